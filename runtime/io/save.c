/* save.c: writers of tensor files: the list of what is to be written, its element types in each format, and its bytes,
 * which come from tensors or straight from another file. The formats are in save_safetensors.c, save_torch.c and
 * save_gguf.c. */
#define _GNU_SOURCE
#include "save.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "doc_build.h"
#include "quant.h"

/* ---- element types
 * --------------------------------------------------------------------------------------------------- */

/* The first row with a store is the one for tensors. */
static const lc_save_dtype dtypes[] = {
    {"F32", "float32", "FloatStorage", 0, LC_F32, 4},
    {"F16", "float16", "HalfStorage", 1, LC_F16, 2},
    {"BF16", "bfloat16", "BFloat16Storage", 30, LC_BF16, 2},
    {"F64", "float64", "DoubleStorage", 28, LC_F64, 8},
    {"I64", "int64", "LongStorage", 27, LC_I64, 8},
    {"I32", "int32", "IntStorage", 26, LC_I32, 4},
    {"I16", "int16", "ShortStorage", 25, LC_STORE_I16, 2},
    {"I8", "int8", "CharStorage", 24, LC_STORE_I8, 1},
    {"U8", "uint8", "ByteStorage", -1, LC_U8, 1},
    {"BOOL", "bool", "BoolStorage", -1, LC_U8, 1},
    {"U16", "uint16", NULL, -1, LC_STORE_U16, 2},
    {"U32", "uint32", NULL, -1, LC_STORE_U32, 4},
    {"U64", "uint64", NULL, -1, LC_STORE_U64, 8},
    {"C64", "complex64", "ComplexFloatStorage", -1, LC_STORE_UNKNOWN, 8},
    {NULL, "complex128", "ComplexDoubleStorage", -1, LC_STORE_UNKNOWN, 16},
    {"F8_E4M3", "float8_e4m3fn", NULL, -1, LC_STORE_UNKNOWN, 1},
    {"F8_E5M2", "float8_e5m2", NULL, -1, LC_STORE_UNKNOWN, 1},
    {"F8_E8M0", "float8_e8m0fnu", NULL, -1, LC_STORE_UNKNOWN, 1},
    {"F8_E4M3FNUZ", "float8_e4m3fnuz", NULL, -1, LC_STORE_UNKNOWN, 1},
    {"F8_E5M2FNUZ", "float8_e5m2fnuz", NULL, -1, LC_STORE_UNKNOWN, 1},
};

static const lc_save_dtype *of_store(int store) {
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        if (dtypes[i].store == store && store >= 0) return &dtypes[i];
    return NULL;
}

static const lc_save_dtype *of_stored(const struct lc_file *f, const lc_file_entry *e) {
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++) {
        const char *name = strcmp(f->format, "torch") == 0 ? dtypes[i].torch : dtypes[i].safetensors;
        if (name && strcmp(name, e->dtype_name) == 0) return &dtypes[i];
    }
    return of_store(e->store);
}

/* ---- the list
 * -------------------------------------------------------------------------------------------------------- */

int lc_writer_open(lc_writer **out, const char *path, const char *format) {
    static const char *const known[] = {"safetensors", "torch", "gguf"};
    bool good = false;
    if (!out || !path || !format) return lc_fail(LC_EARG, "lc_writer_open: expected a path and a format");
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) good = good || strcmp(known[i], format) == 0;
    if (!good)
        return lc_fail(LC_EARG, "the format '%.40s' is not one that can be written: safetensors, torch, gguf", format);
    lc_writer *w = lc_alloc(1, sizeof *w);
    if (!w) return LC_ENOMEM;
    w->path = lc_strdup(path);
    w->format = lc_strdup(format);
    if (!w->path || !w->format) {
        lc_writer_free(w);
        return LC_ENOMEM;
    }
    *out = w;
    return LC_OK;
}

static void free_values(lc_save_value *v, int count) {
    for (int i = 0; i < count; i++) {
        free(v[i].key);
        free(v[i].text);
        free_values(v[i].list, v[i].count);
    }
    free(v);
}

void lc_writer_free(lc_writer *w) {
    if (!w) return;
    for (int i = 0; i < w->count; i++) {
        free(w->entry[i].name);
        free(w->entry[i].dim);
    }
    free_values(w->meta, w->metas);
    free_values(w->value, w->values);
    free(w->entry);
    free(w->path);
    free(w->format);
    free(w->wrapper);
    free(w);
}

static lc_status new_entry(lc_writer *w, const char *name, int ndim, lc_save_entry **out) {
    if (w->count == w->room) {
        int room = w->room ? w->room * 2 : 64;
        lc_save_entry *grown = lc_resize(w->entry, (size_t)room, sizeof *grown);
        if (!grown) return LC_ENOMEM;
        w->entry = grown;
        w->room = room;
    }
    lc_save_entry *e = &w->entry[w->count];
    *e = (lc_save_entry){.name = lc_strdup(name),
                         .dim = lc_alloc(ndim ? (size_t)ndim : 1, sizeof *e->dim),
                         .ndim = ndim,
                         .place = w->count,
                         .quantise = -1};
    w->count++;
    *out = e;
    return e->name && e->dim ? LC_OK : LC_ENOMEM;
}

static lc_status check_name(const char *name) {
    return name && name[0] && lc_utf8_invalid(name, strlen(name)) < 0
               ? LC_OK
               : lc_fail(LC_EARG, "a tensor to be saved has a name that a file cannot hold: '%s'", name ? name : "");
}

int lc_writer_tensor(lc_writer *w, const char *name, const lc_handle *tensor) {
    const lc_tensor *t = lc_get(tensor);
    lc_save_entry *e;
    if (!t) return lc_fail_in(LC_ESTALE, "tensor '%s' to be saved: ", name ? name : "");
    LC_TRY(check_name(name));
    const lc_save_dtype *dtype = of_store(t->dtype);
    if (!dtype)
        return lc_fail(LC_EDTYPE, "'%s' cannot be saved: the format does not hold %s", name, lc_dtype_name(t->dtype));
    LC_TRY(new_entry(w, name, lc_ndim(tensor), &e));
    for (int d = 0; d < e->ndim; d++) e->dim[d] = lc_dim(tensor, d);
    e->tensor = *tensor;
    e->dtype = dtype;
    e->bytes = lc_tensor_bytes(t);
    return LC_OK;
}

int lc_writer_stored(lc_writer *w, const char *name, const lc_file *f, int i, int dtype) {
    lc_save_entry *e;
    if (!f || i < 0 || i >= f->count) return lc_fail(LC_EARG, "no tensor %d in a file of %d", i, f ? f->count : 0);
    const lc_file_entry *from = &f->entry[i];
    LC_TRY(check_name(name));
    bool blocks = dtype >= 0 && lc_dtype_is_quant(dtype);
    const lc_save_dtype *as = dtype < 0 || blocks ? of_stored(f, from) : of_store(dtype);
    if (dtype >= 0 && dtype != from->store && !lc_convertible(from->store, blocks ? LC_F32 : dtype))
        return lc_fail(LC_EDTYPE, "tensor '%s' is %s, which cannot be converted to %s", name, from->dtype_name,
                       lc_dtype_name(dtype));
    if (!as && !blocks && !(dtype < 0 && strcmp(w->format, "gguf") == 0 && strcmp(f->format, "gguf") == 0))
        return lc_fail(LC_EDTYPE, "tensor '%s' is %s; to be written it needs a dtype such as f16", name,
                       from->dtype_name);
    LC_TRY(new_entry(w, name, from->ndim, &e));
    memcpy(e->dim, from->dim, (size_t)from->ndim * sizeof *e->dim);
    e->file = f;
    e->from = from;
    e->dtype = as;
    e->convert = dtype >= 0 && dtype != from->store;
    e->quantise = blocks ? dtype : -1;
    e->bytes = from->bytes;
    if (!e->convert) return LC_OK;
    int block = blocks ? lc_store_block(dtype) : 1, bytes = blocks ? lc_store_block_bytes(dtype) : as->item;
    if (block > 1 && (e->ndim < 1 || e->dim[e->ndim - 1] % block))
        return lc_fail(LC_ESHAPE, "tensor '%s' has rows of %.0f; %s needs a multiple of %d", name,
                       e->ndim ? (double)e->dim[e->ndim - 1] : 1.0, lc_dtype_name(dtype), block);
    if (!lc_file_sizes(e->dim, e->ndim, block, bytes, &e->bytes))
        return lc_fail(LC_ESHAPE, "tensor '%s' is too large", name);
    return LC_OK;
}

static lc_status new_value(lc_save_value **list, int *count, const char *key, lc_save_value **out) {
    if (key && lc_utf8_invalid(key, strlen(key)) >= 0) return lc_fail(LC_EARG, "a key that is not UTF-8");
    lc_save_value *grown = lc_resize(*list, (size_t)*count + 1, sizeof *grown);
    if (!grown) return LC_ENOMEM;
    *list = grown;
    *out = &grown[*count];
    **out = (lc_save_value){.key = key ? lc_strdup(key) : NULL};
    ++*count;
    return key && !(*out)->key ? LC_ENOMEM : LC_OK;
}

static lc_status set_text(lc_save_value *v, const char *text, double length) {
    v->text = lc_alloc((size_t)length + 1, 1);
    if (!v->text) return LC_ENOMEM;
    memcpy(v->text, text, (size_t)length);
    v->length = (size_t)length;
    return LC_OK;
}

int lc_writer_describe(lc_writer *w, const char *key, const char *text, double length) {
    lc_save_value *v;
    w->described = true;
    if (!key) return LC_OK;
    if (!text || lc_utf8_invalid(text, (size_t)length) >= 0)
        return lc_fail(LC_EARG, "a description is a key and a text in UTF-8");
    for (int i = 0; i < w->metas; i++)
        if (strcmp(w->meta[i].key, key) == 0) return lc_fail(LC_EARG, "the description '%s' is given twice", key);
    LC_TRY(new_value(&w->meta, &w->metas, key, &v));
    return set_text(v, text, length);
}

int lc_writer_value(lc_writer *w, const char *key, int kind, double number, const char *text, double length) {
    lc_save_value *v;
    if (!key) return lc_fail(LC_EARG, "a value needs a key");
    for (int i = 0; i < w->values; i++)
        if (strcmp(w->value[i].key, key) == 0) return lc_fail(LC_EARG, "the value '%s' is given twice", key);
    LC_TRY(new_value(&w->value, &w->values, key, &v));
    v->kind = kind;
    v->number = number;
    return text ? set_text(v, text, length) : LC_OK;
}

int lc_writer_element(lc_writer *w, int kind, double number, const char *text, double length) {
    lc_save_value *v, *array = w->values ? &w->value[w->values - 1] : NULL;
    if (!array) return lc_fail(LC_EARG, "an element without an array");
    LC_TRY(new_value(&array->list, &array->count, NULL, &v));
    v->kind = kind;
    v->number = number;
    return text ? set_text(v, text, length) : LC_OK;
}

int lc_writer_copy_value(lc_writer *w, const lc_file *f, int i) {
    lc_save_value *v;
    if (!f || i < 0 || i >= f->metas || strcmp(f->format, "gguf") != 0)
        return lc_fail(LC_EARG, "no metadata value %d in that file", i);
    for (int k = 0; k < w->values; k++)
        if (strcmp(w->value[k].key, f->meta[i].key) == 0) return LC_OK; /* what was set before counts */
    LC_TRY(new_value(&w->value, &w->values, f->meta[i].key, &v));
    v->raw = &f->meta[i];
    v->raw_file = f;
    return LC_OK;
}

int lc_writer_wrap(lc_writer *w, const char *key) {
    free(w->wrapper);
    w->wrapper = key ? lc_strdup(key) : NULL;
    return key && !w->wrapper ? LC_ENOMEM : LC_OK;
}

static int by_name(const void *a, const void *b) {
    return strcmp((*(const lc_save_entry *const *)a)->name, (*(const lc_save_entry *const *)b)->name);
}

static lc_status check_duplicates(const lc_writer *w) {
    const lc_save_entry **order = lc_alloc(w->count ? (size_t)w->count : 1, sizeof *order);
    if (!order) return LC_ENOMEM;
    for (int i = 0; i < w->count; i++) order[i] = &w->entry[i];
    if (w->count > 1) qsort(order, (size_t)w->count, sizeof *order, by_name);
    lc_status status = LC_OK;
    for (int i = 1; status == LC_OK && i < w->count; i++)
        if (strcmp(order[i - 1]->name, order[i]->name) == 0)
            status = lc_fail(LC_EARG, "two tensors to be saved have the name '%s'", order[i]->name);
    free(order);
    return status;
}

int lc_writer_finish(lc_writer *w) {
    lc_aside a;
    LC_TRY(check_duplicates(w));
    LC_TRY(lc_aside_begin(&a, w->path));
    lc_status status = w->format[0] == 's'   ? lc_save_safetensors(w, &a)
                       : w->format[0] == 't' ? lc_save_torch(w, &a)
                                             : lc_save_gguf(w, &a);
    if (status == LC_OK) return lc_aside_commit(&a);
    lc_aside_abandon(&a);
    return status;
}

int lc_safetensors_save(const char *path, int n, const char *const *names, const lc_handle *tensors,
                        const char *metadata) {
    lc_writer *w;
    if (!path || n < 0 || (n > 0 && (!names || !tensors)))
        return lc_fail(LC_EARG, "lc_safetensors_save: expected a path, names and tensors");
    LC_TRY(lc_writer_open(&w, path, "safetensors"));
    lc_status status = LC_OK;
    lc_doc *d = NULL;
    if (metadata) status = lc_json_parse("metadata", metadata, strlen(metadata), &d);
    if (d && d->node[0].kind != LC_DOC_OBJECT)
        status = lc_fail(LC_EARG, "the metadata of a safetensors file is a JSON object of strings");
    for (int32_t i = d ? d->node[0].first : -1; status == LC_OK && i >= 0; i = d->node[i].next) {
        if (d->node[i].kind == LC_DOC_STRING)
            status = lc_writer_describe(w, d->text + d->node[i].key, d->text + d->node[i].str, d->node[i].str_len);
        else
            status = lc_fail(LC_EARG, "the metadata of a safetensors file is a JSON object of strings");
    }
    for (int i = 0; status == LC_OK && i < n; i++) status = lc_writer_tensor(w, names[i], &tensors[i]);
    if (status == LC_OK) status = lc_writer_finish(w);
    lc_doc_free(d);
    lc_writer_free(w);
    return status;
}

/* ---- bytes
 * ----------------------------------------------------------------------------------------------------------- */

lc_status lc_text_add(lc_text *b, const void *s, size_t n) {
    if (b->room - b->length < n) {
        size_t room = (b->room + n) * 2;
        char *grown = lc_resize(b->text, room, 1);
        if (!grown) return LC_ENOMEM;
        b->text = grown;
        b->room = room;
    }
    if (n) memcpy(b->text + b->length, s, n);
    b->length += n;
    return LC_OK;
}

static lc_status tensor_data(const lc_save_entry *e, lc_save_sink sink, void *ctx) {
    void *data;
    size_t bytes;
    if (lc_device_of(&e->tensor) == 0 && lc_is_contiguous(&e->tensor)) {
        LC_TRY(lc_host_span(&e->tensor, &data, &bytes));
        return sink(ctx, data, bytes);
    }
    data = malloc((size_t)e->bytes);
    if (!data) return lc_fail(LC_ENOMEM, "no memory for a copy of '%s' (%.0f bytes)", e->name, (double)e->bytes);
    lc_status status = lc_to_host(&e->tensor, data, (double)e->bytes);
    if (status == LC_OK) status = sink(ctx, data, (size_t)e->bytes);
    free(data);
    return status;
}

enum { PIECE = 1 << 21 }; /* elements; a multiple of every block length */

static lc_status sink_in_parts(lc_save_sink sink, void *ctx, const uint8_t *data, uint64_t bytes) {
    for (uint64_t done = 0; done < bytes;) {
        size_t now = bytes - done < 1u << 24 ? (size_t)(bytes - done) : 1u << 24;
        if (lc_interrupt) return lc_fail(LC_EINTR, "interrupted");
        LC_TRY(sink(ctx, data + done, now));
        done += now;
    }
    return LC_OK;
}

typedef struct gather_target {
    uint8_t *out;
    size_t item;
} gather_target;

static lc_status gather_run(void *ctx, const lc_file_run *run) {
    const gather_target *t = ctx;
    for (int64_t i = 0; i < run->count; i++)
        memcpy(t->out + (size_t)(run->at + i) * t->item, run->data + (size_t)(i * run->step) * t->item, t->item);
    return LC_OK;
}

/* What stands in several pieces is brought together: one tensor at a time. */
static lc_status pieces_data(const lc_save_entry *e, lc_save_sink sink, void *ctx) {
    int64_t n = 1;
    for (int d = 0; d < e->ndim; d++) n *= e->dim[d];
    uint8_t *data = malloc((size_t)e->from->bytes);
    if (!data) return lc_fail(LC_ENOMEM, "no memory for '%s' (%.0f bytes)", e->name, (double)e->from->bytes);
    lc_status status =
        lc_file_runs(e->from, gather_run, &(gather_target){data, (size_t)(e->from->bytes / (uint64_t)n)});
    if (status == LC_OK) status = sink_in_parts(sink, ctx, data, e->from->bytes);
    free(data);
    return status;
}

/* Converted a piece at a time. What has pieces itself is converted whole. */
static lc_status converted_data(const lc_save_entry *e, lc_save_sink sink, void *ctx) {
    int to = e->quantise >= 0 ? LC_F32 : e->dtype->store;
    int64_t n = 1, item = lc_store_block_bytes(to);
    for (int d = 0; d < e->ndim; d++) n *= e->dim[d];
    int64_t most = e->from->pieces || n < PIECE ? n : PIECE;
    uint8_t *out = malloc((size_t)(most * item)), *blocks = malloc((size_t)(most * item));
    lc_status status = out && blocks ? LC_OK : lc_fail(LC_ENOMEM, "no memory for '%s'", e->name);
    for (int64_t first = 0; status == LC_OK && first < n; first += most) {
        int64_t now = n - first < most ? n - first : most;
        lc_file_entry part = *e->from;
        if (!part.pieces) {
            part.ndim = 1;
            part.dim = &now;
            part.offset += (uint64_t)(first / lc_store_block(part.store) * lc_store_block_bytes(part.store));
        }
        status = lc_file_load(e->file, &part, to, out);
        if (status == LC_OK && e->quantise < 0) status = sink(ctx, out, (size_t)(now * item));
        if (status == LC_OK && e->quantise >= 0) {
            lc_quantise(e->quantise, (const float *)(void *)out, blocks, now);
            status = sink(ctx, blocks, (size_t)(now / lc_store_block(e->quantise) * lc_store_block_bytes(e->quantise)));
        }
    }
    free(out);
    free(blocks);
    return status;
}

lc_status lc_save_data(const lc_save_entry *e, lc_save_sink sink, void *ctx) {
    if (e->bytes == 0) return LC_OK;
    if (!e->file) return tensor_data(e, sink, ctx);
    if (e->convert) return converted_data(e, sink, ctx);
    if (e->from->pieces) return pieces_data(e, sink, ctx);
    return sink_in_parts(sink, ctx, e->file->data + e->from->offset, e->bytes);
}
