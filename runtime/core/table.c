/* table.c: the op table as data: ops.def with every signature parsed once. The grammar stands in ops.def. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"

extern const lc_rule lc_rule_unary, lc_rule_binary, lc_rule_compare, lc_rule_pointwise_grad;
#define VIEW(name, sig, flags, doc) extern const lc_rule lc_rule_##name;
#define OP(name, sig, flags, doc) extern const lc_rule lc_rule_##name;
#include "../ops.def"

enum {
    INPLACE = LC_F_INPLACE, NODIFF = LC_F_NODIFF, NOGRAD = LC_F_NOGRAD, RANDOM = LC_F_RANDOM, MIXED = LC_F_MIXED, HALF = LC_F_HALF,
    OPERANDS = LC_F_OPERANDS, RESULT = LC_F_RESULT, NEITHER = LC_F_NEITHER, INTERNAL = LC_F_INTERNAL, STRIDED = LC_F_STRIDED, ROWS = LC_F_ROWS, GRAD = LC_F_GRAD | LC_F_INTERNAL | LC_F_NODIFF | LC_F_POINT | LC_F_STRIDED
};

static lc_row rows[LC_OP_COUNT] = {
#define UNARY(n, sig, fl, d)                                                                                     \
    {.name = #n, .signature = sig, .doc = d, .flags = (fl) | LC_F_POINT | STRIDED, .rule = &lc_rule_unary},      \
    {.name = #n "_grad", .signature = sig, .doc = "gradient of " #n, .flags = (fl) | GRAD, .rule = &lc_rule_pointwise_grad},
#define UNARY_FLAT(n, sig, fl, d) \
    {.name = #n, .signature = sig, .doc = d, .flags = (fl) | LC_F_POINT | NODIFF | STRIDED, .rule = &lc_rule_unary},
#define BINARY(n, sig, fl, d)                                                                                              \
    {.name = #n, .signature = sig, .doc = d, .flags = (fl) | LC_F_POINT | LC_F_BINARY | STRIDED, .rule = &lc_rule_binary}, \
    {.name = #n "_grad_a", .signature = sig, .doc = "gradient of " #n " for a", .flags = (fl) | GRAD | LC_F_BINARY,        \
     .rule = &lc_rule_pointwise_grad},                                                                                     \
    {.name = #n "_grad_b", .signature = sig, .doc = "gradient of " #n " for b", .flags = (fl) | GRAD | LC_F_BINARY,        \
     .rule = &lc_rule_pointwise_grad},
#define COMPARE(n, sig, fl, d)                                                                                                  \
    {.name = #n, .signature = sig, .doc = d, .flags = (fl) | LC_F_POINT | LC_F_BINARY | LC_F_COMPARE | NODIFF | STRIDED,        \
     .rule = &lc_rule_compare},
#define VIEW(n, sig, fl, d) {.name = #n, .signature = sig, .doc = d, .flags = (fl) | LC_F_VIEW | STRIDED, .rule = &lc_rule_##n},
#define OP(n, sig, fl, d) {.name = #n, .signature = sig, .doc = d, .flags = (fl), .rule = &lc_rule_##n},
#include "../ops.def"
};
static bool parsed;

static void add_input(lc_row *r, char kind, bool optional, const char *name, size_t n) {
    int k = r->n_x++;
    r->kind[k] = kind;
    r->optional[k] = optional;
    snprintf(r->x_name[k], sizeof r->x_name[k], "%.*s", (int)n, name);
}

/* One "name:kind?=default" of length n. Inputs of kind F and N take their place after all T, I and A. */
static void parse_item(lc_row *r, const char *p, size_t n, bool second_pass) {
    const char *colon = memchr(p, ':', n);
    char kind = colon[1];
    bool optional = colon + 2 < p + n && colon[2] == '?';
    size_t name = (size_t)(colon - p);
    if (second_pass) {
        if (kind == 'F' || kind == 'N') add_input(r, kind == 'F' ? 'T' : 'I', true, p, name);
        return;
    }
    switch (kind) {
    case 'T': case 'I': case 'A': add_input(r, kind, optional, p, name); break;
    case 'L': r->has_list = 1; break;
    case 'f': case 'F': r->n_f++; break;
    case 'i': case 'b': case 'd': case 'e': case 'N': r->n_i++; break;
    case 'S': case 'D': r->n_i += 1 + LC_MAX_DIMS; break;
    case 's': r->has_s = 1; break;
    default: break;
    }
}

static void parse(lc_row *r) {
    const char *arrow = strstr(r->signature, "->");
    for (int pass = 0; pass < 2; pass++)
        for (const char *p = r->signature; p < arrow;) {
            size_t n = strcspn(p, " ");
            if (n && p + n <= arrow) parse_item(r, p, n, pass);
            p += n + (p[n] == ' ');
        }
    for (const char *p = arrow + 2; *p; p++) {
        if (*p == ' ') continue;
        bool hidden = *p == '+';
        if (hidden) p++;
        r->y_hidden[r->n_y] = hidden;
        if (!hidden) r->n_y_visible = (int8_t)(r->n_y + 1);
        r->y_kind[r->n_y++] = *p;
    }
    if (r->flags & LC_F_GRAD) { /* g, then the op's inputs, then its result */
        memmove(&r->kind[1], &r->kind[0], (size_t)r->n_x);
        memmove(&r->x_name[1], &r->x_name[0], (size_t)r->n_x * sizeof r->x_name[0]);
        r->kind[0] = 'T';
        strcpy(r->x_name[0], "g");
        r->n_x++;
        add_input(r, 'T', false, "y", 1);
    }
}

static void parse_all(void) {
    for (int i = 0; i < LC_OP_COUNT; i++) parse(&rows[i]);
    parsed = true;
}

const lc_row *lc_row_of(int op) {
    if (__builtin_expect(!parsed, 0)) parse_all();
    return &rows[op];
}

static bool is_op(int op) { return op >= 0 && op < LC_OP_COUNT; }
int lc_op_count(void) { return LC_OP_COUNT; }
const char *lc_op_name(int op) { return is_op(op) ? rows[op].name : ""; }
const char *lc_op_signature(int op) { return is_op(op) ? rows[op].signature : ""; }
const char *lc_op_doc(int op) { return is_op(op) ? rows[op].doc : ""; }

int lc_op_find(const char *name) {
    for (int i = 0; i < LC_OP_COUNT; i++)
        if (!strcmp(rows[i].name, name)) return i;
    return -1;
}

int lc_op_has(int op, const char *flag) {
    static const struct { const char *name; uint32_t bit; } flags[] = {
        {"point", LC_F_POINT}, {"binary", LC_F_BINARY}, {"compare", LC_F_COMPARE}, {"view", LC_F_VIEW}, {"inplace", LC_F_INPLACE},
        {"nograd", LC_F_NOGRAD}, {"nondiff", LC_F_NODIFF}, {"random", LC_F_RANDOM}, {"mixed", LC_F_MIXED}, {"internal", LC_F_INTERNAL},
        {"half", LC_F_HALF}, {"strided", LC_F_STRIDED}, {"rows", LC_F_ROWS}, {"grad", LC_F_GRAD}};
    if (!is_op(op)) return 0;
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++)
        if (!strcmp(flag, flags[i].name)) return (rows[op].flags & flags[i].bit) != 0;
    return 0;
}

int lc_op_has_kernel(int op, int device) {
    if (!is_op(op) || device < 0 || device >= lc_device_count()) return 0;
    return rows[op].flags & LC_F_VIEW || lc_device_kernel(device, op, false)->run != NULL;
}

int lc_op_arity(int op, const char *kind) {
    if (!is_op(op)) return -1;
    const lc_row *r = lc_row_of(op);
    switch (kind[0]) {
    case 'T': return r->n_x;
    case 'o': return r->n_y_visible;
    case 'l': return r->has_list;
    case 'f': return r->n_f;
    case 'i': return r->n_i;
    case 's': return r->has_s;
    default: return -1;
    }
}
