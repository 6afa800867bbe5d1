/* save_gguf.c: the writer of GGUF, version 3: metadata values (given, or copied from another GGUF), tensor infos, and
 * the tensors, each from a multiple of 32 bytes. Format: docs/gguf.md of ggml. */
#include <stdlib.h>
#include <string.h>

#include "save.h"

enum { ALIGN = 32, V_F32 = 6, V_STRING = 8, V_ARRAY = 9, V_F64 = 12 };

static lc_status put_little(lc_text *b, uint64_t value, int bytes) {
    uint8_t out[8];
    for (int i = 0; i < bytes; i++) out[i] = (uint8_t)(value >> 8 * i);
    return lc_text_add(b, out, (size_t)bytes);
}

static lc_status put_string(lc_text *b, const char *s, size_t n) {
    LC_TRY(put_little(b, n, 8));
    return lc_text_add(b, s, n);
}

/* ---- metadata
 * -------------------------------------------------------------------------------------------------------- */

static lc_status put_raw(lc_text *b, const lc_save_value *v) {
    const lc_file_meta *m = v->raw;
    bool array = m->kind == LC_DOC_ARRAY;
    LC_TRY(put_little(b, array ? V_ARRAY : (uint64_t)m->type, 4));
    if (!array && m->type == V_STRING) return put_string(b, m->string, (size_t)m->length);
    if (!array) return lc_text_add(b, m->value, (size_t)lc_gguf_value_bytes(m->type));
    LC_TRY(put_little(b, (uint64_t)m->type, 4));
    LC_TRY(put_little(b, (uint64_t)m->count, 8));
    if (m->type != V_STRING) return lc_text_add(b, m->value, (size_t)m->count * (size_t)lc_gguf_value_bytes(m->type));
    int at = (int)(m - v->raw_file->meta);
    for (int32_t i = 0; i < m->count; i++) {
        int32_t length = 0;
        const char *s = lc_file_meta_string(v->raw_file, at, i, &length);
        LC_TRY(put_string(b, s, (size_t)length));
    }
    return LC_OK;
}

static lc_status put_scalar(lc_text *b, const lc_save_value *v) {
    int bytes = lc_gguf_value_bytes(v->kind);
    bool real = v->kind == V_F32 || v->kind == V_F64;
    if (!real && !(v->number > -9.22e18 && v->number < 1.84e19))
        return lc_fail(LC_EARG, "the metadata value '%s' does not fit", v->key ? v->key : "");
    uint64_t bits = real ? 0 : v->number < 0 ? (uint64_t)(int64_t)v->number : (uint64_t)v->number;
    if (v->kind == V_STRING && v->text) return put_string(b, v->text, v->length);
    if (v->kind == V_F64) memcpy(&bits, &v->number, 8);
    if (v->kind == V_F32) {
        float narrow = (float)v->number;
        uint32_t low;
        memcpy(&low, &narrow, 4);
        bits = low;
    }
    return bytes ? put_little(b, bits, bytes)
                 : lc_fail(LC_EARG, "the metadata value '%s' has the type %d", v->key ? v->key : "", v->kind);
}

static lc_status put_value(lc_text *b, const lc_save_value *v) {
    LC_TRY(put_string(b, v->key, strlen(v->key)));
    if (v->raw) return put_raw(b, v);
    LC_TRY(put_little(b, (uint64_t)v->kind, 4));
    if (v->kind != V_ARRAY) return put_scalar(b, v);
    int type = v->count ? v->list[0].kind : V_STRING;
    LC_TRY(put_little(b, (uint64_t)type, 4));
    LC_TRY(put_little(b, (uint64_t)v->count, 8));
    for (int i = 0; i < v->count; i++) {
        if (v->list[i].kind != type) return lc_fail(LC_EARG, "the metadata array '%s' mixes types", v->key);
        LC_TRY(put_scalar(b, &v->list[i]));
    }
    return LC_OK;
}

/* ---- tensors
 * --------------------------------------------------------------------------------------------------------- */

static int type_of(const lc_save_entry *e) {
    if (e->quantise >= 0) return lc_gguf_type(NULL, e->quantise);
    if (e->dtype) return e->dtype->gguf;
    return e->from ? lc_gguf_type(e->from->dtype_name, -1) : -1; /* blocks of another GGUF, as they are */
}

static lc_status put_info(lc_text *b, const lc_save_entry *e, uint64_t offset) {
    int type = type_of(e);
    if (type < 0) return lc_fail(LC_EDTYPE, "'%s' cannot be saved: GGUF does not hold its type", e->name);
    if (e->ndim > 4) return lc_fail(LC_ESHAPE, "'%s' has %d dims; GGUF holds at most 4", e->name, e->ndim);
    LC_TRY(put_string(b, e->name, strlen(e->name)));
    LC_TRY(put_little(b, e->ndim ? (uint64_t)e->ndim : 1, 4));
    for (int d = e->ndim - 1; d >= 0; d--) LC_TRY(put_little(b, (uint64_t)e->dim[d], 8));
    if (e->ndim == 0) LC_TRY(put_little(b, 1, 8));
    LC_TRY(put_little(b, (uint64_t)type, 4));
    return put_little(b, offset, 8);
}

static uint64_t padded(uint64_t bytes) { return (bytes + ALIGN - 1) / ALIGN * ALIGN; }

static lc_status build_header(lc_text *b, const struct lc_writer *w) {
    uint64_t at = 0, values = 0;
    static const uint8_t zeros[ALIGN];
    for (int i = 0; i < w->values; i++) values += strcmp(w->value[i].key, "general.alignment") != 0; /* it is 32 here */
    LC_TRY(lc_text_add(b, "GGUF", 4));
    LC_TRY(put_little(b, 3, 4));
    LC_TRY(put_little(b, (uint64_t)w->count, 8));
    LC_TRY(put_little(b, values, 8));
    for (int i = 0; i < w->values; i++)
        if (strcmp(w->value[i].key, "general.alignment") != 0) LC_TRY(put_value(b, &w->value[i]));
    for (int i = 0; i < w->count; i++) {
        LC_TRY(put_info(b, &w->entry[i], at));
        at += padded(w->entry[i].bytes);
    }
    return lc_text_add(b, zeros, (size_t)(padded(b->length) - b->length));
}

static lc_status to_file(void *ctx, const void *data, size_t bytes) { return lc_aside_write(ctx, data, bytes); }

lc_status lc_save_gguf(struct lc_writer *w, lc_aside *a) {
    lc_text header = {0};
    static const uint8_t zeros[ALIGN];
    lc_status status = build_header(&header, w);
    if (status == LC_OK) status = lc_aside_write(a, header.text, header.length);
    for (int i = 0; status == LC_OK && i < w->count; i++) {
        status = lc_save_data(&w->entry[i], to_file, a);
        if (status == LC_OK) status = lc_aside_write(a, zeros, (size_t)(padded(w->entry[i].bytes) - w->entry[i].bytes));
    }
    free(header.text);
    return status;
}
