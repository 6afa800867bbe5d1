/* hybrid_pairs.cuh: the steps of the forward of hybrid attention that walks chunks of 64 tokens in pairs (hybrid_forward_pairs.cu): three
 * warpgroups with a role each. Two of them do a chunk of their own: its features, scores and results never leave their registers but for
 * the keys' features. The third loads all tiles and has the state S in its accumulators, which takes up one block of keys after the other
 * and is copied to shared memory, in bf16, before each chunk. They meet at named barriers; who need not wait only arrives.
 *
 * Names as in hybrid_forward.cuh: D head dim, F features, IN inputs of the map. Warp r of a group has rows 16 r .. of a tile. Lane l, g =
 * l / 4, q = l % 4, holds rows g and g + 8 ("half" 0 and 1) and columns 2 q + 0, 1 of each 8. */
#ifndef LC_HYBRID_PAIRS_CUH
#define LC_HYBRID_PAIRS_CUH

#include "hybrid_forward.cuh"

enum { PAIR_THREADS = 384, LOADER = 2 };

__device__ __forceinline__ int group_row() { return threadIdx.x / 32 % 4 * 16 + (threadIdx.x & 31) / 4; }

/* ---- loading: by the 128 threads of one group -------------------------------------------------------------------------- */
template <int N> __device__ __forceinline__ void load_tile(bf16 *tile, const row_source &s, int first) {
    constexpr int PIECES = N / 8, AT_ONCE = 128 / PIECES;
    int t = threadIdx.x & 127, r = t / PIECES, e = t % PIECES * 8;
    bf16 *to = tile_at<CHUNK>(tile, r, e);
    if (first < s.cached) {
#pragma unroll 1
        for (int n = 0; n < CHUNK; n += AT_ONCE, to += AT_ONCE * 64) {
            int p = first + r + n;
            bool there = p >= s.from && p < s.to;
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
#pragma unroll
    for (int n = 0; n < CHUNK; n += AT_ONCE) copy16(to + n * 64, from + n * s.stride, p + n >= s.from && p + n < s.to);
}

/* Weights [D][IN] of one head to bf16, by THREADS threads from number t on. All loads of f32 are under way before the first is used. */
template <int D, int IN, int THREADS> __device__ __forceinline__ void load_map(bf16 *tile, const rows4 &m, int h, int t) {
    constexpr int ALL = D * IN / 8, STEPS = (ALL + THREADS - 1) / THREADS;
    auto row = [&](int n) { return (n * THREADS + t) / (IN / 8); };
    auto col = [&](int n) { return (n * THREADS + t) % (IN / 8) * 8; };
    if (!even_weights(m)) {
#pragma unroll 1
        for (int i = t; i < D * IN / 2; i += THREADS) {
            int r = i / (IN / 2), e = i % (IN / 2) * 2;
            int64_t at = h * m.s[1] + r * m.s[2] + e;
            uint32_t two;
            if (m.dtype == LC_K_F32) two = pack2<bf16>(((const float *)m.p)[at], ((const float *)m.p)[at + 1]);
            else memcpy(&two, (const bf16 *)m.p + at, 4);
            *(uint32_t *)tile_at<D>(tile, r, e) = two;
        }
        return;
    }
    if (m.dtype != LC_K_F32) {
#pragma unroll
        for (int n = 0; n < STEPS; n++)
            if (ALL % THREADS == 0 || n * THREADS + t < ALL)
                copy16(tile_at<D>(tile, row(n), col(n)), (const bf16 *)m.p + h * m.s[1] + row(n) * m.s[2] + col(n), true);
        return;
    }
    float4 v[2 * STEPS];
#pragma unroll
    for (int n = 0; n < STEPS; n++)
        if (ALL % THREADS == 0 || n * THREADS + t < ALL) {
            const float4 *from = (const float4 *)((const float *)m.p + h * m.s[1] + row(n) * m.s[2] + col(n));
            v[2 * n] = from[0], v[2 * n + 1] = from[1];
        }
#pragma unroll
    for (int n = 0; n < STEPS; n++)
        if (ALL % THREADS == 0 || n * THREADS + t < ALL) {
            float4 lo = v[2 * n], hi = v[2 * n + 1];
            *(uint4 *)tile_at<D>(tile, row(n), col(n)) =
                make_uint4(pack2<bf16>(lo.x, lo.y), pack2<bf16>(lo.z, lo.w), pack2<bf16>(hi.x, hi.y), pack2<bf16>(hi.z, hi.w));
        }
}

/* ---- features ---------------------------------------------------------------------------------------------------------- */
template <int F, int IN> struct features {
    static constexpr bool BOTH = F == 2 * IN;
    enum { N = IN / 8 };

    static __device__ __forceinline__ void add(float (&x)[N][4], float v) {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) x[n][e] += v;
    }
    /* x += the rows themselves, [64][IN]. */
    static __device__ __forceinline__ void add_rows(float (&x)[N][4], const bf16 *rows) {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float2 v = unpack2<bf16>(*(const uint32_t *)tile_at<CHUNK>(rows, group_row() + 8 * i, 8 * n + (threadIdx.x & 3) * 2));
                x[n][2 * i] += v.x, x[n][2 * i + 1] += v.y;
            }
    }
    /* The features by map `which`, clamped, times `by`, of inputs x, as fragments. */
    static __device__ __forceinline__ void map(const hybrid &a, int which, float (&x)[N][4], float by, uint32_t (&to)[F / 16][4]) {
        uint32_t least = pack2<bf16>(a.feature_eps32 * by, a.feature_eps32 * by);
        if (!BOTH && (which == MAP_RELU || which == MAP_POS_ELU)) {
            bool relu = which == MAP_RELU;
#pragma unroll
            for (int n = 0; n < N; n++) {
                float y[4];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float v = x[n][e];
                    y[e] = (v > 0 ? relu ? v : 1 + v : relu ? 0.f : exp2_fast(v * LC_LOG2E)) * by;
                }
                to[n / 2][2 * (n & 1)] = at_least2(pack2<bf16>(y[0], y[1]), least);
                to[n / 2][2 * (n & 1) + 1] = at_least2(pack2<bf16>(y[2], y[3]), least);
            }
            return;
        }
        float top[2][2]; /* of x, of -x; by half */
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float m[4], l[4];
#pragma unroll
            for (int i = 0; i < 4; i++) m[i] = l[i] = x[i / 2][2 * half + i % 2];
#pragma unroll
            for (int n = 2; n < N; n++) {
                int i = n % 2 * 2;
                m[i] = fmaxf(m[i], x[n][2 * half]), m[i + 1] = fmaxf(m[i + 1], x[n][2 * half + 1]);
                if (BOTH) l[i] = fminf(l[i], x[n][2 * half]), l[i + 1] = fminf(l[i + 1], x[n][2 * half + 1]);
            }
            top[0][half] = fmaxf(fmaxf(m[0], m[1]), fmaxf(m[2], m[3]));
            if (BOTH) top[1][half] = -fminf(fminf(l[0], l[1]), fminf(l[2], l[3]));
        }
#pragma unroll
        for (int s = 0; s < (BOTH ? 2 : 1); s++) top[s][0] = quad_max(top[s][0]), top[s][1] = quad_max(top[s][1]);
        bool whole = which == MAP_EXP_DIM;
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int s = 0; s < (BOTH ? 2 : 1); s++) {
                float scale = s ? -LC_LOG2E : LC_LOG2E, shift = -LC_LOG2E * top[s][half], e[2 * N], sum[4] = {0, 0, 0, 0};
#pragma unroll
                for (int n = 0; n < 2 * N; n++) sum[n % 4] += e[n] = exp2_fast(fmaf(x[n / 2][2 * half + n % 2], scale, shift));
                float all = quad_sum((sum[0] + sum[1]) + (sum[2] + sum[3])), times = by * (whole ? 1 : inverse(all));
#pragma unroll
                for (int n = 0; n < N; n++)
                    to[s * (IN / 16) + n / 2][half + 2 * (n & 1)] = at_least2(pack2<bf16>(e[2 * n] * times, e[2 * n + 1] * times), least);
            }
    }
    /* Ready features times `by`. */
    static __device__ __forceinline__ void read(const bf16 *tile, float by, uint32_t (&to)[F / 16][4]) {
#pragma unroll
        for (int j = 0; j < F / 16; j++) {
            fragment_a<CHUNK>(to[j], tile, threadIdx.x / 32 % 4 * 16, 16 * j);
            if (by != 1)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float2 v = unpack2<bf16>(to[j][i]);
                    to[j][i] = pack2<bf16>(v.x * by, v.y * by);
                }
        }
    }
    /* Rows outside of from .. to - 1 become zeros. */
    static __device__ __forceinline__ void keep_rows(uint32_t (&x)[F / 16][4], int from, int to) {
        if (from <= 0 && to >= CHUNK) return;
        int row = group_row();
        bool lo = row >= from && row < to, hi = row + 8 >= from && row + 8 < to;
#pragma unroll
        for (int j = 0; j < F / 16; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (!(i % 2 ? hi : lo)) x[j][i] = 0;
    }
    static __device__ __forceinline__ void put(bf16 *tile, uint32_t (&x)[F / 16][4]) {
#pragma unroll
        for (int j = 0; j < F / 16; j++) fragment_put<CHUNK>(tile, threadIdx.x / 32 % 4 * 16, 16 * j, x[j]);
    }
};

/* ---- the state --------------------------------------------------------------------------------------------------------- */
/* S [F][D] and z [F] in f32 in the accumulators of one group, 64 features at a time. */
template <int D, int F> struct group_state {
    enum { MANY = (F + 63) / 64, PART = MANY * 64 * (D + 1) };
    float s[MANY][D / 8][4], z[MANY][1][4]; /* z in every column */

    __device__ __forceinline__ static int row(int m) { return 64 * m + group_row(); }
    __device__ __forceinline__ static bool there(int m) { return F >= 64 || row(m) < F; } /* the same for a warp */
    __device__ __forceinline__ static int lane_col() { return (threadIdx.x & 3) * 2; }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int m = 0; m < MANY; m++) {
            set_all(s[m], 0);
            set_all(z[m], 0);
        }
    }
    __device__ __forceinline__ void add_z(int m, float u, float v) { z[m][0][0] += u, z[m][0][1] += u, z[m][0][2] += v, z[m][0][3] += v; }
    __device__ __forceinline__ void save(float *to, float *to_z) const {
#pragma unroll
        for (int m = 0; m < MANY; m++) {
            if (!there(m)) continue;
            if (threadIdx.x % 4 == 0) to_z[row(m)] = z[m][0][0], to_z[row(m) + 8] = z[m][0][2];
#pragma unroll
            for (int n = 0; n < D / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) to[(row(m) + e / 2 * 8) * D + 8 * n + lane_col() + e % 2] = s[m][n][e];
        }
    }
    /* Four numbers of S [F][D] as they lie in a part, at 4 i. */
    static __device__ __forceinline__ float4 piece(const float *from, int i) {
        int t = i % 128, n = i / 128 % (D / 8), row = i / (16 * D) * 64 + t / 32 * 16 + t % 32 / 4;
        if (F < 64 && row >= F) return make_float4(0, 0, 0, 0);
        from += row * D + 8 * n + t % 4 * 2;
        return make_float4(from[0], from[1], from[8 * D], from[8 * D + 1]);
    }
    /* part [PART]: as the threads have it; staged: such a one in shared memory, its z [64 MANY] apart. */
    __device__ __forceinline__ void add_staged(const float *part, const float *from_z) {
        const float *from = part + (threadIdx.x & 127) * 4;
#pragma unroll
        for (int m = 0; m < MANY; m++) {
            add_z(m, from_z[row(m)], from_z[row(m) + 8]);
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                float4 v = *(const float4 *)(from + (m * (D / 8) + n) * 512);
                s[m][n][0] += v.x, s[m][n][1] += v.y, s[m][n][2] += v.z, s[m][n][3] += v.w;
            }
        }
    }
    __device__ __forceinline__ void save_part(float *part) const {
        float *to = part + (threadIdx.x & 127) * 4, *to_z = part + MANY * 64 * D;
#pragma unroll
        for (int m = 0; m < MANY; m++) {
            if (threadIdx.x % 4 == 0) to_z[row(m)] = z[m][0][0], to_z[row(m) + 8] = z[m][0][2];
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                *(float4 *)(to + (m * (D / 8) + n) * 512) = make_float4(s[m][n][0], s[m][n][1], s[m][n][2], s[m][n][3]);
        }
    }
    /* As operands: tile [F][D]; z_tile [2][F]: z in bf16, and what that leaves. */
    __device__ __forceinline__ void put(bf16 *tile, bf16 *z_tile) const {
#pragma unroll
        for (int m = 0; m < MANY; m++) {
            if (!there(m)) continue;
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                uint32_t x[4] = {pack2<bf16>(s[m][2 * j][0], s[m][2 * j][1]), pack2<bf16>(s[m][2 * j][2], s[m][2 * j][3]),
                                 pack2<bf16>(s[m][2 * j + 1][0], s[m][2 * j + 1][1]), pack2<bf16>(s[m][2 * j + 1][2], s[m][2 * j + 1][3])};
                fragment_put<F>(tile, 64 * m + threadIdx.x / 32 % 4 * 16, 16 * j, x);
            }
            if (threadIdx.x % 4) continue;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                bf16 high = store<bf16>(z[m][0][2 * i]);
                z_tile[row(m) + 8 * i] = high, z_tile[F + row(m) + 8 * i] = store<bf16>(z[m][0][2 * i] - load<float>(high));
            }
        }
    }
    /* phi [64][F], v [64][D], ones [8][64]; to the end. */
    __device__ __forceinline__ void absorb(const bf16 *phi, const bf16 *v, const bf16 *ones) {
        group_begin();
#pragma unroll
        for (int m = 0; m < MANY; m++) {
            group_product<D, CHUNK, CHUNK, ACROSS_K, CHUNK, ACROSS_K>(s[m], phi, 64 * m, v, 0);
            group_product<8, CHUNK, CHUNK, ACROSS_K, 8, ALONG_K>(z[m], phi, 64 * m, ones, 0);
        }
        group_end();
#pragma unroll
        for (int m = 0; m < MANY; m++) group_hold(s[m]), group_hold(z[m]);
    }
};

#endif
