/* hybrid_forward_wide.cu: hybrid attention forward computed in f32 throughout, for f32 and for the halves that the tensor cores' kernels do
 * not take, with or without a carried state: chunks of 64 tokens as tiles, products by ordinary multiply-adds. No block walks: a first
 * kernel forms what each block of keys adds to the state, phi_k^T V and sums of phi_k; a second one sums these up, so that each chunk
 * finds the state before it; a third one makes the chunks' results. What stands between them, 4 F (D + 1) bytes a chunk and head, is kept
 * small by doing so many heads at a time.
 *
 * Block j of a head, j = 0 .. n for n chunks from chunk c0 on, is c0 + j - 1 with a window of 64, c0 + j without: the blocks j < i are in
 * the state of chunk c0 + i. Blocks of 256 threads: thread (ty, tx) = (t / 16, t % 16) of a product [64][N] has rows 4 ty .. 4 ty + 3 and
 * columns 64 m + 4 tx .. + 3. Operands lie with k along rows: tiles [k][64 + PAD] of rows that are the product's, panels of STEP values of k. */
#include "hybrid.cuh"
#include "mma.cuh"

enum { CHUNK = 64, WIDE_THREADS = 256, ROW = CHUNK + 4, MOST = 128, STEP = 16, ROW_B = MOST + 4 };
#define LC_WIDE_WORK ((size_t)96 << 20)

/* One head's call. */
struct wide_head {
    int b, h, c0, n;  /* chunks c0 .. c0 + n - 1 */
    int shift, first, end; /* block j is chunk c0 + j - shift; keys first .. end - 1 enter the state */
    hybrid_span at;
};
__device__ __forceinline__ wide_head head_at(const hybrid &a, const carried &c, int64_t row, bool tell) {
    wide_head w;
    w.b = (int)(row / a.h), w.h = (int)(row % a.h);
    w.at = span_of(a, c, w.b, tell && !w.h);
    w.c0 = w.at.p0 / CHUNK, w.n = w.at.p1 > w.at.p0 ? (w.at.p1 - 1) / CHUNK + 1 - w.c0 : 0;
    w.shift = a.window ? 1 : 0, w.first = w.at.k_min;
    w.end = c.state && a.window ? hybrid_lo(a, w.at.p1) : w.at.p1;
    return w;
}
__host__ __device__ static inline int64_t part_of(const hybrid &a) { return (int64_t)a.F * (a.d + 1); }

/* ---- reading ----------------------------------------------------------------------------------------------------------- */
template <class T> __device__ __forceinline__ float4 read4(const T *p) { /* halves, at a multiple of 8 bytes */
    uint2 v = *(const uint2 *)p;
    float2 lo = unpack2<T>(v.x), hi = unpack2<T>(v.y);
    return make_float4(lo.x, lo.y, hi.x, hi.y);
}
template <> __device__ __forceinline__ float4 read4<float>(const float *p) { return *(const float4 *)p; }

/* Rows by position; zeros outside of from .. to - 1. */
template <class T> struct wide_rows {
    const T *x;
    int64_t stride;
    const float *cache;
    int cached, ring, width, from, to;
    __device__ __forceinline__ float4 at(int p, int e) const {
        if (p < from || p >= to || e >= width) return make_float4(0, 0, 0, 0);
        return p < cached ? *(const float4 *)(cache + (int64_t)(p % ring) * width + e) : read4(x + p * stride + e);
    }
};
/* which: 0 keys, 1 values, 2 ready features of keys; 3 queries, 4 their ready features. */
template <class T> __device__ __forceinline__ wide_rows<T> rows_of(const hybrid &a, const carried &c, const wide_head &w, int which) {
    const rows4 &v = which == 0 ? a.k : which == 1 ? a.v : which == 2 ? a.mk : which == 3 ? a.q : a.mq;
    int head = which < 2 ? w.h / a.group : which == 2 ? w.h / a.mk_group : w.h;
    bool keys = which < 3;
    wide_rows<T> r = {v.row<T>(w.b, head, w.at.shift), v.s[2], NULL, 0, 2 * a.window, which == 2 || which == 4 ? a.F : a.d,
                      keys ? w.at.k_min : w.at.p0, w.at.p1};
    if (keys && c.cache && w.at.p0 > 0) {
        r.cached = w.at.p0;
        r.cache = (const float *)c.cache + w.at.slot * c.slot_elements + cached_at(a, which, head, 0);
    }
    return r;
}

/* ---- products ---------------------------------------------------------------------------------------------------------- */
/* acc [4][4 M] += A^T B over `steps` rows of A and B, which lie x_row and y_row apart. */
template <int M> __device__ __forceinline__ void multiply(float (&acc)[4][4 * M], const float *x, int x_row, const float *y, int y_row, int steps) {
    x += threadIdx.x / 16 * 4, y += threadIdx.x % 16 * 4;
#pragma unroll 4
    for (int k = 0; k < steps; k++) {
        float4 u = *(const float4 *)(x + k * x_row);
        float p[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
        for (int m = 0; m < M; m++) {
            float4 v = *(const float4 *)(y + k * y_row + 64 * m);
            float q[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) acc[i][4 * m + j] = fmaf(p[i], q[j], acc[i][4 * m + j]);
        }
    }
}
/* Rows p .. p + 63, STEP columns from e on, to [STEP][row] turned over; a thread has 4 of a row. */
template <class T> __device__ __forceinline__ float4 take_turned(const wide_rows<T> &s, int p, int e) {
    return s.at(p + (int)threadIdx.x / 4, e + threadIdx.x % 4 * 4);
}
__device__ __forceinline__ void put_turned(float *to, int row, float4 v) {
    to += threadIdx.x % 4 * 4 * row + threadIdx.x / 4;
    to[0] = v.x, to[row] = v.y, to[2 * row] = v.z, to[3 * row] = v.w;
}
struct wide_tiles { /* shared memory */
    float *features, *weights, *x, *y, *z; /* [MOST][ROW] twice, [STEP][ROW], [STEP][ROW_B], [MOST] */
    enum { BYTES = 4 * (2 * MOST * ROW + STEP * ROW + STEP * ROW_B + MOST) };
    __device__ __forceinline__ wide_tiles(char *p)
        : features((float *)p), weights(features + MOST * ROW), x(weights + MOST * ROW), y(x + STEP * ROW), z(y + STEP * ROW_B) {}
};

/* Features of rows p .. p + 63, [F][ROW]; with the inputs of the map on their way in the same place. Ends with a barrier. */
template <class T> __device__ __forceinline__ void make_features(const hybrid &a, const wide_rows<T> &rows, const wide_rows<T> &ready, const rows4 &m, float bias,
                                              int h, int p, const wide_tiles &t, float *to) {
    if (a.map == MAP_NONE) {
        for (int i = threadIdx.x; i < CHUNK * a.F / 4; i += WIDE_THREADS) {
            int r = i / (a.F / 4), e = i % (a.F / 4) * 4;
            float4 v = ready.at(p + r, e);
            to[e * ROW + r] = v.x, to[(e + 1) * ROW + r] = v.y, to[(e + 2) * ROW + r] = v.z, to[(e + 3) * ROW + r] = v.w;
        }
        __syncthreads();
        return;
    }
    for (int n0 = 0; n0 < a.f; n0 += 64) { /* 64 inputs at a time */
        float acc[4][4];
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][j] = bias;
#pragma unroll 1
        for (int e = 0; e < a.d; e += STEP) {
            float4 v = take_turned(rows, p, e);
            int k = threadIdx.x / 16, n = threadIdx.x % 16 * 4;
            float w[4] = {0, 0, 0, 0};
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (n0 + n + j < a.f) w[j] = read_as<float>(m.p, m.dtype, h * m.s[1] + (e + k) * m.s[2] + n0 + n + j);
            __syncthreads();
            put_turned(t.x, ROW, v);
            *(float4 *)(t.y + k * ROW_B + n) = make_float4(w[0], w[1], w[2], w[3]);
            __syncthreads();
            multiply<1>(acc, t.x, ROW, t.y, ROW_B, STEP);
        }
        int r = threadIdx.x / 16 * 4, n = n0 + threadIdx.x % 16 * 4;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (n + j >= a.f) continue;
            float s[4] = {0, 0, 0, 0};
            if (a.skip)
                for (int i = 0; i < 4; i++) {
                    float4 v = rows.at(p + r + i, n);
                    s[i] = j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w;
                }
            *(float4 *)(to + (n + j) * ROW + r) = make_float4(acc[0][j] + s[0], acc[1][j] + s[1], acc[2][j] + s[2], acc[3][j] + s[3]);
        }
    }
    __syncthreads();
    float *own = to + threadIdx.x / 4, eps = a.feature_eps32; /* four threads a row */
    int first = threadIdx.x % 4;
    if (a.map == MAP_RELU || a.map == MAP_POS_ELU) {
        for (int i = first; i < a.f; i += 4) {
            float v = own[i * ROW], y = v > 0 ? a.map == MAP_RELU ? v : 1 + v : a.map == MAP_RELU ? 0.f : expf(v);
            own[i * ROW] = y < eps ? eps : y;
        }
        __syncthreads();
        return;
    }
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    for (int i = first; i < a.f; i += 4) top[0] = op_max()(top[0], own[i * ROW]), top[1] = op_max()(top[1], -own[i * ROW]);
#pragma unroll
    for (int s = 0; s < 2; s++)
        for (int o = 1; o < 4; o *= 2) top[s] = op_max()(top[s], __shfl_xor_sync(0xffffffffu, top[s], o));
    for (int i = first; i < a.f; i += 4) {
        float v = own[i * ROW], minus = a.full ? expf(-v - top[1]) : 0;
        sum[0] += own[i * ROW] = expf(v - top[0]);
        if (a.full) sum[1] += own[(a.f + i) * ROW] = minus;
    }
#pragma unroll
    for (int s = 0; s < 2; s++) {
        for (int o = 1; o < 4; o *= 2) sum[s] += __shfl_xor_sync(0xffffffffu, sum[s], o);
        for (int i = first; i < a.f && (!s || a.full); i += 4) {
            float *y = own + (s * a.f + i) * ROW, v = a.map == MAP_EXP_DIM ? *y : *y / sum[s];
            *y = v < eps ? eps : v;
        }
    }
    __syncthreads();
}

/* ---- the first kernel -------------------------------------------------------------------------------------------------- */
/* Grid [heads][blocks]. parts [heads][blocks][F][D + 1]: the sums of phi_k last. */
template <class T, int M> __global__ void __launch_bounds__(WIDE_THREADS, 2) wide_parts_kernel(hybrid a, carried c, int64_t head0, int blocks, float *parts) {
    LC_SHARED(shared);
    wide_tiles t(shared);
    int j = blockIdx.x % blocks;
    wide_head w = head_at(a, c, head0 + blockIdx.x / blocks, j == 0 && threadIdx.x == 0);
    if (j > w.n || (!w.shift && j == w.n)) return;
    int p = (w.c0 + j - w.shift) * CHUNK;
    float *part = parts + blockIdx.x * part_of(a);
    wide_rows<T> k = rows_of<T>(a, c, w, 0), v = rows_of<T>(a, c, w, 1);
    make_features(a, k, rows_of<T>(a, c, w, 2), a.mk, bias_of<float>(a.bk, a.bk_dtype, w.h), w.h, p, t, t.features);
    for (int i = threadIdx.x; i < CHUNK * a.F; i += WIDE_THREADS) /* keys that do not enter the state */
        if (p + i % CHUNK < w.first || p + i % CHUNK >= w.end) t.features[i / CHUNK * ROW + i % CHUNK] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < a.F; i += WIDE_THREADS) {
        float sum = 0;
        for (int r = 0; r < CHUNK; r++) sum += t.features[i * ROW + r];
        part[(int64_t)a.F * a.d + i] = sum;
    }
    /* here the rows are features: turned once more, [64 keys][F], where the weights lie otherwise; the values in panels of STEP keys */
    float *turned = t.weights; /* [CHUNK][ROW_B] */
    for (int i = threadIdx.x; i < CHUNK * a.F; i += WIDE_THREADS) turned[i % CHUNK * ROW_B + i / CHUNK] = t.features[i / CHUNK * ROW + i % CHUNK];
    for (int f0 = 0; f0 < a.F; f0 += 64) {
        float acc[4][4 * M] = {};
        int r4 = threadIdx.x / 16 * 4, n4 = threadIdx.x % 16 * 4;
#pragma unroll 1
        for (int key = 0; key < CHUNK; key += STEP) {
            float4 u[M];
#pragma unroll
            for (int m = 0; m < M; m++) u[m] = v.at(p + key + (int)threadIdx.x / 16, 64 * m + n4);
            __syncthreads();
#pragma unroll
            for (int m = 0; m < M; m++) *(float4 *)(t.y + threadIdx.x / 16 * ROW_B + 64 * m + n4) = u[m];
            __syncthreads();
            multiply<M>(acc, turned + key * ROW_B + f0, ROW_B, t.y, ROW_B, STEP);
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int m = 0; m < M; m++)
                if (f0 + r4 + i < a.F && 64 * m + n4 < a.d)
                    *(float4 *)(part + (int64_t)(f0 + r4 + i) * a.d + 64 * m + n4) =
                        make_float4(acc[i][4 * m], acc[i][4 * m + 1], acc[i][4 * m + 2], acc[i][4 * m + 3]);
    }
}

/* ---- the second ---------------------------------------------------------------------------------------------------------- */
/* Grid [heads][pieces]: part j becomes the sum of the parts before it and of the carried state, which becomes the sum of all. */
template <class T> __global__ void wide_sums_kernel(hybrid a, carried c, int64_t head0, int blocks, int pieces, float *parts) {
    int64_t head = head0 + blockIdx.x / pieces, size = part_of(a), i = (int64_t)(blockIdx.x % pieces) * blockDim.x + threadIdx.x;
    if (i >= size) return;
    wide_head w = head_at(a, c, head, false);
    if (!w.n) return;
    float *at = parts + blockIdx.x / pieces * blocks * size + i, *own = NULL, sum = 0;
    if (c.state) {
        int64_t slot = w.at.slot * a.h + w.h, n = (int64_t)a.F * a.d;
        own = i < n ? (float *)c.state + slot * n + i : (float *)c.zsum + slot * a.F + i - n;
        sum = *own;
    }
    int all = w.n + w.shift, j = 0;
    for (; j + 4 <= all; j += 4) {
        float v[4];
#pragma unroll
        for (int u = 0; u < 4; u++) v[u] = at[(j + u) * size];
#pragma unroll
        for (int u = 0; u < 4; u++) {
            at[(j + u) * size] = sum;
            sum += v[u];
        }
    }
    for (; j < all; j++) {
        float v = at[j * size];
        at[j * size] = sum;
        sum += v;
    }
    if (own) *own = sum;
}

/* ---- the third ----------------------------------------------------------------------------------------------------------- */
template <class T> __device__ __forceinline__ void wide_padding(const hybrid &a, const hybrid_out &o, const wide_head &w) {
    for (int i = threadIdx.x; i < w.at.start * a.d; i += WIDE_THREADS) o.y.row<T>(w.b, w.h, i / a.d)[i % a.d] = store<T>(0.f);
    for (int i = threadIdx.x; i < w.at.start; i += WIDE_THREADS) {
        if (o.c.p) *o.c.row<float>(w.b, w.h, i) = 0;
        if (o.at.p) *o.at.row<int>(w.b, w.h, i) = i;
        if (o.z.p) *o.z.row<float>(w.b, w.h, i) = 1;
    }
}
__device__ __forceinline__ float row_sum(float v) { /* over the 16 threads of a row */
#pragma unroll
    for (int o = 1; o < 16; o *= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}

/* x [4][8]: scores of 4 rows with keys of blocks c - 1 and c (columns 0 .. 3, 4 .. 7), to weights; maxima are kept. */
__device__ __forceinline__ void wide_weights(const hybrid &a, const hybrid_out &o, const wide_head &w, int c, float gamma, float (&x)[4][8]) {
    int r4 = threadIdx.x / 16 * 4, n4 = threadIdx.x % 16 * 4;
    bool prev = c * CHUNK > w.at.k_min;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float m = -INFINITY;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            int key = n4 + j % 4, row = r4 + i;
            bool seen = j < 4 ? prev && (a.kind == KIND_TERRACE || key > row) : key <= row;
            x[i][j] = seen ? x[i][j] * a.scale32 : -INFINITY;
            m = op_max()(m, x[i][j]);
        }
#pragma unroll
        for (int s = 1; s < 16; s *= 2) m = op_max()(m, __shfl_xor_sync(0xffffffffu, m, s));
        int at = 2 * CHUNK, p = c * CHUNK + r4 + i;
#pragma unroll
        for (int j = 7; j >= 0; j--) {
            if (x[i][j] == m) at = n4 + j % 4 + j / 4 * CHUNK;
            x[i][j] = gamma * expf(x[i][j] - m);
        }
#pragma unroll
        for (int s = 1; s < 16; s *= 2) at = min(at, __shfl_xor_sync(0xffffffffu, at, s));
        if (n4 || p < w.at.p0 || p >= w.at.p1) continue;
        if (o.c.p) *o.c.row<float>(w.b, w.h, p + w.at.shift) = m;
        if (o.at.p) *o.at.row<int>(w.b, w.h, p + w.at.shift) = min((c - 1) * CHUNK + at, p) + w.at.shift;
    }
}

/* Grid [heads][blocks - 1]: chunk c0 + i of a head, with state i of parts. */
template <class T, int M> __global__ void __launch_bounds__(WIDE_THREADS, 2) wide_kernel(hybrid a, carried c, hybrid_out o, int64_t head0, int blocks, const float *parts) {
    LC_SHARED(shared);
    wide_tiles t(shared);
    int row = blockIdx.x / (blocks - 1), index = blockIdx.x % (blocks - 1);
    wide_head w = head_at(a, c, head0 + row, false);
    if (!index) wide_padding<T>(a, o, w);
    if (index >= w.n) return;
    int chunk = w.c0 + index, p = chunk * CHUNK, r4 = threadIdx.x / 16 * 4, n4 = threadIdx.x % 16 * 4;
    float gamma = hybrid_gamma<float>(a, w.h), lambda = hybrid_lambda(a, gamma), x[4][8] = {}, den[4] = {0, 0, 0, 0};
    const float *part = parts + ((int64_t)row * blocks + index) * part_of(a);
    wide_rows<T> q = rows_of<T>(a, c, w, 3), k = rows_of<T>(a, c, w, 0), v = rows_of<T>(a, c, w, 1);
    if (a.F) make_features(a, q, rows_of<T>(a, c, w, 4), a.mq, bias_of<float>(a.bq, a.bq_dtype, w.h), w.h, p, t, t.features);
    if (a.window) {
#pragma unroll 1
        for (int e = 0; e < a.d; e += STEP) {
            float4 u = take_turned(q, p, e), before = take_turned(k, p - CHUNK, e), here = take_turned(k, p, e);
            __syncthreads();
            put_turned(t.x, ROW, u), put_turned(t.y, ROW_B, before), put_turned(t.y + 64, ROW_B, here);
            __syncthreads();
            multiply<2>(x, t.x, ROW, t.y, ROW_B, STEP);
        }
        wide_weights(a, o, w, chunk, gamma, x);
    }
    if (!a.window || (a.kind == KIND_SLIDING && p > w.at.k_min)) { /* linear weights within a block */
        int block = a.window ? p - CHUNK : p;
        float u[4][4] = {};
        __syncthreads();
        make_features(a, k, rows_of<T>(a, c, w, 2), a.mk, bias_of<float>(a.bk, a.bk_dtype, w.h), w.h, block, t, t.weights);
        multiply<1>(u, t.features, ROW, t.weights, ROW, a.F);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                bool seen = n4 + j <= r4 + i && block + n4 + j >= w.first; /* earlier ones are in the state */
                float v = seen ? lambda * u[i][j] : 0;
                if (a.window) x[i][j] += v;
                else x[i][4 + j] += v;
            }
        __syncthreads();
    }
    if (!a.window && n4 == 0)
        for (int i = 0; i < 4; i++) {
            int at = p + r4 + i;
            if (at < w.at.p0 || at >= w.at.p1) continue;
            if (o.c.p) *o.c.row<float>(w.b, w.h, at + w.at.shift) = 0;
            if (o.at.p) *o.at.row<int>(w.b, w.h, at + w.at.shift) = at + w.at.shift;
        }
#pragma unroll
    for (int j = 0; j < 8; j++) {
        *(float4 *)(t.weights + (j / 4 * 64 + n4 + j % 4) * ROW + r4) = make_float4(x[0][j], x[1][j], x[2][j], x[3][j]);
#pragma unroll
        for (int i = 0; i < 4; i++) den[i] += x[i][j];
    }
    for (int f = threadIdx.x % 16; f < a.F; f += 16) {
        float z = part[(int64_t)a.F * a.d + f] * lambda;
#pragma unroll
        for (int i = 0; i < 4; i++) den[i] = fmaf(t.features[f * ROW + r4 + i], z, den[i]);
    }
    float y[4][4 * M] = {}, far[4][4 * M] = {};
    int steps = a.F + 2 * CHUNK; /* the state's rows, then values of blocks c - 1 and c */
#pragma unroll 1
    for (int s = 0; s < steps; s += STEP) {
        float4 u[M];
        int kk = s + (int)threadIdx.x / 16;
#pragma unroll
        for (int m = 0; m < M; m++) {
            int e = 64 * m + n4;
            if (s >= a.F) u[m] = v.at(p - CHUNK + kk - a.F, e);
            else u[m] = e < a.d ? *(const float4 *)(part + (int64_t)kk * a.d + e) : make_float4(0, 0, 0, 0);
        }
        __syncthreads();
#pragma unroll
        for (int m = 0; m < M; m++) *(float4 *)(t.y + threadIdx.x / 16 * ROW_B + 64 * m + n4) = u[m];
        __syncthreads();
        if (s < a.F) multiply<M>(far, t.features + s * ROW, ROW, t.y, ROW_B, STEP);
        else multiply<M>(y, t.weights + (s - a.F) * ROW, ROW, t.y, ROW_B, STEP);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int at = p + r4 + i;
        float sum = row_sum(den[i]) + (a.window ? 0 : a.eps32);
        if (at < w.at.p0 || at >= w.at.p1) continue;
        if (o.z.p && !n4) *o.z.row<float>(w.b, w.h, at + w.at.shift) = sum;
        T *to = o.y.row<T>(w.b, w.h, at + w.at.shift);
#pragma unroll
        for (int j = 0; j < 4 * M; j++) {
            int e = j / 4 * 64 + n4 + j % 4;
            if (e < a.d) to[e] = store<T>((y[i][j] + lambda * far[i][j]) / sum);
        }
    }
}

/* ---- the host's side ----------------------------------------------------------------------------------------------------- */
/* Parts a head, and how many heads are done at a time. */
static int blocks_of(const hybrid &a) { return (a.t + CHUNK - 1) / CHUNK + 2; }
static int64_t heads_of(const hybrid &a) {
    int64_t all = (int64_t)a.b * a.h, each = blocks_of(a) * part_of(a) * 4, n = (int64_t)(LC_WIDE_WORK / each);
    return n < 1 ? 1 : n < all ? n : all;
}

static bool rows_of_4(const lc_view *v, int bytes) {
    bool ok = (uintptr_t)v->data % 16 == 0;
    for (int i = 0; i + 1 < v->ndim; i++) ok = ok && (v->dim[i] == 1 || v->stride[i] * bytes % 16 == 0);
    return ok;
}
bool hybrid_wide_fit(const lc_kargs *k, const hybrid &a) {
    int dtype = k->x[0].dtype;
    if (lc_cuda_select(k->device) || (size_t)wide_tiles::BYTES > lc_cuda_now->shared_max || dtype == LC_K_F64) return false;
    if (a.d % STEP || a.d > MOST || !a.F || a.F % STEP || a.F > MOST || (a.window && a.window != CHUNK) || !(a.scale > 0)) return false;
    for (int i = 0; i < 5; i++)
        if ((i < 3 || a.map == MAP_NONE) && !rows_of_4(k->x + i, dtype == LC_K_F32 ? 4 : 2)) return false;
    return !(k->x[11].data && (uintptr_t)k->x[11].data % 16);
}
size_t hybrid_wide_work(const hybrid &a) { return (size_t)(heads_of(a) * blocks_of(a) * part_of(a)) * 4; }

template <class T, int M> static int run(const lc_kargs *k, const hybrid &a, const carried &s) {
    if (allow_shared(wide_parts_kernel<T, M>, wide_tiles::BYTES) || allow_shared(wide_kernel<T, M>, wide_tiles::BYTES)) return LC_K_DEVICE;
    int64_t all = (int64_t)a.b * a.h, each = heads_of(a);
    int blocks = blocks_of(a), pieces = (int)ceil_div(part_of(a), 256);
    float *parts = (float *)k->work;
    for (int64_t head = 0; head < all; head += each) {
        int n = (int)(all - head < each ? all - head : each);
        LC_LAUNCH((wide_parts_kernel<T, M>), n * blocks, WIDE_THREADS, wide_tiles::BYTES, a, s, head, blocks, parts);
        LC_LAUNCH((wide_sums_kernel<T>), n * pieces, 256, 0, a, s, head, blocks, pieces, parts);
        LC_LAUNCH((wide_kernel<T, M>), n * (blocks - 1), WIDE_THREADS, wide_tiles::BYTES, a, s, hybrid_results(k), head, blocks, (const float *)parts);
    }
    return s.state && a.window ? hybrid_remember(k, a, s) : LC_K_OK;
}
template <class T> static int run(const lc_kargs *k, const hybrid &a, const carried &s) { return a.d > 64 ? run<T, 2>(k, a, s) : run<T, 1>(k, a, s); }

int hybrid_wide(const lc_kargs *k, const hybrid &a, const carried &s) {
    switch (k->x[0].dtype) {
    case LC_K_F32: return run<float>(k, a, s);
    case LC_K_F16: return run<f16>(k, a, s);
    case LC_K_BF16: return run<bf16>(k, a, s);
    default: return LC_K_UNSUPPORTED;
    }
}
