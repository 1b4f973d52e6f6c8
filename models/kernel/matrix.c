/* See matrix.h. */

#include "matrix.h"

/* A tile of `multiply`. `rows` and `vectors` are constants where this is inlined, so that the sums stay in registers. */
INLINE void multiply_tile(const int rows, const int vectors, float *to, int64_t to_stride, const float *a,
                          int64_t row_stride, int64_t depth_stride, int64_t depth, const float *w, int64_t w_stride,
                          int add) {
    vec sums[TILE][4] = {0};
    for (int64_t k = 0; k < depth; k++, a += depth_stride, w += w_stride) {
        vec left[TILE];
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) left[r] = broadcast(a[r * row_stride]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            vec right = load(w + v * LANES);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) sums[r][v] += left[r] * right;
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            float *at = to + r * to_stride + v * LANES;
            store(at, add ? load(at) + sums[r][v] : sums[r][v]);
        }
}

#define CASE(count) \
    case count: \
        multiply_tile(count, vectors, to, to_stride, a, row_stride, depth_stride, depth, w, w_stride, add); \
        break;

/* Tiles of as even a height as can be. */
INLINE void multiply_tiles(const int vectors, float *to, int64_t to_stride, const float *a, int64_t row_stride,
                           int64_t depth_stride, int64_t rows, int64_t depth, const float *w, int64_t w_stride,
                           int add) {
    int64_t tiles = (rows + TILE - 1) / TILE;
    for (int64_t count; tiles; tiles--, rows -= count, to += count * to_stride, a += count * row_stride) {
        count = (rows + tiles - 1) / tiles;
        switch (count) {
            CASE(1) CASE(2) CASE(3)
#if TILE > 3
            CASE(4) CASE(5) CASE(6)
#endif
        }
    }
}

void multiply(float *to, int64_t to_stride, const float *a, int64_t row_stride, int64_t depth_stride, int64_t rows,
              int64_t depth, const float *w, int64_t w_stride, int64_t vectors, int add) {
    switch (vectors) {
    case 1: multiply_tiles(1, to, to_stride, a, row_stride, depth_stride, rows, depth, w, w_stride, add); break;
    case 2: multiply_tiles(2, to, to_stride, a, row_stride, depth_stride, rows, depth, w, w_stride, add); break;
    case 3: multiply_tiles(3, to, to_stride, a, row_stride, depth_stride, rows, depth, w, w_stride, add); break;
    case 4: multiply_tiles(4, to, to_stride, a, row_stride, depth_stride, rows, depth, w, w_stride, add); break;
    }
}

void pack(float *packed, const float *from, int64_t depth, int64_t columns, int64_t depth_stride,
          int64_t column_stride) {
    for (int64_t first = 0; first < columns; first += 4 * LANES) {
        int64_t many = columns - first < 4 * LANES ? columns - first : 4 * LANES, width = whole(many);
        for (int64_t k = 0; k < depth; k++, packed += width) {
            const float *row = from + k * depth_stride + first * column_stride;
            for (int64_t j = 0; j < many; j++) packed[j] = row[j * column_stride];
            for (int64_t j = many; j < width; j++) packed[j] = 0.0f;
        }
    }
}

void multiply_packed(float *to, const float *a, int64_t row_stride, int64_t rows, int64_t depth, const float *packed,
                     int64_t columns) {
    for (int64_t column = 0; column < columns; column += 4 * LANES) {
        int64_t left = (whole(columns) - column) / LANES, vectors = left < 4 ? left : 4;
        multiply(to + column, whole(columns), a, row_stride, 1, rows, depth, packed, vectors * LANES, vectors, 0);
        packed += depth * vectors * LANES;
    }
}

void add_product(float *to, const float *a, int64_t row_stride, int64_t depth_stride, int64_t rows, int64_t depth,
                 const float *w, int64_t columns) {
    int64_t stride = whole(columns);
    for (int64_t column = 0; column < stride; column += 4 * LANES) {
        int64_t left = (stride - column) / LANES, vectors = left < 4 ? left : 4;
        multiply(to + column, stride, a, row_stride, depth_stride, rows, depth, w + column, stride, vectors, 1);
    }
}
