/* See network.h. */

#include "network.h"

#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "head.h"
#include "loss.h"
#include "lstm.h"
#include "memory.h"
#include "optimizer.h"
#include "pooling.h"
#include "random.h"
#include "stem.h"
#include "vector.h"

#define CONVOLUTIONS 4 /* at most */
#define AHEAD 4        /* batches whose pages are on their way */

struct layer { /* one direction of one LSTM layer */
    struct lstm_shape shape;
    int64_t place; /* in network.places, of w_ih */
    void *memory;
};

struct batch { /* what one batch of B sequences of up to T steps takes; S: the LSTM's steps */
    int64_t B, T, S, inputs, width, pooled, stride; /* numbers that the LSTM reads and gives a step, that the head reads */
    int64_t training;
    int64_t *lengths, *reduced, *labels;            /* (B) of the data, of the LSTM; labels */
    const int64_t *ragged;                          /* the LSTM's lengths, or NULL where all are S */
    float *row_weights;                             /* (B) */
    struct convolution stem[CONVOLUTIONS];
    float *values, *dvalues;                        /* (B, S, x_stride), what the LSTM reads, and its gradient */
    int64_t x_stride;
    float *outputs[2], *doutputs[2];                /* (B, S, width), of one layer and the next */
    float *pooled_rows, *dpooled;                   /* (B, stride) */
    float *scores;                                  /* (B, S) of attention */
    float *noise[2], *shares;                       /* (C), (C), (width or inputs) to compute with */
    float *hidden, *dhidden, *logits, *dlogits;     /* (B, whole(head)), (B, whole(outputs)) */
    struct linear linear[2];
    int64_t layers, site;                           /* site: of the next random numbers */
    struct layer *layer;
};

static int64_t convolution_kernel(const struct network *net, int64_t i) {
    return i == 0 && net->stem_kernel < net->stem_stride ? net->stem_stride : net->stem_kernel;
}

static int gathers(const struct network *net, int augmented) { return net->stem_layers || net->skip || augmented; }

/* Lay out a batch in `base`; returns the bytes that it takes. */
static int64_t arrange(const struct network *net, struct batch *m, void *base, int64_t B, int64_t T, int64_t training) {
    uintptr_t memory = (uintptr_t)base;
    *m = (struct batch){.B = B, .T = T, .S = T, .training = training};
    m->lengths = take(&memory, 8 * B), m->reduced = take(&memory, 8 * B), m->labels = take(&memory, 8 * B);
    m->row_weights = take(&memory, 4 * B);
    m->inputs = m->x_stride = net->channels;
    for (int64_t i = 0; i < net->stem_layers; i++) {
        int64_t R = i ? 1 : net->stem_stride, k = convolution_kernel(net, i), W = net->stem_width;
        struct convolution *l = &m->stem[i];
        *l = (struct convolution){.T = m->S, .B = B, .C = m->inputs, .W = W, .k = k, .R = R, .c = m->x_stride, .w = whole(W)};
        l->lengths = i ? m->reduced : m->lengths;
        l->inputs = take(&memory, 4 * stem_inputs(B, m->S, k, R, l->c));
        stem_arrange(l, training, &memory);
        m->S = stem_steps(m->S, R), m->inputs = W, m->x_stride = l->w;
    }
    m->values = take(&memory, 4 * B * m->S * m->x_stride);
    for (int64_t i = 0; i < net->stem_layers; i++) { /* outputs lie between the zeros of the next one's inputs */
        struct convolution *l = &m->stem[i], *next = l + 1;
        int last = i + 1 == net->stem_layers;
        l->outputs = last ? m->values : next->inputs + stem_left(next->k, 1) * next->c;
        l->outputs_sequence = last ? m->S * l->w : (stem_left(next->k, 1) + m->S + next->k) * next->c;
    }
    if (training && net->stem_layers) m->dvalues = take(&memory, 4 * B * m->S * m->x_stride);
    m->width = net->directions * net->hidden;
    for (int64_t i = 0; i < (net->layers > 1 ? 2 : 1); i++) {
        m->outputs[i] = take(&memory, 4 * B * m->S * m->width);
        if (training) m->doutputs[i] = take(&memory, 4 * B * m->S * m->width);
    }
    m->layers = net->layers * net->directions;
    m->layer = take(&memory, (int64_t)sizeof(struct layer) * m->layers);
    for (int64_t i = 0; i < m->layers; i++) {
        int64_t depth = i / net->directions, reverse = i % net->directions;
        int64_t final = net->pooling == POOL_LAST && depth == net->layers - 1;
        struct layer l = {.place = 3 * net->stem_layers + 4 * i};
        l.shape = (struct lstm_shape){m->S, B, depth ? m->width : m->inputs, net->hidden, reverse, training, final,
                                      m->width, m->S * m->width};
        l.memory = take(&memory, lstm_bytes(&l.shape));
        if (base) m->layer[i] = l;
    }
    int64_t times = net->pooling == POOL_CONCAT ? 3 : net->pooling == POOL_FLATTEN ? m->S : 1;
    m->pooled = times * m->width + 2 * m->inputs * net->skip, m->stride = whole(m->pooled);
    m->pooled_rows = take(&memory, 4 * B * m->stride);
    m->scores = take(&memory, 4 * B * m->S);
    for (int i = 0; i < 2; i++) m->noise[i] = take(&memory, 4 * net->channels);
    m->shares = take(&memory, 4 * (m->width > m->inputs ? m->width : m->inputs));
    m->logits = take(&memory, 4 * B * whole(net->outputs));
    if (net->head) m->hidden = take(&memory, 4 * B * whole(net->head));
    if (training) {
        m->dpooled = take(&memory, 4 * B * m->stride);
        m->dlogits = take(&memory, 4 * B * whole(net->outputs));
        if (net->head) m->dhidden = take(&memory, 4 * B * whole(net->head));
    }
    m->linear[0] = (struct linear){.B = B, .inputs = m->pooled, .outputs = net->head ? net->head : net->outputs};
    m->linear[1] = (struct linear){.B = B, .inputs = net->head, .outputs = net->outputs};
    for (int64_t i = 0; i < (net->head ? 2 : 1); i++) linear_arrange(&m->linear[i], training, &memory);
    return (int64_t)(memory - (uintptr_t)base);
}

int64_t network_bytes(const struct network *net, int64_t B, int64_t T, int64_t training) {
    struct batch m;
    return arrange(net, &m, 0, B, T, training);
}

static void lay_out(const struct network *net, struct batch *m, void *memory, int64_t B, int64_t T, int64_t training) {
    if (SANITIZED) forget(memory, network_bytes(net, B, T, training));
    arrange(net, m, memory, B, T, training);
}

static const float *weight(const struct network *net, int64_t i) { return net->weights + net->places[i]; }
static float *gradient(const struct network *net, int64_t i) { return net->gradients + net->places[i]; }

static int64_t attention_place(const struct network *net) {
    return 3 * net->stem_layers + 4 * net->layers * net->directions;
}

static int64_t head_place(const struct network *net) {
    return attention_place(net) + (net->pooling == POOL_ATTENTION ? 2 : 0);
}

/* Lengths, labels and weights of the batch's rows. */
static void look_up(const struct network *net, const struct data *data, const int64_t *rows, struct batch *m) {
    int64_t R = net->stem_layers ? net->stem_stride : 1;
    m->ragged = 0;
    for (int64_t b = 0; b < m->B; b++) {
        m->lengths[b] = data->lengths[rows[b]];
        m->reduced[b] = stem_steps(m->lengths[b], R);
        m->labels[b] = data->labels[rows[b]];
        m->row_weights[b] = data->weights ? data->weights[rows[b]] : 1.0f;
        if (m->lengths[b] < m->T) m->ragged = m->reduced; /* also where a stride makes them equal again */
    }
}

/* Sequence b's values, mixed and with noise, as they are trained on: (length, C) to `to`. */
static void gather(const struct network *net, const struct data *data, const struct training *training,
                   const int64_t *rows, const float *shares, const struct draw *draw, const struct batch *m, int64_t b,
                   float *to) {
    int64_t C = net->channels, length = m->lengths[b];
    const float *own = data->values + rows[b] * data->sequence;
    const float *other = data->values + rows[(b + 1) % m->B] * data->sequence;
    for (int64_t t = 0; t < length; t++)
        for (int64_t c = 0; c < C; c++) {
            float value = own[t * data->step + c];
            if (shares) {
                float beside = other[t * data->step + c];
                value = beside + shares[b] * (value - beside);
            }
            to[t * C + c] = value;
        }
    if (!training || !training->added) return;
    float *factor = m->noise[0], *normal = m->noise[1];
    struct draw factors = *draw, terms = *draw;
    terms.site++;
    normal_row(&factors, b, C, normal);
    for (int64_t c = 0; c < C; c++) factor[c] = 1 + training->factor[c] * normal[training->drawn ? training->drawn[c] : c];
    for (int64_t t = 0; t < length; t++) {
        normal_row(&terms, t * m->B + b, C, normal);
        for (int64_t c = 0; c < C; c++) {
            float *at = to + t * C + c;
            *at = *at * factor[c] + normal[training->drawn ? training->drawn[c] : c] * training->added[c];
        }
    }
}

/* Each valid step of a layer's outputs or their gradient, (B, S, width). */
static void drop_steps(const struct network *net, const struct batch *m, const struct draw *draw, float *values) {
    for (int64_t b = 0; b < m->B; b++)
        for (int64_t s = 0; s < m->reduced[b]; s++)
            drop_row(draw, s * m->B + b, m->width, net->dropout, values + (b * m->S + s) * m->width);
}

static struct attention attention_of(const struct network *net, const struct batch *m) {
    struct attention a = {.shares = m->scores};
    if (net->pooling == POOL_ATTENTION) {
        int64_t place = attention_place(net);
        a.weight = weight(net, place), a.bias = weight(net, place + 1);
        if (m->training) a.dweight = gradient(net, place), a.dbias = gradient(net, place + 1);
    }
    return a;
}

static struct steps steps_of(const struct batch *m, float *values, int64_t width, int64_t stride) {
    return (struct steps){values, m->S, m->B, width, stride, m->S * stride, m->reduced};
}

/* Logits of the batch. recent: of the stem's running statistics; 0: they are used. draw: where random numbers come from
 * in training. */
static void forward(const struct network *net, const struct data *data, const struct training *training,
                    const int64_t *rows, const float *shares, struct draw draw, float recent, struct batch *m) {
    int augmented = shares || (training && training->added), copied = gathers(net, augmented);
    for (int64_t b = 0; copied && b < m->B; b++) {
        float *to = m->values + b * m->S * m->x_stride;
        if (net->stem_layers) {
            struct convolution *l = &m->stem[0];
            int64_t left = stem_left(l->k, l->R);
            to = l->inputs + (b * (left + l->T + l->k) + left) * l->c;
        }
        gather(net, data, training, rows, shares, &draw, m, b, to);
    }
    if (training && training->added) draw.site += 2;
    for (int64_t i = 0; i < net->stem_layers; i++) {
        struct convolution *l = &m->stem[i];
        l->weight = weight(net, 3 * i), l->scale = weight(net, 3 * i + 1), l->shift = weight(net, 3 * i + 2);
        l->running_mean = net->running[2 * i], l->running_variance = net->running[2 * i + 1];
        stem_pad(l);
        stem_forward(l, recent);
    }
    m->site = draw.site;
    for (int64_t i = 0; i < m->layers; i++) {
        struct layer *l = &m->layer[i];
        int64_t depth = i / net->directions, place = l->place, reverse = i % net->directions;
        struct lstm_inputs in = {.x = m->values, .x_step = m->x_stride, .x_sequence = m->S * m->x_stride,
                                 .lengths = m->ragged, .w_ih = weight(net, place), .w_hh = weight(net, place + 1),
                                 .b_ih = weight(net, place + 2), .b_hh = weight(net, place + 3)};
        if (!copied) in.x = data->values, in.x_step = data->step, in.x_sequence = data->sequence, in.rows = rows;
        if (depth) {
            if (!reverse && training && net->dropout > 0) {
                drop_steps(net, m, &draw, m->outputs[(depth - 1) % 2]);
                draw.site++;
            }
            in.x = m->outputs[(depth - 1) % 2], in.x_step = m->width, in.x_sequence = m->S * m->width, in.rows = 0;
        }
        float *y = m->outputs[depth % 2];
        if (l->shape.final) y = m->pooled_rows, l->shape.sequence = m->stride;
        lstm_forward(&l->shape, &in, y + reverse * net->hidden, l->memory);
    }
    struct attention attention = attention_of(net, m);
    struct steps y = steps_of(m, m->outputs[(net->layers - 1) % 2], m->width, m->width);
    if (net->pooling != POOL_LAST) pool(net->pooling, &y, net->hidden, &attention, m->pooled_rows, m->stride);
    if (net->skip) {
        struct steps x = steps_of(m, m->values, m->inputs, m->x_stride);
        pool_skip(&x, m->pooled_rows + m->pooled - 2 * m->inputs, m->stride);
    }
    int64_t place = head_place(net);
    m->linear[0].weight = weight(net, place), m->linear[0].bias = weight(net, place + 1);
    linear_forward(&m->linear[0], m->pooled_rows, net->head ? m->hidden : m->logits);
    if (!net->head) return;
    for (int64_t b = 0; b < m->B; b++) {
        float *row = m->hidden + b * whole(net->head);
        for (int64_t k = 0; k < net->head; k++) row[k] = row[k] < 0 ? 0.0f : row[k];
        if (training && net->dropout > 0) drop_row(&draw, b, net->head, net->dropout, row);
    }
    m->linear[1].weight = weight(net, place + 2), m->linear[1].bias = weight(net, place + 3);
    linear_forward(&m->linear[1], m->hidden, m->logits);
}

/* From the gradient of the logits to that of the pooled rows. */
static void backward_head(const struct network *net, struct batch *m) {
    int64_t place = head_place(net);
    const float *dlogits = m->dlogits;
    if (net->head) {
        linear_backward(&m->linear[1], m->hidden, dlogits, m->dhidden, gradient(net, place + 2), gradient(net, place + 3));
        float factor = (float)(1 / (1 - net->dropout)); /* what dropout or ReLU made 0 has no gradient */
        for (int64_t k = 0; k < m->B * whole(net->head); k++) m->dhidden[k] *= m->hidden[k] > 0 ? factor : 0.0f;
        dlogits = m->dhidden;
    }
    linear_backward(&m->linear[0], m->pooled_rows, dlogits, m->dpooled, gradient(net, place), gradient(net, place + 1));
}

/* From the gradient of the logits to that of all weights. */
static void backward(const struct network *net, struct draw draw, struct batch *m) {
    backward_head(net, m);
    struct attention attention = attention_of(net, m);
    int64_t last = (net->layers - 1) % 2;
    struct steps y = steps_of(m, m->outputs[last], m->width, m->width), dy = y;
    dy.values = m->doutputs[last];
    if (net->pooling != POOL_LAST)
        pool_backward(net->pooling, &y, &dy, net->hidden, &attention, m->pooled_rows, m->dpooled, m->stride,
                      m->shares);
    draw.site = (uint32_t)m->site + (net->dropout > 0 ? (uint32_t)net->layers - 1 : 0);
    for (int64_t depth = net->layers - 1; depth >= 0; depth--) {
        for (int64_t reverse = 0; reverse < net->directions; reverse++) {
            struct layer *l = &m->layer[depth * net->directions + reverse];
            int64_t place = l->place, x_stride = depth ? m->width : m->x_stride;
            const float *dy_rows = l->shape.final ? m->dpooled : m->doutputs[depth % 2];
            struct lstm_gradients g = {.dy = dy_rows + reverse * net->hidden, .w_ih = weight(net, place),
                                       .w_hh = weight(net, place + 1), .dx_step = x_stride,
                                       .dx_sequence = m->S * x_stride, .add = reverse, .lengths = m->ragged,
                                       .dw_ih = gradient(net, place), .dw_hh = gradient(net, place + 1),
                                       .db_ih = gradient(net, place + 2), .db_hh = gradient(net, place + 3)};
            g.dx = depth ? m->doutputs[(depth - 1) % 2] : net->stem_layers ? m->dvalues : 0;
            lstm_backward(&l->shape, &g, l->memory);
        }
        if (depth && net->dropout > 0) {
            draw.site--;
            drop_steps(net, m, &draw, m->doutputs[(depth - 1) % 2]);
        }
    }
    if (!net->stem_layers) return;
    if (net->skip) {
        struct steps x = steps_of(m, m->values, m->inputs, m->x_stride), dx = x;
        dx.values = m->dvalues;
        int64_t from = m->pooled - 2 * m->inputs;
        pool_skip_backward(&x, &dx, m->pooled_rows + from, m->dpooled + from, m->stride, m->shares);
    }
    for (int64_t i = net->stem_layers - 1; i >= 0; i--) {
        struct convolution_gradients g = {gradient(net, 3 * i), gradient(net, 3 * i + 1), gradient(net, 3 * i + 2),
                                          m->dvalues, i ? m->dvalues : 0};
        stem_backward(&m->stem[i], &g);
    }
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static int64_t longest(const struct data *data, const int64_t *rows, int64_t count) {
    int64_t most = 0;
    for (int64_t b = 0; b < count; b++) most = data->lengths[rows[b]] > most ? data->lengths[rows[b]] : most;
    return most;
}

/* Ask the system for the pages of a batch's rows, all at once. Met one by one, each waits for the disk, and brings many
 * with it that nobody reads. */
static void ask_for(const struct data *data, const struct batches *b, int64_t i) {
    if (!data->mapped || i >= b->count) return;
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    for (int64_t n = i ? b->ends[i - 1] : 0; n < b->ends[i]; n++) {
        uintptr_t from = (uintptr_t)(data->values + b->rows[n] * data->sequence), end = from + 4 * data->sequence;
        from -= from % page;
        madvise((void *)from, end - from, MADV_WILLNEED);
    }
}

int64_t network_train(const struct network *net, const struct data *data, const struct training *training,
                      const struct batches *b, float *loss, void *memory) {
    double until = now() + b->seconds;
    int64_t i = b->first;
    for (int64_t k = 0; k < AHEAD; k++) ask_for(data, b, i + k);
    for (; i < b->count && (i == b->first || now() < until); i++) {
        ask_for(data, b, i + AHEAD);
        int64_t begin = i ? b->ends[i - 1] : 0, B = b->ends[i] - begin;
        const int64_t *rows = b->rows + begin;
        const float *shares = b->shares ? b->shares + begin : 0;
        struct draw draw = {b->seed, (uint32_t)i, 0};
        struct batch m;
        float recent = 1.0f / (float)(i + 1), counted = 0.0f;
        lay_out(net, &m, memory, B, longest(data, rows, B), 1);
        look_up(net, data, rows, &m);
        forward(net, data, training, rows, shares, draw, recent < 0.1f ? 0.1f : recent, &m);
        struct loss l = {B, net->outputs, whole(net->outputs), m.logits, m.labels, data->weights ? m.row_weights : 0,
                         shares, training->class_weight, training->smoothing, m.dlogits};
        float lost = loss_and_gradient(&l);
        backward(net, draw, &m);
        struct update u = {training->optimizer, training->count, training->rate, training->decay, training->clip,
                           net->weights, net->gradients, training->first, training->second, training->steps};
        if (u.clip > 0) clip_gradients(&u);
        update_weights(&u);
        for (int64_t k = 0; k < B; k++) counted += m.row_weights[k];
        *loss += lost * counted;
    }
    return i;
}

void network_predict(const struct network *net, const struct data *data, const struct batches *b, float *logits,
                     void *memory) {
    ask_for(data, b, b->first);
    for (int64_t i = b->first; i < b->count; i++) {
        ask_for(data, b, i + 1);
        int64_t begin = i ? b->ends[i - 1] : 0, B = b->ends[i] - begin;
        const int64_t *rows = b->rows + begin;
        struct batch m;
        lay_out(net, &m, memory, B, longest(data, rows, B), 0);
        look_up(net, data, rows, &m);
        forward(net, data, 0, rows, 0, (struct draw){0}, 0.0f, &m);
        for (int64_t k = 0; k < B; k++)
            memcpy(logits + (begin + k) * net->outputs, m.logits + k * whole(net->outputs), 4 * net->outputs);
    }
}
