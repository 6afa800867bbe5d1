/* softmax.c: reductions and scans along one dim: softmax, log_softmax, their gradient, logsumexp, argmax, argmin,
 * cumsum. Tensors are contiguous and seen as [outer, n, inner]; a row is the n elements of one (outer, inner). Sums run
 * in double between blocks. With inner 1 a row lies in one piece and is vectorised along itself, otherwise 64 rows side
 * by side go together. */
#include "convert.h"
#include "simd.h"
#include "walk.h"

#define KERNEL(name)                                                                                                   \
    int K(name)(const lc_kargs *k);                                                                                    \
    int K(name)(const lc_kargs *k)

enum { BLOCK = 1024, ARG_BLOCK = 128, SIDE = 64, GRAIN = 8192 };
enum { SOFTMAX, LOG_SOFTMAX, LOGSUMEXP };

typedef struct job {
    const real *x, *g;
    real *y;
    int32_t *index;
    int64_t outer, n, inner, blocks; /* blocks of SIDE rows in inner */
    int mode, reverse;
} job;

static void job_shape(job *j, const lc_view *v, int dim) {
    j->outer = j->inner = 1;
    for (int i = 0; i < dim; i++) j->outer *= v->dim[i];
    for (int i = dim + 1; i < v->ndim; i++) j->inner *= v->dim[i];
    j->n = v->ndim ? v->dim[dim] : 1; /* a 0-dim tensor is one row of one */
    j->blocks = (j->inner + SIDE - 1) / SIDE;
}

/* Tasks are rows where inner is 1, else blocks of SIDE rows. */
static int run_rows(const lc_kargs *k, job *j, void (*rows)(void *, int64_t, int64_t, int),
                    void (*side)(void *, int64_t, int64_t, int)) {
    int64_t tasks = j->inner == 1 ? j->outer : j->outer * j->blocks;
    int64_t work = LC_MAX((int64_t)1, j->n * LC_MIN(j->inner, (int64_t)SIDE));
    if (view_numel(&k->x[0]) > 0 || j->mode == LOGSUMEXP)
        run_parts(k, tasks, LC_MAX((int64_t)1, GRAIN / work), j->inner == 1 ? rows : side, j);
    return LC_K_OK;
}

/* Where block t of rows begins, and how many rows it has. */
static int64_t side_begin(const job *j, int64_t t, int64_t *width) {
    int64_t c = t % j->blocks * SIDE;
    *width = LC_MIN(j->inner - c, (int64_t)SIDE);
    return t / j->blocks * j->n * j->inner + c;
}

/* ---- pieces of one row ------------------------------------------------------------------------------------------- */

static real row_max(const real *x, int64_t n) {
    real best = -INFINITY;
    int64_t i = 0;
    if (n >= VL) {
        vreal m = vload(x);
        for (i = VL; i + VL <= n; i += VL) m = vmax(m, vload(x + i));
        best = vhmax(m);
    }
    for (; i < n; i++) best = x[i] > best ? x[i] : best;
    return best;
}

/* The sum of exp(x - m); the terms go to y unless it is NULL. */
static double row_exp_sum(const real *x, real m, real *y, int64_t n) {
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        int64_t end = LC_MIN(n, begin + BLOCK), i = begin;
        vreal s = {0};
        for (; i + VL <= end; i += VL) {
            vreal e = vexp(vload(x + i) - m);
            if (y) vstore(y + i, e);
            s += e;
        }
        if (i < end) {
            real rest[VL];
            for (int j = 0; j < VL; j++) rest[j] = i + j < end ? x[i + j] - m : -INFINITY;
            vreal e = vexp(vload(rest));
            vstore(rest, e);
            if (y) memcpy(y + i, rest, (size_t)(end - i) * sizeof(real));
            s += e;
        }
        total += (double)vsum(s);
    }
    return total;
}

static real finite_or_0(real m) { return m - m == 0 ? m : 0; }

static void softmax_rows(void *ctx, int64_t begin, int64_t end, int thread) {
    const job *j = (const job *)ctx;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        const real *x = j->x + r * j->n;
        real m = row_max(x, j->n);
        if (j->mode == LOGSUMEXP) {
            m = finite_or_0(m);
            j->y[r] = (real)((double)m + log(row_exp_sum(x, m, NULL, j->n)));
            continue;
        }
        real *y = j->y + r * j->n;
        double s = row_exp_sum(x, m, j->mode == SOFTMAX ? y : NULL, j->n);
        real scale = (real)(1 / s), shift = (real)log(s);
        if (j->mode == SOFTMAX)
            for (int64_t i = 0; i < j->n; i++) y[i] *= scale;
        else
            for (int64_t i = 0; i < j->n; i++) y[i] = (x[i] - m) - shift;
    }
}

static void softmax_side(void *ctx, int64_t begin, int64_t end, int thread) {
    const job *j = (const job *)ctx;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t width, at = side_begin(j, t, &width), step = j->inner;
        const real *x = j->x + at;
        real m[SIDE], scale[SIDE];
        double s[SIDE] = {0};
        for (int64_t c = 0; c < width; c++) m[c] = -INFINITY;
        for (int64_t i = 0; i < j->n; i++)
            for (int64_t c = 0; c < width; c++) m[c] = x[i * step + c] > m[c] ? x[i * step + c] : m[c];
        if (j->mode == LOGSUMEXP)
            for (int64_t c = 0; c < width; c++) m[c] = finite_or_0(m[c]);
        for (int64_t i = 0; i < j->n; i++) {
            real e[SIDE];
#pragma omp simd
            for (int64_t c = 0; c < width; c++) e[c] = rexp(x[i * step + c] - m[c]);
            if (j->mode == SOFTMAX) memcpy(j->y + at + i * step, e, (size_t)width * sizeof(real));
            for (int64_t c = 0; c < width; c++) s[c] += (double)e[c];
        }
        for (int64_t c = 0; c < width; c++) {
            scale[c] = (real)(j->mode == SOFTMAX ? 1 / s[c] : log(s[c]));
            if (j->mode == LOGSUMEXP)
                j->y[t / j->blocks * j->inner + t % j->blocks * SIDE + c] = (real)((double)m[c] + log(s[c]));
        }
        if (j->mode == LOGSUMEXP) continue;
        for (int64_t i = 0; i < j->n; i++) {
            real *y = j->y + at + i * step;
            const real *xi = x + i * step;
            if (j->mode == SOFTMAX)
                for (int64_t c = 0; c < width; c++) y[c] *= scale[c];
            else
                for (int64_t c = 0; c < width; c++) y[c] = (xi[c] - m[c]) - scale[c];
        }
    }
}

static int softmax(const lc_kargs *k, int mode) {
    job j = {.x = (const real *)k->x[0].data, .y = (real *)k->y[0].data, .mode = mode};
    if (k->x[0].dtype != LC_K_REAL || k->y[0].dtype != LC_K_REAL) return LC_K_UNSUPPORTED;
    job_shape(&j, &k->x[0], k->i[0]);
    return run_rows(k, &j, softmax_rows, softmax_side);
}
KERNEL(softmax) { return softmax(k, SOFTMAX); }
KERNEL(log_softmax) { return softmax(k, LOG_SOFTMAX); }
KERNEL(logsumexp) { return softmax(k, LOGSUMEXP); }

/* ---- gradient: y (g - sum g y), or g - exp(y) sum g for the logarithm -------------------------------------------- */

static double row_dot(const real *g, const real *y, int64_t n, int is_log) {
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        int64_t end = LC_MIN(n, begin + BLOCK);
        real s = 0;
        if (is_log) {
#pragma omp simd reduction(+ : s)
            for (int64_t i = begin; i < end; i++) s += g[i];
        } else {
#pragma omp simd reduction(+ : s)
            for (int64_t i = begin; i < end; i++) s += g[i] * y[i];
        }
        total += (double)s;
    }
    return total;
}

static void backward_rows(void *ctx, int64_t begin, int64_t end, int thread) {
    const job *j = (const job *)ctx;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        const real *y = j->x + r * j->n, *g = j->g + r * j->n;
        real *out = j->y + r * j->n;
        real s = (real)row_dot(g, y, j->n, j->mode == LOG_SOFTMAX);
        if (j->mode == LOG_SOFTMAX) {
#pragma omp simd
            for (int64_t i = 0; i < j->n; i++) out[i] = g[i] - rexp(y[i]) * s;
        } else {
            for (int64_t i = 0; i < j->n; i++) out[i] = y[i] * (g[i] - s);
        }
    }
}

static void backward_side(void *ctx, int64_t begin, int64_t end, int thread) {
    const job *j = (const job *)ctx;
    int is_log = j->mode == LOG_SOFTMAX;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t width, at = side_begin(j, t, &width);
        double s[SIDE] = {0};
        for (int64_t i = 0; i < j->n; i++) {
            const real *y = j->x + at + i * j->inner, *g = j->g + at + i * j->inner;
            for (int64_t c = 0; c < width; c++) s[c] += (double)g[c] * (is_log ? 1 : (double)y[c]);
        }
        for (int64_t i = 0; i < j->n; i++) {
            const real *y = j->x + at + i * j->inner, *g = j->g + at + i * j->inner;
            real *out = j->y + at + i * j->inner;
            for (int64_t c = 0; c < width; c++)
                out[c] = is_log ? g[c] - rexp(y[c]) * (real)s[c] : y[c] * (g[c] - (real)s[c]);
        }
    }
}

/* x[0] = g, x[1] = y, i[0] = dim, i[1] = log -> y[0] */
KERNEL(softmax_backward) {
    if (k->x[0].dtype != LC_K_REAL || k->x[1].dtype != LC_K_REAL) return LC_K_UNSUPPORTED;
    job j = {.g = (const real *)k->x[0].data, .x = (const real *)k->x[1].data, .y = (real *)k->y[0].data};
    j.mode = k->i[1] ? LOG_SOFTMAX : SOFTMAX;
    job_shape(&j, &k->x[1], k->i[0]);
    return run_rows(k, &j, backward_rows, backward_side);
}

/* ---- argmax, argmin: the first best; NaN is best ----------------------------------------------------------------- */

static int better(int is_min, real a, real b) { return b == b && (a != a || (is_min ? a < b : a > b)); }

static void arg_rows(void *ctx, int64_t begin, int64_t end, int thread) {
    const job *j = (const job *)ctx;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        const real *x = j->x + r * j->n;
        int64_t best = 0;
        for (int64_t i = 0; i < j->n; i += ARG_BLOCK) { /* is there anything better in the block at all? */
            int64_t stop = LC_MIN(j->n, i + ARG_BLOCK);
            real b = x[best];
            int any = 0;
            if (b != b) break;
            if (j->mode) {
#pragma omp simd reduction(| : any)
                for (int64_t e = i; e < stop; e++) any |= !(x[e] >= b);
            } else {
#pragma omp simd reduction(| : any)
                for (int64_t e = i; e < stop; e++) any |= !(x[e] <= b);
            }
            for (int64_t e = i; any && e < stop; e++)
                if (better(j->mode, x[e], x[best])) best = e;
        }
        j->index[r] = (int32_t)best;
    }
}

static void arg_side(void *ctx, int64_t begin, int64_t end, int thread) {
    const job *j = (const job *)ctx;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t width, at = side_begin(j, t, &width);
        int32_t *index = j->index + t / j->blocks * j->inner + t % j->blocks * SIDE;
        real best[SIDE];
        memset(index, 0, (size_t)width * sizeof *index);
        memcpy(best, j->x + at, (size_t)width * sizeof(real));
        for (int64_t i = 1; i < j->n; i++) {
            const real *x = j->x + at + i * j->inner;
            for (int64_t c = 0; c < width; c++) {
                if (!better(j->mode, x[c], best[c])) continue;
                best[c] = x[c];
                index[c] = (int32_t)i;
            }
        }
    }
}

static int arg(const lc_kargs *k, int is_min) {
    if (k->x[0].dtype != LC_K_REAL || k->y[0].dtype != LC_K_I32) return LC_K_UNSUPPORTED;
    job j = {.x = (const real *)k->x[0].data, .index = (int32_t *)k->y[0].data, .mode = is_min};
    job_shape(&j, &k->x[0], k->i[0]);
    return run_rows(k, &j, arg_rows, arg_side);
}
KERNEL(argmax) { return arg(k, 0); }
KERNEL(argmin) { return arg(k, 1); }

/* ---- cumsum ------------------------------------------------------------------------------------------------------ */

static void cumsum_rows(void *ctx, int64_t begin, int64_t end, int thread) {
    const job *j = (const job *)ctx;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        double s = 0;
        for (int64_t n = 0; n < j->n; n++) {
            int64_t i = r * j->n + (j->reverse ? j->n - 1 - n : n);
            j->y[i] = (real)(s += (double)j->x[i]);
        }
    }
}

static void cumsum_side(void *ctx, int64_t begin, int64_t end, int thread) {
    const job *j = (const job *)ctx;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t width, at = side_begin(j, t, &width);
        double s[SIDE] = {0};
        for (int64_t n = 0; n < j->n; n++) {
            int64_t row = at + (j->reverse ? j->n - 1 - n : n) * j->inner;
            for (int64_t c = 0; c < width; c++) j->y[row + c] = (real)(s[c] += (double)j->x[row + c]);
        }
    }
}

KERNEL(cumsum) {
    if (k->x[0].dtype != LC_K_REAL || k->y[0].dtype != LC_K_REAL) return LC_K_UNSUPPORTED;
    job j = {.x = (const real *)k->x[0].data, .y = (real *)k->y[0].data, .reverse = k->i[1] != 0};
    job_shape(&j, &k->x[0], k->i[0]);
    return run_rows(k, &j, cumsum_rows, cumsum_side);
}
