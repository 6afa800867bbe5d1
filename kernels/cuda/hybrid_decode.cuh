/* hybrid_decode.cuh: one token of hybrid attention with a carried state, as hybrid_decode.cu and hybrid_decode_many.cu share it: reading
 * and writing eight columns, the ring of pieces, the window's weights, the keys that enter the state. */
#ifndef LC_HYBRID_DECODE_CUH
#define LC_HYBRID_DECODE_CUH

#include "chain.cuh"
#include "hybrid.cuh"

enum { DECODE_THREADS = 256, PIECE = 16384, MOST_KEYS = 128, MOST_F = 128, ROWS = 8, QUADS_HELD = 16, MOST_WINDOW = MOST_KEYS / 2 };

template <class T> __device__ __forceinline__ void load_eight(const void *p, float (&v)[8]) {
    uint4 raw = *(const uint4 *)p;
    const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 pair = unpack2<T>(word[i]);
        v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
    }
}
template <> __device__ __forceinline__ void load_eight<float>(const void *p, float (&v)[8]) {
    float4 lo = ((const float4 *)p)[0], hi = ((const float4 *)p)[1];
    v[0] = lo.x, v[1] = lo.y, v[2] = lo.z, v[3] = lo.w, v[4] = hi.x, v[5] = hi.y, v[6] = hi.z, v[7] = hi.w;
}
template <class T> __device__ __forceinline__ void store_eight(void *p, const float (&v)[8]) {
    *(uint4 *)p = make_uint4(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]), pack2<T>(v[4], v[5]), pack2<T>(v[6], v[7]));
}
template <> __device__ __forceinline__ void store_eight<float>(void *p, const float (&v)[8]) {
    ((float4 *)p)[0] = make_float4(v[0], v[1], v[2], v[3]);
    ((float4 *)p)[1] = make_float4(v[4], v[5], v[6], v[7]);
}
/* Four weights of a map. */
__device__ __forceinline__ float4 load_quad(const void *p, int dtype, int64_t at) {
    if (dtype == LC_K_F32) return *(const float4 *)((const float *)p + at);
    uint2 v = *(const uint2 *)((const bf16 *)p + at);
    float2 lo = dtype == LC_K_BF16 ? unpack2<bf16>(v.x) : unpack2<f16>(v.x), hi = dtype == LC_K_BF16 ? unpack2<bf16>(v.y) : unpack2<f16>(v.y);
    return make_float4(lo.x, lo.y, hi.x, hi.y);
}
__device__ __forceinline__ void add_scaled(float4 &to, float by, float4 v) {
    to.x += by * v.x, to.y += by * v.y, to.z += by * v.z, to.w += by * v.w;
}

/* ---- one token ----------------------------------------------------------------------------------------------------------- */
/* Shared memory: the ring of PIECES (afterwards sums [8 warps][HB][D], or what enters the state), then these. */
template <int D, int HB> struct decode_shared {
    enum { PIECES = HB == 1 ? 6 : 5 }; /* so that sm_89 has room */
    float q[HB][D], now[2][D], features[HB][MOST_F], u[MOST_KEYS][HB], lin[HB], den[HB];
};

/* D columns; S the type of state, C of the cache. */
template <int D, int HB, class S, class C> struct decoder {
    enum { PIECES = decode_shared<D, HB>::PIECES, LANES = D / 8, GROUPS = DECODE_THREADS / LANES, KEYS = PIECE / (D * (int)sizeof(C)), STATE_ROWS = PIECE / (D * (int)sizeof(S)) };
    const hybrid &a;
    const carried &c;
    char *ring;
    decode_shared<D, HB> &s;
    hybrid_span at;
    int b, h0, lo, old;                             /* keys lo .. lo + old - 1 lie in the cache; then comes the token */
    int key_pieces, rows, head_pieces, pieces, done; /* of keys (as many of values); rows of state a piece, pieces a head; all; used up */
    int group, column;

    __device__ __forceinline__ int kv_head() const { return h0 / a.group; }
    __device__ __forceinline__ S *state_of(int h) const { return (S *)c.state + (at.slot * a.h + h) * a.F * D; }
    __device__ __forceinline__ float *zsum_of(int h) const { return (float *)c.zsum + (at.slot * a.h + h) * a.F; }
    __device__ __forceinline__ C *cached(int which, int p) const { return (C *)c.cache + at.slot * c.slot_elements + cached_at(a, which, kv_head(), p); }
    __device__ __forceinline__ int piece_keys(int i) const { return old - i * KEYS < KEYS ? old - i * KEYS : (int)KEYS; }

    /* Asks for piece i: keys, then values, then the heads' states. */
    __device__ __forceinline__ void ask(int i) const {
        char *to = ring + i % PIECES * PIECE;
        if (i < 2 * key_pieces) {
            int which = i >= key_pieces, part = which ? i - key_pieces : i;
            enum { UNITS = D * (int)sizeof(C) / 16 };
            for (int e = threadIdx.x; e < piece_keys(part) * UNITS; e += DECODE_THREADS)
                copy16(to + e * 16, (const char *)cached(which, lo + part * KEYS + e / UNITS) + e % UNITS * 16, true);
        } else if (i < pieces) {
            int part = i - 2 * key_pieces;
            const char *from = (const char *)(state_of(h0 + part / head_pieces) + (int64_t)(part % head_pieces) * rows * D);
            for (int e = threadIdx.x; e < rows * D * (int)sizeof(S) / 16; e += DECODE_THREADS) copy16(to + e * 16, from + e * 16, true);
        }
        copy_commit();
    }
    /* The next piece, when it is there. */
    __device__ __forceinline__ const char *next() {
        copy_wait<PIECES - 2>();
        __syncthreads();
        ask(done + PIECES - 1); /* in the place of the one before */
        return ring + done++ % PIECES * PIECE;
    }

    __device__ __forceinline__ void begin() {
        int n = a.F < STATE_ROWS ? a.F : (int)STATE_ROWS;
        key_pieces = (old + KEYS - 1) / KEYS, rows = n, head_pieces = a.F / n;
        pieces = 2 * key_pieces + (lo > 0 ? HB * head_pieces : 0), done = 0;
        group = threadIdx.x / LANES, column = threadIdx.x % LANES * 8;
#pragma unroll 1
        for (int i = 0; i < PIECES - 1; i++) ask(i);
    }

    __device__ __forceinline__ void read_token(const float *features) {
        for (int i = threadIdx.x; i < HB * D; i += DECODE_THREADS)
            s.q[i / D][i % D] = read_as<float>(a.q.p, a.q.dtype, b * a.q.s[0] + (h0 + i / D) * a.q.s[1] + at.start * a.q.s[2] + i % D);
        for (int i = threadIdx.x; i < 2 * D; i += DECODE_THREADS) {
            const rows4 &v = i < D ? a.k : a.v;
            s.now[i / D][i % D] = read_as<float>(v.p, v.dtype, b * v.s[0] + kv_head() * v.s[1] + at.start * v.s[2] + i % D);
        }
        for (int i = threadIdx.x; i < HB * a.F; i += DECODE_THREADS) s.features[i / a.F][i % a.F] = features[((int64_t)b * a.h + h0) * a.F + i];
    }

    /* Warp i: the token's own score by head i, and what the state adds to the denominator. */
    __device__ __forceinline__ void own_score() {
        int i = threadIdx.x / 32, lane = threadIdx.x % 32;
        if (i >= HB) return;
        float dot = 0, lin = 0;
        for (int e = lane; e < D; e += 32) dot += s.q[i][e] * s.now[0][e];
        for (int e = lane; lo > 0 && e < a.F; e += 32) lin += s.features[i][e] * zsum_of(h0 + i)[e];
        dot = warp_reduce(dot, op_sum()), lin = warp_reduce(lin, op_sum());
        if (!lane) s.u[old][i] = dot * (float)a.scale, s.lin[i] = lin;
    }

    /* Sums over a group's lanes; the one that returns true has a head's. */
    __device__ __forceinline__ bool sum_heads(float (&dot)[HB], int *head, float *sum) const {
        int lane = threadIdx.x % LANES;
        if constexpr (HB == 4) {
            bool far = lane & LANES / 2, odd = lane & LANES / 4;
            float x = far ? dot[2] : dot[0], y = far ? dot[3] : dot[1];
            x += __shfl_xor_sync(0xffffffffu, far ? dot[0] : dot[2], LANES / 2);
            y += __shfl_xor_sync(0xffffffffu, far ? dot[1] : dot[3], LANES / 2);
            float z = odd ? y : x;
            z += __shfl_xor_sync(0xffffffffu, odd ? x : y, LANES / 4);
#pragma unroll
            for (int o = LANES / 8; o; o /= 2) z += __shfl_xor_sync(0xffffffffu, z, o);
            *head = (far ? 2 : 0) + (odd ? 1 : 0), *sum = z;
            return lane % (LANES / 4) == 0;
        } else {
#pragma unroll
            for (int o = LANES / 2; o; o /= 2) dot[0] += __shfl_xor_sync(0xffffffffu, dot[0], o);
            *head = 0, *sum = dot[0];
            return lane == 0;
        }
    }
    __device__ __forceinline__ void scores() {
        float q[HB][8];
#pragma unroll
        for (int i = 0; i < HB; i++) load_eight<float>(&s.q[i][column], q[i]);
#pragma unroll 1
        for (int part = 0; part < key_pieces; part++) {
            const char *piece = next();
            int n = piece_keys(part), at_once = 32 / LANES;
            for (int j0 = threadIdx.x / 32 * at_once; j0 < n; j0 += GROUPS) { /* a warp's groups go on together */
                int j = j0 + threadIdx.x % 32 / LANES, head;
                float key[8], dot[HB] = {}, sum;
                load_eight<C>(piece + ((j < n ? j : n - 1) * D + column) * sizeof(C), key);
#pragma unroll
                for (int i = 0; i < HB; i++)
#pragma unroll
                    for (int e = 0; e < 8; e++) dot[i] += key[e] * q[i][e];
                if (sum_heads(dot, &head, &sum) && j < n) s.u[part * KEYS + j][head] = sum * (float)a.scale;
            }
        }
    }

    /* Warp i: u of head i becomes gamma exp(u - max); what is kept of the row. */
    __device__ __forceinline__ void weights(const hybrid_out &o) {
        int i = threadIdx.x / 32, lane = threadIdx.x % 32, h = h0 + i, n = old + 1, first = n;
        if (i >= HB) return;
        float m = -INFINITY, sum = 0, gamma = hybrid_gamma<float>(a, h);
        for (int j = lane; j < n; j += 32) m = op_max()(m, s.u[j][i]);
        m = warp_reduce(m, op_max());
        for (int j = lane; j < n; j += 32) {
            float u = s.u[j][i];
            if (u == m && j < first) first = j;
            sum += s.u[j][i] = gamma * exp2_fast((u - m) * 1.4426950408889634f);
        }
        for (int x = 16; x; x >>= 1) first = min(first, __shfl_xor_sync(0xffffffffu, first, x));
        sum = warp_reduce(sum, op_sum()) + (lo > 0 ? s.lin[i] : 0);
        if (lane) return;
        s.den[i] = sum;
        if (o.c.p) *o.c.row<float>(b, h, at.start) = m;
        if (o.at.p) *o.at.row<int>(b, h, at.start) = lo + (first < n ? first : n - 1) + at.shift;
        if (o.z.p) *o.z.row<float>(b, h, at.start) = sum;
    }

    /* y [HB][8]: the thread's part of the sums over values and states. */
    __device__ __forceinline__ void sums(float (&y)[HB][8]) {
        float v[8];
        load_eight<float>(&s.now[1][column], v);
#pragma unroll
        for (int i = 0; i < HB; i++)
#pragma unroll
            for (int e = 0; e < 8; e++) y[i][e] = group ? 0 : s.u[old][i] * v[e];
#pragma unroll 1
        for (int part = 0; part < key_pieces; part++) {
            const char *piece = next();
            int n = piece_keys(part);
#pragma unroll 2
            for (int j = group; j < n; j += GROUPS) {
                load_eight<C>(piece + (j * D + column) * sizeof(C), v);
#pragma unroll
                for (int i = 0; i < HB; i++) {
                    float u = s.u[part * KEYS + j][i];
#pragma unroll
                    for (int e = 0; e < 8; e++) y[i][e] += u * v[e];
                }
            }
        }
#pragma unroll
        for (int i = 0; i < HB; i++)
#pragma unroll 1
            for (int part = 0; lo > 0 && part < head_pieces; part++) {
                const char *piece = next();
#pragma unroll 4
                for (int r = group; r < rows; r += GROUPS) {
                    float u = s.features[i][part * rows + r];
                    load_eight<S>(piece + (r * D + column) * sizeof(S), v);
#pragma unroll
                    for (int e = 0; e < 8; e++) y[i][e] += u * v[e];
                }
            }
    }

    /* Adds the threads' parts and writes the rows of the result. */
    __device__ __forceinline__ void finish(float (&y)[HB][8], const hybrid_out &o) {
        float *room = (float *)ring;
        int warp = threadIdx.x / 32;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < HB; i++) {
#pragma unroll
            for (int e = 0; e < 8; e++)
#pragma unroll
                for (int x = LANES; x < 32; x *= 2) y[i][e] += __shfl_xor_sync(0xffffffffu, y[i][e], x);
            if (threadIdx.x % 32 < LANES) store_eight<float>(room + (warp * HB + i) * D + column, y[i]);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < HB * D; i += DECODE_THREADS) {
            float sum = 0;
            for (int w = 0; w < 8; w++) sum += room[w * HB * D + i];
            put(o.y, h0 + i / D, i % D, sum / s.den[i / D]);
        }
        __syncthreads();
    }
    __device__ __forceinline__ void put(const rows4 &y, int h, int e, float v) const {
        if (y.dtype == LC_K_BF16) y.row<bf16>(b, h, 0)[e] = store<bf16>(v);
        else if (y.dtype == LC_K_F16) y.row<f16>(b, h, 0)[e] = store<f16>(v);
        else y.row<float>(b, h, 0)[e] = v;
    }
    /* A row of padding. */
    __device__ __forceinline__ void nothing(const hybrid_out &o) const {
        for (int i = threadIdx.x; i < HB * D; i += DECODE_THREADS) put(o.y, h0 + i / D, i % D, 0);
        if (threadIdx.x >= HB) return;
        if (o.c.p) *o.c.row<float>(b, h0 + threadIdx.x, 0) = 0;
        if (o.at.p) *o.at.row<int>(b, h0 + threadIdx.x, 0) = 0;
        if (o.z.p) *o.z.row<float>(b, h0 + threadIdx.x, 0) = 1;
    }

    /* ---- keys that leave the window: at most 64 ---- */
    __device__ void read_key(int which, int j, int e, float (&v)[8]) const { /* j from lo */
        if (j < old) load_eight<C>(cached(which, lo + j) + e, v);
        else load_eight<float>(&s.now[which][e], v);
    }
    /* phi [n][F] of keys lo .. of head h; keys [n][D + 4] in the same place, values [n][D], x [n][f] apart. */
    __device__ void key_features(int h, int n, float *phi, float *x) {
        const float *keys = phi;
        float bias = bias_of<float>(a.bk, a.bk_dtype, h);
        int quads = a.f / 4, column_of = threadIdx.x % quads * 4;
        for (int j0 = threadIdx.x / quads * 4; j0 < n; j0 += DECODE_THREADS / quads * 4) { /* four keys times four columns */
            float4 sum[4];
            const float *key[4];
#pragma unroll
            for (int r = 0; r < 4; r++) {
                key[r] = keys + (j0 + r < n ? j0 + r : n - 1) * (D + 4);
                sum[r] = make_float4(bias, bias, bias, bias);
                if (a.skip) add_scaled(sum[r], 1, *(const float4 *)(key[r] + column_of));
            }
#pragma unroll 1
            for (int e = 0; e < D; e += 4) {
                float4 w[4];
#pragma unroll
                for (int r = 0; r < 4; r++) w[r] = load_quad(a.mk.p, a.mk.dtype, h * a.mk.s[1] + (e + r) * a.mk.s[2] + column_of);
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    float4 q = *(const float4 *)(key[r] + e);
                    add_scaled(sum[r], q.x, w[0]), add_scaled(sum[r], q.y, w[1]), add_scaled(sum[r], q.z, w[2]), add_scaled(sum[r], q.w, w[3]);
                }
            }
#pragma unroll
            for (int r = 0; r < 4; r++)
                if (j0 + r < n) *(float4 *)(x + (j0 + r) * a.f + column_of) = sum[r];
        }
        __syncthreads();
        for (int r = threadIdx.x / 32; r < n; r += DECODE_THREADS / 32) {
            map_row(a, x + r * a.f, phi + r * a.F);
            __syncwarp();
            for (int i = threadIdx.x % 32; i < a.F; i += 32)
                if (phi[r * a.F + i] < (float)a.feature_eps) phi[r * a.F + i] = (float)a.feature_eps;
        }
        __syncthreads();
    }
    /* The n oldest keys enter the states of all heads. A group takes each GROUPS-th row of a state. */
    __device__ void absorb(int n) {
        float *phi = (float *)ring, *values = phi + MOST_WINDOW * (D + 4 > a.F ? D + 4 : a.F), *x = values + MOST_WINDOW * D;
#pragma unroll 1
        for (int i = 0; i < HB; i++) {
            for (int j = group; j < n; j += GROUPS) {
                float v[8];
                read_key(0, j, column, v);
                store_eight<float>(phi + j * (D + 4) + column, v);
                if (i) continue;
                read_key(1, j, column, v);
                store_eight<float>(values + j * D + column, v);
            }
            __syncthreads();
            key_features(h0 + i, n, phi, x);
            add_keys(h0 + i, n, phi, values);
            __syncthreads();
        }
    }
    __device__ __forceinline__ void add_keys(int h, int n, const float *phi, const float *values) {
        enum { AT_ONCE = 4 };
        S *state = state_of(h) + column;
        for (int r0 = group; r0 < a.F; r0 += AT_ONCE * GROUPS) {
            float sum[AT_ONCE][8], v[8];
#pragma unroll
            for (int r = 0; r < AT_ONCE; r++)
                if (r0 + r * GROUPS < a.F) load_eight<S>(state + (r0 + r * GROUPS) * D, sum[r]);
            for (int j = 0; j < n; j++) {
                load_eight<float>(values + j * D + column, v);
#pragma unroll
                for (int r = 0; r < AT_ONCE; r++) {
                    float f = r0 + r * GROUPS < a.F ? phi[j * a.F + r0 + r * GROUPS] : 0;
#pragma unroll
                    for (int e = 0; e < 8; e++) sum[r][e] += f * v[e];
                }
            }
#pragma unroll
            for (int r = 0; r < AT_ONCE; r++)
                if (r0 + r * GROUPS < a.F) store_eight<S>(state + (r0 + r * GROUPS) * D, sum[r]);
        }
        float *zsum = zsum_of(h);
        for (int i = threadIdx.x; i < a.F; i += DECODE_THREADS) {
            float z = zsum[i];
            for (int j = 0; j < n; j++) z += phi[j * a.F + i];
            zsum[i] = z;
        }
    }
    /* The token enters the cache, in the place of one that no head needs any more. */
    __device__ __forceinline__ void remember() const {
        if (h0 % a.group) return;
        for (int i = threadIdx.x; i < 2 * D; i += DECODE_THREADS) cached(i / D, lo + old)[i % D] = store<C>(s.now[i / D][i % D]);
    }
};

/* Bytes of the ring; what enters the state lies there too. */
template <int D, int HB> static int ring_bytes(const hybrid &a) {
    int room = (int)sizeof(float) * MOST_WINDOW * ((D + 4 > a.F ? D + 4 : a.F) + D + a.f), pieces = decode_shared<D, HB>::PIECES * PIECE;
    return pieces > room ? pieces : room;
}

/* hybrid_decode_many.cu: many rows, state and cache of one half dtype. */
bool hybrid_decode_many_fit(const lc_kargs *k, const hybrid &a);
int hybrid_decode_many(const lc_kargs *k, const hybrid &a, const carried &c);

#endif
