/* attention_forward.cu: softmax attention by tiles on the tensor cores (after FlashAttention-2, Dao, 2023). A block of 8 warps takes
 * 128 queries of a head, a warp 16 of them, and walks over tiles of 64 keys with a running maximum and sum; the next tile is on its
 * way while one is worked on. Scores live in registers only. Blocks with the most keys come first. */
#include "attention.cuh"
#include "mma.cuh"

enum { BQ = 128, BK = 64, THREADS = 256 };
#define LOG2E 1.4426950408889634f

/* s [16 x 64] of a warp = q rows m .. m + 15 times the 64 rows of k, both [..][D]. */
template <int D, class T> __device__ __forceinline__ void scores(float (&s)[8][4], const T *q, const T *k, int m) {
#pragma unroll
    for (int n = 0; n < 8; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
    for (int kk = 0; kk < D; kk += 16) {
        uint32_t x[4], y[4];
        fragment_a<BQ>(x, q, m, kk);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            fragment_b<BK>(y, k, n * 16, kk);
            mma16<T>(s[2 * n], x, y[0], y[1]);
            mma16<T>(s[2 * n + 1], x, y[2], y[3]);
        }
    }
}

/* Columns key + 8 n + 2 (lane % 4) + (0, 1); the first row sees keys up to `last`, the other, 8 below, 8 more. */
__device__ __forceinline__ void mask_scores(const softmax_call &a, float (&s)[8][4], int key, int start, int last) {
    int col = key + (threadIdx.x & 3) * 2, first = softmax_first(a, start, last), first8 = softmax_first(a, start, last + 8);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int j = col + n * 8 + (e & 1);
            if (e < 2 ? j < first || j > last : j < first8 || j > last + 8) s[n][e] = -INFINITY;
        }
}

__device__ __forceinline__ float quad_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

/* Scores become weights; the sums so far are brought to the new maximum. */
template <int N> __device__ __forceinline__ void soften(float (&s)[8][4], float (&o)[N][4], float (&max)[2], float (&sum)[2], float scale) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float m = max[r];
#pragma unroll
        for (int n = 0; n < 8; n++) m = fmaxf(m, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
        m = quad_max(m);
        float base = m == -INFINITY ? 0 : m * scale, keep = exp2_fast(max[r] * scale - base), add = 0;
#pragma unroll
        for (int n = 0; n < 8; n++) {
            s[n][2 * r] = exp2_fast(s[n][2 * r] * scale - base);
            s[n][2 * r + 1] = exp2_fast(s[n][2 * r + 1] * scale - base);
            add += s[n][2 * r] + s[n][2 * r + 1];
        }
        max[r] = m;
        sum[r] = sum[r] * keep + add;
#pragma unroll
        for (int n = 0; n < N; n++) o[n][2 * r] *= keep, o[n][2 * r + 1] *= keep;
    }
}

template <class T, int D> __global__ void __launch_bounds__(THREADS, 2) tiles_forward(softmax_call a, rows4 y, rows4 lse) {
    LC_SHARED(shared);
    T *q = (T *)shared, *k = q + BQ * D, *v = q + (BQ + 2 * BK) * D; /* two tiles each of k and v */
    int q0 = (gridDim.x - 1 - blockIdx.x) * BQ, b = blockIdx.y / a.h, h = blockIdx.y % a.h, lane = threadIdx.x & 31;
    int m = (threadIdx.x >> 5) * 16, offset = softmax_offset(a), start = softmax_start(a, b);
    int end = (q0 + BQ < a.t ? q0 + BQ : a.t) + offset; /* keys before it are seen by some query */
    int begin = softmax_first(a, start, q0 + offset);
    begin = begin > 0 ? begin / BK * BK : 0;
    int warp_at = q0 + m + offset; /* the last key that the warp's first query sees */
    const T *kb = a.k.row<T>(b, h / a.group, 0), *vb = a.v.row<T>(b, h / a.group, 0);
    int ks = (int)a.k.s[2], vs = (int)a.v.s[2];
    float o[D / 8][4] = {}, max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, scale = (float)a.scale * LOG2E;

    load_tile<BQ, D, THREADS>(q, a.q.row<T>(b, h, 0), (int)a.q.s[2], q0, a.t);
    load_tile<BK, D, THREADS>(k, kb, ks, begin, a.s);
    load_tile<BK, D, THREADS>(v, vb, vs, begin, a.s);
    copy_commit();
    for (int key = begin, at = 0; key < end; key += BK, at ^= 1) {
        T *kt = k + at * (BK * D), *vt = v + at * (BK * D);
        if (key + BK < end) {
            load_tile<BK, D, THREADS>(k + (at ^ 1) * (BK * D), kb, ks, key + BK, a.s);
            load_tile<BK, D, THREADS>(v + (at ^ 1) * (BK * D), vb, vs, key + BK, a.s);
        }
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        if (key <= warp_at + 15 && key + BK > softmax_first(a, start, warp_at)) {
            float s[8][4];
            scores<D>(s, q, kt, m);
            if (key + BK - 1 > warp_at || key < softmax_first(a, start, warp_at + 15)) mask_scores(a, s, key, start, warp_at + lane / 4);
            soften(s, o, max, sum, scale);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t p[4] = {pack2<T>(s[2 * j][0], s[2 * j][1]), pack2<T>(s[2 * j][2], s[2 * j][3]),
                                 pack2<T>(s[2 * j + 1][0], s[2 * j + 1][1]), pack2<T>(s[2 * j + 1][2], s[2 * j + 1][3])};
#pragma unroll
                for (int n = 0; n < D / 16; n++) {
                    uint32_t x[4];
                    fragment_b_t<BK>(x, vt, n * 16, j * 16);
                    mma16<T>(o[2 * n], p, x[0], x[1]);
                    mma16<T>(o[2 * n + 1], p, x[2], x[3]);
                }
            }
        }
        __syncthreads();
    }
    copy_wait<0>();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float total = quad_sum(sum[r]), by = total > 0 ? 1 / total : 0;
        int row = q0 + m + lane / 4 + r * 8;
        if (row >= a.t) continue;
        T *to = y.row<T>(b, h, row) + (lane & 3) * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) *(uint32_t *)(to + n * 8) = pack2<T>(o[n][2 * r] * by, o[n][2 * r + 1] * by);
        if (lse.p && !(lane & 3)) *lse.row<float>(b, h, row) = total > 0 ? max[r] * (float)a.scale + logf(total) : 0;
    }
}

template <class T, int D> static int run(const lc_kargs *k, const softmax_call &a) {
    size_t shared = (size_t)(BQ + 4 * BK) * D * sizeof(T);
    rows4 y = rows4_of(&k->y[0]), lse = k->y[1].data ? rows3_of(&k->y[1]) : rows4{};
    if (allow_shared(tiles_forward<T, D>, shared)) return LC_K_DEVICE;
    LC_LAUNCH((tiles_forward<T, D>), dim3((unsigned)ceil_div(a.t, BQ), a.b * a.h), THREADS, shared, a, y, lse);
    return LC_K_OK;
}

int softmax_tiles(const lc_kargs *k, const softmax_call &a) {
    if (a.q.dtype == LC_K_BF16) return a.d == 64 ? run<bf16, 64>(k, a) : run<bf16, 128>(k, a);
    return a.d == 64 ? run<f16, 64>(k, a) : run<f16, 128>(k, a);
}
