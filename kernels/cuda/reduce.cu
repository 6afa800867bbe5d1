/* reduce.cu: reductions over sets of dims, of strided operands. Three forms: rows, where what is reduced is walked by a
 * warp or a block for each result (in packs where it lies in one piece); columns, where the kept inner dim lies in one
 * piece and a thread owns some of its columns; lists of tensors. Long reductions are cut in chunks by their shape
 * alone, which a second kernel joins in order: results depend neither on the device nor on timing. Threads sum in
 * float, what is between threads and chunks in double. */
#include "reduce.cuh"

enum { SUM, SQUARES, BAD, BEST }; /* BAD counts NaN and infinities; BEST: the largest of sign * x */
enum { ALONG = 256, COLUMN_ROWS = 8, CHUNK = 16384, CHUNKS_MAX = 256, FILL = 512, LIST = 64 };

typedef struct reduce_job {
    walk<2> kept;    /* x, y */
    walk<1> reduced; /* x */
    const void *x;
    void *y;
    int y_dtype, chunks;
    double scale, sign;
    double *partial; /* rows: [kept][chunks]; columns: [chunks][kept]; NULL: results are written at once */
} reduce_job;

template <int MODE, class R> __device__ __forceinline__ R reduce_none() { return MODE == BEST ? -(R)INFINITY : (R)0; }
template <int MODE, class R> __device__ __forceinline__ R reduce_join(R a, R v, R sign) {
    if (MODE == SUM) return a + v;
    if (MODE == SQUARES) return a + v * v;
    if (MODE == BAD) return a + (v - v == 0 ? (R)0 : (R)1);
    return op_max()(a, v * sign);
}
/* Two results of reduce_join. */
template <int MODE> struct reduce_merge {
    template <class R> __device__ __forceinline__ R operator()(R a, R b) const {
        return MODE == BEST ? op_max()(a, b) : a + b;
    }
};

/* ---- rows ----------------------------------------------------------------------------------------------------- */
/* Block: x threads along what is reduced (32: a warp a task, or ALONG), y tasks; a task is (result, chunk). */
template <class T, int MODE, int V> __global__ void __launch_bounds__(ALONG) reduce_rows(const reduce_job j) {
    typedef sum_of<T> R;
    __shared__ double room[32];
    int64_t task = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (task >= j.kept.total * j.chunks) return; /* a warp's task: no block_reduce then */
    int64_t o = task / j.chunks, c = task - o * j.chunks, at[2], in[1];
    walk_at(j.kept, o, at);
    const T *x = (const T *)j.x + at[0];
    int64_t each = (j.reduced.total + j.chunks - 1) / j.chunks,
            end = (c + 1) * each < j.reduced.total ? (c + 1) * each : j.reduced.total;
    R acc[V], sign = (R)j.sign;
#pragma unroll
    for (int i = 0; i < V; i++) acc[i] = reduce_none<MODE, R>();
#pragma unroll 4
    for (int64_t u = c * each + threadIdx.x; u < end; u += blockDim.x) {
        R v[V];
        walk_at(j.reduced, u, in);
        load_pack<V>(x + in[0], v);
#pragma unroll
        for (int i = 0; i < V; i++) acc[i] = reduce_join<MODE>(acc[i], v[i], sign);
    }
#pragma unroll
    for (int i = 1; i < V; i++) acc[0] = reduce_merge<MODE>()(acc[0], acc[i]);
    double total = (double)acc[0];
    if (blockDim.x == 32)
        total = warp_reduce(total, reduce_merge<MODE>());
    else
        total = block_reduce(total, reduce_merge<MODE>(), reduce_none<MODE, double>(), room);
    if (threadIdx.x) return;
    if (j.partial)
        j.partial[task] = total;
    else
        put_any(j.y, j.y_dtype, at[1], total * j.scale);
}

/* Joins the chunks of each result: a warp a result. */
template <int MODE> __global__ void __launch_bounds__(ALONG) reduce_finish_rows(const reduce_job j) {
    int64_t o = (int64_t)blockIdx.x * blockDim.y + threadIdx.y, at[2];
    if (o >= j.kept.total) return;
    double total = reduce_none<MODE, double>();
    for (int c = threadIdx.x; c < j.chunks; c += 32) total = reduce_merge<MODE>()(total, j.partial[o * j.chunks + c]);
    total = warp_reduce(total, reduce_merge<MODE>());
    walk_at(j.kept, o, at);
    if (!threadIdx.x) put_any(j.y, j.y_dtype, at[1], total * j.scale);
}

/* ---- columns -------------------------------------------------------------------------------------------------- */
/* Block: 32 threads of V columns each, times COLUMN_ROWS; a task is (outer results, chunk of the reduced, tile of
 * columns). */
template <class T, int MODE, int V>
__global__ void __launch_bounds__(32 * COLUMN_ROWS) reduce_columns(const reduce_job j) {
    typedef sum_of<T> R;
    __shared__ R room[COLUMN_ROWS][32 * V];
    const int64_t columns = j.kept.dim[j.kept.ndim - 1], tiles = (columns + 32 * V - 1) / (32 * V);
    int64_t tile = blockIdx.x % tiles, rest = blockIdx.x / tiles, c = rest % j.chunks, outer = rest / j.chunks;
    int64_t each = (j.reduced.total + j.chunks - 1) / j.chunks,
            end = (c + 1) * each < j.reduced.total ? (c + 1) * each : j.reduced.total;
    int64_t column = (tile * 32 + threadIdx.x) * V, at[2], in[1];
    R acc[V], sign = (R)j.sign;
#pragma unroll
    for (int i = 0; i < V; i++) acc[i] = reduce_none<MODE, R>();
    walk_at(j.kept, outer * columns, at);
    const T *x = (const T *)j.x + at[0] + column;
    if (column < columns) {
#pragma unroll 4
        for (int64_t u = c * each + threadIdx.y; u < end; u += COLUMN_ROWS) {
            R v[V];
            walk_at(j.reduced, u, in);
            load_pack<V>(x + in[0], v);
#pragma unroll
            for (int i = 0; i < V; i++) acc[i] = reduce_join<MODE>(acc[i], v[i], sign);
        }
    }
#pragma unroll
    for (int i = 0; i < V; i++) room[threadIdx.y][threadIdx.x * V + i] = acc[i];
    __syncthreads();
    for (int i = threadIdx.y * 32 + threadIdx.x; i < 32 * V && tile * 32 * V + i < columns; i += 32 * COLUMN_ROWS) {
        double total = (double)room[0][i];
        for (int r = 1; r < COLUMN_ROWS; r++) total = reduce_merge<MODE>()(total, (double)room[r][i]);
        int64_t o = outer * columns + tile * 32 * V + i;
        if (j.partial)
            j.partial[c * j.kept.total + o] = total;
        else
            put_any(j.y, j.y_dtype, at[1] + (tile * 32 * V + i) * j.kept.stride[1][j.kept.ndim - 1], total * j.scale);
    }
}

/* Joins the chunks: a thread a result. */
template <int MODE> __global__ void reduce_finish_columns(const reduce_job j) {
    int64_t at[2];
    for (int64_t o = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; o < j.kept.total;
         o += (int64_t)gridDim.x * blockDim.x) {
        double total = j.partial[o];
#pragma unroll 8
        for (int c = 1; c < j.chunks; c++) total = reduce_merge<MODE>()(total, j.partial[c * j.kept.total + o]);
        walk_at(j.kept, o, at);
        put_any(j.y, j.y_dtype, at[1], total * j.scale);
    }
}

/* ---- cutting the work ----------------------------------------------------------------------------------------- */
/* Divides x's dims into kept and reduced; y has x's dims with the reduced ones at 1 (NULL: all are reduced). */
static reduce_job reduce_split(const lc_view *x, const lc_view *y, unsigned reduced) {
    reduce_job j;
    memset(&j, 0, sizeof j);
    lc_view kx = *x, ky = *x, rx = *x;
    kx.ndim = ky.ndim = rx.ndim = 0;
    for (int i = 0; i < x->ndim; i++) {
        lc_view *to = reduced >> i & 1 ? &rx : &kx;
        to->dim[to->ndim] = x->dim[i];
        to->stride[to->ndim++] = x->stride[i];
        if (to == &rx) continue;
        ky.dim[ky.ndim] = x->dim[i];
        ky.stride[ky.ndim++] = y && i < y->ndim ? y->stride[i] : 0;
    }
    j.kept = make_walk_free<2>({&kx, &ky});
    j.reduced = make_walk_free<1>({&rx});
    j.x = x->data;
    j.scale = j.sign = 1;
    j.chunks = 1;
    if (y) j.y = y->data, j.y_dtype = y->dtype;
    return j;
}

static bool reduce_by_columns(const reduce_job *j, int dtype) {
    int k = j->kept.ndim - 1, r = j->reduced.ndim - 1;
    return lc_dtype_is_float(dtype) && j->kept.stride[0][k] == 1 && j->kept.dim[k] >= 8 && j->reduced.stride[0][r] != 1;
}

static int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

/* Chunks by shape alone, so that about FILL blocks have something to do, each of them enough. */
static void reduce_chunks(reduce_job *j, int dtype) {
    int64_t n = j->reduced.total, kept = j->kept.total, most;
    if (reduce_by_columns(j, dtype)) {
        int64_t columns = j->kept.dim[j->kept.ndim - 1], blocks = kept / columns * ceil_div(columns, 256);
        most = at_most(ceil_div(FILL, at_least(blocks, 1)), ceil_div(n, 4 * COLUMN_ROWS));
    } else {
        most = at_most(ceil_div(FILL, at_least(kept, 1)), ceil_div(n, CHUNK / 4));
    }
    j->chunks = (int)at_least(at_most(most, CHUNKS_MAX), 1);
}

template <class T, int MODE, int V> static void launch_rows(const reduce_job *j) {
    int64_t tasks = j->kept.total * j->chunks;
    if (j->reduced.total / j->chunks <= 512)
        LC_LAUNCH((reduce_rows<T, MODE, V>), (unsigned)ceil_div(tasks, 8), dim3(32, 8), 0, *j);
    else
        LC_LAUNCH((reduce_rows<T, MODE, V>), (unsigned)tasks, ALONG, 0, *j);
}

template <class T, int MODE> static int run_rows(reduce_job j) {
    constexpr int V = pack_of<T>();
    if (V > 1 && aligned16(j.x)) {
        bool whole = true; /* every result's data begin at a pack */
        for (int i = 0; i < j.kept.ndim; i++) whole = whole && (j.kept.dim[i] == 1 || j.kept.stride[0][i] % V == 0);
        if (whole && walk_pack(&j.reduced, V)) {
            launch_rows<T, MODE, V>(&j);
            return LC_K_OK;
        }
    }
    launch_rows<T, MODE, 1>(&j);
    return LC_K_OK;
}

template <class T, int MODE> static int run_columns(const reduce_job *j) {
    constexpr int V = pack_of<T>();
    int64_t columns = j->kept.dim[j->kept.ndim - 1], outer = j->kept.total / columns * j->chunks;
    bool packs = aligned16(j->x) && columns % V == 0;
    for (int i = 0; i + 1 < j->kept.ndim; i++) packs = packs && j->kept.stride[0][i] % V == 0;
    for (int i = 0; i < j->reduced.ndim; i++) packs = packs && j->reduced.stride[0][i] % V == 0;
    dim3 block(32, COLUMN_ROWS);
    if (packs)
        LC_LAUNCH((reduce_columns<T, MODE, V>), (unsigned)(outer * ceil_div(columns, 32 * V)), block, 0, *j);
    else
        LC_LAUNCH((reduce_columns<T, MODE, 1>), (unsigned)(outer * ceil_div(columns, 32)), block, 0, *j);
    return LC_K_OK;
}

template <int MODE> static int run_by_dtype(const reduce_job *j, int dtype, bool columns) {
    constexpr int COLUMN_MODE = MODE == BEST ? BEST : SUM; /* the others have one result */
    LC_FLOATS(dtype, return columns ? run_columns<T, COLUMN_MODE>(j) : run_rows<T, MODE>(*j);)
    return LC_K_OK;
}

static int run_integers(const reduce_job *j, int dtype) {
    switch (dtype) {
    case LC_K_I32: return run_rows<int32_t, SUM>(*j);
    case LC_K_I64: return run_rows<int64_t, SUM>(*j);
    case LC_K_U8: return run_rows<uint8_t, SUM>(*j);
    default: return LC_K_UNSUPPORTED;
    }
}

template <int MODE> static int run_job(const lc_kargs *k, reduce_job *j, int dtype) {
    if (!j->kept.total) return LC_K_OK;
    bool columns = reduce_by_columns(j, dtype);
    reduce_chunks(j, dtype);
    if (j->chunks > 1) j->partial = (double *)k->work;
    int rc = lc_dtype_is_float(dtype) ? run_by_dtype<MODE>(j, dtype, columns)
             : MODE == SUM            ? run_integers(j, dtype)
                                      : LC_K_UNSUPPORTED;
    if (rc || j->chunks == 1) return rc;
    if (columns)
        LC_LAUNCH(reduce_finish_columns<MODE>, grid_for(j->kept.total, 128), 128, 0, *j);
    else
        LC_LAUNCH(reduce_finish_rows<MODE>, (unsigned)ceil_div(j->kept.total, 8), dim3(32, 8), 0, *j);
    return LC_K_OK;
}

/* ---- x -> y over the dims listed in i[]; none listed: all ----------------------------------------------------- */
static reduce_job reduce_of(const lc_kargs *k) {
    unsigned reduced = 0;
    for (int i = 0; i < k->i[0]; i++) reduced |= 1u << k->i[1 + i];
    if (k->i[0] == 0) reduced = (1u << k->x[0].ndim) - 1;
    return reduce_split(&k->x[0], &k->y[0], reduced);
}

static size_t partial_bytes(reduce_job j, int dtype) {
    reduce_chunks(&j, dtype);
    return j.chunks > 1 ? (size_t)(j.kept.total * j.chunks) * sizeof(double) : 0;
}

extern "C" {
size_t lc_cuda_sum_work(const lc_kargs *k) { return partial_bytes(reduce_of(k), k->x[0].dtype); }
size_t lc_cuda_mean_work(const lc_kargs *k) { return partial_bytes(reduce_of(k), k->x[0].dtype); }
size_t lc_cuda_amax_work(const lc_kargs *k) { return partial_bytes(reduce_of(k), k->x[0].dtype); }
size_t lc_cuda_amin_work(const lc_kargs *k) { return partial_bytes(reduce_of(k), k->x[0].dtype); }

int lc_cuda_sum(const lc_kargs *k) {
    reduce_job j = reduce_of(k);
    return run_job<SUM>(k, &j, k->x[0].dtype);
}

int lc_cuda_mean(const lc_kargs *k) {
    reduce_job j = reduce_of(k);
    j.scale = 1 / (double)j.reduced.total;
    return run_job<SUM>(k, &j, k->x[0].dtype);
}

int lc_cuda_amax(const lc_kargs *k) {
    reduce_job j = reduce_of(k);
    return run_job<BEST>(k, &j, k->x[0].dtype);
}

int lc_cuda_amin(const lc_kargs *k) {
    reduce_job j = reduce_of(k);
    j.sign = j.scale = -1;
    return run_job<BEST>(k, &j, k->x[0].dtype);
}

size_t lc_cuda_count_nonfinite_work(const lc_kargs *k) {
    return partial_bytes(reduce_split(&k->x[0], NULL, (1u << k->x[0].ndim) - 1), k->x[0].dtype);
}

int lc_cuda_count_nonfinite(const lc_kargs *k) {
    reduce_job j = reduce_split(&k->x[0], NULL, (1u << k->x[0].ndim) - 1);
    j.y = k->y[0].data;
    j.y_dtype = k->y[0].dtype;
    return run_job<BAD>(k, &j, k->x[0].dtype);
}
}

/* ---- lists: the sum of all squares ---------------------------------------------------------------------------- */
/* Tensors in one piece go up to LIST a launch; block b takes chunk b - first[i] of tensor i, the last whose first is
 * not above b. */
typedef struct squares_list {
    const void *p[LIST];
    int64_t n[LIST], chunk;
    int32_t first[LIST], count;
    double *partial;
} squares_list;

template <class T> __global__ void __launch_bounds__(ALONG) squares_of_list(const squares_list l) {
    typedef real_of<T> R;
    constexpr int V = pack_of<T>();
    __shared__ double room[32];
    int i = 0;
    while (i + 1 < l.count && (int)blockIdx.x >= l.first[i + 1]) i++;
    int64_t begin = (blockIdx.x - l.first[i]) * l.chunk, n = l.n[i] - begin < l.chunk ? l.n[i] - begin : l.chunk,
            whole = 0;
    const T *p = (const T *)l.p[i] + begin;
    R acc[V];
#pragma unroll
    for (int v = 0; v < V; v++) acc[v] = 0;
    if (((uintptr_t)p & 15) == 0) {
        whole = n / V * V;
#pragma unroll 4
        for (int64_t e = threadIdx.x * V; e < whole; e += ALONG * V) {
            R v[V];
            load_pack<V>(p + e, v);
#pragma unroll
            for (int c = 0; c < V; c++) acc[c] += v[c] * v[c];
        }
    }
    for (int64_t e = whole + threadIdx.x; e < n; e += ALONG) {
        R v = load<R>(p[e]);
        acc[0] += v * v;
    }
#pragma unroll
    for (int v = 1; v < V; v++) acc[0] += acc[v];
    double total = block_reduce((double)acc[0], op_sum(), 0.0, room);
    if (!threadIdx.x) l.partial[blockIdx.x] = total;
}

/* Elements a chunk, a multiple of every pack: chunks of one size for the whole list, some thousands of them. */
static int64_t list_chunk(const lc_kargs *k) {
    int64_t total = 0;
    for (int i = 0; i < k->n_list; i++) total += view_numel(&k->list[i]);
    return at_least(CHUNK, ceil_div(ceil_div(total, 8192), 256) * 256);
}

static int64_t list_parts(const lc_kargs *k, int64_t chunk) {
    int64_t parts = 0;
    for (int i = 0; i < k->n_list; i++) parts += ceil_div(view_numel(&k->list[i]), chunk);
    return parts;
}

static int squares_flush(squares_list *l, int dtype, int64_t *parts) {
    int64_t blocks = l->count ? l->first[l->count - 1] + ceil_div(l->n[l->count - 1], l->chunk) : 0;
    if (!blocks) return LC_K_OK;
    LC_FLOATS(dtype, LC_LAUNCH(squares_of_list<T>, (unsigned)blocks, ALONG, 0, *l);)
    *parts += blocks;
    l->partial += blocks;
    l->count = 0;
    return LC_K_OK;
}

extern "C" size_t lc_cuda_sum_squares_work(const lc_kargs *k) {
    return (size_t)(list_parts(k, list_chunk(k)) + 1) * sizeof(double);
}

/* list -> the sum of all its elements' squares */
extern "C" int lc_cuda_sum_squares(const lc_kargs *k) {
    squares_list l;
    int64_t parts = 0;
    int dtype = k->list[0].dtype, rc = LC_K_OK;
    l.count = 0;
    l.partial = (double *)k->work;
    l.chunk = list_chunk(k);
    for (int i = 0; i < k->n_list && !rc; i++) {
        reduce_job j = reduce_split(&k->list[i], NULL, (1u << k->list[i].ndim) - 1);
        if (!j.reduced.total) continue;
        bool flat = j.reduced.ndim == 1 && (j.reduced.stride[0][0] == 1 || j.reduced.total == 1);
        if (!flat || l.count == LIST) rc = squares_flush(&l, dtype, &parts);
        if (rc) break;
        int64_t chunks = ceil_div(j.reduced.total, l.chunk);
        if (flat) {
            l.p[l.count] = j.x;
            l.n[l.count] = j.reduced.total;
            l.first[l.count] = l.count ? l.first[l.count - 1] + (int32_t)ceil_div(l.n[l.count - 1], l.chunk) : 0;
            l.count++;
            continue;
        }
        j.chunks = (int)chunks;
        j.partial = l.partial;
        rc = run_by_dtype<SQUARES>(&j, dtype, false);
        parts += chunks;
        l.partial += chunks;
    }
    if (!rc) rc = squares_flush(&l, dtype, &parts);
    if (!rc) LC_LAUNCH(finish_sum, 1, 256, 0, (const double *)k->work, parts, 1.0, k->y[0].data, k->y[0].dtype);
    return rc;
}
