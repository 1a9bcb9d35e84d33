/* Parts of an operation, claimed by threads: a slow thread, or one that the system has stopped, takes fewer of them.
 *
 * The `given` of every operation that CustomOperations.add makes begins with a `struct work` of its own.
 *
 *   struct claims claims = claims_of(given, threads);
 *   for (int64_t part; (part = claim_next(&claims, count)) < count;) ...
 *
 * Every thread runs this loop once, to its end: the last one to leave resets the work, so the graph can be computed again.
 * A lone thread touches no shared memory. Which thread computes a part must not change its result.
 */

#pragma once

#include <stdatomic.h>
#include <stdint.h>

struct work {
    _Atomic int64_t next, finished; /* parts claimed, threads that have left; both 0 between computations */
};

/* one thread's view */
struct claims {
    struct work *work;
    int64_t next, end; /* parts that it has claimed */
    int threads;
};

static inline __attribute__((always_inline)) struct claims claims_of(void *given, int threads) {
    return (struct claims){(struct work *)given, 0, threads == 1 ? INT64_MAX : 0, threads};
}

/* The next of parts 0 to count - 1. A result of at least `count` means that this thread has left, and must not ask again.
 *
 * A thread claims many parts at first, which lie side by side in memory, and fewer as fewer are left. */
static inline __attribute__((always_inline)) int64_t claim_next(struct claims *claims, int64_t count) {
    if (claims->next < claims->end) return claims->next++;
    struct work *work = claims->work;
    int64_t next = atomic_load_explicit(&work->next, memory_order_relaxed);
    while (next < count) {
        const int64_t end = next + 1 + (count - next) / (2 * claims->threads);
        if (!atomic_compare_exchange_weak_explicit(&work->next, &next, end, memory_order_relaxed, memory_order_relaxed))
            continue;
        claims->next = next + 1;
        claims->end = end;
        return next;
    }
    if (atomic_fetch_add_explicit(&work->finished, 1, memory_order_acq_rel) == claims->threads - 1) {
        atomic_store_explicit(&work->next, 0, memory_order_relaxed); /* the start of the next computation publishes these */
        atomic_store_explicit(&work->finished, 0, memory_order_relaxed);
    }
    return count;
}
