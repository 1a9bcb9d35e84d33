/* What attention does with one block of 32 keys: scores, weights, and the sum of weighted values.
 *
 * Every result is computed in an order that the including instruction set does not change: a score is summed over the
 * dimensions one after the other, an output over the keys, and lanes of a register are different keys or outputs.
 *
 * The including file defines WITH (the target attribute), NAME(x), OP(x) (the intrinsic for floats), `vector` of LANES floats,
 * ROWS (queries at once, at most 8), KEY_PARTS (vectors of keys at once for several queries), and on vectors: rounded (to
 * integers), power_of_2 (of integers), where_below (a, b, x, y: x where a < b, else y), is_any_above (a, b: a > b in any lane),
 * largest (of a vector), from_f16 and from_i8 (LANES values each) and to_f16.
 */

#define KEYS 32  /* in a block */
#define ITEMS 32 /* in a group of Q8_0 */
#define GROUP_BYTES (KEYS * (2 + ITEMS))
#define F32 0 /* ggml's type numbers */
#define F16 1
#define Q8_0 8
#define BLOCK_PARTS (KEYS / LANES)
#define MOST_BLOCKS 4 /* scored at once */

/* A loop of constant length that is unrolled: arrays that its variable indexes become registers. */
#define EACH(variable, count) _Pragma("GCC unroll 8") for (int variable = 0; variable < (count); variable++)

WITH INLINED vector load(const float *from) { return OP(loadu)(from); }
WITH INLINED void store(float *to, vector x) { OP(storeu)(to, x); }
WITH INLINED vector broadcast(float x) { return OP(set1)(x); }
WITH INLINED vector add(vector x, vector y) { return OP(add)(x, y); }
WITH INLINED vector subtract(vector x, vector y) { return OP(sub)(x, y); }
WITH INLINED vector multiply(vector x, vector y) { return OP(mul)(x, y); }
WITH INLINED vector divide(vector x, vector y) { return OP(div)(x, y); }
WITH INLINED vector fmadd(vector x, vector y, vector z) { return OP(fmadd)(x, y, z); }
/* max and min return the second operand for NaN */
WITH INLINED vector max(vector x, vector y) { return OP(max)(x, y); }
WITH INLINED vector min(vector x, vector y) { return OP(min)(x, y); }

/* e^x within 2 ulp, 0 below -87; Cephes' polynomial for e^r, |r| <= ln(2) / 2 */
WITH INLINED vector exp_approx(vector x) {
    const vector bounded = max(broadcast(-87.0f), min(broadcast(88.0f), x));
    const vector whole = rounded(multiply(bounded, broadcast(1.44269504f)));
    vector rest = fmadd(whole, broadcast(-0.693359375f), bounded);
    rest = fmadd(whole, broadcast(2.12194440e-4f), rest);
    vector sum = fmadd(rest, broadcast(1.9875691500e-4f), broadcast(1.3981999507e-3f));
    sum = fmadd(sum, rest, broadcast(8.3334519073e-3f));
    sum = fmadd(sum, rest, broadcast(4.1665795894e-2f));
    sum = fmadd(sum, rest, broadcast(1.6666665459e-1f));
    sum = fmadd(sum, rest, broadcast(5.0000001201e-1f));
    sum = add(fmadd(sum, multiply(rest, rest), rest), broadcast(1.0f));
    return where_below(x, broadcast(-87.0f), broadcast(0.0f), multiply(sum, power_of_2(whole)));
}
WITH INLINED float exp_of(float x) {
    float found[LANES];
    store(found, exp_approx(broadcast(x)));
    return found[0];
}

/* tanh(x) = 1 - 2 / (e^2x + 1) */
WITH INLINED vector soft_cap(vector x, float cap) {
    const vector one = broadcast(1.0f), power = exp_approx(add(x, x));
    return multiply(broadcast(cap), subtract(one, divide(broadcast(2.0f), add(power, one))));
}

/* sums over keys of a tile's rows, from which the values of more keys can be added or another segment's merged */
struct state {
    float *most;    /* [rows] greatest score */
    float *weights; /* [rows][32] sums of e^(score - most), by key modulo 32 */
    float *sums;    /* [rows][stride] of values times weights */
};

/* `rows` queries [dimensions][ROWS] times the keys of `blocks` blocks: scores [blocks][rows][32], with `next_scores` between
 * blocks. `next_block` is the distance of blocks in memory, 0 if they lie in the cache. */
WITH INLINED void score(
    float *scores, int64_t next_scores, const float *queries, const char *keys, int64_t next_block, int64_t dimensions,
    const int type, const int rows, const int blocks, const int parts) {
    for (int first = 0; first < BLOCK_PARTS; first += parts) {
        vector sums[MOST_BLOCKS][ROWS][BLOCK_PARTS];
        EACH(block, blocks)
            EACH(row, rows)
                EACH(part, parts) sums[block][row][part] = broadcast(0.0f);
        for (int64_t group = 0; group < dimensions; group += ITEMS) {
            const int count = (int)(dimensions - group < ITEMS ? dimensions - group : ITEMS);
            const char *from = keys + group / ITEMS * (type == Q8_0 ? GROUP_BYTES : (type == F16 ? 2 : 4) * KEYS * ITEMS);
            vector scales[MOST_BLOCKS][BLOCK_PARTS];
            if (type == Q8_0)
                EACH(block, blocks)
                    EACH(part, parts)
                        scales[block][part] = from_f16(from + block * next_block + (first + part) * LANES * 2);
            for (int d = 0; d < count; d++) {
                /* The lines of the next blocks, into the L2 cache: the processor itself fetches them too late, and too few
                 * fit on their way into the L1 cache. */
                if (next_block) EACH(block, blocks) {
                    const char *after = from + (blocks + block) * next_block + d * KEYS * (type == F32 ? 4 : type == F16 ? 2 : 1);
                    if (type != Q8_0 || d % 2 == 0) __builtin_prefetch(after, 0, 2);
                    if (type == F32) __builtin_prefetch(after + 64, 0, 2);
                }
                vector numbers[MOST_BLOCKS][BLOCK_PARTS];
                EACH(block, blocks)
                    EACH(part, parts) {
                        const char *base = from + block * next_block;
                        const int at = d * KEYS + (first + part) * LANES;
                        numbers[block][part] =
                            type == F32   ? load((const float *)base + at)
                            : type == F16 ? from_f16(base + 2 * at)
                                          : multiply(scales[block][part], from_i8(base + 2 * KEYS + at));
                    }
                EACH(row, rows) {
                    const vector query = broadcast(queries[(group + d) * ROWS + row]);
                    EACH(block, blocks)
                        EACH(part, parts)
                            sums[block][row][part] = fmadd(query, numbers[block][part], sums[block][row][part]);
                }
            }
        }
        EACH(block, blocks)
            EACH(row, rows)
                EACH(part, parts)
                    store(scores + block * next_scores + row * KEYS + (first + part) * LANES, sums[block][row][part]);
    }
}

/* Add the values of keys [begin, end) times weights [rows][32] to `parts` vectors of sums [rows][stride] from `first` on. */
WITH INLINED void weigh(
    float *sums, int64_t stride, const float *weights, const char *values, const float *scales, int64_t dimensions,
    int64_t first, int64_t next_block, int begin, int end, const int type, const int rows, const int parts) {
    vector totals[ROWS][8];
    EACH(row, rows)
        EACH(part, parts) totals[row][part] = load(sums + row * stride + first + part * LANES);
    for (int key = begin; key < end; key++) {
        vector numbers[8];
        EACH(part, parts) {
            const int64_t d = first + part * LANES;
            if (next_block) {
                if (type == F32) __builtin_prefetch(values + next_block + 4 * (key * dimensions + d), 0, 2);
                if (type == F16 && part % BLOCK_PARTS == 0)
                    __builtin_prefetch(values + next_block + 2 * (key * dimensions + d), 0, 2);
                if (type == Q8_0 && part % BLOCK_PARTS == 0 && key % 2 == 0)
                    __builtin_prefetch(values + next_block + d / ITEMS * GROUP_BYTES + 2 * KEYS + key * ITEMS, 0, 2);
            }
            if (type == F32) {
                numbers[part] = load((const float *)values + key * dimensions + d);
            } else if (type == F16) {
                numbers[part] = from_f16(values + 2 * (key * dimensions + d));
            } else {
                const char *from = values + d / ITEMS * GROUP_BYTES + 2 * KEYS + key * ITEMS + d % ITEMS;
                numbers[part] = multiply(broadcast(scales[d / ITEMS * KEYS + key]), from_i8(from));
            }
        }
        EACH(row, rows) {
            const vector weight = broadcast(weights[row * KEYS + key]);
            EACH(part, parts) totals[row][part] = fmadd(weight, numbers[part], totals[row][part]);
        }
    }
    EACH(row, rows)
        EACH(part, parts) store(sums + row * stride + first + part * LANES, totals[row][part]);
}

/* Blocks that are scored at once: one or two queries fill too few registers to hide the latency of their additions. */
#define AT_ONCE(rows) ((rows) <= 2 && 8 / BLOCK_PARTS / (rows) > 1 ? 8 / BLOCK_PARTS / (rows) : 1)
/* vectors of outputs at once */
#define MANY_PARTS(rows) ((rows) == 1 ? 8 : (rows) <= 3 ? 4 : 2)

/* As `score`, for any number of rows and blocks. */
WITH INLINED void score_blocks(
    float *scores, int64_t next_scores, const float *queries, const char *keys, int64_t next_block, int64_t dimensions,
    const int type, const int rows, int blocks) {
    const int parts = rows <= 2 ? BLOCK_PARTS : KEY_PARTS;
    int block = 0;
    for (; block + AT_ONCE(rows) <= blocks; block += AT_ONCE(rows))
        score(scores + block * next_scores, next_scores, queries, keys + block * next_block, next_block, dimensions, type,
              rows, AT_ONCE(rows), parts);
    if (AT_ONCE(rows) > 1)
        for (; block < blocks; block++)
            score(scores + block * next_scores, next_scores, queries, keys + block * next_block, next_block, dimensions,
                  type, rows, 1, parts);
}

/* As `weigh`, for all outputs. `stride` is a multiple of 32, and values have as many dimensions. */
WITH INLINED void weigh_rows(
    float *sums, int64_t stride, const float *weights, const char *values, const float *scales, int64_t dimensions,
    int64_t next_block, int begin, int end, const int type, const int rows) {
    int64_t d = 0;
    for (; d + MANY_PARTS(rows) * LANES <= dimensions; d += MANY_PARTS(rows) * LANES)
        weigh(sums, stride, weights, values, scales, dimensions, d, next_block, begin, end, type, rows, MANY_PARTS(rows));
    if (MANY_PARTS(rows) > 2)
        for (; d < dimensions; d += 2 * LANES)
            weigh(sums, stride, weights, values, scales, dimensions, d, next_block, begin, end, type, rows, 2);
}

#define SCORE_CASE(type, rows) \
    case rows: score_blocks(scores, next_scores, queries, keys, next_block, dimensions, type, rows, blocks); break;
#define WEIGH_CASE(type, rows) \
    case rows: weigh_rows(sums, stride, weights, values, scales, dimensions, next_block, begin, end, type, rows); break;
#if ROWS == 8
#define FOR_ROWS(CASE_OF, type) \
    CASE_OF(type, 1) CASE_OF(type, 2) CASE_OF(type, 3) CASE_OF(type, 4) CASE_OF(type, 5) CASE_OF(type, 6) \
    CASE_OF(type, 7) CASE_OF(type, 8)
#else
#define FOR_ROWS(CASE_OF, type) \
    CASE_OF(type, 1) CASE_OF(type, 2) CASE_OF(type, 3) CASE_OF(type, 4) CASE_OF(type, 5) CASE_OF(type, 6)
#endif

#define OF_TYPE(name, type) \
    WITH static void NAME(score_##name)( \
        float *scores, int64_t next_scores, const float *queries, const char *keys, int64_t next_block, int64_t dimensions, \
        int rows, int blocks) { \
        switch (rows) { FOR_ROWS(SCORE_CASE, type) } \
    } \
    WITH static void NAME(weigh_##name)( \
        float *sums, int64_t stride, const float *weights, const char *values, const float *scales, int64_t dimensions, \
        int64_t next_block, int begin, int end, int rows) { \
        switch (rows) { FOR_ROWS(WEIGH_CASE, type) } \
    }

OF_TYPE(f32, F32)
OF_TYPE(f16, F16)
OF_TYPE(q8_0, Q8_0)
