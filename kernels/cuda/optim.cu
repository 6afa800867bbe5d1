/* optim.cu: optimizer steps, in place, in PyTorch's arithmetic and order of operations. Parameters and moments are
 * contiguous, f32 or f64; gradients may be of any float dtype. Learning rate and step may be 0-dim tensors on the
 * device, so that a recorded graph can be replayed: each block then works out the step's factors for itself. */
#include "convert.cuh"
#include "elementwise.cuh"

/* Operands of n elements in one piece. */
template <int N> static operands<N> flat(const lc_view *const (&v)[N]) {
    lc_view line[N];
    const lc_view *lines[N];
    for (int o = 0; o < N; o++) {
        line[o] = *v[o];
        line[o].ndim = 1;
        line[o].dim[0] = view_numel(v[o]);
        line[o].stride[0] = 1;
        lines[o] = &line[o];
    }
    return make_operands<N>(lines);
}

static bool usable(const lc_view *v, const lc_view *p, bool is_gradient) {
    if (!view_contiguous(v) || view_numel(v) != view_numel(p)) return false;
    return is_gradient ? lc_dtype_is_float(v->dtype) : v->dtype == p->dtype;
}

/* ---- adamw_ ------------------------------------------------------------------------------------------------------ */
struct adam {
    scalar_at lr, step;
    double beta1, beta2, eps, weight_decay;
    int decoupled;
};
template <class R> struct adam_factors { R keep, decay, lerp, beta2, rest2, eps, size, root; };

template <class R> __device__ __forceinline__ adam_factors<R> adam_at(const adam &c) {
    adam_factors<R> f;
    double lr = c.lr.get(), step = c.step.get();
    f.keep = (R)(c.decoupled ? 1 - lr * c.weight_decay : 1);
    f.decay = (R)(c.decoupled ? 0 : c.weight_decay); /* one of decay and 1 - keep is 0 */
    f.lerp = (R)(1 - c.beta1);
    f.beta2 = (R)c.beta2;
    f.rest2 = (R)(1 - c.beta2);
    f.eps = (R)c.eps;
    f.size = (R)(lr / (1 - pow(c.beta1, step)));
    f.root = (R)sqrt(1 - pow(c.beta2, step));
    return f;
}

template <class R> __device__ __forceinline__ void adam_one(const adam_factors<R> &f, R *p, R g, R *m, R *v) {
    R gi = g + f.decay * *p, old = *m;
    R mi = f.lerp < (R)0.5 ? old + f.lerp * (gi - old) : gi - (gi - old) * (1 - f.lerp);
    R vi = *v * f.beta2 + f.rest2 * gi * gi;
    *m = mi;
    *v = vi;
    *p = *p * f.keep - f.size * mi / (sqrt(vi) / f.root + f.eps);
}

/* p, g, m, v: four elements at a time */
template <class G> LC_KERNEL adamw_vectors(LC_SPAN(4) s, adam c) {
    typedef vector_of<float, 4> real4;
    __shared__ adam_factors<float> room;
    if (threadIdx.x == 0) room = adam_at<float>(c);
    __syncthreads();
    adam_factors<float> f = room;
    LC_EACH(i, s.total) {
        int32_t at[4];
        float p[4], g[4], m[4], v[4];
        s.at(i, at);
        real4::raw rp = real4::get(s.p[0] + at[0]), rm = real4::get(s.p[2] + at[2]), rv = real4::get(s.p[3] + at[3]);
        typename vector_of<G, 4>::raw rg = vector_of<G, 4>::get(s.p[1] + at[1]);
        real4::open(rp, p);
        real4::open(rm, m);
        real4::open(rv, v);
        vector_of<G, 4>::open(rg, g);
#pragma unroll
        for (int e = 0; e < 4; e++) adam_one(f, &p[e], g[e], &m[e], &v[e]);
        real4::put(s.p[0] + at[0], p);
        real4::put(s.p[2] + at[2], m);
        real4::put(s.p[3] + at[3], v);
    }
}

template <class R> LC_KERNEL adamw_elements(LC_SPAN(4) s, adam c, int g_dtype) {
    __shared__ adam_factors<R> room;
    if (threadIdx.x == 0) room = adam_at<R>(c);
    __syncthreads();
    adam_factors<R> f = room;
    LC_EACH(i, s.total) {
        int32_t at[4];
        s.at(i, at);
        R *p = (R *)(s.p[0] + at[0]), *m = (R *)(s.p[2] + at[2]), *v = (R *)(s.p[3] + at[3]);
        adam_one(f, p, read_as<R>(g_dtype, s.p[1] + at[1]), m, v);
    }
}

/* x = p, g, m, v [n], lr, step; f = lr, beta1, beta2, eps, weight_decay; i = step (from 1), decoupled */
extern "C" int lc_cuda_adamw_(const lc_kargs *k) {
    const lc_view *x = k->x, *const v[4] = {&x[0], &x[1], &x[2], &x[3]};
    int g = x[1].dtype;
    bool wide = x[0].dtype == LC_K_F64;
    if ((!wide && x[0].dtype != LC_K_F32) || !view_contiguous(&x[0])) return LC_K_UNSUPPORTED;
    if (!usable(&x[1], &x[0], true) || !usable(&x[2], &x[0], false) || !usable(&x[3], &x[0], false))
        return LC_K_UNSUPPORTED;
    if (!view_numel(&x[0])) return LC_K_OK;
    adam c = {scalar_or(&x[4], k->f[0]), scalar_or(&x[5], k->i[0]), k->f[1], k->f[2], k->f[3], k->f[4], k->i[1]};
    auto fast = g == LC_K_F32 ? adamw_vectors<float> : g == LC_K_BF16 ? adamw_vectors<bf16> : adamw_vectors<f16>;
    auto any = wide ? adamw_elements<double> : adamw_elements<float>;
    int width = wide || g == LC_K_F64 || k->host->option(LC_OPTION_PLAIN_POINTWISE) ? 1 : 4;
    each_vector(
        flat<4>(v), width, 0,
        [&](const span<4> &s) { LC_LAUNCH(fast, grid_for(s.total, LC_THREADS), LC_THREADS, 0, s, c); },
        [&](const span<4> &s) { LC_LAUNCH(any, grid_for(s.total, LC_THREADS), LC_THREADS, 0, s, c, g); });
    return LC_K_OK;
}

/* ---- sgd_ -------------------------------------------------------------------------------------------------------- */
struct sgd {
    scalar_at lr, step;
    double momentum, dampening, weight_decay;
    int nesterov, has_buf, g_dtype;
};

/* p, g, buf */
template <class R> LC_KERNEL sgd_elements(LC_SPAN(3) s, sgd c) {
    R lr = -(R)c.lr.get(), decay = (R)c.weight_decay, momentum = (R)c.momentum, dampened = (R)(1 - c.dampening);
    bool first = c.step.get() <= 1;
    LC_EACH(i, s.total) {
        int32_t at[3];
        s.at(i, at);
        R *p = (R *)(s.p[0] + at[0]), *buf = (R *)(s.p[2] + at[2]);
        R g = read_as<R>(c.g_dtype, s.p[1] + at[1]) + decay * *p;
        if (c.has_buf) {
            R b = first ? g : *buf * momentum + dampened * g;
            *buf = b;
            g = c.nesterov ? g + momentum * b : b;
        }
        *p += lr * g;
    }
}

/* x = p, g, buf (needed with momentum) [n], lr, step; f = lr, momentum, dampening, weight_decay; i = step (from 1),
 * nesterov. The first step fills buf with the gradient, undampened. */
extern "C" int lc_cuda_sgd_(const lc_kargs *k) {
    const lc_view *x = k->x;
    bool wide = x[0].dtype == LC_K_F64, has_buf = k->f[1] != 0;
    const lc_view *const v[3] = {&x[0], &x[1], has_buf ? &x[2] : &x[0]};
    if ((!wide && x[0].dtype != LC_K_F32) || !view_contiguous(&x[0]) || !usable(&x[1], &x[0], true))
        return LC_K_UNSUPPORTED;
    if (has_buf && (!x[2].data || !usable(&x[2], &x[0], false))) return LC_K_UNSUPPORTED;
    if (!view_numel(&x[0])) return LC_K_OK;
    sgd c = {
        scalar_or(&x[3], k->f[0]), scalar_or(&x[4], k->i[0]), k->f[1], k->f[2], k->f[3], k->i[1], has_buf, x[1].dtype};
    auto kernel = wide ? sgd_elements<double> : sgd_elements<float>;
    each_span(flat<3>(v),
              [&](const span<3> &s) { LC_LAUNCH(kernel, grid_for(s.total, LC_THREADS), LC_THREADS, 0, s, c); });
    return LC_K_OK;
}
