/* safetensors.c: the reader of safetensors headers. The format: 8 bytes of header length, a JSON object of
 * name -> {dtype, shape, data_offsets}, then the data, which the tensors cover without gap or overlap. Writing is in
 * bind.c. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "file.h"
#include "quant.h"

enum { HEADER_LIMIT = 100000000, ST_MAX_DIMS = 64 }; /* the limit is the format's own */

static const struct st_dtype {
    const char *name;
    int bits, store;
} st_dtypes[] = {
    {"F64", 64, LC_F64},
    {"F32", 32, LC_F32},
    {"F16", 16, LC_F16},
    {"BF16", 16, LC_BF16},
    {"I64", 64, LC_I64},
    {"I32", 32, LC_I32},
    {"I16", 16, LC_STORE_I16},
    {"I8", 8, LC_STORE_I8},
    {"U64", 64, LC_STORE_U64},
    {"U32", 32, LC_STORE_U32},
    {"U16", 16, LC_STORE_U16},
    {"U8", 8, LC_U8},
    {"BOOL", 8, LC_U8},
    {"C64", 64, LC_STORE_UNKNOWN},
    {"F8_E5M2", 8, LC_STORE_UNKNOWN},
    {"F8_E4M3", 8, LC_STORE_UNKNOWN},
    {"F8_E8M0", 8, LC_STORE_UNKNOWN},
    {"F8_E4M3FNUZ", 8, LC_STORE_UNKNOWN},
    {"F8_E5M2FNUZ", 8, LC_STORE_UNKNOWN},
    {"F6_E2M3", 6, LC_STORE_UNKNOWN},
    {"F6_E3M2", 6, LC_STORE_UNKNOWN},
    {"F4", 4, LC_STORE_UNKNOWN},
};

static const struct st_dtype *find_dtype(const char *name) {
    for (size_t i = 0; i < sizeof st_dtypes / sizeof *st_dtypes; i++)
        if (strcmp(st_dtypes[i].name, name) == 0) return &st_dtypes[i];
    return NULL;
}

/* A whole number of 0 or more that a double holds exactly. */
static bool whole(const lc_doc *d, int32_t node, int64_t *out) {
    const lc_doc_node *n = &d->node[node];
    if (n->kind != LC_DOC_NUMBER || !n->is_integer || signbit(n->number) || n->number > 9007199254740992.0)
        return false;
    *out = (int64_t)n->number;
    return true;
}

static char *c_name(const lc_doc *d, const lc_doc_node *n) {
    if (memchr(d->text + n->key, 0, n->key_len)) {
        lc_fail(LC_EPARSE, "a name with a zero byte: '%s...'", d->text + n->key);
        return NULL;
    }
    return lc_strdup(d->text + n->key);
}

static lc_status read_shape(const lc_doc *d, int32_t node, lc_file_entry *e) {
    if (node < 0 || d->node[node].kind != LC_DOC_ARRAY)
        return lc_fail(LC_EPARSE, "tensor '%.200s' has no list \"shape\"", e->name);
    if (d->node[node].count > ST_MAX_DIMS)
        return lc_fail(LC_EPARSE, "tensor '%.200s' has %d dims", e->name, d->node[node].count);
    e->dim = lc_alloc(d->node[node].count > 0 ? (size_t)d->node[node].count : 1, sizeof *e->dim);
    if (!e->dim) return LC_ENOMEM;
    for (int32_t i = d->node[node].first; i >= 0; i = d->node[i].next)
        if (!whole(d, i, &e->dim[e->ndim++]))
            return lc_fail(LC_EPARSE,
                           "tensor '%.200s': dim %d of its shape is no whole number of 0 or more (or too large)",
                           e->name, e->ndim - 1);
    return LC_OK;
}

static lc_status read_offsets(const struct lc_file *f, const lc_doc *d, int32_t node, uint64_t start,
                              lc_file_entry *e) {
    int64_t begin, end, room = (int64_t)(f->bytes - start);
    if (node < 0 || d->node[node].kind != LC_DOC_ARRAY || d->node[node].count != 2)
        return lc_fail(LC_EPARSE, "tensor '%.200s' has no pair \"data_offsets\"", e->name);
    int32_t first = d->node[node].first;
    if (!whole(d, first, &begin) || !whole(d, d->node[first].next, &end))
        return lc_fail(LC_EPARSE, "tensor '%.200s': its data_offsets are no whole numbers of 0 or more", e->name);
    if (begin > end || end > room)
        return lc_fail(LC_EPARSE, "tensor '%.200s': data_offsets [%.0f, %.0f] in a file with %.0f bytes of data",
                       e->name, (double)begin, (double)end, (double)room);
    e->offset = start + (uint64_t)begin;
    e->bytes = (uint64_t)(end - begin);
    return LC_OK;
}

static lc_status read_tensor(const struct lc_file *f, int32_t node, uint64_t start, lc_file_entry *e) {
    const lc_doc *d = f->doc;
    if (!(e->name = c_name(d, &d->node[node]))) return LC_EPARSE;
    if (d->node[node].kind != LC_DOC_OBJECT) return lc_fail(LC_EPARSE, "the header's '%.200s' is no object", e->name);
    const char *said = lc_doc_str(d, lc_doc_get(d, node, "dtype"));
    if (!said) return lc_fail(LC_EPARSE, "tensor '%.200s' has no string \"dtype\"", e->name);
    const struct st_dtype *dtype = find_dtype(said);
    if (!dtype) return lc_fail(LC_EPARSE, "tensor '%.200s' has the unknown dtype '%.40s'", e->name, said);
    e->dtype_name = dtype->name;
    e->store = dtype->store;
    LC_TRY(read_shape(d, lc_doc_get(d, node, "shape"), e));
    LC_TRY(read_offsets(f, d, lc_doc_get(d, node, "data_offsets"), start, e));
    uint64_t bytes;
    bool fits = dtype->bits >= 8
                    ? lc_file_sizes(e->dim, e->ndim, 1, dtype->bits / 8, &bytes)
                    : lc_file_sizes(e->dim, e->ndim, dtype->bits == 4 ? 2 : 4, dtype->bits == 4 ? 1 : 3, &bytes);
    if (!fits) return lc_fail(LC_EPARSE, "tensor '%.200s': its shape is too large or fills no whole bytes", e->name);
    if (bytes != e->bytes)
        return lc_fail(LC_EPARSE, "tensor '%.200s': its shape needs %.0f bytes, its data_offsets give %.0f", e->name,
                       (double)bytes, (double)e->bytes);
    return LC_OK;
}

static lc_status read_metadata(struct lc_file *f, int32_t object) {
    const lc_doc *d = f->doc;
    if (d->node[object].kind != LC_DOC_OBJECT) return lc_fail(LC_EPARSE, "__metadata__ is no object");
    f->meta = lc_alloc(d->node[object].count > 0 ? (size_t)d->node[object].count : 1, sizeof *f->meta);
    if (!f->meta) return LC_ENOMEM;
    for (int32_t i = d->node[object].first; i >= 0; i = d->node[i].next) {
        lc_file_meta *m = &f->meta[f->metas++];
        if (!(m->key = c_name(d, &d->node[i]))) return LC_EPARSE;
        m->kind = LC_DOC_STRING;
        m->string = lc_doc_string(d, i, &m->length);
        if (!m->string) return lc_fail(LC_EPARSE, "__metadata__: the value of '%.200s' is no string", m->key);
    }
    return LC_OK;
}

static lc_status read_header(struct lc_file *f, uint64_t start) {
    const lc_doc *d = f->doc;
    if (d->node[0].kind != LC_DOC_OBJECT) return lc_fail(LC_EPARSE, "the safetensors header is no JSON object");
    f->entry = lc_alloc(d->node[0].count > 0 ? (size_t)d->node[0].count : 1, sizeof *f->entry);
    if (!f->entry) return LC_ENOMEM;
    for (int32_t i = d->node[0].first; i >= 0; i = d->node[i].next) {
        if (strcmp(d->text + d->node[i].key, "__metadata__") == 0) {
            LC_TRY(read_metadata(f, i));
        } else {
            LC_TRY(read_tensor(f, i, start, &f->entry[f->count++]));
        }
    }
    return lc_file_check_layout(f, start, true);
}

lc_status lc_safetensors_parse(struct lc_file *f) {
    uint64_t length = 0;
    f->format = "safetensors";
    if (f->bytes < 8)
        return lc_fail(LC_EPARSE, "%d bytes: neither GGUF (no magic) nor safetensors (no header length)",
                       (int)f->bytes);
    for (int i = 7; i >= 0; i--) length = length << 8 | f->data[i];
    bool braced = f->bytes > 8 && f->data[8] == '{';
    if (!braced && length > f->bytes - 8)
        return lc_fail(LC_EPARSE, "neither GGUF (no magic) nor safetensors (its header would have %.0f bytes)",
                       (double)length);
    if (length > HEADER_LIMIT)
        return lc_fail(LC_EPARSE, "its safetensors header would have %.0f bytes; at most 100000000 are allowed",
                       (double)length);
    if (length > f->bytes - 8)
        return lc_fail(LC_EPARSE,
                       "its safetensors header would have %.0f bytes, but the file ends %.0f bytes after the length",
                       (double)length, (double)(f->bytes - 8));
    if (!braced || length < 2) return lc_fail(LC_EPARSE, "its safetensors header does not begin with '{'");
    LC_TRY(lc_json_parse("header", (const char *)f->data + 8, (size_t)length, &f->doc));
    return read_header(f, 8 + length);
}
