/* hybrid_forward_tiles.cu: hybrid attention forward in bf16 on the tensor cores, with or without a carried state. A block of two
 * warpgroups walks the 64-token chunks of one segment of one head; where there are too few heads to fill the machine, a head is cut into
 * segments, and a first kernel sums what the keys of each segment but the last add to the state.
 *
 * Chunk c (window 64): softmax over blocks c - 1 (terrace: all of it; sliding: keys after the query's place) and c (causal); linear:
 * the state, which holds blocks before c - 1, and, sliding, the other keys of block c - 1, as masked products. Then block c - 1 enters
 * the state. Window 0: the state holds blocks before c, block c is all masked products. Warpgroup 0 (side 0) makes the query features,
 * which stay in its registers, and adds up block c and the linear term; warpgroup 1 (side 1) makes the key features and adds up block
 * c - 1. Then each gives the other half of its columns, and finishes its own. */
#include "hybrid_forward.cuh"

enum { BLOCKS_WANTED = 132, MOST_SEGMENTS = 32 };

/* early: there is room of its own for the exchange of results; else it takes the chunk's queries and old keys, and the next chunk's are
 * fetched later. */
template <int D, int F, int IN> struct forward_tiles {
    typedef tile_sizes<D, F, IN> Z;
    bf16 *q, *k, *v, *wq, *wk, *fk, *s; /* [64][D], 2 of [64][D] twice, [D][IN] twice, [64][F], [D][F] */
    float *z, *lin, *top, *sum;         /* [F], [64], [2][64] twice: by side */
    int *arg;                           /* [2][64] */
    bool early;
    enum { HALVES = 5 * Z::X + 2 * Z::W + Z::PHI + Z::STATE, BYTES = 2 * HALVES + 4 * (F + 64 * 7), ROOM = 4 * Z::X };
    __device__ __forceinline__ forward_tiles(char *base, bool early_) : early(early_) {
        q = (bf16 *)base + (early ? 2 * Z::X : 0), k = q + Z::X, v = k + 2 * Z::X, wq = v + 2 * Z::X, wk = wq + Z::W;
        fk = wk + Z::W, s = fk + Z::PHI;
        z = (float *)(s + Z::STATE), lin = z + F, top = lin + 64, sum = top + 128, arg = (int *)(sum + 128);
    }
    __device__ __forceinline__ bf16 *keys(int c) const { return k + (c & 1) * Z::X; }
    __device__ __forceinline__ bf16 *values(int c) const { return v + (c & 1) * Z::X; }
    __device__ __forceinline__ bf16 *fq() const { return wq; } /* [64][F]: ready features; there are no weights then */
    __device__ __forceinline__ float4 *room(int side, int c) const { /* [D / 16][128] */
        return (float4 *)(early ? q - (2 - side) * Z::X : side ? keys(c - 1) : q);
    }
};

/* Rows before the first token: 0, with a denominator that harms nobody. */
__device__ __forceinline__ void put_padding(const hybrid &a, const segment &g, const hybrid_out &o) {
    if (g.s) return;
    for (int i = threadIdx.x; i < g.at.start * (a.d / 2); i += TILE_THREADS)
        *(uint32_t *)(o.y.row<bf16>(g.b, g.h, i / (a.d / 2)) + i % (a.d / 2) * 2) = 0;
    for (int i = threadIdx.x; i < g.at.start; i += TILE_THREADS) {
        if (o.c.p) *o.c.row<float>(g.b, g.h, i) = 0;
        if (o.at.p) *o.at.row<int>(g.b, g.h, i) = i;
        if (o.z.p) *o.z.row<float>(g.b, g.h, i) = 1;
    }
}

/* ---- weights of one chunk --------------------------------------------------------------------------------------------- */
/* x: dots of the 16 rows r with a block's keys: masked to -inf where softmax does not look; row maxima to `top`. side 0: block c. */
__device__ __forceinline__ void mask_scores(const hybrid &a, int side, bool there, float *top, float (&x)[8][4]) {
    int l = threadIdx.x & 31, r = threadIdx.x / 32 % 4, row = 16 * r + l / 4;
    float m[2] = {-INFINITY, -INFINITY};
    bool all = there && side && a.kind == KIND_TERRACE;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int key = 8 * n + l % 4 * 2 + (e & 1), query = row + 8 * (e >> 1);
            if (!all && (!there || (side ? key <= query : key > query))) x[n][e] = -INFINITY;
            m[e >> 1] = fmaxf(m[e >> 1], x[n][e]);
        }
    m[0] = quad_max(m[0]), m[1] = quad_max(m[1]);
    if (l % 4 == 0) top[64 * side + row] = m[0], top[64 * side + row + 8] = m[1];
}

/* x = gamma exp(score - maximum) from dots, summed up; notes the first key of the maximum, if it is here. lift: log2(gamma) */
__device__ __forceinline__ void window_weights(float scale, float lift, int side, const float *top, int *arg, float (&x)[8][4], float (&sum)[2]) {
    int l = threadIdx.x & 31, r = threadIdx.x / 32 % 4, row = 16 * r + l / 4;
    float by = scale * LC_LOG2E;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float m = fmaxf(top[row + 8 * half], top[64 + row + 8 * half]), shift = lift - m * by;
        int at = 64;
#pragma unroll
        for (int n = 7; n >= 0; n--)
#pragma unroll
            for (int e = 2 * half + 1; e >= 2 * half; e--) {
                if (x[n][e] == m) at = 8 * n + l % 4 * 2 + (e & 1);
                sum[half] += x[n][e] = exp2_fast(fmaf(x[n][e], by, shift));
            }
        at = min(at, __shfl_xor_sync(0xffffffffu, at, 1));
        at = min(at, __shfl_xor_sync(0xffffffffu, at, 2));
        if (l % 4 == 0) arg[64 * side + row + 8 * half] = at;
    }
}

/* p: where a key precedes the query, the linear weight (phi holds the factor lambda already), else 0; added to the sum. */
template <int F> __device__ __forceinline__ void linear_weights(const uint32_t (&phi)[F / 16][4], const bf16 *fk, uint32_t (&p)[4][4], float (&sum)[2]) {
    int l = threadIdx.x & 31, r = threadIdx.x / 32 % 4, row = 16 * r + l / 4;
    float u[8][4];
    set_all(u, 0);
    group_begin();
    group_product<64, F, CHUNK, ALONG_K>(u, phi, fk, 0);
    group_end();
    group_hold(u);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int key = 8 * n + l % 4 * 2 + (e & 1), query = row + 8 * (e >> 1);
            sum[e >> 1] += u[n][e] = key <= query ? u[n][e] : 0;
        }
    as_fragments<64>(p, u);
}

/* ---- results of one chunk --------------------------------------------------------------------------------------------- */
/* y [64][D] / denominators: own columns, to which the other side's share is added. The exchange's first half: */
template <int D> __device__ __forceinline__ void give_results(int side, float4 *room, const float (&y)[D / 8][4], float (&own)[D / 16][4]) {
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
        float v[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            own[n][e] = side ? y[D / 16 + n][e] : y[n][e];
            v[e] = side ? y[n][e] : y[D / 16 + n][e];
        }
        room[n * 128 + threadIdx.x % 128] = make_float4(v[0], v[1], v[2], v[3]);
    }
}
template <int D> __device__ __forceinline__ void take_results(const float4 *room, float (&own)[D / 16][4]) {
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
        float4 v = room[n * 128 + threadIdx.x % 128];
        own[n][0] += v.x, own[n][1] += v.y, own[n][2] += v.z, own[n][3] += v.w;
    }
}

template <int D, int F, int IN>
__device__ __forceinline__ void put_results(const hybrid &a, const segment &g, const hybrid_out &o, const forward_tiles<D, F, IN> &t, int c, int side,
                                            const float (&own)[D / 16][4]) {
    int l = threadIdx.x & 31, r = threadIdx.x / 32 % 4;
    float eps = a.window ? 0 : (float)a.eps;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = 16 * r + 8 * half + l / 4, p = c * CHUNK + row;
        float by = 1 / (t.sum[row] + t.sum[64 + row] + t.lin[row] + eps);
        bool there = p >= g.at.p0 && p < g.at.p1;
        bf16 *to = o.y.row<bf16>(g.b, g.h, p + g.at.shift) + side * (D / 2) + l % 4 * 8;
#pragma unroll
        for (int n = 0; n < D / 16; n += 4) {
            uint32_t v[4];
#pragma unroll
            for (int i = 0; i < 4; i++) v[i] = pack2<bf16>(own[n + i][2 * half] * by, own[n + i][2 * half + 1] * by);
            quad_transpose(v);
            if (there) *(uint4 *)(to + 8 * n) = make_uint4(v[0], v[1], v[2], v[3]);
        }
    }
}

/* Maximum, its key and the denominator of each row. */
template <int D, int F, int IN>
__device__ __forceinline__ void put_kept(const hybrid &a, const segment &g, const hybrid_out &o, const forward_tiles<D, F, IN> &t, int c) {
    int row = threadIdx.x, p = c * CHUNK + row, i = p + g.at.shift;
    if (row >= CHUNK || p < g.at.p0 || p >= g.at.p1) return;
    if (o.z.p) *o.z.row<float>(g.b, g.h, i) = t.sum[row] + t.sum[64 + row] + t.lin[row] + (a.window ? 0 : (float)a.eps);
    if (!a.window) {
        if (o.c.p) *o.c.row<float>(g.b, g.h, i) = 0;
        if (o.at.p) *o.at.row<int>(g.b, g.h, i) = i;
        return;
    }
    float here = t.top[row], before = t.top[64 + row];
    if (o.c.p) *o.c.row<float>(g.b, g.h, i) = fmaxf(here, before) * (float)a.scale;
    int key = before >= here ? t.arg[64 + row] - CHUNK : t.arg[row];
    if (o.at.p) *o.at.row<int>(g.b, g.h, i) = min(c * CHUNK + key, p) + g.at.shift;
}

/* ---- the walk --------------------------------------------------------------------------------------------------------- */
template <int D, int F, int IN> struct walker {
    const hybrid &a;
    const carried &s;
    const hybrid_out &o;
    const segment &g;
    forward_tiles<D, F, IN> t;
    float lift, lambda, bias;
    int side;

    __device__ __forceinline__ bool has_prev(int c) const { return a.window && c * CHUNK > g.at.k_min; }

    /* Chunk c's queries, their ready features, and keys; its values and the ready features of keys. */
    __device__ __forceinline__ void fetch_keys(int c) {
        load_rows<D>(t.q, query_source(a, g, a.q), c * CHUNK);
        load_rows<D>(t.keys(c), key_source(a, s, g, 0), c * CHUNK);
        if (a.map == MAP_NONE) load_rows<F>(t.fq(), query_source(a, g, a.mq), c * CHUNK);
    }
    __device__ __forceinline__ void fetch_values(int c) {
        load_rows<D>(t.values(c), key_source(a, s, g, 1), c * CHUNK);
        if (a.map == MAP_NONE) fetch_features(a.window ? c - 1 : c);
    }
    __device__ __forceinline__ void fetch_features(int c) {
        row_source r = key_source(a, s, g, 2);
        r.to = min(r.to, g.absorb_end);
        load_rows<F>(t.fk, r, c * CHUNK);
    }

    /* Of chunk c: the features, side 0's to phi, side 1's to shared memory, and the scores to x. */
    __device__ __forceinline__ void features_and_scores(int c, uint32_t (&phi)[F / 16][4], float (&x)[8][4]) {
        int block = a.window ? c - 1 : c; /* of the keys whose features are wanted */
        float dot[2] = {0, 0}, in[IN / 8][4];
        const bf16 *rows = side ? t.keys(block) : t.q;
        set_all(in, bias), set_all(x, 0);
        group_begin(); /* whether wanted or not: products behind a branch would not run side by side with other work */
        map_inputs<D, IN>(in, rows, side ? t.wk : t.wq);
        group_commit();
        group_product<64, D, CHUNK, ALONG_K, CHUNK, ALONG_K>(x, t.q, 0, t.keys(c - side), 0);
        group_commit();
        group_wait<1>();
        group_hold(in);
        if (a.map == MAP_NONE) {
            if (!side) query_ready<F>(t.fq(), phi, lambda, t.z, dot);
        } else {
            if (IN == D && a.skip) add_skip<IN>(in, rows);
            int from = side ? g.at.k_min - block * CHUNK : 0, to = side ? g.absorb_end - block * CHUNK : CHUNK; /* keys of the state's range count */
            features_of<F, IN>(a, in, side ? 1 : lambda, t.z, dot, phi, side ? t.fk : NULL, from, to);
        }
        group_wait<0>();
        group_hold(x);
        if (a.window) mask_scores(a, side, !side || has_prev(c), t.top, x);
        if (side) return;
        int l = threadIdx.x & 31, row = threadIdx.x / 32 * 16 + l / 4;
        dot[0] = quad_sum(dot[0]), dot[1] = quad_sum(dot[1]);
        if (l % 4 == 0) t.lin[row] = dot[0], t.lin[row + 8] = dot[1];
    }

    /* The side's share y [64][D] of chunk c; the features of the block that leaves the window enter the state (zeros where none does). */
    __device__ __forceinline__ void results(state<D, F> &st, int c, const uint32_t (&phi)[F / 16][4], float (&x)[8][4], float (&y)[D / 8][4]) {
        int block = a.window ? c - 1 : c;
        float sum[2] = {0, 0};
        uint32_t p[4][4] = {};
        group_begin();
        st.absorb(t.fk, t.values(block));
        group_commit();
        st.absorb_z(t.fk);
        if (a.window) window_weights((float)a.scale, lift, side, t.top, t.arg, x, sum);
        group_wait<0>();
        group_hold(st.s);
        set_all(y, 0);
        if (!side) {
            if (!a.window || (a.kind == KIND_SLIDING && has_prev(c))) {
                linear_weights<F>(phi, t.fk, p, sum);
                group_begin();
                group_product<D, CHUNK, CHUNK, ACROSS_K>(y, p, t.values(block), 0);
                group_end();
                group_hold(y);
            }
            group_begin();
            group_product<D, F, D, ALONG_K>(y, phi, t.s, 0);
            group_end();
            group_hold(y);
        }
        if (a.window) {
            as_fragments<64>(p, x);
            group_begin();
            group_product<D, CHUNK, CHUNK, ACROSS_K>(y, p, t.values(c - side), 0);
            group_end();
            group_hold(y);
        }
        int l = threadIdx.x & 31, row = 64 * side + threadIdx.x / 32 % 4 * 16 + l / 4;
        sum[0] = quad_sum(sum[0]), sum[1] = quad_sum(sum[1]);
        if (l % 4 == 0) t.sum[row] = sum[0], t.sum[row + 8] = sum[1];
    }

    __device__ __forceinline__ void chunk(state<D, F> &st, int c) {
        bool more = c + 1 < g.c1;
        uint32_t phi[F / 16][4];
        float x[8][4], y[D / 8][4], own[D / 16][4];
        copy_wait<1>(); /* the values may still be under way */
        shared_fence();
        __syncthreads();
        features_and_scores(c, phi, x);
        copy_wait<0>();
        shared_fence();
        __syncthreads();
        if (t.early && more) fetch_keys(c + 1);
        copy_commit();
        results(st, c, phi, x, y);
        give_results<D>(side, t.room(1 - side, c), y, own);
        __syncthreads();
        if (t.early && more) fetch_values(c + 1);
        copy_commit();
        take_results<D>(t.room(side, c), own);
        if (more) st.put(t.s, t.z);
        put_results<D, F, IN>(a, g, o, t, c, side, own);
        put_kept<D, F, IN>(a, g, o, t, c);
        if (t.early || !more) return;
        __syncthreads();
        fetch_keys(c + 1);
        copy_commit();
        fetch_values(c + 1);
        copy_commit();
    }

    /* Asks for all that the first chunk wants but the state. Block c0 - 1: zeros where there is none. */
    __device__ __forceinline__ void begin() {
        int c = g.c0;
        weights<D, IN> q, k;
        if (a.map != MAP_NONE) q.take(t.wq, a.mq, g.h), k.take(t.wk, a.mk, g.h);
        row_source keys = key_source(a, s, g, 0), values = key_source(a, s, g, 1);
#pragma unroll 1
        for (int i = c - 1; i <= c; i++) {
            load_rows<D>(t.keys(i), keys, i * CHUNK);
            load_rows<D>(t.values(i), values, i * CHUNK);
        }
        load_rows<D>(t.q, query_source(a, g, a.q), c * CHUNK);
        if (a.map == MAP_NONE) {
            load_rows<F>(t.fq(), query_source(a, g, a.mq), c * CHUNK);
            fetch_features(a.window ? c - 1 : c);
        }
        copy_commit();
        copy_commit(); /* as many groups as a chunk has */
        if (a.map != MAP_NONE) q.put(t.wq, a.mq), k.put(t.wk, a.mk);
    }

    /* Keys of the last block that have left the window of the next query. */
    __device__ __forceinline__ void absorb_rest(state<D, F> &st) {
        int c = g.c1 - 1;
        if (!a.window || g.absorb_end <= c * CHUNK) return;
        __syncthreads();
        if (a.map == MAP_NONE) {
            fetch_features(c);
            copy_commit();
            copy_wait<0>();
        } else if (side) {
            float in[IN / 8][4];
            set_all(in, bias);
            group_begin();
            map_inputs<D, IN>(in, t.keys(c), t.wk);
            group_end();
            group_hold(in);
            if (IN == D && a.skip) add_skip<IN>(in, t.keys(c));
            uint32_t phi[F / 16][4];
            float dot[2];
            features_of<F, IN>(a, in, 1, t.z, dot, phi, t.fk, g.at.k_min - c * CHUNK, g.absorb_end - c * CHUNK);
        }
        shared_fence();
        __syncthreads();
        group_begin();
        st.absorb(t.fk, t.values(c));
        group_commit();
        st.absorb_z(t.fk);
        group_wait<0>();
        group_hold(st.s);
    }
};

/* Grid [b][segments][h]. parts [b * h][segments][PART]: what the sum kernel left. */
template <int D, int F, int IN>
__global__ void __launch_bounds__(TILE_THREADS, 1) forward_kernel(hybrid a, carried c, hybrid_out o, int segments, const float *parts, bool early) {
    LC_SHARED(shared);
    int rest = blockIdx.x / a.h, h = blockIdx.x % a.h, side = __shfl_sync(0xffffffffu, (int)threadIdx.x / 128, 0);
    segment g = segment_at(a, c, rest / segments, rest % segments, h, segments, threadIdx.x == 0 && h == 0 && rest % segments == 0);
    float gamma = hybrid_gamma<float>(a, g.h), bias = side ? bias_of<float>(a.bk, a.bk_dtype, g.h) : bias_of<float>(a.bq, a.bq_dtype, g.h);
    walker<D, F, IN> w = {a, c, o, g, forward_tiles<D, F, IN>(shared, early), log2f(gamma), hybrid_lambda(a, gamma), bias, side};
    if (g.c0 < g.c1) w.begin();
    wait_for_previous(); /* the sum kernel: nothing is written, and no part read, before it has ended */
    put_padding(a, g, o);
    if (g.c0 >= g.c1) return;
    typedef state<D, F> S;
    S st;
    st.clear();
    int64_t head = g.b * a.h + g.h;
    float *own = (float *)c.state + (g.at.slot * a.h + g.h) * (F * D), *own_z = (float *)c.zsum + (g.at.slot * a.h + g.h) * F;
    bool before = c.state && g.at.k_min > 0;
    if (before && segments == 1) st.add(own, own_z);
    parts += head * segments * S::PART;
    /* the state itself is written by the last segment's block: what was before is a part too */
    if (before && segments > 1 && !g.s) st.add_part(parts + (int64_t)(segments - 1) * S::PART);
#pragma unroll 1
    for (int i = 0; i < g.s; i++) st.add_part(parts + (int64_t)i * S::PART);
    st.put(w.t.s, w.t.z);
    bool last = c.state && g.s == segments - 1;
#pragma unroll 1
    for (int i = g.c0; i < g.c1; i++) w.chunk(st, i);
    if (!last) return;
    w.absorb_rest(st);
    st.save(own, own_z);
}

/* ---- sums of segments ------------------------------------------------------------------------------------------------- */
template <int D, int F, int IN> struct sum_tiles {
    typedef tile_sizes<D, F, IN> Z;
    enum { BYTES = 2 * (4 * Z::X + Z::W + 2 * Z::PHI) + 4 * F };
};

/* Grid [b][segments - 1][h]: part s of a head = sum over the keys that the segment adds to the state, of phi_k^T v and of phi_k. The
 * first segment's begins with the carried state, of which part segments - 1 is a copy. Two chunks at a time, one a side. */
template <int D, int F, int IN> __global__ void __launch_bounds__(TILE_THREADS, 1) sum_kernel(hybrid a, carried c, int segments, float *parts) {
    typedef tile_sizes<D, F, IN> Z;
    typedef state<D, F> S;
    LC_SHARED(shared);
    bf16 *k = (bf16 *)shared, *v = k + 2 * Z::X, *w = v + 2 * Z::X, *f = w + Z::W;
    const float *nothing = (const float *)(f + 2 * Z::PHI); /* [F]: of no account */
    int h = blockIdx.x % a.h, rest = blockIdx.x / a.h, s = rest % (segments - 1), b = rest / (segments - 1);
    int side = __shfl_sync(0xffffffffu, (int)threadIdx.x / 128, 0);
    segment g = segment_at(a, c, b, s, h, segments, false);
    row_source ks = key_source(a, c, g, 0), vs = key_source(a, c, g, 1), fs = key_source(a, c, g, 2);
    int shift = a.window ? 1 : 0, first = max(g.c0 - shift, g.at.k_min / CHUNK), end = g.c1 - shift;
    int to = min(g.absorb_end, end * CHUNK); /* keys from here on count as zeros */
    ks.to = min(ks.to, to), vs.to = min(vs.to, to), fs.to = min(fs.to, to);
    auto fetch = [&](int i, bool values) { /* the pair of chunks from i */
#pragma unroll 1
        for (int n = 0; n < 2 && i < end; n++)
            if (values) load_rows<D>(v + n * Z::X, vs, (i + n) * CHUNK);
            else if (a.map != MAP_NONE) load_rows<D>(k + n * Z::X, ks, (i + n) * CHUNK);
            else load_rows<F>(f + n * Z::PHI, fs, (i + n) * CHUNK);
        copy_commit();
    };
    weights<D, IN> wk;
    next_may_start();
    if (a.map != MAP_NONE) wk.take(w, a.mk, h);
    fetch(first, false);
    fetch(first, true);
    if (a.map != MAP_NONE) wk.put(w, a.mk);
    float bias = bias_of<float>(a.bk, a.bk_dtype, h);
    S st;
    st.clear();
    if (c.state && !s && g.at.k_min > 0) {
        int64_t at = g.at.slot * a.h + h;
        st.add((const float *)c.state + at * (F * D), (const float *)c.zsum + at * F);
        st.save_part(parts + ((int64_t)(b * a.h + h) * segments + segments - 1) * S::PART);
    }
#pragma unroll 1
    for (int i = first; i < end; i += 2) {
        int mine = i + side;
        copy_wait<1>();
        shared_fence();
        __syncthreads();
        if (a.map != MAP_NONE) {
            float in[IN / 8][4];
            set_all(in, bias);
            group_begin();
            map_inputs<D, IN>(in, k + side * Z::X, w);
            group_end();
            group_hold(in);
            if (IN == D && a.skip) add_skip<IN>(in, k + side * Z::X);
            uint32_t phi[F / 16][4];
            float dot[2];
            features_of<F, IN>(a, in, 1, nothing, dot, phi, f + side * Z::PHI, g.at.k_min - mine * CHUNK, to - mine * CHUNK);
        }
        copy_wait<0>();
        shared_fence();
        __syncthreads();
        if (a.map != MAP_NONE) fetch(i + 2, false);
        group_begin();
        st.absorb(f, v);
        st.absorb(f + Z::PHI, v + Z::X);
        group_commit();
        st.absorb_z(f);
        st.absorb_z(f + Z::PHI);
        group_wait<0>();
        group_hold(st.s);
        __syncthreads();
        if (a.map == MAP_NONE) fetch(i + 2, false);
        fetch(i + 2, true);
    }
    st.save_part(parts + ((int64_t)(b * a.h + h) * segments + s) * S::PART);
}

/* ---- the host's side -------------------------------------------------------------------------------------------------- */
/* Segments a head: what keeps BLOCKS_WANTED multiprocessors busiest, in chunks that the slowest walks; the first kernel costs about a
 * third of the second a chunk, and a segment's begin about a chunk. From the shapes alone, so that results are the same anywhere. */
static int segments_of(const hybrid &a) {
    int chunks = (a.t + 2 * CHUNK - 1) / CHUNK, best = 1;
    int64_t heads = (int64_t)a.b * a.h, least = INT64_MAX;
    for (int s = 1; s <= MOST_SEGMENTS && 2 * s <= chunks + 1; s++) {
        int64_t walk = ceil_div(chunks, s) * 3, cost = ceil_div(heads * s, BLOCKS_WANTED) * (walk + 3);
        if (s > 1) cost += ceil_div(heads * (s - 1), BLOCKS_WANTED) * (walk / 3 + 2) + s;
        if (cost < least) least = cost, best = s;
    }
    return best;
}

/* after_sums: the kernel begins while the sum kernel, an ordinary launch and the one before it, still runs, and waits for its end itself. */
template <class... P> static void launch_forward(bool after_sums, void (*kernel)(P...), int blocks, int shared, P... argument) {
#ifndef LC_EMULATED
    if (after_sums && lc_cuda_now->major >= 9) {
        cudaLaunchAttribute attribute = {};
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t c = {};
        c.gridDim = dim3(blocks), c.blockDim = dim3(TILE_THREADS), c.dynamicSmemBytes = shared, c.stream = lc_cuda_now->stream;
        c.attrs = &attribute, c.numAttrs = 1;
        cudaLaunchKernelEx(&c, kernel, argument...);
        return;
    }
#endif
    LC_LAUNCH(kernel, blocks, TILE_THREADS, shared, argument...);
}

template <int D, int F, int IN> static int run(const lc_kargs *k, const hybrid &a, const carried &s) {
    int segments = segments_of(a), heads = a.b * a.h;
    float *parts = (float *)k->work;
    hybrid_out o = hybrid_results(k);
    typedef forward_tiles<D, F, IN> FT;
    typedef sum_tiles<D, F, IN> ST;
    if (segments > 1) {
        if (allow_shared(sum_kernel<D, F, IN>, ST::BYTES)) return LC_K_DEVICE;
        LC_LAUNCH((sum_kernel<D, F, IN>), heads * (segments - 1), TILE_THREADS, ST::BYTES, a, s, segments, parts);
    }
    bool early = (size_t)(FT::BYTES + FT::ROOM) <= lc_cuda_now->shared_max;
    int shared = early ? FT::BYTES + FT::ROOM : FT::BYTES;
    if (allow_shared(forward_kernel<D, F, IN>, shared)) return LC_K_DEVICE;
    launch_forward(segments > 1, forward_kernel<D, F, IN>, heads * segments, shared, a, s, o, segments, (const float *)parts, early);
    return s.state && a.window ? hybrid_remember(k, a, s) : LC_K_OK;
}

/* The shapes that there are kernels for. */
#define SHAPE(D, F, IN) {D, F, IN, forward_tiles<D, F, IN>::BYTES, state<D, F>::PART, run<D, F, IN>}
static const struct {
    int d, F, in, shared, part;
    int (*run)(const lc_kargs *k, const hybrid &a, const carried &s);
} shapes[] = {
    SHAPE(128, 128, 64), SHAPE(128, 64, 32), SHAPE(128, 128, 128), SHAPE(128, 64, 64), SHAPE(128, 32, 32),
    SHAPE(64, 128, 64),  SHAPE(64, 64, 32),  SHAPE(64, 64, 64),    SHAPE(64, 32, 32),
};
static int shape_of(const hybrid &a) {
    for (int i = 0; i < (int)(sizeof shapes / sizeof *shapes); i++)
        if (shapes[i].d == a.d && shapes[i].F == a.F && (a.map == MAP_NONE || shapes[i].in == a.f)) return i;
    return -1;
}

/* Rows that begin at multiples of 16 bytes. */
static bool even_rows(const lc_view *v) {
    bool ok = (uintptr_t)v->data % 16 == 0;
    for (int i = 0; i + 1 < v->ndim; i++) ok = ok && (v->dim[i] == 1 || v->stride[i] % 8 == 0);
    return ok;
}

bool hybrid_tiles_fit(const lc_kargs *k, const hybrid &a) {
    int shape = shape_of(a);
    if (shape < 0 || lc_cuda_select(k->device) || (size_t)shapes[shape].shared > lc_cuda_now->shared_max) return false;
    if (k->x[0].dtype != LC_K_BF16 || (a.window && a.window != CHUNK) || !(a.scale > 0)) return false;
    for (int i = 0; i < 5; i++)
        if ((i < 3 || a.map == MAP_NONE) && !even_rows(k->x + i)) return false;
    if (a.map != MAP_NONE && (a.mq.s[1] % 2 || a.mq.s[2] % 2 || a.mk.s[1] % 2 || a.mk.s[2] % 2)) return false;
    if (k->x[11].data && ((uintptr_t)k->x[11].data % 16)) return false;
    return even_rows(k->y);
}

size_t hybrid_tiles_work(const lc_kargs *k, const hybrid &a) {
    (void)k;
    int segments = segments_of(a);
    return segments > 1 ? (size_t)a.b * a.h * segments * shapes[shape_of(a)].part * sizeof(float) : 0;
}

int hybrid_tiles(const lc_kargs *k, const hybrid &a, const carried &s) { return shapes[shape_of(a)].run(k, a, s); }
