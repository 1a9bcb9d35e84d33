/* What one core can do at best, for measurements: loops that only read, and loops that only multiply and add.
 *
 * `python -m tests.measure kernels` states each product as a share of these. The loops use the instructions of the products:
 * VPDPBUSD (with AVX2 VPMADDUBSW, VPMADDWD and an addition) for 8 bits, VDPBF16PS for bfloat16, FMA for float32. Everything
 * stays in registers, and there are enough sums that no addition waits for the previous one.
 */

#include <stdint.h>
#include <string.h>

#define INLINED static inline __attribute__((always_inline))
#define READ_BYTES 512 /* in a step */
#define LINE_BYTES 64
#define AHEAD_BYTES 4096

/* Defines noodle_limit_read_<name>: the sum of the 64-bit words of `bytes` bytes, a multiple of READ_BYTES. Every byte is read
 * for it. Four streams at once, and other distances and levels of prefetching, were slower or equal. */
#define READ(name, target, type, zero, load, add) \
    target uint64_t noodle_limit_read_##name(const char *from, int64_t bytes) { \
        enum { SUMS = LINE_BYTES / sizeof(type) }; \
        type sums[SUMS]; \
        for (int sum = 0; sum < SUMS; sum++) sums[sum] = zero; \
        for (const char *end = from + bytes; from < end;) { \
            for (int line = 0; line < READ_BYTES / LINE_BYTES; line++, from += LINE_BYTES) { \
                __builtin_prefetch(from + AHEAD_BYTES, 0, 1); \
                for (int sum = 0; sum < SUMS; sum++) sums[sum] = add(sums[sum], load(from + sum * sizeof(type))); \
            } \
        } \
        uint64_t words[LINE_BYTES / 8], total = 0; \
        memcpy(words, sums, sizeof words); \
        for (int word = 0; word < LINE_BYTES / 8; word++) total += words[word]; \
        return total; \
    }

#if defined(__x86_64__)
#include <immintrin.h>

/* The compiler takes the register for a changed one: it would compute a product of constants once. */
#define IN_REGISTER(value) __asm__ volatile("" : "+x"(value))

/* Defines noodle_limit_multiply_<name>: `steps` times a product for each of `count` sums. Returns how many numbers were
 * multiplied and added; an instruction takes `numbers`. */
#define MULTIPLY(name, target, count, type, zero, one, add, numbers) \
    target int64_t noodle_limit_multiply_##name(int64_t steps) { \
        type sums[count], left = one, right = one; \
        for (int sum = 0; sum < count; sum++) sums[sum] = zero; \
        for (int64_t step = 0; step < steps; step++) { \
            for (int sum = 0; sum < count; sum++) { \
                IN_REGISTER(left); \
                sums[sum] = add(sums[sum], left, right); \
            } \
        } \
        for (int sum = 0; sum < count; sum++) IN_REGISTER(sums[sum]); \
        return steps * count * numbers; \
    }

#define WITH_AVX2 __attribute__((target("avx2,fma")))

WITH_AVX2 INLINED __m256i load_avx2(const char *from) { return _mm256_loadu_si256((const __m256i *)from); }
WITH_AVX2 INLINED __m256i add_int8_avx2(__m256i sum, __m256i left, __m256i right) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(left, right), _mm256_set1_epi16(1)));
}
WITH_AVX2 INLINED __m256 add_f32_avx2(__m256 sum, __m256 left, __m256 right) { return _mm256_fmadd_ps(left, right, sum); }

READ(avx2, WITH_AVX2, __m256i, _mm256_setzero_si256(), load_avx2, _mm256_add_epi64)
MULTIPLY(int8_avx2, WITH_AVX2, 8, __m256i, _mm256_setzero_si256(), _mm256_set1_epi8(1), add_int8_avx2, 32)
MULTIPLY(f32_avx2, WITH_AVX2, 12, __m256, _mm256_setzero_ps(), _mm256_set1_ps(1.0f), add_f32_avx2, 8)

#if !defined(NOODLE_WITHOUT_AVX512)
#define WITH_AVX512 __attribute__((target("avx512f")))
#define WITH_BF16 __attribute__((target("avx512f,avx512bf16")))
#define WITH_VNNI __attribute__((target("avx512f,avx512bw,avx512vnni")))

WITH_AVX512 INLINED __m512i load_avx512(const char *from) { return _mm512_loadu_si512(from); }
WITH_AVX512 INLINED __m512 add_f32_avx512(__m512 sum, __m512 left, __m512 right) { return _mm512_fmadd_ps(left, right, sum); }
WITH_BF16 INLINED __m512 add_bf16_avx512(__m512 sum, __m512 left, __m512 right) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
}

READ(avx512, WITH_AVX512, __m512i, _mm512_setzero_si512(), load_avx512, _mm512_add_epi64)
MULTIPLY(int8_avx512, WITH_VNNI, 12, __m512i, _mm512_setzero_si512(), _mm512_set1_epi8(1), _mm512_dpbusd_epi32, 64)
MULTIPLY(bf16_avx512, WITH_BF16, 12, __m512, _mm512_setzero_ps(), _mm512_set1_ps(1.0f), add_bf16_avx512, 32)
MULTIPLY(f32_avx512, WITH_AVX512, 12, __m512, _mm512_setzero_ps(), _mm512_set1_ps(1.0f), add_f32_avx512, 16)
#endif
#else
INLINED uint64_t load_word(const char *from) {
    uint64_t word;
    memcpy(&word, from, sizeof word);
    return word;
}
INLINED uint64_t add_words(uint64_t left, uint64_t right) { return left + right; }

READ(plain, , uint64_t, 0, load_word, add_words)
#endif
