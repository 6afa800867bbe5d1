/* gemv.cu: products of 1 to 8 rows, which decoding consists of: bound by reading the weight, so all that counts is to keep enough of
 * its loads under way. A row of w is read by a group of `lanes` threads (1 to 256, a power of two: fewer for short rows, more where
 * there are few rows), 16 bytes a thread at a time, up to LOADS of them in flight; x comes from the first-level cache, which the
 * weight's loads are kept out of. The order of a sum depends on the shape alone. */
#include "gemv.cuh"

#include "gemm.cuh"
#include "quant.cuh"

enum { GEMV_THREADS = 256 };

static __device__ __forceinline__ int4 load_once(const int4 *p) {
#ifdef LC_EMULATED
    return *p;
#else
    return __ldcs(p);
#endif
}

/* N consecutive elements, 16-byte aligned where they are that long, as float. */
template <int N, class T> static __device__ __forceinline__ void read_some(const T *p, float (&v)[N]) {
    enum { WORDS = N * (int)sizeof(T) / 8 };
    alignas(16) T raw[N];
    if (WORDS % 2 == 0) {
#pragma unroll
        for (int i = 0; i < WORDS / 2; i++) ((int4 *)raw)[i] = ((const int4 *)p)[i];
    } else {
#pragma unroll
        for (int i = 0; i < WORDS; i++) ((int2 *)raw)[i] = ((const int2 *)p)[i];
    }
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = load<float>(raw[i]);
}

/* How a row of w is read in pieces of EACH elements: fetch starts the loads, unpack makes floats. */
template <class W> struct dense {
    enum { EACH = 16 / sizeof(W), LOADS = 8 };
    typedef int4 piece;
    static __device__ __forceinline__ const void *row(const void *w, int64_t elements) { return (const W *)w + elements; }
    static __device__ __forceinline__ piece fetch(const void *row, int i) { return load_once((const int4 *)row + i); }
    static __device__ __forceinline__ void unpack(piece p, float (&v)[EACH]) {
        alignas(16) W raw[EACH];
        *(int4 *)raw = p;
#pragma unroll
        for (int j = 0; j < EACH; j++) v[j] = load<float>(raw[j]);
    }
};
template <int Q> struct blocks {
    enum { EACH = 8, LOADS = 4, GROUPS = lc_quant<Q>::block / 8 };
    struct piece {
        const uint8_t *block;
        int group;
    };
    static __device__ __forceinline__ const void *row(const void *w, int64_t elements) {
        return (const uint8_t *)w + elements / lc_quant<Q>::block * lc_quant<Q>::bytes;
    }
    static __device__ __forceinline__ piece fetch(const void *row, int i) {
        return {(const uint8_t *)row + (int64_t)(i / GROUPS) * lc_quant<Q>::bytes, i % GROUPS};
    }
    static __device__ __forceinline__ void unpack(piece p, float (&v)[EACH]) { dequantise_eight<Q>(p.block, p.group, v); }
};

/* Adds one piece of a row of w times M rows of x at p. Of x only `left` rows are there: sums of the others count for nothing. */
template <class W, int M, class X>
static __device__ __forceinline__ void add_piece(typename W::piece piece, const X *p, int64_t ldx, int left, float (&sum)[M]) {
    float w[W::EACH], x[W::EACH];
    W::unpack(piece, w);
#pragma unroll
    for (int m = 0; m < M; m++) {
        read_some(p + (m < left ? m : 0) * ldx, x);
#pragma unroll
        for (int j = 0; j < W::EACH; j++) sum[m] += w[j] * x[j];
    }
}

/* This thread's part of M rows of x times one row of w, of `pieces` pieces. */
template <class W, int M, class X>
static __device__ __forceinline__ void dot(const void *row, const X *x, int64_t ldx, int left, int pieces, int lane, int lanes,
                                           float (&sum)[M]) {
    int at = lane;
    for (; at + (W::LOADS - 1) * lanes < pieces; at += lanes * W::LOADS) {
        typename W::piece p[W::LOADS];
#pragma unroll
        for (int u = 0; u < W::LOADS; u++) p[u] = W::fetch(row, at + u * lanes);
#pragma unroll
        for (int u = 0; u < W::LOADS; u++) add_piece<W, M>(p[u], x + (int64_t)(at + u * lanes) * W::EACH, ldx, left, sum);
    }
    for (; at < pieces; at += lanes) add_piece<W, M>(W::fetch(row, at), x + (int64_t)at * W::EACH, ldx, left, sum);
}

/* Rows r0 to r0 + M of x against all n rows of w; a block of 256 threads has 256 / lanes
 * rows of w. */
template <class W, int M> static __global__ void __launch_bounds__(GEMV_THREADS) gemv(const lc_cuda_gemv g, int64_t r0, int lanes) {
    __shared__ float room[M][GEMV_THREADS / 32];
    const int lane = (int)threadIdx.x % lanes, pieces = (int)(g.k / W::EACH);
    const int64_t j = (blockIdx.x * (int64_t)GEMV_THREADS + threadIdx.x) / lanes;
    const int left = (int)(g.rows - r0);
    float sum[M] = {};
    if (j < g.n) {
        const void *row = W::row(g.w, j * g.ld_w);
        if (g.x_dtype == LC_K_BF16) dot<W, M>(row, (const bf16 *)g.x + r0 * g.ldx, g.ldx, left, pieces, lane, lanes, sum);
        else if (g.x_dtype == LC_K_F16) dot<W, M>(row, (const f16 *)g.x + r0 * g.ldx, g.ldx, left, pieces, lane, lanes, sum);
        else dot<W, M>(row, (const float *)g.x + r0 * g.ldx, g.ldx, left, pieces, lane, lanes, sum);
    }
    const int near = lanes < 32 ? lanes : 32;
#pragma unroll
    for (int m = 0; m < M; m++)
        for (int o = near / 2; o; o /= 2) sum[m] += __shfl_xor_sync(0xffffffffu, sum[m], o);
    if (lanes > 32) { /* a row's warps lie side by side */
        const int warp = (int)threadIdx.x / 32, warps = lanes / 32;
#pragma unroll
        for (int m = 0; m < M; m++)
            if (threadIdx.x % 32 == 0) room[m][warp] = sum[m];
        __syncthreads();
        if (lane) return;
#pragma unroll
        for (int m = 0; m < M; m++)
            for (int i = 1; i < warps; i++) sum[m] += room[m][warp + i];
    }
    if (lane || j >= g.n) return;
    const float bias = g.bias ? load_any<float>(g.bias, g.bias_dtype, j) : 0.f;
#pragma unroll
    for (int m = 0; m < M; m++) {
        const int64_t r = r0 + m;
        if (r >= g.rows) break;
        float v = g.alpha * sum[m] + bias;
        if (g.add) v += load_any<float>(g.add, g.y_dtype, r * g.ld_add + j);
        store_any<float>(g.y, g.y_dtype, r * g.ldy + j, v);
    }
}

/* Threads for one row of w: enough that the device is full, but several pieces for each. */
static int lanes_for(int64_t n, int64_t pieces, int loads) {
    int lanes = 1;
    while (lanes < 32 && lanes < pieces) lanes *= 2;
    while (lanes >= 32 && lanes < GEMV_THREADS && n * lanes < (int64_t)lc_cuda_now->sms * 1024 && pieces > lanes * (loads / 2)) lanes *= 2;
    return lanes;
}

template <class W> static int run(const lc_cuda_gemv *g) {
    const int lanes = lanes_for(g->n, g->k / W::EACH, W::LOADS);
    const unsigned grid = (unsigned)ceil_div(g->n * lanes, GEMV_THREADS);
    for (int64_t r = 0; r < g->rows; r += 4) {
        if (g->rows - r == 1) LC_LAUNCH((gemv<W, 1>), grid, GEMV_THREADS, 0, *g, r, lanes);
        else LC_LAUNCH((gemv<W, 4>), grid, GEMV_THREADS, 0, *g, r, lanes);
    }
    return LC_K_OK;
}

static bool in_sixteens(const void *p, int64_t bytes) { return !(((uintptr_t)p | (uintptr_t)bytes) & 15); }

int lc_cuda_gemv_run(const lc_cuda_gemv *g) {
    if (g->rows > LC_GEMV_ROWS || g->k < 1 || g->k >= (int64_t)1 << 31 || g->n * GEMV_THREADS >= (int64_t)1 << 38) return LC_K_UNSUPPORTED;
    if (g->x_dtype == LC_K_F64 || g->w_dtype == LC_K_F64 || g->y_dtype == LC_K_F64) return LC_K_UNSUPPORTED;
    if (!in_sixteens(g->x, (g->rows > 1 ? g->ldx : 0) * dtype_bytes(g->x_dtype))) return LC_K_UNSUPPORTED;
    if (lc_dtype_is_quant(g->w_dtype)) {
        if (g->k % lc_dtype_traits(g->w_dtype)->block) return LC_K_UNSUPPORTED;
        LC_QUANTS(g->w_dtype, return run<blocks<Q>>(g);)
    }
    const int64_t size = dtype_bytes(g->w_dtype);
    if (!in_sixteens(g->w, g->k * size) || !in_sixteens(g->w, g->ld_w * size)) return LC_K_UNSUPPORTED;
    switch (g->w_dtype) {
    case LC_K_BF16: return run<dense<bf16>>(g);
    case LC_K_F16: return run<dense<f16>>(g);
    case LC_K_F32: return run<dense<float>>(g);
    default: return LC_K_UNSUPPORTED;
    }
}
