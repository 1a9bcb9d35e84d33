/* Products (products.h, floats.h) for AVX512: floats with AVX512F, block types with VNNI, whose VPDPBUSD multiplies four unsigned
 * and four signed bytes and sums the products in 32 bits; bfloat16 with the instruction of AVX512_BF16, which rounds
 * activations to bfloat16, where the processor has it. */

#if defined(__x86_64__) && !defined(NOODLE_WITHOUT_AVX512) /* defined to measure AVX2 on a processor with AVX512 */
#include "layout.h"

#define WITH __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")))
#define WITH_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma,f16c")))
#define NAME(x) x##_avx512
#define LANES 16
#define FLOAT_TILE_ROWS 8
#define LOOPS_OVER_LONE_ROWS 1
#define SIGNED_SHIFT 7 /* VPDPBUSD takes weights without a sign: 128 is added to those that have one */

typedef __m512i bytes, ints;
typedef __m512 floats;

WITH INLINED bytes load_bytes(const char *at) { return _mm512_loadu_si512(at); }
WITH INLINED void store_bytes(char *at, bytes x) { _mm512_storeu_si512(at, x); }
WITH INLINED bytes shifted_down(bytes x, int bits) { return _mm512_srli_epi16(x, bits); }
WITH INLINED bytes shifted_up(bytes x, int bits) { return _mm512_slli_epi16(x, bits); }
WITH INLINED bytes masked(bytes x, int mask) { return _mm512_and_si512(x, _mm512_set1_epi8((char)mask)); }
WITH INLINED bytes joined(bytes x, bytes y) { return _mm512_or_si512(x, y); }
WITH INLINED bytes as_multiplied(bytes x) { return _mm512_xor_si512(x, _mm512_set1_epi8((char)0x80)); }
WITH INLINED bytes looked_up(const int8_t *values, bytes x) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)values)), x);
}
/* bits 4 * g to 4 * g + 3 of each integer as four bytes, which are `value` where the bit is set */
WITH INLINED bytes bits_of_four(bytes x, int g, int value) {
    const __m128i places = _mm_add_epi8(
        _mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12), _mm_set1_epi8((char)(g / 2)));
    const bytes spread = _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(places));
    const __mmask64 there = _mm512_test_epi8_mask(spread, _mm512_set1_epi32(g % 2 ? (int)0x80402010 : 0x08040201));
    return _mm512_maskz_mov_epi8(there, _mm512_set1_epi8((char)value));
}

WITH INLINED ints load_ints(const char *at) { return _mm512_loadu_si512(at); }
WITH INLINED ints broadcast_int(int32_t x) { return _mm512_set1_epi32(x); }
WITH INLINED ints shifted(ints x, int bits) { return _mm512_slli_epi32(x, bits); }
WITH INLINED ints upper_halves(ints x) { return _mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000)); }
WITH INLINED floats as_floats(ints x) { return _mm512_castsi512_ps(x); }
WITH INLINED floats to_floats(ints x) { return _mm512_cvtepi32_ps(x); }

WITH INLINED floats load_floats(const float *at) { return _mm512_loadu_ps(at); }
WITH INLINED void store_floats(float *at, floats x) { _mm512_storeu_ps(at, x); }
WITH INLINED floats broadcast_float(float x) { return _mm512_set1_ps(x); }
WITH INLINED floats multiply(floats x, floats y) { return _mm512_mul_ps(x, y); }
WITH INLINED floats fmadd(floats x, floats y, floats z) { return _mm512_fmadd_ps(x, y, z); }
WITH INLINED floats negative(floats x) { return _mm512_xor_ps(x, _mm512_set1_ps(-0.0f)); }
WITH INLINED floats halves(const char *at) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at)); }
WITH INLINED floats from_u8(const void *at) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at)));
}
WITH INLINED floats from_i8(const void *at) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at)));
}
/* 2^(x - 128) of bytes x, as ggml has it (GGML_E8M0_TO_FP32_HALF) */
WITH INLINED floats halved_powers(const char *at) {
    const ints x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at));
    const ints normal = _mm512_slli_epi32(_mm512_sub_epi32(x, _mm512_set1_epi32(1)), 23);
    const ints small = _mm512_sllv_epi32(_mm512_set1_epi32(0x00200000), x);
    return _mm512_castsi512_ps(_mm512_mask_blend_epi32(_mm512_cmplt_epi32_mask(x, _mm512_set1_epi32(2)), normal, small));
}

/* `start` plus the sums of 4 * count products */
WITH INLINED ints dot(ints start, const bytes *weights, const int8_t *numbers, const int count, const int largest) {
    (void)largest;
    for (int g = 0; g < count; g++) {
        int32_t four;
        memcpy(&four, numbers + 4 * g, 4);
        start = _mm512_dpbusd_epi32(start, weights[g], _mm512_set1_epi32(four));
    }
    return start;
}

/* 32 elements in 8 bits. The maximum may ignore NaN. */
WITH INLINED void quantize_block(struct row_block *block, const float *from) {
    const __m512 low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + 16);
    const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
    const bool has_nan = _mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q);
    block->scale = has_nan ? NAN : largest / 127.0f;
    const __m512 inverse = _mm512_set1_ps(inverse_of(block->scale));
    const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse));
    const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
    _mm_storeu_si128((__m128i *)block->numbers, _mm512_cvtsepi32_epi8(a));
    _mm_storeu_si128((__m128i *)(block->numbers + 16), _mm512_cvtsepi32_epi8(b));
    block->first_negative_sum = -_mm512_reduce_add_epi32(a);
    block->negative_sum = block->first_negative_sum - _mm512_reduce_add_epi32(b);
}

#include "floats.h"
#include "products.h"

#define BF16_PAIRS_UNIT_BYTES 4
#define BF16_PAIRS_UNIT_ITEMS 2
#define BF16_PAIRS_UNIT_GIVEN 1
WITH_BF16 INLINED floats add_BF16_PAIRS(floats sum, const char *unit, const float *given, int rows) {
    (void)rows;
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(unit), (__m512bh)_mm512_castps_si512(_mm512_set1_ps(*given)));
}
PRODUCT_OF_FLOATS(BF16_PAIRS, WITH_BF16)

/* dst: tiles of bfloat16 pairs; sources: rows of K float32, K even, for experts routes */
WITH_BF16 void noodle_arrange_pairs_avx512(void *dst, int thread, int threads, void *unused) {
    (void)unused;
    const int64_t length = size_of(source_of(dst, 0), 0);
    struct tiles tiles = tiles_of(dst, FLOAT_TILE_ROWS);
    for (struct tile tile; next_tile_of_thread(&tiles, &tile, thread, threads);) {
        char *to = data_of(dst) + tile.begin * length * 2;
        for (int64_t row = 0; row < tile.rows; row++) {
            const float *from = activations_of(&tiles, tile.begin + row);
            for (int64_t number = 0; number < length; number += 16) {
                const __mmask16 there = length - number < 16 ? (__mmask16)((1u << (length - number)) - 1) : 0xffff;
                const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, from + number));
                char pairs[32];
                _mm256_storeu_si256((__m256i *)pairs, (__m256i)rounded);
                for (int64_t pair = 0; pair < 8 && number + 2 * pair < length; pair++)
                    memcpy(to + ((number / 2 + pair) * tile.rows + row) * 4, pairs + 4 * pair, 4);
            }
        }
    }
}

/* whether this processor has the instructions of the kernels */
bool noodle_has_avx512(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

bool noodle_has_avx512_bf16(void) { return noodle_has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#else
#include <stdbool.h>
bool noodle_has_avx512(void) { return false; }
bool noodle_has_avx512_bf16(void) { return false; }
#endif
