/* attention.cuh: the call of softmax attention as its kernels take it. q [b, h, t, d], k and v [b, g, s, d]; the last query sits on
 * key `length` - 1 (s - 1 without length), so query i on key i + offset. The formula stands at the rows in ops.def. Also what the
 * tiled kernels share: the order of blocks, tiles between device and shared memory. */
#ifndef LC_ATTENTION_CUH
#define LC_ATTENTION_CUH

#include "group.cuh"
#include "hybrid.cuh"

#define LOG2E 1.4426950408889634f

struct softmax_call {
    int b, h, g, t, s, d, group, window;
    double scale;
    rows4 q, k, v;
    const int32_t *start, *length;
    int64_t start_stride;
    fault_to fault;
};

static inline int softmax_open(softmax_call *a, const lc_kargs *k, const lc_view *q, const lc_view *start, const lc_view *length) {
    a->b = (int)q->dim[0], a->h = (int)q->dim[1], a->t = (int)q->dim[2], a->d = (int)q->dim[3];
    a->g = (int)q[1].dim[1], a->s = (int)q[1].dim[2];
    a->group = a->g ? a->h / a->g : 1;
    a->window = k->i[0];
    a->scale = k->f[0] != 0 ? k->f[0] : 1 / sqrt((double)a->d);
    a->q = rows4_of(q), a->k = rows4_of(q + 1), a->v = rows4_of(q + 2);
    a->start = (const int32_t *)start->data;
    a->start_stride = start->data ? start->stride[0] : 0;
    a->length = length ? (const int32_t *)length->data : NULL;
    a->fault = fault_here();
    return LC_K_OK;
}

/* Key position of query 0. */
__device__ __forceinline__ int softmax_offset(const softmax_call &a) {
    int filled = a.s;
    if (a.length) {
        filled = *a.length;
        if (filled < 0 || filled > a.s) {
            if (!threadIdx.x && !blockIdx.x && !blockIdx.y && !blockIdx.z) a.fault.report(filled, a.s + 1, 0);
            filled = a.s;
        }
    }
    return filled - a.t;
}
__device__ __forceinline__ int softmax_start(const softmax_call &a, int b) {
    if (!a.start) return 0;
    int s = a.start[b * a.start_stride];
    return s < 0 ? 0 : s < a.s ? s : a.s;
}
/* First key that the query on key position `last` sees. */
__device__ __forceinline__ int softmax_first(const softmax_call &a, int start, int last) {
    return a.window > 0 && last - a.window + 1 > start ? last - a.window + 1 : start;
}

/* attention_forward.cu and attention_backward.cu: halves, head dims 64 and 128, by tiles on the tensor cores; LC_K_UNSUPPORTED where
 * shared memory is too small. */
int softmax_tiles(const lc_kargs *k, const softmax_call &a);
int softmax_tiles_backward(const lc_kargs *k, const softmax_call &a);
size_t softmax_tiles_backward_work(const lc_kargs *k, const softmax_call &a);

/* Tiles are copied in pieces of 16 bytes. */
static inline bool in_pieces(const rows4 &r) {
    return !(r.s[0] % 8 || r.s[1] % 8 || r.s[2] % 8 || (uintptr_t)r.p % 16) && r.s[2] < INT32_MAX;
}
static inline bool softmax_has_tiles(const lc_kargs *k, const softmax_call &a) {
    bool half = a.q.dtype == LC_K_BF16 || a.q.dtype == LC_K_F16;
    return half && (a.d == 64 || a.d == 128) && !k->host->option(LC_OPTION_PLAIN_ATTENTION) && in_pieces(a.q) && in_pieces(a.k) && in_pieces(a.v);
}

/* ---- the order of blocks --------------------------------------------------------------------------------------------- */
/* Blocks are (tile, head), a head's tiles of very different length: tile 0 of all heads comes first, then tile 1 of all, so that with
 * the longest first the short ones fill the gaps. Heads go in chunks whose keys and values stay in the L2 cache. */
struct block_order {
    int tiles, heads, chunk;
    __device__ __forceinline__ void at(int n, int &tile, int &head) const {
        int c = n / (chunk * tiles), r = n - c * chunk * tiles, width = heads - c * chunk < chunk ? heads - c * chunk : chunk;
        tile = r / width, head = c * chunk + r % width;
    }
};
/* `each` heads share `bytes` of what a block reads tile by tile. */
static inline block_order order_blocks(int tiles, int heads, int each, int64_t bytes) {
    int64_t chunk = ((int64_t)16 << 20) / (bytes > 0 ? bytes : 1) * each, most = INT32_MAX / tiles;
    chunk = chunk < each ? each : chunk;
    chunk = chunk < heads ? chunk : heads;
    block_order o = {tiles, heads, (int)(chunk < most ? chunk : most)};
    return o;
}

/* ---- tiles ----------------------------------------------------------------------------------------------------------- */
/* Rows of a head on their way into tiles [ROWS][D] of shared memory, zeros outside [0, rows); by all threads of the block. */
template <int D, int THREADS, class T> struct tile_source {
    enum { EACH = THREADS / (D / 8) }; /* rows at a time: a multiple of 8, so that a thread's pieces are all exchanged alike */
    const T *from;
    int64_t step; /* of EACH rows */
    int stride, rows, row, col;
    __device__ __forceinline__ tile_source(const T *head, int64_t stride, int rows)
        : from(head), step(EACH * stride), stride((int)stride), rows(rows), row(threadIdx.x / (D / 8)), col(threadIdx.x % (D / 8) * 8) {}
    template <int ROWS> __device__ __forceinline__ void copy(T *tile, int first) const {
        T *to = tile_at<ROWS>(tile, row, col);
        if (first >= 0 && first + ROWS <= rows) {
            const T *p = from + (int64_t)(first + row) * stride + col;
#pragma unroll
            for (int n = 0; n < ROWS; n += EACH, p += step) copy16(to + n * 64, p, true);
        } else {
#pragma unroll
            for (int n = 0; n < ROWS; n += EACH) {
                int at = first + n + row;
                bool valid = at >= 0 && at < rows;
                copy16(to + n * 64, from + (int64_t)(valid ? at : 0) * stride + col, valid);
            }
        }
    }
};

template <int N> __device__ __forceinline__ void clear(float (&x)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++) x[n][0] = x[n][1] = x[n][2] = x[n][3] = 0;
    group_hold(x);
}

/* A warp's accumulator x [16][D] times by[r] (rows r * 8 + lane / 4) as rows first .. of `to`, those in [0, rows), by way of rows m ..
 * m + 15 of a tile [ROWS][D] that nobody else uses any more. */
template <int ROWS, int D, class T>
__device__ __forceinline__ void store_rows(T *to, int64_t stride, int first, int rows, T *tile, int m, const float (&x)[D / 8][4], float by0, float by1) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        *(uint32_t *)tile_at<ROWS>(tile, m + lane / 4, n * 8 + (lane & 3) * 2) = pack2<T>(x[n][0] * by0, x[n][1] * by0);
        *(uint32_t *)tile_at<ROWS>(tile, m + lane / 4 + 8, n * 8 + (lane & 3) * 2) = pack2<T>(x[n][2] * by1, x[n][3] * by1);
    }
    __syncwarp();
    int row = lane / (D / 8), col = lane % (D / 8) * 8;
#pragma unroll
    for (int n = 0; n < 16; n += 256 / D) {
        int at = first + n + row;
        if (at < rows) *(int4 *)(to + at * stride + col) = *(const int4 *)tile_at<ROWS>(tile, m + n + row, col);
    }
    __syncwarp();
}

#endif
