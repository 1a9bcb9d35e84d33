/* Prints the attention of drawn tokens by one instruction set: a line for each case and step. */

#include "drawn.h"
#include "work.h"

operation KERNEL(write_rows), KERNEL(attend);

enum { F32 = 0, F16 = 1, Q8_0 = 8 }; /* ggml's type numbers */
#define KEYS 32 /* in a block */
#define MOST_STEPS 5
#define SCRATCH_BYTES (1 << 20)

/* as kernels/attention/rows.h and attention.h have them */
struct span {
    const char *address;
    int64_t area_bytes, first_position, tokens;
};
struct step {
    char *scratch;
    int64_t scratch_bytes, span_count;
    struct span spans[2];
};
struct rows_fields {
    struct work work;
    const struct step *step;
    int64_t type, key_area, value_area;
};
struct attention_fields {
    struct work work;
    const struct step *step;
    int64_t type, key_area, value_area, window, key_heads, value_dim;
    float scale, cap;
};

static const struct example {
    const char *name;
    int64_t type, heads, key_heads, key_dim, value_dim, window;
    float cap;
    bool has_sinks, is_latent;
    int64_t ends[MOST_STEPS]; /* of the first session's chunks; 0 ends them */
} EXAMPLES[] = {
    {"float32", F32, 4, 2, 64, 64, 0, 0, false, false, {3, 50, 51, 64}},
    {"float16", F16, 4, 1, 64, 64, 0, 0, false, false, {3, 50, 51, 64}},
    {"Q8_0", Q8_0, 6, 2, 64, 64, 0, 0, false, false, {3, 50, 51, 64}},
    {"float16 of odd sizes", F16, 3, 3, 23, 41, 0, 0, false, false, {1, 34, 35}},
    {"window, cap and sinks", F32, 4, 2, 32, 32, 21, 30.0f, true, false, {40, 41, 70}},
    {"latent", F16, 8, 1, 96, 64, 0, 0, false, true, {40, 41, 70}},
    {"segments", Q8_0, 2, 1, 32, 32, 0, 0, false, false, {500, 620, 621}},
};

#define SECOND_TOKENS 5 /* of another session, in each step */

static int64_t area_bytes_of(const struct example *example, int64_t tokens) {
    const int64_t most = example->key_dim > example->value_dim ? example->key_dim : example->value_dim;
    return (tokens + KEYS) * 4 * most * example->key_heads;
}

static struct tensor drawn_tensor(int64_t first, int64_t second, int64_t third) {
    struct tensor tensor = tensor_of(memory_of((size_t)(first * second * third) * 4), 4, first, second, third);
    for (int64_t at = 0; at < first * second * third; at++) ((float *)tensor.data)[at] = 30.0f * drawn_float();
    return tensor;
}

static void print_step(const struct example *example, struct step *step, int threads) {
    const int64_t tokens = step->spans[0].tokens + step->spans[1].tokens, value_area = example->is_latent ? 0 : 1;
    struct tensor key = drawn_tensor(example->key_dim, example->key_heads, tokens);
    struct tensor value = drawn_tensor(example->value_dim, example->key_heads, tokens);
    struct tensor query = drawn_tensor(example->key_dim, example->heads, tokens);
    struct tensor sinks = drawn_tensor(example->heads, 1, 1);
    struct tensor written = {.sources = {&key, example->is_latent ? NULL : &value}};
    struct tensor dst = drawn_tensor(example->value_dim, example->heads, tokens);
    dst.sources[0] = &query, dst.sources[1] = &written, dst.sources[2] = example->has_sinks ? &sinks : NULL;
    struct rows_fields rows = {{0, 0}, step, example->type, 0, value_area};
    struct attention_fields fields = {
        {0, 0}, step, example->type, 0, value_area, example->window, example->key_heads, example->value_dim, 0.125f,
        example->cap};
    run(KERNEL(write_rows), &written, threads, &rows);
    run(KERNEL(attend), &dst, threads, &fields);
    char name[64];
    snprintf(name, sizeof name, "%s, %d tokens from %d on", example->name, (int)step->spans[0].tokens,
             (int)step->spans[0].first_position);
    print_bits(name, dst.data, example->value_dim * example->heads * tokens);
    free(key.data), free(value.data), free(query.data), free(sinks.data), free(dst.data);
}

int main(void) {
    start();
    char *scratch = memory_of(SCRATCH_BYTES);
    for (size_t number = 0; number < sizeof EXAMPLES / sizeof *EXAMPLES; number++) {
        const struct example *example = EXAMPLES + number;
        const int64_t area_bytes = area_bytes_of(example, 700);
        char *first = memory_of((size_t)(2 * area_bytes)), *second = memory_of((size_t)(2 * area_bytes));
        int64_t begin = 0;
        for (int at = 0; at < MOST_STEPS && example->ends[at]; begin = example->ends[at++]) {
            struct step step = {
                scratch, SCRATCH_BYTES, 2,
                {{first, area_bytes, begin, example->ends[at] - begin}, {second, area_bytes, at * SECOND_TOKENS, SECOND_TOKENS}}};
            print_step(example, &step, at % 2 ? 2 : 1);
        }
        free(first), free(second);
    }
    free(scratch);
    return 0;
}
