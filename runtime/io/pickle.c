/* pickle.c: the restricted unpickler: the opcodes of protocols 1 to 5 that data needs, over a stack of value indices. A
 * call builds one of the few things that pickle_globals.c lists; nothing is imported and nothing is run. */
#include "pickle.h"

#include <stdlib.h>
#include <string.h>

#include "doc_build.h"

enum { MAX_NODES = 1 << 23, MAX_MARKS = 1000, MAX_TEXT = 1 << 30 };

typedef struct reader {
    lc_pickle *p;
    const uint8_t *data;
    size_t bytes, at, op_at; /* op_at: the opcode being run, for messages */
    int flags;
    int32_t *stack, *memo;
    int32_t depth, stack_room, memo_room, memo_used;
    int32_t mark[MAX_MARKS];
    int marks;
} reader;

static lc_status wrong(const reader *r, const char *what) {
    return lc_fail(LC_EPARSE, "byte %.0f of the pickle: %s", (double)r->op_at, what);
}

/* ---- values
 * ---------------------------------------------------------------------------------------------------------- */

static lc_status grow(void **array, int32_t *room, int32_t needed, size_t size) {
    if (needed <= *room) return LC_OK;
    int32_t more = *room < 64 ? 64 : *room * 2;
    void *grown = lc_resize(*array, (size_t)more, size);
    if (!grown) return LC_ENOMEM;
    *array = grown;
    *room = more;
    return LC_OK;
}

static lc_status add_node(reader *r, lc_pickle_kind kind, int32_t *out) {
    lc_pickle *p = r->p;
    if (p->nodes >= MAX_NODES) return wrong(r, "more than 8388608 values; no checkpoint has as many");
    LC_TRY(grow((void **)&p->node, &p->node_room, p->nodes + 1, sizeof *p->node));
    p->node[p->nodes] = (lc_pickle_node){.kind = (uint8_t)kind, .state = -1, .items = {-1, -1, 0}};
    *out = p->nodes++;
    return LC_OK;
}

static lc_status add_item(reader *r, int32_t to, int32_t value) {
    lc_pickle *p = r->p;
    if (p->items >= 2 * MAX_NODES) return wrong(r, "more than 16777216 entries; no checkpoint has as many");
    LC_TRY(grow((void **)&p->item, &p->item_room, p->items + 1, sizeof *p->item));
    lc_pickle_node *n = &p->node[to];
    p->item[p->items] = (lc_pickle_item){value, -1};
    if (n->items.last >= 0) p->item[n->items.last].next = p->items;
    if (n->items.first < 0) n->items.first = p->items;
    n->items.last = p->items++;
    n->items.count++;
    return LC_OK;
}

static lc_status push(reader *r, int32_t node) {
    LC_TRY(grow((void **)&r->stack, &r->stack_room, r->depth + 1, sizeof *r->stack));
    r->stack[r->depth++] = node;
    return LC_OK;
}

static lc_status push_new(reader *r, lc_pickle_kind kind) {
    int32_t node;
    LC_TRY(add_node(r, kind, &node));
    return push(r, node);
}

/* How far the stack may be taken down: what lies below the last mark is another container's. */
static int32_t floor_of(const reader *r) { return r->marks > 0 ? r->mark[r->marks - 1] : 0; }

static lc_status need(const reader *r, int32_t n) {
    return r->depth - floor_of(r) >= n ? LC_OK : wrong(r, "too few values on the stack");
}

static int32_t top(const reader *r, int32_t below) { return r->stack[r->depth - 1 - below]; }

static lc_pickle_node *top_node(const reader *r, int32_t below) { return &r->p->node[top(r, below)]; }

static lc_status pop_mark(reader *r, int32_t *from) {
    if (r->marks == 0) return wrong(r, "no mark on the stack");
    *from = r->mark[--r->marks];
    return LC_OK;
}

/* ---- bytes
 * ----------------------------------------------------------------------------------------------------------- */

static lc_status take(reader *r, uint64_t n, const uint8_t **out) {
    if (n > r->bytes - r->at)
        return lc_fail(LC_EPARSE, "byte %.0f of the pickle needs %.0f bytes, but only %.0f are left", (double)r->op_at,
                       (double)n, (double)(r->bytes - r->at));
    *out = r->data + r->at;
    r->at += (size_t)n;
    return LC_OK;
}

static lc_status take_number(reader *r, int bytes, uint64_t *out) {
    const uint8_t *p = NULL;
    LC_TRY(take(r, (uint64_t)bytes, &p));
    *out = 0;
    while (bytes-- > 0) *out = *out << 8 | p[bytes];
    return LC_OK;
}

static lc_status take_line(reader *r, const uint8_t **out, size_t *length) {
    const uint8_t *end = memchr(r->data + r->at, '\n', r->bytes - r->at);
    if (!end) return wrong(r, "a line without an end");
    *out = r->data + r->at;
    *length = (size_t)(end - *out);
    r->at += *length + 1;
    return LC_OK;
}

static lc_status push_bytes(reader *r, lc_pickle_kind kind, int length_bytes, bool unicode) {
    uint64_t n = 0;
    const uint8_t *p = NULL;
    LC_TRY(take_number(r, length_bytes, &n));
    LC_TRY(take(r, n, &p));
    if (n > MAX_TEXT) return wrong(r, "a string of more than 2^30 bytes");
    if (unicode && lc_utf8_invalid((const char *)p, (size_t)n) >= 0) return wrong(r, "a string that is not UTF-8");
    LC_TRY(push_new(r, kind));
    top_node(r, 0)->bytes.data = p;
    top_node(r, 0)->bytes.size = (uint32_t)n;
    return LC_OK;
}

/* ---- numbers
 * --------------------------------------------------------------------------------------------------------- */

static lc_status push_integer(reader *r, lc_pickle_kind kind, int64_t value) {
    LC_TRY(push_new(r, kind));
    top_node(r, 0)->integer = value;
    return LC_OK;
}

static lc_status push_fixed(reader *r, int bytes) {
    uint64_t v = 0;
    LC_TRY(take_number(r, bytes, &v));
    return push_integer(r, LC_PK_INT, bytes == 4 ? (int64_t)(int32_t)(uint32_t)v : (int64_t)v);
}

static lc_status push_long(reader *r, int length_bytes) {
    uint64_t n = 0, v = 0;
    const uint8_t *p = NULL;
    LC_TRY(take_number(r, length_bytes, &n));
    LC_TRY(take(r, n, &p));
    if (n > 128) return wrong(r, "an integer of more than 128 bytes");
    if (n > 8) {
        LC_TRY(push_new(r, LC_PK_BIG));
        top_node(r, 0)->bytes.data = p;
        top_node(r, 0)->bytes.size = (uint32_t)n;
        return LC_OK;
    }
    for (uint64_t i = n; i-- > 0;) v = v << 8 | p[i];
    if (n > 0 && n < 8 && p[n - 1] & 0x80) v |= UINT64_MAX << 8 * n;
    return push_integer(r, LC_PK_INT, (int64_t)v);
}

static lc_status push_float(reader *r) {
    const uint8_t *p = NULL;
    uint64_t bits = 0;
    LC_TRY(take(r, 8, &p));
    for (int i = 0; i < 8; i++) bits = bits << 8 | p[i]; /* the one number that stands with its highest byte first */
    LC_TRY(push_new(r, LC_PK_FLOAT));
    memcpy(&top_node(r, 0)->number, &bits, 8);
    return LC_OK;
}

/* INT and LONG of the text protocol; "00" and "01" are its bools. */
static lc_status push_text_integer(reader *r) {
    const uint8_t *p = NULL;
    size_t n = 0;
    char text[24] = "", *end;
    LC_TRY(take_line(r, &p, &n));
    if (n > 0 && p[n - 1] == 'L') n--;
    if (n == 0 || n >= sizeof text) return wrong(r, "no integer in the text");
    memcpy(text, p, n);
    if (n == 2 && text[0] == '0' && (text[1] == '0' || text[1] == '1'))
        return push_integer(r, LC_PK_BOOL, text[1] - '0');
    long long v = strtoll(text, &end, 10);
    if (*end) return wrong(r, "no integer in the text");
    return push_integer(r, LC_PK_INT, v);
}

/* ---- containers
 * ------------------------------------------------------------------------------------------------------ */

static lc_status push_tuple(reader *r, int32_t from) {
    int32_t node;
    LC_TRY(add_node(r, LC_PK_TUPLE, &node));
    for (int32_t i = from; i < r->depth; i++) LC_TRY(add_item(r, node, r->stack[i]));
    r->depth = from;
    return push(r, node);
}

/* Moves what stands from `from` on into the container below it. */
static lc_status append_from(reader *r, int32_t from, lc_pickle_kind kind) {
    if (from - 1 < floor_of(r)) return wrong(r, "no container below the values");
    int32_t to = r->stack[from - 1];
    if (r->p->node[to].kind != kind)
        return wrong(r,
                     kind == LC_PK_LIST ? "values for a list, but it is none" : "entries for a dict, but it is none");
    if (kind == LC_PK_DICT && (r->depth - from) % 2) return wrong(r, "a key without a value");
    for (int32_t i = from; i < r->depth; i++) LC_TRY(add_item(r, to, r->stack[i]));
    r->depth = from;
    return LC_OK;
}

static lc_status marked(reader *r, uint8_t op) {
    int32_t from = 0;
    LC_TRY(pop_mark(r, &from));
    switch (op) {
    case 't': return push_tuple(r, from);
    case 'e': return append_from(r, from, LC_PK_LIST);
    case 'u': return append_from(r, from, LC_PK_DICT);
    case '1': r->depth = from; return LC_OK;
    default: break;
    }
    int32_t node; /* 'l' and 'd': a container of what follows the mark */
    if (op == 'd' && (r->depth - from) % 2) return wrong(r, "a key without a value");
    LC_TRY(add_node(r, op == 'l' ? LC_PK_LIST : LC_PK_DICT, &node));
    for (int32_t i = from; i < r->depth; i++) LC_TRY(add_item(r, node, r->stack[i]));
    r->depth = from;
    return push(r, node);
}

/* ---- memo
 * ------------------------------------------------------------------------------------------------------------ */

/* Indices are given in order, so one that exceeds the bytes read so far is no honest one. */
static lc_status memo_put(reader *r, uint64_t index) {
    LC_TRY(need(r, 1));
    if (index > r->at)
        return lc_fail(LC_EPARSE, "byte %.0f of the pickle: the memo has no index %.0f yet", (double)r->op_at,
                       (double)index);
    int32_t old = r->memo_room;
    while ((int32_t)index >= r->memo_room)
        LC_TRY(grow((void **)&r->memo, &r->memo_room, r->memo_room + 1, sizeof *r->memo));
    for (int32_t i = old; i < r->memo_room; i++) r->memo[i] = -1;
    r->memo_used += r->memo[index] < 0;
    r->memo[index] = top(r, 0);
    return LC_OK;
}

static lc_status memo_get(reader *r, uint64_t index) {
    if (index >= (uint64_t)r->memo_room || r->memo[index] < 0)
        return lc_fail(LC_EPARSE, "byte %.0f of the pickle: the memo has nothing at %.0f", (double)r->op_at,
                       (double)index);
    return push(r, r->memo[index]);
}

/* ---- globals and calls
 * ----------------------------------------------------------------------------------------------- */

static lc_status refuse_global(const reader *r, const uint8_t *module, size_t m, const uint8_t *name, size_t n) {
    if (m > 100) m = 100;
    if (n > 100) n = 100;
    return lc_fail(
        LC_EPARSE,
        "byte %.0f of the pickle: it asks for %.*s.%.*s; only tensors, parameters, dicts, lists, tuples and plain "
        "values are read, and nothing is run",
        (double)r->op_at, (int)m, (const char *)module, (int)n, (const char *)name);
}

static lc_status push_global(reader *r, const uint8_t *module, size_t m, const uint8_t *name, size_t n) {
    lc_pickle_global g;
    if (!lc_pickle_find_global(module, m, name, n, &g) || (g.distributed && !(r->flags & LC_PICKLE_DISTRIBUTED)))
        return refuse_global(r, module, m, name, n);
    LC_TRY(push_new(r, LC_PK_GLOBAL));
    top_node(r, 0)->global = g;
    return LC_OK;
}

static lc_status global_of_lines(reader *r) {
    const uint8_t *module = NULL, *name = NULL;
    size_t m = 0, n = 0;
    LC_TRY(take_line(r, &module, &m));
    LC_TRY(take_line(r, &name, &n));
    return push_global(r, module, m, name, n);
}

static lc_status global_of_stack(reader *r) {
    LC_TRY(need(r, 2));
    const lc_pickle_node *module = top_node(r, 1), *name = top_node(r, 0);
    if (module->kind != LC_PK_STRING || name->kind != LC_PK_STRING) return wrong(r, "a global whose name is no string");
    r->depth -= 2;
    return push_global(r, module->bytes.data, module->bytes.size, name->bytes.data, name->bytes.size);
}

static lc_status refuse_call(const reader *r, const lc_pickle_global *g) {
    return lc_fail(LC_EPARSE, "byte %.0f of the pickle: %s.%s is called with arguments that it does not take",
                   (double)r->op_at, g->module, g->name);
}

static bool is_tuple_of(const lc_pickle *p, int32_t node, int least) {
    return lc_pickle_is(p, node, LC_PK_TUPLE) && p->node[node].items.count >= least;
}

/* Do the values stand otherwise than they mean? (Lazy conjugates and negatives: bits in the last argument.) */
static bool is_lazy(const lc_pickle *p, int32_t metadata) {
    static const char *const bits[] = {"conj", "neg"};
    for (int i = 0; i < 2; i++) {
        int32_t bit = lc_pickle_get(p, metadata, bits[i]);
        if (bit >= 0 && !(p->node[bit].kind == LC_PK_BOOL && p->node[bit].integer == 0)) return true;
    }
    return false;
}

/* _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata]); v3 has the dtype before the
 * last. */
static lc_status make_tensor(reader *r, const lc_pickle_global *g, int32_t args, int32_t *out) {
    lc_pickle *p = r->p;
    bool v3 = g->role == LC_PR_TENSOR_V3;
    int least = v3 ? 7 : strcmp(g->name, "_rebuild_tensor") == 0 ? 4 : 6;
    if (!is_tuple_of(p, args, least) || !lc_pickle_is(p, lc_pickle_item_at(p, args, 0), LC_PK_STORAGE))
        return refuse_call(r, g);
    int32_t dtype = v3 ? lc_pickle_item_at(p, args, 6) : -1;
    if (v3 && (!lc_pickle_is(p, dtype, LC_PK_GLOBAL) || p->node[dtype].global.role != LC_PR_DTYPE))
        return refuse_call(r, g);
    if (is_lazy(p, lc_pickle_item_at(p, args, v3 ? 7 : 6)))
        return wrong(r, "a tensor whose values wait to be conjugated or negated; save x.resolve_conj().resolve_neg()");
    LC_TRY(add_node(r, LC_PK_TENSOR, out));
    p->node[*out].items = p->node[args].items; /* a tuple's items change no more */
    p->node[*out].state = dtype;
    return LC_OK;
}

/* OrderedDict(), or OrderedDict([[key, value], ..]) as Python 2 wrote it. */
static lc_status make_dict(reader *r, const lc_pickle_global *g, int32_t args, int32_t *out) {
    lc_pickle *p = r->p;
    if (!is_tuple_of(p, args, 0) || p->node[args].items.count > 1) return refuse_call(r, g);
    LC_TRY(add_node(r, LC_PK_DICT, out));
    int32_t list = lc_pickle_item_at(p, args, 0);
    if (list < 0) return LC_OK;
    if (!lc_pickle_is(p, list, LC_PK_LIST)) return refuse_call(r, g);
    for (int32_t i = p->node[list].items.first; i >= 0; i = p->item[i].next) {
        const lc_pickle_node *pair = &p->node[p->item[i].value];
        if ((pair->kind != LC_PK_LIST && pair->kind != LC_PK_TUPLE) || pair->items.count != 2) return refuse_call(r, g);
        int32_t key = p->item[pair->items.first].value, value = p->item[pair->items.last].value;
        LC_TRY(add_item(r, *out, key));
        LC_TRY(add_item(r, *out, value));
    }
    return LC_OK;
}

/* _codecs.encode(text, 'latin1'): the text's characters below 256 as bytes. */
static lc_status make_bytes(reader *r, const lc_pickle_global *g, int32_t args, int32_t *out) {
    int32_t text = lc_pickle_item_at(r->p, args, 0);
    if (!is_tuple_of(r->p, args, 2) || !lc_pickle_is(r->p, text, LC_PK_STRING) ||
        !lc_pickle_text_is(r->p, lc_pickle_item_at(r->p, args, 1), "latin1"))
        return refuse_call(r, g);
    LC_TRY(add_node(r, LC_PK_BYTES, out));
    r->p->node[*out].bytes.data = r->p->node[text].bytes.data;
    r->p->node[*out].bytes.size = r->p->node[text].bytes.size;
    return LC_OK;
}

static lc_status call(reader *r, int32_t callee, int32_t args, int32_t *out) {
    lc_pickle *p = r->p;
    if (!lc_pickle_is(p, callee, LC_PK_GLOBAL)) return wrong(r, "a call of what is no function");
    const lc_pickle_global g = p->node[callee].global;
    int32_t first = is_tuple_of(p, args, 1) ? lc_pickle_item_at(p, args, 0) : -1, inner;
    switch (g.role) {
    case LC_PR_TENSOR:
    case LC_PR_TENSOR_V3: return make_tensor(r, &g, args, out);
    case LC_PR_ORDERED_DICT: return make_dict(r, &g, args, out);
    case LC_PR_ENCODE: return make_bytes(r, &g, args, out);
    case LC_PR_PARAMETER: *out = first; return lc_pickle_is(p, first, LC_PK_TENSOR) ? LC_OK : refuse_call(r, &g);
    case LC_PR_SIZE: *out = first; return lc_pickle_is(p, first, LC_PK_TUPLE) ? LC_OK : refuse_call(r, &g);
    case LC_PR_TEXT: *out = first; return lc_pickle_is(p, first, LC_PK_STRING) ? LC_OK : refuse_call(r, &g);
    case LC_PR_PATH: return add_node(r, LC_PK_NONE, out);
    case LC_PR_IGNORED: return add_node(r, LC_PK_NONE, out);
    case LC_PR_TYPED: /* (function, type, arguments, state): a parameter with attributes */
        inner = lc_pickle_item_at(p, args, 2);
        if (!is_tuple_of(p, args, 4) || !lc_pickle_is(p, first, LC_PK_GLOBAL) ||
            (p->node[first].global.role != LC_PR_TENSOR && p->node[first].global.role != LC_PR_TENSOR_V3 &&
             p->node[first].global.role != LC_PR_PARAMETER))
            return refuse_call(r, &g);
        return call(r, first, inner, out);
    default: return refuse_call(r, &g);
    }
}

static lc_status reduce(reader *r) {
    int32_t made;
    LC_TRY(need(r, 2));
    LC_TRY(call(r, top(r, 1), top(r, 0), &made));
    r->depth -= 2;
    return push(r, made);
}

static lc_status new_object(reader *r) {
    int32_t made;
    LC_TRY(need(r, 2));
    int32_t class = top(r, 1);
    if (lc_pickle_is(r->p, class, LC_PK_GLOBAL) && r->p->node[class].global.role == LC_PR_RECORD) {
        lc_pickle_global g = r->p->node[class].global;
        LC_TRY(add_node(r, LC_PK_OBJECT, &made));
        r->p->node[made].global = g;
    } else {
        LC_TRY(call(r, class, top(r, 0), &made));
    }
    r->depth -= 2;
    return push(r, made);
}

/* The state of a record is its fields; that of an OrderedDict its attributes, such as the _metadata of a module. */
static lc_status build(reader *r) {
    LC_TRY(need(r, 2));
    lc_pickle_node *n = top_node(r, 1);
    if (n->kind != LC_PK_OBJECT && n->kind != LC_PK_DICT) return wrong(r, "a state for what takes none");
    n->state = top(r, 0);
    r->depth--;
    return LC_OK;
}

static lc_status persistent(reader *r) {
    LC_TRY(need(r, 1));
    lc_pickle *p = r->p;
    int32_t id = top(r, 0), made;
    if (!(r->flags & LC_PICKLE_PERSISTENT)) return wrong(r, "a persistent id where there are none");
    int32_t type = is_tuple_of(p, id, 5) ? lc_pickle_item_at(p, id, 1) : -1;
    int32_t key = lc_pickle_item_at(p, id, 2), count = lc_pickle_item_at(p, id, 4);
    if (!lc_pickle_text_is(p, lc_pickle_item_at(p, id, 0), "storage") || !lc_pickle_is(p, type, LC_PK_GLOBAL) ||
        (p->node[type].global.role != LC_PR_STORAGE && p->node[type].global.role != LC_PR_UNTYPED) ||
        !lc_pickle_is(p, key, LC_PK_STRING) || !lc_pickle_is(p, count, LC_PK_INT) || p->node[count].integer < 0)
        return wrong(r, "a persistent id that is not ('storage', type, key, location, size)");
    if (p->node[id].items.count > 5 && !lc_pickle_is(p, lc_pickle_item_at(p, id, 5), LC_PK_NONE))
        return wrong(r, "a view of a storage, as PyTorch before 0.4 wrote it; save the file again with a later one");
    LC_TRY(add_node(r, LC_PK_STORAGE, &made));
    p->node[made].items = p->node[id].items;
    r->depth--;
    return push(r, made);
}

/* ---- opcodes
 * --------------------------------------------------------------------------------------------------------- */

static bool run_value(reader *r, uint8_t op, lc_status *status) {
    switch (op) {
    case 'N': *status = push_new(r, LC_PK_NONE); return true;
    case 0x88: *status = push_integer(r, LC_PK_BOOL, 1); return true;
    case 0x89: *status = push_integer(r, LC_PK_BOOL, 0); return true;
    case 'K': *status = push_fixed(r, 1); return true;
    case 'M': *status = push_fixed(r, 2); return true;
    case 'J': *status = push_fixed(r, 4); return true;
    case 0x8a: *status = push_long(r, 1); return true;
    case 0x8b: *status = push_long(r, 4); return true;
    case 'I':
    case 'L': *status = push_text_integer(r); return true;
    case 'G': *status = push_float(r); return true;
    case 'X': *status = push_bytes(r, LC_PK_STRING, 4, true); return true;
    case 0x8c: *status = push_bytes(r, LC_PK_STRING, 1, true); return true;
    case 0x8d: *status = push_bytes(r, LC_PK_STRING, 8, true); return true;
    case 'T': *status = push_bytes(r, LC_PK_STRING, 4, false); return true; /* Python 2's str */
    case 'U': *status = push_bytes(r, LC_PK_STRING, 1, false); return true;
    case 'B': *status = push_bytes(r, LC_PK_BYTES, 4, false); return true;
    case 'C': *status = push_bytes(r, LC_PK_BYTES, 1, false); return true;
    case 0x8e: *status = push_bytes(r, LC_PK_BYTES, 8, false); return true;
    default: return false;
    }
}

static lc_status set_one(reader *r, lc_pickle_kind kind, int32_t values) {
    LC_TRY(need(r, values + 1));
    return append_from(r, r->depth - values, kind);
}

static lc_status short_tuple(reader *r, int32_t n) {
    LC_TRY(need(r, n));
    return push_tuple(r, r->depth - n);
}

static lc_status push_mark(reader *r) {
    if (r->marks == MAX_MARKS) return wrong(r, "more than 1000 open marks; it nests too deep");
    r->mark[r->marks++] = r->depth;
    return LC_OK;
}

static lc_status pop(reader *r) {
    if (r->marks > 0 && r->mark[r->marks - 1] == r->depth) {
        r->marks--;
        return LC_OK;
    }
    LC_TRY(need(r, 1));
    r->depth--;
    return LC_OK;
}

static lc_status duplicate(reader *r) {
    LC_TRY(need(r, 1));
    return push(r, top(r, 0));
}

static bool run_container(reader *r, uint8_t op, lc_status *status) {
    switch (op) {
    case '(': *status = push_mark(r); return true;
    case '0': *status = pop(r); return true;
    case '2': *status = duplicate(r); return true;
    case '}': *status = push_new(r, LC_PK_DICT); return true;
    case ']': *status = push_new(r, LC_PK_LIST); return true;
    case ')': *status = push_new(r, LC_PK_TUPLE); return true;
    case 0x85: *status = short_tuple(r, 1); return true;
    case 0x86: *status = short_tuple(r, 2); return true;
    case 0x87: *status = short_tuple(r, 3); return true;
    case 'a': *status = set_one(r, LC_PK_LIST, 1); return true;
    case 's': *status = set_one(r, LC_PK_DICT, 2); return true;
    case 't':
    case 'e':
    case 'u':
    case 'l':
    case 'd':
    case '1': *status = marked(r, op); return true;
    default: return false;
    }
}

static lc_status memo_by(reader *r, int bytes, bool put) {
    uint64_t index = 0;
    LC_TRY(take_number(r, bytes, &index));
    return put ? memo_put(r, index) : memo_get(r, index);
}

static bool run_call(reader *r, uint8_t op, lc_status *status) {
    switch (op) {
    case 'q': *status = memo_by(r, 1, true); return true;
    case 'r': *status = memo_by(r, 4, true); return true;
    case 'h': *status = memo_by(r, 1, false); return true;
    case 'j': *status = memo_by(r, 4, false); return true;
    case 0x94: *status = memo_put(r, (uint64_t)r->memo_used); return true;
    case 'c': *status = global_of_lines(r); return true;
    case 0x93: *status = global_of_stack(r); return true;
    case 'R': *status = reduce(r); return true;
    case 0x81: *status = new_object(r); return true;
    case 'b': *status = build(r); return true;
    case 'Q': *status = persistent(r); return true;
    case 'i':
        *status = global_of_lines(r); /* the class is named, and refused by name, before the opcode is */
        if (*status == LC_OK) *status = wrong(r, "the opcode INST, which no checkpoint needs");
        return true;
    default: return false;
    }
}

static lc_status frame(reader *r, uint8_t op) {
    uint64_t n = 0;
    LC_TRY(take_number(r, op == 0x80 ? 1 : 8, &n));
    if (op == 0x80 && n > 5) return wrong(r, "a pickle protocol above 5");
    if (op != 0x80 && n > r->bytes - r->at) return wrong(r, "a frame that is longer than what is left");
    return LC_OK;
}

static lc_status run(reader *r) {
    for (;;) {
        const uint8_t *op = NULL;
        lc_status status = LC_OK;
        r->op_at = r->at;
        if (r->at >= r->bytes)
            return lc_fail(LC_EPARSE, "the pickle ends at byte %.0f without its last opcode", (double)r->at);
        LC_TRY(take(r, 1, &op));
        if (*op == '.') break;
        if (*op == 0x80 || *op == 0x95)
            status = frame(r, *op);
        else if (!run_value(r, *op, &status) && !run_container(r, *op, &status) && !run_call(r, *op, &status))
            status = lc_fail(LC_EPARSE, "byte %.0f of the pickle: the opcode 0x%02x, which no checkpoint needs",
                             (double)r->op_at, *op);
        LC_TRY(status);
    }
    LC_TRY(need(r, 1));
    r->p->root = top(r, 0);
    r->p->used = r->at;
    return LC_OK;
}

lc_status lc_pickle_read(lc_pickle *p, const uint8_t *data, size_t bytes, int flags) {
    reader *r = lc_alloc(1, sizeof *r);
    *p = (lc_pickle){.root = -1};
    if (!r) return LC_ENOMEM;
    *r = (reader){.p = p, .data = data, .bytes = bytes, .flags = flags};
    lc_status status = run(r);
    free(r->stack);
    free(r->memo);
    free(r);
    if (status != LC_OK) lc_pickle_free(p);
    return status;
}

void lc_pickle_free(lc_pickle *p) {
    free(p->node);
    free(p->item);
    *p = (lc_pickle){.root = -1};
}

/* ---- looking
 * --------------------------------------------------------------------------------------------------------- */

bool lc_pickle_is(const lc_pickle *p, int32_t node, lc_pickle_kind kind) {
    return node >= 0 && node < p->nodes && p->node[node].kind == kind;
}

bool lc_pickle_text_is(const lc_pickle *p, int32_t node, const char *text) {
    return lc_pickle_is(p, node, LC_PK_STRING) && p->node[node].bytes.size == strlen(text) &&
           memcmp(p->node[node].bytes.data, text, strlen(text)) == 0;
}

int32_t lc_pickle_item_at(const lc_pickle *p, int32_t container, int32_t n) {
    int kind = container >= 0 && container < p->nodes ? p->node[container].kind : LC_PK_NONE;
    if (kind < LC_PK_LIST || kind == LC_PK_GLOBAL || kind == LC_PK_OBJECT) return -1;
    int32_t i = p->node[container].items.first;
    while (i >= 0 && n-- > 0) i = p->item[i].next;
    return i < 0 ? -1 : p->item[i].value;
}

int32_t lc_pickle_get(const lc_pickle *p, int32_t dict, const char *key) {
    bool record = lc_pickle_is(p, dict, LC_PK_OBJECT);
    if (record) dict = p->node[dict].state;
    if (!lc_pickle_is(p, dict, LC_PK_DICT) || (record && p->node[dict].items.count > 2 * 64))
        return -1; /* no record has 64 fields */
    for (int32_t i = p->node[dict].items.first; i >= 0;) {
        int32_t value = p->item[i].next;
        if (value < 0) return -1;
        if (lc_pickle_text_is(p, p->item[i].value, key)) return p->item[value].value;
        i = p->item[value].next;
    }
    return -1;
}
