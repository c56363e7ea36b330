/* Root-mean-square norm and rotary embedding, alone or together.  The specifications are rms_norm/reference.py and
 * rotary/reference.py, bit for bit: the squares are summed in F64, where their order does not show in the F32 mean. */
#include "core.h"

typedef struct {
    const void *x, *weight, *cos, *sin;
    void *out;
    int64_t stride, table_stride, D, C, R; /* rows of D elements, of heads of C; R is -1 without rotation */
    float eps;
    int weight_is_bf16;
} Norm;

M27_INLINE float get(const void *p, int64_t i, int bf16) {
    return bf16 ? bf16_value(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

M27_INLINE void put(void *p, int64_t i, float y, int bf16) {
    if (bf16) ((uint16_t *)p)[i] = bf16_bits(y);
    else ((float *)p)[i] = y;
}

M27_INLINE float rounded(float y, int bf16) { return bf16 ? bf16_value(bf16_bits(y)) : y; }

/* 1 / sqrt(mean of squares + eps). */
M27_INLINE float inverse_root(const Norm *p, const void *x, int bf16) {
    double lane[16] = {0};
    int64_t d = 0;
    for (; d + 16 <= p->D; d += 16)
        for (int j = 0; j < 16; j++) {
            double v = get(x, d + j, bf16);
            lane[j] += v * v;
        }
    for (; d < p->D; d++) {
        double v = get(x, d, bf16);
        lane[0] += v * v;
    }
    for (int half = 8; half; half /= 2)
        for (int j = 0; j < half; j++) lane[j] += lane[j + half];
    float mean = (float)(lane[0] / (double)p->D);
    return 1.0f / (float)sqrt((double)(mean + p->eps));
}

/* out may be x. */
M27_INLINE void norm_row(const Norm *p, const void *x, void *out, int bf16, int weight_bf16) {
    float scale = inverse_root(p, x, bf16);
    for (int64_t d = 0; d < p->D; d++)
        put(out, d, get(p->weight, d, weight_bf16) * rounded(get(x, d, bf16) * scale, bf16), bf16);
}

/* out may be x. */
M27_INLINE void rotate_row(const Norm *p, const void *x, int64_t t, void *out, int bf16) {
    int64_t half = p->R / 2, table = t * p->table_stride;
    for (int64_t head = 0; head < p->D; head += p->C) {
        for (int64_t i = 0; i < half; i++) {
            float a = get(x, head + i, bf16), b = get(x, head + half + i, bf16);
            float turned = rounded(a * get(p->cos, table + i, bf16), bf16);
            float added = rounded(-b * get(p->sin, table + i, bf16), bf16);
            float turned2 = rounded(b * get(p->cos, table + half + i, bf16), bf16);
            float added2 = rounded(a * get(p->sin, table + half + i, bf16), bf16);
            put(out, head + i, turned + added, bf16);
            put(out, head + half + i, turned2 + added2, bf16);
        }
        if (out != x)
            for (int64_t i = p->R; i < p->C; i++) put(out, head + i, get(x, head + i, bf16), bf16);
    }
}

M27_INLINE void rows(const Norm *p, int64_t first, int64_t end, int bf16) {
    int64_t size = bf16 ? 2 : 4;
    for (int64_t t = first; t < end; t++) {
        const void *x = (const char *)p->x + t * p->stride * size;
        void *out = (char *)p->out + t * p->D * size;
        if (p->weight && p->weight_is_bf16) norm_row(p, x, out, bf16, 1);
        else if (p->weight) norm_row(p, x, out, bf16, 0);
        if (p->R >= 0) rotate_row(p, p->weight ? out : x, t, out, bf16);
    }
}

M27_CLONES static void rows_bf16(const Norm *p, int64_t first, int64_t end) { rows(p, first, end, 1); }
M27_CLONES static void rows_f32(const Norm *p, int64_t first, int64_t end) { rows(p, first, end, 0); }

/* Rows [first, end) of x [T, D], `stride` elements apart, to out [T, D]: norm where `weight` is not NULL, then rotation
 * where R is not -1; cos and sin [T, R] lie `table_stride` elements apart. */
M27_EXPORT void m27_norm_rope(const void *x, int x_is_bf16, int64_t stride, int64_t D, const void *weight,
                              int weight_is_bf16, float eps, const void *cos, const void *sin, int64_t table_stride,
                              int64_t C, int64_t R, void *out, int64_t first, int64_t end) {
    Norm p = {x, weight, cos, sin, out, stride, table_stride, D, C, R, eps, weight_is_bf16};
    if (x_is_bf16) M27_IEEE(rows_bf16(&p, first, end));
    else M27_IEEE(rows_f32(&p, first, end));
}
