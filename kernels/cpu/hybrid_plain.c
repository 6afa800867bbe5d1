/* hybrid_plain.c: hybrid attention and its gradient as the formula reads: every weight of every pair, in double, one
 * thread. The twin that the chunked kernels are compared with (option plain_hybrid). Shapes as in the op table. */
#include "hybrid.h"

/* x [F] and a [F] of one token: what enters the map and its features before the clamp. For map none both are the ready
 * row. */
static void token_features(const hybrid *a, int key, int64_t b, int64_t h, int64_t t, double *x, double *out) {
    const lc_view *m = key ? a->mk : a->mq;
    if (a->map == MAP_NONE) {
        const real *row = row_at(m, b, key ? h / a->mk_group : h, t);
        for (int64_t i = 0; i < a->F; i++) x[i] = out[i] = row[i];
        return;
    }
    const real *row = key ? row_at(a->k, b, h / a->group, t) : row_at(a->q, b, h, t);
    const real *w = weights_at(m, h);
    double bias = bias_at(key ? a->bk : a->bq, h);
    for (int64_t i = 0; i < a->f; i++) {
        double sum = bias + (a->skip ? row[i] : 0);
        for (int64_t j = 0; j < a->d; j++) sum += (double)row[j] * w[j * m->stride[1] + i];
        x[i] = sum;
    }
    K(map_row)(a->map, a->full, a->f, x, out);
}

static double clamped(const hybrid *a, double x) {
    return a->map != MAP_NONE && x < a->feature_eps ? a->feature_eps : x;
}

static double dot_rows(int64_t n, const real *x, const real *y) {
    double s = 0;
    for (int64_t i = 0; i < n; i++) s += (double)x[i] * y[i];
    return s;
}

static double feature_dot(const hybrid *a, const double *fq, const double *fk) {
    double s = 0;
    for (int64_t i = 0; i < a->F; i++) s += clamped(a, fq[i]) * clamped(a, fk[i]);
    return s;
}

typedef struct plain {
    double *xq, *xk, *fq, *fk;        /* [t, F] */
    double *u, *du;                   /* [t]: weights of one row and their gradients */
    double *dfq, *dfk, *tmp;          /* [F], [t, F], [F] */
    double *acc, *gk, *gv;            /* [d], [t, d], [t, d] */
    double *gm[2], *gb[2], *gfactors; /* [h, d, f], [h], [h] */
} plain;

static size_t plain_carve(const hybrid *a, plain *p, void *base, int backward) {
    arena at = {base, 0};
    size_t tf = (size_t)(a->t * a->F + 1) * 8, n = backward ? 1 : 0, td = (size_t)(a->t * a->d) * 8 * n;
    size_t m = a->map == MAP_NONE ? 0 : (size_t)(a->h * a->d * a->f) * 8 * n;
    p->xq = carve(&at, tf), p->xk = carve(&at, tf), p->fq = carve(&at, tf), p->fk = carve(&at, tf);
    p->u = carve(&at, (size_t)a->t * 8), p->du = carve(&at, (size_t)a->t * 8 * n);
    p->dfq = carve(&at, (size_t)a->F * 8 * n), p->dfk = carve(&at, tf * n), p->tmp = carve(&at, (size_t)a->F * 8 * n);
    p->acc = carve(&at, (size_t)a->d * 8), p->gk = carve(&at, td), p->gv = carve(&at, td);
    p->gm[0] = carve(&at, m), p->gm[1] = carve(&at, m);
    p->gb[0] = carve(&at, (size_t)a->h * 8), p->gb[1] = carve(&at, (size_t)a->h * 8),
    p->gfactors = carve(&at, (size_t)a->h * 8);
    return at.used;
}
size_t K(hybrid_plain_work)(const hybrid *a) { return plain_carve(a, &(plain){0}, NULL, 0); }
size_t K(hybrid_plain_backward_work)(const hybrid *a) { return plain_carve(a, &(plain){0}, NULL, 1); }

/* u [i + 1] of row i, scores first, then weights; returns the denominator. c and at: the window's maximum and its key.
 */
static double row_weights(const hybrid *a, const plain *p, int64_t b, int64_t h, int64_t s0, int64_t i, double *c,
                          int64_t *at) {
    int64_t lo = s0 + hybrid_lo(a, i - s0), hk = h / a->group;
    double gamma = hybrid_gamma(a, h), lambda = hybrid_lambda(a, gamma), z = a->window ? 0 : a->eps;
    *c = a->window ? -INFINITY : 0, *at = i;
    for (int64_t j = s0; j <= i; j++) {
        if (j < lo) {
            z += p->u[j] = lambda * feature_dot(a, p->fq + i * a->F, p->fk + j * a->F);
            continue;
        }
        p->u[j] = a->scale * dot_rows(a->d, row_at(a->q, b, h, i), row_at(a->k, b, hk, j));
        if (p->u[j] > *c) *c = p->u[j], *at = j;
    }
    for (int64_t j = lo; j <= i; j++) z += p->u[j] = gamma * exp(p->u[j] - *c);
    return z;
}

static void head_features(const hybrid *a, const plain *p, int64_t b, int64_t h, int64_t s0) {
    if (!a->F) return;
    for (int64_t t = s0; t < a->t; t++) {
        token_features(a, 0, b, h, t, p->xq + t * a->F, p->fq + t * a->F);
        token_features(a, 1, b, h, t, p->xk + t * a->F, p->fk + t * a->F);
    }
}

static void put_row(const lc_kargs *k, int64_t b, int64_t h, int64_t i, double c, int64_t at, double z) {
    if (k->y[1].data) *row_at(&k->y[1], b, h, i) = (real)c;
    if (k->y[2].data)
        ((int32_t *)k->y[2].data)[b * k->y[2].stride[0] + h * k->y[2].stride[1] + i * k->y[2].stride[2]] = (int32_t)at;
    if (k->y[3].data) *row_at(&k->y[3], b, h, i) = (real)z;
}

static void plain_row(const lc_kargs *k, const hybrid *a, const plain *p, int64_t b, int64_t h, int64_t s0, int64_t i) {
    double c;
    int64_t at;
    double z = row_weights(a, p, b, h, s0, i, &c, &at);
    for (int64_t e = 0; e < a->d; e++) p->acc[e] = 0;
    for (int64_t j = s0; j <= i; j++) {
        const real *v = row_at(a->v, b, h / a->group, j);
        for (int64_t e = 0; e < a->d; e++) p->acc[e] += p->u[j] * v[e];
    }
    real *y = row_at(&k->y[0], b, h, i);
    for (int64_t e = 0; e < a->d; e++) y[e] = (real)(p->acc[e] / z);
    put_row(k, b, h, i, c, at, z);
}

int K(hybrid_plain)(const lc_kargs *k, const hybrid *a) {
    plain p;
    plain_carve(a, &p, k->work, 0);
    for (int64_t b = 0; b < a->b; b++)
        for (int64_t h = 0; h < a->h; h++) {
            int64_t s0 = start_of(a->start, b, a->t);
            head_features(a, &p, b, h, s0);
            for (int64_t i = 0; i < s0; i++) {
                memset(row_at(&k->y[0], b, h, i), 0, (size_t)a->d * sizeof(real));
                put_row(k, b, h, i, 0, i, 1);
            }
            for (int64_t i = s0; i < a->t; i++) plain_row(k, a, &p, b, h, s0, i);
        }
    return LC_K_OK;
}

/* ---- backward
 * ---------------------------------------------------------------------------------------------------------- */

/* Through the map of one token: df [F] to the map's weights and bias, to gx [d] (may be NULL), or for map none to
 * gm_row [F]. */
static void token_backward(const hybrid *a, const plain *p, int key, int64_t b, int64_t h, int64_t t, double *df,
                           double *gx) {
    const double *x = (key ? p->xk : p->xq) + t * a->F, *out = (key ? p->fk : p->fq) + t * a->F;
    const lc_view *m = key ? a->mk : a->mq;
    const real *row = key ? row_at(a->k, b, h / a->group, t) : row_at(a->q, b, h, t), *w = weights_at(m, h);
    double *gm = p->gm[key] + h * a->d * a->f;
    for (int64_t i = 0; i < a->F; i++)
        if (out[i] < a->feature_eps) df[i] = 0;
    K(map_row_backward)(a->map, a->full, a->f, x, out, df, p->tmp);
    for (int64_t i = 0; i < a->f; i++) {
        p->gb[key][h] += p->tmp[i];
        if (a->skip) gx[i] += p->tmp[i];
        for (int64_t j = 0; j < a->d; j++) {
            gm[j * a->f + i] += row[j] * p->tmp[i];
            gx[j] += w[j * m->stride[1] + i] * p->tmp[i];
        }
    }
}

static void add_row(real *to, const double *from, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] += (real)from[i];
}

/* Row i: gradients of its weights, then of q_i, of the scores' keys, the values and the features. g [d] is dL/dy_i. */
static void plain_row_backward(const lc_kargs *k, const hybrid *a, const plain *p, int64_t b, int64_t h, int64_t s0,
                               int64_t i) {
    int64_t hk = h / a->group, lo = s0 + hybrid_lo(a, i - s0), at;
    double gamma = hybrid_gamma(a, h), lambda = hybrid_lambda(a, gamma), c, dot = 0, dgamma = 0, dlambda = 0, dc = 0;
    double z = row_weights(a, p, b, h, s0, i, &c, &at), *gq = p->acc;
    const real *g = row_at(&k->x[0], b, h, i), *q = row_at(a->q, b, h, i);
    for (int64_t j = s0; j <= i; j++) dot += p->u[j] * (p->du[j] = dot_rows(a->d, g, row_at(a->v, b, hk, j)));
    dot /= z;
    for (int64_t e = 0; e < a->d; e++) gq[e] = 0;
    for (int64_t e = 0; e < a->F; e++) p->dfq[e] = 0;
    for (int64_t j = s0; j <= i; j++) {
        for (int64_t e = 0; e < a->d; e++) p->gv[j * a->d + e] += p->u[j] / z * g[e];
        p->du[j] = (p->du[j] - dot) / z;
        if (j < lo) {
            dlambda += p->u[j] * p->du[j] / lambda;
            for (int64_t e = 0; e < a->F; e++) {
                p->dfq[e] += lambda * p->du[j] * clamped(a, p->fk[j * a->F + e]);
                p->dfk[j * a->F + e] += lambda * p->du[j] * clamped(a, p->fq[i * a->F + e]);
            }
        } else {
            dgamma += p->u[j] * p->du[j] / gamma;
            dc -= p->u[j] * p->du[j];
        }
    }
    for (int64_t j = lo; j <= i; j++) {
        double ds = a->scale * (p->u[j] * p->du[j] + (j == at ? dc : 0));
        const real *key = row_at(a->k, b, hk, j);
        for (int64_t e = 0; e < a->d; e++) gq[e] += ds * key[e], p->gk[j * a->d + e] += ds * q[e];
    }
    if (a->window) p->gfactors[h] += gamma * (1 - gamma) * (dgamma - (a->affine ? dlambda : 0));
    if (a->F && a->map != MAP_NONE) token_backward(a, p, 0, b, h, i, p->dfq, gq);
    if (a->F && a->map == MAP_NONE && k->y[3].data) add_row(row_at(&k->y[3], b, h, i), p->dfq, a->F);
    if (k->y[0].data) add_row(row_at(&k->y[0], b, h, i), gq, a->d);
}

static void zero_rows(const lc_view *v) {
    if (!v->data || !v->ndim) return;
    int64_t n = view_rows(v), last = v->dim[v->ndim - 1];
    for (int64_t r = 0; r < n; r++) memset((real *)v->data + view_row_offset(v, r), 0, (size_t)last * sizeof(real));
}

static void put_weights(const lc_kargs *k, const hybrid *a, const plain *p) {
    for (int key = 0; key < 2 && a->F && a->map != MAP_NONE; key++) {
        const lc_view *gm = &k->y[3 + key], *gb = &k->y[5 + key];
        for (int64_t r = 0; gm->data && r < a->h * a->d; r++)
            add_row((real *)gm->data + view_row_offset(gm, r), p->gm[key] + r * a->f, a->f);
        for (int64_t h = 0; gb->data && h < a->h; h++) ((real *)gb->data)[h] = (real)p->gb[key][h];
    }
    for (int64_t h = 0; k->y[7].data && h < a->h; h++) ((real *)k->y[7].data)[h] = (real)p->gfactors[h];
}

int K(hybrid_plain_backward)(const lc_kargs *k, const hybrid *a) {
    plain p;
    memset(k->work, 0, plain_carve(a, &p, k->work, 1));
    for (int n = 0; n < 5; n++) zero_rows(&k->y[n]);
    for (int64_t b = 0; b < a->b; b++)
        for (int64_t h = 0; h < a->h; h++) {
            int64_t s0 = start_of(a->start, b, a->t);
            head_features(a, &p, b, h, s0);
            memset(p.gk, 0, (size_t)(a->t * a->d) * 8), memset(p.gv, 0, (size_t)(a->t * a->d) * 8);
            memset(p.dfk, 0, (size_t)(a->t * a->F) * 8);
            for (int64_t i = s0; i < a->t; i++) plain_row_backward(k, a, &p, b, h, s0, i);
            for (int64_t j = s0; j < a->t; j++) {
                double *df = p.dfk + j * a->F;
                if (a->F && a->map != MAP_NONE) token_backward(a, &p, 1, b, h, j, df, p.gk + j * a->d);
                if (a->F && a->map == MAP_NONE && k->y[4].data)
                    add_row(row_at(&k->y[4], b, h / a->mk_group, j), df, a->F);
                if (k->y[1].data) add_row(row_at(&k->y[1], b, h / a->group, j), p.gk + j * a->d, a->d);
                if (k->y[2].data) add_row(row_at(&k->y[2], b, h / a->group, j), p.gv + j * a->d, a->d);
            }
        }
    put_weights(k, a, &p);
    return LC_K_OK;
}
