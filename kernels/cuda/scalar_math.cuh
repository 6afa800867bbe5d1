/* scalar_math.cuh: the elementary functions that kernels/scalar.h and kernels/philox.h are written in, for CUDA, and
 * these two in float (namespace single) and in double (namespace dual). The functions are the toolkit's accurate ones:
 * pointwise kernels wait for memory, not for arithmetic. Where its float functions magnify the rounding of their
 * argument, the argument is split. */
#ifndef LC_SCALAR_MATH_CUH
#define LC_SCALAR_MATH_CUH

#include "device.cuh"

#define LC_FN static __device__ __forceinline__

LC_FN float m_sqrt(float x) { return sqrtf(x); }
LC_FN float m_abs(float x) { return fabsf(x); }
LC_FN float m_floor(float x) { return floorf(x); }
LC_FN float m_rint(float x) { return rintf(x); }
LC_FN float m_sin(float x) { return sinf(x); }
LC_FN float m_cos(float x) { return cosf(x); }
LC_FN float m_pow(float x, float y) { return powf(x, y); }
LC_FN float m_exp(float x) { return expf(x); }
LC_FN float m_expm1(float x) { return expm1f(x); }
LC_FN float m_log(float x) { return logf(x); }
LC_FN float m_log1p(float x) { return log1pf(x); }
LC_FN float m_tanh(float x) { return tanhf(x); }

LC_FN double m_sqrt(double x) { return sqrt(x); }
LC_FN double m_abs(double x) { return fabs(x); }
LC_FN double m_floor(double x) { return floor(x); }
LC_FN double m_rint(double x) { return rint(x); }
LC_FN double m_sin(double x) { return sin(x); }
LC_FN double m_cos(double x) { return cos(x); }
LC_FN double m_pow(double x, double y) { return pow(x, y); }
LC_FN double m_exp(double x) { return exp(x); }
LC_FN double m_expm1(double x) { return expm1(x); }
LC_FN double m_log(double x) { return log(x); }
LC_FN double m_log1p(double x) { return log1p(x); }
LC_FN double m_tanh(double x) { return tanh(x); }

/* exp(-x^2 / 2): the square is split into one that is exact in float and a small rest */
LC_FN float m_gauss(float x) {
    float a = fabsf(x) < 20.f ? x : x != x ? x : 20.f, h;
    uint32_t bits;
    memcpy(&bits, &a, 4);
    bits &= ~0xfffu;
    memcpy(&h, &bits, 4);
    return expf(-0.5f * h * h) * expf(-0.5f * (a - h) * (a + h));
}
LC_FN double m_gauss(double x) { return exp(-0.5 * x * x); }

/* normal distribution function; sine and cosine of 2 pi u */
LC_FN float m_normcdf(float x) { return normcdff(x); }
LC_FN float m_sin2pi(float u) { return sinpif(2.f * u); }
LC_FN float m_cos2pi(float u) { return cospif(2.f * u); }
LC_FN double m_normcdf(double x) { return 0.5 * erfc(x * -0.70710678118654752440); }
LC_FN double m_sin2pi(double u) { return sin(u * 6.28318530717958647693); }
LC_FN double m_cos2pi(double u) { return cos(u * 6.28318530717958647693); }

namespace single {
typedef float real;
#include "../philox.h"
#include "../scalar.h"
} // namespace single
#undef LC_PHILOX_H
#undef LC_SCALAR_H
namespace dual {
typedef double real;
#include "../philox.h"
#include "../scalar.h"
} // namespace dual

#endif
