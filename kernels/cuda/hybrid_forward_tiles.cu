/* hybrid_forward_tiles.cu: hybrid attention forward in bf16 on the tensor cores, with or without a carried state. A block of four
 * warpgroups walks the 64-token chunks of one segment of one head; where there are too few heads to fill the machine, a head is cut into
 * segments, and a first kernel sums what the keys of each segment but the last add to the state.
 *
 * Chunk c (window 64): softmax over blocks c - 1 (terrace: all of it; sliding: keys after the query's place) and c (causal); linear:
 * the state, which holds blocks before c - 1, and, sliding, the other keys of block c - 1, as masked products. Then block c - 1 enters
 * the state. Window 0: the state holds blocks before c, block c is all masked products. Every step is shared by all groups: first the
 * features, half of the queries' by groups 0 and 1, of the keys' by 2 and 3, and a quarter of the scores each (32 keys of block c - 1 by
 * groups 0 and 1, of c by 2 and 3); when the maxima are known, the weights of those, while the state takes the old block up; then a
 * quarter of the columns of the result, from weights and features that all groups left in shared memory. */
#include "hybrid_forward.cuh"

enum { BLOCKS_WANTED = 132, MOST_SEGMENTS = 32 };

/* On Hopper the shapes but one are hybrid_forward_pairs.cu's. */
#if LC_WGMMA
#define ELSEWHERE(D, F, IN) (IN < 128)
#else
#define ELSEWHERE(D, F, IN) false
#endif

/* early: there is room of their own for the queries' features and the weights, and the next chunk's queries and keys are fetched early; else
 * those take the chunk's queries and old keys, and the next are fetched late; not where there is wgmma, which has room enough. */
template <int D, int F, int IN> struct forward_tiles {
    typedef tile_sizes<D, F, IN> Z;
    bf16 *q, *k, *v, *w, *fk, *s, *fq_; /* [64][D], 2 of [64][D] twice, 2 of [D][IN] or [64][F], [64][F], [D][F], [64][F] and [64][128] */
    float *z, *top, *sum;               /* [F], [4][64] twice: by group */
    uint8_t *arg;                       /* [4][64] */
    bool early;
    enum { WEIGHTS = Z::W > Z::PHI ? Z::W : Z::PHI };
    enum { HALVES = 5 * Z::X + 2 * WEIGHTS + Z::PHI + Z::STATE, BYTES = 2 * HALVES + 4 * (F + 64 * 9), ROOM = 2 * (Z::PHI + 64 * 128) };
    /* Elsewhere the tiles that wait for room have it in q and keys(c - 1). */
    static constexpr bool FITS = Z::PHI <= Z::X && 64 * 128 <= Z::X;
    __device__ __forceinline__ forward_tiles(char *base, bool early_) : early(LC_WGMMA || early_) {
        q = (bf16 *)base, k = q + Z::X, v = k + 2 * Z::X, w = v + 2 * Z::X, fk = w + 2 * WEIGHTS, s = fk + Z::PHI;
        fq_ = s + Z::STATE;
        bf16 *end = fq_ + (early ? Z::PHI + 64 * 128 : 0);
        z = (float *)end, top = z + F, sum = top + 256, arg = (uint8_t *)(sum + 256);
    }
    __device__ __forceinline__ bf16 *keys(int c) const { return k + (c & 1) * Z::X; }
    __device__ __forceinline__ bf16 *values(int c) const { return v + (c & 1) * Z::X; }
    __device__ __forceinline__ bf16 *wq() const { return w; }
    __device__ __forceinline__ bf16 *wk() const { return w + WEIGHTS; }
    __device__ __forceinline__ bf16 *fq() const { return early ? fq_ : q; }
    __device__ __forceinline__ bf16 *weights(int c) const { return early ? fq_ + Z::PHI : keys(c - 1); } /* [64][128] */
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
/* x: dots of the 16 rows r with 32 of a block's keys from n0 on: masked to -inf where softmax does not look; row maxima to `top` of the
 * group. old: block c - 1, else c. */
__device__ __forceinline__ void mask_scores(const hybrid &a, bool old, bool there, int n0, float *top, float (&x)[4][4]) {
    int l = threadIdx.x & 31, row = threadIdx.x / 32 % 4 * 16 + l / 4, least = row - n0 - l % 4 * 2; /* key - row, less the lane's */
    float m[2] = {-INFINITY, -INFINITY};
    bool all = there && old && a.kind == KIND_TERRACE;
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int key = 8 * n + (e & 1) - 8 * (e >> 1);
            if (!all && (!there || (old ? key <= least : key > least))) x[n][e] = -INFINITY;
            m[e >> 1] = fmaxf(m[e >> 1], x[n][e]);
        }
    m[0] = quad_max(m[0]), m[1] = quad_max(m[1]);
    if (l % 4 == 0) top[row] = m[0], top[row + 8] = m[1];
}

/* x = gamma exp(score - maximum) from dots, summed up; notes the first key of the maximum, if it is here. lift: log2(gamma) */
__device__ __forceinline__ void window_weights(float scale, float lift, int group, int n0, const float *top, uint8_t *arg, float (&x)[4][4], float (&sum)[2]) {
    int l = threadIdx.x & 31, row = threadIdx.x / 32 % 4 * 16 + l / 4;
    float by = scale * LC_LOG2E;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float *t = top + row + 8 * half;
        float m = fmaxf(fmaxf(t[0], t[64]), fmaxf(t[128], t[192])), shift = lift - m * by;
        int at = 64;
#pragma unroll
        for (int n = 3; n >= 0; n--)
#pragma unroll
            for (int e = 2 * half + 1; e >= 2 * half; e--) {
                if (x[n][e] == m) at = 8 * n + (e & 1);
                sum[half] += x[n][e] = exp2_fast(fmaf(x[n][e], by, shift));
            }
        at = at == 64 ? 64 : at + n0 + l % 4 * 2;
        at = min(at, __shfl_xor_sync(0xffffffffu, at, 1));
        at = min(at, __shfl_xor_sync(0xffffffffu, at, 2));
        if (l % 4 == 0) arg[64 * group + row + 8 * half] = (uint8_t)at;
    }
}

/* x += where a key precedes the query, the linear weight (the queries' features hold the factor lambda already), which sum gets too. */
template <int F> __device__ __forceinline__ void linear_weights(const bf16 *fq, const bf16 *fk, int n0, float (&x)[4][4], float (&sum)[2]) {
    int l = threadIdx.x & 31, row = threadIdx.x / 32 % 4 * 16 + l / 4;
    float u[4][4];
    set_all(u, 0);
    group_begin();
    group_product<32, F, CHUNK, ALONG_K, CHUNK, ALONG_K>(u, fq, 0, fk, n0);
    group_end();
    group_hold(u);
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int key = n0 + 8 * n + l % 4 * 2 + (e & 1), query = row + 8 * (e >> 1);
            float v = key <= query ? u[n][e] : 0;
            x[n][e] += v, sum[e >> 1] += v;
        }
}

/* ---- results of one chunk --------------------------------------------------------------------------------------------- */
template <int D, int F, int IN>
__device__ __forceinline__ float denominator(const hybrid &a, const forward_tiles<D, F, IN> &t, int row) {
    return t.sum[row] + t.sum[64 + row] + t.sum[128 + row] + t.sum[192 + row] + (a.window ? 0 : a.eps32);
}

/* y [64][D / 4]: the group's columns, over the denominators. */
template <int D, int F, int IN>
__device__ __forceinline__ void put_results(const hybrid &a, const segment &g, const hybrid_out &o, const forward_tiles<D, F, IN> &t, int c, int group,
                                            const float (&y)[D / 32][4]) {
    int l = threadIdx.x & 31, r = threadIdx.x / 32 % 4;
    bf16 *base = o.y.row<bf16>(g.b, g.h, c * CHUNK + g.at.shift) + group * (D / 4);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = 16 * r + 8 * half + l / 4, p = c * CHUNK + row, at = row * (int)o.y.s[2];
        float by = inverse(denominator(a, t, row));
        bool there = p >= g.at.p0 && p < g.at.p1;
        uint32_t v[D / 32];
#pragma unroll
        for (int n = 0; n < D / 32; n++) v[n] = pack2<bf16>(y[n][2 * half] * by, y[n][2 * half + 1] * by);
        if constexpr (D == 128) {
            quad_transpose(v);
            if (there) *(uint4 *)(base + (at + l % 4 * 8)) = make_uint4(v[0], v[1], v[2], v[3]);
        } else {
#pragma unroll
            for (int n = 0; n < D / 32; n++)
                if (there) *(uint32_t *)(base + (at + 8 * n + l % 4 * 2)) = v[n];
        }
    }
}

/* Maximum, its key and the denominator of each row. */
template <int D, int F, int IN>
__device__ __forceinline__ void put_kept(const hybrid &a, const segment &g, const hybrid_out &o, const forward_tiles<D, F, IN> &t, int c) {
    int row = threadIdx.x, p = c * CHUNK + row, i = p + g.at.shift;
    if (row >= CHUNK || p < g.at.p0 || p >= g.at.p1) return;
    if (o.z.p) *o.z.row<float>(g.b, g.h, i) = denominator(a, t, row);
    if (!a.window) {
        if (o.c.p) *o.c.row<float>(g.b, g.h, i) = 0;
        if (o.at.p) *o.at.row<int>(g.b, g.h, i) = i;
        return;
    }
    float before = fmaxf(t.top[row], t.top[64 + row]), here = fmaxf(t.top[128 + row], t.top[192 + row]);
    if (o.c.p) *o.c.row<float>(g.b, g.h, i) = fmaxf(here, before) * a.scale32;
    int first = before >= here ? 0 : 128, key = min(t.arg[first + row], t.arg[first + 64 + row]) - (before >= here ? CHUNK : 0);
    if (o.at.p) *o.at.row<int>(g.b, g.h, i) = min(c * CHUNK + key, p) + g.at.shift;
}

/* ---- the walk --------------------------------------------------------------------------------------------------------- */
template <int D, int F, int IN> struct walker {
    typedef halves<F, IN> H;
    const hybrid &a;
    const carried &s;
    const hybrid_out &o;
    const segment &g;
    forward_tiles<D, F, IN> t;
    float lift, lambda, bias;
    int group, hf;      /* hf: half of the features, of a block's keys */
    bool old;           /* groups 0 and 1: features of queries, block c - 1 */
    row_source from_q, from_k, from_v;

    __device__ __forceinline__ bool has_prev(int c) const { return a.window && c * CHUNK > g.at.k_min; }

    /* Chunk c's queries and keys; where features are ready: those of the queries and of the keys that will enter the state. */
    __device__ __forceinline__ void fetch_keys(int c) {
        load_rows<D>(t.q, from_q, c * CHUNK);
        load_rows<D>(t.keys(c), from_k, c * CHUNK);
        if (a.map == MAP_NONE) {
            load_rows<F>(t.wq(), query_source(a, g, a.mq), c * CHUNK);
            fetch_features(a.window ? c - 1 : c);
        }
    }
    __device__ __forceinline__ void fetch_values(int c) { load_rows<D>(t.values(c), from_v, c * CHUNK); }
    __device__ __forceinline__ void fetch_features(int c) {
        row_source r = key_source(a, s, g, 2);
        r.to = min(r.to, g.absorb_end);
        load_rows<F>(t.wk(), r, c * CHUNK);
    }

    /* Of chunk c: the features into their tiles, the scores to x. */
    __device__ __forceinline__ void features_and_scores(int c, float (&dot)[2], float (&x)[4][4]) {
        int block = a.window ? c - 1 : c; /* of the keys whose features are wanted */
        float in[H::N / 8][4];
        const bf16 *rows = old ? t.q : t.keys(block);
        set_all(in, bias), set_all(x, 0);
        group_begin(); /* whether wanted or not: products behind a branch would not run side by side with other work */
        H::template inputs<D>(in, rows, old ? t.wq() : t.wk(), hf);
        group_commit();
        group_product<32, D, CHUNK, ALONG_K, CHUNK, ALONG_K>(x, t.q, 0, t.keys(old ? c - 1 : c), 32 * hf);
        group_commit();
        group_wait<1>();
        group_hold(in);
        if (!t.early) { /* the queries' place gets their features */
            group_wait<0>();
            group_hold(x);
            __syncthreads();
        }
        if (a.map == MAP_NONE) {
            move_ready<F>(t.fq(), t.wq(), lambda, t.z, t.sum);
            move_ready<F>(t.fk, t.wk(), 1, NULL, NULL);
        } else {
            if (IN == D && a.skip) H::add_skip(in, rows, hf);
            int row = H::row() + block * CHUNK; /* keys of the state's range count */
            float by[2] = {lambda, lambda};
            if (!old) by[0] = row >= g.at.k_min && row < g.absorb_end, by[1] = row + 8 >= g.at.k_min && row + 8 < g.absorb_end;
            H::put(a, in, hf, by, old ? t.z : NULL, dot, old ? t.fq() : t.fk, t.sum + (old ? 0 : 128), old ? 1 : 2);
        }
        group_wait<0>();
        group_hold(x);
        if (a.window) mask_scores(a, old, !old || has_prev(c), 32 * hf, t.top + 64 * group, x);
    }

    /* The weights into their tile; the features of the block that leaves the window enter the state (zeros where none does). */
    __device__ __forceinline__ void weigh(state<D, F> &st, int c, float (&sum)[2], float (&x)[4][4]) {
        int l = threadIdx.x & 31, row = H::row(), block = a.window ? c - 1 : c;
        if (a.map == MAP_NONE && !group && l % 4 == 0) sum[0] = t.sum[row], sum[1] = t.sum[row + 8];
        group_begin();
        st.absorb(t.fk, t.values(block));
        group_commit();
        st.absorb_z(t.fk);
        if (a.window) window_weights(a.scale32, lift, group, 32 * hf, t.top, t.arg, x, sum);
        else set_all(x, 0);
        group_wait<0>();
        group_hold(st.s);
        if (a.window ? old && a.kind == KIND_SLIDING && has_prev(c) : !old) linear_weights<F>(t.fq(), t.fk, 32 * hf, x, sum);
        bf16 *tile = t.weights(c) + (old ? 0 : 64 * 64);
        int g8 = l / 4;
        shared_at at = shared_place(tile) + 2 * (row * 64 + ((g8 << 3 ^ 32 * hf) | l % 4 * 2));
#pragma unroll
        for (int n = 0; n < 4; n++) {
            shared_put(at ^ n << 4, pack2<bf16>(x[n][0], x[n][1]));
            shared_put((at ^ n << 4) + 8 * 128, pack2<bf16>(x[n][2], x[n][3]));
        }
        if (a.map == MAP_NONE) __syncthreads(); /* its dots lie where the sums come */
        sum[0] = quad_sum(sum[0]), sum[1] = quad_sum(sum[1]);
        if (l % 4 == 0) t.sum[64 * group + row] = sum[0], t.sum[64 * group + row + 8] = sum[1];
    }

    __device__ __forceinline__ void results(int c, float (&y)[D / 32][4]) {
        int n0 = group * (D / 4);
        const bf16 *p = t.weights(c);
        set_all(y, 0);
        group_begin();
        group_product<D / 4, F, CHUNK, ALONG_K, D, ALONG_K>(y, t.fq(), 0, t.s, n0);
        group_product<D / 4, CHUNK, CHUNK, ALONG_K, CHUNK, ACROSS_K>(y, p, 0, t.values(c - 1), n0); /* window 0: weights of 0, values of old */
        group_product<D / 4, CHUNK, CHUNK, ALONG_K, CHUNK, ACROSS_K>(y, p + 64 * 64, 0, t.values(c), n0);
        group_end();
        group_hold(y);
    }

    __device__ __forceinline__ void chunk(state<D, F> &st, int c) {
        bool more = c + 1 < g.c1;
        float dot[2] = {0, 0};
        {
            float x[4][4];
            copy_wait<1>(); /* the values may still be under way */
            shared_fence();
            __syncthreads();
            st.put(t.s);
            features_and_scores(c, dot, x);
            copy_wait<0>();
            shared_fence();
            __syncthreads();
            if (t.early && more) fetch_keys(c + 1);
            copy_commit();
            weigh(st, c, dot, x);
        }
        shared_fence();
        __syncthreads();
        float y[D / 32][4];
        results(c, y);
        st.save_z(t.z);
        put_results<D, F, IN>(a, g, o, t, c, group, y);
        put_kept<D, F, IN>(a, g, o, t, c);
        if (!more) return;
        __syncthreads();
        if (!t.early) fetch_keys(c + 1), copy_commit();
        fetch_values(c + 1);
        copy_commit();
    }

    /* Asks for all that the first chunk wants but the state. Block c0 - 1: zeros where there is none. */
    __device__ __forceinline__ void begin() {
        int c = g.c0;
        from_q = query_source(a, g, a.q), from_k = key_source(a, s, g, 0), from_v = key_source(a, s, g, 1);
        weights<D, IN> q, k;
        if (a.map != MAP_NONE) q.take(t.wq(), a.mq, g.h), k.take(t.wk(), a.mk, g.h);
        load_rows<D>(t.keys(c - 1), from_k, (c - 1) * CHUNK);
        load_rows<D>(t.values(c - 1), from_v, (c - 1) * CHUNK);
        fetch_keys(c);
        copy_commit();
        fetch_values(c);
        copy_commit();
        if (a.map != MAP_NONE) q.put(t.wq(), a.mq), k.put(t.wk(), a.mk);
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
            __syncthreads();
            move_ready<F>(t.fk, t.wk(), 1, NULL, NULL);
        } else if (!old) {
            float in[H::N / 8][4], dot[2];
            set_all(in, bias);
            group_begin();
            H::template inputs<D>(in, t.keys(c), t.wk(), hf);
            group_end();
            group_hold(in);
            if (IN == D && a.skip) H::add_skip(in, t.keys(c), hf);
            int row = H::row() + c * CHUNK;
            float by[2] = {(float)(row >= g.at.k_min && row < g.absorb_end), (float)(row + 8 >= g.at.k_min && row + 8 < g.absorb_end)};
            H::put(a, in, hf, by, NULL, dot, t.fk, t.sum + 128, 2);
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
    if (ELSEWHERE(D, F, IN)) return;
    LC_SHARED(shared);
    int rest = blockIdx.x / a.h, h = blockIdx.x % a.h, group = __shfl_sync(0xffffffffu, (int)threadIdx.x / 128, 0);
    bool old = group < 2;
    segment g = segment_at(a, c, rest / segments, rest % segments, h, segments, threadIdx.x == 0 && h == 0 && rest % segments == 0);
    float gamma = hybrid_gamma<float>(a, g.h), bias = bias_of<float>(old ? a.bq : a.bk, old ? a.bq_dtype : a.bk_dtype, g.h);
    walker<D, F, IN> w = {a, c, o, g, forward_tiles<D, F, IN>(shared, early), log2f(gamma), hybrid_lambda(a, gamma), bias, group, group & 1, old, {}, {}, {}};
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
    st.save_z(w.t.z);
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
    enum { BYTES = 2 * (4 * Z::X + Z::W + 2 * Z::PHI) + 4 * 256 };
};

/* Grid [b][segments - 1][h]: part s of a head = sum over the keys that the segment adds to the state, of phi_k^T v and of phi_k. The
 * first segment's begins with the carried state, of which part segments - 1 is a copy. Two chunks at a time, two groups each. */
template <int D, int F, int IN> __global__ void __launch_bounds__(TILE_THREADS, 1) sum_kernel(hybrid a, carried c, int segments, float *parts) {
    if (ELSEWHERE(D, F, IN)) return;
    typedef tile_sizes<D, F, IN> Z;
    typedef state<D, F> S;
    typedef halves<F, IN> H;
    LC_SHARED(shared);
    bf16 *k = (bf16 *)shared, *v = k + 2 * Z::X, *w = v + 2 * Z::X, *f = w + Z::W;
    float *pair = (float *)(f + 2 * Z::PHI); /* [2][2][64] */
    int h = blockIdx.x % a.h, rest = blockIdx.x / a.h, s = rest % (segments - 1), b = rest / (segments - 1);
    int group = __shfl_sync(0xffffffffu, (int)threadIdx.x / 128, 0), side = group >> 1, hf = group & 1;
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
        copy_wait<1>();
        shared_fence();
        __syncthreads();
        if (a.map != MAP_NONE) {
            float in[H::N / 8][4], dot[2];
            set_all(in, bias);
            group_begin();
            H::template inputs<D>(in, k + side * Z::X, w, hf);
            group_end();
            group_hold(in);
            if (IN == D && a.skip) H::add_skip(in, k + side * Z::X, hf);
            int row = H::row() + (i + side) * CHUNK;
            float by[2] = {(float)(row >= g.at.k_min && row < to), (float)(row + 8 >= g.at.k_min && row + 8 < to)};
            H::put(a, in, hf, by, NULL, dot, f + side * Z::PHI, pair + side * 128, side + 1);
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
    bool early = !FT::FITS || (size_t)(FT::BYTES + FT::ROOM) <= lc_cuda_now->shared_max;
    int shared = early ? FT::BYTES + FT::ROOM : FT::BYTES;
    if (allow_shared(forward_kernel<D, F, IN>, shared)) return LC_K_DEVICE;
    launch_early(segments > 1, forward_kernel<D, F, IN>, heads * segments, TILE_THREADS, shared, a, s, o, segments, (const float *)parts, early);
    return s.state && a.window ? hybrid_remember(k, a, s) : LC_K_OK;
}

/* The shapes that there are kernels for. */
#define SHAPE(D, F, IN) {D, F, IN, forward_tiles<D, F, IN>::BYTES + (forward_tiles<D, F, IN>::FITS ? 0 : (int)forward_tiles<D, F, IN>::ROOM), state<D, F>::PART, run<D, F, IN>}
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

bool hybrid_tiles_take(const lc_kargs *k, const hybrid &a) {
    if (k->x[0].dtype != LC_K_BF16 || (a.window && a.window != CHUNK) || !(a.scale > 0)) return false;
    for (int i = 0; i < 5; i++)
        if ((i < 3 || a.map == MAP_NONE) && !even_rows(k->x + i)) return false;
    if (a.map != MAP_NONE && (a.mq.s[1] % 2 || a.mq.s[2] % 2 || a.mk.s[1] % 2 || a.mk.s[2] % 2)) return false;
    if (k->x[11].data && ((uintptr_t)k->x[11].data % 16)) return false;
    return even_rows(k->y);
}

bool hybrid_tiles_fit(const lc_kargs *k, const hybrid &a) {
    int shape = shape_of(a);
    if (shape < 0 || lc_cuda_select(k->device) || (size_t)shapes[shape].shared > lc_cuda_now->shared_max) return false;
    return hybrid_tiles_take(k, a);
}

size_t hybrid_tiles_work(const lc_kargs *k, const hybrid &a) {
    (void)k;
    int segments = segments_of(a);
    return segments > 1 ? (size_t)a.b * a.h * segments * shapes[shape_of(a)].part * sizeof(float) : 0;
}

int hybrid_tiles(const lc_kargs *k, const hybrid &a, const carried &s) { return shapes[shape_of(a)].run(k, a, s); }
