/* Statistics of packed NVFP4 codes.  A block of 16 codes is one 64-bit word, so a few operations on words say it all. */
#include "core.h"

#define MAGNITUDES 0x7777777777777777u
#define ONES 0x1111111111111111u

M27_CLONES static void count_codes(const uint8_t *codes, int64_t num_blocks, int64_t *counts) {
    int64_t zero = 0, largest = 0, reached = 0;
    for (int64_t b = 0; b < num_blocks; b++) {
        uint64_t x;
        memcpy(&x, codes + 8 * b, sizeof x);
        uint64_t seven = x & (x >> 1) & (x >> 2) & ONES; /* bits 0, 1 and 2 of a code */
        zero += (x & MAGNITUDES) == 0;
        reached += seven != 0;
        largest += __builtin_popcountll(seven);
    }
    counts[0] = zero;
    counts[1] = largest;
    counts[2] = reached;
}

/* Sets counts[3]: blocks of zeros alone, codes of magnitude 6, blocks that hold such a code. */
M27_EXPORT void m27_count_codes(const uint8_t *codes, int64_t num_blocks, int64_t *counts) {
    count_codes(codes, num_blocks, counts);
}
