/* parquet.c: records of a parquet file, one at a time: columns are read page by page side by side, and their levels say where
 * records, lists and missing values begin. A record becomes an object; groups objects, lists arrays, maps arrays of objects
 * {key, value}; strings must be UTF-8, bytes without that promise are strings of bytes; dates and times stay numbers. */
#define _GNU_SOURCE
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "parquet.h"
#include "records.h"

enum { RECORD_VALUES = 1 << 24, RECORD_BYTES = 1 << 30 }; /* a few bytes of runs can stand for more than any memory */

/* ---- values
 * ---------------------------------------------------------------------------------------------------------- */

static double half_value(const uint8_t *p) {
    unsigned bits = (unsigned)p[0] | (unsigned)p[1] << 8, exponent = bits >> 10 & 31, fraction = bits & 1023;
    double v = exponent == 31 ? (fraction ? NAN : INFINITY)
               : exponent     ? ldexp(1024 + fraction, (int)exponent - 25)
                              : ldexp(fraction, -24);
    return bits >> 15 ? -v : v;
}

static double float_value(uint64_t bits) {
    uint32_t word = (uint32_t)bits;
    float v;
    memcpy(&v, &word, 4);
    return v;
}

static double double_value(uint64_t bits) {
    double v;
    memcpy(&v, &bits, 8);
    return v;
}

/* A decimal of bytes: big-endian, two's complement. */
static double big_endian(const uint8_t *p, size_t n) {
    double v = n && p[0] & 128 ? -1 : 0;
    for (size_t i = 0; i < n; i++) v = v * 256 + p[i];
    return v;
}

static double whole_value(const pq_column *c, uint64_t bits) {
    if (c->type == PQ_INT32) return c->meaning == PQ_UNSIGNED ? (double)(uint32_t)bits : (double)(int32_t)(uint32_t)bits;
    return c->meaning == PQ_UNSIGNED ? (double)bits : (double)(int64_t)bits;
}

/* Nanoseconds since 1970 of the old time stamps: nanoseconds of a day, and a Julian day. */
static double int96_value(const uint8_t *p) {
    uint64_t nanoseconds;
    uint32_t day;
    memcpy(&nanoseconds, p, 8);
    memcpy(&day, p + 8, 4);
    return ((double)day - 2440588) * 86400e9 + (double)nanoseconds;
}

static double number_value(const pq_column *c, const pq_value *v) {
    double x;
    switch (c->type) {
    case PQ_FLOAT: return float_value(v->bits);
    case PQ_DOUBLE: return double_value(v->bits);
    case PQ_INT96: return int96_value(v->bytes);
    case PQ_BYTES: case PQ_FIXED:
        if (c->meaning == PQ_HALF) return half_value(v->bytes);
        x = big_endian(v->bytes, v->length);
        break;
    default: x = whole_value(c, v->bits);
    }
    return c->meaning == PQ_DECIMAL ? x / pow(10, c->scale) : x;
}

static lc_status put_value(pq_column *c, lc_doc_build *b) {
    pq_value v;
    LC_TRY(lc_parquet_value(c, &v));
    if (b->count >= RECORD_VALUES || b->text_len + v.length > RECORD_BYTES)
        return lc_fail(LC_EPARSE, "one record of more than %d values or %d bytes", RECORD_VALUES, RECORD_BYTES);
    if (c->meaning == PQ_TEXT || c->meaning == PQ_BINARY) {
        ptrdiff_t bad = c->meaning == PQ_TEXT ? lc_utf8_invalid((const char *)v.bytes, v.length) : -1;
        if (bad >= 0) return lc_fail(LC_EPARSE, "invalid UTF-8 at byte %d of a text", (int)bad);
        if (lc_doc_build_node(b, LC_DOC_STRING) < 0) return b->status;
        return lc_doc_build_string(b, (const char *)v.bytes, v.length);
    }
    if (lc_doc_build_node(b, c->type == PQ_BOOLEAN ? LC_DOC_BOOL : LC_DOC_NUMBER) < 0) return b->status;
    lc_doc_node *n = lc_doc_build_last(b);
    n->number = c->type == PQ_BOOLEAN ? (double)v.bits : number_value(c, &v);
    n->is_integer = n->kind == LC_DOC_NUMBER && floor(n->number) == n->number && fabs(n->number) < 9007199254740992.0;
    return LC_OK;
}

/* ---- records
 * --------------------------------------------------------------------------------------------------------- */

/* The next entry of a node's first leaf: it says whether the node is there. */
static lc_status look(struct lc_parquet *p, const pq_node *n, pq_column **c) {
    bool there;
    *c = &p->column[n->first_leaf];
    LC_TRY(lc_parquet_peek(*c, &there));
    return there ? LC_OK : lc_fail(LC_EPARSE, "the column ends before its row group");
}

/* Every leaf below a node that is not there has one entry that says so. */
static lc_status pass(struct lc_parquet *p, const pq_node *n) {
    for (int32_t i = 0; i < n->leaves; i++) {
        pq_column *c = &p->column[n->first_leaf + i];
        bool there;
        LC_TRY(lc_parquet_peek(c, &there));
        if (!there || c->now_def >= n->def) return lc_fail(LC_EPARSE, "the levels of columns that belong together differ");
        c->have = false;
    }
    return LC_OK;
}

static lc_status put_node(struct lc_parquet *p, const pq_node *n, lc_doc_build *b);

static lc_status put_children(struct lc_parquet *p, const pq_node *n, lc_doc_build *b) {
    if (lc_doc_build_node(b, LC_DOC_OBJECT) < 0) return b->status;
    if (!lc_doc_build_open(b)) return lc_fail(LC_EPARSE, "nested too deep");
    for (const pq_node *child = n + 1; child < p->node + n->next; child = p->node + child->next) {
        if (n == p->node && !child->wanted) continue;
        LC_TRY(lc_doc_build_key(b, child->name, child->name_length));
        LC_TRY(put_node(p, child, b));
    }
    lc_status status = lc_doc_build_close(b);
    if (status != LC_OK && b->duplicate >= 0)
        return lc_fail(LC_EPARSE, "the column '%.80s' occurs twice", b->text + b->node[b->duplicate].key);
    return status;
}

static lc_status put_content(struct lc_parquet *p, const pq_node *n, lc_doc_build *b);

/* What a repeated node holds, element after element, as an array. element: what to put for each, the node or its only child. */
static lc_status put_repeated(struct lc_parquet *p, const pq_node *n, const pq_node *element, lc_doc_build *b) {
    pq_column *c;
    bool there;
    if (lc_doc_build_node(b, LC_DOC_ARRAY) < 0) return b->status;
    if (!lc_doc_build_open(b)) return lc_fail(LC_EPARSE, "nested too deep");
    LC_TRY(look(p, n, &c));
    if (c->now_def < n->def) {
        LC_TRY(pass(p, n));
        return lc_doc_build_close(b);
    }
    do {
        if (b->count >= RECORD_VALUES) return lc_fail(LC_EPARSE, "one record of more than %d values", RECORD_VALUES);
        LC_TRY(element == n ? put_content(p, n, b) : put_node(p, element, b));
        LC_TRY(lc_parquet_peek(c, &there));
    } while (there && c->now_rep == n->rep);
    return lc_doc_build_close(b);
}

/* The node that is an element of a list, by the format's rules for old and new writers. */
static const pq_node *element_of(const pq_node *list, const pq_node *repeated) {
    static const char suffix[] = "_tuple";
    size_t n = repeated->name_length, m = list->name_length;
    if (repeated->kind == PQ_LEAF || repeated->children != 1) return repeated;
    if (n == 5 && memcmp(repeated->name, "array", 5) == 0) return repeated;
    if (n == m + 6 && memcmp(repeated->name, list->name, m) == 0 && memcmp(repeated->name + m, suffix, 6) == 0) return repeated;
    const pq_node *child = repeated + 1;
    return child->repetition == PQ_REPEATED ? repeated : child;
}

/* A node that is known to be there. */
static lc_status put_content(struct lc_parquet *p, const pq_node *n, lc_doc_build *b) {
    if (n->kind == PQ_LEAF) {
        pq_column *c;
        LC_TRY(look(p, n, &c));
        if (c->now_def != n->def) return lc_fail(LC_EPARSE, "a value that must be there is missing");
        c->have = false;
        return put_value(c, b);
    }
    const pq_node *inner = n + 1;
    if ((n->kind == PQ_LIST || n->kind == PQ_MAP) && n->children == 1 && inner->repetition == PQ_REPEATED)
        return put_repeated(p, inner, n->kind == PQ_LIST ? element_of(n, inner) : inner, b);
    if (n->leaves == 0) return lc_fail(LC_EPARSE, "a group without columns");
    return put_children(p, n, b);
}

static lc_status put_node(struct lc_parquet *p, const pq_node *n, lc_doc_build *b) {
    pq_column *c;
    if (n->leaves == 0) return lc_fail(LC_EPARSE, "a group without columns");
    if (n->repetition == PQ_REPEATED) return put_repeated(p, n, n, b);
    if (n->repetition == PQ_REQUIRED) return put_content(p, n, b);
    LC_TRY(look(p, n, &c));
    if (c->now_def >= n->def) return put_content(p, n, b);
    LC_TRY(pass(p, n));
    return lc_doc_build_node(b, LC_DOC_NULL) < 0 ? b->status : LC_OK;
}

/* ---- row groups
 * ------------------------------------------------------------------------------------------------------ */

static void end_chunk(pq_column *c) {
    free(c->dictionary);
    free(c->word);
    c->dictionary = NULL;
    c->word = NULL;
    c->words = 0;
    c->left = 0;
    c->have = false;
}

static lc_status next_group(struct lc_parquet *p) {
    for (int32_t i = 0; i < p->columns; i++) {
        pq_column *c = &p->column[i];
        const pq_chunk *chunk = &p->chunk[(size_t)p->group * (size_t)p->columns + (size_t)i];
        end_chunk(c);
        c->at = p->data + chunk->offset;
        c->end = c->at + chunk->bytes;
        c->values = chunk->values;
        c->codec = chunk->codec;
    }
    p->group_left = p->group_rows[p->group++];
    return LC_OK;
}

/* Every column of the row begins a record here. */
static lc_status check_row(struct lc_parquet *p) {
    for (const pq_node *n = p->node + 1; n < p->node + p->nodes; n = p->node + n->next) {
        if (!n->wanted) continue;
        for (int32_t i = 0; i < n->leaves; i++) {
            pq_column *c = &p->column[n->first_leaf + i];
            bool there;
            LC_TRY(lc_parquet_peek(c, &there));
            if (!there || c->now_rep != 0) return lc_fail(LC_EPARSE, "its columns have different numbers of rows");
        }
    }
    return LC_OK;
}

lc_status lc_parquet_next(struct lc_parquet *p, lc_doc **record) {
    *record = NULL;
    while (p->group_left == 0) {
        if (p->group == p->groups) return LC_OK;
        LC_TRY(next_group(p));
    }
    if (lc_interrupt) return lc_fail(LC_EINTR, "interrupted");
    lc_doc_build b;
    lc_status status = lc_doc_build_start(&b, 256);
    if (status == LC_OK) status = check_row(p);
    if (status == LC_OK) status = put_children(p, p->node, &b);
    if (status == LC_OK) {
        p->group_left--;
        p->done++;
        return lc_doc_build_end(&b, record);
    }
    lc_doc_build_drop(&b);
    return lc_fail_in(status, "%s: row %.0f: ", p->name, (double)p->done + 1);
}

/* ---- opening
 * --------------------------------------------------------------------------------------------------------- */

static lc_status want_columns(struct lc_parquet *p, const char *columns) {
    for (pq_node *n = p->node + 1; n < p->node + p->nodes; n = p->node + n->next) n->wanted = !columns;
    while (columns && *columns) {
        size_t length = strcspn(columns, "\n");
        bool found = false;
        for (pq_node *n = p->node + 1; n < p->node + p->nodes; n = p->node + n->next)
            if (n->name_length == length && memcmp(n->name, columns, length) == 0) n->wanted = found = true;
        if (!found) return lc_fail(LC_EARG, "there is no column '%.*s'", (int)length, columns);
        columns += length + (columns[length] == '\n');
    }
    return LC_OK;
}

lc_status lc_parquet_open(const uint8_t *data, size_t bytes, const char *name, const char *columns, lc_parquet **out) {
    *out = NULL;
    struct lc_parquet *p = lc_alloc(1, sizeof *p);
    if (!p) return LC_ENOMEM;
    p->data = data;
    p->bytes = bytes;
    p->name = lc_strdup(name);
    lc_status status = p->name ? lc_parquet_footer(p) : LC_ENOMEM;
    if (status == LC_OK) status = want_columns(p, columns);
    if (status != LC_OK) {
        lc_parquet_close(p);
        return lc_fail_in(status, "%s: ", name);
    }
    *out = p;
    return LC_OK;
}

double lc_parquet_rows(const struct lc_parquet *p) { return (double)p->rows; }

void lc_parquet_close(struct lc_parquet *p) {
    if (!p) return;
    for (int32_t i = 0; p->column && i < p->columns; i++) {
        end_chunk(&p->column[i]);
        free(p->column[i].page);
        free(p->column[i].last);
    }
    free(p->column);
    free(p->node);
    free(p->chunk);
    free(p->group_rows);
    free(p->name);
    free(p);
}
