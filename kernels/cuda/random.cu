/* random.cu: random fills and dropout, on the stream that kernels/philox.h defines: a thread makes the four elements of
 * one counter, so the result of element i depends on seed, offset and i alone. Operands are contiguous. */
#include "convert.cuh"
#include "elementwise.cuh"
#include "scalar_math.cuh"

/* Four elements from `at` on; `whole`: all four are there and 16-byte aligned (in f32; 8-byte in halves). */
template <class R>
__device__ __forceinline__ void put_four(int dtype, char *p, int bytes, int64_t n, bool whole, const R (&v)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (whole || i < n) write_as<R>(dtype, p + i * bytes, v[i]);
}
template <>
__device__ __forceinline__ void put_four<float>(int dtype, char *p, int bytes, int64_t n, bool whole,
                                                const float (&v)[4]) {
    if (whole && dtype == LC_K_F32) {
        vector_of<float, 4>::put(p, v);
    } else if (whole && dtype == LC_K_BF16) {
        vector_of<bf16, 4>::put(p, v);
    } else if (whole && dtype == LC_K_F16) {
        vector_of<f16, 4>::put(p, v);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i < n) write_as<float>(dtype, p + i * bytes, v[i]);
    }
}

struct stream {
    uint64_t seed, offset;
    int64_t n; /* elements */
};
static stream stream_of(const lc_kargs *k) { return {k->seed, k->offset, view_numel(&k->x[0])}; }

/* Whether fours of it can be moved at once. */
static bool in_fours(const lc_view *v) {
    return !v->data || (uintptr_t)v->data % (4 * lc_dtype_traits(v->dtype)->bytes) == 0;
}

/* ---- fills ------------------------------------------------------------------------------------------------------- */
enum { UNIFORM, NORMAL };

struct target {
    char *p;
    int dtype, bytes;
    bool fours;
};

__device__ __forceinline__ void normal_pair(uint32_t a, uint32_t b, float *x, float *y) {
    single::lc_normal_pair(a, b, x, y);
}
__device__ __forceinline__ void normal_pair(uint32_t a, uint32_t b, double *x, double *y) {
    dual::lc_normal_pair(a, b, x, y);
}
__device__ __forceinline__ float uniform(uint32_t r, float) { return single::lc_uniform(r); }
__device__ __forceinline__ double uniform(uint32_t r, double) { return dual::lc_uniform(r); }

/* low + (high - low) u, or mean + deviation z */
template <class R> LC_KERNEL random_fours(stream s, target t, int kind, double a, double b) {
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    R low = (R)a, high = (R)b, range = (R)(b - a);
    for (int64_t c = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; 4 * c < s.n; c += step) {
        uint32_t r[4];
        R v[4];
        single::lc_philox(s.seed, s.offset + (uint64_t)c, r);
        if (kind == UNIFORM) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                v[i] = low + range * uniform(r[i], R());
                v[i] = v[i] < high ? v[i] : low; /* rounding may reach the open end */
            }
        } else {
            normal_pair(r[0], r[1], &v[0], &v[1]);
            normal_pair(r[2], r[3], &v[2], &v[3]);
#pragma unroll
            for (int i = 0; i < 4; i++) v[i] = low + high * v[i];
        }
        put_four<R>(t.dtype, t.p + 4 * c * t.bytes, t.bytes, s.n - 4 * c, t.fours && 4 * c + 4 <= s.n, v);
    }
}

static int fill(const lc_kargs *k, int kind) {
    const lc_view *x = &k->x[0];
    if (!lc_dtype_is_float(x->dtype) || !view_contiguous(x)) return LC_K_UNSUPPORTED;
    stream s = stream_of(k);
    if (!s.n) return LC_K_OK;
    target t = {(char *)x->data, x->dtype, lc_dtype_traits(x->dtype)->bytes, in_fours(x)};
    auto kernel = x->dtype == LC_K_F64 ? random_fours<double> : random_fours<float>;
    LC_LAUNCH(kernel, grid_for(ceil_div(s.n, 4), LC_THREADS), LC_THREADS, 0, s, t, kind, k->f[0], k->f[1]);
    return LC_K_OK;
}

/* x[0] = uniform in [f[0], f[1]) */
extern "C" int lc_cuda_uniform_(const lc_kargs *k) { return fill(k, UNIFORM); }
/* x[0] = f[0] + f[1] * normal */
extern "C" int lc_cuda_normal_(const lc_kargs *k) { return fill(k, NORMAL); }

/* ---- dropout ----------------------------------------------------------------------------------------------------- */
struct drop {
    const char *x;
    char *y, *mask; /* mask NULL: not wanted */
    int dtype, mask_dtype, bytes;
    bool fours;
    double p, scale;
};

template <class R> LC_KERNEL dropout_fours(stream s, drop d) {
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    R p = (R)d.p, scale = (R)d.scale;
    for (int64_t c = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; 4 * c < s.n; c += step) {
        uint32_t r[4];
        R keep[4], y[4];
        int64_t n = s.n - 4 * c;
        bool whole = d.fours && n >= 4;
        const char *x = d.x + 4 * c * d.bytes;
#pragma unroll
        for (int i = 0; i < 4; i++) y[i] = i < n ? read_as<R>(d.dtype, x + i * d.bytes) : (R)0;
        single::lc_philox(s.seed, s.offset + (uint64_t)c, r);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            keep[i] = uniform(r[i], R()) < p ? (R)0 : scale;
            y[i] *= keep[i];
        }
        put_four<R>(d.dtype, d.y + 4 * c * d.bytes, d.bytes, n, whole, y);
        if (!d.mask) continue;
        if (d.mask_dtype == LC_K_U8)
            for (int i = 0; i < 4 && i < n; i++) d.mask[4 * c + i] = keep[i] != 0;
        else
            put_four<R>(d.dtype, d.mask + 4 * c * d.bytes, d.bytes, n, whole, keep);
    }
}

/* x -> y = x * mask, mask = 0 with probability f[0], else 1 / (1 - f[0]). The mask y[1], if wanted, has x's dtype and
 * holds the factors themselves, so that the backward is a product; as uint8 it says only what was kept. */
extern "C" int lc_cuda_dropout(const lc_kargs *k) {
    const lc_view *x = &k->x[0], *y = &k->y[0], *mask = &k->y[1];
    if (!lc_dtype_is_float(x->dtype) || y->dtype != x->dtype || !view_contiguous(x) || !view_contiguous(y))
        return LC_K_UNSUPPORTED;
    if (mask->data && ((mask->dtype != x->dtype && mask->dtype != LC_K_U8) || !view_contiguous(mask)))
        return LC_K_UNSUPPORTED;
    stream s = stream_of(k);
    if (!s.n) return LC_K_OK;
    double p = k->f[0];
    drop d = {(const char *)x->data,
              (char *)y->data,
              (char *)mask->data,
              x->dtype,
              mask->dtype,
              lc_dtype_traits(x->dtype)->bytes,
              in_fours(x) && in_fours(y) && in_fours(mask),
              p,
              p < 1 ? 1 / (1 - p) : 0};
    auto kernel = x->dtype == LC_K_F64 ? dropout_fours<double> : dropout_fours<float>;
    LC_LAUNCH(kernel, grid_for(ceil_div(s.n, 4), LC_THREADS), LC_THREADS, 0, s, d);
    return LC_K_OK;
}
