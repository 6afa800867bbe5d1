/* hybrid_backward_queries.cu: the query side of hybrid attention's gradient on tensor cores: a block walks forward over a segment of
 * chunks with S in registers and makes dq, its share of the query map's gradient, delta and x of its rows. */
#include "hybrid_backward_tile.cuh"

/* Values of the 64 queries of a chunk, in shared memory; c: the maximum less the logarithm of what scales the weights; at: the
 * key at the maximum, counted from the first key of chunk c - lag. */
struct query_rows {
    float rz[64], delta[64], c[64], half_x[2][64], z[128], more[128]; /* more: what the next state's Z gets */
    int at[64];
};

template <int D, int BF, int FW, bool TRI> struct query_block {
    typedef layout<D, BF, FW> L;
    static constexpr int HALF = BF / 2, SM = BF / 64;
    static constexpr bool MAPS = FW > 0;
    typedef held<BF, D> states;
    typedef held<D, FW ? FW : 32> weights;
    const gradients &o;
    const fast &p;
    chunk_range s;
    bf16 *q, *g, *ring, *state, *weights_q, *weights_k, *features_k, *ds, *dpre;
    query_rows *rows;
    int strip, hf, m; /* of the warp: rows m .. m + 15, half hf */
    float gamma, lambda, bias_q, bias_k;

    __device__ __forceinline__ query_block(const gradients &o, const fast &p, char *memory) : o(o), p(p),
        s(o.a, p.segments, blockIdx.x / p.segments, blockIdx.x % p.segments) {
        bf16 *at = (bf16 *)memory;
        q = at, at += L::tile;
        g = at, at += L::tile;
        ring = at, at += 4 * L::tile;
        state = at, at += L::state;
        weights_q = at, at += L::weights;
        weights_k = at, at += L::weights;
        features_k = at, at += L::wide;
        ds = at, at += L::wide;
        dpre = at, at += L::dp;
        rows = (query_rows *)at;
        int w = warp_number();
        strip = w & 3, hf = w >> 2, m = 16 * strip;
        gamma = hybrid_gamma<float>(o.a, s.h), lambda = hybrid_lambda<float>(o.a, gamma);
        bias_q = bias_of<float>(o.a.bq, o.a.bq_dtype, s.h), bias_k = bias_of<float>(o.a.bk, o.a.bk_dtype, s.h);
    }
    __device__ __forceinline__ bf16 *keys(int c) const { return ring + (c & 1) * 2 * L::tile; }
    __device__ __forceinline__ bf16 *values(int c) const { return keys(c) + L::tile; }
    __device__ __forceinline__ void load_own(int c) {
        if (c < s.c1) load_tile<D>(q, o.a.q, s, s.h, c), load_tile<D>(g, o.g, s, s.h, c);
        copy_commit();
    }
    __device__ __forceinline__ void load_ring(int c) {
        if (c >= 0 && c < s.c1) load_tile<D>(keys(c), o.a.k, s, s.hk, c), load_tile<D>(values(c), o.a.v, s, s.hk, c);
        copy_commit();
    }

    /* Row values of chunk c: y, and z, the maximum and its key by the first three of a row's four threads, before they are needed. */
    struct fetched {
        uint4 y[D / 32];
        float value;
    };
    __device__ __forceinline__ void fetch(int c, fetched &f) const {
        int row = threadIdx.x >> 2, what = threadIdx.x & 3, i = s.s0 + c * 64 + row;
        fetch_y<D>(o, s, c, f.y);
        f.value = 0;
        if (!holds(s, c, row)) return;
        if (what == 0) f.value = *o.z.row<float>(s.b, s.h, i);
        if (what == 1 && o.a.window) f.value = *o.c.row<float>(s.b, s.h, i);
        if (what == 2 && o.a.window) f.value = __int_as_float(*o.argmax.row<int32_t>(s.b, s.h, i));
    }
    __device__ __forceinline__ void put_row(int c, const fetched &f) {
        int row = threadIdx.x >> 2, what = threadIdx.x & 3;
        bool valid = holds(s, c, row);
        float delta = row_delta<D>(g, f.y);
        float z = __shfl_sync(0xffffffffu, f.value, threadIdx.x & 28);
        if (what == 0) rows->rz[row] = valid ? 1 / f.value : 0.f;
        if (what == 1) rows->c[row] = valid ? f.value * LC_LOG2E - log2f((float)o.a.scale * gamma / z) : INFINITY;
        if (what == 2) rows->at[row] = valid && o.a.window ? __float_as_int(f.value) - s.s0 - (c - p.lag) * 64 : -1;
        if (what == 3) {
            rows->delta[row] = delta;
            if (valid) p.delta[s.head * o.a.t + s.s0 + c * 64 + row] = delta;
        }
    }

    /* Row values; the features of chunk c's queries into v (not clamped), of chunk far's keys, if they are `used`, into their tile. */
    __device__ __forceinline__ void both_features(int c, int far, bool used, const fetched &row, float (&v)[BF / 16][4]) {
        float u[BF / 16][4];
        const float one[2] = {1, 1};
        if constexpr (!FW) {
            ready_features<BF>(o.a, s, 1, far, hf, m, u);
            put_features<BF, FW>(o.a, features_k, hf, m, one, u);
            ready_features<BF>(o.a, s, 0, c, hf, m, v);
            put_row(c, row);
            return;
        }
        features_begin<D, BF, FW>(o.a, bias_k, hf, u), features_begin<D, BF, FW>(o.a, bias_q, hf, v);
        products_begin(u, v);
        features_product<D, BF, FW>(keys(far), weights_k, hf, u);
        group_commit();
        features_product<D, BF, FW>(q, weights_q, hf, v);
        group_commit();
        put_row(c, row);
        group_wait<1>();
        group_hold(u);
        if (used) {
            features_end<D, BF, FW>(o.a, keys(far), hf, m, u);
            put_features<BF, FW>(o.a, features_k, hf, m, one, u);
        }
        group_wait<0>();
        group_hold(v);
        features_end<D, BF, FW>(o.a, q, hf, m, v);
    }

    /* d [16][HALF] = gradient of the features: lambda / z (S g - delta Z), and the triangle. Meanwhile S takes chunk `far` up. */
    __device__ __forceinline__ void feature_gradient(int far, float (&d)[BF / 16][4], typename states::sum &sum) {
        int lane = threadIdx.x & 31, r0 = m + (lane >> 2), n0 = hf * HALF;
        clear(d);
        float du[TRI ? 8 : 1][4];
        products_begin(d, sum);
        group_product<HALF, D, 64, ALONG_K, BF, ALONG_K>(d, g, 0, state, n0);
        group_commit();
        if constexpr (TRI) {
            clear(du);
            products_begin(du);
            group_product<64, D, 64, ALONG_K, 64, ALONG_K>(du, g, 0, values(far), 0);
            group_commit();
        }
        states::product(sum, features_k, values(far), hf);
        group_commit();
        float delta[2] = {rows->delta[r0], rows->delta[r0 + 8]}, by[2] = {rows->rz[r0] * lambda, rows->rz[r0 + 8] * lambda};
        group_wait<1>();
        group_hold(d);
#pragma unroll
        for (int n = 0; n < BF / 16; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) d[n][j] -= delta[j >> 1] * rows->z[n0 + 8 * n + 2 * (lane & 3) + (j & 1)];
        if constexpr (TRI) {
            group_hold(du);
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    du[n][j] = 8 * n + 2 * (lane & 3) + (j & 1) <= r0 + 8 * (j >> 1) ? du[n][j] - delta[j >> 1] : 0.f;
            uint32_t part[4][4];
            as_fragments<64>(part, du);
            products_begin(d);
            group_product<HALF, 64, 64, ACROSS_K>(d, part, features_k, n0);
            products_end(d);
        }
#pragma unroll
        for (int n = 0; n < BF / 16; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) d[n][j] *= by[j >> 1];
    }

    /* This half's share of x of its rows. */
    __device__ __forceinline__ void put_x(const float (&v)[BF / 16][4], const float (&d)[BF / 16][4]) {
        int lane = threadIdx.x & 31, width = half_width<BF>(o.a, hf);
        float x[2] = {0, 0};
#pragma unroll
        for (int n = 0; n < BF / 16; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) x[j >> 1] += (MAPS ? feature_of(o.a, n, width, v[n][j]) : v[n][j]) * d[n][j];
        x[0] = quad_sum(x[0]), x[1] = quad_sum(x[1]);
        if (lane & 3) return;
        rows->half_x[hf][m + (lane >> 2)] = x[0], rows->half_x[hf][m + (lane >> 2) + 8] = x[1];
    }

    /* Scale times the gradient of the scores of a strip with one chunk of keys (half 0: chunk c - lag, 1: chunk c) into ds; sc, dp: the
     * products, at an end. */
    __device__ __forceinline__ void put_scores(float (&sc)[8][4], const float (&dp)[8][4]) {
        int lane = threadIdx.x & 31, most = TRI || hf ? m + (lane >> 2) - 2 * (lane & 3) : 64; /* of column - row, less the lane's */
        float scale = (float)o.a.scale, scale2 = scale * LC_LOG2E;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int row = m + (lane >> 2) + 8 * i;
            float c = rows->c[row], delta = rows->delta[row];
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    bool in = 8 * n + j - 8 * i <= most;
                    if (TRI && !hf) in = !in;
                    float w = in ? exp2_fast(sc[n][2 * i + j] * scale2 - c) : 0.f;
                    sc[n][2 * i + j] = w * (dp[n][2 * i + j] - delta);
                }
        }
        put_tile<64>(ds, sc, m, 64 * hf);
        __syncwarp();
        int row = m + lane, at = lane < 16 ? rows->at[row] - 64 * hf : -1; /* what the maximum gets */
        if (at < 0 || at >= 64) return;
        bf16 *to = tile_at<64>(ds, row, 64 * hf + at);
        *to = store<bf16>(load<float>(*to) + scale * (rows->half_x[0][row] + rows->half_x[1][row]));
    }

    /* Rows of dq: columns hf * D / 2 on. */
    __device__ __forceinline__ void put_queries(int c, bool near, bool before, bool linear) {
        float acc[D / 16][4];
        int n0 = hf * (D / 2);
        clear(acc);
        if (near && before && linear && MAPS && !o.a.skip) { /* the usual: all in one batch */
            products_begin(acc);
            group_product<D / 2, 64, 64, ALONG_K, 64, ACROSS_K>(acc, ds, 0, keys(c - 1), n0);
            group_product<D / 2, 64, 64, ALONG_K, 64, ACROSS_K>(acc, ds + 64 * 64, 0, keys(c), n0);
            group_product<D / 2, FW, 64, ALONG_K, D, ALONG_K>(acc, dpre, 0, weights_q, n0);
            products_end(acc);
        } else {
            if (near && before) over_tokens<D>(acc, ds, keys(c - 1), n0);
            if (near) over_tokens<D>(acc, ds + 64 * 64, keys(c), n0);
            if (linear && MAPS) through_weights<D, FW>(o.a, dpre, weights_q, m, n0, acc);
        }
        put_rows(o.dq.row<bf16>(s.b, s.h, s.s0 + c * 64) + n0, o.dq.s[2], acc, m, s.len - c * 64, D);
    }

    __device__ __forceinline__ void zero_padding() { /* rows before the first token */
        for (int what = 0; what < 2; what++) {
            const rows4 &r = what ? o.dmq : o.dq;
            int width = what ? o.a.F : D;
            if (!r.p || (what && MAPS)) continue;
            for (int i = threadIdx.x; i < s.s0 * width; i += THREADS) r.row<bf16>(s.b, s.h, i / width)[i % width] = store<bf16>(0.f);
        }
    }

    __device__ __forceinline__ void run() {
        typename states::sum sum;
        typename weights::sum dw;
        float bias = 0, all_x = 0;
        int lag = p.lag, tid = threadIdx.x;
        constexpr bool both = MAPS && FW != BF;
        const bool window = o.a.window && o.dq.p;
        load_ring(s.c0 - lag);
        load_own(s.c0);
        if constexpr (MAPS) {
            if (o.through_q) load_weights<D, FW>(weights_q, o.a.mq, weights_k, o.a.mk, s.h, o.a.f);
        }
        clear(sum), clear(dw);
        if (tid < BF) rows->z[tid] = 0;
        for (int n = 0; n < s.seg; n++) {
            const float *from = p.state[0] + (s.head * p.segments + n) * (BF * D + BF);
            add_fragments(sum, from);
            if (tid < BF) rows->z[tid] += from[BF * D + tid];
        }
        put_tile<BF>(state, sum, states::row(hf) + m, states::col(hf));
        if (s.seg == 0) zero_padding();
        for (int c = s.c0; c < s.c1; c++) {
            int far = c - lag;
            bool before = far >= 0, linear = o.through_q && before, takes = linear && c + 1 < s.c1;
            fetched row;
            float v[BF / 16][4], d[BF / 16][4];
            fetch(c, row);
            copy_wait<0>();
            meet();
            load_ring(far + 1); /* all products of the chunk before have ended */
            if (linear) both_features(c, far, takes || TRI, row, v);
            else put_row(c, row);
            meet();
            clear(d);
            if (linear) {
                feature_gradient(far, d, sum);
                put_x(v, d);
                if (MAPS) map_fragments_backward<FW != BF>(o.a, hf, v, d);
                if (both && hf) put_tile<64>(dpre, d, m, 0), bias += total(d);
                if (hf) column_sums<SM>(rows->more, false, features_k, 16 * SM * strip, NULL);
                group_wait<0>();
                group_hold(sum);
            } else if (tid < 128) {
                rows->half_x[tid >> 6][tid & 63] = 0;
            }
            if (!MAPS && o.dmq.p)
                put_rows(o.dmq.row<bf16>(s.b, s.h, s.s0 + c * 64) + hf * HALF, o.dmq.s[2], d, m, s.len - c * 64, half_width<BF>(o.a, hf));
            copy_wait<0>();
            meet();
            if (linear && MAPS && !(both && hf)) {
                bias += total(d);
                if (both) add_tile<64>(dpre, d, m, 0);
                put_tile<64>(dpre, d, m, both ? 0 : hf * HALF);
            }
            auto leave = [&]() { /* what the chunk has changed */
                if (tid < 64 && holds(s, c, tid)) {
                    float x = rows->half_x[0][tid] + rows->half_x[1][tid];
                    p.x[s.head * o.a.t + s.s0 + c * 64 + tid] = x;
                    all_x += x;
                }
                if (!takes) return;
                put_tile<BF>(state, sum, states::row(hf) + m, states::col(hf));
                if (tid < BF) rows->z[tid] += rows->more[tid];
            };
            if (window) { /* without a chunk before, half 0 makes what nobody reads */
                const bf16 *k = keys(hf ? c : far), *v = values(hf ? c : far);
                float sc[8][4], dp[8][4];
                clear(sc), clear(dp);
                products_begin(sc, dp);
                group_product<64, D, 64, ALONG_K, 64, ALONG_K>(sc, q, 0, k, 0);
                group_product<64, D, 64, ALONG_K, 64, ALONG_K>(dp, g, 0, v, 0);
                group_commit();
                leave();
                group_wait<0>();
                group_hold(sc), group_hold(dp);
                put_scores(sc, dp);
            } else {
                leave();
            }
            meet();
            if (linear && p.dw[0]) weights::absorb(dw, q, dpre, hf);
            __syncthreads();
            load_own(c + 1);
            if (o.dq.p) put_queries(c, window, before, linear);
        }
        copy_wait<0>();
        int64_t at = s.head * p.segments + s.seg;
        if (p.dw[0]) put_fragments(p.dw[0] + at * held_fragments(D, FW) * THREADS * 4, dw);
        if (p.bias[0]) {
            bias = block_reduce(bias, op_sum(), 0.f, rows->rz);
            if (!tid) p.bias[0][at] = bias;
        }
        all_x = block_reduce(all_x, op_sum(), 0.f, rows->rz);
        if (!tid) p.xs[at] = all_x;
    }
};

template <int D, int BF, int FW, bool TRI> __global__ void __launch_bounds__(THREADS, 1) queries_tile_kernel(gradients o, fast p) {
    LC_SHARED(memory);
    query_block<D, BF, FW, TRI> block(o, p, memory);
    block.run();
}

template <int D, int BF, int FW, bool TRI> struct queries_launcher {
    static int launch(const gradients &o, const fast &p) {
        size_t bytes = layout<D, BF, FW>::bytes;
        if (allow_shared(queries_tile_kernel<D, BF, FW, TRI>, bytes)) return LC_K_DEVICE;
        LC_LAUNCH((queries_tile_kernel<D, BF, FW, TRI>), (unsigned)(o.a.b * o.a.h * p.segments), THREADS, bytes, o, p);
        return LC_K_OK;
    }
};

int hybrid_backward_tiles::hybrid_backward_queries(const gradients &o, const fast &p) { return with_shape<queries_launcher>(o, p); }
