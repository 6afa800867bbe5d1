/* file.c: files of tensors whatever their format: mapping, opening by content, the list of tensors and metadata, and
 * the checks that both formats need (sizes without overflow, no overlap, no duplicate names). */
#define _GNU_SOURCE
#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "doc_build.h"
#include "quant.h"

/* ---- mapping
 * --------------------------------------------------------------------------------------------------------- */

static lc_status map_descriptor(int fd, const char *path, lc_mapping *m) {
    struct stat st;
    if (fstat(fd, &st) != 0) return lc_fail(LC_EIO, "cannot read %s: %s", path, strerror(errno));
    if (S_ISDIR(st.st_mode)) return lc_fail(LC_EIO, "cannot read %s: it is a folder", path);
    if (!S_ISREG(st.st_mode)) return lc_fail(LC_EIO, "cannot map %s: it is no regular file", path);
    m->bytes = (size_t)st.st_size;
    if (m->bytes == 0) return LC_OK;
    void *data = mmap(NULL, m->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, fd, 0);
    if (data == MAP_FAILED)
        return lc_fail(LC_EIO, "cannot map %s (%.0f bytes): %s", path, (double)m->bytes, strerror(errno));
    m->data = data;
    return LC_OK;
}

lc_status lc_mapping_open(const char *path, lc_mapping **out) {
    *out = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO must not hang */
    if (fd < 0) return lc_fail(LC_EIO, "cannot open %s: %s", path, strerror(errno));
    lc_mapping *m = lc_alloc(1, sizeof *m);
    lc_status status = m ? map_descriptor(fd, path, m) : LC_ENOMEM;
    close(fd);
    if (status != LC_OK) {
        free(m);
        return status;
    }
    m->refs = 1;
    *out = m;
    return LC_OK;
}

void lc_mapping_drop(lc_mapping *m) {
    if (!m || --m->refs > 0) return;
    if (m->data) munmap(m->data, m->bytes);
    free(m);
}

/* ---- checks
 * ---------------------------------------------------------------------------------------------------------- */

bool lc_file_sizes(const int64_t *dim, int ndim, int block, int block_bytes, uint64_t *bytes) {
    uint64_t n = 1, limit = (uint64_t)1 << 53;
    for (int i = 0; i < ndim; i++)
        if (dim[i] < 0 || __builtin_mul_overflow(n, (uint64_t)dim[i], &n) || n > limit) return false;
    if (n % (uint64_t)block) return false;
    return !__builtin_mul_overflow(n / (uint64_t)block, (uint64_t)block_bytes, bytes);
}

static int by_place(const void *a, const void *b) {
    const lc_file_entry *x = *(lc_file_entry *const *)a, *y = *(lc_file_entry *const *)b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

static lc_status check_order(const struct lc_file *f, lc_file_entry **order, uint64_t at, bool packed) {
    for (int i = 0; i < f->count; i++) {
        const lc_file_entry *e = order[i];
        if (e->offset < at && e->bytes > 0)
            return lc_fail(LC_EPARSE,
                           "tensor '%.200s' begins at byte %.0f, inside the one before it, which ends at %.0f", e->name,
                           (double)e->offset, (double)at);
        if (packed && e->offset != at)
            return lc_fail(LC_EPARSE,
                           "tensor '%.200s' begins at byte %.0f of the file; expected %.0f: no gap, no overlap",
                           e->name, (double)e->offset, (double)at);
        if (e->offset + e->bytes > at) at = e->offset + e->bytes;
    }
    if (packed && at != f->bytes)
        return lc_fail(LC_EPARSE, "the tensors end at byte %.0f but the file has %.0f", (double)at, (double)f->bytes);
    return LC_OK;
}

lc_status lc_file_check_layout(const struct lc_file *f, uint64_t start, bool packed) {
    lc_file_entry **order = lc_alloc((size_t)f->count, sizeof *order);
    if (!order) return LC_ENOMEM;
    for (int i = 0; i < f->count; i++) order[i] = &f->entry[i];
    qsort(order, (size_t)f->count, sizeof *order, by_place);
    lc_status status = check_order(f, order, start, packed);
    free(order);
    return status;
}

static const char *entry_name(const struct lc_file *f, int i) { return f->entry[i].name; }

static const char *meta_key(const struct lc_file *f, int i) { return f->meta[i].key; }

/* Open-addressing table of 1 + index. */
static lc_status index_names(const struct lc_file *f, int count, const char *(*name)(const struct lc_file *, int),
                             const char *what, uint32_t **table, size_t *size) {
    size_t slots = 16;
    while (slots < (size_t)count * 2) slots *= 2;
    uint32_t *slot = lc_alloc(slots, sizeof *slot);
    if (!slot) return LC_ENOMEM;
    for (int i = 0; i < count; i++) {
        const char *s = name(f, i);
        size_t at = lc_hash_bytes(s, strlen(s), f->seed) & (slots - 1);
        for (; slot[at]; at = (at + 1) & (slots - 1)) {
            if (strcmp(name(f, (int)slot[at] - 1), s) != 0) continue;
            free(slot);
            return lc_fail(LC_EPARSE, "the %s '%.200s' occurs twice", what, s);
        }
        slot[at] = (uint32_t)i + 1;
    }
    *table = slot;
    *size = slots;
    return LC_OK;
}

lc_status lc_file_check_names(struct lc_file *f) {
    uint32_t *keys = NULL;
    size_t size;
    if (getrandom(&f->seed, sizeof f->seed, GRND_NONBLOCK) != (ssize_t)sizeof f->seed) f->seed = 0x9e3779b97f4a7c15u;
    LC_TRY(index_names(f, f->metas, meta_key, "metadata key", &keys, &size));
    free(keys);
    return index_names(f, f->count, entry_name, "tensor", &f->slot, &f->slots);
}

/* ---- opening
 * --------------------------------------------------------------------------------------------------------- */

static bool begins(const struct lc_file *f, const char *with) {
    size_t n = strlen(with);
    return f->bytes >= n && memcmp(f->data, with, n) == 0;
}

static lc_status parse_by_content(struct lc_file *f) {
    if (begins(f, "GGUF")) return lc_gguf_parse(f);
    bool braced = f->bytes > 8 && f->data[8] == '{'; /* a header's length may begin like anything */
    if (begins(f, "PK\003\004")) return lc_torch_parse(f);
    if (!braced && f->bytes > 1 && ((f->data[0] == 0x80 && f->data[1] <= 5) || begins(f, "c") || begins(f, "(")))
        return lc_torch_parse(f);
    if (begins(f, "version https://git-lfs"))
        return lc_fail(LC_EPARSE, "a Git LFS pointer, not the data; fetch it with `git lfs pull`");
    return lc_safetensors_parse(f);
}

/* What a broken file made the message say may hold anything; it goes to a terminal. */
static lc_status fail_clean(lc_status status, const char *name) {
    char text[1024];
    snprintf(text, sizeof text, "%s", lc_error_message());
    for (ptrdiff_t at; (at = lc_utf8_invalid(text, strlen(text))) >= 0;) text[at] = '?';
    for (char *s = text; *s; s++)
        if ((unsigned char)*s < 32 || *s == 127) *s = '?';
    return lc_fail(status, "%s: %s", name, text);
}

static lc_status open_file(struct lc_file *f, const char *name, struct lc_file **out) {
    lc_status status = parse_by_content(f);
    if (status == LC_OK) status = lc_file_check_names(f);
    if (status != LC_OK) {
        lc_file_close(f);
        return fail_clean(status, name);
    }
    *out = f;
    return LC_OK;
}

lc_status lc_file_open_memory(const void *data, size_t bytes, const char *name, struct lc_file **out) {
    *out = NULL;
    struct lc_file *f = lc_alloc(1, sizeof *f);
    if (!f) return LC_ENOMEM;
    f->data = data ? data : (const uint8_t *)"";
    f->bytes = bytes;
    return open_file(f, name, out);
}

/* A file of a distributed checkpoint, which its metadata names. */
typedef struct part_folder {
    const char *path;
    struct lc_file *file;
} part_folder;

static lc_status open_part(void *ctx, const char *name, const uint8_t **data, size_t *bytes, lc_mapping **map) {
    part_folder *folder = ctx;
    struct lc_file *f = folder->file;
    if (!name[0] || strchr(name, '/') || strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
        return lc_fail(LC_EPARSE, "the metadata names the file '%.200s', which does not lie in the folder", name);
    size_t length = strlen(folder->path) + strlen(name) + 2;
    char *path = lc_alloc(length, 1);
    lc_mapping **more = lc_resize(f->part, (size_t)f->parts + 1, sizeof *more);
    if (more) f->part = more;
    lc_status status = path && more ? LC_OK : LC_ENOMEM;
    if (status == LC_OK) snprintf(path, length, "%s/%s", folder->path, name);
    if (status == LC_OK) status = lc_mapping_open(path, map);
    free(path);
    if (status != LC_OK) return status;
    f->part[f->parts++] = *map;
    *data = (*map)->data ? (*map)->data : (const uint8_t *)"";
    *bytes = (*map)->bytes;
    return LC_OK;
}

static lc_status open_folder(struct lc_file **out, const char *path) {
    size_t length = strlen(path) + sizeof "/.metadata";
    char *inner = lc_alloc(length, 1);
    struct lc_file *f = lc_alloc(1, sizeof *f);
    lc_status status = inner && f ? LC_OK : LC_ENOMEM;
    if (status == LC_OK) snprintf(inner, length, "%s/.metadata", path);
    if (status == LC_OK && lc_path_kind(inner) != 1)
        status =
            lc_fail(LC_EIO, "cannot read %s: it is a folder (without the .metadata of a distributed checkpoint)", path);
    if (status == LC_OK) status = lc_mapping_open(inner, &f->map);
    if (status == LC_OK) {
        f->data = f->map->data ? f->map->data : (const uint8_t *)"";
        f->bytes = f->map->bytes;
        status = lc_torch_parts_parse(f, open_part, &(part_folder){path, f});
        if (status == LC_OK) status = lc_file_check_names(f);
        if (status != LC_OK) fail_clean(status, path);
    }
    free(inner);
    if (status == LC_OK)
        *out = f;
    else
        lc_file_close(f);
    return status;
}

int lc_file_open(lc_file **out, const char *path) {
    if (!out || !path) return lc_fail(LC_EARG, "lc_file_open: expected a path");
    *out = NULL;
    lc_mapping *map;
    if (lc_path_kind(path) == 2) return open_folder(out, path);
    LC_TRY(lc_mapping_open(path, &map));
    struct lc_file *f = lc_alloc(1, sizeof *f);
    if (!f) {
        lc_mapping_drop(map);
        return LC_ENOMEM;
    }
    f->map = map;
    f->data = map->data ? map->data : (const uint8_t *)"";
    f->bytes = map->bytes;
    return open_file(f, path, out);
}

void lc_file_close(lc_file *f) {
    if (!f) return;
    for (int i = 0; f->entry && i < f->count; i++) {
        free(f->entry[i].name);
        free(f->entry[i].dim);
        for (int k = 0; k < f->entry[i].pieces; k++) free(f->entry[i].piece[k].start);
        free(f->entry[i].piece);
    }
    for (int i = 0; f->meta && i < f->metas; i++) {
        free(f->meta[i].key);
        free(f->meta[i].element);
    }
    free(f->entry);
    free(f->meta);
    free(f->slot);
    lc_doc_free(f->doc);
    lc_doc_free(f->extra);
    for (int i = 0; i < f->parts; i++) lc_mapping_drop(f->part[i]);
    free(f->part);
    lc_mapping_drop(f->map);
    free(f);
}

/* ---- tensors
 * --------------------------------------------------------------------------------------------------------- */

static const lc_file_entry *entry_at(const lc_file *f, int i) {
    return f && i >= 0 && i < f->count ? &f->entry[i] : NULL;
}

const char *lc_file_format(const lc_file *f) { return f ? f->format : ""; }

int lc_file_count(const lc_file *f) { return f ? f->count : 0; }

const char *lc_file_tensor_name(const lc_file *f, int i) {
    const lc_file_entry *e = entry_at(f, i);
    return e ? e->name : NULL;
}

int lc_file_find(const lc_file *f, const char *name) {
    if (!f || !name) return -1;
    size_t at = lc_hash_bytes(name, strlen(name), f->seed) & (f->slots - 1);
    for (; f->slot[at]; at = (at + 1) & (f->slots - 1))
        if (strcmp(f->entry[f->slot[at] - 1].name, name) == 0) return (int)f->slot[at] - 1;
    return -1;
}

int lc_file_dtype(const lc_file *f, int i) {
    const lc_file_entry *e = entry_at(f, i);
    return e && e->store < LC_DTYPE_COUNT ? e->store : -1;
}

const char *lc_file_dtype_name(const lc_file *f, int i) {
    const lc_file_entry *e = entry_at(f, i);
    return e ? e->dtype_name : NULL;
}

int lc_file_ndim(const lc_file *f, int i) {
    const lc_file_entry *e = entry_at(f, i);
    return e ? e->ndim : -1;
}

int32_t lc_file_dim(const lc_file *f, int i, int dim) {
    const lc_file_entry *e = entry_at(f, i);
    return e && dim >= 0 && dim < e->ndim && e->dim[dim] <= INT32_MAX ? (int32_t)e->dim[dim] : -1;
}

double lc_file_offset(const lc_file *f, int i) {
    const lc_file_entry *e = entry_at(f, i);
    return e ? (double)e->offset : -1;
}

double lc_file_bytes(const lc_file *f, int i) {
    const lc_file_entry *e = entry_at(f, i);
    return e ? (double)e->bytes : -1;
}

int lc_file_described(const lc_file *f) { return f && f->described; }

const lc_doc *lc_file_extra(const lc_file *f) { return f ? f->extra : NULL; }

/* ---- metadata
 * -------------------------------------------------------------------------------------------------------- */

static const lc_file_meta *meta_at(const lc_file *f, int i) { return f && i >= 0 && i < f->metas ? &f->meta[i] : NULL; }

int lc_file_meta_count(const lc_file *f) { return f ? f->metas : 0; }

const char *lc_file_meta_key(const lc_file *f, int i) {
    const lc_file_meta *m = meta_at(f, i);
    return m ? m->key : NULL;
}

int lc_file_meta_kind(const lc_file *f, int i) {
    const lc_file_meta *m = meta_at(f, i);
    return m ? m->kind : LC_DOC_NULL;
}

int lc_file_meta_find(const lc_file *f, const char *key) {
    for (int i = 0; f && key && i < f->metas; i++)
        if (strcmp(f->meta[i].key, key) == 0) return i;
    return -1;
}

double lc_file_meta_number(const lc_file *f, int i, int32_t element) {
    const lc_file_meta *m = meta_at(f, i);
    return m && m->value ? lc_gguf_number(m, element) : 0;
}

static uint64_t length_at(const lc_file *f, const uint8_t *p) {
    uint64_t n = 0;
    for (int i = f->length_bytes; i-- > 0;) n = n << 8 | p[i];
    return n;
}

const char *lc_file_meta_string(const lc_file *f, int i, int32_t element, int32_t *length) {
    const lc_file_meta *m = meta_at(f, i);
    if (length) *length = 0;
    if (!m) return NULL;
    if (element < 0) {
        if (length && m->kind == LC_DOC_STRING) *length = m->length;
        return m->kind == LC_DOC_STRING ? m->string : NULL;
    }
    if (!m->element || element >= m->count) return NULL;
    if (length) *length = (int32_t)length_at(f, m->element[element]);
    return (const char *)m->element[element] + f->length_bytes;
}

int32_t lc_file_meta_size(const lc_file *f, int i) {
    const lc_file_meta *m = meta_at(f, i);
    return m ? m->count : 0;
}
