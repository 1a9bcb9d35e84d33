/* Attention (attention.h) for AVX512F. */

#if defined(__x86_64__) && !defined(NOODLE_WITHOUT_AVX512)
#include "../tensors.h"
#include "../work.h"

#define WITH __attribute__((target("avx512f,fma,f16c")))
#define NAME(x) x##_avx512
#define LANES 16
#define ROWS 8
#define KEY_PARTS 2
#define OP(x) _mm512_##x##_ps

typedef __m512 vector;
WITH INLINED vector rounded(vector x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
WITH INLINED vector power_of_2(vector x) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), x); }
WITH INLINED vector where_below(vector x, vector y, vector then, vector otherwise) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), otherwise, then);
}
WITH INLINED bool is_any_above(vector x, vector y) { return _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ) != 0; }
WITH INLINED float largest(vector x) { return _mm512_reduce_max_ps(x); }
WITH INLINED vector from_f16(const char *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
WITH INLINED void to_f16(char *to, vector x) {
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
WITH INLINED vector from_i8(const char *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
}

#include "block.h"
#include "rows.h"
#include "attention.h"
#include "parts.h"
#endif
