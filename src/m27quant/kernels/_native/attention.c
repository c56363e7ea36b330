/* Attention over a paged cache: every row over its own list of keys.  The specification is
 * fp8_kv_attention/reference.py; its shapes: T rows, H query heads, J key/value heads, C head_dim, G = H/J.
 *
 * What a row gives depends on its query and its list of keys alone: keys are taken in chunks of 64 and spans of 1024
 * counted by position in the list.  A chunk gives its largest score m, the sum l of exp(score - m) and the sum of
 * exp(score - m) v; chunks are merged in order to a span, spans in order to the row.  Rows that share keys are
 * computed together and spans apart from each other without a change of this order.
 */
#include <stdlib.h>

#include "attention_chunk.h"
#include "kv_cache.h"

#define SPAN 1024

typedef struct {
    const void *q;
    void *out;
    int rows_are_bf16, kind; /* of the cache: see kv_cache.h */
    const uint8_t *k_cache, *v_cache;
    const int32_t *table, *sequence, *context;
    const int64_t *tail, *starts; /* group g has the rows from starts[g] to starts[g + 1] */
    int64_t H, J, C, B, X, block_size, heads; /* heads: most of a unit */
    float score_scale, v_scale;
} Attention;

/* One group of rows and some neighbouring key/value heads at work. */
typedef struct {
    int64_t first, rows, head, heads, G, width; /* width: C rounded up to whole stretches */
    int64_t queries;                            /* rows * heads * G, in this order */
    float *q, *part, *total, *k, *v;            /* queries and their states, [CHUNK] keys and values of a head */
    int64_t slots[2][CHUNK];
} Unit;

M27_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

M27_CLONES static void merge(float *state, const float *later, int64_t width) { merge_states(state, later, width); }

/* NQ queries of one row over a chunk of n keys. */
M27_INLINE void chunk_tile(const Attention *p, const Unit *u, int64_t query, int64_t n, int first_of_span, int NQ) {
    _Alignas(64) float score[4][CHUNK];
    int64_t width = u->width, stride = HEADER + width;
    dots(u->q + query * width, u->k, width, n, score, NQ);
    float *state[4], *sum[4];
    _Alignas(64) float fresh[4][HEADER + MAX_WIDTH];
    for (int i = 0; i < NQ; i++) {
        state[i] = first_of_span ? u->part + (query + i) * stride : fresh[i];
        sum[i] = state[i] + HEADER;
        soften(score[i], n, p->score_scale, &state[i][0], &state[i][1]);
    }
    int64_t c = 0;
    for (; c + 64 <= width; c += 64) weigh(score, u->v, width, n, sum, NQ, 4, c);
    for (; c < width; c += 16) weigh(score, u->v, width, n, sum, NQ, 1, c);
    if (!first_of_span)
        for (int i = 0; i < NQ; i++) merge(u->part + (query + i) * stride, fresh[i], width);
}

/* All queries of row r and head h of the unit over the n keys that lie in the scratch. */
M27_CLONES static void chunk_row(const Attention *p, const Unit *u, int64_t r, int64_t h, int64_t n,
                                 int first_of_span) {
    int64_t query = (r * u->heads + h) * u->G, end = query + u->G;
    for (; query + 4 <= end; query += 4) chunk_tile(p, u, query, n, first_of_span, 4);
    for (; query + 2 <= end; query += 2) chunk_tile(p, u, query, n, first_of_span, 2);
    for (; query < end; query++) chunk_tile(p, u, query, n, first_of_span, 1);
}

M27_INLINE int64_t tail_length(const Attention *p, int64_t t) {
    int64_t n = 0;
    while (n < p->X && p->tail[t * p->X + n] >= 0) n++;
    return n;
}

/* The slots of the n keys from `key` on of row t. */
M27_INLINE void find(const Attention *p, int64_t t, int64_t key, int64_t n, int64_t *slots) {
    const int32_t *table = p->table + p->sequence[t] * p->B;
    int64_t context = p->context[t];
    for (int64_t i = 0; i < n; i++, key++)
        slots[i] = key < context ? table[key / p->block_size] * p->block_size + key % p->block_size
                                 : p->tail[t * p->X + key - context];
}

M27_INLINE void prefetch(const uint8_t *from, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + line);
}

/* Keys and values of head h of some slots to the scratch; of the next ones all heads on their way to the cache. */
M27_INLINE void fetch_kind(const Attention *p, const Unit *u, int64_t h, const int64_t *slots, int64_t n,
                           const int64_t *next, int64_t num_next, int kind) {
    int64_t bytes = p->C * kv_bytes(kind);
    for (int64_t i = 0; i < n; i++) {
        int64_t at = (slots[i] * p->J + u->head + h) * bytes;
        int64_t piece = h * n + i; /* of the next keys, in the order of memory */
        if (piece < num_next * u->heads) {
            int64_t ahead = (next[piece / u->heads] * p->J + u->head + piece % u->heads) * bytes;
            prefetch(p->k_cache + ahead, bytes);
            prefetch(p->v_cache + ahead, bytes);
        }
        kv_decode(p->k_cache + at, kind, p->C, u->k + i * u->width);
        kv_decode(p->v_cache + at, kind, p->C, u->v + i * u->width);
    }
}

M27_CLONES static void fetch(const Attention *p, const Unit *u, int64_t h, const int64_t *slots, int64_t n,
                             const int64_t *next, int64_t num_next) {
    if (p->kind == KV_E4M3) fetch_kind(p, u, h, slots, n, next, num_next, KV_E4M3);
    else if (p->kind == KV_BF16) fetch_kind(p, u, h, slots, n, next, num_next, KV_BF16);
    else fetch_kind(p, u, h, slots, n, next, num_next, KV_F32);
}

/* One span for all rows of a unit, to `part`; rows whose lists end before it are left out. */
static void span(const Attention *p, Unit *u, int64_t from) {
    int64_t tails[MAX_ROWS];
    for (int64_t r = 0; r < u->rows; r++) tails[r] = tail_length(p, u->first + r);
    int64_t known = -1; /* where the keys of slots[0] start */
    for (int64_t key = from; key < from + SPAN; key += CHUNK) {
        int64_t shared = 0, next = 0, longest = u->first;
        for (int64_t r = 0; r < u->rows; r++) {
            int64_t context = p->context[u->first + r], own = tails[r] && context < key + CHUNK;
            if (!own && context - key > shared) shared = context - key, longest = u->first + r;
        }
        next = key + CHUNK < from + SPAN ? min64(CHUNK, shared - CHUNK) : 0;
        shared = min64(shared, CHUNK);
        if (shared && known != key) find(p, longest, key, shared, u->slots[0]);
        if (next > 0) find(p, longest, key + CHUNK, next, u->slots[1]);
        for (int64_t h = 0; h < u->heads && shared; h++) {
            fetch(p, u, h, u->slots[0], shared, u->slots[1], next);
            for (int64_t r = 0; r < u->rows; r++) {
                int64_t context = p->context[u->first + r], own = tails[r] && context < key + CHUNK;
                if (!own && context > key) chunk_row(p, u, r, h, min64(context - key, CHUNK), key == from);
            }
        }
        if (next == CHUNK) {
            memcpy(u->slots[0], u->slots[1], sizeof u->slots[0]);
            known = key + CHUNK;
        }
        for (int64_t r = 0; r < u->rows; r++) {
            int64_t context = p->context[u->first + r], n = min64(context + tails[r] - key, CHUNK);
            if (!tails[r] || context >= key + CHUNK || n <= 0) continue;
            int64_t slots[CHUNK];
            find(p, u->first + r, key, n, slots);
            for (int64_t h = 0; h < u->heads; h++) {
                fetch(p, u, h, slots, n, NULL, 0);
                chunk_row(p, u, r, h, n, key == from);
            }
        }
    }
}

/* Where query i of the unit stands among all T * H. */
M27_INLINE int64_t row_of(const Attention *p, const Unit *u, int64_t i) {
    int64_t among = u->heads * u->G;
    return (u->first + i / among) * p->H + u->head * u->G + i % among;
}

static void load_queries(const Attention *p, const Unit *u) {
    for (int64_t i = 0; i < u->queries; i++) {
        int64_t at = row_of(p, u, i) * p->C;
        float *q = u->q + i * u->width;
        memset(q, 0, (size_t)u->width * sizeof *q);
        for (int64_t c = 0; c < p->C; c++)
            q[kv_place(c, p->kind)] =
                p->rows_are_bf16 ? bf16_value(((const uint16_t *)p->q)[at + c]) : ((const float *)p->q)[at + c];
    }
}

static void write_query(const Attention *p, const Unit *u, int64_t i, const float *state) {
    int64_t at = row_of(p, u, i) * p->C;
    for (int64_t c = 0; c < p->C; c++) {
        float y = state ? state[HEADER + kv_place(c, p->kind)] / state[1] * p->v_scale : 0;
        if (p->rows_are_bf16)
            ((uint16_t *)p->out)[at + c] = bf16_bits(y);
        else
            ((float *)p->out)[at + c] = y;
    }
}

M27_INLINE int64_t num_spans(const Attention *p, int64_t t) {
    return (p->context[t] + tail_length(p, t) + SPAN - 1) / SPAN;
}

static void whole_unit(const Attention *p, Unit *u) {
    int64_t stride = HEADER + u->width, most = 0;
    load_queries(p, u);
    for (int64_t r = 0; r < u->rows; r++) {
        int64_t spans = num_spans(p, u->first + r);
        most = spans > most ? spans : most;
    }
    for (int64_t s = 0; s < most; s++) {
        span(p, u, s * SPAN);
        for (int64_t i = 0; i < u->queries; i++) {
            if (s >= num_spans(p, u->first + i / (u->heads * u->G))) continue;
            float *total = u->total + i * stride, *part = u->part + i * stride;
            if (s) merge(total, part, u->width);
            else memcpy(total, part, (size_t)stride * sizeof *part);
        }
    }
    for (int64_t i = 0; i < u->queries; i++)
        write_query(p, u, i, num_spans(p, u->first + i / (u->heads * u->G)) ? u->total + i * stride : NULL);
}

static void one_span(const Attention *p, Unit *u, int64_t s, float *parts) {
    load_queries(p, u);
    span(p, u, s * SPAN);
    memcpy(parts, u->part, (size_t)(u->queries * (HEADER + u->width)) * sizeof *parts);
}

/* parts: [spans, queries] states; the first span's are added to. */
static void join_spans(const Attention *p, const Unit *u, int64_t queries, float *parts) {
    int64_t stride = HEADER + u->width;
    for (int64_t i = 0; i < u->queries; i++) {
        int64_t spans = num_spans(p, u->first + i / (u->heads * u->G));
        for (int64_t s = 1; s < spans; s++) merge(parts + i * stride, parts + (s * queries + i) * stride, u->width);
        write_query(p, u, i, spans ? parts + i * stride : NULL);
    }
}

static int64_t width_of(int64_t C, int kind) {
    int64_t n = kv_stretch(kind);
    return (C + n - 1) / n * n;
}

static void make_unit(const Attention *p, int64_t index, Unit *u) {
    int64_t blocks = (p->J + p->heads - 1) / p->heads, group = index / blocks;
    u->head = index % blocks * p->heads;
    u->heads = min64(p->heads, p->J - u->head);
    u->first = p->starts[group];
    u->rows = p->starts[group + 1] - u->first;
    u->G = p->H / p->J;
    u->width = width_of(p->C, p->kind);
    u->queries = u->rows * u->heads * u->G;
}

static void run(const Attention *p, int64_t max_queries, int64_t spans, float *parts, int join, Unit *u, int64_t first,
                int64_t end) {
    for (int64_t item = first; item < end; item++) {
        int64_t unit = spans && !join ? item / spans : item;
        make_unit(p, unit, u);
        float *at = parts + unit * spans * max_queries * (HEADER + u->width);
        if (!spans) whole_unit(p, u);
        else if (join) join_spans(p, u, max_queries, at);
        else one_span(p, u, item % spans, at + item % spans * max_queries * (HEADER + u->width));
    }
}

/* Items [first, end).  spans = 0: an item is a unit (group of rows, `heads` key/value heads), computed whole.  Else a span of
 * a unit, which goes to `parts`, F32 [units, spans, max_queries, 16 + width]; with `join` a unit again, whose parts
 * become its result.  0 where there is no memory. */
M27_EXPORT int m27_attention(const void *q, void *out, int rows_are_bf16, const void *k_cache, const void *v_cache,
                             int kind, const int32_t *table, const int32_t *sequence, const int32_t *context,
                             const int64_t *tail, const int64_t *starts, int64_t H, int64_t J, int64_t C, int64_t B,
                             int64_t X, int64_t block_size, int64_t heads, float score_scale, float v_scale,
                             int64_t max_queries, int64_t spans, float *parts, int join, int64_t first, int64_t end) {
    Attention p = {q, out, rows_are_bf16, kind, k_cache, v_cache, table, sequence, context, tail, starts, H, J, C, B,
                   X, block_size, heads, score_scale, v_scale};
    int64_t width = width_of(C, kind), queries = max_queries * (3 * width + 2 * HEADER), keys = 2 * CHUNK * width;
    float *scratch = aligned_alloc(64, (size_t)(queries + keys) * sizeof *scratch);
    if (!scratch) return 0;
    memset(scratch, 0, (size_t)(queries + keys) * sizeof *scratch);
    Unit u;
    u.k = scratch;
    u.v = u.k + CHUNK * width;
    u.q = u.v + CHUNK * width;
    u.part = u.q + max_queries * width;
    u.total = u.part + max_queries * (HEADER + width);
    M27_IEEE(run(&p, max_queries, spans, parts, join, &u, first, end));
    free(scratch);
    return 1;
}

/* Cuts T rows into groups of neighbours of one sequence, at most `most` in each: starts[0..groups].  Returns their
 * number, and the longest list to *longest; -1 where a list points outside of the table or of the cache. */
M27_EXPORT int64_t m27_attention_plan(const int32_t *table, const int32_t *sequence, const int32_t *context,
                                      const int64_t *tail, int64_t T, int64_t S, int64_t B, int64_t X,
                                      int64_t block_size, int64_t num_blocks, int64_t most, int64_t *starts,
                                      int64_t *longest) {
    int64_t groups = 0, checked = 0;
    *longest = 0;
    starts[0] = 0;
    if (most > MAX_ROWS) most = MAX_ROWS;
    for (int64_t t = 0; t < T; t++) {
        int64_t s = sequence[t], n = context[t], tails = 0;
        if (s < 0 || s >= S || n < 0 || n > B * block_size) return -1;
        int same = t && sequence[t - 1] == s;
        if (!same) checked = 0;
        for (int64_t blocks = (n + block_size - 1) / block_size; checked < blocks; checked++)
            if (table[s * B + checked] < 0 || table[s * B + checked] >= num_blocks) return -1;
        for (int64_t x = 0; x < X; x++) {
            int64_t slot = tail[t * X + x];
            if (slot < -1 || slot >= num_blocks * block_size) return -1;
        }
        while (tails < X && tail[t * X + tails] >= 0) tails++;
        if (n + tails > *longest) *longest = n + tails;
        if (!same || t - starts[groups ? groups - 1 : 0] >= most) starts[groups++] = t;
    }
    starts[groups] = T;
    return groups;
}
