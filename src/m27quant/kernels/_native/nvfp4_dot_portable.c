/* Dots in portable C: vectors of 16 bytes hold 4 rows, a block is done in quarters.  NEON's and SSE2's width. */
#include "nvfp4.h"

#define UNROLL _Pragma("GCC unroll 8")
#define LANES 4

typedef Bytes16 Bytes;
typedef int16_t Shorts __attribute__((vector_size(16)));
typedef int32_t Words __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));

/* a * b + c: rounded once where the machine can, as with AVX; else twice. */
M27_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

M27_INLINE Floats to_floats(Words x) { return __builtin_convertvector(x, Floats); }

/* E4M3 bytes to F32: the bits of an F32 number 2^120 times too small, subnormal ones included. */
M27_INLINE Floats scales_of(const uint8_t *scales) {
    Words s = {scales[0], scales[1], scales[2], scales[3]};
    return (Floats)((s & 0x7F) << 20 | (s & 0x80) << 24) * 0x1p120f;
}

/* Four columns of 4 rows as 2 * E2M1: those in the low halves, or in the high ones. */
M27_INLINE Bytes decode(const uint8_t *codes, int high) {
    Words word;
    memcpy(&word, codes, sizeof word);
    return e2m1_twice((Bytes)(word >> (high * 4) & 0x0F0F0F0F));
}

/* Few tokens give few sums to work on while others wait for an addition: then two or four quarters go side by side. */
M27_INLINE void f32(const int T, const uint8_t *codes, const uint8_t *scales, int64_t num_groups, const void *panel,
                    float *out) {
    const int quarters = T == 1 ? 4 : T <= 3 ? 2 : 1;
    for (int row = 0; row < ROWS; row += LANES * quarters) {
        const float *x = panel;
        Floats sum[4][TILE];
        UNROLL for (int q = 0; q < quarters; q++)
            UNROLL for (int t = 0; t < T; t++) sum[q][t] = (Floats){0};
        for (int64_t g = 0; g < num_groups; g++, x += GROUP * T) {
            const uint8_t *at = codes + g * GROUP_BYTES + row * 4;
            fetch_ahead(codes + g * GROUP_BYTES, scales + g * ROWS);
            Floats part[4][TILE];
            UNROLL for (int q = 0; q < quarters; q++)
                UNROLL for (int t = 0; t < T; t++) part[q][t] = (Floats){0};
            UNROLL for (int i = 0; i < 4; i++) {
                Words four[4];
                UNROLL for (int q = 0; q < quarters; q++) four[q] = (Words)decode(at + i / 2 * 64 + q * 16, i % 2);
                UNROLL for (int b = 0; b < 4; b++)
                    UNROLL for (int q = 0; q < quarters; q++) { /* byte b to the top, then down with its sign */
                        Floats w = to_floats((Words)((four[q] << (24 - 8 * b)) >> 24));
                        UNROLL for (int t = 0; t < T; t++)
                            part[q][t] = multiply_add(w, (Floats){0} + x[(i * 4 + b) * T + t], part[q][t]);
                    }
            }
            UNROLL for (int q = 0; q < quarters; q++) {
                Floats scale = scales_of(scales + g * ROWS + row + q * LANES);
                UNROLL for (int t = 0; t < T; t++) sum[q][t] = multiply_add(scale, part[q][t], sum[q][t]);
            }
        }
        UNROLL for (int q = 0; q < quarters; q++)
            UNROLL for (int t = 0; t < T; t++) memcpy(out + t * ROWS + row + q * LANES, &sum[q][t], sizeof sum[q][t]);
    }
}

/* Eight bytes to 16 bits each: the even ones, or the odd ones. */
M27_INLINE Shorts widen(Bytes x, int odd) {
    Shorts pairs = (Shorts)x;
    return odd ? pairs >> 8 : (Shorts)(pairs << 8) >> 8;
}

/* Integer products: the sum of a group is exact and fits 16 bits; so is its product with both block scales. */
M27_INLINE void int8(const int T, const uint8_t *codes, const uint8_t *scales, int64_t num_groups, const void *panel,
                     float *out) {
    for (int row = 0; row < ROWS; row += LANES) {
        const int32_t *x = panel;
        Floats sum[TILE];
        UNROLL for (int t = 0; t < T; t++) sum[t] = (Floats){0};
        for (int64_t g = 0; g < num_groups; g++, x += 6 * T) {
            const uint8_t *at = codes + g * GROUP_BYTES + row * 4;
            fetch_ahead(codes + g * GROUP_BYTES, scales + g * ROWS);
            Shorts w[8];
            UNROLL for (int i = 0; i < 4; i++) {
                Bytes four = decode(at + i / 2 * 64, i % 2);
                w[2 * i] = widen(four, 0);
                w[2 * i + 1] = widen(four, 1);
            }
            Floats scale = scales_of(scales + g * ROWS + row);
            UNROLL for (int t = 0; t < T; t++) {
                Shorts part = {0};
                UNROLL for (int i = 0; i < 4; i++) {
                    Bytes four = (Bytes)((Words){0} + x[i * T + t]);
                    part += w[2 * i] * widen(four, 0) + w[2 * i + 1] * widen(four, 1);
                }
                Words pairs = (Words)part; /* two sums for each row */
                Words total = ((Words)(pairs << 16) >> 16) + (pairs >> 16);
                Floats block_scale = (Floats)((Words){0} + x[5 * T + t]);
                sum[t] = sum[t] + to_floats(total) * (scale * block_scale);
            }
        }
        UNROLL for (int t = 0; t < T; t++) memcpy(out + t * ROWS + row, &sum[t], sizeof sum[t]);
    }
}

#define TARGET
DOTS_OF(TARGET, f32)
DOTS_OF(TARGET, int8)

const Level nvfp4_portable = {"portable C", DOTS(f32), {0}, DOTS(int8)};
