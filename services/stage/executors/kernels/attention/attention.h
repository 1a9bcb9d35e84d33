/* Attention of a step's tokens, each over its session's rows (rows.h). Each source file includes this for one
 * instruction set.
 *
 * A token's result is the same to the last bit whether it comes alone, in a chunk of any size or beside other sessions, with
 * any number of threads and any instruction set:
 *   - Keys are processed in blocks of 32 at fixed positions of the session. In a block, the softmax is online (Milakov and
 *     Gimelshein, "Online normalizer calculation for softmax", 2018): when a larger score appears, the sums are scaled down.
 *   - Blocks are collected in segments of 512 keys at fixed positions, each with sums of its own, which are merged in order.
 *   - Keys that a token does not attend to add nothing, not even zeros: they may be infinite.
 *
 * Rows are the queries of all heads that share a KV head, token by token. Up to ROWS of them are processed together, so a
 * lone token reads K and V once for all these heads. Several such groups, a tile, share a block that is widened to float32 in
 * the L1 cache. Where tiles are too few for the threads, as with a lone token, segments are computed by different threads,
 * and the last one merges them.
 */

#define SEGMENT 16         /* blocks */
#define TILE_ROWS 64       /* at most */
#define TILE_FLOATS 65536  /* of a tile's queries and sums at most, unless that were less than ROWS */
#define NO_WINDOW INT64_MAX
#define NOTHING -1e30f /* a maximum of no scores; finite, since its distance from itself must be 0 */

struct attention_fields {
    struct work work;
    const struct step *step;
    int64_t type, key_area, value_area; /* the same area for latent attention: V is the beginning of K */
    int64_t window;                     /* number of keys a token attends to, its own included; 0 means all */
    int64_t key_heads, value_dim;
    float scale, cap; /* score = cap * tanh(q.k * scale / cap), or q.k * scale if cap is 0 */
};

/* an operation's values that all its parts share */
struct attention {
    void *dst;
    const void *query, *sinks; /* a score of each head that has no value; may be null */
    const struct attention_fields *fields;
    int64_t type, key_dim, value_dim, stride; /* value_dim rounded up to 32 */
    int64_t heads, key_heads, shared;         /* query heads for each KV head */
    int64_t window, tile_rows;
    bool is_split, is_latent;
};

/* some rows of one span and KV head */
struct tile {
    const struct span *span;
    int64_t first_token; /* of the span, in the step */
    int64_t head, first_row, rows, group_rows; /* group_rows are processed together, at most ROWS */
    int64_t first_segment, segments;
};

#define DIRECT_GROUPS 2 /* read a block as it is kept; more share a block that is widened first */

/* memory of one thread; each group of rows has its queries in [key_dim][ROWS] */
struct room {
    float *queries, *keys, *values, *scores, *scales;
    struct state segment, total;
};

/* keys [begin, end) of a block that a row attends to */
struct seen {
    int begin, end;
};

INLINED int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }
INLINED int64_t most_of(int64_t x, int64_t y) { return x > y ? x : y; }
INLINED int64_t position_of(const struct attention *attention, const struct tile *tile, int64_t row) {
    return tile->span->first_position + (tile->first_row + row) / attention->shared;
}
INLINED int64_t first_key_of(const struct attention *attention, int64_t position) {
    return position >= attention->window ? position - attention->window + 1 : 0;
}
INLINED struct seen seen_of(const struct attention *attention, int64_t position, int64_t block) {
    const int64_t begin = first_key_of(attention, position) - block * KEYS, end = position + 1 - block * KEYS;
    return (struct seen){(int)(begin < 0 ? 0 : least(begin, KEYS)), (int)(end < 0 ? 0 : least(end, KEYS))};
}

/* Turn a row's scores of a block into weights, and add these to the row's sum; a greater score scales earlier sums down. */
WITH INLINED void soften(
    float *scores, const struct attention *attention, const struct state *state, int64_t row, struct seen seen) {
    static const float numbers[KEYS] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                        16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    float *weights = state->weights + row * KEYS;
    const float cap = attention->fields->cap;
    vector each[BLOCK_PARTS], most = broadcast(state->most[row]);
    bool is_greater = false;
    for (int part = 0; part < BLOCK_PARTS; part++) {
        each[part] = load(scores + part * LANES);
        if (cap != 0.0f) each[part] = soft_cap(each[part], cap);
        if (seen.begin > 0 || seen.end < KEYS) {
            const vector number = load(numbers + part * LANES), none = broadcast(-INFINITY);
            each[part] = where_below(number, broadcast((float)seen.begin), none, each[part]);
            each[part] = where_below(number, broadcast((float)seen.end), each[part], none);
        }
        is_greater |= is_any_above(each[part], most);
    }
    if (is_greater) {
        vector greatest = each[0];
        for (int part = 1; part < BLOCK_PARTS; part++) greatest = max(each[part], greatest);
        const float found = largest(greatest), before = state->most[row];
        state->most[row] = found > before ? found : before;
        most = broadcast(state->most[row]);
        const vector factor = exp_approx(subtract(broadcast(before), most));
        for (int part = 0; part < BLOCK_PARTS; part++)
            store(weights + part * LANES, multiply(load(weights + part * LANES), factor));
        float *sums = state->sums + row * attention->stride;
        for (int64_t d = 0; d < attention->stride; d += LANES) store(sums + d, multiply(load(sums + d), factor));
    }
    for (int part = 0; part < BLOCK_PARTS; part++) {
        const vector weight = exp_approx(subtract(each[part], most));
        store(scores + part * LANES, weight);
        store(weights + part * LANES, add(load(weights + part * LANES), weight));
    }
}

WITH INLINED void weigh_any(
    const struct attention *attention, int64_t type, float *sums, const float *weights, const char *values,
    const float *scales, int64_t next_block, struct seen seen, int rows) {
    const int64_t stride = attention->stride;
    if (seen.begin >= seen.end) return;
    if (type == F32)
        NAME(weigh_f32)(sums, stride, weights, values, scales, stride, next_block, seen.begin, seen.end, rows);
    else if (type == F16)
        NAME(weigh_f16)(sums, stride, weights, values, scales, stride, next_block, seen.begin, seen.end, rows);
    else
        NAME(weigh_q8_0)(sums, stride, weights, values, scales, stride, next_block, seen.begin, seen.end, rows);
}

/* Add the weighted values of a block to `rows` rows: at once for keys that all of them attend to, the others row by row. */
WITH INLINED void weigh_group(
    const struct attention *attention, const struct tile *tile, const struct room *room, int64_t type, const char *values,
    int64_t next_block, const float *weights, int64_t first, int rows, int64_t block) {
    struct seen shared = {0, KEYS}, each[ROWS];
    float *sums = room->segment.sums + first * attention->stride;
    for (int row = 0; row < rows; row++) {
        each[row] = seen_of(attention, position_of(attention, tile, first + row), block);
        if (each[row].begin > shared.begin) shared.begin = each[row].begin;
        if (each[row].end < shared.end) shared.end = each[row].end;
    }
    if (shared.begin > shared.end) shared = (struct seen){KEYS, KEYS};
    for (int row = 0; row < rows; row++) {
        const struct seen before = {each[row].begin, each[row].end < shared.begin ? each[row].end : shared.begin};
        weigh_any(attention, type, sums + row * attention->stride, weights + row * KEYS, values, room->scales, next_block,
                  before, 1);
    }
    weigh_any(attention, type, sums, weights, values, room->scales, next_block, shared, rows);
    for (int row = 0; row < rows; row++) {
        const struct seen after = {each[row].begin > shared.end ? each[row].begin : shared.end, each[row].end};
        weigh_any(attention, type, sums + row * attention->stride, weights + row * KEYS, values, room->scales, next_block,
                  after, 1);
    }
}

WITH INLINED void score_any(
    const struct attention *attention, int64_t type, float *scores, int64_t next_scores, const float *queries,
    const char *keys, int64_t next_block, int rows, int blocks) {
    if (type == F32)
        NAME(score_f32)(scores, next_scores, queries, keys, next_block, attention->key_dim, rows, blocks);
    else if (type == F16)
        NAME(score_f16)(scores, next_scores, queries, keys, next_block, attention->key_dim, rows, blocks);
    else
        NAME(score_q8_0)(scores, next_scores, queries, keys, next_block, attention->key_dim, rows, blocks);
}

/* K of a block in float32 [dimensions][32] */
WITH INLINED const char *widened_keys(const struct attention *attention, float *to, const char *from) {
    const int64_t dimensions = attention->key_dim;
    if (attention->type == F32) return from;
    if (attention->type == F16) {
        for (int64_t at = 0; at < dimensions * KEYS; at += LANES) store(to + at, from_f16(from + 2 * at));
        return (const char *)to;
    }
    for (int64_t group = 0; group < dimensions; group += ITEMS, from += GROUP_BYTES) {
        for (int part = 0; part < KEYS; part += LANES) {
            const vector scale = from_f16(from + 2 * part);
            for (int d = 0; d < ITEMS; d++)
                store(to + (group + d) * KEYS + part, multiply(scale, from_i8(from + 2 * KEYS + d * KEYS + part)));
        }
    }
    return (const char *)to;
}

/* the scales of V of a block in Q8_0, float32 [groups][32] */
WITH INLINED void widen_scales(const struct attention *attention, float *to, const char *from) {
    for (int64_t group = 0; group < attention->value_dim; group += ITEMS, to += KEYS, from += GROUP_BYTES)
        for (int part = 0; part < KEYS; part += LANES) store(to + part, from_f16(from + 2 * part));
}

/* V of a block in float32 [32][stride]; the numbers beyond value_dim are zeros */
WITH INLINED const char *widened_values(const struct attention *attention, const struct room *room, const char *from) {
    const int64_t dimensions = attention->value_dim, stride = attention->stride, type = attention->type;
    if (type == F32 && stride == dimensions) return from;
    for (int64_t key = 0; key < KEYS; key++) {
        float *to = room->values + key * stride;
        int64_t d = 0;
        if (type == F32)
            for (; d < dimensions; d++) memcpy(to + d, from + 4 * (key * dimensions + d), 4);
        else if (type == F16) {
            for (; d + LANES <= dimensions; d += LANES) store(to + d, from_f16(from + 2 * (key * dimensions + d)));
            for (; d < dimensions; d++) to[d] = half_to_float(from + 2 * (key * dimensions + d));
        } else
            for (; d < dimensions; d += LANES)
                store(to + d, multiply(broadcast(room->scales[d / ITEMS * KEYS + key]),
                                       from_i8(from + d / ITEMS * GROUP_BYTES + 2 * KEYS + key * ITEMS + d % ITEMS)));
        for (; d < stride; d++) to[d] = 0.0f;
    }
    return (const char *)room->values;
}

/* V of latent attention [32][stride] from widened K */
WITH INLINED const char *turned(const struct attention *attention, const struct room *room, const char *widened) {
    const float *from = (const float *)widened;
    const int64_t dimensions = attention->value_dim, stride = attention->stride;
    for (int64_t first = 0; first < dimensions; first += 16)
        for (int64_t key = 0; key < KEYS; key++)
            for (int64_t d = first; d < least(first + 16, dimensions); d++)
                room->values[key * stride + d] = from[d * KEYS + key];
    for (int64_t key = 0; key < KEYS; key++)
        for (int64_t d = dimensions; d < stride; d++) room->values[key * stride + d] = 0.0f;
    return (const char *)room->values;
}

/* Set the sums of a tile's rows over a segment. */
WITH static void NAME(attend_segment)(
    const struct attention *attention, const struct tile *tile, const struct room *room, int64_t segment) {
    const struct state *state = &room->segment;
    const int64_t first_key = first_key_of(attention, position_of(attention, tile, 0));
    const int64_t last_key = position_of(attention, tile, tile->rows - 1), type = attention->type;
    const int64_t end = least(last_key / KEYS + 1, (segment + 1) * SEGMENT);
    const int64_t key_bytes = block_bytes(attention->key_dim, type), value_bytes = block_bytes(attention->value_dim, type);
    const int64_t next_block = key_bytes * attention->key_heads, next_values = value_bytes * attention->key_heads;
    const int64_t group_rows = tile->group_rows, next_scores = tile->rows * KEYS;
    const bool is_direct = tile->rows <= DIRECT_GROUPS * ROWS && !attention->is_latent && attention->value_dim == attention->stride;
    for (int64_t row = 0; row < tile->rows; row++) state->most[row] = NOTHING;
    memset(state->weights, 0, tile->rows * KEYS * sizeof(float));
    memset(state->sums, 0, tile->rows * attention->stride * sizeof(float));
    int64_t blocks;
    for (int64_t block = most_of(first_key / KEYS, segment * SEGMENT); block < end; block += blocks) {
        blocks = is_direct ? least(MOST_BLOCKS, end - block) : 1;
        const char *keys =
            block_of(tile->span, attention->fields->key_area, block, tile->head, attention->key_heads, key_bytes);
        if (!is_direct) keys = widened_keys(attention, room->keys, keys);
        for (int64_t first = 0; first < tile->rows; first += group_rows)
            score_any(attention, is_direct ? type : F32, room->scores + first * KEYS, next_scores,
                      room->queries + first / group_rows * ROWS * attention->key_dim, keys, is_direct ? next_block : 0,
                      (int)least(group_rows, tile->rows - first), (int)blocks);
        for (int64_t number = block; number < block + blocks; number++) {
            float *scores = room->scores + (number - block) * next_scores;
            for (int64_t row = 0; row < tile->rows; row++) {
                const struct seen seen = seen_of(attention, position_of(attention, tile, row), number);
                if (seen.begin < seen.end) soften(scores + row * KEYS, attention, state, row, seen);
            }
            const char *values = block_of(
                tile->span, attention->fields->value_area, number, tile->head, attention->key_heads, value_bytes);
            if (type == Q8_0 && !attention->is_latent) widen_scales(attention, room->scales, values);
            if (attention->is_latent)
                values = turned(attention, room, keys);
            else if (!is_direct)
                values = widened_values(attention, room, values);
            for (int64_t first = 0; first < tile->rows; first += group_rows)
                weigh_group(attention, tile, room, is_direct ? type : F32, values, is_direct ? next_values : 0,
                            scores + first * KEYS, first, (int)least(group_rows, tile->rows - first), number);
        }
    }
    for (int64_t row = 0; row < tile->rows; row++) /* a tree of fixed shape */
        for (int half = KEYS / 2; half; half /= 2)
            for (int lane = 0; lane < half; lane++)
                state->weights[row * KEYS + lane] += state->weights[row * KEYS + half + lane];
}

/* Merge a segment's sums of one row into the total. */
WITH INLINED void merge(
    const struct attention *attention, const struct state *total, int64_t row, float most, float weight, const float *sums) {
    const float before = total->most[row], after = most > before ? most : before;
    const float kept = exp_of(before - after), added = exp_of(most - after);
    float *to = total->sums + row * attention->stride, weights[LANES];
    total->most[row] = after;
    store(weights, fmadd(broadcast(weight), broadcast(added), multiply(broadcast(total->weights[row]), broadcast(kept))));
    total->weights[row] = weights[0];
    for (int64_t d = 0; d < attention->stride; d += LANES)
        store(to + d, fmadd(load(sums + d), broadcast(added), multiply(load(to + d), broadcast(kept))));
}

INLINED bool sees_segment(const struct attention *attention, const struct tile *tile, int64_t row, int64_t segment) {
    const int64_t position = position_of(attention, tile, row), first_key = segment * SEGMENT * KEYS;
    return position >= first_key && first_key_of(attention, position) < first_key + SEGMENT * KEYS;
}

INLINED void clear(const struct attention *attention, const struct state *total, int64_t rows) {
    for (int64_t row = 0; row < rows; row++) total->most[row] = NOTHING;
    memset(total->weights, 0, rows * sizeof(float));
    memset(total->sums, 0, rows * attention->stride * sizeof(float));
}

WITH INLINED void load_queries(const struct attention *attention, const struct tile *tile, const struct room *room) {
    const float cap = attention->fields->cap, scale = cap != 0.0f ? attention->fields->scale / cap : attention->fields->scale;
    for (int64_t row = 0; row < tile->rows; row++) {
        const int64_t number = tile->first_row + row, token = tile->first_token + number / attention->shared;
        const int64_t head = tile->head * attention->shared + number % attention->shared;
        const float *from = (const float *)(data_of(attention->query) + head * stride_of(attention->query, 1) +
                                            token * stride_of(attention->query, 2));
        float *to = room->queries + row / tile->group_rows * ROWS * attention->key_dim + row % tile->group_rows;
        for (int64_t d = 0; d < attention->key_dim; d++) to[d * ROWS] = from[d] * scale;
    }
}

/* Add a score that has a weight and no value. */
WITH INLINED void add_sink(const struct attention *attention, const struct state *total, int64_t row, float sink) {
    const float before = total->most[row], after = sink > before ? sink : before;
    const vector kept = broadcast(exp_of(before - after));
    float *sums = total->sums + row * attention->stride, weights[LANES];
    store(weights, fmadd(broadcast(total->weights[row]), kept, broadcast(exp_of(sink - after))));
    total->weights[row] = weights[0];
    for (int64_t d = 0; d < attention->stride; d += LANES) store(sums + d, multiply(load(sums + d), kept));
}

/* Divide the sums by the weights and write the results. */
WITH INLINED void write_results(const struct attention *attention, const struct tile *tile, const struct state *total) {
    for (int64_t row = 0; row < tile->rows; row++) {
        const int64_t number = tile->first_row + row, token = tile->first_token + number / attention->shared;
        const int64_t head = tile->head * attention->shared + number % attention->shared;
        float *to = (float *)data_of(attention->dst) + (token * attention->heads + head) * attention->value_dim;
        if (attention->sinks) add_sink(attention, total, row, ((const float *)data_of(attention->sinks))[head]);
        const float inverse = 1.0f / total->weights[row], *sums = total->sums + row * attention->stride;
        for (int64_t d = 0; d < attention->value_dim; d++) to[d] = sums[d] * inverse;
    }
}
