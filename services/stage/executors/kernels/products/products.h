/* Products of packed block types (layout.h) with rows in 8 bits. Each source file includes this for one instruction set.
 *
 * A unit is 32 elements of 16 weight rows. What is stored of it is unpacked once (block_types.h) into 8 vectors of bytes, four
 * elements of each row, and multiplied by every row of a tile: the dot product of 32 bytes is exact in 32 bits, is scaled in
 * float32 and added to the output. Units are added in their order, whatever else is computed beside them, so an output has
 * the same bits alone and in any company.
 *
 * The including file defines WITH (the target attribute), NAME(x), LANES (weight rows in a vector), and on vectors: `bytes` of
 * 4 * LANES bytes, `ints` and `floats` of LANES, and the functions that block_types.h and this file use.
 */

#include "block_types.h"

#define TILE_ROWS 16 /* of activations that a unit is multiplied by once it is unpacked */

#define UNIT_BYTES(type) (GROUP_ROWS * type##_BYTES * BLOCK / type##_ITEMS)

#define AHEAD_BYTES 8192

/* Fetch what lies AHEAD_BYTES behind a unit. Processors do this by themselves for a lone row, where memory is read once and in its
 * order; where bytes are read again for other units, or other memory is read in between, they lose track. */
INLINED void fetch_ahead(const char *unit, const int bytes) {
    _Pragma("GCC unroll 9") for (int at = 0; at < bytes; at += 64) __builtin_prefetch(unit + AHEAD_BYTES + at, 0, 1);
}

/* Add the product of a unit's LANES rows and a row's 32 elements to `sum`, with the scale of both. */
#define DOT_AND_ADD(type) \
    WITH INLINED floats add_unit_##type(floats sum, const struct unit *unit, const struct row_block *row) { \
        const floats scale = broadcast_float(row->scale); \
        if (type##_HALVES == 2) { \
            const ints first = shifted(broadcast_int(row->first_negative_sum), type##_ZERO_SHIFT); \
            const ints second = \
                shifted(broadcast_int(row->negative_sum - row->first_negative_sum), type##_ZERO_SHIFT); \
            sum = fmadd(to_floats(dot(first, unit->weights, row->numbers, 4, type##_LARGEST)), \
                        multiply(unit->scale[0], scale), sum); \
            return fmadd(to_floats(dot(second, unit->weights + 4, row->numbers + 16, 4, type##_LARGEST)), \
                         multiply(unit->scale[1], scale), sum); \
        } \
        const ints start = \
            type##_ZERO_SHIFT ? shifted(broadcast_int(row->negative_sum), type##_ZERO_SHIFT) : broadcast_int(0); \
        sum = fmadd(to_floats(dot(start, unit->weights, row->numbers, 8, type##_LARGEST)), \
                    multiply(unit->scale[0], scale), sum); \
        return type##_HAS_MINIMUM ? fmadd(unit->minimum, broadcast_float(row->scaled_negative_sum), sum) : sum; \
    }

/* The product of a group and a tile of `rows` rows; `rows` is a constant where that is faster. */
#define MULTIPLY_TILE(type) \
    DOT_AND_ADD(type) \
    WITH INLINED void multiply_tile_##type(const char *group, const struct row_block *tile, int64_t blocks, float *out, \
                                           size_t out_stride, const int rows) { \
        floats sums[TILE_ROWS][PARTS]; \
        for (int row = 0; row < rows; row++) \
            for (int part = 0; part < PARTS; part++) sums[row][part] = broadcast_float(0.0f); \
        for (int64_t block = 0; block < blocks; block++, group += GROUP_ROWS * type##_BYTES) { \
            struct scales_##type scales; \
            prepare_##type(&scales, group); \
            for (int outer = 0; outer < type##_ITEMS / BLOCK / type##_INNER; outer++) { \
                _Pragma("GCC unroll 8") for (int inner = 0; inner < type##_INNER; inner++, tile += rows) { \
                    if (rows > 1 || type##_READ_AGAIN) \
                        fetch_ahead(group + (outer * type##_INNER + inner) * UNIT_BYTES(type), UNIT_BYTES(type)); \
                    _Pragma("GCC unroll 4") for (int part = 0; part < PARTS; part++) { \
                        struct unit unit; \
                        unpack_##type(&unit, &scales, group, outer, inner, part); \
                        for (int row = 0; row < rows; row++) \
                            sums[row][part] = add_unit_##type(sums[row][part], &unit, tile + row); \
                    } \
                } \
            } \
        } \
        for (int row = 0; row < rows; row++) \
            for (int part = 0; part < PARTS; part++) \
                store_floats((float *)((char *)out + row * out_stride) + part * LANES, sums[row][part]); \
    }

#define PRODUCT_OF_BLOCKS(type) \
    MULTIPLY_TILE(type) \
    WITH static void multiply_rows_##type( \
        const char *group, const void *tile, int64_t length, float *out, size_t out_stride, int rows, int groups) { \
        const int64_t blocks = length / type##_ITEMS; \
        (void)groups; \
        if (rows == 1 && !(LOOPS_OVER_LONE_ROWS && type##_LOOPS_OVER_LONE_ROWS)) \
            multiply_tile_##type(group, tile, blocks, out, out_stride, 1); \
        else \
            multiply_tile_##type(group, tile, blocks, out, out_stride, rows); \
    } \
    PRODUCT(type, type##_ITEMS, type##_BYTES, TILE_ROWS, 1)

PRODUCT_OF_BLOCKS(Q8_0)
PRODUCT_OF_BLOCKS(Q4_0)
PRODUCT_OF_BLOCKS(Q4_1)
PRODUCT_OF_BLOCKS(Q5_0)
PRODUCT_OF_BLOCKS(Q5_1)
PRODUCT_OF_BLOCKS(Q4_K)
PRODUCT_OF_BLOCKS(Q5_K)
PRODUCT_OF_BLOCKS(Q6_K)
PRODUCT_OF_BLOCKS(IQ4_NL)
PRODUCT_OF_BLOCKS(IQ4_XS)
PRODUCT_OF_BLOCKS(MXFP4)

/* dst: bytes [row_blocks of a row, rows], tiles of row_blocks; sources: rows of K float32, for experts routes */
WITH void NAME(noodle_quantize)(void *dst, int thread, int threads, void *unused) {
    (void)unused;
    const int64_t units = size_of(source_of(dst, 0), 0) / BLOCK, first = units * thread / threads, end = units * (thread + 1) / threads;
    struct tiles tiles = tiles_of(dst, TILE_ROWS);
    for (struct tile tile; next_tile(&tiles, &tile);) {
        struct row_block *to = (struct row_block *)data_of(dst) + tile.begin * units;
        for (int64_t row = 0; row < tile.rows; row++) {
            const float *from = activations_of(&tiles, tile.begin + row);
            for (int64_t unit = first; unit < end; unit++) {
                struct row_block *block = to + unit * tile.rows + row;
                quantize_block(block, from + unit * BLOCK);
                block->scaled_negative_sum = block->scale * (float)block->negative_sum;
            }
        }
    }
}
