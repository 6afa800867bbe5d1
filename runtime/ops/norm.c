/* norm.c: RMSNorm and rotary position embedding. */
#include "op.h"

static lc_status rms_norm_shape(lc_frame *c) {
    const lc_tensor *x = c->x[0], *w = c->x[1];
    if (x->ndim < 1 || w->ndim != 1 || w->dim[0] != last_dim(x)) return lc_op_error(c, LC_ESHAPE, "w must have one weight per column of x");
    LC_TRY(lc_out_like(c, 0, x));
    int32_t rows[1] = {last_dim(x) ? (int32_t)(lc_tensor_numel(x) / last_dim(x)) : 0};
    return lc_out(c, 1, real_dtype(x), 1, rows);
}

static lc_status rms_norm_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    lc_frame c;
    lc_frame_init(&c, LC_OP_rms_norm_backward);
    c.x[0] = b->g[0];
    c.x[1] = b->node->x[0];
    c.x[2] = b->node->x[1];
    c.x[3] = b->node->y[1];
    c.skip[0] = !b->need[0];
    c.skip[1] = !b->need[1];
    if (b->need[0]) c.x[4] = lc_back_pending(b, 0); /* of the residual beside the norm */
    x_run(&e, &c);
    for (int i = 0; i < 2; i++) x_give(&e, b, i, c.y[i]);
    return x_done(&e);
}

static lc_status rms_norm_backward_shape(lc_frame *c) {
    LC_TRY(lc_out_like(c, 0, c->x[1]));
    return lc_out_like(c, 1, c->x[2]);
}

static lc_status rope_table_shape(lc_frame *c) {
    const lc_tensor *pos = c->x[0], *inv = c->x[1];
    int32_t dims[LC_MAX_DIMS];
    if (pos->ndim < 1 || pos->ndim > 2 || inv->ndim != 1) return lc_op_error(c, LC_ESHAPE, "pos is [t] or [b, t], inv_freq [d/2]");
    memcpy(dims, pos->dim, sizeof dims);
    dims[pos->ndim] = inv->dim[0];
    LC_TRY(lc_out(c, 0, inv->dtype, pos->ndim + 1, dims));
    return lc_out(c, 1, inv->dtype, pos->ndim + 1, dims);
}

/* Result i: x rotated by the tables cos and sin, which are inputs `at` and at + 1. */
static lc_status rotated(lc_frame *c, int i, int at) {
    const lc_tensor *x = c->x[i], *cos = c->x[at];
    static const int order[4] = {0, 2, 1, 3};
    if (x->ndim != 4) return lc_op_error(c, LC_ESHAPE, "x must be [b, h, t, d]");
    bool ok = lc_same_shape(cos, c->x[at + 1]) && cos->ndim >= 2 && cos->ndim <= 3 && last_dim(cos) * 2 == x->dim[3] &&
              cos->dim[cos->ndim - 2] == x->dim[2] && (cos->ndim == 2 || cos->dim[0] == x->dim[0]);
    if (!ok) return lc_op_error(c, LC_ESHAPE, "cos and sin must be [t, d/2] or [b, t, d/2]");
    for (int k = at; k < at + 2; k++)
        if (c->x[k]->dtype != x->dtype && c->x[k]->dtype != real_dtype(x))
            return lc_op_error(c, LC_EDTYPE, "%s is %s; x is %s", c->row->x_name[k], lc_dtype_name(c->x[k]->dtype), lc_dtype_name(x->dtype));
    return lc_out_permuted(c, i, x->dtype, 4, x->dim, order);
}

static lc_status rope_shape(lc_frame *c) { return rotated(c, 0, 1); }

static lc_status rope_pair_shape(lc_frame *c) {
    if (c->x[0]->dtype != c->x[1]->dtype) return lc_op_error(c, LC_EDTYPE, "dtypes of x and x2 differ");
    LC_TRY(rotated(c, 0, 2));
    return rotated(c, 1, 2);
}

static lc_status rope_pair_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    const lc_node *n = b->node;
    lc_frame c;
    const bool both = b->g[0] && b->g[1] && b->g[0]->dtype == b->g[1]->dtype;
    for (int i = 0; i < 2; i++) {
        if (!b->g[i] || (both && i)) continue;
        lc_frame_init(&c, both ? LC_OP_rope_pair : LC_OP_rope);
        c.x[0] = b->g[i];
        if (both) c.x[1] = b->g[1];
        c.x[1 + both] = n->x[2];
        c.x[2 + both] = n->x[3];
        c.i[0] = !n->i[0];
        x_give(&e, b, i, x_run(&e, &c));
        if (both) x_give(&e, b, 1, c.y[1]);
    }
    return x_done(&e);
}

static lc_status rope_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    lc_frame c;
    lc_frame_init(&c, LC_OP_rope);
    c.x[0] = b->g[0];
    c.x[1] = b->node->x[1];
    c.x[2] = b->node->x[2];
    c.i[0] = !b->node->i[0];
    x_give(&e, b, 0, x_run(&e, &c));
    return x_done(&e);
}

const lc_rule lc_rule_rms_norm = {.shape = rms_norm_shape, .backward = rms_norm_backward, .save_x = 3, .save_y = 2};
const lc_rule lc_rule_rms_norm_backward = {.shape = rms_norm_backward_shape};
const lc_rule lc_rule_rope_table = {.shape = rope_table_shape};
const lc_rule lc_rule_rope_pair = {.shape = rope_pair_shape, .backward = rope_pair_backward, .save_x = 12};
const lc_rule lc_rule_rope = {.shape = rope_shape, .backward = rope_backward, .save_x = 6};
