/* scalar.h: what the pointwise rows of the op table mean, one element at a time, for every back-end. The includer
 * defines LC_FN (static inline, __device__), the type real, and the m_* functions of cpu/scalar_math.h. p holds the
 * row's real parameters in the order of its signature. For UNARY: NAME and NAME_grad(g, x, y, p), for BINARY: NAME,
 * NAME_grad_a, NAME_grad_b (g, a, b, y), for COMPARE: NAME, which looks at the order of a and b alone (integers are
 * compared by calling it with -1, 0 or 1 and 0). NaN goes through wherever PyTorch lets it through. Conditions are
 * written as selects: no branches, so loops vectorise. */
#ifndef LC_SCALAR_H
#define LC_SCALAR_H

#define LC_S(name)       lcs_##name
#define LC_SCALAR_PARAMS 4 /* a row has at most so many; kernels read that many from f[] */

#define LC_UNARY(name, ...)                                                                                            \
    LC_FN real LC_S(name)(real x, const real *p) {                                                                     \
        (void)p;                                                                                                       \
        return __VA_ARGS__;                                                                                            \
    }
#define LC_UNARY_GRAD(name, ...)                                                                                       \
    LC_FN real LC_S(name##_grad)(real g, real x, real y, const real *p) {                                              \
        (void)x, (void)y, (void)p;                                                                                     \
        return __VA_ARGS__;                                                                                            \
    }
#define LC_BINARY(name, ...)                                                                                           \
    LC_FN real LC_S(name)(real a, real b) { return __VA_ARGS__; }
#define LC_BINARY_GRAD(name, ...)                                                                                      \
    LC_FN real LC_S(name)(real g, real a, real b, real y) {                                                            \
        (void)a, (void)b, (void)y;                                                                                     \
        return __VA_ARGS__;                                                                                            \
    }
#define LC_COMPARE(name, ...)                                                                                          \
    LC_FN int LC_S(name)(real a, real b) { return __VA_ARGS__; }

/* ---- shared pieces ----------------------------------------------------------------------------------------------- */
LC_FN real LC_S(logistic)(real x) { return 1 / (1 + m_exp(-x)); }
LC_FN real LC_S(swish)(real x) { return x / (1 + m_exp(-x)); }
LC_FN real LC_S(swish_slope)(real x) { /* s (1 + x (1 - s)), with 1 - s = e s; e must stay finite */
    real e = m_exp(x < -80 ? 80 : -x), s = 1 / (1 + e);
    return s * (1 + x * (e * s));
}
/* half of the gradient on a tie, all of it to the winner; NaN counts as a win, as it is the result */
LC_FN real LC_S(share)(real g, int wins, int ties) { return ties ? g * (real)0.5 : wins ? g : 0; }

/* The formatter takes the products below for declarations. */
/* clang-format off */

/* ---- unary ------------------------------------------------------------------------------------------------------- */
LC_UNARY(neg, -x)
LC_UNARY_GRAD(neg, -g)
LC_UNARY(exp, m_exp(x))
LC_UNARY_GRAD(exp, g * y)
LC_UNARY(log, m_log(x))
LC_UNARY_GRAD(log, g / x)
LC_UNARY(sqrt, m_sqrt(x))
LC_UNARY_GRAD(sqrt, g / (2 * y))
LC_UNARY(rsqrt, 1 / m_sqrt(x))
LC_UNARY_GRAD(rsqrt, (real)-0.5 * g * y * y * y)
LC_UNARY(reciprocal, 1 / x)
LC_UNARY_GRAD(reciprocal, -g * y * y)
LC_UNARY(abs, m_abs(x))
LC_UNARY_GRAD(abs, x > 0 ? g : x < 0 ? -g : 0)
LC_UNARY(square, x * x)
LC_UNARY_GRAD(square, 2 * x * g)
LC_UNARY(sin, m_sin(x))
LC_UNARY_GRAD(sin, g * m_cos(x))
LC_UNARY(cos, m_cos(x))
LC_UNARY_GRAD(cos, -g * m_sin(x))
LC_UNARY(tanh, m_tanh(x))
LC_UNARY_GRAD(tanh, g * (1 - y * y))
LC_UNARY(sigmoid, LC_S(logistic)(x))
LC_UNARY_GRAD(sigmoid, g * y * (1 - y))
LC_UNARY(relu, x <= 0 ? 0 : x)
LC_UNARY_GRAD(relu, x <= 0 ? 0 : g)
LC_UNARY(elu, x > 0 ? x : p[0] * m_expm1(x))
LC_UNARY_GRAD(elu, x > 0 ? g : g * p[0] * m_exp(x))
LC_UNARY(silu, LC_S(swish)(x))
LC_UNARY_GRAD(silu, g * LC_S(swish_slope)(x))
LC_UNARY(gelu, x * m_normcdf(x))
LC_UNARY_GRAD(gelu, g * (m_normcdf(x) + x * (real)0.39894228040143267794 * m_gauss(x)))
LC_UNARY(softplus, p[0] * x > p[1] ? x : (LC_S(relu)(p[0] * x, p) + m_log1p(m_exp(-m_abs(p[0] * x)))) / p[0])
LC_UNARY_GRAD(softplus, p[0] * x > p[1] ? g : g * LC_S(logistic)(p[0] * x))
LC_UNARY(clamp, x < p[0] ? p[0] : x > p[1] ? p[1] : x)
LC_UNARY_GRAD(clamp, x < p[0] || x > p[1] ? 0 : g)
LC_UNARY(affine, p[0] * x + p[1])
LC_UNARY_GRAD(affine, g * p[0])
LC_UNARY(pow_scalar, p[0] == 2 ? x * x : m_pow(x, p[0]))
LC_UNARY_GRAD(pow_scalar, p[0] == 0 ? 0 : p[0] == 2 ? 2 * x * g : g * p[0] * m_pow(x, p[0] - 1))
LC_UNARY(sign, x > 0 ? 1 : x < 0 ? -1 : 0)
LC_UNARY(floor, m_floor(x))
LC_UNARY(round, m_rint(x))

/* ---- binary ------------------------------------------------------------------------------------------------------ */
LC_BINARY(add, a + b)
LC_BINARY_GRAD(add_grad_a, g)
LC_BINARY_GRAD(add_grad_b, g)
LC_BINARY(sub, a - b)
LC_BINARY_GRAD(sub_grad_a, g)
LC_BINARY_GRAD(sub_grad_b, -g)
LC_BINARY(mul, a * b)
LC_BINARY_GRAD(mul_grad_a, g * b)
LC_BINARY_GRAD(mul_grad_b, g * a)
LC_BINARY(div, a / b)
LC_BINARY_GRAD(div_grad_a, g / b)
LC_BINARY_GRAD(div_grad_b, -g * (a / b) / b)
LC_BINARY(pow, m_pow(a, b))
LC_BINARY_GRAD(pow_grad_a, b == 0 ? 0 : g * b * m_pow(a, b - 1))
LC_BINARY_GRAD(pow_grad_b, a == 0 && b >= 0 ? 0 : g * y * m_log(a))
LC_BINARY(maximum, a > b || a != a ? a : b)
LC_BINARY_GRAD(maximum_grad_a, LC_S(share)(g, a > b || a != a, a == b))
LC_BINARY_GRAD(maximum_grad_b, LC_S(share)(g, b > a || b != b, a == b))
LC_BINARY(minimum, a < b || a != a ? a : b)
LC_BINARY_GRAD(minimum_grad_a, LC_S(share)(g, a < b || a != a, a == b))
LC_BINARY_GRAD(minimum_grad_b, LC_S(share)(g, b < a || b != b, a == b))
LC_BINARY(swiglu, LC_S(swish)(a) * b)
LC_BINARY_GRAD(swiglu_grad_a, g * b * LC_S(swish_slope)(a))
LC_BINARY_GRAD(swiglu_grad_b, g * LC_S(swish)(a))

/* ---- comparisons ------------------------------------------------------------------------------------------------- */
LC_COMPARE(eq, a == b)
LC_COMPARE(ne, a != b)
LC_COMPARE(lt, a < b)
LC_COMPARE(le, a <= b)
LC_COMPARE(gt, a > b)
LC_COMPARE(ge, a >= b)

/* clang-format on */

#endif
