/* See random.h. */

#include "random.h"

#include <math.h>

#define HALF (RANDOM_BLOCK / 2)

typedef uint32_t words __attribute__((vector_size(4 * HALF)));

void random_bits(const struct draw *draw, int64_t row, int64_t width, int64_t block, uint32_t bits[RANDOM_BLOCK]) {
    static const int rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
    uint32_t low = (uint32_t)draw->seed, high = (uint32_t)(draw->seed >> 32);
    const uint32_t keys[3] = {low, high, 0x1BD11BDAu ^ low ^ high};
    uint32_t first = (uint32_t)((row * ((width + RANDOM_BLOCK - 1) / RANDOM_BLOCK) + block) * HALF);
    words x = {0}, y = {0};
    for (int lane = 0; lane < HALF; lane++) x[lane] = first + (uint32_t)lane;
    x += keys[0], y += draw->batch * RANDOM_SITES + draw->site + keys[1];
#pragma GCC unroll 5
    for (int group = 0; group < 5; group++) {
#pragma GCC unroll 4
        for (int round = 0; round < 4; round++) {
            int by = rotations[group % 2][round];
            x += y, y = ((y << by) | (y >> (32 - by))) ^ x;
        }
        x += keys[(group + 1) % 3], y += keys[(group + 2) % 3] + (uint32_t)group + 1;
    }
    for (int lane = 0; lane < HALF; lane++) bits[lane] = x[lane], bits[HALF + lane] = y[lane];
}

void drop_row(const struct draw *draw, int64_t row, int64_t width, double probability, float *values) {
    uint32_t bits[RANDOM_BLOCK], least = (uint32_t)(probability * 4294967296.0);
    float factor = (float)(1.0 / (1.0 - probability));
    for (int64_t block = 0; block * RANDOM_BLOCK < width; block++, values += RANDOM_BLOCK) {
        int64_t left = width - block * RANDOM_BLOCK;
        random_bits(draw, row, width, block, bits);
        for (int64_t k = 0; k < left && k < RANDOM_BLOCK; k++) values[k] *= bits[k] >= least ? factor : 0.0f;
    }
}

void normal_row(const struct draw *draw, int64_t row, int64_t width, float *values) {
    uint32_t bits[RANDOM_BLOCK];
    for (int64_t block = 0; block * RANDOM_BLOCK < width; block++, values += RANDOM_BLOCK) {
        int64_t left = width - block * RANDOM_BLOCK;
        random_bits(draw, row, width, block, bits);
        for (int64_t k = 0; k < HALF && k < left; k++) { /* 24 bits each: from 2^-25 on, and from 0 on */
            float radius = sqrtf(-2.0f * logf(((float)(bits[k] >> 8) + 0.5f) * 0x1p-24f));
            float angle = (float)(bits[HALF + k] >> 8) * 0x1p-24f * 6.28318531f;
            values[k] = radius * cosf(angle);
            if (HALF + k < left) values[HALF + k] = radius * sinf(angle);
        }
    }
}
