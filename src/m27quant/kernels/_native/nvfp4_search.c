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
        s->inverse[code] = 1.0f / s->step[code];
    }
    for (int code = SCALES + 1; code < SCALES + 16; code++) s->step[code] = s->inverse[code] = 1.0f;
    s->step[0] = s->inverse[0] = 1.0f;
}

M27_INLINE v16 choose16(v16i condition, v16 a, v16 b) {
    return (v16)(((v16i)a & condition) | ((v16i)b & ~condition));
}

/* Sixteen candidates at a time, lane by lane: the error of a group in F32.  To the nearest E2M1 number by adding and
 * taking away 1.5 * 2^23 steps, where a step is half of the power of two below t, and 1/2 below 2. */
M27_INLINE v16 errors16(const float *x, const float *weight, v16 step, v16 inverse) {
    v16 sum = {0};
    for (int j = 0; j < GROUP; j++) {
        v16 t = x[j] * inverse;
        v16 power = (v16)((v16i)t & 0x7F800000);
        v16 magic = choose16(power > 1.0f, power, splat(1.0f)) * 0x1.8p22f;
        v16 q = (t + magic) - magic;
        q = choose16(q < 6.0f, q, splat(6.0f));
        v16 r = x[j] - q * step;
        sum += weight ? r * r * weight[j] : r * r;
    }
    return sum;
}

M27_INLINE float weighted_sum(v16 r, const float *weight) {
    v16 squares = r * r;
    if (weight) squares *= load16(weight);
    float v[GROUP];
    store16(v, squares);
    return sum_lanes(v);
}

M27_INLINE v16 positive(v16 r) { return choose16(r > 0.0f, r, splat(0.0f)); }

/* Below the error of every scale that is at most as large: what lies beyond 6 d is clipped. */
M27_INLINE float clipped(const float *x, const float *weight, float step) {
    return weighted_sum(positive(load16(x) - 6.0f * step), weight);
}

/* Below the error of every scale that is at least as large: what lies below d/2 becomes 0 or d/2 or more. */
M27_INLINE float coarse(const float *x, const float *weight, float step) {
    v16 near = load16(x), far = 0.5f * step - near;
    return weighted_sum(positive(choose16(far < near, far, near)), weight);
}

/* Errors in F32 of the candidates from `low` to `high` - 1; the others are known to be worse. */
typedef struct {
    int32_t error[SCALES + 1 + 16]; /* bits of the numbers, which are ordered as they are */
    int low, high;
    float most; /* a candidate above it is not the best */
} Window;

M27_INLINE void look16(Window *w, const float *x, const float *weight, const Scales *s, int at) {
    v16 e = errors16(x, weight, load16(s->step + at), load16(s->inverse + at));
    memcpy(w->error + at, &e, sizeof e);
    int32_t least = INT32_MAX;
    for (int i = 0; i < 16; i++) least = w->error[at + i] < least ? w->error[at + i] : least;
    float most = f32_from_bits((uint32_t)least) * MARGIN + SPECK;
    w->most = most < w->most ? most : w->most;
}

/* The first of the best among the candidates in the window that may be it. */
M27_INLINE int first_best(const Block16 *b, const Scales *s, const Window *w) {
    int32_t most = (int32_t)f32_bits(w->most), count = 0, sum = 0;
    for (int at = w->low; at < w->high; at += 16) {
        int first = at > w->high - 16 ? w->high - 16 : at; /* what is looked at twice counts as several */
        for (int i = 0; i < 16; i++) {
            int32_t may = w->error[first + i] <= most;
            count += may;
            sum += may ? first + i : 0;
        }
    }
    if (count == 1) return sum;
    int best = 0;
    double least = INFINITY;
    for (int code = w->low; code < w->high; code++) {
        if (w->error[code] > most) continue;
        double e = exact_error(b, s->of + code);
        if (e < least) least = e, best = code;
    }
    return best;
}

M27_INLINE int best_scale(const Block16 *b, const Scales *s) {
    Window w;
    w.most = INFINITY;
    float x[GROUP];
    uint32_t most = 0; /* magnitudes are ordered as their bits are */
    for (int j = 0; j < GROUP; j++) {
        uint32_t bits = f32_bits(b->x[j]);
        most = bits > most ? bits : most;
        x[j] = b->x[j] * s->unit;
    }
    float largest = f32_from_bits(most) * s->unit;
    if (s->unit == 0.0f || largest > FARTHEST) { /* rare: each candidate may be the best */
        memset(w.error, 0, sizeof w.error);
        w.low = 1, w.high = SCALES + 1;
        return first_best(b, s, &w);
    }
    float six = largest / (6.0f * s->ws2 * s->unit);
    six = six < 0x1p-9f ? 0x1p-9f : six > 448.0f ? 448.0f : six;
    w.low = e4m3_code(six) - 3; /* smaller ones clip too much, as good as always; 16 reach two octaves */
    w.low = w.low < 1 ? 1 : w.low > SCALES - 15 ? SCALES - 15 : w.low;
    w.high = w.low;
    do {
        int at = w.high > SCALES - 15 ? SCALES - 15 : w.high;
        look16(&w, x, b->small_weight, s, at);
        w.high = at + 16;
    } while (w.high <= SCALES && coarse(x, b->small_weight, s->step[w.high]) <= w.most);
    while (w.low > 1 && clipped(x, b->small_weight, s->step[w.low - 1]) <= w.most) {
        w.low = w.low > 16 ? w.low - 16 : 1;
        look16(&w, x, b->small_weight, s, w.low);
    }
    return first_best(b, s, &w);
}

M27_CLONES static int search_bf16(const uint16_t *weight, int64_t K, const Scales *s, const float *channel,
                                  const float *small_channel, uint8_t *codes, uint8_t *scales, int64_t row0,
                                  int64_t row1) {
    Steps16 steps[SCALES + 1];
    for (int c = 0; c <= SCALES; c++) steps[c].ready = 0;
    for (int64_t n = row0; n < row1; n++)
        for (int64_t k = 0; k < K; k += GROUP) {
            const uint16_t *p = weight + n * K + k;
            if (group_most_bf16(p) >= MAGNITUDES) return 0;
            Block16 b = {{0}, channel ? channel + k : NULL, channel ? small_channel + k : NULL};
            for (int j = 0; j < GROUP; j++) b.x[j] = bf16_value(p[j] & 0x7FFF);
            int code = best_scale(&b, s);
            Steps16 *e = steps + code;
            if (!e->ready) {
                e->scale = (uint8_t)code;
                fill_bf16_under_scale(e, s->ws2);
            }
            uint8_t *out = codes + (n * K + k) / 2;
            encode_bf16(p, e, out);
            encode_bf16(p + GROUP / 2, e, out + GROUP / 4);
            scales[(n * K + k) / GROUP] = (uint8_t)code;
        }
    return 1;
}

M27_CLONES int nvfp4_best_scale(const Block16 *b, const Scales *s) { return best_scale(b, s); }

/* The scales of a block's groups, one by one; 0 where it holds a NaN or Inf. */
M27_INLINE int scales_of_block(const uint8_t *weight, int64_t K, const double *value, const Scales *s,
                               const float *channel, const float *small_channel, int64_t top, int64_t bottom,
                               int64_t left, int64_t right, uint8_t *scales) {
    float magnitude[CODES];
    for (int c = 0; c < CODES; c++) magnitude[c] = (float)value[c];
    for (int64_t n = top; n < bottom; n++)
        for (int64_t k = left; k < right; k += GROUP) {
            const uint8_t *p = weight + n * K + k;
            Block16 b = {{0}, channel ? channel + k : NULL, channel ? small_channel + k : NULL};
            for (int j = 0; j < GROUP; j++) b.x[j] = magnitude[p[j] & 0x7F];
            if (!(magnitude[group_most(p)] < INFINITY)) return 0;
            scales[(n * K + k) / GROUP] = (uint8_t)best_scale(&b, s);
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
