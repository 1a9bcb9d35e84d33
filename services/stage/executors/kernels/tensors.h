/* ggml's tensors as the kernels see them, and what all kernels share. */

#pragma once

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 32
#define BLOCK_BYTES 34 /* of one row in Q8_0 */
#define INLINED static inline __attribute__((always_inline))

/* offsets of ggml_tensor's fields, set once by the caller that knows this ggml's struct */
struct tensor_fields {
    size_t data, sizes, strides, sources;
};
extern struct tensor_fields noodle_tensor_fields __attribute__((visibility("hidden")));

INLINED char *data_of(const void *tensor) { return *(char **)((const char *)tensor + noodle_tensor_fields.data); }
INLINED int64_t size_of(const void *tensor, int axis) {
    return ((const int64_t *)((const char *)tensor + noodle_tensor_fields.sizes))[axis];
}
INLINED size_t stride_of(const void *tensor, int axis) {
    return ((const size_t *)((const char *)tensor + noodle_tensor_fields.strides))[axis];
}
INLINED const void *source_of(const void *tensor, int number) {
    return ((void *const *)((const char *)tensor + noodle_tensor_fields.sources))[number];
}

#if defined(__x86_64__)
#include <immintrin.h>

#define WITH_F16C __attribute__((target("f16c")))

WITH_F16C INLINED float half_to_float(const char *at) {
    unsigned short number;
    memcpy(&number, at, 2);
    return _cvtsh_ss(number);
}
WITH_F16C INLINED unsigned short float_to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__aarch64__)
INLINED float half_to_float(const char *at) {
    __fp16 number;
    memcpy(&number, at, 2);
    return number;
}
INLINED unsigned short float_to_half(float x) {
    const __fp16 half = (__fp16)x;
    unsigned short number;
    memcpy(&number, &half, 2);
    return number;
}
#endif
