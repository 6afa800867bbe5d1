/* hybrid_forward.c: hybrid attention (and softmax attention) forward, tile by tile of TILE queries. A tile's softmax
 * keys are scored panel by panel, transposed: [keys][queries]. Its linear keys are those already summed into the state
 * S [F][dp], Z [F], all below a panel boundary, and the panels between that boundary and the window, whose weights are
 * masked products. */
#include "hybrid_forward.h"

typedef struct tile {
    int64_t c, p_first, p_last; /* panel; first and last position that exist in it */
    lane_int lo[TILE];          /* first softmax key of each query, counted from the panel's first token */
    lane_int at[TILE];          /* key of the largest score, counted so too */
    real max[TILE], den[TILE];
} tile;

static void tile_open(tile *t, const hybrid *a, const span *at, int64_t c) {
    t->c = c, t->p_first = LC_MAX(c * TILE, at->p0), t->p_last = LC_MIN(c * TILE + TILE, at->p1) - 1;
    for (int64_t i = 0; i < TILE; i++) {
        t->lo[i] = (lane_int)LC_MAX(hybrid_lo(a, c * TILE + i) - c * TILE, -(1 << 30));
        t->at[i] = 0, t->max[i] = -INFINITY, t->den[i] = a->window ? 0 : (real)a->eps;
    }
}

/* u [keys][TILE]: scores of key panels k0 .. k1 - 1, where any may count. */
static void score(const hybrid *a, scratch *s, const tile *t, int64_t k0, int64_t k1) {
    const panel *q = K(side_panel)(&s->q, t->c, HAS_XT);
    for (int64_t kp = k0; kp < k1; kp++) {
        const panel *k = K(side_panel)(&s->k, kp, HAS_XT);
        for (int64_t jb = 0; jb < TILE; jb += 8) {
            int64_t from, to;
            columns(a, 0, t->c, kp, jb, &from, &to);
            look_ahead(s);
            if (to > from)
                K(tile_gemm)
                (8, to - from, a->d, k->xt + jb, 1, TILE, q->xt + from, TILE,
                 s->u + ((kp - k0) * TILE + jb) * TILE + from, TILE, 0);
        }
    }
}

/* One vector of queries from column i: scales and masks rows j0 .. j1 - 1 of u (key j + base, counted from the tile's
 * panel), takes the running maximum on, and leaves exp(score - maximum) in u. Returns the factor for what was summed
 * before. */
static inline vreal column_softmax(const hybrid *a, tile *t, int64_t i, real *u, int64_t j0, int64_t j1, int64_t base) {
    real scale = (real)a->scale;
    vreal old = vload(t->max + i), max = old, sum = vset(0), none = vset(-INFINITY);
    vint at = vint_load(t->at + i), lo = vint_load(t->lo + i), me = vint_iota((lane_int)i);
    int64_t open_from = t->lo[i + VL - 1] - base, open_to = i - base; /* no mask needed between, inclusive */
    for (int64_t j = j0; j < j1; j++) {
        vreal x = vload(u + j * TILE + i) * scale;
        vint key = vint_set((lane_int)(j + base));
        if (j < open_from || j > open_to) x = vselect((lo <= key) & (key <= me), x, none);
        vstore(u + j * TILE + i, x);
        if (!a->softmax) {
            vint more = x > max;
            at = (more & key) | (~more & at);
        }
        max = vmax(max, x);
    }
    vreal shift = vselect(max == none, vset(0), max), keep = vexp(old - shift); /* 0 from -inf */
    for (int64_t j = j0; j < j1; j++) {
        vreal e = vexp_down(vload(u + j * TILE + i) - shift);
        vstore(u + j * TILE + i, e);
        sum += e;
    }
    vstore(t->max + i, max);
    memcpy(t->at + i, &at, sizeof at);
    vstore(t->den + i, vload(t->den + i) * keep + sum);
    return keep;
}

static void scale_rows(const real *by, real *y, int64_t dp) {
    for (int64_t i = 0; i < TILE; i++)
        for (int64_t e = 0; e < dp; e += VL) vstore(y + i * dp + e, vload(y + i * dp + e) * by[i]);
}

/* s->y [TILE][dp] += u^T v for one key panel; u [TILE][TILE] of that panel. */
static void add_values(const hybrid *a, scratch *s, int linear, int64_t c, int64_t kp, const real *u, const real *v) {
    int64_t dp = padded(a->d);
    for (int64_t ib = 0; ib < TILE; ib += 8) {
        int64_t from, to;
        keys_of(a, linear, c, kp, ib, &from, &to);
        look_ahead(s);
        if (to > from)
            K(tile_gemm)(8, dp, to - from, u + from * TILE + ib, 1, TILE, v + from * dp, dp, s->y + ib * dp, dp, 1);
    }
}

/* The window, in blocks of panels: y += weights times values, with the maximum so far taken off. */
static void window_part(const hybrid *a, scratch *s, tile *t) {
    int64_t first = hybrid_lo(a, t->p_first) / TILE, dp = padded(a->d);
    for (int64_t k0 = first; k0 <= t->c; k0 += BLOCK_PANELS) {
        int64_t k1 = LC_MIN(k0 + BLOCK_PANELS, t->c + 1), base = (k0 - t->c) * TILE;
        real keep[TILE];
        score(a, s, t, k0, k1);
        for (int64_t i = 0; i < TILE; i += VL) {
            int64_t g = i / GRAIN * GRAIN, j0 = LC_MAX(t->lo[g] - base, 0) / 8 * 8,
                    j1 = LC_MIN(g + GRAIN - base, (k1 - k0) * TILE);
            vstore(keep + i, column_softmax(a, t, i, s->u, j0, LC_MAX(j1, j0), base));
        }
        if (k0 > first) scale_rows(keep, s->y, dp);
        for (int64_t kp = k0; kp < k1; kp++)
            add_values(a, s, 0, t->c, kp, s->u + (kp - k0) * TILE * TILE, K(side_panel)(&s->k, kp, HAS_V)->v);
    }
}

/* Linear weights of one key panel: t [keys][TILE], masked; their sums join the denominators. */
static void linear_weights(const hybrid *a, scratch *s, tile *t, int64_t kp, const real *fq, const real *fk) {
    int64_t base = (kp - t->c) * TILE;
    for (int64_t jb = 0; jb < TILE; jb += 8) {
        int64_t from, to;
        columns(a, 1, t->c, kp, jb, &from, &to);
        if (to > from)
            K(tile_gemm)(8, to - from, a->F, fk + jb, 1, TILE, fq + from, TILE, s->t + jb * TILE + from, TILE, 0);
    }
    for (int64_t i = 0; i < TILE; i += VL) {
        int64_t end = LC_MIN(round_up(LC_MAX(t->lo[i / GRAIN * GRAIN + GRAIN - 1] - base, 0), 8), TILE);
        vint lo = vint_load(t->lo + i);
        vreal sum = vload(t->den + i);
        for (int64_t j = 0; j < end; j++) {
            vreal x = vload(s->t + j * TILE + i);
            if (j + base >= t->lo[i]) {
                x = vselect(lo > (lane_int)(j + base), x, vset(0));
                vstore(s->t + j * TILE + i, x);
            }
            sum += x;
        }
        vstore(t->den + i, sum);
    }
}

static void linear_part(const hybrid *a, scratch *s, tile *t, int64_t absorbed, int has_state, double lambda) {
    int64_t end = hybrid_lo(a, t->p_last), dp = padded(a->d);
    if (!a->F || end <= 0) return;
    panel *q = K(side_panel)(&s->q, t->c, HAS_F);
    if (lambda != 1)
        for (int64_t n = 0; n < a->F * TILE; n += VL) vstore(q->f + n, vload(q->f + n) * (real)lambda);
    if (has_state) {
        tile_gemm_ahead(s, TILE, dp, a->F, q->f, 1, TILE, s->s, dp, s->y, dp, 1);
        for (int64_t i = 0; i < TILE; i += VL) {
            vreal sum = vload(t->den + i);
            for (int64_t e = 0; e < a->F; e++) sum += vload(q->f + e * TILE + i) * s->z[e];
            vstore(t->den + i, sum);
        }
    }
    for (int64_t kp = absorbed; kp * TILE < end; kp++) {
        const panel *k = K(side_panel)(&s->k, kp, HAS_F | HAS_V);
        linear_weights(a, s, t, kp, q->f, k->f);
        add_values(a, s, 1, t->c, kp, s->t, k->v);
    }
}

static void put_rows(const lc_kargs *k, const hybrid *a, const span *at, int64_t h, const tile *t, const real *y) {
    const lc_view *c = &k->y[1], *arg = &k->y[2], *z = &k->y[3];
    int64_t dp = padded(a->d);
    for (int64_t p = t->p_first; p <= t->p_last; p++) {
        int64_t n = p - t->c * TILE, i = p + at->q_shift;
        real *to = row_at(&k->y[0], at->b, h, i), by = 1 / t->den[n];
        int64_t e = 0;
        for (; e + VL <= a->d; e += VL) vstore(to + e, vload(y + n * dp + e) * by);
        for (; e < a->d; e++) to[e] = y[n * dp + e] * by;
        if (c->data)
            *row_at(c, at->b, h, i) = a->softmax ? t->max[n] + (real)log((double)t->den[n]) : a->window ? t->max[n] : 0;
        if (a->softmax) continue;
        if (arg->data)
            ((int32_t *)arg->data)[at->b * arg->stride[0] + h * arg->stride[1] + i * arg->stride[2]] =
                (int32_t)(a->window ? t->at[n] + t->c * TILE + at->k_shift : i);
        if (z->data) *row_at(z, at->b, h, i) = t->den[n];
    }
}

/* Rows before the first token: 0, with a denominator that harms nobody. */
void K(put_padding)(const lc_kargs *k, const hybrid *a, const span *at, int64_t h) {
    for (int64_t i = 0; i < LC_MIN(at->p0 + at->q_shift, a->t); i++) {
        memset(row_at(&k->y[0], at->b, h, i), 0, (size_t)a->d * sizeof(real));
        if (k->y[1].data) *row_at(&k->y[1], at->b, h, i) = 0;
        if (a->softmax) continue;
        const lc_view *arg = &k->y[2];
        if (arg->data)
            ((int32_t *)arg->data)[at->b * arg->stride[0] + h * arg->stride[1] + i * arg->stride[2]] = (int32_t)i;
        if (k->y[3].data) *row_at(&k->y[3], at->b, h, i) = 1;
    }
}

void K(absorb)(const hybrid *a, scratch *s, int64_t index, int64_t n) {
    const panel *k = K(side_panel)(&s->k, index, HAS_F | HAS_V);
    int64_t dp = padded(a->d);
    tile_gemm_ahead(s, a->F, dp, n, k->f, TILE, 1, k->v, dp, s->s, dp, 1);
    for (int64_t e = 0; e < a->F; e++) {
        real sum = 0;
        if (n == TILE) {
            vreal v = vset(0);
            for (int64_t j = 0; j < TILE; j += VL) v += vload(k->f + e * TILE + j);
            sum = vsum(v);
        } else
            for (int64_t j = 0; j < n; j++) sum += k->f[e * TILE + j];
        s->z[e] += sum;
    }
}

void K(forward_tile)(const lc_kargs *k, const hybrid *a, scratch *s, const span *at, int64_t h, int64_t c,
                     int64_t *absorbed, int *has_state) {
    double gamma = hybrid_gamma(a, h), lambda = hybrid_lambda(a, gamma);
    int64_t dp = padded(a->d);
    tile t;
    tile_open(&t, a, at, c);
    int64_t boundary = LC_MIN(hybrid_lo(a, t.p_first), t.p_first) / TILE;
    for (; a->F && *absorbed < boundary; ++*absorbed, *has_state = 1) K(absorb)(a, s, *absorbed, TILE);
    s->ahead[AHEAD_OUT] = (ahead){(const char *)row_at(&k->y[0], at->b, h, t.p_first + at->q_shift),
                                k->y[0].stride[2] * (int64_t)sizeof(real), t.p_last + 1 - t.p_first};
    memset(s->y, 0, (size_t)(TILE * dp) * sizeof(real));
    if (a->window) {
        window_part(a, s, &t);
        if (!a->softmax) {
            for (int64_t n = 0; n < TILE * dp; n += VL) vstore(s->y + n, vload(s->y + n) * (real)gamma);
            for (int64_t n = 0; n < TILE; n++) t.den[n] *= (real)gamma;
        }
    }
    linear_part(a, s, &t, *absorbed, *has_state, lambda);
    put_rows(k, a, at, h, &t, s->y);
}

/* ---- a call without state
 * ---------------------------------------------------------------------------------------------- */
typedef struct job {
    const lc_kargs *k;
    const hybrid *call;
    int64_t panels; /* of the longest sequence */
    extent extent;
    size_t scratch_bytes;
    share share;
} job;

static void forward_batch(const job *j, scratch *s, const batch *w) {
    const hybrid *a = j->call;
    int64_t n_seg = j->share.segments, absorbed[TOGETHER] = {0}, first, n;
    int has_state[TOGETHER] = {0};
    span at;
    whole_span(a, w->b, &at);
    first = at.p0 / TILE, n = at.p1 > at.p0 ? (at.p1 - 1) / TILE + 1 - first : 0;
    int64_t begin = n, end = 0;
    for (int i = 0; i < w->n; i++) {
        int64_t h = w->h + i;
        K(side_open)(&s[i].q, a, &at, 0, h, a->q, NULL, 0, NULL);
        K(side_open)(&s[i].k, a, &at, 1, h, a->k, a->v, 0, i && h % a->group ? leader_of(&s[i - 1].k) : NULL);
        memset(s[i].s, 0, (size_t)(a->F * padded(a->d)) * sizeof(real)), memset(s[i].z, 0, (size_t)a->F * sizeof(real));
        if (w->from[i] == 0) K(put_padding)(j->k, a, &at, h);
        begin = LC_MIN(begin, w->from[i] * n / n_seg), end = LC_MAX(end, w->to[i] * n / n_seg);
    }
    if (a->kind == KIND_CAUSAL)
        for (int64_t u = w->from[0]; u < w->to[0] && 2 * u < n; u++) { /* a cheap and a dear tile make a pair */
            K(forward_tile)(j->k, a, s, &at, w->h, first + u, absorbed, has_state);
            if (n - 1 - u != u) K(forward_tile)(j->k, a, s, &at, w->h, first + n - 1 - u, absorbed, has_state);
        }
    else
        for (int64_t c = begin; c < end; c++)
            for (int i = 0; i < w->n; i++)
                if (c >= w->from[i] * n / n_seg && c < w->to[i] * n / n_seg)
                    K(forward_tile)(j->k, a, &s[i], &at, w->h + i, first + c, &absorbed[i], &has_state[i]);
}

static void forward_body(void *ctx, int64_t begin, int64_t end, int thread) {
    job *j = ctx;
    scratch s[TOGETHER];
    arena memory = {(char *)j->k->work + (size_t)thread * j->scratch_bytes, 0};
    batch w;
    K(scratch_carve)(&memory, j->call, &j->extent, s);
    while (share_take(&j->share, &begin, &end))
        while (share_batch(&j->share, j->call->h, &begin, end, &w)) forward_batch(j, s, &w);
}

static void plan(job *j, const lc_kargs *k, const hybrid *a) {
    *j = (job){.k = k, .call = a};
    j->panels = LC_MAX((a->t + LC_MAX(a->offset, 0) + TILE - 1) / TILE, 1);
    j->share.segments = segments_of(a, j->panels);
    int n = (int)reach(a, j->panels);
    j->extent = (extent){(int)heads_together(a, k->host->threads()), 1, n, a->window ? LC_MIN(n, BLOCK_PANELS) : 0, 0};
    arena w = {0};
    scratch s[TOGETHER];
    K(scratch_carve)(&w, a, &j->extent, s);
    j->scratch_bytes = w.used;
}

size_t K(chunked_forward_work)(const lc_kargs *k, const hybrid *a) {
    job j;
    plan(&j, k, a);
    return j.scratch_bytes * (size_t)k->host->threads();
}

int K(chunked_forward)(const lc_kargs *k, const hybrid *a) {
    job j;
    int threads = k->host->threads();
    plan(&j, k, a);
    double absorb = (double)(a->F + a->f), tile = 3 * (double)a->window + 2 * absorb; /* products of one token */
    share_out(&j.share, a, threads, a->F ? absorb / tile : 0);
    k->host->parallel(threads, 1, forward_body, &j);
    return LC_K_OK;
}
