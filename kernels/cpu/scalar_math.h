/* scalar_math.h: the elementary functions that kernels/scalar.h is written in, for the CPU. In float they are free of
 * branches, so that a loop over them becomes vector code in every instruction set, and within 2 ulp or so of the true
 * value (the test says how near); in double they are the library's. Another back-end brings its own m_* functions in
 * place of this file. */
#ifndef LC_SCALAR_MATH_H
#define LC_SCALAR_MATH_H

#include "simd.h"

#define LC_FN static inline __attribute__((always_inline))

LC_FN real m_sqrt(real x) { return LC_DOUBLE ? (real)sqrt(x) : (real)sqrtf((float)x); }
LC_FN real m_abs(real x) { return LC_DOUBLE ? (real)fabs(x) : (real)fabsf((float)x); }
LC_FN real m_floor(real x) { return LC_DOUBLE ? (real)floor(x) : (real)floorf((float)x); }
LC_FN real m_rint(real x) { return LC_DOUBLE ? (real)rint(x) : (real)rintf((float)x); }
LC_FN real m_sin(real x) { return LC_DOUBLE ? (real)sin(x) : (real)sinf((float)x); }
LC_FN real m_cos(real x) { return LC_DOUBLE ? (real)cos(x) : (real)cosf((float)x); }
LC_FN real m_pow(real x, real y) { return LC_DOUBLE ? (real)pow(x, y) : (real)powf((float)x, (float)y); }

/* u in [0, 1): sine and cosine of 2 pi u, for random numbers */
#if LC_DOUBLE

LC_FN real m_sin2pi(real u) { return sin(u * 6.28318530717958647693); }
LC_FN real m_cos2pi(real u) { return cos(u * 6.28318530717958647693); }
LC_FN real m_exp(real x) { return exp(x); }
LC_FN real m_expm1(real x) { return expm1(x); }
LC_FN real m_log(real x) { return log(x); }
LC_FN real m_log1p(real x) { return log1p(x); }
LC_FN real m_tanh(real x) { return tanh(x); }
LC_FN real m_gauss(real x) { return exp(-0.5 * x * x); }                         /* exp(-x^2 / 2) */
LC_FN real m_normcdf(real x) { return 0.5 * erfc(x * -0.70710678118654752440); } /* normal distribution function */

#else

LC_FN int32_t m_bits(float x) {
    int32_t i;
    memcpy(&i, &x, 4);
    return i;
}
LC_FN float m_from_bits(int32_t i) {
    float x;
    memcpy(&x, &i, 4);
    return x;
}

/* Quarter turns are taken off exactly; bit 0 of the quarter swaps sine and cosine, bit 1 is the sign. */
LC_FN real m_turn(real u, int32_t quarters) {
    real q = m_rint(4.f * u), f = (4.f * u - q) * 1.57079633f, z = f * f;
    real s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * f + f;
    real c = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.f;
    int32_t k = (int32_t)q + quarters;
    real y = k & 1 ? c : s;
    return k & 2 ? -y : y;
}
LC_FN real m_sin2pi(real u) { return m_turn(u, 0); }
LC_FN real m_cos2pi(real u) { return m_turn(u, 1); }

/* rexp covers the normal range; squaring the exponential of half the argument adds overflow and denormals. */
LC_FN real m_exp(real x) {
    int far = m_abs(x) > 87.f;
    real e = rexp(far ? 0.5f * x : x);
    return far ? e * e : e;
}

/* 2^n (exp(r) - 1) + (2^n - 1): no cancellation for small x, where n is 0. */
LC_FN real m_expm1(real x) {
    real c = x < -80.f ? -80.f : x > 88.3f ? 88.3f : x;
    real m = c * 1.44269504f + EXP_MAGIC, n = m - EXP_MAGIC, r = EXP_REST(c, n), p = EXPM1_REST(r);
    real s = m_from_bits((int32_t)(((uint32_t)m_bits(m) << 23) + 0x3f800000u));
    real y = s * p + (s - 1.f);
    return x > 88.3f ? m_exp(x) : x != x ? x : y;
}

/* x = 2^e m with m in [sqrt(1/2), sqrt(2)); polynomial in m - 1. */
LC_FN real m_log(real x) {
    int tiny = x < 1.17549435e-38f;
    int32_t i = (int32_t)((uint32_t)m_bits(tiny ? x * 8388608.f : x) + (0x3f800000u - 0x3f3504f3u));
    real e = (real)((i >> 23) - (tiny ? 150 : 127));
    real f = m_from_bits((i & 0x7fffff) + 0x3f3504f3) - 1.f, z = f * f;
    real p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    real y = f + (p * f * z - e * 2.12194440e-4f - 0.5f * z) + e * 0.693359375f;
    y = x == 0 ? -INFINITY : x < 0 ? NAN : y;
    return x > 3.4028235e38f || x != x ? x : y;
}

/* log(u) put right by what rounding u = 1 + x has lost. For x >= 0, which is all that is asked here. */
LC_FN real m_log1p(real x) {
    real u = 1.f + x;
    real y = m_log(u) - ((u - 1.f) - x) / u;
    return u > 3.4028235e38f ? u : y;
}

LC_FN real m_tanh(real x) {
    real a = m_abs(x), z = x * x;
    real p = -5.70498872745e-3f;
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    p = p * z * x + x;
    real far = 1.f - 2.f / (rexp(a + a) + 1.f);
    return a < 0.625f ? p : x < 0 ? -far : far;
}

/* The square is split into one that is exact in float and a small rest, or exp would magnify its rounding. */
LC_FN real m_gauss(real x) {
    real a = m_abs(x) < 20.f ? x : x != x ? x : 20.f;
    real h = m_from_bits(m_bits(a) & ~0xfff);
    return rexp(-0.5f * h * h) * rexp(-0.5f * (a - h) * (a + h));
}

/* Lower tail = gauss(x) / 2 times erfcx(z), z = |x| / sqrt(2), and erfcx(z) (1 + 2 z) is nearly straight in q = (z - 2)
 * / (z + 2): coefficients interpolate it at the Chebyshev nodes of z in [0, 9.45], relative error 2.1e-8. */
LC_FN real m_normcdf(real x) {
    real z = m_abs(x) * 0.70710678f;
    z = z > 15.f ? 15.f : z;
    real r = 1.f / ((z + 2.f) * (1.f + 2.f * z));
    real q = (z - 2.f) * (1.f + 2.f * z) * r;
    real p = -4.283750596e-4f;
    p = p * q - 1.273629428e-3f;
    p = p * q + 1.324574663e-3f;
    p = p * q + 8.669968238e-3f;
    p = p * q - 8.057281289e-3f;
    p = p * q - 5.421512278e-2f;
    p = p * q + 1.640541706e-1f;
    p = p * q - 1.660304059e-1f;
    p = p * q - 9.276391287e-2f;
    p = p * q + 1.276978378e+0f;
    real tail = 0.5f * (p * (z + 2.f) * r) * m_gauss(x);
    return x <= 0 ? tail : 1.f - tail;
}

#endif
#endif
