/* torch.h: what the readers of torch.save's files share: the pickle, its storages found in the file, and tensors as
 * views of them. */
#ifndef LC_TORCH_H
#define LC_TORCH_H

#include "doc_build.h"
#include "file.h"
#include "pickle.h"

enum { LC_TORCH_DIMS = 64 };

typedef struct lc_torch_storage {
    const uint8_t *key, *data;
    uint32_t key_bytes;
    uint64_t bytes;
    bool found;
} lc_torch_storage;

typedef struct lc_torch {
    lc_pickle pickle;
    lc_torch_storage *storage; /* sorted by key */
    int storages;
} lc_torch;

typedef struct lc_torch_view {
    const lc_torch_dtype *dtype;
    const uint8_t *data; /* the first element */
    int ndim;
    int64_t dim[LC_TORCH_DIMS], stride[LC_TORCH_DIMS];
    uint64_t bytes; /* of the elements, row-major */
    bool contiguous;
} lc_torch_view;

/* Reads the pickle of a zip or legacy file and finds every storage that it names: all is there, in the size that it
 * says. */
lc_status lc_torch_open(lc_torch *t, const uint8_t *data, size_t bytes);
void lc_torch_close(lc_torch *t);
lc_status lc_torch_view_of(const lc_torch *t, int32_t tensor, lc_torch_view *v);

/* torch_tree.c: the plain values below `node` as a document's node with the waiting key; tensors are left out of dicts
 * and are null in lists. `steps` bounds the work: shared values are written as often as they stand. */
lc_status lc_torch_plain(const lc_pickle *p, int32_t node, lc_doc_build *d, int64_t *steps);

#endif
