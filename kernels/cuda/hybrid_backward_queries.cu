/* hybrid_backward_queries.cu: the query side of hybrid attention's gradient on tensor cores: a block walks forward over a segment of
 * chunks with S in registers and makes dq, its share of the query map's gradient, and x of its rows. */
#include "hybrid_backward_tile.cuh"

/* Values of the 64 queries of a chunk, in shared memory, by VALUES; more: what the next state's Z gets. */
struct query_rows {
    float value[VALUES][64], half_x[2][64], z[128], more[128];
    row_bases base;
};

template <int D, int BF, int FW, bool TRI> struct query_block {
    typedef layout<D, BF, FW> L;
    static constexpr int HALF = BF / 2, SM = BF / 64, SHARE = D / GROUPS;
    static constexpr bool MAPS = FW > 0, BOTH = MAPS && FW != BF;
    typedef held<BF, D> states;
    typedef held<D, FW ? FW : 32> weights;
    const gradients &o;
    const fast &p;
    chunk_range s;
    bf16 *q, *g, *ring, *state, *weights_q, *weights_k, *features_k, *ds, *dpre;
    query_rows *rows;
    int group, strip, hf, m; /* of the warp: rows m .. m + 15, half hf */
    bool far_side;           /* groups 2 and 3: features of chunk c - lag's keys, and the window (hf 0: chunk c - lag, 1: chunk c) */
    float lambda, bias_in;

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
        group = w >> 2, strip = w & 3, hf = group & 1, far_side = group >> 1, m = 16 * strip;
        lambda = hybrid_lambda<float>(o.a, hybrid_gamma<float>(o.a, s.h));
        bias_in = bias_of<float>(far_side ? o.a.bk : o.a.bq, far_side ? o.a.bk_dtype : o.a.bq_dtype, s.h);
        rows->base.open(o, s);
        __syncthreads();
    }
    __device__ __forceinline__ bf16 *keys(int c) const { return ring + (c & 1) * 2 * L::tile; }
    __device__ __forceinline__ bf16 *values(int c) const { return keys(c) + L::tile; }
    __device__ __forceinline__ void load_own(int c) {
        if (c < s.c1) load_tile<D>(q, rows->base.of[OF_Q], o.a.q, s, c), load_tile<D>(g, rows->base.of[OF_G], o.g, s, c);
        copy_commit();
    }
    __device__ __forceinline__ void load_ring(int c) {
        if (c < s.c1) load_tile<D>(keys(c), rows->base.of[OF_K], o.a.k, s, c), load_tile<D>(values(c), rows->base.of[OF_V], o.a.v, s, c);
        copy_commit();
    }

    /* Row values of chunk c, fetched before they are needed: a thread has one of them at most. */
    __device__ __forceinline__ float fetch(int c) const {
        int row = threadIdx.x & 63, what = threadIdx.x >> 6;
        if (what >= XSUM || !holds(s, c, row)) return what == SHIFT ? INFINITY : what == AT ? __int_as_float(-1) : 0.f;
        return p.values[((int64_t)what * o.a.b * o.a.h + s.head) * o.a.t + s.s0 + c * 64 + row];
    }
    __device__ __forceinline__ void put_rows_of(float value) {
        if (threadIdx.x < XSUM * 64) rows->value[threadIdx.x >> 6][threadIdx.x & 63] = value;
    }

    /* The features, before the clamp, of chunk c's queries are kept, those of chunk far's keys go into their tile
     * (zeros under a triangle where there is no such chunk). */
    __device__ __forceinline__ void all_features(int c, int far, kept_features<BOTH, BF / 16> &kept) {
        float v[BF / 16][4];
        const float none = TRI && far < 0 ? 0.f : 1.f, by[2] = {none, none};
        if constexpr (MAPS) {
            const bf16 *x = far_side ? keys(far) : q;
            features_begin<D, BF, FW>(o.a, bias_in, hf, v);
            products_begin(v);
            features_product<D, BF, FW>(x, far_side ? weights_k : weights_q, hf, v);
            products_end(v);
            features_end<D, BF, FW>(o.a, x, hf, m, v);
        } else {
            ready_features<BF>(o.a, s, far_side, far_side ? far : c, hf, m, v);
        }
        if (far_side) put_features<BF, FW>(o.a, features_k, hf, m, by, v);
        else if (BOTH && o.a.map == MAP_EXP_DIM) kept.keep_below(v);
        else kept.keep(v);
    }

    /* d [16][HALF] = gradient of the features: lambda / z (S g - delta Z), and the triangle. */
    __device__ __forceinline__ void feature_gradient(int far, float (&d)[BF / 16][4]) {
        int lane = threadIdx.x & 31, r0 = m + (lane >> 2), n0 = hf * HALF;
        clear(d);
        products_begin(d);
        group_product<HALF, D, 64, ALONG_K, BF, ALONG_K>(d, g, 0, state, n0);
        group_commit();
        const float *deltas = rows->value[DELTA], *rz = rows->value[RZ];
        float delta[2] = {deltas[r0], deltas[r0 + 8]}, by[2] = {rz[r0] * lambda, rz[r0 + 8] * lambda};
        group_wait<0>();
        group_hold(d);
#pragma unroll
        for (int n = 0; n < BF / 16; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float z = rows->z[n0 + 8 * n + 2 * (lane & 3) + j];
                d[n][j] -= delta[0] * z, d[n][j + 2] -= delta[1] * z;
            }
        if constexpr (TRI) {
#pragma unroll 1
            for (int k0 = 0; k0 < 64; k0 += 32) {
                float du[4][4];
                clear(du);
                products_begin(du);
                group_product<32, D, 64, ALONG_K, 64, ALONG_K>(du, g, 0, values(far), k0);
                products_end(du);
#pragma unroll
                for (int n = 0; n < 4; n++)
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        du[n][j] = k0 + 8 * n + 2 * (lane & 3) + (j & 1) <= r0 + 8 * (j >> 1) ? du[n][j] - delta[j >> 1] : 0.f;
                uint32_t part[2][4];
                as_fragments<32>(part, du);
                products_begin(d);
                group_product<HALF, 32, 64, ACROSS_K>(d, part, features_k + k0 * 64, n0);
                products_end(d);
            }
        }
#pragma unroll
        for (int n = 0; n < BF / 16; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) d[n][j] *= by[j >> 1];
    }

    /* This half's share of x of its rows. */
    __device__ __forceinline__ void put_x(const kept_features<BOTH, BF / 16> &kept, const float (&d)[BF / 16][4]) {
        int lane = threadIdx.x & 31, width = half_width<BF>(o.a, hf);
        float x[2] = {0, 0};
#pragma unroll
        for (int n = 0; n < BF / 16; n++) {
            float v[4];
            kept.get(n, v);
#pragma unroll
            for (int j = 0; j < 4; j++) x[j >> 1] += (MAPS ? feature_of(o.a, n, width, v[j]) : v[j]) * d[n][j];
        }
        x[0] = quad_sum(x[0]), x[1] = quad_sum(x[1]);
        if (lane & 3) return;
        rows->half_x[hf][m + (lane >> 2)] = x[0], rows->half_x[hf][m + (lane >> 2) + 8] = x[1];
    }

    /* Scale times the gradient of the scores of a strip with one chunk of keys (half 0: chunk c - lag, 1: chunk c) into ds, but for what
     * the maximum gets; zeros where there is no such chunk. */
    __device__ __forceinline__ void put_scores(bool there, const bf16 *k, const bf16 *v) {
        int lane = threadIdx.x & 31;
        float scale2 = o.a.scale32 * LC_LOG2E;
        float c[2], delta[2];
#pragma unroll
        for (int i = 0; i < 2; i++) c[i] = there ? rows->value[SHIFT][m + (lane >> 2) + 8 * i] : INFINITY, delta[i] = rows->value[DELTA][m + (lane >> 2) + 8 * i];
#pragma unroll 1
        for (int n0 = 0; n0 < 64; n0 += 32) {
            float sc[4][4], dp[4][4];
            int most = TRI || hf ? m + (lane >> 2) - 2 * (lane & 3) - n0 : 64; /* of column - row, less the lane's */
            clear(sc), clear(dp);
            products_begin(sc, dp);
            group_product<32, D, 64, ALONG_K, 64, ALONG_K>(sc, q, 0, k, n0);
            group_product<32, D, 64, ALONG_K, 64, ALONG_K>(dp, g, 0, v, n0);
            products_end(sc, dp);
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    bool in = 8 * n + (j & 1) - 8 * (j >> 1) <= most;
                    if (TRI && !hf) in = !in;
                    float w = in ? exp2_fast(sc[n][j] * scale2 - c[j >> 1]) : 0.f;
                    sc[n][j] = w * (dp[n][j] - delta[j >> 1]);
                }
            put_tile<64>(ds, sc, m, 64 * hf + n0);
        }
    }

    /* Rows of dq: SHARE columns a group. */
    __device__ __forceinline__ void put_queries(int c, bool window) {
        float acc[SHARE / 8][4];
        int n0 = group * SHARE;
        clear(acc);
        if (window && MAPS && !o.a.skip) { /* the usual: all in one batch */
            products_begin(acc);
            group_product<SHARE, 64, 64, ALONG_K, 64, ACROSS_K>(acc, ds, 0, keys(c - 1), n0);
            group_product<SHARE, 64, 64, ALONG_K, 64, ACROSS_K>(acc, ds + 64 * 64, 0, keys(c), n0);
            group_product<SHARE, FW, 64, ALONG_K, D, ALONG_K>(acc, dpre, 0, weights_q, n0);
            products_end(acc);
        } else {
            if (window) over_tokens<SHARE>(acc, ds, keys(c - 1), n0), over_tokens<SHARE>(acc, ds + 64 * 64, keys(c), n0);
            if constexpr (MAPS) through_weights<D, FW, SHARE>(o.a, dpre, weights_q, m, n0, acc);
        }
        put_wide(o.dq.row<bf16>(s.b, s.h, s.s0 + c * 64) + n0, o.dq.s[2], acc, m, s.len - c * 64);
    }

    __device__ __forceinline__ void zero_padding() { /* rows before the first token */
        for (int what = 0; what < 2; what++) {
            const rows4 &r = what ? o.dmq : o.dq;
            int width = what ? o.a.F : D;
            if (!r.p || (what && MAPS)) continue;
            for (int i = threadIdx.x; i < s.s0 * width; i += THREADS) r.row<bf16>(s.b, s.h, i / width)[i % width] = store<bf16>(0.f);
        }
    }

    /* S and Z before the first chunk of the segment. */
    __device__ __forceinline__ void begin(typename states::sum &sum) {
        int tid = threadIdx.x;
        load_ring(s.c0 - p.lag);
        load_own(s.c0);
        if constexpr (MAPS) load_weights<D, FW>(weights_q, o.a.mq, weights_k, o.a.mk, s.h, o.a.f);
        clear(sum);
        wait_for_previous(); /* the sums; nothing is written before */
        float z = 0;
#pragma unroll 1
        for (int n = 0; n < s.seg; n++) {
            const float *from = p.state[0] + (s.head * p.segments + n) * (BF * D + BF);
            states::add(sum, from, group);
            if (tid < BF) z += from[BF * D + tid];
        }
        if (tid < BF) rows->z[tid] = z;
        put_state(sum);
        if (s.seg == 0) zero_padding();
    }
    __device__ __forceinline__ void put_state(const typename states::sum &sum) {
        if (states::mine(group)) put_tile<BF>(state, sum, states::row(group) + m, states::col(group));
    }

    /* When all of a chunk's parts are there: groups 2 and 3 have a row a thread, group 3 the window's scores at the maximum. */
    __device__ __forceinline__ void leave(int c, bool window, bool takes, float &all_x) {
        int row = threadIdx.x & 63;
        if (threadIdx.x >= THREADS - 64) {
            float x = rows->half_x[0][row] + rows->half_x[1][row];
            int at = __float_as_int(rows->value[AT][row]) - (c - p.lag) * 64;
            if (holds(s, c, row)) p.values[((int64_t)XSUM * o.a.b * o.a.h + s.head) * o.a.t + s.s0 + c * 64 + row] = x, all_x += x;
            if (window && at >= 0 && at < 128) {
                bf16 *to = tile_at<64>(ds, row, at);
                *to = store<bf16>(load<float>(*to) + o.a.scale32 * x);
            }
        }
        if (takes && threadIdx.x >= 256 && threadIdx.x < 256 + BF) rows->z[threadIdx.x - 256] += rows->more[threadIdx.x - 256];
    }

    /* What chunk c's features give: x, the gradient of the map's inputs into dpre, or of ready features into memory. Both halves of a
     * full map give to the same inputs. */
    __device__ __forceinline__ void own_side(int c, kept_features<BOTH, BF / 16> &v, float &bias) {
        float d[BF / 16][4];
        feature_gradient(c - p.lag, d);
        v.after(d[0][0]);
        put_x(v, d);
        if constexpr (MAPS) {
            map_fragments_backward<BOTH>(o.a, hf, v, d);
            if (p.bias[0]) bias += total(d);
            if (BOTH && hf) put_tile<64>(dpre, d, m, 0);
            if (BOTH) groups_meet(1, 2);
            if (BOTH && hf) return;
            if (BOTH) add_tile<64>(dpre, d, m, 0);
            put_tile<64>(dpre, d, m, BOTH ? 0 : hf * HALF);
        } else if (o.dmq.p) {
            put_rows(o.dmq.row<bf16>(s.b, s.h, s.s0 + c * 64) + hf * HALF, o.dmq.s[2], d, m, s.len - c * 64, half_width<BF>(o.a, hf));
        }
    }

    __device__ __forceinline__ void run() {
        typename states::sum sum;
        typename weights::sum dw;
        float bias = 0, all_x = 0;
        int tid = threadIdx.x;
        const bool window = o.a.window && o.dq.p;
        clear(dw);
        begin(sum);
        float row = fetch(s.c0);
#pragma unroll 1
        for (int c = s.c0; c < s.c1; c++) {
            int far = c - p.lag;
            bool takes = c + 1 < s.c1 && far >= 0;
            kept_features<BOTH, BF / 16> v;
            put_rows_of(row); /* its place is free since the last barrier */
            copy_wait<0>();
            meet();
            load_ring(far + 1); /* all products of the chunk before have ended */
            all_features(c, far, v);
            copy_wait<0>();
            meet();
            if (!far_side) {
                own_side(c, v, bias);
            } else {
                if (window) put_scores(hf || far >= 0, keys(hf ? c : far), values(hf ? c : far));
                if (takes && hf) column_sums<SM>(rows->more, false, features_k, 16 * SM * strip, NULL);
            }
            if (takes) states::absorb(sum, features_k, values(far), group);
            meet();
            leave(c, window, takes, all_x);
            if (takes) put_state(sum);
            meet();
            if (p.dw[0]) weights::absorb(dw, q, dpre, group);
            __syncthreads();
            load_own(c + 1);
            row = fetch(c + 1);
            if (o.dq.p) put_queries(c, window);
        }
        copy_wait<0>();
        int64_t at = s.head * p.segments + s.seg;
        if (p.dw[0]) weights::put(p.dw[0] + at * (D * FW), dw, group);
        if (p.bias[0]) {
            bias = block_reduce(bias, op_sum(), 0.f, rows->more);
            if (!tid) p.bias[0][at] = bias;
        }
        all_x = block_reduce(all_x, op_sum(), 0.f, rows->more);
        if (!tid) p.xs[at] = all_x;
    }
};

template <int D, int BF, int FW, bool TRI> __global__ void __launch_bounds__(THREADS, 1) queries_tile_kernel(gradients o, fast p) {
    LC_SHARED(memory);
    next_may_start();
    query_block<D, BF, FW, TRI> block(o, p, memory);
    block.run();
}

template <int D, int BF, int FW, bool TRI> struct queries_launcher {
    static int launch(const gradients &o, const fast &p) {
        size_t bytes = layout<D, BF, FW>::bytes;
        if (allow_shared(queries_tile_kernel<D, BF, FW, TRI>, bytes)) return LC_K_DEVICE;
        launch_next(queries_tile_kernel<D, BF, FW, TRI>, dim3((unsigned)(o.a.b * o.a.h * p.segments)), THREADS, bytes, o, p);
        return LC_K_OK;
    }
};

int hybrid_backward_tiles::hybrid_backward_queries(const gradients &o, const fast &p) { return with_shape<queries_launcher>(o, p); }
