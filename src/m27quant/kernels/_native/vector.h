/* Vectors of 16 F32 lanes in the compilers' own terms: one code path for every lane, on every machine the same bits. */
#ifndef M27QUANT_VECTOR_H
#define M27QUANT_VECTOR_H

#include "core.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" /* vectors are passed between inlined functions alone */
#endif

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef uint32_t v16u __attribute__((vector_size(64)));

M27_INLINE v16 load16(const float *p) {
    v16 v;
    memcpy(&v, p, sizeof v);
    return v;
}

M27_INLINE void store16(float *p, v16 v) { memcpy(p, &v, sizeof v); }

M27_INLINE v16 splat(float x) { return (v16){0} + x; }

/* The sum of 16 lanes, halved four times: lane j adds lane j+8, j+4, j+2, j+1. */
M27_INLINE float sum_lanes(const float *v) {
    float lane[16];
    memcpy(lane, v, sizeof lane);
    for (int half = 8; half; half /= 2)
        for (int j = 0; j < half; j++) lane[j] += lane[j + half];
    return lane[0];
}

/* e^x for x <= 0 within a unit in the last place (0.96 among 30 million numbers); below 2^-126 0; a NaN stays one. */
M27_INLINE v16 exp16(v16 x) {
    v16 shifted = x * 0x1.715476p+0f + 0x1.8p23f; /* the nearest integer to x / ln 2 in the lowest bits */
    v16 n = shifted - 0x1.8p23f;
    v16 r = x - n * 0x1.63p-1f;
    r = r - n * -0x1.bd0106p-13f; /* ln 2 in two parts, the first one exact times n */
    v16 y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    y = y * (v16)(((v16u)shifted << 23) + 0x3F800000u);
    v16i vanishes = x < -0x1.5d589ep+6f;
    return (v16)((v16i)y & ~vanishes);
}

#endif
