/* What is computed beside the products of experts: the choice, the order of the rows, the weighted sum. */

#include "layout.h"

/* Whether an expert's score is above another's; one that is no number is below all others. */
INLINED bool is_better(float score, float other) { return score > other || (!isnan(score) && isnan(other)); }

/* dst: int32 [count, tokens], the experts of the largest scores in their order, of equal ones the first; source 0: float32
 * [experts, tokens]. ggml's sort would write outside of its row where scores are no numbers. */
void noodle_best_experts(void *dst, int thread, int threads, void *unused) {
    (void)unused;
    const void *given = source_of(dst, 0);
    const int64_t count = size_of(dst, 0), experts = size_of(given, 0);
    for (int64_t token = thread; token < size_of(dst, 1); token += threads) {
        const float *scores = (const float *)(data_of(given) + token * stride_of(given, 1));
        int32_t *best = (int32_t *)(data_of(dst) + token * stride_of(dst, 1));
        for (int32_t expert = 0; expert < experts; expert++) {
            int64_t place = expert < count ? expert : count;
            while (place && is_better(scores[expert], scores[best[place - 1]])) place--;
            if (place == count) continue;
            for (int64_t last = expert < count ? expert : count - 1; last > place; last--) best[last] = best[last - 1];
            best[place] = expert;
        }
    }
}

/* dst: float32 [features, tokens]; sources: results [features, slots, tokens], shares [1, slots, tokens] */
void noodle_sum_of_experts(void *dst, int thread, int threads, void *unused) {
    (void)unused;
    const void *results = source_of(dst, 0), *shares = source_of(dst, 1);
    const int64_t features = size_of(dst, 0), first = features * thread / threads, end = features * (thread + 1) / threads;
    for (int64_t token = 0; token < size_of(dst, 1); token++) {
        float *sum = (float *)(data_of(dst) + token * stride_of(dst, 1));
        for (int64_t slot = 0; slot < size_of(results, 1); slot++) {
            const float *result = (const float *)(data_of(results) + token * stride_of(results, 2) + slot * stride_of(results, 1));
            const float share = *(const float *)(data_of(shares) + token * stride_of(shares, 2) + slot * stride_of(shares, 1));
            if (slot)
                for (int64_t feature = first; feature < end; feature++) sum[feature] += share * result[feature];
            else
                for (int64_t feature = first; feature < end; feature++) sum[feature] = share * result[feature];
        }
    }
}

/* dst: routes; source 0: int32 ids of experts [slots, tokens]. An id that is out of range counts as the nearest one. */
void noodle_route(void *dst, int thread, int threads, void *unused) {
    (void)threads, (void)unused;
    if (thread) return;
    const void *ids = source_of(dst, 0);
    const int64_t slots = size_of(ids, 0), pairs = slots * size_of(ids, 1), experts = (size_of(dst, 0) - pairs) / 2 - 1;
    int32_t *numbers = (int32_t *)data_of(dst), *used = numbers + 1, *first_rows = used + experts, *to = first_rows + experts + 1;
    for (int64_t expert = 0; expert <= experts; expert++) first_rows[expert] = 0;
    for (int pass = 0; pass < 2; pass++) { /* count each expert's pairs, then write them: its first row becomes its end */
        for (int64_t pair = 0; pair < pairs; pair++) {
            int64_t id = *(const int32_t *)(data_of(ids) + pair / slots * stride_of(ids, 1) + pair % slots * sizeof(int32_t));
            id = id < 0 ? 0 : id < experts ? id : experts - 1;
            if (pass)
                to[first_rows[id]++] = (int32_t)pair;
            else
                first_rows[id + 1]++;
        }
        for (int64_t expert = 0; !pass && expert < experts; expert++) first_rows[expert + 1] += first_rows[expert];
    }
    int32_t count = 0, begin = 0;
    for (int32_t expert = 0; expert < experts; expert++) {
        const int32_t end = first_rows[expert];
        if (end > begin) used[count] = expert, first_rows[count++] = begin;
        begin = end;
    }
    first_rows[count] = begin;
    numbers[0] = count;
}
