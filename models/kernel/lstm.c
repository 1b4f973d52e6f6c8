/* See lstm.h. */

#include "lstm.h"
#include "matrix.h"
#include "memory.h"

#define ROWS 16   /* of which gates are computed before their outputs */
#define TURNED 8  /* columns */
#define CHUNK 96  /* rows whose gate gradients wait in cache until they go into the weights' gradient together */

struct position { int32_t step, sequence; };

struct layer {
    int64_t S, B, F, H, K, reverse, training;
    int64_t blocks, width;             /* of units: whole blocks, and their lanes */
    int64_t start, stride;             /* of `inputs`: where x begins in a row (so that h is aligned), row to row */
    int64_t dstride;                   /* of `dgates`: row to row, no power of two (cache sets) */
    int64_t *order, *counts, *offsets; /* rank to sequence (B); rows of each step and before it (S + 1) */
    struct position *positions;        /* of each row in x, y and their gradients */
    float *weights, *dweights;         /* (blocks, K, 4, LANES), (K, 4, width) */
    float *inputs;                     /* (rows, stride) */
    /* Of each step (blocks, its rows, …), so that what a block of units writes is one piece: gates (4, LANES), cells and
     * their hyperbolic tangents (LANES). Without training gates and tangents of one step and block. */
    float *gates, *cells, *squashed;
    float *recurrent, *entering;       /* w_hh and w_ih, packed for the backward product */
    float *dgates[2], *dcells;         /* (rows of a chunk, 4, width), this chunk and the last; (blocks, B, LANES) */
    float *dh, *dx;                    /* (B, 4 LANES), (rows of a chunk, 4 LANES): units or inputs of up to four blocks */
    float *y;                          /* outputs (S, B, H), from step to step and from sequence to sequence: */
    const float *dy;                   /* their gradient, too */
    int64_t step, sequence, final;     /* final: a sequence has one output, that of the step it ends with; step is 0 */
};

/* Lay a layer out in `arena`; `bytes` is how much it takes. Without training two steps are kept instead of all. */
static struct layer arrange(void *arena, const struct lstm_shape *shape, int64_t *bytes) {
    int64_t S = shape->S, B = shape->B, F = shape->F, H = shape->H, training = shape->training;
    struct layer l = {.S = S, .B = B, .F = F, .H = H, .K = F + 1 + H};
    int64_t rows = training ? S * B : 2 * B, chunk = B > CHUNK ? B : CHUNK;
    uintptr_t memory = (uintptr_t)arena;
    l.reverse = shape->reverse, l.training = training;
    l.step = shape->final ? 0 : shape->step, l.sequence = shape->sequence, l.final = shape->final;
    l.width = whole(H), l.blocks = l.width / LANES;
    l.start = whole(F + 1) - (F + 1), l.stride = whole(F + 1) + l.width, l.dstride = 4 * l.width + LANES;
    l.order = take(&memory, 8 * B);
    l.counts = take(&memory, 8 * (S + 1)), l.offsets = take(&memory, 8 * (S + 1));
    l.positions = take(&memory, sizeof(struct position) * S * B);
    l.weights = take(&memory, 4 * l.K * 4 * l.width);
    l.inputs = take(&memory, 4 * rows * l.stride);
    l.cells = take(&memory, 4 * rows * l.width);
    if (training) {
        l.gates = take(&memory, 4 * rows * 4 * l.width);
        l.squashed = take(&memory, 4 * rows * l.width);
        l.recurrent = take(&memory, 4 * 4 * l.width * l.width);
        l.entering = take(&memory, 4 * 4 * l.width * whole(F));
        l.dgates[0] = take(&memory, 4 * chunk * l.dstride), l.dgates[1] = take(&memory, 4 * chunk * l.dstride);
        l.dcells = take(&memory, 4 * B * l.width), l.dh = take(&memory, 4 * B * 4 * LANES);
        l.dx = take(&memory, 4 * chunk * 4 * LANES);
        l.dweights = take(&memory, 4 * l.K * 4 * l.width);
    } else {
        l.gates = take(&memory, 4 * B * 4 * LANES), l.squashed = take(&memory, 4 * B * LANES);
    }
    *bytes = (int64_t)(memory - (uintptr_t)arena);
    return l;
}

int64_t lstm_bytes(const struct lstm_shape *shape) {
    int64_t bytes;
    arrange(0, shape, &bytes);
    return bytes;
}

/* Fill order, counts, offsets and positions; whether all lengths lie in 0..S. `lengths` NULL: all are S. */
static int rank(const struct layer *l, const int64_t *lengths) {
    int64_t longer = 0, *next = l->offsets;
    memset(l->counts, 0, 8 * (l->S + 1));
    for (int64_t b = 0; lengths && b < l->B; b++) {
        if (lengths[b] < 0 || lengths[b] > l->S) return 0;
        l->counts[lengths[b]]++;
    }
    if (!lengths) l->counts[l->S] = l->B;
    for (int64_t s = l->S; s >= 0; s--) { /* from how many are of length s to how many are longer */
        int64_t equal = l->counts[s];
        next[s] = l->counts[s] = longer, longer += equal;
    }
    for (int64_t b = 0; b < l->B; b++) l->order[next[lengths ? lengths[b] : l->S]++] = b;
    int64_t row = 0;
    for (int64_t s = 0; s <= l->S; s++) {
        l->offsets[s] = row;
        for (int64_t n = 0; n < l->counts[s]; n++, row++) {
            int64_t b = l->order[n], length = lengths ? lengths[b] : l->S;
            l->positions[row] = (struct position){(int32_t)(l->reverse ? length - 1 - s : s), (int32_t)b};
        }
    }
    return 1;
}

/* Between torch's weights, whose rows are (gate, unit), and the packed ones. */
static float *packed(const struct layer *l, float *weights, int64_t gate, int64_t unit) {
    return weights + unit / LANES * l->K * 4 * LANES + gate * LANES + unit % LANES;
}

static void pack_gates(const struct layer *l, const float *w_ih, const float *w_hh, const float *b_ih, const float *b_hh) {
    if (l->H < l->width) memset(l->weights, 0, 4 * l->K * 4 * l->width);
    for (int64_t j = 0; j < 4 * l->H; j++) {
        float *to = packed(l, l->weights, j / l->H, j % l->H);
        for (int64_t k = 0; k < l->F; k++, to += 4 * LANES) *to = w_ih[j * l->F + k];
        *to = b_ih[j] + b_hh[j], to += 4 * LANES;
        for (int64_t k = 0; k < l->H; k++, to += 4 * LANES) *to = w_hh[j * l->H + k];
    }
}

/* From (columns, 4, width), of which `columns` begin at `from`, to torch's (4 H, columns). */
static void unpack_columns(const struct layer *l, const float *from, int64_t columns, float *to) {
    for (int64_t first = 0; first < columns; first += TURNED) { /* so many rows stay in cache while they are turned */
        int64_t many = columns - first < TURNED ? columns - first : TURNED;
        for (int64_t gate = 0; gate < 4; gate++)
            for (int64_t unit = 0; unit < l->H; unit++)
                for (int64_t k = 0; k < many; k++)
                    to[(gate * l->H + unit) * columns + first + k] = from[(first + k) * 4 * l->width + gate * l->width + unit];
    }
}

static void unpack_gates(const struct layer *l, float *dw_ih, float *dw_hh, float *db_ih, float *db_hh) {
    const float *bias = l->dweights + l->F * 4 * l->width;
    unpack_columns(l, l->dweights, l->F, dw_ih);
    unpack_columns(l, bias, 1, db_ih);
    memcpy(db_hh, db_ih, 4 * 4 * l->H);
    unpack_columns(l, bias + 4 * l->width, l->H, dw_hh);
}

/* w (4 H, columns) to a packed matrix (see matrix.h), whose depth is that of `dgates`. */
static void pack_backward(const struct layer *l, const float *w, int64_t columns, float *to) {
    if (l->H < l->width || columns % LANES) memset(to, 0, 4 * 4 * l->width * whole(columns));
    for (int64_t from = 0; from < columns; from += 4 * LANES) {
        int64_t many = columns - from < 4 * LANES ? columns - from : 4 * LANES;
        for (int64_t gate = 0; gate < 4; gate++)
            for (int64_t unit = 0; unit < l->H; unit++)
                memcpy(to + (gate * l->width + unit) * whole(many), w + (gate * l->H + unit) * columns + from, 4 * many);
        to += 4 * l->width * whole(many);
    }
}

/* Where the rows of step s begin. */
static int64_t begin(const struct layer *l, int64_t s) { return l->training ? l->offsets[s] : s % 2 * l->B; }

/* Where those of a block of units begin, in vectors. */
static int64_t piece(const struct layer *l, int64_t s, int64_t block) {
    return begin(l, s) * l->blocks + block * l->counts[s];
}

/* Step s of all sequences that are still running, one block of units: from the sums of the gates to gates, cells and
 * outputs. First the gates of many rows, then their outputs: so many chains of operations are under way at once. */
static void activate(const struct layer *l, int64_t s, int64_t block, float *gates) {
    int64_t next = begin(l, s + 1), lanes = l->H - block * LANES, at = piece(l, s, block) * LANES;
    const float *past = s ? l->cells + piece(l, s - 1, block) * LANES : 0;
    float *cells = l->cells + at, *squashed = l->squashed + (l->training ? at : 0);
    float *inputs = l->inputs + next * l->stride + l->start + l->F + 1 + block * LANES;
    /* Units that there are not stay 0, where an infinite input times their weight of 0 would be NaN. */
    vec there = load((const float *)(edge + 16 - (lanes < LANES ? lanes : LANES)));
    for (int64_t first = 0, count = l->counts[s]; first < count; first += ROWS) {
        int64_t end = count - first < ROWS ? count : first + ROWS;
        for (int64_t n = first; n < end; n++) {
            float *z = gates + n * 4 * LANES;
            vec i = vec_sigmoid(load(z)), f = vec_sigmoid(load(z + LANES)), g = vec_tanh(load(z + 2 * LANES));
            vec before = {0};
            if (s) before = load(past + n * LANES);
            store(cells + n * LANES, only(there, f * before + i * g));
            store(z, only(there, i)), store(z + LANES, only(there, f)), store(z + 2 * LANES, only(there, g));
        }
        for (int64_t n = first; n < end; n++) {
            float *z = gates + n * 4 * LANES + 3 * LANES;
            vec o = vec_sigmoid(load(z)), c = vec_tanh(load(cells + n * LANES)), h = only(there, o * c);
            store(z, only(there, o)), store(squashed + n * LANES, c);
            if (n < l->counts[s + 1]) store(inputs + n * l->stride, h);
            if (l->final && n < l->counts[s + 1]) continue;
            struct position to = l->positions[l->offsets[s] + n];
            store_some(l->y + to.step * l->step + to.sequence * l->sequence + block * LANES, h, lanes);
        }
    }
}

/* Step s of all sequences that are still running. */
static void forward_step(const struct layer *l, int64_t s) {
    for (int64_t block = 0; block < l->blocks; block++) {
        float *gates = l->gates + (l->training ? piece(l, s, block) * 4 * LANES : 0);
        multiply(gates, 4 * LANES, l->inputs + begin(l, s) * l->stride + l->start, l->stride, 1, l->counts[s], l->K,
                 l->weights + block * l->K * 4 * LANES, 4 * LANES, 4, 0);
        activate(l, s, block, gates);
    }
}

int64_t lstm_forward(const struct lstm_shape *shape, const struct lstm_inputs *in, float *y, void *memory) {
    int64_t bytes, S = shape->S, B = shape->B, F = shape->F, H = shape->H;
    const int64_t *lengths = in->lengths;
    struct layer l = arrange(memory, shape, &bytes);
    l.y = y;
    if (!rank(&l, lengths)) return -1;
    pack_gates(&l, in->w_ih, in->w_hh, in->b_ih, in->b_hh);
    for (int64_t b = 0; lengths && b < B; b++)
        for (int64_t s = lengths[b]; s < (l.final ? !lengths[b] : S); s++)
            memset(y + s * l.step + b * l.sequence, 0, 4 * H);
    for (int64_t s = 0; s < S && l.counts[s]; s++) {
        for (int64_t n = 0; n < l.counts[s]; n++) {
            struct position at = l.positions[l.offsets[s] + n];
            const float *from = in->x + at.step * in->x_step + (in->rows ? in->rows[at.sequence] : at.sequence) * in->x_sequence;
            float *to = l.inputs + (begin(&l, s) + n) * l.stride + l.start;
            for (int64_t k = 0; k < F; k++) to[k] = from[k];
            to[F] = 1.0f;
            if (!s) memset(to + F + 1, 0, 4 * l.width);
        }
        forward_step(&l, s);
    }
    return 0;
}

/* Gate gradients of the rows of step s that are ranked first .. end, one block of units, from the gradient of their
 * outputs: dy plus, where the sequences run on, dh (rows, LANES, from row to row dh_stride floats). */
static void backward_rows(const struct layer *l, int64_t s, int64_t first, int64_t end, int64_t block, const float *dh,
                          int64_t dh_stride, float *here) {
    int64_t piece_here = piece(l, s, block), unit = block * LANES;
    const float *all_gates = l->gates + piece_here * 4 * LANES, *squashed = l->squashed + piece_here * LANES;
    const float *pasts = s ? l->cells + piece(l, s - 1, block) * LANES : 0;
    for (int64_t n = first; n < end; n++) {
        struct position at = l->positions[l->offsets[s] + n];
        const float *dy = l->dy + at.step * l->step + at.sequence * l->sequence + unit, *gates = all_gates + n * 4 * LANES;
        vec i = load(gates), f = load(gates + LANES), g = load(gates + 2 * LANES), o = load(gates + 3 * LANES);
        vec c = load(squashed + n * LANES), past = {0}, d = {0};
        if (s) past = load(pasts + n * LANES);
        if (dh) d = load(dh + (n - first) * dh_stride);
        if (!l->final || !dh) d += load_some(dy, l->H - unit);
        vec dc = d * o * (1.0f - c * c);
        float *kept = l->dcells + (block * l->B + n) * LANES, *to = here + n * l->dstride + unit;
        if (dh) dc += load(kept);
        store(kept, dc * f);
        store(to, dc * g * i * (1.0f - i));
        store(to + l->width, dc * past * f * (1.0f - f));
        store(to + 2 * l->width, dc * i * (1.0f - g * g));
        store(to + 3 * l->width, d * c * o * (1.0f - o));
    }
}

/* Gate gradients of step s, from those of the step after it. */
static void backward_step(const struct layer *l, int64_t s, const float *after, float *here) {
    int64_t count = l->counts[s], continuing = l->counts[s + 1];
    for (int64_t block = 0; block < l->blocks; block += 4) {
        int64_t vectors = l->blocks - block < 4 ? l->blocks - block : 4;
        multiply(l->dh, vectors * LANES, after, l->dstride, 1, continuing, 4 * l->width,
                 l->recurrent + block * LANES * 4 * l->width, vectors * LANES, vectors, 0);
        for (int64_t v = 0; v < vectors; v++) {
            backward_rows(l, s, 0, continuing, block + v, l->dh + v * LANES, vectors * LANES, here);
            backward_rows(l, s, continuing, count, block + v, 0, 0, here);
        }
    }
}

/* Add what `count` rows from `row` on give to the weights' gradient. */
static void weights_gradient(const struct layer *l, int64_t row, int64_t count, const float *dgates) {
    for (int64_t column = 0; column < 4 * l->width; column += 4 * LANES) /* a whole number of four vectors */
        multiply(l->dweights + column, 4 * l->width, l->inputs + row * l->stride + l->start, 1, l->stride, l->K, count,
                 dgates + column, l->dstride, 4, 1);
}

/* Write or, with `add`, add their gradient to dx. */
static void inputs_gradient(const struct layer *l, int64_t row, int64_t count, const float *dgates,
                            const struct lstm_gradients *g) {
    for (int64_t column = 0; column < l->F; column += 4 * LANES) {
        int64_t many = l->F - column < 4 * LANES ? l->F - column : 4 * LANES, vectors = whole(many) / LANES;
        multiply(l->dx, vectors * LANES, dgates, l->dstride, 1, count, 4 * l->width,
                 l->entering + column * 4 * l->width, vectors * LANES, vectors, 0);
        for (int64_t n = 0; n < count; n++) {
            struct position at = l->positions[row + n];
            float *to = g->dx + at.step * g->dx_step + at.sequence * g->dx_sequence + column;
            const float *from = l->dx + n * vectors * LANES;
            for (int64_t k = 0; k < many; k++) to[k] = g->add ? to[k] + from[k] : from[k];
        }
    }
}

void lstm_backward(const struct lstm_shape *shape, const struct lstm_gradients *g, void *memory) {
    int64_t bytes, S = shape->S, B = shape->B, F = shape->F, H = shape->H, end = S, turn = 0;
    struct layer l = arrange(memory, shape, &bytes);
    const float *after = l.dgates[0];
    l.dy = g->dy;
    pack_backward(&l, g->w_hh, H, l.recurrent);
    if (g->dx) pack_backward(&l, g->w_ih, F, l.entering);
    for (int64_t b = 0; g->dx && !g->add && g->lengths && b < B; b++)
        for (int64_t s = g->lengths[b]; s < S; s++) memset(g->dx + s * g->dx_step + b * g->dx_sequence, 0, 4 * F);
    memset(l.dweights, 0, 4 * l.K * 4 * l.width);
    while (end && !l.counts[end - 1]) end--;
    for (int64_t start; end > 0; end = start, turn = !turn) { /* a chunk: steps start .. end */
        for (start = end - 1; start > 0 && l.offsets[end] - l.offsets[start - 1] <= CHUNK;) start--;
        for (int64_t s = end - 1; s >= start; s--) {
            float *here = l.dgates[turn] + (l.offsets[s] - l.offsets[start]) * l.dstride;
            backward_step(&l, s, after, here);
            after = here;
        }
        int64_t row = l.offsets[start], rows = l.offsets[end] - row;
        weights_gradient(&l, row, rows, l.dgates[turn]);
        if (g->dx) inputs_gradient(&l, row, rows, l.dgates[turn], g);
    }
    unpack_gates(&l, g->dw_ih, g->dw_hh, g->db_ih, g->db_hh);
}
