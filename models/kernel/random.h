/* Random numbers that are a function of where they are used, so that nothing is kept between batches.
 *
 * Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), keyed by the
 * epoch's seed. Counters are the number within the tensor, and the batch of the epoch with the place in the network.
 * The numbers of a row of `width` elements come in blocks of 32: the two words of 16 counters.
 */

#ifndef RANDOM_H
#define RANDOM_H

#include <stdint.h>

#define RANDOM_BLOCK 32
#define RANDOM_SITES 64 /* at most, in one batch */

struct draw { /* one tensor's numbers */
    uint64_t seed;
    uint32_t batch, site;
};

/* The 32 bits of each number of block `block` of row `row`, whose elements are `width`. */
void random_bits(const struct draw *draw, int64_t row, int64_t width, int64_t block, uint32_t bits[RANDOM_BLOCK]);

/* Dropout: each of a row's values becomes 0 with the given probability, else grows by 1 / (1 - probability). */
void drop_row(const struct draw *draw, int64_t row, int64_t width, double probability, float *values);

/* A row of normal numbers (Box and Muller, 1958). */
void normal_row(const struct draw *draw, int64_t row, int64_t width, float *values);

#endif
