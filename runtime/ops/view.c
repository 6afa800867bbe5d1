/* view.c: ops that make another view of the same storage. Their gradients put the shape back. */
#include "op.h"

static lc_status quantised(lc_frame *c) {
    return lc_op_error(c, LC_EDTYPE, "a quantised tensor can be sliced along its rows only; convert it with :to \"f32\"");
}

static lc_status make_view(lc_frame *c) {
    c->y[0] = lc_tensor_view(c->x[0]);
    return c->y[0] ? LC_OK : LC_ENOMEM;
}

/* ---- reshape, expand ------------------------------------------------------------------------------------------------- */
/* Strides of x seen in the new shape, if it can be seen so without a copy. */
static bool restride(const lc_tensor *x, int ndim, const int32_t *dims, int64_t *stride) {
    int64_t old_dim[LC_MAX_DIMS], old_stride[LC_MAX_DIMS];
    int n_old = 0, o = 0, n = 0;
    for (int i = 0; i < x->ndim; i++)
        if (x->dim[i] != 1) {
            old_dim[n_old] = x->dim[i];
            old_stride[n_old++] = x->stride[i];
        }
    while (n < ndim && o < n_old) { /* groups of dims with equal products */
        int64_t np = dims[n], op = old_dim[o];
        int n1 = n + 1, o1 = o + 1;
        while (np != op) {
            if (np < op) {
                if (n1 >= ndim) return false;
                np *= dims[n1++];
            } else {
                if (o1 >= n_old) return false;
                op *= old_dim[o1++];
            }
        }
        for (int k = o; k + 1 < o1; k++)
            if (old_stride[k] != old_dim[k + 1] * old_stride[k + 1]) return false;
        stride[n1 - 1] = old_stride[o1 - 1];
        for (int k = n1 - 1; k > n; k--) stride[k - 1] = stride[k] * dims[k];
        n = n1;
        o = o1;
    }
    for (; n < ndim; n++) stride[n] = 1; /* trailing ones */
    return true;
}

static lc_status reshape_shape(lc_frame *c) {
    lc_tensor *x = c->x[0];
    int ndim = c->i[0], unknown = -1;
    int32_t dims[LC_MAX_DIMS];
    int64_t stride[LC_MAX_DIMS], known = 1, numel = lc_tensor_numel(x);
    if (ndim < 0 || ndim > LC_MAX_DIMS) return lc_op_error(c, LC_ESHAPE, "%d dims; at most %d are possible", ndim, LC_MAX_DIMS);
    for (int i = 0; i < ndim; i++) {
        dims[i] = c->i[1 + i];
        if (dims[i] == -1 && unknown < 0) unknown = i;
        else if (dims[i] < 0) return lc_op_error(c, LC_ESHAPE, "size %d of dim %d", dims[i], i + 1);
        else known *= dims[i];
    }
    if (unknown >= 0) {
        if (known == 0 || numel % known) return lc_op_error(c, LC_ESHAPE, "%lld elements do not divide into the given sizes", (long long)numel);
        dims[unknown] = (int32_t)(numel / known);
        known *= dims[unknown];
    }
    if (known != numel) return lc_op_error(c, LC_ESHAPE, "the new shape has %lld elements, the tensor %lld", (long long)known, (long long)numel);
    if (lc_dtype_is_quant(x->dtype) && (ndim < 1 || dims[ndim - 1] != last_dim(x))) return quantised(c);
    if (numel == 0) {
        lc_contiguous_strides(ndim, dims, stride);
        LC_TRY(make_view(c));
    } else if (restride(x, ndim, dims, stride)) {
        LC_TRY(make_view(c));
    } else { /* recorded as one reshape: the copy itself is off the tape */
        lc_frame copy;
        lc_frame_init(&copy, LC_OP_clone);
        copy.x[0] = x;
        bool old = lc_grad_enabled;
        lc_grad_enabled = false;
        lc_status rc = lc_run(&copy);
        lc_grad_enabled = old;
        LC_TRY(rc);
        c->y[0] = copy.y[0];
        lc_contiguous_strides(ndim, dims, stride);
    }
    c->y[0]->ndim = (uint8_t)ndim;
    for (int i = 0; i < ndim; i++) {
        c->y[0]->dim[i] = dims[i];
        c->y[0]->stride[i] = stride[i];
    }
    return LC_OK;
}

static lc_status reshape_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    x_give(&e, b, 0, x_reshape(&e, b->g[0], b->node->edge[0].ndim, b->node->edge[0].dim));
    return x_done(&e);
}

static lc_status expand_shape(lc_frame *c) {
    lc_tensor *x = c->x[0];
    int ndim = c->i[0], lead = ndim - x->ndim;
    int32_t dims[LC_MAX_DIMS];
    if (lc_dtype_is_quant(x->dtype)) return quantised(c);
    if (ndim > LC_MAX_DIMS || lead < 0) return lc_op_error(c, LC_ESHAPE, "%d dims from %d", ndim, x->ndim);
    for (int i = 0; i < ndim; i++) {
        dims[i] = c->i[1 + i];
        int32_t old = i < lead ? 1 : x->dim[i - lead];
        if (dims[i] == -1 && i >= lead) dims[i] = old;
        if (dims[i] < 0 || (old != 1 && old != dims[i]))
            return lc_op_error(c, LC_ESHAPE, "dim %d of size %d cannot become %d: only size 1 expands", i + 1, old, dims[i]);
    }
    c->y[0] = lc_expanded(x, ndim, dims);
    return c->y[0] ? LC_OK : LC_ENOMEM;
}

static lc_status sum_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    x_give(&e, b, 0, x_sum_to(&e, b->g[0], &b->node->edge[0]));
    return x_done(&e);
}

/* ---- permutations ---------------------------------------------------------------------------------------------------- */
static void set_dim(lc_tensor *y, int to, const lc_tensor *x, int from) {
    y->dim[to] = x->dim[from];
    y->stride[to] = x->stride[from];
}

static lc_status permute_shape(lc_frame *c) {
    lc_tensor *x = c->x[0];
    bool seen[LC_MAX_DIMS] = {false};
    if (lc_dtype_is_quant(x->dtype)) return quantised(c);
    if (c->i[0] != x->ndim) return lc_op_error(c, LC_EARG, "%d dims are named, the tensor has %d", c->i[0], x->ndim);
    for (int i = 0; i < x->ndim; i++) {
        int d = c->i[1 + i];
        if (!check_dim(c, d, x->ndim)) return LC_EARG;
        if (seen[d]) return lc_op_error(c, LC_EARG, "dim %d is named twice", d + 1);
        seen[d] = true;
    }
    LC_TRY(make_view(c));
    for (int i = 0; i < x->ndim; i++) set_dim(c->y[0], i, x, c->i[1 + i]);
    return LC_OK;
}

static lc_status permute_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    lc_frame c;
    lc_frame_init(&c, LC_OP_permute);
    c.x[0] = b->g[0];
    c.i[0] = b->node->i[0];
    for (int i = 0; i < c.i[0]; i++) c.i[1 + b->node->i[1 + i]] = i;
    x_give(&e, b, 0, x_run(&e, &c));
    return x_done(&e);
}

static lc_status transpose_shape(lc_frame *c) {
    lc_tensor *x = c->x[0];
    if (!check_dim(c, c->i[0], x->ndim) || !check_dim(c, c->i[1], x->ndim)) return LC_EARG;
    if (lc_dtype_is_quant(x->dtype)) return quantised(c);
    LC_TRY(make_view(c));
    set_dim(c->y[0], c->i[0], x, c->i[1]);
    set_dim(c->y[0], c->i[1], x, c->i[0]);
    return LC_OK;
}

static lc_status transpose_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    lc_frame c;
    lc_frame_init(&c, LC_OP_transpose);
    c.x[0] = b->g[0];
    c.i[0] = b->node->i[0];
    c.i[1] = b->node->i[1];
    x_give(&e, b, 0, x_run(&e, &c));
    return x_done(&e);
}

/* ---- parts ----------------------------------------------------------------------------------------------------------- */
static lc_status slice_shape(lc_frame *c) {
    lc_tensor *x = c->x[0];
    int d = c->i[0], start = c->i[1], stop = c->i[2], step = c->i[3];
    if (!check_dim(c, d, x->ndim)) return LC_EARG;
    if (lc_dtype_is_quant(x->dtype) && (d == x->ndim - 1 || step != 1)) return quantised(c);
    if (step < 1) return lc_op_error(c, LC_EARG, "step %d; it must be at least 1", step);
    if (start < 0 || stop > x->dim[d] || start > stop)
        return lc_op_error(c, LC_EARG, "positions %d to %d of dim %d, which has %d", start + 1, stop, d + 1, x->dim[d]);
    LC_TRY(make_view(c));
    c->y[0]->offset += start * x->stride[d];
    c->y[0]->dim[d] = (stop - start + step - 1) / step;
    c->y[0]->stride[d] = x->stride[d] * step;
    return LC_OK;
}

/* zeros in the input's shape, with the gradient put where the part was cut */
static lc_status part_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    const lc_edge *in = &b->node->edge[0];
    lc_tensor *g = x_zeros(&e, b->g[0]->dtype, b->g[0]->device, in->ndim, in->dim);
    lc_frame c;
    lc_frame_init(&c, b->node->op);
    c.x[0] = g;
    for (int i = 0; i < c.row->n_i; i++) c.i[i] = b->node->i[i];
    lc_tensor *part = g ? x_run(&e, &c) : NULL;
    x2(&e, LC_OP_copy_, part, b->g[0]);
    x_give(&e, b, 0, g);
    return x_done(&e);
}

static lc_status select_shape(lc_frame *c) {
    lc_tensor *x = c->x[0];
    int d = c->i[0], at = c->i[1];
    if (!check_dim(c, d, x->ndim)) return LC_EARG;
    if (lc_dtype_is_quant(x->dtype) && d == x->ndim - 1) return quantised(c);
    if (at < 0 || at >= x->dim[d]) return lc_op_error(c, LC_EARG, "position %d of dim %d, which has %d", at + 1, d + 1, x->dim[d]);
    LC_TRY(make_view(c));
    c->y[0]->offset += at * x->stride[d];
    c->y[0]->ndim--;
    for (int i = d; i + 1 < x->ndim; i++) set_dim(c->y[0], i, x, i + 1);
    return LC_OK;
}

static lc_status unsqueeze_shape(lc_frame *c) {
    lc_tensor *x = c->x[0];
    int d = c->i[0];
    if (!check_dim(c, d, x->ndim + 1)) return LC_EARG;
    if (x->ndim == LC_MAX_DIMS) return lc_op_error(c, LC_ESHAPE, "more than %d dims", LC_MAX_DIMS);
    if (lc_dtype_is_quant(x->dtype) && d == x->ndim) return quantised(c);
    LC_TRY(make_view(c));
    c->y[0]->ndim++;
    for (int i = x->ndim; i > d; i--) set_dim(c->y[0], i, x, i - 1);
    c->y[0]->dim[d] = 1;
    c->y[0]->stride[d] = d < x->ndim ? x->stride[d] * x->dim[d] : 1;
    return LC_OK;
}

static lc_status squeeze_shape(lc_frame *c) {
    lc_tensor *x = c->x[0];
    int d = c->i[0];
    if (!check_dim(c, d, x->ndim)) return LC_EARG;
    if (x->dim[d] != 1) return lc_op_error(c, LC_ESHAPE, "dim %d has size %d, not 1", d + 1, x->dim[d]);
    LC_TRY(make_view(c));
    c->y[0]->ndim--;
    for (int i = d; i + 1 < x->ndim; i++) set_dim(c->y[0], i, x, i + 1);
    return LC_OK;
}

const lc_rule lc_rule_reshape = {.shape = reshape_shape, .backward = reshape_backward};
const lc_rule lc_rule_expand = {.shape = expand_shape, .backward = sum_backward};
const lc_rule lc_rule_permute = {.shape = permute_shape, .backward = permute_backward};
const lc_rule lc_rule_transpose = {.shape = transpose_shape, .backward = transpose_backward};
const lc_rule lc_rule_slice = {.shape = slice_shape, .backward = part_backward};
const lc_rule lc_rule_select = {.shape = select_shape, .backward = part_backward};
const lc_rule lc_rule_unsqueeze = {.shape = unsqueeze_shape, .backward = reshape_backward};
const lc_rule lc_rule_squeeze = {.shape = squeeze_shape, .backward = reshape_backward};
