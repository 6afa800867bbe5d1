/* parquet_meta.c: the footer of a parquet file: thrift's compact protocol, the schema as a flat tree with levels, and where
 * each column's pages lie. Every count and offset is held against the file's size here. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "parquet.h"

enum { THRIFT_DEPTH = 64, SCHEMA_DEPTH = 64 };

/* ---- thrift
 * ---------------------------------------------------------------------------------------------------------- */

uint64_t lc_thrift_varint(thrift_in *t) {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
        if (t->at >= t->end) break;
        uint8_t byte = *t->at++;
        value |= (uint64_t)(byte & 127) << shift;
        if (!(byte & 128)) return value;
    }
    t->bad = true;
    t->at = t->end;
    return 0;
}

int64_t lc_thrift_int(thrift_in *t) {
    uint64_t v = lc_thrift_varint(t);
    return (int64_t)(v >> 1 ^ -(v & 1));
}

bool lc_thrift_field(thrift_in *t, int *id, int *type) {
    if (t->at >= t->end) {
        t->bad = true;
        return false;
    }
    uint8_t head = *t->at++;
    *type = head & 15;
    if (*type == THRIFT_STOP) return false;
    int64_t next = head >> 4 ? *id + (head >> 4) : lc_thrift_int(t);
    if (next < 0 || next > 32767) t->bad = true;
    *id = (int)next;
    return !t->bad;
}

size_t lc_thrift_list(thrift_in *t, int *type) {
    if (t->at >= t->end) {
        t->bad = true;
        return 0;
    }
    uint8_t head = *t->at++;
    uint64_t n = head >> 4;
    *type = head & 15;
    if (n == 15) n = lc_thrift_varint(t);
    if (n > (uint64_t)(t->end - t->at)) {
        t->bad = true;
        return 0;
    }
    return (size_t)n;
}

const uint8_t *lc_thrift_binary(thrift_in *t, size_t *length) {
    uint64_t n = lc_thrift_varint(t);
    const uint8_t *at = t->at;
    *length = 0;
    if (t->bad || n > (uint64_t)(t->end - t->at)) {
        t->bad = true;
        return at;
    }
    *length = (size_t)n;
    t->at += n;
    return at;
}

static void skip_elements(thrift_in *t, int type, size_t n) {
    for (; n > 0 && !t->bad; n--) {
        if (type == THRIFT_TRUE || type == THRIFT_FALSE) t->at++; /* in a list a boolean takes a byte */
        else lc_thrift_skip(t, type);
        if (t->at > t->end) t->bad = true;
    }
}

void lc_thrift_skip(thrift_in *t, int type) {
    size_t length;
    int id = 0, inner;
    if (t->bad) return;
    if (++t->depth > THRIFT_DEPTH) t->bad = true;
    switch (type) {
    case THRIFT_TRUE: case THRIFT_FALSE: break;
    case THRIFT_BYTE: t->at++; break;
    case THRIFT_I16: case THRIFT_I32: case THRIFT_I64: lc_thrift_varint(t); break;
    case THRIFT_DOUBLE: if (t->end - t->at >= 8) t->at += 8; else t->bad = true; break;
    case THRIFT_BINARY: lc_thrift_binary(t, &length); break;
    case THRIFT_LIST: case THRIFT_SET:
        length = lc_thrift_list(t, &inner);
        skip_elements(t, inner, length);
        break;
    case THRIFT_MAP: {
        uint64_t n = lc_thrift_varint(t);
        if (n == 0) break;
        if (t->at >= t->end || n > (uint64_t)(t->end - t->at)) { t->bad = true; break; }
        uint8_t types = *t->at++;
        for (; n > 0 && !t->bad; n--) {
            skip_elements(t, types >> 4, 1);
            skip_elements(t, types & 15, 1);
        }
        break;
    }
    case THRIFT_STRUCT:
        while (lc_thrift_field(t, &id, &inner)) lc_thrift_skip(t, inner);
        break;
    default: t->bad = true;
    }
    if (t->at > t->end) t->bad = true;
    t->depth--;
}

/* A field of the kind that was expected, else it is skipped. */
static bool is(thrift_in *t, int type, int want) {
    if (type == want || (want == THRIFT_I32 && (type == THRIFT_I16 || type == THRIFT_I64)) || (want == THRIFT_I64 && type == THRIFT_I32))
        return true;
    t->bad = true;
    return false;
}

/* ---- schema
 * ---------------------------------------------------------------------------------------------------------- */

typedef struct element { /* SchemaElement */
    int64_t type, type_length, repetition, children, converted, scale;
    int logical, logical_bits, logical_signed;
    const uint8_t *name;
    size_t name_length;
} element;

static void read_logical(thrift_in *t, element *e) {
    int id = 0, type;
    while (lc_thrift_field(t, &id, &type)) {
        e->logical = id;
        if (type != THRIFT_STRUCT || (id != 5 && id != 10)) {
            lc_thrift_skip(t, type);
            continue;
        }
        int inner = 0;
        while (lc_thrift_field(t, &inner, &type)) {
            if (id == 10 && inner == 2) e->logical_signed = type == THRIFT_TRUE;
            else if (id == 5 && inner == 1 && type == THRIFT_I32) { e->scale = lc_thrift_int(t); continue; }
            lc_thrift_skip(t, type);
        }
    }
}

static void read_element(thrift_in *t, element *e) {
    int id = 0, type;
    *e = (element){.type = -1, .converted = -1, .repetition = 0, .logical = 0, .logical_signed = 1};
    while (lc_thrift_field(t, &id, &type)) {
        switch (id) {
        case 1: if (is(t, type, THRIFT_I32)) e->type = lc_thrift_int(t); break;
        case 2: if (is(t, type, THRIFT_I32)) e->type_length = lc_thrift_int(t); break;
        case 3: if (is(t, type, THRIFT_I32)) e->repetition = lc_thrift_int(t); break;
        case 4: if (is(t, type, THRIFT_BINARY)) e->name = lc_thrift_binary(t, &e->name_length); break;
        case 5: if (is(t, type, THRIFT_I32)) e->children = lc_thrift_int(t); break;
        case 6: if (is(t, type, THRIFT_I32)) e->converted = lc_thrift_int(t); break;
        case 7: if (is(t, type, THRIFT_I32)) e->scale = lc_thrift_int(t); break;
        case 10: if (is(t, type, THRIFT_STRUCT)) read_logical(t, e); break;
        default: lc_thrift_skip(t, type);
        }
    }
}

/* What a leaf's values mean: by the logical type, else by the older converted type. */
static pq_meaning meaning_of(const element *e) {
    bool bytes = e->type == PQ_BYTES || e->type == PQ_FIXED;
    if (e->logical == 5 || e->converted == 5) return PQ_DECIMAL;
    if (e->logical == 15 && e->type == PQ_FIXED && e->type_length == 2) return PQ_HALF;
    if (bytes && (e->logical == 1 || e->logical == 4 || e->logical == 12 || e->converted == 0 || e->converted == 4 || e->converted == 19))
        return PQ_TEXT;
    if (bytes) return PQ_BINARY;
    if ((e->logical == 10 && !e->logical_signed) || (e->converted >= 11 && e->converted <= 14)) return PQ_UNSIGNED;
    return PQ_PLAIN_NUMBER;
}

static lc_status schema_fail(const char *why) { return lc_fail(LC_EPARSE, "the schema %s", why); }

static lc_status add_leaf(struct lc_parquet *p, const element *e, const pq_node *n) {
    if (e->type < 0 || e->type > PQ_FIXED) return schema_fail("has a leaf of an unknown type");
    if (e->type == PQ_FIXED && (e->type_length < 0 || e->type_length > 1 << 20)) return schema_fail("has a fixed length out of range");
    if (e->scale < 0 || e->scale > 300) return schema_fail("has a decimal scale out of range");
    p->column[p->columns++] = (pq_column){.node = n, .type = (pq_type)e->type, .type_length = (int32_t)e->type_length,
                                          .meaning = meaning_of(e), .scale = (int)e->scale};
    return LC_OK;
}

/* Node i, which has its parent's levels, and all below it; the elements stand depth first. */
static lc_status add_node(struct lc_parquet *p, const element *list, int32_t count, int32_t i, int depth) {
    const element *e = &list[i];
    pq_node *n = &p->node[i];
    if (depth > SCHEMA_DEPTH) return schema_fail("nests more than 64 deep");
    if (e->repetition < 0 || e->repetition > 2) return schema_fail("has an unknown repetition");
    if (lc_utf8_invalid((const char *)e->name, e->name_length) >= 0) return schema_fail("has a name that is no UTF-8");
    n->name = (const char *)e->name;
    n->name_length = e->name_length;
    n->repetition = depth > 0 ? (uint8_t)e->repetition : PQ_REQUIRED;
    if (n->repetition != PQ_REQUIRED) n->def++;
    if (n->repetition == PQ_REPEATED) n->rep++;
    n->first_leaf = p->columns;
    p->nodes = i + 1;
    if (e->type >= 0 && e->children <= 0) {
        n->kind = PQ_LEAF;
        LC_TRY(add_leaf(p, e, n));
    } else {
        if (e->children < 0 || e->children > count - i - 1) return schema_fail("counts more children than there are elements");
        n->kind = e->logical == 3 || e->converted == 3 ? PQ_LIST : e->logical == 2 || e->converted == 1 || e->converted == 2 ? PQ_MAP : PQ_GROUP;
        n->children = (int32_t)e->children;
        for (int32_t c = 0; c < n->children; c++) {
            int32_t at = p->nodes;
            if (at >= count) return schema_fail("counts more children than there are elements");
            p->node[at].def = n->def;
            p->node[at].rep = n->rep;
            LC_TRY(add_node(p, list, count, at, depth + 1));
        }
    }
    n->leaves = p->columns - n->first_leaf;
    n->next = p->nodes;
    return LC_OK;
}

static lc_status build_schema(struct lc_parquet *p, const element *list, size_t count) {
    if (count == 0) return schema_fail("is missing");
    p->node = lc_alloc(count, sizeof *p->node);
    p->column = lc_alloc(count, sizeof *p->column);
    if (!p->node || !p->column) return LC_ENOMEM;
    LC_TRY(add_node(p, list, (int32_t)count, 0, 0));
    if ((size_t)p->nodes != count) return schema_fail("has elements that belong to no group");
    if (p->node[0].kind == PQ_LEAF) return schema_fail("has no columns");
    p->node[0].kind = PQ_GROUP;
    return LC_OK;
}

static lc_status read_schema(thrift_in *t, struct lc_parquet *p) {
    int type;
    size_t count = lc_thrift_list(t, &type);
    if (t->bad || type != THRIFT_STRUCT || count > 1 << 20) return schema_fail("is no list of elements");
    if (p->node) return schema_fail("occurs twice");
    element *list = lc_alloc(count ? count : 1, sizeof *list);
    if (!list) return LC_ENOMEM;
    for (size_t i = 0; i < count && !t->bad; i++) read_element(t, &list[i]);
    lc_status status = t->bad ? schema_fail("is cut short or damaged") : build_schema(p, list, count);
    free(list);
    return status;
}

/* ---- row groups
 * ------------------------------------------------------------------------------------------------------ */

static lc_status place_chunk(const struct lc_parquet *p, pq_chunk *c, int64_t data_at, int64_t dictionary_at, int64_t bytes) {
    int64_t at = dictionary_at > 0 && dictionary_at < data_at ? dictionary_at : data_at;
    if (c->values == 0) return LC_OK; /* some writers name no place then */
    if (at < 4 || bytes < 0 || (uint64_t)at > p->bytes || (uint64_t)bytes > p->bytes - (uint64_t)at)
        return lc_fail(LC_EPARSE, "a column's pages (%.0f bytes at %.0f) lie outside the file", (double)bytes, (double)at);
    if (c->values < 0) return lc_fail(LC_EPARSE, "a column with a negative number of values");
    c->offset = (uint64_t)at;
    c->bytes = (uint64_t)bytes;
    return LC_OK;
}

static lc_status read_chunk_meta(thrift_in *t, const struct lc_parquet *p, int32_t column, pq_chunk *c) {
    int id = 0, type;
    int64_t kind = -1, data_at = 0, dictionary_at = 0, bytes = -1, codec = -1;
    while (lc_thrift_field(t, &id, &type)) {
        switch (id) {
        case 1: if (is(t, type, THRIFT_I32)) kind = lc_thrift_int(t); break;
        case 4: if (is(t, type, THRIFT_I32)) codec = lc_thrift_int(t); break;
        case 5: if (is(t, type, THRIFT_I64)) c->values = lc_thrift_int(t); break;
        case 7: if (is(t, type, THRIFT_I64)) bytes = lc_thrift_int(t); break;
        case 9: if (is(t, type, THRIFT_I64)) data_at = lc_thrift_int(t); break;
        case 11: if (is(t, type, THRIFT_I64)) dictionary_at = lc_thrift_int(t); break;
        default: lc_thrift_skip(t, type);
        }
    }
    if (t->bad) return lc_fail(LC_EPARSE, "the metadata of a column are cut short or damaged");
    if (kind != p->column[column].type) return lc_fail(LC_EPARSE, "a column's type is not its schema's");
    c->codec = codec < 0 || codec > 100 ? -1 : (int)codec;
    return place_chunk(p, c, data_at, dictionary_at, bytes);
}

static lc_status read_chunk(thrift_in *t, const struct lc_parquet *p, int32_t column, pq_chunk *c) {
    int id = 0, type;
    bool found = false;
    while (lc_thrift_field(t, &id, &type)) {
        if (id == 1) return lc_fail(LC_EPARSE, "a column lies in another file, which is not read");
        if (id == 8) return lc_fail(LC_EPARSE, "the columns are encrypted");
        if (id == 3 && type == THRIFT_STRUCT) {
            LC_TRY(read_chunk_meta(t, p, column, c));
            found = true;
        } else {
            lc_thrift_skip(t, type);
        }
    }
    if (t->bad || !found) return lc_fail(LC_EPARSE, "the metadata of a column are missing or damaged");
    return LC_OK;
}

static lc_status read_columns(thrift_in *t, struct lc_parquet *p, int32_t group) {
    int type;
    size_t n = lc_thrift_list(t, &type);
    if (t->bad || type != THRIFT_STRUCT || n != (size_t)p->columns)
        return lc_fail(LC_EPARSE, "row group %d has %d columns where the schema has %d", (int)group, (int)n, (int)p->columns);
    for (int32_t i = 0; i < p->columns; i++) LC_TRY(read_chunk(t, p, i, &p->chunk[(size_t)group * (size_t)p->columns + (size_t)i]));
    return LC_OK;
}

static lc_status read_group(thrift_in *t, struct lc_parquet *p, int32_t group) {
    int id = 0, type;
    bool columns = false;
    int64_t rows = -1;
    while (lc_thrift_field(t, &id, &type)) {
        if (id == 1 && type == THRIFT_LIST) {
            LC_TRY(read_columns(t, p, group));
            columns = true;
        } else if (id == 3 && is(t, type, THRIFT_I64)) {
            rows = lc_thrift_int(t);
        } else {
            lc_thrift_skip(t, type);
        }
    }
    if (t->bad || !columns || rows < 0) return lc_fail(LC_EPARSE, "row group %d is cut short or damaged", (int)group);
    p->group_rows[group] = rows;
    return LC_OK;
}

static lc_status read_groups(thrift_in *t, struct lc_parquet *p) {
    int type;
    size_t n = lc_thrift_list(t, &type);
    if (t->bad || (n > 0 && type != THRIFT_STRUCT) || n > INT32_MAX) return lc_fail(LC_EPARSE, "there is no list of row groups");
    if (!p->node || p->chunk) return lc_fail(LC_EPARSE, "the row groups stand before the schema, or twice");
    if (p->columns > 0 && n > (size_t)(t->end - t->at) / (size_t)p->columns) /* a column takes more than a byte */
        return lc_fail(LC_EPARSE, "the footer is too short for %.0f row groups", (double)n);
    p->chunk = lc_alloc(n * (size_t)p->columns + 1, sizeof *p->chunk);
    p->group_rows = lc_alloc(n + 1, sizeof *p->group_rows);
    if (!p->chunk || !p->group_rows) return LC_ENOMEM;
    p->groups = (int32_t)n;
    for (int32_t i = 0; i < p->groups; i++) LC_TRY(read_group(t, p, i));
    return LC_OK;
}

/* ---- the footer
 * ------------------------------------------------------------------------------------------------------ */

static lc_status read_metadata(struct lc_parquet *p, const uint8_t *from, size_t bytes) {
    thrift_in t = {.at = from, .end = from + bytes};
    int id = 0, type;
    p->rows = -1;
    while (lc_thrift_field(&t, &id, &type)) {
        if (id == 2 && type == THRIFT_LIST) LC_TRY(read_schema(&t, p));
        else if (id == 3 && is(&t, type, THRIFT_I64)) p->rows = lc_thrift_int(&t);
        else if (id == 4 && type == THRIFT_LIST) LC_TRY(read_groups(&t, p));
        else lc_thrift_skip(&t, type);
    }
    if (t.bad) return lc_fail(LC_EPARSE, "the footer is damaged %d bytes after its beginning", (int)(t.at - from));
    if (!p->node || !p->chunk || p->rows < 0) return lc_fail(LC_EPARSE, "the footer lacks schema, rows or row groups");
    int64_t sum = 0;
    for (int32_t i = 0; i < p->groups; i++)
        if (__builtin_add_overflow(sum, p->group_rows[i], &sum)) return lc_fail(LC_EPARSE, "the row groups have more than 2^63 rows");
    if (sum != p->rows) return lc_fail(LC_EPARSE, "the row groups have %.0f rows, the footer %.0f", (double)sum, (double)p->rows);
    return LC_OK;
}

lc_status lc_parquet_footer(struct lc_parquet *p) {
    uint32_t length;
    if (p->bytes < 12 || memcmp(p->data, "PAR1", 4) != 0) {
        if (p->bytes >= 4 && memcmp(p->data, "PARE", 4) == 0) return lc_fail(LC_EPARSE, "the file is encrypted");
        return lc_fail(LC_EPARSE, "not a parquet file: it does not begin with PAR1");
    }
    const uint8_t *end = p->data + p->bytes;
    if (memcmp(end - 4, "PARE", 4) == 0) return lc_fail(LC_EPARSE, "the file is encrypted");
    if (memcmp(end - 4, "PAR1", 4) != 0)
        return lc_fail(LC_EPARSE, "the file does not end with PAR1 at byte %.0f: it was cut short", (double)(p->bytes - 4));
    memcpy(&length, end - 8, 4);
    if (length > p->bytes - 12)
        return lc_fail(LC_EPARSE, "the footer has %.0f bytes, and the file %.0f", (double)length, (double)p->bytes);
    return read_metadata(p, end - 8 - length, length);
}
