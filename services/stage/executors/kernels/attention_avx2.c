/* Attention (attention.h) for AVX2, FMA and F16C. */

#if defined(__x86_64__)
#include "packed_weights.h"

#define WITH __attribute__((target("avx2,fma,f16c")))
#define NAME(x) x##_avx2
#define LANES 8
#define PARTS 2
#define UNROLL 4

typedef __m256 vector;
WITH INLINED vector load(const float *from) { return _mm256_loadu_ps(from); }
WITH INLINED void store(float *to, vector x) { _mm256_storeu_ps(to, x); }
WITH INLINED vector broadcast(float x) { return _mm256_set1_ps(x); }
WITH INLINED vector add(vector x, vector y) { return _mm256_add_ps(x, y); }
WITH INLINED vector subtract(vector x, vector y) { return _mm256_sub_ps(x, y); }
WITH INLINED vector multiply(vector x, vector y) { return _mm256_mul_ps(x, y); }
WITH INLINED vector divide(vector x, vector y) { return _mm256_div_ps(x, y); }
WITH INLINED vector fmadd(vector x, vector y, vector z) { return _mm256_fmadd_ps(x, y, z); }
WITH INLINED vector max(vector x, vector y) { return _mm256_max_ps(x, y); }
WITH INLINED vector min(vector x, vector y) { return _mm256_min_ps(x, y); }
WITH INLINED vector rounded(vector x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
WITH INLINED vector power_of_2(vector x) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
WITH INLINED vector where_below(vector x, vector y, vector then, vector otherwise) {
    return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(x, y, _CMP_LT_OQ));
}
WITH INLINED vector from_f16(const char *from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }
WITH INLINED vector from_i8(const char *from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
}

#include "attention.h"
#endif
