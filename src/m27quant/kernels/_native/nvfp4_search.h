/* The block scale with the least squared error: what the search of any groups and the tables of a block share.
 *
 * The specification, and the meaning of every name, is nvfp4_pack/scale_search.py; docs/quality.md has the proofs.
 * Errors in F32 only say which scales cannot be the best; among those that are left the F64 error of the
 * specification decides, so that no rounding of a bound can change the result.
 */
#ifndef M27QUANT_NVFP4_SEARCH_H
#define M27QUANT_NVFP4_SEARCH_H

#include "nvfp4_fp8.h"

#define LANES 16   /* groups that are searched together */
#define SCALES 126 /* positive finite E4M3 numbers, the codes 1 to 126 */

/* One candidate, as the specification rounds it. */
typedef struct {
    float d;       /* weight_scale * weight_scale_2 */
    float last[8]; /* an F32 number x has E2M1 code >= k if x > last[k], k = 1..7 */
    float y[8];    /* the values of the codes */
} Candidate;

/* All candidates of one matrix.  F32 numbers are in units of 2^-exponent, where weight_scale_2 lies in [1, 2). */
typedef struct {
    Candidate of[SCALES + 1]; /* by E4M3 code; 0 is not used */
    float step[SCALES + 1];   /* d in those units */
    float unit;               /* 2^exponent, 0 where F32 cannot hold it: nothing is excluded then */
    float ws2;
} Scales;

void nvfp4_prepare_scales(Scales *s, float ws2);

/* Sixteen groups side by side: x[j][l] is element j of group l. */
typedef struct {
    float x[GROUP][LANES];            /* magnitudes as they are, finite */
    const float *weight[LANES];       /* of the squares of each group, as given, or NULL in all */
    const float *small_weight[LANES]; /* the same times a power of two, at most 1 */
} Groups16;

/* The codes of the best scales of sixteen groups. */
void nvfp4_best_scales(const Groups16 *g, const Scales *s, uint8_t *best);

/* Where no magnitude reaches 7 steps of scale `unclipped`, a scale twice as large as one from there on is never better
 * than that one: none above this code need be tried. */
M27_INLINE int last_candidate(int unclipped) {
    int code = unclipped < 8 ? 15 : unclipped + 7;
    return code < SCALES ? code : SCALES;
}

#define SEVENTH (1.0f / 6.99f)

/* The first scale under which no magnitude reaches 7 steps, or the last of all.  `sevenths`: the largest magnitude
 * through weight_scale_2, times SEVENTH, which is a bit more than a seventh: no rounding brings a quotient to 7. */
M27_INLINE int unclipped_scale(float sevenths) {
    if (!(sevenths < 448.0f)) return SCALES;
    int below = sevenths < 0x1p-6f ? (int)(sevenths * 0x1p9f) : (int)(f32_bits(sevenths) >> 20) - 0x3C0;
    return below + 1 < SCALES ? below + 1 : SCALES;
}

/* ---- nvfp4_search_fp8.c: blocks of FP8, where the machine permutes bytes ---- */

int nvfp4_has_tables(void);
void *nvfp4_new_tables(void); /* to be freed */

/* Writes the scales of a block's groups: 1, 0 where it holds a NaN or Inf, -1 where the tables do not suit it. */
int nvfp4_search_block(void *tables, const Scales *s, const uint8_t *weight, int64_t K, const double *value,
                       int64_t top, int64_t bottom, int64_t left, int64_t right, uint8_t *scales);

/* The error that the specification gives to a candidate. */
M27_INLINE double exact_error(const float *x, const float *weight, const Candidate *c) {
    double v[GROUP];
    for (int j = 0; j < GROUP; j++) {
        int code = 0;
        for (int k = 1; k < 8; k++) code += x[j] > c->last[k];
        double r = (double)x[j] - (double)c->y[code];
        v[j] = r * r;
        if (weight) v[j] *= (double)weight[j];
    }
    for (int half = GROUP / 2; half; half /= 2)
        for (int j = 0; j < half; j++) v[j] += v[j + half];
    return v[0];
}

#endif
