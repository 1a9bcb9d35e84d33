/* A thread that keeps the core of a stage's worker from sleeping while it waits for its next step.
 *
 * It has the system's lowest priority (SCHED_IDLE): whatever else wants to run on that core runs at once, the worker
 * first of all. It is a thread of C and not of Python, for one of that priority that holds the interpreter's lock would
 * hold up all others. One per process; services/stage/worker/staying_awake.py says when.
 */
#define _GNU_SOURCE
#include <stdbool.h>
#include <stdint.h>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <time.h>

#define LOOKS_BETWEEN 64 /* at the flag, of which each takes some ten nanoseconds, until the clock is read */

#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() __builtin_ia32_pause() /* lets the other thread of the same core have its units */
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

static sem_t asked, begun;
static atomic_bool is_asked, has_priority;
static atomic_int core; /* of whoever asked last */
static _Atomic int64_t until_nanoseconds;

static int64_t now_nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Best effort: elsewhere than on that core it does no harm, and no good. */
static void move_to(int wanted) {
    cpu_set_t cores;
    CPU_ZERO(&cores);
    CPU_SET(wanted, &cores);
    sched_setaffinity(0, sizeof cores, &cores);
}

static void *stay(void *unused) {
    (void)unused;
    const struct sched_param lowest = {0};
    const bool is_set = sched_setscheduler(0, SCHED_IDLE, &lowest) == 0;
    atomic_store(&has_priority, is_set);
    sem_post(&begun);
    int here = -1;
    while (is_set) {
        while (sem_wait(&asked) != 0) {
        }
        const int wanted = atomic_load(&core);
        if (wanted >= 0 && wanted != here) {
            move_to(wanted);
            here = wanted;
        }
        while (atomic_load_explicit(&is_asked, memory_order_relaxed)) {
            for (int look = 0; look < LOOKS_BETWEEN && atomic_load_explicit(&is_asked, memory_order_relaxed); look++) {
                PAUSE();
            }
            if (now_nanoseconds() >= atomic_load(&until_nanoseconds)) {
                break;
            }
        }
        atomic_store(&is_asked, false);
    }
    return NULL;
}

static void start(void) {
    pthread_t thread;
    if (sem_init(&asked, 0, 0) != 0 || sem_init(&begun, 0, 0) != 0 || pthread_create(&thread, NULL, stay, NULL) != 0) {
        return;
    }
    pthread_detach(thread);
    while (sem_wait(&begun) != 0) {
    }
}

/* Start the thread, once in a process; false when the system does not let it have that priority: then it has ended. */
bool noodle_awake_start(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, start);
    return atomic_load(&has_priority);
}

/* Keep the caller's core awake until told otherwise, and no longer than so many nanoseconds. */
void noodle_awake_begin(int64_t nanoseconds) {
    atomic_store(&until_nanoseconds, now_nanoseconds() + nanoseconds);
    atomic_store(&core, sched_getcpu());
    if (!atomic_exchange(&is_asked, true)) {
        sem_post(&asked);
    }
}

/* Let it sleep. */
void noodle_awake_end(void) { atomic_store(&is_asked, false); }
#else
bool noodle_awake_start(void) { return false; }
void noodle_awake_begin(int64_t nanoseconds) { (void)nanoseconds; }
void noodle_awake_end(void) {}
#endif
