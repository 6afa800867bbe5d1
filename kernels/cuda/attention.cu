/* attention.cu: softmax attention and its gradient without tiles: the plain twin of the tensor-core kernels, what serves other dtypes
 * and head dims, and decoding, where few queries read many keys: those are cut into parts, joined by a second kernel. A block works on
 * one row (a query; in the backward also a key); its warps take rows of the other side in turn, a warp's lanes the head dim. */
#include "attention.cuh"

enum { WARPS = 8, FEW = 8, PART = 256, DIMS = 16 /* of a lane: head dims up to 512 */ };

template <class R, class T> __device__ __forceinline__ void load_row(R (&to)[DIMS], const T *from, int d) {
#pragma unroll
    for (int e = 0; e < DIMS; e++) {
        int i = e * 32 + (threadIdx.x & 31);
        to[e] = i < d ? load<R>(from[i]) : (R)0;
    }
}
template <class R, class T> __device__ __forceinline__ R dot_row(const R (&x)[DIMS], const T *row, int d) {
    R sum = 0;
#pragma unroll
    for (int e = 0; e < DIMS; e++) {
        int i = e * 32 + (threadIdx.x & 31);
        if (i < d) sum += x[e] * load<R>(row[i]);
    }
    return warp_reduce(sum, op_sum());
}
template <class R, class T> __device__ __forceinline__ void add_row(R (&to)[DIMS], R by, const T *row, int d) {
#pragma unroll
    for (int e = 0; e < DIMS; e++) {
        int i = e * 32 + (threadIdx.x & 31);
        if (i < d) to[e] += by * load<R>(row[i]);
    }
}

/* The warps' sums to[DIMS] of a block added in order; the first warp has the result. room: [WARPS][d]. */
template <class R> __device__ __forceinline__ void sum_warps(R (&to)[DIMS], R *room, int d) {
    int lane = threadIdx.x & 31, w = threadIdx.x >> 5;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < DIMS; e++)
        if (e * 32 + lane < d) room[w * d + e * 32 + lane] = to[e];
    __syncthreads();
    if (w) return;
#pragma unroll
    for (int e = 0; e < DIMS; e++) {
        if (e * 32 + lane >= d) continue;
        to[e] = 0;
        for (int i = 0; i < WARPS; i++) to[e] += room[i * d + e * 32 + lane];
    }
}

/* ---- forward --------------------------------------------------------------------------------------------------------- */
/* Block (query and part, head of the batch). With one part the row is finished here; with more, partial [.., parts][d + 2] gets the sum of
 * values, the maximum and the sum of weights. */
template <class T> __global__ void __launch_bounds__(WARPS * 32)
rows_forward(softmax_call a, rows4 y, rows4 lse, real_of<T> *partial, int parts, int part_keys) {
    typedef real_of<T> R;
    LC_SHARED(shared);
    R *room = (R *)shared, *maxima = room + WARPS * a.d, *sums = maxima + WARPS;
    int part = blockIdx.x % parts, i = blockIdx.x / parts, b = blockIdx.y / a.h, h = blockIdx.y % a.h, w = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int last = i + softmax_offset(a), first = softmax_first(a, softmax_start(a, b), last);
    if (parts > 1) {
        int begin = part * part_keys, end = begin + part_keys - 1;
        first = first > begin ? first : begin;
        last = last < end ? last : end;
    }
    R q[DIMS], sum_v[DIMS] = {0}, max = -(R)INFINITY, sum = 0;
    load_row(q, a.q.row<T>(b, h, i), a.d);
    for (int j = first + w; j <= last; j += WARPS) {
        R s = (R)a.scale * dot_row(q, a.k.row<T>(b, h / a.group, j), a.d), m = s > max ? s : max, keep = exp(max - m), p = exp(s - m);
        sum = sum * keep + p;
#pragma unroll
        for (int e = 0; e < DIMS; e++) sum_v[e] *= keep;
        add_row(sum_v, p, a.v.row<T>(b, h / a.group, j), a.d);
        max = m;
    }
    if (!lane) maxima[w] = max, sums[w] = sum;
    __syncthreads();
    R all = -(R)INFINITY, total = 0;
    for (int n = 0; n < WARPS; n++) all = maxima[n] > all ? maxima[n] : all;
    for (int n = 0; n < WARPS; n++) total += sums[n] > 0 ? sums[n] * exp(maxima[n] - all) : (R)0;
    R by = sum > 0 ? exp(max - all) : (R)0;
#pragma unroll
    for (int e = 0; e < DIMS; e++) sum_v[e] *= by;
    sum_warps(sum_v, room, a.d);
    if (w) return;
    R *out = partial + (((int64_t)blockIdx.y * a.t + i) * parts + part) * (a.d + 2);
#pragma unroll
    for (int e = 0; e < DIMS; e++) {
        int at = e * 32 + lane;
        if (at >= a.d) continue;
        if (parts > 1) out[at] = sum_v[e];
        else y.row<T>(b, h, i)[at] = store<T>(total > 0 ? sum_v[e] / total : (R)0);
    }
    if (lane) return;
    if (parts > 1) out[a.d] = all, out[a.d + 1] = total;
    else if (lse.p) *lse.row<R>(b, h, i) = total > 0 ? all + log(total) : (R)0;
}

/* Block (query, head of the batch): parts brought to one maximum. */
template <class T> __global__ void join_parts(softmax_call a, rows4 y, rows4 lse, const real_of<T> *partial, int parts) {
    typedef real_of<T> R;
    int i = blockIdx.x, b = blockIdx.y / a.h, h = blockIdx.y % a.h;
    const R *part = partial + ((int64_t)blockIdx.y * a.t + i) * parts * (a.d + 2);
    R max = -(R)INFINITY, sum = 0;
    for (int p = 0; p < parts; p++) max = part[p * (a.d + 2) + a.d] > max ? part[p * (a.d + 2) + a.d] : max;
    for (int p = 0; p < parts; p++) {
        R n = part[p * (a.d + 2) + a.d + 1];
        if (n > 0) sum += n * exp(part[p * (a.d + 2) + a.d] - max);
    }
    for (int at = threadIdx.x; at < a.d; at += blockDim.x) {
        R v = 0;
        for (int p = 0; p < parts; p++)
            if (part[p * (a.d + 2) + a.d + 1] > 0) v += part[p * (a.d + 2) + at] * exp(part[p * (a.d + 2) + a.d] - max);
        y.row<T>(b, h, i)[at] = store<T>(sum > 0 ? v / sum : (R)0);
    }
    if (!threadIdx.x && lse.p) *lse.row<R>(b, h, i) = sum > 0 ? max + log(sum) : (R)0;
}

static int few_parts(const softmax_call &a) { return a.t <= FEW ? (int)ceil_div(a.s, PART) : 1; }

template <class T> static int run_rows(const lc_kargs *k, const softmax_call &a) {
    typedef real_of<T> R;
    int parts = few_parts(a);
    size_t shared = (size_t)(WARPS * a.d + 2 * WARPS) * sizeof(R);
    rows4 y = rows4_of(&k->y[0]), lse = k->y[1].data ? rows3_of(&k->y[1]) : rows4{};
    LC_LAUNCH(rows_forward<T>, dim3(parts * a.t, a.b * a.h), WARPS * 32, shared, a, y, lse, (R *)k->work, parts, PART);
    if (parts > 1) LC_LAUNCH(join_parts<T>, dim3(a.t, a.b * a.h), 128, 0, a, y, lse, (const R *)k->work, parts);
    return LC_K_OK;
}

extern "C" size_t lc_cuda_attention_work(const lc_kargs *k) {
    softmax_call a;
    softmax_open(&a, k, k->x, k->x + 3, k->x + 4);
    int parts = few_parts(a);
    if (parts <= 1) return 0;
    return (size_t)a.b * a.h * a.t * parts * (a.d + 2) * (a.q.dtype == LC_K_F64 ? 8 : 4);
}

extern "C" int lc_cuda_attention(const lc_kargs *k) {
    softmax_call a;
    softmax_open(&a, k, k->x, k->x + 3, k->x + 4);
    if (a.d > DIMS * 32) return LC_K_UNSUPPORTED;
    if (!a.b || !a.h || !a.t || !a.d) return LC_K_OK;
    if (a.t > FEW && softmax_has_tiles(k, a) && in_pieces(rows4_of(&k->y[0]))) {
        int rc = softmax_tiles(k, a);
        if (rc != LC_K_UNSUPPORTED) return rc; /* the tiles are too large for the device's shared memory */
    }
    LC_FLOATS(a.q.dtype, return run_rows<T>(k, a);)
    return LC_K_OK;
}

/* ---- backward -------------------------------------------------------------------------------------------------------- */
struct softmax_grads {
    rows4 g, y, lse, gq, gk, gv;
};

/* Block (query, head of the batch): gradient of q, and delta [b h, t] = g . y. */
template <class T> __global__ void __launch_bounds__(WARPS * 32) rows_gq(softmax_call a, softmax_grads o, real_of<T> *delta) {
    typedef real_of<T> R;
    LC_SHARED(shared);
    int i = blockIdx.x, b = blockIdx.y / a.h, h = blockIdx.y % a.h, w = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int last = i + softmax_offset(a), first = softmax_first(a, softmax_start(a, b), last);
    R q[DIMS], g[DIMS], sum[DIMS] = {0};
    load_row(g, o.g.row<T>(b, h, i), a.d);
    R along = dot_row(g, o.y.row<T>(b, h, i), a.d);
    if (!threadIdx.x) delta[(int64_t)blockIdx.y * a.t + i] = along;
    if (!o.gq.p) return;
    load_row(q, a.q.row<T>(b, h, i), a.d);
    R lse = *o.lse.row<R>(b, h, i);
    for (int j = first + w; j <= last; j += WARPS) {
        const T *key = a.k.row<T>(b, h / a.group, j);
        R p = exp((R)a.scale * dot_row(q, key, a.d) - lse);
        add_row(sum, (R)a.scale * p * (dot_row(g, a.v.row<T>(b, h / a.group, j), a.d) - along), key, a.d);
    }
    sum_warps(sum, (R *)shared, a.d);
    if (w) return;
#pragma unroll
    for (int e = 0; e < DIMS; e++)
        if (e * 32 + lane < a.d) o.gq.row<T>(b, h, i)[e * 32 + lane] = store<T>(sum[e]);
}

/* Block (key, key head of the batch): gradients of k and v, summed over the queries of all heads of the group that see the key. */
template <class T> __global__ void __launch_bounds__(WARPS * 32) rows_gkv(softmax_call a, softmax_grads o, const real_of<T> *delta) {
    typedef real_of<T> R;
    LC_SHARED(shared);
    int j = blockIdx.x, b = blockIdx.y / a.g, n = blockIdx.y % a.g, w = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int offset = softmax_offset(a), from = j - offset > 0 ? j - offset : 0, to = a.t - 1;
    if (a.window > 0 && j - offset + a.window - 1 < to) to = j - offset + a.window - 1;
    if (j < softmax_start(a, b)) to = -1;
    R key[DIMS], value[DIMS], sum_k[DIMS] = {0}, sum_v[DIMS] = {0};
    load_row(key, a.k.row<T>(b, n, j), a.d);
    load_row(value, a.v.row<T>(b, n, j), a.d);
    for (int h = n * a.group; h < (n + 1) * a.group; h++)
        for (int i = from + w; i <= to; i += WARPS) {
            const T *q = a.q.row<T>(b, h, i), *g = o.g.row<T>(b, h, i);
            R p = exp((R)a.scale * dot_row(key, q, a.d) - *o.lse.row<R>(b, h, i));
            R ds = (R)a.scale * p * (dot_row(value, g, a.d) - delta[((int64_t)b * a.h + h) * a.t + i]);
            add_row(sum_k, ds, q, a.d);
            add_row(sum_v, p, g, a.d);
        }
    sum_warps(sum_k, (R *)shared, a.d);
    sum_warps(sum_v, (R *)shared, a.d);
    if (w) return;
#pragma unroll
    for (int e = 0; e < DIMS; e++) {
        int at = e * 32 + lane;
        if (at >= a.d) continue;
        if (o.gk.p) o.gk.row<T>(b, n, j)[at] = store<T>(sum_k[e]);
        if (o.gv.p) o.gv.row<T>(b, n, j)[at] = store<T>(sum_v[e]);
    }
}

template <class T> static int run_rows_backward(const lc_kargs *k, const softmax_call &a) {
    typedef real_of<T> R;
    softmax_grads o = {rows4_of(&k->x[0]), rows4_of(&k->x[4]), rows3_of(&k->x[5]), rows4_of(&k->y[0]), rows4_of(&k->y[1]), rows4_of(&k->y[2])};
    size_t shared = (size_t)WARPS * a.d * sizeof(R);
    if (a.h && a.t) LC_LAUNCH(rows_gq<T>, dim3(a.t, a.b * a.h), WARPS * 32, shared, a, o, (R *)k->work);
    if ((o.gk.p || o.gv.p) && a.s && a.g) LC_LAUNCH(rows_gkv<T>, dim3(a.s, a.b * a.g), WARPS * 32, shared, a, o, (const R *)k->work);
    return LC_K_OK;
}

extern "C" size_t lc_cuda_attention_backward_work(const lc_kargs *k) {
    softmax_call a;
    softmax_open(&a, k, k->x + 1, k->x + 6, NULL);
    if (softmax_has_tiles(k, a)) return softmax_tiles_backward_work(k, a);
    return (size_t)a.b * a.h * a.t * (a.q.dtype == LC_K_F64 ? 8 : 4);
}

extern "C" int lc_cuda_attention_backward(const lc_kargs *k) {
    softmax_call a;
    softmax_open(&a, k, k->x + 1, k->x + 6, NULL);
    if (a.d > DIMS * 32) return LC_K_UNSUPPORTED;
    if (!a.b || !a.d) return LC_K_OK;
    bool tiles = softmax_has_tiles(k, a) && in_pieces(rows4_of(&k->x[0])) && in_pieces(rows4_of(&k->x[4]));
    for (int n = 0; n < 3; n++) tiles = tiles && (!k->y[n].data || in_pieces(rows4_of(&k->y[n])));
    if (tiles) {
        int rc = softmax_tiles_backward(k, a);
        if (rc != LC_K_UNSUPPORTED) return rc;
    }
    LC_FLOATS(a.q.dtype, return run_rows_backward<T>(k, a);)
    return LC_K_OK;
}
