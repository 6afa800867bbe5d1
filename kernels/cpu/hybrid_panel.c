/* hybrid_panel.c: see hybrid_panel.h. */
#include "hybrid_panel.h"

static void carve_side(arena *at, const hybrid *a, int n, int backward, side *s) {
    size_t tile = (size_t)(padded(a->d) * TILE) * sizeof(real), features = (size_t)(a->F * TILE) * sizeof(real);
    panel *slots = carve(at, (size_t)n * sizeof(panel)), *own = carve(at, (size_t)n * sizeof(panel));
    s->n_slots = n, s->slots = slots, s->own = own;
    s->w = carve(at, (size_t)(a->d * a->f) * sizeof(real));
    s->wt = backward ? carve(at, (size_t)(a->f * padded(a->d)) * sizeof(real)) : NULL;
    for (int i = 0; i < n; i++) {
        panel p = {.index = -1};
        p.x = carve(at, tile), p.v = carve(at, tile), p.xt = carve(at, tile);
        p.vt = backward ? carve(at, tile) : NULL;
        p.f = carve(at, features);
        p.a = backward ? carve(at, features) : p.f;
        if (own) own[i] = p;
    }
}

void K(scratch_carve)(arena *at, const hybrid *a, const extent *e, scratch *s) {
    int64_t dp = padded(a->d), rows = LC_MAX(padded(a->F), TILE);
    size_t tile = (size_t)(dp * TILE) * sizeof(real);
    s->u = carve(at, (size_t)(e->n_u * TILE * TILE) * sizeof(real)),
    s->t = carve(at, (size_t)(rows * TILE) * sizeof(real));
    s->y = carve(at, tile), s->y2 = carve(at, tile);
    s->q.row = s->k.row = carve(at, (size_t)(padded(a->F) * TILE) * sizeof(real));
    s->row_bytes = a->d * (int64_t)sizeof(real);
    s->ahead = carve(at, AHEADS * sizeof(ahead));
    if (s->ahead) memset(s->ahead, 0, AHEADS * sizeof(ahead));
    s->q.ahead = s->ahead ? s->ahead + AHEAD_Q : NULL, s->k.ahead = s->ahead ? s->ahead + AHEAD_K : NULL;
    for (int i = 0; i < e->n; i++) {
        s[i] = s[0];
        carve_side(at, a, e->nq, e->backward, &s[i].q);
        carve_side(at, a, e->nk, e->backward, &s[i].k);
        s[i].s = carve(at, (size_t)(a->F * dp) * sizeof(real)), s[i].z = carve(at, (size_t)a->F * sizeof(real));
        s[i].gm = e->backward ? carve(at, (size_t)(a->f * dp) * sizeof(real)) : NULL;
    }
}

void K(side_open)(side *s, const hybrid *call, const span *at, int is_key, int64_t h, const lc_view *x,
                  const lc_view *v, int transposed_w, side *leader) {
    s->leader = leader;
    s->call = call, s->at = at, s->is_key = is_key, s->h = h, s->x = x, s->v = v, s->cache = NULL;
    s->step = 1;
    s->hx = is_key ? h / call->group : h;
    memcpy(s->slots, s->own, (size_t)s->n_slots * sizeof(panel));
    if (!call->F || call->map == MAP_NONE) return;
    const lc_view *m = is_key ? call->mk : call->mq;
    const real *w = weights_at(m, h);
    int64_t d = call->d, f = call->f, dp = padded(d);
    for (int64_t j = 0; j < d; j++) {
        memcpy(s->w + j * f, w + j * m->stride[1], (size_t)f * sizeof(real));
        if (call->skip) s->w[j * f + j] += 1; /* x + x W = x (I + W) */
    }
    for (int64_t i = 0; transposed_w && i < f; i++)
        for (int64_t j = 0; j < dp; j++) s->wt[i * dp + j] = j < d ? s->w[j * f + i] : 0;
}

/* The tokens of a panel that exist: from .. to - 1 of its rows. */
static void valid_rows(const side *s, int64_t index, int64_t *from, int64_t *to) {
    int64_t first = s->is_key ? s->at->k_min : s->at->p0;
    *from = LC_MIN(LC_MAX(first - index * TILE, 0), TILE);
    *to = LC_MAX(LC_MIN(s->at->p1 - index * TILE, TILE), *from);
}

/* Row of x (which 0), v (1) or ready features (2) at position p. A slot of the cache is laid out as hybrid_state.c
 * says. */
static const real *token_row(const side *s, int which, int64_t p) {
    const span *at = s->at;
    const hybrid *a = s->call;
    int64_t head = which < 2 ? s->hx : s->is_key ? s->h / a->mk_group : s->h;
    if (s->is_key && p < at->cached) {
        const real *slot = (const real *)s->cache->data + at->slot * s->cache->stride[0];
        int64_t ring = 2 * a->window, row = head * ring + p % ring, block = a->g * ring * a->d;
        return slot + (which < 2 ? which * block + row * a->d : 2 * block + row * a->F);
    }
    const lc_view *v = which == 2 ? (s->is_key ? a->mk : a->mq) : which ? s->v : s->x;
    return row_at(v, at->b, head, p + (s->is_key ? at->k_shift : at->q_shift));
}

static void look_at_panel(const side *s, int which, int64_t index) {
    int64_t from, end, p = index * TILE;
    s->ahead[which].rows = 0;
    if (index < 0 || !s->step) return;
    valid_rows(s, index, &from, &end);
    if (from == end || (s->is_key && p < s->at->cached)) return;
    const lc_view *v = which ? s->v : s->x;
    s->ahead[which] =
        (ahead){(const char *)token_row(s, which, p + from), v->stride[2] * (int64_t)sizeof(real), end - from};
}

static void load_rows(const side *s, int which, int64_t index, real *to) {
    int64_t d = s->call->d, dp = padded(d), from, end, p = index * TILE;
    valid_rows(s, index, &from, &end);
    memset(to, 0, (size_t)(from * dp) * sizeof(real));
    memset(to + end * dp, 0, (size_t)((TILE - end) * dp) * sizeof(real));
    for (int64_t i = from; i < end; i++) copy_row(to + i * dp, token_row(s, which, p + i), d, dp);
    look_at_panel(s, which, index + s->step);
}

/* [dp][TILE] straight from the rows, where they are whole and evenly spaced; returns 0 where not. */
static int transpose_in_place(const side *s, int which, int64_t index, real *to) {
    int64_t d = s->call->d, from, end, p = index * TILE;
    const lc_view *v = which ? s->v : s->x;
    valid_rows(s, index, &from, &end);
    if (d % VL || from || end < TILE || (s->is_key && p < s->at->cached)) return 0;
    K(tile_transpose)(d, token_row(s, which, p), v->stride[2], to);
    look_at_panel(s, which, index + s->step);
    return 1;
}

/* map none: [F][TILE] from rows of F. */
static void ready_features(side *s, int64_t index, real *f) {
    const hybrid *a = s->call;
    int64_t fp = padded(a->F), from, end;
    valid_rows(s, index, &from, &end);
    memset(s->row, 0, (size_t)(fp * TILE) * sizeof(real));
    for (int64_t i = from; i < end; i++)
        memcpy(s->row + i * fp, token_row(s, 2, index * TILE + i), (size_t)a->F * sizeof(real));
    for (int64_t e = 0; e < a->F; e += VL) { /* the last block may reach past F: through a small tile */
        real part[VL * TILE];
        K(tile_transpose)(VL, s->row + e, fp, part);
        memcpy(f + e * TILE, part, (size_t)(LC_MIN(VL, a->F - e) * TILE) * sizeof(real));
    }
}

static void features(side *s, panel *p) {
    const hybrid *a = s->call;
    int64_t from, end;
    if (a->map == MAP_NONE) {
        ready_features(s, p->index, p->f);
        return;
    }
    real bias = (real)bias_at(s->is_key ? a->bk : a->bq, s->h);
    for (int64_t n = 0; bias != 0 && n < a->f * TILE; n += VL) vstore(p->a + n, vset(bias));
    K(tile_gemm)(a->f, TILE, a->d, s->w, 1, a->f, p->xt, TILE, p->a, TILE, bias != 0);
    K(map_tile)(a->map, a->full, a->f, (real)a->feature_eps, p->a, p->f);
    valid_rows(s, p->index, &from, &end);
    if (from == 0 && end == TILE) return;
    for (int64_t i = 0; i < a->F; i++) {
        memset(p->f + i * TILE, 0, (size_t)from * sizeof(real));
        memset(p->f + i * TILE + end, 0, (size_t)(TILE - end) * sizeof(real));
    }
}

/* Parts missing of x, v and their transposes. */
static void load_parts(side *s, panel *p, int parts, int missing) {
    int64_t dp = padded(s->call->d);
    for (int which = 0; which < 2; which++) { /* x, v */
        int rows = which ? HAS_V : HAS_X, columns = which ? HAS_VT : HAS_XT;
        real *r = which ? p->v : p->x, *c = which ? p->vt : p->xt;
        if (missing & columns && !((parts | p->has) & rows)) {
            if (transpose_in_place(s, which, p->index, c))
                missing &= ~columns;
            else
                missing |= rows, p->has |= rows;
        }
        if (missing & rows) load_rows(s, which, p->index, r);
        if (missing & columns) K(tile_transpose)(dp, r, dp, c);
    }
}

panel *K(side_panel)(side *s, int64_t index, int parts) {
    panel *p = &s->slots[index % s->n_slots];
    if (p->index != index) p->index = index, p->has = 0;
    if (parts & HAS_F && s->call->map != MAP_NONE) parts |= HAS_XT;
    int missing = parts & ~p->has;
    if (s->leader && parts & ~HAS_F) {
        const panel *from = K(side_panel)(s->leader, index, parts & ~HAS_F);
        p->x = from->x, p->v = from->v, p->xt = from->xt, p->vt = from->vt;
    } else
        load_parts(s, p, parts, missing);
    if (missing & HAS_F) features(s, p);
    p->has |= parts;
    return p;
}
