/* NVFP4 packing on a CPU.  The specification, and the meaning of every name, is nvfp4_pack/reference.py.
 *
 * FP8 input needs no arithmetic in its inner loop.  Under one block scale the BF16 magnitude of an element is a
 * non-decreasing function of its 7-bit FP8 code, and so is its E2M1 code once the group's largest magnitude is
 * known.  So for each (block scale, largest FP8 code of the group) the byte of the group's scale and eight
 * limits in FP8 codes follow; they are computed when first met and serve all groups of the block.  A group
 * then costs one byte maximum and eight byte comparisons in 16 lanes.
 *
 * The limits are exact.  With d = weight_scale * weight_scale_2 in F32, "F32(x / d) > B" holds if and only if
 * x / d lies above the middle between B and its successor (at the middle the even one, B, wins), and
 * "F32(x / d) >= B" if and only if it lies above the middle between B and its predecessor.  Such a middle is
 * an odd number of 25 bits times a power of two and d has 24 bits: their product is exact in a double, and
 * x, with the 8 bits of BF16, never equals it.
 */
#include <stdlib.h>

#include "core.h"

#define GROUP 16
#define CODES 128 /* FP8 magnitudes, the last one NaN */

/* Vectors of 16 bytes: the width that every machine has, and one group of FP8 codes. */
typedef int8_t Lanes __attribute__((vector_size(16)));
typedef int16_t Lanes16 __attribute__((vector_size(16)));

/* LIMIT[k] * d is what x must exceed: for y > 0 (the sign bit) with k = 0, for an E2M1 code >= k with k = 1..7. */
static const double LIMIT[8] = {
    0x1p-150, /* half of the smallest positive F32 */
    0.25 + 0x1p-26, 0.75 - 0x1p-25, 1.25 + 0x1p-24, 1.75 - 0x1p-24, 2.5 + 0x1p-23, 3.5 - 0x1p-23, 5.0 + 0x1p-22,
};

/* The scale of a group before it is brought into E4M3's range. */
M27_INLINE float unclamped_scale(float amax, float ws2) {
    float s = amax / (6.0f * ws2);
    return s == 0.0f ? 1.0f : s;
}

/* Adds `groups` to each of the three counts that a group with this largest magnitude belongs to. */
M27_INLINE void count(int64_t *counts, float amax, float ws2, int64_t groups) {
    float s = unclamped_scale(amax, ws2);
    counts[0] += amax == 0.0f ? groups : 0;
    counts[1] += s > 448.0f ? groups : 0;
    counts[2] += s < 0x1p-9f ? groups : 0;
}

M27_INLINE uint8_t scale_code(float amax, float ws2) {
    float s = unclamped_scale(amax, ws2);
    s = s < 0x1p-9f ? 0x1p-9f : s;
    return e4m3_code(s > 448.0f ? 448.0f : s);
}

/* ---- FP8 input ------------------------------------------------------------------------------------------ */

/* What all groups share whose largest FP8 code is the same: an FP8 code c has E2M1 code >= k if c > last[k]. */
typedef struct {
    Lanes last[8]; /* each limit in all lanes */
    uint8_t scale;
    uint8_t state; /* 0 not computed, 1 ready, 2 the group holds a NaN or Inf */
} Steps;

/* BF16 magnitudes of all FP8 codes under one block scale. */
M27_INLINE void block_values(float scale_inv, double *value) {
    for (uint32_t c = 0; c < CODES; c++) value[c] = bf16_value(bf16_bits(e4m3_value(c) * fabsf(scale_inv)));
}

static void fill(Steps *e, const double *value, int most, float ws2) {
    if (!isfinite(value[most])) {
        e->state = 2;
        return;
    }
    e->scale = scale_code((float)value[most], ws2);
    double d = (double)(e4m3_value(e->scale) * ws2), limit[8];
    for (int k = 0; k < 8; k++) limit[k] = d * LIMIT[k];
    /* last[k]: the largest code whose value does not exceed the limit.  Eight binary searches side by side. */
    int last[8] = {0};
    for (int step = CODES / 2; step; step /= 2)
        for (int k = 0; k < 8; k++)
            last[k] += step & -(value[last[k] + step] <= limit[k]); /* false for Inf and NaN */
    for (int k = 0; k < 8; k++) e->last[k] = (Lanes){0} + (int8_t)last[k];
    e->state = 1;
}

M27_INLINE int group_most(const uint8_t *p) {
    uint8_t most = 0;
    for (int i = 0; i < GROUP; i++) {
        uint8_t c = p[i] & 0x7F;
        most = c > most ? c : most;
    }
    return most;
}

/* Sixteen elements to eight bytes: the even element goes to the low nibble. */
M27_INLINE void encode_fp8(const uint8_t *p, const Steps *e, uint8_t *out) {
    Lanes x, c, code = {0};
    memcpy(&x, p, sizeof x);
    c = x & 0x7F;
    for (int k = 1; k < 8; k++) code -= (Lanes)(c > e->last[k]); /* true is -1 */
    code |= (Lanes)(c > e->last[0]) & (Lanes)(x < 0) & 8;
    typedef uint16_t Pairs __attribute__((vector_size(GROUP)));
    typedef uint8_t Bytes __attribute__((vector_size(GROUP / 2)));
    Pairs pair = (Pairs)code;
    Bytes bytes = __builtin_convertvector((pair | (pair >> 4)) & 0xFF, Bytes);
    memcpy(out, &bytes, sizeof bytes);
}

/* A block of an FP8 weight that ends at row `row1` or `column1`: returns where it ends. */
M27_INLINE int64_t block_end(int64_t start, int64_t side, int64_t end) {
    int64_t next = (start / side + 1) * side;
    return next < end ? next : end;
}

M27_CLONES static int pack_fp8(const uint8_t *weight, const float *scale_inv, int64_t K, int64_t block_n,
                               int64_t block_k, float ws2, uint8_t *codes, uint8_t *scales, int64_t row0,
                               int64_t row1) {
    int64_t J = (K + block_k - 1) / block_k;
    Steps steps[CODES];
    double value[CODES];
    for (int64_t top = row0, bottom; top < row1; top = bottom) {
        bottom = block_end(top, block_n, row1);
        for (int64_t left = 0, right; left < K; left = right) {
            right = block_end(left, block_k, K);
            block_values(scale_inv[top / block_n * J + left / block_k], value);
            for (int m = 0; m < CODES; m++) steps[m].state = 0;
            for (int64_t n = top; n < bottom; n++) {
                for (int64_t k = left; k < right; k += GROUP) {
                    const uint8_t *p = weight + n * K + k;
                    __builtin_prefetch(p + block_k); /* a harmless hint where it lies outside */
                    int most = group_most(p);
                    Steps *e = steps + most;
                    if (e->state != 1) {
                        if (e->state == 0) fill(e, value, most, ws2);
                        if (e->state == 2) return 0;
                    }
                    scales[(n * K + k) / GROUP] = e->scale;
                    encode_fp8(p, e, codes + (n * K + k) / 2);
                }
            }
        }
    }
    return 1;
}

/* `most`: K bytes to work in. */
M27_CLONES static float amax_fp8(const uint8_t *weight, const float *scale_inv, int64_t K, int64_t block_n,
                                 int64_t block_k, int64_t row0, int64_t row1, uint8_t *most) {
    int64_t J = (K + block_k - 1) / block_k;
    float amax = 0.0f;
    for (int64_t top = row0, bottom; top < row1; top = bottom) {
        bottom = block_end(top, block_n, row1);
        memset(most, 0, (size_t)K);
        for (int64_t n = top; n < bottom; n++) {
            const uint8_t *p = weight + n * K;
            for (int64_t k = 0; k < K; k++) {
                uint8_t c = p[k] & 0x7F;
                most[k] = c > most[k] ? c : most[k];
            }
        }
        for (int64_t k = 0; k < K; k++) {
            float scale = fabsf(scale_inv[top / block_n * J + k / block_k]);
            float x = bf16_value(bf16_bits(e4m3_value(most[k]) * scale));
            if (isnan(x)) return x;
            amax = x > amax ? x : amax;
        }
    }
    return amax;
}

M27_CLONES static void count_fp8(const uint8_t *weight, const float *scale_inv, int64_t K, int64_t block_n,
                                 int64_t block_k, float ws2, int64_t *counts, int64_t row0, int64_t row1) {
    int64_t J = (K + block_k - 1) / block_k;
    double value[CODES];
    for (int64_t top = row0, bottom; top < row1; top = bottom) {
        bottom = block_end(top, block_n, row1);
        for (int64_t left = 0, right; left < K; left = right) {
            right = block_end(left, block_k, K);
            int64_t groups[CODES] = {0};
            for (int64_t n = top; n < bottom; n++)
                for (int64_t k = left; k < right; k += GROUP) {
                    const uint8_t *p = weight + n * K + k;
                    __builtin_prefetch(p + block_k);
                    groups[group_most(p)]++;
                }
            block_values(scale_inv[top / block_n * J + left / block_k], value);
            for (int m = 0; m < CODES; m++) count(counts, (float)value[m], ws2, groups[m]);
        }
    }
}

/* ---- BF16 input ----------------------------------------------------------------------------------------- */

/* As Steps, in BF16 magnitudes and for the whole weight, since nothing but the largest magnitude matters. */
typedef struct {
    Lanes16 last[8];
    uint8_t scale;
    uint8_t ready;
} Steps16;

#define MAGNITUDES 0x7F80 /* finite BF16 magnitudes; Inf and NaN lie above */

static void fill_bf16(Steps16 *e, uint32_t most, float ws2) {
    e->scale = scale_code(bf16_value(most), ws2);
    double d = (double)(e4m3_value(e->scale) * ws2);
    for (int k = 0; k < 8; k++) {
        float below = (float)(d * LIMIT[k]); /* rounded; brought below the limit, then cut to BF16 */
        uint32_t bits = f32_bits(below) - ((double)below > d * LIMIT[k]);
        e->last[k] = (Lanes16){0} + (int16_t)(bits >> 16);
    }
    e->ready = 1;
}

M27_INLINE uint32_t group_most_bf16(const uint16_t *p) {
    uint16_t most = 0;
    for (int i = 0; i < GROUP; i++) {
        uint16_t c = p[i] & 0x7FFF;
        most = c > most ? c : most;
    }
    return most;
}

/* Eight elements to four bytes. */
M27_INLINE void encode_bf16(const uint16_t *p, const Steps16 *e, uint8_t *out) {
    Lanes16 x, c, code = {0};
    memcpy(&x, p, sizeof x);
    c = x & 0x7FFF;
    for (int k = 1; k < 8; k++) code -= (Lanes16)(c > e->last[k]); /* true is -1 */
    code |= (Lanes16)(c > e->last[0]) & (Lanes16)(x < 0) & 8;
    typedef uint32_t Pairs __attribute__((vector_size(GROUP)));
    typedef uint8_t Bytes __attribute__((vector_size(GROUP / 4)));
    Pairs pair = (Pairs)code;
    Bytes bytes = __builtin_convertvector((pair | (pair >> 12)) & 0xFF, Bytes);
    memcpy(out, &bytes, sizeof bytes);
}

/* `table`: MAGNITUDES zeroed entries. */
M27_CLONES static int pack_bf16(const uint16_t *weight, int64_t K, float ws2, uint8_t *codes, uint8_t *scales,
                                int64_t row0, int64_t row1, Steps16 *table) {
    for (int64_t g = row0 * K / GROUP; g < row1 * K / GROUP; g++) {
        const uint16_t *p = weight + g * GROUP;
        uint32_t most = group_most_bf16(p);
        if (most >= MAGNITUDES) return 0;
        Steps16 *e = table + most;
        if (!e->ready) fill_bf16(e, most, ws2);
        scales[g] = e->scale;
        encode_bf16(p, e, codes + g * (GROUP / 2));
        encode_bf16(p + GROUP / 2, e, codes + g * (GROUP / 2) + GROUP / 4);
    }
    return 1;
}

M27_CLONES static uint16_t amax_bf16(const uint16_t *weight, int64_t count) {
    uint16_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        uint16_t c = weight[i] & 0x7FFF;
        most = c > most ? c : most;
    }
    return most;
}

M27_CLONES static void count_bf16(const uint16_t *weight, int64_t K, float ws2, int64_t *counts, int64_t row0,
                                  int64_t row1) {
    for (int64_t g = row0 * K / GROUP; g < row1 * K / GROUP; g++)
        count(counts, bf16_value(group_most_bf16(weight + g * GROUP)), ws2, 1);
}

/* ---- the error of packing ------------------------------------------------------------------------------- */

/* Sixteen sums, one a lane, to one: lane j takes lane j + 8, j + 4, j + 2, j + 1. */
M27_INLINE double lane_sum(double *lane) {
    for (int half = GROUP / 2; half; half /= 2)
        for (int j = 0; j < half; j++) lane[j] += lane[j + half];
    return lane[0];
}

M27_CLONES static void row_errors(const uint16_t *weight, int64_t K, float ws2, const uint8_t *codes,
                                  const uint8_t *scales, double *signal, double *noise, int64_t row0,
                                  int64_t row1) {
    static const float E2M1[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
    for (int64_t n = row0; n < row1; n++) {
        double s[GROUP] = {0}, e[GROUP] = {0};
        for (int64_t g = n * K / GROUP; g < (n + 1) * K / GROUP; g++) {
            const uint16_t *p = weight + g * GROUP;
            const uint8_t *q = codes + g * (GROUP / 2);
            float d = e4m3_value(scales[g] & 0x7F) * ws2, y[GROUP];
            for (int i = 0; i < GROUP; i++) y[i] = E2M1[(q[i / 2] >> (i % 2 * 4)) & 15] * d;
            for (int i = 0; i < GROUP; i++) {
                double x = bf16_value(p[i]), r = x - (double)y[i];
                s[i] += x * x;
                e[i] += r * r;
            }
        }
        signal[n] = lane_sum(s);
        noise[n] = lane_sum(e);
    }
}

/* ---- what the loader calls: rows [row0, row1); for FP8 block_k is a multiple of 16 ---------------------- */

/* 1, or with undefined output 0 when a group holds a NaN or Inf and -1 when memory ran out. */
M27_EXPORT int m27_pack_fp8(const uint8_t *weight, const float *scale_inv, int64_t K, int64_t block_n,
                            int64_t block_k, float ws2, uint8_t *codes, uint8_t *scales, int64_t row0,
                            int64_t row1) {
    int finite;
    M27_IEEE(finite = pack_fp8(weight, scale_inv, K, block_n, block_k, ws2, codes, scales, row0, row1));
    return finite;
}

M27_EXPORT int m27_pack_bf16(const uint16_t *weight, int64_t K, float ws2, uint8_t *codes, uint8_t *scales,
                             int64_t row0, int64_t row1) {
    int finite;
    Steps16 *table = calloc(MAGNITUDES, sizeof *table); /* 4.7 MB of which a few pages are ever touched */
    if (!table) return -1;
    M27_IEEE(finite = pack_bf16(weight, K, ws2, codes, scales, row0, row1, table));
    free(table);
    return finite;
}

/* The largest BF16 magnitude; NaN or Inf where there is one, negative when memory ran out. */
M27_EXPORT float m27_amax_fp8(const uint8_t *weight, const float *scale_inv, int64_t K, int64_t block_n,
                              int64_t block_k, int64_t row0, int64_t row1) {
    float amax;
    uint8_t *most = malloc((size_t)K);
    if (!most) return -1.0f;
    M27_IEEE(amax = amax_fp8(weight, scale_inv, K, block_n, block_k, row0, row1, most));
    free(most);
    return amax;
}

M27_EXPORT float m27_amax_bf16(const uint16_t *weight, int64_t K, int64_t row0, int64_t row1) {
    return bf16_value(amax_bf16(weight + row0 * K, (row1 - row0) * K));
}

/* Adds to counts[3]: groups of zeros, with a scale above 448, with one below 2^-9. */
M27_EXPORT void m27_count_fp8(const uint8_t *weight, const float *scale_inv, int64_t K, int64_t block_n,
                              int64_t block_k, float ws2, int64_t *counts, int64_t row0, int64_t row1) {
    M27_IEEE(count_fp8(weight, scale_inv, K, block_n, block_k, ws2, counts, row0, row1));
}

M27_EXPORT void m27_count_bf16(const uint16_t *weight, int64_t K, float ws2, int64_t *counts, int64_t row0,
                               int64_t row1) {
    M27_IEEE(count_bf16(weight, K, ws2, counts, row0, row1));
}

/* Fills signal[row0..row1) and noise[row0..row1) for a BF16 weight. */
M27_EXPORT void m27_row_errors(const uint16_t *weight, int64_t K, float ws2, const uint8_t *codes,
                               const uint8_t *scales, double *signal, double *noise, int64_t row0,
                               int64_t row1) {
    M27_IEEE(row_errors(weight, K, ws2, codes, scales, signal, noise, row0, row1));
}
