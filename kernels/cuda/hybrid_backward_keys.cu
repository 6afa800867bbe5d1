/* hybrid_backward_keys.cu: the key side of hybrid attention's gradient on tensor cores: a block walks backward over a segment of
 * chunks with R in registers and makes, for one query head, dk, dv and its share of the key map's gradient. The mirror image of the
 * query side: keys of chunk c are seen linearly by the chunks after c + lag and, under a triangle, by rows of chunk c + lag. */
#include "hybrid_backward_tile.cuh"

/* Values of the queries of two chunks, slot chunk & 1, in shared memory; at: the key at the maximum, from the first token on. */
struct near_rows {
    float rz[2][64], delta[2][64], c[2][64], x[2][64], sum[128], more[128]; /* P; what the next one gets */
    int at[2][64];
};

template <int D, int BF, int FW, bool TRI> struct key_block {
    typedef layout<D, BF, FW> L;
    static constexpr int HALF = BF / 2, SM = BF / 64;
    typedef held<BF, D> states;
    typedef held<D, FW> maps_sum;
    const gradients &o;
    const fast &p;
    chunk_range s;
    bf16 *k, *v, *ring, *state, *weights_q, *weights_k, *features_q, *features_k, *ds, *dpre;
    near_rows *rows;
    float *exchange;
    int strip, hf, m; /* of the warp: keys m .. m + 15, half hf */
    float gamma, lambda;

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
        exchange = (float *)ds;
        int w = warp_number();
        strip = w & 3, hf = w >> 2, m = 16 * strip;
        gamma = hybrid_gamma<float>(o.a, s.h), lambda = hybrid_lambda<float>(o.a, gamma);
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
        f.value = 0, f.at = -1;
        if (!holds(s, c, row)) return;
        if (what == 0) f.value = *o.z.row<float>(s.b, s.h, i);
        if (what == 1) f.value = p.delta[s.head * o.a.t + i];
        if (what == 2) f.value = p.x[s.head * o.a.t + i];
        if (what != 3 || !o.a.window) return;
        f.value = *o.c.row<float>(s.b, s.h, i) * LC_LOG2E;
        f.at = *o.argmax.row<int32_t>(s.b, s.h, i) - s.s0;
    }
    __device__ __forceinline__ void put_rows_of(int c, const fetched &f) {
        int row = threadIdx.x & 63, what = threadIdx.x >> 6, slot = c & 1;
        if (what == 0) rows->rz[slot][row] = f.value != 0 ? 1 / f.value : 0.f;
        if (what == 1) rows->delta[slot][row] = f.value;
        if (what == 2) rows->x[slot][row] = f.value;
        if (what == 3) rows->c[slot][row] = f.value, rows->at[slot][row] = f.at;
    }

    /* Features of the queries of chunk c, times lambda / z. */
    __device__ __forceinline__ void put_query_features(int c) {
        float f[BF / 16][4];
        int width = half_width<BF>(o.a, hf), r0 = m + ((threadIdx.x & 31) >> 2);
        float by[2];
        for (int i = 0; i < 2; i++) by[i] = lambda * (p.lag ? rows->rz[c & 1][r0 + 8 * i] : row_rz(c, r0 + 8 * i));
        features<D, BF, FW>(o, s, 0, queries(c), weights_q, c, hf, m, f);
#pragma unroll
        for (int n = 0; n < BF / 16; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) f[n][j] = feature_of(o.a, n, width, f[n][j]) * by[j >> 1];
        put_tile<64>(features_q, f, m, hf * HALF);
    }
    __device__ __forceinline__ void put_key_features(const float (&f)[BF / 16][4]) {
        float y[BF / 16][4];
        int width = half_width<BF>(o.a, hf);
#pragma unroll
        for (int n = 0; n < BF / 16; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) y[n][j] = feature_of(o.a, n, width, f[n][j]);
        put_tile<64>(features_k, y, m, hf * HALF);
    }

    /* d [16][HALF] = gradient of the features: R v - P, and the triangle with chunk `far`. */
    __device__ __forceinline__ void feature_gradient(int far, float (&d)[BF / 16][4]) {
        int lane = threadIdx.x & 31, n0 = hf * HALF;
        clear(d);
        float du[TRI ? 8 : 1][4];
        if constexpr (TRI) {
            clear(du);
            products_begin(d, du);
            group_product<64, D, 64, ALONG_K, 64, ALONG_K>(du, v, 0, givens(far), 0);
        } else {
            products_begin(d);
        }
        group_product<HALF, D, 64, ALONG_K, BF, ALONG_K>(d, v, 0, state, n0);
        products_end(d, du);
#pragma unroll
        for (int n = 0; n < BF / 16; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) d[n][j] -= rows->sum[n0 + 8 * n + 2 * (lane & 3) + (j & 1)];
        if constexpr (TRI) {
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
     * the gradient of the scores into ds; linear: the triangle's weights. */
    __device__ __forceinline__ void window_weights(int c, int chunk, bool window, const float (&linear)[TRI ? 8 : 1][4]) {
        float sc[8][4], dp[8][4];
        clear(sc), clear(dp);
        int lane = threadIdx.x & 31, slot = chunk & 1;
        if (window) {
            products_begin(sc, dp);
            group_product<64, D, 64, ALONG_K, 64, ALONG_K>(sc, k, 0, queries(chunk), 0);
            group_product<64, D, 64, ALONG_K, 64, ALONG_K>(dp, v, 0, givens(chunk), 0);
            products_end(sc, dp);
        }
        float scale = (float)o.a.scale, scale2 = scale * LC_LOG2E;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int col = 8 * n + 2 * (lane & 3) + i;
                float mx = rows->c[slot][col], by = rows->rz[slot][col] * gamma, delta = rows->delta[slot][col], x = rows->x[slot][col];
                int at = rows->at[slot][col] - c * 64;
#pragma unroll
                for (int j = i; j < 4; j += 2) {
                    int row = m + (lane >> 2) + 8 * (j >> 1);
                    bool in = window && (hf ? col >= row : !TRI || col < row);
                    float w = in ? exp2_fast(sc[n][j] * scale2 - mx) * by : 0.f;
                    dp[n][j] = scale * (w * (dp[n][j] - delta) + (row == at ? x : 0.f));
                    sc[n][j] = w + (TRI ? linear[TRI ? n : 0][j] : 0.f);
                }
            }
        put_tile<64>(features_q, sc, m, 64 * hf);
        put_tile<64>(ds, dp, m, 64 * hf);
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
    __device__ __forceinline__ void zero_padding() { /* rows before the first token, where heads do not share them */
        for (int which = 0; which < 3; which++) {
            const rows4 &r = which == 0 ? o.dk : which == 1 ? o.dv : o.dmk;
            int width = which == 2 ? o.a.F : D;
            if (!r.p || p.rows[which] || (which == 2 && o.a.map != MAP_NONE)) continue;
            for (int i = threadIdx.x; i < s.s0 * width; i += THREADS) r.row<bf16>(s.b, s.h, i / width)[i % width] = store<bf16>(0.f);
        }
    }

    __device__ __forceinline__ void run() {
        typename states::sum sum;
        typename maps_sum::sum dw;
        float bias = 0;
        int sn = hf * (D / 2), lag = p.lag, tid = threadIdx.x;
        fetched row;
        const bool maps = o.a.map != MAP_NONE, both = has_extreme(o.a), rows_wanted = o.dk.p || o.dv.p, has_f = o.a.F > 0;
        load_ring(s.c1 - 1 + lag);
        load_own(s.c1 - 1);
        load_ring(s.c1 - 2 + lag);
        if (lag) fetch(s.c1, row);
        if (maps && has_f) load_weights<D, FW>(weights_q, o.a.mq, weights_k, o.a.mk, s.h, o.a.f);
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
            bool after = far < s.n, linear = has_f && (TRI ? after : far + 1 < s.n), takes = has_f && after && c > s.c0;
            float f[BF / 16][4], d[BF / 16][4], weights[TRI ? 8 : 1][4];
            fetch(c, row);
            copy_wait<1>();
            meet();
            if (takes || (TRI && linear)) put_query_features(far);
            if (linear) {
                features<D, BF, FW>(o, s, 1, k, weights_k, c, hf, m, f);
                put_key_features(f);
            }
            put_rows_of(c, row);
            meet();
            clear(weights), clear(d);
            if (linear && o.through_k) {
                feature_gradient(far, d);
                if (maps) map_fragments_backward(o.a, hf, f, d);
                if (maps && both && hf) send_half(exchange, strip, d);
            }
            if (!maps && o.dmk.p) {
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
            if (takes) {
                states::absorb(sum, features_q, givens(far), hf);
                if (hf) column_sums<SM>(rows->more, false, features_q, 16 * SM * strip, rows->delta[far & 1]);
            }
            __syncthreads();
            if (linear && o.through_k && maps && !(both && hf)) {
                if (both) receive_half(exchange, strip, d);
                put_tile<64>(dpre, d, m, both ? 0 : hf * HALF);
                bias += total(d);
            }
            copy_wait<0>();
            meet();
            if (linear && p.dw[1]) maps_sum::absorb(dw, k, dpre, hf);
            if (rows_wanted && (hf ? o.a.window > 0 : after)) window_weights(c, hf ? c : far, o.a.window > 0, weights);
            meet();
            load_own(c - 1);
            float acc[D / 16][4];
            if (o.dv.p) {
                clear(acc);
                if (linear) {
                    products_begin(acc);
                    group_product<D / 2, BF, 64, ALONG_K, BF, ACROSS_K>(acc, features_k, 0, state, sn);
                    products_end(acc);
                }
                over_window(features_q, c, after, o.a.window > 0, true, acc);
                put_result(1, c, acc);
            }
            if (o.dk.p) {
                clear(acc);
                if (o.a.window) over_window(ds, c, after, true, false, acc);
                if (linear && maps) through_weights<D, FW>(o.a, dpre, weights_k, m, sn, acc);
                put_result(0, c, acc);
            }
            __syncthreads();
            load_ring(far - 2);
            if (takes) {
                put_tile<BF>(state, sum, states::row(hf) + m, states::col(hf));
                if (tid < BF) rows->sum[tid] += rows->more[tid];
            }
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
