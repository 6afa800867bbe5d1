/* save_torch.c: the writer of what torch.save writes: a zip archive, entries as they are and aligned to 64 bytes, with
 * a pickle of protocol 2 (an OrderedDict of tensors, alone or in a dict of plain values) that
 * torch.load(weights_only=True) reads. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <zlib.h>

#include "doc.h"
#include "save.h"

/* ---- the pickle
 * ------------------------------------------------------------------------------------------------------ */

static lc_status put(lc_text *b, const char *opcodes) { return lc_text_add(b, opcodes, strlen(opcodes)); }

static lc_status put_byte(lc_text *b, int byte) { return lc_text_add(b, &(uint8_t){(uint8_t)byte}, 1); }

static lc_status put_little(lc_text *b, uint64_t value, int bytes) {
    uint8_t out[8];
    for (int i = 0; i < bytes; i++) out[i] = (uint8_t)(value >> 8 * i);
    return lc_text_add(b, out, (size_t)bytes);
}

static lc_status put_string(lc_text *b, const char *s, size_t n) {
    LC_TRY(put_byte(b, 'X'));
    LC_TRY(put_little(b, n, 4));
    return lc_text_add(b, s, n);
}

static lc_status put_integer(lc_text *b, int64_t v) {
    bool small = v >= 0 && v < 256, middle = v >= INT32_MIN && v <= INT32_MAX;
    LC_TRY(put_byte(b, small ? 'K' : middle ? 'J' : 0x8a));
    if (!small && !middle) LC_TRY(put_byte(b, 8));
    return put_little(b, (uint64_t)v, small ? 1 : middle ? 4 : 8);
}

static lc_status put_double(lc_text *b, double v) {
    uint64_t bits;
    memcpy(&bits, &v, 8);
    LC_TRY(put_byte(b, 'G'));
    for (int i = 7; i >= 0; i--) LC_TRY(put_byte(b, (int)(bits >> 8 * i & 255)));
    return LC_OK;
}

static lc_status put_numbers(lc_text *b, const int64_t *v, int n) {
    LC_TRY(put(b, "("));
    for (int i = 0; i < n; i++) LC_TRY(put_integer(b, v[i]));
    return put(b, "t");
}

static lc_status put_tensor(lc_text *b, const lc_save_entry *e, int key) {
    int64_t stride[64], span = 1;
    char text[32];
    const lc_save_dtype *d = e->dtype;
    if (e->ndim > 64) return lc_fail(LC_ESHAPE, "'%s' has %d dims", e->name, e->ndim);
    for (int i = e->ndim - 1; i >= 0; i--) {
        stride[i] = span;
        span *= e->dim[i] > 0 ? e->dim[i] : 1;
    }
    LC_TRY(
        put(b, d->torch_storage ? "ctorch._utils\n_rebuild_tensor_v2\n((" : "ctorch._utils\n_rebuild_tensor_v3\n(("));
    LC_TRY(put_string(b, "storage", 7));
    LC_TRY(put(b, d->torch_storage ? "ctorch\n" : "ctorch.storage\n"));
    LC_TRY(put(b, d->torch_storage ? d->torch_storage : "UntypedStorage"));
    LC_TRY(put(b, "\n"));
    LC_TRY(put_string(b, text, (size_t)snprintf(text, sizeof text, "%d", key)));
    LC_TRY(put_string(b, "cpu", 3));
    LC_TRY(put_integer(b, (int64_t)(d->torch_storage ? e->bytes / (uint64_t)d->item : e->bytes)));
    LC_TRY(put(b, "tQK"));
    LC_TRY(put_byte(b, 0));
    LC_TRY(put_numbers(b, e->dim, e->ndim));
    LC_TRY(put_numbers(b, stride, e->ndim));
    LC_TRY(put(b, "\x89"
                  "ccollections\nOrderedDict\n)R"));
    if (!d->torch_storage) {
        LC_TRY(put(b, "ctorch\n"));
        LC_TRY(put(b, d->torch));
        LC_TRY(put(b, "\n"));
    }
    return put(b, "tR");
}

/* An attribute of the OrderedDict: torch keeps it and looks at it as little as at a module's _metadata. */
static lc_status put_description(lc_text *b, const struct lc_writer *w) {
    if (!w->described) return LC_OK;
    LC_TRY(put(b, "}"));
    LC_TRY(put_string(b, "__metadata__", 12));
    LC_TRY(put(b, "}("));
    for (int i = 0; i < w->metas; i++) {
        LC_TRY(put_string(b, w->meta[i].key, strlen(w->meta[i].key)));
        LC_TRY(put_string(b, w->meta[i].text, w->meta[i].length));
    }
    return put(b, "usb");
}

static lc_status put_value(lc_text *b, const lc_save_value *v) {
    if (v->text) return put_string(b, v->text, v->length);
    if (v->kind == LC_DOC_BOOL) return put_byte(b, v->number != 0 ? 0x88 : 0x89);
    if (v->kind == LC_DOC_NULL) return put(b, "N");
    bool whole = v->number == trunc(v->number) && fabs(v->number) < 9007199254740992.0;
    return whole && v->kind == LC_DOC_NUMBER ? put_integer(b, (int64_t)v->number) : put_double(b, v->number);
}

static lc_status build_pickle(lc_text *b, const struct lc_writer *w) {
    bool outer = w->wrapper || w->values;
    LC_TRY(put(b, "\x80\x02"));
    if (outer) {
        LC_TRY(put(b, "}("));
        LC_TRY(put_string(b, w->wrapper ? w->wrapper : "model_state_dict",
                          strlen(w->wrapper ? w->wrapper : "model_state_dict")));
    }
    LC_TRY(put(b, "ccollections\nOrderedDict\n)R("));
    for (int i = 0; i < w->count; i++) {
        LC_TRY(put_string(b, w->entry[i].name, strlen(w->entry[i].name)));
        LC_TRY(put_tensor(b, &w->entry[i], i));
    }
    LC_TRY(put(b, "u"));
    LC_TRY(put_description(b, w));
    for (int i = 0; i < w->values; i++) {
        LC_TRY(put_string(b, w->value[i].key, strlen(w->value[i].key)));
        LC_TRY(put_value(b, &w->value[i]));
    }
    return put(b, outer ? "u." : ".");
}

/* ---- the archive
 * ----------------------------------------------------------------------------------------------------- */

typedef struct archive {
    lc_aside *file;
    lc_text directory;
    uint64_t at, count, begin; /* begin: of the entry's data */
    uint32_t crc;
    char folder[64];
} archive;

enum { ALIGN = 64, WIDE = 0xffffffffu };

static lc_status emit(void *ctx, const void *data, size_t bytes) {
    archive *z = ctx;
    z->at += bytes;
    return lc_aside_write(z->file, data, bytes);
}

static lc_status emit_data(void *ctx, const void *data, size_t bytes) {
    archive *z = ctx;
    z->crc = (uint32_t)crc32_z(z->crc, data, bytes);
    return emit(z, data, bytes);
}

static lc_status emit_text(archive *z, lc_text *b) {
    lc_status status = emit(z, b->text, b->length);
    free(b->text);
    *b = (lc_text){0};
    return status;
}

static lc_status numbers(lc_text *b, int n, const uint64_t (*field)[2]) {
    for (int i = 0; i < n; i++) LC_TRY(put_little(b, field[i][0], (int)field[i][1]));
    return LC_OK;
}

/* The sizes are not known before the data: a descriptor follows it. The extra field pads so that the data is aligned.
 */
static lc_status begin_entry(archive *z, const char *name, bool wide) {
    lc_text b = {0};
    uint64_t head = 30 + strlen(name) + (wide ? 20 : 0) + 4, pad = (ALIGN - (z->at + head) % ALIGN) % ALIGN;
    uint64_t extra = (wide ? 20 : 0) + 4 + pad;
    lc_status status = numbers(&b, 11,
                               (const uint64_t[][2]){{0x04034b50, 4},
                                                     {wide ? 45 : 20, 2},
                                                     {0x0808, 2},
                                                     {0, 2},
                                                     {0, 2},
                                                     {0, 2},
                                                     {0, 4},
                                                     {wide ? WIDE : 0, 4},
                                                     {wide ? WIDE : 0, 4},
                                                     {strlen(name), 2},
                                                     {extra, 2}});
    if (status == LC_OK) status = lc_text_add(&b, name, strlen(name));
    if (status == LC_OK && wide) status = numbers(&b, 4, (const uint64_t[][2]){{1, 2}, {16, 2}, {0, 8}, {0, 8}});
    if (status == LC_OK) status = numbers(&b, 2, (const uint64_t[][2]){{0x4246, 2}, {pad, 2}});
    while (status == LC_OK && pad-- > 0) status = put(&b, "Z");
    z->crc = 0;
    if (status != LC_OK) free(b.text);
    LC_TRY(status);
    LC_TRY(emit_text(z, &b));
    z->begin = z->at;
    return LC_OK;
}

static lc_status end_entry(archive *z, const char *name, uint64_t local, bool wide) {
    lc_text b = {0};
    uint64_t size = z->at - z->begin;
    bool far = local >= WIDE;
    lc_status status =
        numbers(&b, 4, (const uint64_t[][2]){{0x08074b50, 4}, {z->crc, 4}, {size, wide ? 8 : 4}, {size, wide ? 8 : 4}});
    if (status != LC_OK) free(b.text);
    LC_TRY(status);
    LC_TRY(emit_text(z, &b));
    lc_text *d = &z->directory;
    uint64_t extra = (wide ? 16 : 0) + (far ? 8 : 0);
    LC_TRY(numbers(d, 17,
                   (const uint64_t[][2]){{0x02014b50, 4},
                                         {wide || far ? 45 : 20, 2},
                                         {wide || far ? 45 : 20, 2},
                                         {0x0808, 2},
                                         {0, 2},
                                         {0, 2},
                                         {0, 2},
                                         {z->crc, 4},
                                         {wide ? WIDE : size, 4},
                                         {wide ? WIDE : size, 4},
                                         {strlen(name), 2},
                                         {extra ? extra + 4 : 0, 2},
                                         {0, 2},
                                         {0, 2},
                                         {0, 2},
                                         {0, 4},
                                         {far ? WIDE : local, 4}}));
    LC_TRY(lc_text_add(d, name, strlen(name)));
    if (extra) LC_TRY(numbers(d, 2, (const uint64_t[][2]){{1, 2}, {extra, 2}}));
    if (wide) LC_TRY(numbers(d, 2, (const uint64_t[][2]){{size, 8}, {size, 8}}));
    if (far) LC_TRY(numbers(d, 1, (const uint64_t[][2]){{local, 8}}));
    z->count++;
    return LC_OK;
}

static lc_status add_small(archive *z, const char *rest, const char *text, size_t bytes) {
    char name[128];
    uint64_t local = z->at;
    snprintf(name, sizeof name, "%s/%s", z->folder, rest);
    LC_TRY(begin_entry(z, name, false));
    LC_TRY(emit_data(z, text, bytes));
    return end_entry(z, name, local, false);
}

static lc_status add_storage(archive *z, const lc_save_entry *e, int key) {
    char name[128];
    uint64_t local = z->at;
    bool wide = e->bytes >= WIDE;
    snprintf(name, sizeof name, "%s/data/%d", z->folder, key);
    LC_TRY(begin_entry(z, name, wide));
    LC_TRY(lc_save_data(e, emit_data, z));
    return end_entry(z, name, local, wide);
}

static lc_status end_archive(archive *z) {
    uint64_t begin = z->at, bytes = z->directory.length;
    lc_text b = {0};
    LC_TRY(emit_text(z, &z->directory));
    bool wide = z->count >= 0xffff || begin >= WIDE || bytes >= WIDE;
    lc_status status = LC_OK;
    if (wide)
        status = numbers(&b, 14,
                         (const uint64_t[][2]){{0x06064b50, 4},
                                               {44, 8},
                                               {45, 2},
                                               {45, 2},
                                               {0, 4},
                                               {0, 4},
                                               {z->count, 8},
                                               {z->count, 8},
                                               {bytes, 8},
                                               {begin, 8},
                                               {0x07064b50, 4},
                                               {0, 4},
                                               {begin + bytes, 8},
                                               {1, 4}});
    if (status == LC_OK)
        status = numbers(&b, 8,
                         (const uint64_t[][2]){{0x06054b50, 4},
                                               {0, 2},
                                               {0, 2},
                                               {wide ? 0xffff : z->count, 2},
                                               {wide ? 0xffff : z->count, 2},
                                               {wide ? WIDE : bytes, 4},
                                               {wide ? WIDE : begin, 4},
                                               {0, 2}});
    if (status != LC_OK) free(b.text);
    LC_TRY(status);
    return emit_text(z, &b);
}

/* The archive's folder is the file's name without its ending, as torch.save has it. */
static void name_folder(archive *z, const char *path) {
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path, *dot = strrchr(name, '.');
    size_t n = dot && dot > name ? (size_t)(dot - name) : strlen(name);
    if (n == 0 || n >= sizeof z->folder || strcspn(name, "\\:") < n || strncmp(name, "..", 2) == 0)
        strcpy(z->folder, "archive");
    else
        snprintf(z->folder, sizeof z->folder, "%.*s", (int)n, name);
}

lc_status lc_save_torch(struct lc_writer *w, lc_aside *a) {
    archive z = {.file = a};
    lc_text pickle = {0};
    for (int i = 0; i < w->count; i++)
        if (!w->entry[i].dtype || !w->entry[i].dtype->torch || w->entry[i].quantise >= 0)
            return lc_fail(LC_EDTYPE, "'%s' cannot be saved: PyTorch has no type for it", w->entry[i].name);
    name_folder(&z, w->path);
    lc_status status = build_pickle(&pickle, w);
    if (status == LC_OK) status = add_small(&z, "data.pkl", pickle.text, pickle.length);
    if (status == LC_OK) status = add_small(&z, "byteorder", "little", 6);
    for (int i = 0; status == LC_OK && i < w->count; i++) status = add_storage(&z, &w->entry[i], i);
    if (status == LC_OK) status = add_small(&z, "version", "3\n", 2);
    if (status == LC_OK) status = end_archive(&z);
    free(pickle.text);
    free(z.directory.text);
    return status;
}
