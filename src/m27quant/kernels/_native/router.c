/* The router's choice of experts and their weights.  The specification is router/reference.py. */
#include "vector.h"

/* 1 / (1 + e^-x), the same for an x wherever it stands; no exponential overflows. */
M27_INLINE v16 sigmoid16(v16 x) {
    v16 e = exp16((v16)((v16u)x | 0x80000000u)); /* e^-|x| */
    v16i positive = x >= 0.0f;
    v16 above = (v16)(((v16i)splat(1) & positive) | ((v16i)e & ~positive));
    return above / (1.0f + e);
}

/* In the order of the choice a NaN stands above all numbers. */
M27_INLINE int is_larger(float a, float b) { return a > b || (a != a && b == b); }

M27_CLONES static void select_rows(const float *logits, const float *bias, int64_t E, int64_t k, int64_t *experts,
                                   float *weights, float *wish, int64_t first, int64_t end) {
    for (int64_t t = first; t < end; t++) {
        const float *x = logits + t * E;
        int64_t *chosen = experts + t * k;
        float *weight = weights + t * k, total = 0;
        for (int64_t e = 0; e < E; e += 16) {
            float part[16] = {0};
            int64_t n = E - e < 16 ? E - e : 16;
            memcpy(part, x + e, (size_t)n * sizeof *part);
            store16(part, sigmoid16(load16(part)));
            for (int64_t j = 0; j < n; j++) wish[e + j] = part[j] + bias[e + j];
        }
        for (int64_t slot = 0; slot < k; slot++) {
            int64_t best = -1;
            for (int64_t e = 0; e < E; e++) {
                int taken = 0;
                for (int64_t s = 0; s < slot; s++) taken |= chosen[s] == e;
                if (!taken && (best < 0 || is_larger(wish[e], wish[best]))) best = e;
            }
            chosen[slot] = best;
            float one[16];
            store16(one, sigmoid16(splat(x[best])));
            weight[slot] = one[0];
            total = slot ? total + one[0] : one[0];
        }
        for (int64_t slot = 0; slot < k; slot++) weight[slot] /= total;
    }
}

/* Rows [first, end) of logits [T, E] to experts and weights [T, k]; `wish`: room for E numbers. */
M27_EXPORT void m27_router_select(const float *logits, const float *bias, int64_t E, int64_t k, int64_t *experts,
                                  float *weights, float *wish, int64_t first, int64_t end) {
    M27_IEEE(select_rows(logits, bias, E, k, experts, weights, wish, first, end));
}
