/* pointwise.cuh: the kernels and launches behind the UNARY, UNARY_FLAT and BINARY rows. A row is a type with n operands
 * and at(x, p) in float and in double; it is instantiated as three vector kernels (f32, bf16, f16) and two that go
 * element by element (all three in float; f64). Operands that a row does not look at cost nothing: their loads are dead
 * code. */
#ifndef LC_POINTWISE_CUH
#define LC_POINTWISE_CUH

#include "chain.cuh"
#include "elementwise.cuh"
#include "scalar_math.cuh"

/* The row's real parameters. */
struct scalars {
    float f[LC_SCALAR_PARAMS];
    double d[LC_SCALAR_PARAMS];
};

/* Vectors of 16 bytes. */
template <class F, class T> LC_KERNEL pointwise_vectors(LC_SPAN(F::n + 1) s, scalars c) {
    enum { V = 16 / sizeof(T) };
    next_may_start();
    wait_for_previous();
    LC_EACH(i, s.total) {
        int32_t at[F::n + 1];
        typename vector_of<T, V>::raw raw[F::n];
        float x[F::n][V], y[V];
        s.at(i, at);
#pragma unroll
        for (int o = 0; o < F::n; o++)
            if (!(s.splat >> (o + 1) & 1)) raw[o] = vector_of<T, V>::get(s.p[o + 1] + at[o + 1]);
#pragma unroll
        for (int o = 0; o < F::n; o++) {
            if (s.splat >> (o + 1) & 1) {
                float v = load<float>(*(const T *)(s.p[o + 1] + at[o + 1]));
#pragma unroll
                for (int e = 0; e < V; e++) x[o][e] = v;
            } else {
                vector_of<T, V>::open(raw[o], x[o]);
            }
        }
#pragma unroll
        for (int e = 0; e < V; e++) {
            float in[F::n];
#pragma unroll
            for (int o = 0; o < F::n; o++) in[o] = x[o][e];
            y[e] = F::at(in, c.f);
        }
        vector_of<T, V>::put(s.p[0] + at[0], y);
    }
}

/* Element by element, in float: of two bytes (bf16 or f16) or four. */
__device__ __forceinline__ float word_as_float(uint32_t w, int dtype) {
    float f;
    if (dtype == LC_K_F16) {
        uint16_t u = (uint16_t)w;
        f16 h;
        memcpy(&h, &u, 2);
        return __half2float(h);
    }
    if (dtype == LC_K_BF16) w <<= 16;
    memcpy(&f, &w, 4);
    return f;
}
template <class F> LC_KERNEL pointwise_elements(LC_SPAN(F::n + 1) s, scalars c, int dtype) {
    LC_EACH(i, s.total) {
        int32_t at[F::n + 1];
        uint32_t w[F::n];
        float x[F::n];
        s.at(i, at);
#pragma unroll
        for (int o = 0; o < F::n; o++) {
            const char *p = s.p[o + 1] + at[o + 1];
            w[o] = dtype == LC_K_F32 ? *(const uint32_t *)p : *(const uint16_t *)p;
        }
#pragma unroll
        for (int o = 0; o < F::n; o++) x[o] = word_as_float(w[o], dtype);
        float y = F::at(x, c.f);
        char *to = s.p[0] + at[0];
        if (dtype == LC_K_F32)
            *(float *)to = y;
        else if (dtype == LC_K_BF16)
            *(bf16 *)to = store<bf16>(y);
        else
            *(f16 *)to = store<f16>(y);
    }
}
template <class F> LC_KERNEL pointwise_doubles(LC_SPAN(F::n + 1) s, scalars c, int) {
    LC_EACH(i, s.total) {
        int32_t at[F::n + 1];
        double x[F::n];
        s.at(i, at);
#pragma unroll
        for (int o = 0; o < F::n; o++) x[o] = *(const double *)(s.p[o + 1] + at[o + 1]);
        *(double *)(s.p[0] + at[0]) = F::at(x, c.d);
    }
}

template <int N> struct pointwise_kernels {
    void (*f32)(span<N + 1>, scalars), (*bf16)(span<N + 1>, scalars), (*f16)(span<N + 1>, scalars);
    void (*elements)(span<N + 1>, scalars, int), (*doubles)(span<N + 1>, scalars, int);
};

template <int N> static int run_pointwise(const lc_kargs *k, const pointwise_kernels<N> &kernels) {
    const lc_view *v[N + 1] = {&k->y[0]};
    int dtype = k->x[0].dtype;
    if (!lc_dtype_is_float(dtype) || k->y[0].dtype != dtype) return LC_K_UNSUPPORTED;
    for (int o = 0; o < N; o++) { /* one that the row does not look at may be absent */
        v[o + 1] = k->x[o].data ? &k->x[o] : &k->x[0];
        if (v[o + 1]->dtype != dtype) return LC_K_UNSUPPORTED;
    }
    if (!view_numel(v[0])) return LC_K_OK;
    scalars c;
    for (int i = 0; i < LC_SCALAR_PARAMS; i++) {
        c.d[i] = k->f ? k->f[i] : 0;
        c.f[i] = (float)c.d[i];
    }
    int width = dtype == LC_K_F64 || k->host->option(LC_OPTION_PLAIN_POINTWISE) ? 1 : dtype == LC_K_F32 ? 4 : 8;
    auto vector_kernel = dtype == LC_K_F32 ? kernels.f32 : dtype == LC_K_BF16 ? kernels.bf16 : kernels.f16;
    auto element_kernel = dtype == LC_K_F64 ? kernels.doubles : kernels.elements;
    each_vector(
        make_operands<N + 1>(v), width, ~1u,
        [&](const span<N + 1> &s) {
            LC_LAUNCH_AFTER(true, vector_kernel, grid_for(s.total, LC_THREADS), LC_THREADS, 0, s, c);
            chain_writes(v[0]);
        },
        [&](const span<N + 1> &s) {
            LC_LAUNCH(element_kernel, grid_for(s.total, LC_THREADS), LC_THREADS, 0, s, c, dtype);
        });
    return LC_K_OK;
}

/* A row's type and its entry in the table: an expression over x[0], x[1], .. and p. */
#define POINTWISE(name, count, ...)                                                                                    \
    struct name##_row {                                                                                                \
        enum { n = count };                                                                                            \
        static __device__ __forceinline__ float at(const float (&x)[n], const float *p) {                              \
            using namespace single;                                                                                    \
            (void)p;                                                                                                   \
            return __VA_ARGS__;                                                                                        \
        }                                                                                                              \
        static __device__ __forceinline__ double at(const double (&x)[n], const double *p) {                           \
            using namespace dual;                                                                                      \
            (void)p;                                                                                                   \
            return __VA_ARGS__;                                                                                        \
        }                                                                                                              \
    };                                                                                                                 \
    extern "C" int lc_cuda_##name(const lc_kargs *k) {                                                                 \
        static const pointwise_kernels<count> kernels = {                                                              \
            pointwise_vectors<name##_row, float>, pointwise_vectors<name##_row, bf16>,                                 \
            pointwise_vectors<name##_row, f16>, pointwise_elements<name##_row>, pointwise_doubles<name##_row>};        \
        return run_pointwise<count>(k, kernels);                                                                       \
    }

#endif
