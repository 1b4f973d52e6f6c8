/* A classifier on one CPU thread: all batches of an epoch, forward, backward and update, or predictions.
 *
 * Letters: N sequences of the data, T steps, C numbers of a step, B sequences of a batch, S the LSTM's steps, H hidden
 * units, D directions, W stem width.
 *
 * What is computed is what hpo/models/classifier.py and hpo/models/training/learner.py define; these are the reference.
 * native.py mirrors the structs: every field has 8 bytes.
 */

#ifndef NETWORK_H
#define NETWORK_H

#include <stdint.h>

struct network {
    int64_t channels;                                     /* C */
    int64_t stem_layers, stem_width, stem_kernel, stem_stride; /* convolutions; 0: none */
    int64_t hidden, layers, directions;                   /* H, LSTM layers, D */
    int64_t pooling, skip, head, outputs;                 /* an enum pooling; 0 or 1; width of the hidden layer or 0; logits */
    double dropout;
    float *weights, *gradients; /* one buffer each, where the weights of PLACES lie alike */
    /* Places in the buffers: of each convolution weight, scale, shift; of each LSTM layer and direction w_ih, w_hh,
     * b_ih, b_hh; attention's weight and bias, if pooled so; of each linear layer weight and bias. */
    const int64_t *places;
    float *const *running; /* of each convolution mean and variance (W) */
};

struct data {
    const float *values;    /* (N, T, C), zero beyond each length */
    int64_t step, sequence; /* floats from one step to the next, from one sequence to the next */
    const int64_t *lengths; /* (N), at least 1 */
    const int64_t *labels;  /* (N) */
    const float *weights;   /* (N), how much each counts, or NULL: all alike */
    int64_t mapped;         /* 1: the values are those of a file, whose pages are asked for before they are read */
};

struct training {
    int64_t optimizer, count;   /* an enum optimizer; of weights */
    double rate, decay, clip, smoothing;
    float *first, *second, *steps; /* the optimiser's memory, see optimizer.h */
    const float *class_weight;     /* see loss.h */
    /* (C) deviation of what is added to each value and of the factor of a channel in a sequence, which of the drawn
     * numbers each takes (NULL: its own); NULL: no noise. */
    const float *added, *factor;
    const int64_t *drawn;
};

struct batches {
    const int64_t *rows;  /* of the data, batch after batch */
    const int64_t *ends;  /* (count) where each batch ends in `rows` */
    const float *shares;  /* as `rows`: of each sequence in its mixture with the next one of its batch; or NULL */
    int64_t count, first; /* batches, and the one to begin with */
    uint64_t seed;        /* of the epoch's random numbers */
    double seconds;       /* none is begun so long after the call */
};

/* The bytes of memory for batches of up to B sequences of up to T steps. */
int64_t network_bytes(const struct network *net, int64_t B, int64_t T, int64_t training);

/* Train batches from b->first on until they end or the time is over. Adds the sum of the rows' losses to *loss. Returns
 * the number of the next batch. */
int64_t network_train(const struct network *net, const struct data *data, const struct training *training,
                      const struct batches *b, float *loss, void *memory);

/* The logits (rows, outputs) of the sequences, in the order of b->rows. */
void network_predict(const struct network *net, const struct data *data, const struct batches *b, float *logits,
                     void *memory);

#endif
