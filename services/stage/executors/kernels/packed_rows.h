/* Products of weights and rows in float32, for operations of ggml that are not ggml's own (GGML_OP_CUSTOM).
 *
 * ggml multiplies a weight row by row, and spends much of its time on lining up what it has loaded. Here 16 of a weight's
 * rows stand side by side, so that one instruction takes a number of each of them, or four numbers in 8 bits, and a number
 * of the other side is lined up by its load. The bytes are as many as before, and are read in their order: with the scales
 * of 8 bits behind the numbers, a processor that guesses what is read next guessed wrong, and a single row took twice as
 * long.
 *
 *   a group: 16 rows of K numbers
 *     in float32 or float16: [K][16] numbers
 *     in bfloat16 (K even): [K / 2][16] pairs of numbers
 *     in Q8_0 (K a multiple of 32): K / 32 blocks of 16 scales in float16, one for each row, and then of
 *       [8][16][4] bytes: byte j of [g][r] is number 4 * g + j of the block in row r, plus 128
 *   a tile: so many rows of activations as a kernel takes at once, or one less, so that all are about as large
 *     in float32: [K][rows] numbers
 *     else: as the kernels say that multiply by it
 *
 * As in ggml, activations are rounded to 8 bits with a scale for each 32 of them where weights are in Q8_0 (products are
 * summed in int32 within a block and in float32 over blocks), and to bfloat16 where weights are. All else is in float32.
 */

#pragma once

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 32
#define GROUP_ROWS 16
#define BLOCK_BYTES 34  /* of a row in Q8_0 */
#define SCALES_BYTES 32 /* of a group's block */
#define GROUP_BLOCK_BYTES (GROUP_ROWS * BLOCK_BYTES)
#define INLINED static inline __attribute__((always_inline))

/* where a ggml_tensor has its fields: told once by whoever knows this ggml's struct */
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

/* How rows are cut into tiles: the first `larger` of them have a row more than `rows`. */
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

/* `multiply` writes what 16 rows of a weight (`group`) times the `rows` of a tile are. The rows of PASS_TILES stay in the
 * second cache while all of the weight passes. */
#define PASS_TILES 8
#define ARGUMENTS const char *group, const char *tile, int64_t units, char *out, size_t out_stride, const int rows
#define CASE(multiply, rows) \
    case rows: multiply(group, from, units, out, out_stride, rows); break;

/* dst: float32 [rows of the weight, rows]; sources: the packed weight, tiles. A unit is what a kernel takes at once of each
 * row: one number or more, and of a group and of a row of a tile so many bytes. */
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
