/* FP8 groups to E2M1 codes: what packing a weight and comparing with a packed one share.
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
#ifndef M27QUANT_NVFP4_FP8_H
#define M27QUANT_NVFP4_FP8_H

#include "core.h"

#define GROUP 16
#define CODES 128 /* FP8 magnitudes, the last one NaN */

/* Vectors of 16 bytes: the width that every machine has, and one group of FP8 codes. */
typedef int8_t Lanes __attribute__((vector_size(16)));

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

M27_INLINE uint8_t scale_code(float amax, float ws2) {
    float s = unclamped_scale(amax, ws2);
    s = s < 0x1p-9f ? 0x1p-9f : s;
    return e4m3_code(s > 448.0f ? 448.0f : s);
}

/* What all groups share whose largest FP8 code is the same: an FP8 code c has E2M1 code >= k if c > last[k]. */
typedef struct {
    Lanes last[8]; /* each limit in all lanes */
    float d;       /* weight_scale * weight_scale_2 */
    uint8_t scale;
    uint8_t state; /* 0 not computed, 1 ready, 2 the group holds a NaN or Inf */
} Steps;

/* BF16 magnitudes of all FP8 codes under one block scale. */
M27_INLINE void block_values(float scale_inv, double *value) {
    for (uint32_t c = 0; c < CODES; c++) value[c] = bf16_value(bf16_bits(e4m3_value(c) * fabsf(scale_inv)));
}

/* The limits under the scale that `e` has. */
M27_INLINE void fill_under_scale(Steps *e, const double *value, float ws2) {
    e->d = e4m3_value(e->scale) * ws2;
    double limit[8];
    for (int k = 0; k < 8; k++) limit[k] = (double)e->d * LIMIT[k];
    /* last[k]: the largest code whose value does not exceed the limit.  Eight binary searches side by side. */
    int last[8] = {0};
    for (int step = CODES / 2; step; step /= 2)
        for (int k = 0; k < 8; k++)
            last[k] += step & -(value[last[k] + step] <= limit[k]); /* false for Inf and NaN */
    for (int k = 0; k < 8; k++) e->last[k] = (Lanes){0} + (int8_t)last[k];
    e->state = 1;
}

M27_INLINE void fill(Steps *e, const double *value, int most, float ws2) {
    if (!isfinite(value[most])) {
        e->state = 2;
        return;
    }
    e->scale = scale_code((float)value[most], ws2);
    fill_under_scale(e, value, ws2);
}

/* The larger one of each lane. */
M27_INLINE Lanes larger(Lanes a, Lanes b) {
    Lanes first = (Lanes)(a > b);
    return (a & first) | (b & ~first);
}

/* The largest magnitude: in halves of 8 bytes, folded three times. */
M27_INLINE int group_most(const uint8_t *p) {
    typedef uint64_t Halves __attribute__((vector_size(16)));
    Lanes c;
    memcpy(&c, p, sizeof c);
    c &= 0x7F;
    for (int bits = 32; bits >= 8; bits /= 2) c = larger(c, (Lanes)((Halves)c >> bits));
    return c[0] > c[8] ? c[0] : c[8];
}

/* The E2M1 codes of sixteen elements, sign in bit 3. */
M27_INLINE Lanes codes_fp8(const uint8_t *p, const Steps *e) {
    Lanes x, c, code = {0};
    memcpy(&x, p, sizeof x);
    c = x & 0x7F;
    for (int k = 1; k < 8; k++) code -= (Lanes)(c > e->last[k]); /* true is -1 */
    return code | ((Lanes)(c > e->last[0]) & (Lanes)(x < 0) & 8);
}

/* Sixteen codes to eight bytes: the even element goes to the low nibble. */
M27_INLINE uint64_t nibbles(Lanes code) {
    typedef uint16_t Pairs __attribute__((vector_size(GROUP)));
    typedef uint8_t Bytes __attribute__((vector_size(GROUP / 2)));
    Pairs pair = (Pairs)code;
    Bytes bytes = __builtin_convertvector((pair | (pair >> 4)) & 0xFF, Bytes);
    uint64_t word;
    memcpy(&word, &bytes, sizeof word);
    return word;
}

/* A block of an FP8 weight that ends at row `row1` or `column1`: returns where it ends. */
M27_INLINE int64_t block_end(int64_t start, int64_t side, int64_t end) {
    int64_t next = (start / side + 1) * side;
    return next < end ? next : end;
}

#endif
