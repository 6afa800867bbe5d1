/* hybrid_decode.cu: hybrid attention of one token with a carried state, for feature maps by weights and windows up to 64: decoding. Bound
 * by memory: a block serves HB query heads of one key head of one row, so that the window's keys and values are read once (HB 1 where
 * there are few heads in all). They and then the heads' states flow through a ring of pieces of 16 KB in shared memory, of which the
 * first are on their way before the kernels before have ended (chain.cuh). State and cache are f32 or bf16; what is computed is f32,
 * and a state is rounded when keys that leave the window have been added to it (terrace: every `window` tokens). The queries' features
 * come from a kernel of their own, which reads a head's weights once for ROWS rows. What this file does not take, hybrid_state.cu does.
 *
 * A thread holds 8 neighbouring columns; D / 8 lanes a group; rows of a piece go to the groups in turn. */
#include "hybrid_decode.cuh"

/* ---- the queries' features ---------------------------------------------------------------------------------------------- */
/* Grid [ceil(b / ROWS)][h]: features [b][h][F] of the queries, times lambda. A thread holds a quad of columns of some of the head's rows of
 * weights; their sums over a warp's rows meet in shared memory: parts [8 warps][ROWS][f]. */
__global__ void __launch_bounds__(DECODE_THREADS) query_features(hybrid a, carried c, float *features) {
    LC_SHARED(shared);
    float *q = (float *)shared, *parts = q + ROWS * a.d, *y = parts + 8 * ROWS * a.f;
    int h = blockIdx.x % a.h, b0 = blockIdx.x / a.h * ROWS, rows = a.b - b0 < ROWS ? a.b - b0 : (int)ROWS;
    int quads = a.f / 4, column = threadIdx.x % quads * 4, each = a.d * quads / DECODE_THREADS, first = threadIdx.x / quads * each;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float4 w[QUADS_HELD];
    next_may_start();
#pragma unroll
    for (int i = 0; i < QUADS_HELD; i++)
        if (i < each) w[i] = load_quad(a.mq.p, a.mq.dtype, h * a.mq.s[1] + (first + i) * a.mq.s[2] + column);
    wait_for_previous();
    for (int i = threadIdx.x; i < rows * a.d; i += DECODE_THREADS)
        q[i] = read_as<float>(a.q.p, a.q.dtype, (b0 + i / a.d) * a.q.s[0] + h * a.q.s[1] + i % a.d);
    __syncthreads();
    for (int r = 0; r < rows; r++) {
        float4 x = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < QUADS_HELD; i++)
            if (i < each) add_scaled(x, q[r * a.d + first + i], w[i]);
        for (int o = quads; o < 32; o <<= 1) {
            x.x += __shfl_xor_sync(0xffffffffu, x.x, o), x.y += __shfl_xor_sync(0xffffffffu, x.y, o);
            x.z += __shfl_xor_sync(0xffffffffu, x.z, o), x.w += __shfl_xor_sync(0xffffffffu, x.w, o);
        }
        if (lane < quads) *(float4 *)(parts + (warp * ROWS + r) * a.f + column) = x;
    }
    __syncthreads();
    if (warp >= rows) return; /* a warp a row */
    float *x = parts + warp * a.f, bias = bias_of<float>(a.bq, a.bq_dtype, h), lambda = hybrid_lambda(a, hybrid_gamma<float>(a, h));
    y += warp * a.F;
    for (int i = lane; i < a.f; i += 32) {
        float sum = bias + (a.skip ? q[warp * a.d + i] : 0);
        for (int part = 0; part < 8; part++) sum += x[part * ROWS * a.f + i];
        x[i] = sum;
    }
    __syncwarp();
    map_row(a, x, y);
    __syncwarp();
    for (int i = lane; i < a.F; i += 32)
        features[((int64_t)(b0 + warp) * a.h + h) * a.F + i] = lambda * (y[i] < (float)a.feature_eps ? (float)a.feature_eps : y[i]);
}

/* Grid b * h / HB. */
template <int D, int HB, class S, class C>
__global__ void __launch_bounds__(DECODE_THREADS, 2) decode_kernel(hybrid a, carried c, hybrid_out o, const float *features, int ring) {
    LC_SHARED(shared);
    next_may_start();
    int heads = a.h / HB, b = blockIdx.x / heads, h0 = blockIdx.x % heads * HB;
    hybrid_span at = span_of(a, c, b, threadIdx.x == 0 && h0 == 0);
    int lo = hybrid_lo(a, at.p0);
    decoder<D, HB, S, C> t = {a, c, shared, *(decode_shared<D, HB> *)(shared + ring), at, b, h0, lo, at.p0 - lo};
    if (at.p1 == at.p0) {
        wait_for_previous();
        t.nothing(o);
        return;
    }
    t.begin();
    wait_for_previous();
    t.read_token(features);
    __syncthreads();
    t.own_score();
    t.scores();
    __syncthreads();
    t.weights(o);
    __syncthreads();
    float y[HB][8];
    t.sums(y);
    t.finish(y, o);
    int gone = hybrid_lo(a, at.p0 + 1) - lo;
    if (gone > 0) t.absorb(gone);
    t.remember();
}

/* ---- the host's side ------------------------------------------------------------------------------------------------------ */
enum { SHARED_HEADS = 4 };

template <int D, int HB, class S, class C> static int run(const lc_kargs *k, const hybrid &a, const carried &c) {
    int ring = ring_bytes<D, HB>(a);
    size_t bytes = (size_t)ring + sizeof(decode_shared<D, HB>), first = sizeof(float) * ROWS * (a.d + 8 * a.f + a.F);
    float *features = (float *)k->work;
    if (allow_shared(decode_kernel<D, HB, S, C>, bytes) || allow_shared(query_features, first)) return LC_K_DEVICE;
    bool apart = true;
    for (int i = 9; i <= 13; i++) apart = apart && chain_apart(&k->x[i]);
    bool weights = chain_apart(&k->x[3]);
    LC_LAUNCH_AFTER(weights, query_features, (unsigned)(ceil_div(a.b, ROWS) * a.h), DECODE_THREADS, first, a, c, features);
    chain_writes(features, (int64_t)a.b * a.h * a.F * 4);
    if (k->x[8].data) apart = apart && chain_apart(&k->x[8]);
    LC_LAUNCH_AFTER(apart, (decode_kernel<D, HB, S, C>), (unsigned)(a.b * (a.h / HB)), DECODE_THREADS, bytes, a, c, hybrid_results(k),
                    (const float *)features, ring);
    for (int i = 0; i < 4; i++) chain_writes(&k->y[i]);
    for (int i = 9; i <= 11; i++) chain_writes(&k->x[i]);
    return LC_K_OK;
}

#define WAYS(S, C)                                                                                                               \
    {{run<64, 1, S, C>, run<64, SHARED_HEADS, S, C>}, {run<128, 1, S, C>, run<128, SHARED_HEADS, S, C>}}
typedef int (*decode_way)(const lc_kargs *k, const hybrid &a, const carried &c);
static const struct {
    int state, cache;
    decode_way run[2][2]; /* [d 64, 128][one head a block, SHARED_HEADS] */
} types[] = {
    {LC_K_F32, LC_K_F32, WAYS(float, float)}, {LC_K_F32, LC_K_BF16, WAYS(float, bf16)}, {LC_K_BF16, LC_K_BF16, WAYS(bf16, bf16)},
};
static int type_of(const lc_kargs *k) {
    for (int i = 0; i < (int)(sizeof types / sizeof *types); i++)
        if (types[i].state == k->x[9].dtype && types[i].cache == k->x[11].dtype) return i;
    return -1;
}

/* Rows of weights [h, d, f] that can be read four at a time. */
static bool even_weights(const lc_view *m) {
    return (uintptr_t)m->data % 16 == 0 && m->dim[2] % 4 == 0 && m->stride[0] % 4 == 0 && m->stride[1] % 4 == 0;
}

bool hybrid_decode_fit(const lc_kargs *k, const hybrid &a) {
    const lc_view *x = k->x;
    if (!x[9].data || !x[11].data || a.t != 1 || x[0].dtype == LC_K_F64 || a.map == MAP_NONE || a.window < 1 || a.window > MOST_WINDOW) return false;
    if ((a.d != 64 && a.d != 128) || (a.F & (a.F - 1)) || a.F < 16 || a.F > MOST_F || (a.f & (a.f - 1)) || a.f < 16 || a.f > 128) return false;
    if (type_of(k) < 0 || x[10].dtype != LC_K_F32 || !even_weights(x + 3) || !even_weights(x + 4)) return false;
    if (lc_cuda_select(k->device) || ring_bytes<128, 4>(a) + sizeof(decode_shared<128, 4>) > lc_cuda_now->shared_max ||
        ring_bytes<128, 1>(a) + sizeof(decode_shared<128, 1>) > lc_cuda_now->shared_max)
        return false;
    return (uintptr_t)x[9].data % 16 == 0 && (uintptr_t)x[11].data % 16 == 0;
}
size_t hybrid_decode_work(const hybrid &a) { return (size_t)a.b * a.h * a.F * sizeof(float); }

int hybrid_decode(const lc_kargs *k, const hybrid &a, const carried &c) {
    if (hybrid_decode_many_fit(k, a)) return hybrid_decode_many(k, a, c);
    bool share = a.group % SHARED_HEADS == 0 && (int64_t)a.b * a.h / SHARED_HEADS >= 2 * lc_cuda_now->sms;
    return types[type_of(k)].run[a.d == 128][share](k, a, c);
}
