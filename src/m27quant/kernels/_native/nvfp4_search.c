/* NVFP4 packing under the block scales with the least squared error.  See nvfp4_search.h. */
#include "nvfp4_search.h"

#include "nvfp4_bf16.h"

#include <stdlib.h>

#define MARGIN (1.0f + 0x1p-13f) /* more than F32 errors are off, relative to the true ones */
#define SPECK 0x1p-100f          /* more than underflow takes away */
#define FARTHEST 0x1p20f         /* of |x|, in units; no weight has more, unless amax was too small */

void nvfp4_prepare_scales(Scales *s, float ws2) {
    int exponent;
    frexp((double)ws2, &exponent);
    exponent -= 1;
    int plain = exponent >= -100; /* no d and no y is subnormal */
    s->ws2 = ws2;
    s->unit = plain ? (float)ldexp(1.0, -exponent) : 0.0f;
    for (uint32_t code = 1; code <= SCALES; code++) {
        Candidate *c = s->of + code;
        c->d = e4m3_value(code) * ws2;
        for (int k = 0; k < 8; k++) {
            static const float E2M1[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
            double limit = (double)c->d * LIMIT[k];
            float below = (float)limit;
            if ((double)below > limit) below = f32_from_bits(f32_bits(below) - 1);
            c->last[k] = below;
            c->y[k] = E2M1[k] * c->d;
        }
        s->step[code] = plain ? (float)ldexp((double)c->d, -exponent) : 1.0f;
    }
}

/* Of the candidates of lane l the first of the best, by the specification; errors in F32 say which may be it. */
static int exact_best(const Groups16 *given, int l, const Scales *s, int first, int low, int high, const float *error,
                      int stride, float most) {
    float x[GROUP];
    for (int j = 0; j < GROUP; j++) x[j] = given->x[j][l];
    int best = 0;
    double least = INFINITY;
    for (int i = low; i <= high && least > 0.0; i++) {
        if (error && !(error[i * stride] <= most)) continue;
        double e = exact_error(x, given->weight[l], s->of + first + i);
        if (e < least) least = e, best = first + i;
    }
    return best;
}

#define WIDTH 4
#define INLINE M27_INLINE
#define NAME(name) name##_4
#include "nvfp4_search_lanes.h"

static void search_4(const Groups16 *g, const Scales *s, uint8_t *best) {
    for (int l = 0; l < LANES; l += 4) g->weight[0] ? best_scales_4(g, l, s, 1, best) : best_scales_4(g, l, s, 0, best);
}

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#define WIDTH 8
#define INLINE AVX2 M27_INLINE
#define NAME(name) name##_8
#include "nvfp4_search_lanes.h"

AVX2 static void search_8(const Groups16 *g, const Scales *s, uint8_t *best) {
    for (int l = 0; l < LANES; l += 8) g->weight[0] ? best_scales_8(g, l, s, 1, best) : best_scales_8(g, l, s, 0, best);
}

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define WIDTH 16
#define INLINE AVX512 M27_INLINE
#define NAME(name) name##_16
#include "nvfp4_search_lanes.h"

AVX512 static void search_16(const Groups16 *g, const Scales *s, uint8_t *best) {
    g->weight[0] ? best_scales_16(g, 0, s, 1, best) : best_scales_16(g, 0, s, 0, best);
}

void nvfp4_best_scales(const Groups16 *g, const Scales *s, uint8_t *best) {
    if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
        search_16(g, s, best);
    else if (__builtin_cpu_supports("avx2"))
        search_8(g, s, best);
    else
        search_4(g, s, best);
}
#else
void nvfp4_best_scales(const Groups16 *g, const Scales *s, uint8_t *best) { search_4(g, s, best); }
#endif

M27_INLINE void weigh(Groups16 *g, int lane, const float *channel, const float *small_channel, int64_t k) {
    g->weight[lane] = channel ? channel + k : NULL;
    g->small_weight[lane] = channel ? small_channel + k : NULL;
}

M27_CLONES static int search_bf16(const uint16_t *weight, int64_t K, const Scales *s, const float *channel,
                                  const float *small_channel, uint8_t *codes, uint8_t *scales, int64_t row0,
                                  int64_t row1) {
    Steps16 steps[SCALES + 1];
    for (int c = 0; c <= SCALES; c++) steps[c].ready = 0;
    Groups16 g;
    uint16_t padded[LANES * GROUP] = {0};
    for (int64_t at = row0 * K / GROUP, end = row1 * K / GROUP, k = 0; at < end; at += LANES) {
        const uint16_t *p = weight + at * GROUP;
        int count = end - at < LANES ? (int)(end - at) : LANES;
        if (count < LANES) p = memcpy(padded, p, (size_t)count * GROUP * sizeof *p);
        uint16_t sums = 0; /* bit 15: a magnitude from MAGNITUDES on */
        for (int i = 0; i < LANES * GROUP; i++) sums |= (uint16_t)((p[i] & 0x7FFF) + (0x8000 - MAGNITUDES));
        if (sums & 0x8000) return 0;
        for (int l = 0; l < LANES; l++)
            for (int j = 0; j < GROUP; j++) g.x[j][l] = bf16_value(p[l * GROUP + j] & 0x7FFF);
        for (int l = 0; l < LANES; l++, k = k + GROUP < K ? k + GROUP : 0) weigh(&g, l, channel, small_channel, k);
        uint8_t best[LANES];
        nvfp4_best_scales(&g, s, best);
        for (int l = 0; l < count; l++) {
            Steps16 *e = steps + best[l];
            if (!e->ready) {
                e->scale = best[l];
                fill_bf16_under_scale(e, s->ws2);
            }
            uint8_t *out = codes + (at + l) * (GROUP / 2);
            encode_bf16(p + l * GROUP, e, out);
            encode_bf16(p + l * GROUP + GROUP / 2, e, out + GROUP / 4);
            scales[at + l] = best[l];
        }
    }
    return 1;
}

/* The scales of a block's groups without tables; 0 where it holds a NaN or Inf. */
M27_INLINE int scales_of_block(const uint8_t *weight, int64_t K, const double *value, const Scales *s,
                               const float *channel, const float *small_channel, int64_t top, int64_t bottom,
                               int64_t left, int64_t right, uint8_t *scales) {
    float magnitude[CODES];
    for (int c = 0; c < CODES; c++) magnitude[c] = (float)value[c];
    int64_t across = (right - left) / GROUP, count = (bottom - top) * across;
    Groups16 g;
    for (int64_t first = 0; first < count; first += LANES) {
        uint8_t *out[LANES], best[LANES];
        for (int l = 0; l < LANES; l++) {
            int64_t i = first + l < count ? first + l : count - 1;
            int64_t k = left + i % across * GROUP, at = (top + i / across) * K + k;
            const uint8_t *p = weight + at;
            if (!(magnitude[group_most(p)] < INFINITY)) return 0;
            for (int j = 0; j < GROUP; j++) g.x[j][l] = magnitude[p[j] & 0x7F];
            weigh(&g, l, channel, small_channel, k);
            out[l] = scales + at / GROUP;
        }
        nvfp4_best_scales(&g, s, best);
        for (int l = 0; l < LANES; l++) *out[l] = best[l];
    }
    return 1;
}

/* `tables`: of nvfp4_new_tables() or NULL. */
M27_CLONES static int search_fp8(const uint8_t *weight, const float *scale_inv, int64_t K, int64_t block_n,
                                 int64_t block_k, const Scales *s, const float *channel,
                                 const float *small_channel, uint8_t *codes, uint8_t *scales, int64_t row0,
                                 int64_t row1, void *tables) {
    int64_t J = (K + block_k - 1) / block_k;
    Steps steps[SCALES + 1];
    double value[CODES];
    for (int64_t top = row0, bottom; top < row1; top = bottom) {
        bottom = block_end(top, block_n, row1);
        for (int64_t left = 0, right; left < K; left = right) {
            right = block_end(left, block_k, K);
            block_values(scale_inv[top / block_n * J + left / block_k], value);
            int found = tables ? nvfp4_search_block(tables, s, weight, K, value, top, bottom, left, right, scales) : -1;
            if (found < 0)
                found = scales_of_block(weight, K, value, s, channel, small_channel, top, bottom, left, right, scales);
            if (!found) return 0;
            for (int c = 0; c <= SCALES; c++) steps[c].state = 0;
            for (int64_t n = top; n < bottom; n++)
                for (int64_t k = left; k < right; k += GROUP) {
                    Steps *e = steps + scales[(n * K + k) / GROUP];
                    if (!e->state) {
                        e->scale = (uint8_t)(e - steps);
                        fill_under_scale(e, value, s->ws2);
                    }
                    uint64_t word = nibbles(codes_fp8(weight + n * K + k, e));
                    memcpy(codes + (n * K + k) / 2, &word, sizeof word);
                }
        }
    }
    return 1;
}

/* ---- what the loader calls: rows [row0, row1); for FP8 block_k is a multiple of 16 ---------------------- */

/* Weights of each group times a power of two, so that the largest lies in [1/2, 1). */
static float *small_weights(const float *channel, int64_t K) {
    float *small = malloc((size_t)K * sizeof *small);
    for (int64_t k = 0; small && k < K; k += GROUP) {
        float largest = 0.0f;
        int exponent;
        for (int j = 0; j < GROUP; j++) largest = channel[k + j] > largest ? channel[k + j] : largest;
        frexp((double)largest, &exponent);
        for (int j = 0; j < GROUP; j++) small[k + j] = (float)ldexp((double)channel[k + j], -exponent);
    }
    return small;
}

/* As m27_pack_*; `channel` [K] weights the squares of each column, or is NULL. */
M27_EXPORT int m27_search_bf16(const uint16_t *weight, int64_t K, float ws2, const float *channel, uint8_t *codes,
                               uint8_t *scales, int64_t row0, int64_t row1) {
    int finite = -1;
    Scales *s = malloc(sizeof *s);
    float *small = s && channel ? small_weights(channel, K) : NULL;
    if (s && (small || !channel))
        M27_IEEE({
            nvfp4_prepare_scales(s, ws2);
            finite = search_bf16(weight, K, s, channel, small, codes, scales, row0, row1);
        });
    free(small);
    free(s);
    return finite;
}

M27_EXPORT int m27_search_fp8(const uint8_t *weight, const float *scale_inv, int64_t K, int64_t block_n,
                              int64_t block_k, float ws2, const float *channel, uint8_t *codes, uint8_t *scales,
                              int64_t row0, int64_t row1) {
    int finite = -1;
    Scales *s = malloc(sizeof *s);
    float *small = s && channel ? small_weights(channel, K) : NULL;
    void *tables = !channel && nvfp4_has_tables() ? nvfp4_new_tables() : NULL;
    if (s && (small || !channel))
        M27_IEEE({
            nvfp4_prepare_scales(s, ws2);
            finite = search_fp8(weight, scale_inv, K, block_n, block_k, s, channel, small, codes, scales, row0, row1,
                                tables);
        });
    free(tables);
    free(small);
    free(s);
    return finite;
}
