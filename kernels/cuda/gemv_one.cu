/* gemv_one.cu: one row times a dense weight of halves, which decoding at batch 1 consists of: bound by reading the weight. A block of 256
 * threads takes tiles of ROWS rows of w, each thread the pieces of 16 bytes of its own columns; x lies in shared memory and is read once
 * for a tile's rows. A thread's pieces come through a ring of its own in shared memory, by asynchronous copies that run on from tile to
 * tile, so that they never drain and no barrier is met; the sums of the warps meet once for CHUNK tiles. The ring is filled, and FURTHER
 * steps of it are read into the second-level cache (22 MB on 132 multiprocessors), while the kernels before still run (chain.cuh). The
 * order of a sum depends on k alone. */
#include "chain.cuh"
#include "gemm.cuh"
#include "gemv.cuh"

enum { THREADS = 256, WARPS = THREADS / 32, ROWS = 4, RING = 4, FURTHER = 5, CHUNK = THREADS / ROWS };

static size_t shared_bytes(int steps) { return (size_t)(RING * ROWS + steps) * THREADS * 16 + WARPS * CHUNK * ROWS * sizeof(float); }

template <class T> static __device__ __forceinline__ void open_eight(int4 raw, float (&v)[8]) {
    const int word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 two = unpack2<T>((uint32_t)word[i]);
        v[2 * i] = two.x, v[2 * i + 1] = two.y;
    }
}

/* The sums of a warp: lane l gets that of row l / 8. */
static __device__ __forceinline__ float warp_sums(const float (&sum)[ROWS]) {
    const bool far = threadIdx.x & 16, odd = threadIdx.x & 8;
    float a = far ? sum[2] : sum[0], b = far ? sum[3] : sum[1];
    a += __shfl_xor_sync(0xffffffffu, far ? sum[0] : sum[2], 16);
    b += __shfl_xor_sync(0xffffffffu, far ? sum[1] : sum[3], 16);
    float v = odd ? b : a;
    v += __shfl_xor_sync(0xffffffffu, odd ? a : b, 8);
#pragma unroll
    for (int o = 4; o; o /= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}

/* What a thread copies next: piece step * THREADS + its number of the rows of a tile. */
template <class W> struct copier {
    const lc_cuda_gemv &g;
    int4 (*ring)[ROWS][THREADS];
    int steps, pieces, tile, step;
    const W *from;

    __device__ __forceinline__ void at_tile(int t) { tile = t, step = 0, from = (const W *)g.w + (int64_t)t * ROWS * g.ld_w + threadIdx.x * 8; }
    __device__ __forceinline__ void next(int slot) {
        const int last = (int)g.n - 1 - tile * ROWS; /* rows beyond n are copies of the last one, which nobody looks at */
        if (last >= 0) {
            const bool in = step * THREADS + (int)threadIdx.x < pieces;
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                copy16(&ring[slot][r][threadIdx.x], in ? from + (r < last ? r : last) * g.ld_w : (const W *)g.w, in);
        }
        copy_commit();
        from += THREADS * 8;
        if (++step == steps) at_tile(tile + gridDim.x);
    }
    /* Steps RING - 1 to RING - 1 + FURTHER from the start, a row a thread. */
    __device__ __forceinline__ void further() const {
        const int t = (int)threadIdx.x / ROWS, done = RING - 1 - t * steps, row = ((int)blockIdx.x + t * (int)gridDim.x) * ROWS + (int)threadIdx.x % ROWS;
        if (t >= RING + FURTHER || row >= g.n) return;
        const int a = done < 0 ? 0 : done, b = done + FURTHER < steps ? done + FURTHER : steps;
        if (a >= b) return;
        const int begin = a * THREADS, end = b * THREADS < pieces ? b * THREADS : pieces;
        if (begin < end) read_ahead((const W *)g.w + (int64_t)row * g.ld_w + begin * 8, (uint32_t)(end - begin) * 16);
    }
};

/* Grid-stride over tiles. steps = ceil(pieces of a row / THREADS). */
template <class W> static __global__ void __launch_bounds__(THREADS, 2) gemv_one(const lc_cuda_gemv g, int steps) {
    LC_SHARED(shared);
    int4 (*ring)[ROWS][THREADS] = (int4 (*)[ROWS][THREADS])shared, *x = (int4 *)shared + RING * ROWS * THREADS;
    float *parts = (float *)(x + steps * THREADS); /* [WARPS][CHUNK * ROWS] */
    const int me = (int)threadIdx.x, pieces = (int)(g.k / 8), tiles = ((int)g.n + ROWS - 1) / ROWS;
    const int mine = (tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
    copier<W> c = {g, ring, steps, pieces};
    next_may_start();
    c.at_tile((int)blockIdx.x);
#pragma unroll
    for (int i = 0; i < RING - 1; i++) c.next(i);
    c.further();
    wait_for_previous();
    for (int i = me; i < steps * THREADS; i += THREADS) x[i] = i < pieces ? ((const int4 *)g.x)[i] : make_int4(0, 0, 0, 0);
    __syncthreads();
    int slot = 0;
    for (int first = 0; first < mine; first += CHUNK) {
        const int count = mine - first < CHUNK ? mine - first : (int)CHUNK;
        const int64_t row = ((int64_t)(first + me / ROWS) * gridDim.x + blockIdx.x) * ROWS + me % ROWS; /* which this thread writes */
        const bool writes = me < count * ROWS && row < g.n;
        float more = 0;
        if (writes && g.bias) more = load_any<float>(g.bias, g.bias_dtype, row);
        if (writes && g.add) more += load_any<float>(g.add, g.y_dtype, row);
        for (int t = 0; t < count; t++) {
            float sum[ROWS] = {};
#pragma unroll 1
            for (int s = 0; s < steps; s++) {
                float a[8], w[8];
                c.next((slot + RING - 1) % RING);
                copy_wait<RING - 1>();
                open_eight<W>(x[s * THREADS + me], a);
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    open_eight<W>(ring[slot][r][me], w);
#pragma unroll
                    for (int e = 0; e < 8; e++) sum[r] += w[e] * a[e];
                }
                slot = (slot + 1) % RING;
            }
            const float v = warp_sums(sum);
            if (me % 8 == 0) parts[me / 32 * (CHUNK * ROWS) + t * ROWS + me % 32 / 8] = v;
        }
        __syncthreads();
        if (writes) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += parts[w * (CHUNK * ROWS) + me];
            store_any<float>(g.y, g.y_dtype, row, g.alpha * sum + more);
        }
        __syncthreads();
    }
}

template <class W> static int run(const lc_cuda_gemv *g, int steps) {
    const size_t bytes = shared_bytes(steps);
    const int64_t tiles = ceil_div(g->n, ROWS), most = (int64_t)lc_cuda_now->sms * (2 * (bytes + 1024) <= lc_cuda_now->shared_max + 1024 ? 2 : 1);
    if (allow_shared(gemv_one<W>, bytes)) return LC_K_DEVICE;
    const bool apart = chain_apart(g->w, ((g->n - 1) * g->ld_w + g->k) * (int64_t)sizeof(W));
    LC_LAUNCH_AFTER(apart, gemv_one<W>, (unsigned)(tiles < most ? tiles : most), THREADS, bytes, *g, steps);
    chain_writes(g->y, g->n * dtype_bytes(g->y_dtype));
    return LC_K_OK;
}

int lc_cuda_gemv_one(const lc_cuda_gemv *g) {
    const int64_t pieces = g->k / 8, steps = ceil_div(pieces, THREADS);
    if (g->rows != 1 || g->x_dtype != g->w_dtype || g->k % 8 || g->ld_w % 8 || pieces * 4 < steps * THREADS * 3) return LC_K_UNSUPPORTED;
    if (((uintptr_t)g->x | (uintptr_t)g->w) & 15 || shared_bytes((int)steps) > lc_cuda_now->shared_max) return LC_K_UNSUPPORTED;
    if (g->n < (int64_t)lc_cuda_now->sms * ROWS) return LC_K_UNSUPPORTED; /* few rows: more threads for each serve them better */
    if (g->w_dtype == LC_K_BF16) return run<bf16>(g, (int)steps);
    return g->w_dtype == LC_K_F16 ? run<f16>(g, (int)steps) : LC_K_UNSUPPORTED;
}
