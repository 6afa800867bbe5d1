/* library.h: libraries that are opened when first needed, so that neither the build nor the program depends on them:
 * libcurl, and the compressors of parquet pages. Their few prototypes stand where they are called. */
#ifndef LC_LIBRARY_H
#define LC_LIBRARY_H

#include "../core/base.h"

typedef struct lc_symbol {
    const char *name;
    void *to; /* address of a function pointer */
} lc_symbol;

/* Opens the first of `names` (ended by NULL) that is there and fills all symbols (ended by a NULL name). LC_EIO says which
 * library is missing, what for, and `package`, its name in Debian. Call again after a success only with the same symbols. */
lc_status lc_library_open(const char *const *names, const lc_symbol *symbols, const char *use, const char *package);

#endif
