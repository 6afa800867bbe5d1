/* hybrid_forward.cuh: the steps of the tiled forward of hybrid attention in bf16, each done by the 8 warps of a block on tiles in shared
 * memory (layout: mma.cuh): loading 64 rows, features of 64 rows, scores, and the state S += phi_k^T V, which lies in the accumulators
 * of the tensor cores in f32 and is copied to shared memory in bf16 as an operand.
 *
 * Names: D head dim, F features, IN inputs of the map. Warp w: side = w / 4, r = w % 4; a step that is split by rows gives rows
 * 16 r .. 16 r + 15 to warp r of a side. Of an accumulator [16][8], lane l holds rows g = l / 4 and g + 8, columns 2 (l % 4) + 0, 1. */
#ifndef LC_HYBRID_FORWARD_CUH
#define LC_HYBRID_FORWARD_CUH

#include "hybrid.cuh"
#include "mma.cuh"

enum { CHUNK = 64, TILE_THREADS = 256 };
#define LC_LOG2E 1.4426950408889634f

template <int D, int F, int IN> struct tile_sizes { /* in elements */
    static constexpr int wide(int n) { return n < 64 ? 64 : n; }
    enum { X = CHUNK * D, W = D * wide(IN), PHI = CHUNK * wide(F), STATE = F * D, P = CHUNK * 2 * CHUNK };
};

/* ---- loading ---------------------------------------------------------------------------------------------------------- */
/* Rows first .. first + 63 of one head by position; those outside [from, to) are zeros. Positions before `cached` come from `cache`
 * (f32, a ring of `ring` rows), the rest from rows `stride` apart of which x is position 0. */
struct row_source {
    const bf16 *x, *any; /* any: an address that exists */
    int64_t stride;
    const float *cache;
    int cached, ring, from, to;
};

template <int N> __device__ __forceinline__ void load_rows(bf16 *tile, const row_source &s, int first) {
    constexpr int PIECES = N / 8;
#pragma unroll 4
    for (int i = threadIdx.x; i < CHUNK * PIECES; i += TILE_THREADS) {
        int r = i / PIECES, e = i % PIECES * 8, p = first + r;
        bf16 *to = tile_at<CHUNK>(tile, r, e);
        if (p < s.cached && p >= s.from && p < s.to) {
            const float4 *c = (const float4 *)(s.cache + (int64_t)(p % s.ring) * N + e);
            float4 lo = c[0], hi = c[1];
            *(uint4 *)to = make_uint4(pack2<bf16>(lo.x, lo.y), pack2<bf16>(lo.z, lo.w), pack2<bf16>(hi.x, hi.y), pack2<bf16>(hi.z, hi.w));
            continue;
        }
        bool there = p >= s.from && p < s.to;
        copy16(to, there ? s.x + (int64_t)p * s.stride + e : s.any, there);
    }
}

/* Weights [D][IN] of one head, as bf16. */
template <int D, int IN> __device__ __forceinline__ void load_weights(bf16 *tile, const rows4 &m, int h) {
    for (int i = threadIdx.x; i < D * IN / 2; i += TILE_THREADS) {
        int r = i / (IN / 2), e = i % (IN / 2) * 2;
        int64_t at = h * m.s[1] + r * m.s[2] + e;
        uint32_t v;
        if (m.dtype == LC_K_F32) v = pack2<bf16>(((const float *)m.p)[at], ((const float *)m.p)[at + 1]);
        else memcpy(&v, (const bf16 *)m.p + at, 4);
        *(uint32_t *)tile_at<D>(tile, r, e) = v;
    }
}

template <int N> struct constant {
    enum { value = N };
};

/* ---- products --------------------------------------------------------------------------------------------------------- */
/* acc [16][16 NN] += rows m .. of a [.][K] times b [K][16 NN columns from n]. */
template <int RA, int RB, int K, int NN> __device__ __forceinline__ void product(float (&acc)[2 * NN][4], const bf16 *a, int m, const bf16 *b, int n) {
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        uint32_t x[4], y[4];
        fragment_a<RA>(x, a, m, k);
#pragma unroll
        for (int i = 0; i < NN; i++) {
            fragment_b_t<RB>(y, b, n + 16 * i, k);
            mma16<bf16>(acc[2 * i], x, y[0], y[1]);
            mma16<bf16>(acc[2 * i + 1], x, y[2], y[3]);
        }
    }
}

/* acc [16][64] = rows m .. of a [64][K] times b^T, b [64][K]; blocks of 16 columns from `blocks` on are not wanted. */
template <int K> __device__ __forceinline__ void product_rows(float (&acc)[8][4], const bf16 *a, int m, const bf16 *b, int blocks) {
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[i][e] = 0;
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        uint32_t x[4], y[4];
        fragment_a<CHUNK>(x, a, m, k);
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i < blocks) {
                fragment_b<CHUNK>(y, b, 16 * i, k);
                mma16<bf16>(acc[2 * i], x, y[0], y[1]);
                mma16<bf16>(acc[2 * i + 1], x, y[2], y[3]);
            }
    }
}

/* ---- features --------------------------------------------------------------------------------------------------------- */
__device__ __forceinline__ float quad_sum(float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}
__device__ __forceinline__ float quad_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

/* y [16][8 N] = map of x [16][8 N], or of -x, clamped. Each lane's rows are spread over its quad. */
template <int N> __device__ __forceinline__ void map_tile(int map, float sign, float eps, const float (&x)[N][4], float (&y)[N][4]) {
    if (map == MAP_RELU || map == MAP_POS_ELU) {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float v = x[n][e];
                v = v > 0 ? (map == MAP_RELU ? v : 1 + v) : map == MAP_RELU ? 0.f : exp2_fast(v * LC_LOG2E);
                y[n][e] = v < eps ? eps : v;
            }
        return;
    }
    float by = sign * LC_LOG2E;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float m = -INFINITY, sum = 0;
#pragma unroll
        for (int n = 0; n < N; n++) m = fmaxf(m, fmaxf(sign * x[n][2 * half], sign * x[n][2 * half + 1]));
        m = quad_max(m) * LC_LOG2E;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; e++) sum += y[n][e] = exp2_fast(x[n][e] * by - m);
        float scale = map == MAP_SOFTMAX_DIM ? 1 / quad_sum(sum) : 1;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; e++) {
                float v = y[n][e] * scale;
                y[n][e] = v < eps ? eps : v;
            }
    }
}

/* Where features of 64 rows go, and what is taken of them on the way. Rows outside [from, to) become zeros. */
struct feature_sink {
    bf16 *tile;     /* [64][F] */
    float by;       /* factor */
    int from, to;
    const float *z; /* [F]: lin [row] = features . z; NULL: not wanted */
    float *lin;
};

/* y [16][8 N] of rows m .. enters columns col .. of the sink; adds to dot for the lane's two rows. */
template <int N> __device__ __forceinline__ void put_features(const feature_sink &to, int m, int col, const float (&y)[N][4], float (&dot)[2]) {
    int l = threadIdx.x & 31, row = m + l / 4, at = l % 4 * 2;
    bool in[2] = {row >= to.from && row < to.to, row + 8 >= to.from && row + 8 < to.to};
#pragma unroll
    for (int n = 0; n < N; n++) {
        float2 z = to.z ? *(const float2 *)(to.z + col + 8 * n + at) : make_float2(0, 0);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float u = in[half] ? y[n][2 * half] * to.by : 0, v = in[half] ? y[n][2 * half + 1] * to.by : 0;
            dot[half] += u * z.x + v * z.y;
            *(uint32_t *)tile_at<CHUNK>(to.tile, row + 8 * half, col + 8 * n + at) = pack2<bf16>(u, v);
        }
    }
}

__device__ __forceinline__ void put_lin(const feature_sink &to, int m, float (&dot)[2]) {
    if (!to.z) return;
    int l = threadIdx.x & 31;
    float a = quad_sum(dot[0]), b = quad_sum(dot[1]);
    if (l % 4 == 0) to.lin[m + l / 4] = a, to.lin[m + l / 4 + 8] = b;
}

/* Features of rows m .. m + 15 of x [64][D] through the weights w [D][IN]. */
template <int D, int F, int IN> __device__ __forceinline__ void features_of(const hybrid &a, const bf16 *x, const bf16 *w, float bias, int m, const feature_sink &to) {
    constexpr int N = IN / 8;
    float acc[N][4], y[N][4], dot[2] = {0, 0}, eps = (float)a.feature_eps;
    int l = threadIdx.x & 31;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[n][e] = bias;
    product<CHUNK, D, D, IN / 16>(acc, x, m, w, 0);
    if (IN == D && a.skip) {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float2 v = unpack2<bf16>(*(const uint32_t *)tile_at<CHUNK>(x, m + l / 4 + 8 * half, 8 * n + l % 4 * 2));
                acc[n][2 * half] += v.x, acc[n][2 * half + 1] += v.y;
            }
    }
    map_tile<N>(a.map, 1, eps, acc, y);
    put_features<N>(to, m, 0, y, dot);
    if (F == 2 * IN) {
        map_tile<N>(a.map, -1, eps, acc, y);
        put_features<N>(to, m, IN, y, dot);
    }
    put_lin(to, m, dot);
}

/* The same of features that lie in the sink's tile ready-made. */
template <int F> __device__ __forceinline__ void features_ready(int m, const feature_sink &to) {
    int l = threadIdx.x & 31;
    float dot[2] = {0, 0};
#pragma unroll 2
    for (int n = 0; n < F; n += 8) {
        float y[1][4];
        for (int half = 0; half < 2; half++) {
            float2 v = unpack2<bf16>(*(const uint32_t *)tile_at<CHUNK>(to.tile, m + l / 4 + 8 * half, n + l % 4 * 2));
            y[0][2 * half] = v.x, y[0][2 * half + 1] = v.y;
        }
        put_features<1>(to, m, n, y, dot);
    }
    put_lin(to, m, dot);
}

/* ---- the state -------------------------------------------------------------------------------------------------------- */
/* S [F][D] and z [F] in f32, spread over the block: warp w has rows m0 .. m0 + 16 MT - 1 and columns n0 .. n0 + 16 NN - 1 of S; the
 * warps with n0 = 0 have z, in every column of an accumulator. */
template <int D, int F> struct state {
    enum { MW = F == 128 ? 4 : 2, NW = 8 / MW, MT = F / MW / 16, NN = D / NW / 16 };
    float s[MT][2 * NN][4], z[MT][4];
    int m0, n0;

    __device__ __forceinline__ void clear() {
        int w = threadIdx.x / 32;
        m0 = w % MW * 16 * MT, n0 = w / MW * 16 * NN;
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                z[i][e] = 0;
#pragma unroll
                for (int n = 0; n < 2 * NN; n++) s[i][n][e] = 0;
            }
    }

    /* from: S [F][D], then z at from_z. */
    __device__ __forceinline__ void add(const float *from, const float *from_z) {
        int l = threadIdx.x & 31;
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = m0 + 16 * i + 8 * half + l / 4;
#pragma unroll
                for (int n = 0; n < 2 * NN; n++) {
                    float2 v = *(const float2 *)(from + row * D + n0 + 8 * n + l % 4 * 2);
                    s[i][n][2 * half] += v.x, s[i][n][2 * half + 1] += v.y;
                }
                z[i][2 * half] += from_z[row];
            }
    }
    __device__ __forceinline__ void save(float *to, float *to_z) const {
        int l = threadIdx.x & 31;
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = m0 + 16 * i + 8 * half + l / 4;
#pragma unroll
                for (int n = 0; n < 2 * NN; n++)
                    *(float2 *)(to + row * D + n0 + 8 * n + l % 4 * 2) = make_float2(s[i][n][2 * half], s[i][n][2 * half + 1]);
                if (!n0 && l % 4 == 0) to_z[row] = z[i][2 * half];
            }
    }
    /* As an operand: tile [F][D] in bf16, z in f32. */
    __device__ __forceinline__ void put(bf16 *tile, float *to_z) const {
        int l = threadIdx.x & 31;
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = m0 + 16 * i + 8 * half + l / 4;
#pragma unroll
                for (int n = 0; n < 2 * NN; n++)
                    *(uint32_t *)tile_at<F>(tile, row, n0 + 8 * n + l % 4 * 2) = pack2<bf16>(s[i][n][2 * half], s[i][n][2 * half + 1]);
                if (!n0 && l % 4 == 0) to_z[row] = z[i][2 * half];
            }
    }
    /* phi [64][F], v [64][D] */
    __device__ __forceinline__ void absorb(const bf16 *phi, const bf16 *v) {
        uint32_t one = pack2<bf16>(1, 1);
#pragma unroll
        for (int k = 0; k < CHUNK; k += 16) {
            uint32_t x[MT][4], y[4];
#pragma unroll
            for (int i = 0; i < MT; i++) {
                fragment_a_t<CHUNK>(x[i], phi, m0 + 16 * i, k);
                if (!n0) mma16<bf16>(z[i], x[i], one, one);
            }
#pragma unroll
            for (int n = 0; n < NN; n++) {
                fragment_b_t<CHUNK>(y, v, n0 + 16 * n, k);
#pragma unroll
                for (int i = 0; i < MT; i++) {
                    mma16<bf16>(s[i][2 * n], x[i], y[0], y[1]);
                    mma16<bf16>(s[i][2 * n + 1], x[i], y[2], y[3]);
                }
            }
        }
    }
};

/* ---- segments --------------------------------------------------------------------------------------------------------- */
/* The sequence of a head is cut into segments of whole chunks, worked on by blocks of their own. This block's part. */
struct segment {
    int b, h, s, c0, c1; /* chunks c0 .. c1 - 1 */
    int absorb_end;      /* keys from here on do not enter the state */
    hybrid_span at;
};
__device__ __forceinline__ segment segment_at(const hybrid &a, const carried &c, int b, int index, int h, int segments, bool tell) {
    segment s;
    s.b = b, s.s = index, s.h = h;
    s.at = span_of(a, c, b, tell);
    int first = s.at.p0 / CHUNK, n = s.at.p1 > s.at.p0 ? (s.at.p1 - 1) / CHUNK + 1 - first : 0;
    s.c0 = first + (int)((int64_t)index * n / segments), s.c1 = first + (int)((int64_t)(index + 1) * n / segments);
    s.absorb_end = !c.state ? s.at.p1 : a.window ? hybrid_lo(a, s.at.p1) : s.at.p1;
    return s;
}

/* which: 0 keys, 1 values, 2 ready features of keys. */
__device__ __forceinline__ row_source key_source(const hybrid &a, const carried &c, const segment &s, int which) {
    const rows4 &v = which == 0 ? a.k : which == 1 ? a.v : a.mk;
    int head = which < 2 ? s.h / a.group : s.h / a.mk_group;
    row_source r = {v.row<bf16>(s.b, head, s.at.shift), (const bf16 *)v.p, v.s[2], NULL, 0, 2 * a.window, s.at.k_min, s.at.p1};
    if (c.cache && s.at.p0 > 0) {
        r.cached = s.at.p0;
        r.cache = (const float *)c.cache + s.at.slot * c.slot_elements + cached_at(a, which, head, 0);
    }
    return r;
}
__device__ __forceinline__ row_source query_source(const hybrid &a, const segment &s, const rows4 &v) {
    row_source r = {v.row<bf16>(s.b, s.h, s.at.shift), (const bf16 *)v.p, v.s[2], NULL, 0, 0, s.at.p0, s.at.p1};
    return r;
}

#endif
