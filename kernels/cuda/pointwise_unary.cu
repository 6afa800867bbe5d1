/* pointwise_unary.cu: the UNARY and UNARY_FLAT rows of the op table and their gradients. NAME: x[0] -> y[0]. NAME_grad:
 * x[0] = g, x[1] = x, x[2] = y -> y[0]. All of one shape and float dtype; the formulas are kernels/scalar.h. */
#include "pointwise.cuh"

#define UNARY(name, sig, flags, doc)                                                                                   \
    POINTWISE(name, 1, LC_S(name)(x[0], p))                                                                            \
    POINTWISE(name##_grad, 3, LC_S(name##_grad)(x[0], x[1], x[2], p))
#define UNARY_FLAT(name, sig, flags, doc) POINTWISE(name, 1, LC_S(name)(x[0], p))
#include "../../runtime/ops.def"
