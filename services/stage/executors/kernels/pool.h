/* What CustomOperations.add writes for each operation of a graph. */

#pragma once

#include "work.h"

struct operation {
    void (*function)(void *dst, int thread, int threads, void *given);
    void *given;      /* what the function receives: an address of the caller's, or that of `work` */
    struct work work; /* followed by the function's own fields */
};
