/* quant.cuh: block-quantised formats on the device: eight neighbouring elements of a block at a time, so that a block
 * of 32 is four threads' work and a super-block of 256 a warp's. kernels/quant.c is the reference: products and sums
 * are rounded one by one, so that the values are the same bits. Blocks lie at multiples of their size from a base that
 * is 16-byte aligned or a row away from one; codes are read in words of four bytes where the format keeps these
 * aligned, else of two. */
#ifndef LC_QUANT_CUH
#define LC_QUANT_CUH

#include "device.cuh"

/* n elements (whole blocks) of a quantised dtype -> contiguous f32, bf16, f16 or f64; on the stream. In convert.cu. */
int lc_cuda_dequantise(int dtype, const void *blocks, int to, void *out, int64_t n);

/* Elements and bytes a block: lc_dtype_traits, for compile time. */
template <int Q> struct lc_quant;
#define LC_QUANT(id, elements, size)                                                                                   \
    template <> struct lc_quant<id> {                                                                                  \
        enum { block = elements, bytes = size };                                                                       \
    }
LC_QUANT(LC_K_Q4_0, 32, 18);
LC_QUANT(LC_K_Q4_1, 32, 20);
LC_QUANT(LC_K_Q5_0, 32, 22);
LC_QUANT(LC_K_Q5_1, 32, 24);
LC_QUANT(LC_K_Q8_0, 32, 34);
LC_QUANT(LC_K_Q2_K, 256, 84);
LC_QUANT(LC_K_Q3_K, 256, 110);
LC_QUANT(LC_K_Q4_K, 256, 144);
LC_QUANT(LC_K_Q5_K, 256, 176);
LC_QUANT(LC_K_Q6_K, 256, 210);
LC_QUANT(LC_K_IQ4_NL, 32, 18);
#undef LC_QUANT

/* Runs the statements with Q standing for the dtype; returns LC_K_UNSUPPORTED for one that is not quantised. */
#define LC_QUANTS(dtype, ...)                                                                                          \
    switch (dtype) {                                                                                                   \
    case LC_K_Q4_0: {                                                                                                  \
        enum { Q = LC_K_Q4_0 };                                                                                        \
        __VA_ARGS__                                                                                                    \
    } break;                                                                                                           \
    case LC_K_Q4_1: {                                                                                                  \
        enum { Q = LC_K_Q4_1 };                                                                                        \
        __VA_ARGS__                                                                                                    \
    } break;                                                                                                           \
    case LC_K_Q5_0: {                                                                                                  \
        enum { Q = LC_K_Q5_0 };                                                                                        \
        __VA_ARGS__                                                                                                    \
    } break;                                                                                                           \
    case LC_K_Q5_1: {                                                                                                  \
        enum { Q = LC_K_Q5_1 };                                                                                        \
        __VA_ARGS__                                                                                                    \
    } break;                                                                                                           \
    case LC_K_Q8_0: {                                                                                                  \
        enum { Q = LC_K_Q8_0 };                                                                                        \
        __VA_ARGS__                                                                                                    \
    } break;                                                                                                           \
    case LC_K_Q2_K: {                                                                                                  \
        enum { Q = LC_K_Q2_K };                                                                                        \
        __VA_ARGS__                                                                                                    \
    } break;                                                                                                           \
    case LC_K_Q3_K: {                                                                                                  \
        enum { Q = LC_K_Q3_K };                                                                                        \
        __VA_ARGS__                                                                                                    \
    } break;                                                                                                           \
    case LC_K_Q4_K: {                                                                                                  \
        enum { Q = LC_K_Q4_K };                                                                                        \
        __VA_ARGS__                                                                                                    \
    } break;                                                                                                           \
    case LC_K_Q5_K: {                                                                                                  \
        enum { Q = LC_K_Q5_K };                                                                                        \
        __VA_ARGS__                                                                                                    \
    } break;                                                                                                           \
    case LC_K_Q6_K: {                                                                                                  \
        enum { Q = LC_K_Q6_K };                                                                                        \
        __VA_ARGS__                                                                                                    \
    } break;                                                                                                           \
    case LC_K_IQ4_NL: {                                                                                                \
        enum { Q = LC_K_IQ4_NL };                                                                                      \
        __VA_ARGS__                                                                                                    \
    } break;                                                                                                           \
    default: return LC_K_UNSUPPORTED;                                                                                  \
    }

/* ---- pieces ------------------------------------------------------------------------------------------------------ */
/* Rounded one by one; a product and a sum written plainly may be fused. */
__device__ __forceinline__ float q_mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float q_add(float a, float b) { return __fadd_rn(a, b); }

__device__ __forceinline__ float q_half(const uint8_t *p) { return __half2float(*(const f16 *)p); }
__device__ __forceinline__ uint32_t q_pair(const uint8_t *p) { return *(const uint16_t *)p; }

/* Eight bytes from p as two words; `aligned`: p is a multiple of 4, else of 2. */
__device__ __forceinline__ uint2 q_bytes(const uint8_t *p, bool aligned) {
    if (aligned) return make_uint2(*(const uint32_t *)p, *(const uint32_t *)(p + 4));
    return make_uint2(q_pair(p) | q_pair(p + 2) << 16, q_pair(p + 4) | q_pair(p + 6) << 16);
}
/* Bits [shift, shift + width) of byte i of the eight. */
__device__ __forceinline__ int q_code(uint2 w, int i, int shift, int mask) {
    return (int)((i < 4 ? w.x : w.y) >> (8 * (i & 3) + shift)) & mask;
}

/* Scale and minimum g (0 to 7) of the 6-bit pairs that 12 bytes hold. */
__device__ __forceinline__ void q_scale_min(const uint8_t *packed, int g, int *scale, int *min) {
    if (g < 4) {
        *scale = packed[g] & 63;
        *min = packed[g + 4] & 63;
    } else {
        *scale = (packed[g + 4] & 15) | packed[g - 4] >> 6 << 4;
        *min = packed[g + 4] >> 4 | packed[g] >> 6 << 4;
    }
}

/* Entry c of -127 -104 -83 -65 | -49 -35 -22 -10 | 1 13 25 38 | 53 69 89 113, four bytes a word. */
__device__ __forceinline__ int q_iq4_value(int c) {
    uint32_t low = c & 4 ? 0xf6eaddcfu : 0xbfad9881u, high = c & 4 ? 0x71594535u : 0x26190d01u;
    return (int8_t)((c & 8 ? high : low) >> 8 * (c & 3));
}

/* ---- blocks of 32: group g of 0 to 3; groups 0 and 1 are low nibbles, 2 and 3 high ones -------------------------- */
#define LC_EIGHT(expr) _Pragma("unroll") for (int i = 0; i < 8; i++) y[i] = (expr)

/* y = elements 8 g to 8 g + 7 of the block at b */
template <int Q> __device__ __forceinline__ void dequantise_eight(const uint8_t *b, int g, float (&y)[8]);

template <> __device__ __forceinline__ void dequantise_eight<LC_K_Q4_0>(const uint8_t *b, int g, float (&y)[8]) {
    float d = q_half(b);
    uint2 w = q_bytes(b + 2 + 8 * (g & 1), false);
    int shift = 4 * (g >> 1);
    LC_EIGHT(q_mul((float)(q_code(w, i, shift, 15) - 8), d));
}

template <> __device__ __forceinline__ void dequantise_eight<LC_K_Q4_1>(const uint8_t *b, int g, float (&y)[8]) {
    float d = q_half(b), m = q_half(b + 2);
    uint2 w = q_bytes(b + 4 + 8 * (g & 1), true);
    int shift = 4 * (g >> 1);
    LC_EIGHT(q_add(q_mul((float)q_code(w, i, shift, 15), d), m));
}

template <> __device__ __forceinline__ void dequantise_eight<LC_K_Q5_0>(const uint8_t *b, int g, float (&y)[8]) {
    float d = q_half(b);
    uint32_t high = b[2 + g]; /* one bit an element */
    uint2 w = q_bytes(b + 6 + 8 * (g & 1), false);
    int shift = 4 * (g >> 1);
    LC_EIGHT(q_mul((float)((q_code(w, i, shift, 15) | (int)(high >> i & 1) << 4) - 16), d));
}

template <> __device__ __forceinline__ void dequantise_eight<LC_K_Q5_1>(const uint8_t *b, int g, float (&y)[8]) {
    float d = q_half(b), m = q_half(b + 2);
    uint32_t high = b[4 + g];
    uint2 w = q_bytes(b + 8 + 8 * (g & 1), true);
    int shift = 4 * (g >> 1);
    LC_EIGHT(q_add(q_mul((float)(q_code(w, i, shift, 15) | (int)(high >> i & 1) << 4), d), m));
}

template <> __device__ __forceinline__ void dequantise_eight<LC_K_Q8_0>(const uint8_t *b, int g, float (&y)[8]) {
    float d = q_half(b);
    uint2 w = q_bytes(b + 2 + 8 * g, false);
    LC_EIGHT(q_mul((float)(int8_t)q_code(w, i, 0, 255), d));
}

template <> __device__ __forceinline__ void dequantise_eight<LC_K_IQ4_NL>(const uint8_t *b, int g, float (&y)[8]) {
    float d = q_half(b);
    uint2 w = q_bytes(b + 2 + 8 * (g & 1), false);
    int shift = 4 * (g >> 1);
    LC_EIGHT(q_mul((float)q_iq4_value(q_code(w, i, shift, 15)), d));
}

/* ---- super-blocks of 256: group g of 0 to 31 --------------------------------------------------------------------- */
/* 16 bytes of (min << 4 | scale), 64 of 2-bit codes, d, dmin */
template <> __device__ __forceinline__ void dequantise_eight<LC_K_Q2_K>(const uint8_t *b, int g, float (&y)[8]) {
    int part = g >> 1, shift = (part & 7) >> 1 << 1, scales = b[part];
    uint2 w = q_bytes(b + 16 + 32 * (part >> 3) + 8 * (g & 3), true);
    float scale = q_mul(q_half(b + 80), (float)(scales & 15)), min = q_mul(q_half(b + 82), (float)(scales >> 4));
    LC_EIGHT(q_add(q_mul(scale, (float)q_code(w, i, shift, 3)), -min));
}

/* 32 bytes of high bits (inverted), 64 of 2-bit codes, 12 of 6-bit scales, d */
template <> __device__ __forceinline__ void dequantise_eight<LC_K_Q3_K>(const uint8_t *b, int g, float (&y)[8]) {
    int part = g >> 1, shift = (part & 7) >> 1 << 1, bit = part >> 1;
    const uint8_t *packed = b + 96;
    int low = packed[part & 7] >> 4 * (part >> 3) & 15, high = packed[8 + (part & 3)] >> 2 * (part >> 2) & 3;
    uint2 w = q_bytes(b + 32 + 32 * (part >> 3) + 8 * (g & 3), false), mask = q_bytes(b + 8 * (g & 3), false);
    float scale = q_mul(q_half(b + 108), (float)((low | high << 4) - 32));
    LC_EIGHT(q_mul(scale, (float)(q_code(w, i, shift, 3) - (q_code(mask, i, bit, 1) ? 0 : 4))));
}

/* d, dmin, 12 bytes of scales and minima, 128 of nibbles */
template <> __device__ __forceinline__ void dequantise_eight<LC_K_Q4_K>(const uint8_t *b, int g, float (&y)[8]) {
    int part = g >> 2, shift = 4 * (part & 1), scale, min;
    q_scale_min(b + 4, part, &scale, &min);
    uint2 w = q_bytes(b + 16 + 32 * (part >> 1) + 8 * (g & 3), true);
    float ds = q_mul(q_half(b), (float)scale), dm = q_mul(q_half(b + 2), (float)min);
    LC_EIGHT(q_add(q_mul(ds, (float)q_code(w, i, shift, 15)), -dm));
}

/* the same with 32 bytes of high bits before the nibbles */
template <> __device__ __forceinline__ void dequantise_eight<LC_K_Q5_K>(const uint8_t *b, int g, float (&y)[8]) {
    int part = g >> 2, shift = 4 * (part & 1), scale, min;
    q_scale_min(b + 4, part, &scale, &min);
    uint2 w = q_bytes(b + 48 + 32 * (part >> 1) + 8 * (g & 3), true), high = q_bytes(b + 16 + 8 * (g & 3), true);
    float ds = q_mul(q_half(b), (float)scale), dm = q_mul(q_half(b + 2), (float)min);
    LC_EIGHT(q_add(q_mul(ds, (float)(q_code(w, i, shift, 15) | q_code(high, i, part, 1) << 4)), -dm));
}

/* 128 bytes of low nibbles, 64 of high pairs, 16 int8 scales, d */
template <> __device__ __forceinline__ void dequantise_eight<LC_K_Q6_K>(const uint8_t *b, int g, float (&y)[8]) {
    int half = g >> 4, part = g >> 2 & 3, at = 8 * (g & 3); /* parts of 32 elements */
    uint2 low = q_bytes(b + 64 * half + 32 * (part & 1) + at, false), high = q_bytes(b + 128 + 32 * half + at, false);
    int low_shift = part >> 1 << 2, high_shift = 2 * part;
    float scale = q_mul(q_half(b + 208), (float)((const int8_t *)b)[192 + (g >> 1)]);
    LC_EIGHT(q_mul(scale, (float)((q_code(low, i, low_shift, 15) | q_code(high, i, high_shift, 3) << 4) - 32)));
}
#undef LC_EIGHT

#endif
