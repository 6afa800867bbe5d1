/* attention.cuh: the call of softmax attention as its kernels take it. q [b, h, t, d], k and v [b, g, s, d]; the last query sits on
 * key `length` - 1 (s - 1 without length), so query i on key i + offset. The formula stands at the rows in ops.def. */
#ifndef LC_ATTENTION_CUH
#define LC_ATTENTION_CUH

#include "hybrid.cuh"
#include "mma.cuh"

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

/* attention_forward.cu and attention_backward.cu: halves, head dims 64 and 128, by tiles on the tensor cores. */
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

/* Rows first .. first + ROWS - 1 of a head, whose row 0 is at `from`, into a tile of D columns, zeros outside [0, rows); by all
 * threads of the block. */
template <int ROWS, int D, int THREADS, class T>
__device__ __forceinline__ void load_tile(T *tile, const T *from, int stride, int first, int rows) {
    int col = threadIdx.x % (D / 8) * 8, row = threadIdx.x / (D / 8);
#pragma unroll
    for (int n = 0; n < ROWS; n += THREADS / (D / 8)) {
        int at = first + n + row;
        bool valid = (unsigned)at < (unsigned)rows;
        copy16(tile_at<ROWS>(tile, n + row, col), from + (int64_t)(valid ? at : 0) * stride + col, valid);
    }
}

#endif
