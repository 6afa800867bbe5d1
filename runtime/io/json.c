/* json.c: JSON text into the flat node array of doc.h, on yajl's event parser. yajl checks the grammar; what it is lax
 * about is checked here: the text's UTF-8 (overlong forms, surrogates), lone surrogate escapes (yajl would put "?"),
 * duplicate keys, depth, numbers no double can hold. Strings are stored unescaped, which never needs more room than the
 * text itself. */
#include "doc_build.h"

#include <stdio.h>
#include <string.h>

#include <yajl/yajl_parse.h>

typedef struct json_parse {
    lc_doc_build build;
    yajl_handle yajl;
    const char *why; /* the reason for which a callback stopped the parse */
    int32_t stop_at; /* stop when this node is made: how a duplicate key's place is found, on a second pass */
} json_parse;

static int json_stop(json_parse *p, const char *why) {
    p->why = why;
    return 0;
}

static int json_node(json_parse *p, lc_doc_kind_t kind) {
    int32_t node = lc_doc_build_node(&p->build, kind);
    if (node < 0) return json_stop(p, NULL);
    if (node == p->stop_at) return json_stop(p, "");
    return 1;
}

static int on_null(void *ctx) { return json_node(ctx, LC_DOC_NULL); }

static int on_boolean(void *ctx, int value) {
    json_parse *p = ctx;
    if (!json_node(p, LC_DOC_BOOL)) return 0;
    lc_doc_build_last(&p->build)->number = value != 0;
    return 1;
}

static int on_number(void *ctx, const char *text, size_t len) {
    json_parse *p = ctx;
    if (!json_node(p, LC_DOC_NUMBER)) return 0;
    if (!lc_doc_build_number(&p->build, text, len)) return json_stop(p, "the number is too large for a double");
    return 1;
}

static int on_string(void *ctx, const unsigned char *text, size_t len) {
    json_parse *p = ctx;
    if (!json_node(p, LC_DOC_STRING)) return 0;
    return lc_doc_build_string(&p->build, (const char *)text, len) == LC_OK ? 1 : json_stop(p, NULL);
}

static int on_key(void *ctx, const unsigned char *text, size_t len) {
    json_parse *p = ctx;
    return lc_doc_build_key(&p->build, (const char *)text, len) == LC_OK ? 1 : json_stop(p, NULL);
}

static int json_open(json_parse *p, lc_doc_kind_t kind) {
    if (!json_node(p, kind)) return 0;
    return lc_doc_build_open(&p->build) ? 1 : json_stop(p, "nested more than 256 deep");
}

static int on_map(void *ctx) { return json_open(ctx, LC_DOC_OBJECT); }

static int on_array(void *ctx) { return json_open(ctx, LC_DOC_ARRAY); }

static int on_close(void *ctx) {
    json_parse *p = ctx;
    return lc_doc_build_close(&p->build) == LC_OK ? 1 : json_stop(p, NULL);
}

static const yajl_callbacks json_callbacks = {
    .yajl_null = on_null,
    .yajl_boolean = on_boolean,
    .yajl_number = on_number,
    .yajl_string = on_string,
    .yajl_start_map = on_map,
    .yajl_map_key = on_key,
    .yajl_end_map = on_close,
    .yajl_start_array = on_array,
    .yajl_end_array = on_close,
};

/* Where the text stands in the file that it is a part of. */
typedef struct json_source {
    const char *name;
    double line; /* of its first character; from 1 */
    int column;
} json_source;

static lc_status json_fail(const json_source *from, const char *text, size_t len, size_t offset, const char *why) {
    int line, column;
    lc_doc_place(text, len, offset, &line, &column);
    if (line == 1) column += from->column - 1;
    return lc_fail(LC_EPARSE, "%s:%.0f:%d: not valid JSON: %s", from->name, from->line + line - 1, column, why);
}

static int hex4(const char *s, const char *end) {
    int value = 0;
    if (end - s < 4) return -1;
    for (int i = 0; i < 4; i++) {
        int c = s[i], digit = c >= '0' && c <= '9'                 ? c - '0'
                              : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10
                                                                   : -1;
        if (digit < 0) return -1;
        value = value * 16 + digit;
    }
    return value;
}

/* Offset of a \u escape of half a surrogate pair, or -1. Malformed escapes are left to yajl. */
static ptrdiff_t json_lone_surrogate(const char *text, size_t len) {
    const char *end = text + len, *s = text;
    while ((s = memchr(s, '\\', (size_t)(end - s))) != NULL && end - s >= 2) {
        int unit = s[1] == 'u' ? hex4(s + 2, end) : -1;
        if (unit < 0xd800 || unit > 0xdfff) {
            s += 2;
            continue;
        }
        if (unit >= 0xdc00 || end - s < 12 || s[6] != '\\' || s[7] != 'u') return s - text;
        int low = hex4(s + 8, end);
        if (low < 0xdc00 || low > 0xdfff) return s - text;
        s += 12;
    }
    return -1;
}

/* One pass of yajl. *offset tells where it stopped; the message of a yajl error stands in `said`. */
static bool json_pass(json_parse *p, const char *text, size_t len, size_t *offset, char *said, size_t size) {
    said[0] = 0;
    p->why = NULL;
    p->yajl = yajl_alloc(&json_callbacks, NULL, p);
    if (!p->yajl) {
        snprintf(said, size, "out of memory");
        return false;
    }
    yajl_config(p->yajl, yajl_dont_validate_strings, 1); /* done before, and more strictly */
    yajl_status status = yajl_parse(p->yajl, (const unsigned char *)text, len);
    *offset = yajl_get_bytes_consumed(p->yajl);
    if (status == yajl_status_ok) {
        status = yajl_complete_parse(p->yajl);
        *offset = len;
    }
    if (status == yajl_status_error) {
        unsigned char *message = yajl_get_error(p->yajl, 0, NULL, 0);
        snprintf(said, size, "%s", message ? (const char *)message : "syntax error");
        if (message) yajl_free_error(p->yajl, message);
        said[strcspn(said, "\n")] = 0;
    }
    yajl_free(p->yajl);
    return status == yajl_status_ok;
}

static lc_status json_duplicate(json_parse *p, const json_source *from, const char *text, size_t len) {
    char said[256], why[200];
    size_t offset = 0;
    const lc_doc_node *n = &p->build.node[p->build.duplicate];
    int shown = n->key_len > 80 ? 80 : (int)n->key_len;
    snprintf(why, sizeof why, "the key \"%.*s\" occurs twice in one object", shown, p->build.text + n->key);
    json_parse again = {.stop_at = p->build.duplicate};
    if (lc_doc_build_start(&again.build, len) == LC_OK) json_pass(&again, text, len, &offset, said, sizeof said);
    lc_doc_build_drop(&again.build);
    return json_fail(from, text, len, offset, why);
}

lc_status lc_json_parse_at(const char *name, double line, int column, const char *text, size_t len, struct lc_doc **out) {
    const json_source from = {name, line, column};
    char said[256];
    size_t offset = 0;
    *out = NULL;
    if (len > INT32_MAX) return lc_fail(LC_EPARSE, "%s: %.0f bytes of JSON; at most 2^31 are read", name, (double)len);
    ptrdiff_t bad = lc_utf8_invalid(text, len);
    if (bad >= 0) return json_fail(&from, text, len, (size_t)bad, "invalid UTF-8");
    bad = json_lone_surrogate(text, len);
    if (bad >= 0) return json_fail(&from, text, len, (size_t)bad, "an escape of half a surrogate pair");

    json_parse p = {.stop_at = -1};
    lc_status status = lc_doc_build_start(&p.build, len);
    if (status == LC_OK) {
        if (json_pass(&p, text, len, &offset, said, sizeof said)) return lc_doc_build_end(&p.build, out);
        if (p.build.status != LC_OK) {
            status = p.build.status;
        } else if (p.build.duplicate >= 0) {
            status = json_duplicate(&p, &from, text, len);
        } else {
            status = json_fail(&from, text, len, offset, p.why ? p.why : said);
        }
    }
    lc_doc_build_drop(&p.build);
    return status;
}

lc_status lc_json_parse(const char *name, const char *text, size_t len, struct lc_doc **out) {
    return lc_json_parse_at(name, 1, 1, text, len, out);
}
