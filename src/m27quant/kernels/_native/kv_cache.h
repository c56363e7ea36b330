/* What keys and values are kept in: E4M3 (kind 0), BF16 (1) or F32 (2); shared by writing and attention. */
#ifndef M27QUANT_KV_CACHE_H
#define M27QUANT_KV_CACHE_H

#include "vector.h"

#define MAX_WIDTH 512 /* head_dim */
#define MAX_ROWS 16   /* of a group */

enum { KV_E4M3, KV_BF16, KV_F32 };

M27_INLINE int64_t kv_bytes(int kind) { return kind == KV_E4M3 ? 1 : kind == KV_BF16 ? 2 : 4; }

/* The byte of each 32-bit lane that lies `up` bits below the highest one: 16 E4M3 codes to F32, exactly. */
M27_INLINE v16 e4m3_values(v16u words, int up) {
    v16u word = words << up, magnitude = (word >> 4) & 0x07F00000u;
    v16 x = (v16)(magnitude + 0x3C000000u);                                 /* exponent bias 7 -> 127 */
    x += (v16)((v16u)(x - 0x1p-6f) & (v16u)(magnitude < 0x00800000u));      /* exponent field 0: 2x - 2^-6 */
    v16u nan = 0x7FC00000u & (v16u)(magnitude == 0x07F00000u);
    return (v16)((v16u)x | nan | (word & 0x80000000u));
}

/* Decoding takes 32-bit words apart in whole vectors, so numbers come out in another order: element c of a row in
 * lane kv_place(c) of 64 (E4M3), 32 (BF16) or 16. */
M27_INLINE int64_t kv_stretch(int kind) { return 64 / kv_bytes(kind); }

M27_INLINE int64_t kv_place(int64_t c, int kind) {
    int64_t n = kv_stretch(kind), parts = n / 16;
    return c / n * n + c % n % parts * 16 + c % n / parts;
}

/* C numbers of a cache to F32 and zeros up to whole stretches, in that order. */
M27_INLINE void kv_decode(const uint8_t *from, int kind, int64_t C, float *to) {
    int64_t bytes = C * kv_bytes(kind);
    for (int64_t at = 0; at < bytes; at += 64) {
        v16u words = {0};
        if (at + 64 <= bytes) memcpy(&words, from + at, 64);
        else memcpy(&words, from + at, (size_t)(bytes - at));
        if (kind == KV_E4M3) {
            for (int j = 0; j < 4; j++) store16(to + 16 * j, e4m3_values(words, 24 - 8 * j));
        } else if (kind == KV_BF16) {
            store16(to, (v16)(words << 16));
            store16(to + 16, (v16)(words & 0xFFFF0000u));
        } else {
            store16(to, (v16)words);
        }
        to += kv_stretch(kind);
    }
}

#endif
