/* Packs weights into the layout of packed_weights.h and reads rows back from it. */

#include "packed_weights.h"

struct tensor_fields noodle_tensor_fields;

void noodle_set_tensor_fields(size_t data, size_t sizes, size_t strides, size_t sources) {
    noodle_tensor_fields = (struct tensor_fields){data, sizes, strides, sources};
}

static void pack_q8_0(char *group, const char *rows, int64_t length) {
    const int64_t blocks = length / BLOCK;
    for (int64_t block = 0; block < blocks; block++) {
        char *packed = group + block * GROUP_BLOCK_BYTES;
        for (int row = 0; row < GROUP_ROWS; row++) {
            const char *from = rows + (row * blocks + block) * BLOCK_BYTES;
            memcpy(packed + row * 2, from, 2);
            for (int number = 0; number < BLOCK; number++)
                packed[SCALES_BYTES + (number / 4) * 64 + row * 4 + number % 4] = (char)(from[2 + number] ^ 0x80);
        }
    }
}

/* Inlined with a constant `bytes`, each memcpy is one instruction. */
INLINED void pack_units(char *group, const char *rows, int64_t units, const int64_t bytes) {
    for (int64_t unit = 0; unit < units; unit++)
        for (int64_t row = 0; row < GROUP_ROWS; row++)
            memcpy(group + (unit * GROUP_ROWS + row) * bytes, rows + (row * units + unit) * bytes, bytes);
}

/* Pack a matrix in ggml's layout into groups, in place. A row has `length` units of `unit_bytes` (2 or 4), or `length` values
 * in Q8_0 if `unit_bytes` is 0. `spare` holds 16 rows. */
void noodle_pack(char *weight, char *spare, int64_t row_count, int64_t length, int64_t unit_bytes) {
    const int64_t group_bytes = unit_bytes ? GROUP_ROWS * length * unit_bytes : length / BLOCK * GROUP_BLOCK_BYTES;
    for (int64_t first = 0; first < row_count; first += GROUP_ROWS, weight += group_bytes) {
        memcpy(spare, weight, group_bytes);
        if (unit_bytes == 4)
            pack_units(weight, spare, length, 4);
        else if (unit_bytes)
            pack_units(weight, spare, length, 2);
        else
            pack_q8_0(weight, spare, length);
    }
}

#if defined(__x86_64__)
/* dst: float32 [length, ids]; sources: the packed weight, int32 row ids */
WITH_F16C void noodle_take_rows_q8_0(void *dst, int thread, int threads, void *unused) {
    (void)unused;
    const void *weight = source_of(dst, 0);
    const int32_t *ids = (const int32_t *)data_of(source_of(dst, 1));
    const int64_t blocks = size_of(weight, 0) / BLOCK, count = size_of(dst, 1);
    for (int64_t row = thread; row < count; row += threads) {
        const int lane = ids[row] % GROUP_ROWS;
        const char *group = data_of(weight) + (ids[row] - lane) * blocks * BLOCK_BYTES;
        float *out = (float *)(data_of(dst) + row * stride_of(dst, 1));
        for (int64_t block = 0; block < blocks; block++, group += GROUP_BLOCK_BYTES) {
            const float scale = half_to_float(group + 2 * lane);
            for (int number = 0; number < BLOCK; number++)
                *out++ = scale * ((uint8_t)group[SCALES_BYTES + number / 4 * 64 + lane * 4 + number % 4] - 128);
        }
    }
}

static float from_f32(const char *at) {
    float number;
    memcpy(&number, at, 4);
    return number;
}
WITH_F16C static float from_f16(const char *at) { return half_to_float(at); }
static float from_bf16(const char *at) {
    char number[4] = {0, 0, at[0], at[1]};
    return from_f32(number);
}

/* Defines noodle_take_rows_<type>; arguments as in noodle_take_rows_q8_0. */
#define TAKING(type, unit_numbers, item_bytes) \
    WITH_F16C void noodle_take_rows_##type(void *dst, int thread, int threads, void *unused) { \
        (void)unused; \
        const void *weight = source_of(dst, 0); \
        const int32_t *ids = (const int32_t *)data_of(source_of(dst, 1)); \
        const int64_t length = size_of(weight, 0), count = size_of(dst, 1); \
        for (int64_t row = thread; row < count; row += threads) { \
            const int lane = ids[row] % GROUP_ROWS; \
            const char *group = data_of(weight) + (ids[row] - lane) * length * item_bytes; \
            float *out = (float *)(data_of(dst) + row * stride_of(dst, 1)); \
            for (int64_t number = 0; number < length; number++) { \
                const int64_t unit = number / unit_numbers * GROUP_ROWS + lane; \
                out[number] = from_##type(group + (unit * unit_numbers + number % unit_numbers) * item_bytes); \
            } \
        } \
    }

TAKING(f32, 1, 4)
TAKING(f16, 1, 2)
TAKING(bf16, 2, 2)
#endif
