/* projections.c: the op `projections`, several linear layers of one input with their adapters, made of calls of `linear`, and its
 * gradient for x, made of products. */
#include "gemm.h"

int K(linear)(const lc_kargs *k);
size_t K(linear_work)(const lc_kargs *k);

enum { PARTS = 3, W = 1, A = 4, B = 7, ADD = 10, LOW = 3 };

/* Columns [from, from + n) of a contiguous v as a matrix; of an absent one nothing but data is set. */
static lc_view matrix(const lc_view *v, int64_t rows, int64_t from, int64_t n) {
    if (!v->data) return (lc_view){.data = NULL};
    lc_view m = {.data = (char *)gemm_at(v->data, v->dtype, from), .dtype = v->dtype, .ndim = 2};
    m.dim[0] = rows, m.dim[1] = n;
    m.stride[0] = v->dim[v->ndim - 1], m.stride[1] = 1;
    return m;
}

/* Calls of linear, in this order for each weight: low_i = x a_i^T; y_i = scale_i low_i b_i^T + add; y_i = x w_i^T + y_i. Without an
 * adapter only y_i = x w_i^T + add. Returns false for a step that there is not. */
static int linear_step(const lc_kargs *k, int i, int step, lc_kargs *q, double *f) {
    const lc_view *w = &k->x[W + i], *a = &k->x[A + i], *b = &k->x[B + i], *y = &k->y[i];
    const int64_t rows = view_rows(&k->x[0]);
    int64_t at = 0;
    if (!w->data || (!a->data && step < 2)) return 0;
    for (int j = 0; j < i; j++) at += k->x[A + j].data ? k->x[A + j].dim[0] : 0;
    *q = *k;
    q->n_x = 4, q->n_y = 1, q->f = f, *f = 1;
    q->x[2].data = q->x[3].data = NULL;
    lc_view low = {.data = NULL}, out = matrix(y, rows, 0, w->dim[0]), add = matrix(&k->x[ADD], rows, 0, w->dim[0]);
    if (a->data) low = matrix(&k->y[LOW], rows, at, a->dim[0]);
    q->x[0] = matrix(&k->x[0], rows, 0, w->dim[1]);
    if (i == 0 && k->x[ADD].data && (step == 1 || !a->data)) q->x[3] = add;
    if (step == 0) q->x[1] = *a, q->y[0] = low;
    if (step == 1) q->x[0] = low, q->x[1] = *b, q->y[0] = out, *f = k->f[i];
    if (step == 2) {
        q->x[1] = *w, q->y[0] = out;
        if (a->data) q->x[3] = out;
    }
    for (int j = 0; j < 4; j++) q->prepared[j] = NULL;
    if (step == 2) q->prepared[1] = k->prepared[W + i];
    return 1;
}

size_t K(projections_work)(const lc_kargs *k) {
    size_t most = 0;
    lc_kargs q;
    double f;
    for (int s = 0; s < 3 * PARTS; s++) {
        if (!linear_step(k, s / 3, s % 3, &q, &f)) continue;
        size_t bytes = K(linear_work)(&q);
        if (bytes > most) most = bytes;
    }
    return most;
}

int K(projections)(const lc_kargs *k) {
    lc_kargs q;
    double f;
    for (int s = 0; s < 3 * PARTS; s++) {
        if (!linear_step(k, s / 3, s % 3, &q, &f)) continue;
        int status = K(linear)(&q);
        if (status) return status;
    }
    return LC_K_OK;
}

/* ---- gradient -------------------------------------------------------------------------------------------------- */

/* c [m, n], rows ldc apart, = alpha a [m, k] b [k, n], b given by rows, + beta c */
static int product(const lc_host *host, int64_t m, int64_t n, int64_t k, double alpha, const real *a, int64_t lda, const lc_view *b,
                   double beta, real *c, int64_t ldc) {
    return K(gemm)(host, m, n, k, (real)alpha, a, lda, 1, b->data, n, 1, (real)beta, c, ldc);
}

/* g_i [rows, out_i], w_i [out_i, in], a_i [r_i, in], b_i [out_i, r_i] -> gx [rows, in], low [rows, sum of r_i] */
int K(projections_backward)(const lc_kargs *k) {
    real *gx = k->y[0].data, *low = k->y[1].data;
    const int64_t rank = low ? k->y[1].dim[1] : 0, width = gx ? k->y[0].dim[1] : 0;
    int64_t at = 0;
    int status = 0, begun = 0;
    for (int i = 0; i < PARTS && !status; i++) {
        const lc_view *g = &k->x[i], *w = &k->x[3 + i], *a = &k->x[6 + i], *b = &k->x[9 + i];
        if (!g->data || !g->dim[0]) continue;
        const int64_t rows = g->dim[0], out = g->dim[1], r = b->data ? b->dim[1] : 0;
        for (int j = 0; j < 4; j++) {
            const lc_view *v = &k->x[3 * j + i];
            if (v->data && v->dtype != LC_K_REAL) return LC_K_UNSUPPORTED;
        }
        if (r) status = product(k->host, rows, r, out, k->f[i], g->data, out, b, 0, low + at, rank);
        if (gx && r && !status) status = product(k->host, rows, width, r, 1, low + at, rank, a, begun, gx, width), begun = 1;
        if (gx && !status) status = product(k->host, rows, width, out, 1, g->data, out, w, begun, gx, width), begun = 1;
        at += r;
    }
    return status;
}

/* ga [sum of r_i, in] += g_low^T x; gb_i [out_i, r_i] += scale_i g_i^T low_i */
int K(projections_grads_)(const lc_kargs *k) {
    const lc_view *x = &k->x[4], *low = &k->x[5], *g_low = &k->x[6], *ga = &k->x[0];
    const int64_t rows = x->dim[0], in = x->dim[1], rank = ga->dim[0];
    for (int i = 0; i < 10; i++)
        if (k->x[i].data && k->x[i].dtype != LC_K_REAL) return LC_K_UNSUPPORTED;
    if (!rows) return LC_K_OK;
    int status = K(gemm)(k->host, rank, in, rows, 1, g_low->data, 1, g_low->dim[1], x->data, in, 1, 1, ga->data, in);
    for (int64_t i = 0, at = 0; i < PARTS && !status; i++) {
        const lc_view *gb = &k->x[1 + i], *g = &k->x[7 + i];
        if (!gb->data) continue;
        const int64_t out = gb->dim[0], r = gb->dim[1];
        status = K(gemm)(k->host, out, r, rows, (real)k->f[i], g->data, 1, out, (const real *)low->data + at, low->dim[1], 1, 1, gb->data, r);
        at += r;
    }
    return status;
}
