/* intrinsics.h: the device's arithmetic that the toolkit's headers do not give to the host, in plain C++. The fast, inexact ones are
 * exact here. Included by emulated.h. */
#ifndef LC_INTRINSICS_H
#define LC_INTRINSICS_H

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

template <class To, class From> static inline To lc_emu_bits(From v) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    memcpy(&to, &v, sizeof to);
    return to;
}

/* ---- bits -------------------------------------------------------------------------------------------------------------- */
static inline int __float_as_int(float v) { return lc_emu_bits<int>(v); }
static inline unsigned __float_as_uint(float v) { return lc_emu_bits<unsigned>(v); }
static inline float __int_as_float(int v) { return lc_emu_bits<float>(v); }
static inline float __uint_as_float(unsigned v) { return lc_emu_bits<float>(v); }
static inline long long __double_as_longlong(double v) { return lc_emu_bits<long long>(v); }
static inline double __longlong_as_double(long long v) { return lc_emu_bits<double>(v); }
static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
static inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
static inline int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
static inline int __ffs(int v) { return __builtin_ffs(v); }
static inline int __ffsll(long long v) { return __builtin_ffsll(v); }
static inline unsigned __brev(unsigned v) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++) r |= (v >> i & 1) << (31 - i);
    return r;
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
    uint64_t both = (uint64_t)b << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) {
        unsigned pick = s >> (4 * i) & 15, byte = (unsigned)(both >> (8 * (pick & 7))) & 255;
        if (pick & 8) byte = byte & 128 ? 255 : 0; /* the sign alone */
        r |= byte << (8 * i);
    }
    return r;
}
static inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned by) {
    return (unsigned)((((uint64_t)hi << 32 | lo) << (by & 31)) >> 32);
}
static inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned by) { return (unsigned)(((uint64_t)hi << 32 | lo) >> (by & 31)); }

/* ---- integers ---------------------------------------------------------------------------------------------------------- */
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
static inline int __mulhi(int a, int b) { return (int)((int64_t)a * b >> 32); }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
static inline int __mul24(int a, int b) { return (int)((int64_t)(a << 8 >> 8) * (b << 8 >> 8)); }
static inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (int8_t)(a >> (8 * i)) * (int8_t)(b >> (8 * i));
    return c;
}
static inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 4; i++) c += (a >> (8 * i) & 255) * (b >> (8 * i) & 255);
    return c;
}
static inline unsigned __vsub4(unsigned a, unsigned b) {
    unsigned r = 0;
    for (int i = 0; i < 32; i += 8) r |= ((a >> i) - (b >> i) & 255) << i;
    return r;
}
static inline unsigned __vsubss4(unsigned a, unsigned b) {
    unsigned r = 0;
    for (int i = 0; i < 32; i += 8) {
        int d = (int8_t)(a >> i) - (int8_t)(b >> i);
        r |= (unsigned)((d < -128 ? -128 : d > 127 ? 127 : d) & 255) << i;
    }
    return r;
}

template <class T> constexpr bool lc_emu_number = std::is_arithmetic<T>::value || std::is_enum<T>::value;
/* min and max of mixed types; of floats they pass a NaN over, as fmin and fmax do. */
template <class A, class B, class C = std::common_type_t<A, B>, class = std::enable_if_t<lc_emu_number<A> && lc_emu_number<B>>>
static inline C min(A a, B b) {
    if constexpr (std::is_floating_point<C>::value) return fmin((C)a, (C)b);
    else return (C)a < (C)b ? (C)a : (C)b;
}
template <class A, class B, class C = std::common_type_t<A, B>, class = std::enable_if_t<lc_emu_number<A> && lc_emu_number<B>>>
static inline C max(A a, B b) {
    if constexpr (std::is_floating_point<C>::value) return fmax((C)a, (C)b);
    else return (C)a > (C)b ? (C)a : (C)b;
}

/* ---- floats ------------------------------------------------------------------------------------------------------------ */
/* glibc declares some of these names and keeps them to itself. */
#define __expf lc_emu_expf
#define __exp10f lc_emu_exp10f
#define __exp2f lc_emu_exp2f
#define __logf lc_emu_logf
#define __log2f lc_emu_log2f
#define __log10f lc_emu_log10f
#define __powf lc_emu_powf
#define __sinf lc_emu_sinf
#define __cosf lc_emu_cosf
#define __tanf lc_emu_tanf
#define __tanhf lc_emu_tanhf
#define __sincosf lc_emu_sincosf
static inline float __expf(float x) { return expf(x); }
static inline float __exp10f(float x) { return powf(10, x); }
static inline float __exp2f(float x) { return exp2f(x); }
static inline float __logf(float x) { return logf(x); }
static inline float __log2f(float x) { return log2f(x); }
static inline float __log10f(float x) { return log10f(x); }
static inline float __powf(float x, float y) { return powf(x, y); }
static inline float __sinf(float x) { return sinf(x); }
static inline float __cosf(float x) { return cosf(x); }
static inline float __tanf(float x) { return tanf(x); }
static inline void __sincosf(float x, float *s, float *c) { *s = sinf(x), *c = cosf(x); }
static inline float __tanhf(float x) { return tanhf(x); }
static inline float rsqrtf(float x) { return 1 / sqrtf(x); }
static inline double rsqrt(double x) { return 1 / sqrt(x); }
static inline float rsqrt(float x) { return 1 / sqrtf(x); }
static inline float rcbrtf(float x) { return 1 / cbrtf(x); }
static inline float __frsqrt_rn(float x) { return 1 / sqrtf(x); }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __frcp_rn(float x) { return 1 / x; }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float fdividef(float a, float b) { return a / b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dsub_rn(double a, double b) { return a - b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __ddiv_rn(double a, double b) { return a / b; }
static inline double __dsqrt_rn(double a) { return sqrt(a); }
static inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
static inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1 : 0; }
static inline float normcdff(float x) { return 0.5f * erfcf(-x * 0.70710678118654752f); }
static inline double normcdf(double x) { return 0.5 * erfc(-x * 0.70710678118654752440); }
static inline float sinpif(float x) { return (float)sin(M_PI * (double)x); }
static inline float cospif(float x) { return (float)cos(M_PI * (double)x); }
static inline double sinpi(double x) { return sin(M_PI * x); }
static inline double cospi(double x) { return cos(M_PI * x); }
static inline void sincospif(float x, float *s, float *c) { *s = sinpif(x), *c = cospif(x); }
static inline void sincospi(double x, double *s, double *c) { *s = sinpi(x), *c = cospi(x); }

/* ---- conversions: to integers they saturate, and NaN becomes 0 ------------------------------------------------------------ */
static inline int __float2int_rn(float x) { return x != x ? 0 : x >= 0x1p31f ? INT32_MAX : x < -0x1p31f ? INT32_MIN : (int)rintf(x); }
static inline int __float2int_rz(float x) { return __float2int_rn(truncf(x)); }
static inline int __float2int_rd(float x) { return __float2int_rn(floorf(x)); }
static inline int __float2int_ru(float x) { return __float2int_rn(ceilf(x)); }
static inline unsigned __float2uint_rn(float x) { return x != x || x < 0 ? 0 : x >= 0x1p32f ? UINT32_MAX : (unsigned)rintf(x); }
static inline unsigned __float2uint_rz(float x) { return __float2uint_rn(truncf(x)); }
static inline unsigned __float2uint_rd(float x) { return __float2uint_rn(floorf(x)); }
static inline long long __float2ll_rn(float x) { return x != x ? 0 : x >= 0x1p63f ? INT64_MAX : x < -0x1p63f ? INT64_MIN : (long long)rintf(x); }
static inline long long __double2ll_rn(double x) { return x != x ? 0 : x >= 0x1p63 ? INT64_MAX : x < -0x1p63 ? INT64_MIN : (long long)rint(x); }
static inline long long __float2ll_rz(float x) { return __float2ll_rn(truncf(x)); }
static inline long long __double2ll_rz(double x) { return __double2ll_rn(trunc(x)); }
static inline int __double2int_rn(double x) { return x != x ? 0 : x >= 0x1p31 ? INT32_MAX : x < -0x1p31 ? INT32_MIN : (int)rint(x); }
static inline int __double2int_rz(double x) { return __double2int_rn(trunc(x)); }
static inline float __int2float_rn(int x) { return (float)x; }
static inline float __uint2float_rn(unsigned x) { return (float)x; }
static inline float __ll2float_rn(long long x) { return (float)x; }
static inline float __ull2float_rn(unsigned long long x) { return (float)x; }
static inline double __ll2double_rn(long long x) { return (double)x; }
static inline double __ull2double_rn(unsigned long long x) { return (double)x; }
static inline double __int2double_rn(int x) { return (double)x; }
static inline float __double2float_rn(double x) { return (float)x; }
static inline int __bfloat162int_rn(__nv_bfloat16 v) { return __float2int_rn(__bfloat162float(v)); }
static inline int __half2int_rn(__half v) { return __float2int_rn(__half2float(v)); }

/* ---- halves: sums of a product rounded once ---------------------------------------------------------------------------- */
static inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
    return __double2bfloat16((double)__bfloat162float(a) * __bfloat162float(b) + __bfloat162float(c));
}
static inline __half __hfma(__half a, __half b, __half c) {
    return __double2half((double)__half2float(a) * __half2float(b) + __half2float(c));
}
static inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
    return __halves2bfloat162(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y));
}
static inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    return __halves2half2(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y));
}

/* ---- memory: caches are not there ---------------------------------------------------------------------------------------- */
template <class T> static inline T __ldg(const T *p) { return *p; }
template <class T> static inline T __ldcg(const T *p) { return *p; }
template <class T> static inline T __ldca(const T *p) { return *p; }
template <class T> static inline T __ldcs(const T *p) { return *p; }
template <class T> static inline T __ldlu(const T *p) { return *p; }
template <class T> static inline T __ldcv(const T *p) { return *p; }
template <class T> static inline void __stcg(T *p, std::common_type_t<T> v) { *p = v; }
template <class T> static inline void __stcs(T *p, std::common_type_t<T> v) { *p = v; }
template <class T> static inline void __stwb(T *p, std::common_type_t<T> v) { *p = v; }
template <class T> static inline void __stwt(T *p, std::common_type_t<T> v) { *p = v; }
static inline void __nanosleep(unsigned) {}
static inline void __trap() { __builtin_trap(); }
static inline long long clock64() { return 0; }

#endif
