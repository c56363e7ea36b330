/* The search for sixteen groups, a lane each, in vectors of WIDTH lanes: nvfp4_search.c includes this for each width
 * that a processor may have, with INLINE and NAME().  Vectors are no wider than the processor's, since compilers take
 * comparisons of wider ones apart. */
typedef float NAME(Floats) __attribute__((vector_size(4 * WIDTH)));
typedef int32_t NAME(Ints) __attribute__((vector_size(4 * WIDTH)));

#define Floats NAME(Floats)
#define Ints NAME(Ints)
#define Groups NAME(Groups)
#define all NAME(all)
#define choose NAME(choose)
#define larger_of NAME(larger_of)
#define smaller_of NAME(smaller_of)
#define rounded NAME(rounded)
#define steps NAME(steps)
#define errors NAME(errors)
#define clipped NAME(clipped)

INLINE Floats all(float x) { return (Floats){0} + x; }
INLINE Floats choose(Ints condition, Floats a, Floats b) {
    return (Floats)(((Ints)a & condition) | ((Ints)b & ~condition));
}

/* rounded: to E2M1, ties to either side. */
#if WIDTH == 16
INLINE Floats larger_of(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE Floats smaller_of(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }

/* By a table of quarters. */
INLINE Floats rounded(Floats t) {
    const __m512 near = _mm512_setr_ps(0.0f, 0.5f, 0.5f, 1.0f, 1.0f, 1.5f, 1.5f, 2.0f, 2.0f, 2.0f, 3.0f, 3.0f, 3.0f,
                                       3.0f, 4.0f, 4.0f);
    const __m512 far = _mm512_setr_ps(4.0f, 4.0f, 4.0f, 4.0f, 6.0f, 6.0f, 6.0f, 6.0f, 6.0f, 6.0f, 6.0f, 6.0f, 6.0f,
                                      6.0f, 6.0f, 6.0f);
    __m512i quarters = _mm512_cvttps_epi32(_mm512_min_ps((__m512)(t * 4.0f), _mm512_set1_ps(31.0f)));
    return (Floats)_mm512_permutex2var_ps(near, quarters, far);
}
#else
INLINE Floats larger_of(Floats a, Floats b) { return choose(a > b, a, b); }
INLINE Floats smaller_of(Floats a, Floats b) { return choose(a < b, a, b); }

/* By adding and taking away 1.5 * 2^23 units, where a unit is half of the power of two below t, and 1/2 below 2. */
INLINE Floats rounded(Floats t) {
    Floats magic = larger_of((Floats)((Ints)t & 0x7F800000), all(1.0f)) * 0x1.8p22f;
    return smaller_of((t + magic) - magic, all(6.0f));
}
#endif

/* Some groups, a lane each, in units. */
typedef struct {
    Floats x[GROUP], weight[GROUP];
} Groups;

/* The steps of E4M3 codes. */
INLINE Floats steps(Ints code, float ws2) {
    Floats normal = (Floats)((code << 20) + 0x3C000000);
    return choose(code < 8, __builtin_convertvector(code, Floats) * 0x1p-9f, normal) * ws2;
}

/* Errors in F32 under one step for each lane. */
INLINE Floats errors(const Groups *g, int weighted, Floats step) {
    Floats sum = {0}, inverse = 1.0f / step;
    for (int j = 0; j < GROUP; j++) {
        Floats r = g->x[j] - rounded(g->x[j] * inverse) * step;
        sum += weighted ? r * r * g->weight[j] : r * r;
    }
    return sum;
}

/* Below the error of every scale that is at most as large: what lies beyond 6 d is clipped. */
INLINE Floats clipped(const Groups *g, int weighted, Floats step) {
    Floats sum = {0}, six = 6.0f * step;
    for (int j = 0; j < GROUP; j++) {
        Floats r = larger_of(g->x[j] - six, all(0.0f));
        sum += weighted ? r * r * g->weight[j] : r * r;
    }
    return sum;
}

/* The best scales of the lanes from l0 on, as many as a vector has. */
INLINE void NAME(best_scales)(const Groups16 *given, int l0, const Scales *s, int weighted, uint8_t *best) {
    Groups g;
    float ws2 = s->ws2 * s->unit;
    Floats largest = {0};
    for (int j = 0; j < GROUP; j++) {
        memcpy(g.x + j, given->x[j] + l0, sizeof g.x[j]);
        g.x[j] *= s->unit;
        largest = larger_of(largest, g.x[j]);
        for (int l = 0; weighted && l < WIDTH; l++) g.weight[j][l] = given->small_weight[l0 + l][j];
    }
    Floats sevenths = largest * (SEVENTH / ws2);
    Ints first;
    int high = 0, low = 0;
    for (int l = 0; l < WIDTH; l++) {
        first[l] = unclipped_scale(sevenths[l]);
        int more = last_candidate(first[l]) - first[l];
        high = more > high ? more : high;
    }

    Floats all_errors[SCALES + 16], *error = all_errors + SCALES; /* of scales first + i, i from low to high */
    Floats never = all(INFINITY), least = never, most;
    for (int i = 0; i <= high; i++) {
        error[i] = choose(first + i <= SCALES, errors(&g, weighted, steps(first + i, ws2)), never);
        least = smaller_of(error[i], least);
    }
    for (;; low--) {
        Ints exists = first + low > 1, beyond;
        Floats step = steps(first + (low - 1), ws2);
        most = least * MARGIN + SPECK; /* a candidate above it is not the best */
        beyond = exists & (Ints)(clipped(&g, weighted, step) <= most);
        int32_t any = 0;
        for (int l = 0; l < WIDTH; l++) any |= beyond[l];
        if (!any) break;
        error[low - 1] = choose(exists, errors(&g, weighted, step), never);
        least = smaller_of(error[low - 1], least);
    }

    Ints count = {0}, code = {0};
    for (int i = low; i <= high; i++) {
        Ints may = error[i] <= most;
        count -= may;
        code = ((first + i) & may) | (code & ~may);
    }
    for (int l = 0; l < WIDTH; l++) {
        best[l0 + l] = (uint8_t)code[l];
        if (s->unit == 0.0f || !(largest[l] <= FARTHEST)) /* rare: each candidate may be the best */
            best[l0 + l] = (uint8_t)exact_best(given, l0 + l, s, 0, 1, SCALES, NULL, 0, 0.0f);
        else if (count[l] != 1)
            best[l0 + l] = (uint8_t)exact_best(given, l0 + l, s, first[l], low, high, (const float *)error + l,
                                               WIDTH, most[l]);
    }
}

#undef Floats
#undef Ints
#undef Groups
#undef all
#undef choose
#undef larger_of
#undef smaller_of
#undef rounded
#undef steps
#undef errors
#undef clipped
#undef WIDTH
#undef INLINE
#undef NAME
