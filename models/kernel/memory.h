/* Memory that a caller hands over in one piece, taken from it part by part. From a base of 0, only its size is found. */

#ifndef MEMORY_H
#define MEMORY_H

#include <stdint.h>
#include <string.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define SANITIZED 1
#define BETWEEN 64 /* bytes that nothing may touch, after each part */
#else
#define SANITIZED 0
#define BETWEEN 0
#endif

/* The next part, whose start has the alignment of the largest vectors. */
static inline void *take(uintptr_t *memory, int64_t bytes) {
    uintptr_t taken = *memory;
    *memory += (uintptr_t)(bytes + 63) / 64 * 64 + BETWEEN;
#ifdef __SANITIZE_ADDRESS__
    if (taken >= 4096) { /* not while sizes are counted from 0 */
        ASAN_UNPOISON_MEMORY_REGION((void *)taken, bytes);
        ASAN_POISON_MEMORY_REGION((void *)(taken + (uintptr_t)bytes), *memory - taken - (uintptr_t)bytes);
    }
#endif
    return (void *)taken;
}

/* Memory that is laid out anew: with sanitizers all of it becomes NaN, so that what is read before it was written shows. */
static inline void forget(void *memory, int64_t bytes) {
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
    memset(memory, 0xFF, bytes);
#else
    (void)memory, (void)bytes;
#endif
}

#endif
