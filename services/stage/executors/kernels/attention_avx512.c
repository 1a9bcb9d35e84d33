/* Attention (attention.h) for AVX512F. */

#if defined(__x86_64__) && !defined(NOODLE_WITHOUT_AVX512)
#include "packed_weights.h"

#define WITH __attribute__((target("avx512f,fma,f16c")))
#define NAME(x) x##_avx512
#define LANES 16
#define PARTS 1
#define UNROLL 16

typedef __m512 vector;
WITH INLINED vector load(const float *from) { return _mm512_loadu_ps(from); }
WITH INLINED void store(float *to, vector x) { _mm512_storeu_ps(to, x); }
WITH INLINED vector broadcast(float x) { return _mm512_set1_ps(x); }
WITH INLINED vector add(vector x, vector y) { return _mm512_add_ps(x, y); }
WITH INLINED vector subtract(vector x, vector y) { return _mm512_sub_ps(x, y); }
WITH INLINED vector multiply(vector x, vector y) { return _mm512_mul_ps(x, y); }
WITH INLINED vector divide(vector x, vector y) { return _mm512_div_ps(x, y); }
WITH INLINED vector fmadd(vector x, vector y, vector z) { return _mm512_fmadd_ps(x, y, z); }
WITH INLINED vector max(vector x, vector y) { return _mm512_max_ps(x, y); }
WITH INLINED vector min(vector x, vector y) { return _mm512_min_ps(x, y); }
WITH INLINED vector rounded(vector x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
WITH INLINED vector power_of_2(vector x) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), x); }
WITH INLINED vector where_below(vector x, vector y, vector then, vector otherwise) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), otherwise, then);
}
WITH INLINED vector from_f16(const char *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
WITH INLINED vector from_i8(const char *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
}

#include "attention.h"
#endif
