/* save_safetensors.c: the writer of safetensors: 8 bytes of header length, the header, the tensors. Their order and the
 * header's text are those of the safetensors library, so that a file written by it and read here is written the same
 * again. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "save.h"

/* Highest first; elements of one width stand together, so that every tensor is aligned. */
static const char *const order[] = {"U64",     "I64",     "F64", "C64", "F32",         "U32",         "I32",
                                    "BF16",    "F16",     "U16", "I16", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0",
                                    "F8_E4M3", "F8_E5M2", "I8",  "U8",  "BOOL"};

static int rank(const char *dtype) {
    for (int i = 0; i < (int)(sizeof order / sizeof *order); i++)
        if (strcmp(order[i], dtype) == 0) return i;
    return 100;
}

static int by_dtype(const void *a, const void *b) {
    const lc_save_entry *x = a, *y = b;
    int ranks = rank(x->dtype->safetensors) - rank(y->dtype->safetensors);
    return ranks ? ranks : strcmp(x->name, y->name);
}

static lc_status add_string(lc_text *b, const char *s) {
    static const char plain[] = "\"\\\b\f\n\r\t", escape[] = "\"\\bfnrt";
    LC_TRY(lc_text_add(b, "\"", 1));
    for (; *s; s++) {
        char escaped[8];
        const char *known = strchr(plain, *s);
        int n = known                    ? snprintf(escaped, sizeof escaped, "\\%c", escape[known - plain])
                : (unsigned char)*s < 32 ? snprintf(escaped, sizeof escaped, "\\u%04x", (unsigned)*s)
                                         : snprintf(escaped, sizeof escaped, "%c", *s);
        LC_TRY(lc_text_add(b, escaped, (size_t)n));
    }
    return lc_text_add(b, "\"", 1);
}

static lc_status add_entry(lc_text *b, const lc_save_entry *e, uint64_t begin) {
    char part[128];
    LC_TRY(add_string(b, e->name));
    int n = snprintf(part, sizeof part, ":{\"dtype\":\"%s\",\"shape\":[", e->dtype->safetensors);
    LC_TRY(lc_text_add(b, part, (size_t)n));
    for (int d = 0; d < e->ndim; d++) {
        n = snprintf(part, sizeof part, d ? ",%lld" : "%lld", (long long)e->dim[d]);
        LC_TRY(lc_text_add(b, part, (size_t)n));
    }
    n = snprintf(part, sizeof part, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)begin,
                 (unsigned long long)(begin + e->bytes));
    return lc_text_add(b, part, (size_t)n);
}

static lc_status add_metadata(lc_text *b, const struct lc_writer *w) {
    for (int i = 0; i < w->metas; i++) {
        if (strlen(w->meta[i].text) != w->meta[i].length)
            return lc_fail(LC_EARG, "the description '%s' holds a zero byte", w->meta[i].key);
        LC_TRY(i ? lc_text_add(b, ",", 1) : lc_text_add(b, "\"__metadata__\":{", 16));
        LC_TRY(add_string(b, w->meta[i].key));
        LC_TRY(lc_text_add(b, ":", 1));
        LC_TRY(add_string(b, w->meta[i].text));
    }
    return w->metas ? lc_text_add(b, "}", 1) : LC_OK;
}

static lc_status build_header(lc_text *b, const struct lc_writer *w) {
    uint64_t at = 0;
    LC_TRY(lc_text_add(b, "\0\0\0\0\0\0\0\0{", 9));
    LC_TRY(add_metadata(b, w));
    for (int i = 0; i < w->count; i++) {
        if (i > 0 || w->metas) LC_TRY(lc_text_add(b, ",", 1));
        LC_TRY(add_entry(b, &w->entry[i], at));
        at += w->entry[i].bytes;
    }
    LC_TRY(lc_text_add(b, "}", 1));
    while (b->length % 8) LC_TRY(lc_text_add(b, " ", 1));
    for (int i = 0; i < 8; i++) b->text[i] = (char)((uint64_t)(b->length - 8) >> 8 * i);
    return LC_OK;
}

static lc_status to_file(void *ctx, const void *data, size_t bytes) { return lc_aside_write(ctx, data, bytes); }

lc_status lc_save_safetensors(struct lc_writer *w, lc_aside *a) {
    lc_text header = {0};
    for (int i = 0; i < w->count; i++) {
        const lc_save_entry *e = &w->entry[i];
        if (strcmp(e->name, "__metadata__") == 0)
            return lc_fail(LC_EARG, "a safetensors file cannot hold a tensor named '__metadata__'");
        if (!e->dtype || !e->dtype->safetensors || e->quantise >= 0)
            return lc_fail(LC_EDTYPE, "'%s' cannot be saved: safetensors does not hold its type", e->name);
    }
    if (w->values)
        return lc_fail(LC_EARG, "a safetensors file holds no values beside tensors, such as '%s'", w->value[0].key);
    if (w->count > 1) qsort(w->entry, (size_t)w->count, sizeof *w->entry, by_dtype);
    lc_status status = build_header(&header, w);
    if (status == LC_OK) status = lc_aside_write(a, header.text, header.length);
    for (int i = 0; status == LC_OK && i < w->count; i++) status = lc_save_data(&w->entry[i], to_file, a);
    free(header.text);
    return status;
}
