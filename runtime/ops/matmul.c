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
    int dtype = c->x[0]->dtype;
    LC_TRY(lc_out(c, 0, c->i[0] ? real_dtype(c->x[0]) : dtype, nb + 2, dims));
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

static void add_product(lc_expr *e, lc_tensor *sum, lc_tensor *a, lc_tensor *m, double alpha) {
    if (!sum || !a || !m || e->rc != LC_OK) return;
    lc_frame c;
    lc_frame_init(&c, LC_OP_addmm_);
    c.x[0] = sum;
    c.x[1] = a;
    c.x[2] = m;
    c.f[0] = alpha;
    x_run(e, &c);
}

/* The gradient of input i is alpha * a m, matrices. That of a leaf is added to what it has in the same call, in f32. */
static void give_product(lc_expr *e, lc_back *b, int i, lc_tensor *a, lc_tensor *m, double alpha) {
    const lc_edge *edge = &b->node->edge[i];
    lc_tensor *sum = edge->leaf ? edge->leaf->grad : NULL;
    if (!a || !m || e->rc != LC_OK || !b->need[i]) return;
    if (sum && sum->ndim == 2) {
        add_product(e, sum, a, m, alpha);
        return;
    }
    lc_frame c;
    lc_frame_init(&c, LC_OP_matmul);
    c.x[0] = a;
    c.x[1] = m;
    c.f[0] = alpha;
    c.i[0] = true;
    lc_tensor *g = x_run(e, &c);
    x_give(e, b, i, edge->leaf ? g : x_to(e, g, edge->dtype));
}

static lc_tensor *matrix_view(lc_expr *e, lc_tensor *t, bool column) { return e->rc == LC_OK ? x_hold(e, as_matrix(t, column)) : NULL; }

static lc_status matmul_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    const lc_node *n = b->node;
    lc_tensor *g = x_to(&e, b->g[0], n->edge[0].dtype), *a = matrix_view(&e, n->x[0], false), *m = matrix_view(&e, n->x[1], true);
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
    if (b->need[1]) give_product(&e, b, 1, x_swap(&e, g2), rows_of(&e, n->x[0]), n->f[0]);
    if (b->need[2]) x_give(&e, b, 2, x_to(&e, x_sum_to(&e, g2, &n->edge[2]), n->edge[2].dtype));
    x_give(&e, b, 3, g);
    return x_done(&e);
}

/* ---- addmm_ ---------------------------------------------------------------------------------------------------------- */
static lc_status addmm_shape(lc_frame *c) {
    const lc_tensor *x = c->x[0], *a = c->x[1], *b = c->x[2];
    if (x->ndim != 2 || a->ndim != 2 || b->ndim != 2) return lc_op_error(c, LC_ESHAPE, "x, a and b must be matrices");
    if (a->dim[1] != b->dim[0] || x->dim[0] != a->dim[0] || x->dim[1] != b->dim[1])
        return lc_op_error(c, LC_ESHAPE, "x must be [m, n], a [m, k] and b [k, n]");
    if (a->dtype != b->dtype) return lc_op_error(c, LC_EDTYPE, "dtypes of a and b differ");
    if (x->dtype != a->dtype && x->dtype != LC_F32) return lc_op_error(c, LC_EDTYPE, "x must be f32 or of the dtype of a and b");
    if ((x->dtype == LC_F64) != (a->dtype == LC_F64)) return lc_op_error(c, LC_EDTYPE, "f64 goes with f64 only");
    return LC_OK;
}

/* ---- projections ----------------------------------------------------------------------------------------------------- */
enum { PARTS = 3, P_W = 1, P_A = 4, P_B = 7, P_ADD = 10, P_LOW = 3 /* among the results */ };

static lc_status projection_part(lc_frame *c, int i, int32_t *ranks) {
    const lc_tensor *x = c->x[0], *w = c->x[P_W + i], *a = c->x[P_A + i], *b = c->x[P_B + i];
    const bool wide = x->dtype == LC_F64;
    int32_t dims[LC_MAX_DIMS];
    if ((a == NULL) != (b == NULL)) return lc_op_error(c, LC_EARG, "an adapter is a pair: %s without %s", c->row->x_name[a ? P_A + i : P_B + i],
                                                       c->row->x_name[a ? P_B + i : P_A + i]);
    if (!w) return a ? lc_op_error(c, LC_EARG, "there is an adapter %s without a weight", c->row->x_name[P_A + i]) : LC_OK;
    if (w->ndim != 2 || w->dim[1] != last_dim(x)) return lc_op_error(c, LC_ESHAPE, "w must be a matrix [out, in] and x [.., in]");
    if (!lc_dtype_is_float(w->dtype) && !lc_dtype_is_quant(w->dtype)) return lc_op_error(c, LC_EDTYPE, "w must be a float or quantised tensor");
    if (wide != (w->dtype == LC_F64) || (a && (wide != (a->dtype == LC_F64) || a->dtype != b->dtype)))
        return lc_op_error(c, LC_EDTYPE, "f64 goes with f64 only, and a and b share their dtype");
    if (a && (a->ndim != 2 || b->ndim != 2 || a->dim[1] != w->dim[1] || b->dim[0] != w->dim[0] || a->dim[0] != b->dim[1]))
        return lc_op_error(c, LC_ESHAPE, "an adapter must be a [r, in] and b [out, r]");
    if (a) *ranks += a->dim[0];
    memcpy(dims, x->dim, sizeof dims);
    dims[x->ndim - 1] = w->dim[0];
    return lc_out(c, i, x->dtype, x->ndim, dims);
}

static lc_status projections_shape(lc_frame *c) {
    const lc_tensor *x = c->x[0], *add = c->x[P_ADD];
    int32_t ranks = 0;
    if (x->ndim < 1) return lc_op_error(c, LC_ESHAPE, "x must be [.., in]");
    for (int i = 0; i < PARTS; i++) LC_TRY(projection_part(c, i, &ranks));
    if (add && (add->dtype != x->dtype || !lc_same_shape(add, c->y[0])))
        return lc_op_error(c, LC_ESHAPE, "add must have the first result's shape and dtype");
    if (!ranks) return LC_OK;
    int32_t dims[2] = {last_dim(x) ? (int32_t)(lc_tensor_numel(x) / last_dim(x)) : 0, ranks};
    return lc_out(c, P_LOW, x->dtype, 2, dims);
}

static bool wants(const lc_tensor *t) { return t && t->requires_grad; }

/* A norm's result is not kept where memory is scarce, on a device: what the norm itself keeps gives it again, in one pass. */
static bool is_made_anew(const lc_tensor *x) { return x->node && x->node->op == LC_OP_rms_norm && lc_device_get(x->device)->backend; }

static lc_tensor *input_anew(lc_expr *e, const lc_node *n) {
    const lc_node *norm = n->edge[0].node;
    if (!norm || norm->op != LC_OP_rms_norm || !norm->x[0] || !norm->x[1] || e->rc != LC_OK) return NULL;
    lc_frame c;
    lc_frame_init(&c, LC_OP_rms_norm);
    c.x[0] = norm->x[0], c.x[1] = norm->x[1], c.f[0] = norm->f[0];
    return x_run(e, &c);
}

static void projections_save(const lc_frame *c, uint32_t *save_x, uint32_t *save_y) {
    const bool gx = wants(c->x[0]);
    *save_x = *save_y = 0;
    for (int i = 0; i < PARTS; i++) {
        const bool ga = wants(c->x[P_A + i]);
        if ((ga || wants(c->x[P_W + i])) && !is_made_anew(c->x[0])) *save_x |= 1u;
        if (gx) *save_x |= 1u << (P_W + i) | 1u << (P_A + i);
        if (gx || ga) *save_x |= 1u << (P_B + i);
        if (wants(c->x[P_B + i])) *save_y |= 1u << P_LOW;
    }
}

static lc_tensor *columns(lc_expr *e, lc_tensor *t, int32_t from, int32_t n) { /* of a matrix */
    if (!t || e->rc != LC_OK) return NULL;
    lc_tensor *v = lc_tensor_view(t);
    if (v) {
        v->offset += from * t->stride[1];
        v->dim[1] = n;
    }
    return x_hold(e, v);
}

/* The gradients that the a_i have, as one matrix, where they lie one after the other (flat buffers). */
static lc_tensor *joined_grads(lc_expr *e, const lc_back *b) {
    const lc_tensor *first = NULL;
    int32_t ranks = 0;
    for (int i = 0; i < PARTS; i++) {
        const lc_edge *edge = &b->node->edge[P_A + i];
        if (!edge->ndim) continue;
        const lc_tensor *t = edge->leaf ? edge->leaf->grad : NULL;
        if (!t || !b->g[i] || t->ndim != 2 || !lc_tensor_contiguous(t)) return NULL;
        if (!first) first = t;
        else if (t->storage != first->storage || t->dtype != first->dtype || t->offset != first->offset + (int64_t)ranks * first->dim[1]) return NULL;
        ranks += t->dim[0];
    }
    if (!first || e->rc != LC_OK) return NULL;
    lc_tensor *v = x_hold(e, lc_tensor_view((lc_tensor *)first));
    if (v) v->dim[0] = ranks;
    return v;
}

/* All gradients of adapters in one call, where those of the a_i are one matrix and every b_i has one. false: one by one. */
static bool add_joined(lc_expr *e, lc_back *b, lc_tensor *const *g, lc_tensor *x, lc_tensor *low, lc_tensor *g_low) {
    const lc_node *n = b->node;
    lc_frame c;
    lc_frame_init(&c, LC_OP_projections_grads_);
    for (int i = 0; i < PARTS; i++) {
        if (n->edge[P_A + i].ndim != 2) continue;
        const lc_tensor *leaf = n->edge[P_B + i].leaf;
        if (!g[i] || !b->need[P_A + i] || !b->need[P_B + i] || !leaf || !leaf->grad || !lc_tensor_contiguous(leaf->grad)) return false;
        if (g[i]->dtype != x->dtype || !lc_tensor_contiguous(g[i])) return false;
        c.x[1 + i] = leaf->grad, c.x[7 + i] = g[i], c.f[i] = n->f[i];
    }
    if (!low || !g_low || !lc_tensor_contiguous(x) || !(c.x[0] = joined_grads(e, b))) return false;
    c.x[4] = x, c.x[5] = low, c.x[6] = g_low;
    x_run(e, &c);
    return true;
}

static lc_status projections_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    const lc_node *n = b->node;
    lc_tensor *g[PARTS], *x = n->x[0] ? rows_of(&e, n->x[0]) : NULL, *low = n->y[P_LOW];
    bool need_low = false, need_x = false;
    for (int i = 0; i < PARTS; i++) {
        need_low |= b->g[i] && b->need[P_A + i];
        need_x |= b->g[i] && (b->need[P_A + i] || b->need[P_W + i]);
    }
    lc_frame c;
    lc_frame_init(&c, LC_OP_projections_backward);
    for (int i = 0; i < PARTS; i++) {
        c.x[i] = g[i] = b->g[i] ? rows_of(&e, b->g[i]) : NULL;
        c.f[i] = n->f[i];
        if (!g[i]) continue;
        if (b->need[0]) c.x[3 + i] = x_to(&e, n->x[P_W + i], g[i]->dtype), c.x[6 + i] = n->x[P_A + i];
        if (b->need[0] || need_low) c.x[9 + i] = n->x[P_B + i];
    }
    lc_tensor *g_low = NULL;
    if (b->need[0] || need_low) {
        c.skip[0] = !b->need[0];
        lc_tensor *gx = x_run(&e, &c);
        if (e.rc == LC_OK) g_low = c.y[1];
        if (gx) x_give(&e, b, 0, x_reshape(&e, gx, n->edge[0].ndim, n->edge[0].dim));
    }
    if (need_x && !x) x = rows_of(&e, input_anew(&e, n));
    if (need_x && !x && e.rc == LC_OK) e.rc = lc_fail(LC_EGRAD, "projections: backward a second time through the same graph");
    const bool joined = need_low && e.rc == LC_OK && add_joined(&e, b, g, x, low, g_low);
    int32_t at = 0, g_at = 0; /* columns of low, of g_low: that has none for a result without a gradient */
    for (int i = 0; i < PARTS; i++) {
        const int32_t r = n->edge[P_A + i].ndim == 2 ? n->edge[P_A + i].dim[0] : 0;
        if (g[i] && r && b->need[P_A + i] && !joined) give_product(&e, b, P_A + i, x_swap(&e, columns(&e, g_low, g_at, r)), x, 1);
        if (g[i] && r && b->need[P_B + i] && !joined) give_product(&e, b, P_B + i, x_swap(&e, g[i]), columns(&e, low, at, r), n->f[i]);
        if (g[i] && b->need[P_W + i]) give_product(&e, b, P_W + i, x_swap(&e, g[i]), x, 1);
        at += r;
        if (g[i]) g_at += r;
    }
    x_give(&e, b, P_ADD, b->g[0]);
    return x_done(&e);
}

/* The gradients g_i are matrices [rows, out]; the width of x is that of w or, where x wants none, not needed. */
static lc_status projections_backward_shape(lc_frame *c) {
    const lc_tensor *g = NULL;
    int32_t ranks = 0, width = 0;
    for (int i = 0; i < PARTS; i++) {
        if (c->x[i]) g = c->x[i];
        if (c->x[3 + i]) width = c->x[3 + i]->dim[1];
        if (c->x[9 + i]) ranks += c->x[9 + i]->dim[1];
    }
    if (!g) return lc_op_error(c, LC_EARG, "there is no gradient");
    int32_t dims[2] = {g->dim[0], width}, low[2] = {g->dim[0], ranks};
    LC_TRY(lc_out(c, 0, g->dtype, 2, dims));
    return ranks ? lc_out(c, 1, g->dtype, 2, low) : LC_OK;
}

static lc_status projections_grads_shape(lc_frame *c) {
    const lc_tensor *ga = c->x[0], *x = c->x[4], *low = c->x[5], *g_low = c->x[6];
    int32_t ranks = 0;
    for (int i = 0; i < PARTS; i++) {
        const lc_tensor *gb = c->x[1 + i], *g = c->x[7 + i];
        if ((gb == NULL) != (g == NULL)) return lc_op_error(c, LC_EARG, "gb and g come together");
        if (!gb) continue;
        if (gb->ndim != 2 || g->ndim != 2 || g->dim[1] != gb->dim[0] || g->dim[0] != x->dim[0] || gb->dtype != ga->dtype)
            return lc_op_error(c, LC_ESHAPE, "g must be [rows, out] and gb [out, r]");
        ranks += gb->dim[1];
    }
    const bool fits = ga->ndim == 2 && x->ndim == 2 && low->ndim == 2 && g_low->ndim == 2 && ga->dim[0] == ranks && ga->dim[1] == x->dim[1] &&
                      low->dim[0] == x->dim[0] && low->dim[1] == ranks && lc_same_shape(low, g_low);
    return fits ? LC_OK : lc_op_error(c, LC_ESHAPE, "x must be [rows, in], low and g_low [rows, ranks], ga [ranks, in]");
}

const lc_rule lc_rule_matmul = {.shape = matmul_shape, .backward = matmul_backward, .save_x = 3, .after = matmul_after};
const lc_rule lc_rule_linear = {.shape = linear_shape, .backward = linear_backward, .save_x = 3, .save = linear_save};
const lc_rule lc_rule_addmm_ = {.shape = addmm_shape};
const lc_rule lc_rule_projections = {.shape = projections_shape, .backward = projections_backward, .save_x = 0x3ff, .save_y = 8,
                                     .save = projections_save};
const lc_rule lc_rule_projections_backward = {.shape = projections_backward_shape};
const lc_rule lc_rule_projections_grads_ = {.shape = projections_grads_shape};
