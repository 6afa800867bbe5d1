/* softmax.cu: reductions and scans along one dim: softmax, log_softmax, their gradient, logsumexp, argmax, argmin,
 * cumsum. Tensors are contiguous and seen as [outer, n, inner]; a row is the n elements of one (outer, inner). With
 * inner 1 a row lies in one piece, and a warp (short rows) or a block goes along it in packs; otherwise a thread takes
 * a row, and neighbours read neighbours. */
#include "softmax.cuh"

enum { SOFTMAX, LOG_SOFTMAX, LOGSUMEXP };
enum { WARP_ROW = 1024, ROWS = 4, BLOCK_MAX = 512, SCAN = 256, SCAN_EACH = 4 };

typedef struct along {
    int64_t outer, n, inner;
    int mode;
} along;

static along along_of(const lc_view *v, int dim, int mode) {
    along a = {1, v->ndim ? v->dim[dim] : 1, 1, mode};
    for (int i = 0; i < dim; i++) a.outer *= v->dim[i];
    for (int i = dim + 1; i < v->ndim; i++) a.inner *= v->dim[i];
    return a;
}

/* A warp a row, ROWS a block, or a block a row. */
static dim3 row_block(const along *a, int each) {
    if (a->n <= WARP_ROW) return dim3(32, ROWS);
    return dim3(round_up_32(ceil_div(a->n, each), BLOCK_MAX));
}
static unsigned row_grid(const along *a) { return (unsigned)(a->n <= WARP_ROW ? ceil_div(a->outer, ROWS) : a->outer); }

/* ---- softmax, log_softmax, logsumexp -------------------------------------------------------------------------- */
/* What is left of x after the statistics: infinite maxima make NaN, as the sum of exp(x - m) would be. */
template <class R> __device__ __forceinline__ R softmax_value(R x, R m, R scale, R shift, int mode) {
    return mode == SOFTMAX ? real_exp(x - m) * scale : (x - m) - shift;
}

/* x [outer, n] -> y [outer, n], or [outer] for logsumexp */
template <class T, int V> __global__ void __launch_bounds__(BLOCK_MAX) softmax_rows(const T *x, T *y, const along a) {
    typedef real_of<T> R;
    __shared__ R room[64];
    int64_t r = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (r >= a.outer) return;
    x += r * a.n;
    peak<R> p = peak_none<R>();
#pragma unroll 2
    for (int64_t i = threadIdx.x * V; i < a.n; i += blockDim.x * V) {
        R v[V];
        load_pack<V>(x + i, v);
        peak_take(p, v);
    }
    p = blockDim.x == 32 ? warp_peak(p) : block_peak(p, room);
    if (a.mode == LOGSUMEXP) {
        if (!threadIdx.x) y[r] = store<T>(finite_or_0(p.m) + log(p.s));
        return;
    }
    R m = p.m, s = p.s + (m - m), scale = 1 / s, shift = log(s);
    y += r * a.n;
    for (int64_t i = threadIdx.x * V; i < a.n; i += blockDim.x * V) {
        R v[V];
        load_pack<V>(x + i, v);
#pragma unroll
        for (int c = 0; c < V; c++) v[c] = softmax_value(v[c], m, scale, shift, a.mode);
        store_pack<V>(y + i, v);
    }
}

/* x [outer, n, inner] -> y [outer, n, inner], or [outer, inner] for logsumexp; a thread a row */
template <class T> __global__ void softmax_side(const T *x, T *y, const along a) {
    typedef real_of<T> R;
    for (int64_t t = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; t < a.outer * a.inner;
         t += (int64_t)gridDim.x * blockDim.x) {
        int64_t at = t / a.inner * a.n * a.inner + t % a.inner;
        peak<R> p = peak_none<R>();
        for (int64_t i = 0; i < a.n; i++) {
            R v[1] = {load<R>(x[at + i * a.inner])};
            peak_take(p, v);
        }
        if (a.mode == LOGSUMEXP) {
            y[t] = store<T>(finite_or_0(p.m) + log(p.s));
            continue;
        }
        R m = p.m, s = p.s + (m - m), scale = 1 / s, shift = log(s);
        for (int64_t i = 0; i < a.n; i++)
            y[at + i * a.inner] = store<T>(softmax_value(load<R>(x[at + i * a.inner]), m, scale, shift, a.mode));
    }
}

template <class T> static void launch_softmax(const lc_kargs *k, const along *a) {
    constexpr int V = pack_of<T>();
    const T *x = (const T *)k->x[0].data;
    T *y = (T *)k->y[0].data;
    if (a->inner > 1)
        LC_LAUNCH(softmax_side<T>, grid_for(a->outer * a->inner, 128), 128, 0, x, y, *a);
    else if (a->n % V == 0 && aligned16(x) && aligned16(y))
        LC_LAUNCH((softmax_rows<T, V>), row_grid(a), row_block(a, V), 0, x, y, *a);
    else
        LC_LAUNCH((softmax_rows<T, 1>), row_grid(a), row_block(a, 1), 0, x, y, *a);
}

static int softmax(const lc_kargs *k, int mode) {
    along a = along_of(&k->x[0], k->i[0], mode);
    if (k->y[0].dtype != k->x[0].dtype) return LC_K_UNSUPPORTED;
    if (!a.outer || !a.inner || (!a.n && mode != LOGSUMEXP)) return LC_K_OK;
    LC_FLOATS(k->x[0].dtype, launch_softmax<T>(k, &a);)
    return LC_K_OK;
}

/* ---- gradient: y (g - sum g y), or g - exp(y) sum g for the logarithm ----------------------------------------- */
template <class R> __device__ __forceinline__ R softmax_slope(R g, R y, R s, int mode) {
    return mode == LOG_SOFTMAX ? g - real_exp(y) * s : y * (g - s);
}

/* g, y [outer, n] -> out [outer, n] */
template <class T, int V>
__global__ void __launch_bounds__(BLOCK_MAX) softmax_backward_rows(const T *g, const T *y, T *out, const along a) {
    typedef real_of<T> R;
    __shared__ double room[32];
    int64_t r = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (r >= a.outer) return;
    g += r * a.n, y += r * a.n, out += r * a.n;
    R sum = 0;
    for (int64_t i = threadIdx.x * V; i < a.n; i += blockDim.x * V) {
        R vg[V], vy[V];
        load_pack<V>(g + i, vg);
        load_pack<V>(y + i, vy);
#pragma unroll
        for (int c = 0; c < V; c++) sum += a.mode == LOG_SOFTMAX ? vg[c] : vg[c] * vy[c];
    }
    double total = (double)sum;
    R s = (R)(blockDim.x == 32 ? warp_reduce(total, op_sum()) : block_reduce(total, op_sum(), 0.0, room));
    for (int64_t i = threadIdx.x * V; i < a.n; i += blockDim.x * V) {
        R vg[V], vy[V];
        load_pack<V>(g + i, vg);
        load_pack<V>(y + i, vy);
#pragma unroll
        for (int c = 0; c < V; c++) vg[c] = softmax_slope(vg[c], vy[c], s, a.mode);
        store_pack<V>(out + i, vg);
    }
}

/* g, y [outer, n, inner] -> out; a thread a row */
template <class T> __global__ void softmax_backward_side(const T *g, const T *y, T *out, const along a) {
    typedef real_of<T> R;
    for (int64_t t = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; t < a.outer * a.inner;
         t += (int64_t)gridDim.x * blockDim.x) {
        int64_t at = t / a.inner * a.n * a.inner + t % a.inner;
        double sum = 0;
        for (int64_t i = 0; i < a.n; i++) {
            double vg = load<double>(g[at + i * a.inner]);
            sum += a.mode == LOG_SOFTMAX ? vg : vg * load<double>(y[at + i * a.inner]);
        }
        for (int64_t i = 0; i < a.n; i++)
            out[at + i * a.inner] =
                store<T>(softmax_slope(load<R>(g[at + i * a.inner]), load<R>(y[at + i * a.inner]), (R)sum, a.mode));
    }
}

template <class T> static void launch_backward(const lc_kargs *k, const along *a) {
    constexpr int V = pack_of<T>();
    const T *g = (const T *)k->x[0].data, *y = (const T *)k->x[1].data;
    T *out = (T *)k->y[0].data;
    if (a->inner > 1)
        LC_LAUNCH(softmax_backward_side<T>, grid_for(a->outer * a->inner, 128), 128, 0, g, y, out, *a);
    else if (a->n % V == 0 && aligned16(g) && aligned16(y) && aligned16(out))
        LC_LAUNCH((softmax_backward_rows<T, V>), row_grid(a), row_block(a, V), 0, g, y, out, *a);
    else
        LC_LAUNCH((softmax_backward_rows<T, 1>), row_grid(a), row_block(a, 1), 0, g, y, out, *a);
}

/* ---- argmax, argmin: the first best; NaN is best -------------------------------------------------------------- */
template <class R> struct best_at {
    R v;
    int64_t i;
};
template <class R> __device__ __forceinline__ bool better(best_at<R> a, best_at<R> b) {
    bool na = a.v != a.v, nb = b.v != b.v;
    if (na || nb) return na && (!nb || a.i < b.i);
    return a.v > b.v || (a.v == b.v && a.i < b.i);
}
template <class R> __device__ __forceinline__ best_at<R> warp_best(best_at<R> p) {
#pragma unroll
    for (int o = 16; o; o >>= 1) {
        best_at<R> q = {__shfl_xor_sync(0xffffffffu, p.v, o), __shfl_xor_sync(0xffffffffu, p.i, o)};
        if (better(q, p)) p = q;
    }
    return p;
}

/* x [outer, n] -> index [outer]; sign -1 looks for the smallest */
template <class T, int V>
__global__ void __launch_bounds__(BLOCK_MAX) arg_rows(const T *x, int32_t *index, real_of<T> sign, const along a) {
    typedef real_of<T> R;
    __shared__ R room_v[32];
    __shared__ int64_t room_i[32];
    int64_t r = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (r >= a.outer) return;
    x += r * a.n;
    best_at<R> best = {-(R)INFINITY, INT64_MAX};
#pragma unroll 2
    for (int64_t i = threadIdx.x * V; i < a.n; i += blockDim.x * V) {
        R v[V];
        load_pack<V>(x + i, v);
#pragma unroll
        for (int c = 0; c < V; c++) {
            best_at<R> at = {v[c] * sign, i + c};
            if (better(at, best)) best = at;
        }
    }
    best = warp_best(best);
    if (blockDim.x > 32) {
        int lane = threadIdx.x & 31, w = threadIdx.x >> 5, n = blockDim.x >> 5;
        if (!lane) room_v[w] = best.v, room_i[w] = best.i;
        __syncthreads();
        if (lane < n)
            best = {room_v[lane], room_i[lane]};
        else
            best = {-(R)INFINITY, INT64_MAX};
        best = warp_best(best);
    }
    if (!threadIdx.x) index[r] = (int32_t)best.i;
}

/* x [outer, n, inner] -> index [outer, inner]; a thread a row */
template <class T> __global__ void arg_side(const T *x, int32_t *index, real_of<T> sign, const along a) {
    typedef real_of<T> R;
    for (int64_t t = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; t < a.outer * a.inner;
         t += (int64_t)gridDim.x * blockDim.x) {
        int64_t from = t / a.inner * a.n * a.inner + t % a.inner;
        best_at<R> best = {-(R)INFINITY, INT64_MAX};
        for (int64_t i = 0; i < a.n; i++) {
            best_at<R> at = {load<R>(x[from + i * a.inner]) * sign, i};
            if (better(at, best)) best = at;
        }
        index[t] = (int32_t)best.i;
    }
}

template <class T> static void launch_arg(const lc_kargs *k, const along *a, double sign) {
    constexpr int V = pack_of<T>();
    const T *x = (const T *)k->x[0].data;
    int32_t *index = (int32_t *)k->y[0].data;
    real_of<T> s = (real_of<T>)sign;
    if (a->inner > 1)
        LC_LAUNCH(arg_side<T>, grid_for(a->outer * a->inner, 128), 128, 0, x, index, s, *a);
    else if (a->n % V == 0 && aligned16(x))
        LC_LAUNCH((arg_rows<T, V>), row_grid(a), row_block(a, V), 0, x, index, s, *a);
    else
        LC_LAUNCH((arg_rows<T, 1>), row_grid(a), row_block(a, 1), 0, x, index, s, *a);
}

static int arg(const lc_kargs *k, double sign) {
    along a = along_of(&k->x[0], k->i[0], 0);
    if (k->y[0].dtype != LC_K_I32) return LC_K_UNSUPPORTED;
    if (!a.outer || !a.inner || !a.n) return LC_K_OK;
    LC_FLOATS(k->x[0].dtype, launch_arg<T>(k, &a, sign);)
    return LC_K_OK;
}

/* ---- cumsum --------------------------------------------------------------------------------------------------- */
/* x [outer, n, inner] -> y; a thread a row, in order (from the end where a.mode is 1) and in double */
template <class T> __global__ void cumsum_side(const T *x, T *y, const along a) {
    for (int64_t t = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; t < a.outer * a.inner;
         t += (int64_t)gridDim.x * blockDim.x) {
        int64_t at = t / a.inner * a.n * a.inner + t % a.inner;
        double s = 0;
        for (int64_t n = 0; n < a.n; n++) {
            int64_t i = at + (a.mode ? a.n - 1 - n : n) * a.inner;
            s += load<double>(x[i]);
            y[i] = store<T>(s);
        }
    }
}

/* x [outer, n] -> y; a block a row, SCAN * SCAN_EACH elements at a time: within a thread, a warp, the block; then
 * carried on */
template <class T> __global__ void __launch_bounds__(SCAN) cumsum_rows(const T *x, T *y, const along a) {
    __shared__ double room[SCAN / 32];
    int lane = threadIdx.x & 31, w = threadIdx.x >> 5;
    double carry = 0;
    x += blockIdx.x * a.n, y += blockIdx.x * a.n;
    auto place = [&](int64_t i) { return a.mode ? a.n - 1 - i : i; };
    for (int64_t from = 0; from < a.n; from += SCAN * SCAN_EACH) {
        int64_t at = from + threadIdx.x * SCAN_EACH;
        double v[SCAN_EACH], s = 0;
#pragma unroll
        for (int c = 0; c < SCAN_EACH; c++) v[c] = s += at + c < a.n ? load<double>(x[place(at + c)]) : 0.0;
        double upto = s; /* of this warp's threads up to this one */
#pragma unroll
        for (int o = 1; o < 32; o <<= 1) {
            double before = __shfl_up_sync(0xffffffffu, upto, o);
            if (lane >= o) upto += before;
        }
        __syncthreads();
        if (lane == 31) room[w] = upto;
        __syncthreads();
        double base = carry;
        for (int i = 0; i < SCAN / 32; i++) {
            if (i < w) base += room[i];
            carry += room[i];
        }
        double before = __shfl_up_sync(0xffffffffu, upto, 1);
        if (lane) base += before;
#pragma unroll
        for (int c = 0; c < SCAN_EACH; c++)
            if (at + c < a.n) y[place(at + c)] = store<T>(base + v[c]);
    }
}

/* ---- entries -------------------------------------------------------------------------------------------------- */
extern "C" {
int lc_cuda_softmax(const lc_kargs *k) { return softmax(k, SOFTMAX); }
int lc_cuda_log_softmax(const lc_kargs *k) { return softmax(k, LOG_SOFTMAX); }
int lc_cuda_logsumexp(const lc_kargs *k) { return softmax(k, LOGSUMEXP); }
int lc_cuda_argmax(const lc_kargs *k) { return arg(k, 1); }
int lc_cuda_argmin(const lc_kargs *k) { return arg(k, -1); }

/* x[0] = g, x[1] = y, i[0] = dim, i[1] = log -> y[0] */
int lc_cuda_softmax_backward(const lc_kargs *k) {
    along a = along_of(&k->x[1], k->i[0], k->i[1] ? LOG_SOFTMAX : SOFTMAX);
    if (k->x[0].dtype != k->x[1].dtype || k->y[0].dtype != k->x[1].dtype) return LC_K_UNSUPPORTED;
    if (!a.outer || !a.inner || !a.n) return LC_K_OK;
    LC_FLOATS(k->x[1].dtype, launch_backward<T>(k, &a);)
    return LC_K_OK;
}

int lc_cuda_cumsum(const lc_kargs *k) {
    along a = along_of(&k->x[0], k->i[0], k->i[1] != 0);
    if (!a.outer || !a.inner || !a.n) return LC_K_OK;
    LC_FLOATS(k->x[0].dtype, const T *x = (const T *)k->x[0].data; T *y = (T *)k->y[0].data;
              if (a.inner > 1 || a.n <= 64)
                  LC_LAUNCH(cumsum_side<T>, grid_for(a.outer * a.inner, 128), 128, 0, x, y, a);
              else LC_LAUNCH(cumsum_rows<T>, (unsigned)a.outer, SCAN, 0, x, y, a);)
    return LC_K_OK;
}
}
