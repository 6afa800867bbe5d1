/* save.h: reading a stored tensor into memory, which the binding and the writers share. */
#ifndef LC_SAVE_H
#define LC_SAVE_H

#include "file.h"
#include "system.h"

/* The tensor's elements, row-major, as `dtype`, into `out`, by all threads. An entry that is LC_STORE_UNKNOWN cannot be. */
lc_status lc_file_load(const struct lc_file *f, const lc_file_entry *e, int dtype, uint8_t *out);

#endif
