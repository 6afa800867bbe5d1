/* index.cu: reading and writing by integer indices (selection by masks is in the pointwise files). Ids are int32, int64
 * or uint8, contiguous, and count from 0; one out of range is reported, what it would have read is 0, and what it would
 * have written is left out. Elements are moved by size, 16 bytes at a time where rows allow. Sums run in the order of
 * the ids: no atomics. */
#include "quant.cuh"
#include "reduce.cuh"

enum { BLOCK = 256, PLACES = 4096 };

static bool is_ids(const lc_view *v) { return v->dtype == LC_K_I32 || v->dtype == LC_K_I64 || v->dtype == LC_K_U8; }

/* Whether id is in [0, limit); reports it otherwise. */
__device__ __forceinline__ bool id_good(int64_t id, int64_t limit, int64_t at, const fault_to &fault) {
    if (id >= 0 && id < limit) return true;
    fault.report(id, limit, at);
    return false;
}

/* ---- rows by ids ---------------------------------------------------------------------------------------------- */
/* x [outer, rows, width] by ids [n] -> y [outer, n, width]; width counts U (or, quantised, eight elements) */
typedef struct take_job {
    const void *x, *ids;
    void *y;
    int id_dtype;
    int64_t outer, rows, n, width;
} take_job;

template <class U> __global__ void __launch_bounds__(BLOCK) take_rows(const take_job j, const fault_to fault) {
    const int64_t total = j.outer * j.n * j.width, step = (int64_t)gridDim.x * BLOCK;
    for (int64_t e = (int64_t)blockIdx.x * BLOCK + threadIdx.x; e < total; e += step) {
        int64_t r, c;
        if (total <= 0x7fffffff)
            r = (uint32_t)e / (uint32_t)j.width;
        else
            r = e / j.width;
        c = e - r * j.width;
        int64_t o = r / j.n, i = r - o * j.n, id = id_at(j.ids, j.id_dtype, i);
        U v;
        if (id_good(id, j.rows, i, fault))
            v = ((const U *)j.x)[(o * j.rows + id) * j.width + c];
        else
            memset(&v, 0, sizeof v);
        ((U *)j.y)[e] = v;
    }
}

/* A thread takes eight elements of a block-quantised row; y is f32. */
template <int Q> __global__ void __launch_bounds__(BLOCK) take_quantised(const take_job j, const fault_to fault) {
    const int64_t total = j.n * j.width, step = (int64_t)gridDim.x * BLOCK;
    const int groups = lc_quant<Q>::block / 8;
    for (int64_t e = (int64_t)blockIdx.x * BLOCK + threadIdx.x; e < total; e += step) {
        int64_t r = e / j.width, c = e - r * j.width, id = id_at(j.ids, j.id_dtype, r);
        float v[8] = {0};
        if (id_good(id, j.rows, r, fault)) {
            const uint8_t *b = (const uint8_t *)j.x + (id * (j.width / groups) + c / groups) * lc_quant<Q>::bytes;
            dequantise_eight<Q>(b, (int)(c % groups), v);
        }
        store_pack<8>((float *)j.y + e * 8, v);
    }
}

static int run_take(take_job j, int64_t bytes) {
    const uintptr_t together = (uintptr_t)j.x | (uintptr_t)j.y | (uintptr_t)(bytes * j.width);
    const fault_to fault = fault_here();
    int64_t unit = together % 16 == 0 ? 16 : bytes;
    j.width = j.width * bytes / unit;
    unsigned grid = grid_for(j.outer * j.n * j.width, BLOCK);
    switch (unit) {
    case 16: LC_LAUNCH(take_rows<int4>, grid, BLOCK, 0, j, fault); break;
    case 8: LC_LAUNCH(take_rows<uint64_t>, grid, BLOCK, 0, j, fault); break;
    case 4: LC_LAUNCH(take_rows<uint32_t>, grid, BLOCK, 0, j, fault); break;
    case 2: LC_LAUNCH(take_rows<uint16_t>, grid, BLOCK, 0, j, fault); break;
    default: LC_LAUNCH(take_rows<uint8_t>, grid, BLOCK, 0, j, fault);
    }
    return LC_K_OK;
}

static int run_take_quantised(take_job j, int dtype) {
    const fault_to fault = fault_here();
    j.width /= 8;
    LC_QUANTS(dtype, LC_LAUNCH(take_quantised<Q>, grid_for(j.n * j.width, BLOCK), BLOCK, 0, j, fault);)
    return LC_K_OK;
}

static int take(const lc_kargs *k, int dim) {
    const lc_view *x = &k->x[0], *ids = &k->x[1], *y = &k->y[0];
    take_job j = {x->data, ids->data, y->data, ids->dtype, 1, x->dim[dim], view_numel(ids), 1};
    for (int i = 0; i < dim; i++) j.outer *= x->dim[i];
    for (int i = dim + 1; i < x->ndim; i++) j.width *= x->dim[i];
    if (!is_ids(ids)) return LC_K_UNSUPPORTED;
    if (!j.outer || !j.n || !j.width) return LC_K_OK;
    if (lc_dtype_is_quant(x->dtype))
        return y->dtype == LC_K_F32 && !dim ? run_take_quantised(j, x->dtype) : LC_K_UNSUPPORTED;
    return x->dtype == y->dtype ? run_take(j, lc_dtype_traits(x->dtype)->bytes) : LC_K_UNSUPPORTED;
}

/* ---- gradient of embedding ------------------------------------------------------------------------------------ */
static __global__ void __launch_bounds__(BLOCK) fill_zero(char *y, int64_t bytes) { /* y lies on 16 bytes */
    const int64_t packs = bytes / 16, step = (int64_t)gridDim.x * BLOCK,
                  first = (int64_t)blockIdx.x * BLOCK + threadIdx.x;
    for (int64_t e = first; e < packs; e += step) ((int4 *)y)[e] = make_int4(0, 0, 0, 0);
    for (int64_t e = packs * 16 + first; e < bytes; e += step) y[e] = 0;
}

/* g [n, d]  ids [n]  ->  rows ids[i] of y [rows, d]. Block (i, tile of columns): the first i of an id sums all of that
 * id. */
template <class T, int V>
__global__ void __launch_bounds__(BLOCK) embedding_rows(const T *g, const void *ids, int id_dtype, T *y, int64_t n,
                                                        int64_t d, int64_t rows, const fault_to fault) {
    typedef real_of<T> R;
    __shared__ uint32_t hits[BLOCK / 32];
    const int64_t i = blockIdx.x, id = id_at(ids, id_dtype, i),
                  column = ((int64_t)blockIdx.y * BLOCK + threadIdx.x) * V;
    if (id < 0 || id >= rows) {
        if (!blockIdx.y && !threadIdx.x) fault.report(id, rows, i);
        return;
    }
    for (int64_t from = 0; from < i; from += BLOCK) { /* is there an earlier one? */
        int64_t e = from + threadIdx.x;
        if (__syncthreads_or(e < i && id_at(ids, id_dtype, e) == id)) return;
    }
    R acc[V];
#pragma unroll
    for (int c = 0; c < V; c++) acc[c] = 0;
    for (int64_t from = i; from < n; from += BLOCK) {
        int64_t e = from + threadIdx.x;
        uint32_t mine = __ballot_sync(0xffffffffu, e < n && id_at(ids, id_dtype, e) == id);
        if (!(threadIdx.x & 31)) hits[threadIdx.x >> 5] = mine;
        __syncthreads();
        for (int w = 0; w < BLOCK / 32 && column < d; w++)
            for (uint32_t left = hits[w]; left; left &= left - 1) {
                R v[V];
                load_pack<V>(g + (from + w * 32 + __ffs((int)left) - 1) * d + column, v);
#pragma unroll
                for (int c = 0; c < V; c++) acc[c] += v[c];
            }
        __syncthreads();
    }
    if (column < d) store_pack<V>(y + id * d + column, acc);
}

template <class T> static int run_embedding_backward(const lc_kargs *k) {
    constexpr int V = pack_of<T>();
    const lc_view *ids = &k->x[1], *y = &k->y[0];
    const int64_t n = view_numel(ids), rows = y->dim[0], d = y->dim[1];
    const T *g = (const T *)k->x[0].data;
    T *out = (T *)y->data;
    const fault_to fault = fault_here();
    LC_LAUNCH(fill_zero, grid_for(rows * d, BLOCK * V), BLOCK, 0, (char *)out, rows * d * (int64_t)sizeof(T));
    if (!n) return LC_K_OK;
    if (d % V == 0 && aligned16(g) && aligned16(out))
        LC_LAUNCH((embedding_rows<T, V>), dim3((unsigned)n, (unsigned)ceil_div(d, BLOCK * V)), BLOCK, 0, g, ids->data,
                  ids->dtype, out, n, d, rows, fault);
    else
        LC_LAUNCH((embedding_rows<T, 1>), dim3((unsigned)n, (unsigned)ceil_div(d, BLOCK)), BLOCK, 0, g, ids->data,
                  ids->dtype, out, n, d, rows, fault);
    return LC_K_OK;
}

/* ---- elements by ids: the indexed tensor is walked with a stride of 0 along the dim, to which the id adds its own  */
static lc_view indexed_view(const lc_view *v, const lc_view *ids, int dim) {
    lc_view out = *v;
    for (int i = 0; i < v->ndim; i++) out.dim[i] = ids->dim[i];
    if (v->ndim) out.stride[dim] = 0;
    return out;
}

/* y = x[.., ids[..], ..]: the walk goes over y, ids, x */
template <class U>
__global__ void __launch_bounds__(BLOCK) gather_elements(const U *x, const void *ids, int id_dtype, U *y, int64_t along,
                                                         int64_t limit, const walk<3> w, const fault_to fault) {
    for (int64_t e = (int64_t)blockIdx.x * BLOCK + threadIdx.x; e < w.total; e += (int64_t)gridDim.x * BLOCK) {
        int64_t at[3];
        walk_at(w, e, at);
        int64_t id = id_at(ids, id_dtype, at[1]);
        y[at[0]] = id_good(id, limit, at[1], fault) ? x[at[2] + id * along] : (U)0;
    }
}

/* What scatter_add sums in: acc [..] has y's places; a place is a position outside the dim, along which go n ids. */
typedef struct scatter_job {
    void *acc;
    const void *ids, *src;
    int id_dtype;
    int64_t n, along, id_step, src_step, limit;
    walk<3> places; /* acc, ids, src */
} scatter_job;

/* A thread a place. */
template <class T>
__global__ void __launch_bounds__(BLOCK) scatter_by_place(const scatter_job j, const fault_to fault) {
    typedef real_of<T> R;
    for (int64_t e = (int64_t)blockIdx.x * BLOCK + threadIdx.x; e < j.places.total; e += (int64_t)gridDim.x * BLOCK) {
        int64_t at[3];
        walk_at(j.places, e, at);
        for (int64_t i = 0; i < j.n; i++) {
            int64_t id = id_at(j.ids, j.id_dtype, at[1] + i * j.id_step);
            if (id_good(id, j.limit, at[1] + i * j.id_step, fault))
                ((R *)j.acc)[at[0] + id * j.along] += load<R>(((const T *)j.src)[at[2] + i * j.src_step]);
        }
    }
}

/* A block a place, BLOCK ids at a time: the first of each id among them adds all of that id. */
template <class T>
__global__ void __launch_bounds__(BLOCK) scatter_by_block(const scatter_job j, const fault_to fault) {
    typedef real_of<T> R;
    __shared__ int64_t ids[BLOCK];
    int64_t at[3];
    walk_at(j.places, blockIdx.x, at);
    for (int64_t from = 0; from < j.n; from += BLOCK) {
        int64_t e = from + threadIdx.x, id = -1;
        if (e < j.n) id = id_at(j.ids, j.id_dtype, at[1] + e * j.id_step);
        if (e < j.n && !id_good(id, j.limit, at[1] + e * j.id_step, fault)) id = -1;
        ids[threadIdx.x] = id;
        __syncthreads();
        bool first = id >= 0;
        for (int i = 0; i < (int)threadIdx.x && first; i++) first = ids[i] != id;
        if (first) {
            R *to = (R *)j.acc + at[0] + id * j.along, sum = *to;
            for (int i = threadIdx.x; i < BLOCK; i++)
                if (ids[i] == id) sum += load<R>(((const T *)j.src)[at[2] + (from + i) * j.src_step]);
            *to = sum;
        }
        __syncthreads();
    }
}

/* to = from, converted; n elements */
template <class D, class S> __global__ void __launch_bounds__(BLOCK) copy_flat(D *to, const S *from, int64_t n) {
    for (int64_t e = (int64_t)blockIdx.x * BLOCK + threadIdx.x; e < n; e += (int64_t)gridDim.x * BLOCK)
        to[e] = store<D>(load<real_of<S>>(from[e]));
}

template <class T> static int run_scatter(const lc_kargs *k, scatter_job j, int64_t n) {
    typedef real_of<T> R;
    const fault_to fault = fault_here();
    R *acc = (R *)(sizeof(T) == 2 ? k->work : k->y[0].data); /* halves are summed in f32 */
    LC_LAUNCH((copy_flat<R, T>), grid_for(n, BLOCK), BLOCK, 0, acc, (const T *)k->x[0].data, n);
    j.acc = acc;
    if (j.places.total && j.n) {
        if (j.places.total < PLACES && j.n > 32)
            LC_LAUNCH(scatter_by_block<T>, (unsigned)j.places.total, BLOCK, 0, j, fault);
        else
            LC_LAUNCH(scatter_by_place<T>, grid_for(j.places.total, BLOCK), BLOCK, 0, j, fault);
    }
    if (sizeof(T) == 2)
        LC_LAUNCH((copy_flat<T, R>), grid_for(n, BLOCK), BLOCK, 0, (T *)k->y[0].data, (const R *)acc, n);
    return LC_K_OK;
}

/* ---- entries -------------------------------------------------------------------------------------------------- */
extern "C" {
/* w [n, d] of any dtype, ids [..] -> y [.., d] */
int lc_cuda_embedding(const lc_kargs *k) { return take(k, 0); }
int lc_cuda_index_select(const lc_kargs *k) { return take(k, k->i[0]); }

/* x[0] = g [.., d], x[1] = ids [..] -> y [rows, d] */
int lc_cuda_embedding_backward(const lc_kargs *k) {
    const lc_view *g = &k->x[0], *y = &k->y[0];
    if (g->dtype != y->dtype || !is_ids(&k->x[1])) return LC_K_UNSUPPORTED;
    if (!view_numel(y)) return LC_K_OK;
    LC_FLOATS(g->dtype, return run_embedding_backward<T>(k);)
    return LC_K_OK;
}

/* x, ids -> y[.., p, ..] = x[.., ids[.., p, ..], ..] along dim i[0] */
int lc_cuda_gather(const lc_kargs *k) {
    const lc_view *x = &k->x[0], *ids = &k->x[1], *y = &k->y[0];
    const int dim = k->i[0];
    if (!is_ids(ids) || x->dtype != y->dtype || lc_dtype_is_quant(x->dtype)) return LC_K_UNSUPPORTED;
    if (!view_numel(ids)) return LC_K_OK;
    lc_view from = indexed_view(x, ids, dim);
    walk<3> w = make_walk<3>({y, ids, &from});
    const int64_t along = x->ndim ? x->stride[dim] : 0, limit = x->ndim ? x->dim[dim] : 1;
    const fault_to fault = fault_here();
    const unsigned grid = grid_for(w.total, BLOCK);
#define GATHER(U)                                                                                                      \
    LC_LAUNCH(gather_elements<U>, grid, BLOCK, 0, (const U *)x->data, ids->data, ids->dtype, (U *)y->data, along,      \
              limit, w, fault)
    switch (lc_dtype_traits(x->dtype)->bytes) {
    case 8: GATHER(uint64_t); break;
    case 4: GATHER(uint32_t); break;
    case 2: GATHER(uint16_t); break;
    default: GATHER(uint8_t);
    }
#undef GATHER
    return LC_K_OK;
}

/* work: halves are summed in f32 */
size_t lc_cuda_scatter_add_work(const lc_kargs *k) {
    return k->x[0].dtype == LC_K_BF16 || k->x[0].dtype == LC_K_F16 ? (size_t)view_numel(&k->x[0]) * sizeof(float) : 0;
}

/* x, ids, src -> y = x, then y[.., ids[.., p, ..], ..] += src[.., p, ..] along dim i[0] */
int lc_cuda_scatter_add(const lc_kargs *k) {
    const lc_view *x = &k->x[0], *src = &k->x[2], *y = &k->y[0];
    lc_view ids = k->x[1];
    const int dim = k->i[0];
    if (!is_ids(&ids) || src->dtype != x->dtype || y->dtype != x->dtype) return LC_K_UNSUPPORTED;
    if (!view_numel(x)) return LC_K_OK;
    scatter_job j;
    j.acc = NULL, j.ids = ids.data, j.src = src->data, j.id_dtype = ids.dtype;
    j.n = 1, j.along = j.id_step = j.src_step = 0, j.limit = 1;
    if (x->ndim) {
        j.n = ids.dim[dim];
        j.limit = x->dim[dim];
        j.along = y->stride[dim], j.id_step = ids.stride[dim], j.src_step = src->stride[dim];
        ids.dim[dim] = 1;
    }
    lc_view to = indexed_view(y, &ids, dim);
    j.places = make_walk<3>({&to, &ids, src});
    LC_FLOATS(x->dtype, return run_scatter<T>(k, j, view_numel(x));)
    return LC_K_OK;
}
}
