/* NVFP4 packing on a CPU.  The specification, and the meaning of every name, is nvfp4_pack/reference.py. */
#include <stdlib.h>

#include "nvfp4_bf16.h"
#include "nvfp4_fp8.h"

/* Adds `groups` to each of the three counts that a group with this largest magnitude belongs to. */
M27_INLINE void count(int64_t *counts, float amax, float ws2, int64_t groups) {
    float s = unclamped_scale(amax, ws2);
    counts[0] += amax == 0.0f ? groups : 0;
    counts[1] += s > 448.0f ? groups : 0;
    counts[2] += s < 0x1p-9f ? groups : 0;
}

/* ---- FP8 input ------------------------------------------------------------------------------------------ */

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
                    uint64_t word = nibbles(codes_fp8(p, e));
                    memcpy(codes + (n * K + k) / 2, &word, sizeof word);
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
