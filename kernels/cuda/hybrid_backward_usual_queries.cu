/* hybrid_backward_usual_queries.cu: the query side of the usual call's gradient: a block walks forward over a segment of chunks of a
 * query head with S in registers and makes x of its rows and dq, or its share of the query map's gradient. */
#include "hybrid_backward_usual.cuh"

using namespace hybrid_backward_usual;

template <bool ROWS> struct query_walk : usual_block {
    __device__ __forceinline__ query_walk(const gradients &o, const fast &p, char *memory) : usual_block(o, p, memory) {}
    /* Whether chunk c - 1 enters the state for chunk c + 1. */
    __device__ __forceinline__ bool takes(int c) const { return c > 0 && c + 1 < c1; }

    __device__ __forceinline__ void features_side() {
        float all_x = 0;
        const bool given = ROWS || p.dw[0];
        meet();
#pragma unroll 1
        for (int c = c0; c < c1; c++) {
            const int tid = own_number();
            float x[8][4], d[8][4], dot[2] = {0, 0};
            clear(x), clear(d);
            products_begin(x, d);
            group_product<INPUTS, DIM, 64, ALONG_K, DIM, ACROSS_K>(x, q(c), 0, weights_q(), 0);
            group_commit();
            group_product<64, DIM, 64, ALONG_K, FEATURED, ALONG_K>(d, g(c), 0, state(), 0);
            group_commit();
            int row = lane_row(tid);
            const float *deltas = rows().value[DELTA][c & 1] + row, *rz = rows().value[RZ][c & 1] + row;
            const float delta[2] = {deltas[0], deltas[8]}, times[2] = {rz[0] * rows().lambda, rz[8] * rows().lambda};
            both_features f;
            group_wait<1>();
            group_hold(x);
            f.make(x);
            clear(x);
            products_begin(x);
            group_product<64, DIM, 64, ALONG_K, FEATURED, ALONG_K>(x, g(c), 0, state(), 64);
            group_commit();
            group_wait<1>();
            group_hold(d);
            f.gradient(0, d, rows().z, delta, times, dot, tid);
            uint32_t plus[4][4]; /* registers are short */
            as_fragments<64>(plus, d);
            hold(plus);
            group_wait<0>();
            group_hold(x);
            f.gradient(1, x, rows().z + 64, delta, times, dot, tid);
            if (takes(c)) groups_arrive(FREE, 3);
            add_to(x, plus);
            if (given) {
                put_inputs(dpre(), x, tid);
                shared_fence();
                groups_arrive(INPUT_GRADIENT, ROWS ? 2 : 3);
            }
            if ((tid & 3) == 0) {
                uint32_t *to = (uint32_t *)value_at(XSUM, c, row);
                const int *at = (const int *)rows().value[AT][c & 1] + row;
#pragma unroll
                for (int i = 0; i < 2; i++)
                    if (c * 64 + row + 8 * i < len) {
                        to[8 * i] = pack2<bf16>(0.f, dot[i] * o.a.scale32) | (uint16_t)(at[8 * i] - c * 64);
                        all_x += dot[i];
                    }
            }
            __syncthreads();
        }
        all_x = warp_reduce(all_x, op_sum());
        if (threadIdx.x % 32 == 0) rows().sum[threadIdx.x / 32] = all_x;
    }

    __device__ __forceinline__ void state_side(int half) {
        state_rows state_of;
        if (c0 < c1) load_values(c0, AT, threadIdx.x);
        copy_commit();
        state_of.clear_all(half, strip_of(threadIdx.x));
#pragma unroll 1
        for (int n = 0, seg = blockIdx.x % p.segments; n < seg; n++)
            state_of.add(p.state[0] + ((int64_t)blockIdx.x - seg + n) * PART);
        state_of.put(state(), threadIdx.x), state_of.put_z(rows().z, threadIdx.x);
        copy_wait<0>();
        meet();
        const float by[2] = {1, 1};
        weights_rows dw;
        if (!ROWS) clear(dw.sum);
#pragma unroll 1
        for (int c = c0; c < c1; c++) {
            const int tid = own_number();
            float x[8][4];
            clear(x);
            products_begin(x);
            if (takes(c)) group_product<INPUTS, DIM, 64, ALONG_K, DIM, ACROSS_K>(x, k(c - 1), 0, weights_k(), 0);
            group_commit();
            load_keys(c, tid);
            copy_commit();
            if (c + 1 < c1) load_queries(c + 1, tid), load_values(c + 1, AT, tid);
            copy_commit();
            group_wait<0>();
            group_hold(x);
            if constexpr (ROWS) {
                copy_wait<1>();
                shared_fence();
                groups_arrive(NEAR, 3);
            }
            if (takes(c)) {
                put_features(feature(), half, by, x, tid);
                shared_fence();
                groups_meet(INNER + half, 1);
                products_begin(state_of.sum);
                group_product<DIM, 64, 64, ACROSS_K, 64, ACROSS_K>(state_of.sum, feature(), 64 * half, v(c - 1), 0);
                group_commit();
                state_of.add_z(feature(), NULL, tid);
                group_wait<0>();
                group_hold(state_of.sum);
                groups_meet(FREE, 3);
                state_of.put(state(), tid), state_of.put_z(rows().z, tid);
            }
            if (!ROWS && p.dw[0]) {
                groups_meet(INPUT_GRADIENT, 3);
                dw.absorb(q(c), dpre(), half);
            }
            copy_wait<0>();
            shared_fence();
            __syncthreads();
        }
        if (!ROWS && p.dw[0]) dw.put(p.dw[0] + (int64_t)blockIdx.x * (DIM * INPUTS), half);
    }

    /* Scale times the gradients of the scores of the warp's rows with a chunk of keys, but for what the maximum gets: chunk c (DIAGONAL) as a
     * product's operand, the one before into its tile; less: their sums. */
    template <bool DIAGONAL>
    __device__ __forceinline__ void scores(int c, const float (&sc)[8][4], const float (&dp)[8][4], float (&less)[2], uint32_t (&a)[4][4], int tid) {
        const float *shifts = rows().value[SHIFT][c & 1] + lane_row(tid), *deltas = rows().value[DELTA][c & 1] + lane_row(tid);
        const float none = DIAGONAL || c ? 0 : INFINITY; /* before the first chunk there is nothing */
        const float scale = o.a.scale32, scale2 = scale * LC_LOG2E, shift[2] = {shifts[0] + none, shifts[8] + none};
        const float delta[2] = {deltas[0] * scale, deltas[8] * scale};
        int most = lane_row(tid) - lane_col(tid), l = tid & 31; /* most: of column - row, less the lane's */
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float u[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    u[j] = exp2_fast(fmaf(sc[n][2 * i + j], scale2, -shift[i])) * fmaf(dp[n][2 * i + j], scale, -delta[i]);
                    if (DIAGONAL && 8 * n + j - 8 * i > most) u[j] = 0;
                    less[i] += u[j];
                }
                a[n / 2][n % 2 * 2 + i] = pack2<bf16>(u[0], u[1]);
                if (!DIAGONAL && n % 2 && i) matrix_store(far_weights() + fragment_at<64>(16 * strip_of(tid), 8 * n - 8, l & 15, l >> 4), a[n / 2]);
            }
    }
    /* += x at column `at` of the operand's rows row() + 8 i. */
    static __device__ __forceinline__ void at_maximum(uint32_t (&a)[4][4], int i, int at, float x, int tid) {
        int block = at >= 0 && at < 64 && (at & 6) == lane_col(tid) ? at >> 3 : -1;
        uint32_t two = at & 1 ? pack2<bf16>(0.f, x) : pack2<bf16>(x, 0.f);
#pragma unroll
        for (int n = 0; n < 8; n++)
            if (block == n) a[n / 2][n % 2 * 2 + i] = add2(a[n / 2][n % 2 * 2 + i], two);
    }

    __device__ __forceinline__ void window_side() {
        meet();
#pragma unroll 1
        for (int c = c0; c < c1; c++) {
            const int tid = own_number();
            float sc[8][4], dp[8][4], less[2] = {0, 0};
            uint32_t near[4][4];
            clear(sc), clear(dp);
            products_begin(sc, dp);
            group_product<64, DIM, 64, ALONG_K, 64, ALONG_K>(sc, q(c), 0, k(c - 1), 0);
            group_product<64, DIM, 64, ALONG_K, 64, ALONG_K>(dp, g(c), 0, v(c - 1), 0);
            group_commit();
            group_wait<0>();
            group_hold(sc), group_hold(dp);
            scores<false>(c, sc, dp, less, near, tid);
            groups_meet(NEAR, 3); /* c's keys are there */
            clear(sc), clear(dp);
            products_begin(sc, dp);
            group_product<64, DIM, 64, ALONG_K, 64, ALONG_K>(sc, q(c), 0, k(c), 0);
            group_product<64, DIM, 64, ALONG_K, 64, ALONG_K>(dp, g(c), 0, v(c), 0);
            group_commit();
            group_wait<0>();
            group_hold(sc), group_hold(dp);
            scores<true>(c, sc, dp, less, near, tid);
            hold(near);
#pragma unroll
            for (int i = 0; i < 2; i++) { /* all of a row's weights times their gradients sum to what the linear keys and the maximum get: to 0 */
                int row = lane_row(tid) + 8 * i, at = __float_as_int(rows().value[AT][c & 1][row]) - c * 64;
                float x = -quad_sum(less[i]);
                at_maximum(near, i, at, x, tid);
                if ((tid & 3) == 0 && at < 0 && at >= -64) {
                    bf16 *to = tile_at<64>(far_weights(), row, at + 64);
                    *to = store<bf16>(::load<float>(*to) + x);
                }
            }
            shared_fence();
            groups_meet(SCORES, 1);
#pragma unroll 1
            for (int n = 0; n < DIM; n += 64) {
                clear(sc);
                products_begin(sc);
                group_product<64, 64, 64, ALONG_K, 64, ACROSS_K>(sc, far_weights(), 0, k(c - 1) + n * 64, 0);
                group_product<64, 64, 64, ACROSS_K>(sc, near, k(c) + n * 64, 0);
                group_commit();
                if (!n) groups_meet(INPUT_GRADIENT, 2);
                group_product<64, INPUTS, 64, ALONG_K, DIM, ALONG_K>(sc, dpre(), 0, weights_q(), n);
                products_end(sc);
                put_result(0, c, n, (int)o.dq.s[2], sc, tid);
            }
            __syncthreads();
        }
    }

    __device__ __forceinline__ void run() {
        int group = warp_number() >> 2;
        {
            chunk_range s = range();
            if (ROWS && !threadIdx.x) rows().result[0] = o.dq.row<bf16>(s.b, s.h, s.s0);
            __syncthreads();
            if (loads()) {
                load_keys(c0 - 1, threadIdx.x);
                if (c0 < c1) load_queries(c0, threadIdx.x);
                copy_commit();
            }
            load_maps<ROWS>(s.h);
            wait_for_previous(); /* the sums; nothing is written before */
            if (ROWS && s.seg == 0)
                for (int i = threadIdx.x; i < s.s0 * DIM; i += threads_of<ROWS>) o.dq.row<bf16>(s.b, s.h, i / DIM)[i % DIM] = store<bf16>(0.f);
        }
        if (group == STATE || group == STATE + 1) {
            state_side(group - STATE);
        } else {
            if (group == FEATURES) features_side();
            else if constexpr (ROWS) window_side();
        }
        __syncthreads();
        if (!threadIdx.x) p.xs[blockIdx.x] = rows().sum[0] + rows().sum[1] + rows().sum[2] + rows().sum[3];
    }
};

template <bool ROWS> __global__ void __launch_bounds__(threads_of<ROWS>, 1) usual_queries_kernel(gradients o, fast p) {
#if LC_USUAL_RUNS
    LC_SHARED(memory);
    next_may_start();
    query_walk<ROWS> walk(o, p, memory);
    walk.run();
#endif
}

template <bool ROWS> static int launch(const gradients &o, const fast &p) {
    if (allow_shared(usual_queries_kernel<ROWS>, shared_usual)) return LC_K_DEVICE;
    launch_next(usual_queries_kernel<ROWS>, dim3((unsigned)(o.a.b * o.a.h * p.segments)), threads_of<ROWS>, shared_usual, o, p);
    return LC_K_OK;
}

int hybrid_backward_tiles::usual_queries(const gradients &o, const fast &p) {
    int rc = o.dq.p ? launch<true>(o, p) : LC_K_OK;
    return rc || (o.dq.p && !p.dw[0]) ? rc : launch<false>(o, p);
}
