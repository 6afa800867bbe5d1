/* gemv.cu: products of 1 to 8 rows, which decoding consists of: bound by reading the weight, so all that counts is to keep enough of
 * its loads under way. A row of w is read by a group of `lanes` threads (1 to 256, a power of two: fewer for short rows, more where
 * there are few rows). Dense weights go through shared memory: each thread has a ring of DEPTH pieces of 16 bytes of its own, filled
 * by asynchronous copies that run on from one row into the next, so that they never drain; x comes from the first-level cache, which
 * these copies leave alone. A weight depends on no kernel before, so its first pieces are read while that still runs (chain.cuh): the
 * ring in full, FURTHER pieces a thread (19 MB on 132 multiprocessors) into the second-level cache. Blocks of quantised weights are read straight into
 * registers. The order of a sum depends on the shape alone. */
#include "gemv.cuh"

#include "chain.cuh"
#include "gemm.cuh"
#include "quant.cuh"

enum { GEMV_THREADS = 256, DEPTH = 8, FURTHER = 9, GEMV_BLOCKS = 4 /* a multiprocessor */ };

/* N consecutive elements, aligned to their size up to 16 bytes, as float. */
template <int N, class T> static __device__ __forceinline__ void read_some(const T *p, float (&v)[N]) {
    enum { PAIRS = N * (int)sizeof(T) / 8 };
    alignas(16) T raw[N];
    if (PAIRS % 2 == 0) {
#pragma unroll
        for (int i = 0; i < PAIRS / 2; i++) ((int4 *)raw)[i] = ((const int4 *)p)[i];
    } else {
#pragma unroll
        for (int i = 0; i < PAIRS; i++) ((int2 *)raw)[i] = ((const int2 *)p)[i];
    }
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = load<float>(raw[i]);
}

/* Adds N elements of a row of w times M rows of x at p. Of x only `left` rows are there: sums of the others count for nothing. */
template <int M, int N, class X>
static __device__ __forceinline__ void add_products(const float (&w)[N], const X *p, int64_t ldx, int left, float (&sum)[M]) {
    float x[N];
#pragma unroll
    for (int m = 0; m < M; m++) {
        read_some(p + (m < left ? m : 0) * ldx, x);
#pragma unroll
        for (int j = 0; j < N; j++) sum[m] += w[j] * x[j];
    }
}

/* Adds up the sums of a group's threads; its first thread writes column j of y, rows from r0 on. */
template <int M>
static __device__ __forceinline__ void finish_row(const lc_cuda_gemv &g, int64_t r0, int64_t j, int lane, int lanes, float (&sum)[M]) {
    __shared__ float room[M][GEMV_THREADS / 32];
    const int near = lanes < 32 ? lanes : 32;
#pragma unroll
    for (int m = 0; m < M; m++)
        for (int o = near / 2; o; o /= 2) sum[m] += __shfl_xor_sync(0xffffffffu, sum[m], o);
    if (lanes > 32) { /* a group's warps lie side by side */
        const int warp = (int)threadIdx.x / 32;
        __syncthreads();
#pragma unroll
        for (int m = 0; m < M; m++)
            if (threadIdx.x % 32 == 0) room[m][warp] = sum[m];
        __syncthreads();
#pragma unroll
        for (int m = 0; m < M; m++)
            for (int i = 1; i < lanes / 32 && !lane; i++) sum[m] += room[m][warp + i];
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

/* ---- dense weights --------------------------------------------------------------------------------------------------- */
/* A block's 256 / lanes rows of w, then those gridDim.x times as many further on, and so forth. */
template <class W, int M, class X>
static __device__ __forceinline__ void dense_rows(const lc_cuda_gemv &g, const X *x, int64_t r0, int lane_bits, int4 (*ring)[GEMV_THREADS]) {
    enum { EACH = 16 / sizeof(W) };
    const int lanes = 1 << lane_bits, me = (int)threadIdx.x, lane = me & (lanes - 1), pieces = (int)(g.k / EACH);
    const int steps = (pieces + lanes - 1) >> lane_bits, left = (int)(g.rows - r0);
    const int64_t first = (int64_t)blockIdx.x * (GEMV_THREADS >> lane_bits), apart = (int64_t)gridDim.x * (GEMV_THREADS >> lane_bits);
    const int group = me >> lane_bits;
    int64_t ahead = first + group; /* the row that is copied, its next piece, and where that lies */
    int ahead_at = lane, slot = 0;
    const W *from = (const W *)g.w + ahead * g.ld_w + lane * EACH;
    const int64_t next_row = apart * g.ld_w - (int64_t)steps * lanes * EACH;
    auto copy_next = [&](int to) {
        if (ahead < g.n && ahead_at < pieces) copy16(&ring[to][me], from, true);
        copy_commit();
        from += lanes * EACH, ahead_at += lanes;
        if (ahead_at >= steps << lane_bits) ahead_at = lane, ahead += apart, from += next_row;
    };
    for (int d = 0; d < DEPTH - 1; d++) copy_next(d);
    const int further = pieces - (DEPTH - 1) * lanes < FURTHER * lanes ? pieces - (DEPTH - 1) * lanes : FURTHER * lanes;
    if (!lane && first + group < g.n && further > 0)
        read_ahead((const W *)g.w + (first + group) * g.ld_w + (DEPTH - 1) * lanes * EACH, (uint32_t)further * 16);
    wait_for_previous();
    for (int64_t j = first; j < g.n; j += apart) { /* the same rounds for every thread of the block */
        const X *p = x + lane * EACH;
        const int mine = j + group < g.n ? pieces : 0;
        float sum[M] = {};
        for (int at = lane; at < steps << lane_bits; at += lanes) {
            copy_next((slot + DEPTH - 1) % DEPTH);
            copy_wait<DEPTH - 1>();
            if (at < mine) {
                alignas(16) W raw[EACH];
                float w[EACH];
                *(int4 *)raw = ring[slot][me];
#pragma unroll
                for (int e = 0; e < EACH; e++) w[e] = load<float>(raw[e]);
                add_products<M>(w, p, g.ldx, left, sum);
            }
            p += lanes * EACH;
            slot = (slot + 1) % DEPTH;
        }
        finish_row<M>(g, r0, j + group, lane, lanes, sum);
    }
}

/* Rows r0 to r0 + M of x against all n rows of w. */
template <class W, int M>
static __global__ void __launch_bounds__(GEMV_THREADS, GEMV_BLOCKS) gemv_dense(const lc_cuda_gemv g, int64_t r0, int lane_bits) {
    __shared__ int4 ring[DEPTH][GEMV_THREADS];
    next_may_start();
    if (g.x_dtype == LC_K_BF16) dense_rows<W, M>(g, (const bf16 *)g.x + r0 * g.ldx, r0, lane_bits, ring);
    else if (g.x_dtype == LC_K_F16) dense_rows<W, M>(g, (const f16 *)g.x + r0 * g.ldx, r0, lane_bits, ring);
    else dense_rows<W, M>(g, (const float *)g.x + r0 * g.ldx, r0, lane_bits, ring);
}

/* ---- quantised weights ----------------------------------------------------------------------------------------------- */
template <int Q, int M, class X>
static __device__ __forceinline__ void block_row(const uint8_t *row, const X *x, int64_t ldx, int left, int pieces, int lane, int lanes,
                                                 float (&sum)[M]) {
    enum { GROUPS = lc_quant<Q>::block / 8, SIZE = lc_quant<Q>::bytes, EIGHTS = M == 1 ? 4 : 1 /* pieces under way */ };
    for (int at = lane; at < pieces; at += lanes * EIGHTS) {
        float w[EIGHTS][8];
#pragma unroll
        for (int u = 0; u < EIGHTS; u++) {
            const int i = at + u * lanes < pieces ? at + u * lanes : at;
            dequantise_eight<Q>(row + (int64_t)(i / GROUPS) * SIZE, i % GROUPS, w[u]);
        }
#pragma unroll
        for (int u = 0; u < EIGHTS; u++) {
            const int i = at + u * lanes;
            if (i < pieces) add_products<M>(w[u], x + (int64_t)i * 8, ldx, left, sum);
        }
    }
}

/* As gemv_dense, one round. */
template <int Q, int M> static __global__ void __launch_bounds__(GEMV_THREADS, 3) gemv_blocks(const lc_cuda_gemv g, int64_t r0, int lanes) {
    next_may_start();
    wait_for_previous();
    const int lane = (int)threadIdx.x % lanes, pieces = (int)(g.k / 8), left = (int)(g.rows - r0);
    const int64_t j = (blockIdx.x * (int64_t)GEMV_THREADS + threadIdx.x) / lanes;
    float sum[M] = {};
    if (j < g.n) {
        const uint8_t *row = (const uint8_t *)g.w + j * g.ld_w / lc_quant<Q>::block * lc_quant<Q>::bytes;
        if (g.x_dtype == LC_K_BF16) block_row<Q, M>(row, (const bf16 *)g.x + r0 * g.ldx, g.ldx, left, pieces, lane, lanes, sum);
        else if (g.x_dtype == LC_K_F16) block_row<Q, M>(row, (const f16 *)g.x + r0 * g.ldx, g.ldx, left, pieces, lane, lanes, sum);
        else block_row<Q, M>(row, (const float *)g.x + r0 * g.ldx, g.ldx, left, pieces, lane, lanes, sum);
    }
    finish_row<M>(g, r0, j, lane, lanes, sum);
}

/* ---- launches -------------------------------------------------------------------------------------------------------- */
/* Threads for one row of w: enough that the device is full, but several pieces for each. */
static int lanes_for(int64_t n, int64_t pieces) {
    int lanes = 1;
    while (lanes < 32 && lanes < pieces) lanes *= 2;
    while (lanes >= 32 && lanes < GEMV_THREADS && n * lanes < (int64_t)lc_cuda_now->sms * 512 && pieces > lanes * 4) lanes *= 2;
    return lanes;
}

static void writes_rows(const lc_cuda_gemv *g) {
    chain_writes(g->y, ((g->rows - 1) * g->ldy + g->n) * dtype_bytes(g->y_dtype));
}

/* Rows of x by four; the weight is read anew for each four. */
template <class W> static int run_dense(const lc_cuda_gemv *g) {
    const int lanes = lanes_for(g->n, g->k / (16 / (int64_t)sizeof(W)));
    const int64_t needed = ceil_div(g->n * lanes, GEMV_THREADS), rounds = ceil_div(needed, (int64_t)GEMV_BLOCKS * lc_cuda_now->sms);
    const unsigned grid = (unsigned)ceil_div(needed, rounds); /* as many rounds for each block */
    int lane_bits = 0;
    while (1 << lane_bits < lanes) lane_bits++;
    const bool apart = chain_apart(g->w, ((g->n - 1) * g->ld_w + g->k) * (int64_t)sizeof(W));
    for (int64_t r = 0; r < g->rows; r += 4) {
        if (g->rows - r == 1) LC_LAUNCH_AFTER(apart, (gemv_dense<W, 1>), grid, GEMV_THREADS, 0, *g, r, lane_bits);
        else LC_LAUNCH_AFTER(apart, (gemv_dense<W, 4>), grid, GEMV_THREADS, 0, *g, r, lane_bits);
    }
    writes_rows(g);
    return LC_K_OK;
}

template <int Q> static int run_blocks(const lc_cuda_gemv *g) {
    const int lanes = lanes_for(g->n, g->k / 8);
    const unsigned grid = (unsigned)ceil_div(g->n * lanes, GEMV_THREADS);
    for (int64_t r = 0; r < g->rows; r += 4) {
        if (g->rows - r == 1) LC_LAUNCH_AFTER(true, (gemv_blocks<Q, 1>), grid, GEMV_THREADS, 0, *g, r, lanes);
        else LC_LAUNCH_AFTER(true, (gemv_blocks<Q, 4>), grid, GEMV_THREADS, 0, *g, r, lanes);
    }
    writes_rows(g);
    return LC_K_OK;
}

static bool in_sixteens(const void *p, int64_t bytes) { return !(((uintptr_t)p | (uintptr_t)bytes) & 15); }

int lc_cuda_gemv_run(const lc_cuda_gemv *g) {
    if (g->rows > LC_GEMV_ROWS || g->k < 1 || g->k >= (int64_t)1 << 31 || g->n >= (int64_t)1 << 31) return LC_K_UNSUPPORTED;
    if (g->x_dtype == LC_K_F64 || g->w_dtype == LC_K_F64 || g->y_dtype == LC_K_F64) return LC_K_UNSUPPORTED;
    if (!in_sixteens(g->x, (g->rows > 1 ? g->ldx : 0) * dtype_bytes(g->x_dtype))) return LC_K_UNSUPPORTED;
    if (lc_dtype_is_quant(g->w_dtype)) {
        if (g->k % lc_dtype_traits(g->w_dtype)->block) return LC_K_UNSUPPORTED;
        LC_QUANTS(g->w_dtype, return run_blocks<Q>(g);)
    }
    if (lc_cuda_gemv_one(g) == LC_K_OK) return LC_K_OK;
    const int64_t size = dtype_bytes(g->w_dtype);
    if (!in_sixteens(g->w, g->k * size) || !in_sixteens(g->w, g->ld_w * size)) return LC_K_UNSUPPORTED;
    switch (g->w_dtype) {
    case LC_K_BF16: return run_dense<bf16>(g);
    case LC_K_F16: return run_dense<f16>(g);
    case LC_K_F32: return run_dense<float>(g);
    default: return LC_K_UNSUPPORTED;
    }
}
