/* hybrid_share.h: how the work of an attention call is shared out. Each head is cut into segments, by the shapes alone,
 * so that results do not depend on the threads; an item is a run of segments, maybe of several heads. Segments that
 * follow each other in an item carry the state on; an item that begins inside a head takes in all keys before it anew.
 * So items are whole heads as long as there are enough for each thread, and the rest is one line of segments, cut into
 * items that cost the same with what they take in anew. Heads of an item walk along the sequence together: rows of
 * neighbouring heads lie side by side, in the same pages of memory, and heads of a group read the same keys. */
#ifndef LC_HYBRID_SHARE_H
#define LC_HYBRID_SHARE_H

#include <stdatomic.h>

#include "hybrid.h"

typedef struct share {
    int64_t segments, heads; /* of a head; of the call */
    int64_t together;        /* heads that walk together */
    int64_t whole, parts;    /* items of that many whole heads; items that the other heads are cut into */
    double again, most;      /* cost of taking in a segment, doing one being 1; cost of an item among `parts` */
    atomic_llong next;
} share;

static inline int64_t segments_of(const hybrid *a, int64_t panels) {
    if (a->kind == KIND_CAUSAL) return (panels + 1) / 2;
    return LC_MAX(LC_MIN(LC_MIN(128 / LC_MAX(a->b * a->h, 1), panels / 2), 16), 1);
}

enum { TOGETHER = 4 };
static inline int64_t heads_together(const hybrid *a, int threads) {
    if (a->kind == KIND_CAUSAL) return 1;
    int64_t most = a->group > 1 && a->group < TOGETHER ? a->group : TOGETHER;
    return LC_MAX(LC_MIN(a->b * a->h / threads, most), 1);
}

/* Where an item ends that begins at `from`. Beginning and end of a head are the same place. */
static inline int64_t share_end(const share *s, int64_t from) {
    int64_t n = (int64_t)(s->most - s->again * (double)(from % s->segments) + 1e-6);
    return LC_MIN(from + LC_MAX(n, 0), s->heads * s->segments);
}

static inline int share_enough(const share *s) {
    int64_t at = s->whole * s->together * s->segments;
    for (int64_t n = 0; n < s->parts; n++) at = share_end(s, at);
    return at == s->heads * s->segments;
}

/* s->segments is set. */
static inline void share_out(share *s, const hybrid *a, int threads, double again) {
    s->heads = a->b * a->h, s->again = again, s->together = heads_together(a, threads);
    s->whole = a->kind == KIND_CAUSAL ? 0 : s->heads / (threads * s->together) * threads;
    s->parts = a->kind == KIND_CAUSAL ? 4 * threads : threads;
    atomic_init(&s->next, 0);
    int64_t rest = s->heads - s->whole * s->together;
    double low = 0, high = (double)(rest * s->segments);
    if (!rest) s->parts = 0;
    while (s->parts && high - low > 0.25) { /* ends lie on segments: finer makes no difference */
        s->most = (low + high) / 2;
        if (share_enough(s))
            high = s->most;
        else
            low = s->most;
    }
    s->most = high;
}

/* The next item; 0 when none is left. */
static inline int share_take(share *s, int64_t *begin, int64_t *end) {
    int64_t item = atomic_fetch_add(&s->next, 1), n = item - s->whole, size = s->together * s->segments;
    if (n >= s->parts) return 0;
    *begin = LC_MIN(item, s->whole) * size;
    for (; n > 0; n--) *begin = share_end(s, *begin);
    *end = item < s->whole ? *begin + size : share_end(s, *begin);
    return 1;
}

/* The next heads of an item, of one sequence, with their segments. 0: the item is done. */
typedef struct batch {
    int64_t b, h; /* sequence, first head */
    int n;
    int64_t from[TOGETHER], to[TOGETHER];
} batch;
static inline int share_batch(const share *s, int64_t h, int64_t *begin, int64_t end, batch *w) {
    int64_t head = *begin / s->segments;
    w->b = head / h, w->h = head % h;
    for (w->n = 0; *begin < end && w->n < s->together && w->h + w->n < h; w->n++, head++) {
        w->from[w->n] = *begin - head * s->segments;
        w->to[w->n] = LC_MIN(end - head * s->segments, s->segments);
        *begin = head * s->segments + w->to[w->n];
    }
    return w->n;
}

#endif
