/* accumulate.cu: sums and products in place. x and what is added may have different dtypes: both are read in float, or
 * in double where one of them is f64, and x is rounded once. */
#include "convert.cuh"
#include "elementwise.cuh"

/* ---- add_ -------------------------------------------------------------------------------------------------------- */
/* x (operand 0) += scale * from (operand 1), four at a time; from may be one value for all four */
template <class X, class S> LC_KERNEL add_vectors(LC_SPAN(2) s, float scale) {
    LC_EACH(i, s.total) {
        int32_t at[2];
        float x[4], from[4];
        s.at(i, at);
        char *place = s.p[0] + at[0];
        const char *source = s.p[1] + at[1];
        typename vector_of<X, 4>::raw old = vector_of<X, 4>::get(place);
        if (s.splat & 2) {
            from[0] = from[1] = from[2] = from[3] = load<float>(*(const S *)source);
        } else {
            vector_of<S, 4>::open(vector_of<S, 4>::get(source), from);
        }
        vector_of<X, 4>::open(old, x);
#pragma unroll
        for (int e = 0; e < 4; e++) x[e] += scale * from[e];
        vector_of<X, 4>::put(place, x);
    }
}

template <class R> LC_KERNEL add_elements(LC_SPAN(2) s, int to, int from, double scale) {
    LC_EACH(i, s.total) {
        int32_t at[2];
        s.at(i, at);
        char *place = s.p[0] + at[0];
        R x = read_as<R>(to, place), more = read_as<R>(from, s.p[1] + at[1]);
        x += (R)scale * more;
        write_as<R>(to, place, x);
    }
}

/* x[0] += f[0] * x[1] */
extern "C" int lc_cuda_add_(const lc_kargs *k) {
    typedef void (*add_fn)(span<2>, float);
    static const add_fn kernels[3][3] = {
        {add_vectors<float, float>, add_vectors<float, bf16>, add_vectors<float, f16>},
        {add_vectors<bf16, float>, add_vectors<bf16, bf16>, add_vectors<bf16, f16>},
        {add_vectors<f16, float>, add_vectors<f16, bf16>, add_vectors<f16, f16>},
    };
    const lc_view *const v[2] = {&k->x[0], &k->x[1]};
    int to = v[0]->dtype, from = v[1]->dtype;
    double scale = k->f[0];
    if (!lc_dtype_is_float(to) || lc_dtype_is_quant(from)) return LC_K_UNSUPPORTED;
    if (!view_numel(v[0])) return LC_K_OK;
    add_fn fast =
        to <= LC_K_F16 && from <= LC_K_F16 && !k->host->option(LC_OPTION_PLAIN_POINTWISE) ? kernels[to][from] : NULL;
    auto any = to == LC_K_F64 || from == LC_K_F64 ? add_elements<double> : add_elements<float>;
    each_vector(
        make_operands<2>(v), fast ? 4 : 1, 2,
        [&](const span<2> &s) { LC_LAUNCH(fast, grid_for(s.total, LC_THREADS), LC_THREADS, 0, s, (float)scale); },
        [&](const span<2> &s) { LC_LAUNCH(any, grid_for(s.total, LC_THREADS), LC_THREADS, 0, s, to, from, scale); });
    return LC_K_OK;
}

/* ---- add_pairs_ -------------------------------------------------------------------------------------------------- */
struct add_list {
    void *x[3];
    const void *from[3];
    int64_t n[3]; /* packs */
};
/* V elements at once */
template <class T, int V> static __global__ void add_lists(const add_list l, int64_t total) {
    struct alignas(sizeof(T) * V) pack {
        T v[V];
    };
    for (int64_t e = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; e < total; e += (int64_t)gridDim.x * blockDim.x) {
        int64_t at = e;
        int i = 0;
        if (at >= l.n[0]) at -= l.n[0], i = 1;
        if (i && at >= l.n[1]) at -= l.n[1], i = 2;
        pack *to = (pack *)(i == 0 ? l.x[0] : i == 1 ? l.x[1] : l.x[2]) + at;
        pack x = *to, from = ((const pack *)(i == 0 ? l.from[0] : i == 1 ? l.from[1] : l.from[2]))[at];
#pragma unroll
        for (int c = 0; c < V; c++) x.v[c] += from.v[c];
        *to = x;
    }
}

template <class T, int V> static int run_lists(add_list l) {
    int64_t total = 0;
    for (int i = 0; i < 3; i++) total += l.n[i] /= V;
    if (total) LC_LAUNCH((add_lists<T, V>), grid_for(total, LC_THREADS), LC_THREADS, 0, l, total);
    return LC_K_OK;
}

/* x_i += from_i, all contiguous and of one dtype */
extern "C" int lc_cuda_add_pairs_(const lc_kargs *k) {
    add_list l = {};
    uintptr_t ends = 0;
    for (int i = 0; i < 3; i++) {
        if (!k->x[2 * i].data) continue;
        l.x[i] = k->x[2 * i].data, l.from[i] = k->x[2 * i + 1].data;
        l.n[i] = view_numel(&k->x[2 * i]);
        ends |= (uintptr_t)l.x[i] | (uintptr_t)l.from[i] | (uintptr_t)(l.n[i] * 4);
    }
    if (k->x[0].dtype == LC_K_F64) return run_lists<double, 1>(l);
    return ends & 15 ? run_lists<float, 1>(l) : run_lists<float, 4>(l);
}

/* ---- scale_ ------------------------------------------------------------------------------------------------------ */
template <class T> LC_KERNEL scale_vectors(LC_SPAN(1) s, scalar_at by) {
    enum { V = 16 / sizeof(T) };
    float scale = (float)by.get();
    LC_EACH(i, s.total) {
        int32_t at[1];
        float x[V];
        s.at(i, at);
        vector_of<T, V>::open(vector_of<T, V>::get(s.p[0] + at[0]), x);
#pragma unroll
        for (int e = 0; e < V; e++) x[e] *= scale;
        vector_of<T, V>::put(s.p[0] + at[0], x);
    }
}

template <class R> LC_KERNEL scale_elements(LC_SPAN(1) s, int dtype, scalar_at by) {
    R scale = (R)by.get();
    LC_EACH(i, s.total) {
        int32_t at[1];
        s.at(i, at);
        write_as<R>(dtype, s.p[0] + at[0], read_as<R>(dtype, s.p[0] + at[0]) * scale);
    }
}

/* x[0] *= f[0], or the scalar x[1] */
extern "C" int lc_cuda_scale_(const lc_kargs *k) {
    const lc_view *const v[1] = {&k->x[0]};
    int dtype = v[0]->dtype;
    if (!lc_dtype_is_float(dtype)) return LC_K_UNSUPPORTED;
    if (!view_numel(v[0])) return LC_K_OK;
    scalar_at by = scalar_or(&k->x[1], k->f[0]);
    int width = dtype == LC_K_F64 || k->host->option(LC_OPTION_PLAIN_POINTWISE) ? 1 : dtype == LC_K_F32 ? 4 : 8;
    auto fast = dtype == LC_K_F32    ? scale_vectors<float>
                : dtype == LC_K_BF16 ? scale_vectors<bf16>
                                     : scale_vectors<f16>;
    auto any = dtype == LC_K_F64 ? scale_elements<double> : scale_elements<float>;
    each_vector(
        make_operands<1>(v), width, 0,
        [&](const span<1> &s) { LC_LAUNCH(fast, grid_for(s.total, LC_THREADS), LC_THREADS, 0, s, by); },
        [&](const span<1> &s) { LC_LAUNCH(any, grid_for(s.total, LC_THREADS), LC_THREADS, 0, s, dtype, by); });
    return LC_K_OK;
}
