/* fuzz_yaml.c: the YAML reader must take any bytes: a tree that can be walked, or an error. */
#include <stdint.h>
#include <stdlib.h>

#include "io/doc.h"

static int32_t walk(const lc_doc *d, int32_t node) {
    int32_t seen = 1, children = 0, length;
    lc_doc_string(d, node, &length);
    for (int32_t i = lc_doc_first(d, node); i >= 0; i = lc_doc_next(d, i)) {
        const char *key = lc_doc_key(d, i, &length);
        if (key[length] != 0) abort();
        seen += walk(d, i);
        children++;
    }
    if (children != lc_doc_size(d, node)) abort();
    return seen;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    lc_doc *d;
    if (lc_doc_parse(&d, "yaml", "input", (const char *)data, (double)size) != LC_OK) return 0;
    if (walk(d, 0) != d->count) abort();
    lc_doc_free(d);
    return 0;
}
