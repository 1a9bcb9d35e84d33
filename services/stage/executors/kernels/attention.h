/* Attention of several tokens of one session over its KV rows. Each source file includes this for one instruction set.
 *
 * ggml computes a head's queries against 64 keys at a time, including keys that the mask then discards, and spends as long on
 * shuffling loaded values as on the product. Here 16 queries lie side by side in a register, and each loaded element of a key
 * or value is broadcast to all of them. The maximum score and the weight sum of each query lie side by side too, so nothing is
 * reduced across a register. The queries of all heads that share a KV head are processed together, token by token; keys after
 * the last of these tokens are not read.
 *
 * The softmax is online (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018): when a larger score
 * appears, the sums accumulated so far are scaled down.
 *
 * The including file defines WITH (the target attribute), NAME(x), OP(x) (the intrinsic for floats), `vector` of LANES floats,
 * PARTS (vectors for 16 floats), UNROLL, and on vectors: rounded (to integers), power_of_2 (of integers), where_below (a, b, x,
 * y: x where a < b, else y), from_f16 and from_i8 (LANES values each).
 */

#define TILE 16      /* queries side by side */
#define TILES 4      /* processed per block of keys while the block is in the L1 cache */
#define KEYS 32      /* in a block */
#define MAX_HEAD_DIM 256
#define NO_WINDOW INT64_MAX

#define F32 0 /* ggml's type numbers */
#define F16 1

struct attention_parameters {
    float scale, cap; /* score = cap * tanh(q.k * scale / cap), or q.k * scale if cap is 0 */
    int64_t window;   /* number of keys a token attends to, its own included; 0 means all */
    int64_t type;     /* of K and V: F32, F16, or Q8_0 */
};

/* state of one tile of queries */
struct tile {
    float queries[MAX_HEAD_DIM][TILE];
    float sums[MAX_HEAD_DIM][TILE]; /* values times weights, not yet normalized */
    float max_score[TILE], weight_sums[TILE];
    float last_key[TILE]; /* that the query attends to */
};

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

/* tanh(x) = 1 - 2 / (e^2x + 1) */
WITH INLINED vector soft_cap(vector x, float cap) {
    const vector one = broadcast(1.0f), power = exp_approx(add(x, x));
    return multiply(broadcast(cap), subtract(one, divide(broadcast(2.0f), add(power, one))));
}

WITH INLINED void widen(float *to, const char *from, int64_t dimensions, int64_t type) {
    if (type == F32) {
        memcpy(to, from, dimensions * sizeof(float));
    } else if (type == F16) {
        for (int64_t d = 0; d < dimensions; d += LANES) store(to + d, from_f16(from + 2 * d));
    } else {
        for (int64_t block = 0; block < dimensions / BLOCK; block++, from += BLOCK_BYTES) {
            const vector scale = broadcast(half_to_float(from));
            for (int64_t d = 0; d < BLOCK; d += LANES)
                store(to + block * BLOCK + d, multiply(scale, from_i8(from + 2 + d)));
        }
    }
}

/* scores [count][16] of `count` consecutive keys */
WITH INLINED void score(float (*scores)[TILE], const struct tile *tile, const float *keys, int64_t dimensions, const int count) {
    vector sums[UNROLL][PARTS];
    for (int key = 0; key < count; key++)
        for (int part = 0; part < PARTS; part++) sums[key][part] = broadcast(0.0f);
    for (int64_t d = 0; d < dimensions; d++) {
        vector queries[PARTS];
        for (int part = 0; part < PARTS; part++) queries[part] = load(tile->queries[d] + part * LANES);
        for (int key = 0; key < count; key++) {
            const vector number = broadcast(keys[key * dimensions + d]);
            for (int part = 0; part < PARTS; part++) sums[key][part] = fmadd(queries[part], number, sums[key][part]);
        }
    }
    for (int key = 0; key < count; key++)
        for (int part = 0; part < PARTS; part++) store(scores[key] + part * LANES, sums[key][part]);
}

/* Rescale the sums of dimensions [first, first + count) by `factors` and add values times weights [keys][16]. */
WITH INLINED void accumulate(
    struct tile *tile, float (*weights)[TILE], const float *values, int64_t dimensions, int64_t first, int keys,
    const float *factors, const int count) {
    vector sums[UNROLL][PARTS];
    for (int d = 0; d < count; d++)
        for (int part = 0; part < PARTS; part++)
            sums[d][part] = multiply(load(tile->sums[first + d] + part * LANES), load(factors + part * LANES));
    for (int key = 0; key < keys; key++) {
        vector shares[PARTS];
        for (int part = 0; part < PARTS; part++) shares[part] = load(weights[key] + part * LANES);
        for (int d = 0; d < count; d++) {
            const vector number = broadcast(values[key * dimensions + first + d]);
            for (int part = 0; part < PARTS; part++) sums[d][part] = fmadd(shares[part], number, sums[d][part]);
        }
    }
    for (int d = 0; d < count; d++)
        for (int part = 0; part < PARTS; part++) store(tile->sums[first + d] + part * LANES, sums[d][part]);
}

/* Replace the scores of keys from `first_key` on by weights, and set the `factors` by which earlier sums must be scaled. */
WITH INLINED void online_softmax(
    struct tile *tile, float (*scores)[TILE], int keys, int64_t first_key, float window, float cap, bool is_masked,
    float *factors) {
    for (int part = 0; part < TILE; part += LANES) {
        const vector last = load(tile->last_key + part), none = broadcast(-INFINITY);
        const vector before = load(tile->max_score + part);
        vector most = before;
        for (int key = 0; key < keys; key++) {
            vector each = load(scores[key] + part);
            if (cap != 0.0f) each = soft_cap(each, cap);
            if (is_masked) {
                const vector number = broadcast((float)(first_key + key));
                each = where_below(last, number, none, each);
                each = where_below(subtract(last, broadcast(window)), number, each, none);
            }
            store(scores[key] + part, each);
            most = max(most, each);
        }
        const vector factor = exp_approx(subtract(before, most));
        vector sum = multiply(load(tile->weight_sums + part), factor);
        for (int key = 0; key < keys; key++) {
            const vector weight = exp_approx(subtract(load(scores[key] + part), most));
            store(scores[key] + part, weight);
            sum = add(sum, weight);
        }
        store(tile->max_score + part, most);
        store(tile->weight_sums + part, sum);
        store(factors + part, factor);
    }
}

/* dst: float32 [dimensions, heads, tokens]; sources: Q float32 [dimensions, tokens, heads], K and V [dimensions, keys,
 * kv_heads]. The last key belongs to the last token. */
WITH void NAME(noodle_attend)(void *dst, int thread, int threads, void *given) {
    const struct attention_parameters *parameters = given;
    const void *query = source_of(dst, 0), *key = source_of(dst, 1), *value = source_of(dst, 2);
    const int64_t dimensions = size_of(query, 0), tokens = size_of(query, 1), heads = size_of(query, 2);
    const int64_t key_count = size_of(key, 1), key_heads = size_of(key, 2), shared = heads / key_heads;
    const int64_t window = parameters->window ? parameters->window : NO_WINDOW;
    const float scale = parameters->cap != 0.0f ? parameters->scale / parameters->cap : parameters->scale;
    const int64_t rows = tokens * shared, blocks = (rows + TILE * TILES - 1) / (TILE * TILES);
    float key_rows[KEYS * MAX_HEAD_DIM] __attribute__((aligned(64)));
    float value_rows[KEYS * MAX_HEAD_DIM] __attribute__((aligned(64)));
    float scores[KEYS][TILE] __attribute__((aligned(64))), factors[TILE] __attribute__((aligned(64)));
    struct tile tiles[TILES] __attribute__((aligned(64)));

    for (int64_t item = thread; item < key_heads * blocks; item += threads) {
        const int64_t key_head = item % key_heads, first_row = item / key_heads * TILE * TILES;
        const int64_t end_row = first_row + TILE * TILES < rows ? first_row + TILE * TILES : rows;
        const int64_t tile_count = (end_row - first_row + TILE - 1) / TILE;
        for (int64_t number = 0; number < tile_count * TILE; number++) {
            struct tile *tile = tiles + number / TILE;
            const int64_t lane = number % TILE;
            const int64_t row = first_row + number < rows ? first_row + number : rows - 1; /* padding repeats the last row */
            const int64_t token = row / shared, head = key_head * shared + row % shared;
            const float *from =
                (const float *)(data_of(query) + token * stride_of(query, 1) + head * stride_of(query, 2));
            for (int64_t d = 0; d < dimensions; d++) tile->queries[d][lane] = from[d] * scale;
            for (int64_t d = 0; d < dimensions; d++) tile->sums[d][lane] = 0.0f;
            tile->max_score[lane] = -1e30f; /* finite: a fully masked block must not produce NaN */
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
                for (; done + UNROLL <= seen; done += UNROLL)
                    score(scores + done, tile, key_rows + done * dimensions, dimensions, UNROLL);
                for (; done < seen; done++) score(scores + done, tile, key_rows + done * dimensions, dimensions, 1);
                const bool is_masked = begin_key + seen - 1 > first || begin_key <= last - window;
                online_softmax(tile, scores, seen, begin_key, (float)window, parameters->cap, is_masked, factors);
                int64_t d = 0;
                for (; d + UNROLL <= dimensions; d += UNROLL)
                    accumulate(tile, scores, value_rows, dimensions, d, seen, factors, UNROLL);
                for (; d < dimensions; d++) accumulate(tile, scores, value_rows, dimensions, d, seen, factors, 1);
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
