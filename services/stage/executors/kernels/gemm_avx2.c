/* GEMM with packed weights (packed_weights.h) for AVX2, FMA and F16C: Intel since 2013, AMD since 2015.
 *
 * AVX2's product of unsigned and signed bytes (VPMADDUBSW) adds pairs in 16 bits and overflows with these values. The loaded
 * bytes of a group are therefore split into even and odd ones, as 16-bit values for VPMADDWD. This costs two cheap
 * instructions, shared by all rows of a tile.
 *
 *   Q8_0 tile: K / 32 blocks; per row 8 times the elements 0, 2, 1, 3 of four in int16, their scale in float32, and -128
 *     times their sum in int32
 */

#if defined(__x86_64__)
#include "packed_weights.h"

#define WITH_AVX2 __attribute__((target("avx2,fma,f16c")))
#define FLOAT_ROWS 6 /* per tile: two accumulators per row leave enough of the 16 registers for a product */
#define Q8_0_ROWS 8
#define TILE_BLOCK_BYTES 72 /* per row */

/* Every processor with AVX2 has F16C. */
bool noodle_has_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

WITH_AVX2 INLINED float largest_of(__m256 numbers) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(numbers), _mm256_extractf128_ps(numbers, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

WITH_AVX2 INLINED int32_t sum_of(__m256i numbers) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(numbers), _mm256_extracti128_si256(numbers, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

/* 8 values as int16, each four in the order 0, 2, 1, 3 */
WITH_AVX2 INLINED __m128i in_pairs(__m256i numbers) {
    const __m256i behind = _mm256_slli_epi32(_mm256_shuffle_epi32(numbers, 0x0e), 16);
    const __m256i pairs = _mm256_blend_epi16(numbers, behind, 0xaa);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
}

/* dst: Q8_0 tiles, K / 32 * 72 bytes per row; source 0: rows of K float32 */
WITH_AVX2 void noodle_quantise_avx2(void *dst, int thread, int threads, void *unused) {
    (void)unused;
    const void *rows = source_of(dst, 0);
    const int64_t blocks = size_of(rows, 0) / BLOCK;
    const struct cut cut = cut_of(size_of(rows, 1), Q8_0_ROWS);
    const __m256 without_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    for (int64_t tile = thread; tile < cut.tiles; tile += threads) {
        const int64_t begin = begin_of_tile(cut, tile), width = rows_of_tile(cut, tile);
        for (int64_t row = 0; row < width; row++) {
            const float *from = (const float *)(data_of(rows) + (begin + row) * stride_of(rows, 1));
            char *to = data_of(dst) + (begin * blocks + row) * TILE_BLOCK_BYTES;
            for (int64_t block = 0; block < blocks; block++, from += BLOCK, to += width * TILE_BLOCK_BYTES) {
                __m256 largest = _mm256_setzero_ps(), not_a_number = _mm256_setzero_ps();
                for (int part = 0; part < BLOCK; part += 8) {
                    const __m256 numbers = _mm256_loadu_ps(from + part);
                    largest = _mm256_max_ps(largest, _mm256_and_ps(without_sign, numbers));
                    not_a_number = _mm256_or_ps(not_a_number, _mm256_cmp_ps(numbers, numbers, _CMP_UNORD_Q));
                }
                const bool has_nan = _mm256_movemask_ps(not_a_number); /* the maximum may ignore NaN */
                const float scale = has_nan ? NAN : largest_of(largest) / 127.0f;
                const __m256 inverse = _mm256_set1_ps(scale > 0.0f ? 1.0f / scale : 0.0f);
                __m256i sum = _mm256_setzero_si256();
                for (int part = 0; part < BLOCK; part += 8) {
                    const __m256i numbers = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + part), inverse));
                    sum = _mm256_add_epi32(sum, numbers);
                    _mm_storeu_si128((__m128i *)(to + part * 2), in_pairs(numbers));
                }
                const int32_t correction = -128 * sum_of(sum);
                memcpy(to + 64, &scale, 4);
                memcpy(to + 68, &correction, 4);
            }
        }
    }
}

/* Add the products of four elements of 8 group rows (even and odd bytes) and one tile row to int32 sums. */
WITH_AVX2 INLINED __m256i add_four(__m256i sum, __m256i even, __m256i odd, __m256i number_0_2, __m256i number_1_3) {
    const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(even, number_0_2), _mm256_madd_epi16(odd, number_1_3));
    return _mm256_add_epi32(sum, products);
}

/* The sums of 8 rows exceed the 16 registers and spill: this is cheaper than reading a tile twice. Unrolling the loop over
 * fours further makes the compiler hoist and spill the loads too. */
WITH_AVX2 INLINED void multiply_tile_q8_0(ARGUMENTS) {
    const __m256i even_bytes = _mm256_set1_epi16(0xff);
    __m256 low[Q8_0_ROWS], high[Q8_0_ROWS];
    for (int row = 0; row < rows; row++) low[row] = high[row] = _mm256_setzero_ps();
    for (; units; units--, group += GROUP_BLOCK_BYTES, tile += rows * TILE_BLOCK_BYTES) {
        __m256i low_sums[Q8_0_ROWS], high_sums[Q8_0_ROWS];
        for (int row = 0; row < rows; row++)
            low_sums[row] = high_sums[row] = _mm256_set1_epi32(((const int32_t *)(tile + row * TILE_BLOCK_BYTES))[17]);
#pragma GCC unroll 2
        for (int four = 0; four < 8; four++) {
            const __m256i *weights = (const __m256i *)(group + SCALES_BYTES + four * 64);
            const __m256i a = _mm256_loadu_si256(weights), b = _mm256_loadu_si256(weights + 1);
            const __m256i even_a = _mm256_and_si256(a, even_bytes), odd_a = _mm256_srli_epi16(a, 8);
            const __m256i even_b = _mm256_and_si256(b, even_bytes), odd_b = _mm256_srli_epi16(b, 8);
            for (int row = 0; row < rows; row++) {
                const int32_t *pairs = (const int32_t *)(tile + row * TILE_BLOCK_BYTES) + 2 * four;
                const __m256i number_0_2 = _mm256_set1_epi32(pairs[0]), number_1_3 = _mm256_set1_epi32(pairs[1]);
                low_sums[row] = add_four(low_sums[row], even_a, odd_a, number_0_2, number_1_3);
                high_sums[row] = add_four(high_sums[row], even_b, odd_b, number_0_2, number_1_3);
            }
        }
        const __m256 low_scales = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)group));
        const __m256 high_scales = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)group + 1));
        for (int row = 0; row < rows; row++) {
            const __m256 scale = _mm256_set1_ps(((const float *)(tile + row * TILE_BLOCK_BYTES))[16]);
            low[row] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low_sums[row]), _mm256_mul_ps(low_scales, scale), low[row]);
            high[row] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high_sums[row]), _mm256_mul_ps(high_scales, scale), high[row]);
        }
    }
    for (int row = 0; row < rows; row++) {
        _mm256_storeu_ps((float *)(out + row * out_stride), low[row]);
        _mm256_storeu_ps((float *)(out + row * out_stride) + 8, high[row]);
    }
}
PRODUCT(q8_0_avx2, multiply_tile_q8_0, WITH_AVX2, Q8_0_ROWS, BLOCK, GROUP_BLOCK_BYTES, TILE_BLOCK_BYTES)

void noodle_arrange_avx2(void *dst, int thread, int threads, void *unused) {
    (void)unused;
    arrange(dst, thread, threads, FLOAT_ROWS);
}

/* One element of each of the lower or upper 8 rows of a group. */
WITH_AVX2 INLINED __m256 load_f32(const char *group, int half) { return _mm256_loadu_ps((const float *)group + 8 * half); }
WITH_AVX2 INLINED __m256 load_f16(const char *group, int half) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)group + half));
}

/* Add the products of one element of each group row and each tile row to the sums of both halves of the group. */
#define ADDITION(type) \
    WITH_AVX2 INLINED void add_##type(__m256 *low, __m256 *high, const char *group, const float *given, const int rows) { \
        const __m256 a = load_##type(group, 0), b = load_##type(group, 1); \
        for (int row = 0; row < rows; row++) { \
            const __m256 number = _mm256_set1_ps(given[row]); \
            low[row] = _mm256_fmadd_ps(a, number, low[row]); \
            high[row] = _mm256_fmadd_ps(b, number, high[row]); \
        } \
    }
ADDITION(f32)
ADDITION(f16)

/* With few rows each sum is split into parts: an addition waits for the previous one. */
#define TILE_PRODUCT(type, unit_bytes) \
    WITH_AVX2 INLINED void multiply_tile_##type(ARGUMENTS) { \
        const float *given = (const float *)tile; \
        const int parts = rows == 1 ? 4 : rows <= 3 ? 2 : 1; \
        __m256 low[8], high[8]; \
        for (int sum = 0; sum < rows * parts; sum++) low[sum] = high[sum] = _mm256_setzero_ps(); \
        for (; units >= parts; units -= parts) { \
            for (int part = 0; part < parts; part++, group += GROUP_ROWS * unit_bytes, given += rows) \
                add_##type(low + part * rows, high + part * rows, group, given, rows); \
        } \
        for (; units; units--, group += GROUP_ROWS * unit_bytes, given += rows) add_##type(low, high, group, given, rows); \
        for (int row = 0; row < rows; row++) { \
            for (int part = 1; part < parts; part++) { \
                low[row] = _mm256_add_ps(low[row], low[part * rows + row]); \
                high[row] = _mm256_add_ps(high[row], high[part * rows + row]); \
            } \
            _mm256_storeu_ps((float *)(out + row * out_stride), low[row]); \
            _mm256_storeu_ps((float *)(out + row * out_stride) + 8, high[row]); \
        } \
    }
TILE_PRODUCT(f32, 4)
TILE_PRODUCT(f16, 2)
PRODUCT(f32_avx2, multiply_tile_f32, WITH_AVX2, FLOAT_ROWS, 1, GROUP_ROWS * 4, 4)
PRODUCT(f16_avx2, multiply_tile_f16, WITH_AVX2, FLOAT_ROWS, 1, GROUP_ROWS * 2, 4)
#else
#include <stdbool.h>
bool noodle_has_avx2(void) { return false; }
#endif
