/* linear.c: the ops `linear` and `matmul` on top of gemm.h, and their plain twins (option plain_linear): one dot
 * product at a time, summed in double. Here strides, batches and dtypes are sorted out, so that the product itself sees
 * two matrices. */
#include "gemm.h"

static inline const char *element(const lc_view *v, int64_t at) { return gemm_at(v->data, v->dtype, at); }

/* Can rows of v (all dims but the last) be walked with one stride? */
static int rows_uniform(const lc_view *v, int64_t *ld) {
    int64_t step = 0, count = 1;
    for (int i = v->ndim - 2; i >= 0; i--) {
        if (v->dim[i] == 1) continue;
        if (count == 1)
            step = v->stride[i];
        else if (v->stride[i] != step * count)
            return 0;
        count *= v->dim[i];
    }
    *ld = count > 1 ? step : v->ndim ? v->dim[v->ndim - 1] : 0;
    return 1;
}

/* ---- linear ---------------------------------------------------------------------------------------------------- */

/* What lies in the workspace, in reals: x widened or made regular [rows, k]; b [n]; y before rounding [chunk, n]. */
typedef struct linear_plan {
    int64_t rows, k, n, ldx, ld_add, ldy, chunk;
    int x_direct, add_direct, y_direct, b_direct;
    size_t x_size, b_size, y_size;
} linear_plan;

static linear_plan plan_linear(const lc_kargs *q) {
    const lc_view *x = &q->x[0], *w = &q->x[1], *b = &q->x[2], *add = &q->x[3], *y = &q->y[0];
    linear_plan p = {.rows = view_rows(x), .k = x->dim[x->ndim - 1], .n = w->dim[0]};
    int regular = rows_uniform(x, &p.ldx);
    /* GEMM widens bf16 and f16 as it copies; GEMV wants reals */
    p.x_direct = regular && (x->dtype == LC_K_REAL || (p.rows > GEMV_ROWS && p.n > GEMV_ROWS));
    p.y_direct = y->dtype == LC_K_REAL && rows_uniform(y, &p.ldy);
    p.add_direct = add->data && add->dtype == LC_K_REAL && view_rows(add) == p.rows && rows_uniform(add, &p.ld_add);
    p.b_direct = !b->data || (b->dtype == LC_K_REAL && (b->stride[0] == 1 || p.n == 1));
    p.chunk = p.y_direct ? p.rows : LC_MIN(p.rows, LC_MAX(64, (4 << 20) / LC_MAX(p.n, 1)));
    if (!p.x_direct) p.x_size = (size_t)(p.rows * p.k), p.ldx = p.k;
    if (!p.y_direct) p.y_size = (size_t)(p.chunk * p.n), p.ldy = p.n;
    if (!p.b_direct) p.b_size = (size_t)p.n;
    return p;
}

size_t K(linear_work)(const lc_kargs *q) {
    linear_plan p = plan_linear(q);
    return (p.x_size + p.b_size + p.y_size) * sizeof(real);
}

typedef struct linear_job {
    const lc_kargs *q;
    const linear_plan *p;
    real *x, *y;
    int64_t r0;
} linear_job;

static void widen_x(void *ctx, int64_t begin, int64_t end, int thread) {
    const linear_job *j = ctx;
    const lc_view *x = &j->q->x[0];
    (void)thread;
    for (int64_t r = begin; r < end; r++)
        row_to_real(x->dtype, element(x, view_row_offset(x, r)), j->x + r * j->p->k, j->p->k);
}

/* y [chunk, n] starts as `add`, where that cannot be read in place. */
static void start_y(void *ctx, int64_t begin, int64_t end, int thread) {
    const linear_job *j = ctx;
    const lc_view *add = &j->q->x[3];
    (void)thread;
    for (int64_t r = begin; r < end; r++)
        row_to_real(add->dtype, element(add, view_row_offset(add, j->r0 + r)), j->y + r * j->p->ldy, j->p->n);
}

static void round_y(void *ctx, int64_t begin, int64_t end, int thread) {
    const linear_job *j = ctx;
    const lc_view *y = &j->q->y[0];
    (void)thread;
    for (int64_t r = begin; r < end; r++)
        row_from_real(y->dtype, j->y + r * j->p->ldy, (char *)element(y, view_row_offset(y, j->r0 + r)), j->p->n);
}

/* One output at a time: reads and widens a weight row, then a row of x after the other. */
static void plain_linear(void *ctx, int64_t begin, int64_t end, int thread) {
    const linear_job *job = ctx;
    const lc_kargs *q = job->q;
    const lc_view *x = &q->x[0], *w = &q->x[1], *b = &q->x[2], *add = &q->x[3], *y = &q->y[0];
    const int64_t k = job->p->k, rows = job->p->rows;
    real *wr = lc_cpu_scratch((size_t)(2 * k + 2) * sizeof(real)), *xr = wr + k;
    (void)thread;
    for (int64_t j = begin; j < end; j++) {
        row_to_real(w->dtype, element(w, j * w->stride[0]), wr, k);
        for (int64_t r = 0; r < rows; r++) {
            double s = 0;
            real t;
            row_to_real(x->dtype, element(x, view_row_offset(x, r)), xr, k);
            for (int64_t i = 0; i < k; i++) s += (double)xr[i] * (double)wr[i];
            s *= q->f[0];
            if (b->data) row_to_real(b->dtype, element(b, j * b->stride[0]), &t, 1), s += (double)t;
            if (add->data) row_to_real(add->dtype, element(add, view_row_offset(add, r) + j), &t, 1), s += (double)t;
            t = (real)s;
            row_from_real(y->dtype, &t, (char *)element(y, view_row_offset(y, r) + j), 1);
        }
    }
}

int K(linear)(const lc_kargs *q) {
    const lc_view *x = &q->x[0], *w = &q->x[1], *b = &q->x[2], *add = &q->x[3], *y = &q->y[0];
    linear_plan p = plan_linear(q);
    if (x->dtype != y->dtype || w->ndim != 2 || !lc_dtype_traits(w->dtype) || lc_dtype_traits(w->dtype)->block == 0)
        return LC_K_UNSUPPORTED;
    if (!lc_dtype_is_float(w->dtype) && !lc_dtype_is_quant(w->dtype)) return LC_K_UNSUPPORTED;
    if (p.rows < 1 || p.n < 1) return LC_K_OK;
    linear_job j = {.q = q, .p = &p};
    if (q->host->option(LC_OPTION_PLAIN_LINEAR)) {
        if (!lc_cpu_scratch((size_t)(2 * p.k + 2) * sizeof(real))) return LC_K_NOMEM;
        plain_linear(&j, 0, p.n, 0);
        return LC_K_OK;
    }
    real *work = q->work, *bias = b->data;
    gemm_call g = {.n = p.n,
                   .k = p.k,
                   .b = w->data,
                   .b_dtype = w->dtype,
                   .b_rs = 1,
                   .b_cs = p.n > 1 ? w->stride[0] : p.k,
                   .a = x->data,
                   .a_dtype = x->dtype,
                   .a_rs = p.ldx,
                   .a_cs = 1,
                   .alpha = (real)q->f[0],
                   .beta = 1,
                   .ldc = p.ldy};
    if (!p.x_direct) {
        j.x = work;
        q->host->parallel(p.rows, 16, widen_x, &j);
        g.a = j.x, g.a_dtype = LC_K_REAL;
        work += p.x_size;
    }
    if (!p.b_direct) {
        for (int64_t i = 0; i < p.n; i++) row_to_real(b->dtype, element(b, i * b->stride[0]), work + i, 1);
        bias = work;
        work += p.b_size;
    }
    g.bias = bias;
    for (j.r0 = 0; j.r0 < p.rows; j.r0 += p.chunk) {
        g.m = LC_MIN(p.chunk, p.rows - j.r0);
        g.a = gemm_at(p.x_direct ? x->data : j.x, g.a_dtype, j.r0 * p.ldx);
        g.c = j.y = p.y_direct ? (real *)y->data + j.r0 * p.ldy : work;
        if (p.add_direct) {
            g.add = (const real *)add->data + j.r0 * p.ld_add, g.ld_add = p.ld_add;
        } else if (add->data) {
            q->host->parallel(g.m, 16, start_y, &j);
            g.add = g.c, g.ld_add = p.ldy;
        }
        int status = K(gemm_run)(q->host, &g);
        if (status) return status;
        if (!p.y_direct) q->host->parallel(g.m, 16, round_y, &j);
    }
    return LC_K_OK;
}

/* ---- matmul ---------------------------------------------------------------------------------------------------- */

typedef struct matmul_job {
    const lc_kargs *q;
    const lc_host *inner; /* the pool for one product, or NULL when the products are spread */
    int64_t m, n, k, batch;
    int nb; /* batch dims */
    int failed;
} matmul_job;

static int64_t batch_offset(const lc_view *v, int nb, int64_t at) {
    int64_t offset = 0;
    for (int i = nb - 1; i >= 0; i--) {
        offset += at % v->dim[i] * v->stride[i];
        at /= v->dim[i];
    }
    return offset;
}

static void plain_product(const matmul_job *w, int64_t at) {
    const lc_view *a = &w->q->x[0], *b = &w->q->x[1], *add = &w->q->x[2], *y = &w->q->y[0];
    const int nb = w->nb;
    const real *pa = (const real *)a->data + batch_offset(a, nb, at),
               *pb = (const real *)b->data + batch_offset(b, nb, at);
    const real *pd = add->data ? (const real *)add->data + batch_offset(add, nb, at) : NULL;
    real *py = (real *)y->data + batch_offset(y, nb, at);
    for (int64_t i = 0; i < w->m; i++)
        for (int64_t j = 0; j < w->n; j++) {
            double s = 0;
            for (int64_t k = 0; k < w->k; k++)
                s += (double)pa[i * a->stride[nb] + k * a->stride[nb + 1]] *
                     (double)pb[k * b->stride[nb] + j * b->stride[nb + 1]];
            s *= w->q->f[0];
            if (pd) s += (double)pd[i * add->stride[nb] + j * add->stride[nb + 1]];
            py[i * y->stride[nb] + j * y->stride[nb + 1]] = (real)s;
        }
}

/* One product of the batch. A result whose columns are contiguous is computed as its transpose, b^T a^T. */
static int product(const matmul_job *w, int64_t at) {
    const lc_view *a = &w->q->x[0], *b = &w->q->x[1], *add = &w->q->x[2], *y = &w->q->y[0];
    const int nb = w->nb;
    const int64_t yr = y->stride[nb], yc = y->stride[nb + 1];
    gemm_call g = {.m = w->m,
                   .n = w->n,
                   .k = w->k,
                   .a_dtype = LC_K_REAL,
                   .b_dtype = LC_K_REAL,
                   .alpha = (real)w->q->f[0],
                   .beta = 1,
                   .a_rs = a->stride[nb],
                   .a_cs = a->stride[nb + 1],
                   .b_rs = b->stride[nb],
                   .b_cs = b->stride[nb + 1],
                   .ldc = yr};
    g.a = (const real *)a->data + batch_offset(a, nb, at);
    g.b = (const real *)b->data + batch_offset(b, nb, at);
    g.c = (real *)y->data + batch_offset(y, nb, at);
    if (add->data) {
        const real *d = (const real *)add->data + batch_offset(add, nb, at);
        const int64_t dr = add->stride[nb], dc = add->stride[nb + 1];
        if (dc == 1 && (yc == 1 || w->n == 1)) {
            g.add = d, g.ld_add = dr;
        } else {
            for (int64_t i = 0; i < w->m; i++)
                for (int64_t j = 0; j < w->n; j++) g.c[i * yr + j * yc] = d[i * dr + j * dc];
            g.add = g.c, g.ld_add = yr;
        }
    }
    if (yc == 1 || w->n == 1) return K(gemm_run)(w->inner, &g);
    if (yr != 1 && w->m > 1) {
        plain_product(w, at);
        return LC_K_OK;
    }
    gemm_call t = g;
    t.m = g.n, t.n = g.m, t.a = g.b, t.a_rs = g.b_cs, t.a_cs = g.b_rs, t.b = g.a, t.b_rs = g.a_cs, t.b_cs = g.a_rs;
    t.ldc = t.ld_add = yc;
    return K(gemm_run)(w->inner, &t);
}

static void products(void *ctx, int64_t begin, int64_t end, int thread) {
    matmul_job *w = ctx;
    (void)thread;
    for (int64_t at = begin; at < end; at++) {
        if (w->q->host->option(LC_OPTION_PLAIN_LINEAR))
            plain_product(w, at);
        else if (product(w, at))
            w->failed = 1;
    }
}

/* Batches that share b and whose rows continue one another are one product of more rows: the last batch dim joins m. */
static void fold_batches(lc_kargs *q, matmul_job *w) {
    while (w->nb > 0) {
        lc_view *v[4] = {&q->x[0], &q->y[0], &q->x[2], &q->x[1]};
        const int d = w->nb - 1;
        const int64_t size = v[0]->dim[d];
        if (size != 1 && v[3]->stride[d] != 0) return;
        for (int i = 0; i < 3; i++)
            if (v[i]->data && size != 1 && w->m != 1 && v[i]->stride[d] != v[i]->stride[d + 1] * w->m) return;
        for (int i = 0; i < 3; i++) {
            if (w->m == 1) v[i]->stride[d + 1] = v[i]->stride[d];
            v[i]->dim[d] = size * w->m;
            v[i]->stride[d] = v[i]->stride[d + 1], v[i]->stride[d + 1] = v[i]->stride[d + 2];
            v[i]->dim[d + 1] = v[i]->dim[d + 2];
        }
        v[3]->dim[d] = v[3]->dim[d + 1], v[3]->stride[d] = v[3]->stride[d + 1];
        v[3]->dim[d + 1] = v[3]->dim[d + 2], v[3]->stride[d + 1] = v[3]->stride[d + 2];
        w->m *= size, w->batch /= size, w->nb--;
    }
}

int K(matmul)(const lc_kargs *k) {
    lc_kargs q = *k;
    const int nd = q.y[0].ndim;
    if (nd < 2 || q.x[0].ndim != nd || q.x[1].ndim != nd || (q.x[2].data && q.x[2].ndim != nd)) return LC_K_UNSUPPORTED;
    if (q.x[0].dtype != LC_K_REAL || q.x[1].dtype != LC_K_REAL || q.y[0].dtype != LC_K_REAL) return LC_K_UNSUPPORTED;
    if (view_numel(&q.y[0]) == 0) return LC_K_OK;
    matmul_job w = {
        .q = &q, .m = q.y[0].dim[nd - 2], .n = q.y[0].dim[nd - 1], .k = q.x[0].dim[nd - 1], .nb = nd - 2, .batch = 1};
    for (int i = 0; i < w.nb; i++) w.batch *= q.y[0].dim[i];
    fold_batches(&q, &w);
    double flops = (double)w.m * (double)w.n * (double)w.k;
    if (w.batch >= 2 * k->host->threads() || (w.batch > 1 && flops < 1e6)) {
        k->host->parallel(w.batch, (int64_t)(2e4 / (flops + 1)) + 1, products, &w);
    } else {
        w.inner = k->host;
        products(&w, 0, w.batch, 0);
    }
    return w.failed ? LC_K_NOMEM : LC_K_OK;
}

/* x += alpha a b: a product that adds to itself. */
int K(addmm_)(const lc_kargs *k) {
    lc_kargs q = *k;
    q.n_x = 3, q.n_y = 1;
    q.x[0] = k->x[1], q.x[1] = k->x[2], q.x[2] = q.y[0] = k->x[0];
    return K(matmul)(&q);
}
