/* adapters.cu: what low-rank adapters add to projections, and their gradients. A block has 16 rows: its warps share the sum over the
 * long side (16 rows x ranks, by tensor cores, adapters rounded on the way), add up in order, and then multiply the 16 x ranks that came
 * of it with the other half of the adapters. On Hopper two blocks are a cluster and share both halves of the work. The gradients of
 * adapters themselves are one launch for all of a call: a block has 64 columns and walks all rows. */
#include <string.h>

#include "adapters.cuh"
#include "gemm.cuh"
#include "mma.cuh"

enum { ROWS = 16, WARPS = 16, THREADS = 32 * WARPS };

/* The parts as the kernels walk them: ranks in tiles of 8. */
struct tile_list {
    const float *a[ADAPTER_TILES], *b[ADAPTER_TILES]; /* a: 8 rows [8, in]; b: 8 columns, rows rank apart */
    int32_t part[ADAPTER_TILES];
    int32_t first[ADAPTER_PARTS], count[ADAPTER_PARTS]; /* tiles of a part */
};

/* ---- two blocks ------------------------------------------------------------------------------------------------------ */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && !defined(LC_EMULATED)
static __device__ __forceinline__ void both_blocks() { __cluster_barrier_arrive(), __cluster_barrier_wait(); }
static __device__ __forceinline__ const float *of_block(const float *p, int rank) {
    return (const float *)__cluster_map_shared_rank(p, (unsigned)rank);
}
#else
static __device__ __forceinline__ void both_blocks() { __syncthreads(); }
static __device__ __forceinline__ const float *of_block(const float *p, int) { return p; }
#endif

/* ---- sums over the long side ----------------------------------------------------------------------------------------- */
/* Eight neighbouring columns of row g and of row g + 8: two steps of 16 along k, whose columns 2q, 2q + 1 and 2q + 8, 2q + 9 are the
 * lane's eight in order. The other operand is read in the same order. */
struct two_steps {
    uint4 upper, lower;
    __device__ __forceinline__ void fragment(uint32_t (&a)[4], int step) const {
        a[0] = step ? upper.z : upper.x, a[1] = step ? lower.z : lower.x;
        a[2] = step ? upper.w : upper.y, a[3] = step ? lower.w : lower.y;
    }
};
template <class T> static __device__ __forceinline__ uint4 pack8(const float (&v)[8]) {
    return make_uint4(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]), pack2<T>(v[4], v[5]), pack2<T>(v[6], v[7]));
}
static __device__ __forceinline__ void read8(float (&v)[8], const float *p) {
    float4 x = __ldg((const float4 *)p), y = __ldg((const float4 *)p + 1);
    v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w, v[4] = y.x, v[5] = y.y, v[6] = y.z, v[7] = y.w;
}

/* sum [16][8 N] += rows x [.., n] times the tiles of part i (of all parts going forward), blocks of 32 columns from `from` on. */
template <class T, int N, bool BACK>
static __device__ __forceinline__ void long_sum(float (&sum)[N][4], const adapter_job &j, const tile_list &l, int i, int row, int from, int by) {
    const int g = (threadIdx.x & 31) / 4, q = threadIdx.x & 3;
    const adapter_part &p = j.part[i];
    const int n = BACK ? p.out : j.in, rank = p.rank;
    const T *upper = (const T *)p.x + (int64_t)min(row + g, j.rows - 1) * p.ld_x + 8 * q;
    const T *lower = (const T *)p.x + (int64_t)min(row + g + 8, j.rows - 1) * p.ld_x + 8 * q;
#pragma unroll 2
    for (int c = from * 32; c < n; c += by * 32) {
        two_steps x = {__ldg((const uint4 *)(upper + c)), __ldg((const uint4 *)(lower + c))};
        uint32_t first[4], second[4];
        x.fragment(first, 0), x.fragment(second, 1);
#pragma unroll
        for (int t = 0; t < N; t++) {
            float v[8];
            if (BACK) {
                if (l.part[t] != i) continue;
                const float *b = l.b[t] + (int64_t)(c + 8 * q) * rank + g;
#pragma unroll
                for (int e = 0; e < 8; e++) v[e] = __ldg(b + e * rank);
            } else {
                read8(v, l.a[t] + (int64_t)g * j.in + c + 8 * q);
            }
            uint4 w = pack8<T>(v);
            mma16<T>(sum[t], first, w.x, w.y);
            mma16<T>(sum[t], second, w.z, w.w);
        }
    }
}

/* ---- products with few ranks ----------------------------------------------------------------------------------------- */
/* acc[t]: columns 4 g + t of 32; so a lane's results are columns 8q .. 8q + 7 of rows g and g + 8. */
template <class T>
static __device__ __forceinline__ void store_columns(const float (&acc)[4][4], float scale, T *y, int64_t ld, int row, int rows, int column,
                                                     const T *add, int64_t ld_add) {
    const int g = (threadIdx.x & 31) / 4, q = threadIdx.x & 3;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = row + g + 8 * half;
        if (r >= rows) continue;
        float v[8];
#pragma unroll
        for (int t = 0; t < 4; t++) v[t] = acc[t][2 * half] * scale, v[4 + t] = acc[t][2 * half + 1] * scale;
        if (add) {
            uint4 more = *(const uint4 *)(add + (int64_t)r * ld_add + column + 8 * q);
            const uint32_t m[4] = {more.x, more.y, more.z, more.w};
#pragma unroll
            for (int e = 0; e < 4; e++) v[2 * e] += unpack2<T>(m[e]).x, v[2 * e + 1] += unpack2<T>(m[e]).y;
        }
        *(uint4 *)(y + (int64_t)r * ld + column + 8 * q) = pack8<T>(v);
    }
}

/* Ranks 8 t .. 8 t + 7 of the block's low [16][stride], for rows g and g + 8: half of a fragment. */
template <class T> static __device__ __forceinline__ void low_half(uint32_t &upper, uint32_t &lower, const T *low, int stride, int t) {
    const int g = (threadIdx.x & 31) / 4, q = threadIdx.x & 3;
    upper = *(const uint32_t *)(low + g * stride + 8 * t + 2 * q);
    lower = *(const uint32_t *)(low + (g + 8) * stride + 8 * t + 2 * q);
}

template <class T>
static __device__ __forceinline__ void spread_forward(const adapter_job &j, const tile_list &l, const T *low, int stride, int row, int from,
                                                      int by) {
    const int g = (threadIdx.x & 31) / 4, q = threadIdx.x & 3;
    int at = from;
    for (int i = 0; i < ADAPTER_PARTS; i++) {
        const adapter_part &p = j.part[i];
        if (!p.rank) continue;
        for (; at < p.out / 32; at += by) {
            float acc[4][4] = {};
            for (int t = 0; t < l.count[i]; t += 2) {
                const bool two = t + 1 < l.count[i];
                uint32_t x[4] = {0, 0, 0, 0};
                low_half(x[0], x[1], low, stride, l.first[i] + t);
                if (two) low_half(x[2], x[3], low, stride, l.first[i] + t + 1);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float *b = p.b + (int64_t)(at * 32 + 4 * g + e) * p.rank + 8 * t + 2 * q;
                    float2 v = __ldg((const float2 *)b), w = two ? __ldg((const float2 *)(b + 8)) : make_float2(0, 0);
                    mma16<T>(acc[e], x, pack2<T>(v.x, v.y), pack2<T>(w.x, w.y));
                }
            }
            store_columns<T>(acc, p.scale, (T *)p.y, p.ld_y, row, j.rows, at * 32, i ? NULL : (const T *)j.add, j.ld_add);
        }
        at -= p.out / 32;
    }
}

template <class T, int N>
static __device__ __forceinline__ void spread_back(const adapter_job &j, const tile_list &l, const T *low, int stride, int row, int from, int by) {
    const int g = (threadIdx.x & 31) / 4, q = threadIdx.x & 3;
    for (int at = from; at < j.in / 32; at += by) {
        float acc[4][4] = {};
#pragma unroll
        for (int t = 0; t < N; t += 2) {
            uint32_t x[4] = {0, 0, 0, 0}, b[2][4] = {};
#pragma unroll
            for (int h = 0; h < 2; h++) {
                if (t + h >= N) continue;
                low_half(x[2 * h], x[2 * h + 1], low, stride, t + h);
                const float *a = l.a[t + h < N ? t + h : 0] + (int64_t)(2 * q) * j.in + at * 32 + 4 * g;
                float4 v = __ldg((const float4 *)a), w = __ldg((const float4 *)(a + j.in));
                b[h][0] = pack2<T>(v.x, w.x), b[h][1] = pack2<T>(v.y, w.y), b[h][2] = pack2<T>(v.z, w.z), b[h][3] = pack2<T>(v.w, w.w);
            }
#pragma unroll
            for (int e = 0; e < 4; e++) mma16<T>(acc[e], x, b[0][e], b[1][e]);
        }
        store_columns<T>(acc, 1, (T *)j.gx, j.in, row, j.rows, at * 32, (const T *)NULL, 0);
    }
}

/* ---- both ------------------------------------------------------------------------------------------------------------ */
/* Blocks SHARE * i .. have rows 16 i .. 16 i + 15. */
template <class T, int N, bool BACK, int SHARE>
static __global__ void __launch_bounds__(THREADS, 1) adapters_kernel(const adapter_job j, const tile_list l) {
    enum { WIDE = 8 * N, STRIDE = WIDE + 8 };
    LC_SHARED(shared);
    float(*part)[ROWS][WIDE] = (float(*)[ROWS][WIDE])shared;           /* of each warp */
    float *own = (float *)shared + WARPS * ROWS * WIDE;                /* of this block */
    T *low = (T *)(own + ROWS * WIDE);                                 /* [16][STRIDE] */
    const int warp = threadIdx.x / 32, g = (threadIdx.x & 31) / 4, q = threadIdx.x & 3;
    const int row = (int)(blockIdx.x / SHARE) * ROWS, half = (int)(blockIdx.x % SHARE);
    float sum[N][4] = {};
    if (BACK) {
        for (int i = 0; i < ADAPTER_PARTS; i++)
            if (j.part[i].rank) long_sum<T, N, true>(sum, j, l, i, row, half * WARPS + warp, SHARE * WARPS);
    } else {
        long_sum<T, N, false>(sum, j, l, 0, row, half * WARPS + warp, SHARE * WARPS);
    }
#pragma unroll
    for (int t = 0; t < N; t++)
#pragma unroll
        for (int e = 0; e < 4; e++) part[warp][g + 8 * (e / 2)][8 * t + 2 * q + e % 2] = sum[t][e];
    __syncthreads();
    for (int e = threadIdx.x; e < ROWS * WIDE; e += THREADS) {
        float v = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) v += part[w][e / WIDE][e % WIDE];
        own[e] = v;
    }
    both_blocks();
    for (int e = threadIdx.x; e < ROWS * WIDE; e += THREADS) {
        float v = own[e];
        if (SHARE == 2) v = of_block(own, 0)[e] + of_block(own, 1)[e];
        const int r = e / WIDE, c = e % WIDE;
        const T rounded = store<T>(BACK ? v * j.part[l.part[c / 8]].scale : v);
        low[r * STRIDE + c] = rounded;
        if (!half && row + r < j.rows) ((T *)j.low)[(int64_t)(row + r) * WIDE + c] = rounded;
    }
    both_blocks(); /* the other one has read what lies here */
    if (!BACK) spread_forward<T>(j, l, low, STRIDE, row, half * WARPS + warp, SHARE * WARPS);
    else if (j.gx) spread_back<T, N>(j, l, low, STRIDE, row, half * WARPS + warp, SHARE * WARPS);
}

/* ---- host ------------------------------------------------------------------------------------------------------------ */
static tile_list list_tiles(const adapter_job *j) {
    tile_list l = {};
    int n = 0;
    for (int i = 0; i < ADAPTER_PARTS; i++) {
        l.first[i] = n, l.count[i] = j->part[i].rank / 8;
        for (int t = 0; t < l.count[i]; t++, n++) {
            l.a[n] = j->part[i].a ? j->part[i].a + (int64_t)8 * t * j->in : NULL;
            l.b[n] = j->part[i].b + 8 * t;
            l.part[n] = i;
        }
    }
    return l;
}

static bool lies16(const void *p, int64_t ld) { return !(((uintptr_t)p | (uintptr_t)(ld * 2)) & 15); }

bool adapters_take(const adapter_job *j, bool back) {
    int tiles = 0;
    if (j->rows < 2 * ROWS || (j->in % 32 && (!back || j->gx)) || lc_cuda_host->option(LC_OPTION_PLAIN_LINEAR)) return false;
    if (j->add && !lies16(j->add, j->ld_add)) return false;
    if (j->gx && !lies16(j->gx, j->in)) return false;
    for (int i = 0; i < ADAPTER_PARTS; i++) {
        const adapter_part *p = &j->part[i];
        if (!p->rank) continue;
        if (p->rank % 8 || p->out % 32 || !lies16(p->x, p->ld_x) || !lies16(p->a, 0) || !lies16(p->b, 0)) return false;
        if (!back && !lies16(p->y, p->ld_y)) return false;
        tiles += p->rank / 8;
    }
    return tiles && tiles <= ADAPTER_TILES && tiles != 5;
}

template <class T, int N, bool BACK> static int run_tiles(const adapter_job *j) {
    const size_t shared = sizeof(float) * (WARPS + 1) * ROWS * 8 * N + sizeof(T) * ROWS * (8 * N + 8);
    const unsigned blocks = (unsigned)ceil_div(j->rows, ROWS);
    const tile_list l = list_tiles(j);
#ifndef LC_EMULATED
    static int compiled; /* for which architecture: the driver may have made the kernel from an older one's text */
    if (!compiled) {
        cudaFuncAttributes a;
        compiled = cudaFuncGetAttributes(&a, (const void *)adapters_kernel<T, N, BACK, 2>) == cudaSuccess ? a.ptxVersion : 1;
    }
    if (lc_cuda_now->major >= 9 && compiled >= 90) {
        if (allow_shared(adapters_kernel<T, N, BACK, 2>, shared)) return LC_K_DEVICE;
        cudaLaunchAttribute attribute = {};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = 2, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        cudaLaunchConfig_t c = {};
        c.gridDim = dim3(2 * blocks), c.blockDim = dim3(THREADS), c.dynamicSmemBytes = shared, c.stream = lc_cuda_now->stream;
        c.attrs = &attribute, c.numAttrs = 1;
        return lc_cuda_check(cudaLaunchKernelEx(&c, adapters_kernel<T, N, BACK, 2>, *j, l), "adapters");
    }
#endif
    if (allow_shared(adapters_kernel<T, N, BACK, 1>, shared)) return LC_K_DEVICE;
    LC_LAUNCH((adapters_kernel<T, N, BACK, 1>), blocks, THREADS, shared, *j, l);
    return LC_K_OK;
}

template <class T, bool BACK> static int run_job(const adapter_job *j) {
    int tiles = 0;
    for (int i = 0; i < ADAPTER_PARTS; i++) tiles += j->part[i].rank / 8;
    switch (tiles) {
    case 1: return run_tiles<T, 1, BACK>(j);
    case 2: return run_tiles<T, 2, BACK>(j);
    case 3: return run_tiles<T, 3, BACK>(j);
    case 4: return run_tiles<T, 4, BACK>(j);
    default: return run_tiles<T, 6, BACK>(j);
    }
}

int adapters_run(const adapter_job *j, int dtype, bool back) {
    if (dtype == LC_K_BF16) return back ? run_job<bf16, true>(j) : run_job<bf16, false>(j);
    return back ? run_job<f16, true>(j) : run_job<f16, false>(j);
}
