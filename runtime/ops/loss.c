/* loss.c: mean squared error and cross-entropy. */
#include "op.h"

static lc_status mse_shape(lc_frame *c) {
    if (!lc_same_shape(c->x[0], c->x[1])) return lc_op_error(c, LC_ESHAPE, "shapes differ");
    return lc_out(c, 0, real_dtype(c->x[0]), 0, NULL);
}

static lc_status mse_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    lc_frame c;
    lc_frame_init(&c, LC_OP_mse_loss_backward);
    c.x[0] = b->g[0];
    c.x[1] = b->node->x[0];
    c.x[2] = b->node->x[1];
    c.skip[0] = !b->need[0];
    c.skip[1] = !b->need[1];
    x_run(&e, &c);
    for (int i = 0; i < 2; i++) x_give(&e, b, i, c.y[i]);
    return x_done(&e);
}

static lc_status mse_backward_shape(lc_frame *c) {
    LC_TRY(lc_out_like(c, 0, c->x[1]));
    return lc_out_like(c, 1, c->x[2]);
}

static lc_status mse_slope_shape(lc_frame *c) {
    LC_TRY(mse_shape(c));
    return lc_out_like(c, 1, c->x[0]);
}

static lc_status cross_entropy_shape(lc_frame *c) {
    const lc_tensor *x = c->x[0], *labels = c->x[1];
    if (x->ndim != 2 || labels->ndim != 1 || labels->dim[0] != x->dim[0]) return lc_op_error(c, LC_ESHAPE, "logits are [n, v], labels [n]");
    LC_TRY(lc_out(c, 0, real_dtype(x), 0, NULL));
    return lc_out(c, 1, real_dtype(x), 1, labels->dim);
}

static lc_status cross_entropy_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    lc_frame c;
    lc_frame_init(&c, LC_OP_cross_entropy_backward);
    c.x[0] = b->g[0];
    c.x[1] = b->node->x[0];
    c.x[2] = b->node->x[1];
    c.x[3] = b->node->y[1];
    c.i[0] = b->node->i[0];
    x_give(&e, b, 0, x_run(&e, &c));
    return x_done(&e);
}

static lc_status like_second(lc_frame *c) { return lc_out_like(c, 0, c->x[1]); }

static lc_status linear_cross_entropy_shape(lc_frame *c) {
    const lc_tensor *x = c->x[0], *w = c->x[1], *labels = c->x[2];
    if (x->ndim != 2 || w->ndim != 2 || labels->ndim != 1 || labels->dim[0] != x->dim[0] || w->dim[1] != x->dim[1])
        return lc_op_error(c, LC_ESHAPE, "x is [n, d], w [v, d], labels [n]");
    if ((x->dtype == LC_F64) != (w->dtype == LC_F64)) return lc_op_error(c, LC_EDTYPE, "f64 goes with f64 only");
    if (lc_grad_enabled && w->requires_grad)
        return lc_op_error(c, LC_EGRAD, "it gives no gradient for w; train a head with cross_entropy(linear(x, w), labels)");
    c->i[1] = c->i[1] || c->recording;
    LC_TRY(lc_out(c, 0, real_dtype(x), 0, NULL));
    LC_TRY(lc_out(c, 1, real_dtype(x), 1, labels->dim));
    LC_TRY(lc_out(c, 2, LC_I32, 1, labels->dim));
    if (!c->i[1]) c->skip[3] = true;
    return lc_out(c, 3, x->dtype, 2, x->dim);
}

static lc_status linear_cross_entropy_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    if (b->g[1]) return lc_fail(LC_EGRAD, "linear_cross_entropy: the losses of single rows have no gradient; use the mean");
    if (b->g[0]) {
        lc_tensor *g = x_to(&e, b->g[0], b->node->y[3]->dtype);
        x_give(&e, b, 0, x2(&e, LC_OP_mul, b->node->y[3], g));
    }
    return x_done(&e);
}

const lc_rule lc_rule_mse_loss = {.shape = mse_shape, .backward = mse_backward, .save_x = 3};
const lc_rule lc_rule_mse_loss_backward = {.shape = mse_backward_shape};
const lc_rule lc_rule_mse_loss_slope = {.shape = mse_slope_shape};
const lc_rule lc_rule_cross_entropy = {.shape = cross_entropy_shape, .backward = cross_entropy_backward, .save_x = 3, .save_y = 2};
const lc_rule lc_rule_cross_entropy_backward = {.shape = like_second};
const lc_rule lc_rule_linear_cross_entropy = {.shape = linear_cross_entropy_shape, .backward = linear_cross_entropy_backward, .save_y = 8};
