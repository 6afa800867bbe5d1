/* hybrid_forward.h: the forward tile, shared by the call without state (hybrid_forward.c) and the one with
 * (hybrid_state.c). */
#ifndef LC_HYBRID_FORWARD_H
#define LC_HYBRID_FORWARD_H

#include "hybrid_panel.h"
#include "hybrid_share.h"

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
