/* hybrid_backward_keys.cu: the key side of hybrid attention's gradient on tensor cores: a block walks backward over a segment of
 * chunks with R in registers and makes, for one query head, dk, dv and its share of the key map's gradient. The mirror image of the
 * query side: keys of chunk c are seen linearly by the chunks after c + lag and, under a triangle, by rows of chunk c + lag. */
#include "hybrid_backward_tile.cuh"

/* Values of the queries of two chunks, slot chunk & 1, in shared memory; c: the maximum less the logarithm of gamma / z; at: the
 * key at the maximum, from the first token on. */
struct near_rows {
    float rz[2][64], delta[2][64], c[2][64], x[2][64], sum[128], more[128]; /* P; what the next one gets */
    int at[2][64];
};

template <int D, int BF, int FW, bool TRI> struct key_block {
    typedef layout<D, BF, FW> L;
    static constexpr int HALF = BF / 2, SM = BF / 64;
    static constexpr bool MAPS = FW > 0;
    typedef held<BF, D> states;
    typedef held<D, FW ? FW : 32> maps_sum;
    const gradients &o;
    const fast &p;
    chunk_range s;
    bf16 *k, *v, *ring, *state, *weights_q, *weights_k, *features_q, *features_k, *ds, *dpre;
    near_rows *rows;
    int strip, hf, m; /* of the warp: keys m .. m + 15, half hf */
    float gamma, lambda, bias_q, bias_k;

    __device__ __forceinline__ key_block(const gradients &o, const fast &p, char *memory) : o(o), p(p),
        s(o.a, p.segments, blockIdx.x / p.segments, blockIdx.x % p.segments) {
        bf16 *at = (bf16 *)memory;
        k = at, at += L::tile;
        v = at, at += L::tile;
        ring = at, at += 4 * L::tile;
        state = at, at += L::state;
        weights_q = at, at += L::weights;
        weights_k = at, at += L::weights;
        features_q = at, at += L::wide; /* times lambda / z; then the weights of the window */
        features_k = at, at += L::wide;
        ds = at, at += L::wide;
        dpre = at, at += L::dp;
        rows = (near_rows *)at;
        int w = warp_number();
        strip = w & 3, hf = w >> 2, m = 16 * strip;
        gamma = hybrid_gamma<float>(o.a, s.h), lambda = hybrid_lambda<float>(o.a, gamma);
        bias_q = bias_of<float>(o.a.bq, o.a.bq_dtype, s.h), bias_k = bias_of<float>(o.a.bk, o.a.bk_dtype, s.h);
    }
    __device__ __forceinline__ bf16 *queries(int c) const { return ring + (c & 1) * 2 * L::tile; }
    __device__ __forceinline__ bf16 *givens(int c) const { return queries(c) + L::tile; }
    __device__ __forceinline__ void load_own(int c) {
        if (c >= s.c0) load_tile<D>(k, o.a.k, s, s.hk, c), load_tile<D>(v, o.a.v, s, s.hk, c);
        copy_commit();
    }
    __device__ __forceinline__ void load_ring(int c) {
        if (c >= s.c0 && c < s.n) load_tile<D>(queries(c), o.a.q, s, s.h, c), load_tile<D>(givens(c), o.g, s, s.h, c);
        copy_commit();
    }

    __device__ __forceinline__ float row_rz(int c, int row) const {
        return holds(s, c, row) ? 1 / *o.z.row<float>(s.b, s.h, s.s0 + c * 64 + row) : 0.f;
    }
    /* Row values of chunk c, fetched before they are needed: four times 64 threads have one each. */
    struct fetched {
        float value;
        int at;
    };
    __device__ __forceinline__ void fetch(int c, fetched &f) const {
        int row = threadIdx.x & 63, what = threadIdx.x >> 6, i = s.s0 + c * 64 + row;
        f.value = what == 3 ? INFINITY : 0, f.at = -1;
        if (!holds(s, c, row)) return;
        if (what == 0) f.value = *o.z.row<float>(s.b, s.h, i);
        if (what == 1) f.value = p.delta[s.head * o.a.t + i];
        if (what == 2) f.value = p.x[s.head * o.a.t + i];
        if (what != 3 || !o.a.window) return;
        f.value = *o.c.row<float>(s.b, s.h, i) * LC_LOG2E - log2f(gamma / *o.z.row<float>(s.b, s.h, i));
        f.at = *o.argmax.row<int32_t>(s.b, s.h, i) - s.s0;
    }
    __device__ __forceinline__ void put_rows_of(int c, const fetched &f) {
        int row = threadIdx.x & 63, what = threadIdx.x >> 6, slot = c & 1;
        if (what == 0) rows->rz[slot][row] = f.value != 0 ? 1 / f.value : 0.f;
        if (what == 1) rows->delta[slot][row] = f.value;
        if (what == 2) rows->x[slot][row] = f.value;
        if (what == 3) rows->c[slot][row] = f.value, rows->at[slot][row] = f.at;
    }

    /* The features of chunk c's keys into v (not clamped) and into their tile; of chunk far's queries, times lambda / z, if they are
     * `used`, into theirs. */
    __device__ __forceinline__ void both_features(int c, int far, bool used, float (&v)[BF / 16][4]) {
        float u[BF / 16][4], by[2];
        const float one[2] = {1, 1};
        int r0 = m + ((threadIdx.x & 31) >> 2);
        if constexpr (!FW) {
            ready_features<BF>(o.a, s, 0, far, hf, m, u);
            for (int i = 0; i < 2; i++) by[i] = lambda * (p.lag ? rows->rz[far & 1][r0 + 8 * i] : row_rz(far, r0 + 8 * i));
            put_features<BF, FW>(o.a, features_q, hf, m, by, u);
            ready_features<BF>(o.a, s, 1, c, hf, m, v);
            put_features<BF, FW>(o.a, features_k, hf, m, one, v);
            return;
        }
        features_begin<D, BF, FW>(o.a, bias_q, hf, u), features_begin<D, BF, FW>(o.a, bias_k, hf, v);
        products_begin(u, v);
        features_product<D, BF, FW>(queries(far), weights_q, hf, u);
        group_commit();
        features_product<D, BF, FW>(k, weights_k, hf, v);
        group_commit();
        for (int i = 0; i < 2; i++) by[i] = lambda * (p.lag ? rows->rz[far & 1][r0 + 8 * i] : row_rz(far, r0 + 8 * i));
        group_wait<1>();
        group_hold(u);
        if (used) {
            features_end<D, BF, FW>(o.a, queries(far), hf, m, u);
            put_features<BF, FW>(o.a, features_q, hf, m, by, u);
        }
        group_wait<0>();
        group_hold(v);
        features_end<D, BF, FW>(o.a, k, hf, m, v);
        put_features<BF, FW>(o.a, features_k, hf, m, one, v);
    }

    /* d [16][HALF] = gradient of the features: R v - P, and the triangle with chunk `far`, which R takes up meanwhile. */
    __device__ __forceinline__ void feature_gradient(int far, float (&d)[BF / 16][4], typename states::sum &sum) {
        int lane = threadIdx.x & 31, n0 = hf * HALF;
        clear(d);
        float du[TRI ? 8 : 1][4];
        products_begin(d, sum);
        group_product<HALF, D, 64, ALONG_K, BF, ALONG_K>(d, v, 0, state, n0);
        group_commit();
        if constexpr (TRI) {
            clear(du);
            products_begin(du);
            group_product<64, D, 64, ALONG_K, 64, ALONG_K>(du, v, 0, givens(far), 0);
            group_commit();
        }
        states::product(sum, features_q, givens(far), hf);
        group_commit();
        group_wait<1>();
        group_hold(d);
#pragma unroll
        for (int n = 0; n < BF / 16; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) d[n][j] -= rows->sum[n0 + 8 * n + 2 * (lane & 3) + (j & 1)];
        if constexpr (TRI) {
            group_hold(du);
            triangle(du, rows->delta[far & 1]);
            uint32_t part[4][4];
            as_fragments<64>(part, du);
            products_begin(d);
            group_product<HALF, 64, 64, ACROSS_K>(d, part, features_q, n0);
            products_end(d);
        }
    }
    /* Less `less` of its query, and 0 where the query (column) does not see the key (row) linearly. */
    __device__ __forceinline__ void triangle(float (&u)[8][4], const float *less) {
        int lane = threadIdx.x & 31;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int col = 8 * n + 2 * (lane & 3) + (j & 1), row = m + (lane >> 2) + 8 * (j >> 1);
                u[n][j] = row <= col ? u[n][j] - (less ? less[col] : 0.f) : 0.f;
            }
    }

    /* Weights over z of a strip of keys with one chunk of queries (half 0: chunk c + lag, 1: chunk c) into features_q, scale times
     * the gradient of the scores into ds; sc, dp: the products, at an end; linear: the triangle's weights. */
    __device__ __forceinline__ void put_weights(int c, int chunk, bool window, float (&sc)[8][4], float (&dp)[8][4],
                                                const float (&linear)[TRI ? 8 : 1][4]) {
        int lane = threadIdx.x & 31, slot = chunk & 1, most = TRI || hf ? 2 * (lane & 3) - m - (lane >> 2) : 64; /* of row - column */
        float scale = (float)o.a.scale, scale2 = scale * LC_LOG2E;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int col = 8 * n + 2 * (lane & 3) + i;
                float mx = rows->c[slot][col], delta = rows->delta[slot][col] * scale;
#pragma unroll
                for (int j = i; j < 4; j += 2) {
                    bool in = 8 * (j >> 1) - 8 * n - i <= most;
                    if (TRI && !hf) in = window && !in;
                    float w = in ? exp2_fast(sc[n][j] * scale2 - mx) : 0.f;
                    dp[n][j] = w * (dp[n][j] * scale - delta);
                    sc[n][j] = w + (TRI ? linear[TRI ? n : 0][j] : 0.f);
                }
            }
        put_tile<64>(features_q, sc, m, 64 * hf);
        put_tile<64>(ds, dp, m, 64 * hf);
        __syncwarp();
        for (int col = lane; col < 64; col += 32) { /* what the maximum gets */
            int at = rows->at[slot][col] - c * 64 - m;
            if (at < 0 || at >= 16) continue;
            bf16 *to = tile_at<64>(ds, m + at, 64 * hf + col);
            *to = store<bf16>(load<float>(*to) + scale * rows->x[slot][col]);
        }
    }

    /* acc [16][D / 2] += weights of the strip times rows of the queries' chunks. */
    __device__ __forceinline__ void over_window(const bf16 *w, int c, bool far, bool near, bool given, float (&acc)[D / 16][4]) {
        int n0 = hf * (D / 2), which = given ? L::tile : 0;
        if (far) over_tokens<D>(acc, w, queries(c + p.lag) + which, n0);
        if (near) over_tokens<D>(acc, w + 64 * 64, queries(c) + which, n0);
    }

    /* Where row 0 of chunk c of a result goes: 0 dk, 1 dv, 2 dmk. */
    __device__ __forceinline__ bf16 *result(int which, int c, int64_t *stride) const {
        const rows4 &r = which == 0 ? o.dk : which == 1 ? o.dv : o.dmk;
        int width = which == 2 ? o.a.F : D;
        *stride = p.rows[which] ? width : r.s[2];
        if (p.rows[which]) return p.rows[which] + (s.head * o.a.t + s.s0 + c * 64) * width;
        return r.row<bf16>(s.b, which == 2 ? s.h / o.a.mk_group : s.hk, s.s0 + c * 64);
    }
    __device__ __forceinline__ void put_result(int which, int c, const float (&acc)[D / 16][4]) {
        int64_t stride;
        bf16 *to = result(which, c, &stride);
        put_rows(to + hf * (D / 2), stride, acc, m, s.len - c * 64, D);
    }
    /* Rows of dv and dk of chunk c. */
    __device__ __forceinline__ void put_keys(int c, bool after, bool linear) {
        float dv[D / 16][4], dk[D / 16][4];
        int n0 = hf * (D / 2);
        bool window = o.a.window > 0;
        if (o.dv.p && o.dk.p && linear && window && MAPS && !o.a.skip) { /* the usual: two batches */
            const bf16 *q = queries(c), *q_far = queries(c + p.lag);
            clear(dv), clear(dk);
            products_begin(dv, dk);
            group_product<D / 2, BF, 64, ALONG_K, BF, ACROSS_K>(dv, features_k, 0, state, n0);
            group_product<D / 2, 64, 64, ALONG_K, 64, ACROSS_K>(dv, features_q, 0, q_far + L::tile, n0);
            group_product<D / 2, 64, 64, ALONG_K, 64, ACROSS_K>(dv, features_q + 64 * 64, 0, q + L::tile, n0);
            group_commit();
            group_product<D / 2, 64, 64, ALONG_K, 64, ACROSS_K>(dk, ds, 0, q_far, n0);
            group_product<D / 2, 64, 64, ALONG_K, 64, ACROSS_K>(dk, ds + 64 * 64, 0, q, n0);
            group_product<D / 2, FW, 64, ALONG_K, D, ALONG_K>(dk, dpre, 0, weights_k, n0);
            group_commit();
            group_wait<1>();
            group_hold(dv);
            put_result(1, c, dv);
            group_wait<0>();
            group_hold(dk);
            put_result(0, c, dk);
            return;
        }
        if (o.dv.p) {
            clear(dv);
            if (linear) {
                products_begin(dv);
                group_product<D / 2, BF, 64, ALONG_K, BF, ACROSS_K>(dv, features_k, 0, state, n0);
                products_end(dv);
            }
            over_window(features_q, c, after, window, true, dv);
            put_result(1, c, dv);
        }
        if (o.dk.p) {
            clear(dk);
            if (window) over_window(ds, c, after, true, false, dk);
            if (linear && MAPS) through_weights<D, FW>(o.a, dpre, weights_k, m, n0, dk);
            put_result(0, c, dk);
        }
    }
    __device__ __forceinline__ void zero_padding() { /* rows before the first token, where heads do not share them */
        for (int which = 0; which < 3; which++) {
            const rows4 &r = which == 0 ? o.dk : which == 1 ? o.dv : o.dmk;
            int width = which == 2 ? o.a.F : D;
            if (!r.p || p.rows[which] || (which == 2 && MAPS)) continue;
            for (int i = threadIdx.x; i < s.s0 * width; i += THREADS) r.row<bf16>(s.b, s.h, i / width)[i % width] = store<bf16>(0.f);
        }
    }

    __device__ __forceinline__ void run() {
        typename states::sum sum;
        typename maps_sum::sum dw;
        float bias = 0;
        int lag = p.lag, tid = threadIdx.x;
        bool taken = false; /* the sum has what its tile has not */
        fetched row;
        constexpr bool both = MAPS && FW != BF;
        const bool rows_wanted = o.dk.p || o.dv.p;
        load_ring(s.c1 - 1 + lag);
        load_own(s.c1 - 1);
        if (lag) fetch(s.c1, row);
        if constexpr (MAPS) load_weights<D, FW>(weights_q, o.a.mq, weights_k, o.a.mk, s.h, o.a.f);
        clear(sum), clear(dw);
        if (tid < BF) rows->sum[tid] = 0;
        for (int n = s.seg + 1; n < p.segments; n++) {
            const float *from = p.state[1] + (s.head * p.segments + n) * (BF * D + BF);
            add_fragments(sum, from);
            if (tid < BF) rows->sum[tid] += from[BF * D + tid];
        }
        put_tile<BF>(state, sum, states::row(hf) + m, states::col(hf));
        if (lag) put_rows_of(s.c1, row);
        if (s.seg == 0) zero_padding();
        for (int c = s.c1 - 1; c >= s.c0; c--) {
            int far = c + lag;
            bool after = far < s.n, linear = after, takes = linear && c > s.c0;
            float f[BF / 16][4], d[BF / 16][4], weights[TRI ? 8 : 1][4];
            fetch(c, row);
            copy_wait<0>();
            meet();
            load_ring(far - 1); /* all products of the chunk before have ended */
            if (taken) {
                put_tile<BF>(state, sum, states::row(hf) + m, states::col(hf));
                if (tid < BF) rows->sum[tid] += rows->more[tid];
            }
            if (linear) both_features(c, far, takes || TRI, f);
            put_rows_of(c, row);
            meet();
            clear(weights), clear(d);
            if (linear) {
                feature_gradient(far, d, sum);
                if (MAPS && o.through_k) {
                    map_fragments_backward<FW != BF>(o.a, hf, f, d);
                    if (both && hf) put_tile<64>(dpre, d, m, 0), bias += total(d);
                }
                if (hf) column_sums<SM>(rows->more, false, features_q, 16 * SM * strip, rows->delta[far & 1]);
                group_wait<0>();
                group_hold(sum);
            }
            taken = takes;
            if (!MAPS && o.dmk.p) {
                int64_t stride;
                bf16 *to = result(2, c, &stride);
                put_rows(to + hf * HALF, stride, d, m, s.len - c * 64, half_width<BF>(o.a, hf));
            }
            if constexpr (TRI) {
                if (linear && o.dv.p && !hf) {
                    products_begin(weights);
                    group_product<64, BF, 64, ALONG_K, 64, ALONG_K>(weights, features_k, 0, features_q, 0);
                    products_end(weights);
                    triangle(weights, NULL);
                }
            }
            copy_wait<0>();
            meet();
            if (linear && o.through_k && MAPS && !(both && hf)) {
                bias += total(d);
                if (both) add_tile<64>(dpre, d, m, 0);
                put_tile<64>(dpre, d, m, both ? 0 : hf * HALF);
            }
            if (rows_wanted) {
                int chunk = hf ? c : far; /* if there is none after, half 0 makes what nobody reads */
                float sc[8][4], dp[8][4];
                clear(sc), clear(dp);
                products_begin(sc, dp);
                group_product<64, D, 64, ALONG_K, 64, ALONG_K>(sc, k, 0, queries(chunk), 0);
                group_product<64, D, 64, ALONG_K, 64, ALONG_K>(dp, v, 0, givens(chunk), 0);
                products_end(sc, dp);
                put_weights(c, chunk, o.a.window > 0, sc, dp, weights);
            }
            meet();
            if (linear && p.dw[1]) maps_sum::absorb(dw, k, dpre, hf);
            __syncthreads();
            load_own(c - 1);
            put_keys(c, after, linear);
        }
        copy_wait<0>();
        int64_t at = s.head * p.segments + s.seg;
        if (p.dw[1]) put_fragments(p.dw[1] + at * held_fragments(D, FW) * THREADS * 4, dw);
        if (p.bias[1]) {
            bias = block_reduce(bias, op_sum(), 0.f, rows->sum);
            if (!tid) p.bias[1][at] = bias;
        }
    }
};

template <int D, int BF, int FW, bool TRI> __global__ void __launch_bounds__(THREADS, 1) keys_tile_kernel(gradients o, fast p) {
    LC_SHARED(memory);
    key_block<D, BF, FW, TRI> block(o, p, memory);
    block.run();
}

template <int D, int BF, int FW, bool TRI> struct keys_launcher {
    static int launch(const gradients &o, const fast &p) {
        size_t bytes = layout<D, BF, FW>::bytes;
        if (allow_shared(keys_tile_kernel<D, BF, FW, TRI>, bytes)) return LC_K_DEVICE;
        LC_LAUNCH((keys_tile_kernel<D, BF, FW, TRI>), (unsigned)(o.a.b * o.a.h * p.segments), THREADS, bytes, o, p);
        return LC_K_OK;
    }
};

int hybrid_backward_tiles::hybrid_backward_keys(const gradients &o, const fast &p) { return with_shape<keys_launcher>(o, p); }
