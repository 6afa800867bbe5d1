/* hybrid_plain.cu: hybrid attention token by token, for any shape, dtype, map and window, with or without a carried state: what the
 * tiled kernels are compared with (option plain_hybrid), and the way of the calls that they do not take. A block owns one head of one
 * row and walks its tokens; the state S [F][d] lies in device memory, each thread keeping to its own columns. */
#include "hybrid.cuh"

enum { PLAIN_THREADS = 256 };

/* What a block works with. Arrays lie in shared memory but for s. */
template <class T> struct plain_head {
    typedef real_of<T> R;
    const hybrid &a;
    const carried &c;
    hybrid_span at;
    int b, h;
    R *s, *z;                    /* state [F][d], [F] */
    R *q, *x, *features, *u, *y; /* [d], [f], [F], [2 window], [d] */
    R *room;                     /* [32] */

    /* Element e of the key (which 0), value (1) or ready feature (2) at position p. */
    __device__ R key_element(int which, int p, int e) const {
        int head = which < 2 ? h / a.group : h / a.mk_group;
        if (p < at.p0) return ((const R *)c.cache)[at.slot * c.slot_elements + cached_at(a, which, head, p) + e];
        const rows4 &v = which == 0 ? a.k : which == 1 ? a.v : a.mk;
        return load<R>(v.row<T>(b, head, p + at.shift)[e]);
    }

    /* features [F] of the query or key at position p. */
    __device__ void make_features(int key, int p) {
        __syncthreads();
        if (a.map == MAP_NONE) {
            for (int i = threadIdx.x; i < a.F; i += PLAIN_THREADS)
                features[i] = key ? key_element(2, p, i) : load<R>(a.mq.row<T>(b, h, p + at.shift)[i]);
            __syncthreads();
            return;
        }
        for (int e = threadIdx.x; key && e < a.d; e += PLAIN_THREADS) q[e] = key_element(0, p, e);
        for (int e = threadIdx.x; !key && e < a.d; e += PLAIN_THREADS) q[e] = load<R>(a.q.row<T>(b, h, p + at.shift)[e]);
        __syncthreads();
        const rows4 &m = key ? a.mk : a.mq;
        R bias = key ? bias_of<R>(a.bk, a.bk_dtype, h) : bias_of<R>(a.bq, a.bq_dtype, h);
        for (int i = threadIdx.x; i < a.f; i += PLAIN_THREADS) {
            R sum = bias + (a.skip ? q[i] : 0);
            for (int e = 0; e < a.d; e++) sum += q[e] * read_as<R>(m.p, m.dtype, h * m.s[1] + e * m.s[2] + i);
            x[i] = sum;
        }
        __syncthreads();
        if (threadIdx.x < 32) map_row(a, x, features);
        __syncthreads();
        for (int i = threadIdx.x; i < a.F; i += PLAIN_THREADS)
            if (features[i] < (R)a.feature_eps) features[i] = (R)a.feature_eps;
        __syncthreads();
    }

    /* The state takes in keys from .. to - 1. */
    __device__ void absorb(int from, int to) {
        for (int p = from; a.F && p < to; p++) {
            make_features(1, p);
            for (int e = threadIdx.x; e < a.d; e += PLAIN_THREADS) {
                R v = key_element(1, p, e);
                for (int i = 0; i < a.F; i++) s[(int64_t)i * a.d + e] += features[i] * v;
            }
            for (int i = threadIdx.x; i < a.F; i += PLAIN_THREADS) z[i] += features[i];
        }
        __syncthreads();
    }

    /* u [p + 1 - lo] = exp(score - max); y = their product with the values; returns their sum. */
    __device__ R window_row(int lo, int p, R *max, int *arg) {
        int lane = threadIdx.x & 31, n = p + 1 - lo;
        for (int e = threadIdx.x; e < a.d; e += PLAIN_THREADS) q[e] = load<R>(a.q.row<T>(b, h, p + at.shift)[e]);
        __syncthreads();
        for (int j = threadIdx.x / 32; j < n; j += PLAIN_THREADS / 32) {
            R dot = 0;
            for (int e = lane; e < a.d; e += 32) dot += q[e] * key_element(0, lo + j, e);
            dot = warp_reduce(dot, op_sum());
            if (!lane) u[j] = dot * (R)a.scale;
        }
        __syncthreads();
        R most = -(R)INFINITY, sum = 0;
        for (int j = threadIdx.x; j < n; j += PLAIN_THREADS) most = op_max()(most, u[j]);
        most = block_reduce(most, op_max(), -(R)INFINITY, room);
        R first = (R)0; /* n - index of the first that is largest */
        for (int j = n - 1 - (int)threadIdx.x; j >= 0; j -= PLAIN_THREADS)
            if (u[j] == most) first = (R)(n - j);
        first = block_reduce(first, op_max(), (R)0, room);
        for (int j = threadIdx.x; j < n; j += PLAIN_THREADS) sum += u[j] = exp(u[j] - most);
        sum = block_reduce(sum, op_sum(), (R)0, room);
        for (int e = threadIdx.x; e < a.d; e += PLAIN_THREADS) {
            R dot = 0;
            for (int j = 0; j < n; j++) dot += u[j] * key_element(1, lo + j, e);
            y[e] = dot;
        }
        *max = most, *arg = first > 0 ? lo + n - (int)first : p; /* none: NaN */
        return sum;
    }

    __device__ void step(int p, const hybrid_out &o, R gamma, R lambda) {
        int lo = hybrid_lo(a, p), arg = p, i = p + at.shift;
        R den = (R)a.eps, max = 0;
        if (a.window) den = window_row(lo, p, &max, &arg) * gamma;
        else absorb(p, p + 1);
        R dot = 0;
        bool linear = a.F && lo > 0;
        if (linear) {
            make_features(0, p);
            for (int j = threadIdx.x; j < a.F; j += PLAIN_THREADS) dot += features[j] * z[j];
            den += lambda * block_reduce(dot, op_sum(), (R)0, room);
        }
        for (int e = threadIdx.x; e < a.d; e += PLAIN_THREADS) {
            R sum = 0;
            for (int j = 0; linear && j < a.F; j++) sum += features[j] * s[(int64_t)j * a.d + e];
            o.y.row<T>(b, h, i)[e] = store<T>(((a.window ? gamma * y[e] : 0) + lambda * sum) / den);
        }
        put_row(o, i, max, arg + at.shift, den);
        if (a.window) absorb(lo, hybrid_lo(a, p + 1));
        __syncthreads();
    }

    __device__ void put_row(const hybrid_out &o, int i, R max, int arg, R den) {
        if (threadIdx.x) return;
        if (o.c.p) *o.c.row<R>(b, h, i) = max;
        if (o.at.p) *o.at.row<int32_t>(b, h, i) = arg;
        if (o.z.p) *o.z.row<R>(b, h, i) = den;
    }
};

/* Grid b * h. work: without a carried state, [b * h][F * d + F]. */
template <class T> __global__ void __launch_bounds__(PLAIN_THREADS) plain_kernel(hybrid a, carried c, hybrid_out o, real_of<T> *work) {
    typedef real_of<T> R;
    LC_SHARED(shared);
    R *at = (R *)shared;
    plain_head<T> w = {a, c};
    w.b = blockIdx.x / a.h, w.h = blockIdx.x % a.h;
    w.at = span_of(a, c, w.b, threadIdx.x == 0 && w.h == 0);
    w.room = at, at += 32;
    w.q = at, at += a.d, w.y = at, at += a.d;
    w.x = at, at += a.f, w.features = at, at += a.F, w.u = at;
    int64_t sd = (int64_t)a.F * a.d;
    if (c.state) {
        w.s = (R *)c.state + (w.at.slot * a.h + w.h) * sd;
        w.z = (R *)c.zsum + (w.at.slot * a.h + w.h) * a.F;
    } else {
        w.s = work + blockIdx.x * (sd + a.F), w.z = w.s + sd;
        for (int i = 0; i < a.F; i++)
            for (int e = threadIdx.x; e < a.d; e += PLAIN_THREADS) w.s[(int64_t)i * a.d + e] = 0;
        for (int i = threadIdx.x; i < a.F; i += PLAIN_THREADS) w.z[i] = 0;
    }
    for (int i = 0; i < w.at.start; i++) {
        for (int e = threadIdx.x; e < a.d; e += PLAIN_THREADS) o.y.row<T>(w.b, w.h, i)[e] = store<T>((R)0);
        w.put_row(o, i, 0, i, 1);
    }
    R gamma = hybrid_gamma<R>(a, w.h), lambda = hybrid_lambda(a, gamma);
    for (int p = w.at.p0; p < w.at.p1; p++) w.step(p, o, gamma, lambda);
}

/* Grid b * (g + heads of ready features). The last 2 window rows of each enter the cache. */
template <class T> __global__ void remember_kernel(hybrid a, carried c, int heads) {
    typedef real_of<T> R;
    int b = blockIdx.x / heads, head = blockIdx.x % heads;
    hybrid_span at = span_of(a, c, b, false);
    R *slot = (R *)c.cache + at.slot * c.slot_elements;
    int first = at.p1 - 2 * a.window > at.p0 ? at.p1 - 2 * a.window : at.p0, dim = head < a.g ? a.d : a.F;
    int64_t n = (int64_t)(at.p1 - first) * dim;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
        int p = first + (int)(i / dim), e = (int)(i % dim);
        if (head < a.g) {
            slot[cached_at(a, 0, head, p) + e] = load<R>(a.k.row<T>(b, head, p + at.shift)[e]);
            slot[cached_at(a, 1, head, p) + e] = load<R>(a.v.row<T>(b, head, p + at.shift)[e]);
        } else slot[cached_at(a, 2, head - a.g, p) + e] = load<R>(a.mk.row<T>(b, head - a.g, p + at.shift)[e]);
    }
}

size_t hybrid_plain_work(const lc_kargs *k, const hybrid &a) {
    size_t real = k->x[0].dtype == LC_K_F64 ? 8 : 4;
    return k->x[9].data ? 0 : (size_t)a.b * a.h * ((size_t)a.F * a.d + a.F) * real;
}

int hybrid_remember(const lc_kargs *k, const hybrid &a, const carried &s) {
    int heads = a.g + (a.map == MAP_NONE && a.F ? a.h / a.mk_group : 0);
    if (!s.cache || !a.b || !heads) return LC_K_OK;
    LC_FLOATS(k->x[0].dtype, LC_LAUNCH(remember_kernel<T>, a.b * heads, 256, 0, a, s, heads););
    return LC_K_OK;
}

int hybrid_plain(const lc_kargs *k, const hybrid &a, const carried &s) {
    size_t real = k->x[0].dtype == LC_K_F64 ? 8 : 4;
    size_t shared = (size_t)(32 + 2 * a.d + a.f + a.F + 2 * a.window + 1) * real;
    hybrid_out o = hybrid_results(k);
    LC_FLOATS(k->x[0].dtype, {
        if (allow_shared(plain_kernel<T>, shared)) return LC_K_DEVICE;
        LC_LAUNCH(plain_kernel<T>, a.b * a.h, PLAIN_THREADS, shared, a, s, o, (real_of<T> *)k->work);
    });
    return s.state && a.window ? hybrid_remember(k, a, s) : LC_K_OK;
}
