/* hybrid_backward_tile.cuh: what the tensor-core kernels of hybrid attention's gradient share: their plan, loads of tiles of 64
 * tokens, and the feature maps on fragments. A block of a walk has four warpgroups and a segment of chunks (64 tokens) of one query head.
 * In products with 64 rows a group has some of the columns, its warp `strip` rows 16 strip .. + 15. Features lie as two halves of
 * BF / 2 columns (of a full map: of x and of -x), padded with zeros, so a warp has whole rows of its half: sums over features stay
 * within a quad. Groups 0 and 1 have the two halves of what the block's own rows want, groups 2 and 3 those of the other side's
 * features, and the window's two chunks: so that the two kinds of exponentials run side by side.
 * Queries of chunk c see linearly the state of the chunks before c - lag and, in geometries with a triangle (TRI: sliding window,
 * window 0), the keys of chunk c - lag whose row in it is not above the query's; lag is 0 for window 0, else 1. */
#ifndef LC_HYBRID_BACKWARD_TILE_CUH
#define LC_HYBRID_BACKWARD_TILE_CUH

#include <type_traits>

#include "hybrid_backward.cuh"
#include "group.cuh"

namespace hybrid_backward_tiles { /* names that other files may have too */

struct fast {
    int segments, lag;
    int bf, fw;                /* BF; columns of a map's weights: BF / 2 for full maps, else BF, 0 without maps */
    float *values;             /* [5][b, h, t], what rows_kernel leaves of the queries; x is the query side's */
    float *state[2];           /* [b, h, segments][BF * D as put_held has it, BF]: what a segment adds to S, Z and to R, P */
    float *dw[2];              /* [b, h, segments][D * FW, the same way] */
    float *bias[2], *xs;       /* [b, h, segments] */
    bf16 *rows[3];             /* dk, dv [b, h, t, d], dmk [b, h, t, F] of one query head, where heads share a row */
};

/* Values of a query's row: 1 / z; delta; the maximum less the logarithm of what scales the weights, INFINITY where there is none; the key at
 * the maximum from the first token on, as bits, -1 where there is none; x. The usual call's weights do not come times scale, and instead of
 * x there is x times scale as bf16 above that key's place from the query's chunk on, both in half a word. */
enum { RZ, DELTA, SHIFT, AT, XSUM, VALUES };

/* Launches one after the other, each of which may begin while the one before ends (chain.cuh). */
template <class... P, class... A>
static inline void launch_next(void (*kernel)(P...), dim3 grid, int block, size_t shared, const A &...argument) {
    launch_early(true, kernel, grid, dim3(block), shared, argument...);
}

/* hybrid_backward_{queries,keys,sums}.cu: launches; d, BF, TRI and fw are known to have a kernel. */
int hybrid_backward_queries(const gradients &o, const fast &p);
int hybrid_backward_keys(const gradients &o, const fast &p);
int hybrid_backward_rows(const gradients &o, const fast &p, bool usual);
int hybrid_backward_sums(const gradients &o, const fast &p);
int hybrid_backward_finish(const gradients &o, const fast &p);
/* hybrid_backward_usual_{sums,queries,keys}.cu: the same of the usual call. */
int usual_sums(const gradients &o, const fast &p);
int usual_queries(const gradients &o, const fast &p);
int usual_keys(const gradients &o, const fast &p);

/* The table of instances: D, BF, FW (0: features are given, there are no maps). The usual call has kernels of its own: window 64 in a terrace,
 * head dim 128, 64 softmax features of each sign, no bias and no skip; a clamp that cannot be told from 0 in half precision is none. */
#ifdef LC_EMULATED /* enough for tests; they compile for long */
#define LC_SHAPES(X) X(128, 128, 64) X(64, 128, 64) X(64, 64, 32) X(64, 64, 64) X(64, 64, 0)
#else
#define LC_SHAPES(X)                                                                                                             \
    X(128, 128, 64) X(128, 64, 32) X(128, 64, 64) X(64, 128, 64) X(64, 128, 128) X(64, 64, 32) X(64, 64, 64)                     \
    X(128, 128, 0) X(128, 64, 0) X(64, 128, 0) X(64, 64, 0)
#endif
static inline bool is_usual(const hybrid &a) {
    return a.d == 128 && a.window && a.kind == KIND_TERRACE && a.map == MAP_SOFTMAX_DIM && a.f == 64 && !a.skip && !a.bq && !a.bk && a.feature_eps <= 1. / (1 << 25);
}
static inline bool has_shape(int d, int bf, int fw) {
#define LC_SHAPE(D, BF, FW) || (d == D && bf == BF && fw == FW)
    return false LC_SHAPES(LC_SHAPE);
#undef LC_SHAPE
}
/* Calls launch of L<D, BF, FW, TRI>. */
template <template <int, int, int, bool> class L> static int with_shape(const gradients &o, const fast &p) {
    bool tri = o.a.kind == KIND_SLIDING || !o.a.window;
#define LC_SHAPE(D, BF, FW)                                                                                                      \
    if (o.a.d == D && p.bf == BF && p.fw == FW) {                                                                                \
        return tri ? L<D, BF, FW, true>::launch(o, p) : L<D, BF, FW, false>::launch(o, p);                                       \
    }
    LC_SHAPES(LC_SHAPE)
#undef LC_SHAPE
    return LC_K_UNSUPPORTED;
}

enum { THREADS = 512, GROUPS = 4, SUM_THREADS = 256 }; /* of a walk; of the kernels around it */
#define LC_LOG2E 1.4426950408889634f

/* The parts of a block's shared memory, in halves; every tile starts at a multiple of 1024 bytes. */
constexpr size_t shared_bytes(int d, int bf, int fw) {
    return 2 * ((size_t)6 * 64 * d + bf * d + (fw < 64 ? 64 : fw) * (2 * d + 64) + 3 * 64 * 128) + 4096; /* 4096: values of rows */
}
template <int D, int BF, int FW> struct layout {
    static constexpr int tile = 64 * D, state = BF * D, fw64 = FW < 64 ? 64 : FW, weights = D * fw64, wide = 64 * 128, dp = 64 * fw64;
    static constexpr size_t bytes = shared_bytes(D, BF, FW);
};

/* One of two, field by field: a choice of addresses would put both into memory. */
__device__ __forceinline__ rows4 either(bool first, const rows4 &a, const rows4 &b) {
    rows4 r = {first ? a.p : b.p, {first ? a.s[0] : b.s[0], first ? a.s[1] : b.s[1], first ? a.s[2] : b.s[2]}, first ? a.dtype : b.dtype};
    return r;
}

/* Which segment a block has. Chunks count from the first real token s0; n of them are there. */
struct chunk_range {
    int seg, b, h, hk, s0, len, n, c0, c1;
    int64_t head; /* (b, h) as one number */
    __device__ __forceinline__ chunk_range(const hybrid &a, int segments, int64_t head, int seg) : seg(seg), head(head) {
        h = (int)(head % a.h), b = (int)(head / a.h), hk = h / a.group;
        s0 = __shfl_sync(0xffffffffu, start_of(a, b), 0), len = a.t - s0, n = (len + 63) / 64;
        c0 = (int)((int64_t)n * seg / segments), c1 = (int)((int64_t)n * (seg + 1) / segments);
    }
};

__device__ __forceinline__ bool holds(const chunk_range &s, int chunk, int row) {
    return chunk >= 0 && chunk * 64 + row < s.len;
}

/* Chunk `chunk` of one head's rows, of which base is the first real token's, into a tile [64][D]; rows that do not exist are zeros. */
template <int D, int T = THREADS>
__device__ __forceinline__ void load_tile(bf16 *tile, const bf16 *base, const rows4 &x, const chunk_range &s, int chunk, int tid) {
    constexpr int STEP = T / (D / 8); /* rows at a time, a multiple of 8: the place in a row stays */
    int first = tid / (D / 8), col = tid % (D / 8) * 8;
    int rows = chunk < 0 ? 0 : s.len - chunk * 64, stride = (int)x.s[2];
    const bf16 *at = base + ((int64_t)chunk * (64 * stride) + (first * stride + col));
    bf16 *to = tile_at<64>(tile, first, col);
#pragma unroll
    for (int i = 0; i < 64 / STEP; i++) copy16(to + i * STEP * 64, at + i * STEP * stride, first + i * STEP < rows);
}
template <int D, int T = THREADS>
__device__ __forceinline__ void load_tile(bf16 *tile, const bf16 *base, const rows4 &x, const chunk_range &s, int chunk) {
    load_tile<D, T>(tile, base, x, s, chunk, threadIdx.x);
}
/* Where a block's rows begin, in shared memory: a register of each thread is dearer. */
enum { OF_Q, OF_G, OF_K, OF_V };
struct row_bases {
    const bf16 *of[4];
    __device__ __forceinline__ void open(const gradients &o, const chunk_range &s) {
        if (threadIdx.x) return;
        of[OF_Q] = o.a.q.row<bf16>(s.b, s.h, s.s0), of[OF_G] = o.g.row<bf16>(s.b, s.h, s.s0);
        of[OF_K] = o.a.k.row<bf16>(s.b, s.hk, s.s0), of[OF_V] = o.a.v.row<bf16>(s.b, s.hk, s.s0);
    }
};

/* Barriers: what was written before is there for the products of all after. */
__device__ __forceinline__ void meet() {
    shared_fence();
    __syncthreads();
}
/* The warp's number, known to be the same in all of its threads. */
__device__ __forceinline__ int warp_number() { return __shfl_sync(0xffffffffu, (int)(threadIdx.x >> 5), 0); }
/* Begin and end of a batch of products into these accumulators; no branch in between: the compiler would wait for each product. */
template <class... A> __device__ __forceinline__ void products_begin(A &...acc) {
    (group_hold(acc), ...);
    group_begin();
}
template <class... A> __device__ __forceinline__ void products_end(A &...acc) {
    group_end();
    (group_hold(acc), ...);
}

/* Weights [d, f] of head h of one or two maps, as halves, into tiles [D][FW]; columns that do not exist are zeros. A thread has pieces
 * of eight columns, all of them under way at once. */
template <int D, int FW, int T> struct weights_piece {
    static constexpr int ALL = D * FW / 8, N = ALL > T ? ALL / T : 1;
    uint4 v[N];
    static __device__ __forceinline__ bool wide(const rows4 &m) {
        int align = m.dtype == LC_K_F32 ? 4 : 8;
        return (m.dtype == LC_K_F32 || m.dtype == LC_K_BF16) && (uintptr_t)m.p % 16 == 0 && m.s[1] % align == 0 && m.s[2] % align == 0;
    }
    __device__ __forceinline__ void fetch(const rows4 &m, int h, int f, int tid) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            int at = tid + i * T, n = at % (FW / 8) * 8;
            int64_t from = h * m.s[1] + at / (FW / 8) * m.s[2] + n;
            v[i] = make_uint4(0, 0, 0, 0);
            if (n >= f || (ALL < T && at >= ALL)) continue;
            if (m.dtype == LC_K_BF16) {
                v[i] = *(const uint4 *)((const bf16 *)m.p + from);
            } else {
                float4 x = *(const float4 *)((const float *)m.p + from), y = *(const float4 *)((const float *)m.p + from + 4);
                v[i] = make_uint4(pack2<bf16>(x.x, x.y), pack2<bf16>(x.z, x.w), pack2<bf16>(y.x, y.y), pack2<bf16>(y.z, y.w));
            }
        }
    }
    __device__ __forceinline__ void put(bf16 *tile, int tid) const {
#pragma unroll
        for (int i = 0; i < N; i++) {
            int at = tid + i * T;
            if (ALL < T && at >= ALL) continue;
            *(uint4 *)tile_at<D>(tile, at / (FW / 8), at % (FW / 8) * 8) = v[i];
        }
    }
};
template <int D, int FW, int T> __device__ __forceinline__ void load_weights(bf16 *tile, const rows4 &m, int h, int f, int tid) {
    if (weights_piece<D, FW, T>::wide(m)) {
        weights_piece<D, FW, T> w;
        w.fetch(m, h, f, tid), w.put(tile, tid);
        return;
    }
#pragma unroll 1
    for (int i = tid; i < D * FW; i += T) {
        int e = i / FW, n = i % FW;
        float v = n < f ? read_as<float>(m.p, m.dtype, h * m.s[1] + e * m.s[2] + n) : 0.f;
        *tile_at<D>(tile, e, n) = store<bf16>(v);
    }
}
template <int D, int FW, int T = THREADS> __device__ __forceinline__ void load_weights(bf16 *tile, const rows4 &m, int h, int f) {
    load_weights<D, FW, T>(tile, m, h, f, threadIdx.x);
}
template <int D, int FW>
__device__ __forceinline__ void load_weights(bf16 *tile_q, const rows4 &mq, bf16 *tile_k, const rows4 &mk, int h, int f) {
    if (weights_piece<D, FW, THREADS>::wide(mq) && weights_piece<D, FW, THREADS>::wide(mk)) {
        weights_piece<D, FW, THREADS> q, k;
        q.fetch(mq, h, f, threadIdx.x), k.fetch(mk, h, f, threadIdx.x);
        q.put(tile_q, threadIdx.x), k.put(tile_k, threadIdx.x);
        return;
    }
    load_weights<D, FW>(tile_q, mq, h, f), load_weights<D, FW>(tile_k, mk, h, f);
}

/* acc [16][W] += A B with A [64][64] and B a tile of tokens, columns n on. */
template <int W> __device__ __forceinline__ void over_tokens(float (&acc)[W / 8][4], const bf16 *a, const bf16 *b, int n) {
    products_begin(acc);
    group_product<W, 64, 64, ALONG_K, 64, ACROSS_K>(acc, a, 0, b, n);
    products_end(acc);
}

template <int N> __device__ __forceinline__ void clear(float (&acc)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) acc[n][j] = 0;
}

/* A sum [M][N] that the groups of a block hold over the chunks: rows row(g) .. + 63, columns col(g) .. + width - 1 of it. */
template <int M, int N, int G = GROUPS> struct held {
    static constexpr int across = G / (M / 64), width = N / across < 16 ? 16 : N / across, n8 = width / 8;
    typedef float sum[n8][4];
    static __device__ __forceinline__ int row(int g) { return g / across * 64; }
    static __device__ __forceinline__ int col(int g) { return g % across * width; }
    static __device__ __forceinline__ bool mine(int g) { return across * width == N || col(g) < N; }
    /* += A^T B with A [64][M] and B [64][N] tiles of tokens: the product, and all of it. */
    static __device__ __forceinline__ void product(sum &acc, const bf16 *a, const bf16 *b, int g) {
        group_product<width, 64, 64, ACROSS_K, 64, ACROSS_K>(acc, a, row(g), b, col(g));
    }
    static __device__ __forceinline__ void absorb(sum &acc, const bf16 *a, const bf16 *b, int g) {
        if (!mine(g)) return;
        products_begin(acc);
        product(acc, a, b, g);
        products_end(acc);
    }
    /* In the workspace: [M / 64][N / 8][128][4], whatever G is. */
    static __device__ __forceinline__ int64_t place(int g) { return (int64_t)(row(g) / 64 * (N / 8) + col(g) / 8) * 512 + threadIdx.x % 128 * 4; }
    static __device__ __forceinline__ void put(float *to, const sum &acc, int g) {
        if (!mine(g)) return;
#pragma unroll
        for (int j = 0; j < n8; j++) *(float4 *)(to + place(g) + 512 * j) = make_float4(acc[j][0], acc[j][1], acc[j][2], acc[j][3]);
    }
    static __device__ __forceinline__ void add(sum &acc, const float *from, int g) {
        if (!mine(g)) return;
#pragma unroll
        for (int j = 0; j < n8; j++) {
            float4 v = *(const float4 *)(from + place(g) + 512 * j);
            acc[j][0] += v.x, acc[j][1] += v.y, acc[j][2] += v.z, acc[j][3] += v.w;
        }
    }
};

/* sum[m + r] of A [64][M], rows weighed by `weight` [64] (NULL: all 1), for the 16 MT rows of this warp: into `out`, or added. The
 * weights go as two halves each, in the first two columns of B. */
template <int MT> __device__ __forceinline__ void column_sums(float *out, bool add, const bf16 *a, int m, const float *weight) {
    int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    float acc[MT][4];
    clear(acc);
#pragma unroll
    for (int k = 0; k < 64; k += 16) {
        uint32_t b[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float2 w = weight ? *(const float2 *)(weight + k + 8 * i + 2 * q) : make_float2(1, 1);
            uint32_t high = pack2<bf16>(w.x, w.y);
            float2 h = unpack2<bf16>(high);
            b[i] = g == 0 ? high : g == 1 ? pack2<bf16>(w.x - h.x, w.y - h.y) : 0u;
        }
#pragma unroll
        for (int i = 0; i < MT; i++) {
            uint32_t fa[4];
            fragment_a_t<64>(fa, a, m + 16 * i, k);
            mma16<bf16>(acc[i], fa, b[0], b[1]);
        }
    }
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; !q && j < 2; j++) {
            float *to = out + m + 16 * i + g + 8 * j, v = acc[i][2 * j] + acc[i][2 * j + 1];
            *to = add ? *to + v : v;
        }
}

/* 16 rows by 8 N columns of accumulators into a tile of ROWS rows of halves, from column n on (a multiple of 8 N, or of 64):
 * the piece of column block j is j ^ n / 8, exchanged by the row. */
template <int ROWS> __device__ __forceinline__ shared_at place_in(const bf16 *tile, int m, int n) {
    int g = (threadIdx.x & 31) >> 2, q = threadIdx.x & 3;
    return shared_place(tile) + 2 * ((n >> 6) * (ROWS * 64) + (m + g) * 64 + ((g << 3 ^ (n & 56)) | 2 * q));
}
template <int ROWS, int N> __device__ __forceinline__ void put_tile(bf16 *tile, const float (&acc)[N][4], int m, int n) {
    shared_at at = place_in<ROWS>(tile, m, n);
#pragma unroll
    for (int j = 0; j < N; j++) {
        shared_at to = (at ^ (j & 7) << 4) + (j >> 3) * (ROWS * 128);
        shared_put(to, pack2<bf16>(acc[j][0], acc[j][1]));
        shared_put(to + 8 * 128, pack2<bf16>(acc[j][2], acc[j][3]));
    }
}

/* The same into rows of a result; base is row 0 of the chunk, from column n on, `width` columns at most. */
template <int N>
__device__ __forceinline__ void put_rows(bf16 *base, int64_t stride, const float (&acc)[N][4], int m, int rows, int width) {
    int g = (threadIdx.x & 31) >> 2, q = threadIdx.x & 3;
#pragma unroll
    for (int j = 0; j < N; j++) {
        if (8 * j >= width) continue;
        if (m + g < rows) *(uint32_t *)(base + (m + g) * stride + 8 * j + 2 * q) = pack2<bf16>(acc[j][0], acc[j][1]);
        if (m + g + 8 < rows) *(uint32_t *)(base + (m + g + 8) * stride + 8 * j + 2 * q) = pack2<bf16>(acc[j][2], acc[j][3]);
    }
}

/* The same where rows begin at multiples of 16 bytes, N a multiple of 2 and every column exists. */
template <int N> __device__ __forceinline__ void put_wide(bf16 *base, int64_t stride, const float (&acc)[N][4], int m, int rows) {
    if constexpr (N % 4 == 0) {
        int row = m + (threadIdx.x % 32 >> 2);
        int to = row * (int)stride + threadIdx.x % 4 * 8;
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < N; j += 4) {
                uint32_t v[4];
#pragma unroll
                for (int e = 0; e < 4; e++) v[e] = pack2<bf16>(acc[j + e][2 * i], acc[j + e][2 * i + 1]);
                quad_transpose(v);
                if (row + 8 * i < rows) *(uint4 *)(base + (to + 8 * i * (int)stride + 8 * j)) = make_uint4(v[0], v[1], v[2], v[3]);
            }
    } else put_rows(base, stride, acc, m, rows, 8 * N);
}

__device__ __forceinline__ float quad_sum(float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}
__device__ __forceinline__ float quad_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

/* ---- feature maps on fragments --------------------------------------------------------------------------------------- */
__device__ __forceinline__ bool has_extreme(const hybrid &a) { return a.map == MAP_SOFTMAX_DIM || a.map == MAP_EXP_DIM; }
/* How many columns of half `hf` are features. */
template <int BF> __device__ __forceinline__ int half_width(const hybrid &a, int hf) {
    if (has_extreme(a)) return a.f;
    int w = a.F - hf * (BF / 2);
    return w < 0 ? 0 : w < BF / 2 ? w : BF / 2;
}

/* Maps of x and of -x have FW = BF / 2, the others FW = BF. Rows m .. m + 15 of half hf: the map's inputs, in
 * columns that are none `no_input`, become features before the clamp, 0 in columns that are none. */
template <bool BOTH> __device__ __forceinline__ float no_input(int hf) { return BOTH && hf ? 1e30f : -1e30f; }
template <bool BOTH, int N> __device__ __forceinline__ void map_fragments(const hybrid &a, int hf, float (&v)[N][4]) {
    if constexpr (BOTH) {
        float sign = hf ? -LC_LOG2E : LC_LOG2E, m[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                v[n][j] *= sign;
                m[j >> 1] = fmaxf(m[j >> 1], v[n][j]);
            }
        m[0] = quad_max(m[0]), m[1] = quad_max(m[1]);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                v[n][j] = exp2_fast(v[n][j] - m[j >> 1]);
                sum[j >> 1] += v[n][j];
            }
        if (a.map == MAP_EXP_DIM) return;
        sum[0] = inverse(quad_sum(sum[0])), sum[1] = inverse(quad_sum(sum[1]));
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) v[n][j] *= sum[j >> 1];
    } else {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float x = v[n][j];
                v[n][j] = a.map == MAP_RELU ? fmaxf(x, 0.f) : x > 0 ? 1 + x : exp2_fast(x * LC_LOG2E);
            }
    }
}

/* The clamp, for column block n. */
__device__ __forceinline__ float feature_of(const hybrid &a, int n, int width, float v) {
    return fmaxf(v, 8 * n < width ? a.feature_eps32 : 0.f);
}

/* Features as map_fragments left them, kept as halves: those of full maps, none above 1, in the finer kind. */
template <bool BOTH, int N> struct kept_features {
    uint32_t v[N][2];
    typedef typename std::conditional<BOTH, f16, bf16>::type half;
    __device__ __forceinline__ void keep(const float (&x)[N][4]) {
#pragma unroll
        for (int n = 0; n < N; n++) v[n][0] = pack2<half>(x[n][0], x[n][1]), v[n][1] = pack2<half>(x[n][2], x[n][3]);
    }
    /* Of the extreme's map: what is below 1 stays there. */
    __device__ __forceinline__ void keep_below(const float (&x)[N][4]) {
        float y[N][4];
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) y[n][j] = x[n][j] < 1 ? fminf(x[n][j], 1 - 1.f / 2048) : x[n][j];
        keep(y);
    }
    /* Makes them depend on a sum that is ready: the compiler would unpack them all while it waits for that, and run out of registers. */
    __device__ __forceinline__ void after(float ready) {
        uint32_t never = __float_as_uint(ready) == 0x7fc0dead;
#pragma unroll
        for (int n = 0; n < N; n++) v[n][0] ^= never, v[n][1] ^= never;
    }
    __device__ __forceinline__ void get(int n, float (&x)[4]) const {
        float2 lo = unpack2<half>(v[n][0]), hi = unpack2<half>(v[n][1]);
        x[0] = lo.x, x[1] = lo.y, x[2] = hi.x, x[3] = hi.y;
    }
};

/* d, gradients of clamped features, becomes what this half gives to the map's inputs. */
template <bool BOTH, int N>
__device__ __forceinline__ void map_fragments_backward(const hybrid &a, int hf, const kept_features<BOTH, N> &kept, float (&d)[N][4]) {
    float eps = a.feature_eps32;
    if constexpr (BOTH) {
        float dot[2] = {0, 0}, sign = hf ? -1.f : 1.f, v[4];
#pragma unroll
        for (int n = 0; n < N; n++) {
            kept.get(n, v);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                d[n][j] = v[j] < eps ? 0.f : d[n][j] * v[j] * sign;
                dot[j >> 1] += d[n][j];
            }
        }
        dot[0] = quad_sum(dot[0]), dot[1] = quad_sum(dot[1]);
        bool extreme = a.map == MAP_EXP_DIM; /* the extreme, which has the value 1, alone gets the sum */
        if (extreme) {
            float ties[2] = {0, 0};
#pragma unroll
            for (int n = 0; n < N; n++) {
                kept.get(n, v);
#pragma unroll
                for (int j = 0; j < 4; j++) ties[j >> 1] += v[j] == 1.f;
            }
            dot[0] /= quad_sum(ties[0]), dot[1] /= quad_sum(ties[1]);
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
            kept.get(n, v);
#pragma unroll
            for (int j = 0; j < 4; j++) d[n][j] -= (extreme ? (v[j] == 1.f ? 1.f : 0.f) : v[j]) * dot[j >> 1];
        }
    } else {
        float v[4];
#pragma unroll
        for (int n = 0; n < N; n++) {
            kept.get(n, v);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float x = v[j], slope = a.map == MAP_RELU ? (x > 0 ? 1.f : 0.f) : fminf(x, 1.f);
                d[n][j] = x >= eps ? d[n][j] * slope : 0.f;
            }
        }
    }
}

/* Features before the clamp of rows m .. m + 15 (half hf) of a chunk, from its tile x [64][D] and the weights [D][FW]: begin (sets v), a
 * product, end. */
template <int D, int BF, int FW>
__device__ __forceinline__ void features_begin(const hybrid &a, float bias, int hf, float (&v)[BF / 16][4]) {
    int width = half_width<BF>(a, hf);
#pragma unroll
    for (int n = 0; n < BF / 16; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) v[n][j] = 8 * n < width ? bias : no_input<FW != BF>(hf);
}
template <int D, int BF, int FW>
__device__ __forceinline__ void features_product(const bf16 *x, const bf16 *w, int hf, float (&v)[BF / 16][4]) {
    group_product<BF / 2, D, 64, ALONG_K, D, ACROSS_K>(v, x, 0, w, FW == BF ? hf * (BF / 2) : 0);
}
template <int D, int BF, int FW>
__device__ __forceinline__ void features_end(const hybrid &a, const bf16 *x, int hf, int m, float (&v)[BF / 16][4]) {
    int width = half_width<BF>(a, hf), n0 = FW == BF ? hf * (BF / 2) : 0, g = (threadIdx.x & 31) >> 2, q = threadIdx.x & 3;
    if (a.skip) {
#pragma unroll
        for (int n = 0; n < BF / 16; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (8 * n >= width) continue;
                float2 f = unpack2<bf16>(*(const uint32_t *)tile_at<64>((bf16 *)x, m + g + 8 * i, n0 + 8 * n + 2 * q));
                v[n][2 * i] += f.x, v[n][2 * i + 1] += f.y;
            }
    }
    map_fragments<FW != BF>(a, hf, v);
}
/* Ready ones, from memory. */
template <int BF>
__device__ __forceinline__ void ready_features(const hybrid &a, const chunk_range &s, int key, int chunk, int hf, int m, float (&v)[BF / 16][4]) {
    int width = half_width<BF>(a, hf), g = (threadIdx.x & 31) >> 2, q = threadIdx.x & 3;
    const rows4 &ready = key ? a.mk : a.mq;
    const bf16 *base = ready.row<bf16>(s.b, key ? s.h / a.mk_group : s.h, s.s0) + hf * (BF / 2) + 2 * q;
#pragma unroll
    for (int n = 0; n < BF / 16; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int row = m + g + 8 * i;
            uint32_t two = 0;
            if (8 * n < width && holds(s, chunk, row)) two = *(const uint32_t *)(base + (chunk * 64 + row) * ready.s[2] + 8 * n);
            float2 f = unpack2<bf16>(two);
            v[n][2 * i] = f.x, v[n][2 * i + 1] = f.y;
        }
}
/* Either. */
template <int D, int BF, int FW>
__device__ __forceinline__ void features(const hybrid &a, const chunk_range &s, int key, const bf16 *x, const bf16 *w, float bias, int chunk,
                                         int hf, int m, float (&v)[BF / 16][4]) {
    if constexpr (!FW) {
        ready_features<BF>(a, s, key, chunk, hf, m, v);
    } else {
        features_begin<D, BF, FW>(a, bias, hf, v);
        products_begin(v);
        features_product<D, BF, FW>(x, w, hf, v);
        products_end(v);
        features_end<D, BF, FW>(a, x, hf, m, v);
    }
}
/* Features as they count: clamped, times `by` of their rows. */
template <int BF, int FW>
__device__ __forceinline__ void put_features(const hybrid &a, bf16 *tile, int hf, int m, const float (&by)[2], float (&v)[BF / 16][4]) {
    int width = half_width<BF>(a, hf);
#pragma unroll
    for (int n = 0; n < BF / 16; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) v[n][j] = (FW ? feature_of(a, n, width, v[n][j]) : v[n][j]) * by[j >> 1];
    put_tile<64>(tile, v, m, hf * (BF / 2));
}

/* The gradient of the map's inputs onto rows of d: acc [16][WIDE], columns n .. of the map's d, += dp W^T (+ dp where skip). */
template <int D, int FW, int WIDE>
__device__ __forceinline__ void through_weights(const hybrid &a, const bf16 *dp, const bf16 *w, int m, int n, float (&acc)[WIDE / 8][4]) {
    int g = (threadIdx.x & 31) >> 2, q = threadIdx.x & 3;
    products_begin(acc);
    group_product<WIDE, FW, 64, ALONG_K, D, ALONG_K>(acc, dp, 0, w, n);
    products_end(acc);
    if (!a.skip) return;
#pragma unroll
    for (int j = 0; j < WIDE / 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (n + 8 * j >= FW) continue;
            float2 f = unpack2<bf16>(*(const uint32_t *)tile_at<64>((bf16 *)dp, m + g + 8 * i, n + 8 * j + 2 * q));
            acc[j][2 * i] += f.x, acc[j][2 * i + 1] += f.y;
        }
}

/* d += what put_tile left there. */
template <int ROWS, int N> __device__ __forceinline__ void add_tile(const bf16 *tile, float (&d)[N][4], int m, int n) {
    shared_at at = place_in<ROWS>(tile, m, n);
#pragma unroll
    for (int j = 0; j < N; j++) {
        shared_at from = (at ^ (j & 7) << 4) + (j >> 3) * (ROWS * 128);
        float2 x = unpack2<bf16>(shared_get(from)), y = unpack2<bf16>(shared_get(from + 8 * 128));
        d[j][0] += x.x, d[j][1] += x.y, d[j][2] += y.x, d[j][3] += y.y;
    }
}
template <int N> __device__ __forceinline__ float total(const float (&d)[N][4]) {
    float sum = 0;
#pragma unroll
    for (int n = 0; n < N; n++) sum += d[n][0] + d[n][1] + d[n][2] + d[n][3];
    return sum;
}

} // namespace hybrid_backward_tiles
using namespace hybrid_backward_tiles;

#endif
