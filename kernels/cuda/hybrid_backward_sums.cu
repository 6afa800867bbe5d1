/* hybrid_backward_sums.cu: what stands before and after the two walks of hybrid attention's gradient: the sums over segments that
 * the states start from, and the sums over query heads, segments and the batch, all in a fixed order. */
#include "hybrid_backward_tile.cuh"

/* ---- values of the queries' rows: D / 8 lanes a row, ROWS_AT_ONCE rows a thread; `blocks` a head ----------------------- */
enum { ROWS_AT_ONCE = 4 };
template <int D> __global__ void __launch_bounds__(SUM_THREADS) rows_kernel(gradients o, fast p, int blocks, float scale) {
    constexpr int LANES = D / 8, EACH = SUM_THREADS / LANES; /* rows of a block at a time */
    const hybrid &a = o.a;
    next_may_start();
    int head = blockIdx.x / blocks, b = head / a.h, h = head - b * a.h, lane = threadIdx.x % LANES;
    int first = (blockIdx.x - head * blocks) * (EACH * ROWS_AT_ONCE) + threadIdx.x / LANES, start = start_of(a, b);
    const bf16 *g_row = o.g.row<bf16>(b, h, first) + 8 * lane, *y_row = o.y.row<bf16>(b, h, first) + 8 * lane;
    int64_t g_step = EACH * o.g.s[2], y_step = EACH * o.y.s[2], plane = (int64_t)a.b * a.h * a.t;
    uint4 g[ROWS_AT_ONCE], y[ROWS_AT_ONCE];
    float value[ROWS_AT_ONCE];
#pragma unroll
    for (int n = 0; n < ROWS_AT_ONCE; n++) {
        int t = first + n * EACH;
        value[n] = 0, g[n] = y[n] = make_uint4(0, 0, 0, 0);
        if (t < start || t >= a.t) continue;
        g[n] = *(const uint4 *)(g_row + n * g_step), y[n] = *(const uint4 *)(y_row + n * y_step);
        if (lane == RZ) value[n] = *o.z.row<float>(b, h, t);
        if (lane == SHIFT && a.window) value[n] = *o.c.row<float>(b, h, t);
        if (lane == AT && a.window) value[n] = __int_as_float(*o.argmax.row<int32_t>(b, h, t));
    }
    scale *= hybrid_gamma<float>(a, h);
#pragma unroll
    for (int n = 0; n < ROWS_AT_ONCE; n++) {
        int t = first + n * EACH;
        const uint32_t *u = &g[n].x, *v = &y[n].x;
        float delta = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 s = unpack2<bf16>(u[j]), x = unpack2<bf16>(v[j]);
            delta += s.x * x.x + s.y * x.y;
        }
#pragma unroll
        for (int i = 1; i < LANES; i *= 2) delta += __shfl_xor_sync(0xffffffffu, delta, i);
        float rz = inverse(__shfl_sync(0xffffffffu, value[n], 0, LANES)), out = delta;
        if (t < start || t >= a.t || lane >= XSUM) continue;
        if (lane == RZ) out = rz;
        if (lane == SHIFT) out = a.window ? value[n] * LC_LOG2E - log2_fast(scale * rz) : INFINITY;
        if (lane == AT) out = __int_as_float(a.window ? __float_as_int(value[n]) - start : -1);
        p.values[lane * plane + (int64_t)head * a.t + t] = out;
    }
}

int hybrid_backward_tiles::hybrid_backward_rows(const gradients &o, const fast &p, bool usual) {
    const hybrid &a = o.a;
    int blocks = (int)ceil_div(a.t, SUM_THREADS / (a.d / 8) * ROWS_AT_ONCE);
    unsigned grid = (unsigned)(a.b * a.h * blocks);
    float scale = usual ? 1.f : a.scale32;
    if (a.d == 128) LC_LAUNCH(rows_kernel<128>, grid, SUM_THREADS, 0, o, p, blocks, scale);
    else LC_LAUNCH(rows_kernel<64>, grid, SUM_THREADS, 0, o, p, blocks, scale);
    return LC_K_OK;
}

/* ---- what a segment adds to S, Z (blockIdx.y 0) and to R, P (1) -------------------------------------------------------- */
/* Two blocks a multiprocessor; what a map reads has one place, its second factor two. */
template <int D, int BF, int FW> struct sums_layout {
    typedef layout<D, BF, FW> L;
    static constexpr size_t bytes = 2 * ((size_t)3 * L::tile + L::weights + 64 * BF) + 2048; /* 2048: 4 * 64 + BF floats */
};

template <int D, int BF, int FW> __global__ void __launch_bounds__(SUM_THREADS, 2) segment_sums_kernel(gradients o, fast p) {
    LC_SHARED(memory);
    next_may_start();
    typedef layout<D, BF, FW> L;
    typedef held<BF, D, 2> states;
    constexpr int SM = BF / 64;
    const hybrid &a = o.a;
    const bool back = blockIdx.y; /* the last segment adds to nobody's S, the first to nobody's R */
    chunk_range s(a, p.segments, blockIdx.x / (p.segments - 1), blockIdx.x % (p.segments - 1) + (back ? 1 : 0));
    bf16 *tx = (bf16 *)memory, *tus = tx + L::tile, *w = tus + 2 * L::tile, *feature = w + L::weights;
    float *values = (float *)(feature + 64 * BF), *z = values + 256; /* of rows, by chunk & 1 */
    int first = back ? s.c0 + p.lag : s.c0 - p.lag, end = back ? s.c1 + p.lag : s.c1 - p.lag, tid = threadIdx.x;
    if (first < 0) first = 0;
    if (end > s.n) end = s.n;
    const rows4 x = either(back, a.q, a.k), u = either(back, o.g, a.v);
    int head = back ? s.h : s.hk, warp = warp_number(), strip = warp & 3, hf = warp >> 2, m = 16 * strip;
    float lambda = hybrid_lambda<float>(a, hybrid_gamma<float>(a, s.h));
    float bias = back ? bias_of<float>(a.bq, a.bq_dtype, s.h) : bias_of<float>(a.bk, a.bk_dtype, s.h);
    typename states::sum sum;
    const bf16 *base_x = x.row<bf16>(s.b, head, s.s0), *base_u = u.row<bf16>(s.b, head, s.s0);
    auto load_chunk = [&](int c) {
        if (c < end) load_tile<D, SUM_THREADS>(tx, base_x, x, s, c), load_tile<D, SUM_THREADS>(tus + (c & 1) * L::tile, base_u, u, s, c);
        copy_commit();
    };
    load_chunk(first);
    if constexpr (FW > 0) load_weights<D, FW, SUM_THREADS>(w, either(back, a.mq, a.mk), s.h, a.f);
    clear(sum);
    if (tid < BF) z[tid] = 0;
    if (back) wait_for_previous(); /* the values of rows: before them, all else had ended */
    auto fetch = [&](int c) { /* delta of a row by the first 64 threads, lambda / z by the next */
        int row = tid & 63;
        if (!back || tid >= 128) return 1.f;
        if (c >= end || !holds(s, c, row)) return 0.f;
        float v = p.values[((int64_t)(tid < 64 ? DELTA : RZ) * a.b * a.h + s.head) * a.t + s.s0 + c * 64 + row];
        return tid < 64 ? v : v * lambda;
    };
    float value = fetch(first);
    for (int c = first; c < end; c++) {
        bf16 *tu = tus + (c & 1) * L::tile;
        float v[BF / 16][4];
        float *delta = values + (c & 1) * 128, *rz = delta + 64;
        if (tid < 128) delta[tid] = value;
        copy_wait<0>();
        meet();
        features<D, BF, FW>(a, s, back ? 0 : 1, tx, w, bias, c, hf, m, v);
        int r0 = m + ((tid & 31) >> 2);
        const float by[2] = {rz[r0], rz[r0 + 8]};
        put_features<BF, FW>(a, feature, hf, m, by, v);
        meet();
        load_chunk(c + 1);
        value = fetch(c + 1);
        states::absorb(sum, feature, tu, hf);
        if (hf) column_sums<SM>(z, true, feature, strip * 16 * SM, delta);
    }
    float *to = (back ? p.state[1] : p.state[0]) + (s.head * p.segments + s.seg) * (BF * D + BF);
    states::put(to, sum, hf);
    __syncthreads();
    if (tid < BF) to[BF * D + tid] = z[tid];
    copy_wait<0>();
}

template <int D, int BF, int FW, bool TRI> struct sums_launcher {
    static int launch(const gradients &o, const fast &p) { return sums<D, BF, FW>(o, p); }
    template <int D_, int BF_, int FW_> static int sums(const gradients &o, const fast &p) {
        size_t bytes = sums_layout<D_, BF_, FW_>::bytes;
        if (allow_shared(segment_sums_kernel<D_, BF_, FW_>, bytes)) return LC_K_DEVICE;
        launch_next(segment_sums_kernel<D_, BF_, FW_>, dim3((unsigned)(o.a.b * o.a.h * (p.segments - 1)), 2), SUM_THREADS, bytes, o, p);
        return LC_K_OK;
    }
};

int hybrid_backward_tiles::hybrid_backward_sums(const gradients &o, const fast &p) {
    return p.segments > 1 ? with_shape<sums_launcher>(o, p) : LC_K_OK;
}

/* ---- rows that query heads share: 0 dk, 1 dv, 2 dmk; a thread eight columns; `blocks` a head -------------------------- */
__device__ __forceinline__ void shared_rows(const gradients &o, const fast &p, int which, int block, int blocks) {
    const hybrid &a = o.a;
    int group = which == 2 ? a.mk_group : a.group, heads = a.h / group, pieces = (which == 2 ? a.F : a.d) / 8;
    int of = block / blocks, n = (block - of * blocks) * SUM_THREADS + threadIdx.x, t = n / pieces, e = (n - t * pieces) * 8;
    int b = of / heads, head = of - b * heads;
    const rows4 r = either(which == 0, o.dk, either(which == 1, o.dv, o.dmk));
    const bf16 *parts = which == 0 ? p.rows[0] : which == 1 ? p.rows[1] : p.rows[2];
    if (!parts || t >= a.t || b >= a.b) return;
    float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    const bf16 *from = parts + (((int64_t)b * a.h + head * group) * a.t + t) * (8 * pieces) + e;
    int64_t step = (int64_t)a.t * 8 * pieces;
    if (t < start_of(a, b)) group = 0;
#pragma unroll 4
    for (int i = 0; i < group; i++) {
        uint4 v = *(const uint4 *)(from + i * step);
        const uint32_t *u = &v.x;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 f = unpack2<bf16>(u[j]);
            sum[2 * j] += f.x, sum[2 * j + 1] += f.y;
        }
    }
    bf16 *to = r.row<bf16>(b, head, t) + e;
    uint4 v = make_uint4(pack2<bf16>(sum[0], sum[1]), pack2<bf16>(sum[2], sum[3]), pack2<bf16>(sum[4], sum[5]),
                         pack2<bf16>(sum[6], sum[7]));
    if ((uintptr_t)to % 16 == 0) {
        *(uint4 *)to = v;
        return;
    }
    uint32_t *words = (uint32_t *)to;
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
}

/* ---- sums over batch and segments for head h; y: two fragments of the query map's weights, of the key map's, the rest ---- */
__device__ __forceinline__ void totals(const gradients &o, const fast &p, int h, int y) {
    __shared__ float room[32];
    const hybrid &a = o.a;
    int tid = threadIdx.x, parts = a.b * p.segments, frags = a.d * p.fw / 1024;
    auto item = [&](int n) { return ((int64_t)(n / p.segments) * a.h + h) * p.segments + n % p.segments; };
    if (y == 2 * frags) {
        for (int what = 0; what < 3; what++) {
            const float *from = what < 2 ? p.bias[what] : o.dfactors ? p.xs : NULL;
            if (!from) continue;
            float sum = 0;
            for (int n = tid; n < parts; n += SUM_THREADS) sum += from[item(n)];
            sum = block_reduce(sum, op_sum(), 0.f, room);
            if (what == 2) sum *= a.affine ? -1.f : hybrid_gamma<float>(a, h) - 1;
            void *out = what == 0 ? o.dbq : what == 1 ? o.dbk : o.dfactors;
            if (!tid) write_as<float>(out, what == 0 ? o.dbq_dtype : what == 1 ? o.dbk_dtype : o.dfactors_dtype, h, sum);
        }
        return;
    }
    int key = y >= frags, frag = y - key * frags;
    const float *dw = key ? p.dw[1] : p.dw[0];
    if (!dw) return;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (int n = 0; n < parts; n++) {
        float4 v = ((const float4 *)(dw + item(n) * frags * 1024))[frag * SUM_THREADS + tid];
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    const rows4 r = either(key, o.dmk, o.dmq);
    int at = frag * 2 + (tid >> 7), across = p.fw / 8, e = at / across * 64 + (tid >> 5 & 3) * 16 + ((tid & 31) >> 2);
    int f = at % across * 8 + 2 * (tid & 3);
    float v[4] = {sum.x, sum.y, sum.z, sum.w};
    for (int j = 0; j < 4; j++)
        if (f + (j & 1) < a.f) write_as<float>(r.p, r.dtype, h * r.s[1] + (e + 8 * (j >> 1)) * r.s[2] + f + (j & 1), v[j]);
}

/* Both in one launch: `sums` blocks of totals, then of rows. */
__global__ void finish_kernel(gradients o, fast p, int sums, int heads, int blocks) {
    wait_for_previous();
    int n = blockIdx.x;
    if (n < sums) {
        totals(o, p, n % o.a.h, n / o.a.h);
        return;
    }
    int each = o.a.b * heads * blocks, which = (n - sums) / each;
    shared_rows(o, p, which, n - sums - which * each, blocks);
}

int hybrid_backward_tiles::hybrid_backward_finish(const gradients &o, const fast &p) {
    const hybrid &a = o.a;
    int blocks = (int)ceil_div((int64_t)a.t * ((a.d > a.F ? a.d : a.F) / 8), SUM_THREADS), heads = p.rows[0] || p.rows[1] ? a.g : 0, sums = 0;
    if (p.rows[2] && a.h / a.mk_group > heads) heads = a.h / a.mk_group;
    bool weights = p.dw[0] || p.dw[1];
    if (weights || p.bias[0] || p.bias[1] || o.dfactors) sums = a.h * (2 * (a.d * p.fw / 1024) + 1);
    unsigned grid = (unsigned)(sums + (p.rows[2] ? 3 : 2) * a.b * heads * blocks);
    if (grid) launch_next(finish_kernel, dim3(grid), SUM_THREADS, 0, o, p, sums, heads, blocks);
    return LC_K_OK;
}
