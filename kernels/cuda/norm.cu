/* norm.cu: RMSNorm and rotary position embedding, with their gradients: bound by memory, so every operand is read once,
 * 16 bytes a thread, and a row stays in registers between its sum and its result. Rows that do not lie on packs, or are
 * longer than registers hold, and doubles, take plain twins that read twice. The gradient for weights is summed by each
 * block over its rows, then over the blocks in order. */
#include "chain.cuh"
#include "reduce.cuh"

enum { PACKS = 4, AHEAD = 2 /* of w */, BACK_PACKS = 2, NORM_BLOCK = 1024, DW_BLOCKS = 512, DW_ROWS = 8, ROPE_BLOCK = 256 };

/* The same rows in several views: all dims but the last. */
template <int N> static walk<N> rows_of(const lc_view *const (&v)[N]) {
    lc_view cut[N];
    const lc_view *at[N];
    for (int i = 0; i < N; i++) {
        cut[i] = *v[i];
        if (!cut[i].data) cut[i] = *v[0]; /* not wanted: never used, but the walk wants strides */
        cut[i].ndim = v[0]->ndim - 1;
        at[i] = &cut[i];
    }
    return make_walk(at);
}

/* Threads for a row of n packs: two each where `most` threads do, up to `each`. 0: too long. */
static unsigned norm_threads(int64_t packs, int each, int64_t most) {
    if (packs > most * each) return 0;
    return packs <= most * 2 ? round_up_32(ceil_div(packs, 2), most) : (unsigned)most;
}

/* ---- RMSNorm -------------------------------------------------------------------------------------------------- */
/* x [rows, n]  w [n]  ->  y [rows, n], rstd [rows] (or NULL); a block a row; n packs of V, at most PACKS a thread. w is on its way
 * before x is there to be read. */
template <class T, int V>
__global__ void __launch_bounds__(NORM_BLOCK)
    norm_rows(const T *x, const T *w, T *y, real_of<T> *rstd, int n, double eps, const walk<2> rows) {
    typedef real_of<T> R;
    __shared__ R room[32];
    pack<T, V> held[PACKS], weight[AHEAD];
    int64_t at[2];
    R sum = 0;
    next_may_start();
    walk_at(rows, blockIdx.x, at);
#pragma unroll
    for (int p = 0; p < AHEAD; p++) {
        int i = threadIdx.x + p * blockDim.x;
        if (i < n) weight[p] = *(const pack<T, V> *)(w + i * V);
    }
    wait_for_previous();
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        int i = threadIdx.x + p * blockDim.x;
        if (i < n) held[p] = *(const pack<T, V> *)(x + at[0] + i * V);
    }
#pragma unroll
    for (int p = 0; p < PACKS; p++)
        if (threadIdx.x + p * blockDim.x < n) {
#pragma unroll
            for (int c = 0; c < V; c++) sum += load<R>(held[p].v[c]) * load<R>(held[p].v[c]);
        }
    sum = block_reduce(sum, op_sum(), (R)0, room);
    R scale = 1 / sqrt(sum / ((R)n * V) + (R)eps);
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        int i = threadIdx.x + p * blockDim.x;
        if (i >= n) continue;
        R v[V];
        if (p >= AHEAD) load_pack<V>(w + i * V, v);
#pragma unroll
        for (int c = 0; c < V && p < AHEAD; c++) v[c] = load<R>(weight[p < AHEAD ? p : 0].v[c]);
#pragma unroll
        for (int c = 0; c < V; c++) v[c] *= load<R>(held[p].v[c]) * scale;
        store_pack<V>(y + at[1] + i * V, v);
    }
    if (rstd && !threadIdx.x) rstd[blockIdx.x] = scale;
}

/* The twin for any n. */
template <class T>
__global__ void __launch_bounds__(256)
    norm_plain(const T *x, const T *w, T *y, real_of<T> *rstd, int64_t n, double eps, const walk<2> rows) {
    typedef real_of<T> R;
    __shared__ double room[32];
    int64_t at[2];
    double sum = 0;
    walk_at(rows, blockIdx.x, at);
    x += at[0], y += at[1];
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += (double)(load<R>(x[i]) * load<R>(x[i]));
    sum = block_reduce(sum, op_sum(), 0.0, room);
    R scale = (R)(1 / sqrt(sum / (double)n + eps));
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) y[i] = store<T>(load<R>(x[i]) * scale * load<R>(w[i]));
    if (rstd && !threadIdx.x) rstd[blockIdx.x] = scale;
}

template <class T> static int run_norm(const lc_kargs *k, int64_t rows, int64_t n) {
    constexpr int V = pack_of<T>();
    const lc_view *x = &k->x[0], *y = &k->y[0];
    walk<2> walk = rows_of<2>({x, y});
    unsigned threads =
        view_packs(x, V) && view_packs(y, V) && aligned16(k->x[1].data) ? norm_threads(n / V, PACKS, NORM_BLOCK) : 0;
    const T *px = (const T *)x->data, *pw = (const T *)k->x[1].data;
    T *py = (T *)y->data;
    real_of<T> *rstd = (real_of<T> *)k->y[1].data;
    if constexpr (sizeof(T) < 8) {
        if (threads) {
            LC_LAUNCH_AFTER(chain_apart(&k->x[1]), (norm_rows<T, V>), (unsigned)rows, threads, 0, px, pw, py, rstd, (int)(n / V),
                            k->f[0], walk);
            chain_writes(y);
            chain_writes(&k->y[1]);
            return LC_K_OK;
        }
    }
    LC_LAUNCH(norm_plain<T>, (unsigned)rows, 256, 0, px, pw, py, rstd, n, k->f[0], walk);
    return LC_K_OK;
}

/* ---- its gradients: gx = rstd (g w - x rstd^2 mean(g w x)) + add, gw = sum over rows of g x rstd -------------------- */
typedef struct norm_back {
    const void *g, *x, *w, *rstd, *add; /* add or NULL */
    void *gx;         /* or NULL */
    void *partial;    /* [blocks, n packs of V], or NULL where gw is not wanted */
    int64_t count, n; /* rows; elements a row (in norm_back_rows: packs) */
    walk<4> rows;     /* g, x, gx, add */
} norm_back;

/* A block takes rows b, b + blocks, ..; BACK_PACKS packs a thread at most. DW: gw's part of these rows stays in
 * registers. MOST threads: with gw, packs of 8 want more registers. */
template <class T, int V, bool DW, int MOST>
__global__ void __launch_bounds__(MOST, MOST == 256 ? 4 : 1) norm_back_rows(const norm_back j) {
    typedef real_of<T> R;
    constexpr int P = BACK_PACKS;
    __shared__ R room[32];
    const int n = (int)j.n;
    R part[DW ? P * V : 1];
#pragma unroll
    for (int i = 0; i < (DW ? P * V : 1); i++) part[i] = 0;
    for (int64_t r = blockIdx.x; r < j.count; r += gridDim.x) {
        int64_t at[4];
        pack<T, V> g[P], x[P], w[P];
        R sum = 0, rstd = ((const R *)j.rstd)[r];
        walk_at(j.rows, r, at);
#pragma unroll
        for (int p = 0; p < P; p++) {
            int i = threadIdx.x + p * blockDim.x;
            if (i >= n) continue;
            g[p] = *(const pack<T, V> *)((const T *)j.g + at[0] + i * V);
            x[p] = *(const pack<T, V> *)((const T *)j.x + at[1] + i * V);
            w[p] = *(const pack<T, V> *)((const T *)j.w + i * V);
        }
#pragma unroll
        for (int p = 0; p < P; p++) {
            if (threadIdx.x + p * blockDim.x >= n) continue;
#pragma unroll
            for (int c = 0; c < V; c++) {
                R gx = load<R>(g[p].v[c]) * load<R>(x[p].v[c]);
                sum += gx * load<R>(w[p].v[c]);
                if (DW) part[p * V + c] += gx * rstd;
            }
        }
        if (!j.gx) continue;
        sum = block_reduce(sum, op_sum(), (R)0, room);
        R pull = sum / ((R)n * V) * rstd * rstd;
        walk_at(j.rows, r, at); /* again: registers are scarce in between */
#pragma unroll
        for (int p = 0; p < P; p++) {
            int i = threadIdx.x + p * blockDim.x;
            if (i >= n) continue;
            R out[V];
            w[p] = *(const pack<T, V> *)((const T *)j.w + i * V);
#pragma unroll
            for (int c = 0; c < V; c++)
                out[c] = rstd * (load<R>(g[p].v[c]) * load<R>(w[p].v[c]) - load<R>(x[p].v[c]) * pull);
            if (j.add) {
                R more[V];
                load_pack<V>((const T *)j.add + at[3] + i * V, more);
#pragma unroll
                for (int c = 0; c < V; c++) out[c] += more[c];
            }
            store_pack<V>((T *)j.gx + at[2] + i * V, out);
        }
        if (!DW) return; /* a block has one row */
    }
    if (DW) {
#pragma unroll
        for (int p = 0; p < P; p++) {
            int i = threadIdx.x + p * blockDim.x;
            if (i >= n) continue;
#pragma unroll
            for (int c = 0; c < V; c++) ((R *)j.partial)[(int64_t)blockIdx.x * n * V + i * V + c] = part[p * V + c];
        }
    }
}

/* gx alone, for any n */
template <class T> __global__ void __launch_bounds__(256) norm_back_plain(const norm_back j) {
    typedef real_of<T> R;
    __shared__ double room[32];
    int64_t at[4];
    walk_at(j.rows, blockIdx.x, at);
    const T *g = (const T *)j.g + at[0], *x = (const T *)j.x + at[1], *w = (const T *)j.w;
    R rstd = ((const R *)j.rstd)[blockIdx.x];
    double sum = 0;
    for (int64_t i = threadIdx.x; i < j.n; i += blockDim.x)
        sum += (double)(load<R>(g[i]) * load<R>(w[i]) * load<R>(x[i]));
    sum = block_reduce(sum, op_sum(), 0.0, room);
    R pull = (R)(sum / (double)j.n * (double)rstd * (double)rstd);
    const T *add = (const T *)j.add + at[3];
    for (int64_t i = threadIdx.x; i < j.n; i += blockDim.x) {
        R out = rstd * (load<R>(g[i]) * load<R>(w[i]) - load<R>(x[i]) * pull);
        ((T *)j.gx)[at[2] + i] = store<T>(j.add ? out + load<R>(add[i]) : out);
    }
}

/* gw's parts by blocks of 32 columns x DW_ROWS threads, for any n: block y takes rows y, y + parts, .. */
template <class T> __global__ void __launch_bounds__(32 * DW_ROWS) norm_dw_plain(const norm_back j) {
    typedef real_of<T> R;
    __shared__ R room[DW_ROWS][32];
    int64_t column = (int64_t)blockIdx.x * 32 + threadIdx.x, at[4];
    R sum = 0;
    if (column < j.n)
        for (int64_t r = (int64_t)blockIdx.y * DW_ROWS + threadIdx.y; r < j.count; r += (int64_t)gridDim.y * DW_ROWS) {
            walk_at(j.rows, r, at);
            sum += load<R>(((const T *)j.g)[at[0] + column]) *
                   (load<R>(((const T *)j.x)[at[1] + column]) * ((const R *)j.rstd)[r]);
        }
    room[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || column >= j.n) return;
    for (int i = 1; i < DW_ROWS; i++) sum += room[i][threadIdx.x];
    ((R *)j.partial)[blockIdx.y * j.n + column] = sum;
}

/* gw [n] = the sum of parts [parts, n]: blocks of 32 columns x DW_ROWS threads */
template <class T>
__global__ void __launch_bounds__(32 * DW_ROWS) norm_dw(const real_of<T> *partial, int parts, int64_t n, T *gw) {
    __shared__ double room[DW_ROWS][32];
    int64_t column = (int64_t)blockIdx.x * 32 + threadIdx.x;
    double sum = 0;
    if (column < n) {
#pragma unroll 8
        for (int p = threadIdx.y; p < parts; p += DW_ROWS) sum += (double)partial[p * n + column];
    }
    room[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y || column >= n) return;
    for (int i = 1; i < DW_ROWS; i++) sum += room[i][threadIdx.x];
    gw[column] = store<T>(sum);
}

static int64_t norm_parts(int64_t rows) { return rows < DW_BLOCKS ? rows : (int64_t)DW_BLOCKS; }

template <class T> static int run_norm_back(const lc_kargs *k, norm_back j) {
    constexpr int V = pack_of<T>();
    const lc_view *g = &k->x[0], *x = &k->x[1], *gx = &k->y[0], *gw = &k->y[1], *add = &k->x[4];
    bool packs = view_packs(g, V) && view_packs(x, V) && (!gx->data || view_packs(gx, V)) && (!add->data || view_packs(add, V)) && aligned16(k->x[2].data),
         done = !j.count;
    int64_t parts = norm_parts(j.count), n = j.n;
    if constexpr (sizeof(T) < 8) {
        constexpr int MOST = sizeof(T) == 2 ? NORM_BLOCK / 2 : NORM_BLOCK; /* with gw, and rows up to 8,192 */
        unsigned threads = norm_threads(n / V, BACK_PACKS, j.partial ? MOST : (int)NORM_BLOCK);
        if (packs && threads && !done) {
            done = true;
            j.n = n / V;
            if (j.partial)
                LC_LAUNCH((norm_back_rows<T, V, true, MOST>), (unsigned)parts, threads, 0, j);
            else if (threads <= 256) /* four rows at a time on a multiprocessor */
                LC_LAUNCH((norm_back_rows<T, V, false, 256>), (unsigned)j.count, threads, 0, j);
            else if (threads <= MOST)
                LC_LAUNCH((norm_back_rows<T, V, false, MOST>), (unsigned)j.count, threads, 0, j);
            else
                LC_LAUNCH((norm_back_rows<T, V, false, NORM_BLOCK>), (unsigned)j.count, threads, 0, j);
        }
    }
    if (!done && j.gx) LC_LAUNCH(norm_back_plain<T>, (unsigned)j.count, 256, 0, j);
    if (!done && j.partial)
        LC_LAUNCH(norm_dw_plain<T>, dim3((unsigned)ceil_div(n, 32), (unsigned)parts), dim3(32, DW_ROWS), 0, j);
    if (gw->data)
        LC_LAUNCH(norm_dw<T>, (unsigned)ceil_div(n, 32), dim3(32, DW_ROWS), 0, (const real_of<T> *)j.partial,
                  (int)(j.count ? parts : 0), n, (T *)gw->data);
    return LC_K_OK;
}

/* ---- rotation ------------------------------------------------------------------------------------------------- */
/* pos [rows]  inv_freq [half]  ->  cos, sin [rows, half]; the angle is a double, so long contexts lose nothing */
template <class T>
__global__ void rope_angles(const void *pos, int pos_dtype, const T *inv_freq, T *c, T *s, int64_t rows, int64_t half) {
    for (int64_t e = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; e < rows * half;
         e += (int64_t)gridDim.x * blockDim.x) {
        double angle = scalar_at(pos_dtype == LC_K_I64 ? (const void *)((const int64_t *)pos + e / half)
                                                       : (const int32_t *)pos + e / half,
                                 pos_dtype, 0) *
                       load<double>(inv_freq[e % half]);
        c[e] = store<T>(cos(angle));
        s[e] = store<T>(sin(angle));
    }
}

/* How x, y [b, h, t, d] and cos, sin ([b,] t, half) lie, in elements. */
typedef struct rope_shape {
    int64_t len, heads, half, x[3], y[3], cos_b, cos_t, sin_b, sin_t; /* strides of b, h, t */
    double sign;
} rope_shape;

/* One or two tensors that are turned by the same tables. */
typedef struct rope_job {
    const void *x[2], *c, *s;
    void *y[2];
    rope_shape shape[2]; /* the second one's heads are 0: there is none */
} rope_job;

/* A block a position of a sequence: its threads take packs of V pairs of all heads; C is the tables' type. */
template <class T, class C, int V> __global__ void rope_rows(const rope_job j) {
    typedef real_of<T> R;
    next_may_start();
    wait_for_previous();
    const rope_shape &r = j.shape[0];
    const int64_t b = blockIdx.x / r.len, t = blockIdx.x - b * r.len;
    const int half = (int)(r.half / V), first = (int)r.heads * half, items = first + (int)j.shape[1].heads * half;
    const C *c = (const C *)j.c + b * r.cos_b + t * r.cos_t, *s = (const C *)j.s + b * r.sin_b + t * r.sin_t;
    const R sign = (R)r.sign;
    for (int e = threadIdx.x; e < items; e += blockDim.x) {
        const int which = e >= first, at = which ? e - first : e;
        const int64_t *sx = which ? j.shape[1].x : r.x, *sy = which ? j.shape[1].y : r.y;
        int h = at / half, i = (at - h * half) * V;
        const T *px = (const T *)(which ? j.x[1] : j.x[0]) + b * sx[0] + h * sx[1] + t * sx[2] + i;
        T *py = (T *)(which ? j.y[1] : j.y[0]) + b * sy[0] + h * sy[1] + t * sy[2] + i;
        R low[V], high[V], pc[V], ps[V], a[V], z[V];
        load_pack<V>(px, low);
        load_pack<V>(px + r.half, high);
        load_pack<V>(c + i, pc);
        load_pack<V>(s + i, ps);
#pragma unroll
        for (int v = 0; v < V; v++) {
            R si = ps[v] * sign;
            a[v] = low[v] * pc[v] - high[v] * si;
            z[v] = high[v] * pc[v] + low[v] * si;
        }
        store_pack<V>(py, a);
        store_pack<V>(py + r.half, z);
    }
}

template <class T, class C> static int run_rope(const lc_kargs *k, const rope_job *j, int count) {
    constexpr int V = pack_of<T>();
    const lc_view *x = k->x, *y = k->y, *c = &k->x[count], *s = &k->x[count + 1];
    const rope_shape *r = j->shape;
    const unsigned blocks = (unsigned)(x->dim[0] * r->len);
    bool packs = r->half % V == 0 && view_packs(c, V) && view_packs(s, V);
    for (int i = 0; i < count; i++) packs = packs && view_packs(&x[i], V) && view_packs(&y[i], V);
    const int64_t items = (r[0].heads + r[1].heads) * r->half / (packs ? V : 1);
    const unsigned threads = items <= ROPE_BLOCK || items > 2 * ROPE_BLOCK ? ROPE_BLOCK : (unsigned)((items + 31) / 32 * 32);
    if (packs) LC_LAUNCH_AFTER(true, (rope_rows<T, C, V>), blocks, threads, 0, *j);
    else LC_LAUNCH_AFTER(true, (rope_rows<T, C, 1>), blocks, threads, 0, *j);
    for (int i = 0; i < count; i++) chain_writes(&y[i]);
    return LC_K_OK;
}

/* ---- entries -------------------------------------------------------------------------------------------------- */
extern "C" {
int lc_cuda_rms_norm(const lc_kargs *k) {
    const lc_view *x = &k->x[0];
    int64_t rows = view_rows(x), n = x->dim[x->ndim - 1];
    if (k->x[1].dtype != x->dtype || k->y[0].dtype != x->dtype) return LC_K_UNSUPPORTED;
    if (!rows || !n) return LC_K_OK;
    LC_FLOATS(x->dtype, return run_norm<T>(k, rows, n);)
    return LC_K_OK;
}

/* work: gw's parts */
size_t lc_cuda_rms_norm_backward_work(const lc_kargs *k) {
    const lc_view *x = &k->x[1];
    if (!k->y[1].data) return 0;
    return (size_t)(norm_parts(view_rows(x)) * x->dim[x->ndim - 1]) * (x->dtype == LC_K_F64 ? 8 : 4);
}

int lc_cuda_rms_norm_backward(const lc_kargs *k) {
    const lc_view *g = &k->x[0], *x = &k->x[1], *gx = &k->y[0], *add = &k->x[4];
    norm_back j;
    j.add = add->data;
    j.g = g->data, j.x = x->data, j.w = k->x[2].data, j.rstd = k->x[3].data, j.gx = gx->data;
    j.count = view_rows(x), j.n = x->dim[x->ndim - 1];
    j.partial = k->y[1].data && j.count ? k->work : NULL;
    j.rows = rows_of<4>({g, x, gx, add->data ? add : x});
    if (g->dtype != x->dtype || k->x[2].dtype != x->dtype || (add->data && add->dtype != x->dtype) ||
        k->x[3].dtype != (x->dtype == LC_K_F64 ? LC_K_F64 : LC_K_F32))
        return LC_K_UNSUPPORTED;
    if (!j.n || (!gx->data && !k->y[1].data)) return LC_K_OK;
    LC_FLOATS(x->dtype, return run_norm_back<T>(k, j);)
    return LC_K_OK;
}

int lc_cuda_rope_table(const lc_kargs *k) {
    int64_t rows = view_numel(&k->x[0]), half = k->x[1].dim[0];
    int pos = k->x[0].dtype;
    if (k->y[0].dtype != k->x[1].dtype || (pos != LC_K_I32 && pos != LC_K_I64)) return LC_K_UNSUPPORTED;
    if (!rows || !half) return LC_K_OK;
    LC_FLOATS(k->x[1].dtype, LC_LAUNCH(rope_angles<T>, grid_for(rows * half, 128), 128, 0, k->x[0].data, pos,
                                       (const T *)k->x[1].data, (T *)k->y[0].data, (T *)k->y[1].data, rows, half);)
    return LC_K_OK;
}

/* The first `count` inputs, turned by the tables behind them. */
static int turn(const lc_kargs *k, int count) {
    const lc_view *c = &k->x[count], *s = &k->x[count + 1], *x = k->x;
    rope_job j = {};
    if (c->ndim < 2 || c->ndim > 3 || s->dtype != c->dtype) return LC_K_UNSUPPORTED;
    for (int i = 0; i < count; i++) {
        const lc_view *v = &k->x[i], *y = &k->y[i];
        if (v->ndim != 4 || v->dim[3] % 2 || v->dim[2] != x->dim[2] || v->dim[3] != x->dim[3] || v->dim[0] != x->dim[0] || v->dtype != x->dtype)
            return LC_K_UNSUPPORTED;
        if (!view_numel(v)) return LC_K_OK;
        j.x[i] = v->data, j.y[i] = y->data;
        j.shape[i] = {v->dim[2],
                      v->dim[1],
                      v->dim[3] / 2,
                      {v->stride[0], v->stride[1], v->stride[2]},
                      {y->stride[0], y->stride[1], y->stride[2]},
                      c->ndim == 3 ? c->stride[0] : 0,
                      c->stride[c->ndim - 2],
                      s->ndim == 3 ? s->stride[0] : 0,
                      s->stride[s->ndim - 2],
                      k->i[0] ? -1.0 : 1.0};
    }
    j.c = c->data, j.s = s->data;
    if (c->dtype == x->dtype) {
        LC_FLOATS(x->dtype, return run_rope<T, T>(k, &j, count);)
    } else if (c->dtype == LC_K_F32) {
        if (x->dtype == LC_K_BF16) return run_rope<bf16, float>(k, &j, count);
        if (x->dtype == LC_K_F16) return run_rope<f16, float>(k, &j, count);
    }
    return LC_K_UNSUPPORTED;
}

/* x [b, h, t, d]  cos, sin [t, d/2] or [b, t, d/2]  ->  y, which lies as [b, t, h, d] */
int lc_cuda_rope(const lc_kargs *k) { return turn(k, 1); }
int lc_cuda_rope_pair(const lc_kargs *k) { return turn(k, 2); }
}
