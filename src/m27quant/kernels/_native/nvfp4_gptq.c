/* NVFP4 with error feedback: sixteen rows side by side, a lane each.  The specification, and the meaning of every name,
 * is nvfp4_gptq/reference.py; a row takes the same operations in the same order wherever it lies.
 */
#include "nvfp4_search.h"
#include "vector.h"

#include <stdlib.h>

#define PIECE 128  /* turns whose errors and couplings stay in the nearest cache */
#define COLUMNS 8  /* sums in registers */

/* fed[c] += the sum of error[i] coupling[i][c] over the first turns, one after the other. */
M27_INLINE void feed(v16 *fed, const float *error, const float *coupling, int64_t turns) {
    for (int64_t first = 0; first < turns; first += PIECE) {
        int64_t end = first + PIECE < turns ? first + PIECE : turns;
        for (int c0 = 0; c0 < GROUP; c0 += COLUMNS) {
            v16 sum[COLUMNS];
            for (int c = 0; c < COLUMNS; c++) sum[c] = fed[c0 + c];
            for (int64_t i = first; i < end; i++) {
                v16 e = load16(error + i * LANES);
                for (int c = 0; c < COLUMNS; c++) sum[c] += e * coupling[i * GROUP + c0 + c];
            }
            for (int c = 0; c < COLUMNS; c++) fed[c0 + c] = sum[c];
        }
    }
}

/* What the error of a group's turn j asks of its later turns. */
M27_INLINE void feed_within(v16 *fed, v16 error, const float *within, int j) {
    for (int c = j + 1; c < GROUP; c++) fed[c] += error * within[j * GROUP + c];
}

M27_INLINE v16 magnitude16(v16 x) { return (v16)((v16u)x & 0x7FFFFFFFu); }

M27_INLINE v16i not_finite16(v16 x) { return ((v16i)x & 0x7F800000) == 0x7F800000; }

M27_INLINE int any16(v16i v) {
    int32_t any = 0;
    for (int l = 0; l < LANES; l++) any |= v[l];
    return any != 0;
}

/* E2M1 codes of x under steps d, and the values that they stand for. */
M27_INLINE v16i encode16(v16 x, v16 d, v16 *y) {
    v16 a = magnitude16(x) / d;
    v16i halves = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f); /* true is -1 */
    v16i wholes = (a > 2.5f) + (a >= 3.5f), two = a > 5.0f;
    v16 value = __builtin_convertvector(-(halves + 2 * wholes + 4 * two), v16) * 0.5f;
    *y = (v16)((v16u)(value * d) | ((v16u)x & 0x80000000u));
    return -(halves + wholes + two) | ((x < 0.0f) & (a > 0.0f) & 8);
}

/* `error` [K][LANES]: room for what each turn is left with. */
M27_CLONES static int pack_rows(const uint16_t *weight, int64_t K, const Scales *s, const int32_t *order,
                                const float *coupling, const float *channel, float *error, uint8_t *codes,
                                uint8_t *scales, int64_t row, int64_t count) {
    for (int64_t first = 0; first < K; first += GROUP, coupling += K * GROUP) {
        const float *within = coupling + first * GROUP;
        v16 w[GROUP], fed[GROUP], then[GROUP], d;
        v16i wrong = {0};
        for (int j = 0; j < GROUP; j++)
            for (int l = 0; l < LANES; l++)
                w[j][l] = bf16_value(weight[(row + (l < count ? l : count - 1)) * K + order[first + j]]);
        memset(fed, 0, sizeof fed);
        feed(fed, error, coupling, first);

        Groups16 g;
        memcpy(then, fed, sizeof fed);
        for (int j = 0; j < GROUP; j++) {
            v16 x = w[j] + then[j];
            wrong |= not_finite16(x);
            store16(g.x[j], magnitude16(x));
            feed_within(then, w[j] - x, within, j);
        }
        if (any16(wrong)) return 0;
        for (int l = 0; l < LANES; l++) g.weight[l] = g.small_weight[l] = channel + first;
        uint8_t best[LANES], nibble[GROUP][LANES];
        nvfp4_best_scales(&g, s, best);

        for (int l = 0; l < LANES; l++) d[l] = s->of[best[l]].d;
        for (int j = 0; j < GROUP; j++) {
            v16 x = w[j] + fed[j], y;
            wrong |= not_finite16(x);
            v16i code = encode16(x, d, &y);
            for (int l = 0; l < LANES; l++) nibble[order[first + j] % GROUP][l] = (uint8_t)code[l];
            store16(error + (first + j) * LANES, w[j] - y);
            feed_within(fed, w[j] - y, within, j);
        }
        if (any16(wrong)) return 0;
        int64_t group = order[first] / GROUP;
        for (int64_t l = 0; l < count; l++) {
            uint8_t *out = codes + (row + l) * K / 2 + group * (GROUP / 2);
            for (int j = 0; j < GROUP / 2; j++) out[j] = (uint8_t)(nibble[2 * j][l] | nibble[2 * j + 1][l] << 4);
            scales[(row + l) * K / GROUP + group] = best[l];
        }
    }
    return 1;
}

M27_CLONES static void energy_rows(const float *x, int64_t K, const int32_t *order, const float *coupling,
                                   const double *pivots, float *error, double *energy, int64_t row, int64_t count) {
    double sum[LANES] = {0};
    for (int64_t first = 0; first < K; first += GROUP, coupling += K * GROUP) {
        v16 fed[GROUP];
        for (int j = 0; j < GROUP; j++)
            for (int l = 0; l < LANES; l++)
                error[(first + j) * LANES + l] = x[(row + (l < count ? l : count - 1)) * K + order[first + j]];
        memset(fed, 0, sizeof fed);
        feed(fed, error, coupling, first + GROUP); /* of the group itself, too: 0 from a turn to earlier ones */
        for (int j = 0; j < GROUP; j++) {
            v16 t = load16(error + (first + j) * LANES) + fed[j];
            for (int l = 0; l < LANES; l++) sum[l] += (double)t[l] * (double)t[l] * pivots[first + j];
        }
    }
    for (int64_t l = 0; l < count; l++) energy[row + l] = sum[l];
}

/* ---- what the loader calls: rows [row0, row1); -1 without memory ------------------------------------------ */

/* `order` [K], `coupling` [K/16][K][16], `channel` [K] the weights of squares by turns, at most 1; 0 for NaN or Inf. */
M27_EXPORT int m27_gptq_pack(const uint16_t *weight, int64_t K, float ws2, const int32_t *order, const float *coupling,
                             const float *channel, uint8_t *codes, uint8_t *scales, int64_t row0, int64_t row1) {
    int finite = -1;
    Scales *s = malloc(sizeof *s);
    float *error = malloc((size_t)K * LANES * sizeof *error);
    if (s && error) M27_IEEE({
        nvfp4_prepare_scales(s, ws2);
        finite = 1;
        for (int64_t row = row0; finite && row < row1; row += LANES) {
            int64_t count = row1 - row < LANES ? row1 - row : LANES;
            finite = pack_rows(weight, K, s, order, coupling, channel, error, codes, scales, row, count);
        }
    });
    free(error);
    free(s);
    return finite;
}

M27_EXPORT int m27_gptq_energy(const float *x, int64_t K, const int32_t *order, const float *coupling,
                               const double *pivots, double *energy, int64_t row0, int64_t row1) {
    float *error = malloc((size_t)K * LANES * sizeof *error);
    if (error) M27_IEEE({
        for (int64_t row = row0; row < row1; row += LANES) {
            int64_t count = row1 - row < LANES ? row1 - row : LANES;
            energy_rows(x, K, order, coupling, pivots, error, energy, row, count);
        }
    });
    free(error);
    return error ? 1 : -1;
}
