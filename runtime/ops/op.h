/* op.h: how a rule is written. A shape rule checks and makes c->y. A gradient rule computes with other ops: it opens an lc_expr,
 * calls x1, x2, ... which give borrowed tensors that live until x_done, hands results over with x_give, and ends with
 * `return x_done(&e)`. After a failure every call gives NULL and does nothing, so rules need no checks in between. */
#ifndef LC_OPS_H
#define LC_OPS_H

#include <string.h>

#include "../core/core.h"

enum { LC_EXPR_MAX = 64 };
typedef struct lc_expr {
    lc_tensor *held[LC_EXPR_MAX];
    int n;
    lc_status rc;
} lc_expr;

lc_tensor *x_hold(lc_expr *e, lc_tensor *t);                      /* the reference passes to e */
lc_tensor *x_run(lc_expr *e, lc_frame *c);                        /* all results are held; gives the first */
lc_tensor *x1(lc_expr *e, int op, lc_tensor *a);
lc_tensor *x2(lc_expr *e, int op, lc_tensor *a, lc_tensor *b);
lc_tensor *x_affine(lc_expr *e, lc_tensor *a, double scale, double shift);
lc_tensor *x_zeros(lc_expr *e, int dtype, int device, int ndim, const int32_t *dims);
lc_tensor *x_reshape(lc_expr *e, lc_tensor *a, int ndim, const int32_t *dims);
lc_tensor *x_expand(lc_expr *e, lc_tensor *a, int ndim, const int32_t *dims);
lc_tensor *x_swap(lc_expr *e, lc_tensor *a);                      /* last two dims exchanged */
lc_tensor *x_matmul(lc_expr *e, lc_tensor *a, lc_tensor *b, double alpha);
lc_tensor *x_to(lc_expr *e, lc_tensor *t, int dtype);                /* t itself when it has the dtype */
lc_tensor *x_sum_to(lc_expr *e, lc_tensor *g, const lc_edge *like); /* what broadcasting spread, summed back */
void x_give(lc_expr *e, lc_back *b, int i, lc_tensor *t);         /* the gradient of input i, if wanted */
lc_status x_done(lc_expr *e);

/* Shapes */
static inline int32_t last_dim(const lc_tensor *t) { return t->ndim ? t->dim[t->ndim - 1] : 1; }
bool check_dim(lc_frame *c, int d, int ndim);                     /* records an error when d is outside */
static inline int real_dtype(const lc_tensor *t) { return t->dtype == LC_F64 ? LC_F64 : LC_F32; } /* of sums and statistics */

#endif
