/* hybrid_backward_plain.cu: the gradient of hybrid attention for any dtype, map, size and geometry, cost linear in length: the twin
 * that the tensor-core kernels are compared with. A warp has one row, or one row of a state; sums stand in a fixed order. */
#include "hybrid_backward.cuh"

namespace {

/* Of one query head each, in R; rows before start[b] hold nothing. */
template <class R> struct plain {
    R *aq, *ak;             /* [b, h, t, F]: features before the clamp */
    R *dfq, *dfk;           /* [b, h, t, F]: their gradients, then in the first f of a row those of the maps' inputs */
    R *dv;                  /* [b, h, t, d]: the linear part */
    R *delta, *rz, *x;      /* [b, h, t] */
    R *sums;                /* [2, parts, h, d, f] */
    int parts;
};

template <class R> static size_t plain_carve(const gradients *o, plain<R> *p, void *base) {
    const hybrid &a = o->a;
    arena w = {(char *)base, 0};
    size_t rows = (size_t)a.b * a.h * a.t, m = a.map == MAP_NONE ? 0 : (size_t)a.h * a.d * a.f;
    p->parts = (int)(ceil_div((int64_t)a.b * a.t, 1024) < 32 ? ceil_div((int64_t)a.b * a.t, 1024) : 32);
    p->aq = w.take<R>(rows * a.F), p->ak = w.take<R>(rows * a.F);
    p->dfq = w.take<R>(o->through_q ? rows * a.F : 0), p->dfk = w.take<R>(o->through_k ? rows * a.F : 0);
    p->dv = w.take<R>(a.F && o->dv.p ? rows * a.d : 0);
    p->delta = w.take<R>(rows), p->rz = w.take<R>(rows), p->x = w.take<R>(rows);
    p->sums = w.take<R>(2 * (size_t)p->parts * m);
    return w.used;
}

/* Row r of [b, h, t]. */
struct place {
    int b, h, t;
    __device__ __forceinline__ place(const hybrid &a, int64_t r) {
        t = (int)(r % a.t);
        int64_t head = r / a.t;
        h = (int)(head % a.h), b = (int)(head / a.h);
    }
};
__device__ __forceinline__ int64_t warp_number() { return ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) >> 5; }
template <class R> __device__ __forceinline__ R warp_sum(R v) { return warp_reduce(v, op_sum()); }
template <class R> __device__ __forceinline__ R clamped(const hybrid &a, R v) {
    return a.map != MAP_NONE && v < (R)a.feature_eps ? (R)a.feature_eps : v;
}

/* ---- features -------------------------------------------------------------------------------------------------------- */
/* The half of a row that sees sign * x: exp(sign x - max), over its sum for softmax_dim. from and to [f] may be one. */
template <class R> __device__ void exp_row(int map, int f, R sign, const R *from, R *to) {
    int lane = threadIdx.x & 31;
    R m = -(R)INFINITY, sum = 0;
    for (int i = lane; i < f; i += 32) m = op_max()(m, sign * from[i]);
    m = warp_reduce(m, op_max());
    for (int i = lane; i < f; i += 32) sum += to[i] = exp(sign * from[i] - m);
    sum = warp_sum(sum);
    for (int i = lane; map == MAP_SOFTMAX_DIM && i < f; i += 32) to[i] /= sum;
}

/* A warp a row: features of row [d] of token (b, h, t), in place in `to` [F]. */
template <class T, class R> __device__ void feature_row(const hybrid &a, int key, const place &at, R *to) {
    int lane = threadIdx.x & 31;
    const rows4 &m = key ? a.mk : a.mq;
    if (a.map == MAP_NONE) {
        const T *from = m.row<T>(at.b, key ? at.h / a.mk_group : at.h, at.t);
        for (int i = lane; i < a.F; i += 32) to[i] = load<R>(from[i]);
        return;
    }
    const T *row = key ? a.k.row<T>(at.b, at.h / a.group, at.t) : a.q.row<T>(at.b, at.h, at.t);
    R bias = key ? bias_of<R>(a.bk, a.bk_dtype, at.h) : bias_of<R>(a.bq, a.bq_dtype, at.h);
    for (int i = lane; i < a.f; i += 32) {
        R sum = bias + (a.skip ? load<R>(row[i]) : (R)0);
        for (int j = 0; j < a.d; j++) sum += load<R>(row[j]) * read_as<R>(m.p, m.dtype, at.h * m.s[1] + j * m.s[2] + i);
        to[i] = sum;
    }
    if (a.map == MAP_SOFTMAX_DIM || a.map == MAP_EXP_DIM) {
        if (a.full) exp_row<R>(a.map, a.f, -1, to, to + a.f);
        exp_row<R>(a.map, a.f, 1, to, to);
        return;
    }
    for (int i = lane; i < a.f; i += 32) to[i] = a.map == MAP_RELU ? (to[i] > 0 ? to[i] : (R)0) : to[i] > 0 ? 1 + to[i] : exp(to[i]);
}

/* A warp a row: features, and for queries delta and 1 / z. */
template <class T, class R> __global__ void rows_kernel(gradients o, plain<R> p, int key) {
    const hybrid &a = o.a;
    int64_t r = warp_number();
    if (r >= (int64_t)a.b * a.h * a.t) return;
    place at(a, r);
    if (at.t < start_of(a, at.b)) return;
    if (a.F) feature_row<T, R>(a, key, at, (key ? p.ak : p.aq) + r * a.F);
    if (key) return;
    const T *g = o.g.row<T>(at.b, at.h, at.t), *y = o.y.row<T>(at.b, at.h, at.t);
    R sum = 0;
    for (int e = threadIdx.x & 31; e < a.d; e += 32) sum += load<R>(g[e]) * load<R>(y[e]);
    sum = warp_sum(sum);
    if (threadIdx.x & 31) return;
    p.delta[r] = sum, p.rz[r] = 1 / *o.z.row<R>(at.b, at.h, at.t), p.x[r] = 0;
}

/* ---- the linear part: walks with one row of a state ------------------------------------------------------------------ */
enum { FOR_QUERIES, FOR_KEYS, FOR_VALUES };

/* state[m] of column e0 + 32 m takes in a token; returns what the last sum (Z or P) gets. n: the row of the state. */
template <class T, class R, int WHAT>
__device__ __forceinline__ R take_in(const gradients &o, const plain<R> &p, const place &at, int n, int e0, R lambda, R (&state)[4]) {
    const hybrid &a = o.a;
    int64_t r = ((int64_t)at.b * a.h + at.h) * a.t + at.t;
    int width = WHAT == FOR_VALUES ? a.F : a.d;
    R by;
    if (WHAT == FOR_QUERIES) by = clamped(a, p.ak[r * a.F + n]);
    else if (WHAT == FOR_KEYS) by = clamped(a, p.aq[r * a.F + n]) * p.rz[r] * lambda;
    else by = load<R>(o.g.row<T>(at.b, at.h, at.t)[n]) * p.rz[r] * lambda;
    const T *row = WHAT == FOR_QUERIES ? a.v.row<T>(at.b, at.h / a.group, at.t) : o.g.row<T>(at.b, at.h, at.t);
#pragma unroll
    for (int m = 0; m < 4; m++) {
        int e = e0 + 32 * m;
        if (e < width) state[m] += by * (WHAT == FOR_VALUES ? clamped(a, p.aq[r * a.F + e]) : load<R>(row[e]));
    }
    return WHAT == FOR_KEYS ? by * p.delta[r] : by;
}

template <class T, class R, int WHAT>
__device__ __forceinline__ R meet(const gradients &o, const plain<R> &p, const place &at, int e0, const R (&state)[4]) {
    const hybrid &a = o.a;
    int64_t r = ((int64_t)at.b * a.h + at.h) * a.t + at.t;
    int width = WHAT == FOR_VALUES ? a.F : a.d;
    const T *row = WHAT == FOR_QUERIES ? o.g.row<T>(at.b, at.h, at.t) : a.v.row<T>(at.b, at.h / a.group, at.t);
    R sum = 0;
#pragma unroll
    for (int m = 0; m < 4; m++) {
        int e = e0 + 32 * m;
        if (e < width) sum += state[m] * (WHAT == FOR_VALUES ? clamped(a, p.ak[r * a.F + e]) : load<R>(row[e]));
    }
    return warp_sum(sum);
}

/* A warp has row n of the state of a head: of S (dfq), R (dfk), or R transposed (dv); columns 128 at a time. */
template <class T, class R, int WHAT> __global__ void walk_kernel(gradients o, plain<R> p) {
    const hybrid &a = o.a;
    int rows = WHAT == FOR_VALUES ? a.d : a.F, width = WHAT == FOR_VALUES ? a.F : a.d, lane = threadIdx.x & 31;
    int64_t w = warp_number();
    if (w >= (int64_t)a.b * a.h * rows) return;
    int n = (int)(w % rows);
    place at(a, w / rows * a.t);
    int64_t r0 = w / rows * a.t;
    int s0 = start_of(a, at.b), step = WHAT == FOR_QUERIES ? 1 : -1, end = WHAT == FOR_QUERIES ? a.t : s0 - 1;
    R lambda = hybrid_lambda<R>(a, hybrid_gamma<R>(a, at.h));
    R *out = WHAT == FOR_QUERIES ? p.dfq : WHAT == FOR_KEYS ? p.dfk : p.dv;
    for (int e0 = lane; e0 - lane < width; e0 += 128) {
        R state[4] = {0, 0, 0, 0}, last = 0;
        int taken = WHAT == FOR_QUERIES ? s0 : a.t;
        for (int i = WHAT == FOR_QUERIES ? s0 : a.t - 1; i != end; i += step) {
            int64_t limit = s0 + (WHAT == FOR_QUERIES ? (int64_t)hybrid_lo(a, i - s0) : hybrid_hi(a, i - s0));
            if (WHAT == FOR_QUERIES)
                for (; taken < limit; taken++) at.t = taken, last += take_in<T, R, WHAT>(o, p, at, n, e0, lambda, state);
            else
                for (; taken > limit;) at.t = --taken, last += take_in<T, R, WHAT>(o, p, at, n, e0, lambda, state);
            at.t = i;
            R sum = meet<T, R, WHAT>(o, p, at, e0, state);
            if (lane) continue;
            int64_t r = r0 + i;
            if (WHAT == FOR_QUERIES) sum = (sum - (e0 ? (R)0 : p.delta[r] * last)) * p.rz[r] * lambda;
            if (WHAT == FOR_KEYS) sum -= e0 ? (R)0 : last;
            R *to = out + r * rows + n;
            *to = e0 ? *to + sum : sum;
        }
    }
}

/* ---- through the maps ------------------------------------------------------------------------------------------------ */
/* The half of a row: d [f] from the gradient d of clamped features and the features `from` before the clamp, times sign. */
template <class R> __device__ void exp_row_backward(const hybrid &a, R sign, const R *from, R *d) {
    int lane = threadIdx.x & 31;
    R dot = 0, ties = 0, eps = (R)a.feature_eps;
    for (int i = lane; i < a.f; i += 32) {
        if (from[i] >= eps) dot += from[i] * d[i];
        ties += from[i] == 1;
    }
    dot = warp_sum(dot), ties = warp_sum(ties);
    for (int i = lane; i < a.f; i += 32) {
        R v = from[i], g = v >= eps ? d[i] : (R)0;
        d[i] = sign * (a.map == MAP_SOFTMAX_DIM ? v * (g - dot) : v * g - (v == 1 ? dot / ties : (R)0)); /* the extreme has 1 */
    }
}

/* A warp a row: df [F] becomes the gradient of the map's inputs [f]; x_i of queries. */
template <class T, class R> __global__ void maps_kernel(gradients o, plain<R> p, int key) {
    const hybrid &a = o.a;
    int64_t r = warp_number();
    int lane = threadIdx.x & 31;
    if (r >= (int64_t)a.b * a.h * a.t) return;
    place at(a, r);
    if (at.t < start_of(a, at.b)) return;
    const R *from = (key ? p.ak : p.aq) + r * a.F;
    R *d = (key ? p.dfk : p.dfq) + r * a.F, x = 0;
    for (int i = lane; !key && i < a.F; i += 32) x += clamped(a, from[i]) * d[i];
    x = warp_sum(x);
    if (!key && !lane) p.x[r] = x;
    if (a.map == MAP_NONE) return;
    if (a.map == MAP_SOFTMAX_DIM || a.map == MAP_EXP_DIM) {
        exp_row_backward<R>(a, 1, from, d);
        if (!a.full) return;
        exp_row_backward<R>(a, -1, from + a.f, d + a.f);
        for (int i = lane; i < a.f; i += 32) d[i] += d[a.f + i];
        return;
    }
    for (int i = lane; i < a.f; i += 32) {
        R v = from[i], slope = a.map == MAP_RELU ? (R)(v > 0) : v < 1 ? v : (R)1;
        d[i] = v >= (R)a.feature_eps ? d[i] * slope : (R)0;
    }
}

/* Element e of what the map's inputs' gradient d [f] gives to the token. */
template <class R> __device__ __forceinline__ R input_gradient(const hybrid &a, const rows4 &m, int h, const R *d, int e) {
    R sum = a.skip ? d[e] : (R)0;
    for (int i = 0; i < a.f; i++) sum += read_as<R>(m.p, m.dtype, h * m.s[1] + e * m.s[2] + i) * d[i];
    return sum;
}

/* ---- the window, and rows of results --------------------------------------------------------------------------------- */
template <class T, class R> struct pair_value {
    R p, ds; /* weight / z; scale * gradient of the score */
    __device__ __forceinline__ pair_value(const gradients &o, const plain<R> &w, const place &at, int hk, int j, R gamma) {
        const hybrid &a = o.a;
        int64_t r = ((int64_t)at.b * a.h + at.h) * a.t + at.t;
        const T *q = a.q.row<T>(at.b, at.h, at.t), *k = a.k.row<T>(at.b, hk, j), *v = a.v.row<T>(at.b, hk, j),
                *g = o.g.row<T>(at.b, at.h, at.t);
        R s = 0, dp = 0;
        for (int e = threadIdx.x & 31; e < a.d; e += 32) {
            s += load<R>(q[e]) * load<R>(k[e]);
            dp += load<R>(g[e]) * load<R>(v[e]);
        }
        s = warp_sum(s), dp = warp_sum(dp);
        p = gamma * exp((R)a.scale * s - *o.c.row<R>(at.b, at.h, at.t)) * w.rz[r];
        ds = (R)a.scale * (p * (dp - w.delta[r]) + (j == *o.argmax.row<int32_t>(at.b, at.h, at.t) ? w.x[r] : (R)0));
    }
};

/* A warp a row of dq. */
template <class T, class R> __global__ void queries_kernel(gradients o, plain<R> p) {
    const hybrid &a = o.a;
    int64_t r = warp_number();
    if (r >= (int64_t)a.b * a.h * a.t) return;
    place at(a, r);
    int s0 = start_of(a, at.b), hk = at.h / a.group;
    R gamma = hybrid_gamma<R>(a, at.h);
    T *out = o.dq.row<T>(at.b, at.h, at.t);
    for (int e0 = threadIdx.x & 31; e0 - (int)(threadIdx.x & 31) < a.d; e0 += 128) {
        R sum[4] = {0, 0, 0, 0};
        for (int j = s0 + hybrid_lo(a, at.t - s0); at.t >= s0 && a.window && j <= at.t; j++) {
            pair_value<T, R> u(o, p, at, hk, j, gamma);
#pragma unroll
            for (int m = 0; m < 4; m++)
                if (e0 + 32 * m < a.d) sum[m] += u.ds * load<R>(a.k.row<T>(at.b, hk, j)[e0 + 32 * m]);
        }
#pragma unroll
        for (int m = 0; m < 4; m++) {
            int e = e0 + 32 * m;
            if (e >= a.d) continue;
            if (at.t >= s0 && a.F && a.map != MAP_NONE) sum[m] += input_gradient<R>(a, a.mq, at.h, p.dfq + r * a.F, e);
            out[e] = store<T>(sum[m]);
        }
    }
}

/* A warp a row of dk and dv: the query heads of a group in order. */
template <class T, class R> __global__ void keys_kernel(gradients o, plain<R> p) {
    const hybrid &a = o.a;
    int64_t n = warp_number();
    if (n >= (int64_t)a.b * a.g * a.t) return;
    int j = (int)(n % a.t), hk = (int)(n / a.t % a.g), b = (int)(n / a.t / a.g), s0 = start_of(a, b), lane = threadIdx.x & 31;
    for (int e0 = lane; e0 - lane < a.d; e0 += 128) {
        R dk[4] = {0, 0, 0, 0}, dv[4] = {0, 0, 0, 0};
        for (int h = hk * a.group; j >= s0 && h < (hk + 1) * a.group; h++) {
            int64_t r0 = ((int64_t)b * a.h + h) * a.t, r = r0 + j;
            R gamma = hybrid_gamma<R>(a, h);
            for (int i = j; a.window && i < a.t && i - s0 < hybrid_hi(a, j - s0); i++) {
                place at(a, r0 + i);
                pair_value<T, R> u(o, p, at, hk, j, gamma);
#pragma unroll
                for (int m = 0; m < 4; m++) {
                    int e = e0 + 32 * m;
                    if (e >= a.d) continue;
                    dk[m] += u.ds * load<R>(a.q.row<T>(b, h, i)[e]);
                    dv[m] += u.p * load<R>(o.g.row<T>(b, h, i)[e]);
                }
            }
#pragma unroll
            for (int m = 0; m < 4; m++) {
                int e = e0 + 32 * m;
                if (e >= a.d || !a.F) continue;
                if (o.dk.p && a.map != MAP_NONE) dk[m] += input_gradient<R>(a, a.mk, h, p.dfk + r * a.F, e);
                if (o.dv.p) dv[m] += p.dv[r * a.d + e];
            }
        }
#pragma unroll
        for (int m = 0; m < 4; m++) {
            int e = e0 + 32 * m;
            if (e >= a.d) continue;
            if (o.dk.p) o.dk.row<T>(b, hk, j)[e] = store<T>(dk[m]);
            if (o.dv.p) o.dv.row<T>(b, hk, j)[e] = store<T>(dv[m]);
        }
    }
}

/* A warp a row of the gradient of ready features; the query heads that share a row in order. */
template <class T, class R> __global__ void ready_kernel(gradients o, plain<R> p, int key) {
    const hybrid &a = o.a;
    int group = key ? a.mk_group : 1, heads = a.h / group;
    int64_t n = warp_number();
    if (n >= (int64_t)a.b * heads * a.t) return;
    int t = (int)(n % a.t), hm = (int)(n / a.t % heads), b = (int)(n / a.t / heads);
    T *out = (key ? o.dmk : o.dmq).row<T>(b, hm, t);
    const R *df = (key ? p.dfk : p.dfq) + (((int64_t)b * a.h + hm * group) * a.t + t) * a.F;
    for (int e = threadIdx.x & 31; e < a.F; e += 32) {
        R sum = 0;
        for (int m = 0; m < group && t >= start_of(a, b); m++) sum += df[(int64_t)m * a.t * a.F + e];
        out[e] = store<T>(sum);
    }
}

/* ---- sums over the batch --------------------------------------------------------------------------------------------- */
/* sums [parts, h, d, f]: the rows of one part. A thread an element; blockIdx.y the head, z the part. */
template <class T, class R> __global__ void weights_kernel(gradients o, plain<R> p, int key) {
    const hybrid &a = o.a;
    int64_t e = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, rows = (int64_t)a.b * a.t;
    if (e >= (int64_t)a.d * a.f) return;
    int j = (int)(e / a.f), i = (int)(e % a.f), h = blockIdx.y;
    R sum = 0;
    for (int64_t n = rows * blockIdx.z / p.parts; n < rows * (blockIdx.z + 1) / p.parts; n++) {
        int b = (int)(n / a.t), t = (int)(n % a.t);
        if (t < start_of(a, b)) continue;
        const T *x = key ? a.k.row<T>(b, h / a.group, t) : a.q.row<T>(b, h, t);
        sum += load<R>(x[j]) * (key ? p.dfk : p.dfq)[(((int64_t)b * a.h + h) * a.t + t) * a.F + i];
    }
    p.sums[((((int64_t)key * p.parts + blockIdx.z) * a.h) + h) * a.d * a.f + e] = sum;
}

template <class R> __global__ void finish_kernel(gradients o, plain<R> p, int key) {
    const hybrid &a = o.a;
    int64_t e = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, each = (int64_t)a.h * a.d * a.f;
    if (e >= each) return;
    R sum = 0;
    for (int part = 0; part < p.parts; part++) sum += p.sums[((int64_t)key * p.parts + part) * each + e];
    const rows4 &m = key ? o.dmk : o.dmq;
    write_as<R>(m.p, m.dtype, e / a.f / a.d * m.s[1] + e / a.f % a.d * m.s[2] + e % a.f, sum);
}

/* A block a head: biases and the factor. */
template <class R> __global__ void heads_kernel(gradients o, plain<R> p) {
    __shared__ R room[32];
    const hybrid &a = o.a;
    int h = blockIdx.x;
    for (int what = 0; what < 3; what++) {
        void *out = what == 0 ? o.dbq : what == 1 ? o.dbk : o.dfactors;
        if (!out) continue;
        const R *from = what == 0 ? p.dfq : what == 1 ? p.dfk : p.x;
        int64_t n = what < 2 ? a.f : 1, stride = what < 2 ? a.F : 1;
        R sum = 0;
        for (int b = 0; b < a.b; b++) {
            int s0 = start_of(a, b);
            for (int64_t e = threadIdx.x; e < (a.t - s0) * n; e += blockDim.x)
                sum += from[(((int64_t)b * a.h + h) * a.t + s0 + e / n) * stride + e % n];
        }
        sum = block_reduce(sum, op_sum(), (R)0, room);
        if (what == 2) sum *= a.affine ? (R)-1 : hybrid_gamma<R>(a, h) - 1;
        if (!threadIdx.x) write_as<R>(out, what == 0 ? o.dbq_dtype : what == 1 ? o.dbk_dtype : o.dfactors_dtype, h, sum);
    }
}

/* ---- launches -------------------------------------------------------------------------------------------------------- */
unsigned warps(int64_t n) { return (unsigned)ceil_div(n, 4); } /* blocks of 128 threads */

template <class T, class R> static void linear_part(const gradients &o, const plain<R> &p) {
    const hybrid &a = o.a;
    int64_t heads = (int64_t)a.b * a.h;
    if (o.through_q) {
        LC_LAUNCH((walk_kernel<T, R, FOR_QUERIES>), warps(heads * a.F), 128, 0, o, p);
        LC_LAUNCH((maps_kernel<T, R>), warps(heads * a.t), 128, 0, o, p, 0);
    }
    if (o.through_k) {
        LC_LAUNCH((walk_kernel<T, R, FOR_KEYS>), warps(heads * a.F), 128, 0, o, p);
        LC_LAUNCH((maps_kernel<T, R>), warps(heads * a.t), 128, 0, o, p, 1);
    }
    if (a.F && o.dv.p) LC_LAUNCH((walk_kernel<T, R, FOR_VALUES>), warps(heads * a.d), 128, 0, o, p);
}

template <class T, class R> static void feature_results(const gradients &o, const plain<R> &p) {
    const hybrid &a = o.a;
    for (int key = 0; key < 2; key++) {
        if (!(key ? o.dmk : o.dmq).p) continue;
        if (a.map == MAP_NONE) {
            if (p.parts) LC_LAUNCH((ready_kernel<T, R>), warps((int64_t)a.b * a.h / (key ? a.mk_group : 1) * a.t), 128, 0, o, p, key);
            continue;
        }
        int64_t each = (int64_t)a.d * a.f;
        if (p.parts) LC_LAUNCH((weights_kernel<T, R>), dim3((unsigned)ceil_div(each, 128), a.h, p.parts), 128, 0, o, p, key);
        LC_LAUNCH((finish_kernel<R>), (unsigned)ceil_div(each * a.h, 128), 128, 0, o, p, key);
    }
}

template <class T> static int plain_backward(const gradients &o, void *work) {
    typedef real_of<T> R;
    const hybrid &a = o.a;
    plain<R> p;
    plain_carve(&o, &p, work);
    int64_t rows = (int64_t)a.b * a.h * a.t;
    if (!a.h || !a.d) return LC_K_OK;
    if (rows) {
        LC_LAUNCH((rows_kernel<T, R>), warps(rows), 128, 0, o, p, 0);
        if (a.F) LC_LAUNCH((rows_kernel<T, R>), warps(rows), 128, 0, o, p, 1);
        linear_part<T, R>(o, p);
        if (o.dq.p) LC_LAUNCH((queries_kernel<T, R>), warps(rows), 128, 0, o, p);
        if (o.dk.p || o.dv.p) LC_LAUNCH((keys_kernel<T, R>), warps((int64_t)a.b * a.g * a.t), 128, 0, o, p);
    }
    feature_results<T, R>(o, p);
    if (o.dbq || o.dbk || o.dfactors) LC_LAUNCH((heads_kernel<R>), a.h, 256, 0, o, p);
    return LC_K_OK;
}

} // namespace

size_t hybrid_backward_plain_work(const gradients *o) {
    plain<float> f;
    plain<double> d;
    return o->a.q.dtype == LC_K_F64 ? plain_carve(o, &d, NULL) : plain_carve(o, &f, NULL);
}

int hybrid_backward_plain(const gradients *o, void *work) {
    LC_FLOATS(o->a.q.dtype, return plain_backward<T>(*o, work);)
    return LC_K_OK;
}
