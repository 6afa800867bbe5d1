/* pickle.h: Python's pickles as a tree of plain values, by an unpickler that calls nothing. What it can build is the
 * list in pickle_globals.c: tensors, parameters, dicts, lists, tuples, plain values, and (on request) the records of
 * torch's distributed checkpoints. Any other global is an error that names it. Every value is an index into one array;
 * containers may share values and, by a hostile pickle, hold themselves: who walks the tree bounds depth and steps. */
#ifndef LC_PICKLE_H
#define LC_PICKLE_H

#include "../core/base.h"

typedef enum lc_pickle_kind {
    LC_PK_NONE,
    LC_PK_BOOL,    /* integer */
    LC_PK_INT,     /* integer */
    LC_PK_BIG,     /* bytes: little-endian two's complement of more than 8 bytes */
    LC_PK_FLOAT,   /* number */
    LC_PK_STRING,  /* bytes: UTF-8, not checked */
    LC_PK_BYTES,   /* bytes */
    LC_PK_LIST,    /* items */
    LC_PK_TUPLE,   /* items */
    LC_PK_DICT,    /* items: key, value, key, value, .. */
    LC_PK_GLOBAL,  /* global */
    LC_PK_OBJECT,  /* global: its class; state */
    LC_PK_STORAGE, /* items: 'storage', type, key, location, number of elements */
    LC_PK_TENSOR,  /* items: storage, offset, size, stride, ..; state: a dtype that is not the storage's */
} lc_pickle_kind;

/* What a global stands for. */
typedef enum lc_pickle_role {
    LC_PR_DTYPE,
    LC_PR_STORAGE,
    LC_PR_UNTYPED,
    LC_PR_ORDERED_DICT,
    LC_PR_TENSOR,
    LC_PR_TENSOR_V3,
    LC_PR_PARAMETER,
    LC_PR_TYPED,
    LC_PR_CLASS, /* torch.Tensor, Parameter: only an argument */
    LC_PR_SIZE,
    LC_PR_TEXT,   /* its first argument is all that matters: torch.device, a layout */
    LC_PR_ENCODE, /* how protocol 2 writes bytes */
    LC_PR_PATH,
    LC_PR_IGNORED,
    LC_PR_RECORD,
} lc_pickle_role;

typedef struct lc_torch_dtype {
    const char *name, *storage; /* "float32", "FloatStorage" (or NULL) */
    int store, bytes;           /* LC_STORE_UNKNOWN where it is not converted */
} lc_torch_dtype;

typedef struct lc_pickle_global {
    const char *module, *name;
    lc_pickle_role role;
    bool distributed;            /* only where LC_PICKLE_DISTRIBUTED is asked for */
    const lc_torch_dtype *dtype; /* of LC_PR_DTYPE and LC_PR_STORAGE */
} lc_pickle_global;

typedef struct lc_pickle_node {
    uint8_t kind;
    int32_t state; /* -1: none */
    union {
        int64_t integer;
        double number;
        struct {
            const uint8_t *data; /* into the pickle, or into memory of the lc_pickle */
            uint32_t size;
        } bytes;
        struct {
            int32_t first, last, count; /* a chain of items; -1: none */
        } items;
        lc_pickle_global global;
    };
} lc_pickle_node;

typedef struct lc_pickle_item {
    int32_t value, next;
} lc_pickle_item;

typedef struct lc_pickle {
    lc_pickle_node *node;
    lc_pickle_item *item;
    int32_t nodes, node_room, items, item_room;
    int32_t root;
    size_t used; /* bytes up to the end of this pickle */
} lc_pickle;

enum { LC_PICKLE_PERSISTENT = 1, LC_PICKLE_DISTRIBUTED = 2 }; /* persistent ids are storages; records are known */

/* Reads one pickle from the start of `data`, which outlives it. LC_EPARSE says at which byte and what was wrong. On
 * failure there is nothing to free. */
lc_status lc_pickle_read(lc_pickle *p, const uint8_t *data, size_t bytes, int flags);
void lc_pickle_free(lc_pickle *p);

/* The n-th item, from 0; -1 when there is none. */
int32_t lc_pickle_item_at(const lc_pickle *p, int32_t container, int32_t n);
/* The value of a dict's (or a record's state's) key, or -1. */
int32_t lc_pickle_get(const lc_pickle *p, int32_t dict, const char *key);
bool lc_pickle_is(const lc_pickle *p, int32_t node, lc_pickle_kind kind);
bool lc_pickle_text_is(const lc_pickle *p, int32_t node, const char *text);

/* pickle_globals.c: what `module.name` stands for, or false. */
bool lc_pickle_find_global(const uint8_t *module, size_t module_bytes, const uint8_t *name, size_t name_bytes,
                           lc_pickle_global *out);
const lc_torch_dtype *lc_torch_dtype_of_store(int store);
const lc_torch_dtype *lc_torch_dtype_named(const char *name, size_t length);

#endif
