/* Prints products of drawn weights and rows by one instruction set: a line for each type and number of rows. */

#include "drawn.h"
#include "products/layout.h"

#define OUTPUTS 37 /* the last group is not full */
#define LENGTH 512
#define MOST_ROWS 17
#define MOST_WEIGHT_BYTES (48 * LENGTH * 4)

void noodle_pack(char *weight, char *spare, int64_t row_count, int64_t blocks, int64_t type);
int64_t noodle_packed_items(int64_t type);
operation noodle_take_rows, KERNEL(quantize), KERNEL(arrange);

#define TYPES(DO) \
    DO(F32, 0, 4) DO(F16, 1, 2) DO(BF16, 30, 4) DO(Q4_0, 2, 18) DO(Q4_1, 3, 20) DO(Q5_0, 6, 22) DO(Q5_1, 7, 24) \
    DO(Q8_0, 8, 34) DO(Q4_K, 12, 144) DO(Q5_K, 13, 176) DO(Q6_K, 14, 210) DO(IQ4_NL, 20, 18) DO(IQ4_XS, 23, 136) \
    DO(MXFP4, 39, 17)

#define DECLARE(name, number, block_bytes) operation KERNEL(multiply_##name);
TYPES(DECLARE)

enum { F32 = 0, F16 = 1, Q6_K = 14, BF16 = 30, MXFP4 = 39 }; /* ggml's type numbers */
static const struct type {
    const char *name;
    int64_t number, block_bytes;
    operation *multiply;
} EVERY_TYPE[] = {
#define ROW(name, number, block_bytes) {#name, number, block_bytes, KERNEL(multiply_##name)},
    TYPES(ROW)};

static bool has_minimum(int64_t number) { return number == 3 || number == 7 || number == 12 || number == 13; }

/* in float16, below 2 and also subnormal */
static uint16_t drawn_half(void) { return (uint16_t)((drawn() & 0x83ff) | drawn() % 16 << 10); }

/* any bits, but scales that are numbers of a usual size */
static void draw_block(char *block, const struct type *type) {
    for (int64_t at = 0; at < type->block_bytes; at++) block[at] = (char)drawn();
    if (type->number == F32 || type->number == BF16) {
        for (int at = 0; at < 4; at += type->number == F32 ? 4 : 2) {
            const float number = drawn_float();
            memcpy(block + at, (const char *)&number + (type->number == F32 ? 0 : 2), type->number == F32 ? 4 : 2);
        }
    } else if (type->number == MXFP4) {
        block[0] = (char)(drawn() % 8 ? 110 + drawn() % 20 : drawn() % 3);
    } else {
        for (int number = 0; number < (has_minimum(type->number) ? 2 : 1); number++) {
            const uint16_t scale = drawn_half();
            memcpy(block + (type->number == Q6_K ? 208 : 2 * number), &scale, 2);
        }
    }
}

/* as ggml's to_float is called; here a number for each byte */
static int64_t taken_block_bytes, taken_block_items;
static void bytes_as_floats(const void *blocks, float *values, int64_t count) {
    for (int64_t at = 0; at < count; at++)
        values[at] = at < count / taken_block_items * taken_block_bytes ? ((const uint8_t *)blocks)[at] : 0;
}

/* as kernels/products/layout.c has it */
struct taking {
    struct work work;
    int64_t type;
    void (*to_float)(const void *blocks, float *values, int64_t count);
};

static void print_rows(const struct type *type, struct tensor *weight) {
    int32_t numbers[5] = {0, OUTPUTS - 1, 16, 15, 16};
    float *values = memory_of(5 * LENGTH * sizeof *values);
    struct tensor ids = tensor_of(numbers, 4, 5, 1, 1), dst = tensor_of(values, 4, LENGTH, 5, 1);
    dst.sources[0] = weight, dst.sources[1] = &ids;
    struct taking taking = {{0, 0}, type->number, type->number == F32 ? NULL : bytes_as_floats};
    taken_block_bytes = type->block_bytes, taken_block_items = noodle_packed_items(type->number);
    run(noodle_take_rows, &dst, 2, &taking);
    char name[64];
    snprintf(name, sizeof name, "%s, rows taken", type->name);
    print_bits(name, values, 5 * LENGTH);
    free(values);
}

static void print_product(const struct type *type, struct tensor *weight, float *numbers, int64_t count) {
    const bool is_float = type->number == F32 || type->number == F16 || type->number == BF16;
    const int64_t row_bytes = is_float ? LENGTH * 4 : LENGTH / BLOCK * (int64_t)sizeof(struct row_block);
    const int threads = count == 1 ? 1 : 2;
    struct tensor rows = tensor_of(numbers, 4, LENGTH, count, 1);
    struct tensor tiles = tensor_of(memory_of((size_t)(row_bytes * count)), 1, row_bytes, count, 1);
    struct tensor dst = tensor_of(memory_of(OUTPUTS * MOST_ROWS * 4), 4, OUTPUTS, count, 1);
    struct work work = {0, 0};
    tiles.sources[0] = &rows, dst.sources[0] = weight, dst.sources[1] = &tiles;
    run(is_float ? KERNEL(arrange) : KERNEL(quantize), &tiles, threads, NULL);
    run(type->multiply, &dst, threads, &work);
    char name[64];
    snprintf(name, sizeof name, "%s, %d rows", type->name, (int)count);
    print_bits(name, dst.data, OUTPUTS * count);
    free(tiles.data), free(dst.data);
}

static void draw_rows(float *numbers) {
    for (int at = 0; at < MOST_ROWS * LENGTH; at++) numbers[at] = drawn_float();
    memset(numbers, 0, BLOCK * sizeof *numbers);                              /* a block without a scale */
    for (int at = 0; at < BLOCK; at++) numbers[LENGTH + at] *= 1e-36f;        /* one whose inverse is not finite */
    for (int at = 0; at < BLOCK; at++) numbers[LENGTH + BLOCK + at] = 0.5f * (float)(at - 16); /* ties */
    numbers[LENGTH + BLOCK] = 127.0f;
    numbers[5 * LENGTH + 40] = NAN;
    numbers[7 * LENGTH + 40] = -INFINITY;
}

int main(void) {
    start();
    char *spare = memory_of(GROUP_ROWS * LENGTH * 4), *matrix = memory_of(MOST_WEIGHT_BYTES);
    float *numbers = memory_of(MOST_ROWS * LENGTH * sizeof *numbers);
    draw_rows(numbers);
    for (size_t at = 0; at < sizeof EVERY_TYPE / sizeof *EVERY_TYPE; at++) {
        const struct type *type = EVERY_TYPE + at;
        const int64_t blocks = LENGTH / noodle_packed_items(type->number);
        memset(matrix, 0, MOST_WEIGHT_BYTES);
        for (int64_t block = 0; block < OUTPUTS * blocks; block++) draw_block(matrix + block * type->block_bytes, type);
        noodle_pack(matrix, spare, 48, blocks, type->number);
        struct tensor weight = tensor_of(matrix, 1, LENGTH, OUTPUTS, 1); /* its strides are not read */
        print_rows(type, &weight);
        const int64_t counts[] = {1, 2, 3, MOST_ROWS};
        for (int each = 0; each < 4; each++) print_product(type, &weight, numbers, counts[each]);
    }
    free(spare), free(matrix), free(numbers);
    return 0;
}
