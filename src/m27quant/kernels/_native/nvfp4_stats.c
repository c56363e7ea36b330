/* Statistics of packed NVFP4 codes, and the search for NaN in plain tensors.  A block of 16 codes is one 64-bit word, so a few operations on words say it all. */
#include "core.h"

#define MAGNITUDES 0x7777777777777777u
#define ONES 0x1111111111111111u
#define LOW 0x0F0F0F0F0F0F0F0Fu
#define STRIP 96 /* words: two codes a byte and word, at most 255 */

/* Sum of the eight bytes of x. */
M27_INLINE int64_t byte_sum(uint64_t x) {
    uint64_t pairs = (x & 0x00FF00FF00FF00FFu) + ((x >> 8) & 0x00FF00FF00FF00FFu);
    return (int64_t)((pairs * 0x0001000100010001u) >> 48);
}

/* Without a population count, which few machines have for vectors: bytes count, and STRIP words cannot fill them. */
M27_CLONES static void count_codes(const uint8_t *codes, int64_t num_blocks, int64_t *counts) {
    int64_t zero = 0, largest = 0, reached = 0;
    for (int64_t first = 0; first < num_blocks; first += STRIP) {
        int64_t end = first + STRIP < num_blocks ? first + STRIP : num_blocks;
        uint64_t in_bytes = 0, zeros = 0, sevens = 0;
        for (int64_t b = first; b < end; b++) {
            uint64_t x;
            memcpy(&x, codes + 8 * b, sizeof x);
            uint64_t seven = x & (x >> 1) & (x >> 2) & ONES; /* bits 0, 1 and 2 of a code */
            in_bytes += (seven & LOW) + ((seven >> 4) & LOW);
            zeros += (x & MAGNITUDES) == 0;
            sevens += seven != 0;
        }
        zero += (int64_t)zeros;
        reached += (int64_t)sevens;
        largest += byte_sum(in_bytes);
    }
    counts[0] = zero;
    counts[1] = largest;
    counts[2] = reached;
}

/* Sets counts[3]: blocks of zeros alone, codes of magnitude 6, blocks that hold such a code. */
M27_EXPORT void m27_count_codes(const uint8_t *codes, int64_t num_blocks, int64_t *counts) {
    count_codes(codes, num_blocks, counts);
}

/* The square of twice the E2M1 value of a magnitude. */
M27_INLINE uint16_t square(uint8_t k) {
    int16_t a = (int16_t)(2 * k - 4), b = (int16_t)(4 * k - 16), t = k;
    t = a > t ? a : t;
    t = b > t ? b : t;
    return (uint16_t)(t * t);
}

/* low[J] and high[J]: sums of squares of twice the values of each column of bytes; at most 400 rows. */
M27_CLONES static void column_energy(const uint8_t *restrict codes, int64_t rows, int64_t J,
                                     uint16_t *restrict low, uint16_t *restrict high) {
    memset(low, 0, (size_t)J * sizeof *low);
    memset(high, 0, (size_t)J * sizeof *high);
    for (int64_t n = 0; n < rows; n++) {
        for (int64_t j = 0; j < J; j++) {
            low[j] = (uint16_t)(low[j] + square(codes[n * J + j] & 7));
            high[j] = (uint16_t)(high[j] + square(codes[n * J + j] >> 4 & 7));
        }
    }
}

M27_EXPORT void m27_column_energy(const uint8_t *codes, int64_t rows, int64_t J, uint16_t *low, uint16_t *high) {
    column_energy(codes, rows, J, low, high);
}

/* Whether all exponent bits are set in one of the numbers: NaN or infinity. */
M27_CLONES static int nonfinite16(const uint16_t *numbers, int64_t count, uint16_t exponent) {
    uint16_t found = 0;
    for (int64_t i = 0; i < count; i++) found |= (numbers[i] & exponent) == exponent;
    return found;
}

M27_CLONES static int nonfinite32(const uint32_t *numbers, int64_t count, uint32_t exponent) {
    uint32_t found = 0;
    for (int64_t i = 0; i < count; i++) found |= (numbers[i] & exponent) == exponent;
    return (int)found;
}

M27_EXPORT int m27_nonfinite16(const uint16_t *numbers, int64_t count, int exponent) {
    return nonfinite16(numbers, count, (uint16_t)exponent);
}

M27_EXPORT int m27_nonfinite32(const uint32_t *numbers, int64_t count, int exponent) {
    return nonfinite32(numbers, count, (uint32_t)exponent);
}
