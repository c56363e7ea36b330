/* Shared by the compiled core: which instruction sets it is built for, and the number formats.
 *
 * Portable C11, no intrinsics: inner loops have fixed trip counts and use masks, so that compilers vectorize
 * them for SSE2, AVX2, AVX-512 and NEON alike.  Build with -O3 -ffp-contract=off and never with -ffast-math:
 * each float operation must be rounded once, as the reference in torch does.
 */
#ifndef M27QUANT_CORE_H
#define M27QUANT_CORE_H

#include <fenv.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Raised whenever a signature or a meaning changes; native.py refuses another number. */
#define M27_ABI 5

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the compiled core needs a little-endian machine"
#endif

#define M27_EXPORT __attribute__((visibility("default")))

/* One binary, three x86-64 levels, chosen at load time (GCC 12 names them; the choice is an ifunc of glibc). */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define M27_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define M27_HAS_CLONES 1
#else
#define M27_CLONES
#define M27_HAS_CLONES 0
#endif

#define M27_INLINE static inline __attribute__((always_inline))

/* Runs CALL in IEEE mode, whatever the thread was set to: torch.set_flush_denormal and some libraries switch
 * subnormal numbers off for their thread. */
#define M27_IEEE(CALL)         \
    do {                       \
        fenv_t saved_;         \
        fegetenv(&saved_);     \
        fesetenv(FE_DFL_ENV);  \
        CALL;                  \
        fesetenv(&saved_);     \
    } while (0)

M27_INLINE uint32_t f32_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

M27_INLINE float f32_from_bits(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* E4M3 magnitude code 0..126 to F32, exact; 127 (NaN) becomes NaN. */
M27_INLINE float e4m3_value(uint32_t code) {
    uint32_t normal = (code << 20) + 0x3C000000u;                  /* exponent bias 7 -> 127 */
    uint32_t small = f32_bits((float)(int32_t)code * 0x1p-9f);     /* exponent field 0: code * 2^-9 */
    uint32_t is_small = -(uint32_t)(code < 8), is_nan = -(uint32_t)(code == 127);
    return f32_from_bits((((small & is_small) | (normal & ~is_small)) & ~is_nan) | (0x7FC00000u & is_nan));
}

/* F32 in [2^-9, 448] to the nearest E4M3 code, ties to even. */
M27_INLINE uint8_t e4m3_code(float x) {
    if (x < 0x1p-6f) return (uint8_t)(f32_bits(x + 0x1p14f) - 0x46800000u); /* ulp of 2^14 is 2^-9 */
    uint32_t u = f32_bits(x);
    return (uint8_t)((u + 0x7FFFFu + ((u >> 20) & 1) - 0x3C000000u) >> 20);
}

/* F32 to BF16 bits, nearest, ties to even; NaN becomes 0x7FC0 as in torch. */
M27_INLINE uint16_t bf16_bits(float x) {
    uint32_t u = f32_bits(x);
    uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1)) >> 16;
    uint32_t is_nan = -(uint32_t)((u & 0x7FFFFFFFu) > 0x7F800000u);
    return (uint16_t)((rounded & ~is_nan) | (0x7FC0u & is_nan));
}

M27_INLINE float bf16_value(uint32_t bits) { return f32_from_bits(bits << 16); }

#endif
