/* kernel_harness.h: calls CPU kernels through the back-end table, in every variant that this machine runs (generic in
 * f32 and f64, AVX2, AVX-512), without the core: a host that cuts work into parts, views, and calls. For the tests
 * beside it. */
#ifndef LC_KERNEL_HARNESS_H
#define LC_KERNEL_HARNESS_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define LC_ISA    generic
#define LC_DOUBLE 0
#include "../../kernels/cpu/convert.h"
#include "../../kernels/cpu/scalar_math.h"
#include "../../kernels/cpu/walk.h"

#include "../../kernels/philox.h"

/* ---- a host, views and calls ------------------------------------------------------------------------------------- */

static int host_parts = 3, host_plain = 0;

static void host_parallel(int64_t n, int64_t grain, void (*body)(void *, int64_t, int64_t, int), void *ctx) {
    int64_t parts = LC_MAX(1, LC_MIN(host_parts, n / LC_MAX(1, grain)));
    for (int64_t p = parts - 1; p >= 0; p--) body(ctx, n * p / parts, n * (p + 1) / parts, (int)p);
}
static int host_threads(void) { return host_parts; }
static int host_option(int which) { return which == LC_OPTION_PLAIN_POINTWISE && host_plain; }
static const lc_host host = {host_parallel, host_threads, host_option};

typedef struct variant {
    const char *isa;
    int is_double;
} variant;
static const variant variants[] = {{"generic", 1}, {"generic", 0}, {"avx2", 0}, {"avx512", 0}, {"avx512bf16", 0}};
#define EACH_VARIANT(v)                                                                                                \
    for (const variant *v = variants; v < variants + sizeof variants / sizeof *variants; v++)                          \
        if (lc_cpu_kernels(v->isa, v->is_double))

static int real_of(const variant *v) { return v->is_double ? LC_K_F64 : LC_K_F32; }

static lc_fault fault;
static double no_f[12];
static int32_t no_i[24];

static lc_kargs new_call(void) {
    lc_kargs k;
    memset(&k, 0, sizeof k);
    k.f = no_f;
    k.i = no_i;
    k.host = &host;
    k.fault = &fault;
    return k;
}

static int call(const variant *v, int op, lc_kargs *k) {
    const lc_kernel *kernel = &lc_cpu_kernels(v->isa, v->is_double)[op];
    assert_non_null(kernel->run);
    size_t bytes = kernel->work ? kernel->work(k) : 0;
    k->work = bytes ? malloc(bytes) : NULL;
    k->work_bytes = bytes;
    int status = kernel->run(k);
    free(k->work);
    return status;
}
#define CALL(v, op, k) assert_int_equal(call(v, LC_OP_##op, k), LC_K_OK)

static lc_view view(void *data, int dtype, int ndim, const int64_t *dim) {
    lc_view v = {.data = data, .dtype = dtype, .ndim = ndim};
    int64_t stride = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        v.dim[i] = dim[i];
        v.stride[i] = stride;
        stride *= dim[i];
    }
    return v;
}
#define DIMS(...)                                                                                                      \
    (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (const int64_t[]) { __VA_ARGS__ }

static lc_view view_new(int dtype, int ndim, const int64_t *dim) {
    lc_view v = view(NULL, dtype, ndim, dim);
    v.data = calloc((size_t)LC_MAX(1, view_numel(&v)), (size_t)lc_dtype_traits(dtype)->bytes);
    return v;
}

static char *place(const lc_view *v, int64_t e) { return (char *)v->data + view_offset(v, e) * view_bytes(v); }
static double get(const lc_view *v, int64_t e) {
    double d;
    row_to_f64(v->dtype, place(v, e), &d, 1);
    return d;
}
static void put(const lc_view *v, int64_t e, double d) { row_from_f64(v->dtype, &d, place(v, e), 1); }

static uint64_t noise_state = 1;
static double noise(void) { /* in [-1, 1) */
    noise_state = noise_state * 6364136223846793005u + 1442695040888963407u;
    return (double)(int64_t)noise_state * 0x1p-63;
}
static lc_view view_noise(int dtype, int ndim, const int64_t *dim) {
    lc_view v = view_new(dtype, ndim, dim);
    for (int64_t e = 0; e < view_numel(&v); e++) put(&v, e, dtype_is_int(dtype) ? floor(50 + 50 * noise()) : noise());
    return v;
}
static lc_view swap(lc_view v, int a, int b) {
    int64_t d = v.dim[a], s = v.stride[a];
    v.dim[a] = v.dim[b], v.stride[a] = v.stride[b];
    v.dim[b] = d, v.stride[b] = s;
    return v;
}
static void same(const lc_view *a, const lc_view *b, double tolerance) {
    assert_int_equal(view_numel(a), view_numel(b));
    for (int64_t e = 0; e < view_numel(a); e++) {
        double x = get(a, e), y = get(b, e);
        if (x != y && !(fabs(x - y) <= tolerance * (1 + fabs(y))) && !(x != x && y != y)) {
            print_error("element %lld: %.9g, expected %.9g\n", (long long)e, x, y);
            fail();
        }
    }
}

#endif
