/* One direction of one LSTM layer on one CPU thread, forward and backward, in float32.
 *
 * Letters: S steps, B sequences, F inputs, H hidden units, K = F + 1 + H. Gates stand in torch's order: i, f, g, o.
 *
 * Sequences are ranked by falling length, so those still running at step s are the first counts[s] of them. One step
 * of one sequence is a *row*; the rows of step 0 come first, then those of step 1; padding has none. The inputs of a
 * row are [x_t | 1 | h_{t-1}], so that input projection, bias and recurrence are one product with packed weights.
 *
 * Units go through the vector's lanes in blocks of LANES, rows through the registers in tiles. A tile of the forward
 * product ends with the four gates of a block of units, and the non-linearities follow while they are in cache.
 * Each row's arithmetic is the same in every tile, so a sequence's bits do not depend on the batch that it is in.
 *
 * The entry points, at the end, take the three structs that follow, which native.py mirrors: every field has 8 bytes.
 */

#include <stdint.h>
#include <string.h>

struct lstm_shape { /* the layer, and where its outputs y and their gradients dy lie */
    int64_t S, B, F, H;
    int64_t reverse;  /* 1: each sequence runs backwards within its own length */
    int64_t training; /* 1: the memory keeps what lstm_backward needs */
    int64_t final;    /* 1: y has only the output that each sequence ends with */
    int64_t step;     /* floats from one step of y to the next */
    int64_t sequence; /* floats from one sequence of y to the next */
};

struct lstm_inputs {
    const float *x;                            /* (S, B, F) */
    const int64_t *lengths;                    /* (B), or NULL: all are S */
    const float *w_ih, *w_hh, *b_ih, *b_hh;    /* (4 H, F), (4 H, H), (4 H), (4 H) */
};

struct lstm_gradients {
    const float *dy, *w_ih, *w_hh;
    float *dx;                                 /* (S, B, F) or NULL: written, or with `add` added to */
    int64_t add;
    float *dw_ih, *dw_hh, *db_ih, *db_hh;      /* written */
};

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
#define TILE 6 /* rows: 6 times 4 sums, 4 weights and what multiplies them fill 32 registers */
#else
#define TILE 3 /* 16 registers */
#endif
#define CHUNK 128 /* rows whose gate gradients wait in cache until they go into the weights' gradient together */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float unaligned_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* a vec, unaligned */

INLINE vec load(const float *from) { return *(const unaligned_vec *)from; }
INLINE void store(float *to, vec value) { *(unaligned_vec *)to = value; }
INLINE vec broadcast(float value) { return value - (vec){0}; }

/* The first `lanes` of a vector's lanes, which may be more than there are; the others are zero. */
INLINE vec load_some(const float *from, int64_t lanes) {
    if (lanes >= LANES) return load(from);
    vec value = {0};
    memcpy(&value, from, 4 * lanes);
    return value;
}
INLINE void store_some(float *to, vec value, int64_t lanes) {
    if (lanes >= LANES) store(to, value);
    else memcpy(to, &value, 4 * lanes);
}

static const int32_t edge[32] = {[0 ... 15] = -1}; /* from `edge + 16 - n` on, a mask of the first n lanes */
INLINE vec vec_select(ivec mask, vec a, vec b) { return (vec)(((ivec)a & mask) | ((ivec)b & ~mask)); }

/* exp(x) as scale + scale * p: with x = n ln 2 + r and |r| <= ln 2 / 2, scale is 2^n and p is exp(r) - 1 by its
 * series up to r^7. Kept apart, exp(x) - 1 loses nothing where x is near 0. */
INLINE void split_exp(vec x, vec *scale, vec *p) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: a number added to it is rounded and stands in the low bits */
    x = vec_select((ivec)(x > 88.0f), broadcast(88.0f), x); /* what is greater would overflow; NaN stays NaN */
    x = vec_select((ivec)(x < -87.0f), broadcast(-87.0f), x);
    vec shifted = x * 1.44269504f + shift, n = shifted - shift;
    vec r = x - n * 0.693145752f - n * 1.42860677e-6f, square = r * r;
    vec low = 0.5f + r * (1.0f / 6), middle = 1.0f / 24 + r * (1.0f / 120), high = 1.0f / 720 + r * (1.0f / 5040);
    *p = r + square * (low + square * (middle + square * high));
    *scale = (vec)(((ivec)shifted << 23) + (127 << 23));
}

/* 1 / (1 + exp(-x)), to 2.4 units in the last place. */
INLINE vec vec_sigmoid(vec x) {
    vec scale, p;
    split_exp(-x, &scale, &p);
    return 1.0f / (scale * p + (scale + 1.0f));
}

/* (exp(2x) - 1) / (exp(2x) + 1), to 2.9 units in the last place. */
INLINE vec vec_tanh(vec x) {
    vec scale, p;
    split_exp(2.0f * x, &scale, &p);
    return (scale * p + (scale - 1.0f)) / (scale * p + (scale + 1.0f));
}

/* sums (rows, vectors) = a (rows, depth) times w (depth, vectors); strides in floats. `rows` and `vectors` are
 * constants where this is inlined, so that the sums stay in registers. */
INLINE void multiply(const int rows, const int vectors, vec sums[TILE][4], const float *a, int64_t row_stride,
                     int64_t depth_stride, const float *w, int64_t w_stride, int64_t depth) {
    vec held[TILE][4] = {0};
    for (int64_t k = 0; k < depth; k++, a += depth_stride, w += w_stride) {
        vec left[TILE];
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) left[r] = broadcast(a[r * row_stride]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            vec right = load(w + v * LANES);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) held[r][v] += left[r] * right;
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[r][v] = held[r][v];
}

#define CASE(rows, vectors) \
    case 8 * rows + vectors: multiply(rows, vectors, sums, a, row_stride, depth_stride, w, w_stride, depth); break;
#define CASES(rows) CASE(rows, 1) CASE(rows, 2) CASE(rows, 3) CASE(rows, 4)

static void product(int64_t rows, int64_t vectors, vec sums[TILE][4], const float *a, int64_t row_stride,
                    int64_t depth_stride, const float *w, int64_t w_stride, int64_t depth) {
    switch (8 * rows + vectors) {
        CASES(1) CASES(2) CASES(3)
#if TILE > 3
        CASES(4) CASES(5) CASES(6)
#endif
    }
}

/* Rows of the next tile of those left: as even as can be. */
static int64_t tile(int64_t left) {
    int64_t tiles = (left + TILE - 1) / TILE;
    return (left + tiles - 1) / tiles;
}

static int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

struct position { int32_t step, sequence; };

struct layer {
    int64_t S, B, F, H, K, reverse, training;
    int64_t blocks, width;             /* of units: whole blocks, and their lanes */
    int64_t start, stride;             /* of `inputs`: where x begins in a row (so that h is aligned), row to row */
    int64_t dstride;                   /* of `dgates`: row to row, no power of two (cache sets) */
    int64_t *order, *counts, *offsets; /* rank to sequence (B); rows of each step and before it (S + 1) */
    struct position *positions;        /* of each row in x, y and their gradients */
    float *weights, *dweights;         /* (blocks, K, 4, LANES) */
    float *inputs, *gates, *cells;     /* (rows, stride), (rows, blocks, 4, LANES), (rows, width) */
    float *recurrent, *entering;       /* w_hh and w_ih for the backward product: see pack_backward */
    float *dgates[2], *dcells;         /* (rows of a chunk, blocks, 4, LANES), this chunk and the last; (B, width) */
    float *y;                          /* outputs (S, B, H), from step to step and from sequence to sequence: */
    const float *dy;                   /* their gradient, too */
    int64_t step, sequence, final;     /* final: a sequence has one output, that of the step it ends with; step is 0 */
};

static void *take(uintptr_t *memory, int64_t bytes) {
    uintptr_t taken = *memory;
    *memory += (bytes + 63) / 64 * 64;
    return (void *)taken;
}

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
        l.recurrent = take(&memory, 4 * 4 * l.width * l.width);
        l.entering = take(&memory, 4 * 4 * l.width * whole(F));
        l.dgates[0] = take(&memory, 4 * chunk * l.dstride), l.dgates[1] = take(&memory, 4 * chunk * l.dstride);
        l.dcells = take(&memory, 4 * B * l.width);
        l.dweights = take(&memory, 4 * l.K * 4 * l.width);
    }
    *bytes = (int64_t)(memory - (uintptr_t)arena);
    return l;
}

/* The bytes that the memory of such a layer takes. */
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

static void pack(const struct layer *l, const float *w_ih, const float *w_hh, const float *b_ih, const float *b_hh) {
    if (l->H < l->width) memset(l->weights, 0, 4 * l->K * 4 * l->width);
    for (int64_t j = 0; j < 4 * l->H; j++) {
        float *to = packed(l, l->weights, j / l->H, j % l->H);
        for (int64_t k = 0; k < l->F; k++, to += 4 * LANES) *to = w_ih[j * l->F + k];
        *to = b_ih[j] + b_hh[j], to += 4 * LANES;
        for (int64_t k = 0; k < l->H; k++, to += 4 * LANES) *to = w_hh[j * l->H + k];
    }
}

static void unpack(const struct layer *l, float *dw_ih, float *dw_hh, float *db_ih, float *db_hh) {
    for (int64_t j = 0; j < 4 * l->H; j++) {
        const float *from = packed(l, l->dweights, j / l->H, j % l->H);
        for (int64_t k = 0; k < l->F; k++, from += 4 * LANES) dw_ih[j * l->F + k] = *from;
        db_ih[j] = db_hh[j] = *from, from += 4 * LANES;
        for (int64_t k = 0; k < l->H; k++, from += 4 * LANES) dw_hh[j * l->H + k] = *from;
    }
}

/* w (4 H, columns) to (groups, 4 width, vectors, LANES): groups of up to four vectors of columns, and the depth of
 * the product in the order of `dgates`. */
static void pack_backward(const struct layer *l, const float *w, int64_t columns, float *to) {
    memset(to, 0, 4 * 4 * l->width * whole(columns));
    for (int64_t from = 0; from < columns; from += 4 * LANES) {
        int64_t many = columns - from < 4 * LANES ? columns - from : 4 * LANES;
        for (int64_t unit = 0; unit < l->H; unit++)
            for (int64_t gate = 0; gate < 4; gate++) {
                int64_t depth = unit / LANES * 4 * LANES + gate * LANES + unit % LANES;
                memcpy(to + depth * whole(many), w + (gate * l->H + unit) * columns + from, 4 * many);
            }
        to += 4 * l->width * whole(many);
    }
}

/* Where the rows of step s begin. */
static int64_t begin(const struct layer *l, int64_t s) { return l->training ? l->offsets[s] : s % 2 * l->B; }

/* Step s of the sequences ranked first .. first + rows, one block of units. */
static void forward_tile(const struct layer l, int64_t rows, int64_t s, int64_t first, int64_t block) {
    vec z[TILE][4];
    int64_t here = begin(&l, s) + first, next = begin(&l, s + 1) + first, lanes = l.H - block * LANES;
    product(rows, 4, z, l.inputs + here * l.stride + l.start, l.stride, 1, l.weights + block * l.K * 4 * LANES,
            4 * LANES, l.K);
    /* Units that there are not stay 0, where an infinite input times their weight of 0 would be NaN. */
    ivec units = (ivec)load((const float *)(edge + 16 - (lanes < LANES ? lanes : LANES)));
    for (int64_t v = 0; lanes < LANES && v < 4 * rows; v++) z[v / 4][v % 4] = (vec)((ivec)z[v / 4][v % 4] & units);
    const float *past = s ? l.cells + (begin(&l, s - 1) + first) * l.width + block * LANES : 0;
    float *cells = l.cells + here * l.width + block * LANES;
    /* Two loops: more rows are under way at once than if the processor had to see past both chains of a row. */
    for (int64_t r = 0; r < rows; r++) {
        vec i = vec_sigmoid(z[r][0]), f = vec_sigmoid(z[r][1]), g = vec_tanh(z[r][2]), o = vec_sigmoid(z[r][3]);
        vec before = {0};
        if (s) before = load(past + r * l.width);
        vec c = f * before + i * g;
        store(cells + r * l.width, c);
        z[r][0] = i, z[r][1] = f, z[r][2] = g, z[r][3] = o;
    }
    for (int64_t r = 0; r < rows; r++) {
        vec h = z[r][3] * vec_tanh(load(cells + r * l.width));
        for (int64_t v = 0; l.training && v < 4; v++)
            store(l.gates + (((here + r) * l.blocks + block) * 4 + v) * LANES, z[r][v]);
        if (first + r < l.counts[s + 1])
            store(l.inputs + (next + r) * l.stride + l.start + l.F + 1 + block * LANES, h);
        if (l.final && first + r < l.counts[s + 1]) continue;
        struct position at = l.positions[l.offsets[s] + first + r];
        store_some(l.y + at.step * l.step + at.sequence * l.sequence + block * LANES, h, lanes);
    }
}

/* x (S, B, F) to y. Beyond a length y is zero. With `final` y has one step: the last one that each sequence runs
 * through. With `training` `memory` keeps what lstm_backward needs. -1: a length is not in 0..S. */
int64_t lstm_forward(const struct lstm_shape *shape, const struct lstm_inputs *in, float *y, void *memory) {
    int64_t bytes, S = shape->S, B = shape->B, F = shape->F, H = shape->H;
    const int64_t *lengths = in->lengths;
    struct layer l = arrange(memory, shape, &bytes);
    l.y = y;
    if (!rank(&l, lengths)) return -1;
    pack(&l, in->w_ih, in->w_hh, in->b_ih, in->b_hh);
    for (int64_t b = 0; lengths && b < B; b++)
        for (int64_t s = lengths[b]; s < (l.final ? !lengths[b] : S); s++)
            memset(y + s * l.step + b * l.sequence, 0, 4 * H);
    for (int64_t s = 0; s < S && l.counts[s]; s++) {
        for (int64_t n = 0; n < l.counts[s]; n++) {
            struct position at = l.positions[l.offsets[s] + n];
            const float *from = in->x + (at.step * B + at.sequence) * F;
            float *to = l.inputs + (begin(&l, s) + n) * l.stride + l.start;
            for (int64_t k = 0; k < F; k++) to[k] = from[k];
            to[F] = 1.0f;
            if (!s) memset(to + F + 1, 0, 4 * l.width);
        }
        for (int64_t block = 0; block < l.blocks; block++)
            for (int64_t first = 0, rows; first < l.counts[s]; first += rows) {
                rows = tile(l.counts[s] - first);
                forward_tile(l, rows, s, first, block);
            }
    }
    return 0;
}

/* Gate gradients of rows of step s, units of `vectors` blocks from `block` on: dh is dy plus, where the sequence runs
 * on (`depth` is not 0), the gate gradients of its next step times w_hh. */
static void backward_tile(const struct layer l, int64_t rows, int64_t vectors, int64_t s, int64_t first,
                          int64_t block, int64_t depth, const float *after, float *here) {
    vec dh[TILE][4];
    for (int64_t r = 0; r < rows; r++) { /* fetch what follows the product from memory meanwhile */
        int64_t row = l.offsets[s] + first + r, unit = block * LANES;
        const float *gates = l.gates + row * 4 * l.width + 4 * unit;
        const float *past = l.cells + (row - (s ? l.counts[s - 1] : 0)) * l.width + unit;
        for (int64_t at = 0; at < 4 * vectors * LANES; at += 16) __builtin_prefetch(gates + at);
        for (int64_t at = 0; at < vectors * LANES; at += 16) __builtin_prefetch(past + at);
    }
    product(rows, vectors, dh, after + first * l.dstride, l.dstride, 1, l.recurrent + block * LANES * 4 * l.width,
            vectors * LANES, depth);
    for (int64_t r = 0; r < rows; r++) {
        int64_t row = l.offsets[s] + first + r;
        struct position at = l.positions[row];
        const float *dy = l.dy + at.step * l.step + at.sequence * l.sequence;
        for (int64_t v = 0, unit = block * LANES; v < vectors; v++, unit += LANES) {
            const float *gates = l.gates + row * 4 * l.width + 4 * unit;
            vec i = load(gates), f = load(gates + LANES), g = load(gates + 2 * LANES), o = load(gates + 3 * LANES);
            vec c = vec_tanh(load(l.cells + row * l.width + unit)), past = {0};
            if (s) past = load(l.cells + (row - l.counts[s - 1]) * l.width + unit);
            vec d = dh[r][v];
            if (!l.final || !depth) d += load_some(dy + unit, l.H - unit);
            vec dc = d * o * (1.0f - c * c);
            float *kept = l.dcells + (first + r) * l.width + unit, *to = here + (first + r) * l.dstride + 4 * unit;
            if (depth) dc += load(kept);
            store(kept, dc * f);
            store(to, dc * g * i * (1.0f - i));
            store(to + LANES, dc * past * f * (1.0f - f));
            store(to + 2 * LANES, dc * i * (1.0f - g * g));
            store(to + 3 * LANES, d * c * o * (1.0f - o));
        }
    }
}

/* Add what `count` rows from `row` on give to the weights' gradient. */
static void weights_gradient(const struct layer *l, int64_t row, int64_t count, const float *dgates) {
    for (int64_t block = 0; block < l->blocks; block++)
        for (int64_t k = 0, rows; k < l->K; k += rows) {
            vec sums[TILE][4];
            rows = tile(l->K - k);
            product(rows, 4, sums, l->inputs + row * l->stride + l->start + k, 1, l->stride,
                    dgates + block * 4 * LANES, l->dstride, count);
            float *to = l->dweights + (block * l->K + k) * 4 * LANES;
            for (int64_t v = 0; v < 4 * rows; v++, to += LANES) store(to, load(to) + sums[v / 4][v % 4]);
        }
}

/* Write or, with `add`, add their gradient to dx (S, B, F). */
static void inputs_gradient(const struct layer *l, int64_t row, int64_t count, const float *dgates, float *dx,
                            int64_t add) {
    for (int64_t column = 0; column < l->F; column += 4 * LANES) {
        int64_t many = l->F - column < 4 * LANES ? l->F - column : 4 * LANES, vectors = whole(many) / LANES;
        for (int64_t first = 0, rows; first < count; first += rows) {
            vec sums[TILE][4];
            rows = tile(count - first);
            product(rows, vectors, sums, dgates + first * l->dstride, l->dstride, 1,
                    l->entering + column * 4 * l->width, vectors * LANES, 4 * l->width);
            for (int64_t r = 0; r < rows; r++) {
                struct position at = l->positions[row + first + r];
                float *to = dx + (at.step * l->B + at.sequence) * l->F + column;
                for (int64_t v = 0; v < vectors; v++) {
                    int64_t lanes = many - v * LANES;
                    vec sum = add ? sums[r][v] + load_some(to + v * LANES, lanes) : sums[r][v];
                    store_some(to + v * LANES, sum, lanes);
                }
            }
        }
    }
}

/* Gradients after lstm_forward with the same shape and memory, from dy. dx, if not NULL, is written, or with `add`
 * added to. */
void lstm_backward(const struct lstm_shape *shape, const struct lstm_gradients *g, void *memory) {
    int64_t bytes, S = shape->S, B = shape->B, F = shape->F, H = shape->H, end = S, turn = 0;
    struct layer l = arrange(memory, shape, &bytes);
    const float *after = l.dgates[0];
    float *dx = g->dx;
    l.dy = g->dy;
    pack_backward(&l, g->w_hh, H, l.recurrent);
    if (dx) pack_backward(&l, g->w_ih, F, l.entering);
    if (dx && !g->add) memset(dx, 0, 4 * S * B * F);
    memset(l.dweights, 0, 4 * l.K * 4 * l.width);
    while (end && !l.counts[end - 1]) end--;
    for (int64_t start; end > 0; end = start, turn = !turn) { /* a chunk: steps start .. end */
        for (start = end - 1; start > 0 && l.offsets[end] - l.offsets[start - 1] <= CHUNK;) start--;
        for (int64_t s = end - 1; s >= start; s--) {
            float *here = l.dgates[turn] + (l.offsets[s] - l.offsets[start]) * l.dstride;
            int64_t count = l.counts[s], continuing = l.counts[s + 1];
            for (int64_t block = 0; block < l.blocks; block += 4)
                for (int64_t first = 0, rows; first < count; first += rows) {
                    int64_t ends = first >= continuing, vectors = l.blocks - block < 4 ? l.blocks - block : 4;
                    rows = tile((ends ? count : continuing) - first);
                    backward_tile(l, rows, vectors, s, first, block, ends ? 0 : 4 * l.width, after, here);
                }
            after = here;
        }
        int64_t row = l.offsets[start], rows = l.offsets[end] - row;
        weights_gradient(&l, row, rows, l.dgates[turn]);
        if (dx) inputs_gradient(&l, row, rows, l.dgates[turn], dx, g->add);
    }
    unpack(&l, g->dw_ih, g->dw_hh, g->db_ih, g->db_hh);
}
