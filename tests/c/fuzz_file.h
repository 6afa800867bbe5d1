/* fuzz_file.h: what the fuzzers of tensor files share: opens 8 given bytes and the input as a file, and reads all that
 * is in it. The memory is an exact allocation, so that a sanitizer sees one byte too many. */
#ifndef FUZZ_FILE_H
#define FUZZ_FILE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "io/file.h"
#include "io/quant.h"

static void read_tensor(const lc_file *f, int i) {
    enum { MOST = 1 << 16 };
    static double out[MOST];
    const lc_file_entry *e = &f->entry[i];
    int64_t n = 1;
    if (lc_file_find(f, e->name) != i || e->offset > f->bytes || e->bytes > f->bytes - e->offset) abort();
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

static int fuzz_file(const uint8_t head[8], const uint8_t *data, size_t size) {
    uint8_t *copy = malloc(size + 8);
    lc_file *f;
    if (!copy) return 0;
    memcpy(copy, head, 8);
    if (size) memcpy(copy + 8, data, size);
    if (lc_file_open_memory(copy, size + 8, "input", &f) == LC_OK) {
        for (int i = 0; i < lc_file_count(f); i++) read_tensor(f, i);
        for (int i = 0; i < lc_file_meta_count(f); i++) read_meta(f, i);
        lc_file_close(f);
    }
    free(copy);
    return 0;
}

#endif
