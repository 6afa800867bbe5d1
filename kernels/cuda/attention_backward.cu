/* attention_backward.cu: the gradient of softmax attention by tiles on the tensor cores (after FlashAttention-3, Shah and others, 2024),
 * in three kernels without atomics: delta = g . y of every row; the gradient of q, a block a tile of 128 queries; those of k and v, a
 * block a tile of 128 keys that walks over the queries of its heads. Blocks are two warpgroups of 64 rows each. Weights are made again
 * from q, k and log-sum-exp. The product that ends a step goes on while the next one begins, so the tiles walked over lie in three places
 * in turn. With grouped heads a block either takes all heads of its group in turn or, where that leaves the chip idle, one, whose part
 * a last kernel adds. */
#include "attention.cuh"

enum { BM = 128, BN = 64, STAGES = 3, THREADS = 256 };

struct tile_grads {
    rows4 g, y, lse, gq, gk, gv;
    float *sums;        /* [b, h, tiles of BN queries][2][BN]: log-sum-exp times log2(e), and delta; infinity and 0 where there is no query */
    float *part;        /* [2][b, h, s, d] or NULL: each head's gradients of k and v */
};
static inline __host__ __device__ int query_tiles(const softmax_call &a) { return (a.t + BN - 1) / BN; }

/* ---- delta ----------------------------------------------------------------------------------------------------------- */
/* A warp a row. */
template <class T, int D> __global__ void __launch_bounds__(THREADS) row_products(softmax_call a, tile_grads o) {
    int64_t n = (int64_t)blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5);
    int tiles = query_tiles(a), lane = threadIdx.x & 31;
    if (n >= (int64_t)a.b * a.h * tiles * BN) return;
    int i = (int)(n % (tiles * BN)), h = (int)(n / (tiles * BN) % a.h), b = (int)(n / (tiles * BN) / a.h);
    float sum = 0;
    if (i < a.t) {
        const uint32_t *g = (const uint32_t *)o.g.row<T>(b, h, i), *y = (const uint32_t *)o.y.row<T>(b, h, i);
#pragma unroll
        for (int e = 0; e < D / 64; e++) {
            float2 p = unpack2<T>(g[e * 32 + lane]), r = unpack2<T>(y[e * 32 + lane]);
            sum += p.x * r.x + p.y * r.y;
        }
    }
    sum = warp_reduce(sum, op_sum());
    if (lane) return;
    float *to = o.sums + n / BN * (2 * BN) + n % BN;
    to[0] = i < a.t ? *o.lse.row<float>(b, h, i) * LOG2E : INFINITY, to[BN] = sum;
}

/* ---- the gradient of q ----------------------------------------------------------------------------------------------- */
template <class T, int D> __global__ void __launch_bounds__(THREADS, 1) tiles_gq(softmax_call a, tile_grads o, block_order order) {
    LC_SHARED(shared);
    T *q = (T *)shared, *g = q + BM * D, *k = g + BM * D, *v = k + STAGES * BN * D;
    int tile, head;
    order.at(blockIdx.x, tile, head);
    int q0 = (order.tiles - 1 - tile) * BM, b = head / a.h, h = head % a.h, lane = threadIdx.x & 31;
    int m = (threadIdx.x >> 5) * 16, offset = softmax_offset(a), start = softmax_start(a, b);
    int end = (q0 + BM < a.t ? q0 + BM : a.t) + offset, begin = softmax_first(a, start, q0 + offset);
    begin = begin > 0 ? begin / BN * BN : 0;
    tile_source<D, THREADS, T> keys(a.k.row<T>(b, h / a.group, 0), a.k.s[2], end), values(a.v.row<T>(b, h / a.group, 0), a.v.s[2], end);
    int row = q0 + m + lane / 4, warp_at = q0 + m + offset;
    float scale = (float)a.scale * LOG2E, lse[2], delta[2], gq[D / 8][4];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        bool in = row + 8 * r < a.t;
        const float *from = o.sums + ((int64_t)head * query_tiles(a) + (row + 8 * r) / BN) * (2 * BN) + (row + 8 * r) % BN;
        lse[r] = in ? from[0] : INFINITY, delta[r] = in ? from[BN] : 0;
    }
    tile_source<D, THREADS, T>(a.q.row<T>(b, h, 0), a.q.s[2], a.t).template copy<BM>(q, q0);
    tile_source<D, THREADS, T>(o.g.row<T>(b, h, 0), o.g.s[2], a.t).template copy<BM>(g, q0);
    if (begin < end) keys.template copy<BN>(k, begin), values.template copy<BN>(v, begin);
    copy_commit();
    clear(gq);
    for (int key = begin, at = 0; key < end; key += BN) { /* the tile is in place `at` */
        T *kt = k + at * (BN * D), *vt = v + at * (BN * D);
        at = at + 1 < STAGES ? at + 1 : 0;
        copy_wait<0>();
        shared_fence();
        __syncthreads();
        if (key + BN < end) keys.template copy<BN>(k + at * (BN * D), key + BN), values.template copy<BN>(v + at * (BN * D), key + BN);
        copy_commit();
        float s[BN / 8][4], dp[BN / 8][4];
        uint32_t x[BN / 16][4];
        clear(s);
        clear(dp);
        group_begin();
        group_product<BN, D, BM, ALONG_K, BN, ALONG_K>(s, q, m & 64, kt, 0);
        group_commit();
        group_product<BN, D, BM, ALONG_K, BN, ALONG_K>(dp, g, m & 64, vt, 0);
        group_commit();
        group_wait<1>(); /* the product of the step before too */
        group_hold(s);
#pragma unroll
        for (int n = 0; n < BN / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[n][e] = exp2_fast(s[n][e] * scale - lse[e >> 1]);
        if (key + BN - 1 > warp_at || key < softmax_first(a, start, warp_at + 15)) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int last = row + 8 * r + offset, first = softmax_first(a, start, last), col = key + (lane & 3) * 2;
#pragma unroll
                for (int n = 0; n < BN / 8; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        if (col + n * 8 + e < first || col + n * 8 + e > last) s[n][2 * r + e] = 0;
            }
        }
        group_wait<0>();
        group_hold(dp);
#pragma unroll
        for (int n = 0; n < BN / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[n][e] *= dp[n][e] - delta[e >> 1];
        as_fragments<BN, T>(x, s);
        group_hold(gq);
        group_begin();
        group_product<D, BN, BN, ACROSS_K>(gq, x, kt, 0);
        group_commit();
    }
    group_wait<0>();
    group_hold(gq);
    copy_wait<0>();
    __syncthreads();
    store_rows<BM, D>(o.gq.row<T>(b, h, 0), o.gq.s[2], q0 + m, a.t, q, m, gq, (float)a.scale, (float)a.scale);
}

/* ---- the gradients of k and v ---------------------------------------------------------------------------------------- */
/* A warp's x [16][D], rows first .. of to [s][D]. */
template <int D> __device__ __forceinline__ void store_part(float *to, int first, int rows, const float (&x)[D / 8][4], float by) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int j = first + lane / 4 + 8 * r;
        if (j >= rows) continue;
#pragma unroll
        for (int n = 0; n < D / 8; n++) *(float2 *)(to + (int64_t)j * D + n * 8 + (lane & 3) * 2) = make_float2(x[n][2 * r] * by, x[n][2 * r + 1] * by);
    }
}

/* Scores are transposed here: rows are keys, columns queries. */
template <class T, int D> __global__ void __launch_bounds__(THREADS, 1) tiles_gkv(softmax_call a, tile_grads o, block_order order, int heads) {
    LC_SHARED(shared);
    T *k = (T *)shared, *v = k + BM * D, *q = v + BM * D, *g = q + STAGES * BN * D;
    float *sums = (float *)(g + STAGES * BN * D); /* of the tiles of queries */
    int tile, head;
    order.at(blockIdx.x, tile, head);
    int k0 = tile * BM, each = a.h / heads, b = head / each, h0 = head % each * heads, lane = threadIdx.x & 31, hk = h0 / a.group;
    int m = (threadIdx.x >> 5) * 16, offset = softmax_offset(a), start = softmax_start(a, b);
    int begin = k0 - offset > 0 ? (k0 - offset) / BN * BN : 0, end = a.t;
    if (a.window > 0 && k0 + BM - 1 - offset + a.window < end) end = k0 + BM - 1 - offset + a.window;
    if (k0 + BM <= start) end = 0;
    int tiles = end > begin ? (end - begin + BN - 1) / BN : 0;
    int at_key = k0 + m - offset, at_start = start - offset; /* the query on the warp's first key, on the first key that is seen */
    float scale = (float)a.scale * LOG2E, gk[D / 8][4], gv[D / 8][4];
    tile_source<D, THREADS, T>(a.k.row<T>(b, hk, 0), a.k.s[2], a.s).template copy<BM>(k, k0);
    tile_source<D, THREADS, T>(a.v.row<T>(b, hk, 0), a.v.s[2], a.s).template copy<BM>(v, k0);
    auto fetch = [&](int h, int i0, int at) {
        tile_source<D, THREADS, T>(a.q.row<T>(b, h, 0), a.q.s[2], a.t).template copy<BN>(q + at * (BN * D), i0);
        tile_source<D, THREADS, T>(o.g.row<T>(b, h, 0), o.g.s[2], a.t).template copy<BN>(g + at * (BN * D), i0);
        const float *from = o.sums + (((int64_t)b * a.h + h) * query_tiles(a) + i0 / BN) * (2 * BN);
        if (threadIdx.x < BN / 2) copy16(sums + at * (2 * BN) + threadIdx.x * 4, from + threadIdx.x * 4, true);
    };
    if (tiles) fetch(h0, begin, 0);
    copy_commit();
    clear(gk);
    clear(gv);
    for (int n = tiles * heads, h = h0, i0 = begin, at = 0; n > 0; n--) {
        T *qt = q + at * (BN * D), *gt = g + at * (BN * D);
        const float *lse = sums + at * (2 * BN), *delta = lse + BN;
        int now = i0;
        i0 += BN, at = at + 1 < STAGES ? at + 1 : 0;
        if (i0 >= end) i0 = begin, h++;
        copy_wait<0>();
        shared_fence();
        __syncthreads();
        if (n > 1) fetch(h, i0, at);
        copy_commit();
        float s[BN / 8][4], dp[BN / 8][4];
        uint32_t x[BN / 16][4];
        clear(s);
        clear(dp);
        group_begin();
        group_product<BN, D, BM, ALONG_K, BN, ALONG_K>(s, k, m & 64, qt, 0);
        group_commit();
        group_product<BN, D, BM, ALONG_K, BN, ALONG_K>(dp, v, m & 64, gt, 0);
        group_commit();
        group_wait<1>(); /* the products of the step before too */
        group_hold(s);
#pragma unroll
        for (int c = 0; c < BN / 8; c++) {
            float2 l = *(const float2 *)(lse + c * 8 + (lane & 3) * 2);
#pragma unroll
            for (int e = 0; e < 4; e++) s[c][e] = exp2_fast(s[c][e] * scale - (e & 1 ? l.y : l.x));
        }
        if (at_key + 15 > now || at_key < softmax_first(a, at_start, now + BN - 1)) {
#pragma unroll
            for (int r = 0; r < 2; r++) { /* a key is seen by the queries from its own place to the window's end */
                int from = at_key + lane / 4 + 8 * r, to = a.window > 0 ? from + a.window : INT32_MAX, col = now + (lane & 3) * 2;
                if (from < at_start) to = from;
#pragma unroll
                for (int c = 0; c < BN / 8; c++)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        if (col + c * 8 + e < from || col + c * 8 + e >= to) s[c][2 * r + e] = 0;
            }
        }
        as_fragments<BN, T>(x, s);
        group_hold(gv);
        group_begin();
        group_product<D, BN, BN, ACROSS_K>(gv, x, gt, 0);
        group_commit();
        group_wait<1>();
        group_hold(dp);
#pragma unroll
        for (int c = 0; c < BN / 8; c++) {
            float2 l = *(const float2 *)(delta + c * 8 + (lane & 3) * 2);
#pragma unroll
            for (int e = 0; e < 4; e++) s[c][e] *= dp[c][e] - (e & 1 ? l.y : l.x);
        }
        uint32_t y[BN / 16][4];
        as_fragments<BN, T>(y, s);
        group_hold(gk);
        group_begin();
        group_product<D, BN, BN, ACROSS_K>(gk, y, qt, 0);
        group_commit();
        group_wait<1>(); /* x is free */
    }
    group_wait<0>();
    group_hold(gk);
    group_hold(gv);
    copy_wait<0>();
    __syncthreads();
    if (o.part) {
        float *to = o.part + ((int64_t)b * a.h + h0) * a.s * D;
        store_part<D>(to, k0 + m, a.s, gk, (float)a.scale);
        store_part<D>(to + (int64_t)a.b * a.h * a.s * D, k0 + m, a.s, gv, 1);
        return;
    }
    if (o.gk.p) store_rows<BM, D>(o.gk.row<T>(b, hk, 0), o.gk.s[2], k0 + m, a.s, k, m, gk, (float)a.scale, (float)a.scale);
    if (o.gv.p) store_rows<BM, D>(o.gv.row<T>(b, hk, 0), o.gv.s[2], k0 + m, a.s, v, m, gv, 1, 1);
}

/* A thread two elements of k's and v's gradients: the sum over the heads of the group, in order. */
template <class T, int D> __global__ void join_heads(softmax_call a, tile_grads o) {
    int64_t n = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= (int64_t)a.b * a.g * a.s * (D / 2)) return;
    int col = (int)(n % (D / 2)) * 2, j = (int)(n / (D / 2) % a.s), hk = (int)(n / (D / 2) / a.s % a.g), b = (int)(n / (D / 2) / a.s / a.g);
    for (int which = 0; which < 2; which++) {
        const rows4 &to = which ? o.gv : o.gk;
        if (!to.p) continue;
        const float *from = o.part + which * ((int64_t)a.b * a.h * a.s * D) + (((int64_t)b * a.h + hk * a.group) * a.s + j) * D + col;
        float2 sum = {0, 0};
        for (int h = 0; h < a.group; h++) {
            float2 x = *(const float2 *)(from + (int64_t)h * a.s * D);
            sum.x += x.x, sum.y += x.y;
        }
        *(uint32_t *)(to.row<T>(b, hk, j) + col) = pack2<T>(sum.x, sum.y);
    }
}

/* ---- the whole ------------------------------------------------------------------------------------------------------- */
/* Whether each head's part is kept apart. */
static bool heads_apart(const softmax_call &a) {
    return a.group > 1 && (int64_t)a.b * a.g * ceil_div(a.s, BM) < 2 * (lc_cuda_now ? lc_cuda_now->sms : 1);
}
static size_t sums_bytes(const softmax_call &a) { return (size_t)a.b * a.h * query_tiles(a) * 2 * BN * sizeof(float); }

size_t softmax_tiles_backward_work(const lc_kargs *k, const softmax_call &a) {
    bool kv = k->y[1].data || k->y[2].data;
    return sums_bytes(a) + (kv && heads_apart(a) ? (size_t)2 * a.b * a.h * a.s * a.d * sizeof(float) : 0);
}

template <class T, int D> static int run(const lc_kargs *k, const softmax_call &a) {
    bool kv = k->y[1].data || k->y[2].data, apart = kv && heads_apart(a);
    tile_grads o = {rows4_of(&k->x[0]), rows4_of(&k->x[4]), rows3_of(&k->x[5]), rows4_of(&k->y[0]), rows4_of(&k->y[1]), rows4_of(&k->y[2]),
                    (float *)k->work, apart ? (float *)((char *)k->work + sums_bytes(a)) : NULL};
    size_t shared = (size_t)(2 * BM + 2 * STAGES * BN) * D * sizeof(T) + STAGES * 2 * BN * sizeof(float);
    if (shared > lc_cuda_now->shared_max) return LC_K_UNSUPPORTED;
    if (allow_shared(tiles_gq<T, D>, shared) || allow_shared(tiles_gkv<T, D>, shared)) return LC_K_DEVICE;
    if (!a.t || !a.h) return LC_K_OK;
    LC_LAUNCH((row_products<T, D>), (unsigned)ceil_div((int64_t)a.b * a.h * query_tiles(a) * BN, THREADS / 32), THREADS, 0, a, o);
    if (o.gq.p) {
        block_order order = order_blocks((int)ceil_div(a.t, BM), a.b * a.h, a.group, (int64_t)a.s * D * 4);
        LC_LAUNCH((tiles_gq<T, D>), (unsigned)(order.tiles * order.heads), THREADS, shared, a, o, order);
    }
    if (!kv || !a.s) return LC_K_OK;
    int heads = apart ? 1 : a.group;
    block_order order = order_blocks((int)ceil_div(a.s, BM), a.b * a.h / heads, 1, (int64_t)a.t * heads * D * 4);
    LC_LAUNCH((tiles_gkv<T, D>), (unsigned)(order.tiles * order.heads), THREADS, shared, a, o, order, heads);
    if (apart) LC_LAUNCH((join_heads<T, D>), (unsigned)ceil_div((int64_t)a.b * a.g * a.s * (D / 2), 256), 256, 0, a, o);
    return LC_K_OK;
}

int softmax_tiles_backward(const lc_kargs *k, const softmax_call &a) {
    if (a.q.dtype == LC_K_BF16) return a.d == 64 ? run<bf16, 64>(k, a) : run<bf16, 128>(k, a);
    return a.d == 64 ? run<f16, 64>(k, a) : run<f16, 128>(k, a);
}
