/* save.c: the writer of safetensors files. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../core/core.h"
#include "doc_build.h"
#include "quant.h"
#include "save.h"

/* ---- writing safetensors
 * --------------------------------------------------------------------------------------------- */

typedef struct save_entry {
    const char *name;
    const lc_handle *tensor;
    int dtype, bytes_each, place; /* place: the order given */
    uint64_t bytes;
} save_entry;

typedef struct text_buffer {
    char *text;
    size_t length, room;
} text_buffer;

static lc_status append(text_buffer *b, const char *s, size_t n) {
    if (b->room - b->length < n) {
        size_t room = (b->room + n) * 2;
        char *grown = lc_resize(b->text, room, 1);
        if (!grown) return LC_ENOMEM;
        b->text = grown;
        b->room = room;
    }
    memcpy(b->text + b->length, s, n);
    b->length += n;
    return LC_OK;
}

static lc_status append_string(text_buffer *b, const char *s) {
    LC_TRY(append(b, "\"", 1));
    for (; *s; s++) {
        char escaped[8];
        if (*s == '"' || *s == '\\')
            snprintf(escaped, sizeof escaped, "\\%c", *s);
        else if ((unsigned char)*s < 32)
            snprintf(escaped, sizeof escaped, "\\u%04x", (unsigned)*s);
        else
            snprintf(escaped, sizeof escaped, "%c", *s);
        LC_TRY(append(b, escaped, strlen(escaped)));
    }
    return append(b, "\"", 1);
}

static const char *safetensors_dtype(int dtype) {
    switch (dtype) {
    case LC_F32: return "F32";
    case LC_BF16: return "BF16";
    case LC_F16: return "F16";
    case LC_F64: return "F64";
    case LC_I32: return "I32";
    case LC_I64: return "I64";
    case LC_U8: return "U8";
    default: return NULL;
    }
}

static lc_status append_entry(text_buffer *b, const save_entry *e, uint64_t begin) {
    char part[128];
    LC_TRY(append_string(b, e->name));
    int n = snprintf(part, sizeof part, ":{\"dtype\":\"%s\",\"shape\":[", safetensors_dtype(e->dtype));
    LC_TRY(append(b, part, (size_t)n));
    for (int d = 0; d < lc_ndim(e->tensor); d++) {
        n = snprintf(part, sizeof part, d ? ",%d" : "%d", (int)lc_dim(e->tensor, d));
        LC_TRY(append(b, part, (size_t)n));
    }
    n = snprintf(part, sizeof part, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)begin,
                 (unsigned long long)(begin + e->bytes));
    return append(b, part, (size_t)n);
}

static lc_status check_metadata(const char *metadata) {
    lc_doc *d;
    LC_TRY(lc_json_parse("metadata", metadata, strlen(metadata), &d));
    bool good = d->node[0].kind == LC_DOC_OBJECT;
    for (int32_t i = d->node[0].first; good && i >= 0; i = d->node[i].next) good = d->node[i].kind == LC_DOC_STRING;
    lc_doc_free(d);
    return good ? LC_OK : lc_fail(LC_EARG, "the metadata of a safetensors file is a JSON object of strings");
}

/* Widest elements first, so that every tensor stands aligned; then the order given. */
static int by_width(const void *a, const void *b) {
    const save_entry *x = a, *y = b;
    if (x->bytes_each != y->bytes_each) return y->bytes_each - x->bytes_each;
    return x->place - y->place;
}

static int by_entry_name(const void *a, const void *b) {
    return strcmp(((const save_entry *)a)->name, ((const save_entry *)b)->name);
}

static lc_status gather(int n, const char *const *names, const lc_handle *tensors, save_entry *entry) {
    for (int i = 0; i < n; i++) {
        const lc_tensor *t = lc_get(&tensors[i]);
        if (!t) return lc_fail_in(LC_ESTALE, "tensor %d to be saved: ", i);
        if (!names[i] || strcmp(names[i], "__metadata__") == 0 || lc_utf8_invalid(names[i], strlen(names[i])) >= 0)
            return lc_fail(LC_EARG, "tensor %d has a name that a safetensors file cannot hold: '%s'", i,
                           names[i] ? names[i] : "");
        if (!safetensors_dtype(t->dtype))
            return lc_fail(LC_EDTYPE, "'%s' cannot be saved: safetensors does not hold %s", names[i],
                           lc_dtype_name(t->dtype));
        entry[i] =
            (save_entry){names[i], &tensors[i], t->dtype, lc_dtype_traits(t->dtype)->bytes, i, lc_tensor_bytes(t)};
    }
    if (n > 0) qsort(entry, (size_t)n, sizeof *entry, by_entry_name);
    for (int i = 1; i < n; i++)
        if (strcmp(entry[i - 1].name, entry[i].name) == 0)
            return lc_fail(LC_EARG, "two tensors to be saved have the name '%s'", entry[i].name);
    if (n > 0) qsort(entry, (size_t)n, sizeof *entry, by_width);
    return LC_OK;
}

static lc_status build_header(text_buffer *b, const save_entry *entry, int n, const char *metadata) {
    uint64_t at = 0;
    LC_TRY(append(b, "\0\0\0\0\0\0\0\0{", 9));
    if (metadata) {
        LC_TRY(append(b, "\"__metadata__\":", 15));
        LC_TRY(append(b, metadata, strlen(metadata)));
    }
    for (int i = 0; i < n; i++) {
        if (i > 0 || metadata) LC_TRY(append(b, ",", 1));
        LC_TRY(append_entry(b, &entry[i], at));
        at += entry[i].bytes;
    }
    LC_TRY(append(b, "}", 1));
    while (b->length % 8) LC_TRY(append(b, " ", 1));
    for (int i = 0; i < 8; i++) b->text[i] = (char)((uint64_t)(b->length - 8) >> 8 * i);
    return LC_OK;
}

static lc_status write_tensor(lc_aside *a, const save_entry *e) {
    void *data;
    size_t bytes;
    if (e->bytes == 0) return LC_OK;
    if (lc_device_of(e->tensor) == 0 && lc_is_contiguous(e->tensor)) {
        LC_TRY(lc_host_span(e->tensor, &data, &bytes));
        return lc_aside_write(a, data, bytes);
    }
    data = malloc((size_t)e->bytes);
    if (!data) return lc_fail(LC_ENOMEM, "no memory for a copy of '%s' (%.0f bytes)", e->name, (double)e->bytes);
    lc_status status = lc_to_host(e->tensor, data, (double)e->bytes);
    if (status == LC_OK) status = lc_aside_write(a, data, (size_t)e->bytes);
    free(data);
    return status;
}

static lc_status write_all(const char *path, const text_buffer *header, const save_entry *entry, int n) {
    lc_aside a;
    LC_TRY(lc_aside_begin(&a, path));
    lc_status status = lc_aside_write(&a, header->text, header->length);
    for (int i = 0; status == LC_OK && i < n; i++) status = write_tensor(&a, &entry[i]);
    if (status == LC_OK) return lc_aside_commit(&a);
    lc_aside_abandon(&a);
    return status;
}

int lc_safetensors_save(const char *path, int n, const char *const *names, const lc_handle *tensors,
                        const char *metadata) {
    if (!path || n < 0 || (n > 0 && (!names || !tensors)))
        return lc_fail(LC_EARG, "lc_safetensors_save: expected a path, names and tensors");
    if (metadata) LC_TRY(check_metadata(metadata));
    text_buffer header = {0};
    save_entry *entry = lc_alloc(n > 0 ? (size_t)n : 1, sizeof *entry);
    if (!entry) return LC_ENOMEM;
    lc_status status = gather(n, names, tensors, entry);
    if (status == LC_OK) status = build_header(&header, entry, n, metadata);
    if (status == LC_OK) status = write_all(path, &header, entry, n);
    free(header.text);
    free(entry);
    return status;
}
