/* Block dequantization of FP8 weights on a CPU: F32(weight) * scale, rounded to the output's format.
 * The specification is fp8_dequant/reference.py; NaN and Inf pass through. */
#include "core.h"

/* One row stretch under one scale. */
M27_INLINE float product(uint32_t code, float scale) {
    return f32_from_bits(f32_bits(e4m3_value(code & 0x7F)) ^ (code >> 7 << 31)) * scale;
}

M27_CLONES static void dequantize(const uint8_t *weight, const float *scale_inv, int64_t K, int64_t block_n,
                                  int64_t block_k, uint16_t *out16, float *out32, int64_t row0, int64_t row1) {
    int64_t J = (K + block_k - 1) / block_k;
    for (int64_t n = row0; n < row1; n++) {
        for (int64_t left = 0; left < K; left += block_k) {
            float scale = scale_inv[n / block_n * J + left / block_k];
            int64_t width = left + block_k < K ? block_k : K - left, at = n * K + left;
            if (out16)
                for (int64_t i = 0; i < width; i++) out16[at + i] = bf16_bits(product(weight[at + i], scale));
            else
                for (int64_t i = 0; i < width; i++) out32[at + i] = product(weight[at + i], scale);
        }
    }
}

/* Rows [row0, row1) to BF16 bits (`out16`) or F32 (`out32`); the other is NULL. */
M27_EXPORT void m27_dequantize(const uint8_t *weight, const float *scale_inv, int64_t K, int64_t block_n,
                               int64_t block_k, uint16_t *out16, float *out32, int64_t row0, int64_t row1) {
    M27_IEEE(dequantize(weight, scale_inv, K, block_n, block_k, out16, out32, row0, row1));
}
