/* See loss.h. */

#include "loss.h"

#include <math.h>

#define LEAST 1e-30 /* what divides at least, where a batch may hold rows of weight 0 alone */

/* What a row of this label loses, times `factor`; its gradient is added. */
static double of_two(const struct loss *l, int64_t label, double logit, double factor, float *gradient) {
    double target = (double)label * (1 - l->smoothing) + l->smoothing / 2;
    double positive = (l->class_weight ? l->class_weight[0] : 1.0) * target, negative = 1 - target;
    double small = exp(-fabs(logit)), rest = log1p(small); /* log(1 + exp(-|x|)) */
    double sigmoid = logit >= 0 ? 1 / (1 + small) : small / (1 + small);
    gradient[0] += (float)(factor * ((positive + negative) * sigmoid - positive));
    return factor * (positive * (rest + fmax(-logit, 0)) + negative * (rest + fmax(logit, 0)));
}

static double of_many(const struct loss *l, int64_t label, const float *logits, double log_total, double factor,
                      float *gradient) {
    double spread = l->smoothing / (double)l->outputs, lost = 0, weighed = 0;
    for (int64_t k = 0; k < l->outputs; k++) {
        double target = (k == label ? 1 - l->smoothing : 0) + spread;
        double weight = target * (l->class_weight ? l->class_weight[k] : 1.0);
        lost += weight * (log_total - logits[k]);
        weighed += weight;
        gradient[k] -= (float)(factor * weight);
    }
    for (int64_t k = 0; k < l->outputs; k++) gradient[k] += (float)(factor * weighed * exp(logits[k] - log_total));
    return factor * lost;
}

/* What a row of this label counts in the mean. */
static double counted(const struct loss *l, int64_t b) {
    double by_class = l->class_weight && l->outputs > 1 ? l->class_weight[l->labels[b]] : 1.0;
    return by_class * (l->weights ? l->weights[b] : 1.0);
}

float loss_and_gradient(const struct loss *l) {
    double total = 0, lost = 0;
    for (int64_t b = 0; b < l->B; b++) {
        double share = l->shares ? l->shares[b] : 1.0;
        total += share * counted(l, b);
        if (l->shares) total += (1 - share) * counted(l, (b + 1) % l->B);
    }
    if (l->weights && total < LEAST) total = LEAST;
    for (int64_t b = 0; b < l->B; b++) {
        const float *logits = l->logits + b * l->stride;
        float *gradient = l->gradient + b * l->stride;
        double most = -INFINITY, log_total = 0;
        for (int64_t k = 0; k < l->stride; k++) gradient[k] = 0.0f;
        for (int64_t k = 0; k < l->outputs; k++) most = logits[k] > most || logits[k] != logits[k] ? logits[k] : most;
        for (int64_t k = 0; l->outputs > 1 && k < l->outputs; k++) log_total += exp(logits[k] - most);
        log_total = most + log(log_total);
        for (int64_t mixed = 0; mixed < (l->shares ? 2 : 1); mixed++) { /* own label, then the next one's */
            int64_t of = (b + mixed) % l->B;
            double share = !l->shares ? 1.0 : mixed ? 1.0 - l->shares[b] : l->shares[b];
            double factor = share * (l->weights ? l->weights[of] : 1.0) / total;
            lost += l->outputs == 1 ? of_two(l, l->labels[of], logits[0], factor, gradient)
                                    : of_many(l, l->labels[of], logits, log_total, factor, gradient);
        }
    }
    return (float)lost;
}
