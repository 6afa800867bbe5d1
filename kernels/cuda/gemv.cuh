/* gemv.cuh: few rows times a weight, read once, straight from where it lies. */
#ifndef LC_GEMV_CUH
#define LC_GEMV_CUH

#include "device.cuh"

/* y [rows, n] = alpha * x [rows, k] w[n, k]^T + bias [n] + add [rows, n]. x f32, bf16 or f16; w these or quantised; y and add of one
 * dtype; bias, add NULL: none. ld_w counts elements. */
typedef struct lc_cuda_gemv {
    const void *x, *w, *bias, *add;
    void *y;
    int32_t x_dtype, w_dtype, bias_dtype, y_dtype;
    int64_t rows, n, k, ldx, ld_w, ld_add, ldy;
    float alpha;
} lc_cuda_gemv;

enum { LC_GEMV_ROWS = 8 };

/* Returns LC_K_UNSUPPORTED, having done nothing, for what it does not take: more than LC_GEMV_ROWS rows, f64, rows that are no
 * multiple of 16 bytes. */
int lc_cuda_gemv_run(const lc_cuda_gemv *g);
/* gemv_one.cu: one row of halves, many rows of w; the others are LC_K_UNSUPPORTED. */
int lc_cuda_gemv_one(const lc_cuda_gemv *g);

#endif
