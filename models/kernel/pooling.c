/* See pooling.h. */

#include "pooling.h"

#include <math.h>
#include <string.h>

static float *step(const struct steps *y, int64_t b, int64_t s) { return y->values + b * y->sequence + s * y->stride; }

static void sequence_mean(const struct steps *y, int64_t b, float *to) {
    int64_t length = y->lengths[b];
    memset(to, 0, 4 * y->width);
    for (int64_t s = 0; s < length; s++) {
        const float *row = step(y, b, s);
        for (int64_t k = 0; k < y->width; k++) to[k] += row[k];
    }
    for (int64_t k = 0; k < y->width; k++) to[k] /= (float)length;
}

static void sequence_max(const struct steps *y, int64_t b, float *to) {
    memcpy(to, step(y, b, 0), 4 * y->width);
    for (int64_t s = 1; s < y->lengths[b]; s++) {
        const float *row = step(y, b, s);
        for (int64_t k = 0; k < y->width; k++) to[k] = row[k] > to[k] || row[k] != row[k] ? row[k] : to[k];
    }
}

/* The output that each direction ends with. */
static void sequence_last(const struct steps *y, int64_t b, int64_t hidden, float *to) {
    memcpy(to, step(y, b, y->lengths[b] - 1), 4 * hidden);
    memcpy(to + hidden, step(y, b, 0) + hidden, 4 * (y->width - hidden));
}

static void add_mean(const struct steps *dy, int64_t b, const float *from) {
    int64_t length = dy->lengths[b];
    for (int64_t s = 0; s < length; s++) {
        float *row = step(dy, b, s);
        for (int64_t k = 0; k < dy->width; k++) row[k] += from[k] / (float)length;
    }
}

/* Steps that share a maximum share its gradient, as in torch's amax. */
static void add_max(const struct steps *y, const struct steps *dy, int64_t b, const float *most, const float *from,
                    float *share) {
    memset(share, 0, 4 * y->width);
    for (int64_t s = 0; s < y->lengths[b]; s++) {
        const float *row = step(y, b, s);
        for (int64_t k = 0; k < y->width; k++) share[k] += row[k] == most[k] ? 1.0f : 0.0f;
    }
    for (int64_t k = 0; k < y->width; k++) share[k] = from[k] / share[k];
    for (int64_t s = 0; s < y->lengths[b]; s++) {
        const float *row = step(y, b, s);
        float *to = step(dy, b, s);
        for (int64_t k = 0; k < y->width; k++) to[k] += row[k] == most[k] ? share[k] : 0.0f;
    }
}

static void add_last(const struct steps *dy, int64_t b, int64_t hidden, const float *from) {
    float *forward = step(dy, b, dy->lengths[b] - 1), *reverse = step(dy, b, 0);
    for (int64_t k = 0; k < hidden; k++) forward[k] += from[k];
    for (int64_t k = hidden; k < dy->width; k++) reverse[k] += from[k];
}

static float dot(const float *a, const float *b, int64_t n) {
    float sum[8] = {0}, total = 0.0f; /* eight sums, so that vectors can hold them; their order is fixed */
    int64_t k = 0;
    for (; k + 8 <= n; k += 8)
        for (int64_t j = 0; j < 8; j++) sum[j] += a[k + j] * b[k + j];
    for (; k < n; k++) sum[k % 8] += a[k] * b[k];
    for (int64_t j = 0; j < 8; j++) total += sum[j];
    return total;
}

static void attend(const struct steps *y, int64_t b, const struct attention *attention, float *to) {
    int64_t length = y->lengths[b];
    float *shares = attention->shares + b * y->S, most = -INFINITY, total = 0.0f;
    for (int64_t s = 0; s < length; s++) {
        shares[s] = dot(step(y, b, s), attention->weight, y->width) + attention->bias[0];
        most = shares[s] > most ? shares[s] : most;
    }
    for (int64_t s = 0; s < length; s++) total += shares[s] = expf(shares[s] - most);
    memset(to, 0, 4 * y->width);
    for (int64_t s = 0; s < length; s++) {
        const float *row = step(y, b, s);
        shares[s] /= total;
        for (int64_t k = 0; k < y->width; k++) to[k] += shares[s] * row[k];
    }
}

static void attend_backward(const struct steps *y, const struct steps *dy, int64_t b, const struct attention *attention,
                            const float *pooled, const float *from) {
    const float *shares = attention->shares + b * y->S;
    float mean = dot(pooled, from, y->width);
    for (int64_t s = 0; s < y->lengths[b]; s++) {
        const float *row = step(y, b, s);
        float *to = step(dy, b, s), dscore = shares[s] * (dot(row, from, y->width) - mean);
        for (int64_t k = 0; k < y->width; k++) {
            to[k] += shares[s] * from[k] + dscore * attention->weight[k];
            attention->dweight[k] += dscore * row[k];
        }
        attention->dbias[0] += dscore;
    }
}

void pool(int64_t kind, const struct steps *y, int64_t hidden, const struct attention *attention, float *pooled,
          int64_t pooled_stride) {
    for (int64_t b = 0; b < y->B; b++, pooled += pooled_stride) {
        if (kind == POOL_LAST) sequence_last(y, b, hidden, pooled);
        if (kind == POOL_MEAN) sequence_mean(y, b, pooled);
        if (kind == POOL_MAX) sequence_max(y, b, pooled);
        if (kind == POOL_ATTENTION) attend(y, b, attention, pooled);
        if (kind == POOL_CONCAT) {
            sequence_max(y, b, pooled);
            sequence_mean(y, b, pooled + y->width);
            sequence_last(y, b, hidden, pooled + 2 * y->width);
        }
        if (kind == POOL_FLATTEN)
            for (int64_t s = 0; s < y->S; s++) memcpy(pooled + s * y->width, step(y, b, s), 4 * y->width);
    }
}

void pool_backward(int64_t kind, const struct steps *y, const struct steps *dy, int64_t hidden,
                   const struct attention *attention, const float *pooled, const float *dpooled, int64_t pooled_stride,
                   float *shares) {
    if (kind == POOL_ATTENTION) memset(attention->dweight, 0, 4 * y->width), attention->dbias[0] = 0.0f;
    for (int64_t b = 0; b < y->B; b++, pooled += pooled_stride, dpooled += pooled_stride) {
        for (int64_t s = 0; s < dy->lengths[b]; s++) memset(step(dy, b, s), 0, 4 * dy->width);
        if (kind == POOL_LAST) add_last(dy, b, hidden, dpooled);
        if (kind == POOL_MEAN) add_mean(dy, b, dpooled);
        if (kind == POOL_MAX) add_max(y, dy, b, pooled, dpooled, shares);
        if (kind == POOL_ATTENTION) attend_backward(y, dy, b, attention, pooled, dpooled);
        if (kind == POOL_CONCAT) {
            add_max(y, dy, b, pooled, dpooled, shares);
            add_mean(dy, b, dpooled + y->width);
            add_last(dy, b, hidden, dpooled + 2 * y->width);
        }
        if (kind == POOL_FLATTEN)
            for (int64_t s = 0; s < y->S; s++) memcpy(step(dy, b, s), dpooled + s * y->width, 4 * y->width);
    }
}

void pool_skip(const struct steps *x, float *pooled, int64_t pooled_stride) {
    for (int64_t b = 0; b < x->B; b++, pooled += pooled_stride) {
        sequence_max(x, b, pooled);
        sequence_mean(x, b, pooled + x->width);
    }
}

void pool_skip_backward(const struct steps *x, const struct steps *dx, const float *pooled, const float *dpooled,
                        int64_t pooled_stride, float *shares) {
    for (int64_t b = 0; b < x->B; b++, pooled += pooled_stride, dpooled += pooled_stride) {
        add_max(x, dx, b, pooled, dpooled, shares);
        add_mean(dx, b, dpooled + x->width);
    }
}
