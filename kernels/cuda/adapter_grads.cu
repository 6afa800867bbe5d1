/* adapter_grads.cu: the op `projections_grads_`, the gradients of low-rank adapters added to what they have: one launch for all of a call.
 * A block has 64 columns of one gradient's long side and walks all rows, 128 a step: each warp takes 16 of them, so that the sums of the
 * warps are added up at the end, in order. Both operands come through shared memory, asynchronously, three steps under way. */
#include <string.h>

#include "gemm.cuh"
#include "mma.cuh"

enum { G_PARTS = 3, G_A = 0, G_B = 1, G_X = 4, G_LOW = 5, G_GLOW = 6, G_G = 7 };
enum { COLUMNS = 64, STEP_ROWS = 128, WARPS = 8, THREADS = 32 * WARPS, STEPS = 3, TILE_HALVES = STEP_ROWS * 64, MOST_TILES = 6 };

/* One gradient: sum over rows of low [rows, ranks] times wide [rows, columns]. */
struct grad_part {
    const void *wide, *low;
    int64_t ld_wide;
    int32_t ld_low, columns, ranks, first; /* first block of it */
    float scale;
    float *to; /* of A: [ranks, columns]; of B: [columns, ranks] */
};
struct grad_job {
    grad_part part[1 + G_PARTS]; /* of all A, then of each B; ranks 0: not there */
    int32_t rows;
};

/* What a thread copies of a step: a piece of 16 bytes of each of four rows, 32 apart; of low, pieces of one row. */
template <class T> struct fetcher {
    const T *wide, *low;
    int64_t ld;
    int wide_to, row, low_row, low_ld, rows, pieces;
    bool in;

    __device__ __forceinline__ fetcher(const grad_part &p, int n, int column) {
        const int r = threadIdx.x / 8, c = 8 * (threadIdx.x % 8), half = threadIdx.x % 2;
        row = r, low_row = threadIdx.x / 2, rows = n, ld = p.ld_wide;
        in = column + c < p.columns;
        wide = (const T *)p.wide + (in ? r * ld + column + c : 0);
        low = (const T *)p.low + (int64_t)low_row * p.ld_low + 8 * half;
        wide_to = (int)(tile_at<STEP_ROWS>((T *)0, r, c) - (T *)0);
        pieces = (p.ranks / 8 - half + 1) / 2;
        low_ld = p.ld_low;
    }
    /* The next step, into tile and the one behind it. */
    __device__ __forceinline__ void step(T *tile, const grad_part &p) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const bool there = in && row + 32 * i < rows;
            copy16(tile + wide_to + i * 32 * 64, there ? wide + i * 32 * ld : (const T *)p.wide, there);
        }
        const bool there = low_row < rows;
        for (int i = 0; i < pieces; i++)
            copy16(tile_at<STEP_ROWS>(tile + TILE_HALVES, (int)threadIdx.x / 2, 16 * i + 8 * (int)(threadIdx.x % 2)), there ? low + 16 * i : (const T *)p.low, there);
        row += STEP_ROWS, low_row += STEP_ROWS, wide += STEP_ROWS * ld, low += (int64_t)STEP_ROWS * low_ld;
    }
};

/* N: tiles of 8 ranks of the part that has most; a part with fewer makes sums of what lies there, and forgets them. */
template <class T, int N> static __global__ void __launch_bounds__(THREADS, N > 3 ? 1 : 2) adapter_grads(const grad_job j) {
    enum { EACH = 8 * N * COLUMNS / THREADS, AHEAD = N <= 3 ? EACH : 1 };
    LC_SHARED(shared);
    T *tiles = (T *)shared; /* [STEPS][wide, low][128][64] */
    const int warp = threadIdx.x / 32, g = (threadIdx.x & 31) / 4, q = threadIdx.x & 3;
    int which = 0;
#pragma unroll
    for (int i = 1; i <= G_PARTS; i++)
        if (j.part[i].ranks && (int)blockIdx.x >= j.part[i].first) which = i;
    const grad_part p = j.part[which];
    const int column = ((int)blockIdx.x - p.first) * COLUMNS, steps = (j.rows + STEP_ROWS - 1) / STEP_ROWS;
    fetcher<T> f(p, j.rows, column);
    float sum[COLUMNS / 16][N][4] = {};
    for (int s = 0; s < STEPS - 1; s++) {
        if (s < steps) f.step(tiles + 2 * s * TILE_HALVES, p);
        copy_commit();
    }
    /* where this thread's share of the result goes, and what stands there: on its way meanwhile */
    float *to[AHEAD], old[AHEAD];
    int from[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        const int e = threadIdx.x + i * THREADS, r = which ? e % p.ranks : e / COLUMNS, c = which ? e / p.ranks : e % COLUMNS;
        const bool there = e < p.ranks * COLUMNS && column + c < p.columns;
        to[i] = there ? p.to + (which ? (int64_t)(column + c) * p.ranks + r : (int64_t)r * p.columns + column + c) : NULL;
        from[i] = r * (COLUMNS + 4) + c;
        old[i] = there ? *to[i] : 0;
    }
    for (int s = 0; s < steps; s++) {
        copy_wait<STEPS - 2>();
        __syncthreads();
        const int next = s + STEPS - 1;
        if (next < steps) f.step(tiles + 2 * (next % STEPS) * TILE_HALVES, p);
        copy_commit();
        const T *wide = tiles + 2 * (s % STEPS) * TILE_HALVES, *low = wide + TILE_HALVES;
        uint32_t b[(N + 1) / 2][4];
#pragma unroll
        for (int n = 0; n < (N + 1) / 2; n++) fragment_b_t<STEP_ROWS>(b[n], low, 16 * n, 16 * warp);
#pragma unroll
        for (int m = 0; m < COLUMNS / 16; m++) {
            uint32_t a[4];
            fragment_a_t<STEP_ROWS>(a, wide, 16 * m, 16 * warp);
#pragma unroll
            for (int n = 0; n < N; n++) mma16<T>(sum[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
    }
    copy_wait<0>();
    __syncthreads();
    float *part = (float *)shared; /* [WARPS][8 N][COLUMNS + 4] */
    enum { PART = 8 * N * (COLUMNS + 4) };
#pragma unroll
    for (int m = 0; m < COLUMNS / 16; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                part[warp * PART + (8 * n + 2 * q + e % 2) * (COLUMNS + 4) + 16 * m + g + 8 * (e / 2)] = sum[m][n][e];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        if (!to[i]) continue;
        float v = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) v += part[w * PART + from[i]];
        *to[i] = old[i] + p.scale * v;
    }
    for (int e = threadIdx.x + AHEAD * THREADS; e < p.ranks * COLUMNS; e += THREADS) {
        const int r = which ? e % p.ranks : e / COLUMNS, c = which ? e / p.ranks : e % COLUMNS;
        if (column + c >= p.columns) continue;
        float v = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) v += part[w * PART + r * (COLUMNS + 4) + c];
        p.to[which ? (int64_t)(column + c) * p.ranks + r : (int64_t)r * p.columns + column + c] += p.scale * v;
    }
}

/* ---- host ------------------------------------------------------------------------------------------------------------ */
static bool lies16(const void *p, int64_t ld) { return !(((uintptr_t)p | (uintptr_t)(ld * 2)) & 15); }

static int tiles_of(const grad_job *j) {
    int most = 0;
    for (int i = 0; i <= G_PARTS; i++)
        if (j->part[i].ranks / 8 > most) most = j->part[i].ranks / 8;
    return most;
}

/* Bytes of shared memory: of the steps under way, or of the warps' sums behind them. */
static size_t shared_for(int tiles) {
    const size_t loop = 2 * STEPS * 2 * TILE_HALVES, sums = sizeof(float) * WARPS * 8 * tiles * (COLUMNS + 4);
    return loop > sums ? loop : sums;
}

static bool fill_job(const lc_kargs *k, grad_job *j) {
    const lc_view *x = &k->x[G_X], *low = &k->x[G_LOW], *g_low = &k->x[G_GLOW], *ga = &k->x[G_A];
    int32_t blocks = 0, at = 0;
    if (k->host->option(LC_OPTION_PLAIN_LINEAR) || (x->dtype != LC_K_BF16 && x->dtype != LC_K_F16)) return false;
    if (low->dtype != x->dtype || g_low->dtype != x->dtype) return false;
    j->rows = (int32_t)x->dim[0];
    for (int i = 0; i <= G_PARTS; i++) {
        grad_part *p = &j->part[i];
        const lc_view *wide = i ? &k->x[G_G + i - 1] : x, *to = i ? &k->x[G_B + i - 1] : ga, *l = i ? low : g_low;
        if (!to->data) continue;
        p->wide = wide->data, p->ld_wide = wide->stride[0], p->columns = (int32_t)wide->dim[1];
        p->ranks = (int32_t)to->dim[i ? 1 : 0], p->first = blocks, p->scale = i ? (float)k->f[i - 1] : 1;
        p->low = (const char *)l->data + 2 * (i ? at : 0), p->ld_low = (int32_t)l->stride[0], p->to = (float *)to->data;
        at += i ? p->ranks : 0;
        blocks += (int32_t)ceil_div(p->columns, COLUMNS);
        if (wide->dtype != x->dtype || to->dtype != LC_K_F32 || p->ranks % 8 || p->columns % 8) return false;
        if (!lies16(p->wide, p->ld_wide) || !lies16(p->low, p->ld_low)) return false;
    }
    return tiles_of(j) <= MOST_TILES && shared_for(tiles_of(j) > 3 ? MOST_TILES : tiles_of(j)) <= lc_cuda_now->shared_max;
}

template <class T, int N> static int run_tiles(const grad_job *j, unsigned blocks) {
    const size_t shared = shared_for(N);
    if (allow_shared(adapter_grads<T, N>, shared)) return LC_K_DEVICE;
    LC_LAUNCH((adapter_grads<T, N>), blocks, THREADS, shared, *j);
    return LC_K_OK;
}

template <class T> static int run_job(const grad_job *j, unsigned blocks) {
    switch (tiles_of(j)) {
    case 1: return run_tiles<T, 1>(j, blocks);
    case 2: return run_tiles<T, 2>(j, blocks);
    case 3: return run_tiles<T, 3>(j, blocks);
    default: return run_tiles<T, 6>(j, blocks);
    }
}

/* ga [sum of r_i, in] += g_low [rows, ..]^T x [rows, in]; gb_i [out_i, r_i] += scale_i g_i [rows, out_i]^T low_i [rows, r_i] */
extern "C" int lc_cuda_projections_grads_(const lc_kargs *k) {
    grad_job j = {};
    const lc_view *x = &k->x[G_X], *low = &k->x[G_LOW], *g_low = &k->x[G_GLOW], *ga = &k->x[G_A];
    if (!x->dim[0]) return LC_K_OK;
    if (fill_job(k, &j)) {
        int64_t blocks = ceil_div(x->dim[1], COLUMNS);
        for (int i = 0; i < G_PARTS; i++)
            if (k->x[G_B + i].data) blocks += ceil_div(k->x[G_B + i].dim[0], COLUMNS);
        return x->dtype == LC_K_BF16 ? run_job<bf16>(&j, (unsigned)blocks) : run_job<f16>(&j, (unsigned)blocks);
    }
    const int64_t rows = x->dim[0], in = x->dim[1];
    int rc = lc_cuda_gemm(1, 0, ga->dim[0], in, rows, 1, g_low->data, g_low->dtype, g_low->stride[0], x->data, x->dtype, x->stride[0], 1,
                          ga->data, in, ga->data, ga->dtype, in);
    for (int64_t i = 0, at = 0; i < G_PARTS && !rc; i++) {
        const lc_view *g = &k->x[G_G + i], *gb = &k->x[G_B + i];
        if (!gb->data) continue;
        const int64_t r = gb->dim[1], out = gb->dim[0];
        rc = lc_cuda_gemm(1, 0, out, r, rows, k->f[i], g->data, g->dtype, g->stride[0], (char *)low->data + at * dtype_bytes(low->dtype),
                          low->dtype, low->stride[0], 1, gb->data, r, gb->data, gb->dtype, r);
        at += r;
    }
    return rc;
}
