/* matmul.c: products. A frozen weight saves nothing of its input: linear keeps x only when w (or LoRA's A) is trained. */
#include "op.h"

/* ---- matmul ---------------------------------------------------------------------------------------------------------- */
/* A vector a is a row, a vector b a column; the dim that this adds is dropped from the result. */
static lc_tensor *as_matrix(lc_tensor *t, bool column) {
    lc_tensor *v = lc_tensor_view(t);
    if (!v || t->ndim != 1) return v;
    v->ndim = 2;
    v->dim[column ? 0 : 1] = t->dim[0];
    v->stride[column ? 0 : 1] = t->stride[0];
    v->dim[column ? 1 : 0] = 1;
    v->stride[column ? 1 : 0] = column ? 1 : t->dim[0];
    return v;
}

static lc_status matmul_shape(lc_frame *c) {
    if (c->x[0]->ndim < 1 || c->x[1]->ndim < 1) return lc_op_error(c, LC_ESHAPE, "a single number is no matrix; use *");
    lc_tensor *a = as_matrix(c->x[0], false), *b = as_matrix(c->x[1], true);
    if (a) lc_substitute(c, 0, a);
    if (b) lc_substitute(c, 1, b);
    if (!a || !b) return LC_ENOMEM;
    int m = a->dim[a->ndim - 2], k = a->dim[a->ndim - 1], n = b->dim[b->ndim - 1], nb;
    if (b->dim[b->ndim - 2] != k) return lc_op_error(c, LC_ESHAPE, "inner dims differ: %d and %d", k, b->dim[b->ndim - 2]);
    lc_tensor ba = *a, bb = *b; /* batch dims alone */
    ba.ndim -= 2;
    bb.ndim -= 2;
    int32_t dims[LC_MAX_DIMS];
    LC_TRY(lc_broadcast_dims(c, &ba, &bb, &nb, dims));
    for (int side = 0; side < 2; side++) {
        dims[nb] = side ? k : m;
        dims[nb + 1] = side ? n : k;
        lc_tensor *v = lc_expanded(side ? b : a, nb + 2, dims);
        if (!v) return LC_ENOMEM;
        lc_substitute(c, side, v);
    }
    dims[nb] = m;
    dims[nb + 1] = n;
    LC_TRY(lc_out(c, 0, c->x[0]->dtype, nb + 2, dims));
    if (c->x[2]) {
        lc_tensor *add = c->x[2];
        if (add->ndim > nb + 2) return lc_op_error(c, LC_ESHAPE, "add has more dims than the product");
        for (int i = 0; i < add->ndim; i++)
            if (add->dim[i] != 1 && add->dim[i] != dims[nb + 2 - add->ndim + i]) return lc_op_error(c, LC_ESHAPE, "add does not broadcast to the product");
        lc_tensor *v = lc_expanded(add, nb + 2, dims);
        if (!v) return LC_ENOMEM;
        lc_substitute(c, 2, v);
    }
    return LC_OK;
}

static void matmul_after(lc_frame *c) {
    lc_tensor *y = c->y[0];
    bool row = c->x[0]->ndim == 1, column = c->x[1]->ndim == 1;
    if (column) y->ndim--;
    if (row) {
        int last = y->ndim - 1;
        if (!column) {
            y->dim[last - 1] = y->dim[last];
            y->stride[last - 1] = y->stride[last];
        }
        y->ndim--;
    }
}

static lc_tensor *rows_of(lc_expr *e, lc_tensor *t) { /* [.., n] -> [rows, n] */
    if (!t) return NULL;
    int32_t n = last_dim(t);
    int32_t dims[2] = {n ? (int32_t)(lc_tensor_numel(t) / n) : 0, n};
    return x_reshape(e, t, 2, dims);
}

static lc_tensor *matrix_view(lc_expr *e, lc_tensor *t, bool column) { return e->rc == LC_OK ? x_hold(e, as_matrix(t, column)) : NULL; }

static lc_status matmul_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    const lc_node *n = b->node;
    lc_tensor *g = b->g[0], *a = matrix_view(&e, n->x[0], false), *m = matrix_view(&e, n->x[1], true);
    x_give(&e, b, 2, x_sum_to(&e, g, &n->edge[2]));
    bool row = n->x[0]->ndim == 1, column = n->x[1]->ndim == 1;
    if ((row || column) && e.rc == LC_OK) { /* the dropped dims come back */
        int32_t dims[LC_MAX_DIMS];
        int nb = g->ndim - !row - !column;
        for (int i = 0; i < nb; i++) dims[i] = g->dim[i];
        dims[nb] = row ? 1 : g->dim[nb];
        dims[nb + 1] = column ? 1 : last_dim(g);
        g = x_reshape(&e, g, nb + 2, dims);
    }
    if (b->need[0]) {
        lc_tensor *ga = x_matmul(&e, g, x_swap(&e, m), n->f[0]);
        if (row && ga) ga = x_sum_to(&e, ga, &n->edge[0]), ga = x_reshape(&e, ga, 1, n->edge[0].dim);
        else ga = x_sum_to(&e, ga, &n->edge[0]);
        x_give(&e, b, 0, ga);
    }
    if (b->need[1]) {
        lc_tensor *gb;
        if (m && m->ndim == 2 && a && a->ndim > 2) gb = x_matmul(&e, x_swap(&e, rows_of(&e, a)), rows_of(&e, g), n->f[0]);
        else gb = x_matmul(&e, x_swap(&e, a), g, n->f[0]);
        if (column && gb) {
            int32_t dims[LC_MAX_DIMS];
            for (int i = 0; i + 1 < gb->ndim; i++) dims[i] = gb->dim[i];
            gb = x_reshape(&e, gb, gb->ndim - 1, dims);
        }
        x_give(&e, b, 1, x_sum_to(&e, gb, &n->edge[1]));
    }
    return x_done(&e);
}

/* ---- linear ---------------------------------------------------------------------------------------------------------- */
static lc_status linear_shape(lc_frame *c) {
    const lc_tensor *x = c->x[0], *w = c->x[1], *bias = c->x[2], *add = c->x[3];
    int32_t dims[LC_MAX_DIMS];
    if (w->ndim != 2 || x->ndim < 1) return lc_op_error(c, LC_ESHAPE, "w must be a matrix [out, in] and x [.., in]");
    if (w->dim[1] != last_dim(x)) return lc_op_error(c, LC_ESHAPE, "x has %d columns, w expects %d", last_dim(x), w->dim[1]);
    if (!lc_dtype_is_float(w->dtype) && !lc_dtype_is_quant(w->dtype)) return lc_op_error(c, LC_EDTYPE, "w must be a float or quantised tensor");
    if ((x->dtype == LC_F64) != (w->dtype == LC_F64)) return lc_op_error(c, LC_EDTYPE, "f64 goes with f64 only");
    memcpy(dims, x->dim, sizeof dims);
    dims[x->ndim - 1] = w->dim[0];
    if (bias && (bias->ndim != 1 || bias->dim[0] != w->dim[0])) return lc_op_error(c, LC_ESHAPE, "b must have one value per row of w");
    if (bias && (bias->dtype == LC_F64) != (x->dtype == LC_F64)) return lc_op_error(c, LC_EDTYPE, "f64 goes with f64 only");
    if (add && add->dtype != x->dtype) return lc_op_error(c, LC_EDTYPE, "dtypes of add and x differ");
    LC_TRY(lc_out(c, 0, x->dtype, x->ndim, dims));
    if (add && !lc_same_shape(add, c->y[0])) return lc_op_error(c, LC_ESHAPE, "add must have the result's shape");
    return LC_OK;
}

static void linear_save(const lc_frame *c, uint32_t *save_x, uint32_t *save_y) {
    *save_x = (c->x[1]->requires_grad ? 1u : 0) | (c->x[0]->requires_grad ? 2u : 0);
    *save_y = 0;
}

static lc_status linear_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    const lc_node *n = b->node;
    lc_tensor *g = b->g[0], *g2 = rows_of(&e, g);
    if (b->need[0]) {
        lc_tensor *gx = x_matmul(&e, g2, x_to(&e, n->x[1], g->dtype), n->f[0]);
        x_give(&e, b, 0, gx ? x_reshape(&e, gx, n->edge[0].ndim, n->edge[0].dim) : NULL);
    }
    if (b->need[1]) {
        lc_tensor *gw = x_matmul(&e, x_swap(&e, g2), rows_of(&e, n->x[0]), n->f[0]);
        x_give(&e, b, 1, x_to(&e, gw, n->edge[1].dtype));
    }
    if (b->need[2]) x_give(&e, b, 2, x_to(&e, x_sum_to(&e, g2, &n->edge[2]), n->edge[2].dtype));
    x_give(&e, b, 3, g);
    return x_done(&e);
}

const lc_rule lc_rule_matmul = {.shape = matmul_shape, .backward = matmul_backward, .save_x = 3, .after = matmul_after};
const lc_rule lc_rule_linear = {.shape = linear_shape, .backward = linear_backward, .save_x = 3, .save = linear_save};
