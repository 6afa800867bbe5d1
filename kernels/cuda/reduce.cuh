/* reduce.cuh: what the reductions, the norms, the losses and the indexing share: packs of 16 bytes, walks with
 * divisions of 32 bits where these do, sums across a block in double, scalars and results of any float dtype. Included
 * by .cu files only. */
#ifndef LC_REDUCE_CUH
#define LC_REDUCE_CUH

#include <string.h>

#include "device.cuh"

/* ---- packs ---------------------------------------------------------------------------------------------------- */
template <class T, int V> struct alignas(V * sizeof(T)) pack { T v[V]; };
template <int BYTES> struct lc_word { typedef uint16_t type; };
template <> struct lc_word<16> { typedef uint4 type; };
template <> struct lc_word<8> { typedef uint2 type; };
template <class T> constexpr int pack_of() { return 16 / (int)sizeof(T); } /* elements in 16 bytes */

/* V elements from p, which is a multiple of V elements away from 16-byte alignment; 32 bytes go as two loads. */
template <int V, class R, class T> __device__ __forceinline__ void load_pack(const T *p, R (&out)[V]) {
    constexpr int W = V * sizeof(T) > 16 ? 16 / (int)sizeof(T) : V;
#pragma unroll
    for (int o = 0; o < V; o += W) {
        pack<T, W> a = *(const pack<T, W> *)(p + o);
#pragma unroll
        for (int i = 0; i < W; i++) out[o + i] = load<R>(a.v[i]);
    }
}
/* One store, which the compiler may not break up into those of the elements, as it does where one element takes a
 * branch. */
template <class T, int W> __device__ __forceinline__ void put_pack(T *p, const pack<T, W> &a) {
    if constexpr (W > 1) {
        typename lc_word<W * sizeof(T)>::type whole;
        memcpy(&whole, &a, sizeof whole);
        __stwb((decltype(whole) *)p, whole);
    } else {
        *p = a.v[0];
    }
}
template <int V, class T, class R> __device__ __forceinline__ void store_pack(T *p, const R (&in)[V]) {
    constexpr int W = V * sizeof(T) > 16 ? 16 / (int)sizeof(T) : V;
#pragma unroll
    for (int o = 0; o < V; o += W) {
        pack<T, W> a;
#pragma unroll
        for (int i = 0; i < W; i++) a.v[i] = store<T>(in[o + i]);
        put_pack(p + o, a);
    }
}

static inline bool aligned16(const void *p) { return ((uintptr_t)p & 15) == 0; }
/* The view's last dim can be read in packs of `each` elements, 16 bytes or a part of that each. */
static inline bool view_packs(const lc_view *v, int each) {
    if (!aligned16(v->data) || !v->ndim || v->dim[v->ndim - 1] % each) return false;
    if (v->dim[v->ndim - 1] > 1 && v->stride[v->ndim - 1] != 1) return false;
    for (int i = 0; i + 1 < v->ndim; i++)
        if (v->dim[i] > 1 && v->stride[i] % each) return false;
    return true;
}

/* ---- walks ---------------------------------------------------------------------------------------------------- */
template <int N> __device__ __forceinline__ void walk_at(const walk<N> &w, int64_t e, int64_t (&offset)[N]) {
    if (w.total > 0x7fffffff) {
        w.at(e, offset);
        return;
    }
    uint32_t rest = (uint32_t)e;
#pragma unroll
    for (int o = 0; o < N; o++) offset[o] = 0;
    for (int i = w.ndim - 1; i > 0; i--) {
        uint32_t d = (uint32_t)w.dim[i], q = rest / d, r = rest - q * d;
#pragma unroll
        for (int o = 0; o < N; o++) offset[o] += (int64_t)r * w.stride[o][i];
        rest = q;
    }
#pragma unroll
    for (int o = 0; o < N; o++) offset[o] += (int64_t)rest * w.stride[o][0];
}

/* Makes the walk count packs of `each` elements; false, and nothing changed, when the innermost dim is not in one piece
 * for every operand or other strides are no multiples. Addresses are the caller's to check. */
template <int N> static inline bool walk_pack(walk<N> *w, int each) {
    int last = w->ndim - 1;
    if (each == 1) return true;
    if (w->dim[last] % each) return false;
    for (int o = 0; o < N; o++) {
        if (w->stride[o][last] != 1) return false;
        for (int i = 0; i < last; i++)
            if (w->stride[o][i] % each) return false;
    }
    w->dim[last] /= each;
    w->total /= each;
    for (int o = 0; o < N; o++) w->stride[o][last] = each;
    return true;
}

/* A walk in an order of its own, the operands' longest strides first: for kernels to which order does not matter. Dims
 * of 1 go. */
template <int N> static inline walk<N> make_walk_free(const lc_view *const (&v)[N]) {
    lc_view sorted[N];
    const lc_view *at[N];
    int n = 0, order[LC_VIEW_DIMS];
    for (int i = 0; i < v[0]->ndim; i++) {
        if (v[0]->dim[i] == 1) continue;
        int k = n++;
        for (; k > 0; k--) {
            bool before = false, same = true; /* does dim i go before order[k - 1]? */
            for (int o = 0; o < N && same; o++) {
                int64_t a = v[o]->stride[i], b = v[o]->stride[order[k - 1]];
                if (a != b) before = a > b, same = false;
            }
            if (!before) break;
            order[k] = order[k - 1];
        }
        order[k] = i;
    }
    for (int o = 0; o < N; o++) {
        sorted[o] = *v[o];
        sorted[o].ndim = n;
        for (int i = 0; i < n; i++) {
            sorted[o].dim[i] = v[0]->dim[order[i]];
            sorted[o].stride[i] = v[o]->stride[order[i]];
        }
        at[o] = &sorted[o];
    }
    return make_walk(at);
}

/* ---- sums and scalars ----------------------------------------------------------------------------------------- */
/* What a thread sums in: float, or double for doubles and for integers, which are not exact in float. */
template <class T> struct lc_sum_of { typedef real_of<T> type; };
template <> struct lc_sum_of<int32_t> { typedef double type; };
template <> struct lc_sum_of<int64_t> { typedef double type; };
template <> struct lc_sum_of<uint8_t> { typedef double type; };
template <class T> using sum_of = typename lc_sum_of<T>::type;

__device__ __forceinline__ float real_exp(float x) { return expf(x); }
__device__ __forceinline__ double real_exp(double x) { return exp(x); }
template <class R> __device__ __forceinline__ R finite_or_0(R m) { return m - m == 0 ? m : (R)0; }

__device__ __forceinline__ void put_any(void *p, int dtype, int64_t at, double v) {
    switch (dtype) {
    case LC_K_F32: ((float *)p)[at] = (float)v; break;
    case LC_K_BF16: ((bf16 *)p)[at] = store<bf16>(v); break;
    case LC_K_F16: ((f16 *)p)[at] = store<f16>(v); break;
    default: ((double *)p)[at] = v;
    }
}

/* A scalar that came as a 0-dim tensor; p NULL: `otherwise`. */
__device__ __forceinline__ double scalar_at(const void *p, int dtype, double otherwise) {
    if (!p) return otherwise;
    switch (dtype) {
    case LC_K_F32: return *(const float *)p;
    case LC_K_BF16: return load<double>(*(const bf16 *)p);
    case LC_K_F16: return load<double>(*(const f16 *)p);
    case LC_K_I32: return *(const int32_t *)p;
    case LC_K_I64: return (double)*(const int64_t *)p;
    default: return *(const double *)p;
    }
}

/* Ids and labels: i32, i64 or u8. */
__device__ __forceinline__ int64_t id_at(const void *ids, int dtype, int64_t i) {
    return dtype == LC_K_I64   ? ((const int64_t *)ids)[i]
           : dtype == LC_K_I32 ? ((const int32_t *)ids)[i]
                               : ((const uint8_t *)ids)[i];
}

static inline unsigned round_up_32(int64_t n, int64_t most) {
    int64_t r = (n + 31) / 32 * 32;
    return (unsigned)(r < 32 ? 32 : r > most ? most : r);
}

/* Sums n doubles at p in a fixed order and stores scale * the sum: one block of 256. */
static __global__ void finish_sum(const double *p, int64_t n, double scale, void *y, int dtype) {
    __shared__ double room[32];
    double s = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) s += p[i];
    s = block_reduce(s, op_sum(), 0.0, room);
    if (!threadIdx.x) put_any(y, dtype, 0, s * scale);
}

#endif
