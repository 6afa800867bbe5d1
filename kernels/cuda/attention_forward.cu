/* attention_forward.cu: softmax attention by tiles on the tensor cores (after FlashAttention-3, Shah and others, 2024). A block of two
 * warpgroups takes 128 queries of a head, each group 64 of them, and walks over tiles of 128 keys with a running maximum and sum. The
 * scores of one tile are made while the weights of the tile before multiply the values; exponentials go on meanwhile. The next tiles
 * of keys and values are on their way. Scores live in registers only. */
#include "attention.cuh"

enum { BQ = 128, BK = 128, THREADS = 256 };

/* Columns key + 8 n + 2 (lane % 4) + (0, 1); the first row sees keys up to `last`, the other, 8 below, 8 more. */
__device__ __forceinline__ void mask_scores(const softmax_call &a, float (&s)[BK / 8][4], int key, int start, int last) {
    int col = key + (threadIdx.x & 3) * 2, first = softmax_first(a, start, last), first8 = softmax_first(a, start, last + 8);
#pragma unroll
    for (int n = 0; n < BK / 8; n++)
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

/* Scores become weights; keep: what brings the sums so far to the new maximum. */
__device__ __forceinline__ void soften(float (&s)[BK / 8][4], float (&max)[2], float (&sum)[2], float (&keep)[2], float scale) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float m = max[r], other = -INFINITY;
#pragma unroll
        for (int n = 0; n < BK / 8; n++) m = fmaxf(m, s[n][2 * r]), other = fmaxf(other, s[n][2 * r + 1]);
        m = quad_max(fmaxf(m, other));
        float base = m == -INFINITY ? 0 : m * scale, add = 0, add1 = 0;
        keep[r] = exp2_fast(max[r] * scale - base);
#pragma unroll
        for (int n = 0; n < BK / 8; n++) {
            s[n][2 * r] = exp2_fast(s[n][2 * r] * scale - base);
            s[n][2 * r + 1] = exp2_fast(s[n][2 * r + 1] * scale - base);
            add += s[n][2 * r], add1 += s[n][2 * r + 1];
        }
        max[r] = m;
        sum[r] = sum[r] * keep[r] + (add + add1);
    }
}

template <class T, int D> __global__ void __launch_bounds__(THREADS, 1) tiles_forward(softmax_call a, rows4 y, rows4 lse, block_order order) {
    LC_SHARED(shared);
    T *q = (T *)shared, *k = q + BQ * D, *v = k + 2 * BK * D; /* two tiles each of k and v */
    int tile, head;
    order.at(blockIdx.x, tile, head);
    int q0 = (order.tiles - 1 - tile) * BQ, b = head / a.h, h = head % a.h, lane = threadIdx.x & 31;
    int m = (threadIdx.x >> 5) * 16, offset = softmax_offset(a), start = softmax_start(a, b);
    int end = (q0 + BQ < a.t ? q0 + BQ : a.t) + offset; /* keys before it are seen by some query */
    int begin = softmax_first(a, start, q0 + offset);
    begin = begin > 0 ? begin / BK * BK : 0;
    int tiles = end > begin ? (end - begin + BK - 1) / BK : 1; /* where no key is seen one is masked */
    int warp_at = q0 + m + offset; /* the last key that the warp's first query sees */
    tile_source<D, THREADS, T> keys(a.k.row<T>(b, h / a.group, 0), a.k.s[2], end), values(a.v.row<T>(b, h / a.group, 0), a.v.s[2], end);
    float o[D / 8][4], s[BK / 8][4], max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, keep[2], scale = (float)a.scale * LOG2E;
    uint32_t p[BK / 16][4];
    auto weigh = [&](int key) {
        if (key + BK - 1 > warp_at || key < softmax_first(a, start, warp_at + 15)) mask_scores(a, s, key, start, warp_at + lane / 4);
        soften(s, max, sum, keep, scale);
    };

    tile_source<D, THREADS, T>(a.q.row<T>(b, h, 0), a.q.s[2], a.t).template copy<BQ>(q, q0);
    keys.template copy<BK>(k, begin);
    copy_commit();
    values.template copy<BK>(v, begin);
    if (tiles > 1) keys.template copy<BK>(k + BK * D, begin + BK);
    copy_commit();
    copy_wait<1>();
    shared_fence();
    __syncthreads();
    clear(s);
    clear(o);
    group_begin();
    group_product<BK, D, BQ, ALONG_K, BK, ALONG_K>(s, q, m & 64, k, 0);
    group_end();
    group_hold(s);
    weigh(begin);
    as_fragments<BK, T>(p, s);
    for (int n = 1; n < tiles; n++) { /* keys n and values n - 1 are there, in tiles n % 2 and (n - 1) % 2 */
        copy_wait<0>();
        shared_fence();
        __syncthreads();
        values.template copy<BK>(v + (n & 1) * (BK * D), begin + n * BK);
        if (n + 1 < tiles) keys.template copy<BK>(k + (~n & 1) * (BK * D), begin + (n + 1) * BK);
        copy_commit();
        clear(s);
        group_begin();
        group_product<BK, D, BQ, ALONG_K, BK, ALONG_K>(s, q, m & 64, k + (n & 1) * (BK * D), 0);
        group_commit();
        group_product<D, BK, BK, ACROSS_K>(o, p, v + (~n & 1) * (BK * D), 0);
        group_commit();
        group_wait<1>();
        group_hold(s);
        weigh(begin + n * BK);
        if (sum[0] < 0 || sum[1] < 0) clear(s); /* never; over a branch the assembler does not move the wait up, which it else does */
        group_wait<0>();
        group_hold(o);
#pragma unroll
        for (int i = 0; i < D / 8; i++) o[i][0] *= keep[0], o[i][1] *= keep[0], o[i][2] *= keep[1], o[i][3] *= keep[1];
        as_fragments<BK, T>(p, s);
    }
    copy_wait<0>();
    shared_fence();
    __syncthreads();
    group_hold(o);
    group_begin();
    group_product<D, BK, BK, ACROSS_K>(o, p, v + (~tiles & 1) * (BK * D), 0);
    group_end();
    group_hold(o);
    float by[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float total = quad_sum(sum[r]);
        int row = q0 + m + lane / 4 + r * 8;
        by[r] = total > 0 ? 1 / total : 0;
        if (lse.p && !(lane & 3) && row < a.t) *lse.row<float>(b, h, row) = total > 0 ? max[r] * (float)a.scale + logf(total) : 0;
    }
    store_rows<BQ, D>(y.row<T>(b, h, 0), y.s[2], q0 + m, a.t, q, m, o, by[0], by[1]);
}

template <class T, int D> static int run(const lc_kargs *k, const softmax_call &a) {
    size_t shared = (size_t)(BQ + 4 * BK) * D * sizeof(T);
    rows4 y = rows4_of(&k->y[0]), lse = k->y[1].data ? rows3_of(&k->y[1]) : rows4{};
    block_order order = order_blocks((int)ceil_div(a.t, BQ), a.b * a.h, a.group, (int64_t)a.s * D * 4);
    if (shared > lc_cuda_now->shared_max) return LC_K_UNSUPPORTED;
    if (allow_shared(tiles_forward<T, D>, shared)) return LC_K_DEVICE;
    LC_LAUNCH((tiles_forward<T, D>), (unsigned)(order.tiles * order.heads), THREADS, shared, a, y, lse, order);
    return LC_K_OK;
}

int softmax_tiles(const lc_kargs *k, const softmax_call &a) {
    if (a.q.dtype == LC_K_BF16) return a.d == 64 ? run<bf16, 64>(k, a) : run<bf16, 128>(k, a);
    return a.d == 64 ? run<f16, 64>(k, a) : run<f16, 128>(k, a);
}
