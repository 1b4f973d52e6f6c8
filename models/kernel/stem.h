/* One convolution of the stem with its batch normalisation and ReLU, as hpo/models/stem.py defines them.
 *
 * Letters: B sequences, T steps, C channels, W width, k steps that an output sees, R stride, S = ceil(T / R).
 *
 * Sequences stand one after another, each with its steps one after another, so that what an output sees is one piece
 * of k * c floats, and all outputs of a sequence are a product of matrices. Before a sequence lie `stem_left` steps of
 * zeros, after it k of them. Steps beyond a length are neither read nor written.
 */

#ifndef STEM_H
#define STEM_H

#include <stdint.h>

struct convolution {
    int64_t T, B, C, W, k, R;     /* T: steps of the longest sequence */
    int64_t c, w;                 /* floats of a step of its inputs and of its outputs: C or more, W padded */
    const int64_t *lengths;       /* (B) of the inputs */
    const float *weight, *scale, *shift;                 /* (W, C, k), (W), (W) */
    float *running_mean, *running_variance;              /* (W) */
    float *inputs;                /* (B, stem_left + T + k, c) */
    float *outputs;               /* its first output step; from sequence to sequence: */
    int64_t outputs_sequence;
    /* the rest lies in memory that stem_bytes counts */
    float *packed, *normal, *inverse; /* the weights, (B, S, w) of normalised values, (W) 1 / deviation */
    float *columns[4];                /* (w) each: sums and factors of one pass */
    float *reversed, *padded, *dweight; /* for the backward pass */
};

struct convolution_gradients {
    float *weight, *scale, *shift; /* written */
    float *outputs;                /* (B, S, w), gradient of the outputs; overwritten */
    float *inputs;                 /* (B, T, c) written, or NULL; only for R = 1. May be `outputs` */
};

static inline int64_t stem_steps(int64_t T, int64_t R) { return (T + R - 1) / R; }
static inline int64_t stem_left(int64_t k, int64_t R) { return k > R ? (k - R) / 2 : 0; }

/* The floats of the inputs, with the zeros around each sequence. */
static inline int64_t stem_inputs(int64_t B, int64_t T, int64_t k, int64_t R, int64_t c) {
    return B * (stem_left(k, R) + T + k) * c;
}

/* Lay out what it needs besides, in `memory` (see memory.h). */
void stem_arrange(struct convolution *l, int64_t training, uintptr_t *memory);

/* Zeros before and after each sequence of the inputs. */
void stem_pad(const struct convolution *l);

/* With `recent` above 0 by the statistics of the batch, of which that share enters the running ones; else by these. */
void stem_forward(const struct convolution *l, float recent);

/* After stem_forward with the statistics of the batch. */
void stem_backward(const struct convolution *l, const struct convolution_gradients *g);

#endif
