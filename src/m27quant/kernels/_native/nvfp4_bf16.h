/* BF16 groups to E2M1 codes: what packing by maxima and by least error share. */
#ifndef M27QUANT_NVFP4_BF16_H
#define M27QUANT_NVFP4_BF16_H

#include "nvfp4_fp8.h"

/* Eight BF16 magnitudes. */
typedef int16_t Lanes16 __attribute__((vector_size(16)));

/* As Steps, in BF16 magnitudes and for the whole weight, since nothing but the largest magnitude matters. */
typedef struct {
    Lanes16 last[8];
    uint8_t scale;
    uint8_t ready;
} Steps16;

#define MAGNITUDES 0x7F80 /* finite BF16 magnitudes; Inf and NaN lie above */

/* The limits under the scale that `e` has. */
M27_INLINE void fill_bf16_under_scale(Steps16 *e, float ws2) {
    double d = (double)(e4m3_value(e->scale) * ws2);
    for (int k = 0; k < 8; k++) {
        float below = (float)(d * LIMIT[k]); /* rounded; brought below the limit, then cut to BF16 */
        uint32_t bits = f32_bits(below) - ((double)below > d * LIMIT[k]);
        e->last[k] = (Lanes16){0} + (int16_t)(bits >> 16);
    }
    e->ready = 1;
}

M27_INLINE void fill_bf16(Steps16 *e, uint32_t most, float ws2) {
    e->scale = scale_code(bf16_value(most), ws2);
    fill_bf16_under_scale(e, ws2);
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

#endif
