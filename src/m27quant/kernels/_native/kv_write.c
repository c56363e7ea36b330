/* Keys and values into their slots of a paged cache.  The specification is fp8_kv_attention/reference.py. */
#include "kv_cache.h"

/* E4M3(y): nearest, ties to even, saturating at 448, the sign of zero kept; a NaN has magnitude 127. */
M27_INLINE uint8_t encode(float y) {
    float a = fabsf(y);
    a = a > 448 ? 448 : a;
    uint32_t u = f32_bits(a), normal = (u + 0x7FFFFu + ((u >> 20) & 1) - 0x3C000000u) >> 20;
    uint32_t small = f32_bits(a + 0x1p14f) - 0x46800000u; /* ulp of 2^14 is 2^-9 */
    uint32_t is_small = -(uint32_t)(a < 0x1p-6f), is_nan = -(uint32_t)(y != y);
    uint32_t code = (small & is_small) | (normal & ~is_small);
    return (uint8_t)((code & ~is_nan) | (127 & is_nan) | (f32_bits(y) >> 31 << 7));
}

M27_INLINE void encode_all(const void *x, int x_is_bf16, int64_t n, int kind, float scale, void *to) {
    for (int64_t i = 0; i < n; i++) {
        float value = x_is_bf16 ? bf16_value(((const uint16_t *)x)[i]) : ((const float *)x)[i];
        if (kind == KV_E4M3) ((uint8_t *)to)[i] = encode(value / scale);
        else if (kind == KV_BF16) ((uint16_t *)to)[i] = x_is_bf16 ? ((const uint16_t *)x)[i] : bf16_bits(value);
        else ((float *)to)[i] = value;
    }
}

M27_CLONES static void write_rows(const void *x, int x_is_bf16, int64_t stride, int64_t n, const int64_t *slots,
                                  int kind, float scale, uint8_t *cache, int64_t first, int64_t end) {
    for (int64_t t = first; t < end; t++) {
        if (slots[t] < 0) continue;
        const uint8_t *row = (const uint8_t *)x + t * stride * (x_is_bf16 ? 2 : 4);
        void *to = cache + slots[t] * n * kv_bytes(kind);
        if (x_is_bf16 && kind == KV_E4M3) encode_all(row, 1, n, KV_E4M3, scale, to);
        else if (kind == KV_E4M3) encode_all(row, 0, n, KV_E4M3, scale, to);
        else encode_all(row, x_is_bf16, n, kind, scale, to);
    }
}

/* Rows [first, end) of x, n elements each and `stride` apart, to their slots; those with slot -1 are left out. */
M27_EXPORT void m27_write_kv(const void *x, int x_is_bf16, int64_t stride, int64_t n, const int64_t *slots, int kind,
                             float scale, void *cache, int64_t first, int64_t end) {
    M27_IEEE(write_rows(x, x_is_bf16, stride, n, slots, kind, scale, cache, first, end));
}
