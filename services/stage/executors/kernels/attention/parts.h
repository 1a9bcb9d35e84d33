/* How an operation's attention (attention.h) is cut into parts, which threads claim. No result depends on it. */

#define PARTS_PER_THREAD 4 /* fewer tiles are cut into more */
#define SPLIT_ROWS 16      /* of a tile whose segments are computed by different threads at most */

/* The last finisher of a split tile merges all segments in order. In the scratch memory a segment has, for each row, its
 * maximum, its weight and its sums; the counters of all tiles lie before them. */
#define MOST_SPLIT_TILES 512
struct split {
    _Atomic int64_t *finished; /* segments of the tile */
    float *segments;
    int64_t floats; /* of a segment */
};

WITH static void NAME(attend_split)(
    const struct attention *attention, const struct tile *tile, const struct room *room, int64_t number, struct split split) {
    const int64_t stride = attention->stride, row_floats = stride + 2;
    NAME(attend_segment)(attention, tile, room, tile->first_segment + number);
    float *to = split.segments + number * split.floats;
    for (int64_t row = 0; row < tile->rows; row++, to += row_floats) {
        to[0] = room->segment.most[row];
        to[1] = room->segment.weights[row * KEYS];
        memcpy(to + 2, room->segment.sums + row * stride, stride * sizeof(float));
    }
    if (atomic_fetch_add_explicit(split.finished, 1, memory_order_acq_rel) != tile->segments - 1) return;
    atomic_store_explicit(split.finished, 0, memory_order_relaxed); /* the graph's barrier publishes it */
    clear(attention, &room->total, tile->rows);
    for (int64_t segment = 0; segment < tile->segments; segment++)
        for (int64_t row = 0; row < tile->rows; row++) {
            const float *from = split.segments + segment * split.floats + row * row_floats;
            if (sees_segment(attention, tile, row, tile->first_segment + segment))
                merge(attention, &room->total, row, from[0], from[1], from + 2);
        }
    write_results(attention, tile, &room->total);
}

WITH static void NAME(attend_tile)(const struct attention *attention, const struct tile *tile, const struct room *room) {
    clear(attention, &room->total, tile->rows);
    for (int64_t number = 0; number < tile->segments; number++) {
        const int64_t segment = tile->first_segment + number;
        NAME(attend_segment)(attention, tile, room, segment);
        for (int64_t row = 0; row < tile->rows; row++)
            if (sees_segment(attention, tile, row, segment))
                merge(attention, &room->total, row, room->segment.most[row], room->segment.weights[row * KEYS],
                      room->segment.sums + row * attention->stride);
    }
    write_results(attention, tile, &room->total);
}

INLINED int64_t tiles_of(const struct attention *attention, const struct span *span) {
    return (span->tokens * attention->shared + attention->tile_rows - 1) / attention->tile_rows;
}
INLINED int64_t segments_of(const struct attention *attention, const struct span *span) {
    return (span->first_position + span->tokens - 1) / (SEGMENT * KEYS) -
           first_key_of(attention, span->first_position) / (SEGMENT * KEYS) + 1;
}
/* whether different threads compute the segments of a span's tile */
INLINED bool is_split_span(const struct attention *attention, const struct span *span) {
    return attention->is_split && span->tokens * attention->shared <= SPLIT_ROWS;
}
INLINED int64_t parts_of(const struct attention *attention, const struct span *span) {
    return attention->key_heads * (is_split_span(attention, span) ? segments_of(attention, span) : tiles_of(attention, span));
}

/* Choose how the operation is cut into parts; no result depends on it. */
INLINED void cut_into_parts(struct attention *attention, int threads) {
    const struct step *step = attention->fields->step;
    const int64_t row_floats = attention->key_dim + 2 * attention->stride;
    attention->tile_rows = least(TILE_ROWS, most_of(TILE_FLOATS / row_floats / ROWS * ROWS, ROWS));
    if (threads == 1) return;
    for (;;) {
        int64_t tiles = 0, bytes = MOST_SPLIT_TILES * sizeof(int64_t);
        for (const struct span *span = step->spans; span < step->spans + step->span_count; span++) {
            tiles += attention->key_heads * tiles_of(attention, span);
            if (span->tokens * attention->shared <= SPLIT_ROWS)
                bytes += attention->key_heads * segments_of(attention, span) * span->tokens * attention->shared *
                         (attention->stride + 2) * sizeof(float);
        }
        if (tiles >= PARTS_PER_THREAD * threads) return;
        if (attention->tile_rows <= SPLIT_ROWS) {
            attention->is_split = tiles <= MOST_SPLIT_TILES && bytes <= step->scratch_bytes;
            return;
        }
        attention->tile_rows = most_of(SPLIT_ROWS, attention->tile_rows / 2 / ROWS * ROWS);
    }
}

WITH INLINED void attend_part(const struct attention *attention, const struct room *room, int64_t part) {
    const struct step *step = attention->fields->step;
    struct split split = {(_Atomic int64_t *)step->scratch, (float *)(step->scratch + MOST_SPLIT_TILES * sizeof(int64_t)), 0};
    struct tile tile = {.span = step->spans};
    for (; part >= parts_of(attention, tile.span); tile.first_token += tile.span->tokens, tile.span++) {
        part -= parts_of(attention, tile.span);
        if (!is_split_span(attention, tile.span)) continue;
        split.finished += attention->key_heads;
        split.segments += parts_of(attention, tile.span) * tile.span->tokens * attention->shared * (attention->stride + 2);
    }
    const int64_t rows = tile.span->tokens * attention->shared, number = part / attention->key_heads;
    tile.head = part % attention->key_heads;
    const bool is_split = is_split_span(attention, tile.span);
    /* the tiles with the most keys come first */
    tile.first_row = is_split ? 0 : (tiles_of(attention, tile.span) - 1 - number) * attention->tile_rows;
    tile.rows = least(rows - tile.first_row, is_split ? rows : attention->tile_rows);
    const int64_t groups = (tile.rows + ROWS - 1) / ROWS;
    tile.group_rows = (tile.rows + groups - 1) / groups;
    tile.first_segment = first_key_of(attention, position_of(attention, &tile, 0)) / (SEGMENT * KEYS);
    tile.segments = position_of(attention, &tile, tile.rows - 1) / (SEGMENT * KEYS) - tile.first_segment + 1;
    load_queries(attention, &tile, room);
    if (!is_split) {
        NAME(attend_tile)(attention, &tile, room);
        return;
    }
    split.floats = rows * (attention->stride + 2);
    split.finished += tile.head;
    split.segments += tile.head * tile.segments * split.floats;
    NAME(attend_split)(attention, &tile, room, number, split);
}

#define TAKE(field, count) \
    field = at; \
    at += ((count) + 15) / 16 * 16;

/* dst: float32 [value_dim, heads, tokens]; sources: Q float32 [key_dim, heads, tokens], what noodle_write_rows returned, and
 * sinks of all heads or null. */
WITH void NAME(noodle_attend)(void *dst, int thread, int threads, void *given) {
    (void)thread;
    const struct attention_fields *fields = given;
    const void *query = source_of(dst, 0);
    struct attention attention = {
        .dst = dst, .query = query, .sinks = source_of(dst, 2), .fields = fields, .type = fields->type,
        .key_dim = size_of(query, 0), .value_dim = fields->value_dim, .stride = (fields->value_dim + 31) / 32 * 32,
        .heads = size_of(query, 1), .key_heads = fields->key_heads, .shared = size_of(query, 1) / fields->key_heads,
        .window = fields->window ? fields->window : NO_WINDOW, .is_latent = fields->key_area == fields->value_area};
    cut_into_parts(&attention, threads);
    const struct step *step = fields->step;
    int64_t count = 0, most_rows = 0;
    for (const struct span *span = step->spans; span < step->spans + step->span_count; span++) {
        count += parts_of(&attention, span);
        most_rows = most_of(most_rows, least(attention.tile_rows, span->tokens * attention.shared));
    }
    most_rows = (most_rows + ROWS - 1) / ROWS * ROWS;
    const int64_t stride = attention.stride, key_floats = KEYS * attention.key_dim;
    char memory[sizeof(float) * (most_rows * (attention.key_dim + 2 * stride + 2 * KEYS + 3) + key_floats +
                                 KEYS * stride + MOST_BLOCKS * DIRECT_GROUPS * ROWS * KEYS + stride) + 16 * 64 + 64];
    float *at = (float *)(((uintptr_t)memory + 63) / 64 * 64);
    struct room room;
    TAKE(room.queries, most_rows * attention.key_dim)
    TAKE(room.segment.most, most_rows)
    TAKE(room.segment.weights, most_rows * KEYS)
    TAKE(room.segment.sums, most_rows * stride)
    TAKE(room.total.most, most_rows)
    TAKE(room.total.weights, most_rows)
    TAKE(room.total.sums, most_rows * stride)
    TAKE(room.scores, most_of(most_rows, MOST_BLOCKS * DIRECT_GROUPS * ROWS) * KEYS)
    TAKE(room.keys, key_floats)
    TAKE(room.values, KEYS * stride)
    TAKE(room.scales, stride)
    struct claims claims = claims_of(given, threads);
    for (int64_t part; (part = claim_next(&claims, count)) < count;) attend_part(&attention, &room, part);
}
