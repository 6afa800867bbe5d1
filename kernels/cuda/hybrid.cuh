/* hybrid.cuh: what the files of hybrid attention share: the call taken apart into what a kernel wants, the geometry of window and
 * linear keys, the feature maps. The formula stands at the rows in ops.def. Positions p count from the first real token, so p = pos +
 * i - start for row i of a call. Query p attends with softmax to keys lo(p) .. p and linearly to keys 0 .. lo(p) - 1. */
#ifndef LC_HYBRID_CUH
#define LC_HYBRID_CUH

#include "device.cuh"

enum { KIND_TERRACE, KIND_SLIDING };
enum { MAP_NONE, MAP_SOFTMAX_DIM, MAP_EXP_DIM, MAP_POS_ELU, MAP_RELU };

/* A tensor as a kernel takes it: [b, h, t, n], element strides of the first three, the last one dense. Of a map's weights [h, d, f]
 * s[1] and s[2] are used. dtype: LC_K_*. */
struct rows4 {
    void *p;
    int64_t s[3];
    int32_t dtype;
    template <class T> __device__ __forceinline__ T *row(int64_t b, int64_t h, int64_t t) const {
        return (T *)p + b * s[0] + h * s[1] + t * s[2];
    }
};

struct hybrid {
    int b, h, g, t, d, f, F;    /* f inputs of a map, F its features; F 0: there is no linear term */
    int group, mk_group;        /* query heads a key head, a head of mk */
    int window, map, full, skip, kind, affine;
    double scale, eps, feature_eps;
    float scale32, eps32, feature_eps32; /* for kernels in f32: a conversion a chunk is slow */
    rows4 q, k, v, mq, mk;
    const void *bq, *bk, *factors; /* [h]; each in q's dtype or in what is computed in; NULL: none */
    int bq_dtype, bk_dtype, factors_dtype;
    const int32_t *start;       /* [b] or NULL */
    int64_t start_stride;
};

static inline rows4 rows4_of(const lc_view *v) {
    rows4 r = {v->data, {0, 0, 0}, v->dtype};
    for (int i = 0; i < 3; i++)
        if (v->ndim - 4 + i >= 0 && v->ndim >= 2) r.s[i] = v->stride[v->ndim - 4 + i];
    return r;
}
/* A result of three dims [b, h, t]. */
static inline rows4 rows3_of(const lc_view *v) {
    rows4 r = {v->data, {v->stride[0], v->stride[1], v->stride[2]}, v->dtype};
    return r;
}

/* x points at q, k, v, mq, mk, bq, bk, factors, start in this order. Halves are taken as they are; every tensor has q's dtype but for
 * weights of maps, biases and factors, which may be what q is computed in. */
static inline int hybrid_open(hybrid *a, const lc_kargs *k, const lc_view *x) {
    const int32_t *i = k->i;
    memset(a, 0, sizeof *a);
    a->map = i[0], a->full = i[1], a->skip = i[2], a->window = i[3], a->kind = i[4], a->affine = i[5];
    a->eps = k->f[1], a->feature_eps = k->f[2];
    a->b = (int)x[0].dim[0], a->h = (int)x[0].dim[1], a->t = (int)x[0].dim[2], a->d = (int)x[0].dim[3], a->g = (int)x[1].dim[1];
    a->scale = k->f[0] != 0 ? k->f[0] : 1 / sqrt((double)a->d);
    a->group = a->g ? a->h / a->g : 1;
    a->scale32 = (float)a->scale, a->eps32 = (float)a->eps, a->feature_eps32 = (float)a->feature_eps;
    a->mk_group = 1;
    a->q = rows4_of(x), a->k = rows4_of(x + 1), a->v = rows4_of(x + 2);
    if (x[3].data && x[4].data) {
        a->mq = rows4_of(x + 3), a->mk = rows4_of(x + 4);
        a->f = (int)(a->map == MAP_NONE ? x[3].dim[3] : x[3].dim[2]);
        a->F = a->full && (a->map == MAP_SOFTMAX_DIM || a->map == MAP_EXP_DIM) ? 2 * a->f : a->f;
        if (a->map == MAP_NONE && x[4].dim[1] > 0) a->mk_group = a->h / (int)x[4].dim[1];
    }
    a->bq = x[5].data, a->bk = x[6].data, a->factors = x[7].data;
    a->bq_dtype = x[5].dtype, a->bk_dtype = x[6].dtype, a->factors_dtype = x[7].dtype;
    a->start = (const int32_t *)x[8].data;
    a->start_stride = x[8].data ? x[8].stride[0] : 0;
    if (a->window > 0 && !a->factors) return LC_K_UNSUPPORTED;
    if (a->map == MAP_NONE || !a->F) a->skip = 0;
    return LC_K_OK;
}

/* ---- results and carried state ---------------------------------------------------------------------------------------- */
/* y [b, h, t, d]; c, at, z [b, h, t] may have no data: not wanted. */
struct hybrid_out {
    rows4 y, c, at, z;
};

/* The state of decoding and prefill. state [n, h, F, d], zsum [n, h, F] and cache are contiguous, of the type computed in (but for
 * hybrid_decode.cu, which takes narrower ones; others get copies, hybrid_forward.cu); a slot of the cache, `slot_elements` long, is keys [g, 2 window, d], values likewise and, for map none, features [heads of mk, 2 window, F]. */
struct carried {
    void *state, *zsum, *cache; /* state NULL: the call carries none */
    const int32_t *slot, *pos;
    int64_t slot_stride, pos_stride, slot_elements;
    int n;
    fault_to fault;
};

/* One row of the batch: positions p0 .. p1 - 1 are the call's; position p lies in row p + shift of q, k and v; keys before p0 lie in
 * the cache, those before k_min are in the state already. */
struct hybrid_span {
    int p0, p1, shift, k_min, start;
    int64_t slot;
};

static inline hybrid_out hybrid_results(const lc_kargs *k) {
    hybrid_out o = {rows4_of(k->y), rows3_of(k->y + 1), rows3_of(k->y + 2), rows3_of(k->y + 3)};
    return o;
}

static inline int carried_open(carried *c, const lc_kargs *k, const hybrid *a) {
    memset(c, 0, sizeof *c);
    const lc_view *x = k->x;
    if (!x[9].data) return LC_K_OK;
    if (!x[10].data || !x[13].data || (a->window && !x[11].data)) return LC_K_UNSUPPORTED;
    c->state = x[9].data, c->zsum = x[10].data, c->cache = x[11].data;
    c->slot = (const int32_t *)x[12].data, c->pos = (const int32_t *)x[13].data;
    c->n = (int)x[9].dim[0];
    if (c->slot) c->slot_stride = x[12].stride[0];
    c->pos_stride = x[13].stride[0];
    if (c->cache && c->n) c->slot_elements = view_numel(x + 11) / c->n;
    c->fault = fault_here();
    return LC_K_OK;
}

/* Element i of a small array of another float dtype. */
template <class R> __device__ __forceinline__ R read_as(const void *p, int dtype, int64_t i) {
    switch (dtype) {
    case LC_K_F32: return (R)((const float *)p)[i];
    case LC_K_BF16: return load<R>(((const bf16 *)p)[i]);
    case LC_K_F16: return load<R>(((const f16 *)p)[i]);
    default: return (R)((const double *)p)[i];
    }
}

__host__ __device__ __forceinline__ int hybrid_lo(const hybrid &a, int p) {
    if (!a.window) return p + 1;
    int lo = a.kind == KIND_SLIDING ? p - a.window + 1 : (p / a.window - 1) * a.window;
    return lo > 0 ? lo : 0;
}
template <class R> __device__ __forceinline__ R hybrid_gamma(const hybrid &a, int h) {
    return a.window ? 1 / (1 + exp(-read_as<R>(a.factors, a.factors_dtype, h))) : (R)0;
}
template <class R> __device__ __forceinline__ R hybrid_lambda(const hybrid &a, R gamma) {
    return a.window && a.affine ? 1 - gamma : (R)1;
}
__device__ __forceinline__ int start_of(const hybrid &a, int b) {
    if (!a.start) return 0;
    int s = a.start[b * a.start_stride];
    return s < 0 ? 0 : s < a.t ? s : a.t;
}
template <class R> __device__ __forceinline__ R bias_of(const void *bias, int dtype, int h) {
    return bias ? read_as<R>(bias, dtype, h) : (R)0;
}

/* A slot or position out of range is reported and the row treated as one without tokens; `tell` one thread of the row's blocks. */
__device__ __forceinline__ hybrid_span span_of(const hybrid &a, const carried &c, int b, bool tell) {
    hybrid_span s;
    s.start = start_of(a, b), s.slot = b, s.p0 = 0, s.k_min = 0;
    if (c.state) {
        if (c.slot) s.slot = c.slot[b * c.slot_stride];
        bool bad = s.slot < 0 || s.slot >= c.n;
        int pos = bad ? 0 : c.pos[s.slot * c.pos_stride];
        if (bad || pos < 0) {
            if (tell) bad ? c.fault.report(s.slot, c.n, b) : c.fault.report(pos, INT32_MAX, s.slot);
            s.slot = 0, s.start = a.t, pos = 0;
        }
        s.p0 = pos, s.k_min = a.window ? hybrid_lo(a, pos) : pos;
    }
    s.shift = s.start - s.p0;
    s.p1 = s.p0 + a.t - s.start;
    return s;
}
/* Where a key (which 0), value (1) or feature (2) of a head at position p lies in the cache, counted from the slot's begin. */
__device__ __forceinline__ int64_t cached_at(const hybrid &a, int which, int head, int p) {
    int ring = 2 * a.window;
    int64_t row = (int64_t)head * ring + p % ring, block = (int64_t)a.g * ring * a.d;
    return which < 2 ? which * block + row * a.d : 2 * block + row * a.F;
}

/* ---- feature maps ----------------------------------------------------------------------------------------------------- */
/* One warp: y [F] = map(x [f]), not clamped (clamp from below with feature_eps is the caller's). x and y apart, in shared memory;
 * the caller orders them. */
template <class R> __device__ __forceinline__ void map_row(const hybrid &a, const R *x, R *y) {
    int lane = threadIdx.x & 31;
    if (a.map != MAP_SOFTMAX_DIM && a.map != MAP_EXP_DIM) {
        for (int i = lane; i < a.f; i += 32) y[i] = a.map == MAP_RELU ? (x[i] > 0 ? x[i] : (R)0) : x[i] > 0 ? 1 + x[i] : exp(x[i]);
        return;
    }
    for (int half = 0; half < (a.full ? 2 : 1); half++) {
        R sign = half ? (R)-1 : (R)1, m = -(R)INFINITY, sum = 0;
        for (int i = lane; i < a.f; i += 32) m = op_max()(m, sign * x[i]);
        m = warp_reduce(m, op_max());
        for (int i = lane; i < a.f; i += 32) sum += y[half * a.f + i] = exp(sign * x[i] - m);
        sum = warp_reduce(sum, op_sum());
        if (a.map == MAP_EXP_DIM) continue;
        for (int i = lane; i < a.f; i += 32) y[half * a.f + i] /= sum;
    }
}

/* The ways to a result. hybrid_plain.cu: any call; its workspace. */
int hybrid_plain(const lc_kargs *k, const hybrid &a, const carried &s);
size_t hybrid_plain_work(const lc_kargs *k, const hybrid &a);
/* hybrid_forward_tiles.cu: bf16 on the tensor cores; whether it takes the call. */
bool hybrid_tiles_fit(const lc_kargs *k, const hybrid &a);
int hybrid_tiles(const lc_kargs *k, const hybrid &a, const carried &s);
size_t hybrid_tiles_work(const lc_kargs *k, const hybrid &a);
bool hybrid_tiles_take(const lc_kargs *k, const hybrid &a); /* but for its shape */
/* hybrid_forward_pairs.cu: the same where there is more shared memory. */
bool hybrid_pairs_fit(const lc_kargs *k, const hybrid &a);
int hybrid_pairs(const lc_kargs *k, const hybrid &a, const carried &s);
size_t hybrid_pairs_work(const hybrid &a);
/* hybrid_forward_wide.cu: f32, and halves that the others do not take. */
bool hybrid_wide_fit(const lc_kargs *k, const hybrid &a);
int hybrid_wide(const lc_kargs *k, const hybrid &a, const carried &s);
size_t hybrid_wide_work(const hybrid &a);
/* hybrid_decode.cu: one token with a carried state, f32 or bf16, for the shapes of decoding. */
bool hybrid_decode_fit(const lc_kargs *k, const hybrid &a);
int hybrid_decode(const lc_kargs *k, const hybrid &a, const carried &s);
size_t hybrid_decode_work(const hybrid &a);
/* hybrid_state.cu: one token with a carried state; whether it takes the call. No workspace. */
bool hybrid_step_fit(const lc_kargs *k, const hybrid &a);
int hybrid_step(const lc_kargs *k, const hybrid &a, const carried &s);
/* The last keys and values of a call with state enter the cache (after all has been read). */
int hybrid_remember(const lc_kargs *k, const hybrid &a, const carried &s);

#endif
