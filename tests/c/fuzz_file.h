/* fuzz_file.h: what the fuzzers of tensor files share: opens 8 given bytes and the input as a file, and reads all that
 * is in it. The memory is an exact allocation, so that a sanitizer sees one byte too many. */
#ifndef FUZZ_FILE_H
#define FUZZ_FILE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "io/file.h"
#include "io/quant.h"
#include "io/save.h"

/* Every element of a tensor that lies in pieces must be reached, once, inside the files. */
static lc_status count_run(void *ctx, const lc_file_run *run) {
    volatile uint8_t last = run->data[0];
    *(int64_t *)ctx += run->count;
    (void)last;
    return *(int64_t *)ctx < 1 << 20 ? LC_OK : LC_EARG;
}

static void read_pieces(const lc_file *f, const lc_file_entry *e) {
    static uint8_t out[1 << 16];
    int64_t n = 0, all = 1;
    for (int d = 0; d < e->ndim; d++) all *= e->dim[d];
    if (lc_file_runs(e, count_run, &n) == LC_OK && n != all) abort();
    if (all > 0 && all * 8 <= (int64_t)sizeof out && e->store >= 0) lc_file_load(f, e, LC_F64, out);
}

static void read_tensor(const lc_file *f, int i) {
    enum { MOST = 1 << 16 };
    static double out[MOST];
    const lc_file_entry *e = &f->entry[i];
    int64_t n = 1;
    if (lc_file_find(f, e->name) != i) abort();
    if (e->pieces) {
        read_pieces(f, e);
        return;
    }
    if (e->offset > f->bytes || e->bytes > f->bytes - e->offset) abort();
    for (int d = 0; d < e->ndim; d++) {
        n *= e->dim[d];
        lc_file_dim(f, i, d);
    }
    if (n > MOST) n = MOST;
    for (int to = LC_F32; to <= LC_U8; to++)
        if (lc_convertible(e->store, to)) lc_convert(e->store, f->data + e->offset, to, out, n);
}

static void read_meta(const lc_file *f, int i) {
    volatile char last = 0;
    int32_t length, size = lc_file_meta_size(f, i);
    for (int32_t k = -1; k < size; k += k < 100 ? 1 : 997) {
        const char *s = lc_file_meta_string(f, i, k, &length);
        if (s && length > 0) last = s[length - 1];
        lc_file_meta_number(f, i, k);
    }
    (void)last;
}

static void read_file(const lc_file *f) {
    for (int i = 0; i < lc_file_count(f); i++) read_tensor(f, i);
    for (int i = 0; i < lc_file_meta_count(f); i++) read_meta(f, i);
}

/* Of any bytes. */
static inline int fuzz_bytes(const uint8_t *data, size_t size) {
    uint8_t *copy = malloc(size ? size : 1);
    lc_file *f;
    if (!copy) return 0;
    if (size) memcpy(copy, data, size);
    if (lc_file_open_memory(copy, size, "input", &f) == LC_OK) {
        read_file(f);
        lc_file_close(f);
    }
    free(copy);
    return 0;
}

static inline int fuzz_file(const uint8_t head[8], const uint8_t *data, size_t size) {
    uint8_t *copy = malloc(size + 8);
    lc_file *f;
    if (!copy) return 0;
    memcpy(copy, head, 8);
    if (size) memcpy(copy + 8, data, size);
    if (lc_file_open_memory(copy, size + 8, "input", &f) == LC_OK) {
        read_file(f);
        lc_file_close(f);
    }
    free(copy);
    return 0;
}

#endif
