/* dispatch.c: one way for every op call: interrupt, arity, device and dtype, shape rule, contiguity, widening, workspace, kernel,
 * errors, tape. The only place where all of these meet. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"

static int current = -1;
static int check_finite;
static int profiling;
static struct { double seconds; int64_t calls, copies; } profile[LC_OP_COUNT];

const char *lc_current_op(void) { return current >= 0 ? lc_row_of(current)->name : "a tensor"; }
int lc_check_finite(int on) { int old = check_finite; if (on >= 0) check_finite = on; return old; }

/* ---- errors ---------------------------------------------------------------------------------------------------------- */
lc_status lc_op_error(const lc_frame *c, lc_status code, const char *format, ...) {
    char fact[1024], text[3000];
    va_list list;
    va_start(list, format);
    vsnprintf(fact, sizeof fact, format, list);
    va_end(list);
    int n = snprintf(text, sizeof text, "%s: %s", c->row->name, fact);
    for (int i = 0; i < c->row->n_x && n < (int)sizeof text; i++) {
        if (!c->x[i]) continue;
        char shape[256];
        lc_tensor_describe(c->x[i], shape, sizeof shape);
        n += snprintf(text + n, sizeof text - (size_t)n, "\n    %-8s %s", c->row->x_name[i], shape);
    }
    for (int i = 0; i < c->n_list && i < 8 && n < (int)sizeof text; i++) {
        char shape[256];
        lc_tensor_describe(c->list[i], shape, sizeof shape);
        n += snprintf(text + n, sizeof text - (size_t)n, "\n    [%d]      %s", i + 1, shape);
    }
    return lc_fail(code, "%s", text);
}

/* ---- results --------------------------------------------------------------------------------------------------------- */
lc_status lc_out(lc_frame *c, int i, int dtype, int ndim, const int32_t *dims) {
    if (c->skip[i]) return LC_OK;
    lc_tensor *like = c->x[0] ? c->x[0] : c->n_list ? c->list[0] : NULL;
    for (int k = 1; !like && k < c->row->n_x; k++) like = c->x[k];
    return lc_tensor_new(dtype, like ? like->device : 0, ndim, dims, &c->y[i]);
}

lc_status lc_out_like(lc_frame *c, int i, const lc_tensor *t) { return lc_out(c, i, t->dtype, t->ndim, t->dim); }

lc_status lc_out_permuted(lc_frame *c, int i, int dtype, int ndim, const int32_t *dims, const int *memory_order) {
    LC_TRY(lc_out(c, i, dtype, ndim, dims));
    if (!c->y[i]) return LC_OK;
    int64_t n = 1;
    for (int k = ndim - 1; k >= 0; k--) {
        c->y[i]->stride[memory_order[k]] = n;
        n *= dims[memory_order[k]];
    }
    return LC_OK;
}

void lc_substitute(lc_frame *c, int i, lc_tensor *t) {
    if (c->k_owned >> i & 1) lc_release(c->k[i]);
    c->k[i] = t;
    c->k_owned |= 1u << i;
}

lc_status lc_broadcast_dims(const lc_frame *c, const lc_tensor *a, const lc_tensor *b, int *ndim, int32_t *dims) {
    int n = a->ndim > b->ndim ? a->ndim : b->ndim;
    for (int i = 0; i < n; i++) {
        int ia = i - (n - a->ndim), ib = i - (n - b->ndim);
        int32_t da = ia < 0 ? 1 : a->dim[ia], db = ib < 0 ? 1 : b->dim[ib];
        if (da != db && da != 1 && db != 1)
            return lc_op_error(c, LC_ESHAPE, "sizes %d and %d of dim %d (counted from the end: %d) differ and neither is 1", da, db, i + 1, i - n);
        dims[i] = da == 1 ? db : da;
    }
    *ndim = n;
    return LC_OK;
}

lc_tensor *lc_expanded(lc_tensor *t, int ndim, const int32_t *dims) {
    lc_tensor *v = lc_tensor_view(t);
    if (!v) return NULL;
    v->ndim = (uint8_t)ndim;
    for (int i = 0; i < ndim; i++) {
        int k = i - (ndim - t->ndim);
        v->dim[i] = dims[i];
        v->stride[i] = k < 0 || (t->dim[k] == 1 && dims[i] != 1) ? 0 : t->stride[k];
    }
    return v;
}

/* ---- checks ---------------------------------------------------------------------------------------------------------- */
static lc_status check_inputs(lc_frame *c) {
    const lc_row *r = c->row;
    const lc_tensor *first = NULL, *first_float = NULL;
    for (int i = 0; i < r->n_x; i++) {
        lc_tensor *t = c->x[i];
        if (!t) {
            if (!r->optional[i]) return lc_op_error(c, LC_EARG, "argument %s is missing", r->x_name[i]);
            continue;
        }
        bool is_float = lc_dtype_is_float(t->dtype);
        if (r->kind[i] == 'T' && !is_float) return lc_op_error(c, LC_EDTYPE, "%s must be a float tensor; convert it with :to \"f32\"", r->x_name[i]);
        if (r->kind[i] == 'I' && t->dtype != LC_I32 && t->dtype != LC_I64)
            return lc_op_error(c, LC_EDTYPE, "%s must be an integer tensor (i32 or i64)", r->x_name[i]);
        if (lc_dtype_is_quant(t->dtype) && !(r->flags & (LC_F_MIXED | LC_F_VIEW)))
            return lc_op_error(c, LC_EDTYPE, "%s is quantised; only linear, embedding and to take such tensors", r->x_name[i]);
        if (!first) first = t;
        else if (t->device != first->device && c->op != LC_OP_copy_ && !(r->flags & LC_F_INPLACE && t->ndim == 0))
            return lc_op_error(c, LC_EDEVICE, "operands live on different devices");
        if (r->kind[i] != 'T' && !(r->kind[i] == 'A' && r->flags & LC_F_COMPARE)) continue;
        if (!first_float) first_float = t;
        else if (t->dtype != first_float->dtype && !(r->flags & LC_F_MIXED))
            return lc_op_error(c, LC_EDTYPE, "dtypes differ; convert one, e.g. with :to \"%s\"", lc_dtype_name(first_float->dtype));
    }
    if (r->has_list) {
        if (c->n_list < 1) return lc_op_error(c, LC_EARG, "the list is empty");
        for (int i = 0; i < c->n_list; i++) {
            if (c->list[i]->device != c->list[0]->device) return lc_op_error(c, LC_EDEVICE, "tensors live on different devices");
            if (c->list[i]->dtype != c->list[0]->dtype) return lc_op_error(c, LC_EDTYPE, "dtypes differ");
        }
    }
    return LC_OK;
}

static lc_status check_inplace(lc_frame *c) {
    lc_tensor *t = c->x[0];
    if (t->storage->readonly) return lc_op_error(c, LC_EARG, "%s is a mapped file and cannot be changed; clone it first", c->row->x_name[0]);
    if (lc_grad_enabled && lc_wants_grad(t))
        return lc_op_error(c, LC_EGRAD, "%s is part of a graph; change it in place inside lc.no_grad only", c->row->x_name[0]);
    for (int i = 0; i < t->ndim; i++)
        if (t->stride[i] == 0 && t->dim[i] > 1) return lc_op_error(c, LC_EARG, "%s is an expanded view; clone it first", c->row->x_name[0]);
    return LC_OK;
}

/* ---- what the kernel sees -------------------------------------------------------------------------------------------- */
static lc_status convert_to(lc_tensor *t, int op, int dtype, int device, lc_tensor **out) {
    lc_frame c;
    lc_frame_init(&c, op);
    c.x[0] = t;
    c.i[0] = dtype;
    c.i[1] = device;
    bool old = lc_grad_enabled;
    lc_grad_enabled = false;
    lc_status rc = lc_run(&c);
    lc_grad_enabled = old;
    *out = rc == LC_OK ? c.y[0] : NULL;
    return rc;
}

static lc_status convert(lc_tensor *t, int op, int dtype, lc_tensor **out) { return convert_to(t, op, dtype, t->device, out); }

/* Scalars of an op in place may lie elsewhere. */
static lc_status bring_scalars(lc_frame *c) {
    for (int i = 1; i < c->row->n_x; i++) {
        lc_tensor *t = c->k[i], *made;
        if (!t || t->ndim || t->device == c->x[0]->device || c->op == LC_OP_copy_) continue;
        LC_TRY(convert_to(t, LC_OP_to, t->dtype, c->x[0]->device, &made));
        lc_substitute(c, i, made);
    }
    return LC_OK;
}

static inline bool is_half(const lc_tensor *t) { return t->dtype == LC_BF16 || t->dtype == LC_F16; }

static bool acceptable_layout(const lc_row *r, const lc_tensor *t) {
    if (r->flags & LC_F_STRIDED || t->ndim == 0) return true;
    if (lc_dtype_is_quant(t->dtype)) return true; /* only rows can be sliced */
    if (r->flags & LC_F_ROWS) return t->stride[t->ndim - 1] == 1 || t->dim[t->ndim - 1] == 1;
    return lc_tensor_contiguous(t);
}

/* Broadcasts, makes contiguous, widens halves to f32: each by a temporary in k. */
static lc_status prepare_inputs(lc_frame *c, bool widen) {
    const lc_row *r = c->row;
    if (r->flags & LC_F_INPLACE) LC_TRY(bring_scalars(c));
    if (r->rule->broadcast || r->flags & LC_F_POINT) {
        const lc_tensor *to = r->flags & LC_F_INPLACE ? c->x[0] : c->y[0];
        for (int i = 0; i < r->n_x; i++) {
            if (!c->k[i] || lc_same_shape(c->k[i], to)) continue;
            lc_tensor *v = lc_expanded(c->k[i], to->ndim, to->dim);
            if (!v) return LC_ENOMEM;
            lc_substitute(c, i, v);
        }
    }
    bool inplace = r->flags & LC_F_INPLACE;
    for (int i = 0; i < r->n_x; i++) {
        lc_tensor *t = c->k[i], *made;
        if (!t) continue;
        if (widen && is_half(t)) {
            if (inplace && i == 0) continue; /* run_inplace_half does that */
            LC_TRY(convert(t, LC_OP_to, LC_F32, &made));
            lc_substitute(c, i, made);
            profile[c->op].copies++;
        } else if (!acceptable_layout(r, t)) {
            if (inplace && t->ndim) return lc_op_error(c, LC_EARG, "%s must be contiguous here", r->x_name[i]);
            LC_TRY(convert(t, LC_OP_clone, 0, &made));
            lc_substitute(c, i, made);
            profile[c->op].copies++;
        }
    }
    return LC_OK;
}

static inline void fill_view(lc_view *v, const lc_tensor *t) {
    if (!t) {
        v->data = NULL;
        v->ndim = 0;
        return;
    }
    v->data = lc_tensor_ptr(t);
    v->dtype = t->dtype;
    v->ndim = t->ndim;
    for (int i = 0; i < t->ndim; i++) {
        v->dim[i] = t->dim[i];
        v->stride[i] = t->stride[i];
    }
}

static lc_status kernel_error(const lc_frame *c, int rc, const lc_fault *fault) {
    const lc_tensor *t = c->x[0] ? c->x[0] : c->list ? c->list[0] : NULL;
    switch (rc) {
    case LC_K_RANGE:
        return lc_op_error(c, LC_EARG, "value %lld at element %lld is outside [0, %lld)", (long long)fault->value, (long long)fault->at,
                           (long long)fault->limit);
    case LC_K_NOMEM: return lc_op_error(c, LC_ENOMEM, "out of memory");
    case LC_K_UNSUPPORTED: return lc_op_error(c, LC_ENOKERNEL, "the %s kernel does not take these operands", lc_device_get(t ? t->device : 0)->name);
    default: {
        const lc_device *d = lc_device_get(t ? t->device : 0);
        return lc_op_error(c, LC_EDEVICE, "%s: %s", d->name, d->backend ? d->backend->last_error() : "kernel failed");
    }
    }
}

enum { STACK_LIST = 32 };

static lc_status launch(lc_frame *c, lc_tensor *const *y, int device) {
    const lc_row *r = c->row;
    lc_kargs k;
    lc_fault fault = {0, 0, 0};
    lc_view stack_list[STACK_LIST], *list = stack_list;
    bool is_double = false;
    for (int i = 0; i < r->n_x; i++) {
        fill_view(&k.x[i], c->k[i]);
        k.prepared[i] = c->k[i] ? &c->k[i]->storage->prepared : NULL;
        if (c->k[i] && c->k[i]->dtype == LC_F64) is_double = true;
    }
    for (int i = 0; i < r->n_y; i++) {
        fill_view(&k.y[i], y[i]);
        if (y[i] && y[i]->dtype == LC_F64) is_double = true;
    }
    for (int i = r->n_x; i < LC_KARGS_IN; i++) fill_view(&k.x[i], NULL); /* one kernel may serve rows of different width */
    for (int i = r->n_y; i < LC_KARGS_OUT; i++) fill_view(&k.y[i], NULL);
    if (r->has_list) {
        if (c->n_list > STACK_LIST && !(list = lc_alloc((size_t)c->n_list, sizeof *list))) return LC_ENOMEM;
        for (int i = 0; i < c->n_list; i++) {
            fill_view(&list[i], c->list[i]);
            if (c->list[i]->dtype == LC_F64) is_double = true;
        }
    }
    k.n_x = r->n_x;
    k.n_y = r->n_y;
    k.list = list;
    k.n_list = c->n_list;
    k.f = c->f;
    k.i = c->i;
    k.s = c->s;
    k.seed = c->seed;
    k.offset = c->offset;
    k.work = NULL;
    k.work_bytes = 0;
    k.fault = &fault;
    k.host = &lc_host_services;
    k.device = lc_device_get(device)->index;
    lc_status rc = LC_OK;
    const lc_kernel *kernel = lc_device_kernel(device, c->op, is_double);
    size_t granted = 0;
    if (!kernel->run) {
        rc = lc_op_error(c, LC_ENOKERNEL, "there is no %s kernel for it", lc_device_get(device)->name);
    } else if (kernel->work && (k.work_bytes = kernel->work(&k)) > 0) {
        rc = lc_scratch(device, k.work_bytes, &k.work, &granted);
    }
    if (rc == LC_OK) {
        int e = kernel->run(&k);
        if (e) rc = kernel_error(c, e, &fault);
    }
    if (k.work) lc_scratch_release(device, k.work, granted);
    if (list != stack_list) free(list);
    return rc;
}

/* ---- halves on the CPU ----------------------------------------------------------------------------------------------- */
/* Runs the kernel on f32 twins of half results (and of a half x[0] changed in place), then rounds once. */
static lc_status launch_widened(lc_frame *c, int device) {
    lc_tensor *twin[LC_MAX_OUT] = {NULL}, *inplace = NULL;
    lc_status rc = LC_OK;
    for (int i = 0; i < c->row->n_y && rc == LC_OK; i++) {
        if (!c->y[i]) continue;
        if (is_half(c->y[i])) rc = lc_tensor_new(LC_F32, device, c->y[i]->ndim, c->y[i]->dim, &twin[i]);
        else twin[i] = lc_retain(c->y[i]);
    }
    if (rc == LC_OK && c->row->flags & LC_F_INPLACE && is_half(c->x[0])) {
        rc = convert(c->x[0], LC_OP_to, LC_F32, &inplace);
        if (rc == LC_OK) lc_substitute(c, 0, lc_retain(inplace));
    }
    if (rc == LC_OK) rc = launch(c, twin, device);
    for (int i = 0; i <= c->row->n_y && rc == LC_OK; i++) {
        lc_tensor *from = i < c->row->n_y ? twin[i] : inplace, *to = i < c->row->n_y ? c->y[i] : c->x[0];
        if (!from || from == to) continue;
        lc_frame copy;
        lc_frame_init(&copy, LC_OP_copy_);
        copy.x[0] = to;
        copy.x[1] = from;
        bool old = lc_grad_enabled;
        lc_grad_enabled = false;
        rc = lc_run(&copy);
        lc_grad_enabled = old;
    }
    for (int i = 0; i < c->row->n_y; i++) lc_release(twin[i]);
    lc_release(inplace);
    return rc;
}

/* ---- the call -------------------------------------------------------------------------------------------------------- */
void lc_frame_init(lc_frame *c, int op) {
    const lc_row *r = lc_row_of(op);
    c->op = op;
    c->row = r;
    c->x[0] = NULL; /* read also of ops that take only a list */
    for (int i = 0; i < r->n_x; i++) c->x[i] = NULL;
    c->y[0] = NULL;
    for (int i = 0; i < r->n_y; i++) {
        c->y[i] = NULL;
        c->skip[i] = false;
    }
    for (int i = 0; i < r->n_f; i++) c->f[i] = 0;
    for (int i = 0; i < r->n_i; i++) c->i[i] = 0;
    c->list = NULL;
    c->n_list = 0;
    c->s = NULL;
    c->k_owned = 0;
    c->done = false;
    c->seed = c->offset = 0;
}

static bool needs_recording(const lc_frame *c) {
    if (!lc_grad_enabled || c->row->flags & (LC_F_NODIFF | LC_F_NOGRAD)) return false;
    for (int i = 0; i < c->row->n_x; i++)
        if (c->x[i] && c->x[i]->requires_grad) return true;
    for (int i = 0; i < c->n_list; i++)
        if (c->list[i]->requires_grad) return true;
    return false;
}

static lc_status finite_or_error(lc_frame *c) {
    for (int i = 0; i < c->row->n_y_visible; i++) {
        if (!c->y[i] || !lc_dtype_is_float(c->y[i]->dtype)) continue;
        lc_frame count;
        lc_frame_init(&count, LC_OP_count_nonfinite);
        count.x[0] = c->y[i];
        int old = lc_check_finite(0);
        lc_status rc = lc_run(&count);
        double bad = 0;
        lc_handle h;
        if (rc == LC_OK) {
            lc_give_handle(count.y[0], &h);
            rc = (lc_status)lc_item(&h, &bad);
            lc_drop(&h);
        }
        lc_check_finite(old);
        LC_TRY(rc);
        if (bad > 0) return lc_op_error(c, LC_ENONFINITE, "result %d has %.0f elements that are NaN or infinite", i + 1, bad);
    }
    return LC_OK;
}

/* Adds to the message of an allocation that failed the op's operands and who holds the memory. */
static lc_status out_of_memory(const lc_frame *c) {
    const lc_tensor *t = c->x[0] ? c->x[0] : c->n_list ? c->list[0] : NULL;
    char why[512], holders[1024];
    snprintf(why, sizeof why, "%s", lc_error_message());
    for (int i = 1; !t && i < c->row->n_x; i++) t = c->x[i];
    lc_memory_holders(t ? t->device : 0, holders, sizeof holders);
    lc_op_error(c, LC_ENOMEM, "%s", why);
    return lc_fail(LC_ENOMEM, "%s\n  held there:%s", lc_error_message(), holders);
}

static lc_status run_kernel(lc_frame *c) {
    const lc_row *r = c->row;
    const lc_tensor *any = c->x[0] ? c->x[0] : c->n_list ? c->list[0] : NULL;
    for (int i = 1; !any && i < r->n_x; i++) any = c->x[i];
    int device = any ? any->device : 0;
    bool half = false;
    if (!(r->flags & LC_F_HALF) && !lc_device_get(device)->backend) {
        for (int i = 0; i < r->n_x; i++) half |= c->x[i] && is_half(c->x[i]);
        for (int i = 0; i < r->n_y; i++) half |= c->y[i] && is_half(c->y[i]);
    }
    LC_TRY(prepare_inputs(c, half));
    return half ? launch_widened(c, device) : launch(c, c->y, device);
}

lc_status lc_run(lc_frame *c) {
    const lc_row *r = c->row;
    if (lc_interrupt) return lc_fail(LC_EINTR, "interrupted");
    LC_TRY(check_inputs(c));
    if (r->flags & LC_F_INPLACE) LC_TRY(check_inplace(c));
    for (int i = 0; i < r->n_x; i++) c->k[i] = c->x[i];
    c->k_owned = 0;
    c->recording = needs_recording(c);
    if (c->recording && !r->rule->backward && !(r->flags & LC_F_GRAD)) return lc_op_error(c, LC_EGRAD, "it has no gradient");
    if (r->flags & LC_F_RANDOM && c->x[0] && lc_graph_recording() == c->x[0]->device)
        return lc_op_error(c, LC_EARG, "a graph is being recorded, and each of its runs would draw the same numbers");
    if (r->flags & LC_F_RANDOM && c->x[0]) lc_rng_take((uint64_t)lc_tensor_numel(c->x[0]), &c->seed, &c->offset);
    int outer = current;
    current = c->op;
    double t0 = profiling ? lc_now() : 0;
    lc_status rc = r->rule->shape(c);
    if (rc == LC_OK && !(r->flags & LC_F_VIEW) && !c->done) rc = run_kernel(c);
    for (int i = 0; c->k_owned >> i; i++)
        if (c->k_owned >> i & 1) lc_release(c->k[i]);
    c->k_owned = 0;
    if (rc == LC_OK && r->rule->after) r->rule->after(c);
    if (rc == LC_OK && r->flags & LC_F_INPLACE) lc_storage_written(c->x[0]->storage);
    if (rc == LC_OK && __builtin_expect(check_finite, 0)) rc = finite_or_error(c);
    if (rc == LC_OK && c->recording) rc = lc_record(c);
    if (profiling) {
        profile[c->op].seconds += lc_now() - t0;
        profile[c->op].calls++;
    }
    current = outer;
    if (rc == LC_ENOMEM && outer < 0) rc = out_of_memory(c);
    if (rc != LC_OK)
        for (int i = 0; i < r->n_y; i++) {
            lc_release(c->y[i]);
            c->y[i] = NULL;
        }
    return rc;
}

/* ---- from handles ---------------------------------------------------------------------------------------------------- */
static lc_status stale_argument(int op, const char *name) {
    char why[256];
    snprintf(why, sizeof why, "%s", lc_error_message());
    return lc_fail(LC_ESTALE, "%s: argument %s: %s", lc_row_of(op)->name, name, why);
}

int lc_call(int op, lc_args *a) {
    if (op < 0 || op >= LC_OP_COUNT) return lc_fail(LC_EARG, "no op %d", op);
    lc_frame c;
    const lc_row *r = lc_row_of(op);
    lc_tensor *stack_list[STACK_LIST], **list = stack_list;
    lc_frame_init(&c, op);
    for (int i = 0; i < r->n_x; i++)
        if (a->x[i]._gen && !(c.x[i] = lc_get(&a->x[i]))) return stale_argument(op, r->x_name[i]);
    for (int i = 0; i < r->n_f; i++) c.f[i] = a->f[i];
    for (int i = 0; i < r->n_i; i++) c.i[i] = a->i[i];
    c.s = a->s;
    if (r->has_list) {
        if (a->n_list > STACK_LIST && !(list = lc_alloc((size_t)a->n_list, sizeof *list))) return LC_ENOMEM;
        for (int i = 0; i < a->n_list; i++)
            if (!(list[i] = lc_get(&a->list[i]))) {
                if (list != stack_list) free(list);
                return stale_argument(op, "list");
            }
        c.list = list;
        c.n_list = a->n_list;
    }
    lc_status rc = lc_run(&c);
    a->n_y = 0;
    if (rc == LC_OK)
        for (int i = 0; i < r->n_y; i++) {
            if (!c.y[i]) {
                if (!r->y_hidden[i]) a->y[i]._gen = 0;
            } else if (r->y_hidden[i]) {
                lc_release(c.y[i]);
            } else {
                lc_give_handle(c.y[i], &a->y[i]);
            }
        }
    a->n_y = r->n_y_visible;
    if (list != stack_list) free(list);
    return rc;
}

/* ---- profile --------------------------------------------------------------------------------------------------------- */
int lc_profile(int on) {
    int old = profiling;
    if (on > 0) memset(profile, 0, sizeof profile);
    for (int d = 0; on > 0 && d < lc_device_count(); d++) {
        const lc_backend *b = lc_device_get(d)->backend;
        if (b && b->timing) b->timing(lc_device_get(d)->index, 1);
    }
    if (on >= 0) profiling = on;
    return old;
}

/* An op a line: calls, seconds of the host in them, copies made for them, seconds of devices. */
const char *lc_profile_report(void) {
    static char text[64 * 1024];
    double device[LC_OP_COUNT] = {0};
    int n = 0;
    text[0] = 0;
    for (int d = 0; d < lc_device_count(); d++) {
        const lc_backend *b = lc_device_get(d)->backend;
        const double *seconds = b && b->timing ? b->timing(lc_device_get(d)->index, 0) : NULL;
        for (int i = 0; seconds && i < LC_OP_COUNT; i++) device[i] += seconds[i];
    }
    for (int i = 0; i < LC_OP_COUNT && n < (int)sizeof text - 128; i++)
        if (profile[i].calls)
            n += snprintf(text + n, sizeof text - (size_t)n, "%-28s %8lld %10.5f %6lld %10.5f\n", lc_row_of(i)->name, (long long)profile[i].calls,
                          profile[i].seconds, (long long)profile[i].copies, device[i]);
    return text;
}
