/* convert.h: rows of elements from one dtype to another on the CPU. Floats no wider than f32 pass through float, wider
 * ones and mixtures with integers through double, integers among themselves through int64; every rounding is to nearest
 * even, once. Real to integer: truncated, limited to the type's range, NaN becomes 0. Integer to integer: the low bits.
 */
#ifndef LC_CONVERT_H
#define LC_CONVERT_H

#include "cpu.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

enum { LC_CONVERT_BLOCK = 512 };

/* Defined in kernels/quant.c: n values, whole blocks. */
#include "../quant.h"

static inline float f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, size = h & 0x7fffu, u = size << 13;
    float f;
    memcpy(&f, &u, 4);
    f *= 0x1p112f; /* moves the exponent, denormals included */
    memcpy(&u, &f, 4);
    u = size > 0x7c00u ? 0x7fc00000u | size << 13 : size == 0x7c00u ? 0x7f800000u : u;
    u |= sign;
    memcpy(&f, &u, 4);
    return f;
}

static inline uint16_t f32_to_f16(float x) {
    uint32_t u, size, sign;
    memcpy(&u, &x, 4);
    sign = u >> 16 & 0x8000u;
    size = u & 0x7fffffffu;
    float f;
    memcpy(&f, &size, 4);
    f += 0.5f; /* below 2^-14 the sum's last bit is a denormal half's last bit */
    uint32_t small;
    memcpy(&small, &f, 4);
    small -= 0x3f000000u;
    uint32_t normal = (size - 0x38000000u + 0xfffu + (size >> 13 & 1)) >> 13; /* 65520 and up carry into infinity */
    uint32_t nan = 0x7e00u | (size >> 13 & 0x3ffu);
    uint32_t h = size > 0x7f800000u ? nan : size >= 0x47800000u ? 0x7c00u : size < 0x38800000u ? small : normal;
    return (uint16_t)(h | sign);
}

/* To odd: a second rounding, to fewer bits, then gives what one rounding would have given. */
static inline float f64_to_f32_odd(double d) {
    float f = (float)d;
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((double)f == d || f != f || (u & 1)) return f;
    double size = fabs(d), got = fabs((double)f);
    u = size > got ? u + 1 : u - 1;
    memcpy(&f, &u, 4);
    return f;
}
static inline uint16_t f64_to_bf16(double d) { return f32_to_bf16(f64_to_f32_odd(d)); }
static inline uint16_t f64_to_f16(double d) { return f32_to_f16(f64_to_f32_odd(d)); }

static inline int32_t f64_to_i32(double d) {
    return d != d ? 0 : d <= -2147483648.0 ? INT32_MIN : d >= 2147483647.0 ? INT32_MAX : (int32_t)d;
}
static inline int64_t f64_to_i64(double d) {
    return d != d ? 0 : d <= -0x1p63 ? INT64_MIN : d >= 0x1p63 ? INT64_MAX : (int64_t)d;
}
static inline uint8_t f64_to_u8(double d) { return d > 0 ? d < 255 ? (uint8_t)d : 255 : 0; }

static inline void f16_row_to_f32(const uint16_t *restrict in, float *restrict out, int64_t n) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(in + i))));
#endif
    for (; i < n; i++) out[i] = f16_to_f32(in[i]);
}
static inline void f32_row_to_f16(const float *restrict in, uint16_t *restrict out, int64_t n) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < n; i++) out[i] = f32_to_f16(in[i]);
}

#define LC_ROW(S, D, expr)                                                                                             \
    do {                                                                                                               \
        const S *restrict s_ = (const S *)in;                                                                          \
        D *restrict d_ = (D *)out;                                                                                     \
        for (int64_t i = 0; i < n; i++) {                                                                              \
            S v = s_[i];                                                                                               \
            d_[i] = (D)(expr);                                                                                         \
        }                                                                                                              \
    } while (0);                                                                                                       \
    break

/* n elements of a dtype to float. Quantised ones in whole blocks. */
static inline void row_to_f32(int dtype, const void *restrict in, float *restrict out, int64_t n) {
    switch (dtype) {
    case LC_K_F32: memcpy(out, in, (size_t)n * 4); break;
    case LC_K_BF16: LC_ROW(uint16_t, float, bf16_to_f32(v));
    case LC_K_F16: f16_row_to_f32((const uint16_t *)in, out, n); break;
    case LC_K_F64: LC_ROW(double, float, v);
    case LC_K_I32: LC_ROW(int32_t, float, v);
    case LC_K_I64: LC_ROW(int64_t, float, v);
    case LC_K_U8: LC_ROW(uint8_t, float, v);
    default: lc_dequantise(dtype, in, out, n);
    }
}

static inline void row_to_f64(int dtype, const void *restrict in, double *restrict out, int64_t n) {
    switch (dtype) {
    case LC_K_F32: LC_ROW(float, double, v);
    case LC_K_BF16: LC_ROW(uint16_t, double, bf16_to_f32(v));
    case LC_K_F16: LC_ROW(uint16_t, double, f16_to_f32(v));
    case LC_K_F64: memcpy(out, in, (size_t)n * 8); break;
    case LC_K_I32: LC_ROW(int32_t, double, v);
    case LC_K_I64: LC_ROW(int64_t, double, v);
    case LC_K_U8: LC_ROW(uint8_t, double, v);
    default: break; /* callers take quantised ones through row_to_f32 */
    }
}

static inline void row_to_i64(int dtype, const void *restrict in, int64_t *restrict out, int64_t n) {
    switch (dtype) {
    case LC_K_I32: LC_ROW(int32_t, int64_t, v);
    case LC_K_I64: memcpy(out, in, (size_t)n * 8); break;
    case LC_K_U8: LC_ROW(uint8_t, int64_t, v);
    default: break;
    }
}

static inline void row_from_f32(int dtype, const float *restrict in, void *restrict out, int64_t n) {
    switch (dtype) {
    case LC_K_F32: memcpy(out, in, (size_t)n * 4); break;
    case LC_K_BF16: LC_ROW(float, uint16_t, f32_to_bf16(v));
    case LC_K_F16: f32_row_to_f16(in, (uint16_t *)out, n); break;
    case LC_K_F64: LC_ROW(float, double, v);
    case LC_K_I32: LC_ROW(float, int32_t, f64_to_i32((double)v));
    case LC_K_I64: LC_ROW(float, int64_t, f64_to_i64((double)v));
    case LC_K_U8: LC_ROW(float, uint8_t, f64_to_u8((double)v));
    default: break;
    }
}

static inline void row_from_f64(int dtype, const double *restrict in, void *restrict out, int64_t n) {
    switch (dtype) {
    case LC_K_F32: LC_ROW(double, float, v);
    case LC_K_BF16: LC_ROW(double, uint16_t, f64_to_bf16(v));
    case LC_K_F16: LC_ROW(double, uint16_t, f64_to_f16(v));
    case LC_K_F64: memcpy(out, in, (size_t)n * 8); break;
    case LC_K_I32: LC_ROW(double, int32_t, f64_to_i32(v));
    case LC_K_I64: LC_ROW(double, int64_t, f64_to_i64(v));
    case LC_K_U8: LC_ROW(double, uint8_t, f64_to_u8(v));
    default: break;
    }
}

static inline void row_from_i64(int dtype, const int64_t *restrict in, void *restrict out, int64_t n) {
    switch (dtype) {
    case LC_K_I32: LC_ROW(int64_t, int32_t, (uint64_t)v);
    case LC_K_I64: memcpy(out, in, (size_t)n * 8); break;
    case LC_K_U8: LC_ROW(int64_t, uint8_t, (uint64_t)v);
    default: break;
    }
}
#undef LC_ROW

static inline int dtype_is_int(int dtype) { return dtype >= LC_K_I32 && dtype <= LC_K_U8; }

/* The pair's intermediate: 'f' float, 'd' double, 'i' int64. */
static inline char convert_through(int from, int to) {
    if (dtype_is_int(from) && dtype_is_int(to)) return 'i';
    int wide = from == LC_K_F64 || from == LC_K_I32 || from == LC_K_I64 || to == LC_K_F64;
    return wide && !lc_dtype_is_quant(from) ? 'd' : 'f';
}

/* Elements apart by the dtype's own size, both sides. Quantised input: n counts whole blocks. */
static inline void convert_row(int from, const void *in, int to, void *out, int64_t n) {
    int64_t in_bytes = lc_dtype_traits(from)->bytes, in_block = lc_dtype_traits(from)->block;
    int64_t out_bytes = lc_dtype_traits(to)->bytes;
    if (from == to) {
        memcpy(out, in, (size_t)(n / in_block * in_bytes));
        return;
    }
    if (to == LC_K_F32) {
        row_to_f32(from, in, (float *)out, n);
        return;
    }
    char through = convert_through(from, to);
    if (through == 'f' && from == LC_K_F32) {
        row_from_f32(to, (const float *)in, out, n);
        return;
    }
    union {
        float f[LC_CONVERT_BLOCK];
        double d[LC_CONVERT_BLOCK];
        int64_t i[LC_CONVERT_BLOCK];
    } mid;
    for (int64_t at = 0; at < n; at += LC_CONVERT_BLOCK) {
        int64_t m = LC_MIN(n - at, (int64_t)LC_CONVERT_BLOCK);
        const char *from_here = (const char *)in + at / in_block * in_bytes;
        char *to_here = (char *)out + at * out_bytes;
        if (through == 'i') {
            row_to_i64(from, from_here, mid.i, m);
            row_from_i64(to, mid.i, to_here, m);
        } else if (through == 'd') {
            row_to_f64(from, from_here, mid.d, m);
            row_from_f64(to, mid.d, to_here, m);
        } else {
            row_to_f32(from, from_here, mid.f, m);
            row_from_f32(to, mid.f, to_here, m);
        }
    }
}

/* Rows of real, whatever the variant's real is. */
static inline void row_to_real(int dtype, const void *in, real *out, int64_t n) {
    convert_row(dtype, in, LC_K_REAL, out, n);
}
static inline void row_from_real(int dtype, const real *in, void *out, int64_t n) {
    convert_row(LC_K_REAL, in, dtype, out, n);
}

#endif
