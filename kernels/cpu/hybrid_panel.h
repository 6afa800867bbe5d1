/* hybrid_panel.h: the sequence in panels of TILE tokens. A `side` is the queries or the keys of one head; it loads
 * panels on demand, part by part, into a ring of slots, from the call's tensors or, for keys of earlier chunks, from
 * the cache, and computes their features. Rows outside the sequence are zeros and so are their features. Owns the
 * scratch memory of one thread. */
#ifndef LC_HYBRID_PANEL_H
#define LC_HYBRID_PANEL_H

#include "hybrid.h"
#include "hybrid_tile.h"

/* Where the tokens of one sequence lie. */
typedef struct span {
    int64_t b;
    int64_t p0, p1;           /* positions of the queries: p0 .. p1 - 1; keys end at p1 too */
    int64_t q_shift, k_shift; /* row of position p: p + shift */
    int64_t cached;           /* keys before this position lie in the cache */
    int64_t k_min;            /* keys before this one are in the state already */
    int64_t slot;
} span;

/* What a panel holds. x: queries or keys; v: values, or the gradients of the queries' results. */
enum { HAS_X = 1, HAS_XT = 2, HAS_V = 4, HAS_VT = 8, HAS_F = 16 };
typedef struct panel {
    int64_t index;
    int has;
    real *x, *v;   /* [TILE][dp] */
    real *xt, *vt; /* [dp][TILE] */
    real *f, *a;   /* [F][TILE]: features; before the clamp (backward only, else = f) */
} panel;

/* Rows that will be read or written soon. They lie far apart, so no hardware looks ahead for them; they are asked for a
 * few at a time between products, for all at once would wait for each other. */
typedef struct ahead {
    const char *row;
    int64_t stride, rows; /* bytes to the next, how many */
} ahead;
enum { AHEAD_OUT, AHEAD_Q, AHEAD_Y = AHEAD_Q + 2, AHEAD_K, AHEADS = AHEAD_K + 2 }; /* x and v of a side */

typedef struct side {
    const hybrid *call;
    const span *at;
    int is_key, n_slots;
    int step;      /* which way the panels will be asked for: 1, -1 */
    int64_t h, hx; /* query head; head of x and v */
    const lc_view *x, *v;
    const lc_view *cache; /* of earlier keys; NULL when there is none */
    real *row;            /* scratch [TILE][Fp] */
    real *w, *wt;         /* [d][f], the skip's identity added; [f][dp] (backward only) */
    struct side *leader;     /* a side of the same head of x and v, walked just before; its x and v are used. Or NULL */
    panel *slots;
    const panel *own;        /* [n_slots]: the slots' own memory */
    ahead *ahead;            /* [2]: of x, of v */
} side;

/* Scratch of one head; the heads that a thread walks together share u, t, y, y2, ahead. */
typedef struct scratch {
    side q, k;
    real *s, *z;  /* state [F][dp], [F] */
    real *u, *t;  /* [n][TILE], [max(F, TILE)][TILE] */
    real *y, *y2; /* [TILE][dp] */
    real *gm;     /* backward: [f][dp] */
    int64_t row_bytes;
    ahead *ahead; /* [AHEADS] */
} scratch;

/* Asks for the next few rows. Inlined, or else the compiler takes it for a function without effect. */
static inline __attribute__((always_inline)) void look_ahead(scratch *s) {
    int64_t n = 0;
    while (n < AHEADS - 1 && !s->ahead[n].rows) n++;
    ahead *a = s->ahead + n;
    for (int64_t rows = LC_MIN(a->rows, 4); rows > 0; rows--, a->rows--, a->row += a->stride)
        for (int64_t at = 0; at < s->row_bytes; at += 64) __builtin_prefetch(a->row + at, 0, 2);
}

enum { BLOCK_PANELS = 8 }; /* panels whose scores are held at once */

static inline int64_t padded(int64_t d) { return round_up(d, VL); }

/* Carves one thread's scratch for n heads, with rings of nq and nk panels. n_u: panels of scores. */
typedef struct extent {
    int n, nq, nk, n_u, backward;
} extent;
void K(scratch_carve)(arena *at, const hybrid *a, const extent *e, scratch *s);
/* Points a side at a head: weights are copied, the ring is emptied. leader: see side. */
void K(side_open)(side *s, const hybrid *call, const span *at, int is_key, int64_t h, const lc_view *x,
                  const lc_view *v, int transposed_w, side *leader);
static inline side *leader_of(side *s) { return s->leader ? s->leader : s; }
/* Panel `index` with at least these parts. */
panel *K(side_panel)(side *s, int64_t index, int parts);

/* Panels that are wanted again: those that a window can reach back from a tile, the tile's own, and one that has just
 * left the window, which the next head takes into its state. */
static inline int64_t reach(const hybrid *a, int64_t panels) {
    int64_t back = a->kind == KIND_SLIDING ? a->window - 1 : a->window % TILE ? 2 * a->window - 1 : a->window;
    int64_t n = a->kind == KIND_CAUSAL ? panels : (LC_MAX(back, 0) + TILE - 1) / TILE + 2;
    return LC_MAX(LC_MIN(n, panels), 1);
}

/* tile_gemm in strips of 8 rows, with a look ahead at each. */
static inline void tile_gemm_ahead(scratch *s, int64_t m, int64_t n, int64_t k, const real *a, int64_t ra, int64_t ca,
                                   const real *b, int64_t ldb, real *c, int64_t ldc, int add) {
    for (int64_t i = 0; i < m; i += 8) {
        look_ahead(s);
        K(tile_gemm)(LC_MIN(m - i, 8), n, k, a + i * ra, ra, ca, b, ldb, c + i * ldc, ldc, add);
    }
}

/* Columns (queries of panel c) that rows jb .. jb + 7 (keys of panel kp) may concern, in whole vectors: with softmax;
 * linearly. */
enum { GRAIN = 16 };
static inline void columns(const hybrid *a, int linear, int64_t c, int64_t kp, int64_t jb, int64_t *from, int64_t *to) {
    int64_t j0 = kp * TILE + jb, c0 = c * TILE;
    int64_t lo = linear ? hybrid_hi(a, j0) : j0, hi = linear ? c0 + TILE : hybrid_hi(a, j0 + 7);
    lo = LC_MAX(lo - c0, 0), hi = LC_MIN(hi - c0, TILE);
    *from = LC_MIN(lo, TILE) / GRAIN * GRAIN;
    *to = hi > *from ? round_up(hi, GRAIN) : *from;
}
/* Rows (keys of panel kp) that queries ib .. ib + 7 of panel c concern. */
static inline void keys_of(const hybrid *a, int linear, int64_t c, int64_t kp, int64_t ib, int64_t *from, int64_t *to) {
    int64_t i0 = c * TILE + ib, k0 = kp * TILE;
    int64_t lo = linear ? k0 : hybrid_lo(a, i0), hi = linear ? hybrid_lo(a, i0 + 7) : i0 + 8;
    *from = LC_MAX(lo - k0, 0);
    *to = LC_MAX(LC_MIN(hi - k0, TILE), *from);
}

#endif
