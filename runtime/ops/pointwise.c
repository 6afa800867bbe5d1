/* pointwise.c: shape and gradient of every pointwise op: the kernels NAME_grad stand right behind NAME in the enum. */
#include "op.h"

static lc_status like_first(lc_frame *c) { return lc_out_like(c, 0, c->x[0]); }

static void save(const lc_frame *c, uint32_t *save_x, uint32_t *save_y) {
    if (c->row->flags & (LC_F_RESULT | LC_F_NEITHER)) *save_x = 0;
    if (c->row->flags & (LC_F_OPERANDS | LC_F_NEITHER)) *save_y = 0;
}

/* What was not kept is not read either: the gradient stands in for it, which has the right shape. */
static lc_tensor *kept(const lc_back *b, lc_tensor *t) { return t ? t : b->g[0]; }

static lc_status unary_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    const lc_node *n = b->node;
    lc_frame c;
    lc_frame_init(&c, n->op + 1);
    c.x[0] = b->g[0];
    c.x[1] = kept(b, n->x[0]);
    c.x[2] = kept(b, n->y[0]);
    for (int i = 0; i < c.row->n_f; i++) c.f[i] = n->f[i];
    x_give(&e, b, 0, x_run(&e, &c));
    return x_done(&e);
}

static lc_status binary_shape(lc_frame *c) {
    int ndim;
    int32_t dims[LC_MAX_DIMS];
    if (lc_same_shape(c->x[0], c->x[1])) return lc_out_like(c, 0, c->x[0]);
    LC_TRY(lc_broadcast_dims(c, c->x[0], c->x[1], &ndim, dims));
    return lc_out(c, 0, c->x[0]->dtype, ndim, dims);
}

static lc_status compare_shape(lc_frame *c) {
    int ndim;
    int32_t dims[LC_MAX_DIMS];
    LC_TRY(lc_broadcast_dims(c, c->x[0], c->x[1], &ndim, dims));
    return lc_out(c, 0, LC_U8, ndim, dims);
}

/* Does the tape alone hold it? Then its gradient may take its place. */
static bool for_the_tape_alone(const lc_tensor *t) {
    const lc_device *d = lc_device_get(t->device);
    return d->backend && t->refs == 1 && t->storage->refs == 1 && !t->storage->readonly && lc_tensor_contiguous(t);
}

/* The MLP's gate, most of a step's elementwise bytes, and of its memory: both gradients in one pass, on a device in place of gate and up. */
static lc_status swiglu_both(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    lc_frame c;
    lc_frame_init(&c, LC_OP_swiglu_backward);
    c.x[0] = b->g[0];
    c.x[1] = b->node->x[0];
    c.x[2] = b->node->x[1];
    if (for_the_tape_alone(c.x[1]) && for_the_tape_alone(c.x[2]) && c.x[1]->dtype == b->g[0]->dtype) {
        c.y[0] = lc_tensor_view(c.x[1]); /* without history */
        c.y[1] = lc_tensor_view(c.x[2]);
        if (!c.y[0] || !c.y[1]) {
            lc_release(c.y[0]);
            lc_release(c.y[1]);
            return LC_ENOMEM;
        }
    }
    x_run(&e, &c);
    for (int i = 0; i < 2; i++) x_give(&e, b, i, c.y[i]);
    return x_done(&e);
}

static lc_status swiglu_backward_shape(lc_frame *c) {
    if (!lc_same_shape(c->x[0], c->x[1]) || !lc_same_shape(c->x[0], c->x[2])) return lc_op_error(c, LC_ESHAPE, "shapes differ");
    if (c->y[0]) return LC_OK; /* swiglu_both chose */
    LC_TRY(lc_out_like(c, 0, c->x[1]));
    return lc_out_like(c, 1, c->x[2]);
}

static lc_status binary_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    const lc_node *n = b->node;
    if (n->op == LC_OP_swiglu && b->need[0] && b->need[1] && lc_same_shape(n->x[0], n->x[1])) return swiglu_both(b);
    for (int side = 0; side < 2; side++) {
        if (!b->need[side]) continue;
        lc_frame c;
        lc_frame_init(&c, n->op + 1 + side);
        c.x[0] = b->g[0];
        c.x[1] = kept(b, n->x[0]);
        c.x[2] = kept(b, n->x[1]);
        c.x[3] = kept(b, n->y[0]);
        x_give(&e, b, side, x_sum_to(&e, x_run(&e, &c), &n->edge[side]));
    }
    return x_done(&e);
}

const lc_rule lc_rule_unary = {.shape = like_first, .backward = unary_backward, .save_x = 1, .save_y = 1, .save = save};
const lc_rule lc_rule_binary = {.shape = binary_shape, .backward = binary_backward, .save_x = 3, .save_y = 1, .save = save};
const lc_rule lc_rule_swiglu_backward = {.shape = swiglu_backward_shape};
const lc_rule lc_rule_compare = {.shape = compare_shape};
const lc_rule lc_rule_pointwise_grad = {.shape = like_first};
