/* hybrid_forward_pairs.cu: hybrid attention forward in bf16 for GPUs with much shared memory (Hopper and later), with or without a carried
 * state. A block of three warpgroups walks the 64-token chunks of one segment of one head, two at a time, a group each; the third group
 * loads tiles and keeps the state. Where there are too few heads to fill the machine, a head is cut into segments, and a first kernel sums
 * what the keys of each segment but the last add to the state. What a chunk is made of stands in hybrid_forward_tiles.cu, which does the
 * same with less shared memory.
 *
 * Chunk c (window 64): its group, A or B by turns, takes features of the keys of block c - 1, of its queries, and its scores; when it has
 * its results of the state before block c - 1, the loader, which has added that block by then, lays the next state ready for the other
 * group. So A and B are half a chunk apart, and one's products run beside the other's exponentials. With window 0 the keys are block c's.
 * Chunks beyond the segment (an odd one's last, and one more where keys of the last block enter a carried state) are done with what lies
 * there and dropped, but for the features of keys. */
#include "hybrid_pairs.cuh"

enum { BLOCKS_WANTED = 132, MOST_SEGMENTS = 32 };
/* The targets that may have as much shared memory. */
#if defined(LC_EMULATED) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define PAIRS_HERE 1
#else
#define PAIRS_HERE 0
#endif
enum { PAIRS_SHARED = 200 << 10 }; /* what those have at least, and others do not */
/* Barriers, two of each: of A's and of B's. L: the loader. */
enum {
    QK_LOADED = 1,    /* L tells: keys (what is of queries a group loads itself) */
    V_LOADED = 3,     /* L tells: values, and ready features of keys */
    QK_FREE = 5,      /* tells L: scores are done */
    PHI = 7,          /* tells L: features of keys are there */
    STATE_READ = 9,   /* tells L: results are done, with state and values */
    STATE_READY = 11, /* L tells */
    AMONG_L = 13,     /* one */
    AMONG = 14
};

template <int D, int F, int IN> struct pair_tiles {
    typedef tile_sizes<D, F, IN> Z;
        typedef group_state<D, F> S;
    enum { WEIGHTS = Z::W > Z::PHI ? Z::W : Z::PHI, OURS = 2 * Z::PHI + D * F, STAGE = 2 * S::MANY * 64 * D, SUMS = OURS > STAGE ? OURS : STAGE };
    enum { ONES = 8 * Z::X + 2 * WEIGHTS + SUMS, HALVES = ONES + 512 + 2 * S::MANY * 64, BYTES = 2 * HALVES + 256 };
    bf16 *base;
    __device__ __forceinline__ bf16 *queries(int group) const { return base + group * Z::X; }
    __device__ __forceinline__ bf16 *keys(int c) const { return base + (2 + (unsigned)(c + 3) % 3) * Z::X; }
    __device__ __forceinline__ bf16 *values(int c) const { return base + (5 + (unsigned)(c + 3) % 3) * Z::X; }
    __device__ __forceinline__ bf16 *weights(int which) const { return base + 8 * Z::X + which * WEIGHTS; } /* of queries, keys; or ready features of queries */
    __device__ __forceinline__ bf16 *phi(int group) const { return base + 8 * Z::X + 2 * WEIGHTS + group * Z::PHI; }
    __device__ __forceinline__ bf16 *state() const { return base + 8 * Z::X + 2 * WEIGHTS + 2 * Z::PHI; }
    __device__ __forceinline__ float *stage() const { return (float *)phi(0); } /* a part of the state on its way, S and z */
    __device__ __forceinline__ float *stage_z() const { return (float *)z(); }
    __device__ __forceinline__ bf16 *ones() const { return base + ONES; } /* [8][64] */
    __device__ __forceinline__ bf16 *z() const { return ones() + 512; }
    /* What is seldom needed, so that registers are left for what is: of keys, of values; the block's segment. */
    __device__ __forceinline__ row_source *sources() const { return (row_source *)(base + HALVES); }
    __device__ __forceinline__ segment *own() const { return (segment *)(sources() + 2); }
};
static_assert(2 * sizeof(row_source) + sizeof(segment) <= 256, "room for the rest");

/* Rows before the first token: 0, with a denominator that harms nobody. By 256 threads. */
__device__ __forceinline__ void put_padding(const hybrid &a, const segment &g, const hybrid_out &o) {
    if (g.s) return;
    for (int i = threadIdx.x; i < g.at.start * (a.d / 2); i += 256)
        *(uint32_t *)(o.y.row<bf16>(g.b, g.h, i / (a.d / 2)) + i % (a.d / 2) * 2) = 0;
    for (int i = threadIdx.x; i < g.at.start; i += 256) {
        if (o.c.p) *o.c.row<float>(g.b, g.h, i) = 0;
        if (o.at.p) *o.at.row<int>(g.b, g.h, i) = i;
        if (o.z.p) *o.z.row<float>(g.b, g.h, i) = 1;
    }
}

/* ---- a chunk: groups A and B ------------------------------------------------------------------------------------------- */
/* Where a key of the block is not to be looked at: -inf. old: block c - 1 (sliding: keys after the query's place), else c (keys before it). */
template <bool OLD> __device__ __forceinline__ void mask_block(float (&x)[8][4]) {
    int least = group_row() - (threadIdx.x & 3) * 2; /* key - row, less the lane's */
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int key = 8 * n + (e & 1) - 8 * (e >> 1);
            if (OLD ? key <= least : key > least) x[n][e] = -INFINITY;
        }
}

template <int D, int F, int IN, bool USUAL> struct pair_worker {
    typedef features<F, IN> M;
    const hybrid &a;
    const hybrid_out &o;
    const segment &g;
    pair_tiles<D, F, IN> t;
    int group;
    float lift, lambda, bias_q, bias_k; /* lift: log2(gamma) */

    __device__ __forceinline__ void load_queries(int c) {
        if (c < g.c1) load_tile<D>(t.queries(group), query_source(a, g, a.q), c * CHUNK);
        if (c < g.c1 && ready()) load_tile<F>(t.weights(group), query_source(a, g, a.mq), c * CHUNK);
        copy_commit();
    }

    __device__ __forceinline__ bool windowed() const { return USUAL || a.window; }
    __device__ __forceinline__ bool terrace() const { return USUAL || a.kind == KIND_TERRACE; }
    __device__ __forceinline__ bool ready() const { return !USUAL && a.map == MAP_NONE; }
    __device__ __forceinline__ int map() const { return USUAL ? (int)MAP_SOFTMAX_DIM : a.map; }

    /* Features of the block of keys to their tile, of the queries to fq, scores of blocks c - 1 and c. */
    __device__ __forceinline__ void inputs(int c, uint32_t (&fq)[F / 16][4], float (&before)[8][4], float (&here)[8][4]) {
        int block = windowed() ? c - 1 : c;
        float in_k[IN / 8][4], in_q[IN / 8][4];
        const bf16 *q = t.queries(group), *k = t.keys(block);
        group_begin(); /* whether wanted or not: products behind a branch would not run side by side with other work */
        group_product_new<IN, D, CHUNK, ALONG_K, D, ACROSS_K>(in_k, k, 0, t.weights(1), 0);
        group_commit();
        group_product_new<IN, D, CHUNK, ALONG_K, D, ACROSS_K>(in_q, q, 0, t.weights(0), 0);
        group_commit();
        group_wait<1>();
        group_hold(in_k);
        if (!ready()) {
            uint32_t fk[F / 16][4];
            if (!USUAL && bias_k != 0) M::add(in_k, bias_k);
            if (!USUAL && IN == D && a.skip) M::add_rows(in_k, k);
            M::map(a, map(), in_k, 1, fk);
            M::keep_rows(fk, g.at.k_min - block * CHUNK, g.absorb_end - block * CHUNK);
            M::put(t.phi(group), fk);
        }
        shared_fence();
        groups_arrive(PHI + group, 2);
        group_begin();
        group_product_new<64, D, CHUNK, ALONG_K, CHUNK, ALONG_K>(before, q, 0, t.keys(c - 1), 0);
        group_product_new<64, D, CHUNK, ALONG_K, CHUNK, ALONG_K>(here, q, 0, t.keys(c), 0);
        group_commit();
        group_wait<1>();
        group_hold(in_q);
        if (!ready()) {
            if (!USUAL && bias_q != 0) M::add(in_q, bias_q);
            if (!USUAL && IN == D && a.skip) M::add_rows(in_q, q);
            M::map(a, map(), in_q, lambda, fq);
        } else M::read(t.weights(group), lambda, fq);
        group_wait<0>();
        group_hold(before);
        group_hold(here);
        groups_arrive(QK_FREE + group, 2);
        groups_meet(AMONG + group, 1);
        load_queries(c + 2);
    }

    /* Scores to window weights gamma exp(score - maximum), and their sums of the lane's; keeps the maximum and its first key. */
    __device__ __forceinline__ void window_weights(int c, float (&before)[8][4], float (&here)[8][4], float (&sum)[2]) {
        mask_block<false>(here);
        bool prev = c * CHUNK > g.at.k_min;
        if (!prev) set_all(before, -INFINITY);
        else if (!terrace()) mask_block<true>(before);
        float by = a.scale32 * LC_LOG2E, top[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float m[4];
#pragma unroll
            for (int i = 0; i < 4; i++) m[i] = fmaxf(here[i / 2][2 * half + i % 2], before[i / 2][2 * half + i % 2]);
#pragma unroll
            for (int n = 2; n < 8; n++) {
                int i = n % 2 * 2;
                m[i] = fmaxf(m[i], here[n][2 * half]), m[i + 1] = fmaxf(m[i + 1], here[n][2 * half + 1]);
                m[i] = fmaxf(m[i], before[n][2 * half]), m[i + 1] = fmaxf(m[i + 1], before[n][2 * half + 1]);
            }
            top[half] = fmaxf(fmaxf(m[0], m[1]), fmaxf(m[2], m[3]));
        }
        top[0] = quad_max(top[0]), top[1] = quad_max(top[1]);
        if (o.at.p || o.c.p) keep(c, before, here, top);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float shift = lift - top[half] * by, part[4] = {0, 0, 0, 0};
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    part[e] += here[n][2 * half + e] = exp2_fast(fmaf(here[n][2 * half + e], by, shift));
                    part[2 + e] += before[n][2 * half + e] = exp2_fast(fmaf(before[n][2 * half + e], by, shift));
                }
            sum[half] = (part[0] + part[1]) + (part[2] + part[3]);
        }
    }
    /* The maximum and its first key. */
    __device__ __forceinline__ void keep(int c, const float (&before)[8][4], const float (&here)[8][4], const float (&top)[2]) {
        int q2 = (threadIdx.x & 3) * 2;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int at = 2 * CHUNK, p = c * CHUNK + group_row() + 8 * half, i = p + g.at.shift;
#pragma unroll
            for (int n = 15; n >= 0; n--) /* a number's index, less the lane's part of it */
#pragma unroll
                for (int e = 1; e >= 0; e--) {
                    float x = n < 8 ? before[n & 7][2 * half + e] : here[n & 7][2 * half + e];
                    if (x == top[half]) at = 8 * n + e;
                }
            at += q2;
            at = min(at, __shfl_xor_sync(0xffffffffu, at, 1));
            at = min(at, __shfl_xor_sync(0xffffffffu, at, 2));
            if (c >= g.c1 || p < g.at.p0 || p >= g.at.p1 || q2) continue;
            if (o.at.p) *o.at.row<int>(g.b, g.h, i) = min((c - 1) * CHUNK + at, p) + g.at.shift;
            if (o.c.p) *o.c.row<float>(g.b, g.h, i) = top[half] * a.scale32;
        }
    }
    __device__ __forceinline__ void no_window(int c) {
        for (int half = 0; half < 2; half++) {
            int p = c * CHUNK + group_row() + 8 * half, i = p + g.at.shift;
            if (c >= g.c1 || p < g.at.p0 || p >= g.at.p1 || threadIdx.x % 4) continue;
            if (o.c.p) *o.c.row<float>(g.b, g.h, i) = 0;
            if (o.at.p) *o.at.row<int>(g.b, g.h, i) = i;
        }
    }
    /* x += where a key of the features' block is not after the query('s place), the linear weight. */
    __device__ __forceinline__ void linear_weights(const uint32_t (&fq)[F / 16][4], float (&x)[8][4], float (&sum)[2]) {
        float u[8][4];
        set_all(u, 0);
        groups_meet(AMONG + group, 1); /* the features are there */
        group_begin();
        group_product<64, F, CHUNK, ALONG_K>(u, fq, t.phi(group), 0);
        group_end();
        group_hold(u);
        int least = group_row() - (threadIdx.x & 3) * 2;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (8 * n + (e & 1) - 8 * (e >> 1) <= least) x[n][e] += u[n][e], sum[e >> 1] += u[n][e];
    }

    /* y [64][D] over the denominators den. */
    __device__ __forceinline__ void put_results(int c, float (&y)[D / 8][4], const float (&den)[2]) {
        int l4 = threadIdx.x & 3;
        bf16 *base = o.y.row<bf16>(g.b, g.h, c * CHUNK + g.at.shift);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = group_row() + 8 * half, p = c * CHUNK + row;
            float sum = den[half] + (windowed() ? 0 : a.eps32), by = inverse(sum);
            bool there = c < g.c1 && p >= g.at.p0 && p < g.at.p1;
            bf16 *to = base + row * (int)o.y.s[2] + l4 * 8;
            if (o.z.p && there && !l4) *o.z.row<float>(g.b, g.h, p + g.at.shift) = sum;
#pragma unroll
            for (int n = 0; n < D / 8; n += 4) {
                uint32_t v[4];
#pragma unroll
                for (int i = 0; i < 4; i++) v[i] = pack2<bf16>(y[n + i][2 * half] * by, y[n + i][2 * half + 1] * by);
                quad_transpose(v);
                if (there) *(uint4 *)(to + 8 * n) = make_uint4(v[0], v[1], v[2], v[3]);
            }
        }
    }

    __device__ __forceinline__ void chunk(int c) {
        uint32_t fq[F / 16][4], p_before[4][4], p_here[4][4];
        float sum[2] = {0, 0};
        copy_wait<0>(); /* its queries */
        shared_fence();
        groups_meet(QK_LOADED + group, 2);
        {
            float before[8][4], here[8][4];
            inputs(c, fq, before, here);
            if (windowed()) window_weights(c, before, here, sum);
            else {
                set_all(here, 0), set_all(before, 0);
                no_window(c);
            }
            groups_meet(V_LOADED + group, 2); /* and ready features of keys */
            if (!windowed()) linear_weights(fq, here, sum);
            else if (!terrace() && c * CHUNK > g.at.k_min) linear_weights(fq, before, sum);
            as_fragments<64>(p_before, before);
            as_fragments<64>(p_here, here);
        }
        float y[D / 8][4];
        group_begin();
        group_product_new<D, CHUNK, CHUNK, ACROSS_K>(y, p_here, t.values(c), 0);
        if (windowed()) group_product<D, CHUNK, CHUNK, ACROSS_K>(y, p_before, t.values(c - 1), 0);
        group_commit();
        groups_meet(STATE_READY + group, 2);
        group_product<D, F, F, ACROSS_K>(y, fq, t.state(), 0);
        group_commit();
        const bf16 *z = t.z() + ((threadIdx.x & 31) / 4 & 1) * F + (threadIdx.x & 3) * 2; /* even columns: z's high part, odd ones: the rest */
        uint32_t zf[F / 16][2];
#pragma unroll
        for (int j = 0; j < F / 16; j++) zf[j][0] = *(const uint32_t *)(z + 16 * j), zf[j][1] = *(const uint32_t *)(z + 16 * j + 8);
        group_wait<0>();
        group_hold(y);
        groups_arrive(STATE_READ + group, 2);
        float lin[2][4] = {};
#pragma unroll
        for (int j = 0; j < F / 16; j++) mma16<bf16>(lin[j % 2], fq[j], zf[j][0], zf[j][1]);
        sum[0] = quad_sum(sum[0]) + ((lin[0][0] + lin[0][1]) + (lin[1][0] + lin[1][1]));
        sum[1] = quad_sum(sum[1]) + ((lin[0][2] + lin[0][3]) + (lin[1][2] + lin[1][3]));
        put_results(c, y, sum);
    }
};

/* ---- the loader -------------------------------------------------------------------------------------------------------- */
template <int D, int F, int IN, bool USUAL> struct pair_loader {
    const hybrid &a;
    const carried &s;
    const segment &g;
    pair_tiles<D, F, IN> t;

    __device__ __forceinline__ void load_keys(int c) {
        if (c < g.c1) load_tile<D>(t.keys(c), t.sources()[0], c * CHUNK);
        copy_commit();
    }
    /* And ready features of the keys that chunk c's group would make. */
    __device__ __forceinline__ void load_values(int c, int group) {
        if (c < g.c1) load_tile<D>(t.values(c), t.sources()[1], c * CHUNK);
        int block = USUAL || a.window ? c - 1 : c;
        if (!USUAL && a.map == MAP_NONE && block < g.c1) {
            row_source f = key_source(a, s, g, 2);
            f.to = min(f.to, g.absorb_end);
            load_tile<F>(t.phi(group), f, block * CHUNK);
        }
        copy_commit();
    }
    /* All that the first two chunks want but the state. Block c0 - 1: zeros where there is none. */
    __device__ __forceinline__ void begin() {
        int t0 = threadIdx.x & 127;
        if (!t0) t.sources()[0] = key_source(a, s, g, 0), t.sources()[1] = key_source(a, s, g, 1); /* the registers are the state's */
        for (int i = t0; i < 256; i += 128) ((uint32_t *)t.ones())[i] = pack2<bf16>(1, 1);
        groups_meet(AMONG_L, 1);
        load_tile<D>(t.keys(g.c0 - 1), t.sources()[0], (g.c0 - 1) * CHUNK);
        load_keys(g.c0);
        load_keys(g.c0 + 1);
    }
    __device__ __forceinline__ void begin_values() {
        load_tile<D>(t.values(g.c0 - 1), t.sources()[1], (g.c0 - 1) * CHUNK);
        load_values(g.c0, 0);
        load_values(g.c0 + 1, 1);
    }
    __device__ __forceinline__ void tell(int barrier) {
        shared_fence();
        groups_arrive(barrier, 2);
    }

    /* Chunks up to end - 1, an even number of them. */
    __device__ __forceinline__ void walk(group_state<D, F> &st, int end) {
        begin_values();
        int back = USUAL || a.window ? 1 : 0;
        copy_wait<2>();
        tell(QK_LOADED), tell(QK_LOADED + 1);
        st.put(t.state(), t.z());
        tell(STATE_READY);
        copy_wait<0>();
        tell(V_LOADED);
#pragma unroll 1
        for (int c = g.c0; c < end; c++) {
            int group = c - g.c0 & 1;
            groups_meet(PHI + group, 2);
            if (c - back < g.c1) st.absorb(t.phi(group), t.values(c - back), t.ones());
            groups_meet(QK_FREE + group, 2);
            copy_wait<0>();
            if (c + 1 < end) tell(V_LOADED + (group ^ 1));
            load_keys(c + 2);
            groups_meet(STATE_READ + group, 2);
            if (c + 1 < end) {
                st.put(t.state(), t.z());
                tell(STATE_READY + (group ^ 1));
            }
            load_values(c + 2, group);
            copy_wait<1>();
            if (c + 2 < end) tell(QK_LOADED + group);
        }
    }
};

/* ---- the kernels ------------------------------------------------------------------------------------------------------- */
/* The state before the segment for the loader, made by A and B, which have registers for it at the beginning: the carried one, own or else
 * part `carried` (-1: none), and parts 0 .. to - 1. */
template <int D, int F, int IN>
__device__ __forceinline__ void stage_parts(const pair_tiles<D, F, IN> &t, const float *own, const float *own_z, const float *parts, int carried, int to) {
    typedef group_state<D, F> S;
    constexpr int ALL = S::MANY * 64 * D / 1024, EACH = ALL < 8 ? ALL : 8;
    wait_for_previous(); /* the sum kernel */
#pragma unroll 1
    for (int begin = 0; begin < ALL; begin += EACH) {
        float4 v[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) v[i] = own ? S::piece(own, (begin + i) * 256 + threadIdx.x) : make_float4(0, 0, 0, 0);
#pragma unroll 2
        for (int n = carried < 0 ? 0 : -1; n < to; n++) {
            const float *part = parts + (int64_t)(n < 0 ? carried : n) * S::PART + (begin * 256 + threadIdx.x) * 4;
            float4 u[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++) u[i] = *(const float4 *)(part + i * 1024);
#pragma unroll
            for (int i = 0; i < EACH; i++) v[i].x += u[i].x, v[i].y += u[i].y, v[i].z += u[i].z, v[i].w += u[i].w;
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) *(float4 *)(t.stage() + ((begin + i) * 256 + threadIdx.x) * 4) = v[i];
    }
    float z = own && threadIdx.x < F ? own_z[threadIdx.x] : 0;
    if (threadIdx.x < S::MANY * 64)
        for (int n = carried < 0 ? 0 : -1; n < to; n++) z += parts[(int64_t)(n < 0 ? carried : n) * S::PART + S::MANY * 64 * D + threadIdx.x];
    if (threadIdx.x < S::MANY * 64) t.stage_z()[threadIdx.x] = z;
    groups_arrive(QK_FREE, 3); /* nobody is at its own use yet */
}

/* Grid [b][segments][h]. parts [b * h][segments][PART]: what the sum kernel left. USUAL: Hedgehog's map of the inputs, terrace. */
template <int D, int F, int IN, bool USUAL>
__global__ void __launch_bounds__(PAIR_THREADS, 1) pairs_kernel(hybrid a, carried c, hybrid_out o, int segments, const float *parts) {
#if PAIRS_HERE
    LC_SHARED(shared);
    int rest = blockIdx.x / a.h, h = blockIdx.x % a.h, group = __shfl_sync(0xffffffffu, (int)threadIdx.x / 128, 0);
    pair_tiles<D, F, IN> t = {(bf16 *)shared};
    if (threadIdx.x == 0) *t.own() = segment_at(a, c, rest / segments, rest % segments, h, segments, h == 0 && rest % segments == 0);
    __syncthreads();
    const segment &g = *t.own();
    bool last = c.state && g.s == segments - 1;
    int end = g.c1; /* one more where keys of the last block enter the state */
    if (last && a.window && g.absorb_end > (g.c1 - 1) * CHUNK) end++;
    end += end - g.c0 & 1;
    float *own = (float *)c.state + (g.at.slot * a.h + g.h) * (F * D), *own_z = (float *)c.zsum + (g.at.slot * a.h + g.h) * F;
    bool begun = c.state && g.at.k_min > 0; /* then the state is more than the parts; the last segment's block writes it, so the others have a copy */
    parts += (int64_t)(g.b * a.h + g.h) * segments * group_state<D, F>::PART;
    if (group < LOADER) {
        float gamma = hybrid_gamma<float>(a, g.h);
        pair_worker<D, F, IN, USUAL> w = {a, o, g, t, group, log2f(gamma), hybrid_lambda(a, gamma), bias_of<float>(a.bq, a.bq_dtype, g.h),
                                          bias_of<float>(a.bk, a.bk_dtype, g.h)};
        if (g.c0 >= g.c1) {
            put_padding(a, g, o);
            return;
        }
        if (a.map != MAP_NONE) {
            load_map<D, IN, 256>(t.weights(1), a.mk, h, threadIdx.x);
            load_map<D, IN, 256>(t.weights(0), a.mq, h, threadIdx.x);
        }
        w.load_queries(g.c0 + group);
        if (begun || g.s) stage_parts(t, begun && segments == 1 ? own : NULL, own_z, parts, begun && segments > 1 ? segments - 1 : -1, g.s);
        put_padding(a, g, o);
        copy_wait<0>();
        shared_fence();
        groups_meet(AMONG, 2); /* the maps' weights are there */
#pragma unroll 1
        for (int i = g.c0 + group; i < end; i += 2) w.chunk(i);
        return;
    }
    if (g.c0 >= g.c1) return;
    pair_loader<D, F, IN, USUAL> w = {a, c, g, t};
    w.begin();
    group_state<D, F> st;
    st.clear();
    if (begun || g.s) {
        groups_meet(QK_FREE, 3);
        st.add_staged(t.stage(), t.stage_z());
        groups_meet(AMONG_L, 1);
    }
    w.walk(st, end);
    if (last) st.save(own, own_z);
#endif
}

template <int D, int F, int IN> struct pair_sum_tiles {
    typedef tile_sizes<D, F, IN> Z;
    enum { BYTES = 2 * (8 * Z::X + 4 * Z::PHI + Z::W + 512) };
    bf16 *base; /* place: 0 .. 3, those of two rounds */
    __device__ __forceinline__ bf16 *keys(int place) const { return base + place * Z::X; }
    __device__ __forceinline__ bf16 *values(int place) const { return base + (4 + place) * Z::X; }
    __device__ __forceinline__ bf16 *phi(int place) const { return base + 8 * Z::X + place * Z::PHI; }
    __device__ __forceinline__ bf16 *weights() const { return base + 8 * Z::X + 4 * Z::PHI; }
    __device__ __forceinline__ bf16 *ones() const { return weights() + Z::W; } /* [8][64] */
};
enum { SUM_LOADED = 1, SUM_PHI = 3, SUM_AMONG_L = 5, SUM_AMONG = 6 }; /* the first two: one for each of two rounds */

/* Grid [b][segments - 1][h]: part s of a head = sum over the keys that the segment adds to the state, of phi_k^T v and of phi_k. Part
 * segments - 1 is the carried state. */
template <int D, int F, int IN> __global__ void __launch_bounds__(PAIR_THREADS, 1) pairs_sum_kernel(hybrid a, carried c, int segments, float *parts) {
#if PAIRS_HERE
    typedef group_state<D, F> S;
    typedef features<F, IN> M;
    LC_SHARED(shared);
    pair_sum_tiles<D, F, IN> t = {(bf16 *)shared};
    int h = blockIdx.x % a.h, rest = blockIdx.x / a.h, s = rest % (segments - 1), b = rest / (segments - 1);
    int group = __shfl_sync(0xffffffffu, (int)threadIdx.x / 128, 0);
    next_may_start();
    segment g = segment_at(a, c, b, s, h, segments, false);
    int shift = a.window ? 1 : 0, first = max(g.c0 - shift, g.at.k_min / CHUNK), end = g.c1 - shift;
    int to = min(g.absorb_end, end * CHUNK); /* keys from here on count as zeros */
    if (group < LOADER) {
        if (c.state && !s && g.at.k_min > 0) { /* a copy of the carried state, as a part */
            const float *own = (const float *)c.state + (g.at.slot * a.h + h) * (F * D), *own_z = (const float *)c.zsum + (g.at.slot * a.h + h) * F;
            float *part = parts + ((int64_t)(b * a.h + h) * segments + segments - 1) * S::PART;
            for (int i = threadIdx.x; i < S::MANY * 16 * D; i += 256) *(float4 *)(part + 4 * i) = S::piece(own, i);
            if (threadIdx.x < S::MANY * 64) part[S::MANY * 64 * D + threadIdx.x] = threadIdx.x < F ? own_z[threadIdx.x] : 0;
        }
        if (a.map == MAP_NONE) return;
        float bias = bias_of<float>(a.bk, a.bk_dtype, h);
        load_map<D, IN, 256>(t.weights(), a.mk, h, threadIdx.x);
        copy_commit();
        copy_wait<0>();
        shared_fence();
        groups_meet(SUM_AMONG, 2);
#pragma unroll 1
        for (int i = first; i < end; i += 2) {
            int place = (i - first & 2) + group, round = place / 2, block = i + group;
            float in[IN / 8][4];
            uint32_t f[F / 16][4];
            groups_meet(SUM_LOADED + round, 3);
            group_begin();
            group_product_new<IN, D, CHUNK, ALONG_K, D, ACROSS_K>(in, t.keys(place), 0, t.weights(), 0);
            group_end();
            group_hold(in);
            if (bias != 0) M::add(in, bias);
            if (IN == D && a.skip) M::add_rows(in, t.keys(place));
            M::map(a, a.map, in, 1, f);
            M::keep_rows(f, g.at.k_min - block * CHUNK, to - block * CHUNK);
            M::put(t.phi(place), f);
            shared_fence();
            groups_arrive(SUM_PHI + round, 3);
        }
        return;
    }
    row_source ks = key_source(a, c, g, 0), vs = key_source(a, c, g, 1), fs = key_source(a, c, g, 2);
    ks.to = min(ks.to, to), vs.to = min(vs.to, to), fs.to = min(fs.to, to);
    auto fetch = [&](int i) { /* two blocks from i on; zeros where there is none */
        int place = i - first & 2;
#pragma unroll 1
        for (int n = 0; n < 2 && i < end; n++) {
            if (a.map != MAP_NONE) load_tile<D>(t.keys(place + n), ks, (i + n) * CHUNK);
            else load_tile<F>(t.phi(place + n), fs, (i + n) * CHUNK);
        }
#pragma unroll 1
        for (int n = 0; n < 2 && i < end; n++) load_tile<D>(t.values(place + n), vs, (i + n) * CHUNK);
        copy_commit();
    };
    fetch(first);
    fetch(first + 2);
    for (int i = threadIdx.x & 127; i < 256; i += 128) ((uint32_t *)t.ones())[i] = pack2<bf16>(1, 1);
    S st;
    st.clear();
    auto loaded = [&](int i) {
        shared_fence();
        if (a.map != MAP_NONE && i < end) groups_arrive(SUM_LOADED + (i - first & 2) / 2, 3);
    };
    copy_wait<1>();
    loaded(first);
#pragma unroll 1
    for (int i = first; i < end; i += 2) {
        int place = i - first & 2;
        copy_wait<0>();
        loaded(i + 2);
        groups_meet(SUM_AMONG_L, 1);
        if (a.map != MAP_NONE) groups_meet(SUM_PHI + place / 2, 3);
        st.absorb(t.phi(place), t.values(place), t.ones());
        st.absorb(t.phi(place + 1), t.values(place + 1), t.ones());
        groups_meet(SUM_AMONG_L, 1); /* before the tiles change */
        fetch(i + 4);
    }
    st.save_part(parts + ((int64_t)(b * a.h + h) * segments + s) * S::PART);
#endif
}

/* ---- the host's side -------------------------------------------------------------------------------------------------- */
/* Segments a head: the least that the busiest of BLOCKS_WANTED multiprocessors has to do, counted in thousands of cycles: a round of two
 * chunks takes about 6 and its sums 2, a block's begin 4 (3), a part that is added 1. From the shapes alone, so that results are the same
 * anywhere. */
static int segments_of(const hybrid &a) {
    int chunks = (a.t + CHUNK - 1) / CHUNK, best = 1;
    int64_t heads = (int64_t)a.b * a.h, least = INT64_MAX;
    for (int s = 1; s <= MOST_SEGMENTS && 2 * s <= chunks + 1; s++) {
        int64_t rounds = ceil_div(ceil_div(chunks, s), 2), cost = ceil_div(heads * s, BLOCKS_WANTED) * (6 * rounds + 4);
        if (s > 1) cost += ceil_div(heads * (s - 1), BLOCKS_WANTED) * (2 * rounds + 3) + s;
        if (cost < least) least = cost, best = s;
    }
    return best;
}

template <int D, int F, int IN> static int run(const lc_kargs *k, const hybrid &a, const carried &s) {
    int segments = segments_of(a), heads = a.b * a.h;
    float *parts = (float *)k->work;
    typedef pair_tiles<D, F, IN> T;
    typedef pair_sum_tiles<D, F, IN> ST;
    if (segments > 1) {
        if (allow_shared(pairs_sum_kernel<D, F, IN>, ST::BYTES)) return LC_K_DEVICE;
        LC_LAUNCH((pairs_sum_kernel<D, F, IN>), heads * (segments - 1), PAIR_THREADS, ST::BYTES, a, s, segments, parts);
    }
    auto kernel = pairs_kernel<D, F, IN, false>;
    if constexpr (F == 2 * IN)
        if (a.map == MAP_SOFTMAX_DIM && a.window && a.kind == KIND_TERRACE && !a.skip && !a.bq && !a.bk) kernel = pairs_kernel<D, F, IN, true>;
    if (allow_shared(kernel, T::BYTES)) return LC_K_DEVICE;
    launch_early(segments > 1, kernel, heads * segments, PAIR_THREADS, T::BYTES, a, s, hybrid_results(k), segments, (const float *)parts);
    return s.state && a.window ? hybrid_remember(k, a, s) : LC_K_OK;
}

/* The shapes that there are kernels for. */
#define SHAPE(D, F, IN) {D, F, IN, pair_tiles<D, F, IN>::BYTES, group_state<D, F>::PART, run<D, F, IN>}
static const struct {
    int d, F, in, shared, part;
    int (*run)(const lc_kargs *k, const hybrid &a, const carried &s);
} shapes[] = {
    SHAPE(128, 128, 64), SHAPE(128, 64, 32), SHAPE(128, 64, 64), SHAPE(128, 32, 32),
    SHAPE(64, 128, 64),  SHAPE(64, 64, 32),  SHAPE(64, 64, 64),  SHAPE(64, 32, 32),
};
static int shape_of(const hybrid &a) {
    for (int i = 0; i < (int)(sizeof shapes / sizeof *shapes); i++)
        if (shapes[i].d == a.d && shapes[i].F == a.F && (a.map == MAP_NONE || shapes[i].in == a.f)) return i;
    return -1;
}

bool hybrid_pairs_fit(const lc_kargs *k, const hybrid &a) {
    int shape = shape_of(a);
    if (shape < 0 || lc_cuda_select(k->device) || lc_cuda_now->shared_max < PAIRS_SHARED || (size_t)shapes[shape].shared > lc_cuda_now->shared_max) return false;
    return hybrid_tiles_take(k, a);
}

size_t hybrid_pairs_work(const hybrid &a) {
    int segments = segments_of(a);
    return segments > 1 ? (size_t)a.b * a.h * segments * shapes[shape_of(a)].part * sizeof(float) : 0;
}

int hybrid_pairs(const lc_kargs *k, const hybrid &a, const carried &s) { return shapes[shape_of(a)].run(k, a, s); }
