/* The layout of packed weights: 16 rows side by side, so that a vector holds the same elements of every row.
 *
 * ggml multiplies a weight row by row and spends much of its time shuffling loaded values and adding up the parts of a sum.
 * Here one instruction processes elements of 16 rows, and elements of the other operand are broadcast by their load. The
 * numbers are the file's: packing moves bytes and changes none, so it keeps the byte count and can be undone.
 *
 *   group: 16 rows; their blocks in order, each as the parts of its type (layout.c): with parts of n bytes, for each n bytes of
 *     a block, those of row 0, row 1, ... row 15
 *   tile: as many activation rows as a kernel processes at once, or one less, so that all tiles are about equally large
 *     block types: for each 32 elements, a row_block of each row
 *     float32, float16, bfloat16: [K][rows] elements in float32; for the instruction of AVX512_BF16 [K / 2][rows] pairs
 *
 * Activations are rounded to 8 bits with one scale per 32 elements for block types, as ggml does for Q8_0 (for types with blocks
 * of 256 elements ggml has one scale per 256). Everything else is float32.
 */

#pragma once

#include "../tensors.h"
#include "../work.h"

#define GROUP_ROWS 16
#define PARTS (GROUP_ROWS / LANES) /* vectors of a group's rows */
#define SIGNED 0                   /* in place of a type's largest byte */

/* 32 elements of a row in 8 bits */
struct row_block {
    int8_t numbers[32];
    float scale;
    int32_t negative_sum, first_negative_sum; /* of all numbers and of the first 16, negated */
    float scaled_negative_sum;
};

/* the factor of numbers for a scale; 0 for scales so small that their inverse is not finite */
INLINED float inverse_of(float scale) { return scale >= 1e-37f ? 1.0f / scale : 0.0f; }

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

/* Which rows a matrix multiplies. Dense products have one matrix and all rows in their order; with experts the rows are
 * (token, slot) pairs in order of the expert that the token chose in that slot. As a tensor: int32 [2 * experts + 2 + pairs],
 * the used experts' count, their numbers [experts], the first row of each and the end [experts + 1], the pairs. */
struct routes {
    const int32_t *experts, *first_rows, *pairs; /* NULL without experts */
    int64_t used, rows;
};
INLINED struct routes routes_of(const void *given, int64_t rows) {
    if (!given) return (struct routes){NULL, NULL, NULL, 1, rows};
    const int32_t *numbers = (const int32_t *)data_of(given);
    const int64_t experts = (size_of(given, 0) - rows) / 2 - 1;
    return (struct routes){numbers + 1, numbers + 1 + experts, numbers + 2 + 2 * experts, numbers[0], rows};
}
INLINED int64_t first_row_of(const struct routes *routes, int64_t route) {
    return routes->first_rows ? routes->first_rows[route] : route * routes->rows;
}
INLINED struct cut cut_of_route(const struct routes *routes, int64_t route, int64_t most_rows) {
    return cut_of(first_row_of(routes, route + 1) - first_row_of(routes, route), most_rows);
}
/* where a row's outputs go, and for experts where its activations are */
INLINED int64_t place_of(const struct routes *routes, int64_t row) { return routes->pairs ? routes->pairs[row] : row; }

/* The tiles of all routes, which the operations that write tiles walk through. */
struct tiles {
    struct routes routes;
    const void *rows; /* float32 [K, rows], or for experts [K, 1 or slots, tokens] */
    int64_t most_rows, slots, route, tile, count;
    struct cut cut;
};
struct tile {
    int64_t begin, rows;
};
INLINED struct tiles tiles_of(const void *dst, int64_t most_rows) {
    const void *rows = source_of(dst, 0);
    const struct routes routes = routes_of(source_of(dst, 1), size_of(dst, 1));
    return (struct tiles){routes, rows, most_rows, size_of(dst, 1) / size_of(rows, 2), -1, 0, 0, {0, 0, 0}};
}
INLINED bool next_tile(struct tiles *tiles, struct tile *tile) {
    while (tiles->tile == tiles->cut.tiles) {
        if (++tiles->route == tiles->routes.used) return false;
        tiles->cut = cut_of_route(&tiles->routes, tiles->route, tiles->most_rows);
        tiles->tile = 0;
    }
    tile->begin = first_row_of(&tiles->routes, tiles->route) + begin_of_tile(tiles->cut, tiles->tile);
    tile->rows = rows_of_tile(tiles->cut, tiles->tile++);
    return true;
}
/* Like next_tile, of those tiles that a thread writes alone. */
INLINED bool next_tile_of_thread(struct tiles *tiles, struct tile *tile, int thread, int threads) {
    while (next_tile(tiles, tile))
        if (tiles->count++ % threads == thread) return true;
    return false;
}
INLINED const float *activations_of(const struct tiles *tiles, int64_t row) {
    const int64_t place = place_of(&tiles->routes, row), slot = size_of(tiles->rows, 1) > 1 ? place % tiles->slots : 0;
    return (const float *)(data_of(tiles->rows) + slot * stride_of(tiles->rows, 1) +
                           place / tiles->slots * stride_of(tiles->rows, 2));
}

/* The product of `groups` groups and a tile of `rows` rows; groups are 1 but for at most 2 rows. */
typedef void tile_product(
    const char *group, const void *tile, int64_t length, float *out, size_t out_stride, int rows, int groups);

/* The kernel of a type and an instruction set: elements of a row that stay together and their bytes. */
struct kernel {
    tile_product *multiply;
    int items, bytes, tile_rows, groups;
};

/* Operations of every kernel. dst: float32 [weight rows, rows]; sources: packed weight, tiles, for experts routes. */
__attribute__((visibility("hidden"))) void multiply_by(const struct kernel *kernel, void *dst, int threads, void *work);

#define PRODUCT(type, block_items, block_bytes, most_rows, most_groups) \
    static const struct kernel kernel_##type = {multiply_rows_##type, block_items, block_bytes, most_rows, most_groups}; \
    void NAME(noodle_multiply_##type)(void *dst, int thread, int threads, void *work) { \
        (void)thread; \
        multiply_by(&kernel_##type, dst, threads, work); \
    }
