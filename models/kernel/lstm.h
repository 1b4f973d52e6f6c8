/* One direction of one LSTM layer on one CPU thread, forward and backward, in float32.
 *
 * Letters: S steps, B sequences, F inputs, H hidden units, K = F + 1 + H. Gates stand in torch's order: i, f, g, o.
 *
 * Sequences are ranked by falling length, so those still running at step s are the first counts[s] of them. One step
 * of one sequence is a *row*; the rows of step 0 come first, then those of step 1; padding has none. The inputs of a
 * row are [x_t | 1 | h_{t-1}], so that input projection, bias and recurrence are one product with packed weights.
 *
 * Units go through the vector's lanes in blocks of LANES, rows through the registers in tiles. A tile of the forward
 * product ends with the four gates of a block of units, and the non-linearities follow while they are in cache.
 * Each row's arithmetic is the same in every tile, so a sequence's bits do not depend on the batch that it is in.
 */

#ifndef LSTM_H
#define LSTM_H

#include <stdint.h>

struct lstm_shape { /* the layer, and where its outputs y and their gradients dy lie; strides in floats */
    int64_t S, B, F, H;
    int64_t reverse;  /* 1: each sequence runs backwards within its own length */
    int64_t training; /* 1: the memory keeps what lstm_backward needs */
    int64_t final;    /* 1: y has only the output that each sequence ends with */
    int64_t step;     /* from one step of y to the next */
    int64_t sequence; /* from one sequence of y to the next */
};

struct lstm_inputs {
    const float *x;                         /* (S, sequences, F) */
    int64_t x_step, x_sequence;             /* from one step to the next, from one sequence to the next */
    const int64_t *rows;                    /* (B), which of x's sequences these are; NULL: the first B */
    const int64_t *lengths;                 /* (B), or NULL: all are S */
    const float *w_ih, *w_hh, *b_ih, *b_hh; /* (4 H, F), (4 H, H), (4 H), (4 H) */
};

struct lstm_gradients {
    const float *dy, *w_ih, *w_hh;
    float *dx;                              /* (S, B, F) or NULL: written, or with `add` added to */
    int64_t dx_step, dx_sequence, add;
    const int64_t *lengths;                 /* (B), or NULL: all are S */
    float *dw_ih, *dw_hh, *db_ih, *db_hh;   /* written */
};

/* The bytes of the memory of such a layer. */
int64_t lstm_bytes(const struct lstm_shape *shape);

/* x to y. Beyond a length y is zero. With `final` y has one step: the last one that each sequence runs through. With
 * `training` `memory` keeps what lstm_backward needs. -1: a length is not in 0..S. */
int64_t lstm_forward(const struct lstm_shape *shape, const struct lstm_inputs *in, float *y, void *memory);

/* Gradients after lstm_forward with the same shape and memory. Beyond a length dx is zero. */
void lstm_backward(const struct lstm_shape *shape, const struct lstm_gradients *g, void *memory);

#endif
