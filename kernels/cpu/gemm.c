/* gemm.c: our own packed matrix product. C is cut into a grid of tasks, one a thread; a task walks blocks of NC columns and KC of the
 * inner dim, packs that block of B into panels of NR columns (in the second-level cache), copies MR rows of A at a time (first-level
 * cache) and runs the microkernel over the panels. Weights of other dtypes become reals while they are packed. Every element of C is
 * summed in one order, whatever the number of threads. The double instance is the same code on shorter vectors. */
#include "gemm.h"

#if LC_VBYTES == 64
enum { MR = 14, A_STEP = 16 };
#else
enum { MR = 6, A_STEP = 8 };
#endif
enum { NV = 2, NR = NV * VL, KC = 384, A_LD = KC + 16, SMALL = 1 << 16 };

/* ---- microkernel ------------------------------------------------------------------------------------------------------- */

/* c [mr, nv * VL] = alpha * sum over kc of a b + beta * add + bias. Element (i, k) of the copied a is a[i * A_LD + k] if by_rows, else
 * a[k * A_STEP + i]; row k of b is at b + k * ldb. */
typedef struct tile {
    const real *a, *b, *add, *bias;
    real *c;
    int64_t kc, ldb, ld_add, ldc;
    real alpha, beta;
} tile;

#define ROWS_(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13)
#define ROW_DECLARE(i) vreal c##i##_0 = {0}, c##i##_1 = {0};
#define ROW_STEP(i)                                            \
    if (mr > i) {                                              \
        vreal s = vset(by_rows ? a[i * A_LD] : a[i]);          \
        c##i##_0 += s * b0;                                    \
        if (nv > 1) c##i##_1 += s * b1;                        \
    }
#define ROW_STORE(i)                                                                            \
    if (mr > i) {                                                                               \
        vstore(c, c##i##_0 * alpha + (vload(add) * beta + bias0));                              \
        if (nv > 1) vstore(c + VL, c##i##_1 * alpha + (vload(add + VL) * beta + bias1));        \
        c += t->ldc, add += t->ld_add;                                                          \
    }

static inline __attribute__((always_inline)) void tile_body(const tile *t, const int mr, const int nv, const int by_rows) {
    const real *a = t->a, *b = t->b;
    const int64_t ldb = t->ldb;
    ROWS_(ROW_DECLARE)
    for (int64_t k = t->kc; k > 0; k--) {
        vreal b0 = vload(b), b1 = nv > 1 ? vload(b + VL) : b0;
        ROWS_(ROW_STEP)
        a += by_rows ? 1 : A_STEP;
        b += ldb;
    }
    const real *add = t->add;
    real *c = t->c;
    vreal alpha = vset(t->alpha), beta = vset(t->beta), bias0 = vload(t->bias), bias1 = nv > 1 ? vload(t->bias + VL) : bias0;
    ROWS_(ROW_STORE)
}

typedef void (*tile_fn)(const tile *t);
#define TILE(mr)                                                          \
    static void tile_##mr##_10(const tile *t) { tile_body(t, mr, 1, 0); } \
    static void tile_##mr##_11(const tile *t) { tile_body(t, mr, 1, 1); } \
    static void tile_##mr##_20(const tile *t) { tile_body(t, mr, 2, 0); } \
    static void tile_##mr##_21(const tile *t) { tile_body(t, mr, 2, 1); }
#define TILE_ROW(mr) {tile_##mr##_10, tile_##mr##_11, tile_##mr##_20, tile_##mr##_21},
TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#if LC_VBYTES == 64
TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12) TILE(13) TILE(14)
#endif
static const tile_fn tiles[MR][4] = {
    TILE_ROW(1) TILE_ROW(2) TILE_ROW(3) TILE_ROW(4) TILE_ROW(5) TILE_ROW(6)
#if LC_VBYTES == 64
    TILE_ROW(7) TILE_ROW(8) TILE_ROW(9) TILE_ROW(10) TILE_ROW(11) TILE_ROW(12) TILE_ROW(13) TILE_ROW(14)
#endif
};

static const real zeros[NR];

/* ---- packing ----------------------------------------------------------------------------------------------------------- */

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

/* Columns [j, j + n) and inner [k0, k0 + kc) of b to dst[k * NR + 0 .. VL), the rest zero; n <= VL. t holds VL x KC reals. */
static void pack_columns(const gemm_call *g, int64_t j, int64_t n, int64_t k0, int64_t kc, real *dst, real *t) {
    const real *b = g->b;
    if (g->b_rs == 1 && g->b_dtype == LC_K_REAL && n == VL) {
        pack_transposed(b + j * g->b_cs + k0, g->b_cs, kc, dst);
    } else if (g->b_rs == 1 && n > 0) {
        for (int64_t i = 0; i < VL; i++) {
            if (i < n) row_to_real(g->b_dtype, gemm_at(g->b, g->b_dtype, (j + i) * g->b_cs + k0), t + i * KC, kc);
            else memset(t + i * KC, 0, (size_t)kc * sizeof(real));
        }
        pack_transposed(t, KC, kc, dst);
    } else if (g->b_cs == 1 && n == VL) {
        for (int64_t k = 0; k < kc; k++) vstore(dst + k * NR, vload(b + (k0 + k) * g->b_rs + j));
    } else {
        for (int64_t k = 0; k < kc; k++)
            for (int64_t i = 0; i < VL; i++) dst[k * NR + i] = i < n ? b[(k0 + k) * g->b_rs + (j + i) * g->b_cs] : 0;
    }
}

/* mr rows from i0 and kc of the inner dim from k0 of a, into the layout that it suits. Returns by_rows. */
static int copy_a(const gemm_call *g, int64_t i0, int64_t mr, int64_t k0, int64_t kc, real *dst) {
    if (g->a_cs == 1) {
        for (int64_t i = 0; i < mr; i++)
            row_to_real(g->a_dtype, gemm_at(g->a, g->a_dtype, (i0 + i) * g->a_rs + k0), dst + i * A_LD, kc);
        return 1;
    }
    const real *a = (const real *)g->a + i0 * g->a_rs + k0 * g->a_cs;
    if (g->a_rs == 1) {
        for (int64_t k = 0; k < kc; k++)
            for (int64_t i = 0; i < mr; i++) dst[k * A_STEP + i] = a[k * g->a_cs + i];
        return 0;
    }
    for (int64_t i = 0; i < mr; i++)
        for (int64_t k = 0; k < kc; k++) dst[i * A_LD + k] = a[i * g->a_rs + k * g->a_cs];
    return 1;
}

/* ---- blocks ------------------------------------------------------------------------------------------------------------ */

typedef struct job {
    const gemm_call *g;
    int64_t mt, nt;   /* tasks down and across */
    int64_t kc, nc;
    int failed;
} job;

/* Rows [i0, i0 + mr) of one block of C: columns [j0, j1), inner [k0, k0 + kc). `packed` has its panels, or is NULL where whole panels
 * are read from b itself and `last` holds the panel that is not whole. */
static void run_rows(const gemm_call *g, int64_t i0, int64_t mr, int64_t j0, int64_t j1, int64_t k0, int64_t kc, const real *a,
                     int by_rows, const real *packed, const real *last) {
    tile t = {.a = a, .kc = kc, .alpha = g->alpha};
    real *c = g->c + i0 * g->ldc;
    const real *add = k0 ? c : g->add ? g->add + i0 * g->ld_add : zeros;
    int64_t ld_add = k0 ? g->ldc : g->add ? g->ld_add : 0;
    int add_moves = k0 || g->add;
    t.beta = k0 ? 1 : g->beta;
    for (int64_t j = j0; j < j1; j += NR) {
        int64_t n = LC_MIN(j1 - j, NR), nv = n > VL ? 2 : 1;
        if (packed) t.b = packed + (j - j0) * kc, t.ldb = NR;
        else if (n == NR) t.b = (const real *)g->b + k0 * g->b_rs + j, t.ldb = g->b_rs;
        else t.b = last, t.ldb = NR;
        tile_fn fn = tiles[mr - 1][(nv - 1) * 2 + by_rows];
        const real *bias = k0 || !g->bias ? zeros : g->bias + j;
        if (n == nv * VL) {
            t.c = c + j, t.ldc = g->ldc;
            t.add = add_moves ? add + j : zeros, t.ld_add = ld_add;
            t.bias = bias;
            fn(&t);
            continue;
        }
        real edge[MR * NR];
        t.c = edge, t.ldc = NR, t.add = zeros, t.ld_add = 0, t.bias = zeros;
        fn(&t);
        for (int64_t i = 0; i < mr; i++)
            for (int64_t l = 0; l < n; l++) {
                real v = edge[i * NR + l];
                if (bias != zeros) v += bias[l];
                if (add_moves) v += t.beta * add[i * ld_add + j + l];
                c[i * g->ldc + j + l] = v;
            }
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
            for (int64_t p = direct ? je - (je - j) % NR : j; p < je; p += NR) {
                real *dst = packed + (direct ? 0 : (p - j) * kc);
                pack_columns(g, p, LC_MIN(je - p, VL), k0, kc, dst, t);
                if (je - p > VL) pack_columns(g, p + VL, LC_MIN(je - p - VL, VL), k0, kc, dst + VL, t);
            }
            for (int64_t b = 0, i = i0; b < bands; b++) {
                int64_t mr = m / bands + (b < m % bands);
                int by_rows = copy_a(g, i, mr, k0, kc, a);
                run_rows(g, i, mr, j, je, k0, kc, a, by_rows, direct ? NULL : packed, packed);
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

/* How to cut m rows and n columns among `threads`: the longest task's cost in microkernel steps, plus packing B and copying A. */
static void choose_grid(const gemm_call *g, int threads, int64_t nc, int64_t *mt, int64_t *nt) {
    double best = INFINITY;
    for (int64_t r = 1; r <= threads; r++) {
        int64_t q = threads / r;
        double rows = (double)((g->m + r - 1) / r), bands = (double)((g->m + r * MR - 1) / (r * MR));
        double panels = (double)(((g->n + NR - 1) / NR + q - 1) / q), passes = (double)((panels * NR + nc - 1) / nc);
        double cost = bands * panels * MR + panels * NR * (g->b_rs == 1 ? .35 : .15) + rows * .25 * passes;
        if (cost < best) best = cost, *mt = r, *nt = q;
    }
}

/* ---- oneDNN -------------------------------------------------------------------------------------------------------------- */

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
    if (lc_onednn_sgemm(ta, tb, m1 - m0, n1 - n0, g->k, g->alpha, a, ta ? g->a_cs : g->a_rs, b, tb ? g->b_cs : g->b_rs, beta,
                        g->c + m0 * g->ldc + n0, g->ldc)) {
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

static int dnn_run(const lc_host *host, const gemm_call *g, int threads) {
    int a_ok = (g->a_cs == 1 && g->a_rs >= g->k) || (g->a_rs == 1 && g->a_cs >= g->m);
    int b_ok = (g->b_cs == 1 && g->b_rs >= g->n) || (g->b_rs == 1 && g->b_cs >= g->k);
    if (g->a_dtype != LC_K_F32 || g->b_dtype != LC_K_F32 || !a_ok || !b_ok || g->k < 1 || g->ldc < g->n) return 1;
    if (g->add == g->c && g->add && g->ld_add != g->ldc) return 1;
    dnn_job w = {g, threads, 0};
    if (threads > 1) host->parallel(threads, 1, dnn_parts, &w);
    else dnn_parts(&w, 0, 1, 0);
    return w.failed;
}
#endif

/* ---- entry --------------------------------------------------------------------------------------------------------------- */

static void run_empty(const gemm_call *g) {
    for (int64_t i = 0; i < g->m; i++)
        for (int64_t j = 0; j < g->n; j++)
            g->c[i * g->ldc + j] = (g->add ? g->beta * g->add[i * g->ld_add + j] : 0) + (g->bias ? g->bias[j] : 0);
}

int K(gemm_run)(const lc_host *host, const gemm_call *g) {
    if (g->m < 1 || g->n < 1) return LC_K_OK;
    if (g->k < 1) {
        run_empty(g);
        return LC_K_OK;
    }
    if (g->m <= GEMV_ROWS && g->b_rs == 1 && g->a_cs == 1 && g->a_dtype == LC_K_REAL) {
        K(gemv_run)(host, g, g->ldc, 1, g->ld_add, 1);
        return LC_K_OK;
    }
    if (g->n <= GEMV_ROWS && g->b_rs == 1 && g->a_cs == 1 && g->b_dtype == LC_K_REAL && !g->bias) {
        gemm_call r = *g; /* c^T = b^T a^T: a is the weight */
        r.m = g->n, r.n = g->m, r.a = g->b, r.b = g->a, r.a_dtype = g->b_dtype, r.b_dtype = g->a_dtype;
        r.a_rs = g->b_cs, r.b_cs = g->a_rs;
        K(gemv_run)(host, &r, 1, g->ldc, 1, g->ld_add);
        return LC_K_OK;
    }
    int threads = host && (double)g->m * (double)g->n * (double)g->k > SMALL ? host->threads() : 1;
#if !LC_DOUBLE
    if (lc_onednn_active() && dnn_run(host, g, threads) == 0) return LC_K_OK;
#endif
    const lc_dtype_trait *bt = lc_dtype_traits(g->b_dtype);
    int64_t grain = LC_MAX(8, bt->block), kmax = KC / grain * grain, blocks = (g->k + kmax - 1) / kmax;
    job w = {.g = g, .mt = 1, .nt = 1};
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

int K(gemm)(const lc_host *host, int64_t m, int64_t n, int64_t k, real alpha, const real *a, int64_t a_rs, int64_t a_cs, const real *b,
            int64_t b_rs, int64_t b_cs, real beta, real *c, int64_t ldc) {
    gemm_call g = {.m = m, .n = n, .k = k, .a = a, .b = b, .a_dtype = LC_K_REAL, .b_dtype = LC_K_REAL, .a_rs = a_rs, .a_cs = a_cs,
                   .b_rs = b_rs, .b_cs = b_cs, .alpha = alpha, .beta = beta, .c = c, .ldc = ldc};
    if (beta != 0) g.add = c, g.ld_add = ldc;
    return K(gemm_run)(host, &g);
}
