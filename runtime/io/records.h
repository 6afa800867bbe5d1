/* records.h: what the readers of records share: one record at a time as a document. */
#ifndef LC_RECORDS_H
#define LC_RECORDS_H

#include "doc.h"

/* For fuzzers: as lc_records_open, of memory that outlives it. */
lc_status lc_records_open_memory(const void *data, size_t bytes, const char *name, const char *format, lc_records **out);

/* parquet.c. columns: names of top-level columns, each ended by a line break; NULL: all. The memory outlives the reader. */
typedef struct lc_parquet lc_parquet;
lc_status lc_parquet_open(const uint8_t *data, size_t bytes, const char *name, const char *columns, lc_parquet **out);
lc_status lc_parquet_next(lc_parquet *p, lc_doc **record); /* *record NULL: the end */
double lc_parquet_rows(const lc_parquet *p);
void lc_parquet_close(lc_parquet *p);

#endif
