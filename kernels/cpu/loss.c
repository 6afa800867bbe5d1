/* loss.c: mean squared error, cross-entropy, and cross-entropy straight from hidden states and the output matrix, which
 * never holds all logits: rows go in chunks, the vocabulary in tiles, and row maximum, sum and gradient are carried
 * from tile to tile as in online softmax. Rows whose label is `ignore` are left out before anything is computed. The
 * mean over no rows is 0. Option plain_loss selects the twins: double arithmetic, one row at a time. */
#include "gemm.h"

enum { MSE_BLOCK = 1 << 14 };

static inline int64_t label_at(const lc_view *v, int64_t i) {
    return v->dtype == LC_K_I64 ? ((const int64_t *)v->data)[i] : ((const int32_t *)v->data)[i];
}

/* Counts the labels that are not `ignore`; -1 when one is outside [0, v), which the fault then names. */
static int64_t count_labels(const lc_kargs *k, const lc_view *labels, int64_t v, int64_t ignore) {
    int64_t n = view_numel(labels), count = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t l = label_at(labels, i);
        if (l == ignore) continue;
        if (l < 0 || l >= v) {
            if (k->fault) *k->fault = (lc_fault){l, v, i};
            return -1;
        }
        count++;
    }
    return count;
}

static inline void put_scalar(const lc_view *y, double value) {
    real r = (real)value;
    if (y->data) row_from_real(y->dtype, &r, y->data, 1);
}

/* ---- mean squared error ---------------------------------------------------------------------------------------- */

/* Rows in blocks of a fixed size, each block's sum in double: the result does not depend on the threads. */
static int64_t mse_rows(int64_t n) { return LC_MAX(MSE_BLOCK / LC_MAX(n, 1), 1); }

size_t K(mse_loss_work)(const lc_kargs *k) {
    const lc_view *a = &k->x[0];
    int64_t per = mse_rows(a->ndim ? a->dim[a->ndim - 1] : 1);
    return (size_t)((view_rows(a) + per - 1) / per) * sizeof(double);
}

/* With y[1]: also 2 f[0] (a - b) / numel there. */
static void mse_blocks(void *ctx, int64_t begin, int64_t end, int thread) {
    const lc_kargs *k = ctx;
    const lc_view *a = &k->x[0], *b = &k->x[1], *slope = &k->y[1];
    const real each = (real)(2 * k->f[0] / (double)view_numel(a));
    const int64_t n = a->ndim ? a->dim[a->ndim - 1] : 1, per = mse_rows(n), rows = view_rows(a);
    (void)thread;
    for (int64_t block = begin; block < end; block++) {
        double sum[8] = {0}, rest = 0;
        for (int64_t r = block * per; r < LC_MIN((block + 1) * per, rows); r++) {
            const real *pa = (const real *)a->data + view_row_offset(a, r),
                       *pb = (const real *)b->data + view_row_offset(b, r);
            int64_t i = 0;
            for (; i + 8 <= n; i += 8)
                for (int l = 0; l < 8; l++) {
                    double d = (double)(pa[i + l] - pb[i + l]);
                    sum[l] += d * d;
                }
            for (; i < n; i++) rest += (double)(pa[i] - pb[i]) * (double)(pa[i] - pb[i]);
            if (!slope->data) continue;
            real *restrict to = (real *)slope->data + view_row_offset(slope, r);
            for (i = 0; i < n; i++) to[i] = each * (pa[i] - pb[i]);
        }
        for (int l = 0; l < 8; l++) rest += sum[l];
        ((double *)k->work)[block] = rest;
    }
}

static int mse(const lc_kargs *k, double scale) {
    int64_t blocks = (int64_t)(K(mse_loss_work)(k) / sizeof(double));
    double sum = 0, n = (double)view_numel(&k->x[0]);
    k->host->parallel(blocks, 4, mse_blocks, (void *)k);
    for (int64_t i = 0; i < blocks; i++) sum += ((double *)k->work)[i];
    put_scalar(&k->y[0], scale * sum / n);
    return LC_K_OK;
}

int K(mse_loss)(const lc_kargs *k) { return mse(k, 1); }
size_t K(mse_loss_slope_work)(const lc_kargs *k) { return K(mse_loss_work)(k); }
int K(mse_loss_slope)(const lc_kargs *k) { return mse(k, k->f[0]); }

/* ga = 2 g (a - b) / numel, gb = -ga */
static void mse_gradient(void *ctx, int64_t begin, int64_t end, int thread) {
    const lc_kargs *k = ctx;
    const lc_view *a = &k->x[1], *b = &k->x[2], *ya = &k->y[0], *yb = &k->y[1];
    const int64_t n = a->ndim ? a->dim[a->ndim - 1] : 1;
    const real scale = (real)(2 * scalar_or(&k->x[0], 1) / (double)view_numel(a));
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        const real *restrict pa = (const real *)a->data + view_row_offset(a, r);
        const real *restrict pb = (const real *)b->data + view_row_offset(b, r);
        real *restrict ga = ya->data ? (real *)ya->data + view_row_offset(ya, r) : NULL;
        real *restrict gb = yb->data ? (real *)yb->data + view_row_offset(yb, r) : NULL;
        if (ga)
            for (int64_t i = 0; i < n; i++) ga[i] = scale * (pa[i] - pb[i]);
        if (gb)
            for (int64_t i = 0; i < n; i++) gb[i] = scale * (pb[i] - pa[i]);
    }
}

int K(mse_loss_backward)(const lc_kargs *k) {
    const lc_view *a = &k->x[1];
    int64_t n = a->ndim ? a->dim[a->ndim - 1] : 1;
    k->host->parallel(view_rows(a), 1 + 8192 / (n + 1), mse_gradient, (void *)k);
    return LC_K_OK;
}

/* ---- rows of logits -------------------------------------------------------------------------------------------- */

static real row_max(const real *x, int64_t n) {
    int64_t i = 0;
    real m = -INFINITY;
    vreal a = vset(m), b = a;
    for (; i + 2 * VL <= n; i += 2 * VL) a = vmax(a, vload(x + i)), b = vmax(b, vload(x + i + VL));
    m = vhmax(vmax(a, b));
    for (; i < n; i++) m = x[i] > m ? x[i] : m;
    return m;
}

/* Sum of scale * exp(x - shift); with `out`, the terms are left there. Pieces meet in double. */
static inline __attribute__((always_inline)) double exp_terms(const real *x, int64_t n, real shift, real scale,
                                                              real *out) {
    enum { PIECE = 1024 };
    double total = 0;
    for (int64_t at = 0; at < n; at += PIECE) {
        int64_t end = LC_MIN(at + PIECE, n), i = at;
        vreal s = {0};
        for (; i + VL <= end; i += VL) {
            vreal e = vexp(vload(x + i) - shift) * scale;
            if (out) vstore(out + i, e);
            s += e;
        }
        for (; i < end; i++) {
            real e = rexp(x[i] - shift) * scale;
            if (out) out[i] = e;
            total += (double)e;
        }
        for (int l = 0; l < VL; l++) total += (double)s[l];
    }
    return total;
}

/* ---- cross-entropy --------------------------------------------------------------------------------------------- */

/* work: each row's loss, double [n]. */
size_t K(cross_entropy_work)(const lc_kargs *k) { return (size_t)view_numel(&k->x[1]) * sizeof(double); }

static void ce_rows(void *ctx, int64_t begin, int64_t end, int thread) {
    const lc_kargs *k = ctx;
    const int64_t v = k->x[0].dim[k->x[0].ndim - 1];
    const int plain = k->host->option(LC_OPTION_PLAIN_LOSS);
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        const real *x = (const real *)k->x[0].data + view_row_offset(&k->x[0], r);
        int64_t label = label_at(&k->x[1], r);
        double lse = 0;
        if (label != k->i[0] && plain) {
            double m = -INFINITY, s = 0;
            for (int64_t j = 0; j < v; j++) m = fmax(m, (double)x[j]);
            for (int64_t j = 0; j < v; j++) s += exp((double)x[j] - m);
            lse = m + log(s);
        } else if (label != k->i[0]) {
            real m = row_max(x, v);
            lse = (double)m + log(exp_terms(x, v, m, 1, NULL));
        }
        ((double *)k->work)[r] = label == k->i[0] ? 0 : lse - (double)x[label];
        if (k->y[1].data) ((real *)k->y[1].data)[r] = (real)lse;
    }
}

/* logits [n, v]  labels [n]  ->  loss [], lse [n] (0 where ignored) */
int K(cross_entropy)(const lc_kargs *k) {
    const int64_t n = view_numel(&k->x[1]), v = k->x[0].dim[k->x[0].ndim - 1];
    int64_t count = count_labels(k, &k->x[1], v, k->i[0]);
    double sum = 0;
    if (count < 0) return LC_K_RANGE;
    k->host->parallel(n, 1 + 4096 / (v + 1), ce_rows, (void *)k);
    for (int64_t i = 0; i < n; i++) sum += ((double *)k->work)[i];
    put_scalar(&k->y[0], count ? sum / (double)count : 0);
    return LC_K_OK;
}

typedef struct ce_job {
    const lc_kargs *k;
    double scale;
} ce_job;

/* g_logits = g / count (softmax - onehot), 0 where ignored */
static void ce_gradient(void *ctx, int64_t begin, int64_t end, int thread) {
    const ce_job *w = ctx;
    const lc_kargs *k = w->k;
    const int64_t v = k->x[1].dim[k->x[1].ndim - 1];
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        const real *x = (const real *)k->x[1].data + view_row_offset(&k->x[1], r),
                   lse = ((const real *)k->x[3].data)[r];
        real *y = (real *)k->y[0].data + view_row_offset(&k->y[0], r);
        int64_t label = label_at(&k->x[2], r);
        if (label == k->i[0]) {
            memset(y, 0, (size_t)v * sizeof(real));
        } else {
            exp_terms(x, v, lse, (real)w->scale, y);
            y[label] -= (real)w->scale;
        }
    }
}

int K(cross_entropy_backward)(const lc_kargs *k) {
    const int64_t n = view_numel(&k->x[2]), v = k->x[1].dim[k->x[1].ndim - 1];
    int64_t count = count_labels(k, &k->x[2], v, k->i[0]);
    if (count < 0) return LC_K_RANGE;
    ce_job w = {k, count ? scalar_or(&k->x[0], 1) / (double)count : 0};
    k->host->parallel(n, 1 + 4096 / (v + 1), ce_gradient, &w);
    return LC_K_OK;
}

/* ---- linear cross-entropy -------------------------------------------------------------------------------------- */

/* One chunk of rows: x [rows, d] (gathered), logits of one tile [rows, tile], gradient before the division by the sum
 * [rows, d], the tile of w as reals [tile, d] (when w is of another dtype and the gradient is wanted); per row the
 * running maximum, sum and label's logit. index [n]: which rows of the input count. */
typedef struct lce {
    const lc_kargs *k;
    int64_t n, d, v, rows, tile, count;
    int grad, widen, failed;
    real *x, *logits, *acc, *w, *max;
    double *sum, *target;
    int32_t *arg;
    int64_t *index;
    size_t bytes;
    /* the part at hand */
    const real *px;
    real *pacc;
    int64_t r0, m, v0, vn;
} lce;

static void *carve(lce *p, size_t bytes) {
    void *at = p->k->work ? (char *)p->k->work + p->bytes : NULL;
    p->bytes += (bytes + 63) & ~(size_t)63;
    return at;
}

static lce plan_lce(const lc_kargs *k) {
    lce p = {.k = k, .n = view_numel(&k->x[2]), .v = k->x[1].dim[0], .d = k->x[1].dim[1]};
    p.grad = k->i[1] && k->y[3].data;
    p.widen = p.grad && k->x[1].dtype != LC_K_REAL;
    p.tile = LC_MIN(LC_MAX(LC_MIN((1 << 20) / LC_MAX(p.d, 1), 1024) / 64 * 64, 128), p.v);
    p.rows = LC_MIN(p.n, LC_MAX((1 << 20) / LC_MAX(LC_MAX(p.d, p.tile), 1), 64));
    p.index = carve(&p, (size_t)p.n * sizeof(int64_t));
    p.sum = carve(&p, (size_t)p.rows * sizeof(double));
    p.target = carve(&p, (size_t)p.rows * sizeof(double));
    p.max = carve(&p, (size_t)p.rows * sizeof(real));
    p.arg = carve(&p, (size_t)p.rows * sizeof(int32_t));
    p.x = carve(&p, (size_t)(p.rows * p.d) * sizeof(real));
    p.logits = carve(&p, (size_t)(p.rows * p.tile) * sizeof(real));
    if (p.grad) p.acc = carve(&p, (size_t)(p.rows * p.d) * sizeof(real));
    if (p.widen) p.w = carve(&p, (size_t)(p.tile * p.d) * sizeof(real));
    return p;
}

size_t K(linear_cross_entropy_work)(const lc_kargs *k) {
    lc_kargs q = *k;
    q.work = NULL;
    return plan_lce(&q).bytes;
}

static void lce_gather(void *ctx, int64_t begin, int64_t end, int thread) {
    const lce *p = ctx;
    const lc_view *x = &p->k->x[0];
    (void)thread;
    for (int64_t r = begin; r < end; r++)
        row_to_real(x->dtype, gemm_at(x->data, x->dtype, view_row_offset(x, p->index[p->r0 + r])), p->x + r * p->d,
                    p->d);
}

static void lce_widen(void *ctx, int64_t begin, int64_t end, int thread) {
    const lce *p = ctx;
    const lc_view *w = &p->k->x[1];
    (void)thread;
    for (int64_t j = begin; j < end; j++)
        row_to_real(w->dtype, gemm_at(w->data, w->dtype, (p->v0 + j) * w->stride[0]), p->w + j * p->d, p->d);
}

/* Takes one tile of logits into each row's maximum, sum, argmax and label's logit; leaves exp(logit - maximum). */
static void lce_softmax(void *ctx, int64_t begin, int64_t end, int thread) {
    const lce *p = ctx;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        real *x = p->logits + r * p->vn, old = p->v0 ? p->max[r] : -INFINITY, m = row_max(x, p->vn);
        int64_t label = label_at(&p->k->x[2], p->index[p->r0 + r]) - p->v0;
        if (label >= 0 && label < p->vn) p->target[r] = (double)x[label];
        if (m > old || !p->v0) {
            int64_t j = 0;
            while (j + 1 < p->vn && x[j] != m) j++;
            p->arg[r] = (int32_t)(p->v0 + j);
            p->max[r] = m;
            if (p->v0) {
                real scale = rexp(old - m), *acc = p->pacc + r * p->d;
                p->sum[r] *= (double)scale;
                for (int64_t i = 0; p->grad && i < p->d; i++) acc[i] *= scale;
            } else {
                p->sum[r] = 0;
            }
        }
        p->sum[r] += p->grad ? exp_terms(x, p->vn, p->max[r], 1, x) : exp_terms(x, p->vn, p->max[r], 1, NULL);
    }
}

/* Gradient of the mean: (acc / sum - w[label]) / count. */
static void lce_finish(void *ctx, int64_t begin, int64_t end, int thread) {
    const lce *p = ctx;
    const lc_view *w = &p->k->x[1], *y = &p->k->y[3];
    const real each = (real)(1 / (double)p->count);
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        int64_t at = p->index[p->r0 + r], label = label_at(&p->k->x[2], at);
        real *restrict acc = p->pacc + r * p->d, *restrict row = p->x + r * p->d, s = (real)(1 / p->sum[r]);
        row_to_real(w->dtype, gemm_at(w->data, w->dtype, label * w->stride[0]), row, p->d);
        for (int64_t i = 0; i < p->d; i++) acc[i] = (acc[i] * s - row[i]) * each;
        row_from_real(y->dtype, acc, (char *)gemm_at(y->data, y->dtype, view_row_offset(y, at)), p->d);
    }
}

/* Rows [r0, r0 + m) of those that count, over the whole vocabulary. Returns a status; adds their losses to *total. */
static int lce_chunk(lce *p, double *total) {
    const lc_kargs *k = p->k;
    const lc_view *w = &k->x[1];
    k->host->parallel(p->m, 16, lce_gather, p);
    p->px = p->x, p->pacc = p->acc;
    for (p->v0 = 0; p->v0 < p->v; p->v0 += p->tile) {
        p->vn = LC_MIN(p->tile, p->v - p->v0);
        gemm_call g = {.m = p->m,
                       .n = p->vn,
                       .k = p->d,
                       .a = p->px,
                       .a_dtype = LC_K_REAL,
                       .a_rs = p->d,
                       .a_cs = 1,
                       .b_rs = 1,
                       .b = gemm_at(w->data, w->dtype, p->v0 * w->stride[0]),
                       .b_dtype = w->dtype,
                       .b_cs = w->stride[0],
                       .alpha = 1,
                       .c = p->logits,
                       .ldc = p->vn};
        if (p->widen) {
            k->host->parallel(p->vn, 16, lce_widen, p);
            g.b = p->w, g.b_dtype = LC_K_REAL, g.b_cs = p->d;
        }
        int status = K(gemm_run)(k->host, &g);
        if (status) return status;
        k->host->parallel(p->m, 8, lce_softmax, p);
        if (!p->grad) continue;
        gemm_call h = {.m = p->m,
                       .n = p->d,
                       .k = p->vn,
                       .a = p->logits,
                       .a_dtype = LC_K_REAL,
                       .a_rs = p->vn,
                       .a_cs = 1,
                       .b = g.b,
                       .b_dtype = LC_K_REAL,
                       .b_rs = g.b_cs,
                       .b_cs = 1,
                       .alpha = 1,
                       .beta = 1,
                       .add = p->v0 ? p->pacc : NULL,
                       .ld_add = p->d,
                       .c = p->pacc,
                       .ldc = p->d};
        status = K(gemm_run)(k->host, &h);
        if (status) return status;
    }
    for (int64_t r = 0; r < p->m; r++) {
        int64_t at = p->index[p->r0 + r];
        double loss = (double)p->max[r] + log(p->sum[r]) - p->target[r];
        real rounded = (real)loss;
        *total += loss;
        if (k->y[1].data) row_from_real(k->y[1].dtype, &rounded, (char *)gemm_at(k->y[1].data, k->y[1].dtype, at), 1);
        if (k->y[2].data) ((int32_t *)k->y[2].data)[at] = p->arg[r];
    }
    if (p->grad) k->host->parallel(p->m, 16, lce_finish, p);
    return LC_K_OK;
}

/* The twin: rows [begin, end) of the chunk, all in double; leaves each row's loss in sum. scratch: logits [v],
 * gradient, x, w row [d]. */
static void lce_plain(void *ctx, int64_t begin, int64_t end, int thread) {
    lce *p = ctx;
    const lc_kargs *k = p->k;
    const lc_view *x = &k->x[0], *w = &k->x[1], *y = &k->y[3];
    const int64_t d = p->d, v = p->v;
    double *logits = lc_cpu_scratch((size_t)(v + 3 * d + 1) * sizeof(double)), *g = logits + v;
    real *px = (real *)(g + d), *pw = px + d;
    (void)thread;
    if (!logits) p->failed = 1;
    for (int64_t r = begin; r < end && logits; r++) {
        int64_t at = p->index[p->r0 + r], label = label_at(&k->x[2], at), best = 0;
        double sum = 0;
        row_to_real(x->dtype, gemm_at(x->data, x->dtype, view_row_offset(x, at)), px, d);
        for (int64_t j = 0; j < v; j++) {
            double s = 0;
            row_to_real(w->dtype, gemm_at(w->data, w->dtype, j * w->stride[0]), pw, d);
            for (int64_t i = 0; i < d; i++) s += (double)px[i] * (double)pw[i];
            logits[j] = s;
            if (s > logits[best]) best = j;
        }
        double max = logits[best];
        for (int64_t j = 0; j < v; j++) sum += exp(logits[j] - max);
        real loss = (real)(max + log(sum) - logits[label]);
        if (k->y[1].data) row_from_real(k->y[1].dtype, &loss, (char *)gemm_at(k->y[1].data, k->y[1].dtype, at), 1);
        if (k->y[2].data) ((int32_t *)k->y[2].data)[at] = (int32_t)best;
        p->sum[r] = max + log(sum) - logits[label];
        if (!p->grad) continue;
        memset(g, 0, (size_t)d * sizeof(double));
        for (int64_t j = 0; j < v; j++) {
            double q = exp(logits[j] - max) / sum - (j == label ? 1 : 0);
            row_to_real(w->dtype, gemm_at(w->data, w->dtype, j * w->stride[0]), pw, d);
            for (int64_t i = 0; i < d; i++) g[i] += q * (double)pw[i];
        }
        for (int64_t i = 0; i < d; i++) px[i] = (real)(g[i] / (double)p->count);
        row_from_real(y->dtype, px, (char *)gemm_at(y->data, y->dtype, view_row_offset(y, at)), d);
    }
}

/* x [n, d]  w [v, d]  labels [n]  ->  loss [], losses [n] and argmax [n] (0 where ignored), gradient [n, d] */
int K(linear_cross_entropy)(const lc_kargs *k) {
    lce p = plan_lce(k);
    const lc_view *x = &k->x[0], *y = k->y;
    double total = 0;
    p.count = count_labels(k, &k->x[2], p.v, k->i[0]);
    if (p.count < 0) return LC_K_RANGE;
    if (y[1].data) memset(y[1].data, 0, (size_t)(view_numel(&y[1]) * lc_dtype_traits(y[1].dtype)->bytes));
    if (y[2].data) memset(y[2].data, 0, (size_t)view_numel(&y[2]) * sizeof(int32_t));
    if (y[3].data && (p.count < p.n || !p.grad))
        memset(y[3].data, 0, (size_t)(view_numel(x) * lc_dtype_traits(x->dtype)->bytes));
    int64_t at = 0;
    for (int64_t i = 0; i < p.n; i++)
        if (label_at(&k->x[2], i) != k->i[0]) p.index[at++] = i;
    for (p.r0 = 0; p.r0 < p.count; p.r0 += p.rows) {
        p.m = LC_MIN(p.rows, p.count - p.r0);
        if (k->host->option(LC_OPTION_PLAIN_LOSS)) {
            k->host->parallel(p.m, 1, lce_plain, &p);
            for (int64_t r = 0; r < p.m; r++) total += p.sum[r];
            if (p.failed) return LC_K_NOMEM;
            continue;
        }
        int status = lce_chunk(&p, &total);
        if (status) return status;
    }
    put_scalar(&y[0], p.count ? total / (double)p.count : 0);
    return LC_K_OK;
}
