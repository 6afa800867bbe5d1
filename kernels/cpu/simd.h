/* simd.h: one vector type per instruction set, written with the compiler's vector extensions so that a kernel is written once.
 * vreal holds VL reals. Products and sums contract to FMA (-ffp-contract=fast). */
#ifndef LC_SIMD_H
#define LC_SIMD_H

#include "cpu.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LC_VBYTES 64
#elif defined(__AVX2__)
#define LC_VBYTES 32
#else
#define LC_VBYTES 16
#endif
enum { VL = LC_VBYTES / sizeof(real) };

typedef real vreal __attribute__((vector_size(LC_VBYTES)));
typedef real vreal_u __attribute__((vector_size(LC_VBYTES), aligned(sizeof(real)), may_alias)); /* any address */
#if LC_DOUBLE
typedef int64_t vint __attribute__((vector_size(LC_VBYTES)));
#else
typedef int32_t vint __attribute__((vector_size(LC_VBYTES)));
#endif

#ifdef __clang__ /* has no __builtin_shuffle, but makes one of these when the mask is a constant */
static inline vreal shuffle_one(vreal a, vint m) {
    vreal r;
    for (int i = 0; i < VL; i++) r[i] = a[m[i] & (VL - 1)];
    return r;
}
static inline vreal shuffle_two(vreal a, vreal b, vint m) {
    vreal r;
    for (int i = 0; i < VL; i++) r[i] = m[i] & VL ? b[m[i] & (VL - 1)] : a[m[i] & (VL - 1)];
    return r;
}
#define LC_FOURTH(a, b, c, d, ...) d
#define __builtin_shuffle(...) LC_FOURTH(__VA_ARGS__, shuffle_two, shuffle_one, 0)(__VA_ARGS__)
#endif

static inline vreal vload(const real *p) { return *(const vreal_u *)p; }
static inline void vstore(real *p, vreal v) { *(vreal_u *)p = v; }
static inline vreal vset(real x) { return x - (vreal){0}; }
/* a where the mask (a comparison's result) is set, else b */
static inline vreal vselect(vint mask, vreal a, vreal b) { return (vreal)((mask & (vint)a) | (~mask & (vint)b)); }
#if LC_VBYTES == 64 && !LC_DOUBLE
static inline vreal vmax(vreal a, vreal b) { return (vreal)_mm512_max_ps((__m512)a, (__m512)b); }
static inline vreal vmin(vreal a, vreal b) { return (vreal)_mm512_min_ps((__m512)a, (__m512)b); }
#elif LC_VBYTES == 32 && !LC_DOUBLE
static inline vreal vmax(vreal a, vreal b) { return (vreal)_mm256_max_ps((__m256)a, (__m256)b); }
static inline vreal vmin(vreal a, vreal b) { return (vreal)_mm256_min_ps((__m256)a, (__m256)b); }
#else
static inline vreal vmax(vreal a, vreal b) { return vselect(a > b, a, b); }
static inline vreal vmin(vreal a, vreal b) { return vselect(a < b, a, b); }
#endif
static inline real vsum(vreal v) {
    real s = 0;
    for (int i = 0; i < VL; i++) s += v[i];
    return s;
}
static inline real vhmax(vreal v) {
    real s = v[0];
    for (int i = 1; i < VL; i++) s = v[i] > s ? v[i] : s;
    return s;
}

/* exp in float to 1 ulp or so: x = n ln 2 + r, polynomial in r, exponent by integer addition; 0 below -87.3. In double the
 * library's, for checks. vexp_down is for x <= 0 alone, where only the lower end needs care: there it gives exp(-87.3) for
 * 0, and above 0 the result is of no use. NaN stays NaN. */
#if LC_DOUBLE
static inline real rexp(real x) { return exp(x); }
static inline vreal vexp(vreal x) {
    for (int i = 0; i < VL; i++) x[i] = exp(x[i]);
    return x;
}
static inline vreal vexp_down(vreal x) { return vexp(x); }
#else
/* For a float or a vector; expm1 too is made of these. The low bits of x / ln 2 + EXP_MAGIC are n, rounded; the rest r is in
 * -ln 2 / 2 .. ln 2 / 2, and exp(r) - 1 a polynomial. */
#define EXP_MAGIC 12582912.f
#define EXP_REST(x, n) ((x) - (n) * 0.693359375f + (n) * 2.12194440e-4f)
#define EXPM1_REST(r)                                                                                                  \
    ((((((1.9875691500e-4f * (r) + 1.3981999507e-3f) * (r) + 8.3334519073e-3f) * (r) + 4.1665795894e-2f) * (r) +        \
       1.6666665459e-1f) * (r) + 5.0000001201e-1f) * (r) * (r) + (r))

static inline real rexp(real x) {
    real c = x < -87.3f ? -87.3f : x > 88.3f ? 88.3f : x, m = c * 1.44269504f + EXP_MAGIC, s;
    int32_t bits;
    memcpy(&bits, &m, 4);
    m -= EXP_MAGIC;
    real r = EXP_REST(c, m);
    int32_t e = (int32_t)((uint32_t)bits << 23) + 0x3f800000;
    memcpy(&s, &e, 4);
    return x < -87.3f ? 0.f : x != x ? x : (EXPM1_REST(r) + 1.f) * s;
}
/* -87.3 <= x <= 88.3 */
static inline vreal vexp_within(vreal x) {
    vreal m = x * 1.44269504f + EXP_MAGIC, n = m - EXP_MAGIC, r = EXP_REST(x, n);
    return (EXPM1_REST(r) + 1.f) * (vreal)(((vint)m << 23) + 0x3f800000);
}
static inline vreal vexp(vreal x) {
    vreal s = vexp_within(vmin(vmax(x, vset(-87.3f)), vset(88.3f)));
    return vselect(x < -87.3f, vset(0), vselect(x != x, x, s));
}
static inline vreal vexp_down(vreal x) { return vexp_within(vmax(vset(-87.3f), x)); }
#endif

#endif
