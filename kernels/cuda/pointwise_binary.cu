/* pointwise_binary.cu: the BINARY rows of the op table and their gradients, and the COMPARE rows. NAME: x[0], x[1] ->
 * y[0]. NAME_grad_a, _grad_b: x[0] = g, x[1] = a, x[2] = b, x[3] = y -> y[0]. All of one shape, broadcast by strides of
 * 0, and one dtype; comparisons give uint8. The formulas are kernels/scalar.h. */
#include "pointwise.cuh"

/* One kernel a comparison: an operation that is never waited for. */
template <class F> LC_KERNEL compare_elements(LC_SPAN(3) s, int dtype) {
    LC_EACH(i, s.total) {
        int32_t at[3];
        s.at(i, at);
        const char *a = s.p[1] + at[1], *b = s.p[2] + at[2];
        int yes;
        switch (dtype) {
        case LC_K_F32: yes = F::at(*(const float *)a, *(const float *)b); break;
        case LC_K_BF16: yes = F::at(load<float>(*(const bf16 *)a), load<float>(*(const bf16 *)b)); break;
        case LC_K_F16: yes = F::at(load<float>(*(const f16 *)a), load<float>(*(const f16 *)b)); break;
        case LC_K_F64: yes = F::at(*(const double *)a, *(const double *)b); break;
        case LC_K_I32: yes = F::order(*(const int32_t *)a, *(const int32_t *)b); break;
        case LC_K_I64: yes = F::order(*(const int64_t *)a, *(const int64_t *)b); break;
        default: yes = F::order(*(const uint8_t *)a, *(const uint8_t *)b); break;
        }
        *(uint8_t *)(s.p[0] + at[0]) = (uint8_t)yes;
    }
}

static int run_compare(const lc_kargs *k, void (*kernel)(span<3>, int)) {
    const lc_view *const v[3] = {&k->y[0], &k->x[0], &k->x[1]};
    int dtype = v[1]->dtype;
    if (v[0]->dtype != LC_K_U8 || v[2]->dtype != dtype || lc_dtype_is_quant(dtype)) return LC_K_UNSUPPORTED;
    each_span(make_operands<3>(v),
              [&](const span<3> &s) { LC_LAUNCH(kernel, grid_for(s.total, LC_THREADS), LC_THREADS, 0, s, dtype); });
    return LC_K_OK;
}

#define COMPARE(name, sig, flags, doc)                                                                                 \
    struct name##_row {                                                                                                \
        static __device__ __forceinline__ int at(float a, float b) { return single::LC_S(name)(a, b); }                \
        static __device__ __forceinline__ int at(double a, double b) { return dual::LC_S(name)(a, b); }                \
        template <class T> static __device__ __forceinline__ int order(T a, T b) {                                     \
            return single::LC_S(name)((float)((a > b) - (a < b)), 0.f);                                                \
        }                                                                                                              \
    };                                                                                                                 \
    extern "C" int lc_cuda_##name(const lc_kargs *k) { return run_compare(k, compare_elements<name##_row>); }

#define BINARY(name, sig, flags, doc)                                                                                  \
    POINTWISE(name, 2, LC_S(name)(x[0], x[1]))                                                                         \
    POINTWISE(name##_grad_a, 4, LC_S(name##_grad_a)(x[0], x[1], x[2], x[3]))                                           \
    POINTWISE(name##_grad_b, 4, LC_S(name##_grad_b)(x[0], x[1], x[2], x[3]))
#include "../../runtime/ops.def"
