/* hybrid.h: what the files of hybrid and softmax attention share: the call taken apart, the geometry of window and
 * linear keys, and the places of the rows. Positions p count from the first real token (start[b]), so p = pos + i -
 * start for row i of a call. Query p attends with softmax to keys lo(p) .. p and linearly to keys 0 .. lo(p) - 1.
 * Softmax attention is the case without a linear term. */
#ifndef LC_HYBRID_H
#define LC_HYBRID_H

#include "feature_map.h"

enum { KIND_TERRACE, KIND_SLIDING, KIND_CAUSAL }; /* causal: lo = 0 */

typedef struct hybrid {
    int64_t b, h, g, t, d, f, F; /* f inputs of a map, F its features; F 0: there is no linear term */
    int64_t group, mk_group;     /* query heads a key head, a head of mk */
    int64_t window;
    int map, full, skip, kind, affine;
    int64_t offset; /* key position of query 0, in a call without state */
    int softmax;    /* softmax attention: gamma 1, and the saved row value is log-sum-exp */
    double scale, eps, feature_eps;
    const lc_view *q, *k, *v, *mq, *mk, *bq, *bk, *factors, *start;
} hybrid;

/* x points at q, k, v, mq, mk, bq, bk, factors, start in this order. */
static inline int hybrid_open(hybrid *a, const lc_kargs *k, const lc_view *x) {
    const int32_t *i = k->i;
    *a = (hybrid){.q = x,
                  .k = x + 1,
                  .v = x + 2,
                  .mq = x + 3,
                  .mk = x + 4,
                  .bq = x + 5,
                  .bk = x + 6,
                  .factors = x + 7,
                  .start = x + 8};
    a->map = i[0], a->full = i[1], a->skip = i[2], a->window = i[3], a->kind = i[4], a->affine = i[5];
    a->eps = k->f[1], a->feature_eps = k->f[2];
    a->b = a->q->dim[0], a->h = a->q->dim[1], a->t = a->q->dim[2], a->d = a->q->dim[3], a->g = a->k->dim[1];
    a->scale = k->f[0] != 0 ? k->f[0] : 1 / sqrt((double)a->d);
    a->group = a->g ? a->h / a->g : 1;
    a->mk_group = 1;
    if (a->mq->data && a->mk->data) {
        a->f = a->map == MAP_NONE ? a->mq->dim[3] : a->mq->dim[2];
        a->F = map_features(a->map, a->full, a->f);
        if (a->map == MAP_NONE && a->mk->dim[1] > 0) a->mk_group = a->h / a->mk->dim[1];
    }
    for (int n = 0; n < 8; n++)
        if (x[n].data && x[n].dtype != LC_K_REAL) return LC_K_UNSUPPORTED;
    if (a->window > 0 && !a->factors->data) return LC_K_UNSUPPORTED;
    if (a->map == MAP_NONE || !a->F) a->skip = 0;
    return LC_K_OK;
}

static inline int64_t hybrid_lo(const hybrid *a, int64_t p) {
    if (a->kind == KIND_CAUSAL) return 0;
    if (!a->window) return p + 1;
    if (a->kind == KIND_SLIDING) return LC_MAX(p - a->window + 1, 0);
    return LC_MAX(p / a->window - 1, 0) * a->window;
}
/* The first query that sees key j linearly. */
static inline int64_t hybrid_hi(const hybrid *a, int64_t j) {
    if (a->kind == KIND_CAUSAL) return INT64_MAX / 2;
    if (!a->window) return j;
    return a->kind == KIND_SLIDING ? j + a->window : (j / a->window + 2) * a->window;
}

static inline double hybrid_gamma(const hybrid *a, int64_t h) {
    if (a->softmax) return 1;
    return a->window ? 1 / (1 + exp(-(double)((const real *)a->factors->data)[h])) : 0;
}
static inline double hybrid_lambda(const hybrid *a, double gamma) { return a->window && a->affine ? 1 - gamma : 1; }

static inline int64_t start_of(const lc_view *start, int64_t b, int64_t t) {
    if (!start->data) return 0;
    int64_t s = ((const int32_t *)start->data)[b * start->stride[0]];
    return s < 0 ? 0 : LC_MIN(s, t);
}

/* Row [b, h, t] of a view of four dims; element [b, h, t] of one of three. */
static inline real *row_at(const lc_view *v, int64_t b, int64_t h, int64_t t) {
    return (real *)v->data + b * v->stride[0] + h * v->stride[1] + t * v->stride[2];
}
static inline real *weights_at(const lc_view *m, int64_t h) { return (real *)m->data + h * m->stride[0]; }
static inline double bias_at(const lc_view *b, int64_t h) { return b->data ? ((const real *)b->data)[h] : 0; }

/* A workspace handed out piece by piece, each 64-byte aligned. Without a base it only measures: pieces are NULL. */
typedef struct arena {
    char *base;
    size_t used;
} arena;
static inline void *carve(arena *w, size_t bytes) {
    char *p = w->base ? w->base + w->used : NULL;
    w->used += (bytes + 63) / 64 * 64;
    return p;
}

/* The plain twins (hybrid_plain.c). */
int K(hybrid_plain)(const lc_kargs *k, const hybrid *a);
size_t K(hybrid_plain_work)(const hybrid *a);
int K(hybrid_plain_backward)(const lc_kargs *k, const hybrid *a);
size_t K(hybrid_plain_backward_work)(const hybrid *a);

/* The chunked kernels (hybrid_forward.c, hybrid_backward.c), of softmax attention too. */
int K(chunked_forward)(const lc_kargs *k, const hybrid *a);
size_t K(chunked_forward_work)(const lc_kargs *k, const hybrid *a);
int K(stateful_forward)(const lc_kargs *k, const hybrid *a); /* hybrid_state.c */
size_t K(stateful_forward_work)(const lc_kargs *k, const hybrid *a);
/* Results y[0..7] as in hybrid_attention_backward; g, y and the saved row values are given apart, z NULL for softmax
 * attention. */
typedef struct saved {
    const lc_view *g, *y, *c, *argmax, *z;
} saved;
int K(chunked_backward)(const lc_kargs *k, const hybrid *a, const saved *from);
size_t K(chunked_backward_work)(const lc_kargs *k, const hybrid *a);

#endif
