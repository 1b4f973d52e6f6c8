/* The loss of a batch and the gradient of its logits, as Learner._loss in hpo/models/training/learner.py defines it. */

#ifndef LOSS_H
#define LOSS_H

#include <stdint.h>

struct loss {
    int64_t B, outputs, stride;  /* outputs: 1 logit of two classes, else one a class; floats from row to row */
    const float *logits;         /* (B, outputs) */
    const int64_t *labels;       /* (B) */
    const float *weights;        /* (B), how much each counts, or NULL: all alike */
    const float *shares;         /* (B), of each in its mixture with the next one, or NULL: none are mixed */
    const float *class_weight;   /* (1), of class 1 relative to class 0, or (outputs); NULL: all alike */
    double smoothing;            /* share of a label that is spread over all classes */
    float *gradient;             /* (B, outputs), written */
};

/* The mean over the rows, each weighted by its class and its own weight. */
float loss_and_gradient(const struct loss *l);

#endif
