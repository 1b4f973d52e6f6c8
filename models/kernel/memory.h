/* Memory that a caller hands over in one piece, taken from it part by part. From a base of 0, only its size is found. */

#ifndef MEMORY_H
#define MEMORY_H

#include <stdint.h>

/* The next part, whose start has the alignment of the largest vectors. */
static inline void *take(uintptr_t *memory, int64_t bytes) {
    uintptr_t taken = *memory;
    *memory += (uintptr_t)(bytes + 63) / 64 * 64;
    return (void *)taken;
}

#endif
