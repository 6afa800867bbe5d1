/* hybrid_forward.h: the forward tile, shared by the call without state (hybrid_forward.c) and the one with
 * (hybrid_state.c). */
#ifndef LC_HYBRID_FORWARD_H
#define LC_HYBRID_FORWARD_H

#include "hybrid_panel.h"

typedef struct forward_job {
    const lc_kargs *k;
    const hybrid *call;
    int64_t panels, segments; /* of the longest sequence; parts a head is cut into */
    int n_u;
    size_t scratch_bytes;
} forward_job;

/* Parts of a head: enough of them to keep threads level, from the shapes alone, so that results do not depend on the
 * threads. A part that does not follow on its thread takes in all keys before it anew: too dear for long sequences, where
 * whole heads keep a few threads level well enough. */
static inline int64_t segments_of(const hybrid *a, int64_t panels) {
    if (a->kind == KIND_CAUSAL) return (panels + 1) / 2;
    if (panels > 32 && a->b * a->h >= 8) return 1;
    return LC_MAX(LC_MIN(32 / LC_MAX(a->b * a->h, 1), panels / 2), 1);
}

/* The sequence b of a call without state. */
static inline void whole_span(const hybrid *a, int64_t b, span *at) {
    int64_t start = start_of(a->start, b, a->softmax ? a->k->dim[2] : a->t);
    *at = (span){.b = b, .k_shift = start, .q_shift = start - a->offset};
    at->p0 = LC_MAX(a->offset - start, 0);
    at->p1 = LC_MAX(a->t + a->offset - start, at->p0);
}

/* One tile of queries: panel c of the heads that s->q and s->k point at. Panels before *absorbed are in the state
 * already; the tile takes the state as far as it may. */
void K(forward_tile)(const lc_kargs *k, const hybrid *a, scratch *s, const span *at, int64_t h, int64_t c,
                     int64_t *absorbed, int *has_state);
/* Rows of the results before the first token. */
void K(put_padding)(const lc_kargs *k, const hybrid *a, const span *at, int64_t h);
/* The state takes in the first n keys of a panel. */
void K(absorb)(const hybrid *a, scratch *s, int64_t index, int64_t n);

#endif
