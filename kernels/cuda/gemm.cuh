/* gemm.cuh: matrix products inside the CUDA back-end. One call, lc_cuda_product_run, takes operands of any strides: cuBLASLt where
 * it can, else a plain tiled kernel of our own (also with the option plain_linear, and always under the emulator). lc_cuda_gemm is
 * the same in plain BLAS style. Sums are f32 (f64 for f64), rounded once; f32 products use no TF32. */
#ifndef LC_GEMM_CUH
#define LC_GEMM_CUH

#include "device.cuh"

enum { LC_PRODUCT_BATCH = LC_VIEW_DIMS - 2 };

/* A matrix, or a batch of them: element (i, j) is i * rs + j * cs elements from the start, batch index z_i adds z_i * step[i]. */
typedef struct lc_cuda_operand {
    void *data;
    int32_t dtype;
    int64_t rs, cs, step[LC_PRODUCT_BATCH];
} lc_cuda_operand;

/* d [m, n] = alpha * a [m, k] b [k, n] + beta * c [m, n] + bias [n], for every index of the batch dims. c may be d, may be
 * broadcast (strides of 0) and may differ from d in dtype; c.data NULL: none; bias NULL: none. Float dtypes only; a and b of one
 * half dtype, and d of that dtype or f32, are fast, as are f32 and f64 throughout; other mixtures work, slowly. */
typedef struct lc_cuda_product {
    int64_t m, n, k;
    double alpha, beta;
    lc_cuda_operand a, b, c, d;
    const void *bias;
    int32_t bias_dtype;
    int32_t nb;
    int64_t dim[LC_PRODUCT_BATCH];
} lc_cuda_product;

#ifdef __cplusplus
extern "C" {
#endif

/* Returns an LC_K_ status. */
int lc_cuda_product_run(const lc_cuda_product *p);
/* Makes batch dims that are no more than rows into rows, the last first; lc_cuda_product_run does it by itself. */
void lc_cuda_product_fold(lc_cuda_product *p);

/* Row-major d [m, n] = alpha op(a) op(b) + beta c; op(a) is [m, k]: stored so with leading dimension lda, or [k, m] when ta. c has
 * d's dtype and may be d, or NULL. */
int lc_cuda_gemm(int ta, int tb, int64_t m, int64_t n, int64_t k, double alpha, const void *a, int a_dtype, int64_t lda, const void *b,
                 int b_dtype, int64_t ldb, double beta, const void *c, int64_t ldc, void *d, int d_dtype, int64_t ldd);
/* `batch` of them, a_step, b_step, c_step, d_step elements apart (0: the same one again; not for d). */
int lc_cuda_gemm_batched(int ta, int tb, int64_t m, int64_t n, int64_t k, double alpha, const void *a, int a_dtype, int64_t lda,
                         int64_t a_step, const void *b, int b_dtype, int64_t ldb, int64_t b_step, double beta, const void *c,
                         int64_t ldc, int64_t c_step, void *d, int d_dtype, int64_t ldd, int64_t d_step, int64_t batch);

/* to [rows, cols] = from [rows, cols], converted; float dtypes; row strides ld_to, ld_from (0: one row repeated). */
int lc_cuda_convert(void *to, int to_dtype, int64_t ld_to, const void *from, int from_dtype, int64_t ld_from, int64_t rows,
                    int64_t cols);

#ifdef __cplusplus
}
#endif

/* One element of a buffer whose float dtype is known at run time only. */
template <class R> __device__ __forceinline__ R load_any(const void *p, int dtype, int64_t at) {
    switch (dtype) {
    case LC_K_BF16: return load<R>(((const bf16 *)p)[at]);
    case LC_K_F16: return load<R>(((const f16 *)p)[at]);
    case LC_K_F64: return (R)((const double *)p)[at];
    default: return (R)((const float *)p)[at];
    }
}
template <class R> __device__ __forceinline__ void store_any(void *p, int dtype, int64_t at, R v) {
    switch (dtype) {
    case LC_K_BF16: ((bf16 *)p)[at] = store<bf16>(v); break;
    case LC_K_F16: ((f16 *)p)[at] = store<f16>(v); break;
    case LC_K_F64: ((double *)p)[at] = (double)v; break;
    default: ((float *)p)[at] = (float)v;
    }
}

static inline int64_t dtype_bytes(int dtype) { return lc_dtype_traits(dtype)->bytes; }

#endif
