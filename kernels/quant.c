/* quant.c: block-quantised formats of GGUF to float, and the simple ones from float. One function a format, a block at
 * a time; the inner loops have fixed length so that the compiler vectorises them. Products and sums are rounded one by
 * one (no fused multiply-add): the values are then those of every other reader. */
#include "quant.h"

#include <string.h>

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

static inline float half_at(const uint8_t *p) {
    uint32_t h = (uint32_t)p[0] | (uint32_t)p[1] << 8, sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, bits;
    float value;
    if (exponent == 0) {
        value = (float)(h & 0x3ffu) * 0x1p-24f; /* subnormal: no float subnormal on the way, which may be flushed */
        return sign ? -value : value;
    }
    bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (h & 0x3ffu) << 13;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* ---- blocks of 32
 * ---------------------------------------------------------------------------------------------------- */

static void block_q4_0(const uint8_t *b, float *y) {
    float d = half_at(b);
    for (int i = 0; i < 16; i++) {
        y[i] = (float)((b[2 + i] & 15) - 8) * d;
        y[i + 16] = (float)((b[2 + i] >> 4) - 8) * d;
    }
}

static void block_q4_1(const uint8_t *b, float *y) {
    float d = half_at(b), m = half_at(b + 2);
    for (int i = 0; i < 16; i++) {
        y[i] = (float)(b[4 + i] & 15) * d + m;
        y[i + 16] = (float)(b[4 + i] >> 4) * d + m;
    }
}

static void block_q5_0(const uint8_t *b, float *y) {
    float d = half_at(b);
    uint32_t high = (uint32_t)b[2] | (uint32_t)b[3] << 8 | (uint32_t)b[4] << 16 | (uint32_t)b[5] << 24;
    for (int i = 0; i < 16; i++) {
        y[i] = (float)((int)((b[6 + i] & 15) | (high >> i & 1) << 4) - 16) * d;
        y[i + 16] = (float)((int)((b[6 + i] >> 4) | (high >> (i + 16) & 1) << 4) - 16) * d;
    }
}

static void block_q5_1(const uint8_t *b, float *y) {
    float d = half_at(b), m = half_at(b + 2);
    uint32_t high = (uint32_t)b[4] | (uint32_t)b[5] << 8 | (uint32_t)b[6] << 16 | (uint32_t)b[7] << 24;
    for (int i = 0; i < 16; i++) {
        y[i] = (float)((b[8 + i] & 15) | (high >> i & 1) << 4) * d + m;
        y[i + 16] = (float)((b[8 + i] >> 4) | (high >> (i + 16) & 1) << 4) * d + m;
    }
}

static void block_q8_0(const uint8_t *b, float *y) {
    float d = half_at(b);
    const int8_t *q = (const int8_t *)b + 2;
    for (int i = 0; i < 32; i++) y[i] = (float)q[i] * d;
}

static const int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

static void iq4_codes(const uint8_t *q, float d, float *y) {
    for (int i = 0; i < 16; i++) {
        y[i] = (float)iq4_values[q[i] & 15] * d;
        y[i + 16] = (float)iq4_values[q[i] >> 4] * d;
    }
}

static void block_iq4_nl(const uint8_t *b, float *y) { iq4_codes(b + 2, half_at(b), y); }

/* ---- super-blocks of 256
 * --------------------------------------------------------------------------------------------- */

/* d, scales of 6 bits in two parts, 8 x 16 bytes of codes */
static void block_iq4_xs(const uint8_t *b, float *y) {
    float d = half_at(b);
    uint32_t high = (uint32_t)b[2] | (uint32_t)b[3] << 8;
    for (int s = 0; s < 8; s++) {
        int low = b[4 + s / 2] >> 4 * (s & 1) & 15, scale = (low | (int)(high >> 2 * s & 3) << 4) - 32;
        iq4_codes(b + 8 + 16 * s, d * (float)scale, y + 32 * s);
    }
}

/* 16 bytes of (min << 4 | scale), 64 bytes of 2-bit codes, d, dmin; a code byte serves 4 groups of 16, 32 elements
 * apart */
static void block_q2_k(const uint8_t *b, float *y) {
    const uint8_t *codes = b + 16;
    float d = half_at(b + 80), dmin = half_at(b + 82);
    for (int g = 0; g < 16; g++) {
        const uint8_t *q = codes + 32 * (g / 8) + 16 * (g & 1);
        int shift = g % 8 / 2 * 2;
        float scale = d * (float)(b[g] & 15), min = dmin * (float)(b[g] >> 4);
        for (int i = 0; i < 16; i++) y[16 * g + i] = scale * (float)(q[i] >> shift & 3) - min;
    }
}

/* 32 bytes of high bits (inverted), 64 of 2-bit codes, 12 of 6-bit scales, d */
static void block_q3_k(const uint8_t *b, float *y) {
    const uint8_t *codes = b + 32, *packed = b + 96;
    float d = half_at(b + 108);
    for (int g = 0; g < 16; g++) {
        int low = packed[g & 7] >> 4 * (g / 8) & 15, high = packed[8 + (g & 3)] >> 2 * (g / 4) & 3;
        const uint8_t *q = codes + 32 * (g / 8) + 16 * (g & 1), *mask = b + 16 * (g & 1);
        int shift = g % 8 / 2 * 2, bit = g / 2;
        float scale = d * (float)((low | high << 4) - 32);
        for (int i = 0; i < 16; i++)
            y[16 * g + i] = scale * (float)((q[i] >> shift & 3) - (mask[i] >> bit & 1 ? 0 : 4));
    }
}

/* 8 scales and 8 mins of 6 bits in 12 bytes */
static void k_scale_min(const uint8_t *packed, int g, int *scale, int *min) {
    if (g < 4) {
        *scale = packed[g] & 63;
        *min = packed[g + 4] & 63;
    } else {
        *scale = (packed[g + 4] & 15) | packed[g - 4] >> 6 << 4;
        *min = packed[g + 4] >> 4 | packed[g] >> 6 << 4;
    }
}

static void block_q4_k(const uint8_t *b, float *y) {
    float d = half_at(b), dmin = half_at(b + 2);
    for (int g = 0; g < 8; g++) {
        const uint8_t *q = b + 16 + 32 * (g / 2);
        int scale, min, shift = 4 * (g & 1);
        k_scale_min(b + 4, g, &scale, &min);
        float ds = d * (float)scale, dm = dmin * (float)min;
        for (int i = 0; i < 32; i++) y[32 * g + i] = ds * (float)(q[i] >> shift & 15) - dm;
    }
}

static void block_q5_k(const uint8_t *b, float *y) {
    const uint8_t *high = b + 16;
    float d = half_at(b), dmin = half_at(b + 2);
    for (int g = 0; g < 8; g++) {
        const uint8_t *q = b + 48 + 32 * (g / 2);
        int scale, min, shift = 4 * (g & 1);
        k_scale_min(b + 4, g, &scale, &min);
        float ds = d * (float)scale, dm = dmin * (float)min;
        for (int i = 0; i < 32; i++) y[32 * g + i] = ds * (float)((q[i] >> shift & 15) | (high[i] >> g & 1) << 4) - dm;
    }
}

/* 128 bytes of low nibbles, 64 of high pairs, 16 int8 scales, d */
static void block_q6_k(const uint8_t *b, float *y) {
    const int8_t *scales = (const int8_t *)b + 192;
    float d = half_at(b + 208);
    for (int g = 0; g < 16; g++) {
        int half = g / 8, part = g % 8 / 2, side = 16 * (g & 1);
        const uint8_t *low = b + 64 * half + 32 * (part & 1) + side, *high = b + 128 + 32 * half + side;
        int low_shift = part / 2 * 4, high_shift = 2 * part;
        float scale = d * (float)scales[g];
        for (int i = 0; i < 16; i++)
            y[16 * g + i] = scale * (float)(((low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4) - 32);
    }
}

/* ---- by dtype
 * -------------------------------------------------------------------------------------------------------- */

/* The loop stands once a format so that the block function is inlined into it. */
#define EACH_BLOCK(function, length, size)                                                                             \
    for (int64_t i = 0; i < n / (length); i++) function(b + i * (size), out + i * (length));                           \
    return

void lc_dequantise(int dtype, const void *blocks, float *out, int64_t n) {
    const uint8_t *b = blocks;
    switch (dtype) {
    case LC_K_Q4_0: EACH_BLOCK(block_q4_0, 32, 18);
    case LC_K_Q4_1: EACH_BLOCK(block_q4_1, 32, 20);
    case LC_K_Q5_0: EACH_BLOCK(block_q5_0, 32, 22);
    case LC_K_Q5_1: EACH_BLOCK(block_q5_1, 32, 24);
    case LC_K_Q8_0: EACH_BLOCK(block_q8_0, 32, 34);
    case LC_K_Q2_K: EACH_BLOCK(block_q2_k, 256, 84);
    case LC_K_Q3_K: EACH_BLOCK(block_q3_k, 256, 110);
    case LC_K_Q4_K: EACH_BLOCK(block_q4_k, 256, 144);
    case LC_K_Q5_K: EACH_BLOCK(block_q5_k, 256, 176);
    case LC_K_Q6_K: EACH_BLOCK(block_q6_k, 256, 210);
    case LC_K_IQ4_NL: EACH_BLOCK(block_iq4_nl, 32, 18);
    case LC_K_FILE_IQ4_XS: EACH_BLOCK(block_iq4_xs, 256, 136);
    default: return;
    }
}

/* ---- from float
 * ------------------------------------------------------------------------------------------------------ */

/* Rounded to nearest even. */
static void put_half(uint8_t *p, float value) {
    uint32_t bits, sign, size, half;
    float shifted;
    memcpy(&bits, &value, sizeof bits);
    sign = bits >> 16 & 0x8000u;
    size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) {
        half = 0x7e00u;
    } else if (size >= 0x477ff000u) {
        half = 0x7c00u;
    } else if (size < 0x38800000u) { /* adding 0.5 leaves the rounded fraction in the low bits */
        memcpy(&shifted, &size, sizeof shifted);
        shifted += 0.5f;
        memcpy(&half, &shifted, sizeof half);
        half -= 0x3f000000u;
    } else {
        half = (size - 0x38000000u + 0xfffu + (size >> 13 & 1)) >> 13;
    }
    half |= sign;
    p[0] = (uint8_t)half;
    p[1] = (uint8_t)(half >> 8);
}

static int clipped(float v, int most) { return v >= (float)most ? most : v > 0 ? (int)v : 0; }

/* The scale that maps the entry of largest size to -levels. */
static float signed_scale(const float *x, int levels) {
    float most = 0, size = -1;
    for (int i = 0; i < 32; i++) {
        float a = x[i] < 0 ? -x[i] : x[i];
        if (a > size) {
            size = a;
            most = x[i];
        }
    }
    return most / (float)-levels;
}

static float range_scale(const float *x, int levels, float *least) {
    float most = x[0];
    *least = x[0];
    for (int i = 1; i < 32; i++) {
        most = x[i] > most ? x[i] : most;
        *least = x[i] < *least ? x[i] : *least;
    }
    return (most - *least) / (float)levels;
}

static void put_codes(uint8_t *b, uint8_t *high, const int *q) {
    for (int i = 0; i < 16; i++) b[i] = (uint8_t)((q[i] & 15) | (q[i + 16] & 15) << 4);
    for (int i = 0; high && i < 4; i++) high[i] = 0;
    for (int i = 0; high && i < 32; i++) high[i / 8] = (uint8_t)(high[i / 8] | q[i] >> 4 << i % 8);
}

static void to_signed(const float *x, uint8_t *b, int levels) {
    float d = signed_scale(x, levels), inverse = d == 0 ? 0 : 1 / d;
    int q[32];
    for (int i = 0; i < 32; i++) q[i] = clipped(x[i] * inverse + ((float)levels + 0.5f), 2 * levels - 1);
    put_half(b, d);
    put_codes(levels == 8 ? b + 2 : b + 6, levels == 8 ? NULL : b + 2, q);
}

static void to_range(const float *x, uint8_t *b, int levels) {
    float least, d = range_scale(x, levels, &least), inverse = d == 0 ? 0 : 1 / d;
    int q[32];
    for (int i = 0; i < 32; i++) q[i] = clipped((x[i] - least) * inverse + 0.5f, levels);
    put_half(b, d);
    put_half(b + 2, least);
    put_codes(levels == 15 ? b + 4 : b + 8, levels == 15 ? NULL : b + 4, q);
}

static void to_q8_0(const float *x, uint8_t *b) {
    float most = 0;
    for (int i = 0; i < 32; i++) most = (x[i] < 0 ? -x[i] : x[i]) > most ? (x[i] < 0 ? -x[i] : x[i]) : most;
    float d = most / 127, inverse = d == 0 ? 0 : 1 / d;
    put_half(b, d);
    for (int i = 0; i < 32; i++) {
        float v = x[i] * inverse, size = v < 0 ? -v : v; /* halves are rounded away from 0 */
        int whole = clipped(size, 127);
        whole += size - (float)whole >= 0.5f && whole < 127;
        b[2 + i] = (uint8_t)(int8_t)(v < 0 ? -whole : whole);
    }
}

void lc_quantise(int dtype, const float *in, void *blocks, int64_t n) {
    uint8_t *b = blocks;
    for (int64_t i = 0; i < n / 32; i++, in += 32) {
        switch (dtype) {
        case LC_K_Q4_0: to_signed(in, b + i * 18, 8); break;
        case LC_K_Q4_1: to_range(in, b + i * 20, 15); break;
        case LC_K_Q5_0: to_signed(in, b + i * 22, 16); break;
        case LC_K_Q5_1: to_range(in, b + i * 24, 31); break;
        case LC_K_Q8_0: to_q8_0(in, b + i * 34); break;
        default: return;
        }
    }
}
