/* copy.cu: copies and joins. Copies within a dtype move bytes: in pieces of 16, 8, 4, 2 or 1 byte, whichever the
 * operands allow; a copy that exchanges the dim that lies in one piece goes by tiles through shared memory. */
#include "convert.cuh"
#include "copy.cuh"
#include "elementwise.cuh"
#include "quant.cuh"

/* ---- moving bytes ------------------------------------------------------------------------------------------------ */
enum { AHEAD = 4, TILE = 64, TILE_THREADS = 256, ROWS = TILE_THREADS / 32 };

template <class U> LC_KERNEL move_items(LC_SPAN(2) s) {
    uint32_t step = gridDim.x * blockDim.x;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < s.total; i += AHEAD * step) {
        U u[AHEAD];
        int32_t at[AHEAD][2];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            if (i + a * step >= s.total) continue;
            s.at(i + a * step, at[a]);
            u[a] = *(const U *)(s.p[1] + at[a][1]);
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++)
            if (i + a * step < s.total) *(U *)(s.p[0] + at[a][0]) = u[a];
    }
}

typedef void (*move_fn)(span<2>);
static move_fn move_kernel(int64_t bytes) {
    return bytes == 16  ? move_items<uint4>
           : bytes == 8 ? move_items<uint2>
           : bytes == 4 ? move_items<uint32_t>
           : bytes == 2 ? move_items<uint16_t>
                        : move_items<uint8_t>;
}

/* Tiles of a copy whose source lies in one piece along dim `across` and whose result does so along the last: s walks
 * the corners of the tiles, one a block; rows are `rows` long along `across`, `columns` along the last dim. */
struct tiles {
    span<2> corners;
    int64_t rows, columns;
    int64_t to_step, from_step; /* in bytes: the result's along `across`, the source's along the last dim */
    uint32_t down, over;        /* tiles along each */
};
template <class U> __global__ void __launch_bounds__(TILE_THREADS) move_tiles(const __grid_constant__ tiles t) {
    __shared__ U tile[TILE][TILE + 4 / (sizeof(U) < 4 ? sizeof(U) : 4)];
    int x = threadIdx.x % 32, y = threadIdx.x / 32;
    for (uint32_t b = blockIdx.x; b < t.corners.total * t.down * t.over; b += gridDim.x) {
        int32_t at[2];
        int64_t column = (int64_t)(b % t.over) * TILE, row = (int64_t)(b / t.over % t.down) * TILE;
        t.corners.at(b / t.over / t.down, at);
        const char *from = t.corners.p[1] + at[1] + row * (int64_t)sizeof(U) + column * t.from_step;
        char *to = t.corners.p[0] + at[0] + row * t.to_step + column * (int64_t)sizeof(U);
        int rows = (int)min((int64_t)TILE, t.rows - row), columns = (int)min((int64_t)TILE, t.columns - column);
        U u[TILE / ROWS][TILE / 32]; /* all loads are under way before the first is waited for */
#pragma unroll
        for (int i = 0; i < TILE / ROWS; i++)
#pragma unroll
            for (int j = 0; j < TILE / 32; j++) {
                int c = y + i * ROWS, r = x + j * 32;
                if (c < columns && r < rows) u[i][j] = *(const U *)(from + c * t.from_step + r * (int64_t)sizeof(U));
            }
#pragma unroll
        for (int i = 0; i < TILE / ROWS; i++)
#pragma unroll
            for (int j = 0; j < TILE / 32; j++) tile[y + i * ROWS][x + j * 32] = u[i][j];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TILE / ROWS; i++)
#pragma unroll
            for (int j = 0; j < TILE / 32; j++) {
                int r = y + i * ROWS, c = x + j * 32;
                if (r < rows && c < columns) *(U *)(to + r * t.to_step + c * (int64_t)sizeof(U)) = tile[c][r];
            }
        __syncthreads();
    }
}

/* The dim along which the source lies in one piece, if tiles pay; else -1. */
static int find_across(const walk<2> *w) {
    int last = w->ndim - 1;
    if (w->stride[0][last] != 1 || w->stride[1][last] == 1 || w->dim[last] < 8) return -1;
    for (int i = 0; i < last; i++)
        if (w->stride[1][i] == 1 && w->dim[i] >= 8) return i;
    return -1;
}

static bool move_by_tiles(const operands<2> &a) {
    int across = find_across(&a.w), last = a.w.ndim - 1;
    int64_t bytes = a.bytes[0];
    if (across < 0) return false;
    operands<2> c = a; /* the other dims */
    tiles t;
    t.rows = a.w.dim[across], t.columns = a.w.dim[last];
    t.to_step = a.w.stride[0][across] * bytes, t.from_step = a.w.stride[1][last] * bytes;
    t.down = (uint32_t)ceil_div(t.rows, TILE), t.over = (uint32_t)ceil_div(t.columns, TILE);
    c.w.dim[across] = c.w.dim[last] = 1;
    c.w.total = a.w.total / t.rows / t.columns;
    if (!fits_span(&c) || c.w.total * t.down * t.over > INT32_MAX) return false;
    t.corners = make_span(&c);
    auto kernel = bytes == 8   ? move_tiles<uint2>
                  : bytes == 4 ? move_tiles<uint32_t>
                  : bytes == 2 ? move_tiles<uint16_t>
                               : move_tiles<uint8_t>;
    LC_LAUNCH(kernel, grid_for(c.w.total * t.down * t.over, 1), TILE_THREADS, 0, t);
    return true;
}

/* Operands of one element size. */
static void move(const lc_kargs *k, const operands<2> &a) {
    bool plain = k->host->option(LC_OPTION_PLAIN_POINTWISE);
    int64_t bytes = a.bytes[0], rest;
    auto launch = [&](int64_t item) {
        return [=](const span<2> &s) {
            LC_LAUNCH(move_kernel(item), grid_for(s.total, LC_THREADS * AHEAD), LC_THREADS, 0, s);
        };
    };
    if (a.w.total <= 0 || (!plain && move_by_tiles(a))) return;
    for (int64_t item = 16; item > bytes && !plain; item /= 2) {
        operands<2> v = a;
        if (!make_vectors(&v, (int)(item / bytes), 0, &rest)) continue;
        each_vector(a, (int)(item / bytes), 0, launch(item), launch(bytes));
        return;
    }
    each_span(a, launch(bytes));
}

static int copy_quantised(const lc_kargs *k, const lc_view *dst, const lc_view *src) {
    const lc_dtype_trait *t = lc_dtype_traits(src->dtype);
    int64_t n = view_numel(src);
    if (!view_contiguous(src) || !view_contiguous(dst) || n % t->block) return LC_K_UNSUPPORTED;
    if (dst->dtype != src->dtype) return lc_cuda_dequantise(src->dtype, src->data, dst->dtype, dst->data, n);
    lc_view bytes[2] = {*dst, *src};
    for (int i = 0; i < 2; i++) {
        bytes[i].dtype = LC_K_U8;
        bytes[i].ndim = 1;
        bytes[i].dim[0] = n / t->block * t->bytes;
        bytes[i].stride[0] = 1;
    }
    const lc_view *const v[2] = {&bytes[0], &bytes[1]};
    move(k, make_operands<2>(v));
    return LC_K_OK;
}

int lc_cuda_copy_view(const lc_kargs *k, const lc_view *dst, const lc_view *src) {
    if (lc_dtype_is_quant(src->dtype)) return copy_quantised(k, dst, src);
    if (dst->dtype != src->dtype) return lc_cuda_convert(k, dst, src);
    const lc_view *const v[2] = {dst, src};
    move(k, make_operands<2>(v));
    return LC_K_OK;
}

/* x -> y */
extern "C" int lc_cuda_clone(const lc_kargs *k) { return lc_cuda_copy_view(k, &k->y[0], &k->x[0]); }
/* x[1], expanded -> x[0] */
extern "C" int lc_cuda_copy_(const lc_kargs *k) { return lc_cuda_copy_view(k, &k->x[0], &k->x[1]); }

/* list of tensors -> y, joined along dim i[0] */
extern "C" int lc_cuda_cat(const lc_kargs *k) {
    int dim = k->i[0];
    int64_t at = 0;
    for (int n = 0; n < k->n_list; n++) {
        lc_view part = k->y[0];
        if (!view_numel(&k->list[n])) continue;
        part.dim[dim] = k->list[n].dim[dim];
        part.data = (char *)part.data + at * part.stride[dim] * lc_dtype_traits(part.dtype)->bytes;
        int status = lc_cuda_copy_view(k, &part, &k->list[n]);
        if (status) return status;
        at += k->list[n].dim[dim];
    }
    return LC_K_OK;
}
