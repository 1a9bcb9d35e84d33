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

/* How a product is shared out to threads: passes over the weight, in each of which some tiles of activations stay in the L2 cache
 * while the weight's groups pass, some groups a share. */
#define PASS_BYTES (384 << 10) /* of activations */
#define SHARES_OF_A_THREAD 8   /* so that threads finish together */

struct shares {
    struct claims claims;
    int64_t tiles, pass_tiles, groups, share_groups, shares_of_pass, count;
};
struct share {
    int64_t first_tile, end_tile, first_group, end_group;
};

INLINED struct shares shares_of(void *work, int threads, struct cut cut, int64_t row_bytes, int64_t groups) {
    struct shares shares = {claims_of(work, threads), cut.tiles, 0, groups, groups, 1, 0};
    const int64_t tile_bytes = (cut.rows + 1) * row_bytes;
    shares.pass_tiles = tile_bytes < PASS_BYTES ? PASS_BYTES / tile_bytes : 1;
    if (threads > 1) {
        shares.share_groups = groups / (threads * SHARES_OF_A_THREAD) + 1;
        shares.shares_of_pass = (groups + shares.share_groups - 1) / shares.share_groups;
    }
    shares.count = (cut.tiles + shares.pass_tiles - 1) / shares.pass_tiles * shares.shares_of_pass;
    return shares;
}

INLINED bool next_share(struct shares *shares, struct share *share) {
    const int64_t number = claim_next(&shares->claims, shares->count);
    if (number >= shares->count) return false;
    const int64_t tile = number / shares->shares_of_pass * shares->pass_tiles;
    const int64_t group = number % shares->shares_of_pass * shares->share_groups;
    share->first_tile = tile;
    share->end_tile = tile + shares->pass_tiles < shares->tiles ? tile + shares->pass_tiles : shares->tiles;
    share->first_group = group;
    share->end_group = group + shares->share_groups < shares->groups ? group + shares->share_groups : shares->groups;
    return true;
}

/* Groups of a weight; the last one may be filled up with rows that are not the weight's. */
INLINED int64_t groups_of(const void *weight) { return (size_of(weight, 1) + GROUP_ROWS - 1) / GROUP_ROWS; }

/* Where the product of a group and a tile goes: to its place, or if the group is not full to `last` first. */
struct outputs {
    float *out, *place;
    size_t stride, place_stride;
    int64_t columns;
};
INLINED struct outputs outputs_of(const void *dst, int64_t first_row, int64_t group, float *last) {
    const size_t stride = stride_of(dst, 1);
    const int64_t left = size_of(dst, 0) - group * GROUP_ROWS;
    float *place = (float *)(data_of(dst) + first_row * stride) + group * GROUP_ROWS;
    if (left >= GROUP_ROWS) return (struct outputs){place, place, stride, stride, GROUP_ROWS};
    return (struct outputs){last, place, GROUP_ROWS * sizeof(float), stride, left};
}
INLINED void finish(const struct outputs *outputs, int64_t rows) {
    if (outputs->out == outputs->place) return;
    for (int64_t row = 0; row < rows; row++)
        memcpy((char *)outputs->place + row * outputs->place_stride, outputs->out + row * GROUP_ROWS, outputs->columns * sizeof(float));
}
