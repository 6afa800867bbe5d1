/* fill.cu: what is written without reading much: fills, ranges, identities, triangles, and choices by a mask. Elements
 * are moved by size, whatever their dtype; values come as their bits. */
#include "convert.cuh"
#include "elementwise.cuh"

/* The bits of a value in a dtype. */
static uint64_t bits_of(int dtype, double value) {
    uint64_t bits = 0;
    write_as<double>(dtype, (char *)&bits, value);
    return bits;
}

template <class U> __device__ __forceinline__ U low_bits(uint64_t bits) { return (U)bits; }
template <> __device__ __forceinline__ uint4 low_bits<uint4>(uint64_t bits) {
    uint32_t a = (uint32_t)bits, b = (uint32_t)(bits >> 32);
    return make_uint4(a, b, a, b);
}

/* Runs the statement with U standing for an unsigned type of that size. */
#define LC_SIZES(bytes, ...)                                                                                           \
    switch (bytes) {                                                                                                   \
    case 1: {                                                                                                          \
        typedef uint8_t U;                                                                                             \
        __VA_ARGS__                                                                                                    \
    } break;                                                                                                           \
    case 2: {                                                                                                          \
        typedef uint16_t U;                                                                                            \
        __VA_ARGS__                                                                                                    \
    } break;                                                                                                           \
    case 4: {                                                                                                          \
        typedef uint32_t U;                                                                                            \
        __VA_ARGS__                                                                                                    \
    } break;                                                                                                           \
    default: {                                                                                                         \
        typedef uint64_t U;                                                                                            \
        __VA_ARGS__                                                                                                    \
    } break;                                                                                                           \
    }

/* ---- fill_, arange_ ---------------------------------------------------------------------------------------------- */
template <class U> LC_KERNEL fill_items(LC_SPAN(1) s, uint64_t bits) {
    LC_EACH(i, s.total) {
        int32_t at[1];
        s.at(i, at);
        *(U *)(s.p[0] + at[0]) = low_bits<U>(bits);
    }
}

extern "C" int lc_cuda_fill_(const lc_kargs *k) {
    const lc_view *const v[1] = {&k->x[0]};
    if (lc_dtype_is_quant(v[0]->dtype)) return LC_K_UNSUPPORTED;
    if (!view_numel(v[0])) return LC_K_OK;
    operands<1> a = make_operands<1>(v);
    uint64_t bits = bits_of(v[0]->dtype, k->f[0]), wide = bits;
    for (int64_t n = a.bytes[0]; n < 8; n *= 2) wide |= wide << 8 * n;
    auto elements = [&](const span<1> &s) {
        LC_SIZES(a.bytes[0], {
            auto kernel = fill_items<U>;
            LC_LAUNCH(kernel, grid_for(s.total, LC_THREADS), LC_THREADS, 0, s, bits);
        })
    };
    auto vectors = [&](const span<1> &s) {
        LC_LAUNCH(fill_items<uint4>, grid_for(s.total, LC_THREADS), LC_THREADS, 0, s, wide);
    };
    each_vector(a, k->host->option(LC_OPTION_PLAIN_POINTWISE) ? 1 : (int)(16 / a.bytes[0]), 0, vectors, elements);
    return LC_K_OK;
}

LC_KERNEL arange_elements(LC_SPAN(1) s, int dtype, double start, double by) {
    LC_EACH(i, s.total) {
        int32_t at[1];
        s.at(i, at);
        write_as<double>(dtype, s.p[0] + at[0], start + (double)(s.first + i) * by);
    }
}

extern "C" int lc_cuda_arange_(const lc_kargs *k) {
    const lc_view *const v[1] = {&k->x[0]};
    int dtype = v[0]->dtype;
    double start = k->f[0], by = k->f[1];
    if (lc_dtype_is_quant(dtype)) return LC_K_UNSUPPORTED;
    if (!view_numel(v[0])) return LC_K_OK;
    each_span(make_operands<1>(v), [&](const span<1> &s) {
        LC_LAUNCH(arange_elements, grid_for(s.total, LC_THREADS), LC_THREADS, 0, s, dtype, start, by);
    });
    return LC_K_OK;
}

/* ---- eye_, tril -------------------------------------------------------------------------------------------------- */
/* Matrices [.., rows, columns]; elements of s stand in row-major order. */
struct matrix {
    int64_t rows, columns;
    __device__ __forceinline__ int64_t row(int64_t e) const { return e / columns % rows; }
    __device__ __forceinline__ int64_t column(int64_t e) const { return e % columns; }
};
static matrix matrix_of(const lc_view *v) { return {v->dim[v->ndim - 2], v->dim[v->ndim - 1]}; }

template <class U> LC_KERNEL eye_elements(LC_SPAN(1) s, matrix m, uint64_t one) {
    LC_EACH(i, s.total) {
        int32_t at[1];
        int64_t e = s.first + i;
        s.at(i, at);
        *(U *)(s.p[0] + at[0]) = m.row(e) == m.column(e) ? (U)one : 0;
    }
}

/* x [.., rows, columns] */
extern "C" int lc_cuda_eye_(const lc_kargs *k) {
    const lc_view *const v[1] = {&k->x[0]};
    if (lc_dtype_is_quant(v[0]->dtype) || v[0]->ndim < 2) return LC_K_UNSUPPORTED;
    if (!view_numel(v[0])) return LC_K_OK;
    operands<1> a = make_operands<1>(v);
    uint64_t one = bits_of(v[0]->dtype, 1);
    matrix m = matrix_of(v[0]);
    each_span(a, [&](const span<1> &s) {
        LC_SIZES(a.bytes[0], {
            auto kernel = eye_elements<U>;
            LC_LAUNCH(kernel, grid_for(s.total, LC_THREADS), LC_THREADS, 0, s, m, one);
        })
    });
    return LC_K_OK;
}

template <class U> LC_KERNEL tril_elements(LC_SPAN(2) s, matrix m, int64_t diagonal) {
    LC_EACH(i, s.total) {
        int32_t at[2];
        int64_t e = s.first + i;
        s.at(i, at);
        bool keep = m.column(e) <= m.row(e) + diagonal;
        *(U *)(s.p[0] + at[0]) = keep ? *(const U *)(s.p[1] + at[1]) : 0;
    }
}

/* x [.., rows, columns] -> y: 0 where column > row + i[0] */
extern "C" int lc_cuda_tril(const lc_kargs *k) {
    const lc_view *const v[2] = {&k->y[0], &k->x[0]};
    if (lc_dtype_is_quant(v[1]->dtype) || v[0]->dtype != v[1]->dtype || v[0]->ndim < 2) return LC_K_UNSUPPORTED;
    if (!view_numel(v[0])) return LC_K_OK;
    operands<2> a = make_operands<2>(v);
    matrix m = matrix_of(v[0]);
    int64_t diagonal = k->i[0];
    each_span(a, [&](const span<2> &s) {
        LC_SIZES(a.bytes[0], {
            auto kernel = tril_elements<U>;
            LC_LAUNCH(kernel, grid_for(s.total, LC_THREADS), LC_THREADS, 0, s, m, diagonal);
        })
    });
    return LC_K_OK;
}

/* ---- where, masked_fill ------------------------------------------------------------------------------------------ */
__device__ __forceinline__ bool is_set(int dtype, const char *p) {
    switch (dtype) {
    case LC_K_F32: return *(const float *)p != 0;
    case LC_K_F64: return *(const double *)p != 0;
    case LC_K_BF16:
    case LC_K_F16: return (*(const uint16_t *)p & 0x7fff) != 0;
    case LC_K_I32: return *(const int32_t *)p != 0;
    case LC_K_I64: return *(const int64_t *)p != 0;
    default: return *(const uint8_t *)p != 0;
    }
}

/* y, mask, a, b; with `constant`, a is the value of these bits */
template <class U> LC_KERNEL choose_elements(LC_SPAN(4) s, int mask_dtype, bool constant, uint64_t bits) {
    LC_EACH(i, s.total) {
        int32_t at[4];
        s.at(i, at);
        bool set = is_set(mask_dtype, s.p[1] + at[1]);
        U v = (U)bits;
        if (!(set && constant)) v = *(const U *)(set ? s.p[2] + at[2] : s.p[3] + at[3]);
        *(U *)(s.p[0] + at[0]) = v;
    }
}

static int choose(const lc_kargs *k, const lc_view *mask, const lc_view *a, const lc_view *b, bool constant,
                  uint64_t bits) {
    const lc_view *const v[4] = {&k->y[0], mask, a, b};
    int mask_dtype = mask->dtype;
    if (a->dtype != b->dtype || a->dtype != v[0]->dtype) return LC_K_UNSUPPORTED;
    if (lc_dtype_is_quant(a->dtype) || lc_dtype_is_quant(mask->dtype)) return LC_K_UNSUPPORTED;
    if (!view_numel(v[0])) return LC_K_OK;
    operands<4> all = make_operands<4>(v);
    each_span(all, [&](const span<4> &s) {
        LC_SIZES(all.bytes[0], {
            auto kernel = choose_elements<U>;
            LC_LAUNCH(kernel, grid_for(s.total, LC_THREADS), LC_THREADS, 0, s, mask_dtype, constant, bits);
        })
    });
    return LC_K_OK;
}

/* x[0] = cond, x[1] = a, x[2] = b, all expanded to y's shape -> y = a where cond is not 0, else b */
extern "C" int lc_cuda_where(const lc_kargs *k) { return choose(k, &k->x[0], &k->x[1], &k->x[2], false, 0); }

/* x[0] = x, x[1] = mask expanded to x's shape -> y = f[0] where mask is not 0, else x */
extern "C" int lc_cuda_masked_fill(const lc_kargs *k) {
    const lc_view *x = &k->x[0];
    if (lc_dtype_is_quant(x->dtype)) return LC_K_UNSUPPORTED;
    return choose(k, &k->x[1], x, x, true, bits_of(x->dtype, k->f[0]));
}
