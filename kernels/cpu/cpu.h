/* cpu.h: what every CPU kernel file shares. Each file under kernels/cpu (but backend.c, gemm_onednn.c) is compiled once per
 * instruction set and element type: LC_ISA is generic, avx2, avx512 or avx512bf16, LC_DOUBLE 0 or 1 (double for generic only, for
 * checks). `real` is the element type, K(name) the kernel's symbol; table.c collects them, so a missing kernel fails the link.
 * A kernel whose work function is K(NAME_work) is given that much scratch memory. Dtypes: tensors arrive as `real` unless the row is
 * flagged HALF or MIXED; integers as int32 (ids, labels, positions) unless said otherwise. */
#ifndef LC_CPU_H
#define LC_CPU_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../kernel.h"

#if LC_DOUBLE
typedef double real;
#define LC_REAL_NAME f64
#define LC_K_REAL LC_K_F64
#else
typedef float real;
#define LC_REAL_NAME f32
#define LC_K_REAL LC_K_F32
#endif

#define LC_PASTE_(a, b, c, d) lc_##a##_##b##_##c##d
#define LC_PASTE(a, b, c, d) LC_PASTE_(a, b, c, d)
#define K(name) LC_PASTE(LC_ISA, LC_REAL_NAME, name, )

#define LC_MIN(a, b) ((a) < (b) ? (a) : (b))
#define LC_MAX(a, b) ((a) > (b) ? (a) : (b))

static inline int64_t view_numel(const lc_view *v) {
    int64_t n = 1;
    for (int i = 0; i < v->ndim; i++) n *= v->dim[i];
    return n;
}

/* Rows of a view whose last dim is contiguous: their number, and the address offset (elements) of row r in row-major order. */
static inline int64_t view_rows(const lc_view *v) {
    int64_t n = 1;
    for (int i = 0; i + 1 < v->ndim; i++) n *= v->dim[i];
    return n;
}
static inline int64_t view_row_offset(const lc_view *v, int64_t r) {
    int64_t at = 0;
    for (int i = v->ndim - 2; i >= 0; i--) {
        at += r % v->dim[i] * v->stride[i];
        r /= v->dim[i];
    }
    return at;
}

/* The value of a scalar that may have come as a 0-dim tensor (kinds F and N of the table). */
static inline double scalar_or(const lc_view *v, double otherwise) {
    if (!v->data) return otherwise;
    switch (v->dtype) {
    case LC_K_F64: return *(const double *)v->data;
    case LC_K_I32: return *(const int32_t *)v->data;
    case LC_K_I64: return (double)*(const int64_t *)v->data;
    default: return *(const float *)v->data;
    }
}

static inline float bf16_to_f32(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static inline uint16_t f32_to_bf16(float f) { /* nearest, ties to even; NaN stays NaN */
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

#endif
