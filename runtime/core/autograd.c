/* autograd.c: the tape. An op whose input wants a gradient leaves a node: what its rule reads, its scalars, an edge per input. A
 * backward walks nodes by descending sequence number from a heap (no recursion), frees what a node saved as soon as it has run,
 * and stops at a node written in Lua, whose turn it then is (lc_backward_next); several backwards may be under way, one inside
 * another. Gradients are not differentiable again. */
#include <stdlib.h>
#include <string.h>

#include "core.h"

bool lc_grad_enabled = true;
static uint64_t sequence;

/* ---- Lua nodes that died, for Lua to pull ---------------------------------------------------------------------------- */
static int32_t *dead;
static int dead_count, dead_room;

static void lua_node_died(int32_t id) {
    if (dead_count == dead_room) {
        int room = dead_room ? 2 * dead_room : 64;
        int32_t *p = realloc(dead, (size_t)room * sizeof *p);
        if (!p) return; /* the closure stays in Lua's table: a leak, not a fault */
        dead = p;
        dead_room = room;
    }
    dead[dead_count++] = id;
}

int lc_lua_node_dead(int32_t *id) {
    *id = dead_count ? dead[--dead_count] : 0;
    return LC_OK;
}

/* ---- nodes ----------------------------------------------------------------------------------------------------------- */
static lc_node *node_new(int n_in, int n_x, int n_out) {
    size_t edges = (size_t)(n_in + n_out) * sizeof(lc_edge), tensors = (size_t)(n_x + n_out) * sizeof(lc_tensor *);
    size_t versions = (size_t)(n_x + n_out) * sizeof(uint32_t);
    lc_node *n = malloc(sizeof *n + edges + tensors + versions);
    if (!n) {
        lc_fail(LC_ENOMEM, "out of memory for the tape");
        return NULL;
    }
    memset(n, 0, sizeof *n);
    char *p = (char *)(n + 1);
    n->edge = (lc_edge *)p;
    n->out = n->edge + n_in;
    n->x = (lc_tensor **)(p + edges);
    n->y = n->x + n_x;
    n->version = (uint32_t *)(p + edges + tensors);
    memset(n->x, 0, tensors);
    memset(n->edge, 0, edges);
    n->refs = 1;
    n->n_in = n_in;
    n->n_x = n_x;
    n->n_out = n_out;
    n->seq = ++sequence;
    return n;
}

static void free_saved(lc_node *n) {
    for (int i = 0; i < n->n_x + n->n_out; i++) {
        lc_release(n->x[i]); /* y follows x */
        n->x[i] = NULL;
    }
    n->freed = true;
}

static void free_gradients(lc_node *n) {
    if (!n->g) return;
    for (int i = 0; i < n->n_out; i++) lc_release(n->g[i]);
    free(n->g);
    n->g = NULL;
}

/* Releasing the last reference to a long chain must not recurse: nodes to be freed wait in a list (linked by owner). */
void lc_node_release(lc_node *first) {
    static lc_node *waiting;
    static bool busy;
    if (--first->refs > 0) return;
    first->owner = (lc_backward *)waiting;
    waiting = first;
    if (busy) return;
    busy = true;
    while (waiting) {
        lc_node *n = waiting;
        waiting = (lc_node *)n->owner;
        n->owner = NULL;
        free_saved(n);
        free_gradients(n);
        for (int i = 0; i < n->n_in; i++) {
            if (n->edge[i].node) lc_node_release(n->edge[i].node);
            lc_release(n->edge[i].leaf);
        }
        if (n->op < 0) lua_node_died(n->lua_id);
        free(n);
    }
    busy = false;
}

bool lc_wants_grad(const lc_tensor *t) { return t->requires_grad; }

static void describe(lc_edge *e, const lc_tensor *t) {
    e->ndim = t->ndim;
    e->dtype = t->dtype;
    memcpy(e->dim, t->dim, sizeof e->dim);
}

static void connect(lc_edge *e, lc_tensor *t) {
    describe(e, t);
    if (t->node) {
        e->node = t->node;
        e->node->refs++;
        e->out = t->node_out;
    } else if (t->requires_grad) {
        e->leaf = lc_retain(t);
    }
}

static void attach(lc_node *n, int out, lc_tensor *t) {
    describe(&n->out[out], t);
    t->node = n;
    t->node_out = out;
    t->requires_grad = 1;
    n->refs++;
    n->device = t->device;
}

lc_status lc_record(lc_frame *c) {
    const lc_rule *rule = c->row->rule;
    int n_x = c->row->n_x;
    uint32_t save_x = rule->save_x, save_y = rule->save_y;
    if (rule->save) rule->save(c, &save_x, &save_y);
    lc_node *n = node_new(n_x + c->n_list, n_x, c->row->n_y);
    if (!n) return LC_ENOMEM;
    n->op = c->op;
    for (int i = 0; i < c->row->n_f; i++) n->f[i] = c->f[i];
    for (int i = 0; i < c->row->n_i; i++) n->i[i] = c->i[i];
    n->seed = c->seed;
    n->offset = c->offset;
    for (int i = 0; i < n_x; i++) {
        if (!c->x[i]) continue;
        connect(&n->edge[i], c->x[i]);
        if (save_x >> i & 1) {
            n->x[i] = lc_retain(c->x[i]);
            n->version[i] = c->x[i]->storage->version;
        }
    }
    for (int i = 0; i < c->n_list; i++) connect(&n->edge[n_x + i], c->list[i]);
    for (int i = 0; i < c->row->n_y; i++) {
        if (!c->y[i]) continue;
        if (save_y >> i & 1) { /* a view without history, or the node would hold itself */
            if (!(n->y[i] = lc_tensor_view(c->y[i]))) {
                lc_node_release(n);
                return LC_ENOMEM;
            }
            n->version[n_x + i] = c->y[i]->storage->version;
        }
        if (!c->row->y_hidden[i] && lc_dtype_is_float(c->y[i]->dtype)) attach(n, i, c->y[i]);
        else describe(&n->out[i], c->y[i]);
    }
    lc_node_release(n); /* the results hold it now */
    return LC_OK;
}

int lc_lua_node(int32_t id, int n_in, const lc_handle *in, int n_out, const lc_handle *out) {
    lc_node *n = node_new(n_in, 0, n_out);
    if (!n) return LC_ENOMEM;
    n->op = -1;
    n->lua_id = id;
    for (int i = 0; i < n_in; i++) {
        lc_tensor *t = in[i]._gen ? lc_get(&in[i]) : NULL;
        if (t) connect(&n->edge[i], t);
    }
    for (int i = 0; i < n_out; i++) {
        lc_tensor *t = lc_get(&out[i]);
        if (!t || t->node) {
            lc_node_release(n);
            return t ? lc_fail(LC_EGRAD, "a result of a custom function has history already") : LC_ESTALE;
        }
        attach(n, i, t);
    }
    lc_node_release(n);
    return LC_OK;
}

/* ---- grad mode, leaves ----------------------------------------------------------------------------------------------- */
int lc_grad_mode(int on) {
    int old = lc_grad_enabled;
    if (on >= 0) lc_grad_enabled = on != 0;
    return old;
}

int lc_require_grad(const lc_handle *h, int on) {
    lc_tensor *t = lc_get(h);
    if (!t) return LC_ESTALE;
    if (t->node) return lc_fail(LC_EGRAD, "%T is the result of an op: only leaves can be told; use detach first", t);
    if (on && !lc_dtype_is_float(t->dtype)) return lc_fail(LC_EDTYPE, "only float tensors have gradients, not %T", t);
    t->requires_grad = on != 0;
    return LC_OK;
}

int lc_requires_grad(const lc_handle *h) {
    lc_tensor *t = lc_get(h);
    return t ? t->requires_grad : 0;
}

int lc_grad(lc_handle *out, const lc_handle *h) {
    lc_tensor *t = lc_get(h);
    out->_gen = 0;
    if (!t) return LC_ESTALE;
    if (!t->grad) return LC_OK;
    lc_tensor *v = lc_tensor_view(t->grad);
    if (!v) return LC_ENOMEM;
    lc_give_handle(v, out);
    return LC_OK;
}

int lc_set_grad(const lc_handle *h, const lc_handle *g) {
    lc_tensor *t = lc_get(h), *grad = NULL;
    if (!t) return LC_ESTALE;
    if (g && g->_gen) {
        lc_tensor *src = lc_get(g);
        if (!src) return LC_ESTALE;
        if (!lc_same_shape(t, src)) return lc_fail(LC_ESHAPE, "a gradient has its tensor's shape: %T for %T", src, t);
        if (!(grad = lc_tensor_view(src))) return LC_ENOMEM;
    }
    lc_release(t->grad);
    t->grad = grad;
    return LC_OK;
}

int lc_detach(lc_handle *out, const lc_handle *h) { return lc_alias(out, h); }

/* ---- backward -------------------------------------------------------------------------------------------------------- */
struct lc_backward {
    lc_node **heap; /* by descending seq */
    int count, room;
    lc_node *lua;   /* waiting for Lua */
    lc_tensor **gx; /* what Lua gave */
};

static lc_status heap_push(lc_backward *b, lc_node *n) {
    if (b->count == b->room) {
        int room = b->room ? 2 * b->room : 64;
        lc_node **p = lc_resize(b->heap, (size_t)room, sizeof *p);
        if (!p) return LC_ENOMEM;
        b->heap = p;
        b->room = room;
    }
    n->refs++;
    int i = b->count++;
    for (; i && b->heap[(i - 1) / 2]->seq < n->seq; i = (i - 1) / 2) b->heap[i] = b->heap[(i - 1) / 2];
    b->heap[i] = n;
    return LC_OK;
}

static lc_node *heap_pop(lc_backward *b) {
    lc_node *top = b->heap[0], *last = b->heap[--b->count];
    int i = 0;
    for (;;) {
        int c = 2 * i + 1;
        if (c >= b->count) break;
        if (c + 1 < b->count && b->heap[c + 1]->seq > b->heap[c]->seq) c++;
        if (b->heap[c]->seq <= last->seq) break;
        b->heap[i] = b->heap[c];
        i = c;
    }
    b->heap[i] = last;
    return top;
}

static lc_status add_in_place(lc_tensor *to, lc_tensor *from) {
    lc_frame c;
    lc_frame_init(&c, LC_OP_add_);
    c.x[0] = to;
    c.x[1] = from;
    c.f[0] = 1;
    return lc_run(&c);
}

static lc_status run1(int op, lc_tensor *x, int i0, int i1, lc_tensor **out) {
    lc_frame c;
    lc_frame_init(&c, op);
    c.x[0] = x;
    c.i[0] = i0;
    c.i[1] = i1;
    LC_TRY(lc_run(&c));
    *out = c.y[0];
    return LC_OK;
}

static bool exclusive(const lc_tensor *t) { return t->refs == 1 && t->storage->refs == 1 && !t->storage->readonly && lc_tensor_contiguous(t); }

/* *sum += g, g being a reference that is used up. */
static lc_status gather(lc_tensor **sum, lc_tensor *g) {
    if (!*sum) {
        *sum = g;
        return LC_OK;
    }
    lc_status rc;
    if (exclusive(*sum)) {
        rc = add_in_place(*sum, g);
    } else {
        lc_frame c;
        lc_frame_init(&c, LC_OP_add);
        c.x[0] = *sum;
        c.x[1] = g;
        if ((rc = lc_run(&c)) == LC_OK) {
            lc_release(*sum);
            *sum = c.y[0];
        }
    }
    lc_release(g);
    return rc;
}

static lc_status reach_leaf(lc_tensor *leaf, lc_tensor *g) {
    lc_status rc = LC_OK;
    if (leaf->grad) {
        rc = add_in_place(leaf->grad, g);
        lc_release(g);
        return rc;
    }
    int dtype = leaf->dtype == LC_F64 ? LC_F64 : LC_F32;
    if (g->dtype == dtype && exclusive(g)) {
        leaf->grad = g;
        return LC_OK;
    }
    rc = g->dtype == dtype ? run1(LC_OP_clone, g, 0, 0, &leaf->grad) : run1(LC_OP_to, g, dtype, g->device, &leaf->grad);
    lc_release(g);
    return rc;
}

static lc_status reach_node(lc_backward *b, lc_node *n, int out, lc_tensor *g) {
    lc_status rc = LC_OK;
    if (n->freed) rc = lc_fail(LC_EGRAD, "backward a second time through the same graph: its saved tensors are gone");
    else if (n->owner && n->owner != b) rc = lc_fail(LC_EGRAD, "two backwards share a graph");
    if (rc == LC_OK && !n->g) {
        if (!(n->g = lc_alloc((size_t)n->n_out, sizeof *n->g))) rc = LC_ENOMEM;
        else {
            n->owner = b;
            rc = heap_push(b, n);
        }
    }
    if (rc != LC_OK) {
        lc_release(g);
        return rc;
    }
    return gather(&n->g[out], g);
}

/* What other results have already sent to input i, borrowed, or NULL. A rule that takes it hands over the sum of it and its own
 * part as the gradient of i: no pass over memory of its own adds the two. */
lc_tensor *lc_back_pending(lc_back *b, int i) {
    const lc_edge *e = &b->node->edge[i];
    lc_tensor *g = e->node && e->node->g ? e->node->g[e->out] : NULL;
    if (g && g->dtype != e->dtype) g = NULL;
    b->whole[i] = g != NULL;
    return g;
}

/* Gradients on their way to leaves that have some already: added three at a time, which spares a device launches. */
typedef struct leaf_sums {
    lc_tensor *to[3], *from[3]; /* from: references */
    int n;
} leaf_sums;

static lc_status add_leaf_sums(leaf_sums *s) {
    lc_status rc = LC_OK;
    lc_frame c;
    if (s->n == 1) rc = add_in_place(s->to[0], s->from[0]);
    if (s->n > 1) {
        lc_frame_init(&c, LC_OP_add_pairs_);
        for (int i = 0; i < s->n; i++) c.x[2 * i] = s->to[i], c.x[2 * i + 1] = s->from[i];
        rc = lc_run(&c);
    }
    for (int i = 0; i < s->n; i++) lc_release(s->from[i]);
    s->n = 0;
    return rc;
}

/* Takes the reference g, if the sum can wait for others. */
static bool takes_leaf_sum(leaf_sums *s, const lc_tensor *leaf, lc_tensor *g) {
    lc_tensor *to = leaf->grad;
    const bool plain = to && lc_device_get(to->device)->backend && g->device == to->device && (to->dtype == LC_F32 || to->dtype == LC_F64) &&
                       g->dtype == to->dtype && lc_tensor_contiguous(g) && lc_tensor_contiguous(to);
    if (!plain || s->n == 3 || (s->n && s->to[0]->dtype != to->dtype) || (s->n && s->to[0]->device != to->device)) return false;
    for (int i = 0; i < s->n; i++)
        if (s->to[i] == to) return false;
    s->to[s->n] = to;
    s->from[s->n++] = g;
    return true;
}

/* Sends the gradients of a node's inputs on; uses the references in gx up. whole, where given: which are sums already. */
static lc_status deliver(lc_backward *b, lc_node *n, lc_tensor **gx, const bool *whole) {
    lc_status rc = LC_OK;
    leaf_sums sums = {.n = 0};
    for (int i = 0; i < n->n_in; i++) {
        lc_tensor *g = gx[i];
        const lc_edge *e = &n->edge[i];
        gx[i] = NULL;
        if (!g) continue;
        if (rc != LC_OK || (!e->node && !e->leaf)) {
            lc_release(g);
            continue;
        }
        if (g->ndim != e->ndim || memcmp(g->dim, e->dim, (size_t)g->ndim * sizeof g->dim[0])) {
            rc = lc_fail(n->op < 0 ? LC_ESHAPE : LC_EBUG, "%s: the gradient of input %d has the wrong shape: %T",
                         n->op < 0 ? "custom function" : lc_row_of(n->op)->name, i + 1, g);
            lc_release(g);
            continue;
        }
        if (whole && whole[i]) {
            lc_release(e->node->g[e->out]);
            e->node->g[e->out] = NULL;
        }
        if (e->leaf && takes_leaf_sum(&sums, e->leaf, g)) continue;
        rc = e->leaf ? reach_leaf(e->leaf, g) : reach_node(b, e->node, e->out, g);
    }
    lc_status added = add_leaf_sums(&sums);
    return rc != LC_OK ? rc : added;
}

static lc_status check_versions(const lc_node *n) {
    for (int i = 0; i < n->n_x + n->n_out; i++)
        if (n->x[i] && n->x[i]->storage->version != n->version[i])
            return lc_fail(LC_EGRAD, "%T was changed in place after %s saved it for its gradient", n->x[i], lc_row_of(n->op)->name);
    return LC_OK;
}

enum { STACK_EDGES = 64 };

static lc_status run_node(lc_backward *b, lc_node *n) {
    lc_tensor *stack_gx[STACK_EDGES], **gx = stack_gx;
    bool stack_need[2 * STACK_EDGES], *need = stack_need;
    if (n->n_in > STACK_EDGES) {
        gx = lc_alloc((size_t)n->n_in, sizeof *gx);
        need = lc_alloc(2 * (size_t)n->n_in, sizeof *need);
        if (!gx || !need) {
            free(gx);
            free(need);
            return LC_ENOMEM;
        }
    }
    for (int i = 0; i < n->n_in; i++) {
        gx[i] = NULL;
        need[i] = n->edge[i].node || n->edge[i].leaf;
        need[n->n_in + i] = false;
    }
    lc_back back = {.node = n, .gx = gx, .need = need, .whole = need + n->n_in};
    for (int i = 0; i < n->n_out; i++) back.g[i] = n->g[i];
    lc_status rc = check_versions(n);
    if (rc == LC_OK) rc = lc_row_of(n->op)->rule->backward(&back);
    free_saved(n);
    free_gradients(n);
    if (rc == LC_OK) rc = deliver(b, n, gx, back.whole);
    for (int i = 0; i < n->n_in; i++) lc_release(gx[i]);
    if (gx != stack_gx) {
        free(gx);
        free(need);
    }
    return rc;
}

int lc_backward_begin(lc_backward **out, const lc_handle *loss, const lc_handle *gradient) {
    lc_tensor *t = lc_get(loss), *g = NULL;
    if (!t) return LC_ESTALE;
    if (!t->requires_grad) return lc_fail(LC_EGRAD, "backward of %T, which depends on nothing that wants a gradient", t);
    if (gradient && gradient->_gen) {
        if (!(g = lc_get(gradient))) return LC_ESTALE;
        if (!lc_same_shape(t, g)) return lc_fail(LC_ESHAPE, "the gradient's shape is not the tensor's: %T for %T", g, t);
        lc_retain(g);
    } else {
        if (lc_tensor_numel(t) != 1) return lc_fail(LC_ESHAPE, "backward of %T needs a gradient: only a single number has 1 by default", t);
        LC_TRY(lc_tensor_new(t->dtype, t->device, t->ndim, t->dim, &g));
        lc_frame c;
        lc_frame_init(&c, LC_OP_fill_);
        c.x[0] = g;
        c.f[0] = 1;
        lc_status rc = lc_run(&c);
        if (rc != LC_OK) {
            lc_release(g);
            return rc;
        }
    }
    lc_backward *b = lc_alloc(1, sizeof *b);
    if (!b) {
        lc_release(g);
        return LC_ENOMEM;
    }
    lc_status rc = t->node ? reach_node(b, t->node, t->node_out, g) : reach_leaf(t, g);
    if (rc != LC_OK) lc_backward_free(b);
    else *out = b;
    return rc;
}

static lc_status finish_lua_node(lc_backward *b) {
    lc_node *n = b->lua;
    b->lua = NULL;
    free_gradients(n);
    n->freed = true;
    lc_status rc = deliver(b, n, b->gx, NULL);
    free(b->gx);
    b->gx = NULL;
    n->owner = NULL;
    lc_node_release(n);
    return rc;
}

int lc_backward_next(lc_backward *b, int32_t *lua_node) {
    *lua_node = 0;
    bool old = lc_grad_enabled;
    lc_grad_enabled = false;
    lc_status rc = b->lua ? finish_lua_node(b) : LC_OK;
    while (rc == LC_OK && b->count) {
        lc_node *n = heap_pop(b);
        if (n->op < 0) {
            if (!(b->gx = lc_alloc((size_t)n->n_in, sizeof *b->gx))) rc = LC_ENOMEM;
            b->lua = n;
            *lua_node = n->lua_id;
            break;
        }
        rc = run_node(b, n);
        n->owner = NULL;
        lc_node_release(n);
    }
    lc_grad_enabled = old;
    return rc;
}

int lc_backward_grad(lc_backward *b, int i, lc_handle *out) {
    out->_gen = 0;
    if (!b->lua || i < 0 || i >= b->lua->n_out) return lc_fail(LC_EARG, "no result %d", i);
    if (!b->lua->g[i]) return LC_OK;
    lc_tensor *v = lc_tensor_view(b->lua->g[i]);
    if (!v) return LC_ENOMEM;
    lc_give_handle(v, out);
    return LC_OK;
}

int lc_backward_needs(lc_backward *b, int i) {
    return b->lua && i >= 0 && i < b->lua->n_in && (b->lua->edge[i].node || b->lua->edge[i].leaf);
}

int lc_backward_give(lc_backward *b, int i, const lc_handle *gradient) {
    if (!b->lua || i < 0 || i >= b->lua->n_in) return lc_fail(LC_EARG, "no input %d", i);
    lc_tensor *t = lc_get(gradient), *v;
    if (!t) return LC_ESTALE;
    if (!(v = lc_tensor_view(t))) return LC_ENOMEM;
    lc_release(b->gx[i]);
    b->gx[i] = v;
    return LC_OK;
}

void lc_backward_free(lc_backward *b) {
    if (!b) return;
    if (b->lua) {
        for (int i = 0; b->gx && i < b->lua->n_in; i++) lc_release(b->gx[i]);
        free_gradients(b->lua);
        b->lua->owner = NULL;
        lc_node_release(b->lua);
    }
    free(b->gx);
    while (b->count) {
        lc_node *n = b->heap[--b->count];
        free_gradients(n);
        n->owner = NULL;
        lc_node_release(n);
    }
    free(b->heap);
    free(b);
}
