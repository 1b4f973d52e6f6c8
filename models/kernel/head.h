/* A linear layer of the head: y (B, outputs) = x (B, inputs) times the weight's transpose, plus bias. */

#ifndef HEAD_H
#define HEAD_H

#include <stdint.h>

struct linear {
    int64_t B, inputs, outputs;
    const float *weight, *bias;          /* (outputs, inputs), (outputs) */
    float *packed, *dpadded;             /* memory that linear_arrange takes */
};

/* Lay out what it needs, in `memory` (see memory.h). */
void linear_arrange(struct linear *l, int64_t training, uintptr_t *memory);

/* x and y are padded, with rows of whole(inputs) and whole(outputs) floats. */
void linear_forward(const struct linear *l, const float *x, float *y);

/* From dy the gradients; dx padded, or NULL. */
void linear_backward(const struct linear *l, const float *x, const float *dy, float *dx, float *dweight, float *dbias);

#endif
