/* hybrid_forward.cu: the entry of hybrid attention on CUDA: takes the call apart and picks the tiled kernels (hybrid_forward_tiles.cu), the
 * one-token kernel (hybrid_state.cu) or the plain twin. */
#include "hybrid.cuh"

static int open_call(const lc_kargs *k, hybrid *a, carried *s) {
    int rc = hybrid_open(a, k, k->x);
    return rc ? rc : carried_open(s, k, a);
}

enum { WAY_PLAIN, WAY_STEP, WAY_TILES };
static int way_of(const lc_kargs *k, const hybrid &a) {
    if (k->host->option(LC_OPTION_PLAIN_HYBRID)) return WAY_PLAIN;
    if (hybrid_step_fit(k, a)) return WAY_STEP;
    return hybrid_tiles_fit(k, a) ? WAY_TILES : WAY_PLAIN;
}

extern "C" size_t lc_cuda_hybrid_attention_work(const lc_kargs *k) {
    hybrid a;
    if (hybrid_open(&a, k, k->x)) return 0;
    switch (way_of(k, a)) {
    case WAY_STEP: return 0;
    case WAY_TILES: return hybrid_tiles_work(k, a);
    default: return hybrid_plain_work(k, a);
    }
}

extern "C" int lc_cuda_hybrid_attention(const lc_kargs *k) {
    hybrid a;
    carried s;
    int rc = open_call(k, &a, &s);
    if (rc) return rc;
    if (!a.b || !a.h || !a.t) return LC_K_OK;
    switch (way_of(k, a)) {
    case WAY_STEP: return hybrid_step(k, a, s);
    case WAY_TILES: return hybrid_tiles(k, a, s);
    default: return hybrid_plain(k, a, s);
    }
}
