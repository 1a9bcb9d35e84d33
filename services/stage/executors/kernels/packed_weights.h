/* GEMM with packed weights in float32, for custom operations of ggml graphs (GGML_OP_CUSTOM).
 *
 * ggml multiplies a weight row by row and spends much of its time shuffling loaded values. Here 16 weight rows are interleaved,
 * so one instruction processes one element (or four 8-bit elements) of each row, and elements of the other operand are
 * broadcast by their load. Packing keeps the byte count and the order in which memory is read: with Q8_0 scales stored behind
 * the values, hardware prefetching failed and a product with a single row took twice as long.
 *
 *   group: 16 rows of K elements
 *     float32, float16: [K][16] elements
 *     bfloat16 (K even): [K / 2][16] pairs of elements
 *     Q8_0 (K a multiple of 32): K / 32 blocks of 16 float16 scales, one per row, followed by [8][16][4] bytes: byte j of
 *       [g][r] is element 4 * g + j of the block in row r, plus 128
 *   tile: as many activation rows as a kernel processes at once, or one less, so that all tiles are about equally large
 *     float32: [K][rows] elements
 *     other types: documented with the kernels that use them
 *
 * As in ggml, activations are rounded to 8 bits with one scale per 32 elements for Q8_0 weights (products are summed in int32
 * within a block and in float32 across blocks), and to bfloat16 for bfloat16 weights. Everything else is float32.
 */

#pragma once

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 32
#define GROUP_ROWS 16
#define BLOCK_BYTES 34  /* of one row in Q8_0 */
#define SCALES_BYTES 32 /* in a block of a group */
#define GROUP_BLOCK_BYTES (GROUP_ROWS * BLOCK_BYTES)
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
#endif

/* How rows are cut into tiles: the first `larger` tiles have `rows` + 1 rows, the others `rows`. */
struct cut {
    int64_t tiles, rows, larger;
};
INLINED struct cut cut_of(int64_t count, int64_t most_rows) {
    const int64_t tiles = (count + most_rows - 1) / most_rows;
    return (struct cut){tiles, tiles ? count / tiles : 0, tiles ? count % tiles : 0};
}
INLINED int64_t begin_of_tile(struct cut cut, int64_t tile) {
    return tile * cut.rows + (tile < cut.larger ? tile : cut.larger);
}
INLINED int64_t rows_of_tile(struct cut cut, int64_t tile) { return cut.rows + (tile < cut.larger); }

/* dst: float32 tiles; source 0: rows of K float32 */
INLINED void arrange(void *dst, int thread, int threads, const int64_t most_rows) {
    const void *rows = source_of(dst, 0);
    const int64_t length = size_of(rows, 0);
    const struct cut cut = cut_of(size_of(rows, 1), most_rows);
    for (int64_t tile = thread; tile < cut.tiles; tile += threads) {
        const int64_t begin = begin_of_tile(cut, tile), width = rows_of_tile(cut, tile);
        float *to = (float *)data_of(dst) + begin * length;
        for (int64_t row = 0; row < width; row++) {
            const float *from = (const float *)(data_of(rows) + (begin + row) * stride_of(rows, 1));
            for (int64_t number = 0; number < length; number++) to[number * width + row] = from[number];
        }
    }
}

/* `multiply` writes the product of a `group` and a tile of `rows` rows. PASS_TILES tiles stay in the L2 cache while the whole
 * weight passes. */
#define PASS_TILES 8
#define ARGUMENTS const char *group, const char *tile, int64_t units, char *out, size_t out_stride, const int rows
#define CASE(multiply, rows) \
    case rows: multiply(group, from, units, out, out_stride, rows); break;

/* Defines noodle_multiply_<name>. dst: float32 [weight rows, rows]; sources: packed weight, tiles. A unit is what a kernel
 * processes of each row at once: `unit_numbers` elements, `group_bytes` of a group and `tile_bytes` per tile row. */
#define PRODUCT(name, multiply, target, most_rows, unit_numbers, group_bytes, tile_bytes) \
    target void noodle_multiply_##name(void *dst, int thread, int threads, void *unused) { \
        (void)unused; \
        const void *weight = source_of(dst, 0), *given = source_of(dst, 1); \
        const int64_t units = size_of(weight, 0) / unit_numbers, groups = size_of(weight, 1) / GROUP_ROWS; \
        const struct cut cut = cut_of(size_of(dst, 1), most_rows); \
        const size_t out_stride = stride_of(dst, 1); \
        const int64_t first = groups * thread / threads, end = groups * (thread + 1) / threads; \
        for (int64_t pass = 0; pass < cut.tiles; pass += PASS_TILES) { \
            const int64_t pass_end = pass + PASS_TILES < cut.tiles ? pass + PASS_TILES : cut.tiles; \
            for (int64_t number = first; number < end; number++) { \
                const char *group = data_of(weight) + number * units * group_bytes; \
                for (int64_t tile = pass; tile < pass_end; tile++) { \
                    const int64_t begin = begin_of_tile(cut, tile); \
                    const char *from = data_of(given) + begin * units * tile_bytes; \
                    char *out = data_of(dst) + begin * out_stride + number * GROUP_ROWS * sizeof(float); \
                    switch (rows_of_tile(cut, tile)) { \
                        CASE(multiply, 8) \
                        CASE(multiply, 7) \
                        CASE(multiply, 6) \
                        CASE(multiply, 5) \
                        CASE(multiply, 4) \
                        CASE(multiply, 3) \
                        CASE(multiply, 2) \
                        CASE(multiply, 1) \
                    } \
                } \
            } \
        } \
    }
