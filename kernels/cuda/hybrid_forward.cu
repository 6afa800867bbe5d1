/* hybrid_forward.cu: the entry of hybrid attention on CUDA: takes the call apart and picks the tiled kernels (hybrid_forward_tiles.cu), the
 * one-token kernel (hybrid_state.cu) or the plain twin. */
#include "hybrid.cuh"

static int open_call(const lc_kargs *k, hybrid *a, carried *s) {
    int rc = hybrid_open(a, k, k->x);
    return rc ? rc : carried_open(s, k, a);
}

enum { WAY_PLAIN, WAY_TILES };
static int way_of(const lc_kargs *k, const hybrid &a) {
    if (k->host->option(LC_OPTION_PLAIN_HYBRID)) return WAY_PLAIN;
    return hybrid_tiles_fit(k, a) ? WAY_TILES : WAY_PLAIN;
}

extern "C" size_t lc_cuda_hybrid_attention_work(const lc_kargs *k) {
    hybrid a;
    if (hybrid_open(&a, k, k->x)) return 0;
    return way_of(k, a) == WAY_TILES ? hybrid_tiles_work(k, a) : hybrid_plain_work(k, a);
}

extern "C" int lc_cuda_hybrid_attention(const lc_kargs *k) {
    hybrid a;
    carried s;
    int rc = open_call(k, &a, &s);
    if (rc) return rc;
    if (!a.b || !a.h || !a.t) return LC_K_OK;
    return way_of(k, a) == WAY_TILES ? hybrid_tiles(k, a, s) : hybrid_plain(k, a, s);
}
