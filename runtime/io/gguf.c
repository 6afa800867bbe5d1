/* gguf.c: the reader of GGUF (versions 1 to 3, little-endian; version 1 counts and measures in 32 bits): metadata of
 * all value types, tensor infos, and the place of the data. Every count is checked against the bytes that are left
 * before anything is allocated for it. */
#include <stdlib.h>
#include <string.h>

#include "../../kernels/dtype.h"
#include "doc_build.h"
#include "file.h"
#include "quant.h"

enum { GGUF_MAX_DIMS = 4, GGUF_MAX_ENTRIES = 1 << 20, GGUF_MAX_NAME = 65535 };
enum { V_U8, V_I8, V_U16, V_I16, V_U32, V_I32, V_F32, V_BOOL, V_STRING, V_ARRAY, V_U64, V_I64, V_F64, V_COUNT };

static const uint8_t value_bytes[V_COUNT] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

/* Formats by GGUF's number. Where a tensor can hold it, block sizes come from the dtype table. */
static const struct gguf_type {
    const char *name;
    int id, store, block, bytes;
} gguf_types[] = {
    {"F32", 0, LC_F32, 0, 0},
    {"F16", 1, LC_F16, 0, 0},
    {"Q4_0", 2, LC_Q4_0, 0, 0},
    {"Q4_1", 3, LC_Q4_1, 0, 0},
    {"Q5_0", 6, LC_Q5_0, 0, 0},
    {"Q5_1", 7, LC_Q5_1, 0, 0},
    {"Q8_0", 8, LC_Q8_0, 0, 0},
    {"Q8_1", 9, LC_STORE_UNKNOWN, 32, 40},
    {"Q2_K", 10, LC_Q2_K, 0, 0},
    {"Q3_K", 11, LC_Q3_K, 0, 0},
    {"Q4_K", 12, LC_Q4_K, 0, 0},
    {"Q5_K", 13, LC_Q5_K, 0, 0},
    {"Q6_K", 14, LC_Q6_K, 0, 0},
    {"Q8_K", 15, LC_STORE_UNKNOWN, 256, 292},
    {"IQ2_XXS", 16, LC_STORE_UNKNOWN, 256, 66},
    {"IQ2_XS", 17, LC_STORE_UNKNOWN, 256, 74},
    {"IQ3_XXS", 18, LC_STORE_UNKNOWN, 256, 98},
    {"IQ1_S", 19, LC_STORE_UNKNOWN, 256, 50},
    {"IQ4_NL", 20, LC_IQ4_NL, 0, 0},
    {"IQ3_S", 21, LC_STORE_UNKNOWN, 256, 110},
    {"IQ2_S", 22, LC_STORE_UNKNOWN, 256, 82},
    {"IQ4_XS", 23, LC_STORE_IQ4_XS, 0, 0},
    {"I8", 24, LC_STORE_I8, 0, 0},
    {"I16", 25, LC_STORE_I16, 0, 0},
    {"I32", 26, LC_I32, 0, 0},
    {"I64", 27, LC_I64, 0, 0},
    {"F64", 28, LC_F64, 0, 0},
    {"IQ1_M", 29, LC_STORE_UNKNOWN, 256, 56},
    {"BF16", 30, LC_BF16, 0, 0},
    {"TQ1_0", 34, LC_STORE_UNKNOWN, 256, 54},
    {"TQ2_0", 35, LC_STORE_UNKNOWN, 256, 66},
    {"MXFP4", 39, LC_STORE_UNKNOWN, 32, 17},
};

typedef struct gguf_reader {
    struct lc_file *file;
    size_t at;
    int wide; /* bytes of a count or a length: 4 in version 1, else 8 */
} gguf_reader;

/* ---- bytes
 * ----------------------------------------------------------------------------------------------------------- */

static lc_status take(gguf_reader *r, uint64_t n, const uint8_t **out, const char *what) {
    if (n > r->file->bytes - r->at)
        return lc_fail(LC_EPARSE, "%s at byte %.0f needs %.0f bytes; the file ends after %.0f", what, (double)r->at,
                       (double)n, (double)(r->file->bytes - r->at));
    *out = r->file->data + r->at;
    r->at += (size_t)n;
    return LC_OK;
}

static uint64_t little(const uint8_t *p, int n) {
    uint64_t value = 0;
    while (n-- > 0) value = value << 8 | p[n];
    return value;
}

static lc_status take_number(gguf_reader *r, int bytes, uint64_t *out, const char *what) {
    const uint8_t *p = NULL;
    LC_TRY(take(r, (uint64_t)bytes, &p, what));
    *out = little(p, bytes);
    return LC_OK;
}

static lc_status take_string(gguf_reader *r, const uint8_t **out, uint64_t *length, const char *what) {
    LC_TRY(take_number(r, r->wide, length, what));
    return take(r, *length, out, what);
}

/* A key or a tensor's name, as a C string. */
static lc_status take_name(gguf_reader *r, char **out, const char *what) {
    const uint8_t *p = NULL;
    uint64_t length = 0;
    size_t at = r->at;
    LC_TRY(take_string(r, &p, &length, what));
    if (length > GGUF_MAX_NAME)
        return lc_fail(LC_EPARSE, "%s at byte %.0f has %.0f bytes", what, (double)at, (double)length);
    if (memchr(p, 0, (size_t)length) || lc_utf8_invalid((const char *)p, (size_t)length) >= 0)
        return lc_fail(LC_EPARSE, "%s at byte %.0f is not plain UTF-8", what, (double)at);
    *out = lc_alloc((size_t)length + 1, 1);
    if (!*out) return LC_ENOMEM;
    memcpy(*out, p, (size_t)length);
    return LC_OK;
}

/* ---- metadata
 * -------------------------------------------------------------------------------------------------------- */

static lc_status read_string_array(gguf_reader *r, lc_file_meta *m) {
    m->element =
        lc_alloc(m->count > 0 ? (size_t)m->count : 1, sizeof *m->element); /* at most the bytes that are left */
    if (!m->element) return LC_ENOMEM;
    for (int32_t i = 0; i < m->count; i++) {
        const uint8_t *p = NULL;
        uint64_t length = 0;
        m->element[i] = r->file->data + r->at;
        LC_TRY(take_string(r, &p, &length, "a string of an array"));
        if (length > INT32_MAX)
            return lc_fail(LC_EPARSE, "a string of '%.200s' has %.0f bytes", m->key, (double)length);
    }
    return LC_OK;
}

static lc_status read_array(gguf_reader *r, lc_file_meta *m) {
    uint64_t type = 0, count = 0;
    LC_TRY(take_number(r, 4, &type, "an array's type"));
    LC_TRY(take_number(r, r->wide, &count, "an array's length"));
    if (type == V_ARRAY) return lc_fail(LC_EPARSE, "'%.200s' is an array of arrays, which is not read", m->key);
    if (type >= V_COUNT)
        return lc_fail(LC_EPARSE, "'%.200s' is an array of the unknown value type %.0f", m->key, (double)type);
    uint64_t each = type == V_STRING ? (uint64_t)r->wide : value_bytes[type], left = r->file->bytes - r->at;
    if (count > left / each || count > INT32_MAX)
        return lc_fail(LC_EPARSE, "'%.200s' has %.0f elements, but the file ends %.0f bytes on", m->key, (double)count,
                       (double)left);
    m->kind = LC_DOC_ARRAY;
    m->type = (int)type;
    m->count = (int32_t)count;
    if (type == V_STRING) return read_string_array(r, m);
    return take(r, count * each, &m->value, "an array");
}

static lc_status read_value(gguf_reader *r, lc_file_meta *m) {
    uint64_t type = 0, length = 0;
    const uint8_t *p = NULL;
    LC_TRY(take_name(r, &m->key, "a metadata key"));
    LC_TRY(take_number(r, 4, &type, "a value type"));
    if (type >= V_COUNT) return lc_fail(LC_EPARSE, "'%.200s' has the unknown value type %.0f", m->key, (double)type);
    m->type = (int)type;
    if (type == V_ARRAY) return read_array(r, m);
    if (type == V_STRING) {
        LC_TRY(take_string(r, &p, &length, "a metadata string"));
        if (length > INT32_MAX) return lc_fail(LC_EPARSE, "'%.200s' has %.0f bytes", m->key, (double)length);
        m->kind = LC_DOC_STRING;
        m->string = (const char *)p;
        m->length = (int32_t)length;
        return LC_OK;
    }
    m->kind = type == V_BOOL ? LC_DOC_BOOL : LC_DOC_NUMBER;
    return take(r, value_bytes[type], &m->value, "a metadata value");
}

double lc_gguf_number(const lc_file_meta *m, int32_t element) {
    if (m->kind == LC_DOC_ARRAY ? element < 0 || element >= m->count : element >= 0) return 0;
    int bytes = value_bytes[m->type];
    uint64_t bits = little(m->value + (element > 0 ? (size_t)element * (size_t)bytes : 0), bytes);
    uint32_t low = (uint32_t)bits;
    float single;
    double real;
    switch (m->type) {
    case V_I8: return (int8_t)bits;
    case V_I16: return (int16_t)bits;
    case V_I32: return (int32_t)low;
    case V_I64: return (double)(int64_t)bits;
    case V_BOOL: return bits != 0;
    case V_F32: memcpy(&single, &low, sizeof single); return single;
    case V_F64: memcpy(&real, &bits, sizeof real); return real;
    default: return (double)bits;
    }
}

int lc_gguf_value_bytes(int type) { return type >= 0 && type < V_COUNT ? value_bytes[type] : 0; }

int lc_gguf_type(const char *name, int store) {
    for (size_t i = 0; i < sizeof gguf_types / sizeof *gguf_types; i++)
        if (name ? strcmp(gguf_types[i].name, name) == 0 : gguf_types[i].store == store && store >= 0)
            return gguf_types[i].id;
    return -1;
}

static lc_status read_alignment(const struct lc_file *f, uint64_t *out) {
    *out = 32;
    int at = lc_file_meta_find(f, "general.architecture");
    if (at >= 0 && f->meta[at].kind != LC_DOC_STRING) return lc_fail(LC_EPARSE, "general.architecture is no string");
    at = lc_file_meta_find(f, "general.alignment");
    if (at < 0) return LC_OK;
    double value = f->meta[at].kind == LC_DOC_NUMBER ? lc_gguf_number(&f->meta[at], -1) : -1;
    if (!(value >= 1 && value <= 1 << 30) || value != (double)(uint64_t)value ||
        ((uint64_t)value & ((uint64_t)value - 1)))
        return lc_fail(LC_EPARSE, "general.alignment is %g; expected a power of two", value);
    *out = (uint64_t)value;
    return LC_OK;
}

/* ---- tensors
 * --------------------------------------------------------------------------------------------------------- */

static lc_status read_dims(gguf_reader *r, lc_file_entry *e) {
    uint64_t ndim = 0, dim = 0;
    LC_TRY(take_number(r, 4, &ndim, "a tensor's dims"));
    if (ndim > GGUF_MAX_DIMS)
        return lc_fail(LC_EPARSE, "tensor '%.200s' has %.0f dims; at most 4 are allowed", e->name, (double)ndim);
    e->dim = lc_alloc(GGUF_MAX_DIMS, sizeof *e->dim);
    if (!e->dim) return LC_ENOMEM;
    e->ndim = (int)ndim;
    for (int i = e->ndim - 1; i >= 0; i--) { /* the file begins with the fastest */
        LC_TRY(take_number(r, r->wide, &dim, "a tensor's dims"));
        if (dim > (uint64_t)1 << 53)
            return lc_fail(LC_EPARSE, "tensor '%.200s' has a dim of %.0f", e->name, (double)dim);
        e->dim[i] = (int64_t)dim;
    }
    return LC_OK;
}

static lc_status read_type(gguf_reader *r, lc_file_entry *e) {
    const struct gguf_type *type = NULL;
    uint64_t id = 0;
    LC_TRY(take_number(r, 4, &id, "a tensor's type"));
    for (size_t i = 0; i < sizeof gguf_types / sizeof *gguf_types; i++)
        if ((uint64_t)gguf_types[i].id == id) type = &gguf_types[i];
    if (!type) return lc_fail(LC_EPARSE, "tensor '%.200s' has the unknown type %.0f", e->name, (double)id);
    e->dtype_name = type->name;
    e->store = type->store;
    int block = type->block ? type->block : lc_store_block(type->store);
    int bytes = type->block ? type->bytes : lc_store_block_bytes(type->store);
    int64_t row = e->ndim > 0 ? e->dim[e->ndim - 1] : 1;
    if (row % block)
        return lc_fail(LC_EPARSE, "tensor '%.200s' (%s) has rows of %.0f; expected a multiple of %d", e->name,
                       type->name, (double)row, block);
    if (!lc_file_sizes(e->dim, e->ndim, block, bytes, &e->bytes))
        return lc_fail(LC_EPARSE, "the dims of tensor '%.200s' are too large", e->name);
    return LC_OK;
}

static lc_status read_info(gguf_reader *r, lc_file_entry *e) {
    LC_TRY(take_name(r, &e->name, "a tensor's name"));
    LC_TRY(read_dims(r, e));
    LC_TRY(read_type(r, e));
    return take_number(r, 8, &e->offset, "a tensor's offset"); /* from the start of the data, so far */
}

static lc_status place_tensors(struct lc_file *f, uint64_t header, uint64_t alignment) {
    uint64_t start = (header + alignment - 1) / alignment * alignment;
    for (int i = 0; i < f->count; i++) {
        lc_file_entry *e = &f->entry[i];
        uint64_t room = start <= f->bytes ? f->bytes - start : 0;
        if (e->offset % alignment)
            return lc_fail(LC_EPARSE, "tensor '%.200s' has the offset %.0f; expected a multiple of %.0f", e->name,
                           (double)e->offset, (double)alignment);
        if (e->offset > room || e->bytes > room - e->offset)
            return lc_fail(LC_EPARSE,
                           "tensor '%.200s' has %.0f bytes at offset %.0f, but the file has %.0f bytes of data",
                           e->name, (double)e->bytes, (double)e->offset, (double)room);
        e->offset += start;
        if (e->offset > f->bytes) e->offset = f->bytes; /* an empty tensor, and no padding before it */
    }
    return lc_file_check_layout(f, start, false);
}

static lc_status read_counts(gguf_reader *r, uint64_t *tensors, uint64_t *values) {
    uint64_t version = 0;
    r->at = 4;
    LC_TRY(take_number(r, 4, &version, "the version"));
    r->wide = version == 1 ? 4 : 8;
    r->file->length_bytes = r->wide;
    if (version < 1 || version > 3) {
        if (version && !(version & 0xffff))
            return lc_fail(LC_EPARSE, "a big-endian GGUF file; only little-endian ones are read");
        return lc_fail(LC_EPARSE, "GGUF version %.0f; expected 1 to 3", (double)version);
    }
    LC_TRY(take_number(r, r->wide, tensors, "the number of tensors"));
    LC_TRY(take_number(r, r->wide, values, "the number of metadata values"));
    uint64_t left = r->file->bytes - r->at; /* a tensor's info has at least 20 bytes, a metadata value 9 */
    if (*tensors > left / 20 || *tensors > GGUF_MAX_ENTRIES)
        return lc_fail(LC_EPARSE, "%.0f tensors cannot stand in %.0f bytes", (double)*tensors, (double)left);
    if (*values > left / 9 || *values > GGUF_MAX_ENTRIES)
        return lc_fail(LC_EPARSE, "%.0f metadata values cannot stand in %.0f bytes", (double)*values, (double)left);
    return LC_OK;
}

lc_status lc_gguf_parse(struct lc_file *f) {
    gguf_reader r = {.file = f};
    uint64_t tensors = 0, values = 0, alignment = 32;
    f->format = "gguf";
    LC_TRY(read_counts(&r, &tensors, &values));
    f->entry = lc_alloc(tensors ? (size_t)tensors : 1, sizeof *f->entry);
    f->meta = lc_alloc(values ? (size_t)values : 1, sizeof *f->meta);
    if (!f->entry || !f->meta) return LC_ENOMEM;
    while ((uint64_t)f->metas < values) LC_TRY(read_value(&r, &f->meta[f->metas++]));
    LC_TRY(read_alignment(f, &alignment));
    while ((uint64_t)f->count < tensors) LC_TRY(read_info(&r, &f->entry[f->count++]));
    return place_tensors(f, r.at, alignment);
}
