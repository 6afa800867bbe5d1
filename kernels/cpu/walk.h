/* walk.h: how strided elementwise kernels go through their operands. A walk takes views of one shape (broadcasting has
 * been put into strides of 0), drops dims of 1, merges dims that all operands hold in one piece, and hands out rows: an
 * address and a step in bytes for each operand, and a length. Rows are cut at the bounds of a thread's part. Operand 0
 * is the result. */
#ifndef LC_WALK_H
#define LC_WALK_H

#include "cpu.h"

/* Elements are moved by size alone, whatever their type. */
typedef uint8_t walk_1 __attribute__((may_alias));
typedef uint16_t walk_2 __attribute__((may_alias));
typedef uint32_t walk_4 __attribute__((may_alias));
typedef uint64_t walk_8 __attribute__((may_alias));

enum { WALK_OPERANDS = 5, WALK_SERIAL = 16384, WALK_BLOCK = 512 };

typedef struct walk {
    int n, ndim;                                                         /* operands; dims, at least 1 */
    int64_t total, dim[LC_VIEW_DIMS], step[WALK_OPERANDS][LC_VIEW_DIMS]; /* steps in bytes */
    char *base[WALK_OPERANDS];
} walk;

/* at: position of the row's first element in row-major order (only where the walk was made with `ordered`). */
typedef void (*walk_fn)(void *ctx, char *const *p, const int64_t *step, int64_t n, int64_t at);

static inline int64_t view_bytes(const lc_view *v) { return lc_dtype_traits(v->dtype)->bytes; }

static inline int view_contiguous(const lc_view *v) {
    int64_t expect = 1;
    for (int i = v->ndim - 1; i >= 0; i--) {
        if (v->dim[i] != 1 && v->stride[i] != expect) return 0;
        expect *= v->dim[i];
    }
    return 1;
}

/* Where element e in row-major order lies. */
static inline int64_t view_offset(const lc_view *v, int64_t e) {
    int64_t at = 0;
    for (int i = v->ndim - 1; i >= 0; i--) {
        at += e % v->dim[i] * v->stride[i];
        e /= v->dim[i];
    }
    return at;
}

/* With a short last dim the longest dim becomes the row: the order of elements does not matter to an elementwise
 * kernel. */
static inline void walk_lengthen(walk *w) {
    int last = w->ndim - 1, best = last;
    if (w->dim[last] >= 8) return;
    for (int i = 0; i < last; i++)
        if (w->dim[i] > w->dim[best]) best = i;
    int64_t d = w->dim[best];
    w->dim[best] = w->dim[last];
    w->dim[last] = d;
    for (int o = 0; o < w->n; o++) {
        int64_t s = w->step[o][best];
        w->step[o][best] = w->step[o][last];
        w->step[o][last] = s;
    }
}

static inline void walk_make(walk *w, int n, const lc_view *const *v, int ordered) {
    w->n = n;
    w->ndim = 0;
    w->total = 1;
    for (int o = 0; o < n; o++) w->base[o] = (char *)v[o]->data;
    for (int i = 0; i < v[0]->ndim; i++) {
        int64_t d = v[0]->dim[i];
        w->total *= d;
        if (d == 1) continue;
        int at = w->ndim - 1, merge = at >= 0;
        for (int o = 0; o < n && merge; o++) merge = w->step[o][at] == v[o]->stride[i] * view_bytes(v[o]) * d;
        if (merge) {
            w->dim[at] *= d;
        } else {
            at = w->ndim++;
            w->dim[at] = d;
        }
        for (int o = 0; o < n; o++) w->step[o][at] = v[o]->stride[i] * view_bytes(v[o]);
    }
    if (w->ndim == 0) {
        w->ndim = 1;
        w->dim[0] = 1;
        for (int o = 0; o < n; o++) w->step[o][0] = view_bytes(v[o]);
    }
    if (!ordered) walk_lengthen(w);
}

/* Calls f for the rows of elements [begin, end). */
static inline void walk_range(const walk *w, int64_t begin, int64_t end, walk_fn f, void *ctx) {
    if (begin >= end) return;
    int last = w->ndim - 1;
    int64_t pos[LC_VIEW_DIMS], rest = begin, step[WALK_OPERANDS];
    char *p[WALK_OPERANDS];
    for (int o = 0; o < w->n; o++) p[o] = w->base[o], step[o] = w->step[o][last];
    for (int i = last; i >= 0; i--) {
        pos[i] = 0;
        if (rest == 0) continue;
        pos[i] = rest % w->dim[i];
        rest /= w->dim[i];
        for (int o = 0; o < w->n; o++) p[o] += pos[i] * w->step[o][i];
    }
    while (begin < end) {
        int64_t n = LC_MIN(w->dim[last] - pos[last], end - begin);
        f(ctx, p, step, n, begin);
        begin += n;
        if (begin >= end) return;
        for (int o = 0; o < w->n; o++) p[o] -= pos[last] * step[o];
        pos[last] = 0;
        for (int i = last - 1; i >= 0; i--) {
            for (int o = 0; o < w->n; o++) p[o] += w->step[o][i];
            if (++pos[i] < w->dim[i]) break;
            for (int o = 0; o < w->n; o++) p[o] -= w->dim[i] * w->step[o][i];
            pos[i] = 0;
        }
    }
}

/* body over [0, n), on the pool when there is enough to do. */
static inline void run_parts(const lc_kargs *k, int64_t n, int64_t grain, void (*body)(void *, int64_t, int64_t, int),
                             void *ctx) {
    if (n > grain)
        k->host->parallel(n, grain, body, ctx);
    else if (n > 0)
        body(ctx, 0, n, 0);
}

typedef struct walk_job {
    const walk *w;
    walk_fn f;
    void *ctx;
} walk_job;

static inline void walk_part(void *job, int64_t begin, int64_t end, int thread) {
    const walk_job *j = (const walk_job *)job;
    (void)thread;
    walk_range(j->w, begin, end, j->f, j->ctx);
}

/* All of it, on the pool when there is enough to do. ctx is shared by the threads. */
static inline void walk_all(const lc_kargs *k, const walk *w, walk_fn f, void *ctx) {
    if (w->total <= WALK_SERIAL) {
        walk_range(w, 0, w->total, f, ctx);
        return;
    }
    walk_job job = {w, f, ctx};
    k->host->parallel(w->total, WALK_SERIAL / 2, walk_part, &job);
}

/* n elements of `bytes` each, `step` bytes apart, into one piece; and back. */
#define WALK_GATHER(T, dst, dstep, src, sstep, n)                                                                      \
    do {                                                                                                               \
        for (int64_t i_ = 0; i_ < (n); i_++)                                                                           \
            *(T *)((char *)(dst) + i_ * (dstep)) = *(const T *)((const char *)(src) + i_ * (sstep));                   \
    } while (0)

static inline void walk_gather(void *dst, const void *src, int64_t step, int64_t n, int64_t bytes) {
    if (step == bytes) {
        memcpy(dst, src, (size_t)(n * bytes));
        return;
    }
    switch (bytes) {
    case 1: WALK_GATHER(walk_1, dst, 1, src, step, n); break;
    case 2: WALK_GATHER(walk_2, dst, 2, src, step, n); break;
    case 4: WALK_GATHER(walk_4, dst, 4, src, step, n); break;
    default: WALK_GATHER(walk_8, dst, 8, src, step, n); break;
    }
}
static inline void walk_scatter(void *dst, int64_t step, const void *src, int64_t n, int64_t bytes) {
    if (step == bytes) {
        memcpy(dst, src, (size_t)(n * bytes));
        return;
    }
    switch (bytes) {
    case 1: WALK_GATHER(walk_1, dst, step, src, 1, n); break;
    case 2: WALK_GATHER(walk_2, dst, step, src, 2, n); break;
    case 4: WALK_GATHER(walk_4, dst, step, src, 4, n); break;
    default: WALK_GATHER(walk_8, dst, step, src, 8, n); break;
    }
}

/* A row as one piece: itself if it is one, else a copy in buf (WALK_BLOCK elements). */
static inline const void *walk_piece(const char *p, int64_t step, int64_t n, int64_t bytes, void *buf) {
    if (step == bytes || n == 1) return p;
    walk_gather(buf, p, step, n, bytes);
    return buf;
}

#endif
