/* Drawn numbers, and tensors with what the kernels read of ggml's: a program needs no ggml, and draws the same anywhere. */

#pragma once

#include <stdio.h>
#include <stdlib.h>

#include "tensors.h"

#define JOINED_(a, b) a##b
#define JOINED(a, b) JOINED_(a, b)
#define KERNEL(x) JOINED(noodle_##x##_, INSTRUCTIONS) /* -DINSTRUCTIONS=avx2 */

typedef void operation(void *dst, int thread, int threads, void *given);

void noodle_set_tensor_fields(size_t data, size_t sizes, size_t strides, size_t sources);
bool JOINED(noodle_has_, INSTRUCTIONS)(void);

#define MISSING 77 /* exit status if this processor lacks the instructions */

struct tensor {
    void *data;
    int64_t sizes[4];
    size_t strides[4];
    struct tensor *sources[4];
};

/* contiguous */
static struct tensor tensor_of(void *data, size_t item_bytes, int64_t first, int64_t second, int64_t third) {
    const size_t row = item_bytes * (size_t)first;
    return (struct tensor){
        data, {first, second, third, 1}, {item_bytes, row, row * (size_t)second, row * (size_t)(second * third)}, {NULL}};
}

static void *memory_of(size_t bytes) {
    void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!memory) abort();
    return memset(memory, 0, (bytes + 63) / 64 * 64);
}

static uint64_t drawn_state;
static uint32_t drawn(void) { /* splitmix64 */
    uint64_t x = drawn_state += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return (uint32_t)((x ^ x >> 31) >> 32);
}
/* any mantissa and sign, and an exponent of 2^-24 to 2^-1 or so */
static float drawn_float(void) {
    const uint32_t bits = (drawn() & 0x807fffff) | (103 + drawn() % 24) << 23;
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

/* All threads' parts, one thread after the other. */
static void run(operation *compute, struct tensor *dst, int threads, void *given) {
    for (int thread = 0; thread < threads; thread++) compute(dst, thread, threads, given);
}

/* A line with the bits of all numbers. What is not finite is marked only: processors' NaNs differ. */
static void print_bits(const char *name, const float *numbers, int64_t count) {
    printf("%s:", name);
    for (int64_t at = 0; at < count; at++) {
        uint32_t bits;
        memcpy(&bits, numbers + at, sizeof bits);
        if (isfinite(numbers[at]))
            printf(" %08x", bits);
        else
            printf(" -");
    }
    printf("\n");
}

static void start(void) {
    if (!JOINED(noodle_has_, INSTRUCTIONS)()) exit(MISSING);
    noodle_set_tensor_fields(
        offsetof(struct tensor, data), offsetof(struct tensor, sizes), offsetof(struct tensor, strides),
        offsetof(struct tensor, sources));
}
