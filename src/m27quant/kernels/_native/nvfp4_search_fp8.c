/* The least-error search on FP8 blocks by table: under one block scale the error of an element is a function of its
 * 7-bit code, for each candidate scale.  Tables of 128 errors in 16 bits, rounded down, lie in four registers, and a
 * permutation looks up 64 elements at a time; sixteen groups go together.
 *
 * Sums of 16 errors that are rounded down lie less than 16 below the true ones, in units of the table: MARGIN apart
 * they are in the right order.  What lies nearer is compared exactly, group by group.  The scales that are tried end
 * with the last one that any of the groups can have, and go down until another table, of what is clipped, puts all
 * smaller ones out of the question for every group.  See docs/quality.md.
 */
#include "nvfp4_search.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_TABLES 1
#include <immintrin.h>
#include <stdlib.h>

#define TARGET __attribute__((target("avx2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")))
#define VECTORS 4   /* of 64 codes, which is 4 groups, in a batch of LANES */
#define MARGIN 18   /* 16, and what F32 arithmetic is off */
#define LEAST 256   /* smaller sums tell too little */
#define MOST 65535  /* larger ones may hold a saturated error */
#define USUAL 1.8e-5f /* of the mean square: a unit in which most groups have sums of some thousand */

enum { ERROR, CLIPPED, KINDS };

typedef struct {
    uint8_t high[CODES], low[CODES];
} Table;

typedef struct {
    Table table[KINDS][SCALES + 1];
    uint8_t known[KINDS][SCALES + 1];
    uint8_t last[CODES]; /* the last candidate of a group by its largest FP8 code */
    float x[CODES];      /* magnitudes in units */
    float per_unit;      /* of the tables */
    const Scales *scales;
} Tables;

TARGET static void build(Tables *t, int kind, int code) {
    const Candidate *c = t->scales->of + code;
    float step = t->scales->step[code];
    Table *to = &t->table[kind][code];
    for (int i = 0; i < CODES; i++) {
        float x = t->x[i], r;
        if (kind == ERROR) {
            float k = 0.0f;
            for (int n = 1; n < 8; n++) {
                float gap = n < 5 ? 0.5f : n < 7 ? 1.0f : 2.0f;
                k += x > c->last[n] * t->scales->unit ? gap : 0.0f;
            }
            r = x - k * step;
        } else {
            r = x - 6.0f * step;
            r = r > 0.0f ? r : 0.0f;
        }
        float e = r * r * t->per_unit;
        int32_t units = (int32_t)(e < 65535.0f ? e : 65535.0f);
        to->high[i] = (uint8_t)(units >> 8);
        to->low[i] = (uint8_t)units;
    }
    t->known[kind][code] = 1;
}

/* The sums of sixteen groups; lane 4 g + v is group g of vector v. */
TARGET M27_INLINE __m512i sums(Tables *t, int kind, int code, const __m512i *c) {
    if (!t->known[kind][code]) build(t, kind, code);
    const Table *table = &t->table[kind][code];
    __m512i h0 = _mm512_loadu_si512(table->high), h1 = _mm512_loadu_si512(table->high + 64);
    __m512i l0 = _mm512_loadu_si512(table->low), l1 = _mm512_loadu_si512(table->low + 64);
    __m512i sum[VECTORS], zero = _mm512_setzero_si512();
    for (int v = 0; v < VECTORS; v++) {
        __m512i high = _mm512_sad_epu8(_mm512_permutex2var_epi8(h0, c[v], h1), zero);
        __m512i low = _mm512_sad_epu8(_mm512_permutex2var_epi8(l0, c[v], l1), zero);
        sum[v] = _mm512_add_epi64(_mm512_slli_epi64(high, 8), low); /* two halves of each group */
    }
    __m512i ab = _mm512_or_si512(sum[0], _mm512_slli_epi64(sum[1], 32));
    __m512i cd = _mm512_or_si512(sum[2], _mm512_slli_epi64(sum[3], 32));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

TARGET M27_INLINE int largest_code(const __m512i *c) {
    __m512i m = _mm512_max_epu8(_mm512_max_epu8(c[0], c[1]), _mm512_max_epu8(c[2], c[3]));
    __m256i half = _mm256_max_epu8(_mm512_castsi512_si256(m), _mm512_extracti64x4_epi64(m, 1));
    __m128i b = _mm_max_epu8(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    b = _mm_max_epu8(b, _mm_srli_si128(b, 8));
    b = _mm_max_epu8(b, _mm_srli_si128(b, 4));
    b = _mm_max_epu8(b, _mm_srli_si128(b, 2));
    b = _mm_max_epu8(b, _mm_srli_si128(b, 1));
    return _mm_cvtsi128_si32(b) & 0xFF;
}

static void magnitudes(const uint8_t *p, const double *value, int stride, float *x) {
    for (int j = 0; j < GROUP; j++) x[j * stride] = (float)value[p[j] & 0x7F];
}

/* Of the scales whose sums lie below `most` the first of the best, by the specification. */
static int exact_best(const uint8_t *p, const double *value, const Scales *s, const int32_t *sum, int low, int high,
                      int32_t most) {
    float x[GROUP];
    magnitudes(p, value, 1, x);
    int best = 0;
    double least = INFINITY;
    for (int code = low; code < high; code++) {
        if (sum[(code - low) * LANES] >= most) continue;
        double e = exact_error(x, NULL, s->of + code);
        if (e < least) least = e, best = code;
    }
    return best;
}

/* Sixteen groups.  p: where the vectors lie; start: the first scale to try, changed for the next batch; out: where the
 * scales of the groups go. */
TARGET static int search_batch(Tables *t, const uint8_t *const *p, const double *value, int first_bad, int *start,
                               uint8_t *const *out) {
    __m512i c[VECTORS], sum[SCALES + 1], best = _mm512_set1_epi32(INT32_MAX);
    for (int v = 0; v < VECTORS; v++) c[v] = _mm512_and_si512(_mm512_loadu_si512(p[v]), _mm512_set1_epi8(0x7F));
    int largest = largest_code(c);
    if (largest >= first_bad) return 0;
    int high = t->last[largest] + 1, low = *start < high ? *start : high - 1, tests = 0;
    for (int code = low; code < high; code++) {
        sum[code] = sums(t, ERROR, code, c);
        best = _mm512_min_epi32(best, sum[code]);
    }
    __mmask16 alone, beyond; /* alone: left to the search by numbers */
    do {
        alone = _mm512_cmplt_epi32_mask(best, _mm512_set1_epi32(LEAST)) |
                _mm512_cmpge_epi32_mask(best, _mm512_set1_epi32(MOST));
        if (low <= 1) break;
        __m512i most = _mm512_add_epi32(best, _mm512_set1_epi32(MARGIN));
        beyond = _mm512_cmplt_epi32_mask(sums(t, CLIPPED, low - 1, c), most) & ~alone;
        for (int n = 0; beyond && n < 2 && low > 1; n++) {
            low--;
            sum[low] = sums(t, ERROR, low, c);
            best = _mm512_min_epi32(best, sum[low]);
        }
        tests++;
    } while (beyond);
    *start = tests == 1 && low + 8 < high ? low + 1 : low;

    __m512i most = _mm512_add_epi32(best, _mm512_set1_epi32(MARGIN)), code = _mm512_setzero_si512();
    __mmask16 one = 0, several = 0;
    for (int s = low; s < high; s++) {
        __mmask16 may = _mm512_cmplt_epi32_mask(sum[s], most);
        code = _mm512_mask_mov_epi32(code, may, _mm512_set1_epi32(s));
        several |= one & may;
        one |= may;
    }
    int32_t chosen[LANES], limit[LANES];
    _mm512_storeu_si512(chosen, code);
    _mm512_storeu_si512(limit, most);
    for (unsigned left = several & ~alone; left; left &= left - 1) {
        int lane = __builtin_ctz(left);
        chosen[lane] = exact_best(p[lane % VECTORS] + lane / VECTORS * GROUP, value, t->scales,
                                  (const int32_t *)(sum + low) + lane, low, high, limit[lane]);
    }
    if (alone) {
        Groups16 g = {.weight = {NULL}};
        uint8_t found[LANES];
        for (int lane = 0; lane < LANES; lane++)
            magnitudes(p[lane % VECTORS] + lane / VECTORS * GROUP, value, LANES, &g.x[0][lane]);
        nvfp4_best_scales(&g, t->scales, found);
        for (int lane = 0; lane < LANES; lane++)
            if (alone >> lane & 1) chosen[lane] = found[lane];
    }
    for (int lane = 0; lane < LANES; lane++) out[lane % VECTORS][lane / VECTORS] = (uint8_t)chosen[lane];
    return 1;
}

int nvfp4_has_tables(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bw");
}

void *nvfp4_new_tables(void) { return malloc(sizeof(Tables)); }

/* The scales of a block's groups: 1, 0 where it holds a NaN or Inf, -1 where the tables do not suit it. */
int nvfp4_search_block(void *memory, const Scales *s, const uint8_t *weight, int64_t K, const double *value,
                       int64_t top, int64_t bottom, int64_t left, int64_t right, uint8_t *scales) {
    Tables *t = memory;
    int64_t across = (right - left) / 64, vectors = (bottom - top) * across;
    if ((right - left) % 64 || vectors < 64 || s->unit == 0.0f) return -1;
    int first_bad = 0;
    while (first_bad < CODES && value[first_bad] < INFINITY) first_bad++;
    float mean = 0.0f;
    for (int64_t i = 0; i < 256; i++) { /* a sample, as good as any */
        int64_t v = vectors * i / 256, at = (top + v / across) * K + left + v % across * 64 + i * 37 % 64;
        int c = weight[at] & 0x7F;
        mean += c < first_bad ? (float)value[c] * s->unit * (1.0f / 256) : 0.0f;
    }
    if (!(mean > 0x1p-20f && mean < 0x1p20f)) return -1;
    float square = mean * mean * 1.57f; /* the mean square of a Gaussian */
    memset(t->known, 0, sizeof t->known);
    t->scales = s;
    t->per_unit = 1.0f / (USUAL * square);
    for (int c = 0; c < CODES; c++) {
        float x = c < first_bad ? (float)value[c] * s->unit : 0.0f;
        t->x[c] = x < 0x1p40f ? x : 0x1p40f; /* far beyond what saturates */
        t->last[c] = (uint8_t)last_candidate(unclipped_scale(x * (SEVENTH / (s->ws2 * s->unit))));
    }
    float guess = 0.25f * sqrtf(square) / (s->ws2 * s->unit);
    int low = e4m3_code(guess < 0x1p-9f ? 0x1p-9f : guess > 448.0f ? 448.0f : guess);
    for (int64_t first = 0; first < vectors; first += VECTORS) {
        const uint8_t *p[VECTORS];
        uint8_t *out[VECTORS];
        for (int64_t i = 0; i < VECTORS; i++) {
            int64_t v = first + i < vectors ? first + i : vectors - 1;
            int64_t at = (top + v / across) * K + left + v % across * 64;
            p[i] = weight + at;
            out[i] = scales + at / GROUP;
        }
        if (!search_batch(t, p, value, first_bad, &low, out)) return 0;
    }
    return 1;
}

#else
int nvfp4_has_tables(void) { return 0; }
void *nvfp4_new_tables(void) { return NULL; }
int nvfp4_search_block(void *memory, const Scales *s, const uint8_t *weight, int64_t K, const double *value,
                       int64_t top, int64_t bottom, int64_t left, int64_t right, uint8_t *scales) {
    (void)memory, (void)s, (void)weight, (void)K, (void)value;
    (void)top, (void)bottom, (void)left, (void)right, (void)scales;
    return -1;
}
#endif
