/* From a sequence's steps to one row: pooling over the last layer's outputs, and the skip connection's over its inputs.
 *
 * Letters: S steps, B sequences, H hidden units, D directions. Steps beyond a length never count, nor are they written.
 */

#ifndef POOLING_H
#define POOLING_H

#include <stdint.h>

enum pooling { POOL_LAST, POOL_MEAN, POOL_MAX, POOL_CONCAT, POOL_ATTENTION, POOL_FLATTEN }; /* concat: max, mean, last */

struct steps {               /* what is pooled, or its gradient */
    float *values;           /* (B, S, width) */
    int64_t S, B, width;
    int64_t stride, sequence;  /* floats from one step to the next, from one sequence to the next */
    const int64_t *lengths;  /* (B) */
};

struct attention {
    const float *weight, *bias; /* (width), (1) */
    float *dweight, *dbias;     /* written in the backward pass */
    float *shares;              /* (B, S), kept for it */
};

/* To rows of `pooled`. hidden: H, where the reverse direction's units begin in a step. */
void pool(int64_t kind, const struct steps *y, int64_t hidden, const struct attention *attention, float *pooled,
          int64_t pooled_stride);

/* dy of all valid steps from y, the pooled rows and their gradient. shares: (width) to compute with. */
void pool_backward(int64_t kind, const struct steps *y, const struct steps *dy, int64_t hidden,
                   const struct attention *attention, const float *pooled, const float *dpooled, int64_t pooled_stride,
                   float *shares);

/* Maximum and mean of x's steps to 2 * width numbers a row. */
void pool_skip(const struct steps *x, float *pooled, int64_t pooled_stride);

/* Adds to dx. shares: (width) to compute with. */
void pool_skip_backward(const struct steps *x, const struct steps *dx, const float *pooled, const float *dpooled,
                        int64_t pooled_stride, float *shares);

#endif
