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

template <class T>
static __device__ __forceinline__ void fetch_step(T *wide, T *low, const grad_part &p, int rows, int step, int column) {
    for (int e = threadIdx.x; e < STEP_ROWS * 16; e += THREADS) {
        const int r = e / 16, piece = e % 16, row = step * STEP_ROWS + r;
        if (piece < 8) {
            const bool in = row < rows && column + 8 * piece < p.columns;
            copy16(tile_at<STEP_ROWS>(wide, r, 8 * piece), (const T *)p.wide + (in ? row * p.ld_wide + column + 8 * piece : 0), in);
        } else {
            const int c = 8 * (piece - 8);
            const bool in = row < rows && c < p.ranks;
            if (c < 8 * MOST_TILES) copy16(tile_at<STEP_ROWS>(low, r, c), (const T *)p.low + (in ? (int64_t)row * p.ld_low + c : 0), in);
        }
    }
    copy_commit();
}

/* N tiles of 8 ranks; those beyond a part's are zeros. */
template <class T, int N> static __global__ void __launch_bounds__(THREADS, 2) adapter_grads(const grad_job j) {
    LC_SHARED(shared);
    T *tiles = (T *)shared; /* [STEPS][wide, low][128][64] */
    const int warp = threadIdx.x / 32, g = (threadIdx.x & 31) / 4, q = threadIdx.x & 3;
    int which = 0;
#pragma unroll
    for (int i = 1; i <= G_PARTS; i++)
        if (j.part[i].ranks && (int)blockIdx.x >= j.part[i].first) which = i;
    const grad_part p = j.part[which];
    const int column = ((int)blockIdx.x - p.first) * COLUMNS, steps = (j.rows + STEP_ROWS - 1) / STEP_ROWS;
    float sum[COLUMNS / 16][N][4] = {};
    for (int s = 0; s < STEPS - 1; s++) {
        if (s < steps) fetch_step(tiles + 2 * s * TILE_HALVES, tiles + (2 * s + 1) * TILE_HALVES, p, j.rows, s, column);
        else copy_commit();
    }
    for (int s = 0; s < steps; s++) {
        copy_wait<STEPS - 2>();
        __syncthreads();
        const int next = s + STEPS - 1;
        T *room = tiles + 2 * (next % STEPS) * TILE_HALVES;
        if (next < steps) fetch_step(room, room + TILE_HALVES, p, j.rows, next, column);
        else copy_commit();
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
    float(*part)[8 * N][COLUMNS + 4] = (float(*)[8 * N][COLUMNS + 4])shared;
#pragma unroll
    for (int m = 0; m < COLUMNS / 16; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) part[warp][8 * n + 2 * q + e % 2][16 * m + g + 8 * (e / 2)] = sum[m][n][e];
    __syncthreads();
    for (int e = threadIdx.x; e < p.ranks * COLUMNS; e += THREADS) {
        const int r = which ? e % p.ranks : e / COLUMNS, c = which ? e / p.ranks : e % COLUMNS;
        if (column + c >= p.columns) continue;
        float v = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) v += part[w][r][c];
        float *to = which ? p.to + (int64_t)(column + c) * p.ranks + r : p.to + (int64_t)r * p.columns + column + c;
        *to += p.scale * v;
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
    return tiles_of(j) <= MOST_TILES;
}

template <class T, int N> static int run_tiles(const grad_job *j, unsigned blocks) {
    const size_t loop = sizeof(T) * STEPS * 2 * TILE_HALVES, sums = sizeof(float) * WARPS * 8 * N * (COLUMNS + 4);
    const size_t shared = loop > sums ? loop : sums;
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
