/* hybrid_forward.cu: the entry of hybrid attention on CUDA: takes the call apart and picks the tiled kernels (hybrid_forward_pairs.cu, hybrid_forward_tiles.cu, hybrid_forward_wide.cu), the
 * one-token kernels (hybrid_decode.cu, hybrid_state.cu) or the plain twin. A carried state or cache in halves is the business of decoding:
 * the other ways work on a copy in f32, which is rounded at their end. */
#include "gemm.cuh"
#include "hybrid.cuh"

static int open_call(const lc_kargs *k, hybrid *a, carried *s) {
    int rc = hybrid_open(a, k, k->x);
    return rc ? rc : carried_open(s, k, a);
}

enum { WAY_PLAIN, WAY_DECODE, WAY_STEP, WAY_TILES, WAY_PAIRS, WAY_WIDE };
static int way_of(const lc_kargs *k, const hybrid &a) {
    if (k->host->option(LC_OPTION_PLAIN_HYBRID)) return WAY_PLAIN;
    if (hybrid_decode_fit(k, a)) return WAY_DECODE;
    if (hybrid_step_fit(k, a)) return WAY_STEP;
    if (hybrid_pairs_fit(k, a)) return WAY_PAIRS;
    return hybrid_tiles_fit(k, a) ? WAY_TILES : hybrid_wide_fit(k, a) ? WAY_WIDE : WAY_PLAIN;
}

/* Bytes of the copy of x[i] (9 state, 11 cache), if it needs one. */
static bool is_half(const lc_view *v) { return v->data && (v->dtype == LC_K_BF16 || v->dtype == LC_K_F16); }
static size_t wide_bytes(const lc_kargs *k, int i) {
    hybrid a;
    if (!is_half(&k->x[i]) || hybrid_open(&a, k, k->x) || way_of(k, a) == WAY_DECODE) return 0;
    return (size_t)((view_numel(&k->x[i]) * 4 + 255) / 256 * 256);
}
static size_t own_work(const lc_kargs *k, const hybrid &a) {
    size_t bytes = 0;
    switch (way_of(k, a)) {
    case WAY_DECODE: bytes = hybrid_decode_work(a); break;
    case WAY_STEP: break;
    case WAY_TILES: bytes = hybrid_tiles_work(k, a); break;
    case WAY_PAIRS: bytes = hybrid_pairs_work(a); break;
    case WAY_WIDE: bytes = hybrid_wide_work(a); break;
    default: bytes = hybrid_plain_work(k, a);
    }
    return (bytes + 255) / 256 * 256;
}

/* The copies made (or, back, written home). */
static int copy_wide(const lc_kargs *k, char *copy[2], bool back) {
    for (int i = 0; i < 2; i++) {
        const lc_view *v = &k->x[9 + 2 * i];
        int64_t n = view_numel(v);
        if (!copy[i] || !n) continue;
        int rc = back ? lc_cuda_convert(v->data, v->dtype, n, copy[i], LC_K_F32, n, 1, n) : lc_cuda_convert(copy[i], LC_K_F32, n, v->data, v->dtype, n, 1, n);
        if (rc) return rc;
    }
    return LC_K_OK;
}

static int go(const lc_kargs *k, const hybrid &a, const carried &s) {
    switch (way_of(k, a)) {
    case WAY_DECODE: return hybrid_decode(k, a, s);
    case WAY_STEP: return hybrid_step(k, a, s);
    case WAY_TILES: return hybrid_tiles(k, a, s);
    case WAY_PAIRS: return hybrid_pairs(k, a, s);
    case WAY_WIDE: return hybrid_wide(k, a, s);
    default: return hybrid_plain(k, a, s);
    }
}

extern "C" size_t lc_cuda_hybrid_attention_work(const lc_kargs *k) {
    hybrid a;
    if (hybrid_open(&a, k, k->x)) return 0;
    return own_work(k, a) + wide_bytes(k, 9) + wide_bytes(k, 11);
}

extern "C" int lc_cuda_hybrid_attention(const lc_kargs *k) {
    hybrid a;
    carried s;
    int rc = open_call(k, &a, &s);
    if (rc) return rc;
    if (!a.b || !a.h || !a.t) return LC_K_OK;
    size_t at = own_work(k, a), bytes[2] = {wide_bytes(k, 9), wide_bytes(k, 11)};
    if (!bytes[0] && !bytes[1]) return go(k, a, s);
    char *copy[2] = {bytes[0] ? (char *)k->work + at : NULL, bytes[1] ? (char *)k->work + at + bytes[0] : NULL};
    if (copy[0]) s.state = copy[0];
    if (copy[1]) s.cache = copy[1];
    rc = copy_wide(k, copy, false);
    if (!rc) rc = go(k, a, s);
    return rc ? rc : copy_wide(k, copy, true);
}
