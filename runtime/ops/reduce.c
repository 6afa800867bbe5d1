/* reduce.c: sums, extremes, softmax. Kernels see results with the reduced dims kept at size 1; they are dropped afterwards. */
#include "op.h"

enum { KEEP = 1 + LC_MAX_DIMS };

/* ---- reductions over a set of dims: i[0] dims, i[1..], i[KEEP] ---------------------------------------------------------- */
static lc_status reduce_shape(lc_frame *c) {
    const lc_tensor *x = c->x[0];
    int32_t dims[LC_MAX_DIMS];
    bool seen[LC_MAX_DIMS] = {false};
    memcpy(dims, x->dim, sizeof dims);
    if (c->i[0] == 0) {
        c->i[0] = x->ndim;
        for (int i = 0; i < x->ndim; i++) c->i[1 + i] = i;
    }
    for (int i = 0; i < c->i[0]; i++) {
        int d = c->i[1 + i];
        if (!check_dim(c, d, x->ndim)) return LC_EARG;
        if (seen[d]) return lc_op_error(c, LC_EARG, "dim %d is named twice", d + 1);
        seen[d] = true;
        dims[d] = 1;
    }
    if ((c->op == LC_OP_amax || c->op == LC_OP_amin) && lc_tensor_numel(x) == 0) return lc_op_error(c, LC_ESHAPE, "no elements");
    return lc_out(c, 0, lc_dtype_is_float(x->dtype) ? x->dtype : LC_F32, x->ndim, dims);
}

static void drop_dims(lc_tensor *y, const int32_t *which, int n) {
    int to = 0;
    for (int i = 0; i < y->ndim; i++) {
        bool drop = false;
        for (int k = 0; k < n; k++) drop |= which[k] == i;
        if (drop) continue;
        y->dim[to] = y->dim[i];
        y->stride[to++] = y->stride[i];
    }
    y->ndim = (uint8_t)to;
}

static void reduce_after(lc_frame *c) {
    if (!c->i[KEEP]) drop_dims(c->y[0], &c->i[1], c->i[0]);
}

/* t (a gradient or result with dims perhaps dropped) spread over the input's shape */
static lc_tensor *spread(lc_expr *e, const lc_node *n, lc_tensor *t) {
    const lc_edge *in = &n->edge[0];
    int32_t keep[LC_MAX_DIMS];
    memcpy(keep, in->dim, sizeof keep);
    for (int i = 0; i < n->i[0]; i++) keep[n->i[1 + i]] = 1;
    return x_expand(e, x_reshape(e, t, in->ndim, keep), in->ndim, in->dim);
}

static lc_status sum_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    x_give(&e, b, 0, spread(&e, b->node, b->g[0]));
    return x_done(&e);
}

static lc_status mean_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    const lc_node *n = b->node;
    double count = 1;
    for (int i = 0; i < n->i[0]; i++) count *= n->edge[0].dim[n->i[1 + i]];
    x_give(&e, b, 0, spread(&e, n, x_affine(&e, b->g[0], 1 / (count > 0 ? count : 1), 0)));
    return x_done(&e);
}

static lc_status extreme_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    const lc_node *n = b->node;
    lc_tensor *x = n->x[0], *hit = x_to(&e, x2(&e, LC_OP_eq, x, spread(&e, n, n->y[0])), x->dtype);
    lc_frame c;
    lc_frame_init(&c, LC_OP_sum);
    c.x[0] = hit;
    memcpy(c.i, n->i, sizeof n->i[0] * (KEEP + 1));
    c.i[KEEP] = 1;
    lc_tensor *ties = hit ? x_run(&e, &c) : NULL;
    x_give(&e, b, 0, x2(&e, LC_OP_mul, x2(&e, LC_OP_div, hit, ties), spread(&e, n, b->g[0])));
    return x_done(&e);
}

/* ---- along one dim: i[0] ------------------------------------------------------------------------------------------------ */
static lc_status along_shape(lc_frame *c) { return check_dim(c, c->i[0], c->x[0]->ndim) ? lc_out_like(c, 0, c->x[0]) : LC_EARG; }

static lc_status pick_shape(lc_frame *c) { /* argmax, argmin, logsumexp: dim, keep */
    const lc_tensor *x = c->x[0];
    int32_t dims[LC_MAX_DIMS];
    if (!check_dim(c, c->i[0], x->ndim)) return LC_EARG;
    memcpy(dims, x->dim, sizeof dims);
    if (c->op != LC_OP_logsumexp && dims[c->i[0]] == 0) return lc_op_error(c, LC_ESHAPE, "dim %d is empty", c->i[0] + 1);
    dims[c->i[0]] = 1;
    return lc_out(c, 0, c->op == LC_OP_logsumexp ? x->dtype : LC_I32, x->ndim, dims);
}

static void pick_after(lc_frame *c) {
    if (!c->i[1]) drop_dims(c->y[0], c->i, 1);
}

static lc_status softmax_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    lc_frame c;
    lc_frame_init(&c, LC_OP_softmax_backward);
    c.x[0] = b->g[0];
    c.x[1] = b->node->y[0];
    c.i[0] = b->node->i[0];
    c.i[1] = b->node->op == LC_OP_log_softmax;
    x_give(&e, b, 0, x_run(&e, &c));
    return x_done(&e);
}

static lc_status logsumexp_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    const lc_node *n = b->node;
    const lc_edge *in = &n->edge[0];
    int32_t keep[LC_MAX_DIMS];
    memcpy(keep, in->dim, sizeof keep);
    keep[n->i[0]] = 1;
    lc_tensor *y = x_reshape(&e, n->y[0], in->ndim, keep), *g = x_reshape(&e, b->g[0], in->ndim, keep);
    x_give(&e, b, 0, x2(&e, LC_OP_mul, x1(&e, LC_OP_exp, x2(&e, LC_OP_sub, n->x[0], y)), g));
    return x_done(&e);
}

static lc_status cumsum_backward(lc_back *b) { /* the running sum the other way: no difference of large sums */
    lc_expr e = {.rc = LC_OK};
    lc_frame run;
    lc_frame_init(&run, LC_OP_cumsum);
    run.x[0] = b->g[0];
    run.i[0] = b->node->i[0];
    run.i[1] = !b->node->i[1];
    x_give(&e, b, 0, x_run(&e, &run));
    return x_done(&e);
}

static lc_status scalar_shape(lc_frame *c) {
    const lc_tensor *t = c->x[0] ? c->x[0] : c->list[0];
    if (!lc_dtype_is_float(t->dtype)) return lc_op_error(c, LC_EDTYPE, "float tensors are wanted");
    return lc_out(c, 0, real_dtype(t), 0, NULL);
}

const lc_rule lc_rule_sum = {.shape = reduce_shape, .backward = sum_backward, .after = reduce_after};
const lc_rule lc_rule_mean = {.shape = reduce_shape, .backward = mean_backward, .after = reduce_after};
const lc_rule lc_rule_amax = {.shape = reduce_shape, .backward = extreme_backward, .save_x = 1, .save_y = 1, .after = reduce_after};
const lc_rule lc_rule_amin = {.shape = reduce_shape, .backward = extreme_backward, .save_x = 1, .save_y = 1, .after = reduce_after};
const lc_rule lc_rule_argmax = {.shape = pick_shape, .after = pick_after};
const lc_rule lc_rule_argmin = {.shape = pick_shape, .after = pick_after};
const lc_rule lc_rule_logsumexp = {.shape = pick_shape, .backward = logsumexp_backward, .save_x = 1, .save_y = 1, .after = pick_after};
const lc_rule lc_rule_cumsum = {.shape = along_shape, .backward = cumsum_backward};
const lc_rule lc_rule_softmax = {.shape = along_shape, .backward = softmax_backward, .save_y = 1};
const lc_rule lc_rule_log_softmax = {.shape = along_shape, .backward = softmax_backward, .save_y = 1};
const lc_rule lc_rule_softmax_backward = {.shape = along_shape};
const lc_rule lc_rule_count_nonfinite = {.shape = scalar_shape};
const lc_rule lc_rule_sum_squares = {.shape = scalar_shape};
