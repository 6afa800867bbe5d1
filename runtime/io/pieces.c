/* pieces.c: tensors that stand in a file as strided views or in several blocks, as runs of elements with one step each.
 */
#include <string.h>

#include "file.h"

bool lc_piece_is_whole(const lc_file_entry *e, int i) {
    const lc_file_piece *p = &e->piece[i];
    int64_t dense = 1;
    for (int d = e->ndim - 1; d >= 0; d--) {
        if (p->size[d] != e->dim[d] || (p->size[d] != 1 && p->stride[d] != dense)) return false;
        dense *= e->dim[d];
    }
    return true;
}

/* Dims from the end that are one run: each next one steps by what the ones behind it span, in the file and in the
 * tensor. */
static int run_dims(const lc_file_entry *e, const lc_file_piece *p, int64_t *count, int64_t *step) {
    int d = e->ndim;
    bool full = true; /* the dims behind are the tensor's whole: what comes next follows them in the tensor */
    *count = 1;
    *step = 1;
    for (; d > 0; d--) {
        int64_t size = p->size[d - 1];
        if (size != 1 && !full) break;
        if (size != 1 && *count == 1)
            *step = p->stride[d - 1];
        else if (size != 1 && p->stride[d - 1] != *count * *step)
            break;
        *count *= size;
        full = full && size == e->dim[d - 1];
    }
    return d;
}

static lc_status piece_runs(const lc_file_entry *e, const lc_file_piece *p,
                            lc_status (*each)(void *, const lc_file_run *), void *ctx) {
    int64_t at[64] = {0}, place[64], span = 1, item, elements = 1;
    lc_file_run run = {.piece = p};
    if (e->ndim > 64) return lc_fail(LC_ESHAPE, "%d dims", e->ndim);
    for (int d = e->ndim - 1; d >= 0; d--) {
        if (p->size[d] == 0) return LC_OK;
        place[d] = span;
        span *= e->dim[d];
    }
    for (int d = 0; d < e->ndim; d++) elements *= e->dim[d];
    item = (int64_t)e->bytes / elements; /* of any type, converted here or not */
    int outer = run_dims(e, p, &run.count, &run.step);
    for (;;) {
        int64_t from = 0;
        run.at = 0;
        for (int d = 0; d < e->ndim; d++) {
            from += at[d] * p->stride[d];
            run.at += (p->start[d] + at[d]) * place[d];
        }
        run.data = p->data + from * item;
        LC_TRY(each(ctx, &run));
        int d = outer - 1;
        while (d >= 0 && ++at[d] == p->size[d]) at[d--] = 0;
        if (d < 0) return LC_OK;
    }
}

lc_status lc_file_runs(const lc_file_entry *e, lc_status (*each)(void *, const lc_file_run *), void *ctx) {
    for (int i = 0; i < e->pieces; i++) LC_TRY(piece_runs(e, &e->piece[i], each, ctx));
    return LC_OK;
}
