/* What packing costs a weight, and whether a packed one is exactly what packing gives.
 * The specification is nvfp4_pack/reference.py; the order of additions is part of it: sixteen sums, one a lane,
 * from left to right along a row. */
#include "nvfp4_fp8.h"

#define ROWS 128     /* at most in one band: their sums stay in the nearest cache */
#define COLUMNS 128  /* at a time: loops of a fixed length, which compilers make vectors of */
#define GROUPS (COLUMNS / GROUP)

/* Signal and noise of a row so far, lane by lane. */
typedef struct {
    double signal[GROUP], noise[GROUP];
} Sums;

/* A stretch of a row.  What lies behind the row's end is zero and adds nothing. */
typedef struct {
    float x[COLUMNS];
    int8_t twice[COLUMNS]; /* two times the E2M1 value */
    float d[COLUMNS];      /* weight_scale * weight_scale_2 of the group */
} Stretch;

/* Sixteen sums, one a lane, to one: lane j takes lane j + 8, j + 4, j + 2, j + 1. */
M27_INLINE double lane_sum(double *lane) {
    for (int half = GROUP / 2; half; half /= 2)
        for (int j = 0; j < half; j++) lane[j] += lane[j + half];
    return lane[0];
}

/* Twice the E2M1 values of magnitudes k, without a table: 0, 1, 2, 3, 4, 6, 8, 12. */
M27_INLINE Lanes twice_e2m1(Lanes k) { return larger(k, larger(2 * k - 4, 4 * k - 16)); }

/* Adds each lane's squares, group by group. */
M27_INLINE void add_errors(Sums *restrict sums, const Stretch *restrict s) {
    float y[COLUMNS];
    for (int i = 0; i < COLUMNS; i++) y[i] = (float)s->twice[i] * 0.5f * s->d[i];
    for (int i = 0; i < GROUP; i++) {
        double signal = sums->signal[i], noise = sums->noise[i];
        for (int g = 0; g < GROUPS; g++) {
            double v = s->x[g * GROUP + i], r = v - (double)y[g * GROUP + i];
            signal += v * v;
            noise += r * r;
        }
        sums->signal[i] = signal;
        sums->noise[i] = noise;
    }
}

/* Eight bytes to sixteen codes. */
M27_INLINE Lanes spread(const uint8_t *bytes) {
    typedef uint16_t Pairs __attribute__((vector_size(GROUP)));
    uint16_t wide[GROUP / 2];
    for (int i = 0; i < GROUP / 2; i++) wide[i] = bytes[i];
    Pairs pair;
    memcpy(&pair, wide, sizeof pair);
    return (Lanes)((pair & 15) | ((pair >> 4) << 8));
}

/* A BF16 weight against any codes and scales. */
M27_CLONES static void row_errors(const uint16_t *weight, int64_t K, float ws2, const uint8_t *codes,
                                  const uint8_t *scales, double *signal, double *noise, int64_t row0,
                                  int64_t row1) {
    for (int64_t n = row0; n < row1; n++) {
        Sums sums = {{0}, {0}};
        for (int64_t left = 0; left < K; left += COLUMNS) {
            int64_t width = left + COLUMNS < K ? COLUMNS : K - left, at = n * K + left;
            Stretch s;
            if (width < COLUMNS) memset(&s, 0, sizeof s);
            for (int64_t i = 0; i < width; i++) s.x[i] = bf16_value(weight[at + i]);
            for (int64_t g = 0; g < width / GROUP; g++) {
                Lanes code = spread(codes + at / 2 + g * (GROUP / 2)), minus = (Lanes)(code > 7);
                Lanes t = (twice_e2m1(code & 7) ^ minus) - minus;
                memcpy(s.twice + g * GROUP, &t, sizeof t);
                float d = e4m3_value(scales[at / GROUP + g] & 0x7F) * ws2;
                for (int i = 0; i < GROUP; i++) s.d[g * GROUP + i] = d;
            }
            add_errors(&sums, &s);
        }
        signal[n] = lane_sum(sums.signal);
        noise[n] = lane_sum(sums.noise);
    }
}

/* block_values without a table, where none is NaN or Inf. */
M27_INLINE void magnitudes(float *restrict x, const uint8_t *restrict p, int64_t count, float scale_inv) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t c = p[i] & 0x7F, is_small = -(uint32_t)(c < 8);
        uint32_t small = f32_bits((float)(int32_t)c * 0x1p-9f), normal = (c << 20) + 0x3C000000u;
        uint32_t u = f32_bits(f32_from_bits((small & is_small) | (normal & ~is_small)) * scale_inv);
        x[i] = f32_from_bits((u + 0x7FFFu + ((u >> 16) & 1)) & 0xFFFF0000u);
    }
}

/* A stretch of one row in one block; 0 where bytes differ or a value is NaN or Inf.  Raises `largest`, an FP8 code. */
M27_INLINE int compare_groups(const uint8_t *p, int64_t groups, float scale_inv, const double *value,
                              Steps *steps, float ws2, const uint8_t *codes, const uint8_t *scales,
                              Sums *sums, int *largest, int64_t ahead) {
    uint64_t differ = 0;
    int all = *largest;
    Stretch s;
    if (groups < GROUPS) memset(&s, 0, sizeof s);
    for (int64_t g = 0; g < groups; g += 4) {
        __builtin_prefetch(p + (g + ahead) * GROUP); /* harmless hints where they lie outside */
        __builtin_prefetch(codes + (g + ahead) * 8);
    }
    __builtin_prefetch(scales + ahead);
    for (int64_t g = 0; g < groups; g++) {
        int most = group_most(p + g * GROUP);
        Steps *e = steps + most;
        all = most > all ? most : all;
        if (e->state != 1) {
            if (e->state == 0) fill(e, value, most, ws2);
            if (e->state == 2) return 0;
        }
        Lanes code = codes_fp8(p + g * GROUP, e);
        uint64_t stored;
        memcpy(&stored, codes + 8 * g, sizeof stored);
        differ |= (stored ^ nibbles(code)) | (uint64_t)(scales[g] ^ e->scale);
        Lanes t = twice_e2m1(code & 7); /* magnitudes alone: (x - y)^2 does not know the sign */
        memcpy(s.twice + g * GROUP, &t, sizeof t);
        float d = e->d;
        for (int i = 0; i < GROUP; i++) s.d[g * GROUP + i] = d;
    }
    magnitudes(s.x, p, groups * GROUP, scale_inv);
    add_errors(sums, &s);
    *largest = all;
    return differ == 0;
}

M27_CLONES static float compare_fp8(const uint8_t *weight, const float *scale_inv, int64_t K, int64_t block_n,
                                  int64_t block_k, float ws2, const uint8_t *codes, const uint8_t *scales,
                                  double *signal, double *noise, int64_t row0, int64_t row1) {
    int64_t J = (K + block_k - 1) / block_k;
    Steps steps[CODES];
    double value[CODES];
    Sums sums[ROWS];
    float amax = 0.0f;
    for (int64_t top = row0, bottom; top < row1; top = bottom) {
        bottom = block_end(top, block_n, row1);
        bottom = bottom < top + ROWS ? bottom : top + ROWS;
        memset(sums, 0, sizeof sums);
        for (int64_t left = 0, right; left < K; left = right) {
            right = block_end(left, block_k, K);
            float scale = fabsf(scale_inv[top / block_n * J + left / block_k]);
            block_values(scale, value);
            for (int m = 0; m < CODES; m++) steps[m].state = 0;
            int largest = 0;
            for (int64_t n = top; n < bottom; n++) {
                for (int64_t k = left; k < right; k += COLUMNS) {
                    int64_t at = n * K + k, groups = (k + COLUMNS < right ? COLUMNS : right - k) / GROUP;
                    if (!compare_groups(weight + at, groups, scale, value, steps, ws2, codes + at / 2,
                                        scales + at / GROUP, sums + (n - top), &largest, block_k / GROUP))
                        return -1.0f;
                }
            }
            amax = value[largest] > amax ? (float)value[largest] : amax;
        }
        for (int64_t n = top; n < bottom; n++) {
            signal[n] = lane_sum(sums[n - top].signal);
            noise[n] = lane_sum(sums[n - top].noise);
        }
    }
    return amax;
}

/* Fills signal[row0..row1) and noise[row0..row1) for a BF16 weight. */
M27_EXPORT void m27_row_errors(const uint16_t *weight, int64_t K, float ws2, const uint8_t *codes,
                               const uint8_t *scales, double *signal, double *noise, int64_t row0,
                               int64_t row1) {
    M27_IEEE(row_errors(weight, K, ws2, codes, scales, signal, noise, row0, row1));
}

/* Where `codes` and `scales` are byte for byte what m27_pack_fp8 gives: the largest BF16 magnitude, and signal and
 * noise as above.  Else -1; the first difference ends it. */
M27_EXPORT float m27_compare_fp8(const uint8_t *weight, const float *scale_inv, int64_t K, int64_t block_n,
                                 int64_t block_k, float ws2, const uint8_t *codes, const uint8_t *scales,
                                 double *signal, double *noise, int64_t row0, int64_t row1) {
    float amax;
    M27_IEEE(amax = compare_fp8(weight, scale_inv, K, block_n, block_k, ws2, codes, scales, signal, noise, row0,
                                row1));
    return amax;
}
