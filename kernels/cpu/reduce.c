/* reduce.c: reductions over sets of dims. Float sums run in vectors over short blocks and in double from block to
 * block, so their error does not grow with the length. How the work is cut depends on the shape alone: results do not
 * depend on the threads. y has x's dims with the reduced ones at 1. Reductions along one dim (softmax and others) are
 * in softmax.c. */
#include "convert.h"
#include "simd.h"
#include "walk.h"

#define KERNEL(name)                                                                                                   \
    int K(name)(const lc_kargs *k);                                                                                    \
    int K(name)(const lc_kargs *k)

enum { SUM, MAX, MIN, SQUARES, BAD }; /* BAD counts NaN and infinities */
enum { BLOCK = 1024, COLUMNS = 256, CHUNKS = 256, CHUNK = 16384, FEW = 16 };

typedef struct dims {
    int n;
    int64_t total, dim[LC_VIEW_DIMS], x[LC_VIEW_DIMS],
        y[LC_VIEW_DIMS]; /* strides in elements, longest x stride first */
} dims;

typedef struct job {
    int mode, dtype;
    double scale;
    const char *x;
    int64_t bytes;
    real *y;
    dims kept, reduced;
    int64_t output; /* reduction in chunks: which result */
    int64_t chunk;
    double *partial;
} job;

/* ---- one row ----------------------------------------------------------------------------------------------------- */

static double start_of(int mode) { return mode == MAX ? -INFINITY : mode == MIN ? INFINITY : 0; }

static double join(int mode, double a, double b) {
    if (mode == MAX) return b > a || b != b ? b : a;
    if (mode == MIN) return b < a || b != b ? b : a;
    return a + b;
}

static double block_sum(const real *p, int64_t n) {
    vreal s[4] = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        for (int j = 0; j < 4; j++) s[j] += vload(p + i + j * VL);
    for (; i + VL <= n; i += VL) s[0] += vload(p + i);
    real rest = 0;
    for (; i < n; i++) rest += p[i];
    return (double)(vsum((s[0] + s[1]) + (s[2] + s[3])) + rest);
}

static double block_squares(const real *p, int64_t n) {
    double s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < n; i++) s += (double)p[i] * (double)p[i];
    return s;
}

static double block_bad(const real *p, int64_t n) {
    int32_t s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < n; i++) s += !(p[i] - p[i] == 0);
    return s;
}

/* NaN wins, and stays. */
static double block_best(int mode, const real *p, int64_t n) {
    double best = start_of(mode);
    int64_t i = 0;
    if (n >= VL) {
        vreal m = vload(p);
        for (i = VL; i + VL <= n; i += VL) {
            vreal v = vload(p + i);
            vint better = mode == MAX ? (vint)(v > m) : (vint)(v < m);
            m = vselect(better | (vint)(v != v), v, m);
        }
        for (int j = 0; j < VL; j++) best = join(mode, best, (double)m[j]);
    }
    for (; i < n; i++) best = join(mode, best, (double)p[i]);
    return best;
}

static double block_reduce(int mode, const real *p, int64_t n) {
    switch (mode) {
    case SUM: return block_sum(p, n);
    case SQUARES: return block_squares(p, n);
    case BAD: return block_bad(p, n);
    default: return block_best(mode, p, n);
    }
}

/* n elements of any dtype, `step` bytes apart */
static double row_reduce(const job *j, const char *p, int64_t step, int64_t n) {
    double total = start_of(j->mode);
    real values[BLOCK];
    uint64_t raw[BLOCK];
    for (int64_t i = 0; i < n; i += BLOCK) {
        int64_t m = LC_MIN(n - i, (int64_t)BLOCK);
        const char *from = p + i * step;
        if (step != j->bytes) {
            walk_gather(raw, from, step, m, j->bytes);
            from = (const char *)raw;
        }
        if (j->dtype == LC_K_I32 || j->dtype == LC_K_I64) { /* not exact in float */
            double wide[BLOCK];
            row_to_f64(j->dtype, from, wide, m);
            for (int64_t e = 0; e < m; e++) total = join(j->mode, total, wide[e]);
            continue;
        }
        if (j->dtype != LC_K_REAL || from == (const char *)raw) {
            row_to_real(j->dtype, from, values, m);
            from = (const char *)values;
        }
        total = join(j->mode, total, block_reduce(j->mode, (const real *)from, m));
    }
    return total;
}

/* ---- all rows of one result -------------------------------------------------------------------------------------- */

static const char *at_kept(const job *j, int64_t o, real **y) {
    const char *x = j->x;
    *y = j->y;
    for (int i = j->kept.n - 1; i >= 0; i--) {
        int64_t at = o % j->kept.dim[i];
        o /= j->kept.dim[i];
        x += at * j->kept.x[i] * j->bytes;
        *y += at * j->kept.y[i];
    }
    return x;
}

/* elements [begin, end) of what is reduced into the result whose data start at x */
static double reduce_range(const job *j, const char *x, int64_t begin, int64_t end) {
    const dims *r = &j->reduced;
    int last = r->n - 1;
    double total = start_of(j->mode);
    while (begin < end) {
        int64_t rest = begin / r->dim[last], from = begin % r->dim[last];
        int64_t n = LC_MIN(r->dim[last] - from, end - begin);
        const char *p = x + from * r->x[last] * j->bytes;
        for (int i = last - 1; i >= 0; i--) {
            p += rest % r->dim[i] * r->x[i] * j->bytes;
            rest /= r->dim[i];
        }
        total = join(j->mode, total, row_reduce(j, p, r->x[last] * j->bytes, n));
        begin += n;
    }
    return total;
}

static void reduce_outputs(void *ctx, int64_t begin, int64_t end, int thread) {
    const job *j = (const job *)ctx;
    (void)thread;
    for (int64_t o = begin; o < end; o++) {
        real *y;
        const char *x = at_kept(j, o, &y);
        *y = (real)(reduce_range(j, x, 0, j->reduced.total) * j->scale);
    }
}

static void reduce_chunks(void *ctx, int64_t begin, int64_t end, int thread) {
    const job *j = (const job *)ctx;
    real *y;
    const char *x = at_kept(j, j->output, &y);
    (void)thread;
    for (int64_t c = begin; c < end; c++)
        j->partial[c] = reduce_range(j, x, c * j->chunk, LC_MIN((c + 1) * j->chunk, j->reduced.total));
}

/* One long reduction, in at most CHUNKS parts that are joined in their order. */
static double reduce_long(const lc_kargs *k, job *j, int64_t output) {
    double partial[CHUNKS], total = start_of(j->mode);
    j->output = output;
    j->chunk = LC_MAX((int64_t)CHUNK, (j->reduced.total + CHUNKS - 1) / CHUNKS);
    j->partial = partial;
    int64_t chunks = (j->reduced.total + j->chunk - 1) / j->chunk;
    run_parts(k, chunks, 1, reduce_chunks, j);
    for (int64_t c = 0; c < chunks; c++) total = join(j->mode, total, partial[c]);
    return total;
}

/* ---- columns: the kept inner dim lies in one piece, the reduced ones do not -------------------------------------- */

static void add_columns(int mode, real *restrict to, const real *restrict from, int64_t n) {
    if (mode == SUM)
        for (int64_t i = 0; i < n; i++) to[i] += from[i];
    else if (mode == MAX)
        for (int64_t i = 0; i < n; i++) to[i] = from[i] > to[i] || from[i] != from[i] ? from[i] : to[i];
    else
        for (int64_t i = 0; i < n; i++) to[i] = from[i] < to[i] || from[i] != from[i] ? from[i] : to[i];
}

/* Tasks: blocks of COLUMNS results. 16 rows at a time are summed in real, these sums in double. */
static void reduce_columns(void *ctx, int64_t begin, int64_t end, int thread) {
    const job *j = (const job *)ctx;
    const dims *r = &j->reduced;
    int64_t columns = j->kept.dim[j->kept.n - 1], blocks = (columns + COLUMNS - 1) / COLUMNS;
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t column = t % blocks * COLUMNS, n = LC_MIN(columns - column, (int64_t)COLUMNS);
        real *y, part[COLUMNS];
        const real *x = (const real *)at_kept(j, t / blocks * columns + column, &y);
        double total[COLUMNS];
        for (int64_t i = 0; i < n; i++) total[i] = start_of(j->mode);
        for (int64_t row = 0; row < r->total; row += 16) {
            for (int64_t i = 0; i < n; i++) part[i] = (real)start_of(j->mode);
            for (int64_t e = row; e < LC_MIN(row + 16, r->total); e++) {
                int64_t rest = e, at = 0;
                for (int i = r->n - 1; i >= 0; i--) {
                    at += rest % r->dim[i] * r->x[i];
                    rest /= r->dim[i];
                }
                add_columns(j->mode, part, x + at, n);
            }
            for (int64_t i = 0; i < n; i++) total[i] = join(j->mode, total[i], (double)part[i]);
        }
        int64_t step = j->kept.y[j->kept.n - 1];
        for (int64_t i = 0; i < n; i++) y[i * step] = (real)(total[i] * j->scale);
    }
}

/* ---- cutting the work -------------------------------------------------------------------------------------------- */

static void dims_add(dims *d, int64_t dim, int64_t x, int64_t y) {
    int at = d->n++;
    for (; at > 0 && d->x[at - 1] < x; at--) {
        d->dim[at] = d->dim[at - 1];
        d->x[at] = d->x[at - 1];
        d->y[at] = d->y[at - 1];
    }
    d->dim[at] = dim;
    d->x[at] = x;
    d->y[at] = y;
    d->total *= dim;
}

static void dims_merge(dims *d) {
    int n = 0;
    for (int i = 0; i < d->n; i++) {
        int merge = n > 0 && d->x[n - 1] == d->x[i] * d->dim[i] && d->y[n - 1] == d->y[i] * d->dim[i];
        if (merge)
            d->dim[n - 1] *= d->dim[i];
        else
            d->dim[n++] = d->dim[i];
        d->x[n - 1] = d->x[i];
        d->y[n - 1] = d->y[i];
    }
    if (n == 0) {
        d->dim[0] = 1;
        d->x[0] = d->y[0] = n = 1;
    }
    d->n = n;
}

static void plan(job *j, int mode, const lc_view *x, const lc_view *y, unsigned reduced) {
    memset(j, 0, sizeof *j);
    j->mode = mode;
    j->dtype = x->dtype;
    j->scale = 1;
    j->x = (const char *)x->data;
    j->bytes = view_bytes(x);
    j->y = (real *)y->data;
    j->kept.total = j->reduced.total = 1;
    for (int i = 0; i < x->ndim; i++) {
        if (x->dim[i] == 1) continue;
        if (reduced >> i & 1)
            dims_add(&j->reduced, x->dim[i], x->stride[i], 0);
        else
            dims_add(&j->kept, x->dim[i], x->stride[i], i < y->ndim ? y->stride[i] : 0);
    }
    dims_merge(&j->kept);
    dims_merge(&j->reduced);
}

static void execute(const lc_kargs *k, job *j) {
    const dims *kept = &j->kept, *r = &j->reduced;
    if (kept->total == 0) return;
    int64_t inner = kept->dim[kept->n - 1];
    if (j->dtype == LC_K_REAL && kept->x[kept->n - 1] == 1 && inner >= 8 && r->x[r->n - 1] != 1) {
        int64_t blocks = (inner + COLUMNS - 1) / COLUMNS,
                work = LC_MAX((int64_t)1, LC_MIN(inner, (int64_t)COLUMNS) * r->total);
        run_parts(k, kept->total / inner * blocks, LC_MAX((int64_t)1, CHUNK / work), reduce_columns, j);
    } else if (kept->total < FEW && r->total > 2 * CHUNK) {
        for (int64_t o = 0; o < kept->total; o++) {
            double value = reduce_long(k, j, o);
            real *y;
            at_kept(j, o, &y);
            *y = (real)(value * j->scale);
        }
    } else {
        run_parts(k, kept->total, LC_MAX((int64_t)1, CHUNK / LC_MAX((int64_t)1, r->total)), reduce_outputs, j);
    }
}

/* x -> y over the dims listed in i[]; none listed: all */
static int reduce(const lc_kargs *k, int mode, int mean) {
    const lc_view *x = &k->x[0];
    if (k->y[0].dtype != LC_K_REAL || lc_dtype_is_quant(x->dtype)) return LC_K_UNSUPPORTED;
    unsigned reduced = 0;
    for (int i = 0; i < k->i[0]; i++) reduced |= 1u << k->i[1 + i];
    if (k->i[0] == 0) reduced = (1u << x->ndim) - 1;
    job j;
    plan(&j, mode, x, &k->y[0], reduced);
    if (mean) j.scale = 1 / (double)j.reduced.total;
    execute(k, &j);
    return LC_K_OK;
}

KERNEL(sum) { return reduce(k, SUM, 0); }
KERNEL(mean) { return reduce(k, SUM, 1); }
KERNEL(amax) { return reduce(k, MAX, 0); }
KERNEL(amin) { return reduce(k, MIN, 0); }

static double reduce_all(const lc_kargs *k, int mode, const lc_view *x) {
    job j;
    plan(&j, mode, x, x, (1u << x->ndim) - 1);
    if (j.reduced.total > 2 * CHUNK) return reduce_long(k, &j, 0);
    return reduce_range(&j, j.x, 0, j.reduced.total);
}

KERNEL(count_nonfinite) {
    if (k->y[0].dtype != LC_K_REAL || !lc_dtype_is_float(k->x[0].dtype)) return LC_K_UNSUPPORTED;
    *(real *)k->y[0].data = (real)reduce_all(k, BAD, &k->x[0]);
    return LC_K_OK;
}

/* list -> the sum of all its elements' squares */
KERNEL(sum_squares) {
    double total = 0;
    if (k->y[0].dtype != LC_K_REAL) return LC_K_UNSUPPORTED;
    for (int i = 0; i < k->n_list; i++) {
        if (!lc_dtype_is_float(k->list[i].dtype)) return LC_K_UNSUPPORTED;
        total += reduce_all(k, SQUARES, &k->list[i]);
    }
    *(real *)k->y[0].data = (real)total;
    return LC_K_OK;
}
