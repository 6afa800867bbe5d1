/* sample.c: random numbers and dropout. */
#include "op.h"

static lc_status nothing(lc_frame *c) {
    (void)c;
    return LC_OK;
}

static lc_status dropout_shape(lc_frame *c) {
    if (!(c->f[0] >= 0 && c->f[0] < 1)) return lc_op_error(c, LC_EARG, "p is %g; it must be in [0, 1)", c->f[0]);
    LC_TRY(lc_out_like(c, 0, c->x[0]));
    return lc_out_like(c, 1, c->x[0]);
}

static lc_status dropout_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    x_give(&e, b, 0, x2(&e, LC_OP_mul, b->g[0], b->node->y[1]));
    return x_done(&e);
}

const lc_rule lc_rule_uniform_ = {.shape = nothing};
const lc_rule lc_rule_normal_ = {.shape = nothing};
const lc_rule lc_rule_dropout = {.shape = dropout_shape, .backward = dropout_backward, .save_y = 2};
