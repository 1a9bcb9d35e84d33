/* Packs weights into the layout of layout.h, and takes rows from it. */

#include "layout.h"

struct tensor_fields noodle_tensor_fields;

void noodle_set_tensor_fields(size_t data, size_t sizes, size_t strides, size_t sources) {
    noodle_tensor_fields = (struct tensor_fields){data, sizes, strides, sources};
}

#define MOST_PARTS 6

/* The parts of a block, in the layout's order: `count` times `bytes` bytes that begin at `offset` in ggml's block. */
struct layout {
    int block_items, block_bytes;
    struct {
        int offset, bytes, count;
    } parts[MOST_PARTS];
};

/* by ggml's type numbers; structs: ggml-common.h */
static const struct layout LAYOUTS[] = {
    [0] = {1, 4, {{0, 4, 1}}},                                       /* F32 */
    [1] = {1, 2, {{0, 2, 1}}},                                       /* F16 */
    [2] = {32, 18, {{0, 2, 1}, {2, 4, 4}}},                          /* Q4_0: scale, nibbles */
    [3] = {32, 20, {{0, 2, 2}, {4, 4, 4}}},                          /* Q4_1: scale and minimum, nibbles */
    [6] = {32, 22, {{0, 2, 1}, {2, 4, 1}, {6, 4, 4}}},               /* Q5_0: scale, fifth bits, nibbles */
    [7] = {32, 24, {{0, 2, 2}, {4, 4, 1}, {8, 4, 4}}},               /* Q5_1: scale and minimum, fifth bits, nibbles */
    [8] = {32, 34, {{0, 2, 1}, {2, 4, 8}}},                          /* Q8_0: scale, bytes */
    [12] = {256, 144, {{0, 2, 2}, {4, 1, 12}, {16, 4, 32}}},         /* Q4_K: scale and minimum, of units, nibbles */
    [13] = {256, 176, {{0, 2, 2}, {4, 1, 12}, {16, 4, 8}, {48, 4, 32}}}, /* Q5_K: with fifth bits */
    /* Q6_K: scale, of units; upper bits and nibbles of each half, so that memory is read in its order */
    [14] = {256, 210, {{208, 2, 1}, {192, 1, 16}, {128, 4, 8}, {0, 4, 16}, {160, 4, 8}, {64, 4, 16}}},
    [20] = {32, 18, {{0, 2, 1}, {2, 4, 4}}},                         /* IQ4_NL: scale, nibbles */
    [23] = {256, 136, {{0, 2, 2}, {4, 1, 4}, {8, 4, 32}}},           /* IQ4_XS: scale, upper and lower bits of units', nibbles */
    [30] = {2, 4, {{0, 4, 1}}},                                      /* BF16, in pairs */
    [39] = {32, 17, {{0, 1, 1}, {1, 4, 4}}},                         /* MXFP4: exponent, nibbles */
};

static const struct layout *layout_of(int64_t type) {
    return type >= 0 && type < (int64_t)(sizeof LAYOUTS / sizeof *LAYOUTS) && LAYOUTS[type].block_items ? LAYOUTS + type : NULL;
}

/* Elements of a row that stay together in a type's layout; 0 if it has none. */
int64_t noodle_packed_items(int64_t type) {
    const struct layout *layout = layout_of(type);
    return layout ? layout->block_items : 0;
}

/* Inlined with a constant `bytes`, each memcpy is one instruction. */
INLINED void interleave(char *to, const char *from, size_t row_bytes, int count, const int bytes) {
    for (int number = 0; number < count; number++, from += bytes)
        for (int row = 0; row < GROUP_ROWS; row++, to += bytes) memcpy(to, from + row * row_bytes, bytes);
}

/* Pack a matrix of `blocks` blocks in each row in place; `spare` holds 16 rows. The row count is a multiple of 16. */
void noodle_pack(char *weight, char *spare, int64_t row_count, int64_t blocks, int64_t type) {
    const struct layout *layout = layout_of(type);
    const size_t row_bytes = blocks * layout->block_bytes;
    for (int64_t first = 0; first < row_count; first += GROUP_ROWS) {
        memcpy(spare, weight, GROUP_ROWS * row_bytes);
        for (int64_t block = 0; block < blocks; block++) {
            for (int number = 0; number < MOST_PARTS && layout->parts[number].count; number++) {
                const int bytes = layout->parts[number].bytes, count = layout->parts[number].count;
                const char *from = spare + block * layout->block_bytes + layout->parts[number].offset;
                if (bytes == 4)
                    interleave(weight, from, row_bytes, count, 4);
                else if (bytes == 2)
                    interleave(weight, from, row_bytes, count, 2);
                else
                    interleave(weight, from, row_bytes, count, 1);
                weight += GROUP_ROWS * bytes * count;
            }
        }
    }
}

/* Undo the packing of `count` blocks of one row, of those of a group that begin at `from`. */
static void unpack_blocks(char *blocks, const char *from, const struct layout *layout, int lane, int64_t count) {
    for (int64_t block = 0; block < count; block++, blocks += layout->block_bytes) {
        for (int number = 0; number < MOST_PARTS && layout->parts[number].count; number++) {
            const int bytes = layout->parts[number].bytes;
            char *to = blocks + layout->parts[number].offset;
            for (int each = 0; each < layout->parts[number].count; each++, to += bytes, from += GROUP_ROWS * bytes)
                memcpy(to, from + lane * bytes, bytes);
        }
    }
}

#define TAKEN_BYTES 1024 /* of blocks that are unpacked at once: at least one of the largest type */

struct taking {
    struct work work;
    int64_t type;
    void (*to_float)(const void *blocks, float *values, int64_t count); /* ggml's; NULL for float32 */
};

/* dst: float32 [length, ids]; sources: the packed weight, int32 row ids */
void noodle_take_rows(void *dst, int thread, int threads, void *given) {
    const struct taking *parameters = given;
    const struct layout *layout = layout_of(parameters->type);
    const void *weight = source_of(dst, 0);
    const int32_t *ids = (const int32_t *)data_of(source_of(dst, 1));
    const int64_t blocks = size_of(weight, 0) / layout->block_items, count = size_of(dst, 1);
    const int64_t most = TAKEN_BYTES / layout->block_bytes;
    char taken[TAKEN_BYTES];
    for (int64_t row = thread; row < count; row += threads) {
        const int lane = ids[row] % GROUP_ROWS;
        const char *group = data_of(weight) + (ids[row] - lane) * blocks * layout->block_bytes;
        float *out = (float *)(data_of(dst) + row * stride_of(dst, 1));
        for (int64_t first = 0; first < blocks; first += most) {
            const int64_t part = blocks - first < most ? blocks - first : most, items = part * layout->block_items;
            unpack_blocks(taken, group + first * GROUP_ROWS * layout->block_bytes, layout, lane, part);
            if (parameters->to_float)
                parameters->to_float(taken, out, items);
            else
                memcpy(out, taken, items * sizeof(float));
            out += items;
        }
    }
}
