/* hybrid_forward_tiles.cu: hybrid attention forward in bf16 on the tensor cores, with or without a carried state. A block of 8 warps
 * walks the 64-token chunks of one segment of one head; where there are too few heads to fill the machine, a head is cut into segments,
 * and a first kernel sums what the keys of each segment but the last add to the state.
 *
 * Chunk c (window 64): softmax over blocks c - 1 (terrace: all of it; sliding: keys after the query's place) and c (causal); linear:
 * the state, which holds blocks before c - 1, and, sliding, the other keys of block c - 1, as masked products. Then block c - 1 enters
 * the state. Window 0: the state holds blocks before c, block c is all masked products. Warps 0-3 (side 0) make the query features and
 * the weights of block c, warps 4-7 (side 1) the key features and the weights of block c - 1; all share the product with the values. */
#include "hybrid_forward.cuh"

enum { BLOCKS_WANTED = 132, MOST_SEGMENTS = 32 };

template <int D, int F, int IN> struct forward_tiles {
    typedef tile_sizes<D, F, IN> Z;
    bf16 *q, *k, *v, *wq, *wk, *fq, *fk, *p, *s; /* [64][D], 2 of [64][D] twice, [D][IN] twice, [64][F] twice, [64][128], [F][D] */
    float *z, *lin, *top, *sum;                  /* [F], [64], [2][64] twice: by side */
    int *arg;                                    /* [2][64] */
    enum { HALVES = 5 * Z::X + 2 * Z::W + 2 * Z::PHI + Z::P + Z::STATE, BYTES = 2 * HALVES + 4 * (F + 64 * 7) };
    __device__ __forceinline__ explicit forward_tiles(char *base) {
        q = (bf16 *)base, k = q + Z::X, v = k + 2 * Z::X, wq = v + 2 * Z::X, wk = wq + Z::W;
        fq = wk + Z::W, fk = fq + Z::PHI, p = fk + Z::PHI, s = p + Z::P;
        z = (float *)(s + Z::STATE), lin = z + F, top = lin + 64, sum = top + 128, arg = (int *)(sum + 128);
    }
    __device__ __forceinline__ bf16 *keys(int c) const { return k + (c & 1) * Z::X; }
    __device__ __forceinline__ bf16 *values(int c) const { return v + (c & 1) * Z::X; }
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
/* Dots of the 16 rows r with a block's keys: masked, -inf where softmax does not look; row maxima to `top`. side 0: block c. */
template <int D> __device__ __forceinline__ void score(const hybrid &a, const bf16 *q, const bf16 *k, int side, bool there, float *top, float (&x)[8][4]) {
    int l = threadIdx.x & 31, r = threadIdx.x / 32 % 4, row = 16 * r + l / 4;
    float m[2] = {-INFINITY, -INFINITY};
    if (there) {
        product_rows<D>(x, q, 16 * r, k, side ? 4 : r + 1);
        bool all = side && a.kind == KIND_TERRACE;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int key = 8 * n + l % 4 * 2 + (e & 1), query = row + 8 * (e >> 1);
                if (!all && (side ? key <= query : key > query)) x[n][e] = -INFINITY;
                m[e >> 1] = fmaxf(m[e >> 1], x[n][e]);
            }
        m[0] = quad_max(m[0]), m[1] = quad_max(m[1]);
    }
    if (l % 4 == 0) top[64 * side + row] = m[0], top[64 * side + row + 8] = m[1];
}

/* x = gamma exp(score - maximum) from dots; notes the first key of the maximum, if it is here. */
__device__ __forceinline__ void window_weights(float scale, float gamma, int side, const float *top, int *arg, float (&x)[8][4]) {
    int l = threadIdx.x & 31, r = threadIdx.x / 32 % 4, row = 16 * r + l / 4;
    float by = scale * LC_LOG2E, lift = log2f(gamma);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float m = fmaxf(top[row + 8 * half], top[64 + row + 8 * half]), shift = lift - m * by;
        int at = 64;
#pragma unroll
        for (int n = 7; n >= 0; n--)
#pragma unroll
            for (int e = 2 * half + 1; e >= 2 * half; e--) {
                if (x[n][e] == m) at = 8 * n + l % 4 * 2 + (e & 1);
                x[n][e] = exp2_fast(fmaf(x[n][e], by, shift));
            }
        at = min(at, __shfl_xor_sync(0xffffffffu, at, 1));
        at = min(at, __shfl_xor_sync(0xffffffffu, at, 2));
        if (l % 4 == 0) arg[64 * side + row + 8 * half] = at;
    }
}

/* Weights x of the 16 rows r and their sums to shared memory; p [64][128]: block c - 1, block c. */
__device__ __forceinline__ void put_weights(int side, const float (&x)[8][4], bf16 *p, float *sum) {
    int l = threadIdx.x & 31, r = threadIdx.x / 32 % 4, row = 16 * r + l / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float s = 0;
#pragma unroll
        for (int n = 0; n < 8; n++) {
            s += x[n][2 * half] + x[n][2 * half + 1];
            *(uint32_t *)tile_at<CHUNK>(p, row + 8 * half, (side ? 0 : 64) + 8 * n + l % 4 * 2) = pack2<bf16>(x[n][2 * half], x[n][2 * half + 1]);
        }
        s = quad_sum(s);
        if (l % 4 == 0) sum[64 * side + row + 8 * half] = s;
    }
}

/* Where softmax does not look in this block and a key precedes the query: the linear weight (fq holds the factor lambda already). */
template <int F> __device__ __forceinline__ void linear_weights(const bf16 *fq, const bf16 *fk, bool sliding, float (&x)[8][4]) {
    int l = threadIdx.x & 31, r = threadIdx.x / 32 % 4, row = 16 * r + l / 4;
    float u[8][4];
    product_rows<F>(u, fq, 16 * r, fk, r + 1);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int key = 8 * n + l % 4 * 2 + (e & 1), query = row + 8 * (e >> 1);
            x[n][e] = key <= query ? u[n][e] : sliding ? x[n][e] : 0;
        }
}

/* ---- results of one chunk --------------------------------------------------------------------------------------------- */
/* y [64][D] = (p [64][128] times the values of both blocks + fq times the state) / denominators. Warp: 32 rows, D / 4 columns. */
template <int D, int F, int IN> __device__ __forceinline__ void put_results(const hybrid &a, const segment &g, const hybrid_out &o, const forward_tiles<D, F, IN> &t, int c, bool prev, bool has_state) {
    constexpr int NN = D / 64;
    int l = threadIdx.x & 31, w = threadIdx.x / 32, m0 = w / 4 * 32, n0 = w % 4 * (D / 4);
    float y[2][2 * NN][4] = {};
    auto step = [&](const bf16 *left, int k, const bf16 *right, int rows_k, auto rows) {
        uint32_t x0[4], x1[4], b[4];
        fragment_a<CHUNK>(x0, left, m0, k);
        fragment_a<CHUNK>(x1, left, m0 + 16, k);
#pragma unroll
        for (int n = 0; n < NN; n++) {
            fragment_b_t<decltype(rows)::value>(b, right, n0 + 16 * n, rows_k);
            mma16<bf16>(y[0][2 * n], x0, b[0], b[1]);
            mma16<bf16>(y[0][2 * n + 1], x0, b[2], b[3]);
            mma16<bf16>(y[1][2 * n], x1, b[0], b[1]);
            mma16<bf16>(y[1][2 * n + 1], x1, b[2], b[3]);
        }
    };
    if (has_state) {
#pragma unroll
        for (int k = 0; k < F; k += 16) step(t.fq, k, t.s, k, constant<F>());
    }
    if (prev) {
#pragma unroll
        for (int k = 0; k < 64; k += 16) step(t.p, k, t.values(c - 1), k, constant<CHUNK>());
    }
#pragma unroll
    for (int k = 0; k < 64; k += 16)
        if (k < m0 + 32) step(t.p, 64 + k, t.values(c), k, constant<CHUNK>());
    float eps = a.window ? 0 : (float)a.eps;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int row = m0 + 8 * i + l / 4, p = c * CHUNK + row;
        if (p < g.at.p0 || p >= g.at.p1) continue;
        float by = 1 / (t.sum[row] + t.sum[64 + row] + t.lin[row] + eps);
        bf16 *to = o.y.row<bf16>(g.b, g.h, p + g.at.shift) + n0 + l % 4 * 2;
#pragma unroll
        for (int n = 0; n < 2 * NN; n++) *(uint32_t *)(to + 8 * n) = pack2<bf16>(y[i / 2][n][i % 2 * 2] * by, y[i / 2][n][i % 2 * 2 + 1] * by);
    }
}

/* Maximum, its key and the denominator of each row. */
template <int D, int F, int IN> __device__ __forceinline__ void put_kept(const hybrid &a, const segment &g, const hybrid_out &o, const forward_tiles<D, F, IN> &t, int c) {
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
    float gamma, lambda, bias_q, bias_k;
    bool has_state;

    __device__ __forceinline__ bool has_prev(int c) const { return a.window && c * CHUNK > g.at.k_min; }

    /* Chunk c's queries and keys; its values and, ready-made, the features. */
    __device__ __forceinline__ void fetch_keys(int c) {
        load_rows<D>(t.q, query_source(a, g, a.q), c * CHUNK);
        load_rows<D>(t.keys(c), key_source(a, s, g, 0), c * CHUNK);
    }
    __device__ __forceinline__ void fetch_values(int c) {
        load_rows<D>(t.values(c), key_source(a, s, g, 1), c * CHUNK);
        if (a.map != MAP_NONE) return;
        load_rows<F>(t.fq, query_source(a, g, a.mq), c * CHUNK);
        if (!a.window || has_prev(c)) fetch_features(a.window ? c - 1 : c);
    }
    __device__ __forceinline__ void fetch_features(int c) {
        row_source r = key_source(a, s, g, 2);
        r.to = min(r.to, g.absorb_end);
        load_rows<F>(t.fk, r, c * CHUNK);
    }

    /* Side 1: features of the keys of block c, of which those of the state's range count. */
    __device__ __forceinline__ void key_features(int c) {
        int m = threadIdx.x / 32 % 4 * 16;
        feature_sink to = {t.fk, 1, g.at.k_min - c * CHUNK, g.absorb_end - c * CHUNK, NULL, NULL};
        if (a.map != MAP_NONE) features_of<D, F, IN>(a, t.keys(c), t.wk, bias_k, m, to);
    }
    __device__ __forceinline__ void query_features() {
        int m = threadIdx.x / 32 % 4 * 16;
        feature_sink to = {t.fq, lambda, 0, CHUNK, has_state ? t.z : NULL, t.lin};
        if (a.map != MAP_NONE) features_of<D, F, IN>(a, t.q, t.wq, bias_q, m, to);
        else features_ready<F>(m, to);
    }

    __device__ __forceinline__ void chunk(state<D, F> &st, int c, bool last) {
        int side = threadIdx.x / 128;
        bool prev = has_prev(c), leaves = !a.window || prev, more = c + 1 < g.c1;
        float x[8][4];
        if (a.map == MAP_NONE) copy_wait<0>();
        else copy_wait<1>(); /* the values may still be under way */
        __syncthreads();
        if (!side) query_features();
        else if (leaves) key_features(a.window ? c - 1 : c);
        if (a.window) score<D>(a, t.q, t.keys(c - side), side, !side || prev, t.top, x);
        __syncthreads();
        if (more) fetch_keys(c + 1);
        copy_commit();
        if (a.window && (!side || prev)) window_weights((float)a.scale, gamma, side, t.top, t.arg, x);
        if (!a.window && !side) linear_weights<F>(t.fq, t.fk, false, x);
        if (a.window && a.kind == KIND_SLIDING && side && prev) linear_weights<F>(t.fq, t.fk, true, x);
        if (!side || prev) put_weights(side, x, t.p, t.sum);
        else if (threadIdx.x % 128 < 64) t.sum[64 + threadIdx.x % 128] = 0;
        copy_wait<1>();
        __syncthreads();
        put_kept<D, F, IN>(a, g, o, t, c);
        put_results<D, F, IN>(a, g, o, t, c, prev, has_state);
        bool absorbs = leaves && (more || last);
        if (absorbs) st.absorb(t.fk, t.values(a.window ? c - 1 : c));
        __syncthreads();
        if (absorbs && more) st.put(t.s, t.z);
        has_state |= absorbs;
        if (more) fetch_values(c + 1);
        copy_commit();
    }

    /* Keys of the last block that have left the window of the next query. */
    __device__ __forceinline__ void absorb_rest(state<D, F> &st) {
        int c = g.c1 - 1;
        if (!a.window || g.absorb_end <= c * CHUNK) return;
        if (a.map == MAP_NONE) fetch_features(c);
        copy_commit();
        copy_wait<0>();
        __syncthreads();
        if (threadIdx.x >= 128) key_features(c);
        __syncthreads();
        st.absorb(t.fk, t.values(c));
    }
};

/* Grid [b][segments][h]. parts [b * h][segments][F D + F]: what the sum kernel left. */
template <int D, int F, int IN> __global__ void __launch_bounds__(TILE_THREADS, 1) forward_kernel(hybrid a, carried c, hybrid_out o, int segments, const float *parts) {
    LC_SHARED(shared);
    int rest = blockIdx.x / a.h, h = blockIdx.x % a.h;
    segment g = segment_at(a, c, rest / segments, rest % segments, h, segments, threadIdx.x == 0 && h == 0 && rest % segments == 0);
    put_padding(a, g, o);
    if (g.c0 >= g.c1) return;
    float gamma = hybrid_gamma<float>(a, g.h);
    walker<D, F, IN> w = {a, c, o, g, forward_tiles<D, F, IN>(shared), gamma, hybrid_lambda(a, gamma), 0, 0, false};
    w.bias_q = bias_of<float>(a.bq, a.bq_dtype, g.h), w.bias_k = bias_of<float>(a.bk, a.bk_dtype, g.h);
    w.fetch_keys(g.c0);
    if (w.has_prev(g.c0)) load_rows<D>(w.t.keys(g.c0 - 1), key_source(a, c, g, 0), (g.c0 - 1) * CHUNK);
    copy_commit();
    w.fetch_values(g.c0);
    if (w.has_prev(g.c0)) load_rows<D>(w.t.values(g.c0 - 1), key_source(a, c, g, 1), (g.c0 - 1) * CHUNK);
    copy_commit();
    if (a.map != MAP_NONE) {
        load_weights<D, IN>(w.t.wq, a.mq, g.h);
        load_weights<D, IN>(w.t.wk, a.mk, g.h);
    }
    state<D, F> st;
    st.clear();
    int64_t head = g.b * a.h + g.h;
    float *own = (float *)c.state + (g.at.slot * a.h + g.h) * (F * D), *own_z = (float *)c.zsum + (g.at.slot * a.h + g.h) * F;
    if (c.state && segments == 1 && g.at.k_min > 0) st.add(own, own_z), w.has_state = true;
    parts += head * segments * (F * D + F);
    bool carries = c.state && segments > 1 && !g.s && g.at.k_min > 0; /* the state itself is written by the last segment's block */
    for (int i = carries ? segments - 1 : 0; i < (carries ? segments : g.s); i++) {
        const float *part = parts + (int64_t)i * (F * D + F);
        st.add(part, part + F * D), w.has_state = true;
    }
    if (w.has_state) st.put(w.t.s, w.t.z);
    if (threadIdx.x < 64) w.t.lin[threadIdx.x] = 0;
    bool last = c.state && g.s == segments - 1;
#pragma unroll 1
    for (int i = g.c0; i < g.c1; i++) w.chunk(st, i, last);
    if (!last) return;
    w.absorb_rest(st);
    st.save(own, own_z);
}

/* ---- sums of segments ------------------------------------------------------------------------------------------------- */
template <int D, int F, int IN> struct sum_tiles {
    typedef tile_sizes<D, F, IN> Z;
    enum { BYTES = 2 * (4 * Z::X + Z::W + 2 * Z::PHI) };
};

/* Grid [b][segments - 1][h]: part s [F D + F] of a head = sum over the keys that the segment adds to the state, of phi_k^T v and of phi_k. The
 * first segment's begins with the carried state, of which part segments - 1 is a copy. Two chunks at a time, one a side. */
template <int D, int F, int IN> __global__ void __launch_bounds__(TILE_THREADS, 1) sum_kernel(hybrid a, carried c, int segments, float *parts) {
    typedef tile_sizes<D, F, IN> Z;
    LC_SHARED(shared);
    bf16 *k = (bf16 *)shared, *v = k + 2 * Z::X, *w = v + 2 * Z::X, *f = w + Z::W;
    int h = blockIdx.x % a.h, rest = blockIdx.x / a.h, s = rest % (segments - 1), b = rest / (segments - 1), side = threadIdx.x / 128;
    segment g = segment_at(a, c, b, s, h, segments, false);
    row_source ks = key_source(a, c, g, 0), vs = key_source(a, c, g, 1), fs = key_source(a, c, g, 2);
    int shift = a.window ? 1 : 0, first = max(g.c0 - shift, g.at.k_min / CHUNK), end = g.c1 - shift;
    fs.to = min(fs.to, g.absorb_end);
    auto fetch = [&](int i, bool values) { /* the pair of chunks from i */
#pragma unroll 1
        for (int n = 0; n < 2 && i + n < end; n++)
            if (values) load_rows<D>(v + n * Z::X, vs, (i + n) * CHUNK);
            else if (a.map != MAP_NONE) load_rows<D>(k + n * Z::X, ks, (i + n) * CHUNK);
            else load_rows<F>(f + n * Z::PHI, fs, (i + n) * CHUNK);
        copy_commit();
    };
    fetch(first, false);
    fetch(first, true);
    if (a.map != MAP_NONE) load_weights<D, IN>(w, a.mk, h);
    float bias = bias_of<float>(a.bk, a.bk_dtype, h);
    state<D, F> st;
    st.clear();
    if (c.state && !s && g.at.k_min > 0) {
        int64_t at = g.at.slot * a.h + h;
        st.add((const float *)c.state + at * (F * D), (const float *)c.zsum + at * F);
        float *copy = parts + ((int64_t)(b * a.h + h) * segments + segments - 1) * (F * D + F);
        st.save(copy, copy + F * D);
    }
#pragma unroll 1
    for (int i = first; i < end; i += 2) {
        copy_wait<1>();
        __syncthreads();
        feature_sink to = {f + side * Z::PHI, 1, g.at.k_min - (i + side) * CHUNK, g.absorb_end - (i + side) * CHUNK, NULL, NULL};
        if (a.map != MAP_NONE && i + side < end) features_of<D, F, IN>(a, k + side * Z::X, w, bias, threadIdx.x / 32 % 4 * 16, to);
        copy_wait<0>();
        __syncthreads();
        if (a.map != MAP_NONE) fetch(i + 2, false);
        st.absorb(f, v);
        if (i + 1 < end) st.absorb(f + Z::PHI, v + Z::X);
        __syncthreads();
        if (a.map == MAP_NONE) fetch(i + 2, false);
        fetch(i + 2, true);
    }
    float *part = parts + ((int64_t)(b * a.h + h) * segments + s) * (F * D + F);
    st.save(part, part + F * D);
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
    if (allow_shared(forward_kernel<D, F, IN>, FT::BYTES)) return LC_K_DEVICE;
    LC_LAUNCH((forward_kernel<D, F, IN>), heads * segments, TILE_THREADS, FT::BYTES, a, s, o, segments, parts);
    return s.state && a.window ? hybrid_remember(k, a, s) : LC_K_OK;
}

/* The shapes that there are kernels for. */
#define SHAPE(D, F, IN) {D, F, IN, forward_tiles<D, F, IN>::BYTES, run<D, F, IN>}
static const struct {
    int d, F, in, shared;
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
    return segments > 1 ? (size_t)a.b * a.h * segments * (a.F * a.d + a.F) * sizeof(float) : 0;
}

int hybrid_tiles(const lc_kargs *k, const hybrid &a, const carried &s) { return shapes[shape_of(a)].run(k, a, s); }
