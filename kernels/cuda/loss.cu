/* loss.cu: mean squared error and cross-entropy. Each reads its operands once, in packs of 16 bytes where they lie so:
 * the squares of differences in whatever order the operands share in memory, logits with a running maximum and sum.
 * Nothing is read back: how many labels count is found on the device. Option plain_loss selects twins that take one
 * element at a time, in double. */
#include "loss.cuh"

enum { MSE_BLOCK = 256, MSE_BLOCKS = 512, CE_BLOCK = 512, SLOPE_BLOCK = 256, SLOPE_EACH = 8 };

/* ---- mean squared error --------------------------------------------------------------------------------------- */
/* The walk goes over a, b and the slope, each (a - b), which may be absent; partial [blocks]. */
template <class T, int V>
__global__ void __launch_bounds__(MSE_BLOCK)
    mse_parts(const T *a, const T *b, T *slope, double each, const walk<3> w, double *partial) {
    typedef real_of<T> R;
    const R factor = (R)each;
    __shared__ double room[32];
    R sum[V];
#pragma unroll
    for (int c = 0; c < V; c++) sum[c] = 0;
#pragma unroll 2
    for (int64_t e = (int64_t)blockIdx.x * MSE_BLOCK + threadIdx.x; e < w.total; e += (int64_t)gridDim.x * MSE_BLOCK) {
        int64_t at[3];
        R va[V], vb[V];
        walk_at(w, e, at);
        load_pack<V>(a + at[0], va);
        load_pack<V>(b + at[1], vb);
#pragma unroll
        for (int c = 0; c < V; c++) {
            R d = va[c] - vb[c];
            sum[c] += d * d;
            va[c] = factor * d;
        }
        if (slope) store_pack<V>(slope + at[2], va);
    }
    double total = 0;
#pragma unroll
    for (int c = 0; c < V; c++) total += (double)sum[c];
    total = block_reduce(total, op_sum(), 0.0, room);
    if (!threadIdx.x) partial[blockIdx.x] = total;
}

/* By the size alone: sums do not depend on the device. */
static unsigned mse_blocks(int64_t n) {
    int64_t blocks = ceil_div(n, MSE_BLOCK * 8);
    return (unsigned)(blocks < 1 ? 1 : blocks > MSE_BLOCKS ? MSE_BLOCKS : blocks);
}

/* y[0] = scale times the mean; y[1], where wanted, its gradient for a. */
template <class T> static int run_mse(const lc_kargs *k, double scale) {
    constexpr int V = pack_of<T>();
    const lc_view *a = &k->x[0], *b = &k->x[1], *slope = &k->y[1];
    const int64_t n = view_numel(a);
    const double each = 2 * scale / (double)n;
    walk<3> w = make_walk_free<3>({a, b, slope->data ? slope : a});
    unsigned blocks = mse_blocks(n);
    double *partial = (double *)k->work;
    bool packs = !k->host->option(LC_OPTION_PLAIN_LOSS) && aligned16(a->data) && aligned16(b->data) &&
                 aligned16(slope->data) && walk_pack(&w, V);
    const T *pa = (const T *)a->data, *pb = (const T *)b->data;
    T *to = (T *)slope->data;
    if (packs)
        LC_LAUNCH((mse_parts<T, V>), blocks, MSE_BLOCK, 0, pa, pb, to, each, w, partial);
    else
        LC_LAUNCH((mse_parts<T, 1>), blocks, MSE_BLOCK, 0, pa, pb, to, each, w, partial);
    LC_LAUNCH(finish_sum, 1, 256, 0, (const double *)partial, (int64_t)blocks, scale / (double)n, k->y[0].data,
              k->y[0].dtype);
    return LC_K_OK;
}

/* ga = 2 g (a - b) / numel, gb = -ga; either may be NULL. The walk goes over a, b, ga, gb. */
template <class T, int V>
__global__ void __launch_bounds__(MSE_BLOCK)
    mse_slopes(const void *g, int g_dtype, double each, const T *a, const T *b, T *ga, T *gb, const walk<4> w) {
    typedef real_of<T> R;
    const R scale = (R)(scalar_at(g, g_dtype, 1) * each);
    for (int64_t e = (int64_t)blockIdx.x * MSE_BLOCK + threadIdx.x; e < w.total; e += (int64_t)gridDim.x * MSE_BLOCK) {
        int64_t at[4];
        R va[V], vb[V];
        walk_at(w, e, at);
        load_pack<V>(a + at[0], va);
        load_pack<V>(b + at[1], vb);
#pragma unroll
        for (int c = 0; c < V; c++) va[c] = scale * (va[c] - vb[c]), vb[c] = -va[c];
        if (ga) store_pack<V>(ga + at[2], va);
        if (gb) store_pack<V>(gb + at[3], vb);
    }
}

template <class T> static int run_mse_backward(const lc_kargs *k) {
    constexpr int V = pack_of<T>();
    const lc_view *g = &k->x[0], *a = &k->x[1], *b = &k->x[2], *ga = &k->y[0], *gb = &k->y[1];
    walk<4> w = make_walk_free<4>({a, b, ga->data ? ga : a, gb->data ? gb : a});
    bool packs = !k->host->option(LC_OPTION_PLAIN_LOSS) && aligned16(a->data) && aligned16(b->data) &&
                 aligned16(ga->data) && aligned16(gb->data) && walk_pack(&w, V);
    const double each = 2 / (double)view_numel(a);
    const T *pa = (const T *)a->data, *pb = (const T *)b->data;
    T *ya = (T *)ga->data, *yb = (T *)gb->data;
    if (packs)
        LC_LAUNCH((mse_slopes<T, V>), grid_for(w.total, MSE_BLOCK), MSE_BLOCK, 0, g->data, g->dtype, each, pa, pb, ya,
                  yb, w);
    else
        LC_LAUNCH((mse_slopes<T, 1>), grid_for(w.total, MSE_BLOCK), MSE_BLOCK, 0, g->data, g->dtype, each, pa, pb, ya,
                  yb, w);
    return LC_K_OK;
}

/* ---- cross-entropy -------------------------------------------------------------------------------------------- */
/* logits x [n, v]  ->  loss [n] (0 where ignored), lse [n] (likewise; or NULL); a block a row; R: what is computed in
 */
template <class T, class R, int V>
__global__ void __launch_bounds__(CE_BLOCK) ce_rows(const T *x, const lc_labels l, double *loss, real_of<T> *lse) {
    __shared__ R room[64];
    const int64_t r = blockIdx.x, label = label_of(l, r);
    if (label < 0) {
        if (!threadIdx.x) loss[r] = 0;
        if (!threadIdx.x && lse) lse[r] = 0;
        return;
    }
    x += r * l.v;
    peak<R> p = peak_none<R>();
#pragma unroll 4
    for (int64_t i = threadIdx.x * V; i < l.v; i += CE_BLOCK * V) {
        R v[V];
        load_pack<V>(x + i, v);
        peak_take(p, v);
    }
    p = block_peak(p, room);
    if (threadIdx.x) return;
    double sum = (double)p.m + log((double)p.s);
    loss[r] = sum - load<double>(x[label]);
    if (lse) lse[r] = (real_of<T>)sum;
}

template <class T> static int run_ce(const lc_kargs *k) {
    constexpr int V = pack_of<T>();
    const lc_view *x = &k->x[0];
    const lc_labels l = labels_of(&k->x[1], x->dim[1], k->i[0]);
    const T *px = (const T *)x->data;
    double *loss = (double *)k->work;
    real_of<T> *lse = (real_of<T> *)k->y[1].data;
    const fault_to fault = fault_here();
    const unsigned n = (unsigned)l.n;
    if (!n)
        (void)0;
    else if (k->host->option(LC_OPTION_PLAIN_LOSS))
        LC_LAUNCH((ce_rows<T, double, 1>), n, CE_BLOCK, 0, px, l, loss, lse);
    else if (l.v % V == 0 && aligned16(px))
        LC_LAUNCH((ce_rows<T, real_of<T>, V>), n, CE_BLOCK, 0, px, l, loss, lse);
    else
        LC_LAUNCH((ce_rows<T, real_of<T>, 1>), n, CE_BLOCK, 0, px, l, loss, lse);
    LC_LAUNCH(loss_mean, 1, 512, 0, (const double *)loss, l, k->y[0].data, k->y[0].dtype, fault);
    return LC_K_OK;
}

/* y = g / count (softmax - onehot), 0 where ignored; block (part of a row, row) */
template <class T, int V>
__global__ void __launch_bounds__(SLOPE_BLOCK) ce_slopes(const T *x, const lc_labels l, const real_of<T> *lse, T *y,
                                                         const void *g, int g_dtype, const double *each) {
    typedef real_of<T> R;
    const int64_t parts = (l.v + SLOPE_BLOCK * SLOPE_EACH * V - 1) / (SLOPE_BLOCK * SLOPE_EACH * V),
                  r = blockIdx.x / parts;
    const int64_t begin = (blockIdx.x - r * parts) * SLOPE_BLOCK * SLOPE_EACH * V, label = label_of(l, r);
    const R scale = label < 0 ? (R)0 : (R)(scalar_at(g, g_dtype, 1) * *each), shift = lse[r];
    x += r * l.v, y += r * l.v;
#pragma unroll 4
    for (int o = 0; o < SLOPE_EACH; o++) {
        int64_t i = begin + (o * SLOPE_BLOCK + threadIdx.x) * V;
        if (i >= l.v) break;
        R v[V];
        load_pack<V>(x + i, v);
#pragma unroll
        for (int c = 0; c < V; c++)
            v[c] = (scale == 0 ? (R)0 : real_exp(v[c] - shift) * scale) - (i + c == label ? scale : (R)0);
        store_pack<V>(y + i, v);
    }
}

template <class T> static int run_ce_backward(const lc_kargs *k) {
    constexpr int V = pack_of<T>();
    const lc_view *g = &k->x[0], *x = &k->x[1];
    const lc_labels l = labels_of(&k->x[2], x->dim[1], k->i[0]);
    const T *px = (const T *)x->data;
    T *y = (T *)k->y[0].data;
    const real_of<T> *lse = (const real_of<T> *)k->x[3].data;
    double *each = (double *)k->work;
    const fault_to fault = fault_here();
    const bool packs = l.v % V == 0 && aligned16(px) && aligned16(y) && !k->host->option(LC_OPTION_PLAIN_LOSS);
    const unsigned grid = (unsigned)(l.n * ceil_div(l.v, SLOPE_BLOCK * SLOPE_EACH * (packs ? V : 1)));
    LC_LAUNCH(loss_count, 1, 512, 0, l, each, fault);
    if (packs)
        LC_LAUNCH((ce_slopes<T, V>), grid, SLOPE_BLOCK, 0, px, l, lse, y, g->data, g->dtype, each);
    else
        LC_LAUNCH((ce_slopes<T, 1>), grid, SLOPE_BLOCK, 0, px, l, lse, y, g->data, g->dtype, each);
    return LC_K_OK;
}

/* ---- entries -------------------------------------------------------------------------------------------------- */
extern "C" {
size_t lc_cuda_mse_loss_work(const lc_kargs *k) { return mse_blocks(view_numel(&k->x[0])) * sizeof(double); }

int lc_cuda_mse_loss(const lc_kargs *k) {
    if (k->x[0].dtype != k->x[1].dtype) return LC_K_UNSUPPORTED;
    LC_FLOATS(k->x[0].dtype, return run_mse<T>(k, 1);)
    return LC_K_OK;
}

size_t lc_cuda_mse_loss_slope_work(const lc_kargs *k) { return lc_cuda_mse_loss_work(k); }

int lc_cuda_mse_loss_slope(const lc_kargs *k) {
    if (k->x[0].dtype != k->x[1].dtype) return LC_K_UNSUPPORTED;
    LC_FLOATS(k->x[0].dtype, return run_mse<T>(k, k->f[0]);)
    return LC_K_OK;
}

int lc_cuda_mse_loss_backward(const lc_kargs *k) {
    const lc_view *a = &k->x[1];
    if (k->x[2].dtype != a->dtype) return LC_K_UNSUPPORTED;
    if (!view_numel(a) || (!k->y[0].data && !k->y[1].data)) return LC_K_OK;
    LC_FLOATS(a->dtype, return run_mse_backward<T>(k);)
    return LC_K_OK;
}

/* work: each row's loss */
size_t lc_cuda_cross_entropy_work(const lc_kargs *k) { return (size_t)(view_numel(&k->x[1]) + 1) * sizeof(double); }

int lc_cuda_cross_entropy(const lc_kargs *k) {
    LC_FLOATS(k->x[0].dtype, return run_ce<T>(k);)
    return LC_K_OK;
}

/* work: 1 / count */
size_t lc_cuda_cross_entropy_backward_work(const lc_kargs *k) {
    (void)k;
    return sizeof(double);
}

int lc_cuda_cross_entropy_backward(const lc_kargs *k) {
    if (!view_numel(&k->x[1])) return LC_K_OK;
    if (k->x[3].dtype != (k->x[1].dtype == LC_K_F64 ? LC_K_F64 : LC_K_F32)) return LC_K_UNSUPPORTED;
    LC_FLOATS(k->x[1].dtype, return run_ce_backward<T>(k);)
    return LC_K_OK;
}
}
