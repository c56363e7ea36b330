/* Error feedback without Python: sixteen rows side by side against one row after another, as reference.py says it, and
 * the Cholesky factor by panels against the plain loop.  Prints nothing and returns 0 where every bit is the same. */
#include <stdio.h>
#include <stdlib.h>

#include "core.h"

enum { N = 21, K = 80, G = 16, SCALES = 126 };

void m27_arrange(const double *hessian, const int32_t *order, double added, double *a, int64_t n);
int m27_cholesky(double *a, int64_t n, double least);
void m27_couplings(const double *upper, int64_t n, float *coupling);
int m27_gptq_pack(const uint16_t *weight, int64_t k, float ws2, const int32_t *order, const float *coupling,
                  const float *channel, uint8_t *codes, uint8_t *scales, int64_t row0, int64_t row1);

static uint32_t state = 1;

static double uniform(void) {
    state = state * 1664525u + 1013904223u;
    return (double)(state >> 8) / (1 << 24) - 0.5;
}

static int code_of(float x, float d) {
    float a = fabsf(x) / d;
    return (a > .25f) + (a >= .75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5);
}

static float value_of(float x, float d) {
    static const float VALUES[8] = {0, .5f, 1, 1.5f, 2, 3, 4, 6};
    return copysignf(VALUES[code_of(x, d)] * d, x);
}

static int first_best(const float *x, const float *channel, float ws2) {
    int best = 0;
    double least = INFINITY;
    for (uint32_t code = 1; code <= SCALES; code++) {
        double v[G];
        for (int j = 0; j < G; j++) {
            double r = (double)x[j] - (double)value_of(x[j], e4m3_value(code) * ws2);
            v[j] = r * r * (double)channel[j];
        }
        for (int half = 8; half; half /= 2)
            for (int j = 0; j < half; j++) v[j] += v[j + half];
        if (v[0] < least) least = v[0], best = (int)code;
    }
    return best;
}

/* One row; y [K] by columns. */
static void pack_row(const uint16_t *weight, float ws2, const int32_t *order, const float *coupling,
                     const float *channel, float *y, uint8_t *scales) {
    float fed[K] = {0};
    for (int first = 0; first < K; first += G) {
        const float *within = coupling + first / G * K * G + first * G;
        float x[G], then[G], d = 0;
        int scale = 0;
        for (int stored = 0; stored < 2; stored++) {
            memcpy(then, fed + first, sizeof then);
            for (int j = 0; j < G; j++) {
                float w = bf16_value(weight[order[first + j]]);
                x[j] = w + then[j];
                float value = stored ? value_of(x[j], d) : x[j];
                for (int c = j + 1; c < G; c++) then[c] += (w - value) * within[j * G + c];
            }
            if (!stored) scale = first_best(x, channel + first, ws2), d = e4m3_value((uint32_t)scale) * ws2;
        }
        scales[order[first] / G] = (uint8_t)scale;
        for (int j = 0; j < G; j++) {
            int column = order[first + j];
            y[column] = value_of(x[j], d);
            for (int later = first + G; later < K; later++)
                fed[later] += (bf16_value(weight[column]) - y[column]) *
                              coupling[later / G * K * G + (first + j) * G + later % G];
        }
    }
}

static int check_factor(const double *a, const double *found) {
    double *u = malloc(K * K * sizeof *u);
    int wrong = 0;
    memcpy(u, a, K * K * sizeof *u);
    for (int k = 0; k < K; k++) {
        double root = sqrt(u[k * K + k]);
        for (int i = k; i < K; i++) u[k * K + i] /= root, wrong += u[k * K + i] != found[k * K + i];
        for (int j = k + 1; j < K; j++)
            for (int i = j; i < K; i++) u[j * K + i] -= u[k * K + j] * u[k * K + i];
    }
    free(u);
    return wrong;
}

int main(void) {
    static double hessian[K * K], a[K * K], upper[K * K];
    static float coupling[K * K], channel[K], y[K];
    static uint16_t weight[N * K];
    static uint8_t codes[N * K / 2], scales[N * K / G], expected[K / G];
    static int32_t order[K], last_first[K];
    for (int sample = 0; sample < 2 * K; sample++) {
        double x[K];
        for (int i = 0; i < K; i++) x[i] = uniform() + (i ? x[i - 1] : 0);
        for (int i = 0; i < K; i++)
            for (int j = i; j < K; j++) hessian[i * K + j] += x[i] * x[j];
    }
    for (int i = 0; i < K; i++) order[i] = (i / G + 2) % (K / G) * G + i * 5 % G;
    for (int i = 0; i < K; i++) last_first[K - 1 - i] = order[i];
    for (int i = 0; i < K; i++) channel[i] = 1.0f / (float)(1 + i % G);
    for (int i = 0; i < N * K; i++) weight[i] = bf16_bits((float)(uniform() * uniform()));

    m27_arrange(hessian, last_first, 0.5, a, K);
    memcpy(upper, a, sizeof a);
    if (m27_cholesky(upper, K, 0.25) != 1 || check_factor(a, upper)) return printf("the factor differs\n"), 1;
    m27_couplings(upper, K, coupling);
    float ws2 = 0.25f / 2688;
    if (m27_gptq_pack(weight, K, ws2, order, coupling, channel, codes, scales, 0, N) != 1) return printf("refused\n"), 1;
    for (int n = 0; n < N; n++) {
        pack_row(weight + n * K, ws2, order, coupling, channel, y, expected);
        if (memcmp(expected, scales + n * K / G, sizeof expected)) return printf("row %d: scales differ\n", n), 1;
        for (int k = 0; k < K; k++) {
            float d = e4m3_value(expected[k / G]) * ws2;
            int code = codes[(n * K + k) / 2] >> k % 2 * 4 & 15;
            if (code != (code_of(y[k], d) | (signbit(y[k]) != 0) << 3)) return printf("row %d: column %d differs\n", n, k), 1;
        }
    }
    weight[K + 3] = 0x7F80;
    return m27_gptq_pack(weight, K, ws2, order, coupling, channel, codes, scales, 0, N) != 0;
}
