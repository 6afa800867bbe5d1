/* fuzz_records.c: the readers of records must take any bytes: records that can be walked, or an error, in bounded memory. The
 * first byte picks the format; text may be packed with gzip or Zstandard. */
#include <stdint.h>
#include <stdlib.h>

#include "io/records.h"

static int32_t walk(const lc_doc *d, int32_t node) {
    int32_t seen = 1, length;
    lc_doc_string(d, node, &length);
    for (int32_t i = lc_doc_first(d, node); i >= 0; i = lc_doc_next(d, i)) {
        const char *key = lc_doc_key(d, i, &length);
        if (key[length] != 0) abort();
        seen += walk(d, i);
    }
    return seen;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char *const formats[] = {"parquet", "jsonl", "json", "csv", "tsv", "text"};
    lc_records *r;
    lc_doc *d;
    if (size == 0) return 0;
    if (lc_records_open_memory(data + 1, size - 1, "input", formats[data[0] % 6], &r) != LC_OK) return 0;
    for (int n = 0; n < 200 && lc_records_next(r, &d) == LC_OK && d; n++) { /* a few bytes of runs stand for many rows */
        if (walk(d, 0) != d->count) abort();
        lc_doc_free(d);
    }
    lc_records_close(r);
    return 0;
}
