/* Routed experts on a CPU: one pass over the weights of each expert that some token chose.
 * The specification is nvfp4_moe/reference.py, the layout of weights and activations is in nvfp4.h.
 *
 * A slot is a place t * K + k of the routing.  Slots are sorted by expert and cut into tiles of one expert's slots;
 * the phases below work on tiles, or on chunks of an expert's rows, whoever of the threads comes first.  What a slot
 * gets depends on nothing but its row and its expert.
 *
 * Shapes: T tokens, D hidden, I intermediate, K experts per token, E experts held. */
#include "nvfp4.h"

#define CHUNK 4 /* blocks of rows that stay in the cache while all tiles of an expert pass */

typedef struct {
    int64_t expert, start, size; /* a stretch of `order` */
} Tile;

/* What plan() finds; numbers of 64 bits in a buffer of the caller. */
typedef struct {
    int64_t num_tiles, num_hit;
    int64_t *order;  /* [T * K] slots by expert, as they stand within one */
    int64_t *rows;   /* [T * K] the token of each */
    int64_t *bounds; /* [E + 1] */
    int64_t *hit;    /* [E] experts that have slots */
    int64_t *tile0;  /* [E + 1] the first tile of hit[i] */
    Tile *tiles;     /* [T * K] at most */
} Plan;

typedef struct {
    const Level *level;
    Kind kind;
    Rows x, act; /* act: [T * K, I] in sorted order, x's format */
    int64_t T, D, I, K, E, first;
    const int64_t *experts;
    const float *weights;
    const uint8_t *codes[3], *scales[3]; /* w1, w2, w3 of all experts */
    const float *globals;                /* [E, 3] */
    const float *input_scales;           /* [E, 2], NULL in W4A16 */
    uint8_t *panel1, *panel2;            /* x and act, arranged in sorted order */
    double *factor1, *factor2;           /* [T * K] */
    float *out;                          /* [T * K, D] by slot */
    void *y;
    Plan *plan;
} Moe;

M27_INLINE Matrix matrix_of(const Moe *a, int which, int64_t expert) {
    int64_t N = which == 1 ? a->D : a->I, K = which == 1 ? a->I : a->D;
    int64_t groups = num_blocks(N) * (K / GROUP);
    return (Matrix){a->codes[which] + expert * groups * GROUP_BYTES, a->scales[which] + expert * groups * ROWS, N, K};
}

/* The expert of a slot within the slice, or -1. */
M27_INLINE int64_t expert_of(const Moe *a, int64_t slot) {
    int64_t e = a->experts[slot] - a->first;
    return 0 <= e && e < a->E ? e : -1;
}

static void plan(const Moe *a) {
    Plan *p = a->plan;
    int64_t slots = a->T * a->K;
    memset(p->bounds, 0, (size_t)(a->E + 1) * sizeof *p->bounds);
    for (int64_t s = 0; s < slots; s++)
        if (expert_of(a, s) >= 0) p->bounds[expert_of(a, s) + 1]++;
    for (int64_t e = 0; e < a->E; e++) p->bounds[e + 1] += p->bounds[e];
    memcpy(p->hit, p->bounds, (size_t)a->E * sizeof *p->hit); /* where the next slot of each goes */
    for (int64_t s = 0; s < slots; s++) {
        if (expert_of(a, s) < 0) continue;
        int64_t at = p->hit[expert_of(a, s)]++;
        p->order[at] = s;
        p->rows[at] = s / a->K;
    }
    p->num_hit = p->num_tiles = 0;
    for (int64_t e = 0; e < a->E; e++) {
        int64_t size = p->bounds[e + 1] - p->bounds[e], tiles = (size + TILE - 1) / TILE;
        if (!size) continue;
        p->hit[p->num_hit] = e;
        p->tile0[p->num_hit++] = p->num_tiles;
        for (int64_t i = 0; i < tiles; i++) {
            int64_t start = p->bounds[e] + size * i / tiles, end = p->bounds[e] + size * (i + 1) / tiles;
            p->tiles[p->num_tiles++] = (Tile){e, start, end - start};
        }
    }
    p->tile0[p->num_hit] = p->num_tiles;
}

static void arrange_x(const Moe *a, int64_t i) {
    Tile tile = a->plan->tiles[i];
    nvfp4_arrange(a->kind, a->x, a->plan->rows + tile.start, (int)tile.size,
                  a->input_scales ? a->input_scales[2 * tile.expert] : 1.0f,
                  a->panel1 + tile.start * panel_bytes(a->kind, a->D), a->factor1 + tile.start);
}

static void arrange_act(const Moe *a, int64_t i) {
    Tile tile = a->plan->tiles[i];
    int64_t index[TILE];
    for (int t = 0; t < tile.size; t++) index[t] = tile.start + t;
    nvfp4_arrange(a->kind, a->act, index, (int)tile.size,
                  a->input_scales ? a->input_scales[2 * tile.expert + 1] : 1.0f,
                  a->panel2 + tile.start * panel_bytes(a->kind, a->I), a->factor2 + tile.start);
}

/* e^x, to one or two units of the last place; at least e^-88, Inf above 88.7, NaN stays. */
M27_INLINE float exponential(float x) {
    float bounded = x < -88.0f ? -88.0f : x > 89.0f ? 89.0f : x; /* false for NaN */
    float n = bounded * 0x1.715476p+0f + 0x1.8p23f;              /* the nearest integer, in the lowest bits */
    uint32_t bits = f32_bits(n);
    n -= 0x1.8p23f;
    float r = bounded - n * 0x1.62ep-1f - n * 0x1.0bfbe8p-15f; /* ln 2 in two parts: the first product is exact */
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    /* 2^n in two factors, as neither 2^128 nor 2^-127 is a normal number */
    int32_t e = (int32_t)(bits - 0x4B400000u), half = e >> 1;
    float two = f32_from_bits((uint32_t)(half + 127) << 23), rest = f32_from_bits((uint32_t)(e - half + 127) << 23);
    return p * two * rest;
}

/* silu(gate) * up of one token and 16 rows. */
M27_CLONES static void swiglu(const float *gate, const float *up, double gate_factor, double up_factor, int is_bf16,
                              void *act) {
    float v[ROWS];
    for (int r = 0; r < ROWS; r++) {
        float g = (float)((double)gate[r] * gate_factor), u = (float)((double)up[r] * up_factor);
        v[r] = g / (1.0f + exponential(-g)) * u;
    }
    if (is_bf16)
        for (int r = 0; r < ROWS; r++) ((uint16_t *)act)[r] = bf16_bits(v[r]);
    else memcpy(act, v, sizeof v);
}

static void gate_up_chunk(const Moe *a, int64_t item) {
    const Plan *p = a->plan;
    int64_t chunks = (num_blocks(a->I) + CHUNK - 1) / CHUNK, h = item / chunks, block0 = item % chunks * CHUNK;
    int64_t expert = p->hit[h], end = block0 + CHUNK < num_blocks(a->I) ? block0 + CHUNK : num_blocks(a->I);
    Matrix w1 = matrix_of(a, 0, expert), w3 = matrix_of(a, 2, expert);
    double global1 = a->globals[3 * expert], global3 = a->globals[3 * expert + 2];
    for (int64_t i = p->tile0[h]; i < p->tile0[h + 1]; i++) {
        Tile tile = p->tiles[i];
        const uint8_t *panel = a->panel1 + tile.start * panel_bytes(a->kind, a->D);
        Dot dot = dot_of(a->level, a->kind, (int)tile.size);
        for (int64_t block = block0; block < end; block++) {
            float gate[TILE * ROWS], up[TILE * ROWS];
            block_dot(dot, w1, block, panel, gate);
            block_dot(dot, w3, block, panel, up);
            for (int64_t t = 0; t < tile.size; t++) {
                double factor = a->factor1[tile.start + t];
                int64_t at = (tile.start + t) * a->I + block * ROWS;
                swiglu(gate + t * ROWS, up + t * ROWS, factor * global1, factor * global3, a->x.is_bf16,
                       (uint8_t *)(uintptr_t)a->act.data + at * (a->x.is_bf16 ? 2 : 4));
            }
        }
    }
}

static void down_chunk(const Moe *a, int64_t item) {
    const Plan *p = a->plan;
    int64_t chunks = (num_blocks(a->D) + CHUNK - 1) / CHUNK, h = item / chunks, block0 = item % chunks * CHUNK;
    int64_t expert = p->hit[h], end = block0 + CHUNK < num_blocks(a->D) ? block0 + CHUNK : num_blocks(a->D);
    Matrix w2 = matrix_of(a, 1, expert);
    double global = a->globals[3 * expert + 1];
    for (int64_t i = p->tile0[h]; i < p->tile0[h + 1]; i++) {
        Tile tile = p->tiles[i];
        const uint8_t *panel = a->panel2 + tile.start * panel_bytes(a->kind, a->I);
        Dot dot = dot_of(a->level, a->kind, (int)tile.size);
        for (int64_t block = block0; block < end; block++) {
            float sum[TILE * ROWS];
            block_dot(dot, w2, block, panel, sum);
            for (int64_t t = 0; t < tile.size; t++) {
                double factor = a->factor2[tile.start + t] * global;
                float *out = a->out + p->order[tile.start + t] * a->D + block * ROWS;
                for (int r = 0; r < ROWS; r++) out[r] = (float)((double)sum[t * ROWS + r] * factor);
            }
        }
    }
}

#define STRETCH 512 /* columns of a token that are summed at a time */

/* y = the sum over a token's slots, in their order. */
M27_CLONES static void combine(const Moe *a, int64_t t) {
    for (int64_t left = 0; left < a->D; left += STRETCH) {
        int64_t width = left + STRETCH < a->D ? STRETCH : a->D - left;
        float y[STRETCH] = {0};
        for (int64_t s = t * a->K; s < (t + 1) * a->K; s++) {
            if (expert_of(a, s) < 0) continue;
            const float *out = a->out + s * a->D + left;
            for (int64_t d = 0; d < width; d++) y[d] += a->weights[s] * out[d];
        }
        int64_t at = t * a->D + left;
        if (a->x.is_bf16)
            for (int64_t d = 0; d < width; d++) ((uint16_t *)a->y)[at + d] = bf16_bits(y[d]);
        else memcpy((float *)a->y + at, y, (size_t)width * sizeof *y);
    }
}

#define NUM_PHASES 6

/* Numbers of 64 bits that the plan and the phases take. */
M27_EXPORT int64_t m27_nvfp4_moe_words(int64_t slots, int64_t E) {
    return NUM_PHASES * (int64_t)sizeof(Phase) / 8 + 2 + 5 * slots + 3 * E + 2;
}

/* y [T, D].  Called by every thread with the same arguments; D and I are multiples of 16.
 * `input_scales`: NULL for W4A16.  `panel1`, `panel2`: T * K times panel_bytes of D and of I; `factors`: [2, T * K];
 * `act`: [T * K, I] in x's format; `out`: [T * K, D]; `words`: as many as m27_nvfp4_moe_words() says, zero. */
M27_EXPORT void m27_nvfp4_moe(int level, const void *x, int is_bf16, int64_t T, int64_t D, int64_t I, int64_t K,
                              int64_t E, int64_t first, const int64_t *experts, const float *weights,
                              const uint8_t *codes1, const uint8_t *scales1, const uint8_t *codes2,
                              const uint8_t *scales2, const uint8_t *codes3, const uint8_t *scales3,
                              const float *globals, const float *input_scales, uint8_t *panel1, uint8_t *panel2,
                              double *factors, void *act, float *out, void *y, int64_t *words) {
    int64_t slots = T * K;
    Phase *phases = (Phase *)words;
    Moe a = {
        .level = nvfp4_level(level),
        .x = {x, D, is_bf16},
        .act = {act, I, is_bf16},
        .T = T, .D = D, .I = I, .K = K, .E = E, .first = first,
        .experts = experts,
        .weights = weights,
        .codes = {codes1, codes2, codes3},
        .scales = {scales1, scales2, scales3},
        .globals = globals,
        .input_scales = input_scales,
        .panel1 = panel1,
        .panel2 = panel2,
        .factor1 = factors,
        .factor2 = factors + slots,
        .out = out,
        .y = y,
    };
    a.kind = kind_of(a.level, input_scales != NULL, is_bf16);
    /* Every thread has a Plan of its own that points to the shared arrays; the counts are shared too. */
    int64_t *at = (int64_t *)(phases + NUM_PHASES), *counts = at;
    Plan p = {.order = at + 2, .rows = at + 2 + slots};
    p.bounds = p.rows + slots;
    p.hit = p.bounds + E + 1;
    p.tile0 = p.hit + E;
    p.tiles = (Tile *)(p.tile0 + E + 1);
    a.plan = &p;
    M27_IEEE({
        PHASE(&phases[0], 1, i, {
            (void)i;
            plan(&a);
            counts[0] = p.num_tiles;
            counts[1] = p.num_hit;
        });
        p.num_tiles = counts[0];
        p.num_hit = counts[1];
        int64_t gate_up = p.num_hit * ((num_blocks(I) + CHUNK - 1) / CHUNK);
        int64_t down = p.num_hit * ((num_blocks(D) + CHUNK - 1) / CHUNK);
        PHASE(&phases[1], p.num_tiles, i, arrange_x(&a, i));
        PHASE(&phases[2], gate_up, i, gate_up_chunk(&a, i));
        PHASE(&phases[3], p.num_tiles, i, arrange_act(&a, i));
        PHASE(&phases[4], down, i, down_chunk(&a, i));
        PHASE(&phases[5], T, t, combine(&a, t));
    });
}
