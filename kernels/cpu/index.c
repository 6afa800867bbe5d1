/* index.c: reading and writing by integer indices, and selection by masks. Ids are int32, int64 or uint8, contiguous,
 * and count from 0; all of them are looked at before anything is written, and one out of range is LC_K_RANGE with its
 * value and place. Elements are moved by size, whatever their dtype, except where they are added up. */
#include "convert.h"
#include "walk.h"

#define KERNEL(name)                                                                                                   \
    int K(name)(const lc_kargs *k);                                                                                    \
    int K(name)(const lc_kargs *k)

static int64_t id_at(const void *ids, int dtype, int64_t i) {
    return dtype == LC_K_I64   ? ((const int64_t *)ids)[i]
           : dtype == LC_K_I32 ? ((const int32_t *)ids)[i]
                               : ((const uint8_t *)ids)[i];
}

static int check_ids(const lc_kargs *k, const lc_view *ids, int64_t limit) {
    int64_t n = view_numel(ids);
    if (!dtype_is_int(ids->dtype) || !view_contiguous(ids)) return LC_K_UNSUPPORTED;
    for (int64_t i = 0; i < n; i++) {
        int64_t id = id_at(ids->data, ids->dtype, i);
        if (id >= 0 && id < limit) continue;
        if (k->fault) *k->fault = (lc_fault){id, limit, i};
        return LC_K_RANGE;
    }
    return LC_K_OK;
}

/* ---- rows by ids ------------------------------------------------------------------------------------------------- */

typedef struct rows_job {
    const void *ids;
    int id_dtype, from, to;
    const char *x;
    char *y;
    int64_t x_bytes, y_bytes;     /* of a row */
    int64_t width, n_ids, n_rows; /* elements a row; ids; rows of x (of y in embedding_backward) */
} rows_job;

static void rows_part(void *ctx, int64_t begin, int64_t end, int thread) {
    const rows_job *j = (const rows_job *)ctx;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        int64_t id = r / j->n_ids * j->n_rows + id_at(j->ids, j->id_dtype, r % j->n_ids);
        convert_row(j->from, j->x + id * j->x_bytes, j->to, j->y + r * j->y_bytes, j->width);
    }
}

/* x [outer, rows, inner] by ids [n] -> y [outer, n, inner]; dtypes may differ */
static int take_rows(const lc_kargs *k, const lc_view *x, const lc_view *ids, int dim) {
    const lc_dtype_trait *t = lc_dtype_traits(x->dtype);
    int64_t outer = 1, inner = 1;
    int status = check_ids(k, ids, x->dim[dim]);
    if (status != LC_K_OK) return status;
    for (int i = 0; i < dim; i++) outer *= x->dim[i];
    for (int i = dim + 1; i < x->ndim; i++) inner *= x->dim[i];
    if (inner % t->block || (x->dtype != k->y[0].dtype && !lc_dtype_is_float(k->y[0].dtype))) return LC_K_UNSUPPORTED;
    rows_job j = {.ids = ids->data, .id_dtype = ids->dtype, .x = (const char *)x->data, .y = (char *)k->y[0].data};
    j.from = x->dtype;
    j.to = k->y[0].dtype;
    j.width = inner;
    j.n_ids = view_numel(ids);
    j.n_rows = x->dim[dim];
    j.x_bytes = inner / t->block * t->bytes;
    j.y_bytes = inner / lc_dtype_traits(j.to)->block * lc_dtype_traits(j.to)->bytes;
    run_parts(k, outer * j.n_ids, LC_MAX((int64_t)1, WALK_SERIAL / LC_MAX((int64_t)1, inner)), rows_part, &j);
    return LC_K_OK;
}

/* w [n, d] of any dtype, ids [..] -> y [.., d] */
KERNEL(embedding) { return take_rows(k, &k->x[0], &k->x[1], 0); }
KERNEL(index_select) { return take_rows(k, &k->x[0], &k->x[1], k->i[0]); }

/* A thread owns rows of the result and reads all ids: each row's sum has one order whatever the threads. */
static void embedding_backward_part(void *ctx, int64_t begin, int64_t end, int thread) {
    const rows_job *j = (const rows_job *)ctx;
    real *y = (real *)j->y;
    const real *g = (const real *)j->x;
    (void)thread;
    memset(y + begin * j->width, 0, (size_t)((end - begin) * j->width) * sizeof(real));
    for (int64_t i = 0; i < j->n_ids; i++) {
        int64_t id = id_at(j->ids, j->id_dtype, i);
        if (id < begin || id >= end) continue;
        real *restrict to = y + id * j->width;
        const real *restrict from = g + i * j->width;
        for (int64_t e = 0; e < j->width; e++) to[e] += from[e];
    }
}

/* x[0] = g [.., d], x[1] = ids [..] -> y [rows, d] */
KERNEL(embedding_backward) {
    const lc_view *g = &k->x[0], *ids = &k->x[1], *y = &k->y[0];
    if (g->dtype != LC_K_REAL || y->dtype != LC_K_REAL) return LC_K_UNSUPPORTED;
    int status = check_ids(k, ids, y->dim[0]);
    if (status != LC_K_OK) return status;
    rows_job j = {.ids = ids->data, .id_dtype = ids->dtype, .x = (const char *)g->data, .y = (char *)y->data};
    j.width = y->dim[1];
    j.n_ids = view_numel(ids);
    run_parts(k, y->dim[0], LC_MAX((int64_t)256, WALK_SERIAL / LC_MAX((int64_t)1, j.width)), embedding_backward_part,
              &j);
    return LC_K_OK;
}

/* ---- elements by ids: the indexed tensor is walked with a stride of 0 along the dim, to which the id adds its own  */

typedef struct element_job {
    int id_dtype;
    int64_t bytes, id_bytes, along; /* of an element, of an id, from one position of the dim to the next */
    const walk *w;
    int64_t n, id_step, src_step; /* scatter_add: the dim's length in ids, steps along it in bytes */
} element_job;

static lc_view indexed_view(const lc_view *v, const lc_view *ids, int dim) {
    lc_view out = *v;
    for (int i = 0; i < v->ndim; i++) out.dim[i] = ids->dim[i];
    out.stride[dim] = 0;
    return out;
}

static void gather_row(void *ctx, char *const *p, const int64_t *step, int64_t n, int64_t at) {
    const element_job *j = (const element_job *)ctx;
    (void)at;
    for (int64_t i = 0; i < n; i++) {
        const char *from = p[2] + i * step[2] + id_at(p[1] + i * step[1], j->id_dtype, 0) * j->along;
        char *to = p[0] + i * step[0];
        switch (j->bytes) {
        case 1: *(walk_1 *)to = *(const walk_1 *)from; break;
        case 2: *(walk_2 *)to = *(const walk_2 *)from; break;
        case 4: *(walk_4 *)to = *(const walk_4 *)from; break;
        default: *(walk_8 *)to = *(const walk_8 *)from; break;
        }
    }
}

/* x, ids -> y[.., p, ..] = x[.., ids[.., p, ..], ..] along dim i[0] */
KERNEL(gather) {
    const lc_view *x = &k->x[0], *ids = &k->x[1];
    int dim = k->i[0], status = check_ids(k, ids, x->ndim ? x->dim[dim] : 1);
    if (status != LC_K_OK || view_numel(ids) == 0) return status;
    if (x->dtype != k->y[0].dtype || lc_dtype_is_quant(x->dtype)) return LC_K_UNSUPPORTED;
    lc_view from = indexed_view(x, ids, dim);
    const lc_view *v[3] = {&k->y[0], ids, &from};
    walk w;
    walk_make(&w, 3, v, 0);
    element_job j = {
        .id_dtype = ids->dtype, .bytes = view_bytes(x), .along = x->ndim ? x->stride[dim] * view_bytes(x) : 0};
    walk_all(k, &w, gather_row, &j);
    return LC_K_OK;
}

static void scatter_row(void *ctx, char *const *p, const int64_t *step, int64_t n, int64_t at) {
    const element_job *j = (const element_job *)ctx;
    (void)at;
    for (int64_t i = 0; i < n; i++) {
        real *to = (real *)(p[0] + i * step[0] + id_at(p[1] + i * step[1], j->id_dtype, 0) * j->along);
        *to += *(const real *)(p[2] + i * step[2]);
    }
}

/* A thread owns places outside the dim and goes along it in order, so sums have one order. */
static void scatter_part(void *ctx, int64_t begin, int64_t end, int thread) {
    const element_job *j = (const element_job *)ctx;
    walk w = *j->w;
    (void)thread;
    for (int64_t i = 0; i < j->n; i++) {
        walk_range(&w, begin, end, scatter_row, ctx);
        w.base[1] += j->id_step;
        w.base[2] += j->src_step;
    }
}

/* x, ids, src -> y = x, then y[.., ids[.., p, ..], ..] += src[.., p, ..] along dim i[0] */
KERNEL(scatter_add) {
    const lc_view *x = &k->x[0], *src = &k->x[2], *y = &k->y[0];
    lc_view ids = k->x[1], from = *src;
    int dim = k->i[0], status = check_ids(k, &ids, x->ndim ? x->dim[dim] : 1);
    if (status != LC_K_OK) return status;
    if (x->dtype != LC_K_REAL || src->dtype != LC_K_REAL || y->dtype != LC_K_REAL) return LC_K_UNSUPPORTED;
    if (view_numel(x) > 0) memcpy(y->data, x->data, (size_t)view_numel(x) * sizeof(real));
    if (view_numel(&ids) == 0) return LC_K_OK;
    element_job j = {.id_dtype = ids.dtype, .n = 1};
    if (x->ndim) {
        j.n = ids.dim[dim];
        j.along = y->stride[dim] * view_bytes(y);
        j.id_step = ids.stride[dim] * view_bytes(&ids);
        j.src_step = src->stride[dim] * view_bytes(src);
        ids.dim[dim] = 1;
    }
    lc_view to = indexed_view(y, &ids, dim);
    const lc_view *v[3] = {&to, &ids, &from};
    walk w;
    walk_make(&w, 3, v, 0);
    j.w = &w;
    run_parts(k, w.total, LC_MAX((int64_t)1, WALK_SERIAL / j.n), scatter_part, &j);
    return LC_K_OK;
}

/* ---- selection by a mask ----------------------------------------------------------------------------------------- */

typedef struct where_job {
    int mask_dtype;
    int64_t mask_bytes, bytes;
} where_job;

static void mask_piece(int dtype, const void *in, uint8_t *out, int64_t n) {
#define LC_TEST(T, expr)                                                                                               \
    for (int64_t i = 0; i < n; i++) {                                                                                  \
        T v = ((const T *)in)[i];                                                                                      \
        out[i] = (uint8_t)(expr);                                                                                      \
    }                                                                                                                  \
    break
    switch (dtype) {
    case LC_K_F32: LC_TEST(float, v != 0);
    case LC_K_F64: LC_TEST(double, v != 0);
    case LC_K_BF16:
    case LC_K_F16: LC_TEST(uint16_t, (v & 0x7fff) != 0);
    case LC_K_I32: LC_TEST(int32_t, v != 0);
    case LC_K_I64: LC_TEST(int64_t, v != 0);
    default: LC_TEST(uint8_t, v != 0);
    }
#undef LC_TEST
}

#define SELECT(T)                                                                                                      \
    _Pragma("omp simd") for (int64_t e = 0; e < m; e++)((T *)to)[e] = mask[e] ? ((const T *)a)[e] : ((const T *)b)[e]; \
    break

/* operands: y, mask, a, b */
static void where_row(void *ctx, char *const *p, const int64_t *step, int64_t n, int64_t at) {
    const where_job *j = (const where_job *)ctx;
    uint64_t raw_mask[WALK_BLOCK], raw_a[WALK_BLOCK], raw_b[WALK_BLOCK], out[WALK_BLOCK];
    uint8_t mask[WALK_BLOCK];
    (void)at;
    for (int64_t i = 0; i < n; i += WALK_BLOCK) {
        int64_t m = LC_MIN(n - i, (int64_t)WALK_BLOCK);
        mask_piece(j->mask_dtype, walk_piece(p[1] + i * step[1], step[1], m, j->mask_bytes, raw_mask), mask, m);
        const void *a = walk_piece(p[2] + i * step[2], step[2], m, j->bytes, raw_a);
        const void *b = walk_piece(p[3] + i * step[3], step[3], m, j->bytes, raw_b);
        char *place = p[0] + i * step[0];
        int direct = step[0] == j->bytes;
        void *to = direct ? (void *)place : (void *)out;
        switch (j->bytes) {
        case 1: SELECT(walk_1);
        case 2: SELECT(walk_2);
        case 4: SELECT(walk_4);
        default: SELECT(walk_8);
        }
        if (!direct) walk_scatter(place, step[0], out, m, j->bytes);
    }
}

static int select_by(const lc_kargs *k, const lc_view *mask, const lc_view *a, const lc_view *b) {
    const lc_view *v[4] = {&k->y[0], mask, a, b};
    if (a->dtype != b->dtype || a->dtype != k->y[0].dtype) return LC_K_UNSUPPORTED;
    if (lc_dtype_is_quant(a->dtype) || lc_dtype_is_quant(mask->dtype)) return LC_K_UNSUPPORTED;
    where_job j = {mask->dtype, view_bytes(mask), view_bytes(a)};
    walk w;
    walk_make(&w, 4, v, 0);
    walk_all(k, &w, where_row, &j);
    return LC_K_OK;
}

/* x[0] = cond, x[1] = a, x[2] = b, all expanded to y's shape -> y = a where cond is not 0, else b */
KERNEL(where) { return select_by(k, &k->x[0], &k->x[1], &k->x[2]); }

/* x[0] = x, x[1] = mask expanded to x's shape -> y = f[0] where mask is not 0, else x */
KERNEL(masked_fill) {
    uint64_t value = 0;
    lc_view v = k->x[0];
    if (lc_dtype_is_quant(v.dtype)) return LC_K_UNSUPPORTED;
    convert_row(LC_K_F64, &k->f[0], v.dtype, &value, 1);
    v.data = &value;
    memset(v.stride, 0, sizeof v.stride);
    return select_by(k, &k->x[1], &v, &k->x[0]);
}
