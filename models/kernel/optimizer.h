/* Clipping and the optimisers, over all weights in one buffer, as torch defines them. */

#ifndef OPTIMIZER_H
#define OPTIMIZER_H

#include <stdint.h>

enum optimizer { ADAMW, ADAM, RMSPROP, SGD };

struct update {
    int64_t kind, count;       /* an `optimizer`; of weights */
    double rate, decay, clip;  /* clip: largest norm of the gradients; 0: none */
    float *weights, *gradients;
    float *first, *second;     /* memories: Adam's two, else the only one and NULL */
    float *steps;              /* (1), Adam's number of steps, else NULL */
};

/* Scale the gradients down to a norm of at most u->clip. */
void clip_gradients(const struct update *u);

/* Move the weights by their gradients. */
void update_weights(const struct update *u);

#endif
