/* bind.c: where files meet tensors: views of a mapping, reading with conversion into a tensor, and the safetensors
 * writer. The only file of runtime/io that knows the core. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../core/core.h"
#include "doc_build.h"
#include "file.h"
#include "quant.h"
#include "system.h"

/* ---- views
 * ----------------------------------------------------------------------------------------------------------- */

static void drop_mapping(void *map) { lc_mapping_drop(map); }

/* A tensor over memory that `release` gives back; on failure it is given back here. */
static lc_status tensor_over(void *ptr, size_t bytes, void (*release)(void *), void *ctx, int dtype, int ndim,
                             const int32_t *dims, lc_handle *out) {
    lc_storage *s;
    lc_status status = lc_storage_wrap(ptr, bytes, release, ctx, &s);
    if (status != LC_OK) {
        release(ctx);
        return status;
    }
    status = lc_tensor_of_storage(s, 0, dtype, ndim, dims, out);
    lc_storage_release(s); /* the tensor has its own reference */
    return status;
}

static lc_status view_of_mapping(lc_mapping *map, uint64_t offset, uint64_t bytes, int dtype, int ndim,
                                 const int32_t *dims, lc_handle *out) {
    uint8_t *at = map->data + offset;
    size_t align = lc_dtype_is_quant(dtype) ? 2 : (size_t)lc_dtype_traits(dtype)->bytes;
    if ((uintptr_t)at % align == 0) {
        map->refs++;
        return tensor_over(at, (size_t)bytes, drop_mapping, map, dtype, ndim, dims, out);
    }
    void *copy = malloc((size_t)bytes + 1); /* the file does not align it: kernels need more */
    if (!copy) return lc_fail(LC_ENOMEM, "no memory for a copy of %.0f bytes", (double)bytes);
    memcpy(copy, at, (size_t)bytes);
    return tensor_over(copy, (size_t)bytes, free, copy, dtype, ndim, dims, out);
}

static const lc_file_entry *want_entry(const lc_file *f, int i) {
    if (f && i >= 0 && i < f->count) return &f->entry[i];
    lc_fail(LC_EARG, "no tensor %d in a file of %d", i, f ? f->count : 0);
    return NULL;
}

int lc_file_tensor(const lc_file *f, int i, lc_handle *out) {
    const lc_file_entry *e = want_entry(f, i);
    int32_t dims[LC_MAX_DIMS] = {0};
    if (!e) return LC_EARG;
    if (!f->map) return lc_fail(LC_EARG, "the file was opened from memory");
    if (e->store < 0 || e->store >= LC_DTYPE_COUNT)
        return lc_fail(LC_EDTYPE, "tensor '%s' is %s, which no tensor here can hold%s", e->name, e->dtype_name,
                       e->store >= 0 ? "; reading it with a dtype converts it" : "");
    if (e->ndim > LC_MAX_DIMS)
        return lc_fail(LC_ESHAPE, "tensor '%s' has %d dims; at most %d are held", e->name, e->ndim, LC_MAX_DIMS);
    for (int d = 0; d < e->ndim; d++) {
        if (e->dim[d] > INT32_MAX)
            return lc_fail(LC_ESHAPE, "tensor '%s' has a dim of %.0f", e->name, (double)e->dim[d]);
        dims[d] = (int32_t)e->dim[d];
    }
    return view_of_mapping(f->map, e->offset, e->bytes, e->store, e->ndim, dims, out);
}

int lc_map_file(lc_handle *out, const char *path, double offset, int dtype, int ndim, const int32_t *dims) {
    const lc_dtype_trait *traits = lc_dtype_traits(dtype);
    int64_t wide[LC_MAX_DIMS] = {0};
    uint64_t bytes;
    lc_mapping *map;
    if (!out || !path || !traits || !(offset >= 0 && offset < 9e15) || ndim < 0 || ndim > LC_MAX_DIMS)
        return lc_fail(LC_EARG, "lc_map_file: expected a path, an offset, a dtype and at most %d dims", LC_MAX_DIMS);
    for (int d = 0; d < ndim; d++) wide[d] = dims[d];
    if (!lc_file_sizes(wide, ndim, traits->block, traits->bytes, &bytes))
        return lc_fail(LC_ESHAPE, "%s: dims that no file holds", path);
    LC_TRY(lc_mapping_open(path, &map));
    lc_status status;
    if (offset > (double)map->bytes || bytes > map->bytes - (uint64_t)offset) {
        status = lc_fail(LC_EARG, "%s has %.0f bytes; %.0f at offset %.0f do not fit", path, (double)map->bytes,
                         (double)bytes, offset);
    } else if (!map->data) {
        status = lc_new(out, dtype, 0, ndim, dims);
    } else {
        status = view_of_mapping(map, (uint64_t)offset, bytes, dtype, ndim, dims, out);
    }
    lc_mapping_drop(map);
    return status;
}

/* ---- reading
 * --------------------------------------------------------------------------------------------------------- */

/* Gives the pages of a part of the mapping that was read back to the system, so that a model's file does not stay
 * resident beside the model. Not while a tensor views the mapping: it may have been written to, which is kept in those
 * pages. */
static void forget_pages(const lc_file *f, uint64_t begin, uint64_t end) {
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    if (!f->map || f->map->refs > 1) return;
    begin = begin / page * page;
    if (end > begin) madvise(f->map->data + begin, (size_t)(end - begin), MADV_DONTNEED);
}

typedef struct read_job {
    const lc_file *file;
    const lc_file_entry *entry;
    int dtype;
    uint8_t *out;
    int64_t first, count; /* elements of this piece */
    int failed;
} read_job;

enum { READ_UNIT = 4096, READ_PIECE = 1 << 21 }; /* elements; multiples of every block length */

static uint64_t bytes_of(int store, int64_t elements) {
    return (uint64_t)(elements / lc_store_block(store)) * (uint64_t)lc_store_block_bytes(store);
}

static void read_units(void *ctx, int64_t begin, int64_t end, int thread) {
    read_job *j = ctx;
    int64_t from = j->first + begin * READ_UNIT, n = (end - begin) * READ_UNIT;
    (void)thread;
    if (n > j->first + j->count - from) n = j->first + j->count - from;
    const uint8_t *in = j->file->data + j->entry->offset + bytes_of(j->entry->store, from);
    if (lc_convert(j->entry->store, in, j->dtype, j->out + bytes_of(j->dtype, from), n) != LC_OK)
        __atomic_store_n(&j->failed, 1, __ATOMIC_RELAXED);
}

static lc_status read_pieces(const lc_file *f, const lc_file_entry *e, int dtype, uint8_t *out, int64_t n) {
    read_job job = {.file = f, .entry = e, .dtype = dtype, .out = out};
    for (; job.first < n; job.first += READ_PIECE) {
        job.count = n - job.first < READ_PIECE ? n - job.first : READ_PIECE;
        if (lc_interrupt) return lc_fail(LC_EINTR, "interrupted");
        lc_parallel((job.count + READ_UNIT - 1) / READ_UNIT, 16, read_units, &job);
        if (job.failed) return lc_fail(LC_EARG, "an integer does not fit in %s", lc_dtype_name(dtype));
        uint64_t begin = e->offset + bytes_of(e->store, job.first);
        forget_pages(f, begin, begin + bytes_of(e->store, job.count));
    }
    return LC_OK;
}

int lc_file_read(const lc_file *f, int i, int dtype, const lc_handle *into) {
    const lc_file_entry *e = want_entry(f, i);
    if (!e) return LC_EARG;
    lc_tensor *t = lc_get(into);
    if (!t) return LC_ESTALE;
    if (t->dtype != dtype || !lc_convertible(e->store, dtype))
        return lc_fail(LC_EDTYPE, "tensor '%s' is %s; it cannot be read into %T", e->name, e->dtype_name, t);
    int64_t n = 1;
    for (int d = 0; d < e->ndim; d++) n *= e->dim[d]; /* checked at opening */
    if (n != lc_tensor_numel(t))
        return lc_fail(LC_ESHAPE, "tensor '%s' has %.0f elements; it does not fit into %T", e->name, (double)n, t);
    if (t->storage->readonly) return lc_fail(LC_EARG, "tensor '%s' cannot be read into mapped memory: %T", e->name, t);
    void *out;
    size_t bytes;
    LC_TRY(lc_host_span(into, &out, &bytes));
    lc_storage_written(t->storage);
    lc_status status = read_pieces(f, e, dtype, out, n);
    return status == LC_OK ? LC_OK : lc_fail_in(status, "tensor '%s': ", e->name);
}

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
