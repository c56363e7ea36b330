/* Dots for AVX2 with FMA: a vector holds 8 rows, a block is done in two halves. */
#include "nvfp4.h"

#ifdef NVFP4_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma")))
#define UNROLL _Pragma("GCC unroll 8")
#define LANES 8

/* E4M3 bytes to F32: the bits of an F32 number 2^120 times too small, subnormal ones included. */
TARGET M27_INLINE __m256 scales_of(const uint8_t *scales) {
    __m256i s = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)scales));
    s = _mm256_and_si256(_mm256_slli_epi32(s, 20), _mm256_set1_epi32((int)0x87F00000));
    return _mm256_mul_ps(_mm256_castsi256_ps(s), _mm256_set1_ps(0x1p120f));
}

/* Four columns of 8 rows, as bytes: those in the low halves, or in the high ones. */
TARGET M27_INLINE __m256i lookup(__m256i table, const uint8_t *codes, int high) {
    __m256i word = _mm256_loadu_si256((const __m256i *)codes);
    return _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(word, high * 4), _mm256_set1_epi8(15)));
}

/* Few tokens give few sums to work on while others wait for an addition: then both halves go side by side. */
TARGET M27_INLINE void f32(const int T, const uint8_t *codes, const uint8_t *scales, int64_t num_groups,
                           const void *panel, float *out) {
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
    const int halves = T <= 4 ? 2 : 1;
    for (int row = 0; row < ROWS; row += LANES * halves) {
        const float *x = panel;
        __m256 sum[2][TILE];
        UNROLL for (int h = 0; h < halves; h++)
            UNROLL for (int t = 0; t < T; t++) sum[h][t] = _mm256_setzero_ps();
        for (int64_t g = 0; g < num_groups; g++, x += GROUP * T) {
            const uint8_t *at = codes + g * GROUP_BYTES + row * 4;
            fetch_ahead(codes + g * GROUP_BYTES, scales + g * ROWS);
            __m256 part[2][TILE];
            UNROLL for (int h = 0; h < halves; h++)
                UNROLL for (int t = 0; t < T; t++) part[h][t] = _mm256_setzero_ps();
            UNROLL for (int i = 0; i < 4; i++) {
                __m256i four[2];
                UNROLL for (int h = 0; h < halves; h++) four[h] = lookup(table, at + i / 2 * 64 + h * 32, i % 2);
                UNROLL for (int b = 0; b < 4; b++)
                    UNROLL for (int h = 0; h < halves; h++) { /* byte b to the top, then down with its sign */
                        __m256i one = _mm256_srai_epi32(_mm256_slli_epi32(four[h], 24 - 8 * b), 24);
                        __m256 w = _mm256_cvtepi32_ps(one);
                        UNROLL for (int t = 0; t < T; t++)
                            part[h][t] = _mm256_fmadd_ps(w, _mm256_set1_ps(x[(i * 4 + b) * T + t]), part[h][t]);
                    }
            }
            UNROLL for (int h = 0; h < halves; h++) {
                __m256 scale = scales_of(scales + g * ROWS + row + h * LANES);
                UNROLL for (int t = 0; t < T; t++) sum[h][t] = _mm256_fmadd_ps(scale, part[h][t], sum[h][t]);
            }
        }
        UNROLL for (int h = 0; h < halves; h++)
            UNROLL for (int t = 0; t < T; t++) _mm256_storeu_ps(out + t * ROWS + row + h * LANES, sum[h][t]);
    }
}

/* Products of bytes are added in pairs to 16 bits, where a group's sum fits: 4 * 2 * 24 * 12.  As in AVX-512,
 * weights count 12 more, and word 4 of a group takes it back. */
TARGET M27_INLINE void int8(const int T, const uint8_t *codes, const uint8_t *scales, int64_t num_groups,
                            const void *panel, float *out) {
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    for (int row = 0; row < ROWS; row += LANES) {
        const int32_t *x = panel;
        __m256 sum[TILE];
        UNROLL for (int t = 0; t < T; t++) sum[t] = _mm256_setzero_ps();
        for (int64_t g = 0; g < num_groups; g++, x += 6 * T) {
            const uint8_t *at = codes + g * GROUP_BYTES + row * 4;
            fetch_ahead(codes + g * GROUP_BYTES, scales + g * ROWS);
            __m256i w[4];
            UNROLL for (int i = 0; i < 4; i++) w[i] = lookup(table, at + i / 2 * 64, i % 2);
            __m256 scale = scales_of(scales + g * ROWS + row);
            UNROLL for (int t = 0; t < T; t++) {
                __m256i part = _mm256_maddubs_epi16(w[0], _mm256_set1_epi32(x[t]));
                UNROLL for (int i = 1; i < 4; i++)
                    part = _mm256_add_epi16(part, _mm256_maddubs_epi16(w[i], _mm256_set1_epi32(x[i * T + t])));
                part = _mm256_add_epi32(_mm256_madd_epi16(part, _mm256_set1_epi16(1)),
                                        _mm256_set1_epi32(x[4 * T + t]));
                __m256 both = _mm256_mul_ps(scale, _mm256_castsi256_ps(_mm256_set1_epi32(x[5 * T + t])));
                sum[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(part), both, sum[t]);
            }
        }
        UNROLL for (int t = 0; t < T; t++) _mm256_storeu_ps(out + t * ROWS + row, sum[t]);
    }
}

DOTS_OF(TARGET, f32)
DOTS_OF(TARGET, int8)

const Level nvfp4_avx2 = {"AVX2 with FMA", DOTS(f32), {0}, DOTS(int8)};
#endif
