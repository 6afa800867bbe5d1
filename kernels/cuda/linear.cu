/* linear.cu: the ops `matmul`, `addmm_` and `linear`: views sorted into products (gemm.cuh) or few rows times a weight (gemv.cuh). A weight of
 * another dtype than x, or a quantised one, is converted to x's in the workspace, in slabs of rows of w that stay in the second-level
 * cache; with the option plain_linear float weights are taken as they are. */
#include "gemm.cuh"
#include "gemv.cuh"
#include "quant.cuh"

/* ---- matmul ---------------------------------------------------------------------------------------------------------- */
static lc_cuda_operand operand_of(const lc_view *v, int nb) {
    lc_cuda_operand o = {};
    o.data = v->data, o.dtype = v->dtype;
    if (!v->data) return o;
    o.rs = v->stride[nb], o.cs = v->stride[nb + 1];
    for (int i = 0; i < nb; i++) o.step[i] = v->stride[i];
    return o;
}

/* y [.., m, n] = f[0] * a [.., m, k] b [.., k, n] + add; batch dims and add are broadcast by strides of 0. */
extern "C" int lc_cuda_matmul(const lc_kargs *k) {
    const lc_view *a = &k->x[0], *b = &k->x[1], *y = &k->y[0];
    const int nd = y->ndim, nb = nd - 2;
    if (nd < 2 || a->ndim != nd || b->ndim != nd || (k->x[2].data && k->x[2].ndim != nd)) return LC_K_UNSUPPORTED;
    if (!view_numel(y)) return LC_K_OK;
    lc_cuda_product p = {};
    p.m = y->dim[nb], p.n = y->dim[nb + 1], p.k = a->dim[nb + 1];
    p.alpha = k->f[0], p.beta = 1;
    p.a = operand_of(a, nb), p.b = operand_of(b, nb), p.c = operand_of(&k->x[2], nb), p.d = operand_of(y, nb);
    p.nb = nb;
    for (int i = 0; i < nb; i++) p.dim[i] = y->dim[i];
    return lc_cuda_product_run(&p);
}

/* x [m, n] += f[0] * a [m, k] b [k, n] */
extern "C" int lc_cuda_addmm_(const lc_kargs *k) {
    const lc_view *x = &k->x[0];
    lc_cuda_product p = {};
    p.m = x->dim[0], p.n = x->dim[1], p.k = k->x[1].dim[1];
    p.alpha = k->f[0], p.beta = 1;
    p.a = operand_of(&k->x[1], 0), p.b = operand_of(&k->x[2], 0), p.c = p.d = operand_of(x, 0);
    return lc_cuda_product_run(&p);
}

/* ---- linear ---------------------------------------------------------------------------------------------------------- */
enum { SLAB_BYTES = 32 << 20 };

static bool converts(const lc_kargs *k) {
    const int x = k->x[0].dtype, w = k->x[1].dtype;
    return lc_dtype_is_quant(w) || (w != x && !k->host->option(LC_OPTION_PLAIN_LINEAR));
}

/* Rows of w in a slab. */
static int64_t slab_rows(const lc_kargs *k) {
    const int64_t n = k->x[1].dim[0], bytes = k->x[1].dim[1] * dtype_bytes(k->x[0].dtype);
    if (!converts(k)) return n;
    int64_t rows = SLAB_BYTES / (bytes ? bytes : 1) / 256 * 256;
    if (rows < 256) rows = 256;
    return rows < n ? rows : n;
}

static size_t bias_bytes(const lc_kargs *k) { /* cuBLASLt wants the result's dtype */
    if (!k->x[2].data || k->x[2].dtype == k->y[0].dtype) return 0;
    return (size_t)(ceil_div(k->x[1].dim[0] * dtype_bytes(k->y[0].dtype), 256) * 256);
}

extern "C" size_t lc_cuda_linear_work(const lc_kargs *k) {
    if (!view_rows(&k->x[0])) return 0;
    return bias_bytes(k) + (converts(k) ? (size_t)(slab_rows(k) * k->x[1].dim[1] * dtype_bytes(k->x[0].dtype)) : 0);
}

/* x [.., k], add, y [.., n] as rows: the last but one dim is m, the others batch dims. */
static lc_cuda_operand rows_of(const lc_view *v) {
    lc_cuda_operand o = {};
    o.data = v->data, o.dtype = v->dtype, o.cs = 1;
    if (!v->data) return o;
    o.cs = v->ndim && v->dim[v->ndim - 1] > 1 ? v->stride[v->ndim - 1] : 1;
    o.rs = v->ndim > 1 ? v->stride[v->ndim - 2] : 0;
    for (int i = 0; i + 2 < v->ndim; i++) o.step[i] = v->stride[i];
    return o;
}

/* Few rows, the weight's dtype as it is. LC_K_UNSUPPORTED: by way of the product. */
static int few_rows(const lc_kargs *k, const lc_cuda_product *p) {
    const lc_view *w = &k->x[1];
    if (p->nb || p->m > LC_GEMV_ROWS || k->host->option(LC_OPTION_PLAIN_LINEAR)) return LC_K_UNSUPPORTED;
    if (p->m > 1 && w->dtype == p->a.dtype && w->dtype != LC_K_F32) return LC_K_UNSUPPORTED; /* cuBLASLt reads the weight once too */
    if (p->a.cs != 1 || p->d.cs != 1 || (p->c.data && p->c.cs != 1)) return LC_K_UNSUPPORTED;
    if (w->dim[1] > 1 && w->stride[1] != 1) return LC_K_UNSUPPORTED;
    lc_cuda_gemv g = {};
    g.x = p->a.data, g.x_dtype = p->a.dtype, g.ldx = p->a.rs;
    g.w = w->data, g.w_dtype = w->dtype, g.ld_w = p->n > 1 ? w->stride[0] : p->k;
    g.bias = p->bias, g.bias_dtype = p->bias_dtype;
    g.add = p->c.data, g.ld_add = p->c.rs;
    g.y = p->d.data, g.y_dtype = p->d.dtype, g.ldy = p->d.rs;
    g.rows = p->m, g.n = p->n, g.k = p->k, g.alpha = (float)p->alpha;
    return lc_cuda_gemv_run(&g);
}

/* All of y by slabs of w's rows, which are columns of y. */
static int by_slabs(const lc_kargs *k, lc_cuda_product p, char *work) {
    const lc_view *w = &k->x[1];
    const lc_dtype_trait *t = lc_dtype_traits(w->dtype);
    const int64_t n = p.n, slab = slab_rows(k), ld = n > 1 ? w->stride[0] : p.k;
    lc_cuda_operand whole[2] = {p.c, p.d};
    const char *bias = (const char *)p.bias;
    p.b.data = work, p.b.dtype = p.a.dtype, p.b.rs = 1, p.b.cs = p.k;
    for (int64_t j = 0; j < n; j += slab) {
        p.n = slab < n - j ? slab : n - j;
        const char *from = (const char *)w->data + j * ld / t->block * t->bytes;
        int rc = lc_dtype_is_quant(w->dtype) ? lc_cuda_dequantise(w->dtype, from, p.b.dtype, work, p.n * p.k)
                                             : lc_cuda_convert(work, p.b.dtype, p.k, from, w->dtype, ld, p.n, p.k);
        if (whole[0].data) p.c.data = (char *)whole[0].data + j * whole[0].cs * dtype_bytes(whole[0].dtype);
        p.d.data = (char *)whole[1].data + j * whole[1].cs * dtype_bytes(whole[1].dtype);
        if (bias) p.bias = bias + j * dtype_bytes(p.bias_dtype);
        if (!rc) rc = lc_cuda_product_run(&p);
        if (rc) return rc;
    }
    return LC_K_OK;
}

/* y [.., n] = f[0] * x [.., k] w[n, k]^T + bias [n] + add [.., n] */
extern "C" int lc_cuda_linear(const lc_kargs *k) {
    const lc_view *x = &k->x[0], *w = &k->x[1], *bias = &k->x[2], *y = &k->y[0];
    if (w->ndim != 2 || x->ndim < 1 || x->ndim > LC_VIEW_DIMS || x->dtype != y->dtype) return LC_K_UNSUPPORTED;
    if (lc_dtype_is_quant(w->dtype) && w->dim[0] > 1 && w->stride[0] != w->dim[1]) return LC_K_UNSUPPORTED;
    if (!view_numel(y)) return LC_K_OK;
    lc_cuda_product p = {};
    p.n = w->dim[0], p.k = w->dim[1], p.m = x->ndim > 1 ? x->dim[x->ndim - 2] : 1;
    p.alpha = k->f[0], p.beta = 1;
    p.a = rows_of(x), p.c = rows_of(&k->x[3]), p.d = rows_of(y);
    p.b.data = w->data, p.b.dtype = w->dtype, p.b.rs = p.k > 1 ? w->stride[1] : 1, p.b.cs = p.n > 1 ? w->stride[0] : p.k;
    for (int i = 0; i + 2 < x->ndim; i++) p.dim[p.nb++] = x->dim[i];
    p.bias = bias->data, p.bias_dtype = bias->dtype;
    lc_cuda_product_fold(&p);
    char *work = (char *)k->work;
    int rc = bias->data && p.n > 1 && bias->stride[0] != 1 ? LC_K_UNSUPPORTED : few_rows(k, &p);
    if (rc != LC_K_UNSUPPORTED) return rc;
    if (bias_bytes(k)) {
        rc = lc_cuda_convert(work, y->dtype, p.n, bias->data, bias->dtype, p.n, 1, p.n);
        if (rc) return rc;
        p.bias = work, p.bias_dtype = y->dtype;
        work += bias_bytes(k);
    }
    return converts(k) ? by_slabs(k, p, work) : lc_cuda_product_run(&p);
}
