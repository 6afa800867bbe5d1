/* hybrid_backward.c: gradients of hybrid attention (and softmax attention), in tiles, linear in length; nothing but row
 * values was kept. With u_ij the weights before division, z_i the denominator and delta_i = g_i . y_i: du_ij = (g_i .
 * v_j - delta_i) / z_i. Queries walk forward with the state S = sum f(k_j) v_j, Z = sum f(k_j): df(q_i) = lambda (S g_i
 * - Z delta_i) / z_i. Keys walk backward with the suffix R = sum f(q_i) g_i lambda / z_i, P = sum f(q_i) delta_i lambda
 * / z_i: df(k_j) = R v_j - P. All weights of a row times their du sum to 0, so x_i = f(q_i) . df(q_i) is what the row
 * maximum gets (it goes to the key at the maximum), and the factors' gradient needs no window at all: attention
 * transfer costs the linear part alone. */
#include "hybrid_forward.h"

typedef struct job {
    const lc_kargs *k;
    const hybrid *call;
    saved from;
    int64_t panels, segments, keys;             /* of the longest sequence; of a head; rows of k */
    int linear_q, linear_k, window_q, window_k; /* parts that some wanted result needs */
    real *delta, *x;                            /* [b, h, t] */
    real *gm[2], *gb[2], *xs; /* [b, h, segments][f][dp], [b, h, segments], same: sums of one segment */
    real *rows[3];            /* gk, gv [b, h, keys, d], gmk [b, h, t, F]: of one query head, where heads share a row */
    char *summed;             /* [b, g]: gk and gv are in place, not in rows */
    char *scratch;
    size_t scratch_bytes;
} job;

/* Row values of a panel of queries. Rows that do not exist have rz 0, so they weigh nothing. */
typedef struct rows {
    lane_int lo[TILE];
    real c[TILE], rz[TILE], delta[TILE], x[TILE];
} rows;

enum { GQ, GK, GV, GMQ, GMK, GBQ, GBK, GFACTORS };
static int wanted(const job *j, int n) { return j->k->y[n].data != NULL; }

static void load_rows(const job *j, const span *at, int64_t h, int64_t c, rows *r) {
    const hybrid *a = j->call;
    *r = (rows){0};
    for (int64_t n = 0; n < TILE; n++) {
        int64_t p = c * TILE + n, i = p + at->q_shift, flat = (at->b * a->h + h) * a->t + i;
        r->lo[n] = (lane_int)LC_MAX(hybrid_lo(a, p) - c * TILE, -(1 << 30));
        if (p < at->p0 || p >= at->p1) continue;
        r->c[n] = a->window ? *row_at(j->from.c, at->b, h, i) : 0;
        r->rz[n] = a->softmax ? 1 : 1 / *row_at(j->from.z, at->b, h, i);
        r->delta[n] = j->delta[flat], r->x[n] = j->x[flat];
    }
}

/* ---- weights of one pair of panels
 * ------------------------------------------------------------------------------------- */

/* Window: p [keys][TILE] = u / z and ds [keys][TILE] = scale * (gradient of the score), for key panel kp and query
 * panel c. */
static void window_weights(const hybrid *a, scratch *s, const rows *r, const panel *q, const panel *k, real gamma,
                           real *p, real *ds) {
    int64_t dp = padded(a->d), c = q->index, kp = k->index, base = (kp - c) * TILE;
    real scale = (real)a->scale;
    for (int64_t jb = 0; jb < TILE; jb += 8) {
        int64_t from, to;
        columns(a, 0, c, kp, jb, &from, &to);
        if (to <= from) continue;
        look_ahead(s);
        K(tile_gemm)(8, to - from, a->d, k->xt + jb, 1, TILE, q->xt + from, TILE, p + jb * TILE + from, TILE, 0);
        look_ahead(s);
        K(tile_gemm)(8, to - from, a->d, k->v + jb * dp, dp, 1, q->vt + from, TILE, ds + jb * TILE + from, TILE, 0);
    }
    for (int64_t i = 0; i < TILE; i += VL) {
        int64_t g = i / GRAIN * GRAIN, j0 = LC_MAX(r->lo[g] - base, 0) / 8 * 8, j1 = LC_MIN(g + GRAIN - base, TILE);
        int64_t open_from = r->lo[i + VL - 1] - base, open_to = i - base;
        vreal max = vload(r->c + i), by = vload(r->rz + i) * gamma, delta = vload(r->delta + i);
        vint lo = vint_load(r->lo + i), me = vint_iota((lane_int)i);
        for (int64_t j = j0; j < j1; j++) {
            real *pp = p + j * TILE + i, *dd = ds + j * TILE + i;
            vreal e = vexp_down(vload(pp) * scale - max) * by;
            if (j < open_from || j > open_to) {
                vint key = vint_set((lane_int)(j + base));
                e = vselect((lo <= key) & (key <= me), e, vset(0));
            }
            vstore(pp, e);
            vstore(dd, e * (vload(dd) - delta) * scale);
        }
    }
}

/* Linear: du [keys][TILE] = lambda (v . g - delta) / z where the key is linear, else 0, rows 0 .. n - 1. */
static void linear_du(const hybrid *a, const rows *r, const panel *q, const panel *k, real lambda, int64_t n,
                      real *du) {
    int64_t dp = padded(a->d), base = (k->index - q->index) * TILE;
    for (int64_t jb = 0; jb < n; jb += 8) {
        int64_t from, to;
        columns(a, 1, q->index, k->index, jb, &from, &to);
        if (to > from)
            K(tile_gemm)(8, to - from, a->d, k->v + jb * dp, dp, 1, q->vt + from, TILE, du + jb * TILE + from, TILE, 0);
    }
    for (int64_t i = 0; i < TILE; i += VL) {
        vint lo = vint_load(r->lo + i);
        vreal by = vload(r->rz + i) * lambda, delta = vload(r->delta + i);
        for (int64_t j = 0; j < n; j++) {
            real *at = du + j * TILE + i;
            vstore(at, vselect(lo > (lane_int)(j + base), (vload(at) - delta) * by, vset(0)));
        }
    }
}

/* The same seen from the keys: du [queries][TILE keys], from query row i0 on. */
static void linear_du_keys(const hybrid *a, const rows *r, const panel *q, const panel *k, real lambda, int64_t i0,
                           real *du) {
    int64_t dp = padded(a->d), base = (k->index - q->index) * TILE;
    for (int64_t ib = i0; ib < TILE; ib += 8) {
        int64_t from, to;
        keys_of(a, 1, q->index, k->index, ib, &from, &to);
        to = round_up(to, GRAIN);
        if (to) K(tile_gemm)(8, to, a->d, q->v + ib * dp, dp, 1, k->vt, TILE, du + ib * TILE, TILE, 0);
    }
    for (int64_t i = i0; i < TILE; i++) {
        real by = r->rz[i] * lambda, delta = r->delta[i];
        for (int64_t j = 0; j < TILE; j += VL) {
            real *at = du + i * TILE + j;
            vstore(at,
                   vselect(vint_iota((lane_int)(j + base)) < (lane_int)r->lo[i], (vload(at) - delta) * by, vset(0)));
        }
    }
}

/* gv [TILE][dp] += linear weights / z times g, of one panel of queries; t [keys][TILE] is scratch. */
static void linear_values(const hybrid *a, const rows *r, const panel *q, const panel *k, real lambda, real *t,
                          real *gv) {
    int64_t dp = padded(a->d), base = (k->index - q->index) * TILE;
    for (int64_t jb = 0; jb < TILE; jb += 8) {
        int64_t from, to;
        columns(a, 1, q->index, k->index, jb, &from, &to);
        if (to <= from) continue;
        K(tile_gemm)(8, to - from, a->F, k->f + jb, 1, TILE, q->f + from, TILE, t + jb * TILE + from, TILE, 0);
        for (int64_t i = from; i < to; i += VL) {
            vreal by = vload(r->rz + i) * lambda;
            vint lo = vint_load(r->lo + i);
            for (int64_t j = jb; j < jb + 8; j++) {
                real *at = t + j * TILE + i;
                vstore(at, vselect(lo > (lane_int)(j + base), vload(at) * by, vset(0)));
            }
        }
        K(tile_gemm)(8, dp, to - from, t + jb * TILE + from, TILE, 1, q->v + from * dp, dp, gv + jb * dp, dp, 1);
    }
}

/* ---- what both walks do with the gradient of the features
 * ---------------------------------------------------------------- */
typedef struct sums {
    double bias, x; /* of one segment */
} sums;

static void put_ready(const hybrid *a, scratch *s, const side *d, const panel *p, int64_t from, int64_t to, real *rows,
                      int64_t stride) {
    int64_t fp = padded(a->F);
    K(tile_transpose_back)(a->F, s->t, d->row, fp);
    for (int64_t n = from; n < to; n++)
        memcpy(rows + (p->index * TILE + n) * stride, d->row + n * fp, (size_t)a->F * sizeof(real));
}

/* s->t [F][TILE], gradient of the features: through the map, to the weights' sums, and onto gx [TILE][dp] (or NULL). */
static void through_map(const hybrid *a, scratch *s, const side *d, const panel *p, real *gx, int weights, sums *sum) {
    int64_t dp = padded(a->d);
    K(map_tile_backward)(a->map, a->full, a->f, (real)a->feature_eps, p->a, s->t);
    if (weights) {
        tile_gemm_ahead(s, a->f, dp, TILE, s->t, TILE, 1, p->x, dp, s->gm, dp, 1);
        vreal all = vset(0);
        for (int64_t n = 0; n < a->f * TILE; n += VL) all += vload(s->t + n);
        sum->bias += vsum(all);
    }
    if (gx) tile_gemm_ahead(s, TILE, dp, a->f, s->t, 1, TILE, d->wt, dp, gx, dp, 1);
}

static void add_scaled(real *to, const real *from, real by, int64_t n) {
    for (int64_t e = 0; e < n; e++) to[e] += by * from[e];
}

static int64_t argmax_of(const job *j, const span *at, int64_t h, int64_t i) {
    const lc_view *v = j->from.argmax;
    return ((const int32_t *)v->data)[at->b * v->stride[0] + h * v->stride[1] + i * v->stride[2]];
}

/* ---- queries
 * ----------------------------------------------------------------------------------------------------------- */
static void row_deltas(const job *j, const span *at, int64_t h, const panel *q, int64_t from, int64_t to) {
    int64_t d = j->call->d, dp = padded(d);
    for (int64_t n = from; n < to; n++) {
        int64_t i = q->index * TILE + n + at->q_shift;
        const real *y = row_at(j->from.y, at->b, h, i), *g = q->v + n * dp;
        vreal v = vset(0);
        real sum = 0;
        int64_t e = 0;
        for (; e + VL <= d; e += VL) v += vload(g + e) * vload(y + e);
        for (; e < d; e++) sum += g[e] * y[e];
        j->delta[(at->b * j->call->h + h) * j->call->t + i] = sum + vsum(v);
    }
}

/* s->t = gradient of the features of queries; returns 0 when no key is linear here. */
static int query_features(const job *j, scratch *s, const span *at, rows *r, const panel *q, int64_t absorbed,
                          int has_state, real lambda) {
    const hybrid *a = j->call;
    int64_t dp = padded(a->d), end = hybrid_lo(a, LC_MIN(q->index * TILE + TILE, at->p1) - 1);
    if (!a->F || end <= 0) return 0;
    if (has_state) {
        tile_gemm_ahead(s, a->F, TILE, a->d, s->s, dp, 1, q->vt, TILE, s->t, TILE, 0);
        for (int64_t i = 0; i < TILE; i += VL) {
            vreal by = vload(r->rz + i) * lambda, delta = vload(r->delta + i);
            for (int64_t e = 0; e < a->F; e++)
                vstore(s->t + e * TILE + i, (vload(s->t + e * TILE + i) - delta * s->z[e]) * by);
        }
    } else
        memset(s->t, 0, (size_t)(a->F * TILE) * sizeof(real));
    for (int64_t kp = absorbed; kp * TILE < end; kp++) {
        const panel *k = K(side_panel)(&s->k, kp, HAS_F | HAS_V);
        int64_t n = round_up(LC_MIN(end - kp * TILE, TILE), 8);
        linear_du(a, r, q, k, lambda, n, s->u);
        tile_gemm_ahead(s, a->F, TILE, n, k->f, TILE, 1, s->u, TILE, s->t, TILE, 1);
    }
    for (int64_t i = 0; i < TILE; i += VL) {
        vreal x = vset(0);
        for (int64_t e = 0; e < a->F; e++) x += vload(q->f + e * TILE + i) * vload(s->t + e * TILE + i);
        vstore(r->x + i, x);
    }
    return 1;
}

static void query_window(const job *j, scratch *s, const span *at, int64_t h, const rows *r, const panel *q,
                         int64_t from, int64_t to, real gamma) {
    const hybrid *a = j->call;
    int64_t dp = padded(a->d), c = q->index;
    for (int64_t kp = hybrid_lo(a, c * TILE + from) / TILE; kp <= c; kp++) {
        const panel *k = K(side_panel)(&s->k, kp, HAS_X | HAS_XT | HAS_V);
        real *ds = s->u + TILE * TILE;
        window_weights(a, s, r, q, k, gamma, s->u, ds);
        for (int64_t ib = 0; ib < TILE; ib += 8) {
            int64_t k0, k1;
            keys_of(a, 0, c, kp, ib, &k0, &k1);
            look_ahead(s);
            if (k1 > k0)
                K(tile_gemm)(8, dp, k1 - k0, ds + k0 * TILE + ib, 1, TILE, k->x + k0 * dp, dp, s->y + ib * dp, dp, 1);
        }
    }
    for (int64_t n = from; n < to && !a->softmax; n++)
        if (r->x[n] != 0) {
            const real *key = row_at(a->k, at->b, h / a->group, argmax_of(j, at, h, c * TILE + n + at->q_shift));
            add_scaled(s->y + n * dp, key, (real)a->scale * r->x[n], a->d);
        }
}

/* The rows of panel c in a tensor, to be looked at ahead of time. */
static ahead rows_ahead(const lc_view *v, const span *at, int64_t h, int64_t shift, int64_t c) {
    int64_t from = LC_MAX(c * TILE, at->p0), end = LC_MIN(c * TILE + TILE, at->p1);
    if (end <= from) return (ahead){0};
    return (ahead){(const char *)row_at(v, at->b, h, from + shift), v->stride[2] * (int64_t)sizeof(real), end - from};
}

static void query_tile(const job *j, scratch *s, const span *at, int64_t h, int64_t c, int64_t *absorbed,
                       int *has_state, sums *sum) {
    const hybrid *a = j->call;
    double gamma = hybrid_gamma(a, h), lambda = hybrid_lambda(a, gamma);
    int64_t from = LC_MAX(at->p0 - c * TILE, 0), to = LC_MIN(at->p1 - c * TILE, TILE), dp = padded(a->d);
    int64_t first = c * TILE + from, boundary = LC_MIN(hybrid_lo(a, first), first) / TILE;
    rows r;
    panel *q = K(side_panel)(&s->q, c, HAS_V);
    row_deltas(j, at, h, q, from, to);
    s->ahead[AHEAD_Y] = rows_ahead(&j->from.y[0], at, h, at->q_shift, c + 1);
    if (wanted(j, GQ)) s->ahead[AHEAD_OUT] = rows_ahead(&j->k->y[GQ], at, h, at->q_shift, c);
    load_rows(j, at, h, c, &r);
    memset(r.x, 0, sizeof r.x);
    memset(s->y, 0, (size_t)(TILE * dp) * sizeof(real));
    if (j->linear_q) {
        for (; a->F && *absorbed < boundary; ++*absorbed, *has_state = 1) K(absorb)(a, s, *absorbed, TILE);
        if (hybrid_lo(a, c * TILE + to - 1) > 0) q = K(side_panel)(&s->q, c, HAS_VT | HAS_F | (a->map ? HAS_X : 0));
        if (query_features(j, s, at, &r, q, *absorbed, *has_state, (real)lambda)) {
            if (a->map == MAP_NONE) {
                const lc_view *m = &j->k->y[GMQ];
                if (m->data)
                    put_ready(a, s, &s->q, q, from, to, row_at(m, at->b, h, 0) + at->q_shift * m->stride[2],
                              m->stride[2]);
            } else if (wanted(j, GQ) || wanted(j, GMQ) || wanted(j, GBQ))
                through_map(a, s, &s->q, q, wanted(j, GQ) ? s->y : NULL, wanted(j, GMQ) || wanted(j, GBQ), sum);
        } else if (a->map == MAP_NONE && wanted(j, GMQ))
            for (int64_t n = from; n < to; n++)
                memset(row_at(&j->k->y[GMQ], at->b, h, c * TILE + n + at->q_shift), 0, (size_t)a->F * sizeof(real));
    }
    for (int64_t n = from; n < to; n++) {
        j->x[(at->b * a->h + h) * a->t + c * TILE + n + at->q_shift] = r.x[n];
        sum->x += r.x[n];
    }
    if (!wanted(j, GQ)) return;
    if (j->window_q) {
        q = K(side_panel)(&s->q, c, HAS_XT | HAS_VT);
        query_window(j, s, at, h, &r, q, from, to, (real)gamma);
    }
    for (int64_t n = from; n < to; n++)
        memcpy(row_at(&j->k->y[GQ], at->b, h, c * TILE + n + at->q_shift), s->y + n * dp, (size_t)a->d * sizeof(real));
}

/* ---- keys
 * -------------------------------------------------------------------------------------------------------------- */

/* R, P (in s->s, s->z) take in a panel of queries. */
static void absorb_queries(const job *j, scratch *s, const span *at, int64_t h, int64_t c, real lambda) {
    const hybrid *a = j->call;
    int64_t dp = padded(a->d);
    const panel *q = K(side_panel)(&s->q, c, HAS_F | HAS_V);
    rows r;
    load_rows(j, at, h, c, &r);
    for (int64_t e = 0; e < a->F; e++) {
        vreal sum = vset(0);
        for (int64_t i = 0; i < TILE; i += VL) {
            vreal x = vload(q->f + e * TILE + i) * vload(r.rz + i) * lambda;
            vstore(s->t + e * TILE + i, x);
            sum += x * vload(r.delta + i);
        }
        s->z[e] += vsum(sum);
    }
    tile_gemm_ahead(s, a->F, dp, TILE, s->t, TILE, 1, q->v, dp, s->s, dp, 1);
}

/* s->t = gradient of the features of keys, s->y2 += the linear part of gv. Returns 0 when no query sees them linearly.
 */
static int key_features(const job *j, scratch *s, const span *at, int64_t h, const panel *k, int64_t absorbed,
                        int has_suffix, int features, real lambda) {
    const hybrid *a = j->call;
    int64_t dp = padded(a->d), c = k->index, first = hybrid_hi(a, c * TILE);
    if (!a->F || first >= at->p1) return 0;
    if (has_suffix) {
        if (features) {
            tile_gemm_ahead(s, a->F, TILE, a->d, s->s, dp, 1, k->vt, TILE, s->t, TILE, 0);
            for (int64_t n = 0; n < a->F * TILE; n += VL) vstore(s->t + n, vload(s->t + n) - s->z[n / TILE]);
        }
        if (wanted(j, GV)) tile_gemm_ahead(s, TILE, dp, a->F, k->f, 1, TILE, s->s, dp, s->y2, dp, 1);
    } else
        memset(s->t, 0, (size_t)(a->F * TILE) * sizeof(real));
    for (int64_t qp = LC_MAX(first, at->p0) / TILE; qp < absorbed; qp++) {
        const panel *q = K(side_panel)(&s->q, qp, HAS_F | HAS_V);
        int64_t i0 = LC_MAX(first - qp * TILE, 0) / 8 * 8;
        rows r;
        load_rows(j, at, h, qp, &r);
        if (features) {
            linear_du_keys(a, &r, q, k, lambda, i0, s->u);
            tile_gemm_ahead(s, a->F, TILE, TILE - i0, q->f + i0, TILE, 1, s->u + i0 * TILE, TILE, s->t, TILE, 1);
        }
        if (wanted(j, GV)) linear_values(a, &r, q, k, lambda, s->u, s->y2);
    }
    return features;
}

static void key_window(const job *j, scratch *s, const span *at, int64_t h, const panel *k, real gamma) {
    const hybrid *a = j->call;
    int64_t dp = padded(a->d), c = k->index, end = LC_MIN(hybrid_hi(a, c * TILE + TILE - 1), at->p1);
    real *p = s->u, *ds = s->u + TILE * TILE;
    for (int64_t qp = LC_MAX(c, at->p0 / TILE); qp * TILE < end; qp++) {
        const panel *q = K(side_panel)(&s->q, qp, HAS_X | HAS_XT | HAS_V | HAS_VT);
        rows r;
        load_rows(j, at, h, qp, &r);
        window_weights(a, s, &r, q, k, gamma, p, ds);
        for (int64_t jb = 0; jb < TILE; jb += 8) {
            int64_t from, to;
            columns(a, 0, qp, c, jb, &from, &to);
            if (to <= from) continue;
            look_ahead(s);
            if (wanted(j, GV)) K(tile_gemm)
            (8, dp, to - from, p + jb * TILE + from, TILE, 1, q->v + from * dp, dp, s->y2 + jb * dp, dp, 1);
            if (wanted(j, GK)) K(tile_gemm)
            (8, dp, to - from, ds + jb * TILE + from, TILE, 1, q->x + from * dp, dp, s->y + jb * dp, dp, 1);
        }
        for (int64_t n = 0; n < TILE && !a->softmax && wanted(j, GK); n++) {
            if (r.x[n] == 0) continue;
            int64_t row = argmax_of(j, at, h, qp * TILE + n + at->q_shift) - at->k_shift - c * TILE;
            if (row >= 0 && row < TILE) add_scaled(s->y + row * dp, q->x + n * dp, (real)a->scale * r.x[n], dp);
        }
    }
}

/* Where gk and gv of a head go: to rows of its own, which are added up at the end; or, where all heads of a group walk
 * together, to the result, in the same order. */
enum { OWN_ROWS, PUT, ADD };

/* Where row 0 of a key-side result of this head goes, and how far apart its rows are. */
static real *key_rows(const job *j, int which, int put, int64_t b, int64_t h, int64_t *stride) {
    const hybrid *a = j->call;
    const lc_view *v = &j->k->y[which == 2 ? GMK : GK + which];
    int64_t n = which == 2 ? a->t : j->keys, width = which == 2 ? a->F : a->d;
    if (!v->data) return NULL;
    int own = j->rows[which] && (which == 2 || put == OWN_ROWS);
    *stride = own ? width : v->stride[2];
    if (own) return j->rows[which] + (b * a->h + h) * n * width;
    return row_at(v, b, which == 2 ? h / a->mk_group : h / a->group, 0);
}

static void put_key_rows(const job *j, const scratch *s, const span *at, int64_t h, int64_t c, int put) {
    int64_t d = j->call->d, dp = padded(d), to = LC_MIN(at->p1 - c * TILE, TILE), stride;
    for (int which = 0; which < 2; which++) {
        real *out = key_rows(j, which, put, at->b, h, &stride);
        const real *tile = which ? s->y2 : s->y;
        if (out) out += (c * TILE + at->k_shift) * stride;
        for (int64_t n = 0; out && n < to; n++, out += stride, tile += dp) {
            if (put == ADD)
                for (int64_t e = 0; e < d; e++) out[e] += tile[e];
            else
                memcpy(out, tile, (size_t)d * sizeof(real));
        }
    }
}

static void key_tile(const job *j, scratch *s, const span *at, int64_t h, int64_t c, int put, int64_t *absorbed,
                     int *has_suffix, sums *sum) {
    const hybrid *a = j->call;
    double gamma = hybrid_gamma(a, h), lambda = hybrid_lambda(a, gamma);
    int64_t to = LC_MIN(at->p1 - c * TILE, TILE), dp = padded(a->d), stride;
    int features = wanted(j, GK) || wanted(j, GMK) || wanted(j, GBK);
    int64_t all_see = a->F ? (hybrid_hi(a, c * TILE + to - 1) + TILE - 1) / TILE : 0;
    /* a panel with rows that are no keys takes its queries one by one: those rows must stay out of the bias's sum */
    if (to < TILE) all_see = LC_MAX(all_see, c + 1);
    if (j->linear_k)
        for (; a->F && *absorbed > all_see; *has_suffix = 1) absorb_queries(j, s, at, h, --*absorbed, (real)lambda);
    memset(s->y, 0, (size_t)(TILE * dp) * sizeof(real)), memset(s->y2, 0, (size_t)(TILE * dp) * sizeof(real));
    real *gm = a->map == MAP_NONE && a->F ? key_rows(j, 2, put, at->b, h, &stride) : NULL;
    if (j->linear_k && a->F && hybrid_hi(a, c * TILE) < at->p1) {
        const panel *k = K(side_panel)(&s->k, c, HAS_F | HAS_VT | (a->map ? HAS_X : 0));
        if (key_features(j, s, at, h, k, *absorbed, *has_suffix, features, (real)lambda)) {
            if (gm) put_ready(a, s, &s->k, k, 0, to, gm + at->k_shift * stride, stride);
            if (a->map) through_map(a, s, &s->k, k, wanted(j, GK) ? s->y : NULL, wanted(j, GMK) || wanted(j, GBK), sum);
        }
    } else if (gm)
        for (int64_t n = 0; n < to; n++)
            memset(gm + (c * TILE + n + at->k_shift) * stride, 0, (size_t)a->F * sizeof(real));
    if (j->window_k) key_window(j, s, at, h, K(side_panel)(&s->k, c, HAS_XT | HAS_V), (real)gamma);
    put_key_rows(j, s, at, h, c, put);
}

/* ---- walks
 * ------------------------------------------------------------------------------------------------------------- */
typedef struct walk {
    const job *j;
    int keys; /* which walk */
    share share;
} walk;

/* A head on its walk. */
typedef struct walker {
    int64_t h, item;     /* item: of the segment it is in, among the sums */
    int64_t seg, to;     /* the segment, of its walk; the one before which it stops */
    int64_t from, until; /* steps of the walk that are this segment's */
    int64_t absorbed;
    int has, put;
    sums sum;
} walker;

static void zero_rows(const lc_view *v, int64_t b, int64_t h, int64_t from, int64_t to) {
    for (int64_t i = from; v->data && i < to; i++) memset(row_at(v, b, h, i), 0, (size_t)v->dim[3] * sizeof(real));
}

/* Rows of results that belong to no token. */
static void zero_padding(const job *j, const span *at, int64_t h, int keys, int put) {
    const hybrid *a = j->call;
    int64_t stride, first = LC_MIN(at->p0 + at->q_shift, a->t);
    if (!keys) {
        zero_rows(&j->k->y[GQ], at->b, h, 0, first);
        if (a->map == MAP_NONE && a->F) zero_rows(&j->k->y[GMQ], at->b, h, 0, first);
        return;
    }
    for (int which = put == ADD ? 2 : 0; which < 3; which++) {
        real *out = which < 2 || (a->map == MAP_NONE && a->F) ? key_rows(j, which, put, at->b, h, &stride) : NULL;
        int64_t n = which == 2 ? a->t : j->keys, width = which == 2 ? a->F : a->d;
        for (int64_t i = 0; out && i < n; i++)
            if (i < at->k_shift || i >= at->p1 + at->k_shift) memset(out + i * stride, 0, (size_t)width * sizeof(real));
    }
}

static void put_sums(const job *j, const scratch *s, int64_t item, int keys, const sums *sum) {
    size_t n = (size_t)(j->call->f * padded(j->call->d));
    if (j->gm[keys]) memcpy(j->gm[keys] + (size_t)item * n, s->gm, n * sizeof(real));
    if (j->gb[keys]) j->gb[keys][item] = (real)sum->bias;
    if (!keys && j->xs) j->xs[item] = (real)sum->x;
}

/* Panels of a sequence: n from `first`. A walk over keys counts steps and segments from the end. */
typedef struct stretch {
    int64_t first, n, segments;
    int keys;
} stretch;
static int64_t segment_from(const stretch *x, int64_t seg) {
    return x->keys ? x->n - (x->segments - seg) * x->n / x->segments : seg * x->n / x->segments;
}

static void enter_segment(const stretch *x, const walk *w, scratch *s, walker *r) {
    const hybrid *a = w->j->call;
    r->from = segment_from(x, r->seg), r->until = segment_from(x, r->seg + 1);
    r->sum = (sums){0};
    if (s->gm) memset(s->gm, 0, (size_t)(a->f * padded(a->d)) * sizeof(real));
}

/* Segments that end before this step are put away. */
static void leave_segments(const stretch *x, const walk *w, scratch *s, walker *r, int64_t step) {
    while (r->seg < r->to && r->until <= step) {
        put_sums(w->j, s, r->item + (x->keys ? x->segments - 1 - r->seg : r->seg), x->keys, &r->sum);
        if (++r->seg < r->to) enter_segment(x, w, s, r);
    }
}

static void walk_tile(const stretch *x, const walk *w, scratch *s, const span *at, walker *r, int64_t step) {
    int64_t c = x->first + (x->keys ? x->n - 1 - step : step);
    if (x->keys)
        key_tile(w->j, s, at, r->h, c, r->put, &r->absorbed, &r->has, &r->sum);
    else
        query_tile(w->j, s, at, r->h, c, &r->absorbed, &r->has, &r->sum);
}

/* Whether gk and gv of head i can be added up in place. */
static int way_to_put(const walk *w, const batch *heads, int i) {
    int64_t group = w->j->call->group, first = i - (heads->h + i) % group;
    if (group == 1) return PUT;
    if (first < 0 || first + group > heads->n) return OWN_ROWS;
    for (int64_t n = first; n < first + group; n++)
        if (heads->from[n] || heads->to[n] < w->share.segments) return OWN_ROWS;
    return i == first ? PUT : ADD;
}

static void walk_open(const stretch *x, const walk *w, scratch *s, const span *at, const batch *heads, int i,
                      walker *r) {
    const job *j = w->j;
    const hybrid *a = j->call;
    int64_t h = heads->h + i;
    *r = (walker){.h = h, .item = (heads->b * a->h + h) * x->segments, .seg = heads->from[i], .to = heads->to[i]};
    r->absorbed = x->keys ? x->first + x->n : 0, r->put = way_to_put(w, heads, i);
    if (x->keys && r->put != OWN_ROWS) j->summed[heads->b * a->g + h / a->group] = 1;
    K(side_open)(&s->q, a, at, 0, h, a->q, j->from.g, wanted(j, GQ), NULL);
    K(side_open)(&s->k, a, at, 1, h, a->k, a->v, wanted(j, GK), i && h % a->group ? leader_of(&s[-1].k) : NULL);
    s->q.step = s->k.step = x->keys ? -1 : 1;
    memset(s->s, 0, (size_t)(a->F * padded(a->d)) * sizeof(real)), memset(s->z, 0, (size_t)a->F * sizeof(real));
    if (r->seg == 0) zero_padding(j, at, h, x->keys, r->put);
    enter_segment(x, w, s, r);
}

static void walk_batch(const walk *w, scratch *s, const batch *heads) {
    const hybrid *a = w->j->call;
    walker r[TOGETHER];
    span at;
    whole_span(a, heads->b, &at);
    stretch x = {w->keys ? 0 : at.p0 / TILE, 0, w->share.segments, w->keys};
    x.n = at.p1 > at.p0 ? (at.p1 - 1) / TILE + 1 - x.first : 0;
    int64_t begin = x.n, end = 0;
    for (int i = 0; i < heads->n; i++) {
        walk_open(&x, w, &s[i], &at, heads, i, &r[i]);
        begin = LC_MIN(begin, r[i].from), end = LC_MAX(end, segment_from(&x, r[i].to));
    }
    if (a->kind == KIND_CAUSAL) /* a segment is a pair of tiles, a cheap and a dear one */
        for (int64_t u = heads->from[0]; u < heads->to[0] && 2 * u < x.n; u++) {
            walk_tile(&x, w, s, &at, r, u);
            if (x.n - 1 - u != u) walk_tile(&x, w, s, &at, r, x.n - 1 - u);
        }
    else
        for (int64_t step = begin; step < end; step++)
            for (int i = 0; i < heads->n; i++) {
                leave_segments(&x, w, &s[i], &r[i], step);
                if (r[i].seg < r[i].to && step >= r[i].from) walk_tile(&x, w, &s[i], &at, &r[i], step);
            }
    for (int i = 0; i < heads->n; i++) leave_segments(&x, w, &s[i], &r[i], x.n);
}

/* What the two walks need; walks differ in the side that has the ring. */
static void carve_scratch(const job *j, arena *memory, int keys, scratch *s) {
    int n = (int)reach(j->call, j->panels);
    extent e = {(int)heads_together(j->call, j->k->host->threads()), keys ? n : 1, keys ? 1 : n, 2, 1};
    K(scratch_carve)(memory, j->call, &e, s);
}

static void walk_body(void *ctx, int64_t begin, int64_t end, int thread) {
    walk *w = ctx;
    arena memory = {w->j->scratch + (size_t)thread * w->j->scratch_bytes, 0};
    scratch s[TOGETHER];
    batch heads;
    carve_scratch(w->j, &memory, w->keys, s);
    while (share_take(&w->share, &begin, &end))
        while (share_batch(&w->share, w->j->call->h, &begin, end, &heads)) walk_batch(w, s, &heads);
}

static void do_walk(const job *j, int keys, int threads) {
    const hybrid *a = j->call;
    walk w = {.j = j, .keys = keys, .share.segments = j->segments};
    /* products of one token: what a part takes in anew, and all */
    double absorb = (double)(a->F + a->f), window = 1.5 * (double)a->window;
    double tile = keys ? 3 * (double)a->F + 4 * (double)a->f + 4 * window * j->window_k
                       : 2 * (double)a->F + 4 * (double)a->f + 3 * window * j->window_q;
    share_out(&w.share, a, threads, a->F ? absorb / tile : 0);
    j->k->host->parallel(threads, 1, walk_body, &w);
}

/* ---- sums over segments and heads
 * ---------------------------------------------------------------------------------------- */
/* gm [d][f] of head h = sum of the segments' [f][dp]. */
static void finish_map(const job *j, int keys, int64_t h) {
    const hybrid *a = j->call;
    const lc_view *out = &j->k->y[GMQ + keys];
    int64_t dp = padded(a->d), n = a->f * dp;
    for (int64_t i = 0; i < a->f; i++)
        for (int64_t e = 0; e < dp; e += VL) {
            double sum[VL] = {0};
            for (int64_t b = 0; b < a->b; b++) {
                const real *part = j->gm[keys] + (b * a->h + h) * j->segments * n + i * dp + e;
                for (int64_t seg = 0; seg < j->segments; seg++)
                    for (int64_t l = 0; l < VL; l++) sum[l] += part[seg * n + l];
            }
            for (int64_t l = 0; l < LC_MIN(VL, a->d - e); l++)
                ((real *)out->data)[h * out->stride[0] + (e + l) * out->stride[1] + i * out->stride[2]] = (real)sum[l];
        }
}

static void finish_weights(const job *j, int64_t h) {
    const hybrid *a = j->call;
    double gamma = hybrid_gamma(a, h), x = 0, bias[2] = {0, 0};
    for (int keys = 0; keys < 2; keys++)
        if (j->gm[keys]) finish_map(j, keys, h);
    for (int64_t b = 0; b < a->b; b++)
        for (int64_t seg = 0; seg < j->segments; seg++) {
            int64_t at = (b * a->h + h) * j->segments + seg;
            for (int keys = 0; keys < 2; keys++) bias[keys] += j->gb[keys] ? j->gb[keys][at] : 0;
            x += j->xs ? j->xs[at] : 0;
        }
    for (int keys = 0; keys < 2; keys++)
        if (j->gb[keys]) ((real *)j->k->y[GBQ + keys].data)[h] = (real)bias[keys];
    if (j->xs) ((real *)j->k->y[GFACTORS].data)[h] = (real)(a->affine ? -x : (gamma - 1) * x);
}

/* Rows that several query heads share: item = (b, row head, row) of results whose head count is less than h. */
static void finish_rows(const job *j, int which, int64_t b) {
    const hybrid *a = j->call;
    const lc_view *out = &j->k->y[which == 2 ? GMK : GK + which];
    int64_t group = which == 2 ? a->mk_group : a->group, n = which == 2 ? a->t : j->keys,
            width = which == 2 ? a->F : a->d;
    if (!j->rows[which]) return;
    const char *summed = which < 2 ? j->summed + b * a->g : NULL;
    for (int64_t g = 0; g < a->h / group; g++)
        for (int64_t i = 0; i < n && !(summed && summed[g]); i++) {
            real *to = row_at(out, b, g, i);
            const real *from = j->rows[which] + ((b * a->h + g * group) * n + i) * width;
            memcpy(to, from, (size_t)width * sizeof(real));
            for (int64_t m = 1; m < group; m++)
                for (int64_t e = 0; e < width; e++) to[e] += from[m * n * width + e];
        }
}

static void finish_body(void *ctx, int64_t begin, int64_t end, int thread) {
    const job *j = ctx;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        if (i < j->call->h)
            finish_weights(j, i);
        else
            finish_rows(j, (int)((i - j->call->h) % 3), (i - j->call->h) / 3);
    }
}

/* ---- entry
 * ------------------------------------------------------------------------------------------------------------- */
static size_t plan(job *j, const lc_kargs *k, const hybrid *a) {
    arena w = {k->work, 0};
    size_t heads = (size_t)(a->b * a->h), one;
    scratch s[TOGETHER];
    *j = (job){.k = k, .call = a, .keys = a->k->dim[2]};
    j->panels = LC_MAX((a->t + LC_MAX(a->offset, 0) + TILE - 1) / TILE, 1), j->segments = segments_of(a, j->panels);
    int maps = a->F && a->map != MAP_NONE, factors = wanted(j, GFACTORS) && a->window;
    int gk = wanted(j, GK) || wanted(j, GMK) || wanted(j, GBK);
    j->linear_q =
        a->F && (wanted(j, GQ) || wanted(j, GMQ) || wanted(j, GBQ) || factors || (wanted(j, GK) && a->window));
    j->linear_k = a->F && (gk || wanted(j, GV));
    j->window_q = a->window && wanted(j, GQ), j->window_k = a->window && (wanted(j, GK) || wanted(j, GV));
    j->delta = carve(&w, heads * (size_t)a->t * sizeof(real)), j->x = carve(&w, heads * (size_t)a->t * sizeof(real));
    one = heads * (size_t)j->segments;
    for (int keys = 0; keys < 2; keys++) {
        if (maps && wanted(j, GMQ + keys)) j->gm[keys] = carve(&w, one * (size_t)(a->f * padded(a->d)) * sizeof(real));
        if (maps && wanted(j, GBQ + keys)) j->gb[keys] = carve(&w, one * sizeof(real));
    }
    if (factors) j->xs = carve(&w, one * sizeof(real));
    for (int which = 0; which < 2; which++)
        if (a->group > 1 && wanted(j, GK + which))
            j->rows[which] = carve(&w, heads * (size_t)(j->keys * a->d) * sizeof(real));
    j->summed = carve(&w, (size_t)(a->b * a->g));
    if (a->mk_group > 1 && wanted(j, GMK)) j->rows[2] = carve(&w, heads * (size_t)(a->t * a->F) * sizeof(real));
    for (int keys = 0; keys < 2; keys++) {
        arena measure = {0};
        carve_scratch(j, &measure, keys, s);
        j->scratch_bytes = LC_MAX(j->scratch_bytes, measure.used);
    }
    j->scratch = carve(&w, j->scratch_bytes * (size_t)k->host->threads());
    return w.used;
}

size_t K(chunked_backward_work)(const lc_kargs *k, const hybrid *a) {
    lc_kargs empty = *k;
    empty.work = NULL;
    job j;
    return plan(&j, &empty, a);
}

int K(chunked_backward)(const lc_kargs *k, const hybrid *a, const saved *from) {
    job j;
    plan(&j, k, a);
    j.from = *from;
    memset(j.summed, 0, (size_t)(a->b * a->g));
    int threads = k->host->threads();
    do_walk(&j, 0, threads);
    if (j.linear_k || j.window_k) do_walk(&j, 1, threads);
    k->host->parallel(a->h + 3 * a->b, 1, finish_body, &j);
    return LC_K_OK;
}
