/* hybrid_state.c: hybrid attention that carries a state: prefill in chunks of any size, and decoding. After p tokens
 * the state and zsum hold the keys before lo(p), where the next query's window begins, and the cache holds the last 2 *
 * window keys and values, at (position mod 2 * window). A slot of the cache is k [g, 2 window, d], v [g, 2 window, d]
 * and, for map none, the features [heads of mk, 2 window, F]. Few tokens go one at a time, from where the rows lie;
 * more go through the tiles of hybrid_forward.c. */
#include "hybrid_forward.h"
#include "hybrid_row.h"

enum { FEW = 4 };

typedef struct job {
    const lc_kargs *k;
    const hybrid *call;
    const lc_view *state, *zsum, *cache, *slot, *pos;
    int one_by_one, alone; /* rows through row_step; a single token, so a head may write the cache at once */
    extent extent;
    int64_t panels;
    size_t scratch_bytes;
} job;

/* Keys before this position are in the state once p tokens are seen. */
static int64_t absorbed_at(const hybrid *a, int64_t p) { return a->window ? hybrid_lo(a, p) : p; }

static void open_span(const job *j, int64_t b, span *at) {
    const hybrid *a = j->call;
    int64_t start = start_of(a->start, b, a->t);
    int64_t slot = j->slot->data ? ((const int32_t *)j->slot->data)[b * j->slot->stride[0]] : b;
    int64_t pos = ((const int32_t *)j->pos->data)[slot * j->pos->stride[0]];
    *at = (span){.b = b,
                 .p0 = pos,
                 .p1 = pos + a->t - start,
                 .q_shift = start - pos,
                 .k_shift = start - pos,
                 .cached = pos,
                 .slot = slot};
    at->k_min = absorbed_at(a, pos);
}

static int check_slots(const job *j) {
    int64_t n = j->state->dim[0];
    for (int64_t b = 0; b < j->call->b; b++) {
        int64_t slot = j->slot->data ? ((const int32_t *)j->slot->data)[b * j->slot->stride[0]] : b;
        int bad = slot < 0 || slot >= n;
        int64_t pos = bad ? 0 : ((const int32_t *)j->pos->data)[slot * j->pos->stride[0]];
        if (!bad && pos >= 0) continue;
        if (j->k->fault) *j->k->fault = bad ? (lc_fault){slot, n, b} : (lc_fault){pos, INT32_MAX, slot};
        return LC_K_RANGE;
    }
    return LC_K_OK;
}

/* Row of a cached key (which 0), value (1) or feature (2) of a head at position p. */
static real *cached_row(const job *j, const span *at, int which, int64_t head, int64_t p) {
    const hybrid *a = j->call;
    int64_t ring = 2 * a->window, block = a->g * ring * a->d;
    real *slot = (real *)j->cache->data + at->slot * j->cache->stride[0];
    return slot +
           (which < 2 ? which * block + (head * ring + p % ring) * a->d : 2 * block + (head * ring + p % ring) * a->F);
}

/* Row of x at position p, and how many follow at *stride before the place changes. */
static const real *rows_from(const job *j, const span *at, int which, int64_t head, int64_t p, int64_t to, int64_t *n,
                             int64_t *stride) {
    const hybrid *a = j->call;
    if (p < at->cached) {
        *n = LC_MIN(LC_MIN(to, at->cached) - p, 2 * a->window - p % (2 * a->window));
        *stride = which < 2 ? a->d : a->F;
        return cached_row(j, at, which, head, p);
    }
    const lc_view *v = which == 0 ? a->k : which == 1 ? a->v : a->mk;
    *n = to - p, *stride = v->stride[2];
    return row_at(v, at->b, head, p + at->k_shift);
}

static void remember(const job *j, const span *at, int which, int64_t head, int64_t p) {
    int64_t n, stride;
    const span fresh = {.b = at->b, .k_shift = at->k_shift};
    memcpy(cached_row(j, at, which, head, p), rows_from(j, &fresh, which, head, p, p + 1, &n, &stride),
           (size_t)(which < 2 ? j->call->d : j->call->F) * sizeof(real));
}

/* ---- one token at a time
 * ------------------------------------------------------------------------------------------------- */
typedef struct token {
    real *x, *f; /* [f], [F] */
    real *u, *y; /* [2 window], [d] */
} token;

static void carve_token(const job *j, arena *w, token *t) {
    const hybrid *a = j->call;
    t->x = carve(w, (size_t)a->F * sizeof(real)), t->f = carve(w, (size_t)a->F * sizeof(real));
    t->u = carve(w, (size_t)(2 * a->window + 1) * sizeof(real)), t->y = carve(w, (size_t)a->d * sizeof(real));
}

/* f [F] of one row x [d]. */
static void row_features(const hybrid *a, int key, int64_t h, const real *x, token *t) {
    const lc_view *m = key ? a->mk : a->mq;
    real bias = (real)bias_at(key ? a->bk : a->bq, h);
    for (int64_t i = 0; i < a->f; i++) t->x[i] = bias + (a->skip ? x[i] : 0);
    rows_sum(a->f, a->d, x, weights_at(m, h), m->stride[1], t->x);
    K(map_line)(a->map, a->full, a->f, (real)a->feature_eps, t->x, t->f);
}

/* The state of a head takes in keys from .. to - 1. */
static void row_absorb(const job *j, const span *at, int64_t h, int64_t from, int64_t to, token *t) {
    const hybrid *a = j->call;
    real *s = row_at(j->state, at->slot, h, 0),
         *z = (real *)j->zsum->data + at->slot * j->zsum->stride[0] + h * j->zsum->stride[1];
    for (int64_t p = from; a->F && p < to; p++) {
        int64_t n, stride;
        const real *v = rows_from(j, at, 1, h / a->group, p, p + 1, &n, &stride), *f = t->f;
        if (a->map == MAP_NONE)
            f = rows_from(j, at, 2, h / a->mk_group, p, p + 1, &n, &stride);
        else
            row_features(a, 1, h, rows_from(j, at, 0, h / a->group, p, p + 1, &n, &stride), t);
        for (int64_t e = 0; e < a->F; e++) {
            real x = f[e];
            real *row = s + e * j->state->stride[2];
            int64_t c = 0;
            for (; c + VL <= a->d; c += VL) vstore(row + c, vload(row + c) + x * vload(v + c));
            for (; c < a->d; c++) row[c] += x * v[c];
            z[e] += x;
        }
    }
}

static real row_window(const job *j, const span *at, int64_t h, int64_t p, const real *q, real *max, token *t) {
    const hybrid *a = j->call;
    int64_t lo = hybrid_lo(a, p), n, stride, g = h / a->group;
    for (int64_t i = lo; i <= p; i += n) {
        const real *k = rows_from(j, at, 0, g, i, p + 1, &n, &stride);
        rows_dot(a->d, n, q, k, stride, (real)a->scale, t->u + i - lo);
    }
    *max = row_max(p + 1 - lo, t->u);
    real sum = row_exp(p + 1 - lo, t->u, *max);
    for (int64_t i = lo; i <= p; i += n) {
        const real *v = rows_from(j, at, 1, g, i, p + 1, &n, &stride);
        rows_sum(a->d, n, t->u + i - lo, v, stride, t->y);
    }
    return sum;
}

/* Query p of one head; before it, keys up to p are in place. */
static void row_step(const job *j, const span *at, int64_t h, int64_t p, token *t) {
    const hybrid *a = j->call;
    double gamma = hybrid_gamma(a, h), lambda = hybrid_lambda(a, gamma);
    int64_t i = p + at->q_shift;
    const real *q = row_at(a->q, at->b, h, i), *f = t->f;
    real den = a->window ? 0 : (real)a->eps, max = 0;
    memset(t->y, 0, (size_t)a->d * sizeof(real));
    if (a->window) {
        den = row_window(j, at, h, p, q, &max, t) * (real)gamma;
        for (int64_t e = 0; e < a->d; e++) t->y[e] *= (real)gamma;
    } else
        row_absorb(j, at, h, p, p + 1, t);
    if (a->F && hybrid_lo(a, p) > 0) {
        const real *s = row_at(j->state, at->slot, h, 0);
        const real *z = (const real *)j->zsum->data + at->slot * j->zsum->stride[0] + h * j->zsum->stride[1];
        if (a->map == MAP_NONE)
            f = row_at(a->mq, at->b, h, i);
        else
            row_features(a, 0, h, q, t);
        for (int64_t e = 0; e < a->F; e++) t->x[e] = f[e] * (real)lambda;
        rows_sum(a->d, a->F, t->x, s, j->state->stride[2], t->y);
        den += row_dot(a->F, t->x, z);
    }
    real *y = row_at(&j->k->y[0], at->b, h, i);
    for (int64_t e = 0; e < a->d; e++) y[e] = t->y[e] / den;
    if (j->k->y[1].data) *row_at(&j->k->y[1], at->b, h, i) = max;
    if (j->k->y[3].data) *row_at(&j->k->y[3], at->b, h, i) = den;
    if (a->window) row_absorb(j, at, h, hybrid_lo(a, p), hybrid_lo(a, p + 1), t);
}

static void rows_body(void *ctx, int64_t begin, int64_t end, int thread) {
    const job *j = ctx;
    const hybrid *a = j->call;
    arena w = {(char *)j->k->work + (size_t)thread * j->scratch_bytes, 0};
    token t;
    carve_token(j, &w, &t);
    for (int64_t n = begin; n < end; n++) {
        int64_t h = n % a->h;
        span at;
        open_span(j, n / a->h, &at);
        K(put_padding)(j->k, a, &at, h);
        for (int64_t p = at.p0; p < at.p1; p++) row_step(j, &at, h, p, &t);
        if (!j->alone || !a->window || at.p1 == at.p0) continue;
        /* The row written is p - 2 window's, which no head needs any more. */
        if (h % a->group == 0) remember(j, &at, 0, h / a->group, at.p0), remember(j, &at, 1, h / a->group, at.p0);
        if (a->map == MAP_NONE && h % a->mk_group == 0) remember(j, &at, 2, h / a->mk_group, at.p0);
    }
}

/* ---- tiles
 * ------------------------------------------------------------------------------------------------------------- */
static void move_state(const job *j, const span *at, int64_t h, scratch *s, int store) {
    const hybrid *a = j->call;
    int64_t dp = padded(a->d);
    real *z = (real *)j->zsum->data + at->slot * j->zsum->stride[0] + h * j->zsum->stride[1];
    for (int64_t e = 0; e < a->F; e++) {
        real *row = row_at(j->state, at->slot, h, e);
        if (store)
            memcpy(row, s->s + e * dp, (size_t)a->d * sizeof(real)), z[e] = s->z[e];
        else
            copy_row(s->s + e * dp, row, a->d, dp), s->z[e] = z[e];
    }
}

static void tiles_body(void *ctx, int64_t begin, int64_t end, int thread) {
    const job *j = ctx;
    const hybrid *a = j->call;
    scratch s;
    arena w = {(char *)j->k->work + (size_t)thread * j->scratch_bytes, 0};
    K(scratch_carve)(&w, a, &j->extent, &s);
    for (int64_t n = begin; n < end; n++) {
        int64_t h = n % a->h;
        span at;
        open_span(j, n / a->h, &at);
        K(put_padding)(j->k, a, &at, h);
        if (at.p1 == at.p0) continue;
        int64_t absorbed = at.k_min / TILE, last = absorbed_at(a, at.p1);
        int has_state = at.k_min > 0;
        K(side_open)(&s.q, a, &at, 0, h, a->q, NULL, 0, NULL);
        K(side_open)(&s.k, a, &at, 1, h, a->k, a->v, 0, NULL);
        s.k.cache = a->window ? j->cache : NULL;
        move_state(j, &at, h, &s, 0);
        for (int64_t c = at.p0 / TILE; c * TILE < at.p1; c++)
            K(forward_tile)(j->k, a, &s, &at, h, c, &absorbed, &has_state);
        for (; a->F && absorbed < last / TILE; absorbed++) K(absorb)(a, &s, absorbed, TILE);
        if (a->F && last % TILE && last > at.k_min) K(absorb)(a, &s, last / TILE, last % TILE);
        move_state(j, &at, h, &s, 1);
    }
}

/* The last 2 * window rows of each row head enter the cache. */
static void cache_body(void *ctx, int64_t begin, int64_t end, int thread) {
    const job *j = ctx;
    const hybrid *a = j->call;
    int64_t features = a->map == MAP_NONE && a->F ? a->h / a->mk_group : 0;
    (void)thread;
    for (int64_t n = begin; n < end; n++) {
        int64_t head = n % (a->g + features);
        span at;
        open_span(j, n / (a->g + features), &at);
        for (int64_t p = LC_MAX(at.p0, at.p1 - 2 * a->window); p < at.p1; p++) {
            if (head < a->g)
                remember(j, &at, 0, head, p), remember(j, &at, 1, head, p);
            else
                remember(j, &at, 2, head - a->g, p);
        }
    }
}

/* ---- entry
 * ------------------------------------------------------------------------------------------------------------- */
static int plan(job *j, const lc_kargs *k, const hybrid *a) {
    *j = (job){.k = k,
               .call = a,
               .state = k->x + 9,
               .zsum = k->x + 10,
               .cache = k->x + 11,
               .slot = k->x + 12,
               .pos = k->x + 13};
    if (!j->zsum->data || !j->pos->data || (a->window && !j->cache->data)) return LC_K_UNSUPPORTED;
    if (j->state->dtype != LC_K_REAL || j->zsum->dtype != LC_K_REAL || (a->window && j->cache->dtype != LC_K_REAL))
        return LC_K_UNSUPPORTED;
    j->one_by_one = a->t <= FEW || (k->host->option(LC_OPTION_PLAIN_HYBRID));
    j->alone = a->t == 1;
    j->panels = (a->t + 2 * a->window) / TILE + 3;
    int n = (int)reach(a, j->panels);
    j->extent = (extent){1, 1, n, a->window ? LC_MIN(n, BLOCK_PANELS) : 0, 0};
    arena w = {0};
    scratch s;
    token t;
    if (j->one_by_one)
        carve_token(j, &w, &t);
    else
        K(scratch_carve)(&w, a, &j->extent, &s);
    j->scratch_bytes = w.used;
    return LC_K_OK;
}

size_t K(stateful_forward_work)(const lc_kargs *k, const hybrid *a) {
    job j;
    return plan(&j, k, a) ? 0 : j.scratch_bytes * (size_t)k->host->threads();
}

int K(stateful_forward)(const lc_kargs *k, const hybrid *a) {
    job j;
    int status = plan(&j, k, a);
    if (!status) status = check_slots(&j);
    if (status) return status;
    k->host->parallel(a->b * a->h, 1, j.one_by_one ? rows_body : tiles_body, &j);
    int64_t heads = a->g + (a->map == MAP_NONE && a->F ? a->h / a->mk_group : 0);
    if (a->window && !j.alone) k->host->parallel(a->b * heads, 1, cache_body, &j);
    return LC_K_OK;
}
