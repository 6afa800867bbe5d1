/* doc_build.h: what the JSON and YAML parsers share: a builder that turns a stream of values, opens and closes into the
 * node array of doc.h, finds duplicate keys, and reads numbers; UTF-8 checking and places in a text. */
#ifndef LC_DOC_BUILD_H
#define LC_DOC_BUILD_H

#include "doc.h"

enum { LC_DOC_DEPTH = 256 };

typedef struct lc_doc_build {
    lc_doc_node *node;
    int32_t count, room;
    char *text; /* grows by doubling */
    size_t text_len, text_room;
    uint32_t key, key_len; /* the key waiting for its value */
    int depth;
    int32_t open[LC_DOC_DEPTH + 1]; /* the arrays and objects being filled */
    int32_t tail[LC_DOC_DEPTH + 1]; /* the last child of each, -1 at first */
    uint32_t *slot;                 /* hash table of the object being checked */
    size_t slots;
    uint64_t seed;
    int32_t duplicate; /* the node whose key a sibling has already, or -1 */
    lc_status status;  /* why a call failed, when it was not the text's fault */
} lc_doc_build;

lc_status lc_doc_build_start(lc_doc_build *b, size_t text_room);
/* Adds a node under the open one, with the waiting key. -1 when there is no memory. */
int32_t lc_doc_build_node(lc_doc_build *b, lc_doc_kind_t kind);
static inline lc_doc_node *lc_doc_build_last(lc_doc_build *b) { return &b->node[b->count - 1]; }
lc_status lc_doc_build_key(lc_doc_build *b, const char *text, size_t len);
lc_status lc_doc_build_string(lc_doc_build *b, const char *text, size_t len); /* of the last node */
bool lc_doc_build_number(lc_doc_build *b, const char *text, size_t len);      /* of the last node; false: not finite */
bool lc_doc_build_open(lc_doc_build *b);                                      /* the last node; false: too deep */
/* Closes the open node. A duplicate key is LC_EPARSE without a message, with b->duplicate set. */
lc_status lc_doc_build_close(lc_doc_build *b);
lc_status lc_doc_build_end(lc_doc_build *b, struct lc_doc **out); /* hands the nodes over */
void lc_doc_build_drop(lc_doc_build *b);

uint64_t lc_hash_bytes(const char *s, size_t len, uint64_t seed); /* for tables: differs by seed */

ptrdiff_t lc_utf8_invalid(const char *text, size_t len); /* offset of the first byte that is not UTF-8, or -1 */
void lc_doc_place(const char *text, size_t len, size_t offset, int *line, int *column); /* both count from 1 */

#endif
