/* hybrid_backward_usual_keys.cu: the key side of the usual call's gradient, the mirror image of the query side: a block walks backward
 * over a segment of chunks with R in registers and makes, for one query head, dk and dv, or its share of the key map's gradient. */
#include "hybrid_backward_usual.cuh"

using namespace hybrid_backward_usual;

template <bool ROWS> struct key_walk : usual_block {
    __device__ __forceinline__ key_walk(const gradients &o, const fast &p, char *memory) : usual_block(o, p, memory) {}
    /* Whether chunk c + 1 enters the state for chunk c - 1. */
    __device__ __forceinline__ bool takes(int c) const { return c > c0; }

    /* Of dk (0) or dv (1), of the query head alone where heads share rows. */
    __device__ __forceinline__ int stride_of(int which) const { return p.rows[which] ? DIM : (int)(which ? o.dv.s[2] : o.dk.s[2]); }

    __device__ __forceinline__ void features_side() {
        const float one[2] = {1, 1};
        meet();
        const bool given = ROWS || p.dw[1];
#pragma unroll 1
        for (int c = c1 - 1; c >= c0; c--) {
            const int tid = own_number();
            float x[8][4], d[8][4], dot[2] = {0, 0};
            both_features f;
            clear(x), clear(d);
            products_begin(x, d);
            group_product<INPUTS, DIM, 64, ALONG_K, DIM, ACROSS_K>(x, k(c), 0, weights_k(), 0);
            group_commit();
            if (!ROWS) group_product<64, DIM, 64, ALONG_K, FEATURED, ALONG_K>(d, v(c), 0, state(), 0);
            group_commit();
            group_wait<1>();
            group_hold(x);
            f.make(x);
            clear(x);
            if constexpr (ROWS) { /* registers are short */
                products_begin(d);
                group_product<64, DIM, 64, ALONG_K, FEATURED, ALONG_K>(d, v(c), 0, state(), 0);
                group_commit();
            }
            products_begin(x);
            group_product<64, DIM, 64, ALONG_K, FEATURED, ALONG_K>(x, v(c), 0, state(), 64);
            group_commit();
            group_wait<1>();
            group_hold(d);
            f.gradient(0, d, rows().z, one, one, dot, tid);
            uint32_t plus[4][4]; /* registers are short */
            as_fragments<64>(plus, d);
            hold(plus);
            group_wait<0>();
            group_hold(x);
            f.gradient(1, x, rows().z + 64, one, one, dot, tid);
            if (!ROWS && takes(c)) groups_arrive(FREE, 3);
            add_to(x, plus);
            if (given) {
                put_inputs(dpre(), x, tid);
                shared_fence();
                groups_arrive(INPUT_GRADIENT, ROWS ? 2 : 3);
            }
            if constexpr (ROWS) {
                uint32_t a[8][4];
                f.fragments(a);
                hold(a);
#pragma unroll 1
                for (int n = 0; n < DIM; n += 64) {
                    float dv[8][4];
                    clear(dv);
                    products_begin(dv);
                    group_product<64, FEATURED, FEATURED, ACROSS_K>(dv, a, state() + n * FEATURED, 0);
                    group_commit();
                    if (!n) groups_meet(WEIGHTS, 2);
                    group_product<64, 64, 64, ALONG_K, 64, ACROSS_K>(dv, far_weights(), 0, g(c + 1) + n * 64, 0);
                    group_product<64, 64, 64, ALONG_K, 64, ACROSS_K>(dv, feature(), 0, g(c) + n * 64, 0);
                    products_end(dv);
                    if (n && takes(c)) groups_arrive(FREE, 3);
                    if (o.dv.p) put_result(1, c, n, stride_of(1), dv, tid);
                }
            }
            __syncthreads();
        }
    }

    /* What this chunk still wants, then what the next one does. */
    __device__ __forceinline__ void load_near(int c, int tid) const {
        load_queries(c, tid), load_values(c, XSUM, tid);
        copy_commit();
        if (c > c0) load_keys(c - 1, tid);
        copy_commit();
    }

    __device__ __forceinline__ void state_side(int half) {
        state_rows state_of;
        load_values(c1, XSUM, threadIdx.x);
        copy_commit();
        state_of.clear_all(half, strip_of(threadIdx.x));
#pragma unroll 1
        for (int n = 1, after = p.segments - 1 - blockIdx.x % p.segments; n <= after; n++)
            state_of.add(p.state[1] + ((int64_t)blockIdx.x + n) * PART);
        state_of.put(state(), threadIdx.x), state_of.put_z(rows().z, threadIdx.x);
        copy_wait<0>();
        meet();
        weights_rows dw;
        if (!ROWS) clear(dw.sum);
#pragma unroll 1
        for (int c = c1 - 1; c >= c0; c--) {
            const int tid = own_number();
            if (ROWS) load_near(c, tid); /* the window waits for these, for the state nobody */
            float x[8][4];
            clear(x);
            products_begin(x);
            if (takes(c)) group_product<INPUTS, DIM, 64, ALONG_K, DIM, ACROSS_K>(x, q(c + 1), 0, weights_q(), 0);
            group_commit();
            if (!ROWS) load_near(c, tid);
            group_wait<0>();
            group_hold(x);
            if constexpr (ROWS) {
                copy_wait<1>();
                shared_fence();
                groups_arrive(NEAR, 3);
            }
            if (takes(c)) {
                const float *rz = rows().value[RZ][(c + 1) & 1] + lane_row(tid);
                const float by[2] = {rows().lambda * rz[0], rows().lambda * rz[8]};
                put_features(feature(), half, by, x, tid);
                shared_fence();
                groups_meet(INNER + half, 1);
                products_begin(state_of.sum);
                group_product<DIM, 64, 64, ACROSS_K, 64, ACROSS_K>(state_of.sum, feature(), 64 * half, g(c + 1), 0);
                group_commit();
                state_of.add_z(feature(), rows().value[DELTA][(c + 1) & 1], tid);
                group_wait<0>();
                group_hold(state_of.sum);
                if (ROWS) groups_arrive(ROOM, 3);
                groups_meet(FREE, 3);
                state_of.put(state(), tid), state_of.put_z(rows().z, tid);
            }
            if (!ROWS && p.dw[1]) {
                groups_meet(INPUT_GRADIENT, 3);
                dw.absorb(k(c), dpre(), half);
            }
            copy_wait<0>();
            shared_fence();
            __syncthreads();
        }
        if (!ROWS && p.dw[1]) dw.put(p.dw[1] + (int64_t)blockIdx.x * (DIM * INPUTS), half);
    }

    /* Of the warp's keys of chunk c with the queries of one chunk: scale times the gradients of the scores, as a product's operand, and the
     * weights over z into their tile. */
    template <bool DIAGONAL>
    __device__ __forceinline__ void scores(const float (&sc)[8][4], const float (&dp)[8][4], int slot, uint32_t (&a)[4][4], bf16 *weights,
                                           int tid) {
        const float scale = o.a.scale32, scale2 = scale * LC_LOG2E;
        int first = lane_row(tid) - (DIAGONAL ? 0 : 64), most = lane_col(tid) - lane_row(tid), l = tid & 31; /* most: of row - column, less the lane's */
        uint32_t w[4];
#pragma unroll
        for (int n = 0; n < 8; n++) {
            int col = 8 * n + lane_col(tid);
            float2 shift = *(const float2 *)&rows().value[SHIFT][slot][col], delta = *(const float2 *)&rows().value[DELTA][slot][col];
            uint2 most_of = *(const uint2 *)&rows().value[3][slot][col]; /* x above the key's place */
            delta.x *= scale, delta.y *= scale;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float u[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    u[j] = exp2_fast(fmaf(sc[n][2 * i + j], scale2, -(j ? shift.y : shift.x)));
                    if (DIAGONAL && 8 * i - 8 * n - j > most) u[j] = 0;
                }
                w[n % 2 * 2 + i] = pack2<bf16>(u[0], u[1]);
                u[0] *= fmaf(dp[n][2 * i], scale, -delta.x), u[1] *= fmaf(dp[n][2 * i + 1], scale, -delta.y);
                if ((int16_t)most_of.x == first + 8 * i) u[0] += unpack2<bf16>(most_of.x).y; /* what the maximum gets */
                if ((int16_t)most_of.y == first + 8 * i) u[1] += unpack2<bf16>(most_of.y).y;
                a[n / 2][n % 2 * 2 + i] = pack2<bf16>(u[0], u[1]);
            }
            if (n % 2) matrix_store(weights + fragment_at<64>(16 * strip_of(tid), 8 * n - 8, l & 15, l >> 4), w);
        }
        hold(a);
    }

    __device__ __forceinline__ void window_side() {
        meet();
#pragma unroll 1
        for (int c = c1 - 1; c >= c0; c--) {
            const int tid = own_number();
            uint32_t far[4][4], near[4][4];
            float lo[8][4], hi[8][4]; /* scores and what multiplies their weights; then half of dk */
            clear(lo), clear(hi);
            products_begin(lo, hi);
            group_product<64, DIM, 64, ALONG_K, 64, ALONG_K>(lo, k(c), 0, q(c + 1), 0);
            group_product<64, DIM, 64, ALONG_K, 64, ALONG_K>(hi, v(c), 0, g(c + 1), 0);
            products_end(lo, hi);
            scores<false>(lo, hi, (c + 1) & 1, far, far_weights(), tid);
            groups_meet(NEAR, 3); /* c's queries are there */
            clear(lo), clear(hi);
            products_begin(lo, hi);
            group_product<64, DIM, 64, ALONG_K, 64, ALONG_K>(lo, k(c), 0, q(c), 0);
            group_product<64, DIM, 64, ALONG_K, 64, ALONG_K>(hi, v(c), 0, g(c), 0);
            products_end(lo, hi);
            if (takes(c)) groups_meet(ROOM, 3); /* nobody reads the features any more */
            scores<true>(lo, hi, c & 1, near, feature(), tid);
            shared_fence();
            groups_arrive(WEIGHTS, 2);
#pragma unroll 1
            for (int n = 0; n < DIM; n += 64) {
                clear(lo);
                products_begin(lo);
                group_product<64, 64, 64, ACROSS_K>(lo, far, q(c + 1) + n * 64, 0);
                group_product<64, 64, 64, ACROSS_K>(lo, near, q(c) + n * 64, 0);
                group_commit();
                if (!n) groups_meet(INPUT_GRADIENT, 2);
                group_product<64, INPUTS, 64, ALONG_K, DIM, ALONG_K>(lo, dpre(), 0, weights_k(), n);
                products_end(lo);
                if (o.dk.p) put_result(0, c, n, stride_of(0), lo, tid);
            }
            __syncthreads();
        }
    }

    __device__ __forceinline__ void zero_padding(const rows4 &r, const chunk_range &s) const { /* rows before the first token */
        for (int i = threadIdx.x; i < s.s0 * DIM; i += threads_of<ROWS>) r.row<bf16>(s.b, s.h, i / DIM)[i % DIM] = store<bf16>(0.f);
    }
    __device__ __forceinline__ void run() {
        int group = warp_number() >> 2;
        {
            chunk_range s = range();
            if (ROWS && threadIdx.x < 2) {
                bf16 *own = threadIdx.x ? p.rows[1] : p.rows[0];
                rows().result[threadIdx.x] =
                    own ? own + (s.head * o.a.t + s.s0) * DIM : either(threadIdx.x, o.dv, o.dk).row<bf16>(s.b, s.hk, s.s0);
            }
            __syncthreads();
            if (loads()) {
                load_queries(c1, threadIdx.x);
                if (c0 < c1) load_keys(c1 - 1, threadIdx.x);
                copy_commit();
            }
            load_maps<ROWS>(s.h);
            wait_for_previous(); /* the sums, the rows' values; nothing is written before */
            if (ROWS && s.seg == 0) { /* where heads do not share rows */
                if (o.dk.p && !p.rows[0]) zero_padding(o.dk, s);
                if (o.dv.p && !p.rows[1]) zero_padding(o.dv, s);
            }
        }
        if (group == STATE || group == STATE + 1) {
            state_side(group - STATE);
        } else {
            if (group == FEATURES) features_side();
            else if constexpr (ROWS) window_side();
        }
    }
};

template <bool ROWS> __global__ void __launch_bounds__(threads_of<ROWS>, 1) usual_keys_kernel(gradients o, fast p) {
#if LC_USUAL_RUNS
    LC_SHARED(memory);
    next_may_start();
    key_walk<ROWS> walk(o, p, memory);
    walk.run();
#endif
}

template <bool ROWS> static int launch(const gradients &o, const fast &p) {
    if (allow_shared(usual_keys_kernel<ROWS>, shared_usual)) return LC_K_DEVICE;
    launch_next(usual_keys_kernel<ROWS>, dim3((unsigned)(o.a.b * o.a.h * p.segments)), threads_of<ROWS>, shared_usual, o, p);
    return LC_K_OK;
}

int hybrid_backward_tiles::usual_keys(const gradients &o, const fast &p) {
    int rc = o.dk.p || o.dv.p ? launch<true>(o, p) : LC_K_OK;
    return rc || !p.dw[1] ? rc : launch<false>(o, p);
}
