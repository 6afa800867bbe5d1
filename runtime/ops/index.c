/* index.c: lookups by integer tensors, and choices by masks. Ids count from 0 and are checked by the kernels. */
#include "op.h"

/* ---- embedding ------------------------------------------------------------------------------------------------------- */
static lc_status embedding_shape(lc_frame *c) {
    const lc_tensor *w = c->x[0], *ids = c->x[1];
    int32_t dims[LC_MAX_DIMS];
    if (w->ndim != 2) return lc_op_error(c, LC_ESHAPE, "w must be a matrix");
    if (ids->ndim == LC_MAX_DIMS) return lc_op_error(c, LC_ESHAPE, "too many dims");
    if (!lc_dtype_is_float(w->dtype) && !lc_dtype_is_quant(w->dtype)) return lc_op_error(c, LC_EDTYPE, "w must be a float or quantised tensor");
    for (int i = 0; i < ids->ndim; i++) dims[i] = ids->dim[i];
    dims[ids->ndim] = w->dim[1];
    return lc_out(c, 0, lc_dtype_is_float(w->dtype) ? w->dtype : LC_F32, ids->ndim + 1, dims);
}

static lc_status embedding_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    lc_frame c;
    lc_frame_init(&c, LC_OP_embedding_backward);
    c.x[0] = b->g[0];
    c.x[1] = b->node->x[1];
    c.i[0] = b->node->edge[0].dim[0];
    x_give(&e, b, 0, x_run(&e, &c));
    return x_done(&e);
}

static lc_status embedding_backward_shape(lc_frame *c) {
    int32_t dims[2] = {c->i[0], last_dim(c->x[0])};
    return lc_out(c, 0, c->x[0]->dtype, 2, dims);
}

/* ---- index_select, gather, scatter_add --------------------------------------------------------------------------------- */
static lc_status index_select_shape(lc_frame *c) {
    const lc_tensor *x = c->x[0];
    int32_t dims[LC_MAX_DIMS];
    if (!check_dim(c, c->i[0], x->ndim)) return LC_EARG;
    if (c->x[1]->ndim != 1) return lc_op_error(c, LC_ESHAPE, "ids must be a vector");
    if (lc_dtype_is_quant(x->dtype)) return lc_op_error(c, LC_EDTYPE, "x is quantised; convert it with :to \"f32\"");
    memcpy(dims, x->dim, sizeof dims);
    dims[c->i[0]] = c->x[1]->dim[0];
    return lc_out(c, 0, x->dtype, x->ndim, dims);
}

static lc_tensor *scatter(lc_expr *e, const lc_edge *in, int dim, lc_tensor *ids, lc_tensor *g) {
    lc_frame c;
    lc_frame_init(&c, LC_OP_scatter_add);
    c.x[0] = x_zeros(e, g->dtype, g->device, in->ndim, in->dim);
    c.x[1] = ids;
    c.x[2] = g;
    c.i[0] = dim;
    return ids && e->rc == LC_OK ? x_run(e, &c) : NULL;
}

static lc_status index_select_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    lc_tensor *g = b->g[0];
    int32_t dims[LC_MAX_DIMS];
    for (int i = 0; i < g->ndim; i++) dims[i] = i == b->node->i[0] ? g->dim[i] : 1;
    lc_tensor *ids = x_expand(&e, x_reshape(&e, b->node->x[1], g->ndim, dims), g->ndim, g->dim);
    x_give(&e, b, 0, scatter(&e, &b->node->edge[0], b->node->i[0], ids, g));
    return x_done(&e);
}

static lc_status same_but_dim(lc_frame *c, const lc_tensor *a, const lc_tensor *b) {
    if (a->ndim != b->ndim) return lc_op_error(c, LC_ESHAPE, "ids must have as many dims as the tensor");
    for (int i = 0; i < a->ndim; i++)
        if (i != c->i[0] && b->dim[i] > a->dim[i]) return lc_op_error(c, LC_ESHAPE, "ids are larger than the tensor in dim %d", i + 1);
    return LC_OK;
}

static lc_status gather_shape(lc_frame *c) {
    const lc_tensor *x = c->x[0], *ids = c->x[1];
    if (!check_dim(c, c->i[0], x->ndim)) return LC_EARG;
    if (lc_dtype_is_quant(x->dtype)) return lc_op_error(c, LC_EDTYPE, "x is quantised; convert it with :to \"f32\"");
    LC_TRY(same_but_dim(c, x, ids));
    return lc_out(c, 0, x->dtype, ids->ndim, ids->dim);
}

static lc_status gather_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    x_give(&e, b, 0, scatter(&e, &b->node->edge[0], b->node->i[0], b->node->x[1], b->g[0]));
    return x_done(&e);
}

static lc_status scatter_add_shape(lc_frame *c) {
    if (!check_dim(c, c->i[0], c->x[0]->ndim)) return LC_EARG;
    if (c->x[2]->dtype != c->x[0]->dtype) return lc_op_error(c, LC_EDTYPE, "dtypes of x and src differ");
    LC_TRY(same_but_dim(c, c->x[0], c->x[1]));
    if (!lc_same_shape(c->x[1], c->x[2])) return lc_op_error(c, LC_ESHAPE, "ids and src differ in shape");
    return lc_out_like(c, 0, c->x[0]);
}

static lc_status scatter_add_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    lc_frame c;
    x_give(&e, b, 0, b->g[0]);
    lc_frame_init(&c, LC_OP_gather);
    c.x[0] = b->g[0];
    c.x[1] = b->node->x[1];
    c.i[0] = b->node->i[0];
    if (b->need[2]) x_give(&e, b, 2, x_run(&e, &c));
    return x_done(&e);
}

/* ---- where, masked_fill ---------------------------------------------------------------------------------------------- */
static lc_status where_shape(lc_frame *c) {
    int ndim, n2;
    int32_t dims[LC_MAX_DIMS], d2[LC_MAX_DIMS];
    if (c->x[1]->dtype != c->x[2]->dtype) return lc_op_error(c, LC_EDTYPE, "dtypes of a and b differ");
    LC_TRY(lc_broadcast_dims(c, c->x[1], c->x[2], &ndim, dims));
    lc_tensor both = {.ndim = (uint8_t)ndim};
    memcpy(both.dim, dims, sizeof dims);
    LC_TRY(lc_broadcast_dims(c, c->x[0], &both, &n2, d2));
    return lc_out(c, 0, c->x[1]->dtype, n2, d2);
}

static lc_status where_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    lc_tensor *zero = x_zeros(&e, b->g[0]->dtype, b->g[0]->device, 0, NULL);
    for (int side = 1; side <= 2; side++) {
        if (!b->need[side]) continue;
        lc_frame c;
        lc_frame_init(&c, LC_OP_where);
        c.x[0] = b->node->x[0];
        c.x[side] = b->g[0];
        c.x[3 - side] = zero;
        x_give(&e, b, side, x_sum_to(&e, x_run(&e, &c), &b->node->edge[side]));
    }
    return x_done(&e);
}

static lc_status masked_fill_shape(lc_frame *c) {
    int ndim;
    int32_t dims[LC_MAX_DIMS];
    LC_TRY(lc_broadcast_dims(c, c->x[0], c->x[1], &ndim, dims));
    if (ndim != c->x[0]->ndim || memcmp(dims, c->x[0]->dim, (size_t)ndim * sizeof *dims))
        return lc_op_error(c, LC_ESHAPE, "the mask does not broadcast to x");
    return lc_out_like(c, 0, c->x[0]);
}

static lc_status masked_fill_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    lc_frame c;
    lc_frame_init(&c, LC_OP_masked_fill);
    c.x[0] = b->g[0];
    c.x[1] = b->node->x[1];
    x_give(&e, b, 0, x_run(&e, &c));
    return x_done(&e);
}

const lc_rule lc_rule_embedding = {.shape = embedding_shape, .backward = embedding_backward, .save_x = 2};
const lc_rule lc_rule_embedding_backward = {.shape = embedding_backward_shape};
const lc_rule lc_rule_index_select = {.shape = index_select_shape, .backward = index_select_backward, .save_x = 2};
const lc_rule lc_rule_gather = {.shape = gather_shape, .backward = gather_backward, .save_x = 2};
const lc_rule lc_rule_scatter_add = {.shape = scatter_add_shape, .backward = scatter_add_backward, .save_x = 2};
const lc_rule lc_rule_where = {.shape = where_shape, .backward = where_backward, .save_x = 1, .broadcast = true};
const lc_rule lc_rule_masked_fill = {.shape = masked_fill_shape, .backward = masked_fill_backward, .save_x = 2, .broadcast = true};
