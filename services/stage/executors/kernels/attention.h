/* Attention of several tokens of one session to the session's rows, for processors whose file includes this.
 *
 * ggml computes a head's queries against 64 keys at a time, with all that a mask then throws away, and spends the time of a
 * product on lining up what was loaded. Here 16 queries stand side by side in a register, and a number of a key or a value
 * is spread to all of them by its load; each query's greatest score and the sum of its weights stand side by side as well,
 * so that nothing is summed across a register. Queries of all heads that share a head of keys are taken together, token by
 * token: keys after the last of them are not looked at.
 *
 * The softmax is taken as it goes (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018): what was
 * summed is scaled down whenever a greater score is met.
 *
 * Before it is included are defined: WITH (the target), NAME(x), `vector` of LANES floats, PARTS of which are 16, KEYS_AT_ONCE,
 * and on vectors: load, store, spread (of one float), add, subtract, multiply, divide, fused (a * b + c), greater, lesser
 * (the second where one is no number), rounded (to whole numbers), power_of_2 (of whole numbers), where_below (a, b, x, y:
 * x where a < b, else y), from_f16 (so many as a vector has) and from_i8.
 */

#define TILE 16      /* queries side by side */
#define TILES 4      /* that are taken through a block of keys while it is in the first cache */
#define KEYS 32      /* of a block */
#define MOST_DIMENSIONS 256 /* of a head */
#define NO_WINDOW INT64_MAX

#define F32 0 /* ggml's numbers of types */
#define F16 1

struct attention_parameters {
    float scale, cap; /* scores are `cap` * tanh(score * `scale` / `cap`), without a cap (0) score * `scale` */
    int64_t window;   /* a token attends to so many, itself the last one; 0 is to all */
    int64_t type;     /* of K and V: F32, F16, or Q8_0 */
};

/* what one tile of queries has come to */
struct tile {
    float queries[MOST_DIMENSIONS][TILE];
    float sums[MOST_DIMENSIONS][TILE]; /* of values by their weights */
    float greatest[TILE], weight_sums[TILE];
    float last_key[TILE]; /* that a query attends to */
};

/* e^x within 2 units of the last place, 0 below -87; Cephes' polynomial for e^r, |r| <= ln(2) / 2 */
WITH INLINED vector exponential(vector x) {
    const vector bounded = greater(spread(-87.0f), lesser(spread(88.0f), x));
    const vector whole = rounded(multiply(bounded, spread(1.44269504f)));
    vector rest = fused(whole, spread(-0.693359375f), bounded);
    rest = fused(whole, spread(2.12194440e-4f), rest);
    vector sum = fused(rest, spread(1.9875691500e-4f), spread(1.3981999507e-3f));
    sum = fused(sum, rest, spread(8.3334519073e-3f));
    sum = fused(sum, rest, spread(4.1665795894e-2f));
    sum = fused(sum, rest, spread(1.6666665459e-1f));
    sum = fused(sum, rest, spread(5.0000001201e-1f));
    sum = add(fused(sum, multiply(rest, rest), rest), spread(1.0f));
    return where_below(x, spread(-87.0f), spread(0.0f), multiply(sum, power_of_2(whole)));
}

/* tanh(x) = 1 - 2 / (e^2x + 1) */
WITH INLINED vector capped(vector x, float cap) {
    const vector one = spread(1.0f), power = exponential(add(x, x));
    return multiply(spread(cap), subtract(one, divide(spread(2.0f), add(power, one))));
}

WITH INLINED void widen(float *to, const char *from, int64_t dimensions, int64_t type) {
    if (type == F32) {
        memcpy(to, from, dimensions * sizeof(float));
    } else if (type == F16) {
        for (int64_t d = 0; d < dimensions; d += LANES) store(to + d, from_f16(from + 2 * d));
    } else {
        for (int64_t block = 0; block < dimensions / BLOCK; block++, from += BLOCK_BYTES) {
            const vector scale = spread(half_to_float(from));
            for (int64_t d = 0; d < BLOCK; d += LANES)
                store(to + block * BLOCK + d, multiply(scale, from_i8(from + 2 + d)));
        }
    }
}

/* scores [keys][16] of some keys, whose rows stand one behind the other */
WITH INLINED void score(float (*scores)[TILE], const struct tile *tile, const float *keys, int64_t dimensions, const int count) {
    vector sums[KEYS_AT_ONCE][PARTS];
    for (int key = 0; key < count; key++)
        for (int part = 0; part < PARTS; part++) sums[key][part] = spread(0.0f);
    for (int64_t d = 0; d < dimensions; d++) {
        vector queries[PARTS];
        for (int part = 0; part < PARTS; part++) queries[part] = load(tile->queries[d] + part * LANES);
        for (int key = 0; key < count; key++) {
            const vector number = spread(keys[key * dimensions + d]);
            for (int part = 0; part < PARTS; part++) sums[key][part] = fused(queries[part], number, sums[key][part]);
        }
    }
    for (int key = 0; key < count; key++)
        for (int part = 0; part < PARTS; part++) store(scores[key] + part * LANES, sums[key][part]);
}

/* to a tile's sums, some of their dimensions, the values of a block by their weights [keys][16] */
WITH INLINED void weigh(
    struct tile *tile, float (*weights)[TILE], const float *values, int64_t dimensions, int64_t first, int keys,
    const float *factors, const int count) {
    vector sums[KEYS_AT_ONCE][PARTS];
    for (int d = 0; d < count; d++)
        for (int part = 0; part < PARTS; part++)
            sums[d][part] = multiply(load(tile->sums[first + d] + part * LANES), load(factors + part * LANES));
    for (int key = 0; key < keys; key++) {
        vector shares[PARTS];
        for (int part = 0; part < PARTS; part++) shares[part] = load(weights[key] + part * LANES);
        for (int d = 0; d < count; d++) {
            const vector number = spread(values[key * dimensions + first + d]);
            for (int part = 0; part < PARTS; part++) sums[d][part] = fused(shares[part], number, sums[d][part]);
        }
    }
    for (int d = 0; d < count; d++)
        for (int part = 0; part < PARTS; part++) store(tile->sums[first + d] + part * LANES, sums[d][part]);
}

/* Scores become weights, and what the tile had summed is to be multiplied by `factors`. Keys are numbered from `first_key`. */
WITH INLINED void soften(
    struct tile *tile, float (*scores)[TILE], int keys, int64_t first_key, float window, float cap, bool is_masked,
    float *factors) {
    for (int part = 0; part < TILE; part += LANES) {
        const vector last = load(tile->last_key + part), none = spread(-INFINITY);
        const vector before = load(tile->greatest + part);
        vector most = before;
        for (int key = 0; key < keys; key++) {
            vector each = load(scores[key] + part);
            if (cap != 0.0f) each = capped(each, cap);
            if (is_masked) {
                const vector number = spread((float)(first_key + key));
                each = where_below(last, number, none, each);
                each = where_below(subtract(last, spread(window)), number, each, none);
            }
            store(scores[key] + part, each);
            most = greater(most, each);
        }
        const vector factor = exponential(subtract(before, most));
        vector sum = multiply(load(tile->weight_sums + part), factor);
        for (int key = 0; key < keys; key++) {
            const vector weight = exponential(subtract(load(scores[key] + part), most));
            store(scores[key] + part, weight);
            sum = add(sum, weight);
        }
        store(tile->greatest + part, most);
        store(tile->weight_sums + part, sum);
        store(factors + part, factor);
    }
}

/* dst: float32 [dimensions, heads, tokens]; sources: Q float32 [dimensions, tokens, heads], K and V [dimensions, keys, heads
 * of keys], whose last key is the last token's own. */
WITH void NAME(noodle_attend)(void *dst, int thread, int threads, void *given) {
    const struct attention_parameters *parameters = given;
    const void *query = source_of(dst, 0), *key = source_of(dst, 1), *value = source_of(dst, 2);
    const int64_t dimensions = size_of(query, 0), tokens = size_of(query, 1), heads = size_of(query, 2);
    const int64_t key_count = size_of(key, 1), key_heads = size_of(key, 2), shared = heads / key_heads;
    const int64_t window = parameters->window ? parameters->window : NO_WINDOW;
    const float scale = parameters->cap != 0.0f ? parameters->scale / parameters->cap : parameters->scale;
    const int64_t rows = tokens * shared, blocks = (rows + TILE * TILES - 1) / (TILE * TILES);
    float key_rows[KEYS * MOST_DIMENSIONS] __attribute__((aligned(64)));
    float value_rows[KEYS * MOST_DIMENSIONS] __attribute__((aligned(64)));
    float scores[KEYS][TILE] __attribute__((aligned(64))), factors[TILE] __attribute__((aligned(64)));
    struct tile tiles[TILES] __attribute__((aligned(64)));

    for (int64_t item = thread; item < key_heads * blocks; item += threads) {
        const int64_t key_head = item % key_heads, first_row = item / key_heads * TILE * TILES;
        const int64_t end_row = first_row + TILE * TILES < rows ? first_row + TILE * TILES : rows;
        const int64_t tile_count = (end_row - first_row + TILE - 1) / TILE;
        for (int64_t number = 0; number < tile_count * TILE; number++) {
            struct tile *tile = tiles + number / TILE;
            const int64_t lane = number % TILE;
            const int64_t row = first_row + number < rows ? first_row + number : rows - 1; /* beyond: the last one again */
            const int64_t token = row / shared, head = key_head * shared + row % shared;
            const float *from =
                (const float *)(data_of(query) + token * stride_of(query, 1) + head * stride_of(query, 2));
            for (int64_t d = 0; d < dimensions; d++) tile->queries[d][lane] = from[d] * scale;
            for (int64_t d = 0; d < dimensions; d++) tile->sums[d][lane] = 0.0f;
            tile->greatest[lane] = -1e30f; /* finite: where all keys of a block are masked, nothing becomes no number */
            tile->weight_sums[lane] = 0.0f;
            tile->last_key[lane] = (float)(key_count - tokens + token);
        }
        const int64_t first_last = key_count - tokens + first_row / shared;
        const int64_t end_key = key_count - tokens + (end_row - 1) / shared + 1;
        int64_t begin_key = first_last >= window ? first_last - window + 1 : 0;
        for (; begin_key < end_key; begin_key += KEYS) {
            const int keys = (int)(end_key - begin_key < KEYS ? end_key - begin_key : KEYS);
            for (int number = 0; number < keys; number++) {
                const int64_t at = begin_key + number;
                widen(key_rows + number * dimensions, data_of(key) + at * stride_of(key, 1) + key_head * stride_of(key, 2),
                      dimensions, parameters->type);
                widen(value_rows + number * dimensions,
                      data_of(value) + at * stride_of(value, 1) + key_head * stride_of(value, 2), dimensions,
                      parameters->type);
            }
            for (int64_t number = 0; number < tile_count; number++) {
                struct tile *tile = tiles + number;
                const int64_t first = (int64_t)tile->last_key[0], last = (int64_t)tile->last_key[TILE - 1];
                if (begin_key > last || begin_key + keys <= first - window + 1) continue;
                const int seen = (int)(last + 1 - begin_key < keys ? last + 1 - begin_key : keys);
                int done = 0;
                for (; done + KEYS_AT_ONCE <= seen; done += KEYS_AT_ONCE)
                    score(scores + done, tile, key_rows + done * dimensions, dimensions, KEYS_AT_ONCE);
                for (; done < seen; done++) score(scores + done, tile, key_rows + done * dimensions, dimensions, 1);
                const bool is_masked = begin_key + seen - 1 > first || begin_key <= last - window;
                soften(tile, scores, seen, begin_key, (float)window, parameters->cap, is_masked, factors);
                int64_t d = 0;
                for (; d + KEYS_AT_ONCE <= dimensions; d += KEYS_AT_ONCE)
                    weigh(tile, scores, value_rows, dimensions, d, seen, factors, KEYS_AT_ONCE);
                for (; d < dimensions; d++) weigh(tile, scores, value_rows, dimensions, d, seen, factors, 1);
            }
        }
        for (int64_t row = first_row; row < end_row; row++) {
            const struct tile *tile = tiles + (row - first_row) / TILE;
            const int64_t lane = (row - first_row) % TILE, token = row / shared, head = key_head * shared + row % shared;
            float *to = (float *)data_of(dst) + (token * heads + head) * dimensions;
            const float inverse = 1.0f / tile->weight_sums[lane];
            for (int64_t d = 0; d < dimensions; d++) to[d] = tile->sums[d][lane] * inverse;
        }
    }
}
