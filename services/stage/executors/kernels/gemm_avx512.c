/* GEMM with packed weights (packed_weights.h) for AVX512: floats with AVX512F, bfloat16 with AVX512_BF16, Q8_0 with VNNI, whose
 * VPDPBUSD multiplies four unsigned and four signed bytes and sums the products in 32 bits.
 *
 *   Q8_0 tile: K / 32 blocks; per row 32 elements in int8, their scale in float32, and -128 times their sum in int32
 *   bfloat16 tile: [K / 2][rows] pairs
 */

#if defined(__x86_64__) && !defined(NOODLE_WITHOUT_AVX512) /* defined to measure AVX2 on a processor with AVX512 */
#include "packed_weights.h"

#define TILE_ROWS 8
#define TILE_BLOCK_BYTES 40 /* per row */
#define WITH_AVX512 __attribute__((target("avx512f,fma,f16c")))
#define WITH_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,fma")))
#define WITH_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")))

/* whether this processor has the instructions of the kernels */
bool noodle_has_avx512_floats(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("fma");
}

bool noodle_has_avx512_bf16(void) {
    return noodle_has_avx512_floats() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bf16");
}

bool noodle_has_avx512_q8_0(void) {
    return noodle_has_avx512_floats() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

/* dst: Q8_0 tiles, K / 32 * 40 bytes per row; source 0: rows of K float32 */
WITH_VNNI void noodle_quantise_avx512(void *dst, int thread, int threads, void *unused) {
    (void)unused;
    const void *rows = source_of(dst, 0);
    const int64_t blocks = size_of(rows, 0) / BLOCK;
    const struct cut cut = cut_of(size_of(rows, 1), TILE_ROWS);
    for (int64_t tile = thread; tile < cut.tiles; tile += threads) {
        const int64_t begin = begin_of_tile(cut, tile), width = rows_of_tile(cut, tile);
        for (int64_t row = 0; row < width; row++) {
            const float *from = (const float *)(data_of(rows) + (begin + row) * stride_of(rows, 1));
            char *to = data_of(dst) + (begin * blocks + row) * TILE_BLOCK_BYTES;
            for (int64_t block = 0; block < blocks; block++, from += BLOCK, to += width * TILE_BLOCK_BYTES) {
                const __m512 low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + 16);
                const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
                const bool has_nan = _mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q); /* the maximum may ignore NaN */
                const float scale = has_nan ? NAN : largest / 127.0f;
                const __m512 inverse = _mm512_set1_ps(scale > 0.0f ? 1.0f / scale : 0.0f);
                const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse));
                const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
                _mm_storeu_si128((__m128i *)to, _mm512_cvtsepi32_epi8(a));
                _mm_storeu_si128((__m128i *)(to + 16), _mm512_cvtsepi32_epi8(b));
                const int32_t correction = -128 * _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
                memcpy(to + 32, &scale, 4);
                memcpy(to + 36, &correction, 4);
            }
        }
    }
}

/* product of a group and a tile, inlined for each number of rows */
WITH_VNNI INLINED void multiply_tile_q8_0(ARGUMENTS) {
    __m512 sums[TILE_ROWS];
    for (int row = 0; row < rows; row++) sums[row] = _mm512_setzero_ps();
    for (; units; units--, group += GROUP_BLOCK_BYTES, tile += rows * TILE_BLOCK_BYTES) {
        const __m512 scales = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)group));
        __m512i weights[8];
        for (int g = 0; g < 8; g++) weights[g] = _mm512_loadu_si512(group + SCALES_BYTES + g * 64);
        for (int row = 0; row < rows; row++) {
            const int32_t *numbers = (const int32_t *)(tile + row * TILE_BLOCK_BYTES);
            __m512i products = _mm512_set1_epi32(numbers[9]);
            for (int g = 0; g < 8; g++) products = _mm512_dpbusd_epi32(products, weights[g], _mm512_set1_epi32(numbers[g]));
            const __m512 scale = _mm512_mul_ps(scales, _mm512_castsi512_ps(_mm512_set1_epi32(numbers[8])));
            sums[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), scale, sums[row]);
        }
    }
    for (int row = 0; row < rows; row++) _mm512_storeu_ps((float *)(out + row * out_stride), sums[row]);
}

void noodle_arrange_avx512(void *dst, int thread, int threads, void *unused) {
    (void)unused;
    arrange(dst, thread, threads, TILE_ROWS);
}

/* dst: bfloat16 tiles; source 0: rows of K float32, K even */
WITH_BF16 void noodle_arrange_bf16_avx512(void *dst, int thread, int threads, void *unused) {
    (void)unused;
    const void *rows = source_of(dst, 0);
    const int64_t length = size_of(rows, 0);
    const struct cut cut = cut_of(size_of(rows, 1), TILE_ROWS);
    for (int64_t tile = thread; tile < cut.tiles; tile += threads) {
        const int64_t begin = begin_of_tile(cut, tile), width = rows_of_tile(cut, tile);
        char *to = data_of(dst) + begin * length * 2;
        for (int64_t row = 0; row < width; row++) {
            const float *from = (const float *)(data_of(rows) + (begin + row) * stride_of(rows, 1));
            for (int64_t number = 0; number < length; number += 16) {
                const __mmask16 there = length - number < 16 ? (__mmask16)((1u << (length - number)) - 1) : 0xffff;
                const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, from + number));
                char pairs[32];
                _mm256_storeu_si256((__m256i *)pairs, (__m256i)rounded);
                for (int64_t pair = 0; pair < 8 && number + 2 * pair < length; pair++)
                    memcpy(to + ((number / 2 + pair) * width + row) * 4, pairs + 4 * pair, 4);
            }
        }
    }
}

/* A unit is what one instruction processes of each of 16 rows: one element, or two in bfloat16. For each type: load the units
 * of 16 rows, and add their products with the unit of one tile row to a sum. */
typedef __m512 units_f32, units_f16;
typedef __m512bh units_bf16;
WITH_AVX512 INLINED __m512 load_f32(const char *at) { return _mm512_loadu_ps(at); }
WITH_AVX512 INLINED __m512 load_f16(const char *at) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at)); }
WITH_BF16 INLINED __m512bh load_bf16(const char *at) { return (__m512bh)_mm512_loadu_si512(at); }
WITH_AVX512 INLINED __m512 add_f32(__m512 sum, __m512 units, float unit) {
    return _mm512_fmadd_ps(units, _mm512_set1_ps(unit), sum);
}
WITH_AVX512 INLINED __m512 add_f16(__m512 sum, __m512 units, float unit) { return add_f32(sum, units, unit); }
WITH_BF16 INLINED __m512 add_bf16(__m512 sum, __m512bh units, float pair) {
    return _mm512_dpbf16_ps(sum, units, (__m512bh)_mm512_castps_si512(_mm512_set1_ps(pair)));
}

/* Like multiply_tile_q8_0. With few rows each sum is split into parts: an addition waits for the previous one. */
#define TILE_PRODUCT(type, target, unit_bytes) \
    target INLINED void multiply_tile_##type(ARGUMENTS) { \
        const float *given = (const float *)tile; \
        const int parts = rows <= 2 ? 4 : rows <= 4 ? 2 : 1; \
        __m512 sums[TILE_ROWS]; \
        for (int sum = 0; sum < rows * parts; sum++) sums[sum] = _mm512_setzero_ps(); \
        for (; units >= parts; units -= parts) { \
            for (int part = 0; part < parts; part++, group += GROUP_ROWS * unit_bytes, given += rows) { \
                const units_##type weights = load_##type(group); \
                for (int row = 0; row < rows; row++) \
                    sums[part * rows + row] = add_##type(sums[part * rows + row], weights, given[row]); \
            } \
        } \
        for (; units; units--, group += GROUP_ROWS * unit_bytes, given += rows) { \
            const units_##type weights = load_##type(group); \
            for (int row = 0; row < rows; row++) sums[row] = add_##type(sums[row], weights, given[row]); \
        } \
        for (int row = 0; row < rows; row++) { \
            for (int part = 1; part < parts; part++) sums[row] = _mm512_add_ps(sums[row], sums[part * rows + row]); \
            _mm512_storeu_ps((float *)(out + row * out_stride), sums[row]); \
        } \
    }
TILE_PRODUCT(f32, WITH_AVX512, 4)
TILE_PRODUCT(f16, WITH_AVX512, 2)
TILE_PRODUCT(bf16, WITH_BF16, 4)

PRODUCT(f32_avx512, multiply_tile_f32, WITH_AVX512, TILE_ROWS, 1, GROUP_ROWS * 4, 4)
PRODUCT(f16_avx512, multiply_tile_f16, WITH_AVX512, TILE_ROWS, 1, GROUP_ROWS * 2, 4)
PRODUCT(bf16_avx512, multiply_tile_bf16, WITH_BF16, TILE_ROWS, 2, GROUP_ROWS * 4, 4)
PRODUCT(q8_0_avx512, multiply_tile_q8_0, WITH_VNNI, TILE_ROWS, BLOCK, GROUP_BLOCK_BYTES, TILE_BLOCK_BYTES)
#else
#include <stdbool.h>
bool noodle_has_avx512_floats(void) { return false; }
bool noodle_has_avx512_bf16(void) { return false; }
bool noodle_has_avx512_q8_0(void) { return false; }
#endif
