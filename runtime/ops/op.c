/* op.c: the helpers of op.h. */
#include "op.h"

lc_tensor *x_hold(lc_expr *e, lc_tensor *t) {
    if (!t) {
        if (e->rc == LC_OK) e->rc = LC_ENOMEM;
        return NULL;
    }
    if (e->n == LC_EXPR_MAX) {
        lc_release(t);
        e->rc = lc_fail(LC_EBUG, "a gradient rule holds more than %d tensors", LC_EXPR_MAX);
        return NULL;
    }
    return e->held[e->n++] = t;
}

lc_tensor *x_run(lc_expr *e, lc_frame *c) {
    if (e->rc != LC_OK) return NULL;
    if ((e->rc = lc_run(c)) != LC_OK) return NULL;
    for (int i = 0; i < c->row->n_y; i++)
        if (c->y[i]) x_hold(e, c->y[i]);
    return e->rc == LC_OK ? c->y[0] : NULL;
}

lc_tensor *x1(lc_expr *e, int op, lc_tensor *a) {
    if (!a || e->rc != LC_OK) return NULL;
    lc_frame c;
    lc_frame_init(&c, op);
    c.x[0] = a;
    return x_run(e, &c);
}

lc_tensor *x2(lc_expr *e, int op, lc_tensor *a, lc_tensor *b) {
    if (!a || !b || e->rc != LC_OK) return NULL;
    lc_frame c;
    lc_frame_init(&c, op);
    c.x[0] = a;
    c.x[1] = b;
    return x_run(e, &c);
}

lc_tensor *x_affine(lc_expr *e, lc_tensor *a, double scale, double shift) {
    if (!a || e->rc != LC_OK) return NULL;
    lc_frame c;
    lc_frame_init(&c, LC_OP_affine);
    c.x[0] = a;
    c.f[0] = scale;
    c.f[1] = shift;
    return x_run(e, &c);
}

lc_tensor *x_zeros(lc_expr *e, int dtype, int device, int ndim, const int32_t *dims) {
    if (e->rc != LC_OK) return NULL;
    lc_tensor *t;
    if ((e->rc = lc_tensor_new(dtype, device, ndim, dims, &t)) != LC_OK) return NULL;
    x_hold(e, t);
    lc_frame c;
    lc_frame_init(&c, LC_OP_fill_);
    c.x[0] = t;
    e->rc = lc_run(&c);
    return e->rc == LC_OK ? t : NULL;
}

static lc_tensor *shape_op(lc_expr *e, int op, lc_tensor *a, int ndim, const int32_t *dims) {
    if (!a || e->rc != LC_OK) return NULL;
    lc_frame c;
    lc_frame_init(&c, op);
    c.x[0] = a;
    c.i[0] = ndim;
    for (int i = 0; i < ndim; i++) c.i[1 + i] = dims[i];
    return x_run(e, &c);
}

lc_tensor *x_reshape(lc_expr *e, lc_tensor *a, int ndim, const int32_t *dims) { return shape_op(e, LC_OP_reshape, a, ndim, dims); }
lc_tensor *x_expand(lc_expr *e, lc_tensor *a, int ndim, const int32_t *dims) { return shape_op(e, LC_OP_expand, a, ndim, dims); }

lc_tensor *x_swap(lc_expr *e, lc_tensor *a) {
    if (!a || e->rc != LC_OK) return NULL;
    lc_frame c;
    lc_frame_init(&c, LC_OP_transpose);
    c.x[0] = a;
    c.i[0] = a->ndim - 2;
    c.i[1] = a->ndim - 1;
    return x_run(e, &c);
}

lc_tensor *x_matmul(lc_expr *e, lc_tensor *a, lc_tensor *b, double alpha) {
    if (!a || !b || e->rc != LC_OK) return NULL;
    lc_frame c;
    lc_frame_init(&c, LC_OP_matmul);
    c.x[0] = a;
    c.x[1] = b;
    c.f[0] = alpha;
    return x_run(e, &c);
}

lc_tensor *x_to(lc_expr *e, lc_tensor *t, int dtype) {
    if (!t || e->rc != LC_OK || t->dtype == dtype) return t;
    lc_frame c;
    lc_frame_init(&c, LC_OP_to);
    c.x[0] = t;
    c.i[0] = dtype;
    c.i[1] = t->device;
    return x_run(e, &c);
}

lc_tensor *x_sum_to(lc_expr *e, lc_tensor *g, const lc_edge *like) {
    if (!g || e->rc != LC_OK) return NULL;
    lc_frame c;
    lc_frame_init(&c, LC_OP_sum);
    int n = 0, lead = g->ndim - like->ndim;
    for (int i = 0; i < g->ndim; i++)
        if (i < lead || (like->dim[i - lead] == 1 && g->dim[i] != 1)) c.i[1 + n++] = i;
    if (n) {
        c.x[0] = g;
        c.i[0] = n;
        c.i[1 + LC_MAX_DIMS] = 1;
        g = x_run(e, &c);
    }
    return lead && g ? x_reshape(e, g, like->ndim, like->dim) : g;
}

void x_give(lc_expr *e, lc_back *b, int i, lc_tensor *t) {
    if (t && e->rc == LC_OK && b->need[i] && !b->gx[i]) b->gx[i] = lc_retain(t);
}

lc_status x_done(lc_expr *e) {
    for (int i = 0; i < e->n; i++) lc_release(e->held[i]);
    e->n = 0;
    return e->rc;
}

bool check_dim(lc_frame *c, int d, int ndim) {
    if (d >= 0 && d < ndim) return true;
    lc_op_error(c, LC_EARG, "dim %d does not exist: there are %d (dims count from 1, or -1 from the end)", d + 1, ndim);
    return false;
}
