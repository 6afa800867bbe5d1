/* doc.h: one read-only tree for JSON and YAML documents, as a flat array of nodes that C walks directly and Lua pulls through
 * the lc_doc_* functions of lolcats.h. Owned by whoever parsed it; freed in one piece by lc_doc_free. */
#ifndef LC_DOC_H
#define LC_DOC_H

#include "../core/base.h"

typedef enum { LC_DOC_NULL, LC_DOC_BOOL, LC_DOC_NUMBER, LC_DOC_STRING, LC_DOC_ARRAY, LC_DOC_OBJECT } lc_doc_kind_t;

typedef struct lc_doc_node {
    uint8_t kind;          /* lc_doc_kind_t */
    uint8_t is_integer;    /* a number written without fraction or exponent that a double holds exactly */
    int32_t next;          /* index of the next sibling, -1 at the end */
    int32_t first;         /* first child of an array or object, -1 when empty */
    int32_t count;         /* children */
    uint32_t key, key_len; /* offset into lc_doc.text and length; the key when the parent is an object */
    uint32_t str, str_len; /* a string's bytes (UTF-8, may hold NUL) */
    double number;         /* number, or 0/1 for a bool */
} lc_doc_node;

struct lc_doc {
    lc_doc_node *node; /* node[0] is the root */
    int32_t count;
    char *text; /* all keys and strings, each followed by a NUL */
};

/* Parses `len` bytes. Duplicate keys, trailing text, invalid UTF-8, depth over 256 and non-finite numbers are LC_EPARSE with
 * line and column. `name` stands in front of messages (a file name or what the text is). */
lc_status lc_json_parse(const char *name, const char *text, size_t len, struct lc_doc **out);
/* The same of a part of a longer text, which begins there at `line` and `column` (both from 1). */
lc_status lc_json_parse_at(const char *name, double line, int column, const char *text, size_t len, struct lc_doc **out);
lc_status lc_yaml_parse(const char *name, const char *text, size_t len, struct lc_doc **out);

/* Child of an object by key, or -1. Linear in the number of children: for big vocabularies walk the children instead. */
int32_t lc_doc_get(const struct lc_doc *d, int32_t object, const char *key);
/* The string of a node, or NULL when the node is absent (-1) or no string. */
const char *lc_doc_str(const struct lc_doc *d, int32_t node);

#endif
