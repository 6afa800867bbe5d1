/* copy.c: copies, conversions, fills. */
#include <stdlib.h>

#include "op.h"

static lc_status like_first(lc_frame *c) { return lc_out_like(c, 0, c->x[0]); }
static lc_status nothing(lc_frame *c) {
    (void)c;
    return LC_OK;
}

static lc_status pass_on(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    x_give(&e, b, 0, b->g[0]);
    return x_done(&e);
}

/* ---- copy_, add_ ----------------------------------------------------------------------------------------------------- */
/* copy_ also brings what lies on another device. */
static lc_status broadcast_into(lc_frame *c) {
    lc_tensor *x = c->x[0], *from = c->x[1];
    int lead = x->ndim - from->ndim;
    for (int i = 0; i < from->ndim; i++)
        if (lead < 0 || (from->dim[i] != 1 && from->dim[i] != x->dim[i + lead])) return lc_op_error(c, LC_ESHAPE, "the source does not broadcast to the destination");
    if (from->device != x->device) {
        lc_frame move;
        lc_frame_init(&move, LC_OP_to);
        move.x[0] = from;
        move.i[0] = from->dtype;
        move.i[1] = x->device;
        LC_TRY(lc_run(&move));
        lc_substitute(c, 1, move.y[0]);
        return LC_OK;
    }
    if (from->storage != x->storage || (from->offset == x->offset && lc_same_shape(x, from) && !memcmp(x->stride, from->stride, sizeof x->stride[0] * x->ndim)))
        return LC_OK;
    lc_frame copy; /* two views of one storage may overlap */
    lc_frame_init(&copy, LC_OP_clone);
    copy.x[0] = from;
    LC_TRY(lc_run(&copy));
    lc_substitute(c, 1, copy.y[0]);
    return LC_OK;
}

/* ---- to -------------------------------------------------------------------------------------------------------------- */
static lc_status across(lc_frame *c, int device) {
    lc_frame copy;
    lc_tensor *x = c->x[0];
    const lc_device *from = lc_device_get(x->device), *to = lc_device_get(device);
    lc_frame_init(&copy, LC_OP_clone);
    copy.x[0] = x;
    if (!lc_tensor_contiguous(x)) {
        LC_TRY(lc_run(&copy));
        x = copy.y[0];
    }
    lc_status rc = lc_tensor_new(x->dtype, device, x->ndim, x->dim, &c->y[0]);
    size_t bytes = lc_tensor_bytes(x);
    void *a = lc_tensor_ptr(x), *b = rc == LC_OK ? lc_tensor_ptr(c->y[0]) : NULL, *host = NULL;
    int bad = 0;
    if (rc == LC_OK && bytes) {
        if (!from->backend) bad = to->backend->upload(to->index, b, a, bytes);
        else if (!to->backend) bad = from->backend->download(from->index, b, a, bytes);
        else if (from->backend == to->backend && from->index == to->index) bad = from->backend->copy(from->index, b, a, bytes);
        else if (!(host = lc_alloc(bytes, 1))) rc = LC_ENOMEM;
        else bad = from->backend->download(from->index, host, a, bytes) || to->backend->upload(to->index, b, host, bytes);
    }
    free(host);
    if (bad) rc = lc_fail(LC_EDEVICE, "%s to %s: %s", from->name, to->name, (from->backend ? from : to)->backend->last_error());
    lc_release(copy.y[0]);
    return rc;
}

static lc_status to_shape(lc_frame *c) {
    lc_tensor *x = c->x[0];
    int dtype = c->i[0], device = c->i[1];
    if (!lc_dtype_traits(dtype)) return lc_op_error(c, LC_EDTYPE, "unknown dtype %d", dtype);
    if (device < 0 || device >= lc_device_count()) return lc_op_error(c, LC_EDEVICE, "no device %d", device);
    if (lc_dtype_is_quant(dtype) && dtype != x->dtype) return lc_op_error(c, LC_EDTYPE, "quantising is not offered here");
    if (device != x->device) {
        c->done = true;
        if (dtype == x->dtype) return across(c, device);
        lc_frame half;
        lc_frame_init(&half, LC_OP_to); /* convert where it is, then move */
        half.x[0] = x;
        half.i[0] = dtype;
        half.i[1] = x->device;
        bool old = lc_grad_enabled;
        lc_grad_enabled = false;
        lc_status rc = lc_run(&half);
        lc_grad_enabled = old;
        LC_TRY(rc);
        lc_tensor *keep = c->x[0];
        c->x[0] = half.y[0];
        rc = across(c, device);
        c->x[0] = keep;
        lc_release(half.y[0]);
        return rc;
    }
    lc_frame copy;
    if (dtype == x->dtype) {
        c->done = true;
        c->y[0] = lc_tensor_view(x);
        return c->y[0] ? LC_OK : LC_ENOMEM;
    }
    if (lc_dtype_is_quant(x->dtype) && dtype != LC_F32) { /* dequantise to f32 first */
        lc_frame_init(&copy, LC_OP_to);
        copy.x[0] = x;
        copy.i[0] = LC_F32;
        copy.i[1] = device;
        LC_TRY(lc_run(&copy));
        lc_substitute(c, 0, copy.y[0]);
    }
    return lc_out(c, 0, dtype, x->ndim, x->dim);
}

static lc_status to_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    lc_frame c;
    lc_frame_init(&c, LC_OP_to);
    c.x[0] = b->g[0];
    c.i[0] = b->node->edge[0].dtype;
    c.i[1] = b->node->edge[0].node ? b->node->edge[0].node->device : b->node->edge[0].leaf ? b->node->edge[0].leaf->device : 0;
    x_give(&e, b, 0, x_run(&e, &c));
    return x_done(&e);
}

/* ---- cat ------------------------------------------------------------------------------------------------------------- */
static lc_status cat_shape(lc_frame *c) {
    const lc_tensor *t = c->list[0];
    int32_t dims[LC_MAX_DIMS];
    int d = c->i[0];
    if (!check_dim(c, d, t->ndim)) return LC_EARG;
    memcpy(dims, t->dim, sizeof dims);
    for (int i = 1; i < c->n_list; i++) {
        const lc_tensor *u = c->list[i];
        if (u->ndim != t->ndim) return lc_op_error(c, LC_ESHAPE, "tensor %d has %d dims, the first %d", i + 1, u->ndim, t->ndim);
        for (int k = 0; k < t->ndim; k++)
            if (k != d && u->dim[k] != t->dim[k]) return lc_op_error(c, LC_ESHAPE, "tensor %d differs from the first in dim %d", i + 1, k + 1);
        dims[d] += u->dim[d];
    }
    return lc_out(c, 0, t->dtype, t->ndim, dims);
}

static lc_status cat_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    int d = b->node->i[0], at = 0;
    for (int i = 0; i < b->node->n_in; i++) {
        int n = b->node->edge[i].dim[d];
        if (b->need[i]) {
            lc_frame c;
            lc_frame_init(&c, LC_OP_slice);
            c.x[0] = b->g[0];
            c.i[0] = d;
            c.i[1] = at;
            c.i[2] = at + n;
            c.i[3] = 1;
            x_give(&e, b, i, x_run(&e, &c));
            if (e.n == LC_EXPR_MAX) { /* many parts: what was given holds its own reference */
                LC_TRY(x_done(&e));
            }
        }
        at += n;
    }
    return x_done(&e);
}

/* ---- tril ------------------------------------------------------------------------------------------------------------ */
static lc_status tril_shape(lc_frame *c) {
    if (c->x[0]->ndim < 2) return lc_op_error(c, LC_ESHAPE, "a matrix is wanted");
    return lc_out_like(c, 0, c->x[0]);
}
static lc_status tril_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    lc_frame c;
    lc_frame_init(&c, LC_OP_tril);
    c.x[0] = b->g[0];
    c.i[0] = b->node->i[0];
    x_give(&e, b, 0, x_run(&e, &c));
    return x_done(&e);
}

static lc_status eye_shape(lc_frame *c) {
    return c->x[0]->ndim < 2 ? lc_op_error(c, LC_ESHAPE, "a matrix is wanted") : LC_OK;
}

const lc_rule lc_rule_clone = {.shape = like_first, .backward = pass_on};
const lc_rule lc_rule_copy_ = {.shape = broadcast_into, .broadcast = true};
const lc_rule lc_rule_add_ = {.shape = broadcast_into, .broadcast = true};
const lc_rule lc_rule_to = {.shape = to_shape, .backward = to_backward};
const lc_rule lc_rule_cat = {.shape = cat_shape, .backward = cat_backward};
const lc_rule lc_rule_fill_ = {.shape = nothing};
const lc_rule lc_rule_arange_ = {.shape = nothing};
const lc_rule lc_rule_eye_ = {.shape = eye_shape};
const lc_rule lc_rule_tril = {.shape = tril_shape, .backward = tril_backward};
const lc_rule lc_rule_scale_ = {.shape = nothing};

/* ---- add_pairs_ ------------------------------------------------------------------------------------------------------ */
static lc_status add_pairs_shape(lc_frame *c) {
    for (int i = 0; i < 6; i += 2) {
        const lc_tensor *x = c->x[i], *from = c->x[i + 1];
        if ((x == NULL) != (from == NULL)) return lc_op_error(c, LC_EARG, "x_i and from_i come together");
        if (x && !lc_same_shape(x, from)) return lc_op_error(c, LC_ESHAPE, "shapes differ");
        if (x && x->dtype != LC_F32 && x->dtype != LC_F64) return lc_op_error(c, LC_EDTYPE, "f32 or f64 is wanted");
    }
    return LC_OK;
}
const lc_rule lc_rule_add_pairs_ = {.shape = add_pairs_shape};
