/* Products (products.h, floats.h) for arm64 with the dot product (ARMv8.2's optional SDOT: Cortex-A55 and -A75, Neoverse and
 * Apple's M series, and later ones), which multiplies four signed bytes with four of a lane and sums them in 32 bits.
 *
 * A vector is one register of four weight rows: with the eight vectors of a unit, a row's numbers in two registers and its
 * sums, all is in the 32 registers, and a wider vector would save nothing but the loads of the numbers. */

#if defined(__aarch64__) && defined(__linux__)
#include <arm_neon.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>

#include "layout.h"

#define WITH __attribute__((target("arch=armv8.2-a+dotprod")))
#define NAME(x) x##_neon
#define LANES 4
#define FLOAT_TILE_ROWS 4 /* with four accumulators a row, more rows do not stay in the 32 registers */
#define LOOPS_OVER_LONE_ROWS 1 /* a constant row leaves too few registers, and the loop over rows spills none */
#define SIGNED_SHIFT 0

typedef int8x16_t bytes;
typedef int32x4_t ints;
typedef float32x4_t floats;

WITH INLINED bytes load_bytes(const char *at) { return vld1q_s8((const int8_t *)at); }
WITH INLINED void store_bytes(char *at, bytes x) { vst1q_s8((int8_t *)at, x); }
WITH INLINED bytes shifted_down(bytes x, int bits) { return (bytes)vshlq_u8((uint8x16_t)x, vdupq_n_s8((int8_t)-bits)); }
WITH INLINED bytes shifted_up(bytes x, int bits) { return vshlq_s8(x, vdupq_n_s8((int8_t)bits)); }
WITH INLINED bytes masked(bytes x, int mask) { return vandq_s8(x, vdupq_n_s8((int8_t)mask)); }
WITH INLINED bytes joined(bytes x, bytes y) { return vorrq_s8(x, y); }
WITH INLINED bytes as_multiplied(bytes x) { return x; }
WITH INLINED bytes looked_up(const int8_t *values, bytes x) { return vqtbl1q_s8(vld1q_s8(values), (uint8x16_t)x); }
/* bits 4 * g to 4 * g + 3 of each integer as four bytes, which are `value` where the bit is set */
WITH INLINED bytes bits_of_four(bytes x, int g, int value) {
    static const uint8_t bytes_of_ints[16] = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
    const uint8x16_t places = vaddq_u8(vld1q_u8(bytes_of_ints), vdupq_n_u8((uint8_t)(g / 2)));
    const bytes bit = vreinterpretq_s8_u32(vdupq_n_u32(g % 2 ? 0x80402010 : 0x08040201));
    return masked(vreinterpretq_s8_u8(vtstq_s8(vqtbl1q_s8(x, places), bit)), value);
}

WITH INLINED ints load_ints(const char *at) { return vld1q_s32((const int32_t *)at); }
WITH INLINED ints broadcast_int(int32_t x) { return vdupq_n_s32(x); }
WITH INLINED ints shifted(ints x, int bits) { return vshlq_s32(x, vdupq_n_s32(bits)); }
WITH INLINED ints upper_halves(ints x) { return vandq_s32(x, vdupq_n_s32((int32_t)0xffff0000)); }
WITH INLINED floats as_floats(ints x) { return vreinterpretq_f32_s32(x); }
WITH INLINED floats to_floats(ints x) { return vcvtq_f32_s32(x); }

WITH INLINED floats load_floats(const float *at) { return vld1q_f32(at); }
WITH INLINED void store_floats(float *at, floats x) { vst1q_f32(at, x); }
WITH INLINED floats broadcast_float(float x) { return vdupq_n_f32(x); }
WITH INLINED floats multiply(floats x, floats y) { return vmulq_f32(x, y); }
WITH INLINED floats fmadd(floats x, floats y, floats z) { return vfmaq_f32(z, x, y); }
WITH INLINED floats negative(floats x) { return vnegq_f32(x); }
WITH INLINED floats halves(const char *at) { return vcvt_f32_f16(vld1_f16((const float16_t *)at)); }
/* four bytes, in the lower half of a vector's 64 bits */
WITH INLINED uint8x8_t load_four(const void *at) {
    uint32_t four;
    memcpy(&four, at, sizeof four);
    return vcreate_u8(four);
}
WITH INLINED uint32x4_t widened(uint8x8_t x) { return vmovl_u16(vget_low_u16(vmovl_u8(x))); }
WITH INLINED floats from_u8(const void *at) { return vcvtq_f32_u32(widened(load_four(at))); }
WITH INLINED floats from_i8(const void *at) {
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(load_four(at))))));
}
/* 2^(x - 128) of bytes x, as ggml has it (GGML_E8M0_TO_FP32_HALF) */
WITH INLINED floats halved_powers(const char *at) {
    const uint32x4_t x = widened(load_four(at));
    const uint32x4_t normal = vshlq_n_u32(vsubq_u32(x, vdupq_n_u32(1)), 23);
    const uint32x4_t small = vshlq_u32(vdupq_n_u32(0x00200000), vreinterpretq_s32_u32(x));
    return vreinterpretq_f32_u32(vbslq_u32(vcltq_u32(x, vdupq_n_u32(2)), small, normal));
}

/* `start` plus the sums of 4 * count products; count is 4 or 8 */
WITH INLINED ints dot(ints start, const bytes *weights, const int8_t *numbers, const int count, const int largest) {
    (void)largest;
    for (int half = 0; half < count / 4; half++, weights += 4) {
        const bytes given = vld1q_s8(numbers + 16 * half);
        start = vdotq_laneq_s32(start, weights[0], given, 0);
        start = vdotq_laneq_s32(start, weights[1], given, 1);
        start = vdotq_laneq_s32(start, weights[2], given, 2);
        start = vdotq_laneq_s32(start, weights[3], given, 3);
    }
    return start;
}

/* 32 elements in 8 bits. The maximum may ignore NaN. */
WITH INLINED void quantize_block(struct row_block *block, const float *from) {
    floats largest = vdupq_n_f32(0.0f);
    uint32x4_t is_number = vdupq_n_u32(UINT32_MAX);
    for (int part = 0; part < BLOCK; part += 4) {
        const floats numbers = vld1q_f32(from + part);
        largest = vmaxq_f32(largest, vabsq_f32(numbers));
        is_number = vandq_u32(is_number, vceqq_f32(numbers, numbers));
    }
    block->scale = vminvq_u32(is_number) ? vmaxvq_f32(largest) / 127.0f : NAN;
    const float inverse = inverse_of(block->scale);
    ints whole[8]; /* to the nearest, of two the even one */
    for (int part = 0; part < 8; part++) whole[part] = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(from + 4 * part), inverse));
    int32_t sums[2];
    for (int half = 0; half < 2; half++) {
        const ints *four = whole + 4 * half;
        const int16x8_t low = vcombine_s16(vqmovn_s32(four[0]), vqmovn_s32(four[1]));
        const int16x8_t high = vcombine_s16(vqmovn_s32(four[2]), vqmovn_s32(four[3]));
        vst1q_s8(block->numbers + 16 * half, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
        sums[half] = vaddvq_s32(vaddq_s32(vaddq_s32(four[0], four[1]), vaddq_s32(four[2], four[3])));
    }
    block->first_negative_sum = -sums[0];
    block->negative_sum = block->first_negative_sum - sums[1];
}

#include "floats.h"
#include "products.h"

bool noodle_has_neon(void) { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
#else
#include <stdbool.h>
bool noodle_has_neon(void) { return false; }
#endif
