/* y = x w^T with a fixed order of summation: what a row gives does not depend on the other rows, on the tile it is
 * computed in, or on the thread.  The specification is linear/reference.py.
 *
 * One output: 16 F32 lanes run over K, then the lanes are halved four times (lane j adds lane j+8, j+4, j+2, j+1).
 * A step of lane j takes two elements of a BF16 row, 2j and 2j+1 of a stretch of 32, or one of an F32 row, j of a
 * stretch of 16; a row ends in zeros up to a whole stretch.  BF16 x BF16 may use the processor's own dot product of
 * pairs (AVX512_BF16): another rounding, the same for all rows.  Sums wait in memory while a tile's stretch of K is
 * done, so tiles may be cut anywhere.
 */
#include "vector.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#include <immintrin.h>
#define HAS_DPBF16 1
#else
#define HAS_DPBF16 0
#endif

typedef struct {
    const void *x, *w;
    void *y;
    int64_t x_stride, w_stride, T, N, K; /* strides of rows in elements; y is contiguous [T, N] */
    int y_is_bf16;
} Product;

#define ROWS 6     /* rows of w in a tile */
#define STRIP_T 64 /* rows of x that stay in the second-level cache while all of w goes by */
#define STRIP_K 1024 /* elements of the tile's rows of w that stay in the first-level cache */

typedef struct {
    _Alignas(64) float lanes[ROWS][STRIP_T][16];
} Sums;

/* 32 BF16 elements: the even ones and the odd ones, as F32. */
M27_INLINE void load_bf16(const uint16_t *p, v16 *even, v16 *odd) {
    v16u u;
    memcpy(&u, p, sizeof u);
    *even = (v16)(u << 16);
    *odd = (v16)(u & 0xFFFF0000u);
}

M27_INLINE void store(const Product *p, int64_t t, int64_t n, float value) {
    if (p->y_is_bf16)
        ((uint16_t *)p->y)[t * p->N + n] = bf16_bits(value);
    else
        ((float *)p->y)[t * p->N + n] = value;
}

/* Adds NN rows of w times TT rows of x, from k0 to k1; x is F32, laid out by m27_linear_rows. */
M27_INLINE void tile_f32(const Product *p, Sums *sums, int64_t t0, int64_t n0, int64_t k0, int64_t k1, int NN, int TT,
                         int w_is_bf16) {
    v16 sum[ROWS][4];
    for (int n = 0; n < NN; n++)
        for (int t = 0; t < TT; t++) memcpy(&sum[n][t], sums->lanes[n][t0 % STRIP_T + t], sizeof(v16));
    const float *x = (const float *)p->x + t0 * p->x_stride;
    for (int64_t k = k0; k < k1; k += 32) {
        for (int n = 0; n < NN; n++) {
            v16 first, second;
            int64_t at = (n0 + n) * p->w_stride + k, rest = p->K - k;
            if (w_is_bf16) {
                const uint16_t *w = (const uint16_t *)p->w + at;
                uint16_t end[32] = {0};
                if (rest < 32) {
                    memcpy(end, w, (size_t)rest * sizeof *w);
                    w = end;
                }
                load_bf16(w, &first, &second);
            } else {
                const float *w = (const float *)p->w + at;
                float end[32] = {0};
                if (rest < 32) {
                    memcpy(end, w, (size_t)rest * sizeof *w);
                    w = end;
                }
                first = load16(w);
                second = load16(w + 16);
            }
            for (int t = 0; t < TT; t++) {
                sum[n][t] += first * load16(x + t * p->x_stride + k);
                sum[n][t] += second * load16(x + t * p->x_stride + k + 16);
            }
        }
    }
    for (int n = 0; n < NN; n++)
        for (int t = 0; t < TT; t++) memcpy(sums->lanes[n][t0 % STRIP_T + t], &sum[n][t], sizeof(v16));
}

/* All of the rows [n0, n1) of w; TILE(NN, TT) adds to the sums of one tile at (t, n). */
#define OVER_TILES(p, n0, n1, TILE)                                                                        \
    Sums sums;                                                                                             \
    int64_t step = (p)->T <= 4 ? (p)->K : STRIP_K;                                                         \
    for (int64_t strip = 0; strip < (p)->T; strip += STRIP_T) {                                            \
        int64_t end = strip + STRIP_T < (p)->T ? strip + STRIP_T : (p)->T;                                 \
        for (int64_t n = n0, rows; n < n1; n += rows) {                                                    \
            rows = n + ROWS <= n1 ? ROWS : 1;                                                              \
            for (int64_t r = 0; r < rows; r++) memset(sums.lanes[r], 0, (size_t)(end - strip) * sizeof(v16)); \
            for (int64_t k0 = 0; k0 < (p)->K; k0 += step) {                                                \
                int64_t k1 = k0 + step < (p)->K ? k0 + step : (p)->K, t = strip;                           \
                if (rows == ROWS) {                                                                        \
                    for (; t + 4 <= end; t += 4) TILE(ROWS, 4);                                            \
                    for (; t + 2 <= end; t += 2) TILE(ROWS, 2);                                            \
                    for (; t < end; t++) TILE(ROWS, 1);                                                    \
                } else {                                                                                   \
                    for (; t + 4 <= end; t += 4) TILE(1, 4);                                               \
                    for (; t < end; t++) TILE(1, 1);                                                       \
                }                                                                                          \
            }                                                                                              \
            for (int64_t r = 0; r < rows; r++)                                                             \
                for (int64_t t = strip; t < end; t++) store(p, t, n + r, sum_lanes(sums.lanes[r][t - strip])); \
        }                                                                                                  \
    }

#define TILE_BF16(NN, TT) tile_f32(p, &sums, t, n, k0, k1, NN, TT, 1)
#define TILE_F32(NN, TT) tile_f32(p, &sums, t, n, k0, k1, NN, TT, 0)

M27_CLONES static void product_bf16(const Product *p, int64_t n0, int64_t n1) { OVER_TILES(p, n0, n1, TILE_BF16) }
M27_CLONES static void product_f32(const Product *p, int64_t n0, int64_t n1) { OVER_TILES(p, n0, n1, TILE_F32) }

#if HAS_DPBF16
#define DPBF16 __attribute__((target("arch=x86-64-v4,avx512bf16")))

DPBF16 M27_INLINE __m512bh load_pairs(const uint16_t *p, __mmask32 mask) {
    return (__m512bh)_mm512_maskz_loadu_epi16(mask, p);
}

/* Both x and w are BF16 as they lie in memory. */
DPBF16 M27_INLINE void tile_pairs(const Product *p, Sums *sums, int64_t t0, int64_t n0, int64_t k0, int64_t k1, int NN,
                                  int TT) {
    __m512 sum[ROWS][4];
    for (int n = 0; n < NN; n++)
        for (int t = 0; t < TT; t++) sum[n][t] = _mm512_load_ps(sums->lanes[n][t0 % STRIP_T + t]);
    const uint16_t *x = (const uint16_t *)p->x + t0 * p->x_stride, *w = (const uint16_t *)p->w + n0 * p->w_stride;
    for (int64_t k = k0; k < k1; k += 32) {
        __mmask32 mask = p->K - k < 32 ? (1u << (p->K - k)) - 1 : 0xFFFFFFFFu;
        __m512bh right[4];
        for (int t = 0; t < TT; t++) right[t] = load_pairs(x + t * p->x_stride + k, mask);
        for (int n = 0; n < NN; n++) {
            __m512bh left = load_pairs(w + n * p->w_stride + k, mask);
            for (int t = 0; t < TT; t++) sum[n][t] = _mm512_dpbf16_ps(sum[n][t], left, right[t]);
        }
    }
    for (int n = 0; n < NN; n++)
        for (int t = 0; t < TT; t++) _mm512_store_ps(sums->lanes[n][t0 % STRIP_T + t], sum[n][t]);
}

#define TILE_PAIRS(NN, TT) tile_pairs(p, &sums, t, n, k0, k1, NN, TT)
DPBF16 static void product_pairs(const Product *p, int64_t n0, int64_t n1) { OVER_TILES(p, n0, n1, TILE_PAIRS) }
#endif

/* x as kinds 0 and 1 of m27_linear want it: F32 rows of `padded` elements, a multiple of 32, zeros at the end; for
 * weights in BF16 every stretch of 32 has its even elements first.  T rows. */
M27_EXPORT void m27_linear_rows(const void *x, int x_is_bf16, int64_t x_stride, int64_t T, int64_t K, int w_is_bf16,
                                int64_t padded, float *out) {
    for (int64_t t = 0; t < T; t++)
        for (int64_t k = 0; k < padded; k++) {
            int64_t j = k % 32, from = w_is_bf16 ? k - j + 2 * (j % 16) + j / 16 : k, at = t * x_stride + from;
            float value = 0;
            if (from < K) value = x_is_bf16 ? bf16_value(((const uint16_t *)x)[at]) : ((const float *)x)[at];
            out[t * padded + k] = value;
        }
}

/* Outputs [n0, n1) of all rows.  Kind 0: w F32, x prepared; 1: w BF16, x prepared; 2: both BF16 as they lie. */
M27_EXPORT void m27_linear(int kind, const void *x, int64_t x_stride, const void *w, int64_t w_stride, void *y,
                           int y_is_bf16, int64_t T, int64_t N, int64_t K, int64_t n0, int64_t n1) {
    Product p = {x, w, y, x_stride, w_stride, T, N, K, y_is_bf16};
    if (kind == 0) M27_IEEE(product_f32(&p, n0, n1));
    else if (kind == 1) M27_IEEE(product_bf16(&p, n0, n1));
#if HAS_DPBF16
    else M27_IEEE(product_pairs(&p, n0, n1));
#endif
}
