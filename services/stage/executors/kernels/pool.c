/* One pool of threads for the operations of all graphs of this process.
 *
 * ggml's threads meet after every operation of a graph: each waits for the slowest, also for one that has done nothing yet
 * because another program has its core. Here the thread that computes the graph, the owner, computes each operation for a
 * number of threads, and helpers take these threads' shares from it. It computes itself what no helper has taken, and waits
 * only for helpers that are in the middle of a share. Operations that claim their parts (work.h) are then done as soon as any
 * thread is through, and the shares of threads that come later are empty.
 *
 * Helpers spin briefly between operations and then sleep, as does an owner that waits for a helper.
 *
 * A helper that another program interrupts in the middle of a share keeps the owner waiting until it has a core again. Then the
 * owner computes alone for some time, so that beside busy programs little is lost to one thread alone. */

#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <time.h>

#include "pool.h"

#define MOST_THREADS 256
#define HELPER_SPIN_NANOSECONDS 200000 /* between two operations of a graph or, with luck, between two graphs */
#define OWNER_SPIN_NANOSECONDS 20000   /* then another program may have the helper's core, and this one is free for it */
#define HELPER_STACK_BYTES (4 << 20)
#define INTERRUPTION_NANOSECONDS 2000000 /* shorter ones are the system's own; another program has a core for longer */
/* times the interruption: how long the owner is alone, at first and at most; it doubles while interruptions go on */
#define LEAST_ALONE 4
#define MOST_ALONE 64

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define RELAX() __asm__ volatile("yield" ::: "memory")
#else
#define RELAX()
#endif

static struct {
    pthread_mutex_t mutex;
    pthread_cond_t called, finished_all;
    atomic_bool is_taken; /* by an owner */
    int helpers;
    /* the current operation: its number << 32 | threads << 16 | the next thread whose share is to be taken */
    _Alignas(64) _Atomic uint64_t ticket;
    _Alignas(64) atomic_int finished; /* shares that helpers have computed */
    atomic_int sleeping;
    atomic_bool owner_sleeps;
    _Atomic int64_t alone_until, times_alone;
    uint64_t calls; /* under the mutex: helpers are called for each graph */
    const struct operation *operation;
    void *dst;
} pool = {.mutex = PTHREAD_MUTEX_INITIALIZER, .called = PTHREAD_COND_INITIALIZER, .finished_all = PTHREAD_COND_INITIALIZER};

static _Thread_local int own_threads = 1; /* of the graph that this thread computes */

static int threads_of(uint64_t ticket) { return ticket >> 16 & 0xffff; }
static int next_of(uint64_t ticket) { return ticket & 0xffff; }

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Whether helper `number` (from 1) is to help: a graph may have fewer threads than the pool. */
static bool has_work(uint64_t ticket, int number) { return next_of(ticket) < threads_of(ticket) && number < threads_of(ticket); }

static uint64_t wait_for_work(int number) {
    for (;;) {
        const int64_t begin = nanoseconds();
        do {
            for (int round = 0; round < 32; round++) {
                const uint64_t ticket = atomic_load(&pool.ticket);
                if (has_work(ticket, number)) return ticket;
                RELAX();
            }
        } while (nanoseconds() - begin < HELPER_SPIN_NANOSECONDS);
        pthread_mutex_lock(&pool.mutex);
        const uint64_t calls = pool.calls;
        atomic_fetch_add(&pool.sleeping, 1); /* before the ticket is read: an owner writes it before it reads this */
        while (pool.calls == calls && !has_work(atomic_load(&pool.ticket), number))
            pthread_cond_wait(&pool.called, &pool.mutex);
        atomic_fetch_sub(&pool.sleeping, 1);
        pthread_mutex_unlock(&pool.mutex);
    }
}

/* What this thread has computed. */
static int64_t computed_nanoseconds(void) {
    struct timespec used;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
    return used.tv_sec * 1000000000LL + used.tv_nsec;
}

static void leave_owner_alone(int64_t interruption, int64_t now) {
    const int64_t times = pool.times_alone;
    const bool goes_on = now - interruption - pool.alone_until < MOST_ALONE / 4 * interruption;
    pool.times_alone = !goes_on ? LEAST_ALONE : 2 * times < MOST_ALONE ? 2 * times : MOST_ALONE;
    pool.alone_until = now + pool.times_alone * interruption;
}

static void *help(void *number) {
    for (;;) {
        uint64_t ticket = wait_for_work((int)(intptr_t)number);
        if (!atomic_compare_exchange_strong(&pool.ticket, &ticket, ticket + 1)) continue;
        /* the owner waits for this share, so the operation stays until it is counted as finished */
        const int64_t begin = nanoseconds(), computed = computed_nanoseconds();
        pool.operation->function(pool.dst, next_of(ticket), threads_of(ticket), pool.operation->given);
        const int64_t now = nanoseconds();
        if (now - begin > INTERRUPTION_NANOSECONDS) { /* a long share is not one that was interrupted for long */
            const int64_t interruption = now - begin - (computed_nanoseconds() - computed);
            if (interruption > INTERRUPTION_NANOSECONDS) leave_owner_alone(interruption, now);
        }
        atomic_fetch_add(&pool.finished, 1);
        if (atomic_load(&pool.owner_sleeps)) {
            pthread_mutex_lock(&pool.mutex);
            pthread_cond_signal(&pool.finished_all);
            pthread_mutex_unlock(&pool.mutex);
        }
    }
    return NULL;
}

static void call_helpers(void) {
    if (!atomic_load(&pool.sleeping)) return;
    pthread_mutex_lock(&pool.mutex);
    pool.calls++;
    pthread_cond_broadcast(&pool.called);
    pthread_mutex_unlock(&pool.mutex);
}

static void forget_helpers(void) { /* in a forked process, which has none */
    pthread_mutex_init(&pool.mutex, NULL);
    pthread_cond_init(&pool.called, NULL);
    pthread_cond_init(&pool.finished_all, NULL);
    pool.helpers = 0;
    pool.is_taken = false;
    pool.sleeping = 0;
    pool.owner_sleeps = false;
}

/* Start the helpers that a graph with `threads` threads lacks; signals stay with the threads that the program made. */
static void start_helpers(int threads) {
    static bool watches_forks;
    if (!watches_forks) watches_forks = !pthread_atfork(NULL, NULL, forget_helpers);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, HELPER_STACK_BYTES);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_t thread;
    while (pool.helpers < threads - 1 && !pthread_create(&thread, &attributes, help, (void *)(intptr_t)(pool.helpers + 1)))
        pool.helpers++; /* where the system gives no more threads, the owner takes their shares */
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void wait_for_helpers(int count) {
    const int64_t begin = nanoseconds();
    do {
        for (int round = 0; round < 32; round++) {
            if (atomic_load(&pool.finished) == count) return;
            RELAX();
        }
    } while (nanoseconds() - begin < OWNER_SPIN_NANOSECONDS);
    pthread_mutex_lock(&pool.mutex);
    atomic_store(&pool.owner_sleeps, true); /* before `finished` is read: helpers write it before they read this */
    while (atomic_load(&pool.finished) != count) pthread_cond_wait(&pool.finished_all, &pool.mutex);
    atomic_store(&pool.owner_sleeps, false);
    pthread_mutex_unlock(&pool.mutex);
}

static void share(const struct operation *operation, void *dst, int threads) {
    pool.operation = operation;
    pool.dst = dst;
    atomic_store(&pool.finished, 0);
    uint64_t ticket = (atomic_load(&pool.ticket) >> 32) + 1;
    atomic_store(&pool.ticket, ticket << 32 | (uint64_t)threads << 16 | 1);
    call_helpers();
    operation->function(dst, 0, threads, operation->given);
    int helped = threads - 1;
    ticket = atomic_load(&pool.ticket);
    while (next_of(ticket) < threads) {
        if (!atomic_compare_exchange_weak(&pool.ticket, &ticket, ticket + 1)) continue;
        operation->function(dst, next_of(ticket), threads, operation->given);
        ticket++;
        helped--;
    }
    if (helped) wait_for_helpers(helped);
}

/* an operation of a graph, as ggml calls it; `threads` are ggml's own */
void noodle_compute_operation(void *dst, int thread, int threads, void *given) {
    const struct operation *operation = given;
    if (threads == 1 && own_threads > 1 && nanoseconds() >= pool.alone_until)
        share(operation, dst, own_threads);
    else
        operation->function(dst, thread, threads, operation->given);
}

/* Compute a graph by ggml's `compute` on a backend with one thread, and its operations by `threads` threads of the pool. If
 * another thread's graph has the pool, this one is computed by the calling thread alone. */
int noodle_compute_graph(int (*compute)(void *, void *), void *backend, void *graph, int threads) {
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    const bool is_owner = threads > 1 && !atomic_exchange(&pool.is_taken, true);
    if (is_owner) {
        if (pool.helpers < threads - 1) start_helpers(threads);
        if (nanoseconds() >= pool.alone_until) call_helpers();
        own_threads = threads;
    }
    const int status = compute(backend, graph);
    own_threads = 1;
    if (is_owner) atomic_store(&pool.is_taken, false);
    return status;
}
