/* hybrid_backward_fast.cu: the plan of hybrid attention's gradient on tensor cores: which calls it takes, how the sequence is cut
 * into segments so that the GPU is full, the workspace, the order of the kernels: values of the queries' rows, sums of segments, queries (which
 * leave x), keys, sums over heads. */
#include "hybrid_backward_tile.cuh"

static bool is_rows(const rows4 &r, int align) { /* rows of halves that begin at multiples of `align` of them */
    if (!r.p) return true;
    if (r.s[2] >= 1 << 23) return false; /* 64 rows are walked in 32 bits */
    return r.dtype == LC_K_BF16 && (uintptr_t)r.p % (2 * align) == 0 && r.s[0] % align == 0 && r.s[1] % align == 0 && r.s[2] % align == 0;
}

static void shape_of(const hybrid &a, fast *p) {
    bool both = a.map == MAP_SOFTMAX_DIM || a.map == MAP_EXP_DIM;
    p->lag = a.window ? 1 : 0;
    p->bf = a.F <= 64 ? 64 : 128;
    p->fw = a.map == MAP_NONE ? 0 : both ? p->bf / 2 : p->bf;
}

bool hybrid_backward_fast_takes(const gradients *o) {
    const hybrid &a = o->a;
    fast p;
    if (a.q.dtype != LC_K_BF16 || (a.d != 64 && a.d != 128) || (a.window && a.window != 64) || !a.F || a.F > 128 || a.f % 8) return false;
    bool both = a.map == MAP_SOFTMAX_DIM || a.map == MAP_EXP_DIM;
    if ((both && !a.full) || !a.b || !a.t || a.t > 1 << 30) return false;
    shape_of(a, &p);
    if (lc_cuda_now->shared_max < shared_bytes(a.d, p.bf, p.fw)) return false;
    if (!has_shape(a.d, p.bf, p.fw)) return false; /* as d and fw 128: both maps' weights do not fit into shared memory */
    bool ok = is_rows(a.q, 8) && is_rows(a.k, 8) && is_rows(a.v, 8) && is_rows(o->g, 8) && is_rows(o->y, 8) && is_rows(o->dq, 8) &&
              is_rows(o->dk, 8) && is_rows(o->dv, 8);
    if (a.map == MAP_NONE) ok = ok && is_rows(a.mq, 2) && is_rows(a.mk, 2) && is_rows(o->dmq, 2) && is_rows(o->dmk, 2);
    return ok;
}

static size_t plan(const gradients &o, fast *p, void *work) {
    const hybrid &a = o.a;
    memset(p, 0, sizeof *p);
    shape_of(a, p);
    int64_t heads = (int64_t)a.b * a.h, chunks = (a.t + 63) / 64, n = lc_cuda_now->sms / heads;
    if (n > chunks / 2) n = chunks / 2;
    p->segments = (int)(n < 1 ? 1 : n > 32 ? 32 : n);
    arena w = {(char *)work, 0};
    size_t rows = (size_t)heads * a.t, items = (size_t)heads * p->segments;
    bool maps = a.map != MAP_NONE;
    p->values = w.take<float>(VALUES * rows), p->xs = w.take<float>(items);
    for (int key = 0; key < 2; key++) {
        if (p->segments > 1) p->state[key] = w.take<float>(items * p->bf * (a.d + 1));
        if (maps && (key ? o.dmk : o.dmq).p) p->dw[key] = w.take<float>(items * a.d * p->fw);
        if (maps && (key ? o.dbk : o.dbq)) p->bias[key] = w.take<float>(items);
    }
    if (a.group > 1 && o.dk.p) p->rows[0] = w.take<bf16>(rows * a.d);
    if (a.group > 1 && o.dv.p) p->rows[1] = w.take<bf16>(rows * a.d);
    if (a.mk_group > 1 && o.dmk.p) p->rows[2] = w.take<bf16>(rows * a.F);
    return w.used;
}

size_t hybrid_backward_fast_work(const gradients *o) {
    fast p;
    return plan(*o, &p, NULL);
}

int hybrid_backward_fast(const gradients *o, void *work) {
    fast p;
    plan(*o, &p, work);
    bool usual = is_usual(o->a), keys = o->through_k || o->dv.p || o->dk.p;
    int rc = hybrid_backward_rows(*o, p, usual);
    if (!rc) rc = usual ? usual_sums(*o, p) : hybrid_backward_sums(*o, p);
    if (!rc) rc = usual ? usual_queries(*o, p) : hybrid_backward_queries(*o, p);
    if (!rc && keys) rc = usual ? usual_keys(*o, p) : hybrid_backward_keys(*o, p);
    return rc ? rc : hybrid_backward_finish(*o, p);
}
