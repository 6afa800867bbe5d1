/* swiglu.cu: both gradients of swiglu in one pass, which reads the three operands once: bound by memory. x[0] = g, x[1] = gate, x[2] = up,
 * of one shape and dtype -> y[0], y[1]. The formulas are kernels/scalar.h. */
#include "pointwise.cuh"

template <class T> LC_KERNEL swiglu_vectors(LC_SPAN(5) s) {
    enum { V = 16 / sizeof(T) };
    LC_EACH(i, s.total) {
        int32_t at[5];
        typename vector_of<T, V>::raw raw[3];
        float g[V], a[V], b[V], ga[V], gb[V];
        s.at(i, at);
#pragma unroll
        for (int o = 0; o < 3; o++) raw[o] = vector_of<T, V>::get(s.p[o + 2] + at[o + 2]);
        vector_of<T, V>::open(raw[0], g);
        vector_of<T, V>::open(raw[1], a);
        vector_of<T, V>::open(raw[2], b);
#pragma unroll
        for (int e = 0; e < V; e++) {
            ga[e] = single::LC_S(swiglu_grad_a)(g[e], a[e], b[e], 0.f);
            gb[e] = single::LC_S(swiglu_grad_b)(g[e], a[e], b[e], 0.f);
        }
        vector_of<T, V>::put(s.p[0] + at[0], ga);
        vector_of<T, V>::put(s.p[1] + at[1], gb);
    }
}

template <class T> LC_KERNEL swiglu_elements(LC_SPAN(5) s) {
    LC_EACH(i, s.total) {
        int32_t at[5];
        s.at(i, at);
        float g = load<float>(*(const T *)(s.p[2] + at[2])), a = load<float>(*(const T *)(s.p[3] + at[3]));
        float b = load<float>(*(const T *)(s.p[4] + at[4]));
        *(T *)(s.p[0] + at[0]) = store<T>(single::LC_S(swiglu_grad_a)(g, a, b, 0.f));
        *(T *)(s.p[1] + at[1]) = store<T>(single::LC_S(swiglu_grad_b)(g, a, b, 0.f));
    }
}
LC_KERNEL swiglu_doubles(LC_SPAN(5) s) {
    LC_EACH(i, s.total) {
        int32_t at[5];
        s.at(i, at);
        double g = *(const double *)(s.p[2] + at[2]), a = *(const double *)(s.p[3] + at[3]), b = *(const double *)(s.p[4] + at[4]);
        *(double *)(s.p[0] + at[0]) = dual::LC_S(swiglu_grad_a)(g, a, b, 0.);
        *(double *)(s.p[1] + at[1]) = dual::LC_S(swiglu_grad_b)(g, a, b, 0.);
    }
}

template <class T> static void run(const lc_kargs *k, const operands<5> &all) {
    int width = k->host->option(LC_OPTION_PLAIN_POINTWISE) ? 1 : 16 / (int)sizeof(T);
    each_vector(
        all, width, 0,
        [&](const span<5> &s) { LC_LAUNCH(swiglu_vectors<T>, grid_for(s.total, LC_THREADS), LC_THREADS, 0, s); },
        [&](const span<5> &s) { LC_LAUNCH(swiglu_elements<T>, grid_for(s.total, LC_THREADS), LC_THREADS, 0, s); });
}

extern "C" int lc_cuda_swiglu_backward(const lc_kargs *k) {
    const lc_view *const v[5] = {&k->y[0], &k->y[1], &k->x[0], &k->x[1], &k->x[2]};
    int dtype = v[0]->dtype;
    for (int o = 1; o < 5; o++)
        if (v[o]->dtype != dtype) return LC_K_UNSUPPORTED;
    if (!view_numel(v[0])) return LC_K_OK;
    operands<5> all = make_operands<5>(v);
    switch (dtype) {
    case LC_K_F32: run<float>(k, all); return LC_K_OK;
    case LC_K_BF16: run<bf16>(k, all); return LC_K_OK;
    case LC_K_F16: run<f16>(k, all); return LC_K_OK;
    case LC_K_F64:
        each_span(all, [&](const span<5> &s) { LC_LAUNCH(swiglu_doubles, grid_for(s.total, LC_THREADS), LC_THREADS, 0, s); });
        return LC_K_OK;
    default: return LC_K_UNSUPPORTED;
    }
}
