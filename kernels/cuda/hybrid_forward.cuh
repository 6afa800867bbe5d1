/* hybrid_forward.cuh: the steps of the tiled forward of hybrid attention in bf16, done by the four warpgroups of a block on tiles in shared
 * memory (layout: mma.cuh, products: group.cuh): loading 64 rows, features of 64 rows, and the state S += phi_k^T V, which lies in the
 * accumulators of the tensor cores in f32 and is copied to shared memory in bf16 as an operand.
 *
 * Names: D head dim, F features, IN inputs of the map. Warp w: group = w / 4, r = w % 4: it has rows 16 r .. 16 r + 15 of its group's
 * accumulators. Of an accumulator [16][8], lane l holds rows g = l / 4 and g + 8, columns 2 (l % 4) + 0, 1. */
#ifndef LC_HYBRID_FORWARD_CUH
#define LC_HYBRID_FORWARD_CUH

#include "group.cuh"
#include "hybrid.cuh"

enum { CHUNK = 64, TILE_THREADS = 512, TILE_GROUPS = 4 };
#define LC_LOG2E 1.4426950408889634f

template <int D, int F, int IN> struct tile_sizes { /* in elements */
    static constexpr int wide(int n) { return n < 64 ? 64 : n; }
    enum { X = CHUNK * D, W = D * wide(IN), PHI = CHUNK * wide(F), STATE = D * wide(F) };
};

/* ---- loading ---------------------------------------------------------------------------------------------------------- */
/* Rows first .. first + 63 of one head by position; those outside [from, to) are zeros. Positions before `cached` come from `cache`
 * (f32, a ring of `ring` rows), the rest from rows `stride` apart of which x is position 0. */
struct row_source {
    const bf16 *x;
    int stride;
    const float *cache;
    int cached, ring, from, to;
};

template <int N> __device__ __forceinline__ void load_rows(bf16 *tile, const row_source &s, int first) {
    constexpr int PIECES = N / 8, AT_ONCE = TILE_THREADS / PIECES; /* rows, a multiple of 8 */
    int r = threadIdx.x / PIECES, e = threadIdx.x % PIECES * 8;
    if (AT_ONCE > CHUNK && r >= CHUNK) return;
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
            } else copy16(to, s.x + (int64_t)p * s.stride + e, there);
        }
        return;
    }
    int p = first + r;
    const bf16 *from = s.x + (int64_t)p * s.stride + e;
    bf16 *to = tile_at<CHUNK>(tile, r, e);
#pragma unroll
    for (int n = 0; n < CHUNK; n += AT_ONCE) copy16(to + n * 64, from + n * s.stride, p + n >= s.from && p + n < s.to);
}

/* Weights [D][IN] of one head on their way to bf16 in shared memory: take() asks for 16 bytes at a time, all under way at once (bf16 goes
 * straight to the tile, as an asynchronous copy), put() stores what came in f32. */
__device__ __forceinline__ bool even_weights(const rows4 &m) {
    int each = m.dtype == LC_K_F32 ? 4 : 8;
    return (uintptr_t)m.p % 16 == 0 && m.s[1] % each == 0 && m.s[2] % each == 0;
}
template <int D, int IN> struct weights {
    enum { ALL = D * IN / 8, STEPS = ALL > TILE_THREADS ? ALL / TILE_THREADS : 1 };
    float4 v[2 * STEPS];
    __device__ __forceinline__ int row(int n) const { return (n * TILE_THREADS + threadIdx.x) / (IN / 8); }
    __device__ __forceinline__ int col() const { return threadIdx.x % (IN / 8) * 8; }
    __device__ __forceinline__ bool idle() const { return ALL < TILE_THREADS && threadIdx.x >= ALL; }
    __device__ __forceinline__ void take(bf16 *tile, const rows4 &m, int h) {
        if (even_weights(m)) {
            if (idle()) return;
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
        if (m.dtype != LC_K_F32 || !even_weights(m) || idle()) return;
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

/* Features go by halves of F / 2 columns, a group each: those of the inputs and of their negatives (F = 2 IN), or one half of all. */
template <int F, int IN> struct halves {
    static constexpr bool BOTH = F == 2 * IN;
    enum { N = F / 2 };
    /* Inputs of the map [64][N] on top of the bias in acc: products of x [64][D] with weights w [D][IN]. Between group_begin and group_wait. */
    template <int D> static __device__ __forceinline__ void inputs(float (&acc)[N / 8][4], const bf16 *x, const bf16 *w, int hf) {
        group_product<N, D, CHUNK, ALONG_K, D, ACROSS_K>(acc, x, 0, w, BOTH ? 0 : hf * N);
    }
    static __device__ __forceinline__ int row() { return threadIdx.x / 32 % 4 * 16 + (threadIdx.x & 31) / 4; }

    /* acc += x */
    static __device__ __forceinline__ void add_skip(float (&acc)[N / 8][4], const bf16 *x, int hf) {
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float2 v = unpack2<bf16>(*(const uint32_t *)tile_at<CHUNK>(x, row() + 8 * i, (BOTH ? 0 : hf * N) + 8 * n + (threadIdx.x & 3) * 2));
                acc[n][2 * i] += v.x, acc[n][2 * i + 1] += v.y;
            }
    }
    /* What two groups have of a row, put together: pair [4][64], `meeting` their barrier. */
    template <class O> static __device__ __forceinline__ void together(float (&v)[2], O op, float *pair, int hf, int meeting) {
        if ((threadIdx.x & 3) == 0) pair[64 * hf + row()] = v[0], pair[64 * hf + row() + 8] = v[1];
        groups_meet(meeting, 2);
        v[0] = op(pair[row()], pair[64 + row()]), v[1] = op(pair[row() + 8], pair[64 + row() + 8]);
        groups_meet(meeting, 2);
    }
    /* y = map of x, not clamped. Each lane's rows are spread over its quad. */
    static __device__ __forceinline__ void map(int map, float (&x)[N / 8][4], int hf, float *pair, int meeting) {
        if (!BOTH && (map == MAP_RELU || map == MAP_POS_ELU)) {
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float v = x[n][e];
                    x[n][e] = v > 0 ? (map == MAP_RELU ? v : 1 + v) : map == MAP_RELU ? 0.f : exp2_fast(v * LC_LOG2E);
                }
            return;
        }
        float by = BOTH && hf ? -LC_LOG2E : LC_LOG2E, m[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) x[n][e] *= by, m[e >> 1] = fmaxf(m[e >> 1], x[n][e]);
        m[0] = quad_max(m[0]), m[1] = quad_max(m[1]);
        if (!BOTH) together(m, op_max(), pair, hf, meeting);
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) sum[e >> 1] += x[n][e] = exp2_fast(x[n][e] - m[e >> 1]);
        if (map == MAP_EXP_DIM) return;
        sum[0] = quad_sum(sum[0]), sum[1] = quad_sum(sum[1]);
        if (!BOTH) together(sum, op_sum(), pair, hf, meeting);
        sum[0] = inverse(sum[0]), sum[1] = inverse(sum[1]);
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) x[n][e] *= sum[e >> 1];
    }
    /* The features of this half, clamped, times `by` of their rows into the tile [64][F]; dot: features . z [F] for the lane's rows, unless z
     * is NULL. */
    static __device__ __forceinline__ void put(const hybrid &a, float (&x)[N / 8][4], int hf, const float (&by)[2], const float *z, float (&dot)[2],
                                               bf16 *tile, float *pair, int meeting) {
        float eps = a.feature_eps32;
        map(a.map, x, hf, pair, meeting);
        int col = hf * N;
        shared_at at = shared_place(tile) + 2 * ((col >> 6) * (CHUNK * 64) + row() * 64 + (((row() & 7) << 3 ^ (col & 56)) | (threadIdx.x & 3) * 2));
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) x[n][e] = at_least(x[n][e], eps) * by[e >> 1];
            if (z) {
                float2 f = *(const float2 *)(z + col + 8 * n + (threadIdx.x & 3) * 2);
                dot[0] += x[n][0] * f.x + x[n][1] * f.y, dot[1] += x[n][2] * f.x + x[n][3] * f.y;
            }
            shared_at to = at ^ n << 4;
            shared_put(to, pack2<bf16>(x[n][0], x[n][1]));
            shared_put(to + 8 * 128, pack2<bf16>(x[n][2], x[n][3]));
        }
    }
};
/* Ready features [64][F], moved to another tile: times `by` if they are the queries', with their products with z. Eight threads a row, all of
 * which get the dot. */
template <int F> __device__ __forceinline__ void move_ready(bf16 *to, const bf16 *from, float by, const float *z, float *dot) {
    int row = threadIdx.x / 8;
    float sum = 0;
#pragma unroll 1
    for (int e = threadIdx.x % 8 * 8; e < F; e += 64) {
        uint4 v = *(const uint4 *)tile_at<CHUNK>(from, row, e);
        uint32_t *u = &v.x;
#pragma unroll
        for (int i = 0; z && i < 4; i++) {
            float2 f = unpack2<bf16>(u[i]);
            f.x *= by, f.y *= by;
            sum += f.x * z[e + 2 * i] + f.y * z[e + 2 * i + 1];
            u[i] = pack2<bf16>(f.x, f.y);
        }
        *(uint4 *)tile_at<CHUNK>(to, row, e) = v;
    }
    if (!z) return;
    sum = quad_sum(sum);
    sum += __shfl_xor_sync(0xffffffffu, sum, 4);
    if (threadIdx.x % 8 == 0) dot[row] = sum;
}

/* ---- the state -------------------------------------------------------------------------------------------------------- */
/* S and z in f32, spread over the block, S transposed: a group has 64 rows from m0 of S^T [D][F], N columns from n0. Warp w has
 * z of features 16 w .., in every column of an accumulator. */
template <int D, int F> struct state {
    enum { ACROSS = TILE_GROUPS / (D / 64), N = F / ACROSS < 16 ? 16 : F / ACROSS, PART = D * F + F };
    float s[N / 8][4], z[4];
    int g; /* the group */

    __device__ __forceinline__ int m0() const { return g / ACROSS * 64; }
    __device__ __forceinline__ int n0() const { return g % ACROSS * N; }
    __device__ __forceinline__ int row() const { return m0() + threadIdx.x / 32 % 4 * 16 + (threadIdx.x & 31) / 4; }
    __device__ __forceinline__ int col() const { return n0() + (threadIdx.x & 3) * 2; }
    __device__ __forceinline__ int z_row() const { return threadIdx.x / 32 * 16 + (threadIdx.x & 31) / 4; }
    __device__ __forceinline__ bool has_z() const { return threadIdx.x < 2 * F; }
    __device__ __forceinline__ bool has_s() const { return ACROSS * N == F || n0() < F; }

    __device__ __forceinline__ void clear() {
        set_all(s, 0);
        z[0] = z[1] = z[2] = z[3] = 0;
        g = __shfl_sync(0xffffffffu, (int)threadIdx.x / 128, 0);
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
        add_z(from_z);
        if (!has_s()) return;
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[n][e] += from[(col() + 8 * n + e % 2) * D + row() + e / 2 * 8];
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
    __device__ __forceinline__ int64_t place() const { return (int64_t)(m0() / 64 * (F / 8) + n0() / 8) * 512 + threadIdx.x % 128 * 4; }
    __device__ __forceinline__ void add_part(const float *part) {
        add_z(part + PART - F);
        if (!has_s()) return;
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
            float4 v = *(const float4 *)(part + place() + 512 * n);
            s[n][0] += v.x, s[n][1] += v.y, s[n][2] += v.z, s[n][3] += v.w;
        }
    }
    __device__ __forceinline__ void save_part(float *part) const {
        save_z(part + PART - F);
        if (!has_s()) return;
#pragma unroll
        for (int n = 0; n < N / 8; n++) *(float4 *)(part + place() + 512 * n) = make_float4(s[n][0], s[n][1], s[n][2], s[n][3]);
    }
    /* As an operand: tile [D][F] in bf16, z in f32. */
    __device__ __forceinline__ void put(bf16 *tile) const {
        if (!has_s()) return;
        int g = (threadIdx.x & 31) / 4, c = n0();
        shared_at at = shared_place(tile) + 2 * ((c >> 6) * (D * 64) + row() * 64 + ((g << 3 ^ (c & 56)) | (threadIdx.x & 3) * 2));
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
            shared_put(at ^ n << 4, pack2<bf16>(s[n][0], s[n][1]));
            shared_put((at ^ n << 4) + 8 * 128, pack2<bf16>(s[n][2], s[n][3]));
        }
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
    row_source r = {v.row<bf16>(s.b, head, s.at.shift), (int)v.s[2], NULL, 0, 2 * a.window, s.at.k_min, s.at.p1};
    if (c.cache && s.at.p0 > 0) {
        r.cached = s.at.p0;
        r.cache = (const float *)c.cache + s.at.slot * c.slot_elements + cached_at(a, which, head, 0);
    }
    return r;
}
__device__ __forceinline__ row_source query_source(const hybrid &a, const segment &s, const rows4 &v) {
    row_source r = {v.row<bf16>(s.b, s.h, s.at.shift), (int)v.s[2], NULL, 0, 0, s.at.p0, s.at.p1};
    return r;
}

#endif
