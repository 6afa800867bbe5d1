/* yaml.c: YAML text into the flat node array of doc.h, on libyaml's events. Plain scalars follow YAML 1.2's core
 * schema: `1e-4` and `.5` are numbers, `yes` is a string. What a recipe's settings do not need is refused by name
 * rather than guessed at: several documents, merge keys, keys that are no scalars, unknown tags. Aliases are copied, up
 * to a limit. */
#include "doc_build.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <yaml.h>

enum { YAML_MAX_ANCHORS = 4096, YAML_MAX_COPIES = 100000 };

typedef struct yaml_anchor {
    char *name;
    int32_t node;
} yaml_anchor;

typedef struct yaml_parse {
    lc_doc_build build;
    yaml_parser_t parser;
    const char *name;
    bool have_key; /* the open mapping's next value has its key */
    yaml_mark_t key_mark;
    yaml_anchor *anchor;
    int anchors;
    int32_t copies;  /* nodes made by aliases */
    int32_t stop_at; /* stop when this node is made: how a duplicate key's place is found, on a second pass */
} yaml_parse;

static lc_status yaml_fail(const yaml_parse *p, const yaml_mark_t *at, const char *why) {
    return lc_fail(LC_EPARSE, "%s:%d:%d: not valid YAML: %s", p->name, (int)at->line + 1, (int)at->column + 1, why);
}

/* ---- scalars
 * --------------------------------------------------------------------------------------------------------- */

static bool is_one_of(const char *s, const char *const *words) {
    for (; *words; words++)
        if (strcmp(s, *words) == 0) return true;
    return false;
}

static bool is_null(const char *s) {
    return is_one_of(s, (const char *const[]){"", "~", "null", "Null", "NULL", NULL});
}

static bool is_true(const char *s) { return is_one_of(s, (const char *const[]){"true", "True", "TRUE", NULL}); }

static bool is_false(const char *s) { return is_one_of(s, (const char *const[]){"false", "False", "FALSE", NULL}); }

static bool is_not_finite(const char *s) {
    if (*s == '-' || *s == '+') s++;
    return is_one_of(s, (const char *const[]){".inf", ".Inf", ".INF", ".nan", ".NaN", ".NAN", NULL});
}

static const char *skip_digits(const char *s) {
    while (*s >= '0' && *s <= '9') s++;
    return s;
}

/* [-+]? ( \.[0-9]+ | [0-9]+ ( \.[0-9]* )? ) ( [eE] [-+]? [0-9]+ )? */
static bool is_decimal(const char *s) {
    if (*s == '-' || *s == '+') s++;
    const char *whole = skip_digits(s), *end = whole;
    if (*whole == '.') end = skip_digits(whole + 1);
    if (whole == s && end <= whole + 1) return false;
    if (*end == 'e' || *end == 'E') {
        const char *power = end + 1;
        if (*power == '-' || *power == '+') power++;
        end = skip_digits(power);
        if (end == power) return false;
    }
    return *end == 0;
}

/* 0x1f and 0o17; false when it is neither */
static bool read_radix(const char *s, double *value, bool *exact) {
    int bits = s[0] != '0' ? 0 : s[1] == 'x' ? 4 : s[1] == 'o' ? 3 : 0;
    uint64_t sum = 0;
    if (bits == 0 || !s[2]) return false;
    for (s += 2; *s; s++) {
        int lower = *s | 32, digit = *s >= '0' && *s <= '9'         ? *s - '0'
                                     : lower >= 'a' && lower <= 'f' ? lower - 'a' + 10
                                                                    : 16;
        if (digit >= 1 << bits || sum >> (64 - bits)) return false;
        sum = sum << bits | (uint64_t)digit;
    }
    *value = (double)sum;
    *exact = *value < 18446744073709551616.0 && (uint64_t)*value == sum;
    return true;
}

static lc_status yaml_node(yaml_parse *p, lc_doc_kind_t kind) {
    int32_t node = lc_doc_build_node(&p->build, kind);
    if (node < 0) return p->build.status;
    p->have_key = false;
    if (node == p->stop_at) return yaml_fail(p, &p->key_mark, "this key occurs twice in one mapping");
    return LC_OK;
}

static lc_status yaml_plain(yaml_parse *p, const yaml_event_t *e) {
    const char *text = (const char *)e->data.scalar.value;
    size_t len = e->data.scalar.length;
    double value;
    bool exact;
    if (strlen(text) == len) { /* no NUL within */
        if (is_null(text)) return yaml_node(p, LC_DOC_NULL);
        if (is_true(text) || is_false(text)) {
            LC_TRY(yaml_node(p, LC_DOC_BOOL));
            lc_doc_build_last(&p->build)->number = is_true(text);
            return LC_OK;
        }
        if (is_not_finite(text)) return yaml_fail(p, &e->start_mark, "only finite numbers are read");
        if (is_decimal(text)) {
            LC_TRY(yaml_node(p, LC_DOC_NUMBER));
            if (lc_doc_build_number(&p->build, text, len)) return LC_OK;
            return yaml_fail(p, &e->start_mark, "the number is too large for a double");
        }
        if (read_radix(text, &value, &exact)) {
            LC_TRY(yaml_node(p, LC_DOC_NUMBER));
            lc_doc_build_last(&p->build)->number = value;
            lc_doc_build_last(&p->build)->is_integer = exact;
            return LC_OK;
        }
    }
    LC_TRY(yaml_node(p, LC_DOC_STRING));
    return lc_doc_build_string(&p->build, text, len);
}

static lc_status yaml_key(yaml_parse *p, const yaml_event_t *e) {
    const char *text = (const char *)e->data.scalar.value;
    if (e->data.scalar.style == YAML_PLAIN_SCALAR_STYLE && strcmp(text, "<<") == 0)
        return yaml_fail(p, &e->start_mark, "merge keys (<<) are not read; write the keys out");
    if (e->data.scalar.anchor) return yaml_fail(p, &e->start_mark, "an anchor on a key is not read");
    p->have_key = true;
    p->key_mark = e->start_mark;
    return lc_doc_build_key(&p->build, text, e->data.scalar.length);
}

static lc_status yaml_scalar(yaml_parse *p, const yaml_event_t *e) {
    const char *tag = (const char *)e->data.scalar.tag;
    bool plain = e->data.scalar.style == YAML_PLAIN_SCALAR_STYLE;
    if (tag && (strcmp(tag, "!") == 0 || strcmp(tag, YAML_STR_TAG) == 0))
        plain = false;
    else if (tag)
        return yaml_fail(p, &e->start_mark, "only the tag !!str is read on a value");
    if (plain) return yaml_plain(p, e);
    LC_TRY(yaml_node(p, LC_DOC_STRING));
    return lc_doc_build_string(&p->build, (const char *)e->data.scalar.value, e->data.scalar.length);
}

/* ---- structure
 * ------------------------------------------------------------------------------------------------------- */

static bool wants_key(const yaml_parse *p) {
    const lc_doc_build *b = &p->build;
    return b->depth > 0 && b->node[b->open[b->depth - 1]].kind == LC_DOC_OBJECT && !p->have_key;
}

static lc_status yaml_open(yaml_parse *p, const yaml_event_t *e, lc_doc_kind_t kind) {
    const yaml_char_t *tag =
        e->type == YAML_MAPPING_START_EVENT ? e->data.mapping_start.tag : e->data.sequence_start.tag;
    if (wants_key(p)) return yaml_fail(p, &e->start_mark, "a key must be a plain or quoted word");
    if (tag) return yaml_fail(p, &e->start_mark, "only the tag !!str is read on a value");
    LC_TRY(yaml_node(p, kind));
    return lc_doc_build_open(&p->build) ? LC_OK : yaml_fail(p, &e->start_mark, "nested more than 256 deep");
}

static lc_status yaml_close(yaml_parse *p) { return lc_doc_build_close(&p->build); }

/* Remembers that the last node made has this anchor. */
static lc_status yaml_anchor_here(yaml_parse *p, const yaml_event_t *e, const yaml_char_t *name) {
    if (!name) return LC_OK;
    if (p->anchors == YAML_MAX_ANCHORS) return yaml_fail(p, &e->start_mark, "more than 4096 anchors");
    if (!p->anchor) p->anchor = lc_alloc(YAML_MAX_ANCHORS, sizeof *p->anchor);
    if (!p->anchor) return p->build.status = LC_ENOMEM;
    char *copy = lc_strdup((const char *)name);
    if (!copy) return p->build.status = LC_ENOMEM;
    p->anchor[p->anchors++] = (yaml_anchor){copy, p->build.count - 1};
    return LC_OK;
}

/* Copies the tree at `from` to the open place. Its strings are shared. */
static lc_status yaml_copy(yaml_parse *p, const yaml_event_t *e, int32_t from) {
    lc_doc_build *b = &p->build;
    if (++p->copies > YAML_MAX_COPIES) return yaml_fail(p, &e->start_mark, "aliases stand for more than 100000 values");
    LC_TRY(yaml_node(p, (lc_doc_kind_t)b->node[from].kind));
    lc_doc_node *copy = lc_doc_build_last(b), *source = &b->node[from];
    copy->is_integer = source->is_integer;
    copy->number = source->number;
    copy->str = source->str;
    copy->str_len = source->str_len;
    if (source->kind != LC_DOC_ARRAY && source->kind != LC_DOC_OBJECT) return LC_OK;
    if (!lc_doc_build_open(b)) return yaml_fail(p, &e->start_mark, "nested more than 256 deep");
    for (int32_t child = b->node[from].first; child >= 0; child = b->node[child].next) {
        b->key = b->node[child].key;
        b->key_len = b->node[child].key_len;
        LC_TRY(yaml_copy(p, e, child));
    }
    return lc_doc_build_close(b);
}

static lc_status yaml_alias(yaml_parse *p, const yaml_event_t *e) {
    int i = p->anchors - 1;
    if (wants_key(p)) return yaml_fail(p, &e->start_mark, "an alias cannot be a key");
    while (i >= 0 && strcmp(p->anchor[i].name, (const char *)e->data.alias.anchor) != 0) i--;
    if (i < 0) return yaml_fail(p, &e->start_mark, "an alias without its anchor");
    for (int k = 0; k < p->build.depth; k++)
        if (p->build.open[k] == p->anchor[i].node)
            return yaml_fail(p, &e->start_mark, "an alias inside what it stands for");
    return yaml_copy(p, e, p->anchor[i].node);
}

static lc_status yaml_event(yaml_parse *p, const yaml_event_t *e) {
    switch (e->type) {
    case YAML_DOCUMENT_START_EVENT:
        return p->build.count ? yaml_fail(p, &e->start_mark, "a second document; one is read") : LC_OK;
    case YAML_ALIAS_EVENT: return yaml_alias(p, e);
    case YAML_SCALAR_EVENT:
        if (wants_key(p)) return yaml_key(p, e);
        LC_TRY(yaml_scalar(p, e));
        return yaml_anchor_here(p, e, e->data.scalar.anchor);
    case YAML_SEQUENCE_START_EVENT:
        LC_TRY(yaml_open(p, e, LC_DOC_ARRAY));
        return yaml_anchor_here(p, e, e->data.sequence_start.anchor);
    case YAML_MAPPING_START_EVENT:
        LC_TRY(yaml_open(p, e, LC_DOC_OBJECT));
        return yaml_anchor_here(p, e, e->data.mapping_start.anchor);
    case YAML_SEQUENCE_END_EVENT:
    case YAML_MAPPING_END_EVENT: return yaml_close(p);
    default: return LC_OK;
    }
}

static lc_status yaml_syntax(const yaml_parse *p) {
    const yaml_parser_t *y = &p->parser;
    char why[256];
    if (y->error == YAML_MEMORY_ERROR) return lc_fail(LC_ENOMEM, "%s: no memory to read YAML", p->name);
    snprintf(why, sizeof why, "%s%s%s", y->context ? y->context : "", y->context ? ", " : "",
             y->problem ? y->problem : "error");
    return yaml_fail(p, &y->problem_mark, why);
}

static lc_status yaml_pass(yaml_parse *p, const char *text, size_t len) {
    if (!yaml_parser_initialize(&p->parser)) return lc_fail(LC_ENOMEM, "%s: no memory to read YAML", p->name);
    lc_status status = lc_doc_build_start(&p->build, len);
    yaml_parser_set_encoding(&p->parser, YAML_UTF8_ENCODING);
    yaml_parser_set_input_string(&p->parser, (const unsigned char *)text, len);
    for (bool done = false; !done && status == LC_OK;) {
        yaml_event_t event;
        if (!yaml_parser_parse(&p->parser, &event)) {
            status = yaml_syntax(p);
            break;
        }
        status = yaml_event(p, &event);
        done = event.type == YAML_STREAM_END_EVENT;
        yaml_event_delete(&event);
    }
    if (status == LC_OK && p->build.count == 0) status = yaml_node(p, LC_DOC_NULL);
    yaml_parser_delete(&p->parser);
    for (int i = 0; i < p->anchors; i++) free(p->anchor[i].name);
    free(p->anchor);
    p->anchor = NULL;
    p->anchors = 0;
    return status;
}

lc_status lc_yaml_parse(const char *name, const char *text, size_t len, struct lc_doc **out) {
    *out = NULL;
    if (len > INT32_MAX) return lc_fail(LC_EPARSE, "%s: %.0f bytes of YAML; at most 2^31 are read", name, (double)len);
    ptrdiff_t bad = lc_utf8_invalid(text, len);
    if (bad >= 0) {
        int line, column;
        lc_doc_place(text, len, (size_t)bad, &line, &column);
        return lc_fail(LC_EPARSE, "%s:%d:%d: not valid YAML: invalid UTF-8", name, line, column);
    }
    yaml_parse p = {.name = name, .stop_at = -1};
    lc_status status = yaml_pass(&p, text, len);
    if (status == LC_OK) return lc_doc_build_end(&p.build, out);
    if (p.build.duplicate >= 0) {
        yaml_parse again = {.name = name, .stop_at = p.build.duplicate};
        status = yaml_pass(&again, text, len);
        lc_doc_build_drop(&again.build);
    }
    lc_doc_build_drop(&p.build);
    return status;
}
