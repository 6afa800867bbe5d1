/* tensor.c: tensor headers, the handles that name them, shapes and views, copies to and from the host. Headers live in chunks
 * that never move or go: a stale handle can always be looked at, and its generation tells. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"

enum { CHUNK = 1024, MAX_CHUNKS = 1 << 16 };
static lc_tensor *chunks[MAX_CHUNKS];
static uint32_t chunk_count;
static lc_tensor *free_headers; /* linked by next */

/* ---- headers and handles --------------------------------------------------------------------------------------------- */
static lc_status grow_headers(void) {
    if (chunk_count == MAX_CHUNKS) return lc_fail(LC_ENOMEM, "more than %d tensors alive", CHUNK * MAX_CHUNKS);
    lc_tensor *c = lc_alloc(CHUNK, sizeof *c);
    if (!c) return LC_ENOMEM;
    for (int i = CHUNK - 1; i >= 0; i--) {
        c[i].slot = chunk_count * CHUNK + (uint32_t)i;
        c[i].gen = 1;
        c[i].next = free_headers;
        free_headers = &c[i];
    }
    chunks[chunk_count++] = c;
    return LC_OK;
}

uint32_t lc_header_count(void) { return chunk_count * CHUNK; }
const lc_tensor *lc_header_at(uint32_t i) { return &chunks[i / CHUNK][i % CHUNK]; }

lc_tensor *lc_header_new(void) {
    if (!free_headers && grow_headers() != LC_OK) return NULL;
    lc_tensor *t = free_headers;
    free_headers = t->next;
    t->refs = 1;
    t->has_handle = t->requires_grad = 0;
    t->storage = NULL;
    t->node = NULL;
    t->grad = t->prev = t->next = NULL;
    t->name = NULL;
    t->scope = 0;
    t->offset = 0;
    return t;
}

void lc_release(lc_tensor *t) {
    if (!t || --t->refs > 0) return;
    if (t->node) lc_node_release(t->node);
    if (t->grad) lc_release(t->grad);
    if (t->storage) lc_storage_release(t->storage);
    free(t->name);
    t->name = NULL;
    t->node = NULL;
    t->storage = NULL;
    t->grad = NULL;
    t->next = free_headers;
    free_headers = t;
}

lc_status lc_stale(const lc_handle *h) {
    return lc_fail(LC_ESTALE, h && h->_gen ? "this tensor was released when its scope ended; return it from the scope or lc.keep it"
                                           : "no tensor here");
}

lc_tensor *lc_get(const lc_handle *h) {
    if (h && h->_gen && h->_slot < chunk_count * CHUNK) {
        lc_tensor *t = &chunks[h->_slot / CHUNK][h->_slot % CHUNK];
        if (t->gen == h->_gen && t->has_handle) return t;
    }
    lc_stale(h);
    return NULL;
}

void lc_give_handle(lc_tensor *t, lc_handle *out) {
    if (t->has_handle) { /* one handle a header: a second one names a view of it */
        lc_tensor *v = lc_tensor_view(t);
        if (v) {
            v->node = t->node;
            v->node_out = t->node_out;
            v->requires_grad = t->node ? 1 : 0;
            if (v->node) v->node->refs++;
        }
        lc_release(t);
        t = v;
    }
    t->has_handle = 1;
    out->_slot = t->slot;
    out->_gen = t->gen;
    lc_scope_adopt(t);
}

void lc_drop(lc_handle *h) {
    if (!h->_gen || h->_slot >= chunk_count * CHUNK) return;
    lc_tensor *t = &chunks[h->_slot / CHUNK][h->_slot % CHUNK];
    if (t->gen != h->_gen || !t->has_handle) return;
    lc_scope_forget(t);
    t->has_handle = 0;
    t->gen++;
    lc_release(t);
}

int lc_alive(const lc_handle *h) {
    if (!h->_gen || h->_slot >= chunk_count * CHUNK) return 0;
    const lc_tensor *t = &chunks[h->_slot / CHUNK][h->_slot % CHUNK];
    return t->gen == h->_gen && t->has_handle;
}

/* ---- shapes ---------------------------------------------------------------------------------------------------------- */
void lc_contiguous_strides(int ndim, const int32_t *dims, int64_t *stride) {
    int64_t n = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        stride[i] = n;
        n *= dims[i];
    }
}

int64_t lc_tensor_numel(const lc_tensor *t) {
    int64_t n = 1;
    for (int i = 0; i < t->ndim; i++) n *= t->dim[i];
    return n;
}

static size_t dtype_bytes(int dtype, int64_t n) {
    const lc_dtype_trait *tr = lc_dtype_traits(dtype);
    return (size_t)((n + tr->block - 1) / tr->block) * (size_t)tr->bytes;
}

size_t lc_tensor_bytes(const lc_tensor *t) { return dtype_bytes(t->dtype, lc_tensor_numel(t)); }

bool lc_tensor_contiguous(const lc_tensor *t) {
    int64_t n = 1;
    for (int i = t->ndim - 1; i >= 0; i--) {
        if (t->dim[i] != 1 && t->stride[i] != n) return t->dim[i] == 0 || lc_tensor_numel(t) == 0;
        n *= t->dim[i];
    }
    return true;
}

bool lc_same_shape(const lc_tensor *a, const lc_tensor *b) {
    return a->ndim == b->ndim && memcmp(a->dim, b->dim, (size_t)a->ndim * sizeof a->dim[0]) == 0;
}

void *lc_tensor_ptr(const lc_tensor *t) {
    const lc_dtype_trait *tr = lc_dtype_traits(t->dtype);
    return (char *)t->storage->ptr + t->offset / tr->block * tr->bytes;
}

void lc_tensor_describe(const lc_tensor *t, char *out, size_t size) {
    if (!t) {
        snprintf(out, size, "absent");
        return;
    }
    int n = snprintf(out, size, "%s[", lc_dtype_traits(t->dtype)->name);
    for (int i = 0; i < t->ndim && n < (int)size; i++) n += snprintf(out + n, size - (size_t)n, i ? " x %d" : "%d", t->dim[i]);
    if (n < (int)size) n += snprintf(out + n, size - (size_t)n, "] %s", lc_device_get(t->device)->name);
    if (t->name && n < (int)size) snprintf(out + n, size - (size_t)n, " (%s)", t->name);
}

/* ---- making tensors -------------------------------------------------------------------------------------------------- */
static lc_status check_dims(int dtype, int ndim, const int32_t *dims, int64_t *numel) {
    if (!lc_dtype_traits(dtype)) return lc_fail(LC_EDTYPE, "unknown dtype %d", dtype);
    if (ndim < 0 || ndim > LC_MAX_DIMS) return lc_fail(LC_ESHAPE, "%d dims; at most %d are possible", ndim, LC_MAX_DIMS);
    int64_t n = 1;
    for (int i = 0; i < ndim; i++) {
        if (dims[i] < 0) return lc_fail(LC_ESHAPE, "dim %d is negative: %d", i + 1, dims[i]);
        if (__builtin_mul_overflow(n, dims[i], &n) || n > (int64_t)1 << 46) return lc_fail(LC_ESHAPE, "too many elements");
    }
    int block = lc_dtype_traits(dtype)->block;
    if (block > 1 && (ndim < 1 || dims[ndim - 1] % block))
        return lc_fail(LC_ESHAPE, "the last dim of a %s tensor must be a multiple of %d", lc_dtype_traits(dtype)->name, block);
    *numel = n;
    return LC_OK;
}

lc_status lc_tensor_new(int dtype, int device, int ndim, const int32_t *dims, lc_tensor **out) {
    int64_t numel;
    LC_TRY(check_dims(dtype, ndim, dims, &numel));
    lc_tensor *t = lc_header_new();
    if (!t) return LC_ENOMEM;
    lc_status rc = lc_storage_new(device, dtype_bytes(dtype, numel), &t->storage);
    if (rc != LC_OK) {
        lc_release(t);
        return rc;
    }
    t->dtype = (uint8_t)dtype;
    t->device = device;
    t->ndim = (uint8_t)ndim;
    for (int i = 0; i < ndim; i++) t->dim[i] = dims[i];
    lc_contiguous_strides(ndim, dims, t->stride);
    *out = t;
    return LC_OK;
}

lc_tensor *lc_tensor_view(lc_tensor *of) {
    lc_tensor *t = lc_header_new();
    if (!t) return NULL;
    t->dtype = of->dtype;
    t->ndim = of->ndim;
    t->device = of->device;
    memcpy(t->dim, of->dim, sizeof t->dim);
    memcpy(t->stride, of->stride, sizeof t->stride);
    t->offset = of->offset;
    t->storage = of->storage;
    t->storage->refs++;
    return t;
}

lc_status lc_tensor_of_storage(lc_storage *s, size_t byte_offset, int dtype, int ndim, const int32_t *dims, lc_handle *out) {
    int64_t numel;
    LC_TRY(check_dims(dtype, ndim, dims, &numel));
    const lc_dtype_trait *tr = lc_dtype_traits(dtype);
    size_t bytes = dtype_bytes(dtype, numel);
    if (byte_offset > s->bytes || bytes > s->bytes - byte_offset)
        return lc_fail(LC_EARG, "a tensor of %zu bytes at %zu does not fit into %zu bytes", bytes, byte_offset, s->bytes);
    if (byte_offset % (size_t)tr->bytes) return lc_fail(LC_EARG, "offset %zu is not a multiple of the element size", byte_offset);
    lc_tensor *t = lc_header_new();
    if (!t) return LC_ENOMEM;
    t->dtype = (uint8_t)dtype;
    t->device = s->device;
    t->ndim = (uint8_t)ndim;
    for (int i = 0; i < ndim; i++) t->dim[i] = dims[i];
    lc_contiguous_strides(ndim, dims, t->stride);
    t->offset = (int64_t)(byte_offset / (size_t)tr->bytes) * tr->block;
    t->storage = s;
    s->refs++;
    lc_give_handle(t, out);
    return LC_OK;
}

/* Zeros, where they are: nothing is copied to a device. */
static lc_status fill_there(lc_tensor *t) {
    lc_frame c;
    lc_frame_init(&c, LC_OP_fill_);
    c.x[0] = t;
    bool old = lc_grad_enabled;
    lc_grad_enabled = false;
    lc_status rc = lc_run(&c);
    lc_grad_enabled = old;
    return rc;
}

static lc_status upload(lc_tensor *t, const void *data) {
    size_t bytes = lc_tensor_bytes(t);
    const lc_device *d = lc_device_get(t->device);
    if (!data && d->backend && bytes && !lc_dtype_is_quant(t->dtype) && lc_device_kernel(t->device, LC_OP_fill_, false)->run) {
        lc_status rc = fill_there(t);
        if (rc != LC_ENOKERNEL) return rc;
    }
    if (!d->backend) {
        if (data) memcpy(lc_tensor_ptr(t), data, bytes);
        else memset(lc_tensor_ptr(t), 0, bytes);
        return LC_OK;
    }
    void *zeros = data || !bytes ? NULL : lc_alloc(bytes, 1);
    if (!data && bytes && !zeros) return LC_ENOMEM;
    int rc = bytes ? d->backend->upload(d->index, lc_tensor_ptr(t), data ? data : zeros, bytes) : 0;
    free(zeros);
    return rc ? lc_fail(LC_EDEVICE, "%s: %s", d->name, d->backend->last_error()) : LC_OK;
}

int lc_from_host(lc_handle *out, int dtype, int device, int ndim, const int32_t *dims, const void *data) {
    if (device < 0 || device >= lc_device_count()) return lc_fail(LC_EDEVICE, "no device %d", device);
    lc_tensor *t;
    lc_status rc = lc_tensor_new(dtype, device, ndim, dims, &t);
    if (rc == LC_ENOMEM) {
        char holders[1024];
        lc_memory_holders(device, holders, sizeof holders);
        return lc_fail(rc, "%s\n  held there:%s", lc_error_message(), holders);
    }
    if (rc != LC_OK) return rc;
    rc = upload(t, data);
    if (rc != LC_OK) lc_release(t);
    else lc_give_handle(t, out);
    return rc;
}

int lc_new(lc_handle *out, int dtype, int device, int ndim, const int32_t *dims) {
    return lc_from_host(out, dtype, device, ndim, dims, NULL);
}

/* ---- host copies ----------------------------------------------------------------------------------------------------- */
static lc_status download(lc_tensor *t, void *data, size_t bytes) {
    const lc_device *d = lc_device_get(t->device);
    if (!d->backend) memcpy(data, lc_tensor_ptr(t), bytes);
    else if (bytes && d->backend->download(d->index, data, lc_tensor_ptr(t), bytes))
        return lc_fail(LC_EDEVICE, "%s: %s", d->name, d->backend->last_error());
    return LC_OK;
}

int lc_to_host(const lc_handle *h, void *data, double bytes) {
    lc_tensor *t = lc_get(h);
    if (!t) return LC_ESTALE;
    if ((double)lc_tensor_bytes(t) != bytes) return lc_fail(LC_EARG, "%T holds %zu bytes, not %.0f", t, lc_tensor_bytes(t), bytes);
    if (lc_tensor_contiguous(t)) return download(t, data, lc_tensor_bytes(t));
    lc_frame c;
    lc_frame_init(&c, LC_OP_clone);
    c.x[0] = t;
    bool old = lc_grad_enabled;
    lc_grad_enabled = false;
    lc_status rc = lc_run(&c);
    lc_grad_enabled = old;
    if (rc != LC_OK) return rc;
    rc = download(c.y[0], data, lc_tensor_bytes(c.y[0]));
    lc_release(c.y[0]);
    return rc;
}

static double half_value(uint16_t h) {
    int e = h >> 10 & 31, m = h & 1023;
    double v = e == 31 ? (m ? __builtin_nan("") : __builtin_inf()) : e ? __builtin_ldexp(1024 + m, e - 25) : __builtin_ldexp(m, -24);
    return h & 0x8000 ? -v : v;
}

int lc_item(const lc_handle *h, double *out) {
    lc_tensor *t = lc_get(h);
    if (!t) return LC_ESTALE;
    if (lc_tensor_numel(t) != 1 || lc_dtype_is_quant(t->dtype)) return lc_fail(LC_ESHAPE, "item() wants one element, not %T", t);
    union { float f; double d; int32_t i; int64_t l; uint16_t h; uint8_t b; uint32_t u; } v = {.l = 0};
    LC_TRY(download(t, &v, (size_t)lc_dtype_traits(t->dtype)->bytes));
    switch (t->dtype) {
    case LC_F32: *out = (double)v.f; break;
    case LC_F64: *out = v.d; break;
    case LC_I32: *out = v.i; break;
    case LC_I64: *out = (double)v.l; break;
    case LC_U8: *out = v.b; break;
    case LC_F16: *out = half_value(v.h); break;
    default: v.u = (uint32_t)v.h << 16; *out = (double)v.f; break;
    }
    return LC_OK;
}

lc_status lc_host_span(const lc_handle *h, void **ptr, size_t *bytes) {
    lc_tensor *t = lc_get(h);
    if (!t) return LC_ESTALE;
    if (t->device != 0 || !lc_tensor_contiguous(t)) return lc_fail(LC_EARG, "a contiguous tensor on the CPU is wanted, not %T", t);
    *ptr = lc_tensor_ptr(t);
    *bytes = lc_tensor_bytes(t);
    return LC_OK;
}

/* ---- what Lua asks of a tensor --------------------------------------------------------------------------------------- */
int lc_ndim(const lc_handle *h) { lc_tensor *t = lc_get(h); return t ? t->ndim : -1; }
int32_t lc_dim(const lc_handle *h, int d) { lc_tensor *t = lc_get(h); return t && d >= 0 && d < t->ndim ? t->dim[d] : -1; }
double lc_stride(const lc_handle *h, int d) { lc_tensor *t = lc_get(h); return t && d >= 0 && d < t->ndim ? (double)t->stride[d] : -1; }
int lc_dtype_of(const lc_handle *h) { lc_tensor *t = lc_get(h); return t ? t->dtype : -1; }
int lc_device_of(const lc_handle *h) { lc_tensor *t = lc_get(h); return t ? t->device : -1; }
double lc_numel(const lc_handle *h) { lc_tensor *t = lc_get(h); return t ? (double)lc_tensor_numel(t) : -1; }
double lc_storage_bytes(const lc_handle *h) { lc_tensor *t = lc_get(h); return t ? (double)t->storage->bytes : -1; }
double lc_storage_id(const lc_handle *h) { lc_tensor *t = lc_get(h); return t ? (double)((uintptr_t)t->storage >> 3) : -1; }
int lc_is_contiguous(const lc_handle *h) { lc_tensor *t = lc_get(h); return t ? lc_tensor_contiguous(t) : 0; }

void *lc_data(const lc_handle *h) {
    lc_tensor *t = lc_get(h);
    return t && t->device == 0 ? lc_tensor_ptr(t) : NULL;
}

int lc_set_name(const lc_handle *h, const char *name) {
    lc_tensor *t = lc_get(h);
    if (!t) return LC_ESTALE;
    char *copy = name ? lc_strdup(name) : NULL;
    if (name && !copy) return LC_ENOMEM;
    free(t->name);
    t->name = copy;
    return LC_OK;
}

const char *lc_name(const lc_handle *h) {
    lc_tensor *t = lc_get(h);
    return t && t->name ? t->name : "";
}

int lc_alias(lc_handle *out, const lc_handle *h) {
    lc_tensor *t = lc_get(h);
    if (!t) return LC_ESTALE;
    lc_tensor *v = lc_tensor_view(t);
    if (!v) return LC_ENOMEM;
    lc_give_handle(v, out);
    return LC_OK;
}

int lc_set_data(const lc_handle *h, const lc_handle *from) {
    lc_tensor *t = lc_get(h), *f = lc_get(from);
    if (!t || !f) return LC_ESTALE;
    if (!lc_same_shape(t, f) || t->dtype != f->dtype) return lc_fail(LC_ESHAPE, "data of another shape or dtype: %T from %T", t, f);
    f->storage->refs++;
    lc_storage_release(t->storage);
    t->storage = f->storage;
    t->device = f->device;
    t->offset = f->offset;
    memcpy(t->stride, f->stride, sizeof t->stride);
    return LC_OK;
}

double lc_dtype_bytes(int dtype, double n) { return lc_dtype_traits(dtype) ? (double)dtype_bytes(dtype, (int64_t)n) : -1; }

const char *lc_dtype_name(int dtype) {
    const lc_dtype_trait *tr = lc_dtype_traits(dtype);
    return tr ? tr->name : "unknown";
}

int lc_dtype_id(const char *name) {
    static const struct { const char *name; int id; } other[] = {
        {"float", LC_F32}, {"half", LC_F16}, {"double", LC_F64}, {"int", LC_I32}, {"long", LC_I64}, {"bool", LC_U8}, {"BF16", LC_BF16},
        {"F32", LC_F32}, {"F16", LC_F16}, {"F64", LC_F64}, {"I32", LC_I32}, {"I64", LC_I64}, {"U8", LC_U8}, {"BOOL", LC_U8}};
    for (int i = 0; i < LC_DTYPE_COUNT; i++)
        if (!strcmp(name, lc_dtype_traits(i)->name) || !strcmp(name, lc_dtype_traits(i)->long_name)) return i;
    for (size_t i = 0; i < sizeof other / sizeof *other; i++)
        if (!strcmp(name, other[i].name)) return other[i].id;
    return -1;
}
