/* attention_backward.cu: the gradient of softmax attention by tiles on the tensor cores (after FlashAttention-2, Dao, 2023), in three
 * kernels without atomics: delta = g . y of every row; the gradient of q, a block a tile of 128 queries; those of k and v, a block a
 * tile of 128 keys that walks over the queries of its heads. Weights are made again from q, k and log-sum-exp. With grouped heads
 * a block either takes all heads of its group in turn or, where that leaves the chip idle, one, whose part a last kernel adds. */
#include "attention.cuh"
#include "mma.cuh"

enum { BM = 128, BN = 64, THREADS = 256 };
#define LOG2E 1.4426950408889634f

struct tile_grads {
    rows4 g, y, lse, gq, gk, gv;
    float *delta;       /* [b, h, t] */
    float *part;        /* [2][b, h, s, d] or NULL: each head's gradients of k and v */
};

/* x [16 x 64] of a warp = rows m .. m + 15 of the tile p [BM][D] times the 64 rows of r [BN][D]. */
template <int D, class T> __device__ __forceinline__ void product(float (&x)[8][4], const T *p, const T *r, int m) {
#pragma unroll
    for (int n = 0; n < 8; n++) x[n][0] = x[n][1] = x[n][2] = x[n][3] = 0;
#pragma unroll
    for (int kk = 0; kk < D; kk += 16) {
        uint32_t u[4], w[4];
        fragment_a<BM>(u, p, m, kk);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            fragment_b<BN>(w, r, n * 16, kk);
            mma16<T>(x[2 * n], u, w[0], w[1]);
            mma16<T>(x[2 * n + 1], u, w[2], w[3]);
        }
    }
}

/* y [16 x D] += x [16 x 64], in halves, times the tile r [BN][D]. */
template <int D, class T> __device__ __forceinline__ void accumulate(float (&y)[D / 8][4], const float (&x)[8][4], const T *r) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        uint32_t u[4] = {pack2<T>(x[2 * j][0], x[2 * j][1]), pack2<T>(x[2 * j][2], x[2 * j][3]),
                         pack2<T>(x[2 * j + 1][0], x[2 * j + 1][1]), pack2<T>(x[2 * j + 1][2], x[2 * j + 1][3])};
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t w[4];
            fragment_b_t<BN>(w, r, n * 16, j * 16);
            mma16<T>(y[2 * n], u, w[0], w[1]);
            mma16<T>(y[2 * n + 1], u, w[2], w[3]);
        }
    }
}

/* ---- delta ----------------------------------------------------------------------------------------------------------- */
/* A warp a row. */
template <class T, int D> __global__ void __launch_bounds__(THREADS) row_products(softmax_call a, tile_grads o) {
    int64_t n = (int64_t)blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5);
    if (n >= (int64_t)a.b * a.h * a.t) return;
    int i = (int)(n % a.t), h = (int)(n / a.t % a.h), b = (int)(n / a.t / a.h), lane = threadIdx.x & 31;
    const uint32_t *g = (const uint32_t *)o.g.row<T>(b, h, i), *y = (const uint32_t *)o.y.row<T>(b, h, i);
    float sum = 0;
#pragma unroll
    for (int e = 0; e < D / 64; e++) {
        float2 p = unpack2<T>(g[e * 32 + lane]), r = unpack2<T>(y[e * 32 + lane]);
        sum += p.x * r.x + p.y * r.y;
    }
    sum = warp_reduce(sum, op_sum());
    if (!lane) o.delta[n] = sum;
}

/* ---- the gradient of q ----------------------------------------------------------------------------------------------- */
template <class T, int D> __global__ void __launch_bounds__(THREADS, 1) tiles_gq(softmax_call a, tile_grads o) {
    LC_SHARED(shared);
    T *q = (T *)shared, *g = q + BM * D, *k = g + BM * D, *v = k + 2 * BN * D;
    int q0 = (gridDim.x - 1 - blockIdx.x) * BM, b = blockIdx.y / a.h, h = blockIdx.y % a.h, lane = threadIdx.x & 31;
    int m = (threadIdx.x >> 5) * 16, offset = softmax_offset(a), start = softmax_start(a, b);
    int end = (q0 + BM < a.t ? q0 + BM : a.t) + offset, begin = softmax_first(a, start, q0 + offset);
    begin = begin > 0 ? begin / BN * BN : 0;
    const T *kb = a.k.row<T>(b, h / a.group, 0), *vb = a.v.row<T>(b, h / a.group, 0);
    int ks = (int)a.k.s[2], vs = (int)a.v.s[2], row = q0 + m + lane / 4;
    float scale = (float)a.scale, lse[2], delta[2], gq[D / 8][4] = {};
#pragma unroll
    for (int r = 0; r < 2; r++) {
        bool in = row + 8 * r < a.t;
        lse[r] = in ? *o.lse.row<float>(b, h, row + 8 * r) * LOG2E : 0;
        delta[r] = in ? o.delta[((int64_t)b * a.h + h) * a.t + row + 8 * r] : 0;
    }
    load_tile<BM, D, THREADS>(q, a.q.row<T>(b, h, 0), (int)a.q.s[2], q0, a.t);
    load_tile<BM, D, THREADS>(g, o.g.row<T>(b, h, 0), (int)o.g.s[2], q0, a.t);
    load_tile<BN, D, THREADS>(k, kb, ks, begin, a.s);
    load_tile<BN, D, THREADS>(v, vb, vs, begin, a.s);
    copy_commit();
    for (int key = begin, at = 0; key < end; key += BN, at ^= 1) {
        T *kt = k + at * (BN * D), *vt = v + at * (BN * D);
        if (key + BN < end) {
            load_tile<BN, D, THREADS>(k + (at ^ 1) * (BN * D), kb, ks, key + BN, a.s);
            load_tile<BN, D, THREADS>(v + (at ^ 1) * (BN * D), vb, vs, key + BN, a.s);
        }
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        if (key <= q0 + m + 15 + offset && key + BN > softmax_first(a, start, q0 + m + offset)) {
            float s[8][4], dp[8][4];
            product<D>(s, q, kt, m);
            product<D>(dp, g, vt, m);
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int r = e >> 1, j = key + n * 8 + (lane & 3) * 2 + (e & 1), last = row + 8 * r + offset;
                    bool seen = j <= last && j >= softmax_first(a, start, last);
                    s[n][e] = seen ? exp2_fast(s[n][e] * (scale * LOG2E) - lse[r]) * (dp[n][e] - delta[r]) : 0;
                }
            accumulate<D>(gq, s, kt);
        }
        __syncthreads();
    }
    copy_wait<0>();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (row + 8 * r >= a.t) continue;
        T *to = o.gq.row<T>(b, h, row + 8 * r) + (lane & 3) * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) *(uint32_t *)(to + n * 8) = pack2<T>(gq[n][2 * r] * scale, gq[n][2 * r + 1] * scale);
    }
}

/* ---- the gradients of k and v ---------------------------------------------------------------------------------------- */
/* Scores are transposed here: rows are keys, columns queries. */
template <class T, int D> __global__ void __launch_bounds__(THREADS, 1) tiles_gkv(softmax_call a, tile_grads o, int heads) {
    LC_SHARED(shared);
    T *k = (T *)shared, *v = k + BM * D, *q = v + BM * D, *g = q + 2 * BN * D;
    float *lse = (float *)(g + 2 * BN * D), *delta = lse + 2 * BN; /* of the two tiles of queries */
    int k0 = blockIdx.x * BM, each = a.h / heads, b = blockIdx.y / each, h0 = blockIdx.y % each * heads, lane = threadIdx.x & 31;
    int m = (threadIdx.x >> 5) * 16, offset = softmax_offset(a), start = softmax_start(a, b), hk = h0 / a.group;
    int begin = k0 - offset > 0 ? (k0 - offset) / BN * BN : 0, end = a.t;
    if (a.window > 0 && k0 + BM - 1 - offset + a.window < end) end = k0 + BM - 1 - offset + a.window;
    if (k0 + BM <= start) end = 0;
    int tiles = end > begin ? (end - begin + BN - 1) / BN : 0, row = k0 + m + lane / 4;
    float scale = (float)a.scale, gk[D / 8][4] = {}, gv[D / 8][4] = {};
    load_tile<BM, D, THREADS>(k, a.k.row<T>(b, hk, 0), (int)a.k.s[2], k0, a.s);
    load_tile<BM, D, THREADS>(v, a.v.row<T>(b, hk, 0), (int)a.v.s[2], k0, a.s);
    auto fetch = [&](int n, int at) { /* tile n of the walk over heads and queries */
        int h = h0 + n / tiles, i0 = begin + n % tiles * BN;
        load_tile<BN, D, THREADS>(q + at * (BN * D), a.q.row<T>(b, h, 0), (int)a.q.s[2], i0, a.t);
        load_tile<BN, D, THREADS>(g + at * (BN * D), o.g.row<T>(b, h, 0), (int)o.g.s[2], i0, a.t);
        if (threadIdx.x < BN) {
            int i = i0 + threadIdx.x;
            lse[at * BN + threadIdx.x] = i < a.t ? *o.lse.row<float>(b, h, i) * LOG2E : 0;
            delta[at * BN + threadIdx.x] = i < a.t ? o.delta[((int64_t)b * a.h + h) * a.t + i] : 0;
        }
    };
    if (tiles) fetch(0, 0);
    copy_commit();
    for (int n = 0, at = 0; n < tiles * heads; n++, at ^= 1) {
        if (n + 1 < tiles * heads) fetch(n + 1, at ^ 1);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        int i0 = begin + n % tiles * BN;
        if (k0 + m <= i0 + BN - 1 + offset) { /* some query of the tile is late enough for some key of the warp */
            const T *qt = q + at * (BN * D), *gt = g + at * (BN * D);
            float s[8][4], dp[8][4];
            product<D>(s, k, qt, m);
#pragma unroll
            for (int c = 0; c < 8; c++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int col = c * 8 + (lane & 3) * 2 + (e & 1), j = row + 8 * (e >> 1), last = i0 + col + offset;
                    bool seen = i0 + col < a.t && j <= last && j >= softmax_first(a, start, last);
                    s[c][e] = seen ? exp2_fast(s[c][e] * (scale * LOG2E) - lse[at * BN + col]) : 0;
                }
            accumulate<D>(gv, s, gt);
            product<D>(dp, v, gt, m);
#pragma unroll
            for (int c = 0; c < 8; c++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[c][e] *= dp[c][e] - delta[at * BN + c * 8 + (lane & 3) * 2 + (e & 1)];
            accumulate<D>(gk, s, qt);
        }
        __syncthreads();
    }
    copy_wait<0>();
    int64_t whole = (int64_t)a.b * a.h * a.s * D;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int j = row + 8 * r;
        if (j >= a.s) continue;
        int col = (lane & 3) * 2;
        float *part = o.part ? o.part + (((int64_t)b * a.h + h0) * a.s + j) * D + col : NULL;
        T *tk = o.gk.p ? o.gk.row<T>(b, hk, j) + col : NULL, *tv = o.gv.p ? o.gv.row<T>(b, hk, j) + col : NULL;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            float x = gk[n][2 * r] * scale, y = gk[n][2 * r + 1] * scale;
            if (part) {
                *(float2 *)(part + n * 8) = make_float2(x, y);
                *(float2 *)(part + whole + n * 8) = make_float2(gv[n][2 * r], gv[n][2 * r + 1]);
                continue;
            }
            if (tk) *(uint32_t *)(tk + n * 8) = pack2<T>(x, y);
            if (tv) *(uint32_t *)(tv + n * 8) = pack2<T>(gv[n][2 * r], gv[n][2 * r + 1]);
        }
    }
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
static size_t delta_bytes(const softmax_call &a) { return ((size_t)a.b * a.h * a.t * sizeof(float) + 255) / 256 * 256; }

size_t softmax_tiles_backward_work(const lc_kargs *k, const softmax_call &a) {
    bool kv = k->y[1].data || k->y[2].data;
    return delta_bytes(a) + (kv && heads_apart(a) ? (size_t)2 * a.b * a.h * a.s * a.d * sizeof(float) : 0);
}

template <class T, int D> static int run(const lc_kargs *k, const softmax_call &a) {
    bool kv = k->y[1].data || k->y[2].data, apart = kv && heads_apart(a);
    tile_grads o = {rows4_of(&k->x[0]), rows4_of(&k->x[4]), rows3_of(&k->x[5]), rows4_of(&k->y[0]), rows4_of(&k->y[1]), rows4_of(&k->y[2]),
                    (float *)k->work, apart ? (float *)((char *)k->work + delta_bytes(a)) : NULL};
    size_t shared = (size_t)(2 * BM + 4 * BN) * D * sizeof(T) + 4 * BN * sizeof(float);
    if (allow_shared(tiles_gq<T, D>, shared) || allow_shared(tiles_gkv<T, D>, shared)) return LC_K_DEVICE;
    if (!a.t || !a.h) return LC_K_OK;
    LC_LAUNCH((row_products<T, D>), (unsigned)ceil_div((int64_t)a.b * a.h * a.t, THREADS / 32), THREADS, 0, a, o);
    if (o.gq.p) LC_LAUNCH((tiles_gq<T, D>), dim3((unsigned)ceil_div(a.t, BM), a.b * a.h), THREADS, shared, a, o);
    if (!kv || !a.s) return LC_K_OK;
    int heads = apart ? 1 : a.group;
    LC_LAUNCH((tiles_gkv<T, D>), dim3((unsigned)ceil_div(a.s, BM), a.b * a.h / heads), THREADS, shared, a, o, heads);
    if (apart) LC_LAUNCH((join_heads<T, D>), (unsigned)ceil_div((int64_t)a.b * a.g * a.s * (D / 2), 256), 256, 0, a, o);
    return LC_K_OK;
}

int softmax_tiles_backward(const lc_kargs *k, const softmax_call &a) {
    if (a.q.dtype == LC_K_BF16) return a.d == 64 ? run<bf16, 64>(k, a) : run<bf16, 128>(k, a);
    return a.d == 64 ? run<f16, 64>(k, a) : run<f16, 128>(k, a);
}
