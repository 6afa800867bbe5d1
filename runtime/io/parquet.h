/* parquet.h: what the files of the parquet reader share: the schema, columns and pages (after the Parquet format's
 * parquet.thrift and Encodings.md, versions up to 2.11). parquet_meta.c reads the footer, parquet_page.c pages and levels,
 * parquet_values.c the encodings of values, parquet.c puts records together. */
#ifndef LC_PARQUET_H
#define LC_PARQUET_H

#include "doc_build.h"

/* ---- thrift's compact protocol */

typedef struct thrift_in {
    const uint8_t *at, *end;
    int depth;
    bool bad; /* something was cut short or not of its kind; all further reads give 0 */
} thrift_in;

enum { THRIFT_STOP, THRIFT_TRUE, THRIFT_FALSE, THRIFT_BYTE, THRIFT_I16, THRIFT_I32, THRIFT_I64, THRIFT_DOUBLE, THRIFT_BINARY,
       THRIFT_LIST, THRIFT_SET, THRIFT_MAP, THRIFT_STRUCT };

uint64_t lc_thrift_varint(thrift_in *t);
int64_t lc_thrift_int(thrift_in *t);                            /* zigzag */
bool lc_thrift_field(thrift_in *t, int *id, int *type);         /* the next field of a struct; *id 0 before the first */
size_t lc_thrift_list(thrift_in *t, int *type);                 /* how many elements follow: at most one a byte */
const uint8_t *lc_thrift_binary(thrift_in *t, size_t *length);
void lc_thrift_skip(thrift_in *t, int type);

/* ---- schema */

typedef enum { PQ_BOOLEAN, PQ_INT32, PQ_INT64, PQ_INT96, PQ_FLOAT, PQ_DOUBLE, PQ_BYTES, PQ_FIXED } pq_type;
typedef enum { PQ_REQUIRED, PQ_OPTIONAL, PQ_REPEATED } pq_repetition;
typedef enum { PQ_GROUP, PQ_LEAF, PQ_LIST, PQ_MAP } pq_kind;
typedef enum { PQ_PLAIN_NUMBER, PQ_UNSIGNED, PQ_DECIMAL, PQ_HALF, PQ_TEXT, PQ_BINARY } pq_meaning;

typedef struct pq_node {
    const char *name; /* in the file, name_length bytes, UTF-8 */
    size_t name_length;
    uint8_t kind, repetition, wanted;
    int16_t def, rep;          /* levels at and from which it is there */
    int32_t children, next;    /* how many; the node after its whole subtree */
    int32_t first_leaf, leaves;
} pq_node;

typedef struct pq_chunk {
    uint64_t offset, bytes; /* of the pages, dictionary first */
    int64_t values;
    int codec;
} pq_chunk;

/* ---- levels and values of one page */

typedef struct pq_runs { /* the RLE and bit-packing hybrid */
    const uint8_t *at, *end;
    int width;
    uint64_t left; /* values of the current run */
    bool packed;
    uint32_t value;
    uint64_t bit; /* packed: of the next value, from at */
} pq_runs;

typedef struct pq_delta { /* DELTA_BINARY_PACKED */
    const uint8_t *at, *end;
    uint64_t left, miniblocks, per_mini, mini, in_mini; /* counts; in_mini: values left in this miniblock */
    const uint8_t *widths;
    uint64_t value, min_delta, bit;
    int width;
    bool begun;
} pq_delta;

typedef struct pq_value {
    uint64_t bits;        /* of a number */
    const uint8_t *bytes; /* of bytes */
    size_t length;
} pq_value;

typedef struct pq_column {
    const pq_node *node;
    pq_type type;
    int32_t type_length;
    pq_meaning meaning;
    int scale;
    const uint8_t *at, *end; /* pages of the chunk not read yet */
    int64_t values;          /* of the chunk not in a page yet */
    int codec;
    uint8_t *page, *dictionary; /* unpacked */
    size_t page_room, page_bytes;
    pq_value *word; /* the dictionary's values */
    uint32_t words;
    int64_t left; /* entries of the page */
    pq_runs def, rep;
    int encoding;
    const uint8_t *in, *in_end; /* PLAIN and others: values not read yet */
    uint64_t bit, index, split; /* of a boolean; of a BYTE_STREAM_SPLIT value, and how many there are */
    pq_runs runs;
    pq_delta delta, suffix;
    uint8_t *last; /* DELTA_BYTE_ARRAY: the value before */
    size_t last_length, last_room;
    const uint8_t *text; /* DELTA_*: the bytes behind the lengths */
    int64_t entries;     /* non-null values that the page can still have: guards the decoders */
    bool have;           /* an entry has been looked at: its levels are */
    int now_def, now_rep;
} pq_column;

struct lc_parquet {
    const uint8_t *data;
    size_t bytes;
    char *name;
    pq_node *node;
    int32_t nodes;
    pq_column *column;
    int32_t columns;
    pq_chunk *chunk; /* [groups, columns] */
    int64_t *group_rows;
    int32_t groups, group; /* group: the next one */
    int64_t rows, done, group_left;
};

/* parquet_meta.c */
lc_status lc_parquet_footer(struct lc_parquet *p);

/* parquet_page.c: sets c->now_def and now_rep of the next entry; *there false at the end of the chunk. */
lc_status lc_parquet_peek(pq_column *c, bool *there);
/* Takes a page's bytes apart from packed to plain; `into` has exactly `bytes`. */
lc_status lc_parquet_unpack(int codec, const uint8_t *from, size_t packed, uint8_t *into, size_t bytes);
bool lc_parquet_run_next(pq_runs *r, uint32_t *value);

/* parquet_values.c */
lc_status lc_parquet_values_begin(pq_column *c, int encoding, const uint8_t *from, const uint8_t *end, int64_t entries);
lc_status lc_parquet_value(pq_column *c, pq_value *v); /* bytes stay until the next call */
lc_status lc_parquet_dictionary(pq_column *c, const uint8_t *from, size_t bytes, int64_t count);

#endif
