/* convert.cuh: one element of any plain dtype to another, by the rules of kernels/cpu/convert.h: floats no wider than
 * f32 pass through float, wider ones and mixtures with integers through double, integers among themselves through
 * int64; every rounding is to nearest even, once. Real to integer: truncated, limited to the type's range, NaN becomes
 * 0. Integer to integer: the low bits. The dtype is a run-time number, the same for all threads. */
#ifndef LC_CONVERT_CUH
#define LC_CONVERT_CUH

#include "device.cuh"

static inline bool dtype_is_int(int dtype) { return dtype >= LC_K_I32 && dtype <= LC_K_U8; }

/* Rounded to odd: a second rounding, to fewer bits, then gives what one rounding would have given. */
__host__ __device__ __forceinline__ float round_to_odd(double d) {
    float f = (float)d;
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((double)f == d || f != f || (u & 1)) return f;
    u = fabs(d) > fabs((double)f) ? u + 1 : u - 1;
    memcpy(&f, &u, 4);
    return f;
}

/* R: float, double, or (integers alone) int64_t */
template <class R> __device__ __forceinline__ R read_as(int dtype, const char *p) {
    switch (dtype) {
    case LC_K_F32: return (R)(*(const float *)p);
    case LC_K_BF16: return (R)__bfloat162float(*(const bf16 *)p);
    case LC_K_F16: return (R)__half2float(*(const f16 *)p);
    case LC_K_F64: return (R)(*(const double *)p);
    case LC_K_I32: return (R)(*(const int32_t *)p);
    case LC_K_I64: return (R)(*(const int64_t *)p);
    default: return (R)(*(const uint8_t *)p);
    }
}

__host__ __device__ __forceinline__ float as_float(float v) { return v; }
__host__ __device__ __forceinline__ float as_float(double v) { return round_to_odd(v); }

/* A float or a double. */
template <class R> __host__ __device__ __forceinline__ void write_as(int dtype, char *p, R v) {
    switch (dtype) {
    case LC_K_F32: *(float *)p = (float)v; break;
    case LC_K_BF16: *(bf16 *)p = __float2bfloat16_rn(as_float(v)); break;
    case LC_K_F16: *(f16 *)p = __float2half_rn(as_float(v)); break;
    case LC_K_F64: *(double *)p = v; break;
    case LC_K_I32: {
        double d = v;
        *(int32_t *)p = d != d ? 0 : d <= -2147483648.0 ? INT32_MIN : d >= 2147483647.0 ? INT32_MAX : (int32_t)d;
        break;
    }
    case LC_K_I64: {
        double d = v, most = 9223372036854775808.0;
        *(int64_t *)p = d != d ? 0 : d <= -most ? INT64_MIN : d >= most ? INT64_MAX : (int64_t)d;
        break;
    }
    default: *(uint8_t *)p = v > 0 ? v < 255 ? (uint8_t)v : 255 : 0; break;
    }
}
__device__ __forceinline__ void write_int(int dtype, char *p, int64_t v) {
    switch (dtype) {
    case LC_K_I32: *(int32_t *)p = (int32_t)(uint32_t)(uint64_t)v; break;
    case LC_K_I64: *(int64_t *)p = v; break;
    default: *(uint8_t *)p = (uint8_t)(uint64_t)v; break;
    }
}

/* What a pair of dtypes goes through. */
enum { THROUGH_FLOAT, THROUGH_DOUBLE, THROUGH_INT, THROUGH_INT_TO_FLOAT };
static inline int convert_through(int from, int to) {
    if (dtype_is_int(from))
        return dtype_is_int(to) ? THROUGH_INT : to == LC_K_F32 ? THROUGH_INT_TO_FLOAT : THROUGH_DOUBLE;
    return from == LC_K_F64 || to == LC_K_F64 ? THROUGH_DOUBLE : THROUGH_FLOAT;
}
__device__ __forceinline__ void convert_one(int from, const char *in, int to, char *out, int through) {
    switch (through) {
    case THROUGH_FLOAT: write_as<float>(to, out, read_as<float>(from, in)); break;
    case THROUGH_DOUBLE: write_as<double>(to, out, read_as<double>(from, in)); break;
    case THROUGH_INT: write_int(to, out, read_as<int64_t>(from, in)); break;
    default: *(float *)out = (float)read_as<int64_t>(from, in); break;
    }
}

/* The value of a scalar that may have come as a 0-dim tensor on the device. */
struct scalar_at {
    const char *p; /* NULL: value */
    int dtype;
    double value;
    __device__ __forceinline__ double get() const { return p ? read_as<double>(dtype, p) : value; }
};
static inline scalar_at scalar_or(const lc_view *v, double otherwise) {
    return {(const char *)v->data, v->dtype, otherwise};
}

#endif
