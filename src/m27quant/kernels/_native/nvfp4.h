/* NVFP4 products on a CPU: how weights and activations lie, and who multiplies them.
 *
 * Weights are repacked once (nvfp4_gemm.c).  Sixteen rows form a block, so that a lane of a vector is a row, whatever
 * the width of vectors; a block's groups of 16 columns follow each other:
 *
 *     codes  [blocks][groups][2][16 rows] words of 32 bits; in a word for columns k..k+7 byte b holds column k + b in
 *            its low half and column k + 4 + b in its high half
 *     scales [blocks][groups][16 rows] E4M3 bytes
 *
 * Activations are arranged for a tile of T <= 8 tokens (nvfp4_rows.c), in one of three kinds, by groups of 16 columns:
 *
 *     F32    [groups][16][T] float, columns in order
 *     BF16   [groups][8][T] words, each a pair of columns as bf16_column() says
 *     INT8   [groups][6][T] words: four of four columns each as 2 * E2M1 in int8; -12 times their sum in int32; the
 *            block scale in float
 *
 * A Dot multiplies a block of 16 rows with a tile.  Weights count double in it (2 * E2M1 is an integer), global scales
 * not at all.  For each token it does the same operations in the same order whatever T is: results do not depend on
 * the batch, nor on how blocks and tiles are spread over threads.
 */
#ifndef M27QUANT_NVFP4_H
#define M27QUANT_NVFP4_H

#include "core.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#define GROUP 16 /* columns under one block scale */
#define ROWS 16  /* of a block */
#define TILE 8   /* most tokens */
#define GROUP_BYTES (ROWS * GROUP / 2)

typedef enum { KIND_F32, KIND_BF16, KIND_INT8 } Kind;

/* out[T][ROWS] = the sums over all groups. */
typedef void (*Dot)(const uint8_t *codes, const uint8_t *scales, int64_t num_groups, const void *panel, float *out);

/* What one instruction set has, for T = 1..TILE; without products of BF16 pairs bf16[0] is NULL. */
typedef struct {
    const char *name;
    Dot f32[TILE], bf16[TILE], int8[TILE];
} Level;

extern const Level nvfp4_portable;
#if defined(__x86_64__) && defined(__GNUC__)
#define NVFP4_X86 1
extern const Level nvfp4_avx2, nvfp4_avx512, nvfp4_avx512_bf16;
#endif

/* Defines f_1 .. f_8 from an inline `f` whose first argument is T, and the list of them. */
#define DOT_OF(TARGET, f, T)                                                                                           \
    TARGET static void f##_##T(const uint8_t *codes, const uint8_t *scales, int64_t num_groups, const void *panel,     \
                               float *out) {                                                                           \
        f(T, codes, scales, num_groups, panel, out);                                                                   \
    }
#define DOTS_OF(TARGET, f)                                                                                             \
    DOT_OF(TARGET, f, 1)                                                                                               \
    DOT_OF(TARGET, f, 2)                                                                                               \
    DOT_OF(TARGET, f, 3)                                                                                               \
    DOT_OF(TARGET, f, 4)                                                                                               \
    DOT_OF(TARGET, f, 5)                                                                                               \
    DOT_OF(TARGET, f, 6)                                                                                               \
    DOT_OF(TARGET, f, 7)                                                                                               \
    DOT_OF(TARGET, f, 8)
#define DOTS(f) {f##_1, f##_2, f##_3, f##_4, f##_5, f##_6, f##_7, f##_8}

#define AHEAD 4096 /* bytes of codes that are on their way while memory answers; measured: 4 to 8 KiB are best */

/* Asks for the weights that come next, mostly the next block's; at the very end for what is never read. */
M27_INLINE void fetch_ahead(const uint8_t *codes, const uint8_t *scales) {
    __builtin_prefetch(codes + AHEAD);
    __builtin_prefetch(codes + AHEAD + GROUP_BYTES / 2);
    __builtin_prefetch(scales + AHEAD / 8);
}

typedef int8_t Bytes16 __attribute__((vector_size(16)));

/* 2 * E2M1 of 16 codes: magnitudes 0 1 2 3 4 5 6 7 become 0 1 2 3 4 6 8 12. */
M27_INLINE Bytes16 e2m1_twice(Bytes16 code) {
#if defined(__aarch64__)
    static const int8_t TWICE[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    return (Bytes16)vqtbl1q_s8(vld1q_s8(TWICE), (uint8x16_t)code);
#else
    Bytes16 m = code & 7, minus = (Bytes16)(code > 7); /* true is -1 */
    Bytes16 value = m + ((Bytes16)(m > 4) & (m - 4)) - 2 * (Bytes16)(m == 7);
    return (value ^ minus) - minus;
#endif
}

/* The first column of pair i of a group; the second is two further. */
M27_INLINE int bf16_column(int i) { return i / 4 * 8 + i % 2 * 4 + i % 4 / 2; }

/* ---- nvfp4_rows.c ---- */

/* Rows of activations, in F32 or BF16. */
typedef struct {
    const void *data;
    int64_t num_columns;
    int is_bf16;
} Rows;

/* Bytes that one token takes in a panel. */
M27_INLINE int64_t panel_bytes(Kind kind, int64_t num_columns) {
    return kind == KIND_F32 ? num_columns * 4 : kind == KIND_BF16 ? num_columns * 2 : num_columns / GROUP * 24;
}

/* Arranges T rows, x.data[index[t]], for products.  factor[t]: what the token's sums must be multiplied with, beside
 * the weight's global scale. */
void nvfp4_arrange(Kind kind, Rows x, const int64_t *index, int T, float input_scale, void *panel, double *factor);

/* ---- nvfp4_gemm.c ---- */

/* A prepared matrix, or one of an array of them. */
typedef struct {
    const uint8_t *codes, *scales;
    int64_t num_rows, num_columns;
} Matrix;

/* The level with this number, at most what the machine has. */
const Level *nvfp4_level(int number);

M27_INLINE Kind kind_of(const Level *level, int quantize, int is_bf16) {
    return quantize ? KIND_INT8 : is_bf16 && level->bf16[0] ? KIND_BF16 : KIND_F32;
}

M27_INLINE Dot dot_of(const Level *level, Kind kind, int T) {
    return (kind == KIND_F32 ? level->f32 : kind == KIND_BF16 ? level->bf16 : level->int8)[T - 1];
}

M27_INLINE int64_t num_blocks(int64_t num_rows) { return (num_rows + ROWS - 1) / ROWS; }

/* One block of a matrix with one tile. */
M27_INLINE void block_dot(Dot dot, Matrix w, int64_t block, const void *panel, float *out) {
    int64_t groups = w.num_columns / GROUP;
    dot(w.codes + block * groups * GROUP_BYTES, w.scales + block * groups * ROWS, groups, panel, out);
}

/* ---- work that several threads share: each calls the same function, who comes late helps with what is left ---- */

typedef struct {
    int64_t next, done; /* zero at the start */
} Phase;

/* Takes items one by one until none is left; then waits for those that others have taken. */
#define PHASE(phase, num_items, item, BODY)                                                                            \
    do {                                                                                                               \
        for (int64_t item; (item = phase_next(phase)) < (num_items); phase_done(phase)) BODY;                          \
        phase_wait(phase, num_items);                                                                                  \
    } while (0)

M27_INLINE int64_t phase_next(Phase *p) { return __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED); }
M27_INLINE void phase_done(Phase *p) { __atomic_fetch_add(&p->done, 1, __ATOMIC_RELEASE); }
void phase_wait(Phase *p, int64_t num_items);

#endif
