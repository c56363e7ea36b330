/* What keys and values are kept in: E4M3 (kind 0), BF16 (1) or F32 (2); shared by writing and attention. */
#ifndef M27QUANT_KV_CACHE_H
#define M27QUANT_KV_CACHE_H

#include "core.h"

#define MAX_WIDTH 512 /* head_dim */
#define MAX_ROWS 16   /* of a group */

enum { KV_E4M3, KV_BF16, KV_F32 };

M27_INLINE int64_t kv_bytes(int kind) { return kind == KV_E4M3 ? 1 : kind == KV_BF16 ? 2 : 4; }

/* A decoded number times this is the number. */
M27_INLINE float kv_unit(int kind) { (void)kind; return 1; }

M27_INLINE void kv_decode(const uint8_t *from, int kind, int64_t C, int64_t width, float *to) {
    if (kind == KV_E4M3) {
        for (int64_t c = 0; c < C; c++)
            to[c] = f32_from_bits(f32_bits(e4m3_value(from[c] & 0x7F)) ^ ((uint32_t)from[c] >> 7 << 31));
    } else if (kind == KV_BF16) {
        for (int64_t c = 0; c < C; c++) {
            uint16_t bits;
            memcpy(&bits, from + 2 * c, sizeof bits);
            to[c] = bf16_value(bits);
        }
    } else {
        memcpy(to, from, (size_t)C * sizeof *to);
    }
    for (int64_t c = C; c < width; c++) to[c] = 0;
}

#endif
