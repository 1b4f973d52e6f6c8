/* See head.h. */

#include "head.h"

#include "matrix.h"
#include "memory.h"

void linear_arrange(struct linear *l, int64_t training, uintptr_t *memory) {
    int64_t there = packed_size(l->inputs, l->outputs), back = packed_size(l->outputs, l->inputs);
    l->packed = take(memory, 4 * (there > back ? there : back));
    if (training) l->dpadded = take(memory, 4 * l->outputs * whole(l->inputs));
}

void linear_forward(const struct linear *l, const float *x, float *y) {
    pack(l->packed, l->weight, l->inputs, l->outputs, 1, l->inputs);
    multiply_packed(y, x, whole(l->inputs), l->B, l->inputs, l->packed, l->outputs);
    for (int64_t b = 0; b < l->B; b++)
        for (int64_t o = 0; o < l->outputs; o++) y[b * whole(l->outputs) + o] += l->bias[o];
}

void linear_backward(const struct linear *l, const float *x, const float *dy, float *dx, float *dweight, float *dbias) {
    int64_t stride = whole(l->inputs), from = whole(l->outputs);
    memset(l->dpadded, 0, 4 * l->outputs * stride);
    add_product(l->dpadded, dy, 1, from, l->outputs, l->B, x, l->inputs);
    memset(dbias, 0, 4 * l->outputs);
    for (int64_t o = 0; o < l->outputs; o++) memcpy(dweight + o * l->inputs, l->dpadded + o * stride, 4 * l->inputs);
    for (int64_t b = 0; b < l->B; b++)
        for (int64_t o = 0; o < l->outputs; o++) dbias[o] += dy[b * from + o];
    if (!dx) return;
    pack(l->packed, l->weight, l->outputs, l->inputs, l->inputs, 1);
    multiply_packed(dx, dy, from, l->B, l->outputs, l->packed, l->inputs);
}
