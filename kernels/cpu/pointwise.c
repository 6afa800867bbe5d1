/* pointwise.c: the CPU kernels of all UNARY, UNARY_FLAT, BINARY and COMPARE rows, and of their gradients. Each row of
 * the op table is instantiated once, as a loop over contiguous operands that the compiler turns into vector code;
 * operands with other strides pass through buffers that stay in the cache. All operands have the result's shape,
 * broadcast by strides of 0.
 *
 * UNARY: x[0] -> y[0]. NAME_grad: x[0] = g, x[1] = x, x[2] = y -> y[0].
 *
 * BINARY: x[0], x[1] -> y[0]. NAME_grad_a, _grad_b: x[0] = g, x[1] = a, x[2] = b, x[3] = y -> y[0].
 *
 * COMPARE: x[0], x[1] of one dtype -> y[0] uint8.
 *
 * f[] holds LC_SCALAR_PARAMS numbers at least, or is NULL. An operand that the row's function does not look at may be
 * absent. */
#include "scalar_math.h"
#include "walk.h"

#include "../scalar.h"

typedef void (*row_fn)(void *out, const void *const *in, int64_t n, const real *p);

typedef struct job {
    row_fn row;
    int n_in;
    int64_t in_bytes, out_bytes;
    real p[LC_SCALAR_PARAMS];
} job;

/* Buffers for what is not in one piece; a row's constants are spread out once. */
static void strided_row(void *ctx, char *const *p, const int64_t *step, int64_t n, int64_t at) {
    const job *j = (const job *)ctx;
    uint64_t buf[WALK_OPERANDS][WALK_BLOCK];
    (void)at;
    for (int64_t i = 0; i < n; i += WALK_BLOCK) {
        int64_t m = LC_MIN(n - i, (int64_t)WALK_BLOCK);
        const void *in[WALK_OPERANDS - 1];
        for (int o = 0; o < j->n_in; o++) {
            const char *from = p[o + 1] + i * step[o + 1];
            in[o] = from;
            if (step[o + 1] == j->in_bytes || m == 1) continue;
            if (i == 0 || step[o + 1] != 0) walk_gather(buf[o], from, step[o + 1], m, j->in_bytes);
            in[o] = buf[o];
        }
        char *to = p[0] + i * step[0];
        int direct = step[0] == j->out_bytes;
        void *out = direct ? (void *)to : (void *)buf[WALK_OPERANDS - 1];
        j->row(out, in, m, j->p);
        if (!direct) walk_scatter(to, step[0], out, m, j->out_bytes);
    }
}

/* The plain twin: one element at a time, each found from its position. */
static void plain(const job *j, const lc_view *const *v) {
    int64_t total = view_numel(v[0]);
    for (int64_t e = 0; e < total; e++) {
        char *out = (char *)v[0]->data + view_offset(v[0], e) * j->out_bytes;
        const void *in[WALK_OPERANDS - 1] = {0};
        for (int o = 0; o < j->n_in; o++) in[o] = (char *)v[o + 1]->data + view_offset(v[o + 1], e) * j->in_bytes;
        j->row(out, in, 1, j->p);
    }
}

static int run(const lc_kargs *k, int n_in, row_fn row) {
    const lc_view *v[WALK_OPERANDS] = {&k->y[0]};
    int dtype = k->x[0].dtype, together = 1;
    for (int o = 0; o < n_in; o++) {
        v[o + 1] = k->x[o].data ? &k->x[o] : &k->x[0];
        if (v[o + 1]->dtype != dtype) return LC_K_UNSUPPORTED;
        together &= view_contiguous(v[o + 1]);
    }
    job j = {.row = row, .n_in = n_in, .in_bytes = view_bytes(v[1]), .out_bytes = view_bytes(v[0])};
    if (k->f)
        for (int i = 0; i < LC_SCALAR_PARAMS; i++) j.p[i] = (real)k->f[i];
    if (k->host->option(LC_OPTION_PLAIN_POINTWISE)) {
        plain(&j, v);
        return LC_K_OK;
    }
    int64_t total = view_numel(v[0]);
    if (together && total <= WALK_SERIAL && view_contiguous(v[0])) {
        const void *in[WALK_OPERANDS - 1];
        for (int o = 0; o < n_in; o++) in[o] = v[o + 1]->data;
        row(v[0]->data, in, total, j.p);
        return LC_K_OK;
    }
    walk w;
    walk_make(&w, n_in + 1, v, 0);
    walk_all(k, &w, strided_row, &j);
    return LC_K_OK;
}

static int run_real(const lc_kargs *k, int n_in, row_fn row) {
    if (k->x[0].dtype != LC_K_REAL || k->y[0].dtype != LC_K_REAL) return LC_K_UNSUPPORTED;
    return run(k, n_in, row);
}

/* ---- the rows of the table --------------------------------------------------------------------------------------- */

/* The parameters are copied where the compiler sees that nothing else writes them. */
#define KERNEL(name, n_in, ...)                                                                                        \
    static void name##_row(void *out, const void *const *in, int64_t n, const real *f) {                               \
        real *y_ = (real *)out;                                                                                        \
        const real *x_[4] = {(const real *)in[0]};                                                                     \
        for (int o = 1; o < n_in; o++) x_[o] = (const real *)in[o];                                                    \
        const real *x0 = x_[0], *x1 = x_[1], *x2 = x_[2], *x3 = x_[3];                                                 \
        const real p[LC_SCALAR_PARAMS] = {f[0], f[1], f[2], f[3]};                                                     \
        (void)x1, (void)x2, (void)x3, (void)p;                                                                         \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y_[i] = __VA_ARGS__;                                       \
    }                                                                                                                  \
    int K(name)(const lc_kargs *k);                                                                                    \
    int K(name)(const lc_kargs *k) { return run_real(k, n_in, name##_row); }

#define UNARY(name, sig, flags, doc)                                                                                   \
    KERNEL(name, 1, LC_S(name)(x0[i], p))                                                                              \
    KERNEL(name##_grad, 3, LC_S(name##_grad)(x0[i], x1[i], x2[i], p))
#define UNARY_FLAT(name, sig, flags, doc) KERNEL(name, 1, LC_S(name)(x0[i], p))
#define BINARY(name, sig, flags, doc)                                                                                  \
    KERNEL(name, 2, LC_S(name)(x0[i], x1[i]))                                                                          \
    KERNEL(name##_grad_a, 4, LC_S(name##_grad_a)(x0[i], x1[i], x2[i], x3[i]))                                          \
    KERNEL(name##_grad_b, 4, LC_S(name##_grad_b)(x0[i], x1[i], x2[i], x3[i]))

#define COMPARE_ROW(name, type, T, ...)                                                                                \
    static void name##_##type##_row(void *out, const void *const *in, int64_t n, const real *f) {                      \
        uint8_t *y = (uint8_t *)out;                                                                                   \
        const T *x0 = (const T *)in[0], *x1 = (const T *)in[1];                                                        \
        (void)f;                                                                                                       \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] = (uint8_t)(__VA_ARGS__);                             \
    }
#define ORDER(a, b) (real)(((a) > (b)) - ((a) < (b)))
#define COMPARE(name, sig, flags, doc)                                                                                 \
    COMPARE_ROW(name, real, real, LC_S(name)(x0[i], x1[i]))                                                            \
    COMPARE_ROW(name, i32, int32_t, LC_S(name)(ORDER(x0[i], x1[i]), 0))                                                \
    COMPARE_ROW(name, i64, int64_t, LC_S(name)(ORDER(x0[i], x1[i]), 0))                                                \
    COMPARE_ROW(name, u8, uint8_t, LC_S(name)(ORDER(x0[i], x1[i]), 0))                                                 \
    int K(name)(const lc_kargs *k);                                                                                    \
    int K(name)(const lc_kargs *k) {                                                                                   \
        if (k->y[0].dtype != LC_K_U8) return LC_K_UNSUPPORTED;                                                         \
        switch (k->x[0].dtype) {                                                                                       \
        case LC_K_REAL: return run(k, 2, name##_real_row);                                                             \
        case LC_K_I32: return run(k, 2, name##_i32_row);                                                               \
        case LC_K_I64: return run(k, 2, name##_i64_row);                                                               \
        case LC_K_U8: return run(k, 2, name##_u8_row);                                                                 \
        default: return LC_K_UNSUPPORTED;                                                                              \
        }                                                                                                              \
    }

#include "../../runtime/ops.def"
