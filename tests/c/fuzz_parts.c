/* fuzz_parts.c: the reader of distributed checkpoints must take any bytes. Two bytes say how long the metadata is; what follows it
 * stands for every file that it names. */
#include "fuzz_file.h"

typedef struct rest {
    const uint8_t *data;
    size_t size;
} rest;

static lc_status open_rest(void *ctx, const char *name, const uint8_t **data, size_t *bytes, lc_mapping **map) {
    const rest *r = ctx;
    if (strchr(name, '/')) return lc_fail(LC_EPARSE, "a folder");
    *data = r->data;
    *bytes = r->size;
    *map = NULL;
    return LC_OK;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 2) return 0;
    size_t n = (size_t)data[0] | (size_t)data[1] << 8;
    if (n > size - 2) n = size - 2;
    uint8_t *meta = malloc(n + 1), *other = malloc(size - 2 - n + 1);
    lc_file *f = calloc(1, sizeof *f);
    if (meta && other && f) {
        memcpy(meta, data + 2, n);
        memcpy(other, data + 2 + n, size - 2 - n);
        f->data = meta;
        f->bytes = n;
        if (lc_torch_parts_parse(f, open_rest, &(rest){other, size - 2 - n}) == LC_OK && lc_file_check_names(f) == LC_OK) read_file(f);
    }
    lc_file_close(f);
    free(meta);
    free(other);
    return 0;
}
