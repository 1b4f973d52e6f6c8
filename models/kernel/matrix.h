/* Products of matrices in float32, a tile of rows at a time.
 *
 * A packed matrix (depth, columns) is stored as (groups, depth, vectors, LANES): groups of up to four vectors of
 * columns, the last vector filled with zeros. A padded one has rows of whole(columns) floats, filled likewise.
 */

#ifndef MATRIX_H
#define MATRIX_H

#include "vector.h"

/* to (rows, vectors * LANES) = or with `add` += a (rows, depth) times w (depth, vectors * LANES); at most four vectors,
 * strides in floats. A row's sums have the same order of terms however many rows there are. */
void multiply(float *to, int64_t to_stride, const float *a, int64_t row_stride, int64_t depth_stride, int64_t rows,
              int64_t depth, const float *w, int64_t w_stride, int64_t vectors, int add);

/* The floats of a packed matrix. */
static inline int64_t packed_size(int64_t depth, int64_t columns) { return depth * whole(columns); }

/* Pack a matrix whose elements lie at from[k * depth_stride + j * column_stride]. */
void pack(float *packed, const float *from, int64_t depth, int64_t columns, int64_t depth_stride,
          int64_t column_stride);

/* to (rows, columns), padded, = a (rows, depth), of row stride row_stride, times a packed matrix. */
void multiply_packed(float *to, const float *a, int64_t row_stride, int64_t rows, int64_t depth, const float *packed,
                     int64_t columns);

/* to (rows, columns) += a (rows, depth) times w (depth, columns); `to` and w are padded. */
void add_product(float *to, const float *a, int64_t row_stride, int64_t depth_stride, int64_t rows, int64_t depth,
                 const float *w, int64_t columns);

#endif
