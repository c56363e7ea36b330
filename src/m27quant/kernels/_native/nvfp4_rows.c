/* Rows of activations: quantized to NVFP4 (the specification is nvfp4_quantize/reference.py), and arranged for
 * products as nvfp4.h says. */
#include <float.h>

#include "nvfp4.h"

/* ---- quantizing ------------------------------------------------------------------------------------------ */

/* What follows from a static scale; each operation rounded once, as the reference does. */
typedef struct {
    float to_scale, inverse;
} Static;

M27_INLINE Static static_scale(float input_scale) {
    float S = 1.0f / input_scale;
    return (Static){S * (1.0f / 6.0f), 1.0f / S};
}

M27_INLINE void load_group(Rows x, int64_t at, float *out) {
    if (x.is_bf16)
        for (int i = 0; i < GROUP; i++) out[i] = bf16_value(((const uint16_t *)x.data)[at + i]);
    else
        memcpy(out, (const float *)x.data + at, GROUP * sizeof *out);
}

/* A group's block scale (E4M3 code) and its 16 codes in eight bytes, the even one in the low half. */
M27_INLINE uint8_t quantize_group(const float *x, Static s, uint8_t *out) {
    uint32_t most = 0; /* as integers magnitudes have the same order, and NaN is the largest */
    for (int i = 0; i < GROUP; i++) {
        uint32_t u = f32_bits(x[i]) & 0x7FFFFFFFu;
        most = u > most ? u : most;
    }
    float wanted = f32_from_bits(most) * s.to_scale;
    uint8_t scale = isnan(wanted) ? 0x7F : e4m3_code(wanted > 448.0f ? 448.0f : wanted);
    float factor = 1.0f / (e4m3_value(scale) * s.inverse);
    factor = factor > FLT_MAX ? FLT_MAX : factor;
    uint32_t codes[GROUP];
    for (int i = 0; i < GROUP; i++) {
        float y = fabsf(x[i] * factor);
        uint32_t code = (uint32_t)(y > 0.25f) + (y >= 0.75f) + (y > 1.25f) + (y >= 1.75f) + (y > 2.5f) + (y >= 3.5f) +
                        (y > 5.0f);
        codes[i] = code | (f32_bits(x[i]) >> 31 << 3);
    }
    for (int i = 0; i < GROUP / 2; i++) out[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
    return scale;
}

M27_CLONES static void quantize(Rows x, float input_scale, int swizzled, uint8_t *codes, uint8_t *scales, int64_t row0,
                                int64_t row1) {
    Static s = static_scale(input_scale);
    int64_t groups = x.num_columns / GROUP, tiles = (groups + 3) / 4;
    for (int64_t t = row0; t < row1; t++) {
        uint8_t *tile = scales + t / 128 * tiles * 512 + t % 32 * 16 + t / 32 % 4 * 4;
        for (int64_t g = 0; g < groups; g++) {
            float v[GROUP];
            load_group(x, t * x.num_columns + g * GROUP, v);
            uint8_t scale = quantize_group(v, s, codes + (t * groups + g) * (GROUP / 2));
            *(swizzled ? tile + g / 4 * 512 + g % 4 : scales + t * groups + g) = scale;
        }
    }
}

/* Rows [row0, row1) of `x` [.., num_columns].  Swizzled: `scales` is the whole tensor, its padding set before. */
M27_EXPORT void m27_nvfp4_quantize(const void *x, int is_bf16, int64_t num_columns, float input_scale, int swizzled,
                                   uint8_t *codes, uint8_t *scales, int64_t row0, int64_t row1) {
    M27_IEEE(quantize((Rows){x, num_columns, is_bf16}, input_scale, swizzled, codes, scales, row0, row1));
}

typedef uint8_t Bytes8 __attribute__((vector_size(8)));
typedef uint16_t Shorts8 __attribute__((vector_size(16)));

/* ---- arranging ------------------------------------------------------------------------------------------- */

M27_CLONES static void arrange_int8(Rows x, int64_t row, int T, float input_scale, int32_t *panel) {
    Static s = static_scale(input_scale);
    for (int64_t g = 0; g < x.num_columns / GROUP; g++, panel += 6 * T) {
        float v[GROUP];
        uint8_t c[GROUP / 2];
        load_group(x, row * x.num_columns + g * GROUP, v);
        float scale = e4m3_value(quantize_group(v, s, c));
        Bytes8 packed;
        memcpy(&packed, c, sizeof packed);
        Shorts8 pair = __builtin_convertvector(packed, Shorts8);
        Bytes16 code = e2m1_twice((Bytes16)((pair & 0x0F) | (pair & 0xF0) << 4)) + 12; /* not negative, to add up */
        uint32_t words[4], sums = 0;
        memcpy(words, &code, sizeof words);
        for (int i = 0; i < 4; i++) sums += (words[i] & 0x00FF00FF) + (words[i] >> 8 & 0x00FF00FF);
        code -= 12;
        memcpy(words, &code, sizeof words);
        for (int i = 0; i < 4; i++) panel[i * T] = (int32_t)words[i];
        panel[4 * T] = -12 * ((int32_t)((sums & 0xFFFF) + (sums >> 16)) - 12 * GROUP);
        memcpy(panel + 5 * T, &scale, sizeof scale);
    }
}

/* A power of two that brings a row into the middle of F32's range, 1 for nearly all: products with it neither
 * overflow nor meet subnormal numbers, which some BF16 instructions take for 0. */
M27_CLONES static float middle(Rows x, int64_t row) {
    uint32_t most = 0;
    for (int64_t g = 0; g < x.num_columns / GROUP; g++) {
        float v[GROUP];
        load_group(x, row * x.num_columns + g * GROUP, v);
        for (int i = 0; i < GROUP; i++) {
            uint32_t u = f32_bits(v[i]) & 0x7FFFFFFFu;
            most = u > most ? u : most;
        }
    }
    float amax = f32_from_bits(most); /* NaN and Inf stay what they are under any power */
    return amax > 0x1p60f ? 0x1p-64f : amax < 0x1p-60f ? 0x1p64f : 1.0f;
}

M27_CLONES static void arrange_f32(Rows x, int64_t row, int T, float power, float *panel) {
    for (int64_t g = 0; g < x.num_columns / GROUP; g++, panel += GROUP * T) {
        float v[GROUP];
        load_group(x, row * x.num_columns + g * GROUP, v);
        for (int i = 0; i < GROUP; i++) panel[i * T] = v[i] * power;
    }
}

M27_CLONES static void arrange_bf16(Rows x, int64_t row, int T, float power, uint32_t *panel) {
    for (int64_t g = 0; g < x.num_columns / GROUP; g++, panel += GROUP / 2 * T) {
        float v[GROUP];
        load_group(x, row * x.num_columns + g * GROUP, v);
        uint32_t bits[GROUP];
        for (int i = 0; i < GROUP; i++) bits[i] = f32_bits(v[i] * power); /* still BF16: its low half is 0 */
        for (int i = 0; i < GROUP / 2; i++) {
            int k = bf16_column(i);
            panel[i * T] = bits[k] >> 16 | bits[k + 2];
        }
    }
}

void nvfp4_arrange(Kind kind, Rows x, const int64_t *index, int T, float input_scale, void *panel, double *factor) {
    for (int t = 0; t < T; t++) {
        if (kind == KIND_INT8) {
            arrange_int8(x, index[t], T, input_scale, (int32_t *)panel + t);
            factor[t] = 0.25 * (double)input_scale; /* both sides count double */
            continue;
        }
        float power = middle(x, index[t]);
        if (kind == KIND_F32) arrange_f32(x, index[t], T, power, (float *)panel + t);
        else arrange_bf16(x, index[t], T, power, (uint32_t *)panel + t);
        factor[t] = 0.5 / (double)power;
    }
}
