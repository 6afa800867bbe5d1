/* torch_parts.c: folders that torch.distributed.checkpoint wrote. .metadata is a pickle of records: of each tensor its
 * size and dtype, and for each of its blocks the file, offset and length of what torch.save wrote of it. Opening checks
 * that every block is a tensor of the right dtype, and that a tensor's blocks cover it exactly once. */
#include <stdlib.h>
#include <string.h>

#include "quant.h"
#include "torch.h"

/* A block of a tensor, or a plain value, as the metadata lists it. */
typedef struct block {
    const lc_pickle_node *name; /* a string */
    int32_t offsets, info;      /* a tuple or None; a _StorageInfo */
    int order;
} block;

typedef struct part {
    char *name;
    const uint8_t *data;
    size_t bytes, claimed; /* claimed: by blocks so far, which do not overlap */
    lc_mapping *map;
} part;

typedef struct parts {
    struct lc_file *file;
    lc_part_opener open;
    void *ctx;
    lc_pickle meta;
    block *block; /* sorted by name */
    int blocks;
    part *part;
    int count;
    size_t prefix; /* bytes of a wrapper's name that every tensor's begins with */
    lc_doc_build doc;
    int64_t steps;
} parts;

/* ---- the list of blocks
 * ---------------------------------------------------------------------------------------------- */

static int compare_text(const lc_pickle_node *x, const lc_pickle_node *y) {
    uint32_t n = x->bytes.size < y->bytes.size ? x->bytes.size : y->bytes.size;
    int order = memcmp(x->bytes.data, y->bytes.data, n);
    return order ? order : x->bytes.size < y->bytes.size ? -1 : x->bytes.size > y->bytes.size;
}

static int compare_blocks(const void *a, const void *b) {
    const block *x = a, *y = b;
    int order = compare_text(x->name, y->name);
    return order ? order : x->order - y->order;
}

static lc_status list_blocks(parts *s) {
    const lc_pickle *p = &s->meta;
    int32_t data = lc_pickle_get(p, p->root, "storage_data");
    if (!lc_pickle_is(p, data, LC_PK_DICT)) return lc_fail(LC_EPARSE, "the metadata has no dict 'storage_data'");
    s->block = lc_alloc((size_t)p->node[data].items.count / 2 + 1, sizeof *s->block);
    if (!s->block) return LC_ENOMEM;
    for (int32_t i = p->node[data].items.first; i >= 0; i = p->item[i].next) {
        int32_t key = p->item[i].value, name = lc_pickle_get(p, key, "fqn");
        i = p->item[i].next;
        if (!lc_pickle_is(p, name, LC_PK_STRING) || !lc_pickle_is(p, p->item[i].value, LC_PK_OBJECT))
            return lc_fail(LC_EPARSE, "an entry of 'storage_data' is not MetadataIndex -> _StorageInfo");
        s->block[s->blocks] = (block){&p->node[name], lc_pickle_get(p, key, "offset"), p->item[i].value, s->blocks};
        s->blocks++;
    }
    if (s->blocks > 1) qsort(s->block, (size_t)s->blocks, sizeof *s->block, compare_blocks);
    return LC_OK;
}

static int first_block(const parts *s, const lc_pickle_node *name) {
    int low = 0, high = s->blocks;
    while (low < high) {
        int middle = (low + high) / 2;
        if (compare_text(s->block[middle].name, name) < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* ---- files
 * ----------------------------------------------------------------------------------------------------------- */

static lc_status find_part(parts *s, const lc_pickle_node *name, part **out) {
    char text[512];
    if (name->bytes.size >= sizeof text || memchr(name->bytes.data, 0, name->bytes.size))
        return lc_fail(LC_EPARSE, "a file name of %u bytes", (unsigned)name->bytes.size);
    memcpy(text, name->bytes.data, name->bytes.size);
    text[name->bytes.size] = 0;
    for (int i = s->count; i-- > 0;)
        if (strcmp(s->part[i].name, text) == 0) {
            *out = &s->part[i];
            return LC_OK;
        }
    part *grown = lc_resize(s->part, (size_t)s->count + 1, sizeof *grown);
    if (!grown) return LC_ENOMEM;
    s->part = grown;
    part *p = &s->part[s->count];
    *p = (part){.name = lc_strdup(text)};
    if (!p->name) return LC_ENOMEM;
    s->count++;
    LC_TRY(s->open(s->ctx, text, &p->data, &p->bytes, &p->map));
    *out = p;
    return LC_OK;
}

/* What torch.save wrote of a block. */
static lc_status open_block(parts *s, const block *b, lc_torch *t, part **from) {
    const lc_pickle *p = &s->meta;
    int32_t name = lc_pickle_get(p, b->info, "relative_path"), offset = lc_pickle_get(p, b->info, "offset");
    int32_t length = lc_pickle_get(p, b->info, "length"),
            transforms = lc_pickle_get(p, b->info, "transform_descriptors");
    if (!lc_pickle_is(p, name, LC_PK_STRING) || !lc_pickle_is(p, offset, LC_PK_INT) ||
        !lc_pickle_is(p, length, LC_PK_INT))
        return lc_fail(LC_EPARSE, "its place is not (relative_path, offset, length)");
    if (transforms >= 0 && !lc_pickle_is(p, transforms, LC_PK_NONE) && lc_pickle_item_at(p, transforms, 0) >= 0)
        return lc_fail(LC_EPARSE, "it is stored with a transform (compressed?), which is not read");
    LC_TRY(find_part(s, &p->node[name], from));
    int64_t at = p->node[offset].integer, bytes = p->node[length].integer;
    if (at < 0 || bytes < 0 || (uint64_t)at > (*from)->bytes || (uint64_t)bytes > (*from)->bytes - (uint64_t)at)
        return lc_fail(LC_EPARSE, "%.0f bytes at %.0f of %s, which has %.0f", (double)bytes, (double)at, (*from)->name,
                       (double)(*from)->bytes);
    if ((size_t)bytes > (*from)->bytes - (*from)->claimed)
        return lc_fail(LC_EPARSE, "the blocks of %s overlap", (*from)->name);
    (*from)->claimed += (size_t)bytes;
    lc_status status = lc_torch_open(t, (*from)->data + at, (size_t)bytes);
    return status == LC_OK ? LC_OK : lc_fail_in(status, "%s, from byte %.0f: ", (*from)->name, (double)at);
}

/* ---- a tensor
 * -------------------------------------------------------------------------------------------------------- */

/* Numbers of a tuple of `count` elements. */
static lc_status numbers(const lc_pickle *p, int32_t tuple, int count, int64_t *out) {
    if ((!lc_pickle_is(p, tuple, LC_PK_TUPLE) && !lc_pickle_is(p, tuple, LC_PK_LIST)) ||
        p->node[tuple].items.count != count)
        return lc_fail(LC_EPARSE, "a place of other than %d dims", count);
    for (int32_t i = p->node[tuple].items.first; i >= 0; i = p->item[i].next) {
        const lc_pickle_node *n = &p->node[p->item[i].value];
        if (n->kind != LC_PK_INT || n->integer < 0 || n->integer > (int64_t)1 << 53)
            return lc_fail(LC_EPARSE, "a size or offset is no whole number of 0 or more (or too large)");
        *out++ = n->integer;
    }
    return LC_OK;
}

static lc_status fill_piece(parts *s, const block *b, const lc_torch *t, const part *from, lc_file_entry *e) {
    const lc_pickle *p = &s->meta;
    lc_torch_view v;
    size_t n = e->ndim ? (size_t)e->ndim : 1;
    if (!lc_pickle_is(&t->pickle, t->pickle.root, LC_PK_TENSOR)) return lc_fail(LC_EPARSE, "a block that is no tensor");
    LC_TRY(lc_torch_view_of(t, t->pickle.root, &v));
    if (v.ndim != e->ndim || strcmp(v.dtype->name, e->dtype_name) != 0)
        return lc_fail(LC_EPARSE, "a block of %d dims in %s", v.ndim, v.dtype->name);
    lc_file_piece *piece = &e->piece[e->pieces];
    *piece = (lc_file_piece){.data = v.data, .map = from->map, .start = lc_alloc(3 * n, sizeof(int64_t))};
    if (!piece->start) return LC_ENOMEM;
    e->pieces++;
    piece->size = piece->start + n;
    piece->stride = piece->size + n;
    memcpy(piece->size, v.dim, (size_t)v.ndim * sizeof *v.dim);
    memcpy(piece->stride, v.stride, (size_t)v.ndim * sizeof *v.stride);
    if (b->offsets >= 0 && !lc_pickle_is(p, b->offsets, LC_PK_NONE))
        LC_TRY(numbers(p, b->offsets, e->ndim, piece->start));
    for (int d = 0; d < e->ndim; d++)
        if (piece->start[d] > e->dim[d] || piece->size[d] > e->dim[d] - piece->start[d])
            return lc_fail(LC_EPARSE, "a block of %.0f from %.0f in dim %d, which has %.0f", (double)piece->size[d],
                           (double)piece->start[d], d, (double)e->dim[d]);
    if (e->pieces == 1) e->offset = (uint64_t)(v.data - from->data);
    return LC_OK;
}

static bool overlap(const lc_file_entry *e, const lc_file_piece *a, const lc_file_piece *b) {
    for (int d = 0; d < e->ndim; d++)
        if (a->start[d] + a->size[d] <= b->start[d] || b->start[d] + b->size[d] <= a->start[d]) return false;
    return true;
}

/* No two blocks overlap, and together they have as many elements as the tensor: then they are the tensor. */
static lc_status check_cover(const lc_file_entry *e) {
    int64_t have = 0, want = 1;
    for (int d = 0; d < e->ndim; d++) want *= e->dim[d];
    for (int i = 0; i < e->pieces; i++) {
        int64_t n = 1;
        for (int d = 0; d < e->ndim; d++) n *= e->piece[i].size[d];
        have += n;
        for (int k = 0; n && k < i; k++)
            if (overlap(e, &e->piece[i], &e->piece[k])) return lc_fail(LC_EPARSE, "two of its blocks overlap");
    }
    return have == want ? LC_OK
                        : lc_fail(LC_EPARSE, "its blocks have %.0f of its %.0f elements", (double)have, (double)want);
}

static lc_status fill_tensor(parts *s, int32_t record, const lc_pickle_node *name, lc_file_entry *e) {
    enum { MOST = 4096 };
    const lc_pickle *p = &s->meta;
    int32_t size = lc_pickle_get(p, record, "size"), properties = lc_pickle_get(p, record, "properties");
    int32_t state = lc_pickle_is(p, properties, LC_PK_OBJECT) ? p->node[properties].state : -1;
    int32_t dtype =
        lc_pickle_is(p, state, LC_PK_TUPLE) ? lc_pickle_item_at(p, state, 0) : lc_pickle_get(p, properties, "dtype");
    if (!lc_pickle_is(p, size, LC_PK_TUPLE) || p->node[size].items.count > LC_TORCH_DIMS ||
        !lc_pickle_is(p, dtype, LC_PK_GLOBAL) || p->node[dtype].global.role != LC_PR_DTYPE)
        return lc_fail(LC_EPARSE, "its record has no size or dtype");
    const lc_torch_dtype *type = p->node[dtype].global.dtype;
    e->ndim = p->node[size].items.count;
    e->dim = lc_alloc(e->ndim ? (size_t)e->ndim : 1, sizeof *e->dim);
    if (!e->dim) return LC_ENOMEM;
    LC_TRY(numbers(p, size, e->ndim, e->dim));
    e->dtype_name = type->name;
    e->store = type->store;
    if (!lc_file_sizes(e->dim, e->ndim, 1, type->bytes, &e->bytes)) return lc_fail(LC_EPARSE, "its shape is too large");
    int first = first_block(s, name), last = first;
    while (last < s->blocks && compare_text(s->block[last].name, name) == 0) last++;
    if (last - first > MOST) return lc_fail(LC_EPARSE, "it has %d blocks", last - first);
    if (!(e->piece = lc_alloc((size_t)(last - first) + 1, sizeof *e->piece))) return LC_ENOMEM;
    for (int i = first; i < last; i++) {
        lc_torch t;
        part *from = NULL;
        LC_TRY(open_block(s, &s->block[i], &t, &from));
        lc_status status = fill_piece(s, &s->block[i], &t, from, e);
        lc_torch_close(&t);
        LC_TRY(status);
    }
    return check_cover(e);
}

/* ---- all of them
 * ----------------------------------------------------------------------------------------------------- */

static lc_status plain_value(parts *s, const lc_pickle_node *name) {
    int at = first_block(s, name);
    lc_torch t;
    part *from = NULL;
    if (at == s->blocks || compare_text(s->block[at].name, name) != 0) return LC_OK;
    LC_TRY(open_block(s, &s->block[at], &t, &from));
    lc_status status = lc_doc_build_key(&s->doc, (const char *)name->bytes.data, name->bytes.size);
    if (status == LC_OK) status = lc_torch_plain(&t.pickle, t.pickle.root, &s->doc, &s->steps);
    lc_torch_close(&t);
    return status;
}

static bool names_tensor(const lc_pickle *p, int32_t list, int32_t name) {
    char text[4096];
    if (!lc_pickle_is(p, name, LC_PK_STRING) || p->node[name].bytes.size >= sizeof text) return true;
    memcpy(text, p->node[name].bytes.data, p->node[name].bytes.size);
    text[p->node[name].bytes.size] = 0;
    int32_t record = lc_pickle_get(p, list, text);
    return lc_pickle_is(p, record, LC_PK_OBJECT) && strcmp(p->node[record].global.name, "TensorStorageMetadata") == 0;
}

/* Where the path of every tensor in the saved dict begins with the same wrapper, it is no part of the names. */
static size_t wrapper_bytes(const lc_pickle *p, int32_t list) {
    static const char *const known[] = {"model_state_dict", "state_dict", "model", "module"};
    int32_t data = lc_pickle_get(p, p->root, "planner_data"), first = -1;
    int look = 1000; /* values beside the tensors, which have other paths; each costs a search */
    if (!lc_pickle_is(p, data, LC_PK_DICT)) return 0;
    for (int32_t i = p->node[data].items.first; i >= 0; i = p->item[i].next) {
        int32_t name = p->item[i].value;
        i = p->item[i].next;
        int32_t path = p->item[i].value, head = lc_pickle_item_at(p, path, 0);
        bool nested =
            lc_pickle_is(p, path, LC_PK_TUPLE) && p->node[path].items.count >= 2 && lc_pickle_is(p, head, LC_PK_STRING);
        if (nested && (first < 0 || compare_text(&p->node[first], &p->node[head]) == 0) &&
            (first >= 0 || names_tensor(p, list, name)))
            first = head;
        else if (look-- == 0 || names_tensor(p, list, name))
            return 0;
    }
    for (size_t k = 0; k < sizeof known / sizeof *known; k++)
        if (lc_pickle_text_is(p, first, known[k])) return strlen(known[k]) + 1;
    return 0;
}

static lc_status add_tensor(parts *s, int32_t record, const lc_pickle_node *name) {
    lc_file_entry *e = &s->file->entry[s->file->count];
    const char *text = (const char *)name->bytes.data;
    size_t skip = name->bytes.size > s->prefix ? s->prefix : 0, bytes = name->bytes.size - skip;
    if (memchr(text, 0, name->bytes.size) || lc_utf8_invalid(text, name->bytes.size) >= 0)
        return lc_fail(LC_EPARSE, "a tensor's name that is not plain UTF-8");
    if (!(e->name = lc_alloc(bytes + 1, 1))) return LC_ENOMEM;
    memcpy(e->name, text + skip, bytes);
    s->file->count++;
    lc_status status = fill_tensor(s, record, name, e);
    return status == LC_OK ? LC_OK : lc_fail_in(status, "tensor '%.200s': ", e->name);
}

static lc_status read_all(parts *s) {
    const lc_pickle *p = &s->meta;
    int32_t list = lc_pickle_get(p, p->root, "state_dict_metadata");
    if (!lc_pickle_is(p, list, LC_PK_DICT)) return lc_fail(LC_EPARSE, "the metadata has no dict 'state_dict_metadata'");
    s->file->entry = lc_alloc((size_t)p->node[list].items.count / 2 + 1, sizeof *s->file->entry);
    if (!s->file->entry) return LC_ENOMEM;
    s->prefix = wrapper_bytes(p, list);
    LC_TRY(list_blocks(s));
    if (lc_doc_build_node(&s->doc, LC_DOC_OBJECT) < 0 || !lc_doc_build_open(&s->doc)) return s->doc.status;
    for (int32_t i = p->node[list].items.first; i >= 0; i = p->item[i].next) {
        int32_t key = p->item[i].value;
        i = p->item[i].next;
        int32_t record = p->item[i].value;
        if (!lc_pickle_is(p, key, LC_PK_STRING) || !lc_pickle_is(p, record, LC_PK_OBJECT))
            return lc_fail(LC_EPARSE, "an entry of 'state_dict_metadata' is not name -> record");
        const char *class = p->node[record].global.name;
        if (strcmp(class, "TensorStorageMetadata") == 0)
            LC_TRY(add_tensor(s, record, &p->node[key]));
        else if (strcmp(class, "BytesStorageMetadata") == 0)
            LC_TRY(plain_value(s, &p->node[key]));
    }
    lc_status status = lc_doc_build_close(&s->doc);
    return status == LC_EPARSE ? lc_fail(LC_EPARSE, "a name occurs twice in 'state_dict_metadata'") : status;
}

lc_status lc_torch_parts_parse(struct lc_file *f, lc_part_opener open, void *ctx) {
    parts s = {.file = f, .open = open, .ctx = ctx, .steps = 1 << 20};
    f->format = "torch";
    lc_status status = lc_pickle_read(&s.meta, f->data, f->bytes, LC_PICKLE_DISTRIBUTED);
    if (status != LC_OK) return lc_fail_in(status, ".metadata: ");
    status = lc_doc_build_start(&s.doc, 256);
    if (status == LC_OK) {
        status = read_all(&s);
        if (status == LC_OK)
            status = lc_doc_build_end(&s.doc, &f->extra);
        else
            lc_doc_build_drop(&s.doc);
    }
    for (int i = 0; i < s.count; i++) free(s.part[i].name);
    free(s.part);
    free(s.block);
    lc_pickle_free(&s.meta);
    return status;
}
