/* loss_linear.cu: cross-entropy straight from hidden states x [n, d] and the output matrix w [v, d]. Rows go in chunks
 * whose logits [rows, v], f32 (f64 beside f64), fit a workspace of some 64 MB, but 256 rows at least: a product, then
 * one kernel that takes each row's maximum, sum and argmax and, when the gradient is wanted, leaves softmax - onehot in
 * the row's place (in the operands' dtype, so in its first half for halves), then a product with w. Operands that
 * differ in dtype, or are quantised, are converted: x a chunk at a time, w in tiles of the vocabulary. Ignored rows are
 * computed too, and count as nothing: how many there are is known on the device only. Option plain_loss selects a twin
 * that takes every dot product in double. */
#include "gemm.cuh"
#include "loss.cuh"
#include "quant.cuh"

enum { ROW_BLOCK = 512, PLAIN_BLOCK = 256, LEAST_ROWS = 256 /* fewer, and the products are slow */ };
#define LOGITS_BYTES ((int64_t)64 << 20)
#define TILE_BYTES   ((int64_t)64 << 20)

/* dtypes: c of the products' operands, a of the logits. Pointers are NULL until the workspace is there. */
typedef struct lce {
    const lc_kargs *k;
    lc_labels labels;
    int64_t n, d, v, rows, tile;
    int a, c, grad, plain, direct; /* direct: the second product's result is the gradient, in x's dtype */
    double *each, *loss;           /* 1 / count; [n] */
    void *logits, *x, *w, *acc;    /* [rows, v] a; [rows, d] c; [tile, d] c; [rows, d] a */
    size_t bytes;
} lce;

static void *carve(lce *p, bool wanted, int64_t n, int dtype) {
    if (!wanted) return NULL;
    void *at = p->k->work ? (char *)p->k->work + p->bytes : NULL;
    p->bytes += ((size_t)(n * dtype_bytes(dtype)) + 255) & ~(size_t)255;
    return at;
}

static int64_t limited(int64_t n, int64_t least, int64_t most) { return n > most ? most : n < least ? least : n; }

static lce plan_lce(const lc_kargs *k) {
    const lc_view *x = &k->x[0], *w = &k->x[1];
    lce p;
    memset(&p, 0, sizeof p);
    p.k = k;
    p.n = x->dim[0], p.d = x->dim[1], p.v = w->dim[0];
    p.labels = labels_of(&k->x[2], p.v, k->i[0]);
    p.grad = k->i[1] && k->y[3].data;
    p.plain = k->host->option(LC_OPTION_PLAIN_LOSS);
    bool quantised = lc_dtype_is_quant(w->dtype);
    p.a = p.plain || x->dtype == LC_K_F64 ? LC_K_F64 : LC_K_F32;
    p.c = quantised || x->dtype == w->dtype ? x->dtype : (int)LC_K_F32;
    bool widen_x = x->dtype != p.c && !p.plain, widen_w = w->dtype != p.c && !(p.plain && !quantised);
    p.direct = p.c == x->dtype && !widen_w && p.c != LC_K_F16; /* a half's range holds softmax, not softmax / count */
    p.rows = limited(LOGITS_BYTES / (p.v * dtype_bytes(p.a) + 1), limited(LEAST_ROWS, 1, p.n), p.n);
    if (p.rows > 128 && p.rows < p.n) p.rows = p.rows / 128 * 128;
    p.tile = p.v;
    if (widen_w && !p.plain)
        p.tile = limited(TILE_BYTES / (p.d * dtype_bytes(p.c) + 1) / 256 * 256, limited(256, 1, p.v), p.v);
    p.each = (double *)carve(&p, true, 1, LC_K_F64);
    p.loss = (double *)carve(&p, true, p.n, LC_K_F64);
    p.logits = carve(&p, true, p.rows * p.v, p.a);
    p.x = carve(&p, widen_x, p.rows * p.d, p.c);
    p.w = carve(&p, widen_w, p.tile * p.d, p.c);
    p.acc = carve(&p, p.grad && !p.direct && !p.plain, p.rows * p.d, p.a);
    return p;
}

/* ---- a row of logits ------------------------------------------------------------------------------------------ */
/* What the rows of a chunk, the first of which is row `first` of the input, leave behind. */
typedef struct row_out {
    double *loss;
    const double *each;
    void *losses;    /* [n] R, or NULL */
    int32_t *argmax; /* [n], or NULL */
    int64_t first;
} row_out;

/* A block a row. logits [rows, v] R  ->  loss, losses, argmax; GRAD: and (softmax - onehot) * scale in place, as C;
 * scale is 1 / count when `scaled`, else 1. A piece of the row is read by all threads before any of it is written, and
 * C is not wider than R, so what is written has been read. */
template <class R, class C, int V, bool GRAD>
__global__ void __launch_bounds__(ROW_BLOCK) lce_rows(R *logits, const lc_labels l, const row_out out, bool scaled) {
    __shared__ R room[64];
    __shared__ R top_v[32];
    __shared__ int top_i[32];
    const int64_t r = out.first + blockIdx.x, label = label_of(l, r);
    const int v = (int)l.v;
    const R *x = logits + blockIdx.x * l.v;
    C *y = (C *)(logits + blockIdx.x * l.v);
    if (label < 0) {
        if (!threadIdx.x) {
            out.loss[r] = 0;
            if (out.losses) ((R *)out.losses)[r] = 0;
            if (out.argmax) out.argmax[r] = 0;
        }
        if (GRAD)
            for (int i = threadIdx.x; i < v; i += ROW_BLOCK) y[i] = store<C>((R)0);
        return;
    }
    peak<R> p = peak_none<R>();
    R best = -(R)INFINITY;
    int at = v;
#pragma unroll 4
    for (int i = threadIdx.x * V; i < v; i += ROW_BLOCK * V) {
        R e[V];
        load_pack<V>(x + i, e);
        peak_take(p, e);
#pragma unroll
        for (int c = 0; c < V; c++)
            if (e[c] > best || at == v) best = e[c], at = i + c;
    }
    R own = x[label];
    p = block_peak(p, room);
#pragma unroll
    for (int o = 16; o; o >>= 1) {
        R other = __shfl_xor_sync(0xffffffffu, best, o);
        int where = __shfl_xor_sync(0xffffffffu, at, o);
        if (where < v && (at == v || other > best || (other == best && where < at))) best = other, at = where;
    }
    if (!(threadIdx.x & 31)) top_v[threadIdx.x >> 5] = best, top_i[threadIdx.x >> 5] = at;
    __syncthreads(); /* and all have read their own logit before any is overwritten */
    const double sum = (double)p.m + log((double)p.s);
    if (!threadIdx.x) {
        for (int w = 1; w < ROW_BLOCK / 32; w++)
            if (top_i[w] < v && (top_v[w] > best || (top_v[w] == best && top_i[w] < at)))
                best = top_v[w], at = top_i[w];
        out.loss[r] = sum - (double)own;
        if (out.losses) ((R *)out.losses)[r] = (R)(sum - (double)own);
        if (out.argmax) out.argmax[r] = at;
    }
    if (!GRAD) return;
    const R scale = scaled ? (R)*out.each : (R)1, shift = p.m, under = scale / p.s;
    for (int from = 0; from < v; from += ROW_BLOCK * V) {
        int i = from + threadIdx.x * V;
        R e[V];
        if (i < v) load_pack<V>(x + i, e);
        if (sizeof(C) < sizeof(R)) __syncthreads();
        if (i >= v) continue;
#pragma unroll
        for (int c = 0; c < V; c++) e[c] = real_exp(e[c] - shift) * under - (i + c == label ? scale : (R)0);
        store_pack<V>(y + i, e);
    }
}

template <class R, class C> static void launch_rows(const lce *p, const row_out *out, int64_t m) {
    constexpr int V = pack_of<R>();
    R *logits = (R *)p->logits;
    const bool packs = p->v % V == 0;
    if (p->grad && packs)
        LC_LAUNCH((lce_rows<R, C, V, true>), (unsigned)m, ROW_BLOCK, 0, logits, p->labels, *out, p->direct);
    else if (p->grad)
        LC_LAUNCH((lce_rows<R, C, 1, true>), (unsigned)m, ROW_BLOCK, 0, logits, p->labels, *out, p->direct);
    else if (packs)
        LC_LAUNCH((lce_rows<R, R, V, false>), (unsigned)m, ROW_BLOCK, 0, logits, p->labels, *out, false);
    else
        LC_LAUNCH((lce_rows<R, R, 1, false>), (unsigned)m, ROW_BLOCK, 0, logits, p->labels, *out, false);
}

/* y [m, d] of any float dtype = acc [m, d] / count */
template <class R>
__global__ void lce_scale(const R *acc, const double *each, void *y, int dtype, int64_t first, int64_t n) {
    for (int64_t e = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; e < n; e += (int64_t)gridDim.x * blockDim.x)
        put_any(y, dtype, first + e, (double)acc[e] * *each);
}

/* ---- a chunk of rows ------------------------------------------------------------------------------------------ */
static const char *row_of(const lc_view *v, int64_t r, int64_t d) {
    const lc_dtype_trait *t = lc_dtype_traits(v->dtype);
    return (const char *)v->data + r * d / t->block * t->bytes;
}

/* Rows [v0, v0 + vn) of w in the products' dtype: themselves, or converted into the workspace. */
static int tile_of(const lce *p, int64_t v0, int64_t vn, const void **tile) {
    const lc_view *w = &p->k->x[1];
    const char *from = row_of(w, v0, p->d);
    *tile = p->w ? p->w : from;
    if (!p->w) return LC_K_OK;
    if (lc_dtype_is_quant(w->dtype)) return lc_cuda_dequantise(w->dtype, from, p->c, p->w, vn * p->d);
    return lc_cuda_convert(p->w, p->c, p->d, from, w->dtype, p->d, vn, p->d);
}

/* logits [m, v] = x [m, d] w^T */
static int chunk_logits(const lce *p, const void *x, int64_t m) {
    for (int64_t v0 = 0; v0 < p->v; v0 += p->tile) {
        int64_t vn = limited(p->v - v0, 0, p->tile);
        const void *w;
        int rc = tile_of(p, v0, vn, &w);
        if (!rc)
            rc = lc_cuda_gemm(0, 1, m, vn, p->d, 1, x, p->c, p->d, w, p->c, p->d, 0, NULL, 0,
                              (char *)p->logits + v0 * dtype_bytes(p->a), p->a, p->v);
        if (rc) return rc;
    }
    return LC_K_OK;
}

/* gradient [m, d] = what lce_rows left [m, v] times w, in its place or in acc and from there */
static int chunk_gradient(const lce *p, int64_t r0, int64_t m) {
    const lc_view *y = &p->k->y[3];
    const int64_t wide = p->v * dtype_bytes(p->a) / dtype_bytes(p->c); /* from row to row */
    void *to = p->direct ? (char *)y->data + r0 * p->d * dtype_bytes(y->dtype) : p->acc;
    const int dtype = p->direct ? y->dtype : p->a;
    for (int64_t v0 = 0; v0 < p->v; v0 += p->tile) {
        int64_t vn = limited(p->v - v0, 0, p->tile);
        const void *w;
        int rc = tile_of(p, v0, vn, &w);
        if (!rc)
            rc = lc_cuda_gemm(0, 0, m, p->d, vn, 1, (char *)p->logits + v0 * dtype_bytes(p->c), p->c, wide, w, p->c,
                              p->d, v0 ? 1 : 0, v0 ? to : NULL, p->d, to, dtype, p->d);
        if (rc) return rc;
    }
    if (p->direct) return LC_K_OK;
    const unsigned grid = grid_for(m * p->d, 256);
    const double *each = p->each;
    if (p->a == LC_K_F64)
        LC_LAUNCH(lce_scale<double>, grid, 256, 0, (const double *)p->acc, each, y->data, y->dtype, r0 * p->d,
                  m * p->d);
    else
        LC_LAUNCH(lce_scale<float>, grid, 256, 0, (const float *)p->acc, each, y->data, y->dtype, r0 * p->d, m * p->d);
    return LC_K_OK;
}

static int run_chunk(const lce *p, int64_t r0, int64_t m, const row_out *out) {
    const lc_view *x = &p->k->x[0];
    const void *px = row_of(x, r0, p->d);
    int rc = LC_K_OK;
    if (p->x) {
        rc = lc_cuda_convert(p->x, p->c, p->d, px, x->dtype, p->d, m, p->d);
        px = p->x;
    }
    if (!rc) rc = chunk_logits(p, px, m);
    if (rc) return rc;
    switch (p->c) {
    case LC_K_F32: launch_rows<float, float>(p, out, m); break;
    case LC_K_BF16: launch_rows<float, bf16>(p, out, m); break;
    case LC_K_F16: launch_rows<float, f16>(p, out, m); break;
    default: launch_rows<double, double>(p, out, m);
    }
    return p->grad ? chunk_gradient(p, r0, m) : LC_K_OK;
}

/* ---- the twin: a block a row; logits [rows, v] double --------------------------------------------------------- */
typedef struct plain_job {
    const void *x, *w;
    void *gx; /* or NULL */
    double *logits;
    int x_dtype, w_dtype, losses_dtype;
    int64_t d;
} plain_job;

static __global__ void __launch_bounds__(PLAIN_BLOCK)
    lce_plain(const plain_job j, const lc_labels l, const row_out out) {
    __shared__ double room[64];
    const int64_t r = out.first + blockIdx.x, label = label_of(l, r);
    double *logits = j.logits + blockIdx.x * l.v, max = -INFINITY, sum = 0, at = (double)l.v;
    for (int64_t v = threadIdx.x; v < l.v && label >= 0; v += PLAIN_BLOCK) {
        double s = 0;
        for (int64_t i = 0; i < j.d; i++)
            s += load_any<double>(j.x, j.x_dtype, r * j.d + i) * load_any<double>(j.w, j.w_dtype, v * j.d + i);
        logits[v] = s;
        max = s > max ? s : max;
    }
    max = block_reduce(max, op_max(), -(double)INFINITY, room);
    for (int64_t v = threadIdx.x; v < l.v && label >= 0; v += PLAIN_BLOCK) {
        sum += exp(logits[v] - max);
        if (logits[v] == max && (double)v < at) at = (double)v;
    }
    sum = block_reduce(sum, op_sum(), 0.0, room);
    at = -block_reduce(-at, op_max(), -(double)INFINITY, room);
    const double loss = label < 0 ? 0 : max + log(sum) - logits[label];
    if (!threadIdx.x) {
        out.loss[r] = loss;
        if (out.losses) put_any(out.losses, j.losses_dtype, r, loss);
        if (out.argmax) out.argmax[r] = label < 0 ? 0 : (int32_t)at;
    }
    if (!j.gx) return;
    __syncthreads();
    for (int64_t v = threadIdx.x; v < l.v && label >= 0; v += PLAIN_BLOCK)
        logits[v] = exp(logits[v] - max) / sum - (v == label ? 1 : 0);
    __syncthreads();
    for (int64_t i = threadIdx.x; i < j.d; i += PLAIN_BLOCK) {
        double g = 0;
        for (int64_t v = 0; v < l.v && label >= 0; v++) g += logits[v] * load_any<double>(j.w, j.w_dtype, v * j.d + i);
        put_any(j.gx, j.x_dtype, r * j.d + i, g * *out.each);
    }
}

static int run_plain(const lce *p, int64_t m, const row_out *out) {
    const lc_view *x = &p->k->x[0], *w = &p->k->x[1];
    plain_job j = {x->data,          w->data, p->grad ? p->k->y[3].data : NULL, (double *)p->logits, x->dtype, w->dtype,
                   p->k->y[1].dtype, p->d};
    if (p->w) {
        int rc = tile_of(p, 0, p->v, &j.w);
        if (rc) return rc;
        j.w_dtype = p->c;
    }
    LC_LAUNCH(lce_plain, (unsigned)m, PLAIN_BLOCK, 0, j, p->labels, *out);
    return LC_K_OK;
}

/* ---- entries -------------------------------------------------------------------------------------------------- */
extern "C" size_t lc_cuda_linear_cross_entropy_work(const lc_kargs *k) {
    lc_kargs q = *k;
    q.work = NULL;
    return plan_lce(&q).bytes;
}

/* x [n, d]  w [v, d]  labels [n]  ->  loss [], losses [n] and argmax [n] (0 where ignored), gradient [n, d] */
extern "C" int lc_cuda_linear_cross_entropy(const lc_kargs *k) {
    const lce p = plan_lce(k);
    const lc_view *w = &k->x[1], *y = k->y;
    const fault_to fault = fault_here();
    if (!lc_dtype_is_float(w->dtype) && !lc_dtype_is_quant(w->dtype)) return LC_K_UNSUPPORTED;
    LC_LAUNCH(loss_count, 1, 512, 0, p.labels, p.each, fault);
    for (int64_t r0 = 0; r0 < p.n && p.v; r0 += p.rows) {
        const int64_t m = limited(p.n - r0, 0, p.rows);
        const row_out out = {p.loss, p.each, y[1].data, (int32_t *)y[2].data, r0};
        int rc = p.plain ? run_plain(&p, m, &out) : run_chunk(&p, r0, m, &out);
        if (rc) return rc;
    }
    LC_LAUNCH(loss_mean, 1, 512, 0, (const double *)p.loss, p.labels, y[0].data, y[0].dtype, fault);
    return LC_K_OK;
}
