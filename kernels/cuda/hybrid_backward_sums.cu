/* hybrid_backward_sums.cu: what stands before and after the two walks of hybrid attention's gradient: the sums over segments that
 * the states start from, and the sums over query heads, segments and the batch, all in a fixed order. */
#include "hybrid_backward_tile.cuh"

/* ---- what a segment adds to S, Z (blockIdx.y 0) and to R, P (1) -------------------------------------------------------- */
template <int D, int BF, int FW> struct sums_layout {
    typedef layout<D, BF, FW> L;
    static constexpr size_t bytes = 2 * ((size_t)4 * L::tile + L::weights + 64 * BF) + 1024; /* 1024: 64 + BF floats */
};

template <int D, int BF, int FW> __global__ void __launch_bounds__(THREADS, 1) segment_sums_kernel(gradients o, fast p) {
    LC_SHARED(memory);
    typedef layout<D, BF, FW> L;
    constexpr int SM = BF / 64, SN = D / 16;
    chunk_range s(o.a, p.segments);
    bool back = blockIdx.y;
    if (s.seg == (back ? 0 : p.segments - 1)) return; /* nobody asks */
    bf16 *tiles = (bf16 *)memory, *w = tiles + 4 * L::tile, *feature = w + L::weights;
    float *delta = (float *)(feature + 64 * BF), *z = delta + 64;
    int first = back ? s.c0 + p.lag : s.c0 - p.lag, end = back ? s.c1 + p.lag : s.c1 - p.lag, tid = threadIdx.x;
    if (first < 0) first = 0;
    if (end > s.n) end = s.n;
    const hybrid &a = o.a;
    const rows4 &x = back ? a.q : a.k, &u = back ? o.g : a.v;
    int head = back ? s.h : s.hk, strip = tid >> 5 & 3, hf = tid >> 7, m = 16 * strip, width = half_width<BF>(a, hf);
    float lambda = hybrid_lambda<float>(a, hybrid_gamma<float>(a, s.h)), sum[SM][SN][4];
#pragma unroll
    for (int i = 0; i < SM; i++) clear(sum[i]);
    if (tid < BF) z[tid] = 0;
    if (a.map != MAP_NONE) load_weights<D, FW>(w, back ? a.mq : a.mk, s.h, a.f);
    if (first < end) load_tile<D>(tiles, x, s, head, first), load_tile<D>(tiles + L::tile, u, s, head, first);
    copy_commit();
    for (int c = first, slot = 0; c < end; c++, slot ^= 1) {
        bf16 *tx = tiles + slot * 2 * L::tile, *tu = tx + L::tile, *next = tiles + (slot ^ 1) * 2 * L::tile;
        copy_wait<0>();
        __syncthreads();
        if (c + 1 < end) load_tile<D>(next, x, s, head, c + 1), load_tile<D>(next + L::tile, u, s, head, c + 1);
        copy_commit();
        uint4 y[D / 32];
        if (back) fetch_y<D>(o, s, c, y);
        float v[BF / 16][4], by[2] = {1, 1};
        features<D, BF, FW>(o, s, back ? 0 : 1, tx, w, c, hf, m, v);
        for (int i = 0; back && i < 2; i++) {
            int row = m + ((tid & 31) >> 2) + 8 * i;
            by[i] = holds(s, c, row) ? lambda / *o.z.row<float>(s.b, s.h, s.s0 + c * 64 + row) : 0.f;
        }
#pragma unroll
        for (int n = 0; n < BF / 16; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) v[n][j] = feature_of(a, n, width, v[n][j]) * by[j >> 1];
        put_tile(feature, v, m, hf * (BF / 2));
        float row = back ? row_delta<D>(tu, y) : 1.f;
        if (!(tid & 3)) delta[tid >> 2] = row;
        __syncthreads();
        absorb(sum, feature, strip * 16 * SM, tu, hf * (D / 2));
        if (hf) column_sums<SM>(z, true, feature, strip * 16 * SM, delta);
    }
    float *to = p.state[back] + (s.head * p.segments + s.seg) * (BF * D + BF);
    put_fragments(to, sum);
    __syncthreads();
    if (tid < BF) to[BF * D + tid] = z[tid];
    copy_wait<0>();
}

template <int D, int BF, int FW, bool TRI> struct sums_launcher {
    static int launch(const gradients &o, const fast &p) { return sums<D, BF, FW>(o, p); }
    template <int D_, int BF_, int FW_> static int sums(const gradients &o, const fast &p) {
        size_t bytes = sums_layout<D_, BF_, FW_>::bytes;
        if (allow_shared(segment_sums_kernel<D_, BF_, FW_>, bytes)) return LC_K_DEVICE;
        LC_LAUNCH((segment_sums_kernel<D_, BF_, FW_>), dim3((unsigned)(o.a.b * o.a.h * p.segments), 2), THREADS, bytes, o, p);
        return LC_K_OK;
    }
};

int hybrid_backward_tiles::hybrid_backward_sums(const gradients &o, const fast &p) { return p.segments > 1 ? with_shape<sums_launcher>(o, p) : LC_K_OK; }

/* ---- rows that query heads share: blockIdx.y 0 dk, 1 dv, 2 dmk; a thread eight columns -------------------------------- */
__global__ void shared_rows_kernel(gradients o, fast p) {
    const hybrid &a = o.a;
    int which = blockIdx.y, group = which == 2 ? a.mk_group : a.group, heads = a.h / group;
    int64_t pieces = (which == 2 ? a.F : a.d) / 8, width = pieces * 8;
    const rows4 &r = which == 0 ? o.dk : which == 1 ? o.dv : o.dmk;
    if (!p.rows[which]) return;
    for (int64_t n = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; n < (int64_t)a.b * heads * a.t * pieces; n += (int64_t)gridDim.x * blockDim.x) {
        int e = (int)(n % pieces) * 8, t = (int)(n / pieces % a.t), head = (int)(n / pieces / a.t % heads), b = (int)(n / pieces / a.t / heads);
        float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        const bf16 *from = p.rows[which] + (((int64_t)b * a.h + head * group) * a.t + t) * width + e;
        for (int i = 0; i < group && t >= start_of(a, b); i++) {
            uint4 v = *(const uint4 *)(from + i * a.t * width);
            const uint32_t *u = &v.x;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float2 f = unpack2<bf16>(u[j]);
                sum[2 * j] += f.x, sum[2 * j + 1] += f.y;
            }
        }
        uint32_t *to = (uint32_t *)(r.row<bf16>(b, head, t) + e);
#pragma unroll
        for (int j = 0; j < 4; j++) to[j] = pack2<bf16>(sum[2 * j], sum[2 * j + 1]);
    }
}

/* ---- sums over batch and segments: blockIdx.x the head, y: a fragment of the query map's weights, of the key map's, the rest -- */
__global__ void totals_kernel(gradients o, fast p) {
    __shared__ float room[32];
    const hybrid &a = o.a;
    int h = blockIdx.x, y = blockIdx.y, tid = threadIdx.x, parts = a.b * p.segments, frags = a.d * p.fw / (4 * THREADS);
    auto item = [&](int n) { return ((int64_t)(n / p.segments) * a.h + h) * p.segments + n % p.segments; };
    if (y == 2 * frags) {
        for (int what = 0; what < 3; what++) {
            const float *from = what < 2 ? p.bias[what] : o.dfactors ? p.xs : NULL;
            if (!from) continue;
            float sum = 0;
            for (int n = tid; n < parts; n += THREADS) sum += from[item(n)];
            sum = block_reduce(sum, op_sum(), 0.f, room);
            if (what == 2) sum *= a.affine ? -1.f : hybrid_gamma<float>(a, h) - 1;
            void *out = what == 0 ? o.dbq : what == 1 ? o.dbk : o.dfactors;
            if (!tid) write_as<float>(out, what == 0 ? o.dbq_dtype : what == 1 ? o.dbk_dtype : o.dfactors_dtype, h, sum);
        }
        return;
    }
    int key = y >= frags, frag = y - key * frags, wm = a.d / 64, wn = p.fw / 16;
    if (!p.dw[key]) return;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (int n = 0; n < parts; n++) {
        float4 v = ((const float4 *)(p.dw[key] + item(n) * a.d * p.fw))[frag * THREADS + tid];
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    const rows4 &r = key ? o.dmk : o.dmq;
    int strip = tid >> 5 & 3, hf = tid >> 7, e = strip * 16 * wm + frag / wn * 16 + ((tid & 31) >> 2), f = hf * (p.fw / 2) + frag % wn * 8 + 2 * (tid & 3);
    float v[4] = {sum.x, sum.y, sum.z, sum.w};
    for (int j = 0; j < 4; j++)
        if (f + (j & 1) < a.f) write_as<float>(r.p, r.dtype, h * r.s[1] + (e + 8 * (j >> 1)) * r.s[2] + f + (j & 1), v[j]);
}

int hybrid_backward_tiles::hybrid_backward_finish(const gradients &o, const fast &p) {
    const hybrid &a = o.a;
    if (p.rows[0] || p.rows[1] || p.rows[2])
        LC_LAUNCH(shared_rows_kernel, dim3(grid_for((int64_t)a.b * a.h * a.t * (a.d > a.F ? a.d : a.F) / 8, THREADS), 3), THREADS, 0, o, p);
    bool weights = p.dw[0] || p.dw[1];
    if (weights || p.bias[0] || p.bias[1] || o.dfactors)
        LC_LAUNCH(totals_kernel, dim3(a.h, 2 * (a.d * p.fw / (4 * THREADS)) + 1), THREADS, 0, o, p);
    return LC_K_OK;
}
