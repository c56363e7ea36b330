/* The arithmetic of attention on one chunk of keys: scores, weights, weighted values, and two states merged.
 *
 * A state is what some keys of a list give: their largest score m, the sum l of exp(score - m), and from HEADER on the
 * sum of exp(score - m) v.  `width` is a multiple of 16. */
#ifndef M27QUANT_ATTENTION_CHUNK_H
#define M27QUANT_ATTENTION_CHUNK_H

#include "vector.h"

#define CHUNK 64
#define HEADER 16

typedef float v4 __attribute__((vector_size(16)));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t v4i __attribute__((vector_size(16)));
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (v4i){i, j, k, l})
#endif

M27_INLINE float exp1(float x) {
    v16 y = exp16(splat(x));
    return y[0];
}

/* The sums of the lanes of four vectors, each halved four times. */
M27_INLINE v4 sum_lanes4(const v16 *a) {
    v4 s[4];
    for (int i = 0; i < 4; i++) {
        v4 part[4];
        memcpy(part, &a[i], sizeof part);
        s[i] = (part[0] + part[2]) + (part[1] + part[3]);
    }
    v4 x = SHUFFLE(s[0], s[1], 0, 1, 4, 5) + SHUFFLE(s[0], s[1], 2, 3, 6, 7);
    v4 y = SHUFFLE(s[2], s[3], 0, 1, 4, 5) + SHUFFLE(s[2], s[3], 2, 3, 6, 7);
    return SHUFFLE(x, y, 0, 2, 4, 6) + SHUFFLE(x, y, 1, 3, 5, 7);
}

/* score[i] = q[i] k^T for NQ queries, four keys at a time; what lies behind key n is not looked at later. */
M27_INLINE void dots(const float *q, const float *k, int64_t width, int64_t n, float score[][CHUNK], int NQ) {
    for (int64_t key = 0; key < n; key += 4) {
        v16 sum[4][4];
        for (int i = 0; i < NQ; i++)
            for (int j = 0; j < 4; j++) sum[i][j] = (v16){0};
        for (int64_t c = 0; c < width; c += 16) {
            for (int j = 0; j < 4; j++) {
                v16 kj = load16(k + (key + j) * width + c);
                for (int i = 0; i < NQ; i++) sum[i][j] += load16(q + i * width + c) * kj;
            }
        }
        for (int i = 0; i < NQ; i++) {
            v4 s = sum_lanes4(sum[i]);
            memcpy(&score[i][key], &s, sizeof s);
        }
    }
}

/* sum[i] = weights[i] v for NQ queries, the n keys in order; `V` vectors at a time. */
M27_INLINE void weigh(float weights[][CHUNK], const float *v, int64_t width, int64_t n, float *const *sum, int NQ,
                      int V, int64_t c0) {
    v16 acc[4][4];
    for (int i = 0; i < NQ; i++)
        for (int j = 0; j < V; j++) acc[i][j] = (v16){0};
    for (int64_t key = 0; key < n; key++)
        for (int j = 0; j < V; j++) {
            v16 vj = load16(v + key * width + c0 + 16 * j);
            for (int i = 0; i < NQ; i++) acc[i][j] += vj * weights[i][key];
        }
    for (int i = 0; i < NQ; i++)
        for (int j = 0; j < V; j++) store16(sum[i] + c0 + 16 * j, acc[i][j]);
}

/* Scores to weights in place: the largest to m, their sum to l. */
M27_INLINE void soften(float *score, int64_t n, float scale, float *m, float *l) {
    int64_t whole = (n + 15) / 16 * 16;
    for (int64_t i = n; i < whole; i++) score[i] = -INFINITY;
    v16 largest = splat(-INFINITY);
    for (int64_t i = 0; i < whole; i += 16) {
        v16 s = load16(score + i) * scale;
        store16(score + i, s);
        v16i more = s > largest;
        largest = (v16)(((v16i)s & more) | ((v16i)largest & ~more));
    }
    float top = -INFINITY;
    for (int j = 0; j < 16; j++) top = largest[j] > top ? largest[j] : top;
    float origin = top == -INFINITY ? 0 : top;
    v16 total = {0};
    for (int64_t i = 0; i < whole; i += 16) {
        v16 p = exp16(load16(score + i) - origin);
        store16(score + i, p);
        total += p;
    }
    float lane[16];
    store16(lane, total);
    *m = top;
    *l = sum_lanes(lane);
}

/* Adds what came later in the list to a state. */
M27_INLINE void merge_states(float *state, const float *later, int64_t width) {
    float m = state[0] > later[0] ? state[0] : later[0], origin = m == -INFINITY ? 0 : m;
    float a = exp1(state[0] - origin), b = exp1(later[0] - origin);
    state[0] = m;
    state[1] = state[1] * a + later[1] * b;
    for (int64_t c = HEADER; c < HEADER + width; c += 16)
        store16(state + c, load16(state + c) * a + load16(later + c) * b);
}

#endif
