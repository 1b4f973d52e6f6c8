/* See optimizer.h. */

#include "optimizer.h"

#include <math.h>

#define CLIP_EPSILON 1e-6 /* as in torch's clip_grad_norm_ */
#define SUMS 32           /* of squares, side by side: their order does not depend on the vectors' width */
#define BETA1 0.9
#define BETA2 0.999
#define ALPHA 0.99f   /* of RMSprop */
#define MOMENTUM 0.9f /* of SGD */
#define EPSILON 1e-8f

void clip_gradients(const struct update *u) {
    float sums[SUMS] = {0};
    double total = 0;
    int64_t k = 0;
    for (; k + SUMS <= u->count; k += SUMS)
        for (int64_t j = 0; j < SUMS; j++) sums[j] += u->gradients[k + j] * u->gradients[k + j];
    for (; k < u->count; k++) sums[k % SUMS] += u->gradients[k] * u->gradients[k];
    for (int64_t j = 0; j < SUMS; j++) total += sums[j];
    double norm = sqrt(total);
    if (norm < u->clip - 2 * CLIP_EPSILON) return; /* the factor would be 1; a NaN is no smaller */
    double scale = u->clip / (norm + CLIP_EPSILON);
    float factor = (float)(scale > 1 ? 1 : scale);
    for (k = 0; k < u->count; k++) u->gradients[k] *= factor;
}

static void adam(const struct update *u) {
    double steps = *u->steps += 1;
    float root = (float)sqrt(1 - pow(BETA2, steps)), size = (float)(u->rate / (1 - pow(BETA1, steps)));
    float decay = (float)u->decay, kept = (float)(1 - u->rate * u->decay);
    float *restrict w = u->weights, *restrict m = u->first, *restrict v = u->second;
    const float *restrict gradients = u->gradients;
    for (int64_t k = 0; k < u->count; k++) {
        float g = gradients[k];
        if (u->kind == ADAM) g += decay * w[k];
        else w[k] *= kept;
        m[k] += (float)(1 - BETA1) * (g - m[k]);
        v[k] = (float)BETA2 * v[k] + (float)(1 - BETA2) * g * g;
        w[k] -= size * m[k] / (sqrtf(v[k]) / root + EPSILON);
    }
}

static void rmsprop(const struct update *u) {
    float decay = (float)u->decay, rate = (float)u->rate;
    float *restrict w = u->weights, *restrict v = u->first;
    const float *restrict gradients = u->gradients;
    for (int64_t k = 0; k < u->count; k++) {
        float g = gradients[k] + decay * w[k];
        v[k] = ALPHA * v[k] + (1 - ALPHA) * g * g;
        w[k] -= rate * g / (sqrtf(v[k]) + EPSILON);
    }
}

static void sgd(const struct update *u) {
    float decay = (float)u->decay, rate = (float)u->rate;
    float *restrict w = u->weights, *restrict m = u->first;
    const float *restrict gradients = u->gradients;
    for (int64_t k = 0; k < u->count; k++) {
        m[k] = MOMENTUM * m[k] + gradients[k] + decay * w[k];
        w[k] -= rate * m[k];
    }
}

void update_weights(const struct update *u) {
    if (u->kind == SGD) sgd(u);
    else if (u->kind == RMSPROP) rmsprop(u);
    else adam(u);
}
