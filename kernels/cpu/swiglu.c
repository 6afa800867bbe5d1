/* swiglu.c: both gradients of swiglu in one pass, which reads the three operands once. x[0] = g, x[1] = gate, x[2] = up, of one shape and
 * any strides -> y[0], y[1], which may be x[1] and x[2] themselves. The formulas are kernels/scalar.h. */
#include "scalar_math.h"
#include "walk.h"

#include "../scalar.h"

#define AT(o, i) *(real *)(p[o] + (i) * step[o])

static void both_rows(void *ctx, char *const *p, const int64_t *step, int64_t n, int64_t at) {
    int dense = 1;
    (void)ctx, (void)at;
    for (int o = 0; o < 5; o++) dense &= step[o] == (int64_t)sizeof(real);
    if (dense) {
        real *ga = (real *)p[0], *gb = (real *)p[1];
        const real *g = (const real *)p[2], *a = (const real *)p[3], *b = (const real *)p[4];
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            real of_a = LC_S(swiglu_grad_a)(g[i], a[i], b[i], 0), of_b = LC_S(swiglu_grad_b)(g[i], a[i], b[i], 0);
            ga[i] = of_a, gb[i] = of_b;
        }
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        real g = AT(2, i), a = AT(3, i), b = AT(4, i);
        AT(0, i) = LC_S(swiglu_grad_a)(g, a, b, 0);
        AT(1, i) = LC_S(swiglu_grad_b)(g, a, b, 0);
    }
}

int K(swiglu_backward)(const lc_kargs *k);
int K(swiglu_backward)(const lc_kargs *k) {
    const lc_view *const v[WALK_OPERANDS] = {&k->y[0], &k->y[1], &k->x[0], &k->x[1], &k->x[2]};
    for (int o = 0; o < 5; o++)
        if (v[o]->dtype != LC_K_REAL) return LC_K_UNSUPPORTED;
    walk w;
    walk_make(&w, 5, v, 0);
    if (w.total) walk_all(k, &w, both_rows, NULL);
    return LC_K_OK;
}
