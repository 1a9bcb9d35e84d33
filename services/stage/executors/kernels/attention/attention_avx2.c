/* Attention (attention.h) for AVX2, FMA and F16C. */

#if defined(__x86_64__)
#include "../tensors.h"
#include "../work.h"

#define WITH __attribute__((target("avx2,fma,f16c")))
#define NAME(x) x##_avx2
#define LANES 8
#define ROWS 6
#define KEY_PARTS 2
#define OP(x) _mm256_##x##_ps

typedef __m256 vector;
WITH INLINED vector rounded(vector x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
WITH INLINED vector power_of_2(vector x) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
WITH INLINED vector where_below(vector x, vector y, vector then, vector otherwise) {
    return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(x, y, _CMP_LT_OQ));
}
WITH INLINED bool is_any_above(vector x, vector y) { return _mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_GT_OQ)) != 0; }
WITH INLINED float largest(vector x) {
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ps(most, _mm_movehdup_ps(most)));
}
WITH INLINED vector from_f16(const char *from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }
WITH INLINED void to_f16(char *to, vector x) {
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
WITH INLINED vector from_i8(const char *from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
}

#include "block.h"
#include "rows.h"
#include "attention.h"
#include "parts.h"
#endif
