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

#define MOST_GROUPS (LANES < 8 ? 2 : 4) /* processed at once with one or two rows */
#define MOST_SUMS 8 /* MOST_GROUPS of two rows, or a tile's rows: compilers keep a larger array in memory */

#define MULTIPLY_FLOATS(type, target) \
    target INLINED void multiply_tile_##type( \
        const char *group, const float *tile, int64_t units, float *out, size_t out_stride, const int rows, const int groups) { \
        const size_t group_bytes = GROUP_ROWS * type##_UNIT_BYTES * units; \
        floats sums[MOST_SUMS * PARTS]; \
        for (int sum = 0; sum < groups * PARTS * rows; sum++) sums[sum] = broadcast_float(0.0f); \
        for (; units; units--, group += GROUP_ROWS * type##_UNIT_BYTES, tile += rows * type##_UNIT_GIVEN) \
            for (int row = 0; row < rows; row++) \
                for (int part = 0; part < groups * PARTS; part++) { \
                    const char *unit = group + part / PARTS * group_bytes + part % PARTS * LANES * type##_UNIT_BYTES; \
                    sums[part * rows + row] = add_##type(sums[part * rows + row], unit, tile + row, rows); \
                } \
        for (int row = 0; row < rows; row++) \
            for (int part = 0; part < groups * PARTS; part++) \
                store_floats((float *)((char *)out + row * out_stride) + part * LANES, sums[part * rows + row]); \
    }

#define FLOAT_CASE(type, count) \
    case count: multiply_tile_##type(group, tile, units, out, out_stride, count, 1); break;

#define PRODUCT_OF_FLOATS(type, target) \
    MULTIPLY_FLOATS(type, target) \
    target static void multiply_rows_##type( \
        const char *group, const void *tile, int64_t length, float *out, size_t out_stride, int rows, int groups) { \
        const int64_t units = length / type##_UNIT_ITEMS; \
        switch (rows + (groups > 1 ? 16 : 0)) { \
            FLOAT_CASE(type, 8) \
            FLOAT_CASE(type, 7) \
            FLOAT_CASE(type, 6) \
            FLOAT_CASE(type, 5) \
            FLOAT_CASE(type, 4) \
            FLOAT_CASE(type, 3) \
            FLOAT_CASE(type, 2) \
            FLOAT_CASE(type, 1) \
            case 17: multiply_tile_##type(group, tile, units, out, out_stride, 1, MOST_GROUPS); break; \
            case 18: multiply_tile_##type(group, tile, units, out, out_stride, 2, MOST_GROUPS); break; \
        } \
    } \
    PRODUCT(type, type##_UNIT_ITEMS, type##_UNIT_BYTES, FLOAT_TILE_ROWS, MOST_GROUPS)

/* dst: tiles of float32; sources: rows of K float32, for experts routes */
WITH void NAME(noodle_arrange)(void *dst, int thread, int threads, void *unused) {
    (void)unused;
    const int64_t length = size_of(source_of(dst, 0), 0);
    struct tiles tiles = tiles_of(dst, FLOAT_TILE_ROWS);
    for (struct tile tile; next_tile_of_thread(&tiles, &tile, thread, threads);) {
        float *to = (float *)data_of(dst) + tile.begin * length;
        for (int64_t row = 0; row < tile.rows; row++) {
            const float *from = activations_of(&tiles, tile.begin + row);
            for (int64_t number = 0; number < length; number++) to[number * tile.rows + row] = from[number];
        }
    }
}

PRODUCT_OF_FLOATS(F32, WITH)
PRODUCT_OF_FLOATS(F16, WITH)
PRODUCT_OF_FLOATS(BF16, WITH)
