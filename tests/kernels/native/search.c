/* The search for block scales without Python, in vectors of every width that the processor has, against all 126 scales
 * as scale_search.py tries them.  Prints nothing and returns 0 where every scale is the first of the best. */
#include <stdio.h>

#include "nvfp4_search.c"

enum { ROWS_ = 36, K_ = 144, COUNT = ROWS_ * K_ / GROUP };

static uint32_t state = 1;

static uint32_t bits(void) { return (state = state * 1664525u + 1013904223u) >> 8; }

static float uniform(void) { return (float)(bits() % 4001) / 1000.0f - 2.0f; }

static double error_of(const float *x, const float *weight, float d) {
    static const float VALUES[8] = {0, .5f, 1, 1.5f, 2, 3, 4, 6};
    double v[GROUP];
    for (int j = 0; j < GROUP; j++) {
        float a = fabsf(x[j]) / d;
        int code = (a > .25f) + (a >= .75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5);
        float y = VALUES[code] * d;
        double r = (double)fabsf(x[j]) - (double)y;
        v[j] = r * r * (weight ? (double)weight[j] : 1.0);
    }
    for (int half = 8; half; half /= 2)
        for (int j = 0; j < half; j++) v[j] += v[j + half];
    return v[0];
}

static uint8_t first_best(const float *x, const float *weight, float ws2) {
    uint8_t best = 0;
    double least = INFINITY;
    for (uint32_t code = 1; code <= SCALES; code++) {
        double e = error_of(x, weight, e4m3_value(code) * ws2);
        if (e < least) least = e, best = (uint8_t)code;
    }
    return best;
}

static int fail(const char *what, int64_t group, int found, int expected) {
    printf("%s: group %d has scale %d, not %d\n", what, (int)group, found, expected);
    return 1;
}

/* Normal and tiny numbers, outliers, ties, zeros: a kind for each group. */
static float draw(int64_t group) {
    float x = uniform() * uniform();
    switch (group % 7) {
    case 0: return ldexpf(x, -(int)(group % 29));
    case 1: return bits() % 16 ? x : x * 100;
    case 2: return (float)(bits() % 25) * 0.25f;
    case 3: return bits() % 16 ? 0.0f : x;
    case 4: return bits() % 2 ? 1.5f : -1.5f;
    default: return x;
    }
}

typedef void Search(const Groups16 *, const Scales *, uint8_t *);

static int check_width(const char *name, Search *search, const float *x, const float *weight, const float *small,
                       const uint8_t *expected, float ws2) {
    static Scales s;
    nvfp4_prepare_scales(&s, ws2);
    Groups16 g;
    uint8_t best[LANES];
    for (int64_t first = 0; first + LANES <= COUNT; first += LANES) {
        for (int l = 0; l < LANES; l++) {
            for (int j = 0; j < GROUP; j++) g.x[j][l] = fabsf(x[(first + l) * GROUP + j]);
            weigh(&g, l, weight, small, (first + l) * GROUP % K_);
        }
        search(&g, &s, best);
        for (int l = 0; l < LANES; l++)
            if (best[l] != expected[first + l]) return fail(name, first + l, best[l], expected[first + l]);
    }
    return 0;
}

int main(void) {
    static uint16_t bf16[COUNT * GROUP];
    static uint8_t fp8[COUNT * GROUP], codes[COUNT * GROUP / 2], found[COUNT], expected[COUNT];
    static float x[COUNT * GROUP], weight[K_];
    static const float AMAX[] = {6.0f, 400.0f, 0.3f, 0x1p-110f};
    const float scale_inv[4] = {0.01f, 0.003f, 1.0f, 0.0f};
    for (int k = 0; k < K_; k++) weight[k] = bits() % 5 ? ldexpf(uniform() + 2.001f, (int)(bits() % 9)) : 0.0f;
    float *small = small_weights(weight, K_);
    for (int a = 0; a < 4; a++)
        for (int weighted = 0; weighted < 1 + (a == 0); weighted++) {
            const float ws2 = AMAX[a] / 2688.0f, *w = weighted ? weight : NULL;
            for (int64_t i = 0; i < COUNT * GROUP; i++) {
                bf16[i] = bf16_bits(draw(i / GROUP) * (a == 3 ? 0x1p-112f : 1.0f));
                x[i] = bf16_value(bf16[i]);
            }
            for (int64_t g = 0; g < COUNT; g++)
                expected[g] = first_best(x + g * GROUP, w ? w + g * GROUP % K_ : NULL, ws2);
            if (check_width("width 4", search_4, x, w, small, expected, ws2)) return 1;
#if defined(__x86_64__) && defined(__GNUC__)
            if (__builtin_cpu_supports("avx2") && check_width("width 8", search_8, x, w, small, expected, ws2)) return 1;
            if (__builtin_cpu_supports("avx512vl") && check_width("width 16", search_16, x, w, small, expected, ws2))
                return 1;
#endif
            m27_search_bf16(bf16, K_, ws2, w, codes, found, 0, ROWS_);
            for (int64_t g = 0; g < COUNT; g++)
                if (found[g] != expected[g]) return fail("BF16", g, found[g], expected[g]);

            for (int64_t i = 0; i < COUNT * GROUP; i++) {
                int code = (int)(64.0f + 20.0f * uniform());
                fp8[i] = (uint8_t)(code | (int)(bits() & 1) << 7);
                x[i] = bf16_value(bf16_bits(e4m3_value((uint32_t)code) * scale_inv[i / K_ / 34 * 2 + i % K_ / 128]));
            }
            m27_search_fp8(fp8, scale_inv, K_, 34, 128, ws2, w, codes, found, 0, ROWS_);
            for (int64_t g = 0; g < COUNT; g++) {
                int best = first_best(x + g * GROUP, w ? w + g * GROUP % K_ : NULL, ws2);
                if (found[g] != best) return fail("FP8", g, found[g], best);
            }
        }
    free(small);
    return 0;
}
