/* projections.cu: the op `projections`, several linear layers of one input with their low-rank adapters, and its gradient. What the
 * adapters add is written first and the large products accumulate onto it, so that no pass over a result is made for them; the
 * gradient for x is accumulated likewise. The adapters' part is one launch where adapters.cuh takes it. Elsewhere the a_i of all parts
 * are one skinny product; f32 adapters beside half activations are converted by one launch. */
#include "adapters.cuh"
#include "gemm.cuh"
#include <string.h>

extern "C" int lc_cuda_linear(const lc_kargs *k);
extern "C" size_t lc_cuda_linear_work(const lc_kargs *k);

enum { PARTS = 3, P_W = 1, P_A = 4, P_B = 7, P_ADD = 10, P_LOW = 3 };

/* ---- adapters in the dtype of x -------------------------------------------------------------------------------------- */
struct adapter_list { /* a_1 a_2 a_3 b_1 b_2 b_3 one after the other; n 0: absent */
    const void *from[2 * PARTS];
    int32_t dtype[2 * PARTS];
    int64_t n[2 * PARTS];
};

static __global__ void gather_adapters(const adapter_list l, void *to, int to_dtype, int64_t total) {
    for (int64_t e = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; e < total; e += (int64_t)gridDim.x * blockDim.x) {
        int64_t at = e;
        bool done = false;
#pragma unroll
        for (int i = 0; i < 2 * PARTS; i++) {
            if (!done && at < l.n[i]) {
                if (to_dtype == LC_K_F64) store_any<double>(to, to_dtype, e, load_any<double>(l.from[i], l.dtype[i], at));
                else store_any<float>(to, to_dtype, e, load_any<float>(l.from[i], l.dtype[i], at));
                done = true;
            }
            at -= l.n[i];
        }
    }
}

/* a and b: where the first a_i, b_i stand among the inputs. */
static adapter_list adapters_of(const lc_kargs *k, int a, int b, int64_t *total) {
    adapter_list l = {};
    *total = 0;
    for (int i = 0; i < 2 * PARTS; i++) {
        const lc_view *v = &k->x[i < PARTS ? a + i : b + i - PARTS];
        if (!v->data) continue;
        l.from[i] = v->data, l.dtype[i] = v->dtype, l.n[i] = view_numel(v);
        *total += l.n[i];
    }
    return l;
}

/* Bytes for all adapters in a dtype, a whole number of 256; the copies begin there in the list's order. */
static size_t adapter_bytes(const lc_kargs *k, int a, int b, int dtype) {
    int64_t total;
    adapters_of(k, a, b, &total);
    return (size_t)(ceil_div(total * dtype_bytes(dtype), 256) * 256);
}

/* Fills at[i] with the copy of each. */
static void gather(const lc_kargs *k, int a, int b, void *work, int dtype, char *(&at)[2 * PARTS]) {
    int64_t total, sum = 0;
    const adapter_list l = adapters_of(k, a, b, &total);
    for (int i = 0; i < 2 * PARTS; i++) {
        at[i] = l.n[i] ? (char *)work + sum * dtype_bytes(dtype) : NULL;
        sum += l.n[i];
    }
    if (total) LC_LAUNCH(gather_adapters, grid_for(total, 256), 256, 0, l, work, dtype, total);
}

/* ---- forward --------------------------------------------------------------------------------------------------------- */
/* The call of linear for part i: x w_i^T + add. */
static void linear_of(const lc_kargs *k, int i, lc_kargs *q, const double *one) {
    *q = *k;
    q->n_x = 4, q->n_y = 1, q->f = one;
    q->x[1] = k->x[P_W + i], q->prepared[1] = k->prepared[P_W + i];
    q->x[2].data = q->x[3].data = NULL;
    q->y[0] = k->y[i];
    if (k->x[P_A + i].data) q->x[3] = k->y[i];
    else if (i == 0) q->x[3] = k->x[P_ADD];
}

/* The adapters' part as one launch, if they are f32 beside halves. */
static bool forward_job(const lc_kargs *k, adapter_job *j) {
    const lc_view *x = &k->x[0], *add = &k->x[P_ADD], *low = &k->y[P_LOW];
    const int64_t in = x->dim[x->ndim - 1];
    memset(j, 0, sizeof *j);
    if ((x->dtype != LC_K_BF16 && x->dtype != LC_K_F16) || !low->data) return false;
    j->rows = (int32_t)view_rows(x), j->in = (int32_t)in, j->low = low->data, j->ld_add = k->x[P_W].data ? k->x[P_W].dim[0] : 0;
    j->add = k->x[P_A].data ? add->data : NULL;
    for (int i = 0; i < PARTS; i++) {
        const lc_view *a = &k->x[P_A + i], *b = &k->x[P_B + i];
        adapter_part *p = &j->part[i];
        p->x = x->data, p->ld_x = in;
        if (!a->data) continue;
        if (a->dtype != LC_K_F32 || b->dtype != LC_K_F32) return false;
        p->a = (const float *)a->data, p->b = (const float *)b->data, p->rank = (int32_t)a->dim[0], p->out = (int32_t)b->dim[0];
        p->scale = (float)k->f[i], p->y = k->y[i].data, p->ld_y = p->out;
    }
    return adapters_take(j, false);
}

extern "C" size_t lc_cuda_projections_work(const lc_kargs *k) {
    const double one = 1;
    adapter_job job;
    size_t most = 0;
    for (int i = 0; i < PARTS; i++) {
        lc_kargs q;
        if (!k->x[P_W + i].data) continue;
        linear_of(k, i, &q, &one);
        size_t bytes = lc_cuda_linear_work(&q);
        if (bytes > most) most = bytes;
    }
    return most + (forward_job(k, &job) ? 0 : adapter_bytes(k, P_A, P_B, k->x[0].dtype));
}

/* x [.., in], w_i [out_i, in], a_i [r_i, in], b_i [out_i, r_i], add [.., out_1] -> y_i [.., out_i], low [rows, sum of r_i] */
extern "C" int lc_cuda_projections(const lc_kargs *k) {
    const lc_view *x = &k->x[0], *low = &k->y[P_LOW];
    const int dtype = x->dtype;
    const int64_t rows = view_rows(x), in = x->dim[x->ndim - 1], size = dtype_bytes(dtype), rank = low->data ? low->dim[1] : 0;
    const double one = 1;
    if (!rows) return LC_K_OK;
    adapter_job job;
    const bool joined = forward_job(k, &job);
    char *copy[2 * PARTS] = {}, *work = (char *)k->work + (joined ? 0 : adapter_bytes(k, P_A, P_B, dtype));
    if (!joined) gather(k, P_A, P_B, k->work, dtype, copy);
    int rc = joined ? adapters_run(&job, dtype, false) : LC_K_OK;
    if (rank && !joined) rc = lc_cuda_gemm(0, 1, rows, rank, in, 1, x->data, dtype, in, k->work, dtype, in, 0, NULL, 0, low->data, dtype, rank);
    for (int64_t i = 0, at = 0; i < PARTS && !rc; i++) {
        const lc_view *w = &k->x[P_W + i], *y = &k->y[i];
        if (!w->data) continue;
        if (copy[i]) {
            const int64_t out = w->dim[0], r = k->x[P_A + i].dim[0];
            const void *add = i ? NULL : k->x[P_ADD].data;
            rc = lc_cuda_gemm(0, 1, rows, out, r, k->f[i], (char *)low->data + at * size, dtype, rank, copy[PARTS + i], dtype, r,
                              add != NULL, add, out, y->data, dtype, out);
            at += r;
            if (rc) return rc;
        }
        lc_kargs q;
        linear_of(k, (int)i, &q, &one);
        q.work = work;
        rc = lc_cuda_linear(&q);
    }
    return rc;
}

/* ---- gradient -------------------------------------------------------------------------------------------------------- */
static bool backward_job(const lc_kargs *k, adapter_job *j) {
    const lc_view *gx = &k->y[0], *low = &k->y[1];
    memset(j, 0, sizeof *j);
    if ((low->dtype != LC_K_BF16 && low->dtype != LC_K_F16) || !low->data) return false;
    j->rows = (int32_t)low->dim[0], j->in = gx->data ? (int32_t)gx->dim[1] : 0, j->low = low->data, j->gx = gx->data;
    for (int i = 0; i < PARTS; i++) {
        const lc_view *g = &k->x[i], *a = &k->x[6 + i], *b = &k->x[9 + i];
        adapter_part *p = &j->part[i];
        if (!g->data || !b->data) continue;
        if (b->dtype != LC_K_F32 || g->dtype != low->dtype || (gx->data && (!a->data || a->dtype != LC_K_F32))) return false;
        p->x = g->data, p->ld_x = g->dim[1], p->a = (const float *)a->data, p->b = (const float *)b->data;
        p->rank = (int32_t)b->dim[1], p->out = (int32_t)b->dim[0], p->scale = (float)k->f[i];
    }
    return adapters_take(j, true);
}

extern "C" size_t lc_cuda_projections_backward_work(const lc_kargs *k) {
    adapter_job job;
    if (backward_job(k, &job)) return 0;
    for (int i = 0; i < PARTS; i++)
        if (k->x[i].data) return adapter_bytes(k, 6, 9, k->x[i].dtype);
    return 0;
}

/* g_i [rows, out_i], w_i [out_i, in], a_i [r_i, in], b_i [out_i, r_i] -> gx [rows, in], low [rows, sum of r_i] */
extern "C" int lc_cuda_projections_backward(const lc_kargs *k) {
    void *gx = k->y[0].data, *low = k->y[1].data;
    const lc_view *any = low ? &k->y[1] : &k->y[0];
    const int dtype = any->dtype;
    const int64_t rows = any->dim[0], size = dtype_bytes(dtype), in = gx ? k->y[0].dim[1] : 0, rank = low ? k->y[1].dim[1] : 0;
    char *copy[2 * PARTS] = {};
    int rc = LC_K_OK, begun = 0;
    if (!rows) return LC_K_OK;
    adapter_job job;
    const bool joined = backward_job(k, &job);
    if (joined) rc = adapters_run(&job, dtype, true), begun = gx != NULL;
    else gather(k, 6, 9, k->work, dtype, copy);
    for (int64_t i = 0, at = 0; i < PARTS && !rc && !joined; i++) {
        const lc_view *g = &k->x[i], *b = &k->x[9 + i];
        if (!g->data || !b->data) continue;
        const int64_t out = g->dim[1], r = b->dim[1];
        rc = lc_cuda_gemm(0, 0, rows, r, out, k->f[i], g->data, dtype, out, copy[PARTS + i], dtype, r, 0, NULL, 0,
                          (char *)low + at * size, dtype, rank);
        at += r;
    }
    if (!gx || rc) return rc;
    if (rank && !joined) rc = lc_cuda_gemm(0, 0, rows, in, rank, 1, low, dtype, rank, k->work, dtype, in, 0, NULL, 0, gx, dtype, in), begun = 1;
    for (int i = 0; i < PARTS && !rc; i++) {
        const lc_view *g = &k->x[i], *w = &k->x[3 + i];
        if (!g->data) continue;
        const int64_t out = g->dim[1];
        rc = lc_cuda_gemm(0, 0, rows, in, out, 1, g->data, dtype, out, w->data, w->dtype, in, begun, gx, in, gx, dtype, in);
        begun = 1;
    }
    return rc;
}
