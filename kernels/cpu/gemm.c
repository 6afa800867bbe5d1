/* gemm.c: our own packed matrix product. C is cut into a grid of tasks, one a thread; a task walks blocks of NC columns
 * and KC of the inner dim, packs that block of B into panels of NR columns (in the second-level cache), copies MR rows
 * of A at a time (first-level cache) and runs the microkernel over the panels. Weights of other dtypes become reals
 * while they are packed. Every element of C is summed in one order, whatever the number of threads. The double instance
 * is the same code on shorter vectors. */
#include "gemm.h"

#if LC_VBYTES == 64
enum { MR = 14, A_STEP = 16 };
#else
enum { MR = 6, A_STEP = 8 };
#endif
enum { NV = 2, NR = NV * VL, KC = 384, A_LD = KC + 16, SMALL = 1 << 16 };

/* ---- microkernel ----------------------------------------------------------------------------------------------- */

/* c [mr, nv * VL] = alpha * sum over kc of a b + beta * add + bias. Element (i, k) of the copied a is a[i * A_LD + k]
 * if by_rows, else a[k * A_STEP + i]; row k of b is at b + k * ldb. */
typedef struct tile {
    const real *a, *b, *add, *bias;
    real *c;
    int64_t kc, ldb, ld_add, ldc;
    real alpha, beta;
} tile;

#define ROWS_(X)       X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13)
#define ROW_DECLARE(i) vreal c##i##_0 = {0}, c##i##_1 = {0};
#define ROW_FETCH(i)                                                                                                   \
    if (mr > i) {                                                                                                      \
        __builtin_prefetch(t->c + i * t->ldc, 1);                                                                      \
        if (nv > 1) __builtin_prefetch(t->c + i * t->ldc + VL, 1);                                                     \
    }
#define ROW_STEP(i)                                                                                                    \
    if (mr > i) {                                                                                                      \
        vreal s = vset(by_rows ? a[i * A_LD] : a[i]);                                                                  \
        c##i##_0 += s * b0;                                                                                            \
        if (nv > 1) c##i##_1 += s * b1;                                                                                \
    }
#define ROW_STORE(i)                                                                                                   \
    if (mr > i) {                                                                                                      \
        vstore(c, alpha * c##i##_0 + (vload(add) * beta + bias0));                                                     \
        if (nv > 1) vstore(c + VL, alpha * c##i##_1 + (vload(add + VL) * beta + bias1));                               \
        c += t->ldc, add += t->ld_add;                                                                                 \
    }

static inline __attribute__((always_inline)) void tile_body(const tile *t, const int mr, const int nv,
                                                            const int by_rows) {
    const real *a = t->a, *b = t->b;
    const int64_t ldb = t->ldb;
    ROWS_(ROW_DECLARE)
    if (t->kc >= 64) { /* c is wanted at the end: a short product is there at once */
        ROWS_(ROW_FETCH)
    }
    for (int64_t k = t->kc; k > 0; k--) {
        vreal b0 = vload(b), b1 = nv > 1 ? vload(b + VL) : b0;
        ROWS_(ROW_STEP)
        a += by_rows ? 1 : A_STEP;
        b += ldb;
    }
    const real *add = t->add;
    real *c = t->c;
    const vreal alpha = vset(t->alpha), beta = vset(t->beta);
    const vreal bias0 = vload(t->bias), bias1 = nv > 1 ? vload(t->bias + VL) : bias0;
    ROWS_(ROW_STORE)
}

typedef void (*tile_fn)(const tile *t);
/* clang-format off */
#define TILE(mr)                                                          \
    static void tile_##mr##_10(const tile *t) { tile_body(t, mr, 1, 0); } \
    static void tile_##mr##_11(const tile *t) { tile_body(t, mr, 1, 1); } \
    static void tile_##mr##_20(const tile *t) { tile_body(t, mr, 2, 0); } \
    static void tile_##mr##_21(const tile *t) { tile_body(t, mr, 2, 1); }
#define TILE_ROW(mr) {tile_##mr##_10, tile_##mr##_11, tile_##mr##_20, tile_##mr##_21},
#if LC_VBYTES == 64
#define SIZES(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14)
#else
#define SIZES(X) X(1) X(2) X(3) X(4) X(5) X(6)
#endif
SIZES(TILE)
static const tile_fn tiles[MR][4] = {SIZES(TILE_ROW)}; /* by rows, then vectors and layout of a */
/* clang-format on */

static const real zeros[NR];

/* ---- packing --------------------------------------------------------------------------------------------------- */

/* One step of the butterfly that transposes VL x VL: exchanges the off-diagonal blocks of size h. */
static inline __attribute__((always_inline)) void swap_blocks(vreal *r, const int h) {
    vint low, high;
#pragma GCC unroll 16
    for (int l = 0; l < VL; l++) {
        low[l] = l & h ? VL + l - h : l;
        high[l] = l & h ? VL + l : l + h;
    }
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) {
        if (i & h) continue;
        vreal a = r[i], b = r[i + h];
        r[i] = __builtin_shuffle(a, b, low);
        r[i + h] = __builtin_shuffle(a, b, high);
    }
}

/* VL rows of kc contiguous reals, row i at src + i * ld, to dst[k * NR + i]. */
static void pack_transposed(const real *src, int64_t ld, int64_t kc, real *dst) {
    int64_t k = 0;
    for (; k + VL <= kc; k += VL) {
        vreal r[VL];
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++) r[i] = vload(src + i * ld + k);
        swap_blocks(r, 1);
        if (VL > 2) swap_blocks(r, 2);
        if (VL > 4) swap_blocks(r, 4);
        if (VL > 8) swap_blocks(r, 8);
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++) vstore(dst + (k + i) * NR, r[i]);
    }
    for (; k < kc; k++)
        for (int i = 0; i < VL; i++) dst[k * NR + i] = src[i * ld + k];
}

/* Columns [j, j + n) and inner [k0, k0 + kc) of b to dst[k * NR + 0 .. VL), the rest zero; n <= VL. t holds VL x KC
 * reals. */
static void pack_columns(const gemm_call *g, int64_t j, int64_t n, int64_t k0, int64_t kc, real *dst, real *t) {
    const real *b = g->b;
    if (g->b_rs == 1 && g->b_dtype == LC_K_REAL && n == VL) {
        pack_transposed(b + j * g->b_cs + k0, g->b_cs, kc, dst);
    } else if (g->b_rs == 1 && n > 0) {
        for (int64_t i = 0; i < VL; i++) {
            if (i < n)
                row_to_real(g->b_dtype, gemm_at(g->b, g->b_dtype, (j + i) * g->b_cs + k0), t + i * KC, kc);
            else
                memset(t + i * KC, 0, (size_t)kc * sizeof(real));
        }
        pack_transposed(t, KC, kc, dst);
    } else if (g->b_cs == 1 && n == VL) {
        for (int64_t k = 0; k < kc; k++) vstore(dst + k * NR, vload(b + (k0 + k) * g->b_rs + j));
    } else {
        for (int64_t k = 0; k < kc; k++)
            for (int64_t i = 0; i < VL; i++) dst[k * NR + i] = i < n ? b[(k0 + k) * g->b_rs + (j + i) * g->b_cs] : 0;
    }
}

/* Columns [j0, j1), panel after panel. Where rows of b are contiguous, whole panels are filled a row at a time. */
static void pack_block(const gemm_call *g, int64_t j0, int64_t j1, int64_t k0, int64_t kc, real *packed, real *t) {
    int64_t whole = g->b_cs == 1 && g->b_dtype == LC_K_REAL ? (j1 - j0) / NR * NR : 0;
    for (int64_t k = 0; whole && k < kc; k++) {
        const real *b = (const real *)g->b + (k0 + k) * g->b_rs + j0;
        real *dst = packed + k * NR;
        for (int64_t p = 0; p < whole; p += NR, dst += kc * NR)
            for (int l = 0; l < NV; l++) vstore(dst + l * VL, vload(b + p + l * VL));
    }
    for (int64_t p = j0 + whole; p < j1; p += NR) {
        real *dst = packed + (p - j0) * kc;
        pack_columns(g, p, LC_MIN(j1 - p, VL), k0, kc, dst, t);
        if (j1 - p > VL) pack_columns(g, p + VL, LC_MIN(j1 - p - VL, VL), k0, kc, dst + VL, t);
    }
}

/* n < A_STEP reals, out to a place for A_STEP of them. */
static inline void copy_few(real *out, const real *in, int64_t n) {
#if LC_VBYTES == 64 && !LC_DOUBLE
    _mm512_storeu_ps(out, _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), in));
#else
    for (int64_t i = 0; i < n; i++) out[i] = in[i];
#endif
}

/* mr rows from i0 and kc of the inner dim from k0 of a, into the layout that it suits. Returns by_rows. */
static int copy_a(const gemm_call *g, int64_t i0, int64_t mr, int64_t k0, int64_t kc, real *dst) {
    const real *a = (const real *)g->a + i0 * g->a_rs + k0 * g->a_cs;
    if (g->a_cs == 1 && g->a_dtype != LC_K_REAL) {
        for (int64_t i = 0; i < mr; i++)
            row_to_real(g->a_dtype, gemm_at(g->a, g->a_dtype, (i0 + i) * g->a_rs + k0), dst + i * A_LD, kc);
        return 1;
    }
    if (g->a_cs == 1) {
        for (int64_t i = 0; i < mr; i++) {
            const real *src = a + i * g->a_rs;
            int64_t k = 0;
            for (; k + VL <= kc; k += VL) vstore(dst + i * A_LD + k, vload(src + k));
            for (; k < kc; k++) dst[i * A_LD + k] = src[k];
        }
        return 1;
    }
    if (g->a_rs == 1) {
        for (int64_t k = 0; k < kc; k++) copy_few(dst + k * A_STEP, a + k * g->a_cs, mr);
        return 0;
    }
    for (int64_t i = 0; i < mr; i++)
        for (int64_t k = 0; k < kc; k++) dst[i * A_LD + k] = a[i * g->a_rs + k * g->a_cs];
    return 1;
}

/* ---- blocks ---------------------------------------------------------------------------------------------------- */

typedef struct job {
    const gemm_call *g;
    int64_t mt, nt;                 /* tasks down and across */
    int64_t kc, nc;                 /* block of the inner dim, of columns */
    int64_t c_rs, c_cs, d_rs, d_cs; /* steps of c and add; columns are apart when c^T is computed */
    int failed;
} job;

/* A tile whose columns are not whole vectors, or not contiguous in c, goes through memory. */
static void run_edge(const job *w, tile *t, tile_fn fn, int64_t mr, int64_t n, int64_t i, int64_t j, int first) {
    const gemm_call *g = w->g;
    real edge[MR * NR], *c = g->c + i * w->c_rs + j * w->c_cs;
    t->c = edge, t->ldc = NR, t->add = zeros, t->ld_add = 0, t->bias = zeros;
    fn(t);
    for (int64_t r = 0; r < mr; r++)
        for (int64_t l = 0; l < n; l++) {
            real v = edge[r * NR + l], *to = c + r * w->c_rs + l * w->c_cs;
            if (first && g->bias) v += g->bias[j + l];
            if (first && g->add) v += g->beta * g->add[(i + r) * w->d_rs + (j + l) * w->d_cs];
            *to = first ? v : *to + v;
        }
}

/* Rows [i, i + mr) of one block of C: columns [j0, j1), inner [k0, k0 + kc). `packed` has its panels, or is NULL where
 * whole panels are read from b itself and `last` holds the panel that is not whole. */
static void run_rows(const job *w, int64_t i, int64_t mr, int64_t j0, int64_t j1, int64_t k0, int64_t kc, const real *a,
                     int by_rows, const real *packed, const real *last) {
    const gemm_call *g = w->g;
    const int first = k0 == 0;
    tile t = {.a = a, .kc = kc, .alpha = g->alpha, .beta = first ? g->beta : 1};
    for (int64_t j = j0; j < j1; j += NR) {
        const int64_t n = LC_MIN(j1 - j, NR), nv = n > VL ? 2 : 1;
        const tile_fn fn = tiles[mr - 1][(nv - 1) * 2 + by_rows];
        if (packed)
            t.b = packed + (j - j0) * kc, t.ldb = NR;
        else if (n == NR)
            t.b = (const real *)g->b + k0 * g->b_rs + j, t.ldb = g->b_rs;
        else
            t.b = last, t.ldb = NR;
        if (n < nv * VL || w->c_cs != 1 || (first && g->add && w->d_cs != 1)) {
            run_edge(w, &t, fn, mr, n, i, j, first);
            continue;
        }
        t.c = g->c + i * w->c_rs + j, t.ldc = w->c_rs;
        t.bias = first && g->bias ? g->bias + j : zeros;
        t.add = zeros, t.ld_add = 0;
        if (!first)
            t.add = t.c, t.ld_add = t.ldc;
        else if (g->add)
            t.add = g->add + i * w->d_rs + j, t.ld_add = w->d_rs;
        fn(&t);
    }
}

static void run_task(const job *w, int64_t i0, int64_t i1, int64_t j0, int64_t j1, real *scratch) {
    const gemm_call *g = w->g;
    int64_t m = i1 - i0, bands = (m + MR - 1) / MR;
    /* few rows: packing costs more than it saves where panels can be read in place */
    int direct = g->b_cs == 1 && g->b_dtype == LC_K_REAL && bands <= 2;
    real *a = scratch, *t = a + LC_MAX((int)MR * A_LD, (int)KC * A_STEP), *packed = t + VL * KC;
    for (int64_t j = j0; j < j1; j += w->nc) {
        int64_t je = LC_MIN(j + w->nc, j1);
        for (int64_t k0 = 0; k0 < g->k; k0 += w->kc) {
            int64_t kc = LC_MIN(w->kc, g->k - k0);
            pack_block(g, direct ? je - (je - j) % NR : j, je, k0, kc, packed, t);
            for (int64_t b = 0, i = i0; b < bands; b++) {
                int64_t mr = m / bands + (b < m % bands);
                int by_rows = copy_a(g, i, mr, k0, kc, a);
                run_rows(w, i, mr, j, je, k0, kc, a, by_rows, direct ? NULL : packed, packed);
                i += mr;
            }
        }
    }
}

static void run_tasks(void *ctx, int64_t begin, int64_t end, int thread) {
    job *w = ctx;
    const gemm_call *g = w->g;
    (void)thread;
    int64_t panels = (g->n + NR - 1) / NR;
    size_t a_size = LC_MAX((size_t)MR * A_LD, (size_t)KC * A_STEP);
    real *scratch = lc_cpu_scratch((a_size + (size_t)VL * KC + (size_t)w->kc * (size_t)w->nc) * sizeof(real));
    if (!scratch) {
        w->failed = 1;
        return;
    }
    for (int64_t x = begin; x < end; x++) {
        int64_t r = x / w->nt, q = x % w->nt;
        int64_t i0 = g->m * r / w->mt, i1 = g->m * (r + 1) / w->mt;
        int64_t j0 = panels * q / w->nt * NR, j1 = LC_MIN(panels * (q + 1) / w->nt * NR, g->n);
        if (i1 > i0 && j1 > j0) run_task(w, i0, i1, j0, j1, scratch);
    }
}

/* How to cut m rows and n columns: the time of all threads in microkernel steps, packing B and copying A included.
 * Twice as many tasks as threads let a thread that is held up do less; they must cost hardly more. */
static void choose_grid(const gemm_call *g, int threads, int64_t nc, int64_t *mt, int64_t *nt) {
    const double pack = .5, copy = .65, wish = .95; /* measured, in steps an element; A comes from afar */
    double best = INFINITY;
    for (int64_t tasks = threads; tasks <= 2 * threads; tasks += threads)
        for (int64_t r = 1; r <= tasks; r++) {
            if (tasks % r) continue;
            const int64_t q = tasks / r, panels = ((g->n + NR - 1) / NR + q - 1) / q;
            const double rows = (double)((g->m + r - 1) / r), bands = (double)((g->m + r * MR - 1) / (r * MR));
            const double columns = (double)(panels * NR), passes = (double)((panels * NR + nc - 1) / nc);
            double cost = bands * MR * (double)panels + columns * pack + rows * copy * passes;
            cost *= tasks > threads ? wish * (double)tasks / threads : 1;
            if (cost < best) best = cost, *mt = r, *nt = q;
        }
}

/* ---- oneDNN ---------------------------------------------------------------------------------------------------- */

#if !LC_DOUBLE
typedef struct dnn_job {
    const gemm_call *g;
    int64_t parts;
    int failed;
} dnn_job;

/* The longer of m and n is cut into `parts`; each worker's share is one single-threaded sgemm. */
static void dnn_parts(void *ctx, int64_t begin, int64_t end, int thread) {
    dnn_job *w = ctx;
    const gemm_call *g = w->g;
    (void)thread;
    int by_m = g->m >= g->n, ta = g->a_cs != 1, tb = g->b_cs != 1;
    int64_t m0 = by_m ? g->m * begin / w->parts : 0, m1 = by_m ? g->m * end / w->parts : g->m;
    int64_t n0 = by_m ? 0 : g->n * begin / w->parts, n1 = by_m ? g->n : g->n * end / w->parts;
    const float *a = (const float *)g->a + m0 * g->a_rs, *b = (const float *)g->b + n0 * g->b_cs;
    float beta = g->add == g->c && g->add ? g->beta : 0;
    if (m1 == m0 || n1 == n0) return;
    if (lc_onednn_sgemm(ta, tb, m1 - m0, n1 - n0, g->k, g->alpha, a, ta ? g->a_cs : g->a_rs, b, tb ? g->b_cs : g->b_rs,
                        beta, g->c + m0 * g->ldc + n0, g->ldc)) {
        w->failed = 1;
        return;
    }
    for (int64_t i = m0; i < m1; i++) {
        float *c = g->c + i * g->ldc;
        if (g->bias)
            for (int64_t j = n0; j < n1; j++) c[j] += g->bias[j];
        if (g->add && g->add != g->c)
            for (int64_t j = n0; j < n1; j++) c[j] += g->beta * g->add[i * g->ld_add + j];
    }
}

static int dnn_run(const lc_host *host, const gemm_call *g) {
    int threads = host && (double)g->m * (double)g->n * (double)g->k > SMALL ? host->threads() : 1;
    int a_ok = (g->a_cs == 1 && g->a_rs >= g->k) || (g->a_rs == 1 && g->a_cs >= g->m);
    int b_ok = (g->b_cs == 1 && g->b_rs >= g->n) || (g->b_rs == 1 && g->b_cs >= g->k);
    if (g->a_dtype != LC_K_F32 || g->b_dtype != LC_K_F32 || !a_ok || !b_ok || g->k < 1 || g->ldc < g->n) return 1;
    if (g->add == g->c && g->add && g->ld_add != g->ldc) return 1;
    dnn_job w = {g, threads, 0};
    if (threads > 1)
        host->parallel(threads, 1, dnn_parts, &w);
    else
        dnn_parts(&w, 0, 1, 0);
    return w.failed;
}
#endif

/* ---- entry ----------------------------------------------------------------------------------------------------- */

static void run_empty(const gemm_call *g) {
    for (int64_t i = 0; i < g->m; i++)
        for (int64_t j = 0; j < g->n; j++)
            g->c[i * g->ldc + j] = (g->add ? g->beta * g->add[i * g->ld_add + j] : 0) + (g->bias ? g->bias[j] : 0);
}

/* Packed product; c_cs 1, or c_rs 1 for a result computed as its transpose. */
static int run_packed(const lc_host *host, const gemm_call *g, int64_t c_rs, int64_t c_cs, int64_t d_rs, int64_t d_cs) {
    int threads = host && (double)g->m * (double)g->n * (double)g->k > SMALL ? host->threads() : 1;
    int64_t grain = LC_MAX(8, lc_dtype_traits(g->b_dtype)->block), kmax = KC / grain * grain,
            blocks = (g->k + kmax - 1) / kmax;
    job w = {.g = g, .mt = 1, .nt = 1, .c_rs = c_rs, .c_cs = c_cs, .d_rs = d_rs, .d_cs = d_cs};
    w.kc = ((g->k + blocks - 1) / blocks + grain - 1) / grain * grain;
    w.nc = LC_MAX((int64_t)(lc_cpu_panel_bytes() / sizeof(real)) / w.kc / NR, 1) * NR;
    w.nc = LC_MIN(w.nc, (g->n + NR - 1) / NR * NR);
    if (threads > 1) {
        choose_grid(g, threads, w.nc, &w.mt, &w.nt);
        host->parallel(w.mt * w.nt, 1, run_tasks, &w);
    } else {
        run_tasks(&w, 0, 1, 0);
    }
    return w.failed ? LC_K_NOMEM : LC_K_OK;
}

/* The same product the other way round, c^T = b^T a^T; without bias. */
static gemm_call turned(const gemm_call *g) {
    gemm_call r = *g;
    r.m = g->n, r.n = g->m, r.a = g->b, r.b = g->a, r.a_dtype = g->b_dtype, r.b_dtype = g->a_dtype;
    r.a_rs = g->b_cs, r.a_cs = g->b_rs, r.b_rs = g->a_cs, r.b_cs = g->a_rs;
    return r;
}

/* Few columns (LoRA's down projection and its gradients): a is the weight, b^T the rows. */
static int run_narrow(const lc_host *host, const gemm_call *g) {
    gemm_call r = turned(g);
    if (r.a_cs != 1) { /* b is small: its columns become rows */
        real *t = lc_cpu_scratch((size_t)(g->n * g->k) * sizeof(real));
        if (!t) return LC_K_NOMEM;
        for (int64_t k = 0; k < g->k; k++)
            for (int64_t j = 0; j < g->n; j++) t[j * g->k + k] = ((const real *)g->b)[k * g->b_rs + j * g->b_cs];
        r.a = t, r.a_cs = 1, r.a_rs = g->k;
    }
    K(gemv_run)(host, &r, 1, g->ldc, 1, g->ld_add);
    return LC_K_OK;
}

int K(gemm_run)(const lc_host *host, const gemm_call *g) {
    if (g->m < 1 || g->n < 1) return LC_K_OK;
    if ((g->a_dtype != LC_K_REAL && g->a_cs != 1) || (g->b_dtype != LC_K_REAL && g->b_rs != 1)) return LC_K_UNSUPPORTED;
    if (g->k < 1) {
        run_empty(g);
        return LC_K_OK;
    }
    if (g->m <= GEMV_ROWS && g->b_rs == 1 && g->a_cs == 1 && g->a_dtype == LC_K_REAL) {
        K(gemv_run)(host, g, g->ldc, 1, g->ld_add, 1);
        return LC_K_OK;
    }
#if !LC_DOUBLE
    if (lc_onednn_active() && dnn_run(host, g) == 0) return LC_K_OK;
#endif
    if (!g->bias && g->b_dtype == LC_K_REAL) {
        if (g->n <= GEMV_ROWS && g->a_cs == 1 && g->m > GEMV_ROWS) return run_narrow(host, g);
        if (g->n <= VL && g->a_rs == 1 && g->a_dtype == LC_K_REAL && g->m >= 2 * NR) {
            gemm_call r = turned(g);
            return run_packed(host, &r, 1, g->ldc, 1, g->ld_add);
        }
    }
    return run_packed(host, g, g->ldc, 1, g->ld_add, 1);
}

int K(gemm)(const lc_host *host, int64_t m, int64_t n, int64_t k, real alpha, const real *a, int64_t a_rs, int64_t a_cs,
            const real *b, int64_t b_rs, int64_t b_cs, real beta, real *c, int64_t ldc) {
    gemm_call g = {.m = m,
                   .n = n,
                   .k = k,
                   .a = a,
                   .b = b,
                   .a_dtype = LC_K_REAL,
                   .b_dtype = LC_K_REAL,
                   .a_rs = a_rs,
                   .a_cs = a_cs,
                   .b_rs = b_rs,
                   .b_cs = b_cs,
                   .alpha = alpha,
                   .beta = beta,
                   .c = c,
                   .ldc = ldc};
    if (beta != 0) g.add = c, g.ld_add = ldc;
    return K(gemm_run)(host, &g);
}
