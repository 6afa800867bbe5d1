/* hybrid_state.cu: hybrid attention of one token with a carried state: decoding. Bound by memory: the state is read once, in pieces of 16
 * bytes (with one head a block asked for before anything else is done), and written only when keys leave the window (terrace: every `window` tokens).
 * A block takes HB query heads of one key head of one row: 1 where there are few heads in all, 4 where the cached keys are worth
 * sharing. All in f32; q, k, v of any float dtype but f64.
 *
 * Layout of S [F][D] over the block: a lane holds 4 neighbouring columns, D / 4 lanes a group, and a group ROWS rows. The sums over
 * keys are spread in the same way: key j of the window belongs to group j mod GROUPS. */
#include "hybrid.cuh"
#include "mma.cuh"

enum { STEP_THREADS = 256, BATCH = 16 }; /* keys that enter the state at a time */

template <int D, int F> struct step_shape {
    enum { LANES = D / 4, GROUPS = STEP_THREADS / LANES, ROWS = F / GROUPS };
    enum { KEY = D + 4 }; /* floats from key to key in shared memory, so that few meet in a bank */
};

/* Shared memory, in floats. scratch: partial sums, or a batch of keys on their way into the state. */
struct step_shared {
    float *q, *now, *features, *u, *lin, *den, *scratch; /* [HB][d], [2][d], [HB][F], [HB][2 window], [HB], [HB] */
    __host__ __device__ static size_t carve(char *base, const hybrid &a, int heads, step_shared *to) {
        size_t at = 0, n[] = {(size_t)heads * a.d, (size_t)2 * a.d, (size_t)heads * a.F, (size_t)heads * 2 * a.window, (size_t)heads, (size_t)heads, 0};
        size_t sums = (size_t)heads * 4 * STEP_THREADS, inputs = (size_t)heads * 8 * a.f, batch = (size_t)BATCH * (2 * a.d + 4 + a.f + a.F);
        n[6] = sums > inputs ? sums : inputs;
        if (batch > n[6]) n[6] = batch;
        float **place[] = {&to->q, &to->now, &to->features, &to->u, &to->lin, &to->den, &to->scratch};
        for (int i = 0; i < 7; i++) {
            *place[i] = (float *)base + at;
            at += (n[i] + 3) / 4 * 4;
        }
        return at * sizeof(float);
    }
};

__device__ __forceinline__ float4 load4(const void *p, int dtype, int64_t at) {
    if (dtype == LC_K_F32) return *(const float4 *)((const float *)p + at);
    uint2 v = *(const uint2 *)((const bf16 *)p + at);
    float2 lo = dtype == LC_K_BF16 ? unpack2<bf16>(v.x) : unpack2<f16>(v.x), hi = dtype == LC_K_BF16 ? unpack2<bf16>(v.y) : unpack2<f16>(v.y);
    return make_float4(lo.x, lo.y, hi.x, hi.y);
}
__device__ __forceinline__ void add_scaled(float4 &to, float by, float4 v) {
    to.x += by * v.x, to.y += by * v.y, to.z += by * v.z, to.w += by * v.w;
}

template <int D, int F, int HB> struct stepper {
    typedef step_shape<D, F> L;
    const hybrid &a;
    const carried &c;
    hybrid_span at;
    step_shared s;
    int b, h0, p, lo;

    __device__ __forceinline__ int kv_head() const { return h0 / a.group; }
    __device__ __forceinline__ float *state_of(int h) const { return (float *)c.state + (at.slot * a.h + h) * (F * D); }
    __device__ __forceinline__ float *zsum_of(int h) const { return (float *)c.zsum + (at.slot * a.h + h) * F; }
    __device__ __forceinline__ float *cached(int which, int head, int j) const {
        return (float *)c.cache + at.slot * c.slot_elements + cached_at(a, which, head, j);
    }
    /* Row of the key (which 0) or value (1) at position j. */
    __device__ __forceinline__ const float *row(int which, int j) const { return j < p ? cached(which, kv_head(), j) : s.now + which * D; }

    __device__ __forceinline__ void read_state(int h, float4 (&x)[L::ROWS]) const {
        const float *from = state_of(h) + threadIdx.x / L::LANES * L::ROWS * D + threadIdx.x % L::LANES * 4;
#pragma unroll
        for (int r = 0; r < L::ROWS; r++) x[r] = *(const float4 *)(from + r * D);
    }

    __device__ __forceinline__ void read_token() {
        for (int i = threadIdx.x; i < HB * D; i += STEP_THREADS) s.q[i] = read_as<float>(a.q.row<char>(0, 0, 0), a.q.dtype, b * a.q.s[0] + (h0 + i / D) * a.q.s[1] + at.start * a.q.s[2] + i % D);
        for (int i = threadIdx.x; i < 2 * D; i += STEP_THREADS) {
            const rows4 &v = i < D ? a.k : a.v;
            s.now[i] = read_as<float>(v.p, v.dtype, b * v.s[0] + kv_head() * v.s[1] + at.start * v.s[2] + i % D);
        }
    }

    /* features [HB][F] of the queries, times lambda; lin: their products with zsum. Ends without a barrier. */
    __device__ __forceinline__ void query_features() {
        int w = threadIdx.x / 32, lane = threadIdx.x % 32, groups = a.f / 4, each = STEP_THREADS / groups;
        for (int n = 0; a.map != MAP_NONE && n < HB; n++) { /* sums over parts of q, one a warp: scratch [HB][8][f] */
            float4 x = make_float4(0, 0, 0, 0);
            for (int e = threadIdx.x / groups; e < D; e += each)
                add_scaled(x, s.q[n * D + e], load4(a.mq.p, a.mq.dtype, (h0 + n) * a.mq.s[1] + e * a.mq.s[2] + threadIdx.x % groups * 4));
            for (int o = groups; o < 32; o <<= 1) {
                x.x += __shfl_xor_sync(0xffffffffu, x.x, o), x.y += __shfl_xor_sync(0xffffffffu, x.y, o);
                x.z += __shfl_xor_sync(0xffffffffu, x.z, o), x.w += __shfl_xor_sync(0xffffffffu, x.w, o);
            }
            if (lane < groups) *(float4 *)(s.scratch + (n * 8 + w) * a.f + lane * 4) = x;
        }
        __syncthreads();
        if (w >= HB) return;
        int h = h0 + w;
        float *y = s.features + w * F, *x = s.scratch + w * 8 * a.f, dot = 0, lambda = hybrid_lambda(a, hybrid_gamma<float>(a, h)), bias = bias_of<float>(a.bq, a.bq_dtype, h);
        if (a.map != MAP_NONE) {
            for (int i = lane; i < a.f; i += 32) {
                float sum = bias + (a.skip ? s.q[w * D + i] : 0);
                for (int r = 0; r < 8; r++) sum += x[r * a.f + i];
                x[i] = sum;
            }
            __syncwarp();
            map_row(a, x, y);
            __syncwarp();
        }
        for (int i = lane; i < F; i += 32) {
            float v = a.map == MAP_NONE ? read_as<float>(a.mq.p, a.mq.dtype, b * a.mq.s[0] + h * a.mq.s[1] + at.start * a.mq.s[2] + i) : y[i];
            if (a.map != MAP_NONE && v < (float)a.feature_eps) v = (float)a.feature_eps;
            y[i] = v *= lambda;
            dot += v * zsum_of(h)[i];
        }
        dot = warp_reduce(dot, op_sum());
        if (!lane) s.lin[w] = dot;
    }

    /* u [HB][n] = scores of the window's keys; 8 lanes a key. */
    __device__ __forceinline__ void scores(int n) {
        int w = threadIdx.x / 32, part = threadIdx.x % 8, sub = threadIdx.x % 32 / 8;
        for (int j0 = 4 * w; j0 < n; j0 += 32) {
            int j = j0 + sub < n ? j0 + sub : n - 1;
            const float *key = row(0, lo + j) + part * 4;
            float dot[HB] = {};
#pragma unroll
            for (int e = 0; e < D; e += 32) {
                float4 k = *(const float4 *)(key + e);
#pragma unroll
                for (int i = 0; i < HB; i++) {
                    float4 q = *(const float4 *)(s.q + i * D + part * 4 + e);
                    dot[i] += k.x * q.x + k.y * q.y + k.z * q.z + k.w * q.w;
                }
            }
#pragma unroll
            for (int i = 0; i < HB; i++) {
                for (int o = 1; o < 8; o <<= 1) dot[i] += __shfl_xor_sync(0xffffffffu, dot[i], o);
                if (!part) s.u[i * 2 * a.window + j] = dot[i] * (float)a.scale;
            }
        }
    }

    /* Warp i: u [n] of head i becomes gamma exp(u - max); what is kept of the row. */
    __device__ __forceinline__ void weights(int n, const hybrid_out &o) {
        int i = threadIdx.x / 32, lane = threadIdx.x % 32, h = h0 + i;
        if (i >= HB) return;
        float *u = s.u + i * 2 * a.window, m = -INFINITY, sum = 0, gamma = hybrid_gamma<float>(a, h);
        int first = n;
        for (int j = lane; j < n; j += 32) m = op_max()(m, u[j]);
        m = warp_reduce(m, op_max());
        for (int j = lane; j < n; j += 32) {
            if (u[j] == m && j < first) first = j;
            sum += u[j] = gamma * exp2_fast((u[j] - m) * 1.4426950408889634f);
        }
        for (int x = 16; x; x >>= 1) first = min(first, __shfl_xor_sync(0xffffffffu, first, x));
        sum = warp_reduce(sum, op_sum());
        if (lane) return;
        float den = n ? sum : (float)a.eps;
        if (lo > 0 || !a.window) den += s.lin[i];
        s.den[i] = den;
        if (o.c.p) *o.c.row<float>(b, h, at.start) = n ? m : 0;
        if (o.at.p) *o.at.row<int>(b, h, at.start) = (n ? lo + (first < n ? first : n - 1) : p) + at.shift;
        if (o.z.p) *o.z.row<float>(b, h, at.start) = den;
    }

    /* S and zsum of head h take in keys from .. to - 1. */
    __device__ void absorb(int h, int from, int to) {
        float *keys = s.scratch, *values = keys + BATCH * L::KEY, *f = values + BATCH * D, *x = f + BATCH * F;
        float4 S[L::ROWS];
        float z = threadIdx.x < F ? zsum_of(h)[threadIdx.x] : 0;
        read_state(h, S);
        for (int j0 = from; j0 < to; j0 += BATCH) {
            int n = to - j0 < BATCH ? to - j0 : (int)BATCH;
            __syncthreads();
            for (int i = threadIdx.x; i < n * D / 4; i += STEP_THREADS) {
                int r = i / (D / 4), e = i % (D / 4) * 4;
                *(float4 *)(keys + r * L::KEY + e) = *(const float4 *)(row(0, j0 + r) + e);
                *(float4 *)(values + r * D + e) = *(const float4 *)(row(1, j0 + r) + e);
            }
            __syncthreads();
            key_features(h, j0, n, keys, x, f);
            __syncthreads();
            for (int j = 0; j < n; j++) {
                float4 v = *(const float4 *)(values + j * D + threadIdx.x % L::LANES * 4);
                const float *phi = f + j * F + threadIdx.x / L::LANES * L::ROWS;
#pragma unroll
                for (int r = 0; r < L::ROWS; r++) add_scaled(S[r], phi[r], v);
                if (threadIdx.x < F) z += f[j * F + threadIdx.x];
            }
        }
        float *to_s = state_of(h) + threadIdx.x / L::LANES * L::ROWS * D + threadIdx.x % L::LANES * 4;
#pragma unroll
        for (int r = 0; r < L::ROWS; r++) *(float4 *)(to_s + r * D) = S[r];
        if (threadIdx.x < F) zsum_of(h)[threadIdx.x] = z;
        __syncthreads();
    }

    /* f [n][F] of keys [n][KEY] at positions j0 ..; x [BATCH][IN]. A thread makes 4 inputs of the map of one key at a time. */
    __device__ __forceinline__ void key_features(int h, int j0, int n, const float *keys, float *x, float *f) {
        if (a.map == MAP_NONE) {
            int head = h / a.mk_group;
            for (int i = threadIdx.x; i < n * F; i += STEP_THREADS) {
                int j = j0 + i / F;
                f[i] = j < p ? cached(2, head, j)[i % F] : read_as<float>(a.mk.p, a.mk.dtype, b * a.mk.s[0] + head * a.mk.s[1] + at.start * a.mk.s[2] + i % F);
            }
            return;
        }
        float bias = bias_of<float>(a.bk, a.bk_dtype, h);
        int j = threadIdx.x % BATCH;
        for (int i = threadIdx.x / BATCH * 4; i < a.f && j < n; i += STEP_THREADS / BATCH * 4) {
            float4 sum = make_float4(bias, bias, bias, bias);
            if (a.skip) add_scaled(sum, 1, *(const float4 *)(keys + j * L::KEY + i));
            for (int e = 0; e < D; e++) add_scaled(sum, keys[j * L::KEY + e], load4(a.mk.p, a.mk.dtype, h * a.mk.s[1] + e * a.mk.s[2] + i));
            *(float4 *)(x + j * a.f + i) = sum;
        }
        __syncthreads();
        for (int r = threadIdx.x / 32; r < n; r += STEP_THREADS / 32) {
            map_row(a, x + r * a.f, f + r * F);
            __syncwarp();
            for (int i = threadIdx.x % 32; i < F; i += 32)
                if (f[r * F + i] < (float)a.feature_eps) f[r * F + i] = (float)a.feature_eps;
        }
    }

    /* The token enters the cache, in the place of one that no head needs any more. */
    __device__ __forceinline__ void remember() {
        if (h0 % a.group == 0)
            for (int i = threadIdx.x; i < 2 * D; i += STEP_THREADS) cached(i / D, kv_head(), p)[i % D] = s.now[i];
        for (int n = 0; a.map == MAP_NONE && n < HB; n++)
            if ((h0 + n) % a.mk_group == 0) {
                int head = (h0 + n) / a.mk_group;
                for (int i = threadIdx.x; i < F; i += STEP_THREADS)
                    cached(2, head, p)[i] = read_as<float>(a.mk.p, a.mk.dtype, b * a.mk.s[0] + head * a.mk.s[1] + at.start * a.mk.s[2] + i);
            }
    }
};

template <class T> __device__ __forceinline__ void put_one(const rows4 &v, int64_t b, int64_t h, int e, float x) { v.row<T>(b, h, 0)[e] = store<T>(x); }
__device__ __forceinline__ void put_result(const rows4 &v, int b, int h, int e, float x) {
    if (v.dtype == LC_K_BF16) put_one<bf16>(v, b, h, e, x);
    else if (v.dtype == LC_K_F16) put_one<f16>(v, b, h, e, x);
    else put_one<float>(v, b, h, e, x);
}

/* Grid b * h / HB. */
template <int D, int F, int HB> __global__ void __launch_bounds__(STEP_THREADS, 2) step_kernel(hybrid a, carried c, hybrid_out o) {
    typedef step_shape<D, F> L;
    LC_SHARED(shared);
    step_shared s;
    step_shared::carve(shared, a, HB, &s);
    int heads = a.h / HB, b = blockIdx.x / heads, h0 = blockIdx.x % heads * HB;
    hybrid_span at = span_of(a, c, b, threadIdx.x == 0 && h0 == 0);
    if (at.p1 == at.p0) { /* padding */
        for (int i = threadIdx.x; i < HB * D; i += STEP_THREADS) put_result(o.y, b, h0 + i / D, i % D, 0);
        if (threadIdx.x >= HB) return;
        if (o.c.p) *o.c.row<float>(b, h0 + threadIdx.x, 0) = 0;
        if (o.at.p) *o.at.row<int>(b, h0 + threadIdx.x, 0) = 0;
        if (o.z.p) *o.z.row<float>(b, h0 + threadIdx.x, 0) = 1;
        return;
    }
    stepper<D, F, HB> t = {a, c, at, s, b, h0, at.p0, hybrid_lo(a, at.p0)};
    bool linear = t.lo > 0;
    int n = a.window ? t.p + 1 - t.lo : 0;
    float4 S[L::ROWS], y[HB];
    if (HB == 1 && linear && a.window) t.read_state(h0, S);
    t.read_token();
    __syncthreads();
    if (!a.window) {
        for (int i = 0; i < HB; i++) t.absorb(h0 + i, t.p, t.p + 1);
        if (HB == 1) t.read_state(h0, S);
    }
    if (linear) t.query_features();
    t.scores(n);
    __syncthreads();
    t.weights(n, o);
    __syncthreads();
    int group = threadIdx.x / L::LANES, column = threadIdx.x % L::LANES * 4;
#pragma unroll
    for (int i = 0; i < HB; i++) y[i] = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (int j = group; j < n; j += L::GROUPS) {
        float4 v = *(const float4 *)(t.row(1, t.lo + j) + column);
#pragma unroll
        for (int i = 0; i < HB; i++) add_scaled(y[i], s.u[i * 2 * a.window + j], v);
    }
#pragma unroll
    for (int i = 0; i < HB; i++) {
        if (linear) {
            if (HB > 1) t.read_state(h0 + i, S);
#pragma unroll
            for (int r = 0; r < L::ROWS; r++) add_scaled(y[i], s.features[i * F + group * L::ROWS + r], S[r]);
        }
        *(float4 *)(s.scratch + (group * HB + i) * D + column) = y[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < HB * D; i += STEP_THREADS) {
        float sum = 0;
        for (int r = 0; r < L::GROUPS; r++) sum += s.scratch[r * HB * D + i];
        put_result(o.y, b, h0 + i / D, i % D, sum / s.den[i / D]);
    }
    if (!a.window) return;
    int to = hybrid_lo(a, t.p + 1);
    for (int i = 0; i < HB && to > t.lo; i++) t.absorb(h0 + i, t.lo, to);
    t.remember();
}

/* ---- the host's side -------------------------------------------------------------------------------------------------- */
enum { STEP_HEADS = 4, STEP_BLOCKS = 264 };

template <int D, int F, int HB> static int run(const hybrid &a, const carried &c, const hybrid_out &o) {
    step_shared s;
    size_t bytes = step_shared::carve(NULL, a, HB, &s);
    if (allow_shared(step_kernel<D, F, HB>, bytes)) return LC_K_DEVICE;
    LC_LAUNCH((step_kernel<D, F, HB>), a.b * (a.h / HB), STEP_THREADS, bytes, a, c, o);
    return LC_K_OK;
}

static const struct {
    int d, F;
    int (*run[2])(const hybrid &a, const carried &c, const hybrid_out &o); /* one head a block, STEP_HEADS */
} shapes[] = {
    {128, 128, {run<128, 128, 1>, run<128, 128, 4>}}, {128, 64, {run<128, 64, 1>, run<128, 64, 4>}}, {128, 32, {run<128, 32, 1>, run<128, 32, 4>}},
    {64, 128, {run<64, 128, 1>, run<64, 128, 4>}},    {64, 64, {run<64, 64, 1>, run<64, 64, 4>}},    {64, 32, {run<64, 32, 1>, run<64, 32, 4>}},
};
static int shape_of(const hybrid &a) {
    for (int i = 0; i < (int)(sizeof shapes / sizeof *shapes); i++)
        if (shapes[i].d == a.d && shapes[i].F == a.F) return i;
    return -1;
}

/* Rows of weights [h, d, f] that can be read four at a time. */
static bool even_weights(const lc_view *m) {
    return (uintptr_t)m->data % 16 == 0 && m->dim[2] % 4 == 0 && m->stride[0] % 4 == 0 && m->stride[1] % 4 == 0;
}

bool hybrid_step_fit(const lc_kargs *k, const hybrid &a) {
    if (!k->x[9].data || a.t != 1 || k->x[0].dtype == LC_K_F64 || shape_of(a) < 0) return false;
    if (a.map != MAP_NONE && (!even_weights(k->x + 3) || !even_weights(k->x + 4) || (a.f & (a.f - 1)) || a.f < 16)) return false;
    if (a.window > 1024) return false;
    return (uintptr_t)k->x[9].data % 16 == 0 && (uintptr_t)k->x[11].data % 16 == 0;
}

int hybrid_step(const lc_kargs *k, const hybrid &a, const carried &c) {
    bool share = a.group % STEP_HEADS == 0 && (int64_t)a.b * a.h / STEP_HEADS >= STEP_BLOCKS;
    return shapes[shape_of(a)].run[share](a, c, hybrid_results(k));
}
