/* attention.c: shapes and gradients of softmax attention and of the hybrid of window softmax and linear attention. The maths
 * stands at the rows in ops.def. */
#include "op.h"

static const int order[4] = {0, 2, 1, 3}; /* results lie as [b, t, h, d] */

static lc_status check_qkv(lc_frame *c, const lc_tensor *q, const lc_tensor *k, const lc_tensor *v) {
    if (q->ndim != 4 || k->ndim != 4 || v->ndim != 4) return lc_op_error(c, LC_ESHAPE, "q is [b, h, t, d], k and v [b, g, s, d]");
    if (q->dtype != k->dtype || q->dtype != v->dtype) return lc_op_error(c, LC_EDTYPE, "dtypes of q, k and v differ");
    if (!lc_same_shape(k, v)) return lc_op_error(c, LC_ESHAPE, "k and v differ in shape");
    if (q->dim[0] != k->dim[0] || q->dim[3] != k->dim[3]) return lc_op_error(c, LC_ESHAPE, "q and k differ in batch or head dim");
    if (k->dim[1] < 1 || q->dim[1] % k->dim[1]) return lc_op_error(c, LC_ESHAPE, "%d query heads do not divide by %d key heads", q->dim[1], k->dim[1]);
    return LC_OK;
}

static lc_status check_start(lc_frame *c, const lc_tensor *start, const lc_tensor *q) {
    if (start && (start->ndim != 1 || start->dim[0] != q->dim[0] || start->dtype != LC_I32))
        return lc_op_error(c, LC_ESHAPE, "start is one i32 per row of the batch");
    return LC_OK;
}

/* ---- softmax --------------------------------------------------------------------------------------------------------- */
static lc_status attention_shape(lc_frame *c) {
    const lc_tensor *q = c->x[0];
    LC_TRY(check_qkv(c, q, c->x[1], c->x[2]));
    LC_TRY(check_start(c, c->x[3], q));
    if (c->x[4] && (c->x[4]->ndim != 0 || c->x[4]->dtype != LC_I32)) return lc_op_error(c, LC_ESHAPE, "length is a 0-dim i32 tensor");
    if (c->x[4] && c->recording) return lc_op_error(c, LC_EGRAD, "no gradient with length: that is for caches");
    if (!c->x[4] && q->dim[2] > c->x[1]->dim[2]) return lc_op_error(c, LC_ESHAPE, "more queries than keys");
    LC_TRY(lc_out_permuted(c, 0, q->dtype, 4, q->dim, order));
    return lc_out(c, 1, real_dtype(q), 3, q->dim);
}

static lc_status attention_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    const lc_node *n = b->node;
    lc_frame c;
    lc_frame_init(&c, LC_OP_attention_backward);
    c.x[0] = b->g[0];
    for (int i = 0; i < 3; i++) c.x[1 + i] = n->x[i];
    c.x[4] = n->y[0];
    c.x[5] = n->y[1];
    c.x[6] = n->x[3];
    c.i[0] = n->i[0];
    c.f[0] = n->f[0];
    for (int i = 0; i < 3; i++) c.skip[i] = !b->need[i];
    x_run(&e, &c);
    for (int i = 0; i < 3; i++) x_give(&e, b, i, c.y[i]);
    return x_done(&e);
}

static lc_status attention_backward_shape(lc_frame *c) {
    for (int i = 0; i < 3; i++) LC_TRY(lc_out_permuted(c, i, c->x[1 + i]->dtype, 4, c->x[1 + i]->dim, order));
    return LC_OK;
}

/* ---- hybrid ---------------------------------------------------------------------------------------------------------- */
enum { Q, K_, V, MQ, MK, BQ, BK, FACTORS, START, STATE, ZSUM, CACHE, SLOT, POS, GATES, SINKS, HYBRID_IN };
enum { MAP, FULL, SKIP, WINDOW, KIND, AFFINE };

/* What is trained may be kept in f32 beside activations in bf16 or f16. */
static bool head_dtype(const lc_frame *c, int i) { return c->x[i]->dtype == c->x[Q]->dtype || c->x[i]->dtype == real_dtype(c->x[Q]); }

static lc_status check_map(lc_frame *c) {
    const lc_tensor *q = c->x[Q], *k = c->x[K_], *mq = c->x[MQ], *mk = c->x[MK];
    if (!mq || !mk) return lc_op_error(c, LC_EARG, "mq and mk are wanted: the maps' weights, or ready features");
    if (mq->dtype != mk->dtype) return lc_op_error(c, LC_EDTYPE, "dtypes of mq and mk differ");
    if (mq->dtype != q->dtype && (c->i[MAP] == 0 || mq->dtype != real_dtype(q)))
        return lc_op_error(c, LC_EDTYPE, "mq and mk have q's dtype; weights of a map may also be %s", lc_dtype_name(real_dtype(q)));
    if (c->i[MAP] == 0) {
        bool ok = mq->ndim == 4 && mk->ndim == 4 && !memcmp(mq->dim, q->dim, 3 * sizeof q->dim[0]) && mk->dim[0] == k->dim[0] &&
                  mk->dim[2] == k->dim[2] && mk->dim[3] == mq->dim[3] && (mk->dim[1] == q->dim[1] || mk->dim[1] == k->dim[1]);
        return ok ? LC_OK : lc_op_error(c, LC_ESHAPE, "ready features are mq [b, h, t, F] and mk [b, h or g, t, F]");
    }
    if (mq->ndim != 3 || !lc_same_shape(mq, mk) || mq->dim[0] != q->dim[1] || mq->dim[1] != q->dim[3])
        return lc_op_error(c, LC_ESHAPE, "mq and mk are [h, d, f]");
    if (c->i[SKIP] && mq->dim[2] != mq->dim[1]) return lc_op_error(c, LC_ESHAPE, "skip wants f = d");
    for (int i = BQ; i <= BK; i++)
        if (c->x[i] && (lc_tensor_numel(c->x[i]) != q->dim[1] || !head_dtype(c, i)))
            return lc_op_error(c, LC_ESHAPE, "a bias has one value per query head, in q's dtype or %s", lc_dtype_name(real_dtype(q)));
    return LC_OK;
}

/* The kernels read one value per head as an array. */
static lc_status pack_heads(lc_frame *c, int first, int last) {
    for (int i = first; i <= last; i++) {
        if (!c->x[i] || lc_tensor_contiguous(c->x[i])) continue;
        lc_frame copy;
        lc_frame_init(&copy, LC_OP_clone);
        copy.x[0] = c->x[i];
        bool old = lc_grad_enabled;
        lc_grad_enabled = false;
        lc_status rc = lc_run(&copy);
        lc_grad_enabled = old;
        LC_TRY(rc);
        lc_substitute(c, i, copy.y[0]);
    }
    return LC_OK;
}

static int32_t feature_dim(const lc_frame *c) {
    int32_t f = last_dim(c->x[MQ]);
    return c->i[FULL] && (c->i[MAP] == 1 || c->i[MAP] == 2) ? 2 * f : f;
}

/* Sums are carried in what is computed in; a device's kernels also round them, and the cached keys and values, to halves. */
static bool state_dtype(const lc_tensor *q, const lc_tensor *t) {
    return t->dtype == real_dtype(q) || (t->device != 0 && t->dtype == q->dtype);
}

static lc_status check_state(lc_frame *c) {
    const lc_tensor *q = c->x[Q], *k = c->x[K_], *s = c->x[STATE], *z = c->x[ZSUM], *cache = c->x[CACHE];
    if (!s) {
        for (int i = ZSUM; i <= POS; i++)
            if (c->x[i]) return lc_op_error(c, LC_EARG, "%s comes with a state only", c->row->x_name[i]);
        return LC_OK;
    }
    if (c->recording) return lc_op_error(c, LC_EGRAD, "a carried state has no gradient");
    if (!z || !c->x[POS] || (c->i[WINDOW] > 0 && !cache)) return lc_op_error(c, LC_EARG, "a state comes with zsum, pos and, with a window, cache");
    int real = real_dtype(q), n = s->ndim == 4 ? s->dim[0] : -1;
    if (!state_dtype(q, s) || (cache && !state_dtype(q, cache)))
        return lc_op_error(c, LC_EDTYPE, "state and cache are %s; on a device they may have q's dtype", lc_dtype_name(real));
    bool ok = s->ndim == 4 && s->dim[1] == q->dim[1] && s->dim[2] == feature_dim(c) && s->dim[3] == q->dim[3] && z->ndim == 3 &&
              z->dtype == real && z->dim[0] == n && z->dim[1] == q->dim[1] && z->dim[2] == s->dim[2];
    if (!ok) return lc_op_error(c, LC_ESHAPE, "state is [n, h, F, d], zsum [n, h, F] with F = %d", feature_dim(c));
    if (!lc_tensor_contiguous(s) || !lc_tensor_contiguous(z) || (cache && !lc_tensor_contiguous(cache)))
        return lc_op_error(c, LC_EARG, "state, zsum and cache must be contiguous");
    if (cache && c->i[MAP] != 0) {
        ok = cache->ndim == 5 && cache->dim[0] == n && cache->dim[1] == 2 && cache->dim[2] == k->dim[1] &&
             cache->dim[3] == 2 * c->i[WINDOW] && cache->dim[4] == q->dim[3];
        if (!ok) return lc_op_error(c, LC_ESHAPE, "cache is [n, 2, g, 2 * window, d]");
    }
    const lc_tensor *pos = c->x[POS], *slot = c->x[SLOT];
    if (pos->ndim != 1 || pos->dim[0] != n || pos->dtype != LC_I32) return lc_op_error(c, LC_ESHAPE, "pos is one i32 per slot");
    if (slot && (slot->ndim != 1 || slot->dim[0] != q->dim[0] || slot->dtype != LC_I32)) return lc_op_error(c, LC_ESHAPE, "slot is one i32 per row");
    if (!slot && q->dim[0] > n) return lc_op_error(c, LC_ESHAPE, "%d rows, %d slots", q->dim[0], n);
    return LC_OK;
}

static lc_status hybrid_shape(lc_frame *c) {
    const lc_tensor *q = c->x[Q];
    LC_TRY(check_qkv(c, q, c->x[K_], c->x[V]));
    if (q->dim[2] != c->x[K_]->dim[2]) return lc_op_error(c, LC_ESHAPE, "q and k differ in length");
    if (c->x[GATES] || c->x[SINKS]) return lc_op_error(c, LC_EARG, "gates and sinks are not built yet");
    if (c->i[WINDOW] < 0) return lc_op_error(c, LC_EARG, "window %d", c->i[WINDOW]);
    if (c->i[WINDOW] > 0 && (!c->x[FACTORS] || lc_tensor_numel(c->x[FACTORS]) != q->dim[1] || !head_dtype(c, FACTORS)))
        return lc_op_error(c, LC_ESHAPE, "factors has one value per query head, in q's dtype or %s", lc_dtype_name(real_dtype(q)));
    LC_TRY(check_start(c, c->x[START], q));
    LC_TRY(check_map(c));
    LC_TRY(check_state(c));
    LC_TRY(pack_heads(c, BQ, START));
    LC_TRY(lc_out_permuted(c, 0, q->dtype, 4, q->dim, order));
    LC_TRY(lc_out(c, 1, real_dtype(q), 3, q->dim));
    LC_TRY(lc_out(c, 2, LC_I32, 3, q->dim));
    return lc_out(c, 3, real_dtype(q), 3, q->dim);
}

static lc_status hybrid_backward(lc_back *b) {
    lc_expr e = {.rc = LC_OK};
    const lc_node *n = b->node;
    lc_frame c;
    lc_frame_init(&c, LC_OP_hybrid_attention_backward);
    c.x[0] = b->g[0];
    for (int i = Q; i <= START; i++) c.x[1 + i] = n->x[i];
    for (int i = 0; i < 4; i++) c.x[2 + START + i] = n->y[i];
    memcpy(c.i, n->i, sizeof c.i[0] * 6);
    memcpy(c.f, n->f, sizeof c.f[0] * 3);
    for (int i = Q; i <= FACTORS; i++) c.skip[i] = !n->x[i] || !b->need[i];
    x_run(&e, &c);
    for (int i = Q; i <= FACTORS; i++) x_give(&e, b, i, c.y[i]);
    return x_done(&e);
}

static lc_status hybrid_backward_shape(lc_frame *c) {
    LC_TRY(pack_heads(c, 1 + BQ, 1 + START));
    for (int i = 0; i < 8; i++) {
        const lc_tensor *x = c->x[1 + i];
        if (!x) c->skip[i] = true;
        else if (x->ndim == 4 && i <= MK && lc_tensor_numel(x) > 0 && x->dim[0] == c->x[1]->dim[0] && x->dim[2] == c->x[1]->dim[2])
            LC_TRY(lc_out_permuted(c, i, x->dtype, 4, x->dim, order));
        else LC_TRY(lc_out_like(c, i, x));
    }
    return LC_OK;
}

const lc_rule lc_rule_attention = {.shape = attention_shape, .backward = attention_backward, .save_x = 15, .save_y = 3};
const lc_rule lc_rule_attention_backward = {.shape = attention_backward_shape};
const lc_rule lc_rule_hybrid_attention = {.shape = hybrid_shape, .backward = hybrid_backward, .save_x = 511, .save_y = 15};
const lc_rule lc_rule_hybrid_attention_backward = {.shape = hybrid_backward_shape};
