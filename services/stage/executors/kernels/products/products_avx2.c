/* Products (products.h, floats.h) for AVX2, FMA and F16C: Intel since 2013, AMD since 2015.
 *
 * VPMADDUBSW multiplies unsigned and signed bytes and adds two products in 16 bits: for weights of few bits the sums of several
 * fit there too, before they are widened. For weights of 8 bits the sign goes from the weight to the activation. */

#if defined(__x86_64__)
#include "layout.h"

#define WITH __attribute__((target("avx2,fma,f16c")))
#define NAME(x) x##_avx2
#define LANES 8
#define FLOAT_TILE_ROWS 6 /* two accumulators a row leave enough of the 16 registers for a product */
#define LOOPS_OVER_LONE_ROWS 0
#define SIGNED_SHIFT 0

typedef __m256i bytes, ints;
typedef __m256 floats;

WITH INLINED bytes load_bytes(const char *at) { return _mm256_loadu_si256((const __m256i *)at); }
WITH INLINED void store_bytes(char *at, bytes x) { _mm256_storeu_si256((__m256i *)at, x); }
WITH INLINED bytes shifted_down(bytes x, int bits) { return _mm256_srli_epi16(x, bits); }
WITH INLINED bytes shifted_up(bytes x, int bits) { return _mm256_slli_epi16(x, bits); }
WITH INLINED bytes masked(bytes x, int mask) { return _mm256_and_si256(x, _mm256_set1_epi8((char)mask)); }
WITH INLINED bytes joined(bytes x, bytes y) { return _mm256_or_si256(x, y); }
WITH INLINED bytes as_multiplied(bytes x) { return x; }
WITH INLINED bytes looked_up(const int8_t *values, bytes x) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)values)), x);
}
/* bits 4 * g to 4 * g + 3 of each integer as four bytes, which are `value` where the bit is set */
WITH INLINED bytes bits_of_four(bytes x, int g, int value) {
    const __m128i places = _mm_add_epi8(
        _mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12), _mm_set1_epi8((char)(g / 2)));
    const bytes spread = _mm256_shuffle_epi8(x, _mm256_broadcastsi128_si256(places));
    const bytes bit = _mm256_set1_epi32(g % 2 ? (int)0x80402010 : 0x08040201);
    return masked(_mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit), value);
}

WITH INLINED ints load_ints(const char *at) { return _mm256_loadu_si256((const __m256i *)at); }
WITH INLINED ints broadcast_int(int32_t x) { return _mm256_set1_epi32(x); }
WITH INLINED ints shifted(ints x, int bits) { return _mm256_slli_epi32(x, bits); }
WITH INLINED ints upper_halves(ints x) { return _mm256_and_si256(x, _mm256_set1_epi32((int)0xffff0000)); }
WITH INLINED floats as_floats(ints x) { return _mm256_castsi256_ps(x); }
WITH INLINED floats to_floats(ints x) { return _mm256_cvtepi32_ps(x); }

WITH INLINED floats load_floats(const float *at) { return _mm256_loadu_ps(at); }
WITH INLINED void store_floats(float *at, floats x) { _mm256_storeu_ps(at, x); }
WITH INLINED floats broadcast_float(float x) { return _mm256_set1_ps(x); }
WITH INLINED floats multiply(floats x, floats y) { return _mm256_mul_ps(x, y); }
WITH INLINED floats fmadd(floats x, floats y, floats z) { return _mm256_fmadd_ps(x, y, z); }
WITH INLINED floats negative(floats x) { return _mm256_xor_ps(x, _mm256_set1_ps(-0.0f)); }
WITH INLINED floats halves(const char *at) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at)); }
WITH INLINED floats from_u8(const void *at) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)at)));
}
WITH INLINED floats from_i8(const void *at) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)at)));
}
/* 2^(x - 128) of bytes x, as ggml has it (GGML_E8M0_TO_FP32_HALF) */
WITH INLINED floats halved_powers(const char *at) {
    const ints x = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)at));
    const ints normal = _mm256_slli_epi32(_mm256_sub_epi32(x, _mm256_set1_epi32(1)), 23);
    const ints small = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), x);
    return _mm256_castsi256_ps(_mm256_blendv_epi8(normal, small, _mm256_cmpgt_epi32(_mm256_set1_epi32(2), x)));
}

/* `start` plus the sums of 4 * count products; 16 bits hold 32767 / (2 * 127 * largest) sums of two products */
WITH INLINED ints dot(ints start, const bytes *weights, const int8_t *numbers, const int count, const int largest) {
    const bytes ones = _mm256_set1_epi16(1);
    const int summed = largest == SIGNED ? 1 : largest <= 15 ? 8 : largest <= 31 ? 4 : 2;
    _Pragma("GCC unroll 8") for (int g = 0; g < count; g += summed) {
        bytes sum = _mm256_setzero_si256();
        for (int each = g; each < g + summed && each < count; each++) {
            int32_t four;
            memcpy(&four, numbers + 4 * each, 4);
            const bytes given = _mm256_set1_epi32(four);
            const bytes product = largest == SIGNED
                                      ? _mm256_maddubs_epi16(_mm256_abs_epi8(weights[each]), _mm256_sign_epi8(given, weights[each]))
                                      : _mm256_maddubs_epi16(weights[each], given);
            sum = each == g ? product : _mm256_add_epi16(sum, product);
        }
        start = _mm256_add_epi32(start, _mm256_madd_epi16(sum, ones));
    }
    return start;
}

WITH INLINED float largest_of(__m256 numbers) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(numbers), _mm256_extractf128_ps(numbers, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

WITH INLINED int32_t sum_of(__m256i numbers) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(numbers), _mm256_extracti128_si256(numbers, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

/* 32 elements in 8 bits. The maximum may ignore NaN. */
WITH INLINED void quantize_block(struct row_block *block, const float *from) {
    const __m256 without_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 largest = _mm256_setzero_ps(), not_a_number = _mm256_setzero_ps();
    for (int part = 0; part < BLOCK; part += 8) {
        const __m256 numbers = _mm256_loadu_ps(from + part);
        largest = _mm256_max_ps(largest, _mm256_and_ps(without_sign, numbers));
        not_a_number = _mm256_or_ps(not_a_number, _mm256_cmp_ps(numbers, numbers, _CMP_UNORD_Q));
    }
    block->scale = _mm256_movemask_ps(not_a_number) ? NAN : largest_of(largest) / 127.0f;
    const __m256 inverse = _mm256_set1_ps(inverse_of(block->scale));
    __m256i whole[4];
    for (int part = 0; part < 4; part++)
        whole[part] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + 8 * part), inverse));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(whole[0], whole[1]), _mm256_packs_epi32(whole[2], whole[3]));
    _mm256_storeu_si256((__m256i *)block->numbers, _mm256_permutevar8x32_epi32(packed, order));
    block->first_negative_sum = -sum_of(_mm256_add_epi32(whole[0], whole[1]));
    block->negative_sum = block->first_negative_sum - sum_of(_mm256_add_epi32(whole[2], whole[3]));
}

#include "floats.h"
#include "products.h"

/* Every processor with AVX2 has F16C. */
bool noodle_has_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#else
#include <stdbool.h>
bool noodle_has_avx2(void) { return false; }
#endif
