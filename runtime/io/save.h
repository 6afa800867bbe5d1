/* save.h: what the writers of tensor files share. A writer is a list of tensors, in memory or stored in another file;
 * finishing it writes them one after the other, converted on the way, so that a model needs no memory of its size. */
#ifndef LC_SAVE_H
#define LC_SAVE_H

#include "../core/core.h"
#include "file.h"
#include "system.h"

/* The names of one element type in each format; NULL where it has none. */
typedef struct lc_save_dtype {
    const char *safetensors, *torch, *torch_storage;
    int gguf, store, item; /* gguf: -1 where it has none; item: bytes */
} lc_save_dtype;

typedef struct lc_save_entry {
    char *name;
    lc_handle tensor;
    const struct lc_file *file; /* NULL: it is `tensor` */
    const lc_file_entry *from;
    const lc_save_dtype *dtype;
    int quantise; /* an lc_dtype of blocks to be written, or -1 */
    bool convert; /* stored otherwise than it is written */
    int ndim, place;
    int64_t *dim;
    uint64_t bytes; /* as written */
} lc_save_entry;

typedef struct lc_save_value {
    char *key, *text; /* text NULL: a number */
    size_t length;
    double number;
    int kind; /* of GGUF: a value type; else an lc_doc_kind_t */
    const lc_file_meta *raw;
    const struct lc_file *raw_file;
    struct lc_save_value *list; /* elements of an array */
    int count;
} lc_save_value;

struct lc_writer {
    char *path, *format, *wrapper;
    lc_save_entry *entry;
    int count, room;
    lc_save_value *meta; /* strings that describe the file: safetensors' __metadata__ */
    int metas;
    bool described;       /* the description is written even where it is empty */
    lc_save_value *value; /* plain values beside the tensors (torch), metadata (gguf) */
    int values;
};

typedef struct lc_text {
    char *text;
    size_t length, room;
} lc_text;

lc_status lc_text_add(lc_text *b, const void *s, size_t n);

/* The tensor's elements, row-major, as `dtype`, into `out`, by all threads. An entry that is LC_STORE_UNKNOWN cannot
 * be. */
lc_status lc_file_load(const struct lc_file *f, const lc_file_entry *e, int dtype, uint8_t *out);

/* Hands the bytes of an entry, as they are written, to `sink`, piece by piece. */
typedef lc_status (*lc_save_sink)(void *ctx, const void *data, size_t bytes);
lc_status lc_save_data(const lc_save_entry *e, lc_save_sink sink, void *ctx);

/* The formats. They write to an open `lc_aside`, which the caller commits. */
lc_status lc_save_safetensors(struct lc_writer *w, lc_aside *a);
lc_status lc_save_torch(struct lc_writer *w, lc_aside *a);
lc_status lc_save_gguf(struct lc_writer *w, lc_aside *a);

#endif
