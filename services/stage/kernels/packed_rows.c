/* Products of weights and rows in float32, for operations of ggml that are not ggml's own (GGML_OP_CUSTOM).
 *
 * ggml multiplies a weight row by row, and spends much of its time on lining up what it has loaded. Here 16 of a weight's
 * rows stand side by side, so that one instruction takes a number of each of them, or four numbers in 8 bits
 * (VPDPBUSD of AVX512-VNNI), and a number of the other side is lined up by its load. The bytes are as many as before, and
 * are read in their order: with the scales of 8 bits behind the numbers, a processor that guesses what is read next
 * guessed wrong, and a single row took twice as long.
 *
 *   a group: 16 rows of K numbers
 *     in float32 or float16: [K][16] numbers
 *     in bfloat16 (K even): [K / 2][16] pairs of numbers
 *     in Q8_0 (K a multiple of 32): K / 32 blocks of 16 scales in float16, one for each row, and then of
 *       [8][16][4] bytes: byte j of [g][r] is number 4 * g + j of the block in row r, plus 128
 *   a tile: 8 rows of activations (fewer at the end)
 *     in float32: [K][rows] numbers, for bfloat16: [K / 2][rows] pairs
 *     for Q8_0: K / 32 blocks, of each row 32 numbers in int8, their scale in float32, and -128 times their sum in int32
 *
 * As in ggml, activations are rounded to 8 bits with a scale for each 32 of them where weights are in Q8_0 (products are
 * summed in int32 within a block and in float32 over blocks), and to bfloat16 where weights are. All else is in float32.
 */

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 32
#define GROUP_ROWS 16
#define BLOCK_BYTES 34 /* of a row in Q8_0 */
#define TILE_ROWS 8
#define TILE_BLOCK_BYTES 40 /* of each row */
#define SCALES_BYTES 32 /* of a group's block */
#define GROUP_BLOCK_BYTES (GROUP_ROWS * BLOCK_BYTES)
#define PASS_ROWS 64 /* so many rows of activations stay in the second cache while all of the weight passes */

/* where a ggml_tensor has its fields: told once by whoever knows this ggml's struct */
static size_t at_data, at_sizes, at_strides, at_sources;

void noodle_set_tensor_fields(size_t data, size_t sizes, size_t strides, size_t sources) {
    at_data = data;
    at_sizes = sizes;
    at_strides = strides;
    at_sources = sources;
}

static char *data_of(const void *tensor) { return *(char **)((const char *)tensor + at_data); }
static int64_t size_of(const void *tensor, int axis) { return ((const int64_t *)((const char *)tensor + at_sizes))[axis]; }
static size_t stride_of(const void *tensor, int axis) { return ((const size_t *)((const char *)tensor + at_strides))[axis]; }
static const void *source_of(const void *tensor, int number) {
    return ((void *const *)((const char *)tensor + at_sources))[number];
}

static void pack_q8_0(char *group, const char *rows, int64_t length) {
    const int64_t blocks = length / BLOCK;
    for (int64_t block = 0; block < blocks; block++) {
        char *packed = group + block * GROUP_BLOCK_BYTES;
        for (int row = 0; row < GROUP_ROWS; row++) {
            const char *from = rows + (row * blocks + block) * BLOCK_BYTES;
            memcpy(packed + row * 2, from, 2);
            for (int number = 0; number < BLOCK; number++)
                packed[SCALES_BYTES + (number / 4) * 64 + row * 4 + number % 4] = (char)(from[2 + number] ^ 0x80);
        }
    }
}

/* With a size that is known where it is called, a copy is one instruction and not a call. */
static inline __attribute__((always_inline)) void pack_units(char *group, const char *rows, int64_t units, const int64_t bytes) {
    for (int64_t unit = 0; unit < units; unit++)
        for (int64_t row = 0; row < GROUP_ROWS; row++)
            memcpy(group + (unit * GROUP_ROWS + row) * bytes, rows + (row * units + unit) * bytes, bytes);
}

/* Puts the rows of a matrix as ggml has it into groups, in place: rows of `length` units of 2 or 4 `unit_bytes`, or of `length`
 * numbers in Q8_0 where that is 0. `spare` has the bytes of 16 rows. */
void noodle_pack(char *weight, char *spare, int64_t row_count, int64_t length, int64_t unit_bytes) {
    const int64_t group_bytes = unit_bytes ? GROUP_ROWS * length * unit_bytes : length / BLOCK * GROUP_BLOCK_BYTES;
    for (int64_t first = 0; first < row_count; first += GROUP_ROWS, weight += group_bytes) {
        memcpy(spare, weight, group_bytes);
        if (unit_bytes == 4)
            pack_units(weight, spare, length, 4);
        else if (unit_bytes)
            pack_units(weight, spare, length, 2);
        else
            pack_q8_0(weight, spare, length);
    }
}

static int64_t rows_in_tile(int64_t first, int64_t count) { return count - first < TILE_ROWS ? count - first : TILE_ROWS; }

#if defined(__x86_64__)
#include <immintrin.h>
#define WITH_AVX512 __attribute__((target("avx512f,fma,f16c")))
#define WITH_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,fma")))
#define WITH_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")))

/* whether this processor has what the kernels use */
bool noodle_has_floats(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("fma");
}

bool noodle_has_bf16(void) {
    return noodle_has_floats() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bf16");
}

bool noodle_has_q8_0(void) {
    return noodle_has_floats() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

/* dst: bytes of tiles, K / 32 * 40 for each row; source 0: rows of K float32 */
WITH_VNNI void noodle_quantise(void *dst, int thread, int threads, void *unused) {
    (void)unused;
    const void *rows = source_of(dst, 0);
    const int64_t blocks = size_of(rows, 0) / BLOCK, count = size_of(rows, 1);
    for (int64_t row = thread; row < count; row += threads) {
        const float *from = (const float *)(data_of(rows) + row * stride_of(rows, 1));
        const int64_t first = row - row % TILE_ROWS, width = rows_in_tile(first, count);
        char *to = data_of(dst) + (first * blocks + row % TILE_ROWS) * TILE_BLOCK_BYTES;
        for (int64_t block = 0; block < blocks; block++, from += BLOCK, to += width * TILE_BLOCK_BYTES) {
            const __m512 low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + 16);
            const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
            const bool has_nan = _mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q); /* the maximum may pass it over */
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

/* 16 rows of the weight times a tile of so many rows; inlined for each number of them */
WITH_VNNI static inline __attribute__((always_inline)) void
multiply_tile_q8_0(const char *group, const char *tile, int64_t blocks, char *out, size_t out_stride, const int rows) {
    __m512 sums[TILE_ROWS];
    for (int row = 0; row < rows; row++) sums[row] = _mm512_setzero_ps();
    for (; blocks; blocks--, group += GROUP_BLOCK_BYTES, tile += rows * TILE_BLOCK_BYTES) {
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

/* dst: float32 [length, ids]; sources: the packed weight, ids in int32 of the rows that are wanted of it */
WITH_VNNI void noodle_take_rows_q8_0(void *dst, int thread, int threads, void *unused) {
    (void)unused;
    const void *weight = source_of(dst, 0);
    const int32_t *ids = (const int32_t *)data_of(source_of(dst, 1));
    const int64_t blocks = size_of(weight, 0) / BLOCK, count = size_of(dst, 1);
    for (int64_t row = thread; row < count; row += threads) {
        const int lane = ids[row] % GROUP_ROWS;
        const char *group = data_of(weight) + (ids[row] - lane) * blocks * BLOCK_BYTES;
        float *out = (float *)(data_of(dst) + row * stride_of(dst, 1));
        for (int64_t block = 0; block < blocks; block++, group += GROUP_BLOCK_BYTES) {
            const float scale = _cvtsh_ss(((const unsigned short *)group)[lane]);
            for (int number = 0; number < BLOCK; number++)
                *out++ = scale * ((uint8_t)group[SCALES_BYTES + number / 4 * 64 + lane * 4 + number % 4] - 128);
        }
    }
}

/* dst: float32 tiles; source 0: rows of K float32 */
void noodle_arrange(void *dst, int thread, int threads, void *unused) {
    (void)unused;
    const void *rows = source_of(dst, 0);
    const int64_t length = size_of(rows, 0), count = size_of(rows, 1);
    for (int64_t first = thread * TILE_ROWS; first < count; first += threads * TILE_ROWS) {
        const int64_t width = rows_in_tile(first, count);
        float *tile = (float *)data_of(dst) + first * length;
        for (int64_t row = 0; row < width; row++) {
            const float *from = (const float *)(data_of(rows) + (first + row) * stride_of(rows, 1));
            for (int64_t number = 0; number < length; number++) tile[number * width + row] = from[number];
        }
    }
}

/* dst: tiles of bfloat16; source 0: rows of K float32, K even */
WITH_BF16 void noodle_arrange_bf16(void *dst, int thread, int threads, void *unused) {
    (void)unused;
    const void *rows = source_of(dst, 0);
    const int64_t length = size_of(rows, 0), count = size_of(rows, 1);
    for (int64_t first = thread * TILE_ROWS; first < count; first += threads * TILE_ROWS) {
        const int64_t width = rows_in_tile(first, count);
        char *tile = data_of(dst) + first * length * 2;
        for (int64_t row = 0; row < width; row++) {
            const float *from = (const float *)(data_of(rows) + (first + row) * stride_of(rows, 1));
            for (int64_t number = 0; number < length; number += 16) {
                const __mmask16 there = length - number < 16 ? (__mmask16)((1u << (length - number)) - 1) : 0xffff;
                const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, from + number));
                char pairs[32];
                _mm256_storeu_si256((__m256i *)pairs, (__m256i)rounded);
                for (int64_t pair = 0; pair < 8 && number + 2 * pair < length; pair++)
                    memcpy(tile + ((number / 2 + pair) * width + row) * 4, pairs + 4 * pair, 4);
            }
        }
    }
}

/* A unit is what one instruction takes of each of 16 rows: a number, in bfloat16 two. Of a type: 16 rows' units as they are
 * loaded, and a sum with their products by a row's unit. */
typedef __m512 units_f32, units_f16;
typedef __m512bh units_bf16;
#define INLINED static inline __attribute__((always_inline))
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

/* The product of a tile, as multiply_tile_q8_0. A sum of few rows is split, for an addition must wait for the one before. */
#define TILE_PRODUCT(type, target, unit_bytes) \
    target INLINED void multiply_tile_##type( \
        const char *group, const char *tile, int64_t units, char *out, size_t out_stride, const int rows) { \
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

/* dst: float32 [rows of the weight, rows]; sources: the packed weight, tiles. A unit (in Q8_0 a block) takes so many bytes of
 * a group and of each row of a tile. */
#define PRODUCT(type, target, unit_numbers, group_bytes, tile_bytes) \
    target void noodle_multiply_##type(void *dst, int thread, int threads, void *unused) { \
        (void)unused; \
        const void *weight = source_of(dst, 0), *tiles = source_of(dst, 1); \
        const int64_t units = size_of(weight, 0) / unit_numbers, groups = size_of(weight, 1) / GROUP_ROWS; \
        const int64_t count = size_of(dst, 1); \
        const size_t out_stride = stride_of(dst, 1); \
        const int64_t first = groups * thread / threads, end = groups * (thread + 1) / threads; \
        for (int64_t begin = 0; begin < count; begin += PASS_ROWS) { \
            const int64_t last = begin + PASS_ROWS < count ? begin + PASS_ROWS : count; \
            for (int64_t number = first; number < end; number++) { \
                const char *group = data_of(weight) + number * units * group_bytes; \
                for (int64_t row = begin; row < last; row += TILE_ROWS) { \
                    const char *tile = data_of(tiles) + row * units * tile_bytes; \
                    char *out = data_of(dst) + row * out_stride + number * GROUP_ROWS * sizeof(float); \
                    switch (rows_in_tile(row, count)) { \
                        case 8: multiply_tile_##type(group, tile, units, out, out_stride, 8); break; \
                        case 7: multiply_tile_##type(group, tile, units, out, out_stride, 7); break; \
                        case 6: multiply_tile_##type(group, tile, units, out, out_stride, 6); break; \
                        case 5: multiply_tile_##type(group, tile, units, out, out_stride, 5); break; \
                        case 4: multiply_tile_##type(group, tile, units, out, out_stride, 4); break; \
                        case 3: multiply_tile_##type(group, tile, units, out, out_stride, 3); break; \
                        case 2: multiply_tile_##type(group, tile, units, out, out_stride, 2); break; \
                        default: multiply_tile_##type(group, tile, units, out, out_stride, 1); break; \
                    } \
                } \
            } \
        } \
    }
PRODUCT(f32, WITH_AVX512, 1, GROUP_ROWS * 4, 4)
PRODUCT(f16, WITH_AVX512, 1, GROUP_ROWS * 2, 4)
PRODUCT(bf16, WITH_BF16, 2, GROUP_ROWS * 4, 4)
PRODUCT(q8_0, WITH_VNNI, BLOCK, GROUP_BLOCK_BYTES, TILE_BLOCK_BYTES)

static float from_f32(const char *at) {
    float number;
    memcpy(&number, at, 4);
    return number;
}
WITH_AVX512 static float from_f16(const char *at) {
    unsigned short number;
    memcpy(&number, at, 2);
    return _cvtsh_ss(number);
}
static float from_bf16(const char *at) {
    char number[4] = {0, 0, at[0], at[1]};
    return from_f32(number);
}

/* Of each type the taking of rows, as noodle_take_rows_q8_0. */
#define TAKING(type, target, unit_numbers, item_bytes) \
    target void noodle_take_rows_##type(void *dst, int thread, int threads, void *unused) { \
        (void)unused; \
        const void *weight = source_of(dst, 0); \
        const int32_t *ids = (const int32_t *)data_of(source_of(dst, 1)); \
        const int64_t length = size_of(weight, 0), count = size_of(dst, 1); \
        for (int64_t row = thread; row < count; row += threads) { \
            const int lane = ids[row] % GROUP_ROWS; \
            const char *group = data_of(weight) + (ids[row] - lane) * length * item_bytes; \
            float *out = (float *)(data_of(dst) + row * stride_of(dst, 1)); \
            for (int64_t number = 0; number < length; number++) { \
                const int64_t unit = number / unit_numbers * GROUP_ROWS + lane; \
                out[number] = from_##type(group + (unit * unit_numbers + number % unit_numbers) * item_bytes); \
            } \
        } \
    }

TAKING(f32, WITH_AVX512, 1, 4)
TAKING(f16, WITH_AVX512, 1, 2)
TAKING(bf16, WITH_BF16, 2, 2)
#else
bool noodle_has_floats(void) { return false; }
bool noodle_has_bf16(void) { return false; }
bool noodle_has_q8_0(void) { return false; }
#endif
