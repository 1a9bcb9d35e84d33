/* Products of packed float types (layout.h) with rows in float32, and the arrangement of these rows. Included by each
 * instruction set's file after products.h.
 *
 * An output is the sum of its products in their order, so it has the same bits in any company. Each addition waits for the
 * one before: with few rows several groups are processed at once. */

/* A unit is what is loaded at once of LANES rows: one element, or two in bfloat16. For each type: its bytes of a row, its elements,
 * and the sum with its products. `given` is the tile's row of the first element, and `rows` the distance to the next element. */
#define F32_UNIT_BYTES 4
#define F16_UNIT_BYTES 2
#define BF16_UNIT_BYTES 4
#define F32_UNIT_ITEMS 1
#define F16_UNIT_ITEMS 1
#define BF16_UNIT_ITEMS 2
#define F32_UNIT_GIVEN 1 /* numbers of an activation row in its tile */
#define F16_UNIT_GIVEN 1
#define BF16_UNIT_GIVEN 2
WITH INLINED floats add_F32(floats sum, const char *unit, const float *given, int rows) {
    (void)rows;
    return fmadd(load_floats((const float *)unit), broadcast_float(*given), sum);
}
WITH INLINED floats add_F16(floats sum, const char *unit, const float *given, int rows) {
    (void)rows;
    return fmadd(halves(unit), broadcast_float(*given), sum);
}
WITH INLINED floats add_BF16(floats sum, const char *unit, const float *given, int rows) {
    const ints pairs = load_ints(unit);
    sum = fmadd(as_floats(shifted(pairs, 16)), broadcast_float(given[0]), sum);
    return fmadd(as_floats(upper_halves(pairs)), broadcast_float(given[rows]), sum);
}

#define MOST_GROUPS 4 /* processed at once with a lone row */

#define MULTIPLY_FLOATS(type, target) \
    target INLINED void multiply_tile_##type( \
        const char *group, const float *tile, int64_t units, float *out, size_t out_stride, const int rows, const int groups) { \
        const size_t group_bytes = GROUP_ROWS * type##_UNIT_BYTES * units; \
        floats sums[MOST_GROUPS * PARTS * FLOAT_TILE_ROWS]; \
        for (int sum = 0; sum < groups * PARTS * rows; sum++) sums[sum] = broadcast_float(0.0f); \
        for (; units; units--, group += GROUP_ROWS * type##_UNIT_BYTES, tile += rows * type##_UNIT_GIVEN) \
            for (int part = 0; part < groups * PARTS; part++) { \
                const char *unit = group + part / PARTS * group_bytes + part % PARTS * LANES * type##_UNIT_BYTES; \
                for (int row = 0; row < rows; row++) \
                    sums[part * rows + row] = add_##type(sums[part * rows + row], unit, tile + row, rows); \
            } \
        for (int row = 0; row < rows; row++) \
            for (int part = 0; part < groups * PARTS; part++) \
                store_floats((float *)((char *)out + row * out_stride) + part * LANES, sums[part * rows + row]); \
    }

#define FLOAT_CASE(type, count, groups) \
    case count: multiply_tile_##type(group, from, units, out, out_stride, count, groups); break;

/* noodle_multiply_<type>. dst: float32 [weight rows, rows]; sources: packed weight, tiles */
#define PRODUCT_OF_FLOATS(type, target) \
    MULTIPLY_FLOATS(type, target) \
    target void NAME(noodle_multiply_##type)(void *dst, int thread, int threads, void *given_work) { \
        const void *weight = source_of(dst, 0), *given = source_of(dst, 1); \
        const int64_t units = size_of(weight, 0) / type##_UNIT_ITEMS, length = units * type##_UNIT_GIVEN; \
        const int64_t group_bytes = units * GROUP_ROWS * type##_UNIT_BYTES; \
        const struct cut cut = cut_of(size_of(dst, 1), FLOAT_TILE_ROWS); \
        (void)thread; \
        float last[FLOAT_TILE_ROWS * GROUP_ROWS]; \
        struct shares shares = \
            shares_of(given_work, threads, cut, length * sizeof(float), groups_of(weight)); \
        for (struct share share; next_share(&shares, &share);) { \
            for (int64_t number = share.first_group; number < share.end_group;) { \
                const char *group = data_of(weight) + number * group_bytes; \
                const int64_t after = number + MOST_GROUPS; \
                const bool is_full = after <= share.end_group && after * GROUP_ROWS <= size_of(weight, 1); \
                const int64_t groups = is_full && cut.tiles == 1 && cut.rows <= 2 ? MOST_GROUPS : 1; \
                for (int64_t tile = share.first_tile; tile < share.end_tile; tile++) { \
                    const int64_t begin = begin_of_tile(cut, tile); \
                    const float *from = (const float *)data_of(given) + begin * length; \
                    const int rows = (int)rows_of_tile(cut, tile); \
                    struct outputs outputs = outputs_of(dst, begin, number, last); \
                    float *out = outputs.out; \
                    const size_t out_stride = outputs.stride; \
                    switch (rows + (groups > 1 ? 16 : 0)) { \
                        FLOAT_CASE(type, 8, 1) \
                        FLOAT_CASE(type, 7, 1) \
                        FLOAT_CASE(type, 6, 1) \
                        FLOAT_CASE(type, 5, 1) \
                        FLOAT_CASE(type, 4, 1) \
                        FLOAT_CASE(type, 3, 1) \
                        FLOAT_CASE(type, 2, 1) \
                        FLOAT_CASE(type, 1, 1) \
                        case 17: multiply_tile_##type(group, from, units, out, out_stride, 1, MOST_GROUPS); break; \
                        case 18: multiply_tile_##type(group, from, units, out, out_stride, 2, MOST_GROUPS); break; \
                    } \
                    finish(&outputs, rows); \
                } \
                number += groups; \
            } \
        } \
    }

/* dst: tiles of float32; source 0: rows of K float32 */
WITH void NAME(noodle_arrange)(void *dst, int thread, int threads, void *unused) {
    (void)unused;
    const void *rows = source_of(dst, 0);
    const int64_t length = size_of(rows, 0);
    const struct cut cut = cut_of(size_of(rows, 1), FLOAT_TILE_ROWS);
    for (int64_t tile = thread; tile < cut.tiles; tile += threads) {
        const int64_t begin = begin_of_tile(cut, tile), width = rows_of_tile(cut, tile);
        float *to = (float *)data_of(dst) + begin * length;
        for (int64_t row = 0; row < width; row++) {
            const float *from = (const float *)(data_of(rows) + (begin + row) * stride_of(rows, 1));
            for (int64_t number = 0; number < length; number++) to[number * width + row] = from[number];
        }
    }
}

PRODUCT_OF_FLOATS(F32, WITH)
PRODUCT_OF_FLOATS(F16, WITH)
PRODUCT_OF_FLOATS(BF16, WITH)
