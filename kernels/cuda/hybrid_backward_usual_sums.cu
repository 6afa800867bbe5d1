/* hybrid_backward_usual_sums.cu: what a segment of the usual call adds to S, Z (blockIdx.y 0) and to R, P (1): two groups, each with the
 * features of one sign and their rows of the state, two blocks a multiprocessor. */
#include "hybrid_backward_usual.cuh"

using namespace hybrid_backward_usual;

enum { SUM_TILES = 6 }; /* what features are made of and what they multiply, of two chunks each; the map's weights; features */
struct sum_rows {
    float value[2][2][64]; /* RZ and DELTA by chunk & 1 */
};
constexpr size_t shared_sums = 2 * (size_t)SUM_TILES * TILE + sizeof(sum_rows);

__global__ void __launch_bounds__(LOADERS, 2) usual_sums_kernel(gradients o, fast p) {
#if LC_USUAL_RUNS
    LC_SHARED(memory);
    next_may_start();
    const hybrid &a = o.a;
    const bool back = blockIdx.y; /* the last segment adds to nobody's S, the first to nobody's R */
    chunk_range s(a, p.segments, blockIdx.x / (p.segments - 1), blockIdx.x % (p.segments - 1) + (back ? 1 : 0));
    bf16 *tiles = (bf16 *)memory, *weights = tiles + 4 * TILE, *feature = tiles + 5 * TILE;
    sum_rows &rows = *(sum_rows *)(memory + 2 * (size_t)SUM_TILES * TILE);
    const int first = max(back ? s.c0 + 1 : s.c0 - 1, 0), end = min(back ? s.c1 + 1 : s.c1 - 1, s.n);
    const rows4 x = either(back, a.q, a.k), u = either(back, o.g, a.v);
    const int head = back ? s.h : s.hk, half = warp_number() >> 2;
    const float lambda = hybrid_lambda<float>(a, hybrid_gamma<float>(a, s.h)), *values = p.values + s.head * a.t + s.s0;
    const bf16 *base_x = x.row<bf16>(s.b, head, s.s0), *base_u = u.row<bf16>(s.b, head, s.s0);
    auto load_x = [&](int c, int tid) { load_tile<DIM, LOADERS>(tiles + (c & 1) * TILE, base_x, x, s, c, tid); };
    auto load_u = [&](int c, int tid) {
        load_tile<DIM, LOADERS>(tiles + (2 + (c & 1)) * TILE, base_u, u, s, c, tid);
        if (!back || tid >= 128) return;
        int what = tid >> 6, row = tid & 63;
        copy4(&rows.value[what][c & 1][row], values + (int64_t)what * a.b * a.h * a.t + c * 64 + row, c * 64 + row < s.len);
    };
    state_rows state_of;
    state_of.clear_all(half, strip_of(threadIdx.x));
    if (first < end) load_x(first, threadIdx.x);
    load_weights<DIM, INPUTS, LOADERS>(weights, either(back, a.mq, a.mk), s.h, INPUTS);
    if (back) wait_for_previous(); /* the values of rows: before them, all else had ended */
    if (first < end) load_u(first, threadIdx.x);
    copy_commit();
#pragma unroll 1
    for (int c = first; c < end; c++) {
        const int tid = own_number();
        float in[8][4], by[2] = {1, 1};
        clear(in);
        copy_wait<0>();
        meet();
        products_begin(in);
        group_product<INPUTS, DIM, 64, ALONG_K, DIM, ACROSS_K>(in, tiles + (c & 1) * TILE, 0, weights, 0);
        group_commit();
        if (c + 1 < end) load_x(c + 1, tid), load_u(c + 1, tid); /* their places are free since the barrier */
        copy_commit();
        if (back) {
            const float *rz = rows.value[RZ][c & 1] + lane_row(tid);
            by[0] = lambda * rz[0], by[1] = lambda * rz[8];
        }
        group_wait<0>();
        group_hold(in);
        put_features(feature, half, by, in, tid);
        shared_fence();
        groups_meet(INNER + half, 1);
        products_begin(state_of.sum);
        group_product<DIM, 64, 64, ACROSS_K, 64, ACROSS_K>(state_of.sum, feature, 64 * half, tiles + (2 + (c & 1)) * TILE, 0);
        group_commit();
        state_of.add_z(feature, back ? rows.value[DELTA][c & 1] : NULL, tid);
        group_wait<0>();
        group_hold(state_of.sum);
    }
    copy_wait<0>();
    state_of.leave((back ? p.state[1] : p.state[0]) + (s.head * p.segments + s.seg) * PART);
#endif
}

int hybrid_backward_tiles::usual_sums(const gradients &o, const fast &p) {
    if (p.segments < 2) return LC_K_OK;
    if (allow_shared(usual_sums_kernel, shared_sums)) return LC_K_DEVICE;
    launch_next(usual_sums_kernel, dim3((unsigned)(o.a.b * o.a.h * (p.segments - 1)), 2), LOADERS, shared_sums, o, p);
    return LC_K_OK;
}
