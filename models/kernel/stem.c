/* See stem.h. */

#include "stem.h"

#include <math.h>

#include "matrix.h"
#include "memory.h"

#define EPSILON 1e-5f /* added to a variance */
#define CHUNK 128     /* rows that enter a weight's gradient in one product */

static int64_t length(const struct convolution *l, int64_t b) { return stem_steps(l->lengths[b], l->R); }
static int64_t sequence(const struct convolution *l) { return (stem_left(l->k, l->R) + l->T + l->k) * l->c; }

/* Of a gradient of the outputs with k - 1 steps of zeros around each sequence. */
static int64_t padded_sequence(const struct convolution *l) {
    return (stem_steps(l->T, l->R) + 2 * (l->k - 1)) * l->w;
}

void stem_arrange(struct convolution *l, int64_t training, uintptr_t *memory) {
    int64_t rows = l->B * stem_steps(l->T, l->R);
    l->packed = take(memory, 4 * l->k * l->c * l->w);
    l->normal = take(memory, 4 * rows * l->w);
    l->inverse = take(memory, 4 * l->w);
    for (int i = 0; i < 4; i++) l->columns[i] = take(memory, 4 * l->w);
    if (training) {
        l->reversed = take(memory, 4 * l->k * l->w * whole(l->C));
        l->padded = take(memory, 4 * l->B * padded_sequence(l));
        l->dweight = take(memory, 4 * l->k * l->c * l->w);
    }
}

void stem_pad(const struct convolution *l) {
    int64_t left = stem_left(l->k, l->R);
    for (int64_t b = 0; b < l->B; b++) {
        float *from = l->inputs + b * sequence(l);
        memset(from, 0, 4 * left * l->c);
        memset(from + (left + l->lengths[b]) * l->c, 0, 4 * l->k * l->c);
    }
}

/* (W, C, k) to (k, c, W), packed. */
static void pack_windows(const struct convolution *l) {
    for (int64_t first = 0; first < l->W; first += 4 * LANES) {
        int64_t many = l->W - first < 4 * LANES ? l->W - first : 4 * LANES, width = whole(many);
        float *to = l->packed + l->k * l->c * first;
        memset(to, 0, 4 * l->k * l->c * width);
        for (int64_t w = 0; w < many; w++)
            for (int64_t c = 0; c < l->C; c++)
                for (int64_t j = 0; j < l->k; j++)
                    to[(j * l->c + c) * width + w] = l->weight[((first + w) * l->C + c) * l->k + j];
    }
}

/* Mean and variance (w) of the convolution's outputs over all valid steps. */
static void statistics(const struct convolution *l, float *mean, float *variance) {
    int64_t S = stem_steps(l->T, l->R), count = 0;
    for (int64_t b = 0; b < l->B; b++) count += length(l, b);
    for (int64_t w = 0; w < l->w; w += LANES) {
        vec total = {0}, squares = {0};
        for (int64_t b = 0; b < l->B; b++) {
            vec sum = {0};
            for (int64_t s = 0; s < length(l, b); s++) sum += load(l->normal + (b * S + s) * l->w + w);
            total += sum;
        }
        total /= (float)count;
        for (int64_t b = 0; b < l->B; b++) {
            vec sum = {0};
            for (int64_t s = 0; s < length(l, b); s++) {
                vec off = load(l->normal + (b * S + s) * l->w + w) - total;
                sum += off * off;
            }
            squares += sum;
        }
        store(mean + w, total), store(variance + w, squares / (float)count);
    }
}

void stem_forward(const struct convolution *l, float recent) {
    int64_t S = stem_steps(l->T, l->R);
    float *mean = l->columns[0], *variance = l->columns[1], *scale = l->columns[2], *shift = l->columns[3];
    pack_windows(l);
    for (int64_t b = 0; b < l->B; b++)
        multiply_packed(l->normal + b * S * l->w, l->inputs + b * sequence(l), l->R * l->c, length(l, b),
                        l->k * l->c, l->packed, l->W);
    if (recent > 0) {
        statistics(l, mean, variance);
        for (int64_t w = 0; w < l->W; w++) {
            l->running_mean[w] += recent * (mean[w] - l->running_mean[w]);
            l->running_variance[w] += recent * (variance[w] - l->running_variance[w]);
        }
    } else {
        memcpy(mean, l->running_mean, 4 * l->W), memcpy(variance, l->running_variance, 4 * l->W);
    }
    for (int64_t w = 0; w < l->w; w++) { /* what fills the last vector stays 0 */
        int there = w < l->W;
        l->inverse[w] = there ? 1.0f / sqrtf(variance[w] + EPSILON) : 0.0f;
        scale[w] = there ? l->scale[w] : 0.0f, shift[w] = there ? l->shift[w] : 0.0f;
        if (!there) mean[w] = 0.0f;
    }
    for (int64_t b = 0; b < l->B; b++)
        for (int64_t s = 0; s < length(l, b); s++) {
            float *normal = l->normal + (b * S + s) * l->w, *to = l->outputs + b * l->outputs_sequence + s * l->w;
            for (int64_t w = 0; w < l->w; w += LANES) {
                vec value = (load(normal + w) - load(mean + w)) * load(l->inverse + w);
                store(normal + w, value);
                value = load(shift + w) + value * load(scale + w);
                store(to + w, vec_select((ivec)(value < 0.0f), (vec){0}, value)); /* NaN stays NaN */
            }
        }
}

/* Through ReLU and normalisation: g->outputs to the gradient of the convolution's outputs, with zeros around each
 * sequence, in l->padded. */
static void backward_normalization(const struct convolution *l, const struct convolution_gradients *g) {
    int64_t S = stem_steps(l->T, l->R), count = 0;
    float *shift = l->columns[0], *slope = l->columns[1], *factor = l->columns[2];
    for (int64_t b = 0; b < l->B; b++) count += length(l, b);
    for (int64_t w = 0; w < l->w; w += LANES) {
        vec shifts = {0}, slopes = {0};
        for (int64_t b = 0; b < l->B; b++) {
            vec shifted = {0}, sloped = {0};
            for (int64_t s = 0; s < length(l, b); s++) {
                float *at = g->outputs + (b * S + s) * l->w + w;
                ivec on = (ivec)(load(l->outputs + b * l->outputs_sequence + s * l->w + w) > 0.0f);
                vec d = vec_select(on, load(at), (vec){0});
                store(at, d);
                shifted += d, sloped += d * load(l->normal + (b * S + s) * l->w + w);
            }
            shifts += shifted, slopes += sloped;
        }
        store(shift + w, shifts), store(slope + w, slopes);
    }
    memcpy(g->shift, shift, 4 * l->W), memcpy(g->scale, slope, 4 * l->W);
    for (int64_t w = 0; w < l->w; w++) {
        factor[w] = w < l->W ? l->scale[w] * l->inverse[w] : 0.0f;
        shift[w] /= (float)count, slope[w] /= (float)count;
    }
    for (int64_t b = 0; b < l->B; b++) {
        float *to = l->padded + b * padded_sequence(l);
        int64_t around = (l->k - 1) * l->w, own = length(l, b) * l->w;
        memset(to, 0, 4 * around), memset(to + around + own, 0, 4 * around);
        for (int64_t s = 0; s < length(l, b); s++)
            for (int64_t w = 0; w < l->w; w += LANES) {
                int64_t at = (b * S + s) * l->w + w;
                vec d = load(g->outputs + at) - (load(shift + w) + load(l->normal + at) * load(slope + w));
                store(to + around + s * l->w + w, d * load(factor + w));
            }
    }
}

void stem_backward(const struct convolution *l, const struct convolution_gradients *g) {
    backward_normalization(l, g);
    int64_t around = (l->k - 1) * l->w;
    memset(l->dweight, 0, 4 * l->k * l->c * l->w);
    for (int64_t b = 0; b < l->B; b++)
        for (int64_t s = 0; s < length(l, b); s += CHUNK) {
            int64_t left = length(l, b) - s, many = left < CHUNK ? left : CHUNK;
            add_product(l->dweight, l->inputs + b * sequence(l) + s * l->R * l->c, 1, l->R * l->c, l->k * l->c, many,
                        l->padded + b * padded_sequence(l) + around + s * l->w, l->W);
        }
    for (int64_t w = 0; w < l->W; w++)
        for (int64_t c = 0; c < l->C; c++)
            for (int64_t j = 0; j < l->k; j++)
                g->weight[(w * l->C + c) * l->k + j] = l->dweight[(j * l->c + c) * l->w + w];
    if (!g->inputs) return;
    /* An input's gradient sees k outputs, as an output sees k inputs, with the weights the other way round. */
    for (int64_t first = 0; first < l->C; first += 4 * LANES) {
        int64_t many = l->C - first < 4 * LANES ? l->C - first : 4 * LANES, width = whole(many);
        float *to = l->reversed + l->k * l->w * first;
        memset(to, 0, 4 * l->k * l->w * width);
        for (int64_t w = 0; w < l->W; w++)
            for (int64_t c = 0; c < many; c++)
                for (int64_t j = 0; j < l->k; j++)
                    to[((l->k - 1 - j) * l->w + w) * width + c] = l->weight[(w * l->C + first + c) * l->k + j];
    }
    for (int64_t b = 0; b < l->B; b++)
        multiply_packed(g->inputs + b * l->T * l->c,
                        l->padded + b * padded_sequence(l) + stem_left(l->k, l->R) * l->w, l->w, l->lengths[b],
                        l->k * l->w, l->reversed, l->C);
}
