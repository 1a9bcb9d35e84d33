/* How each block type is unpacked from the layout of layout.h: a constant few for each type, and
 *   scales_<type>   what is prepared once for each block of 16 rows
 *   prepare_<type>  prepares it
 *   unpack_<type>   unpacks unit outer * INNER + inner of a block, for LANES rows from part * LANES on
 *
 * <type>_LARGEST is the largest byte of a weight, or SIGNED where bytes have a sign; a weight is (byte - 2^ZERO_SHIFT) * scale, or
 * byte * scale - minimum, or (without either) byte * scale. Types with HALVES 2 have a scale for each 16 elements.
 * READ_AGAIN: bytes of a block are read for units that are far apart. LOOPS_OVER_LONE_ROWS: code for one row as a constant, whose
 * loads the compiler reorders, reads memory more slowly (measured; with AVX512 alone). Formulas: ggml-quants.c, dequantize_row_*.
 */

struct unit {
    bytes weights[8]; /* [g]: elements 4 * g to 4 * g + 3 of each row */
    floats scale[2];
    floats minimum;
};

static const int8_t IQ4_VALUES[16] __attribute__((aligned(16))) = {
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const int8_t FP4_VALUES[16] __attribute__((aligned(16))) = { /* twice the value, plus 16 */
    16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4};

/* the place of vector g for `part`, where `at` is the first of all parts' vectors */
INLINED const char *vector_at(const char *at, int g, int part) { return at + g * 4 * GROUP_ROWS + part * 4 * LANES; }

/* 32 elements from 16 bytes: the lower nibbles are the first 16 elements, the upper ones the others */
WITH INLINED void unpack_nibbles(struct unit *unit, const char *at, int part) {
    for (int g = 0; g < 4; g++) {
        const bytes raw = load_bytes(vector_at(at, g, part));
        unit->weights[g] = masked(raw, 0x0f);
        unit->weights[g + 4] = masked(shifted_down(raw, 4), 0x0f);
    }
}

#define NO_SCALES(type) \
    struct scales_##type {}; \
    WITH INLINED void prepare_##type(struct scales_##type *scales, const char *group) { (void)scales, (void)group; }

#define Q8_0_ITEMS 32
#define Q8_0_BYTES 34
#define Q8_0_INNER 1
#define Q8_0_HALVES 1
#define Q8_0_LARGEST SIGNED
#define Q8_0_ZERO_SHIFT SIGNED_SHIFT
#define Q8_0_READ_AGAIN 0
#define Q8_0_LOOPS_OVER_LONE_ROWS 0
#define Q8_0_HAS_MINIMUM 0
NO_SCALES(Q8_0)
WITH INLINED void unpack_Q8_0(
    struct unit *unit, const struct scales_Q8_0 *scales, const char *group, int outer, int inner, int part) {
    (void)scales, (void)outer, (void)inner;
    unit->scale[0] = halves(group + part * 2 * LANES);
    for (int g = 0; g < 8; g++) unit->weights[g] = as_multiplied(load_bytes(vector_at(group + 2 * GROUP_ROWS, g, part)));
}

#define Q4_0_ITEMS 32
#define Q4_0_BYTES 18
#define Q4_0_INNER 1
#define Q4_0_HALVES 1
#define Q4_0_LARGEST 15
#define Q4_0_ZERO_SHIFT 3
#define Q4_0_READ_AGAIN 0
#define Q4_0_LOOPS_OVER_LONE_ROWS 0
#define Q4_0_HAS_MINIMUM 0
NO_SCALES(Q4_0)
WITH INLINED void unpack_Q4_0(
    struct unit *unit, const struct scales_Q4_0 *scales, const char *group, int outer, int inner, int part) {
    (void)scales, (void)outer, (void)inner;
    unit->scale[0] = halves(group + part * 2 * LANES);
    unpack_nibbles(unit, group + 2 * GROUP_ROWS, part);
}

#define Q4_1_ITEMS 32
#define Q4_1_BYTES 20
#define Q4_1_INNER 1
#define Q4_1_HALVES 1
#define Q4_1_LARGEST 15
#define Q4_1_ZERO_SHIFT 0
#define Q4_1_READ_AGAIN 0
#define Q4_1_LOOPS_OVER_LONE_ROWS 0
#define Q4_1_HAS_MINIMUM 1
NO_SCALES(Q4_1)
WITH INLINED void unpack_Q4_1(
    struct unit *unit, const struct scales_Q4_1 *scales, const char *group, int outer, int inner, int part) {
    (void)scales, (void)outer, (void)inner;
    unit->scale[0] = halves(group + part * 2 * LANES);
    unit->minimum = negative(halves(group + 2 * GROUP_ROWS + part * 2 * LANES));
    unpack_nibbles(unit, group + 4 * GROUP_ROWS, part);
}

#define Q5_0_ITEMS 32
#define Q5_0_BYTES 22
#define Q5_0_INNER 1
#define Q5_0_HALVES 1
#define Q5_0_LARGEST 31
#define Q5_0_ZERO_SHIFT 4
#define Q5_0_READ_AGAIN 0
#define Q5_0_LOOPS_OVER_LONE_ROWS 0
#define Q5_0_HAS_MINIMUM 0
NO_SCALES(Q5_0)
/* the fifth bits of 32 elements are those of an integer for each row */
WITH INLINED void unpack_fives(struct unit *unit, const char *at, int part) {
    const bytes bits = load_bytes(vector_at(at, 0, part));
    unpack_nibbles(unit, at + 4 * GROUP_ROWS, part);
    _Pragma("GCC unroll 8") for (int g = 0; g < 8; g++)
        unit->weights[g] = joined(unit->weights[g], bits_of_four(bits, g, 0x10));
}
WITH INLINED void unpack_Q5_0(
    struct unit *unit, const struct scales_Q5_0 *scales, const char *group, int outer, int inner, int part) {
    (void)scales, (void)outer, (void)inner;
    unit->scale[0] = halves(group + part * 2 * LANES);
    unpack_fives(unit, group + 2 * GROUP_ROWS, part);
}

#define Q5_1_ITEMS 32
#define Q5_1_BYTES 24
#define Q5_1_INNER 1
#define Q5_1_HALVES 1
#define Q5_1_LARGEST 31
#define Q5_1_ZERO_SHIFT 0
#define Q5_1_READ_AGAIN 0
#define Q5_1_LOOPS_OVER_LONE_ROWS 0
#define Q5_1_HAS_MINIMUM 1
NO_SCALES(Q5_1)
WITH INLINED void unpack_Q5_1(
    struct unit *unit, const struct scales_Q5_1 *scales, const char *group, int outer, int inner, int part) {
    (void)scales, (void)outer, (void)inner;
    unit->scale[0] = halves(group + part * 2 * LANES);
    unit->minimum = negative(halves(group + 2 * GROUP_ROWS + part * 2 * LANES));
    unpack_fives(unit, group + 4 * GROUP_ROWS, part);
}

/* 6-bit scales and minimums of 8 units in 12 bytes, of 16 rows: see get_scale_min_k4 of ggml-quants.c */
struct scales_k4 {
    uint8_t scale[8][GROUP_ROWS], minimum[8][GROUP_ROWS];
} __attribute__((aligned(64)));
WITH INLINED void prepare_k4(struct scales_k4 *scales, const char *at) {
    for (int part = 0; part < PARTS; part++) {
        const bytes a = load_bytes(vector_at(at, 0, part)), b = load_bytes(vector_at(at, 1, part));
        const bytes c = load_bytes(vector_at(at, 2, part));
        char *scale = (char *)scales->scale + part * 4 * LANES, *minimum = (char *)scales->minimum + part * 4 * LANES;
        store_bytes(scale, masked(a, 0x3f));
        store_bytes(minimum, masked(b, 0x3f));
        store_bytes(scale + 64, joined(masked(c, 0x0f), masked(shifted_down(a, 2), 0x30)));
        store_bytes(minimum + 64, joined(masked(shifted_down(c, 4), 0x0f), masked(shifted_down(b, 2), 0x30)));
    }
}
WITH INLINED void scale_k4(struct unit *unit, const struct scales_k4 *scales, const char *group, int number, int part) {
    const floats scale = halves(group + part * 2 * LANES), minimum = halves(group + 2 * GROUP_ROWS + part * 2 * LANES);
    unit->scale[0] = multiply(scale, from_u8(scales->scale[number] + part * LANES));
    unit->minimum = multiply(minimum, from_u8(scales->minimum[number] + part * LANES));
}

#define Q4_K_ITEMS 256
#define Q4_K_BYTES 144
#define Q4_K_INNER 2
#define Q4_K_HALVES 1
#define Q4_K_LARGEST 15
#define Q4_K_ZERO_SHIFT 0
#define Q4_K_READ_AGAIN 0
#define Q4_K_LOOPS_OVER_LONE_ROWS 1
#define Q4_K_HAS_MINIMUM 1
struct scales_Q4_K { struct scales_k4 each; };
WITH INLINED void prepare_Q4_K(struct scales_Q4_K *scales, const char *group) {
    prepare_k4(&scales->each, group + 4 * GROUP_ROWS);
}
WITH INLINED void unpack_Q4_K(
    struct unit *unit, const struct scales_Q4_K *scales, const char *group, int outer, int inner, int part) {
    scale_k4(unit, &scales->each, group, 2 * outer + inner, part);
    const char *at = group + 16 * GROUP_ROWS + outer * 32 * GROUP_ROWS;
    for (int g = 0; g < 8; g++) {
        const bytes raw = load_bytes(vector_at(at, g, part));
        unit->weights[g] = masked(inner ? shifted_down(raw, 4) : raw, 0x0f);
    }
}

#define Q5_K_ITEMS 256
#define Q5_K_BYTES 176
#define Q5_K_INNER 8
#define Q5_K_HALVES 1
#define Q5_K_LARGEST 31
#define Q5_K_ZERO_SHIFT 0
#define Q5_K_READ_AGAIN 1
#define Q5_K_LOOPS_OVER_LONE_ROWS 1
#define Q5_K_HAS_MINIMUM 1
struct scales_Q5_K { struct scales_k4 each; };
WITH INLINED void prepare_Q5_K(struct scales_Q5_K *scales, const char *group) {
    prepare_k4(&scales->each, group + 4 * GROUP_ROWS);
}
WITH INLINED void unpack_Q5_K(
    struct unit *unit, const struct scales_Q5_K *scales, const char *group, int outer, int inner, int part) {
    (void)outer;
    scale_k4(unit, &scales->each, group, inner, part);
    const char *fifth = group + 16 * GROUP_ROWS, *at = fifth + 32 * GROUP_ROWS + inner / 2 * 32 * GROUP_ROWS;
    for (int g = 0; g < 8; g++) {
        const bytes raw = load_bytes(vector_at(at, g, part)), bits = load_bytes(vector_at(fifth, g, part));
        const bytes bit = inner <= 4 ? shifted_up(bits, 4 - inner) : shifted_down(bits, inner - 4);
        unit->weights[g] = joined(masked(inner % 2 ? shifted_down(raw, 4) : raw, 0x0f), masked(bit, 0x10));
    }
}

#define Q6_K_ITEMS 256
#define Q6_K_BYTES 210
#define Q6_K_INNER 4
#define Q6_K_HALVES 2
#define Q6_K_LARGEST 63
#define Q6_K_ZERO_SHIFT 5
#define Q6_K_READ_AGAIN 1
#define Q6_K_LOOPS_OVER_LONE_ROWS 0
#define Q6_K_HAS_MINIMUM 0
NO_SCALES(Q6_K)
WITH INLINED void unpack_Q6_K(
    struct unit *unit, const struct scales_Q6_K *scales, const char *group, int outer, int inner, int part) {
    (void)scales;
    const floats scale = halves(group + part * 2 * LANES);
    const char *factors = group + 2 * GROUP_ROWS + (8 * outer + 2 * inner) * GROUP_ROWS + part * LANES;
    unit->scale[0] = multiply(scale, from_i8(factors));
    unit->scale[1] = multiply(scale, from_i8(factors + GROUP_ROWS));
    const char *high = group + (18 + 96 * outer) * GROUP_ROWS, *low = high + (32 + inner % 2 * 32) * GROUP_ROWS;
    for (int g = 0; g < 8; g++) {
        const bytes raw = load_bytes(vector_at(low, g, part)), bits = load_bytes(vector_at(high, g, part));
        const bytes bit = inner <= 2 ? shifted_up(bits, 4 - 2 * inner) : shifted_down(bits, 2);
        unit->weights[g] = joined(masked(inner >= 2 ? shifted_down(raw, 4) : raw, 0x0f), masked(bit, 0x30));
    }
}

#define IQ4_NL_ITEMS 32
#define IQ4_NL_BYTES 18
#define IQ4_NL_INNER 1
#define IQ4_NL_HALVES 1
#define IQ4_NL_LARGEST SIGNED
#define IQ4_NL_ZERO_SHIFT SIGNED_SHIFT
#define IQ4_NL_READ_AGAIN 0
#define IQ4_NL_LOOPS_OVER_LONE_ROWS 0
#define IQ4_NL_HAS_MINIMUM 0
NO_SCALES(IQ4_NL)
WITH INLINED void unpack_iq4(struct unit *unit, const char *at, int part) {
    unpack_nibbles(unit, at, part);
    for (int g = 0; g < 8; g++) unit->weights[g] = as_multiplied(looked_up(IQ4_VALUES, unit->weights[g]));
}
WITH INLINED void unpack_IQ4_NL(
    struct unit *unit, const struct scales_IQ4_NL *scales, const char *group, int outer, int inner, int part) {
    (void)scales, (void)outer, (void)inner;
    unit->scale[0] = halves(group + part * 2 * LANES);
    unpack_iq4(unit, group + 2 * GROUP_ROWS, part);
}

#define IQ4_XS_ITEMS 256
#define IQ4_XS_BYTES 136
#define IQ4_XS_INNER 1
#define IQ4_XS_HALVES 1
#define IQ4_XS_LARGEST SIGNED
#define IQ4_XS_ZERO_SHIFT SIGNED_SHIFT
#define IQ4_XS_READ_AGAIN 0
#define IQ4_XS_LOOPS_OVER_LONE_ROWS 0
#define IQ4_XS_HAS_MINIMUM 0
/* 6-bit scales less 32: the lower four bits of two in a byte, the upper two of all eight in 16 bits */
struct scales_IQ4_XS {
    int8_t scale[8][GROUP_ROWS];
};
WITH INLINED void prepare_IQ4_XS(struct scales_IQ4_XS *scales, const char *group) {
    const uint8_t *low = (const uint8_t *)group + 4 * GROUP_ROWS;
    for (int number = 0; number < 8; number++) {
        for (int row = 0; row < GROUP_ROWS; row++) {
            uint16_t high;
            memcpy(&high, group + 2 * GROUP_ROWS + 2 * row, 2);
            const int lower = low[number / 2 * GROUP_ROWS + row] >> number % 2 * 4 & 0x0f;
            scales->scale[number][row] = (int8_t)((lower | (high >> 2 * number & 3) << 4) - 32);
        }
    }
}
WITH INLINED void unpack_IQ4_XS(
    struct unit *unit, const struct scales_IQ4_XS *scales, const char *group, int outer, int inner, int part) {
    (void)inner;
    const char *factors = (const char *)scales->scale[outer] + part * LANES;
    unit->scale[0] = multiply(halves(group + part * 2 * LANES), from_i8(factors));
    unpack_iq4(unit, group + (8 + 16 * outer) * GROUP_ROWS, part);
}

#define MXFP4_ITEMS 32
#define MXFP4_BYTES 17
#define MXFP4_INNER 1
#define MXFP4_HALVES 1
#define MXFP4_LARGEST 31
#define MXFP4_ZERO_SHIFT 4
#define MXFP4_READ_AGAIN 0
#define MXFP4_LOOPS_OVER_LONE_ROWS 0
#define MXFP4_HAS_MINIMUM 0
NO_SCALES(MXFP4)
WITH INLINED void unpack_MXFP4(
    struct unit *unit, const struct scales_MXFP4 *scales, const char *group, int outer, int inner, int part) {
    (void)scales, (void)outer, (void)inner;
    unit->scale[0] = halved_powers(group + part * LANES);
    unpack_nibbles(unit, group + GROUP_ROWS, part);
    for (int g = 0; g < 8; g++) unit->weights[g] = looked_up(FP4_VALUES, unit->weights[g]);
}
