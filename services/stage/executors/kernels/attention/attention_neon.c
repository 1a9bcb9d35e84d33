/* Attention (attention.h) for arm64 with the dot product: what is used here every arm64 has, but one library has one name
 * for its instructions (products_neon.c). */

#if defined(__aarch64__) && defined(__linux__)
#include <arm_neon.h>

#include "../tensors.h"
#include "../work.h"

#define WITH
#define NAME(x) x##_neon
#define LANES 4
#define ROWS 8
#define KEY_PARTS 2
#define OP(x) x##_of_four

typedef float32x4_t vector;
INLINED vector loadu_of_four(const float *from) { return vld1q_f32(from); }
INLINED void storeu_of_four(float *to, vector x) { vst1q_f32(to, x); }
INLINED vector set1_of_four(float x) { return vdupq_n_f32(x); }
INLINED vector add_of_four(vector x, vector y) { return vaddq_f32(x, y); }
INLINED vector sub_of_four(vector x, vector y) { return vsubq_f32(x, y); }
INLINED vector mul_of_four(vector x, vector y) { return vmulq_f32(x, y); }
INLINED vector div_of_four(vector x, vector y) { return vdivq_f32(x, y); }
INLINED vector fmadd_of_four(vector x, vector y, vector z) { return vfmaq_f32(z, x, y); }
INLINED vector max_of_four(vector x, vector y) { return vbslq_f32(vcgtq_f32(x, y), x, y); } /* as x86 does with NaN */
INLINED vector min_of_four(vector x, vector y) { return vbslq_f32(vcltq_f32(x, y), x, y); }

INLINED vector rounded(vector x) { return vrndnq_f32(x); }
INLINED vector power_of_2(vector x) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(x), vdupq_n_s32(127)), 23));
}
INLINED vector where_below(vector x, vector y, vector then, vector otherwise) {
    return vbslq_f32(vcltq_f32(x, y), then, otherwise);
}
INLINED bool is_any_above(vector x, vector y) { return vmaxvq_u32(vcgtq_f32(x, y)) != 0; }
INLINED float largest(vector x) { return vmaxnmvq_f32(x); }
INLINED vector from_f16(const char *from) { return vcvt_f32_f16(vld1_f16((const float16_t *)from)); }
INLINED void to_f16(char *to, vector x) { vst1_f16((float16_t *)to, vcvt_f16_f32(x)); }
INLINED vector from_i8(const char *from) {
    uint32_t four;
    memcpy(&four, from, sizeof four);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four)))));
}

#include "block.h"
#include "rows.h"
#include "attention.h"
#include "parts.h"
#endif
