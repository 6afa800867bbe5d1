/* hybrid_backward_keys.cu: the key side of hybrid attention's gradient on tensor cores: a block walks backward over a segment of
 * chunks with R in registers and makes, for one query head, dk, dv and its share of the key map's gradient. The mirror image of the
 * query side: keys of chunk c are seen linearly by the chunks after c + lag and, under a triangle, by rows of chunk c + lag. */
#include "hybrid_backward_tile.cuh"

/* Values of the queries of two chunks by VALUES, slot chunk & 1, in shared memory; sum: P; more: what the next one gets. */
struct near_rows {
    float value[VALUES][2][64], sum[128], more[128];
    row_bases base;
};

template <int D, int BF, int FW, bool TRI> struct key_block {
    typedef layout<D, BF, FW> L;
    static constexpr int HALF = BF / 2, SM = BF / 64, SHARE = D / GROUPS;
    static constexpr bool MAPS = FW > 0, BOTH = MAPS && FW != BF;
    typedef held<BF, D> states;
    typedef held<D, FW ? FW : 32> maps_sum;
    const gradients &o;
    const fast &p;
    chunk_range s;
    bf16 *k, *v, *ring, *state, *weights_q, *weights_k, *features_q, *features_k, *ds, *dpre;
    near_rows *rows;
    int group, strip, hf, m; /* of the warp: keys m .. m + 15, half hf */
    bool far_side;           /* groups 2 and 3: features of chunk c + lag's queries, and the window (hf 0: chunk c + lag, 1: chunk c) */
    float lambda, bias_in;

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
        group = w >> 2, strip = w & 3, hf = group & 1, far_side = group >> 1, m = 16 * strip;
        lambda = hybrid_lambda<float>(o.a, hybrid_gamma<float>(o.a, s.h));
        bias_in = bias_of<float>(far_side ? o.a.bq : o.a.bk, far_side ? o.a.bq_dtype : o.a.bk_dtype, s.h);
        rows->base.open(o, s);
        __syncthreads();
    }
    __device__ __forceinline__ bf16 *queries(int c) const { return ring + (c & 1) * 2 * L::tile; }
    __device__ __forceinline__ bf16 *givens(int c) const { return queries(c) + L::tile; }
    __device__ __forceinline__ void load_own(int c) {
        if (c >= s.c0) load_tile<D>(k, rows->base.of[OF_K], o.a.k, s, c), load_tile<D>(v, rows->base.of[OF_V], o.a.v, s, c);
        copy_commit();
    }
    __device__ __forceinline__ void load_ring(int c) {
        if (c >= s.c0) load_tile<D>(queries(c), rows->base.of[OF_Q], o.a.q, s, c), load_tile<D>(givens(c), rows->base.of[OF_G], o.g, s, c);
        copy_commit();
    }

    /* Row values of chunk c, fetched before they are needed: a thread has one of them at most. */
    __device__ __forceinline__ float fetch(int c) const {
        int row = threadIdx.x & 63, what = threadIdx.x >> 6;
        if (what >= VALUES || !holds(s, c, row)) return what == SHIFT ? INFINITY : what == AT ? __int_as_float(-1) : 0.f;
        return p.values[((int64_t)what * o.a.b * o.a.h + s.head) * o.a.t + s.s0 + c * 64 + row];
    }
    __device__ __forceinline__ void put_rows_of(int c, float value) {
        if (threadIdx.x < VALUES * 64) rows->value[threadIdx.x >> 6][c & 1][threadIdx.x & 63] = value;
    }

    /* The features of chunk c's keys into their tile and, before the clamp, kept; of chunk far's queries, times lambda / z (0 where there
     * are none), into theirs. */
    __device__ __forceinline__ void all_features(int c, int far, kept_features<BOTH, BF / 16> &kept) {
        float u[BF / 16][4], by[2] = {1, 1};
        int r0 = m + ((threadIdx.x & 31) >> 2);
        if constexpr (MAPS) {
            const bf16 *x = far_side ? queries(far) : k;
            features_begin<D, BF, FW>(o.a, bias_in, hf, u);
            products_begin(u);
            features_product<D, BF, FW>(x, far_side ? weights_q : weights_k, hf, u);
            products_end(u);
            features_end<D, BF, FW>(o.a, x, hf, m, u);
        } else {
            ready_features<BF>(o.a, s, !far_side, far_side ? far : c, hf, m, u);
        }
        if (far_side)
            for (int i = 0; i < 2; i++) by[i] = lambda * rows->value[RZ][far & 1][r0 + 8 * i];
        else if (BOTH && o.a.map == MAP_EXP_DIM) kept.keep_below(u);
        else kept.keep(u);
        put_features<BF, FW>(o.a, far_side ? features_q : features_k, hf, m, by, u);
    }

    /* d [16][HALF] = gradient of the features: R v - P, and the triangle with chunk `far`. */
    __device__ __forceinline__ void feature_gradient(int far, float (&d)[BF / 16][4]) {
        int lane = threadIdx.x & 31, n0 = hf * HALF;
        clear(d);
        products_begin(d);
        group_product<HALF, D, 64, ALONG_K, BF, ALONG_K>(d, v, 0, state, n0);
        products_end(d);
#pragma unroll
        for (int n = 0; n < BF / 16; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float less = rows->sum[n0 + 8 * n + 2 * (lane & 3) + j];
                d[n][j] -= less, d[n][j + 2] -= less;
            }
        if constexpr (TRI) {
#pragma unroll 1
            for (int k0 = 0; k0 < 64; k0 += 32) {
                float du[4][4];
                clear(du);
                products_begin(du);
                group_product<32, D, 64, ALONG_K, 64, ALONG_K>(du, v, 0, givens(far), k0);
                products_end(du);
                triangle(du, k0, rows->value[DELTA][far & 1]);
                uint32_t part[2][4];
                as_fragments<32>(part, du);
                products_begin(d);
                group_product<HALF, 32, 64, ACROSS_K>(d, part, features_q + k0 * 64, n0);
                products_end(d);
            }
        }
    }
    /* Columns n0 .. n0 + 31, less `less` of their query, and 0 where the query (column) does not see the key (row) linearly. */
    __device__ __forceinline__ void triangle(float (&u)[4][4], int n0, const float *less) {
        int lane = threadIdx.x & 31;
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int col = n0 + 8 * n + 2 * (lane & 3) + (j & 1), row = m + (lane >> 2) + 8 * (j >> 1);
                u[n][j] = row <= col ? u[n][j] - (less ? less[col] : 0.f) : 0.f;
            }
    }

    /* Of a strip of keys with one chunk of queries (half 0: chunk c + lag, 1: chunk c): weights over z into the place of features_q or, under
     * a triangle, which still wants those, to w as put_packed takes them; scale times the gradient of the scores into ds. */
    typedef uint32_t packed[8][2];
    __device__ __forceinline__ void put_scores(int c, int chunk, bool window, packed &w) {
        int lane = threadIdx.x & 31, slot = chunk & 1;
        float scale = o.a.scale32, scale2 = scale * LC_LOG2E, less = inverse(scale); /* the weights come times scale */
#pragma unroll TRI ? 2 : 1
        for (int n0 = 0; n0 < 64; n0 += 32) {
            float sc[4][4], dp[4][4], linear[TRI ? 4 : 1][4];
            int most = TRI || hf ? 2 * (lane & 3) - m - (lane >> 2) + n0 : 64; /* of row - column */
            clear(sc), clear(dp);
            products_begin(sc, dp);
            group_product<32, D, 64, ALONG_K, 64, ALONG_K>(sc, k, 0, queries(chunk), n0);
            group_product<32, D, 64, ALONG_K, 64, ALONG_K>(dp, v, 0, givens(chunk), n0);
            products_end(sc, dp);
            if constexpr (TRI) {
                clear(linear);
                if (!hf) {
                    products_begin(linear);
                    group_product<32, BF, 64, ALONG_K, 64, ALONG_K>(linear, features_k, 0, features_q, n0);
                    products_end(linear);
                    triangle(linear, n0, NULL);
                }
            }
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int col = n0 + 8 * n + 2 * (lane & 3) + i;
                    float mx = rows->value[SHIFT][slot][col], delta = rows->value[DELTA][slot][col];
#pragma unroll
                    for (int j = i; j < 4; j += 2) {
                        bool in = 8 * (j >> 1) - 8 * n - i <= most;
                        if (TRI && !hf) in = window && !in;
                        float u = in ? exp2_fast(sc[n][j] * scale2 - mx) : 0.f;
                        dp[n][j] = u * (dp[n][j] - delta);
                        sc[n][j] = u * less + (TRI ? linear[TRI ? n : 0][j] : 0.f);
                    }
                }
            put_tile<64>(ds, dp, m, 64 * hf + n0);
            if constexpr (!TRI) put_tile<64>(features_q, sc, m, 64 * hf + n0);
#pragma unroll
            for (int n = 0; n < 4 && TRI; n++) w[n0 / 8 + n][0] = pack2<bf16>(sc[n][0], sc[n][1]), w[n0 / 8 + n][1] = pack2<bf16>(sc[n][2], sc[n][3]);
        }
        __syncwarp();
        for (int col = lane; col < 64; col += 32) { /* what the maximum gets */
            int at = __float_as_int(rows->value[AT][slot][col]) - c * 64 - m;
            if (at < 0 || at >= 16) continue;
            bf16 *to = tile_at<64>(ds, m + at, 64 * hf + col);
            *to = store<bf16>(load<float>(*to) + scale * rows->value[XSUM][slot][col]);
        }
    }
    __device__ __forceinline__ void put_packed(bf16 *tile, const packed &w) {
        int g = (threadIdx.x & 31) >> 2, q = threadIdx.x & 3;
        bf16 *base = tile + 64 * 64 * hf + (m + g) * 64 + 2 * q;
#pragma unroll
        for (int n = 0; n < 8; n++) {
            *(uint32_t *)(base + ((n ^ g) << 3)) = w[n][0];
            *(uint32_t *)(base + ((n ^ g) << 3) + 8 * 64) = w[n][1];
        }
    }

    /* acc [16][SHARE] += weights of the strip times rows of the queries' chunks. */
    __device__ __forceinline__ void over_window(const bf16 *w, int c, bool near, bool given, float (&acc)[SHARE / 8][4]) {
        int n0 = group * SHARE, which = given ? L::tile : 0;
        over_tokens<SHARE>(acc, w, queries(c + p.lag) + which, n0);
        if (near) over_tokens<SHARE>(acc, w + 64 * 64, queries(c) + which, n0);
    }

    /* Where row 0 of chunk c of a result goes: 0 dk, 1 dv, 2 dmk. */
    __device__ __forceinline__ bf16 *result(int which, int c, int64_t *stride) const {
        const rows4 &r = which == 0 ? o.dk : which == 1 ? o.dv : o.dmk;
        int width = which == 2 ? o.a.F : D;
        *stride = p.rows[which] ? width : r.s[2];
        if (p.rows[which]) return p.rows[which] + (s.head * o.a.t + s.s0 + c * 64) * width;
        return r.row<bf16>(s.b, which == 2 ? s.h / o.a.mk_group : s.hk, s.s0 + c * 64);
    }
    __device__ __forceinline__ void put_result(int which, int c, const float (&acc)[SHARE / 8][4]) {
        int64_t stride;
        bf16 *to = result(which, c, &stride);
        put_wide(to + group * SHARE, stride, acc, m, s.len - c * 64);
    }
    /* Rows of dv and dk of chunk c: SHARE columns a group. */
    __device__ __forceinline__ void put_keys(int c) {
        float dv[SHARE / 8][4], dk[SHARE / 8][4];
        int n0 = group * SHARE;
        bool window = o.a.window > 0;
        if (o.dv.p && o.dk.p && window && MAPS && !o.a.skip) { /* the usual: two batches */
            const bf16 *q = queries(c), *q_far = queries(c + 1);
            clear(dv), clear(dk);
            products_begin(dv, dk);
            group_product<SHARE, BF, 64, ALONG_K, BF, ACROSS_K>(dv, features_k, 0, state, n0);
            group_product<SHARE, 64, 64, ALONG_K, 64, ACROSS_K>(dv, features_q, 0, q_far + L::tile, n0);
            group_product<SHARE, 64, 64, ALONG_K, 64, ACROSS_K>(dv, features_q + 64 * 64, 0, q + L::tile, n0);
            group_commit();
            group_product<SHARE, 64, 64, ALONG_K, 64, ACROSS_K>(dk, ds, 0, q_far, n0);
            group_product<SHARE, 64, 64, ALONG_K, 64, ACROSS_K>(dk, ds + 64 * 64, 0, q, n0);
            group_product<SHARE, FW, 64, ALONG_K, D, ALONG_K>(dk, dpre, 0, weights_k, n0);
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
            products_begin(dv);
            group_product<SHARE, BF, 64, ALONG_K, BF, ACROSS_K>(dv, features_k, 0, state, n0);
            products_end(dv);
            over_window(features_q, c, window, true, dv);
            put_result(1, c, dv);
        }
        if (o.dk.p) {
            clear(dk);
            if (window) over_window(ds, c, true, false, dk);
            if constexpr (MAPS) through_weights<D, FW, SHARE>(o.a, dpre, weights_k, m, n0, dk);
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

    /* R and P after the last chunk of the segment. */
    __device__ __forceinline__ void begin(typename states::sum &sum) {
        int tid = threadIdx.x;
        float row = 0;
        load_ring(s.c1 - 1 + p.lag);
        load_own(s.c1 - 1);
        if constexpr (MAPS) load_weights<D, FW>(weights_q, o.a.mq, weights_k, o.a.mk, s.h, o.a.f);
        clear(sum);
        wait_for_previous(); /* the sums, delta and x; nothing is written before */
        if (p.lag) row = fetch(s.c1);
        float less = 0;
#pragma unroll 1
        for (int n = s.seg + 1; n < p.segments; n++) {
            const float *from = p.state[1] + (s.head * p.segments + n) * (BF * D + BF);
            states::add(sum, from, group);
            if (tid < BF) less += from[BF * D + tid];
        }
        if (tid < BF) rows->sum[tid] = less, rows->more[tid] = 0;
        if (p.lag) put_rows_of(s.c1, row);
        if (s.seg == 0) zero_padding();
    }

    /* What chunk c's features give: the gradient of the map's inputs into dpre, or of ready features into memory. Both halves of a full map
     * give to the same inputs. */
    __device__ __forceinline__ void own_side(int c, kept_features<BOTH, BF / 16> &f, float &bias) {
        float d[BF / 16][4];
        feature_gradient(c + p.lag, d);
        f.after(d[0][0]);
        if constexpr (MAPS) {
            map_fragments_backward<BOTH>(o.a, hf, f, d);
            if (p.bias[1]) bias += total(d);
            if (BOTH && hf) put_tile<64>(dpre, d, m, 0);
            if (BOTH) groups_meet(1, 2);
            if (BOTH && hf) return;
            if (BOTH) add_tile<64>(dpre, d, m, 0);
            put_tile<64>(dpre, d, m, BOTH ? 0 : hf * HALF);
        } else if (o.dmk.p) {
            int64_t stride;
            bf16 *to = result(2, c, &stride);
            put_rows(to + hf * HALF, stride, d, m, s.len - c * 64, half_width<BF>(o.a, hf));
        }
    }

    __device__ __forceinline__ void run() {
        typename states::sum sum;
        typename maps_sum::sum dw;
        float bias = 0;
        int tid = threadIdx.x;
        const bool rows_wanted = o.dk.p || o.dv.p;
        clear(dw);
        begin(sum);
        float row = fetch(s.c1 - 1);
#pragma unroll 1
        for (int c = s.c1 - 1; c >= s.c0; c--) {
            int far = c + p.lag;
            bool takes = c > s.c0;
            kept_features<BOTH, BF / 16> f;
            packed w;
            put_rows_of(c, row); /* its place is free since the last barrier */
            copy_wait<0>();
            meet();
            load_ring(far - 1); /* all products of the chunk before have ended */
            if (states::mine(group)) put_tile<BF>(state, sum, states::row(group) + m, states::col(group));
            if (c + 1 < s.c1 && tid < BF) rows->sum[tid] += rows->more[tid];
            all_features(c, far, f);
            copy_wait<0>();
            meet();
            if (takes) {
                if (far_side && hf) column_sums<SM>(rows->more, false, features_q, 16 * SM * strip, rows->value[DELTA][far & 1]);
                states::absorb(sum, features_q, givens(far), group);
            }
            if (!TRI) __syncthreads(); /* features_q has been read */
            if (!far_side) {
                if (o.through_k) own_side(c, f, bias);
            } else {
                if (rows_wanted) put_scores(c, hf ? c : far, o.a.window > 0, w);
            }
            meet();
            if (TRI) {
                if (far_side && rows_wanted) put_packed(features_q, w);
                meet();
            }
            if (p.dw[1]) maps_sum::absorb(dw, k, dpre, group);
            __syncthreads();
            load_own(c - 1);
            row = fetch(c - 1);
            put_keys(c);
        }
        copy_wait<0>();
        int64_t at = s.head * p.segments + s.seg;
        if (p.dw[1]) maps_sum::put(p.dw[1] + at * (D * FW), dw, group);
        if (p.bias[1]) {
            bias = block_reduce(bias, op_sum(), 0.f, rows->sum);
            if (!tid) p.bias[1][at] = bias;
        }
    }
};

template <int D, int BF, int FW, bool TRI> __global__ void __launch_bounds__(THREADS, 1) keys_tile_kernel(gradients o, fast p) {
    LC_SHARED(memory);
    next_may_start();
    key_block<D, BF, FW, TRI> block(o, p, memory);
    block.run();
}

template <int D, int BF, int FW, bool TRI> struct keys_launcher {
    static int launch(const gradients &o, const fast &p) {
        size_t bytes = layout<D, BF, FW>::bytes;
        if (allow_shared(keys_tile_kernel<D, BF, FW, TRI>, bytes)) return LC_K_DEVICE;
        launch_next(keys_tile_kernel<D, BF, FW, TRI>, dim3((unsigned)(o.a.b * o.a.h * p.segments)), THREADS, bytes, o, p);
        return LC_K_OK;
    }
};

int hybrid_backward_tiles::hybrid_backward_keys(const gradients &o, const fast &p) { return with_shape<keys_launcher>(o, p); }
