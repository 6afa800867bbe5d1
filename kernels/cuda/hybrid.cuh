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

#endif
