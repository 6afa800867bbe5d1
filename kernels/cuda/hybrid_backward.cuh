/* hybrid_backward.cuh: what the files of hybrid attention's gradient share: the call, its results, and the workspace. With u_ij the
 * weights before division, z_i the denominator and delta_i = g_i . y_i: du_ij = (g_i . v_j - delta_i) / z_i. The features' gradients
 * are df(q_i) = lambda (S_i g_i - Z_i delta_i) / z_i with S_i = sum f(k_j) v_j^T, Z_i = sum f(k_j) over i's linear keys, and
 * df(k_j) = R_j v_j - P_j with R_j = sum f(q_i) g_i^T lambda / z_i, P_j = sum f(q_i) delta_i lambda / z_i over the queries that see j
 * linearly. All weights of a row times their du sum to 0, so x_i = f(q_i) . df(q_i) is what the row's maximum gets (it goes to the
 * key at the maximum), and the sum of all x gives the factors' gradient: those need no window at all. */
#ifndef LC_HYBRID_BACKWARD_CUH
#define LC_HYBRID_BACKWARD_CUH

#include "hybrid.cuh"

struct gradients {
    hybrid a;
    rows4 g, y, c, argmax, z;    /* of the forward; the last three [b, h, t] */
    rows4 dq, dk, dv, dmq, dmk;  /* p NULL: not wanted */
    void *dbq, *dbk, *dfactors;  /* [h] */
    int dbq_dtype, dbk_dtype, dfactors_dtype;
    int through_q, through_k;    /* the features' gradients are wanted */
};

/* Of a result that is not wanted nothing but data is set. */
static inline rows4 result_of(const lc_view *v) {
    rows4 none = {NULL, {0, 0, 0}, 0};
    return v->data ? rows4_of(v) : none;
}

static inline int gradients_open(gradients *o, const lc_kargs *k) {
    const lc_view *x = k->x, *y = k->y;
    memset(o, 0, sizeof *o);
    int rc = hybrid_open(&o->a, k, x + 1);
    if (rc) return rc;
    o->g = rows4_of(x), o->y = rows4_of(x + 10);
    o->c = rows3_of(x + 11), o->argmax = rows3_of(x + 12), o->z = rows3_of(x + 13);
    o->dq = result_of(y), o->dk = result_of(y + 1), o->dv = result_of(y + 2), o->dmq = result_of(y + 3), o->dmk = result_of(y + 4);
    o->dbq = y[5].data, o->dbk = y[6].data, o->dfactors = o->a.window ? y[7].data : NULL;
    o->dbq_dtype = y[5].dtype, o->dbk_dtype = y[6].dtype, o->dfactors_dtype = y[7].dtype;
    if (!o->a.F) o->dmq.p = o->dmk.p = NULL;
    o->through_k = o->a.F && (o->dk.p || o->dmk.p || o->dbk);
    o->through_q = o->a.F && (o->dq.p || o->dmq.p || o->dbq || (o->a.window && (o->dk.p || o->dfactors)));
    return 0;
}

/* The first query that sees key j linearly; positions. */
__host__ __device__ __forceinline__ int64_t hybrid_hi(const hybrid &a, int64_t j) {
    if (!a.window) return j;
    return a.kind == KIND_SLIDING ? j + a.window : (j / a.window + 2) * a.window;
}

template <class R> __device__ __forceinline__ void write_as(void *p, int dtype, int64_t i, R v) {
    switch (dtype) {
    case LC_K_F32: ((float *)p)[i] = (float)v; break;
    case LC_K_BF16: ((bf16 *)p)[i] = store<bf16>(v); break;
    case LC_K_F16: ((f16 *)p)[i] = store<f16>(v); break;
    default: ((double *)p)[i] = (double)v;
    }
}

/* A workspace handed out piece by piece. Without a base it only measures. */
struct arena {
    char *base;
    size_t used;
    template <class X> X *take(size_t n) {
        X *p = base ? (X *)(base + used) : NULL;
        used += (n * sizeof(X) + 255) / 256 * 256;
        return p;
    }
};

/* hybrid_backward_plain.cu: any dtype, any size. Both return / measure as the entry points do. */
int hybrid_backward_plain(const gradients *o, void *work);
size_t hybrid_backward_plain_work(const gradients *o);
/* hybrid_backward_fast.cu: whether the tensor-core kernels take the call; then the same two. */
bool hybrid_backward_fast_takes(const gradients *o);
int hybrid_backward_fast(const gradients *o, void *work);
size_t hybrid_backward_fast_work(const gradients *o);

#endif
