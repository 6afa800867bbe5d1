/* file.h: what the readers of tensor files share: the mapping, the list of tensors and the metadata that lc_file_* of
 * lolcats.h show. The readers take memory and know no tensors, so that fuzzers run them alone; bind.c makes tensors of
 * what they found. */
#ifndef LC_FILE_H
#define LC_FILE_H

#include "doc.h"

/* A file in memory, copy on write: a write into a tensor that views it stays in this process. */
typedef struct lc_mapping {
    uint8_t *data;
    size_t bytes;
    int refs;
} lc_mapping;

lc_status lc_mapping_open(const char *path, lc_mapping **out);
void lc_mapping_drop(lc_mapping *m); /* NULL does nothing */

/* A block of a tensor that does not stand as one row-major row of bytes: part of a view with strides, or of a tensor
 * that several files share. */
typedef struct lc_file_piece {
    const uint8_t *data;            /* its first element */
    lc_mapping *map;                /* borrowed; NULL when read from memory */
    int64_t *start, *size, *stride; /* ndim each, in elements: place in the tensor, extent, step in the file */
} lc_file_piece;

typedef struct lc_file_entry {
    char *name;
    const char *dtype_name;
    int store; /* an lc_dtype or LC_STORE_* of quant.h */
    int ndim;
    int64_t *dim;           /* row-major, slowest first */
    uint64_t offset, bytes; /* from the start of the file; bytes of the tensor, which pieces may not have */
    lc_file_piece *piece;   /* NULL: at offset, row-major */
    int pieces;
} lc_file_entry;

typedef struct lc_file_meta {
    char *key;
    int kind; /* as lc_doc_kind */
    int type; /* GGUF's value type: of the value, or of an array's elements */
    int32_t count;
    const uint8_t *value;    /* GGUF: the bytes of a value or of an array's elements */
    const uint8_t **element; /* GGUF: where each string of an array of strings begins */
    const char *string;      /* a string */
    int32_t length;
} lc_file_meta;

struct lc_file {
    const char *format;
    const uint8_t *data;
    size_t bytes;
    lc_mapping *map; /* NULL when opened from memory */
    lc_doc *doc;     /* safetensors: the header, which strings of the metadata point into */
    lc_file_entry *entry;
    int count;
    lc_file_meta *meta;
    int metas;
    uint32_t *slot; /* hash table of the tensors' names */
    size_t slots;
    uint64_t seed;
    int length_bytes;  /* GGUF: of the length before a string: 4 in version 1, else 8 */
    bool described;    /* PyTorch: the description of a safetensors file is in it */
    lc_doc *extra;     /* PyTorch: the values that are no tensors */
    lc_mapping **part; /* the files of a distributed checkpoint */
    int parts;
};

/* The readers fill an empty file from f->data. On failure the caller closes it. */
lc_status lc_safetensors_parse(struct lc_file *f);
lc_status lc_gguf_parse(struct lc_file *f);
lc_status lc_torch_parse(struct lc_file *f); /* what torch.save wrote, zip or legacy */

/* A folder that torch.distributed.checkpoint wrote. f->data is its .metadata; `open` finds its other files by name. */
typedef lc_status (*lc_part_opener)(void *ctx, const char *name, const uint8_t **data, size_t *bytes, lc_mapping **map);
lc_status lc_torch_parts_parse(struct lc_file *f, lc_part_opener open, void *ctx);

/* Reads from memory that outlives the file. `name` stands in front of messages. */
lc_status lc_file_open_memory(const void *data, size_t bytes, const char *name, struct lc_file **out);

/* For the readers: elements and bytes of a tensor with overflow checked; false when they exceed any file. */
bool lc_file_sizes(const int64_t *dim, int ndim, int block, int block_bytes, uint64_t *bytes);
/* Tensors must not overlap; `packed`: nor leave a gap between `start` and the end of the file. */
lc_status lc_file_check_layout(const struct lc_file *f, uint64_t start, bool packed);
/* Fills the hash table; a name that occurs twice, of a tensor or a key, is an error. */
lc_status lc_file_check_names(struct lc_file *f);

/* Is the i-th piece the whole tensor, row-major? */
bool lc_piece_is_whole(const lc_file_entry *e, int i);
/* Calls `each` for every run of elements with one step that the tensor's pieces are made of: `count` elements from
 * `data`, `step` elements apart, which belong at element `at` of the row-major tensor. Stops at a failure. */
typedef struct lc_file_run {
    const uint8_t *data;
    int64_t step, count, at;
    const lc_file_piece *piece;
} lc_file_run;
lc_status lc_file_runs(const lc_file_entry *e, lc_status (*each)(void *ctx, const lc_file_run *run), void *ctx);

/* GGUF's part of lc_file_meta_number and lc_file_meta_string. */
double lc_gguf_number(const lc_file_meta *m, int32_t element);
int lc_gguf_value_bytes(int type); /* of a metadata value; 0: a string or an array */
int lc_gguf_type(const char *name,
                 int store); /* GGUF's number of an element type, by name or else by store; -1: none */

#endif
