/* NVFP4 products on a CPU: weights repacked once, then multiplied as they are packed.  nvfp4.h says how they lie;
 * the specification is nvfp4_gemm/reference.py. */
#define _DEFAULT_SOURCE /* madvise */
#include <sched.h>

#include "nvfp4.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

/* ---- which instructions ---------------------------------------------------------------------------------- */

static int has_level(int number) {
#ifdef NVFP4_X86
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vnni");
    return number == 0 || (number == 1 && avx2) || (number == 2 && avx512) ||
           (number == 3 && avx512 && __builtin_cpu_supports("avx512bf16"));
#else
    return number == 0;
#endif
}

/* The best level of this machine; all below it run here as well. */
M27_EXPORT int m27_nvfp4_level(void) {
    int number = 0;
    while (has_level(number + 1)) number++;
    return number;
}

const Level *nvfp4_level(int number) {
#ifdef NVFP4_X86
    if (number == 1) return &nvfp4_avx2;
    if (number == 2) return &nvfp4_avx512;
    if (number == 3) return &nvfp4_avx512_bf16;
#endif
    (void)number;
    return &nvfp4_portable;
}

M27_EXPORT const char *m27_nvfp4_level_name(int number) { return nvfp4_level(number)->name; }

/* ---- threads --------------------------------------------------------------------------------------------- */

void phase_wait(Phase *p, int64_t num_items) {
    for (int spins = 0; __atomic_load_n(&p->done, __ATOMIC_ACQUIRE) < num_items; spins++)
        if (spins > 100) sched_yield(); /* whoever still works may need this processor */
}

/* ---- repacking ------------------------------------------------------------------------------------------- */

/* Eight columns of a row, from the checkpoint's order (even column in the low half of a byte) to a word's. */
M27_INLINE uint32_t reorder(uint32_t x) {
    uint32_t front = x & 0xFFFF, back = x >> 16; /* columns 0..3 and 4..7 */
    uint32_t even = (front & 0x0F0F) | (back & 0x0F0F) << 4, odd = (front >> 4 & 0x0F0F) | (back & 0xF0F0);
    even = (even & 0xFF) | (even & 0xFF00) << 8;
    odd = (odd & 0xFF) | (odd & 0xFF00) << 8;
    return even | odd << 8;
}

#define STRIP 64 /* words of a row that are reordered before they are spread */

M27_CLONES static void prepare(const uint8_t *codes, const uint8_t *scales, int64_t N, int64_t K, uint8_t *out_codes,
                               uint8_t *out_scales, int64_t block0, int64_t block1) {
    int64_t words = K / 8, groups = K / GROUP;
    for (int64_t block = block0; block < block1; block++) {
        uint8_t *to_codes = out_codes + block * groups * GROUP_BYTES, *to_scales = out_scales + block * groups * ROWS;
        for (int64_t left = 0; left < words; left += STRIP) {
            int64_t width = left + STRIP < words ? STRIP : words - left;
            uint32_t strip[ROWS][STRIP];
            for (int r = 0; r < ROWS; r++) {
                int64_t n = block * ROWS + r;
                if (n < N) memcpy(strip[r], codes + (n * words + left) * 4, (size_t)width * 4);
                else memset(strip[r], 0, sizeof strip[r]);
                for (int i = 0; i < STRIP; i++) strip[r][i] = reorder(strip[r][i]);
            }
            for (int64_t i = 0; i < width; i++) {
                uint32_t column[ROWS];
                for (int r = 0; r < ROWS; r++) column[r] = strip[r][i];
                memcpy(to_codes + (left + i) * ROWS * 4, column, sizeof column);
            }
        }
        for (int64_t g = 0; g < groups; g++)
            for (int r = 0; r < ROWS; r++) {
                int64_t n = block * ROWS + r;
                to_scales[g * ROWS + r] = n < N ? scales[n * groups + g] : 0;
            }
    }
}

/* Asks for large pages where `memory` fills them: weights are read from end to end, and small ones cost a tenth to a
 * fifth of the speed.  No more than a wish; only Linux knows it. */
M27_EXPORT void m27_advise_large_pages(uint8_t *memory, int64_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    uintptr_t page = 1 << 21, start = ((uintptr_t)memory + page - 1) & ~(page - 1);
    uintptr_t end = ((uintptr_t)memory + (uintptr_t)size) & ~(page - 1);
    if (start < end) (void)madvise((void *)start, end - start, MADV_HUGEPAGE);
#else
    (void)memory, (void)size;
#endif
}

/* Blocks [block0, block1) of a matrix [N, K] as it lies in the checkpoint; rows that fill the last block are 0. */
M27_EXPORT void m27_nvfp4_prepare(const uint8_t *codes, const uint8_t *scales, int64_t N, int64_t K,
                                  uint8_t *out_codes, uint8_t *out_scales, int64_t block0, int64_t block1) {
    prepare(codes, scales, N, K, out_codes, out_scales, block0, block1);
}

/* The values of rows [row0, row1) of a prepared matrix [N, K], as the checkpoint's formula gives them. */
static void unpack(const uint8_t *codes, const uint8_t *scales, int64_t K, float global, float *out, int64_t row0,
                   int64_t row1) {
    static const float E2M1[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
    for (int64_t n = row0; n < row1; n++) {
        for (int64_t k = 0; k < K; k++) {
            int64_t at = (n / ROWS * (K / GROUP) + k / GROUP) * ROWS;
            uint32_t scale = scales[at + n % ROWS], byte = codes[at * 8 + k % 16 / 8 * 64 + n % ROWS * 4 + k % 4];
            float value = e4m3_value(scale & 0x7F), d = (scale >> 7 ? -value : value) * global;
            out[n * K + k] = E2M1[byte >> k % 8 / 4 * 4 & 15] * d;
        }
    }
}

M27_EXPORT void m27_nvfp4_unpack(const uint8_t *codes, const uint8_t *scales, int64_t K, const float *global,
                                 float *out, int64_t row0, int64_t row1) {
    M27_IEEE(unpack(codes, scales, K, *global, out, row0, row1));
}

/* ---- the product ----------------------------------------------------------------------------------------- */

#define CHUNK 8 /* blocks of rows that stay in the cache while all tokens pass */

typedef struct {
    const Level *level;
    Kind kind;
    Rows x;
    int64_t num_tokens;
    Matrix w;
    float global, input_scale;
    uint8_t *panel;
    double *factor;
    void *y;
} Gemm;

/* The first token of a tile, of as many equal tiles as there must be. */
M27_INLINE int64_t tile_start(const Gemm *a, int64_t tile) {
    int64_t tiles = (a->num_tokens + TILE - 1) / TILE;
    return a->num_tokens * tile / tiles;
}

static void arrange_tile(const Gemm *a, int64_t tile) {
    int64_t start = tile_start(a, tile), index[TILE];
    int T = (int)(tile_start(a, tile + 1) - start);
    for (int t = 0; t < T; t++) index[t] = start + t;
    nvfp4_arrange(a->kind, a->x, index, T, a->input_scale, a->panel + start * panel_bytes(a->kind, a->x.num_columns),
                  a->factor + start);
}

static void multiply_chunk(const Gemm *a, int64_t chunk) {
    int64_t blocks = num_blocks(a->w.num_rows), tiles = (a->num_tokens + TILE - 1) / TILE;
    int64_t end = (chunk + 1) * CHUNK < blocks ? (chunk + 1) * CHUNK : blocks;
    for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t start = tile_start(a, tile);
        int T = (int)(tile_start(a, tile + 1) - start);
        const uint8_t *panel = a->panel + start * panel_bytes(a->kind, a->x.num_columns);
        Dot dot = dot_of(a->level, a->kind, T);
        for (int64_t block = chunk * CHUNK; block < end; block++) {
            float sum[TILE * ROWS];
            block_dot(dot, a->w, block, panel, sum);
            int64_t first = block * ROWS, width = a->w.num_rows - first < ROWS ? a->w.num_rows - first : ROWS;
            for (int t = 0; t < T; t++) {
                double factor = a->factor[start + t] * (double)a->global;
                int64_t at = (start + t) * a->w.num_rows + first;
                for (int r = 0; r < width; r++) {
                    float y = (float)((double)sum[t * ROWS + r] * factor);
                    if (a->x.is_bf16) ((uint16_t *)a->y)[at + r] = bf16_bits(y);
                    else ((float *)a->y)[at + r] = y;
                }
            }
        }
    }
}

/* y [T, N] = x [T, K] times a prepared matrix.  Called by every thread with the same arguments.
 * `input_scale`: NULL for W4A16.  `panel`: T * panel_bytes; `factor`: [T]; `phases`: [2], zero. */
M27_EXPORT void m27_nvfp4_gemm(int level, const void *x, int is_bf16, int64_t T, int64_t N, int64_t K,
                               const uint8_t *codes, const uint8_t *scales, const float *global,
                               const float *input_scale, uint8_t *panel, double *factor, void *y, Phase *phases) {
    Gemm a = {
        .level = nvfp4_level(level),
        .x = {x, K, is_bf16},
        .num_tokens = T,
        .w = {codes, scales, N, K},
        .global = *global,
        .input_scale = input_scale ? *input_scale : 1.0f,
        .panel = panel,
        .factor = factor,
        .y = y,
    };
    a.kind = kind_of(a.level, input_scale != NULL, is_bf16);
    int64_t tiles = (T + TILE - 1) / TILE, chunks = (num_blocks(N) + CHUNK - 1) / CHUNK;
    M27_IEEE({
        PHASE(&phases[0], tiles, tile, arrange_tile(&a, tile));
        PHASE(&phases[1], chunks, chunk, multiply_chunk(&a, chunk));
    });
}

/* Bytes of `panel` for one token. */
M27_EXPORT int64_t m27_nvfp4_panel_bytes(int level, int quantize, int is_bf16, int64_t num_columns) {
    return panel_bytes(kind_of(nvfp4_level(level), quantize, is_bf16), num_columns);
}
