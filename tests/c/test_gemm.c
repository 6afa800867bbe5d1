/* test_gemm.c: matrix products, norms, rotations and losses of the CPU back-end, on every instruction set that this
 * machine has, against loops in double: odd shapes, strides, all weight dtypes, both GEMM providers, fast paths and
 * plain twins. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernel.h"

extern void lc_dequantise(int dtype, const void *blocks, float *out, int64_t n);

/* ---- a host whose pool is made for each call ------------------------------------------------------------------- */

enum { THREADS = 3 };
static int options[LC_OPTION_COUNT];

typedef struct part {
    void (*body)(void *ctx, int64_t begin, int64_t end, int thread);
    void *ctx;
    int64_t begin, end;
    int id;
} part;

static void *run_part(void *arg) {
    part *p = arg;
    p->body(p->ctx, p->begin, p->end, p->id);
    return NULL;
}

static void parallel(int64_t n, int64_t grain, void (*body)(void *, int64_t, int64_t, int), void *ctx) {
    pthread_t t[THREADS];
    part p[THREADS];
    if (n <= 0) return;
    int64_t parts = (n + grain - 1) / grain;
    parts = parts > THREADS ? THREADS : parts;
    for (int i = 0; i < parts; i++) {
        p[i] = (part){body, ctx, n * i / parts, n * (i + 1) / parts, i};
        if (i && pthread_create(&t[i], NULL, run_part, &p[i])) abort();
    }
    run_part(&p[0]);
    for (int i = 1; i < parts; i++) pthread_join(t[i], NULL);
}
static int threads(void) { return THREADS; }
static int option(int which) { return options[which]; }
static const lc_host host = {parallel, threads, option};

/* ---- operands -------------------------------------------------------------------------------------------------- */

static uint64_t seed = 1;
static double uniform(void) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (double)(seed >> 11) / 9007199254740992.0 - 0.5;
}

static void *held[256];
static int n_held;
static void *hold(size_t bytes) { /* exactly as large as asked for, so that the sanitizer sees a step too far */
    if (n_held == 256) abort();
    return held[n_held++] = calloc(bytes ? bytes : 1, 1);
}
static void drop_all(void) {
    while (n_held) free(held[--n_held]);
}

/* A contiguous view of n dims, unset. */
static lc_view view(int dtype, int ndim, const int64_t *dims) {
    lc_view v = {.dtype = dtype, .ndim = ndim};
    int64_t n = 1;
    for (int i = ndim - 1; i >= 0; i--) v.dim[i] = dims[i], v.stride[i] = n, n *= dims[i];
    const lc_dtype_trait *t = lc_dtype_traits(dtype);
    v.data = hold((size_t)(n / t->block * t->bytes));
    return v;
}
#define VIEW(dtype, ...)                                                                                               \
    view(dtype, (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (int64_t[]){__VA_ARGS__})
static lc_view swapped(lc_view v, int a, int b) {
    int64_t d = v.dim[a], s = v.stride[a];
    v.dim[a] = v.dim[b], v.stride[a] = v.stride[b], v.dim[b] = d, v.stride[b] = s;
    return v;
}
static lc_view narrowed(lc_view v, int dim, int64_t start, int64_t size) {
    v.data = (char *)v.data + start * v.stride[dim] * lc_dtype_traits(v.dtype)->bytes;
    v.dim[dim] = size;
    return v;
}

static uint16_t to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
static float from_bf16(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static uint16_t to_f16(double x) { /* exact enough for normal values */
    int e;
    double m = frexp(fabs(x), &e);
    uint16_t s = x < 0 ? 0x8000 : 0;
    if (x == 0 || e < -13) return s;
    return (uint16_t)(s | (((e + 14) << 10) + (int)(lrint(m * 2048) - 1024)));
}
static double from_f16(uint16_t h) {
    double m = h & 1023, e = h >> 10 & 31, v = e ? ldexp(1024 + m, (int)e - 25) : ldexp(m, -24);
    return h & 0x8000 ? -v : v;
}

static double get(const lc_view *v, int64_t at) {
    switch (v->dtype) {
    case LC_K_F32: return ((float *)v->data)[at];
    case LC_K_F64: return ((double *)v->data)[at];
    case LC_K_BF16: return from_bf16(((uint16_t *)v->data)[at]);
    case LC_K_F16: return from_f16(((uint16_t *)v->data)[at]);
    case LC_K_I32: return ((int32_t *)v->data)[at];
    default: return (double)((int64_t *)v->data)[at];
    }
}
static void set(const lc_view *v, int64_t at, double x) {
    switch (v->dtype) {
    case LC_K_F32: ((float *)v->data)[at] = (float)x; break;
    case LC_K_F64: ((double *)v->data)[at] = x; break;
    case LC_K_BF16: ((uint16_t *)v->data)[at] = to_bf16((float)x); break;
    case LC_K_F16: ((uint16_t *)v->data)[at] = to_f16(x); break;
    case LC_K_I32: ((int32_t *)v->data)[at] = (int32_t)x; break;
    default: ((int64_t *)v->data)[at] = (int64_t)x;
    }
}
static int64_t numel(const lc_view *v) {
    int64_t n = 1;
    for (int i = 0; i < v->ndim; i++) n *= v->dim[i];
    return n;
}
/* Address offset of the i-th element in row-major order. */
static int64_t offset(const lc_view *v, int64_t i) {
    int64_t at = 0;
    for (int d = v->ndim - 1; d >= 0; d--) at += i % v->dim[d] * v->stride[d], i /= v->dim[d];
    return at;
}
static double item(const lc_view *v, int64_t i) { return get(v, offset(v, i)); }
static lc_view filled(lc_view v) {
    for (int64_t i = 0; i < numel(&v); i++) set(&v, offset(&v, i), uniform());
    return v;
}

/* A weight [n, k] of any dtype, and its values as doubles. */
static lc_view weight(int dtype, int64_t n, int64_t k, lc_view *values) {
    lc_view w = VIEW(dtype, n, k);
    *values = VIEW(LC_K_F64, n, k);
    if (lc_dtype_is_float(dtype)) {
        filled(w);
        for (int64_t i = 0; i < n * k; i++) set(values, i, get(&w, i));
        return w;
    }
    const lc_dtype_trait *t = lc_dtype_traits(dtype);
    float *f = hold((size_t)(n * k) * sizeof(float));
    for (int64_t b = 0; b < n * k / t->block; b++) {
        uint8_t *p = (uint8_t *)w.data + b * t->bytes;
        for (int i = 0; i < t->bytes; i++) p[i] = (uint8_t)((uniform() + 0.5) * 255);
        uint16_t d = to_f16(0.001 + uniform() * 0.001); /* scales stand first or last, one or two */
        int at[4] = {0, 2, t->bytes - 2, t->bytes - 4};
        int two = dtype == LC_K_Q4_1 || dtype == LC_K_Q5_1 || dtype == LC_K_Q4_K || dtype == LC_K_Q5_K;
        int last = dtype == LC_K_Q6_K || dtype == LC_K_Q3_K || dtype == LC_K_Q2_K;
        memcpy(p + at[last ? 2 : 0], &d, 2);
        if (two) memcpy(p + at[1], &d, 2);
        if (dtype == LC_K_Q2_K) memcpy(p + at[3], &d, 2);
    }
    lc_dequantise(dtype, w.data, f, n * k);
    for (int64_t i = 0; i < n * k; i++) set(values, i, f[i]);
    return w;
}

/* ---- running --------------------------------------------------------------------------------------------------- */

typedef struct variant {
    const char *isa;
    int is_double;
} variant;
static const variant variants[] = {{"generic", 0}, {"avx2", 0}, {"avx512", 0}, {"avx512bf16", 0}, {"generic", 1}};
static const lc_kernel *kernels;
static int real_type;
static lc_fault fault;

static int next_variant(int *i) {
    for (; *i < 5; ++*i) {
        kernels = lc_cpu_kernels(variants[*i].isa, variants[*i].is_double);
        real_type = variants[*i].is_double ? LC_K_F64 : LC_K_F32;
        if (kernels) return ++*i;
    }
    return 0;
}
#define EACH_VARIANT for (int at_ = 0; next_variant(&at_);)

static int run(int op, lc_kargs *k) {
    static const double f0[8];
    static const int32_t i0[8];
    if (!k->f) k->f = f0;
    if (!k->i) k->i = i0;
    k->host = &host;
    k->fault = &fault;
    k->work_bytes = kernels[op].work ? kernels[op].work(k) : 0;
    if (k->work_bytes && posix_memalign(&k->work, 64, k->work_bytes)) abort();
    if (k->work) memset(k->work, 0xff, k->work_bytes); /* NaN */
    int status = kernels[op].run(k);
    free(k->work);
    k->work = NULL;
    return status;
}

static double tolerance(int dtype) {
    return dtype == LC_K_F64 ? 1e-12 : dtype == LC_K_BF16 ? 5e-3 : dtype == LC_K_F16 ? 1e-3 : 3e-6;
}

/* Largest difference over the largest value. */
static void expect_close(const char *what, const lc_view *got, const lc_view *want, double limit) {
    double worst = 0, top = 1e-30;
    for (int64_t i = 0; i < numel(want); i++) {
        double w = item(want, i), d = fabs(item(got, i) - w);
        top = fmax(top, fabs(w));
        if (!(d <= worst)) worst = d;
    }
    if (worst <= limit * top) return;
    print_error("%s: off by %g, largest value %g, in %s\n", what, worst, top,
                real_type == LC_K_F64 ? "double" : "float");
    fail();
}

/* ---- linear ---------------------------------------------------------------------------------------------------- */

/* extras: 1 bias, 2 add, 4 rows of x apart and permuted. */
static void check_linear(int x_type, int w_type, int64_t m, int64_t n, int64_t k, int extras) {
    lc_view values, x, w = weight(w_type, n, k, &values);
    int64_t half = m % 2 ? 1 : 2;
    if (extras & 4)
        x = narrowed(swapped(filled(VIEW(x_type, m / half, half, k + 32)), 0, 1), 2, 0, k);
    else
        x = filled(VIEW(x_type, half, m / half, k));
    lc_view y = VIEW(x_type, half, m / half, n), want = VIEW(LC_K_F64, half, m / half, n);
    lc_view b = filled(VIEW(extras & 8 ? LC_K_F16 : x_type, n)), add = filled(VIEW(x_type, half, m / half, n));
    if (extras & 8) add = swapped(filled(VIEW(x_type, m / half, half, n)), 0, 1);
    double alpha = 0.75, *px = hold((size_t)(m * k) * 8);
    const double *pw = values.data;
    for (int64_t i = 0; i < m * k; i++) px[i] = item(&x, i);
    lc_kargs q = {.x = {x, w}, .y = {y}, .f = &alpha};
    if (extras & 1) q.x[2] = b;
    if (extras & 2) q.x[3] = add;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            double s = 0;
            for (int64_t c = 0; c < k; c++) s += px[i * k + c] * pw[j * k + c];
            s = s * alpha + (extras & 1 ? get(&b, j) : 0) + (extras & 2 ? item(&add, i * n + j) : 0);
            set(&want, i * n + j, s);
        }
    char what[160];
    snprintf(what, sizeof what, "linear %s x %s, m %d n %d k %d, extras %d", lc_dtype_traits(x_type)->name,
             lc_dtype_traits(w_type)->name, (int)m, (int)n, (int)k, extras);
    for (int plain = 0; plain < 2; plain++) {
        options[LC_OPTION_PLAIN_LINEAR] = plain;
        memset(y.data, 0xff, (size_t)numel(&y) * (size_t)lc_dtype_traits(x_type)->bytes);
        assert_int_equal(run(LC_OP_linear, &q), LC_K_OK);
        expect_close(what, &y, &want, tolerance(x_type));
    }
    options[LC_OPTION_PLAIN_LINEAR] = 0;
    drop_all();
}

static void test_linear_shapes(void **state) {
    (void)state;
    static const int64_t shapes[][3] = {
        {1, 1, 1},   {1, 7, 33},   {2, 64, 64},  {3, 5, 40},   {4, 33, 96},   {5, 17, 31},   {7, 100, 64},
        {8, 31, 65}, {9, 33, 17},  {14, 32, 16}, {15, 65, 7},  {28, 64, 400}, {29, 95, 801}, {33, 1, 20},
        {40, 3, 64}, {50, 8, 129}, {51, 9, 33},  {64, 130, 8}, {100, 16, 3},  {17, 700, 40}, {130, 257, 66}};
    EACH_VARIANT for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) for (int extras = 0; extras < 16; extras++)
        check_linear(real_type, real_type, shapes[i][0], shapes[i][1], shapes[i][2], extras);
}

static void test_linear_dtypes(void **state) {
    (void)state;
    static const int64_t m[] = {1, 7, 9, 30};
    EACH_VARIANT {
        if (real_type == LC_K_F64) continue;
        for (int w = LC_K_F32; w < LC_K_COUNT; w++) {
            if (!lc_dtype_is_quant(w) && (!lc_dtype_is_float(w) || w == LC_K_F64)) continue;
            int64_t block = lc_dtype_traits(w)->block;
            for (int i = 0; i < 4; i++)
                for (int n = 5; n < 80; n += 42)
                    for (int x = LC_K_F32; x <= (n > 40 ? LC_K_F32 : LC_K_F16); x++)
                        check_linear(x, w, m[i], n, block > 1 ? (n > 40 ? 512 : 256) : 70 + n, i * 5);
        }
    }
}

static void test_linear_empty(void **state) {
    (void)state;
    EACH_VARIANT {
        double alpha = 1;
        for (int i = 0; i < 3; i++) {
            int64_t m = i == 0 ? 0 : 3, n = i == 1 ? 0 : 4, k = i == 2 ? 0 : 5;
            lc_kargs q = {.x = {VIEW(real_type, m, k), VIEW(real_type, n, k), {0}, filled(VIEW(real_type, m, n))},
                          .f = &alpha};
            q.y[0] = VIEW(real_type, m, n);
            assert_int_equal(run(LC_OP_linear, &q), LC_K_OK);
            expect_close("empty", &q.y[0], &q.x[3], 1e-6);
        }
        drop_all();
    }
}

/* ---- matmul ---------------------------------------------------------------------------------------------------- */

static lc_view operand(int64_t b0, int64_t b1, int64_t r, int64_t c, int form) {
    switch (form) {
    case 0: return filled(VIEW(real_type, b0, b1, r, c));
    case 1: return swapped(filled(VIEW(real_type, b0, b1, c, r)), 2, 3);
    case 2: return swapped(filled(VIEW(real_type, b0, r, b1, c)), 1, 2); /* heads inside rows */
    case 3: {                                                            /* no stride is 1 */
        lc_view v = filled(VIEW(real_type, b0, b1, r, 2 * c));
        v.dim[3] = c, v.stride[3] = 2;
        return v;
    }
    default: { /* shared by all batches */
        lc_view v = filled(VIEW(real_type, 1, 1, r, c));
        v.dim[0] = b0, v.dim[1] = b1, v.stride[0] = v.stride[1] = 0;
        return v;
    }
    }
}

static void check_matmul(const int64_t *s, int form_a, int form_b, int form_add, int form_y) {
    lc_view a = operand(s[0], s[1], s[2], s[4], form_a), b = operand(s[0], s[1], s[4], s[3], form_b);
    lc_view y = operand(s[0], s[1], s[2], s[3], form_y), want = VIEW(LC_K_F64, s[0], s[1], s[2], s[3]);
    double alpha = -1.5, *pa = hold((size_t)numel(&a) * 8), *pb = hold((size_t)numel(&b) * 8);
    for (int64_t i = 0; i < numel(&a); i++) pa[i] = item(&a, i);
    for (int64_t i = 0; i < numel(&b); i++) pb[i] = item(&b, i);
    lc_kargs q = {.x = {a, b}, .y = {y}, .f = &alpha};
    if (form_add >= 0) q.x[2] = operand(s[0], s[1], s[2], s[3], form_add);
    for (int64_t p = 0; p < s[0] * s[1]; p++)
        for (int64_t i = 0; i < s[2]; i++)
            for (int64_t j = 0; j < s[3]; j++) {
                double sum = 0;
                int64_t at = (p * s[2] + i) * s[3] + j;
                for (int64_t k = 0; k < s[4]; k++) sum += pa[(p * s[2] + i) * s[4] + k] * pb[(p * s[4] + k) * s[3] + j];
                set(&want, at, alpha * sum + (form_add >= 0 ? item(&q.x[2], at) : 0));
            }
    char what[160];
    snprintf(what, sizeof what, "matmul %dx%d of %d %d %d, forms %d %d %d %d", (int)s[0], (int)s[1], (int)s[2],
             (int)s[3], (int)s[4], form_a, form_b, form_add, form_y);
    for (int plain = 0; plain < 2; plain++) {
        options[LC_OPTION_PLAIN_LINEAR] = plain;
        assert_int_equal(run(LC_OP_matmul, &q), LC_K_OK);
        expect_close(what, &y, &want, tolerance(real_type));
    }
    options[LC_OPTION_PLAIN_LINEAR] = 0;
    drop_all();
}

static void all_matmuls(void) {
    static const int64_t shapes[][5] = {{1, 1, 1, 1, 1},    {1, 1, 40, 70, 33},   {2, 3, 17, 9, 20}, {3, 4, 1, 40, 16},
                                        {2, 2, 33, 1, 12},  {1, 2, 5, 64, 450},   {4, 2, 12, 33, 1}, {1, 1, 130, 8, 64},
                                        {1, 1, 8, 130, 64}, {1, 1, 61, 150, 390}, {5, 1, 3, 3, 3},   {1, 1, 0, 4, 4},
                                        {1, 1, 4, 4, 0}};
    EACH_VARIANT for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) for (int a = 0; a < 5;
                                                                                  a++) for (int b = 0; b < 5; b++)
        check_matmul(shapes[i], a, b, (a + 2 * b) % 6 - 1, (a + b) % 4);
}

static void test_matmul(void **state) {
    (void)state;
    all_matmuls();
}

static void test_onednn(void **state) {
    (void)state;
    const char *why = NULL;
    if (strcmp(lc_cpu_gemm_provider("onednn", &why), "onednn")) {
        print_message("oneDNN: %s\n", why);
        skip();
    }
    all_matmuls();
    test_linear_shapes(state);
    assert_string_equal(lc_cpu_gemm_provider("own", &why), "own");
}

/* ---- norms and rotation ---------------------------------------------------------------------------------------- */

static void check_norm(int64_t rows, int64_t n) {
    lc_view x = narrowed(filled(VIEW(real_type, rows, n + 3)), 1, 0, n), w = filled(VIEW(real_type, n)),
            g = filled(VIEW(real_type, rows, n));
    lc_view y = VIEW(real_type, rows, n), rstd = VIEW(real_type, rows), gx = VIEW(real_type, rows, n),
            gw = VIEW(real_type, n);
    lc_view want = VIEW(LC_K_F64, rows, n), want_gx = VIEW(LC_K_F64, rows, n), want_gw = VIEW(LC_K_F64, n);
    double eps = 1e-5;
    for (int64_t r = 0; r < rows; r++) {
        double ss = 0, pull = 0, s;
        for (int64_t i = 0; i < n; i++) ss += item(&x, r * n + i) * item(&x, r * n + i);
        s = 1 / sqrt(ss / (double)n + eps);
        for (int64_t i = 0; i < n; i++) pull += item(&g, r * n + i) * get(&w, i) * item(&x, r * n + i);
        for (int64_t i = 0; i < n; i++) {
            double xi = item(&x, r * n + i), gi = item(&g, r * n + i);
            set(&want, r * n + i, xi * s * get(&w, i));
            set(&want_gx, r * n + i, s * (gi * get(&w, i) - xi * s * s * pull / (double)n));
            set(&want_gw, i, get(&want_gw, i) + gi * xi * s);
        }
    }
    lc_kargs q = {.x = {x, w}, .y = {y, rstd}, .f = &eps};
    assert_int_equal(run(LC_OP_rms_norm, &q), LC_K_OK);
    expect_close("rms_norm", &y, &want, tolerance(real_type));
    lc_kargs b = {.x = {g, x, w, rstd}, .y = {gx, gw}};
    assert_int_equal(run(LC_OP_rms_norm_backward, &b), LC_K_OK);
    expect_close("rms_norm gradient for x", &gx, &want_gx, tolerance(real_type));
    expect_close("rms_norm gradient for w", &gw, &want_gw, tolerance(real_type));
    b.y[0].data = b.y[1].data = NULL;
    assert_int_equal(run(LC_OP_rms_norm_backward, &b), LC_K_OK);
    drop_all();
}

static void test_norm(void **state) {
    (void)state;
    EACH_VARIANT {
        check_norm(1, 5);
        check_norm(5, 7);
        check_norm(70, 64);
        check_norm(33, 577);
        check_norm(0, 8);
    }
}

static void check_rope(int64_t b, int64_t h, int64_t t, int64_t d, int batched, int wide) {
    lc_view pos = batched ? VIEW(wide ? LC_K_I64 : LC_K_I32, b, t) : VIEW(wide ? LC_K_I64 : LC_K_I32, t),
            freq = VIEW(real_type, d / 2);
    for (int64_t i = 0; i < numel(&pos); i++) set(&pos, i, floor(5000 * (uniform() + 0.5)));
    for (int64_t i = 0; i < d / 2; i++) set(&freq, i, pow(10000, -2.0 * (double)i / (double)d));
    lc_view c = batched ? VIEW(real_type, b, t, d / 2) : VIEW(real_type, t, d / 2),
            s = batched ? VIEW(real_type, b, t, d / 2) : VIEW(real_type, t, d / 2);
    lc_kargs q = {.x = {pos, freq}, .y = {c, s}};
    assert_int_equal(run(LC_OP_rope_table, &q), LC_K_OK);
    lc_view x = swapped(filled(VIEW(real_type, b, t, h, d)), 1, 2), y = swapped(VIEW(real_type, b, t, h, d), 1, 2),
            want = VIEW(LC_K_F64, b, h, t, d);
    for (int64_t i = 0; i < numel(&x); i++) {
        int64_t e = i % d, p = i / d % t, at = batched ? i / (d * t * h) * t + p : p;
        double angle = get(&pos, at) * get(&freq, e % (d / 2)), other = item(&x, e < d / 2 ? i + d / 2 : i - d / 2);
        set(&want, i, item(&x, i) * cos(angle) + (e < d / 2 ? -other : other) * sin(angle));
    }
    int32_t inverse = 0;
    lc_kargs r = {.x = {x, c, s}, .y = {y}, .i = &inverse};
    assert_int_equal(run(LC_OP_rope, &r), LC_K_OK);
    expect_close("rope", &y, &want, tolerance(real_type));
    inverse = 1;
    r.x[0] = y;
    r.y[0] = VIEW(real_type, b, h, t, d);
    assert_int_equal(run(LC_OP_rope, &r), LC_K_OK);
    expect_close("rope and back", &r.y[0], &x, tolerance(real_type));
    drop_all();
}

static void test_rope(void **state) {
    (void)state;
    EACH_VARIANT for (int i = 0; i < 4; i++) {
        check_rope(1, 1, 1, 2, i & 1, i >> 1);
        check_rope(2, 3, 5, 64, i & 1, i >> 1);
        check_rope(2, 9, 33, 22, i & 1, i >> 1);
    }
}

/* ---- losses ---------------------------------------------------------------------------------------------------- */

static void test_mse(void **state) {
    (void)state;
    static const int64_t shapes[][2] = {{1, 1}, {3, 5}, {100, 64}, {7, 20001}, {900, 33}};
    EACH_VARIANT for (int i = 0; i < 5; i++) {
        int64_t rows = shapes[i][0], n = shapes[i][1];
        lc_view a = narrowed(filled(VIEW(real_type, rows, n + 2)), 1, 0, n), b = filled(VIEW(real_type, rows, n)),
                g = VIEW(real_type, 1);
        lc_view y = VIEW(real_type, 1), want = VIEW(LC_K_F64, 1), ga = VIEW(real_type, rows, n),
                gb = VIEW(real_type, rows, n), want_g = VIEW(LC_K_F64, rows, n);
        double s = 0;
        y.ndim = g.ndim = 0;
        set(&g, 0, 3);
        for (int64_t j = 0; j < rows * n; j++) {
            double d = item(&a, j) - item(&b, j);
            s += d * d;
            set(&want_g, j, 6 * d / (double)(rows * n));
        }
        set(&want, 0, s / (double)(rows * n));
        lc_kargs q = {.x = {a, b}, .y = {y}};
        assert_int_equal(run(LC_OP_mse_loss, &q), LC_K_OK);
        expect_close("mse", &y, &want, tolerance(real_type));
        lc_kargs r = {.x = {g, a, b}, .y = {ga, gb}};
        assert_int_equal(run(LC_OP_mse_loss_backward, &r), LC_K_OK);
        expect_close("mse gradient", &ga, &want_g, tolerance(real_type));
        for (int64_t j = 0; j < rows * n; j++) assert_true(get(&ga, j) == -get(&gb, j));
        lc_kargs both = {.x = {a, b}, .y = {y, gb}, .f = (double[]){3}};
        assert_int_equal(run(LC_OP_mse_loss_slope, &both), LC_K_OK);
        for (int64_t j = 0; j < rows * n; j++) assert_true(get(&ga, j) == get(&gb, j));
        set(&want, 0, 3 * s / (double)(rows * n));
        expect_close("mse with its slope", &y, &want, tolerance(real_type));
        drop_all();
    }
}

/* Logits in doubles -> mean loss, losses, lse, argmax, d mean / d logits. */
static double naive_loss(const double *logits, int64_t n, int64_t v, const lc_view *labels, int64_t ignore,
                         double *losses, double *lses, int64_t *best, double *gradient) {
    double total = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) count += get(labels, i) != (double)ignore;
    for (int64_t i = 0; i < n; i++) {
        const double *x = logits + i * v;
        int64_t label = (int64_t)get(labels, i), top = 0;
        double sum = 0;
        losses[i] = lses[i] = 0, best[i] = 0;
        for (int64_t j = 0; j < v; j++) gradient[i * v + j] = 0;
        if (label == ignore) continue;
        for (int64_t j = 1; j < v; j++) top = x[j] > x[top] ? j : top;
        for (int64_t j = 0; j < v; j++) sum += exp(x[j] - x[top]);
        best[i] = top, lses[i] = x[top] + log(sum), losses[i] = lses[i] - x[label];
        total += losses[i];
        for (int64_t j = 0; j < v; j++) gradient[i * v + j] = (exp(x[j] - lses[i]) - (j == label)) / (double)count;
    }
    return count ? total / (double)count : 0;
}

/* ignored: 0 none, 1 some, 2 all */
static lc_view make_labels(int dtype, int64_t n, int64_t v, int ignored, int ignore) {
    lc_view l = VIEW(dtype, n);
    for (int64_t i = 0; i < n; i++)
        set(&l, i, ignored == 2 || (ignored && i % 3 == 1) ? ignore : floor((uniform() + 0.5) * (double)v));
    return l;
}

static void check_cross_entropy(int64_t n, int64_t v, int ignored, int label_type, double spread) {
    int32_t ignore = ignored == 1 ? 2 : -100; /* a valid id may be the ignored one */
    lc_view x = filled(VIEW(real_type, n, v)), labels = make_labels(label_type, n, v, ignored, ignore),
            loss = VIEW(real_type, 1), lse = VIEW(real_type, n);
    lc_view want = VIEW(LC_K_F64, 1), want_lse = VIEW(LC_K_F64, n), want_g = VIEW(LC_K_F64, n, v),
            logits = VIEW(LC_K_F64, n, v), gx = VIEW(real_type, n, v);
    double *losses = hold((size_t)n * 8);
    int64_t *best = hold((size_t)n * 8);
    for (int64_t i = 0; i < n * v; i++) set(&x, i, get(&x, i) * spread), set(&logits, i, get(&x, i));
    set(&want, 0, naive_loss(logits.data, n, v, &labels, ignore, losses, want_lse.data, best, want_g.data));
    lc_kargs q = {.x = {x, labels}, .y = {loss, lse}, .i = &ignore};
    for (int plain = 0; plain < 2; plain++) {
        options[LC_OPTION_PLAIN_LOSS] = plain;
        assert_int_equal(run(LC_OP_cross_entropy, &q), LC_K_OK);
        expect_close("cross_entropy", &loss, &want, tolerance(real_type));
        expect_close("log-sum-exp", &lse, &want_lse, tolerance(real_type));
        lc_view g = VIEW(real_type, 1);
        set(&g, 0, 1);
        lc_kargs b = {.x = {g, x, labels, lse}, .y = {gx}, .i = &ignore};
        assert_int_equal(run(LC_OP_cross_entropy_backward, &b), LC_K_OK);
        expect_close("cross_entropy gradient", &gx, &want_g, real_type == LC_K_F64 ? 1e-12 : 1e-5);
    }
    options[LC_OPTION_PLAIN_LOSS] = 0;
    drop_all();
}

static void test_cross_entropy(void **state) {
    (void)state;
    EACH_VARIANT for (int i = 0; i < 3; i++) {
        check_cross_entropy(1, 3, i, LC_K_I32, 1);
        check_cross_entropy(10, 37, i, LC_K_I64, 4);
        check_cross_entropy(50, 3001, i, LC_K_I32, 30);
    }
}

static void check_linear_cross_entropy(int x_type, int w_type, int64_t n, int64_t d, int64_t v, int ignored, int grad) {
    lc_view values, x = filled(VIEW(x_type, n, d)), w = weight(w_type, v, d, &values), logits = VIEW(LC_K_F64, n, v),
                    gl = VIEW(LC_K_F64, n, v);
    lc_view labels = make_labels(n % 2 ? LC_K_I64 : LC_K_I32, n, v, ignored, -7), want = VIEW(LC_K_F64, 1),
            want_each = VIEW(LC_K_F64, n), want_g = VIEW(LC_K_F64, n, d);
    lc_view loss = VIEW(real_type, 1), each = VIEW(real_type, n), arg = VIEW(LC_K_I32, n), gx = VIEW(x_type, n, d);
    double *lses = hold((size_t)n * 8);
    int64_t *best = hold((size_t)n * 8);
    for (int64_t i = 0; i < n * d; i++) set(&x, i, get(&x, i) * 4);
    for (int64_t i = 0; i < n * v; i++) {
        double s = 0;
        for (int64_t k = 0; k < d; k++) s += get(&x, i / v * d + k) * get(&values, i % v * d + k);
        set(&logits, i, s);
    }
    set(&want, 0, naive_loss(logits.data, n, v, &labels, -7, want_each.data, lses, best, gl.data));
    for (int64_t i = 0; i < n * d; i++) {
        double s = 0;
        for (int64_t j = 0; j < v; j++) s += get(&gl, i / d * v + j) * get(&values, j * d + i % d);
        set(&want_g, i, s);
    }
    int32_t ints[2] = {-7, grad};
    lc_kargs q = {.x = {x, w, labels}, .y = {loss, each, arg}, .i = ints};
    if (grad) q.y[3] = gx;
    for (int plain = 0; plain < 2; plain++) {
        options[LC_OPTION_PLAIN_LOSS] = plain;
        memset(gx.data, 0xff, (size_t)numel(&gx) * (size_t)lc_dtype_traits(x_type)->bytes);
        assert_int_equal(run(LC_OP_linear_cross_entropy, &q), LC_K_OK);
        expect_close("linear_cross_entropy", &loss, &want, tolerance(real_type));
        expect_close("its rows", &each, &want_each, tolerance(real_type));
        if (grad)
            expect_close("its gradient", &gx, &want_g,
                         real_type == LC_K_F64 ? 1e-12
                         : x_type == LC_K_F32  ? 1e-5
                                               : tolerance(x_type));
        for (int64_t i = 0; i < n; i++) {
            double gap = get(&logits, i * v + best[i]) - get(&logits, i * v + (int64_t)get(&arg, i));
            assert_true(ignored || get(&arg, i) == (double)best[i] || fabs(gap) < 1e-5);
        }
    }
    options[LC_OPTION_PLAIN_LOSS] = 0;
    drop_all();
}

static void test_linear_cross_entropy(void **state) {
    (void)state;
    static const int weights[] = {LC_K_F32, LC_K_BF16, LC_K_F16, LC_K_Q8_0, LC_K_Q4_1};
    EACH_VARIANT for (int ignored = 0; ignored < 3; ignored++) for (int grad = 0; grad < 2; grad++) {
        check_linear_cross_entropy(real_type, real_type, 1, 1, 1, ignored, grad);
        check_linear_cross_entropy(real_type, real_type, 5, 7, 30, ignored, grad);
        check_linear_cross_entropy(real_type, real_type, 40, 33, 2500, ignored, grad);
        check_linear_cross_entropy(real_type, real_type, 1100, 8, 300, ignored, grad);
        for (int w = 0; w < 5 && real_type == LC_K_F32; w++) {
            check_linear_cross_entropy(LC_K_F32, weights[w], 20, 64, 1100, ignored, grad);
            check_linear_cross_entropy(LC_K_BF16, weights[w], 3, 32, 200, ignored, grad);
        }
    }
}

static void test_label_range(void **state) {
    (void)state;
    EACH_VARIANT {
        int32_t ints[2] = {-100, 1};
        lc_view labels = VIEW(LC_K_I32, 4), x = filled(VIEW(real_type, 4, 8)), w = filled(VIEW(real_type, 20, 8)),
                logits = filled(VIEW(real_type, 4, 20));
        set(&labels, 1, -100);
        set(&labels, 2, 20);
        lc_kargs q = {.x = {x, w, labels},
                      .y = {VIEW(real_type, 1), VIEW(real_type, 4), VIEW(LC_K_I32, 4), VIEW(real_type, 4, 8)},
                      .i = ints};
        assert_int_equal(run(LC_OP_linear_cross_entropy, &q), LC_K_RANGE);
        assert_true(fault.value == 20 && fault.limit == 20 && fault.at == 2);
        set(&labels, 2, 19);
        set(&labels, 3, -1);
        lc_kargs r = {.x = {logits, labels}, .y = {VIEW(real_type, 1), VIEW(real_type, 4)}, .i = ints};
        assert_int_equal(run(LC_OP_cross_entropy, &r), LC_K_RANGE);
        assert_true(fault.value == -1 && fault.at == 3);
        drop_all();
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_linear_shapes), cmocka_unit_test(test_linear_dtypes),
        cmocka_unit_test(test_linear_empty),  cmocka_unit_test(test_matmul),
        cmocka_unit_test(test_onednn),        cmocka_unit_test(test_norm),
        cmocka_unit_test(test_rope),          cmocka_unit_test(test_mse),
        cmocka_unit_test(test_cross_entropy), cmocka_unit_test(test_linear_cross_entropy),
        cmocka_unit_test(test_label_range),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
