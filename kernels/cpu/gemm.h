/* gemm.h: matrix products inside the CPU back-end. One call, K(gemm_run), for everything; K(gemm) is the same in plain
 * BLAS style; K(gemv_run), which K(gemm_run) calls where it fits, is for up to GEMV_ROWS rows times a row-major weight.
 * Nothing allocates per call: each thread keeps one scratch buffer (lc_cpu_scratch), which a product on that thread
 * overwrites. */
#ifndef LC_GEMM_H
#define LC_GEMM_H

#include "convert.h"
#include "simd.h"

/* c [m, n] = alpha * a [m, k] b [k, n] + beta * add [m, n] + bias [n]. Element (i, k) of a is at a + i * a_rs + k *
 * a_cs, (k, j) of b at b + k * b_rs + j * b_cs; rows of c and add are contiguous. a may be of any float dtype if a_cs
 * is 1, b of any dtype if b_rs is 1 (a weight [n, k]); otherwise they are `real`. bias and add may be NULL, add may be
 * c. */
typedef struct gemm_call {
    int64_t m, n, k;
    const void *a, *b;
    int32_t a_dtype, b_dtype;
    int64_t a_rs, a_cs, b_rs, b_cs;
    real alpha, beta;
    const real *bias, *add;
    real *c;
    int64_t ld_add, ldc;
} gemm_call;

/* Parallel over the pool; host NULL: on the calling thread alone, so it may be used inside a parallel body. */
int K(gemm_run)(const lc_host *host, const gemm_call *g);

/* c = alpha * a b + beta * c on reals. */
int K(gemm)(const lc_host *host, int64_t m, int64_t n, int64_t k, real alpha, const real *a, int64_t a_rs, int64_t a_cs,
            const real *b, int64_t b_rs, int64_t b_cs, real beta, real *c, int64_t ldc);

/* The product of m <= GEMV_ROWS rows (a real, a_cs 1) with a weight (b_rs 1), read once, straight from where it lies.
 * Element (i, j) of the result and of add is i * c_rs + j * c_cs from its start, so that a product with few columns can
 * be run the other way round. */
enum { GEMV_ROWS = 8 };
void K(gemv_run)(const lc_host *host, const gemm_call *g, int64_t c_rs, int64_t c_cs, int64_t add_rs, int64_t add_cs);

/* The calling thread's scratch memory, at least `bytes`, 64-byte aligned, kept until the thread ends; NULL: no memory.
 */
void *lc_cpu_scratch(size_t bytes);
/* Bytes of packed panels to keep in the second-level cache. */
size_t lc_cpu_panel_bytes(void);
/* oneDNN's sgemm on the calling thread, row-major; not 0: not available or not done. */
int lc_onednn_sgemm(int trans_a, int trans_b, int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
                    const float *b, int64_t ldb, float beta, float *c, int64_t ldc);
/* Is oneDNN the provider in use? */
int lc_onednn_active(void);

/* Address of element `at` of a buffer of some dtype; block-quantised ones only at block starts. */
static inline const void *gemm_at(const void *p, int dtype, int64_t at) {
    const lc_dtype_trait *t = lc_dtype_traits(dtype);
    return (const char *)p + at / t->block * t->bytes;
}

#endif
