/* torch.c: opens what torch.save wrote. A zip archive has NAME/data.pkl and a NAME/data/KEY for each storage; the
 * legacy form is four pickles (magic number, version, system, the object), a fifth with the storages' keys, and after
 * it each storage as its count of elements and its bytes. Formats: torch/serialization.py and caffe2/serialize of
 * PyTorch. */
#include "torch.h"

#include <stdlib.h>
#include <string.h>

#include <zlib.h>

#include "zip.h"

/* ---- the storages that a pickle names
 * -------------------------------------------------------------------------------- */

static int compare_keys(const void *a, const void *b) {
    const lc_torch_storage *x = a, *y = b;
    uint32_t n = x->key_bytes < y->key_bytes ? x->key_bytes : y->key_bytes;
    int order = memcmp(x->key, y->key, n);
    return order ? order : x->key_bytes < y->key_bytes ? -1 : x->key_bytes > y->key_bytes;
}

/* Bytes of a storage by its persistent id; an untyped one counts bytes. */
static lc_status storage_bytes(const lc_pickle *p, int32_t node, uint64_t *bytes) {
    const lc_pickle_global *type = &p->node[lc_pickle_item_at(p, node, 1)].global;
    uint64_t count = (uint64_t)p->node[lc_pickle_item_at(p, node, 4)].integer;
    if (__builtin_mul_overflow(count, type->dtype ? (uint64_t)type->dtype->bytes : 1, bytes) || *bytes > (uint64_t)1
                                                                                                             << 53)
        return lc_fail(LC_EPARSE, "a storage of %.0f elements", (double)count);
    return LC_OK;
}

static lc_torch_storage *find_storage(const lc_torch *t, const uint8_t *key, uint32_t bytes) {
    lc_torch_storage wanted = {.key = key, .key_bytes = bytes};
    return t->storages ? bsearch(&wanted, t->storage, (size_t)t->storages, sizeof wanted, compare_keys) : NULL;
}

static lc_status list_storages(lc_torch *t) {
    const lc_pickle *p = &t->pickle;
    int count = 0, kept = 0;
    for (int32_t i = 0; i < p->nodes; i++) count += p->node[i].kind == LC_PK_STORAGE;
    t->storage = lc_alloc(count ? (size_t)count : 1, sizeof *t->storage);
    if (!t->storage) return LC_ENOMEM;
    for (int32_t i = 0; i < p->nodes; i++) {
        if (p->node[i].kind != LC_PK_STORAGE) continue;
        const lc_pickle_node *key = &p->node[lc_pickle_item_at(p, i, 2)];
        lc_torch_storage *s = &t->storage[t->storages++];
        s->key = key->bytes.data;
        s->key_bytes = key->bytes.size;
        LC_TRY(storage_bytes(p, i, &s->bytes));
    }
    if (count > 1) qsort(t->storage, (size_t)count, sizeof *t->storage, compare_keys);
    for (int i = 0; i < count; i++) {
        lc_torch_storage *s = &t->storage[i];
        if (kept > 0 && compare_keys(s, &t->storage[kept - 1]) == 0) {
            if (s->bytes != t->storage[kept - 1].bytes)
                return lc_fail(LC_EPARSE, "the storage '%.*s' has two sizes",
                               s->key_bytes < 100 ? (int)s->key_bytes : 100, s->key);
            continue;
        }
        t->storage[kept++] = *s;
    }
    t->storages = kept;
    return LC_OK;
}

/* ---- zip
 * ------------------------------------------------------------------------------------------------------------- */

static const lc_zip_entry *find_in(const lc_zip *z, const char *folder, size_t folder_bytes, const char *rest,
                                   size_t rest_bytes) {
    char name[1024];
    if (folder_bytes + rest_bytes > sizeof name) return NULL;
    memcpy(name, folder, folder_bytes);
    memcpy(name + folder_bytes, rest, rest_bytes);
    return lc_zip_find(z, name, folder_bytes + rest_bytes);
}

/* The archive's folder, with its slash, is where data.pkl stands. */
static lc_status find_pickle(const lc_zip *z, const lc_zip_entry **pickle, size_t *folder) {
    static const char tail[] = "data.pkl";
    size_t n = sizeof tail - 1;
    *pickle = NULL;
    for (int i = 0; i < z->count; i++) {
        const lc_zip_entry *e = &z->entry[i];
        if (e->name_bytes < n || memcmp(e->name + e->name_bytes - n, tail, n) != 0) continue;
        size_t before = e->name_bytes - n;
        const char *slash = memchr(e->name, '/', e->name_bytes);
        if (before && (!slash || (size_t)(slash - e->name) + 1 != before)) continue;
        if (*pickle) return lc_fail(LC_EPARSE, "a zip archive with two data.pkl");
        *pickle = e;
        *folder = before;
    }
    return *pickle ? LC_OK : lc_fail(LC_EPARSE, "a zip archive without data.pkl: no PyTorch checkpoint");
}

static lc_status check_archive(const lc_zip *z, const lc_zip_entry *pickle, size_t folder) {
    const lc_zip_entry *order = find_in(z, pickle->name, folder, "byteorder", 9);
    if (order && !(order->bytes == 6 && memcmp(z->data + order->offset, "little", 6) == 0))
        return lc_fail(LC_EPARSE, "its byte order is not 'little'; only that is read");
    if (find_in(z, pickle->name, folder, "constants.pkl", 13))
        return lc_fail(LC_EPARSE, "a TorchScript program (it has constants.pkl); save its state_dict instead");
    uLong crc = crc32(0, Z_NULL, 0);
    crc = crc32_z(crc, z->data + pickle->offset, (z_size_t)pickle->bytes);
    if ((uint32_t)crc != pickle->crc)
        return lc_fail(LC_EPARSE, "data.pkl at byte %.0f has the checksum %08lx; the directory says %08x",
                       (double)pickle->offset, crc, (unsigned)pickle->crc);
    return LC_OK;
}

static lc_status place_in_zip(lc_torch *t, const lc_zip *z, const char *folder, size_t folder_bytes) {
    for (int i = 0; i < t->storages; i++) {
        lc_torch_storage *s = &t->storage[i];
        char rest[256];
        int shown = s->key_bytes < 100 ? (int)s->key_bytes : 100;
        if (s->key_bytes > sizeof rest - 5)
            return lc_fail(LC_EPARSE, "a storage's key has %u bytes", (unsigned)s->key_bytes);
        memcpy(rest, "data/", 5);
        memcpy(rest + 5, s->key, s->key_bytes);
        const lc_zip_entry *e = find_in(z, folder, folder_bytes, rest, s->key_bytes + 5);
        if (!e) return lc_fail(LC_EPARSE, "the storage data/%.*s is missing", shown, s->key);
        if (e->bytes != s->bytes)
            return lc_fail(LC_EPARSE, "the storage data/%.*s has %.0f bytes at byte %.0f; its tensors need %.0f", shown,
                           s->key, (double)e->bytes, (double)e->offset, (double)s->bytes);
        s->data = z->data + e->offset;
    }
    return LC_OK;
}

static lc_status open_archive(lc_torch *t, const lc_zip *z) {
    const lc_zip_entry *pickle = NULL;
    size_t folder = 0;
    LC_TRY(find_pickle(z, &pickle, &folder));
    lc_status status =
        lc_pickle_read(&t->pickle, z->data + pickle->offset, (size_t)pickle->bytes, LC_PICKLE_PERSISTENT);
    if (status != LC_OK) return lc_fail_in(status, "data.pkl (at byte %.0f): ", (double)pickle->offset);
    LC_TRY(check_archive(z, pickle, folder));
    LC_TRY(list_storages(t));
    return place_in_zip(t, z, pickle->name, folder);
}

static lc_status open_zip(lc_torch *t, const uint8_t *data, size_t bytes) {
    lc_zip z;
    LC_TRY(lc_zip_open(&z, data, bytes));
    lc_status status = open_archive(t, &z);
    lc_zip_close(&z);
    return status;
}

/* ---- legacy
 * ---------------------------------------------------------------------------------------------------------- */

static const uint8_t legacy_magic[10] = {0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19};

typedef struct legacy {
    const uint8_t *data;
    size_t bytes, at;
} legacy;

static lc_status next_pickle(legacy *l, lc_pickle *p, int flags, const char *what) {
    lc_status status = lc_pickle_read(p, l->data + l->at, l->bytes - l->at, flags);
    if (status != LC_OK) return lc_fail_in(status, "%s (at byte %.0f): ", what, (double)l->at);
    l->at += p->used;
    return LC_OK;
}

static lc_status check_head(legacy *l) {
    lc_pickle p;
    LC_TRY(next_pickle(l, &p, 0, "the magic number"));
    const lc_pickle_node *n = &p.node[p.root];
    bool good = n->kind == LC_PK_BIG && n->bytes.size == sizeof legacy_magic &&
                memcmp(n->bytes.data, legacy_magic, sizeof legacy_magic) == 0;
    lc_pickle_free(&p);
    if (!good)
        return lc_fail(LC_EPARSE,
                       "a pickle that is no PyTorch checkpoint (it does not begin with torch.save's magic number)");
    LC_TRY(next_pickle(l, &p, 0, "the version"));
    n = &p.node[p.root];
    good = n->kind == LC_PK_INT && n->integer == 1001;
    lc_pickle_free(&p);
    if (!good) return lc_fail(LC_EPARSE, "a legacy PyTorch checkpoint whose version is not 1001");
    LC_TRY(next_pickle(l, &p, 0, "the system"));
    int32_t little = lc_pickle_get(&p, p.root, "little_endian");
    good = lc_pickle_is(&p, little, LC_PK_BOOL) && p.node[little].integer == 1;
    lc_pickle_free(&p);
    return good ? LC_OK : lc_fail(LC_EPARSE, "a legacy PyTorch checkpoint that is not little-endian");
}

/* After its key's turn in the list stands a storage: 8 bytes of count, then the elements. */
static lc_status place_next(lc_torch *t, legacy *l, const lc_pickle *keys, int32_t key) {
    if (!lc_pickle_is(keys, key, LC_PK_STRING)) return lc_fail(LC_EPARSE, "a storage's key is no string");
    const lc_pickle_node *k = &keys->node[key];
    int shown = k->bytes.size < 100 ? (int)k->bytes.size : 100;
    lc_torch_storage *s = find_storage(t, k->bytes.data, k->bytes.size);
    if (!s || s->found)
        return lc_fail(LC_EPARSE, "the storage '%.*s' %s", shown, k->bytes.data, s ? "comes twice" : "is no tensor's");
    if (l->bytes - l->at < 8 || s->bytes > l->bytes - l->at - 8)
        return lc_fail(LC_EPARSE, "the storage '%.*s' at byte %.0f needs %.0f bytes; the file ends after %.0f", shown,
                       k->bytes.data, (double)l->at, (double)s->bytes + 8, (double)(l->bytes - l->at));
    uint64_t count = 0;
    for (int i = 7; i >= 0; i--) count = count << 8 | l->data[l->at + (size_t)i];
    if (count > s->bytes || (count ? s->bytes % count != 0 || s->bytes / count > 16 : s->bytes != 0))
        return lc_fail(LC_EPARSE, "the storage '%.*s' at byte %.0f has %.0f elements; its tensors need %.0f bytes",
                       shown, k->bytes.data, (double)l->at, (double)count, (double)s->bytes);
    s->found = true;
    s->data = l->data + l->at + 8;
    l->at += 8 + (size_t)s->bytes;
    return LC_OK;
}

static lc_status place_all(lc_torch *t, legacy *l, const lc_pickle *keys) {
    if (!lc_pickle_is(keys, keys->root, LC_PK_LIST)) return lc_fail(LC_EPARSE, "the storages' keys are no list");
    for (int32_t i = keys->node[keys->root].items.first; i >= 0; i = keys->item[i].next)
        LC_TRY(place_next(t, l, keys, keys->item[i].value));
    for (int i = 0; i < t->storages; i++)
        if (!t->storage[i].found)
            return lc_fail(LC_EPARSE, "the storage '%.*s' is missing",
                           t->storage[i].key_bytes < 100 ? (int)t->storage[i].key_bytes : 100, t->storage[i].key);
    return l->at == l->bytes ? LC_OK
                             : lc_fail(LC_EPARSE, "%.0f bytes follow the last storage at byte %.0f",
                                       (double)(l->bytes - l->at), (double)l->at);
}

static lc_status open_legacy(lc_torch *t, const uint8_t *data, size_t bytes) {
    legacy l = {data, bytes, 0};
    lc_pickle keys;
    LC_TRY(check_head(&l));
    LC_TRY(next_pickle(&l, &t->pickle, LC_PICKLE_PERSISTENT, "the object"));
    LC_TRY(list_storages(t));
    LC_TRY(next_pickle(&l, &keys, 0, "the list of storages"));
    lc_status status = place_all(t, &l, &keys);
    lc_pickle_free(&keys);
    return status;
}

lc_status lc_torch_open(lc_torch *t, const uint8_t *data, size_t bytes) {
    *t = (lc_torch){.pickle = {.root = -1}};
    bool zip = bytes >= 4 && memcmp(data, "PK\003\004", 4) == 0;
    lc_status status = zip ? open_zip(t, data, bytes) : open_legacy(t, data, bytes);
    if (status != LC_OK) lc_torch_close(t);
    return status;
}

void lc_torch_close(lc_torch *t) {
    lc_pickle_free(&t->pickle);
    free(t->storage);
    *t = (lc_torch){.pickle = {.root = -1}};
}

/* ---- tensors
 * --------------------------------------------------------------------------------------------------------- */

static lc_status read_numbers(const lc_pickle *p, int32_t tuple, int64_t *out, int *count) {
    if (!lc_pickle_is(p, tuple, LC_PK_TUPLE) && !lc_pickle_is(p, tuple, LC_PK_LIST))
        return lc_fail(LC_EPARSE, "a tensor's size is no tuple");
    if (p->node[tuple].items.count > LC_TORCH_DIMS)
        return lc_fail(LC_EPARSE, "a tensor of %d dims", (int)p->node[tuple].items.count);
    *count = 0;
    for (int32_t i = p->node[tuple].items.first; i >= 0; i = p->item[i].next) {
        const lc_pickle_node *n = &p->node[p->item[i].value];
        if (n->kind != LC_PK_INT || n->integer < 0 || n->integer > (int64_t)1 << 53)
            return lc_fail(LC_EPARSE, "a tensor's size or stride is no whole number of 0 or more (or too large)");
        out[(*count)++] = n->integer;
    }
    return LC_OK;
}

/* The view must lie in its storage. What is repeated by a stride of 0 costs nothing in the file, so its size is
 * bounded. */
static lc_status check_extent(lc_torch_view *v, uint64_t offset, uint64_t storage) {
    enum { REPEATED = 1 << 28 };
    uint64_t item = (uint64_t)v->dtype->bytes, last = offset, step;
    if (!lc_file_sizes(v->dim, v->ndim, 1, v->dtype->bytes, &v->bytes))
        return lc_fail(LC_EPARSE, "its shape is too large");
    v->contiguous = true;
    if (v->bytes == 0) return LC_OK;
    int64_t dense = 1;
    for (int d = v->ndim - 1; d >= 0; d--) {
        if (__builtin_mul_overflow((uint64_t)v->stride[d], (uint64_t)v->dim[d] - 1, &step) ||
            __builtin_add_overflow(last, step, &last))
            return lc_fail(LC_EPARSE, "its strides are too large");
        v->contiguous = v->contiguous && (v->dim[d] == 1 || v->stride[d] == dense);
        dense *= v->dim[d];
    }
    if (last >= storage / item)
        return lc_fail(LC_EPARSE, "it reaches to element %.0f of a storage of %.0f", (double)last,
                       (double)(storage / item));
    if (v->bytes > storage && v->bytes - storage > REPEATED)
        return lc_fail(LC_EPARSE, "it repeats a storage of %.0f bytes to %.0f", (double)storage, (double)v->bytes);
    return LC_OK;
}

lc_status lc_torch_view_of(const lc_torch *t, int32_t tensor, lc_torch_view *v) {
    const lc_pickle *p = &t->pickle;
    int32_t storage = lc_pickle_item_at(p, tensor, 0), offset = lc_pickle_item_at(p, tensor, 1);
    int strides = 0;
    const lc_pickle_global *type = &p->node[lc_pickle_item_at(p, storage, 1)].global;
    v->dtype = p->node[tensor].state >= 0 ? p->node[p->node[tensor].state].global.dtype : type->dtype;
    if (!v->dtype) return lc_fail(LC_EPARSE, "an untyped storage, and nothing says its dtype");
    if (!lc_pickle_is(p, offset, LC_PK_INT) || p->node[offset].integer < 0)
        return lc_fail(LC_EPARSE, "its offset is no whole number of 0 or more");
    LC_TRY(read_numbers(p, lc_pickle_item_at(p, tensor, 2), v->dim, &v->ndim));
    LC_TRY(read_numbers(p, lc_pickle_item_at(p, tensor, 3), v->stride, &strides));
    if (strides != v->ndim) return lc_fail(LC_EPARSE, "it has %d dims but %d strides", v->ndim, strides);
    const lc_pickle_node *key = &p->node[lc_pickle_item_at(p, storage, 2)];
    const lc_torch_storage *s = find_storage(t, key->bytes.data, key->bytes.size);
    if (!s) return lc_fail(LC_EBUG, "a storage that was not listed");
    LC_TRY(check_extent(v, (uint64_t)p->node[offset].integer, s->bytes));
    v->data = v->bytes ? s->data + (uint64_t)p->node[offset].integer * (uint64_t)v->dtype->bytes : s->data;
    return LC_OK;
}
