/* Dots for AVX-512 with VNNI, and with BF16 pairs: a vector holds the 16 rows of a block. */
#include "nvfp4.h"

#ifdef NVFP4_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define TARGET_BF16 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")))
#define UNROLL _Pragma("GCC unroll 16")

/* E4M3 bytes to F32: the bits of an F32 number 2^120 times too small, subnormal ones included. */
TARGET M27_INLINE __m512 scales_of(const uint8_t *scales) {
    __m512i s = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)scales));
    s = _mm512_and_si512(_mm512_slli_epi32(s, 20), _mm512_set1_epi32((int)0x87F00000));
    return _mm512_mul_ps(_mm512_castsi512_ps(s), _mm512_set1_ps(0x1p120f));
}

TARGET M27_INLINE void store(int T, const __m512 *sum, float *out) {
    UNROLL for (int t = 0; t < T; t++) _mm512_storeu_ps(out + t * ROWS, sum[t]);
}

/* A permutation reads the lowest four bits of each lane: the code that was shifted there. */
TARGET M27_INLINE void f32(const int T, const uint8_t *codes, const uint8_t *scales, int64_t num_groups,
                           const void *panel, float *out) {
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 6, 8, 12, -0.f, -1, -2, -3, -4, -6, -8, -12);
    const float *x = panel;
    __m512 sum[TILE];
    UNROLL for (int t = 0; t < T; t++) sum[t] = _mm512_setzero_ps();
    for (int64_t g = 0; g < num_groups; g++, codes += GROUP_BYTES, scales += ROWS, x += GROUP * T) {
        __m512 part[TILE];
        UNROLL for (int i = 0; i < GROUP; i++) {
            __m512i word = _mm512_loadu_si512(codes + i / 8 * 64);
            __m512 w = _mm512_permutexvar_ps(_mm512_srli_epi32(word, i % 4 * 8 + i % 8 / 4 * 4), table);
            UNROLL for (int t = 0; t < T; t++) {
                __m512 v = _mm512_set1_ps(x[i * T + t]);
                part[t] = i ? _mm512_fmadd_ps(w, v, part[t]) : _mm512_mul_ps(w, v);
            }
        }
        fetch_ahead(codes, scales);
        __m512 scale = scales_of(scales);
        UNROLL for (int t = 0; t < T; t++) sum[t] = _mm512_fmadd_ps(scale, part[t], sum[t]);
    }
    store(T, sum, out);
}

/* Both halves of a lane at once.  Their permutation reads five bits, so the table is there twice. */
TARGET_BF16 M27_INLINE void bf16(const int T, const uint8_t *codes, const uint8_t *scales, int64_t num_groups,
                                 const void *panel, float *out) {
    const __m256i half = _mm256_setr_epi16(0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40C0, 0x4100, 0x4140, (short)0x8000,
                                           (short)0xBF80, (short)0xC000, (short)0xC040, (short)0xC080, (short)0xC0C0,
                                           (short)0xC100, (short)0xC140);
    const __m512i table = _mm512_broadcast_i64x4(half);
    const uint32_t *x = panel;
    __m512 sum[TILE];
    UNROLL for (int t = 0; t < T; t++) sum[t] = _mm512_setzero_ps();
    for (int64_t g = 0; g < num_groups; g++, codes += GROUP_BYTES, scales += ROWS, x += GROUP / 2 * T) {
        __m512 part[TILE];
        UNROLL for (int t = 0; t < T; t++) part[t] = _mm512_setzero_ps();
        UNROLL for (int i = 0; i < GROUP / 2; i++) {
            __m512i word = _mm512_loadu_si512(codes + i / 4 * 64);
            __m512bh w = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi32(word, i % 4 * 4), table);
            UNROLL for (int t = 0; t < T; t++)
                part[t] = _mm512_dpbf16_ps(part[t], w, (__m512bh)_mm512_set1_epi32((int)x[i * T + t]));
        }
        fetch_ahead(codes, scales);
        __m512 scale = scales_of(scales);
        UNROLL for (int t = 0; t < T; t++) sum[t] = _mm512_fmadd_ps(scale, part[t], sum[t]);
    }
    store(T, sum, out);
}

/* Integer products: the sum of a group is exact, and so is its product with both block scales (12 + 8 bits).
 * VNNI wants one side unsigned: weights count 12 more, which word 4 of a group takes back. */
TARGET M27_INLINE void int8(const int T, const uint8_t *codes, const uint8_t *scales, int64_t num_groups,
                            const void *panel, float *out) {
    const __m512i table = _mm512_broadcast_i32x4(
        _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    const __m512i low = _mm512_set1_epi8(15);
    const int32_t *x = panel;
    __m512 sum[TILE];
    UNROLL for (int t = 0; t < T; t++) sum[t] = _mm512_setzero_ps();
    for (int64_t g = 0; g < num_groups; g++, codes += GROUP_BYTES, scales += ROWS, x += 6 * T) {
        __m512i w[4];
        UNROLL for (int i = 0; i < 4; i++) {
            __m512i word = _mm512_loadu_si512(codes + i / 2 * 64);
            w[i] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(word, i % 2 * 4), low));
        }
        fetch_ahead(codes, scales);
        __m512 scale = scales_of(scales);
        UNROLL for (int t = 0; t < T; t++) {
            __m512i part = _mm512_set1_epi32(x[4 * T + t]);
            UNROLL for (int i = 0; i < 4; i++) part = _mm512_dpbusd_epi32(part, w[i], _mm512_set1_epi32(x[i * T + t]));
            __m512 both = _mm512_mul_ps(scale, _mm512_castsi512_ps(_mm512_set1_epi32(x[5 * T + t])));
            sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part), both, sum[t]);
        }
    }
    store(T, sum, out);
}

DOTS_OF(TARGET, f32)
DOTS_OF(TARGET_BF16, bf16)
DOTS_OF(TARGET, int8)

const Level nvfp4_avx512 = {"AVX-512 with VNNI", DOTS(f32), {0}, DOTS(int8)};
const Level nvfp4_avx512_bf16 = {"AVX-512 with VNNI and BF16", DOTS(f32), DOTS(bf16), DOTS(int8)};
#endif
