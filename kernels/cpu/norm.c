/* norm.c: RMSNorm and rotary position embedding, with their gradients. Rows are spread over the threads; every sum is
 * made in a fixed order, whatever the number of threads: over a row in vector lanes that meet in double, over rows in
 * blocks that meet in double. */
#include "simd.h"

static inline real *row_at(const lc_view *v, int64_t r) { return (real *)v->data + view_row_offset(v, r); }
static inline int64_t grain_of(int64_t row) { return 1 + 8192 / (row + 1); }

static double sum_double(vreal a, vreal b, vreal c, vreal d) {
    double s = 0;
    for (int i = 0; i < VL; i++) s += ((double)a[i] + (double)b[i]) + ((double)c[i] + (double)d[i]);
    return s;
}

/* sum of a b c over n; c NULL: of a b. */
static inline __attribute__((always_inline)) double dot3(const real *a, const real *b, const real *c, int64_t n) {
    vreal s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    int64_t i = 0;
#define TERM(o)                                                                                                        \
    (c ? vload(a + i + (o)*VL) * vload(b + i + (o)*VL) * vload(c + i + (o)*VL)                                         \
       : vload(a + i + (o)*VL) * vload(b + i + (o)*VL))
    for (; i + 4 * VL <= n; i += 4 * VL) s0 += TERM(0), s1 += TERM(1), s2 += TERM(2), s3 += TERM(3);
    for (; i + VL <= n; i += VL) s0 += TERM(0);
#undef TERM
    double s = sum_double(s0, s1, s2, s3);
    for (; i < n; i++) s += (double)a[i] * (double)b[i] * (c ? (double)c[i] : 1);
    return s;
}

/* ---- RMSNorm --------------------------------------------------------------------------------------------------- */

/* x [rows, n]  w [n]  ->  y [rows, n], rstd [rows] */
static void norm_rows(void *ctx, int64_t begin, int64_t end, int thread) {
    const lc_kargs *k = ctx;
    const lc_view *x = &k->x[0];
    const int64_t n = x->dim[x->ndim - 1];
    const real *restrict w = k->x[1].data;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        const real *restrict px = row_at(x, r);
        real *restrict py = row_at(&k->y[0], r);
        real rstd = (real)(1 / sqrt(dot3(px, px, NULL, n) / (double)n + k->f[0]));
        for (int64_t i = 0; i < n; i++) py[i] = px[i] * rstd * w[i];
        if (k->y[1].data) ((real *)k->y[1].data)[r] = rstd;
    }
}

int K(rms_norm)(const lc_kargs *k) {
    const lc_view *x = &k->x[0];
    int64_t rows = view_rows(x), n = x->dim[x->ndim - 1];
    if (n > 0) k->host->parallel(rows, grain_of(n), norm_rows, (void *)k);
    return LC_K_OK;
}

/* gx = rstd (g w - x rstd^2 mean(g w x)) + add */
static void norm_gx(void *ctx, int64_t begin, int64_t end, int thread) {
    const lc_kargs *k = ctx;
    const lc_view *x = &k->x[1];
    const int64_t n = x->dim[x->ndim - 1];
    const real *restrict w = k->x[2].data, *rstds = k->x[3].data;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        const real *restrict pg = row_at(&k->x[0], r), *restrict px = row_at(x, r);
        real *restrict out = row_at(&k->y[0], r), rstd = rstds[r];
        real pull = (real)(dot3(pg, w, px, n) / (double)n * (double)rstd * (double)rstd);
        for (int64_t i = 0; i < n; i++) out[i] = rstd * (pg[i] * w[i] - px[i] * pull);
        if (!k->x[4].data) continue;
        const real *restrict add = row_at(&k->x[4], r);
        for (int64_t i = 0; i < n; i++) out[i] += add[i];
    }
}

/* gw [n] = sum over rows of g x rstd; threads take columns. */
static void norm_gw(void *ctx, int64_t begin, int64_t end, int thread) {
    enum { WIDTH = 128, BLOCK = 32 };
    const lc_kargs *k = ctx;
    const int64_t rows = view_rows(&k->x[1]);
    const real *rstds = k->x[3].data;
    (void)thread;
    for (int64_t c = begin; c < end; c += WIDTH) {
        const int64_t n = LC_MIN(end - c, WIDTH);
        double total[WIDTH] = {0};
        for (int64_t r0 = 0; r0 < rows; r0 += BLOCK) {
            real part[WIDTH] = {0};
            for (int64_t r = r0; r < LC_MIN(r0 + BLOCK, rows); r++) {
                const real *restrict pg = row_at(&k->x[0], r) + c, *restrict px = row_at(&k->x[1], r) + c,
                                     rstd = rstds[r];
                for (int64_t i = 0; i < n; i++) part[i] += pg[i] * (px[i] * rstd);
            }
            for (int64_t i = 0; i < n; i++) total[i] += (double)part[i];
        }
        for (int64_t i = 0; i < n; i++) ((real *)k->y[1].data)[c + i] = (real)total[i];
    }
}

int K(rms_norm_backward)(const lc_kargs *k) {
    const lc_view *x = &k->x[1];
    int64_t rows = view_rows(x), n = x->dim[x->ndim - 1];
    if (n > 0 && k->y[0].data) k->host->parallel(rows, grain_of(n), norm_gx, (void *)k);
    if (n > 0 && k->y[1].data) k->host->parallel(n, 64, norm_gw, (void *)k);
    return LC_K_OK;
}

/* ---- rotation -------------------------------------------------------------------------------------------------- */

static inline double number_at(const lc_view *v, int64_t i) {
    switch (v->dtype) {
    case LC_K_I32: return ((const int32_t *)v->data)[i];
    case LC_K_I64: return (double)((const int64_t *)v->data)[i];
    case LC_K_F64: return ((const double *)v->data)[i];
    default: return ((const float *)v->data)[i];
    }
}

/* pos [n]  inv_freq [half]  ->  cos, sin [n, half]; the angle is a double, so long contexts lose nothing. */
static void table_rows(void *ctx, int64_t begin, int64_t end, int thread) {
    const lc_kargs *k = ctx;
    const int64_t half = k->x[1].dim[0];
    real *c = k->y[0].data, *s = k->y[1].data;
    (void)thread;
    for (int64_t r = begin; r < end; r++)
        for (int64_t i = 0; i < half; i++) {
            double angle = number_at(&k->x[0], r) * number_at(&k->x[1], i);
            c[r * half + i] = (real)cos(angle);
            s[r * half + i] = (real)sin(angle);
        }
}

int K(rope_table)(const lc_kargs *k) {
    if (k->y[0].dtype != LC_K_REAL || k->x[1].ndim != 1) return LC_K_UNSUPPORTED;
    k->host->parallel(view_numel(&k->x[0]), 64, table_rows, (void *)k);
    return LC_K_OK;
}

/* x [b, h, t, d]  cos, sin [t, d/2] or [b, t, d/2]  ->  y, which lies as [b, t, h, d]; r counts (b, t). */
static void rope_rows(void *ctx, int64_t begin, int64_t end, int thread) {
    const lc_kargs *k = ctx;
    const lc_view *x = &k->x[0], *y = &k->y[0], *c = &k->x[1], *s = &k->x[2];
    const int64_t heads = x->dim[1], len = x->dim[2], half = x->dim[3] / 2;
    const real sign = k->i[0] ? -1 : 1;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        const int64_t b = r / len, t = r % len;
        const real *restrict pc =
            (const real *)c->data + (c->ndim == 3 ? b * c->stride[0] : 0) + t * c->stride[c->ndim - 2];
        const real *restrict ps =
            (const real *)s->data + (s->ndim == 3 ? b * s->stride[0] : 0) + t * s->stride[s->ndim - 2];
        for (int64_t h = 0; h < heads; h++) {
            const real *restrict px = (const real *)x->data + b * x->stride[0] + h * x->stride[1] + t * x->stride[2];
            real *restrict py = (real *)y->data + b * y->stride[0] + h * y->stride[1] + t * y->stride[2];
            for (int64_t i = 0; i < half; i++) {
                real low = px[i], high = px[i + half], si = ps[i] * sign;
                py[i] = low * pc[i] - high * si;
                py[i + half] = high * pc[i] + low * si;
            }
        }
    }
}

int K(rope)(const lc_kargs *k) {
    const lc_view *x = &k->x[0];
    if (x->ndim != 4 || x->dim[3] % 2 || k->x[1].ndim < 2 || k->x[1].ndim > 3) return LC_K_UNSUPPORTED;
    k->host->parallel(x->dim[0] * x->dim[2], grain_of(x->dim[1] * x->dim[3]), rope_rows, (void *)k);
    return LC_K_OK;
}

/* x, x2 [b, h, t, d]: rope of each */
int K(rope_pair)(const lc_kargs *k) {
    for (int i = 0; i < 2; i++) {
        lc_kargs q = *k;
        q.x[0] = k->x[i], q.x[1] = k->x[2], q.x[2] = k->x[3], q.y[0] = k->y[i];
        int status = K(rope)(&q);
        if (status) return status;
    }
    return LC_K_OK;
}
