/* The compiled products without Python: for compilers and processors that only a cross compiler and an emulator reach.
 * Prints nothing and returns 0 where every product is right. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int64_t next, done;
} Phase;

int m27_nvfp4_level(void);
const char *m27_nvfp4_level_name(int level);
void m27_nvfp4_prepare(const uint8_t *codes, const uint8_t *scales, int64_t N, int64_t K, uint8_t *out_codes,
                       uint8_t *out_scales, int64_t block0, int64_t block1);
void m27_nvfp4_unpack(const uint8_t *codes, const uint8_t *scales, int64_t K, const float *global, float *out,
                      int64_t row0, int64_t row1);
void m27_nvfp4_gemm(int level, const void *x, int is_bf16, int64_t T, int64_t N, int64_t K, const uint8_t *codes,
                    const uint8_t *scales, const float *global, const float *input_scale, uint8_t *panel,
                    double *factor, void *y, Phase *phases);
void m27_nvfp4_moe(int level, const void *x, int is_bf16, int64_t T, int64_t D, int64_t I, int64_t K, int64_t E,
                   int64_t first, const int64_t *experts, const float *weights, const uint8_t *codes1,
                   const uint8_t *scales1, const uint8_t *codes2, const uint8_t *scales2, const uint8_t *codes3,
                   const uint8_t *scales3, const float *globals, const float *input_scales, uint8_t *panel1,
                   uint8_t *panel2, double *factors, void *act, float *out, void *y, int64_t *words);

enum { N = 37, K = 80, T_MOST = 9, BLOCKS = (N + 15) / 16, D = 48, I = 32 };

static uint32_t state = 1;

static uint32_t bits(void) { return (state = state * 1664525u + 1013904223u) >> 8; }

static float uniform(void) { return (float)(bits() % 4001) / 1000.0f - 2.0f; }

static void expect(int holds, const char *what, int level, int T) {
    if (holds) return;
    printf("%s: wrong at level %s, %d tokens\n", what, m27_nvfp4_level_name(level), T);
    exit(1);
}

static double e4m3(int code) {
    int e = code >> 3 & 15, m = code & 7;
    return (code & 128 ? -1 : 1) * (e ? ldexp(8 + m, e - 10) : ldexp(m, -9));
}

static double e2m1(int code) {
    static const double VALUES[8] = {0, .5, 1, 1.5, 2, 3, 4, 6};
    return code & 8 ? -VALUES[code & 7] : VALUES[code & 7];
}

static double nearest(double y) { /* ties to even: thresholds as in the format's definition */
    static const double VALUES[8] = {0, .5, 1, 1.5, 2, 3, 4, 6};
    double a = fabs(y);
    int code = (a > .25) + (a >= .75) + (a > 1.25) + (a >= 1.75) + (a > 2.5) + (a >= 3.5) + (a > 5);
    return y < 0 ? -VALUES[code] : VALUES[code];
}

/* What W4A4 makes of 16 numbers under scale 1: the block scale is the power of two that it is made to be. */
static void quantize(const float *x, double scale, double *out) {
    for (int i = 0; i < 16; i++) out[i] = nearest(x[i] / scale) * scale;
}

static void products(int level) {
    static uint8_t codes[N * K / 2], scales[N * K / 16], to_codes[BLOCKS * K * 8], to_scales[BLOCKS * K];
    static uint8_t panel[T_MOST * K * 4];
    static float x[T_MOST * K], y[T_MOST * N], alone[N], unpacked[N * K];
    static double w[N * K], quantized[T_MOST * K], factor[T_MOST];
    float global = 0.125f, one = 1.0f;
    for (int i = 0; i < N * K / 2; i++) codes[i] = (uint8_t)bits();
    for (int i = 0; i < N * K / 16; i++) scales[i] = (uint8_t)(bits() % 127 | (bits() & 1) << 7);
    for (int n = 0; n < N; n++)
        for (int k = 0; k < K; k++)
            w[n * K + k] = e2m1(codes[(n * K + k) / 2] >> k % 2 * 4 & 15) * e4m3(scales[(n * K + k) / 16]) * global;
    for (int i = 0; i < T_MOST * K; i++) x[i] = uniform() * 0.5f;
    for (int g = 0; g < T_MOST * K / 16; g++) { /* 6 * 2^e is in each group: its block scale is 2^e */
        double scale = ldexp(1, (int)(bits() % 6) - 2);
        x[g * 16 + bits() % 16] = (float)(6 * scale);
        quantize(x + g * 16, scale, quantized + g * 16);
    }
    m27_nvfp4_prepare(codes, scales, N, K, to_codes, to_scales, 0, BLOCKS);
    m27_nvfp4_unpack(to_codes, to_scales, K, &global, unpacked, 0, N);
    for (int i = 0; i < N * K; i++) expect(unpacked[i] == (float)w[i], "unpack", level, 0);
    for (int T = 1; T <= T_MOST; T++)
        for (int mode = 0; mode < 2; mode++) {
            const float *input_scale = mode ? &one : NULL;
            Phase phases[2] = {{0, 0}, {0, 0}};
            m27_nvfp4_gemm(level, x, 0, T, N, K, to_codes, to_scales, &global, input_scale, panel, factor, y, phases);
            for (int t = 0; t < T; t++)
                for (int n = 0; n < N; n++) {
                    double sum = 0, most = 0;
                    for (int k = 0; k < K; k++) {
                        double v = (mode ? quantized[t * K + k] : x[t * K + k]) * w[n * K + k];
                        sum += v;
                        most += fabs(v);
                    }
                    expect(fabs(y[t * N + n] - sum) <= 1e-6 * most, mode ? "W4A4" : "W4A16", level, T);
                }
            Phase again[2] = {{0, 0}, {0, 0}};
            m27_nvfp4_gemm(level, x + (T - 1) * K, 0, 1, N, K, to_codes, to_scales, &global, input_scale, panel, factor,
                           alone, again);
            expect(!memcmp(alone, y + (T - 1) * N, sizeof alone), "a row alone", level, T);
        }
}

static void experts(int level) {
    enum { E = 3, SLOTS = 2 * T_MOST };
    static uint8_t codes[3][E * D * I / 2], scales[3][E * D * I / 16];
    static uint8_t panel1[SLOTS * D * 4], panel2[SLOTS * I * 4];
    static float x[T_MOST * D], y[T_MOST * D], weights[SLOTS], globals[E * 3], act[SLOTS * I], out[SLOTS * D];
    static float w[3][D * I];
    static double factors[2 * SLOTS];
    static int64_t chosen[SLOTS], words[12 + 5 * SLOTS + 3 * E + 4];
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < E * D * I / 2; j++) codes[i][j] = (uint8_t)bits();
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < E * D * I / 16; j++) scales[i][j] = (uint8_t)(40 + bits() % 20);
    for (int i = 0; i < E * 3; i++) globals[i] = 0.05f + (float)(bits() % 100) / 1000;
    for (int i = 0; i < T_MOST * D; i++) x[i] = uniform();
    for (int i = 0; i < SLOTS; i++) {
        chosen[i] = (int64_t)(bits() % (E + 1)) - 1;
        weights[i] = uniform();
    }
    memset(words, 0, sizeof words);
    m27_nvfp4_moe(level, x, 0, T_MOST, D, I, 2, E, 0, chosen, weights, codes[0], scales[0], codes[1], scales[1],
                  codes[2], scales[2], globals, NULL, panel1, panel2, factors, act, out, y, words);
    double wanted[T_MOST * D] = {0}, most = 0;
    for (int s = 0; s < SLOTS; s++) {
        int64_t e = chosen[s];
        if (e < 0) continue;
        for (int i = 0; i < 3; i++)
            m27_nvfp4_unpack(codes[i] + e * D * I / 2, scales[i] + e * D * I / 16, i == 1 ? I : D, &globals[3 * e + i],
                             w[i], 0, i == 1 ? D : I);
        double hidden[I];
        for (int i = 0; i < I; i++) {
            double gate = 0, up = 0;
            for (int d = 0; d < D; d++) {
                gate += (double)x[s / 2 * D + d] * w[0][i * D + d];
                up += (double)x[s / 2 * D + d] * w[2][i * D + d];
            }
            hidden[i] = gate / (1 + exp(-gate)) * up;
        }
        for (int d = 0; d < D; d++)
            for (int i = 0; i < I; i++) wanted[s / 2 * D + d] += weights[s] * hidden[i] * w[1][d * I + i];
    }
    for (int i = 0; i < T_MOST * D; i++) most = fmax(most, fabs(wanted[i]));
    for (int i = 0; i < T_MOST * D; i++) expect(fabs(y[i] - wanted[i]) <= 2e-6 * most, "experts", level, T_MOST);
}

int main(void) {
    for (int level = 0; level <= m27_nvfp4_level(); level++) {
        products(level);
        experts(level);
    }
    return 0;
}
