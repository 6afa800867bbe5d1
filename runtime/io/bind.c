/* bind.c: where files meet tensors: views of a mapping, and reading with conversion into a tensor. It and save.c are
 * the only files of runtime/io that know the core. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../core/core.h"
#include "file.h"
#include "quant.h"
#include "save.h"

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

/* A tensor that is no single piece of a file, brought together. */
static lc_status gathered(const lc_file *f, const lc_file_entry *e, const int32_t *dims, lc_handle *out) {
    uint8_t *copy = malloc((size_t)e->bytes + 1);
    if (!copy) return lc_fail(LC_ENOMEM, "no memory for tensor '%s' (%.0f bytes)", e->name, (double)e->bytes);
    lc_status status = lc_file_load(f, e, e->store, copy);
    if (status == LC_OK) return tensor_over(copy, (size_t)e->bytes, free, copy, e->store, e->ndim, dims, out);
    free(copy);
    return status;
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
    if (!e->pieces) return view_of_mapping(f->map, e->offset, e->bytes, e->store, e->ndim, dims, out);
    const lc_file_piece *p = e->piece;
    if (e->pieces > 1 || !lc_piece_is_whole(e, 0)) return gathered(f, e, dims, out);
    return view_of_mapping(p->map, (uint64_t)(p->data - p->map->data), e->bytes, e->store, e->ndim, dims, out);
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
static void forget_pages(const lc_mapping *map, const uint8_t *begin, const uint8_t *end) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    if (!map || map->refs > 1) return;
    uintptr_t first = (uintptr_t)begin / page * page;
    if ((uintptr_t)end > first) madvise((void *)first, (uintptr_t)end - first, MADV_DONTNEED);
}

enum { READ_UNIT = 4096, READ_PIECE = 1 << 21 }; /* elements; multiples of every block length */

typedef struct read_job {
    const uint8_t *in;
    int store, dtype;
    uint8_t *out;
    int64_t step;  /* elements of the file from one to the next */
    int64_t count; /* elements of this piece */
    int failed;
} read_job;

static uint64_t bytes_of(int store, int64_t elements) {
    return (uint64_t)(elements / lc_store_block(store)) * (uint64_t)lc_store_block_bytes(store);
}

/* Elements that do not stand side by side are brought together first. */
static lc_status convert_steps(const read_job *j, int64_t from, int64_t n) {
    uint8_t packed[1024 * 8];
    size_t item = (size_t)lc_store_block_bytes(j->store);
    for (int64_t done = 0; done < n; done += 1024) {
        int64_t now = n - done < 1024 ? n - done : 1024;
        for (int64_t i = 0; i < now; i++)
            memcpy(packed + (size_t)i * item, j->in + (from + done + i) * j->step * (int64_t)item, item);
        LC_TRY(lc_convert(j->store, packed, j->dtype, j->out + bytes_of(j->dtype, from + done), now));
    }
    return LC_OK;
}

static void read_units(void *ctx, int64_t begin, int64_t end, int thread) {
    read_job *j = ctx;
    int64_t from = begin * READ_UNIT, n = (end - begin) * READ_UNIT;
    (void)thread;
    if (n > j->count - from) n = j->count - from;
    lc_status status = j->step == 1 ? lc_convert(j->store, j->in + bytes_of(j->store, from), j->dtype,
                                                 j->out + bytes_of(j->dtype, from), n)
                                    : convert_steps(j, from, n);
    if (status != LC_OK) __atomic_store_n(&j->failed, 1, __ATOMIC_RELAXED);
}

/* One run, by all threads where it is long. */
static lc_status read_run(read_job job, int64_t n, const lc_mapping *map) {
    for (int64_t first = 0; first < n; first += READ_PIECE) {
        job.count = n - first < READ_PIECE ? n - first : READ_PIECE;
        if (lc_interrupt) return lc_fail(LC_EINTR, "interrupted");
        if (job.count <= READ_UNIT)
            read_units(&job, 0, 1, 0);
        else
            lc_parallel((job.count + READ_UNIT - 1) / READ_UNIT, 16, read_units, &job);
        if (job.failed) return lc_fail(LC_EARG, "an integer does not fit in %s", lc_dtype_name(job.dtype));
        const uint8_t *next = job.in + bytes_of(job.store, job.count) * (uint64_t)job.step;
        if (job.step == 1 && n >= READ_UNIT) forget_pages(map, job.in, next);
        job.in = next;
        job.out += bytes_of(job.dtype, job.count);
    }
    return LC_OK;
}

typedef struct run_target {
    const lc_file_entry *entry;
    int dtype;
    uint8_t *out;
} run_target;

static lc_status load_run(void *ctx, const lc_file_run *run) {
    const run_target *t = ctx;
    read_job job = {.in = run->data,
                    .store = t->entry->store,
                    .dtype = t->dtype,
                    .step = run->step,
                    .out = t->out + bytes_of(t->dtype, run->at)};
    return read_run(job, run->count, run->piece->map);
}

lc_status lc_file_load(const lc_file *f, const lc_file_entry *e, int dtype, uint8_t *out) {
    int64_t n = 1;
    for (int d = 0; d < e->ndim; d++) n *= e->dim[d]; /* checked at opening */
    if (e->pieces) return lc_file_runs(e, load_run, &(run_target){e, dtype, out});
    read_job job = {.in = f->data + e->offset, .store = e->store, .dtype = dtype, .step = 1, .out = out};
    return read_run(job, n, f->map);
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
    lc_status status = lc_file_load(f, e, dtype, out);
    return status == LC_OK ? LC_OK : lc_fail_in(status, "tensor '%s': ", e->name);
}
