/* torch_tree.c: a checkpoint's tree of dicts and lists as a flat file of tensors: names are the keys on the way, joined
 * by dots, without a wrapper such as "model_state_dict" that holds all of them; what is no tensor becomes a document.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "quant.h"
#include "torch.h"

enum { MAX_DEPTH = 200, MAX_STEPS = 1 << 23, MAX_PATH = 4096 };

typedef struct tree {
    struct lc_file *file;
    const lc_torch *torch;
    int room;
    int32_t bare; /* the wrapper whose key is no part of names, or -1 */
    int64_t steps;
    char path[MAX_PATH + 1];
    size_t length;
} tree;

static bool is_container(const lc_pickle *p, int32_t node) {
    int kind = p->node[node].kind;
    return kind == LC_PK_LIST || kind == LC_PK_TUPLE || kind == LC_PK_DICT;
}

static lc_status spend(int64_t *steps) {
    return --*steps >= 0 ? LC_OK : lc_fail(LC_EPARSE, "a tree of more than 8388608 values (does it hold itself?)");
}

/* Is there a tensor (or, with `tensor` false, a plain value) at or below the node? Stops at the first, and at too much.
 */
static bool holds(const lc_pickle *p, int32_t node, bool tensor, int depth, int64_t *steps) {
    if (--*steps < 0 || depth > MAX_DEPTH) return true;
    if (!is_container(p, node)) return (p->node[node].kind == LC_PK_TENSOR) == tensor;
    bool dict = p->node[node].kind == LC_PK_DICT;
    if (p->node[node].items.count == 0) return !tensor;
    for (int32_t i = p->node[node].items.first; i >= 0; i = p->item[i].next) {
        if (dict) i = p->item[i].next;
        if (holds(p, p->item[i].value, tensor, depth + 1, steps)) return true;
    }
    return false;
}

/* ---- keys
 * ------------------------------------------------------------------------------------------------------------ */

/* An integer of any length in decimal; `text` has room for 320 characters. */
static void decimal(const uint8_t *data, uint32_t bytes, char *text) {
    uint8_t value[128];
    char digits[320];
    int n = 0;
    bool negative = bytes > 0 && data[bytes - 1] & 0x80, more = true;
    unsigned carry = negative;
    for (uint32_t i = 0; i < bytes; i++) {
        unsigned b = (negative ? (uint8_t)~data[i] : data[i]) + carry;
        value[i] = (uint8_t)b;
        carry = b >> 8;
    }
    while (more) {
        unsigned rest = 0;
        more = false;
        for (uint32_t i = bytes; i-- > 0;) {
            rest = rest << 8 | value[i];
            value[i] = (uint8_t)(rest / 10);
            more = more || value[i];
            rest %= 10;
        }
        digits[n++] = (char)('0' + rest);
    }
    if (negative) *text++ = '-';
    while (n > 0) *text++ = digits[--n];
    *text = 0;
}

static void integer_text(const lc_pickle_node *n, char text[324]) {
    uint8_t bytes[8];
    for (int i = 0; i < 8; i++) bytes[i] = (uint8_t)((uint64_t)n->integer >> 8 * i);
    if (n->kind == LC_PK_BIG)
        decimal(n->bytes.data, n->bytes.size, text);
    else
        decimal(bytes, 8, text);
}

/* A dict's key as text: a string itself, a number in decimal. */
static lc_status key_text(const lc_pickle *p, int32_t node, char spare[324], const char **text, size_t *bytes) {
    const lc_pickle_node *n = &p->node[node];
    *text = spare;
    switch (n->kind) {
    case LC_PK_STRING:
        *text = (const char *)n->bytes.data;
        *bytes = n->bytes.size;
        if (lc_utf8_invalid(*text, *bytes) >= 0 || memchr(*text, 0, *bytes))
            return lc_fail(LC_EPARSE, "a key that is not plain UTF-8");
        return LC_OK;
    case LC_PK_INT:
    case LC_PK_BIG: integer_text(n, spare); break;
    case LC_PK_BOOL: strcpy(spare, n->integer ? "True" : "False"); break;
    case LC_PK_NONE: strcpy(spare, "None"); break;
    default: return lc_fail(LC_EPARSE, "a dict's key that is neither a string nor a number");
    }
    *bytes = strlen(spare);
    return LC_OK;
}

/* ---- plain values
 * ---------------------------------------------------------------------------------------------------- */

static lc_status put_string(lc_doc_build *d, const char *text, size_t bytes) {
    if (lc_doc_build_node(d, LC_DOC_STRING) < 0) return d->status;
    return lc_doc_build_string(d, text, bytes);
}

static lc_status put_number(lc_doc_build *d, lc_doc_kind_t kind, double value) {
    if (lc_doc_build_node(d, kind) < 0) return d->status;
    lc_doc_build_last(d)->number = value;
    return LC_OK;
}

/* As a number where a double holds it, else as text. */
static lc_status put_integer(lc_doc_build *d, const lc_pickle_node *n) {
    char text[324];
    if (n->kind == LC_PK_INT && n->integer >= -((int64_t)1 << 53) && n->integer <= (int64_t)1 << 53) {
        LC_TRY(put_number(d, LC_DOC_NUMBER, (double)n->integer));
        lc_doc_build_last(d)->is_integer = 1;
        return LC_OK;
    }
    char exact[400];
    integer_text(n, text);
    double value = strtod(text, NULL);
    snprintf(exact, sizeof exact, "%.0f", value);
    return strcmp(exact, text) == 0 ? put_number(d, LC_DOC_NUMBER, value) : put_string(d, text, strlen(text));
}

static lc_status put_leaf(const lc_pickle *p, int32_t node, lc_doc_build *d) {
    const lc_pickle_node *n = &p->node[node];
    char text[64];
    switch (n->kind) {
    case LC_PK_BOOL: return put_number(d, LC_DOC_BOOL, (double)n->integer);
    case LC_PK_INT:
    case LC_PK_BIG: return put_integer(d, n);
    case LC_PK_FLOAT: return put_number(d, LC_DOC_NUMBER, n->number);
    case LC_PK_STRING:
    case LC_PK_BYTES:
        if (lc_utf8_invalid((const char *)n->bytes.data, n->bytes.size) < 0)
            return put_string(d, (const char *)n->bytes.data, n->bytes.size);
        return put_string(d, text, (size_t)snprintf(text, sizeof text, "<%u bytes>", (unsigned)n->bytes.size));
    case LC_PK_GLOBAL:
        return put_string(d, text,
                          (size_t)snprintf(text, sizeof text, "%.24s.%.32s", n->global.module, n->global.name));
    default: return put_number(d, LC_DOC_NULL, 0);
    }
}

static lc_status put_value(const lc_pickle *p, int32_t node, lc_doc_build *d, int depth, int64_t *steps);

static lc_status put_entries(const lc_pickle *p, int32_t node, lc_doc_build *d, int depth, int64_t *steps) {
    bool dict = p->node[node].kind == LC_PK_DICT;
    for (int32_t i = p->node[node].items.first; i >= 0; i = p->item[i].next) {
        const char *key;
        size_t bytes = 0;
        char spare[324];
        int32_t value = dict ? p->item[p->item[i].next].value : p->item[i].value;
        if (dict) {
            int32_t name = p->item[i].value;
            i = p->item[i].next;
            if (holds(p, value, true, 0, steps) && !holds(p, value, false, 0, steps))
                continue; /* nothing but tensors */
            LC_TRY(key_text(p, name, spare, &key, &bytes));
            LC_TRY(lc_doc_build_key(d, key, bytes));
        }
        LC_TRY(put_value(p, value, d, depth + 1, steps));
    }
    return LC_OK;
}

static lc_status close_container(lc_doc_build *d) {
    lc_status status = lc_doc_build_close(d);
    if (status == LC_EPARSE && d->duplicate >= 0)
        return lc_fail(LC_EPARSE, "the key '%.200s' occurs twice in a dict", d->text + d->node[d->duplicate].key);
    return status;
}

static lc_status put_value(const lc_pickle *p, int32_t node, lc_doc_build *d, int depth, int64_t *steps) {
    LC_TRY(spend(steps));
    if (!is_container(p, node)) return put_leaf(p, node, d);
    bool dict = p->node[node].kind == LC_PK_DICT;
    if (lc_doc_build_node(d, dict ? LC_DOC_OBJECT : LC_DOC_ARRAY) < 0) return d->status;
    if (depth > MAX_DEPTH || !lc_doc_build_open(d)) return lc_fail(LC_EPARSE, "values nest deeper than %d", MAX_DEPTH);
    LC_TRY(put_entries(p, node, d, depth, steps));
    return close_container(d);
}

lc_status lc_torch_plain(const lc_pickle *p, int32_t node, lc_doc_build *d, int64_t *steps) {
    return put_value(p, node, d, 0, steps);
}

static lc_status make_extra(tree *w) {
    const lc_pickle *p = &w->torch->pickle;
    lc_doc_build d;
    LC_TRY(lc_doc_build_start(&d, 256));
    lc_status status = LC_OK;
    if (p->node[p->root].kind == LC_PK_DICT) {
        status = lc_torch_plain(p, p->root, &d, &w->steps);
    } else {
        status = lc_doc_build_node(&d, LC_DOC_OBJECT) < 0 ? d.status : LC_OK;
        if (status == LC_OK && !lc_doc_build_open(&d)) status = lc_fail(LC_EBUG, "a document that nests too deep");
        if (status == LC_OK && p->node[p->root].kind != LC_PK_TENSOR) {
            status = lc_doc_build_key(&d, "value", 5);
            if (status == LC_OK) status = lc_torch_plain(p, p->root, &d, &w->steps);
        }
        if (status == LC_OK) status = close_container(&d);
    }
    if (status == LC_OK) return lc_doc_build_end(&d, &w->file->extra);
    lc_doc_build_drop(&d);
    return status;
}

/* ---- tensors
 * --------------------------------------------------------------------------------------------------------- */

static lc_status fill_entry(tree *w, int32_t node, lc_file_entry *e) {
    struct lc_file *f = w->file;
    lc_torch_view v;
    LC_TRY(lc_torch_view_of(w->torch, node, &v));
    size_t n = v.ndim ? (size_t)v.ndim : 1;
    e->dim = lc_alloc(n, sizeof *e->dim);
    if (!e->dim) return LC_ENOMEM;
    memcpy(e->dim, v.dim, (size_t)v.ndim * sizeof *e->dim);
    e->ndim = v.ndim;
    e->dtype_name = v.dtype->name;
    e->store = v.dtype->store;
    e->bytes = v.bytes;
    e->offset = v.data ? (uint64_t)(v.data - f->data) : 0;
    if (v.contiguous) return LC_OK;
    e->piece = lc_alloc(1, sizeof *e->piece);
    int64_t *numbers = lc_alloc(3 * n, sizeof *numbers);
    if (!e->piece || !numbers) {
        free(numbers);
        return LC_ENOMEM;
    }
    e->pieces = 1;
    *e->piece = (lc_file_piece){v.data, f->map, numbers, numbers + n, numbers + 2 * n};
    memcpy(e->piece->size, v.dim, (size_t)v.ndim * sizeof *v.dim);
    memcpy(e->piece->stride, v.stride, (size_t)v.ndim * sizeof *v.stride);
    return LC_OK;
}

static lc_status add_entry(tree *w, int32_t node) {
    struct lc_file *f = w->file;
    if (f->count == w->room) {
        int room = w->room ? w->room * 2 : 64;
        lc_file_entry *grown = lc_resize(f->entry, (size_t)room, sizeof *grown);
        if (!grown) return LC_ENOMEM;
        f->entry = grown;
        w->room = room;
    }
    lc_file_entry *e = &f->entry[f->count];
    *e = (lc_file_entry){.name = lc_strdup(w->length ? w->path : "tensor")};
    if (!e->name) return LC_ENOMEM;
    f->count++;
    lc_status status = fill_entry(w, node, e);
    return status == LC_OK ? LC_OK : lc_fail_in(status, "tensor '%.200s': ", e->name);
}

static lc_status extend(tree *w, const char *key, size_t bytes) {
    if (bytes + 1 > MAX_PATH - w->length) return lc_fail(LC_EPARSE, "a name of more than %d bytes", MAX_PATH);
    if (w->length) w->path[w->length++] = '.';
    memcpy(w->path + w->length, key, bytes);
    w->length += bytes;
    w->path[w->length] = 0;
    return LC_OK;
}

static lc_status walk(tree *w, int32_t node, int depth) {
    const lc_pickle *p = &w->torch->pickle;
    LC_TRY(spend(&w->steps));
    if (p->node[node].kind == LC_PK_TENSOR) return add_entry(w, node);
    if (!is_container(p, node)) return LC_OK;
    if (depth > MAX_DEPTH) return lc_fail(LC_EPARSE, "values nest deeper than %d", MAX_DEPTH);
    bool dict = p->node[node].kind == LC_PK_DICT;
    int64_t position = 0;
    for (int32_t i = p->node[node].items.first; i >= 0; i = p->item[i].next, position++) {
        size_t before = w->length, bytes = 0;
        const char *key;
        char spare[324];
        lc_pickle_node at = {.kind = LC_PK_INT, .integer = position};
        int32_t value = dict ? p->item[p->item[i].next].value : p->item[i].value;
        if (is_container(p, value) || p->node[value].kind == LC_PK_TENSOR) {
            if (dict) {
                LC_TRY(key_text(p, p->item[i].value, spare, &key, &bytes));
            } else {
                integer_text(&at, spare);
                key = spare;
                bytes = strlen(spare);
            }
            if (value != w->bare || depth > 0) LC_TRY(extend(w, key, bytes));
            LC_TRY(walk(w, value, depth + 1));
            w->length = before;
            w->path[before] = 0;
        }
        if (dict) i = p->item[i].next;
    }
    return LC_OK;
}

/* The value of the one key that holds all tensors, where the key is a known wrapper's. */
static int32_t find_wrapper(const lc_pickle *p) {
    static const char *const known[] = {"model_state_dict", "state_dict", "model", "module"};
    int32_t found = -1;
    bool named = false;
    int64_t look = MAX_STEPS;
    if (!lc_pickle_is(p, p->root, LC_PK_DICT)) return -1;
    for (int32_t i = p->node[p->root].items.first; i >= 0; i = p->item[i].next) {
        int32_t key = p->item[i].value;
        i = p->item[i].next;
        if (!holds(p, p->item[i].value, true, 1, &look)) continue;
        if (found >= 0) return -1;
        found = p->item[i].value;
        for (size_t k = 0; k < sizeof known / sizeof *known; k++) named = named || lc_pickle_text_is(p, key, known[k]);
    }
    return named && lc_pickle_is(p, found, LC_PK_DICT) ? found : -1;
}

/* Metadata of a safetensors file that was converted: strings in an attribute of the state dict, which torch keeps and
 * ignores. */
static lc_status read_attribute(struct lc_file *f, const lc_pickle *p, int32_t dict) {
    int32_t meta = lc_pickle_is(p, dict, LC_PK_DICT) ? lc_pickle_get(p, p->node[dict].state, "__metadata__") : -1;
    if (!lc_pickle_is(p, meta, LC_PK_DICT)) return LC_OK;
    f->described = true;
    f->meta = lc_alloc((size_t)p->node[meta].items.count / 2 + 1, sizeof *f->meta);
    if (!f->meta) return LC_ENOMEM;
    for (int32_t i = p->node[meta].items.first; i >= 0; i = p->item[i].next) {
        char spare[324], *copy;
        const char *key;
        size_t bytes = 0;
        const lc_pickle_node *value = &p->node[p->item[p->item[i].next].value];
        LC_TRY(key_text(p, p->item[i].value, spare, &key, &bytes));
        i = p->item[i].next;
        if (value->kind != LC_PK_STRING || value->bytes.size > INT32_MAX) continue;
        if (!(copy = lc_alloc(bytes + 1, 1))) return LC_ENOMEM;
        memcpy(copy, key, bytes);
        f->meta[f->metas++] = (lc_file_meta){.key = copy,
                                             .kind = LC_DOC_STRING,
                                             .string = (const char *)value->bytes.data,
                                             .length = (int32_t)value->bytes.size};
    }
    return LC_OK;
}

static lc_status read_tree(struct lc_file *f, const lc_torch *t) {
    tree *w = lc_alloc(1, sizeof *w);
    if (!w) return LC_ENOMEM;
    *w = (tree){.file = f, .torch = t, .bare = find_wrapper(&t->pickle), .steps = MAX_STEPS};
    lc_status status = walk(w, t->pickle.root, 0);
    if (status == LC_OK) status = make_extra(w);
    if (status == LC_OK) status = read_attribute(f, &t->pickle, w->bare >= 0 ? w->bare : t->pickle.root);
    free(w);
    return status;
}

lc_status lc_torch_parse(struct lc_file *f) {
    lc_torch t;
    f->format = "torch";
    LC_TRY(lc_torch_open(&t, f->data, f->bytes));
    lc_status status = read_tree(f, &t);
    lc_torch_close(&t);
    return status;
}
