/* hybrid_forward.cuh: the steps of the tiled forward of hybrid attention in bf16, done by the two warpgroups of a block on tiles in shared
 * memory (layout: mma.cuh, products: group.cuh): loading 64 rows, features of 64 rows, and the state S += phi_k^T V, which lies in the
 * accumulators of the tensor cores in f32 and is copied to shared memory in bf16 as an operand.
 *
 * Names: D head dim, F features, IN inputs of the map. Warp w: side = w / 4, r = w % 4: it has rows 16 r .. 16 r + 15 of its side's
 * accumulators. Of an accumulator [16][8], lane l holds rows g = l / 4 and g + 8, columns 2 (l % 4) + 0, 1. */
#ifndef LC_HYBRID_FORWARD_CUH
#define LC_HYBRID_FORWARD_CUH

#include "group.cuh"
#include "hybrid.cuh"

enum { CHUNK = 64, TILE_THREADS = 256 };
#define LC_LOG2E 1.4426950408889634f

template <int D, int F, int IN> struct tile_sizes { /* in elements */
    static constexpr int wide(int n) { return n < 64 ? 64 : n; }
    enum { X = CHUNK * D, W = D * wide(IN), PHI = CHUNK * wide(F), STATE = D * wide(F) };
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
    constexpr int PIECES = N / 8, AT_ONCE = TILE_THREADS / PIECES; /* rows */
    int r = threadIdx.x / PIECES, e = threadIdx.x % PIECES * 8;
    if (first < s.cached) {
#pragma unroll 1
        for (; r < CHUNK; r += AT_ONCE) {
            int p = first + r;
            bool there = p >= s.from && p < s.to;
            bf16 *to = tile_at<CHUNK>(tile, r, e);
            if (there && p < s.cached) {
                const float4 *c = (const float4 *)(s.cache + (int64_t)(p % s.ring) * N + e);
                float4 lo = c[0], hi = c[1];
                *(uint4 *)to = make_uint4(pack2<bf16>(lo.x, lo.y), pack2<bf16>(lo.z, lo.w), pack2<bf16>(hi.x, hi.y), pack2<bf16>(hi.z, hi.w));
            } else copy16(to, there ? s.x + (int64_t)p * s.stride + e : s.any, there);
        }
        return;
    }
    int p = first + r;
    const bf16 *from = s.x + (int64_t)p * s.stride + e;
    bf16 *to = tile_at<CHUNK>(tile, r, e); /* AT_ONCE is a multiple of 8 */
#pragma unroll
    for (int n = 0; n < CHUNK; n += AT_ONCE) {
        bool there = p + n >= s.from && p + n < s.to;
        copy16(to + n * 64, there ? from + n * s.stride : s.any, there);
    }
}

/* Weights [D][IN] of one head on their way to bf16 in shared memory: take() asks for 16 bytes at a time, all under way at once (bf16 goes
 * straight to the tile, as an asynchronous copy), put() stores what came in f32. */
__device__ __forceinline__ bool even_weights(const rows4 &m) {
    int each = m.dtype == LC_K_F32 ? 4 : 8;
    return (uintptr_t)m.p % 16 == 0 && m.s[1] % each == 0 && m.s[2] % each == 0;
}
template <int D, int IN> struct weights {
    enum { STEPS = D * IN / 8 / TILE_THREADS };
    float4 v[2 * STEPS];
    __device__ __forceinline__ int row(int n) const { return (n * TILE_THREADS + threadIdx.x) / (IN / 8); }
    __device__ __forceinline__ int col() const { return threadIdx.x % (IN / 8) * 8; }
    __device__ __forceinline__ void take(bf16 *tile, const rows4 &m, int h) {
        if (even_weights(m)) {
#pragma unroll
            for (int n = 0; n < STEPS; n++) {
                int64_t at = h * m.s[1] + row(n) * m.s[2] + col();
                const float4 *from = (const float4 *)((const float *)m.p + at);
                if (m.dtype == LC_K_F32) v[2 * n] = from[0], v[2 * n + 1] = from[1];
                else copy16(tile_at<D>(tile, row(n), col()), (const bf16 *)m.p + at, true);
            }
            return;
        }
#pragma unroll 1
        for (int i = threadIdx.x; i < D * IN / 2; i += TILE_THREADS) {
            int r = i / (IN / 2), e = i % (IN / 2) * 2;
            int64_t at = h * m.s[1] + r * m.s[2] + e;
            uint32_t two;
            if (m.dtype == LC_K_F32) two = pack2<bf16>(((const float *)m.p)[at], ((const float *)m.p)[at + 1]);
            else memcpy(&two, (const bf16 *)m.p + at, 4);
            *(uint32_t *)tile_at<D>(tile, r, e) = two;
        }
    }
    __device__ __forceinline__ void put(bf16 *tile, const rows4 &m) const {
        if (m.dtype != LC_K_F32 || !even_weights(m)) return;
#pragma unroll
        for (int n = 0; n < STEPS; n++) {
            float4 lo = v[2 * n], hi = v[2 * n + 1];
            *(uint4 *)tile_at<D>(tile, row(n), col()) =
                make_uint4(pack2<bf16>(lo.x, lo.y), pack2<bf16>(lo.z, lo.w), pack2<bf16>(hi.x, hi.y), pack2<bf16>(hi.z, hi.w));
        }
    }
};

template <int N> __device__ __forceinline__ void set_all(float (&x)[N][4], float v) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) x[n][e] = v;
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

/* y [16][8 N] = map of x [16][8 N], clamped. Each lane's rows are spread over its quad. */
template <int N> __device__ __forceinline__ void map_tile(int map, float eps, const float (&x)[N][4], float (&y)[N][4]) {
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
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float m = -INFINITY, sum = 0;
#pragma unroll
        for (int n = 0; n < N; n++) m = fmaxf(m, fmaxf(x[n][2 * half], x[n][2 * half + 1]));
        m = quad_max(m) * LC_LOG2E;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; e++) sum += y[n][e] = exp2_fast(x[n][e] * LC_LOG2E - m);
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

/* Inputs of the map [64][IN] on top of the bias in acc: products of x [64][D] with weights w [D][IN]. Between group_begin and group_wait. */
template <int D, int IN> __device__ __forceinline__ void map_inputs(float (&acc)[IN / 8][4], const bf16 *x, const bf16 *w) {
    group_product<IN, D, CHUNK, ALONG_K, D, ACROSS_K>(acc, x, 0, w, 0);
}
/* acc += x */
template <int IN> __device__ __forceinline__ void add_skip(float (&acc)[IN / 8][4], const bf16 *x) {
    int l = threadIdx.x & 31, row = threadIdx.x / 32 % 4 * 16 + l / 4;
#pragma unroll
    for (int n = 0; n < IN / 8; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float2 v = unpack2<bf16>(*(const uint32_t *)tile_at<CHUNK>(x, row + 8 * half, 8 * n + l % 4 * 2));
            acc[n][2 * half] += v.x, acc[n][2 * half + 1] += v.y;
        }
}

/* Features of 64 rows from the inputs of the map, times `by`: as fragments phi, or, if there is a tile [64][F], into that, rows outside
 * [from, to) as zeros. dot: features . z [F] for the lane's rows. One body for all, as code that is walked a few times must be short. */
template <int F, int IN>
__device__ __forceinline__ void features_of(const hybrid &a, float (&in)[IN / 8][4], float by, const float *z, float (&dot)[2],
                                            uint32_t (&phi)[F / 16][4], bf16 *tile, int from, int to) {
    int l = threadIdx.x & 31, row = threadIdx.x / 32 % 4 * 16 + l / 4;
    bool there[2] = {row >= from && row < to, row + 8 >= from && row + 8 < to};
#pragma unroll 1
    for (int col = 0; col < F; col += IN) {
        float y[IN / 8][4];
        uint32_t two[IN / 16][4];
        map_tile<IN / 8>(a.map, (float)a.feature_eps, in, y);
#pragma unroll
        for (int n = 0; n < IN / 8; n++) {
            float2 f = *(const float2 *)(z + col + 8 * n + l % 4 * 2);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float u = y[n][2 * half] * by, v = y[n][2 * half + 1] * by;
                dot[half] += u * f.x + v * f.y;
                two[n / 2][n % 2 * 2 + half] = pack2<bf16>(u, v);
                in[n][2 * half] = -in[n][2 * half], in[n][2 * half + 1] = -in[n][2 * half + 1];
            }
        }
        if (tile) {
#pragma unroll
            for (int n = 0; n < IN / 8; n++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    *(uint32_t *)tile_at<CHUNK>(tile, row + 8 * half, col + 8 * n + l % 4 * 2) = there[half] ? two[n / 2][n % 2 * 2 + half] : 0;
        } else {
#pragma unroll
            for (int j = 0; j < IN / 16; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if (F > IN) phi[j][i] = phi[F / 16 - IN / 16 + j][i]; /* the first round's find their place in the second */
                    phi[F / 16 - IN / 16 + j][i] = two[j][i];
                }
        }
    }
}
/* The same of features that lie ready-made in a tile [64][F]. */
template <int F> __device__ __forceinline__ void query_ready(const bf16 *tile, uint32_t (&phi)[F / 16][4], float by, const float *z, float (&dot)[2]) {
    int at = (threadIdx.x & 3) * 2;
#pragma unroll
    for (int j = 0; j < F / 16; j++) {
        fragment_a<CHUNK>(phi[j], tile, threadIdx.x / 32 % 4 * 16, 16 * j);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 v = unpack2<bf16>(phi[j][i]), f = *(const float2 *)(z + 16 * j + i / 2 * 8 + at);
            v.x *= by, v.y *= by;
            dot[i % 2] += v.x * f.x + v.y * f.y;
            phi[j][i] = pack2<bf16>(v.x, v.y);
        }
    }
}

/* ---- the state -------------------------------------------------------------------------------------------------------- */
/* S and z in f32, spread over the block, S transposed: warpgroup `side` has 64 rows from m0 of S^T [D][F], N columns from n0. Warp w has
 * z of features 16 w .., in every column of an accumulator. */
template <int D, int F> struct state {
    enum { N = D == 128 || F == 32 ? F : F / 2, TWICE = D == 64 && F == 32, PART = N / 8 * 4 * TILE_THREADS + F };
    float s[N / 8][4], z[4];

    __device__ __forceinline__ int m0() const { return D == 128 ? threadIdx.x / 128 * 64 : 0; }
    __device__ __forceinline__ int n0() const { return N < F ? threadIdx.x / 128 * N : 0; }
    __device__ __forceinline__ int row() const { return m0() + threadIdx.x / 32 % 4 * 16 + (threadIdx.x & 31) / 4; }
    __device__ __forceinline__ int col() const { return n0() + (threadIdx.x & 3) * 2; }
    __device__ __forceinline__ int z_row() const { return threadIdx.x / 32 * 16 + (threadIdx.x & 31) / 4; }
    __device__ __forceinline__ bool has_z() const { return threadIdx.x < 2 * F; }
    __device__ __forceinline__ bool has_s() const { return !TWICE || threadIdx.x < 128; } /* else the other warpgroup has the same */

    __device__ __forceinline__ void clear() {
        set_all(s, 0);
        z[0] = z[1] = z[2] = z[3] = 0;
    }
    __device__ __forceinline__ void add_z(const float *from) {
        if (!has_z()) return;
        float u = from[z_row()], v = from[z_row() + 8];
        z[0] += u, z[1] += u, z[2] += v, z[3] += v;
    }
    __device__ __forceinline__ void save_z(float *to) const {
        if (has_z() && threadIdx.x % 4 == 0) to[z_row()] = z[0], to[z_row() + 8] = z[2];
    }
    /* from: S [F][D] */
    __device__ __forceinline__ void add(const float *from, const float *from_z) {
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[n][e] += from[(col() + 8 * n + e % 2) * D + row() + e / 2 * 8];
        add_z(from_z);
    }
    __device__ __forceinline__ void save(float *to, float *to_z) const {
        if (has_s()) {
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) to[(col() + 8 * n + e % 2) * D + row() + e / 2 * 8] = s[n][e];
        }
        save_z(to_z);
    }
    /* part [PART]: as the threads have it. */
    __device__ __forceinline__ void add_part(const float *part) {
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
            float4 v = ((const float4 *)part)[n * TILE_THREADS + threadIdx.x];
            s[n][0] += v.x, s[n][1] += v.y, s[n][2] += v.z, s[n][3] += v.w;
        }
        add_z(part + PART - F);
    }
    __device__ __forceinline__ void save_part(float *part) const {
#pragma unroll
        for (int n = 0; n < N / 8; n++) ((float4 *)part)[n * TILE_THREADS + threadIdx.x] = make_float4(s[n][0], s[n][1], s[n][2], s[n][3]);
        save_z(part + PART - F);
    }
    /* As an operand: tile [D][F] in bf16, z in f32. */
    __device__ __forceinline__ void put(bf16 *tile, float *to_z) const {
        if (has_s()) {
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    *(uint32_t *)tile_at<D>(tile, row() + 8 * half, col() + 8 * n) = pack2<bf16>(s[n][2 * half], s[n][2 * half + 1]);
        }
        save_z(to_z);
    }
    /* phi [64][F], v [64][D]. Between group_begin and group_wait. */
    __device__ __forceinline__ void absorb(const bf16 *phi, const bf16 *v) {
        group_product<N, CHUNK, CHUNK, ACROSS_K, CHUNK, ACROSS_K>(s, v, m0(), phi, n0());
    }
    __device__ __forceinline__ void absorb_z(const bf16 *phi) {
        if (!has_z()) return;
        uint32_t one = pack2<bf16>(1, 1), x[4];
#pragma unroll
        for (int k = 0; k < CHUNK; k += 16) {
            fragment_a_t<CHUNK>(x, phi, threadIdx.x / 32 * 16, k);
            mma16<bf16>(z, x, one, one);
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
