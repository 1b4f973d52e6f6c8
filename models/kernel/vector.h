/* Vectors of float32, and the functions of gates.
 *
 * LANES numbers a vector, the widest that the processor has where the build does not say; TILE rows of a product whose
 * sums stay in registers. Sums have an order that depends on neither: all widths give the same bits.
 */

#ifndef VECTOR_H
#define VECTOR_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(LANES)
#elif defined(__AVX512F__)
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
INLINE vec only(vec mask, vec value) { return (vec)((ivec)value & (ivec)mask); }
INLINE vec vec_select(ivec mask, vec a, vec b) { return (vec)(((ivec)a & mask) | ((ivec)b & ~mask)); }

/* The smaller and the greater of a bound and x; NaN stays NaN. */
#if LANES == 16 && defined(__AVX512F__)
INLINE vec at_most(float bound, vec x) { return (vec)_mm512_min_ps((__m512)broadcast(bound), (__m512)x); }
INLINE vec at_least(float bound, vec x) { return (vec)_mm512_max_ps((__m512)broadcast(bound), (__m512)x); }
#elif LANES == 8 && defined(__AVX__)
INLINE vec at_most(float bound, vec x) { return (vec)_mm256_min_ps((__m256)broadcast(bound), (__m256)x); }
INLINE vec at_least(float bound, vec x) { return (vec)_mm256_max_ps((__m256)broadcast(bound), (__m256)x); }
#else
INLINE vec at_most(float bound, vec x) { return vec_select((ivec)(x > bound), broadcast(bound), x); }
INLINE vec at_least(float bound, vec x) { return vec_select((ivec)(x < bound), broadcast(bound), x); }
#endif

/* exp(x) as scale + scale * p: with x = n ln 2 + r and |r| <= ln 2 / 2, scale is 2^n and p is exp(r) - 1 by its
 * series up to r^7. Kept apart, exp(x) - 1 loses nothing where x is near 0. */
INLINE void split_exp(vec x, vec *scale, vec *p) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: a number added to it is rounded and stands in the low bits */
    x = at_least(-87.0f, at_most(88.0f, x)); /* what is greater would overflow */
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

/* n rounded up to whole vectors. */
INLINE int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

#endif
