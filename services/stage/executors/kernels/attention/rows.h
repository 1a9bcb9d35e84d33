/* Rows of K and V of sessions, in the layout that attention.h reads, and how a step's rows are written there.
 *
 *   area: K or V of all of a session's tokens in one layer: blocks of 32 tokens
 *   block: a part for each KV head, one behind the other
 *     K, float32 and float16: [dimensions][32 tokens] elements: tokens lie side by side, as scores are computed
 *     V, float32 and float16: [32 tokens][dimensions] elements
 *     Q8_0: dimensions / 32 groups of 32 float16 scales, one per token, followed by [32 dimensions][32 tokens] (K) or
 *       [32 tokens][32 dimensions] (V) bytes
 *   latent attention keeps one row for K and V, as K
 *
 * A token's bytes depend on its own row alone.
 */

struct span {
    const char *address; /* of the session's first area */
    int64_t area_bytes;
    int64_t first_position, tokens; /* that the step computes */
};

/* what changes from step to step, for all layers */
struct step {
    char *scratch; /* zeroed before the first step */
    int64_t scratch_bytes, span_count;
    struct span spans[];
};

struct rows_fields {
    struct work work;
    const struct step *step;
    int64_t type, key_area, value_area; /* the same area for latent attention */
};

INLINED int64_t block_bytes(int64_t dimensions, int64_t type) {
    return KEYS * (type == F32 ? 4 * dimensions : type == F16 ? 2 * dimensions : dimensions / ITEMS * (2 + ITEMS));
}

/* the part of `block` that one of `heads` has */
INLINED const char *block_of(
    const struct span *span, int64_t area, int64_t block, int64_t head, int64_t heads, int64_t bytes) {
    return span->address + area * span->area_bytes + (block * heads + head) * bytes;
}

WITH INLINED void write_halves(unsigned short *to, const float *from, int64_t at, int64_t dimensions, const bool is_key) {
    int64_t d = 0;
    for (; d + LANES <= dimensions; d += LANES) {
        unsigned short halves[LANES];
        to_f16((char *)halves, load(from + d));
        if (is_key)
            for (int lane = 0; lane < LANES; lane++) to[(d + lane) * KEYS + at] = halves[lane];
        else
            memcpy(to + at * dimensions + d, halves, sizeof halves);
    }
    for (; d < dimensions; d++) to[is_key ? d * KEYS + at : at * dimensions + d] = float_to_half(from[d]);
}

/* Quantize 32 numbers of token `at`, as ggml does. */
WITH INLINED void write_group(char *to, const float *from, int64_t at, const bool is_key) {
    float most = 0.0f, whole[ITEMS];
    for (int d = 0; d < ITEMS; d++)
        if (most == most && !(fabsf(from[d]) <= most)) most = fabsf(from[d]); /* a NaN stays: the whole group is NaN */
    const vector inverse = broadcast(most != 0.0f ? 127.0f / most : 0.0f);
    for (int d = 0; d < ITEMS; d += LANES) store(whole + d, rounded(multiply(load(from + d), inverse)));
    const unsigned short scale = float_to_half(most / 127.0f);
    memcpy(to + 2 * at, &scale, 2);
    for (int d = 0; d < ITEMS; d++) {
        const bool is_small = fabsf(whole[d]) <= 127.0f; /* not for infinities, whose scale is infinite */
        to[2 * KEYS + (is_key ? d * KEYS + at : at * ITEMS + d)] = (char)(is_small ? (int)whole[d] : 127);
    }
}

/* Write the row of token `at` of a block. */
WITH INLINED void write_row(char *to, const float *from, int64_t at, int64_t dimensions, int64_t type, const bool is_key) {
    if (type == F32) {
        float *rows = (float *)to;
        for (int64_t d = 0; d < dimensions; d++) rows[is_key ? d * KEYS + at : at * dimensions + d] = from[d];
    } else if (type == F16) {
        write_halves((unsigned short *)to, from, at, dimensions, is_key);
    } else {
        for (int64_t d = 0; d < dimensions; d += ITEMS, to += GROUP_BYTES) write_group(to, from + d, at, is_key);
    }
}

WITH INLINED void write_rows(
    const void *rows, const struct rows_fields *fields, int64_t area, const struct span *span, int64_t head,
    int64_t position, int64_t row, const bool is_key) {
    const int64_t dimensions = size_of(rows, 0), heads = size_of(rows, 1), type = fields->type;
    const int64_t end = span->first_position + span->tokens;
    char *to = (char *)block_of(span, area, position / KEYS, head, heads, block_bytes(dimensions, type));
    for (int64_t at = position % KEYS; at < KEYS && position < end; at++, position++, row++) {
        const char *from = data_of(rows) + row * stride_of(rows, 2) + head * stride_of(rows, 1);
        write_row(to, (const float *)from, at, dimensions, type, is_key);
    }
}

/* Write K and V of a step's tokens into their sessions' rows. Sources: K and, unless attention is latent, V, float32
 * [dimensions, heads, tokens]. Of dst nothing is written: attention has it as a source, so that rows are written first. */
WITH void NAME(noodle_write_rows)(void *dst, int thread, int threads, void *given) {
    (void)thread;
    const struct rows_fields *fields = given;
    const struct step *step = fields->step;
    const void *key = source_of(dst, 0), *value = source_of(dst, 1);
    const int64_t heads = size_of(key, 1);
    int64_t count = 0;
    for (int64_t number = 0; number < step->span_count; number++) {
        const struct span *span = step->spans + number;
        count += heads * ((span->first_position + span->tokens - 1) / KEYS - span->first_position / KEYS + 1);
    }
    struct claims claims = claims_of(given, threads);
    for (int64_t part; (part = claim_next(&claims, count)) < count;) {
        int64_t first_row = 0;
        for (const struct span *span = step->spans;; first_row += span->tokens, span++) {
            const int64_t first_block = span->first_position / KEYS;
            const int64_t blocks = (span->first_position + span->tokens - 1) / KEYS - first_block + 1;
            if (part >= heads * blocks) {
                part -= heads * blocks;
                continue;
            }
            const int64_t block = first_block + part / heads, head = part % heads;
            const int64_t begin = block * KEYS > span->first_position ? block * KEYS : span->first_position;
            const int64_t row = first_row + begin - span->first_position;
            write_rows(key, fields, fields->key_area, span, head, begin, row, true);
            if (value) write_rows(value, fields, fields->value_area, span, head, begin, row, false);
            break;
        }
    }
}
