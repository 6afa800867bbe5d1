/* core.h: the types that runtime/core and runtime/ops share: storage, tensor, node, op row, call frame, device. Nothing outside
 * runtime/ sees them: Lua has handles, kernels have views.
 *
 * Ownership. A tensor header is reference-counted: its handle (if it has one) is one reference, the tape, parents and temporaries
 * hold others. A function that returns a tensor gives one reference to the caller; one that takes a tensor borrows it. A header
 * refers to a storage, reference-counted too; views share it. One thread runs all of this. */
#ifndef LC_CORE_H
#define LC_CORE_H

#include "../../kernels/kernel.h"
#include "base.h"

typedef struct lc_storage lc_storage;
typedef struct lc_tensor lc_tensor;
typedef struct lc_node lc_node;

struct lc_storage {
    int32_t refs;
    int32_t device;
    void *ptr;
    size_t bytes;
    uint32_t version;   /* bumped by every write in place; the tape compares */
    uint8_t readonly;   /* a mapped file */
    uint8_t in_debt;
    void (*release)(void *ctx); /* foreign memory: how it goes; NULL: the device's allocator */
    void *ctx;
    lc_prepared prepared;
};

struct lc_tensor {
    int32_t refs;
    uint32_t slot, gen;  /* what a handle must say */
    uint8_t dtype, ndim, has_handle, requires_grad; /* requires_grad: a leaf that wants a gradient, or node is set */
    int32_t device;
    int32_t dim[LC_MAX_DIMS];
    int64_t stride[LC_MAX_DIMS]; /* elements */
    int64_t offset;              /* elements from the storage's start; a multiple of the block for quantised dtypes */
    lc_storage *storage;
    lc_node *node;       /* what made it, when recorded */
    int32_t node_out;    /* which of its results */
    int32_t scope;       /* depth whose end drops the handle; 0: none */
    lc_tensor *prev, *next; /* neighbours in that scope's list */
    lc_tensor *grad;
    char *name;
};

/* ---- tensor.c -------------------------------------------------------------------------------------------------------- */
lc_tensor *lc_get(const lc_handle *h);                  /* borrowed; NULL with LC_ESTALE recorded when the handle is stale */
lc_status lc_stale(const lc_handle *h);                 /* records and returns LC_ESTALE */
uint32_t lc_header_count(void);
const lc_tensor *lc_header_at(uint32_t i);              /* one without a storage is free */
lc_tensor *lc_header_new(void);                         /* one reference, nothing set but slot and gen */
static inline lc_tensor *lc_retain(lc_tensor *t) { t->refs++; return t; }
void lc_release(lc_tensor *t);                          /* NULL is fine */
void lc_give_handle(lc_tensor *t, lc_handle *out);      /* the reference passes to a new handle in the current scope */
lc_status lc_tensor_new(int dtype, int device, int ndim, const int32_t *dims, lc_tensor **out); /* uninitialised, contiguous */
lc_tensor *lc_tensor_view(lc_tensor *of);               /* same data, shape and strides, no history */
lc_status lc_tensor_of_storage(lc_storage *s, size_t byte_offset, int dtype, int ndim, const int32_t *dims, lc_handle *out);
lc_status lc_host_span(const lc_handle *t, void **ptr, size_t *bytes); /* a contiguous CPU tensor's bytes */
int64_t lc_tensor_numel(const lc_tensor *t);
size_t lc_tensor_bytes(const lc_tensor *t);             /* of its elements, as if contiguous */
bool lc_tensor_contiguous(const lc_tensor *t);
bool lc_same_shape(const lc_tensor *a, const lc_tensor *b);
void *lc_tensor_ptr(const lc_tensor *t);                /* address of its first element, on its device */
void lc_tensor_describe(const lc_tensor *t, char *out, size_t size); /* "f32[2 x 3] cpu (name)" */
void lc_contiguous_strides(int ndim, const int32_t *dims, int64_t *stride);

/* ---- memory.c -------------------------------------------------------------------------------------------------------- */
lc_status lc_storage_new(int device, size_t bytes, lc_storage **out);
lc_status lc_storage_wrap(void *ptr, size_t bytes, void (*release)(void *ctx), void *ctx, lc_storage **out); /* CPU, read-only */
void lc_storage_release(lc_storage *s);
void lc_storage_written(lc_storage *s);                 /* bumps the version, drops prepared copies */
lc_status lc_scratch(int device, size_t bytes, void **out, size_t *granted); /* cached memory without a header */
void lc_scratch_release(int device, void *p, size_t granted);
/* Memory that stays with a graph: what a device's blocks given back from begin to end become, to be taken again in between only. */
typedef struct lc_keep lc_keep;
lc_status lc_keep_begin(int device, double room);       /* room: bytes taken at once, for the larger blocks; 0: none */
lc_keep *lc_keep_end(void);
double lc_kept_bytes(int device);
void lc_memory_holders(int device, char *out, size_t size); /* holders.c: the largest, a line each */
void lc_keep_free(lc_keep *k);                          /* to the cache; NULL is fine */
void lc_scope_adopt(lc_tensor *t);                      /* into the current scope's list */
void lc_scope_forget(lc_tensor *t);

/* ---- arena.c --------------------------------------------------------------------------------------------------------- */
typedef struct lc_arena lc_arena;
lc_arena *lc_arena_new(void *base, size_t bytes);       /* of memory that it does not own; free() ends it */
void *lc_arena_base(const lc_arena *a);
size_t lc_arena_in_use(const lc_arena *a);
bool lc_arena_holds(const lc_arena *a, const void *p);
void *lc_arena_take(lc_arena *a, size_t bytes, size_t *granted); /* NULL: no hole is large enough */
void lc_arena_give(lc_arena *a, void *p, size_t granted);

/* ---- graph.c --------------------------------------------------------------------------------------------------------- */
int lc_graph_recording(void);                           /* the device that records, or -1 */

/* ---- device.c -------------------------------------------------------------------------------------------------------- */
enum { LC_MAX_DEVICES = 17 };
typedef struct lc_device {
    char name[32];
    const lc_backend *backend; /* NULL: the CPU */
    int index;                 /* the back-end's own number */
} lc_device;
const lc_device *lc_device_get(int device);
const lc_kernel *lc_device_kernel(int device, int op, bool is_double);
extern const lc_host lc_host_services;

/* ---- table.c --------------------------------------------------------------------------------------------------------- */
enum { LC_F_INPLACE = 1, LC_F_NODIFF = 2, LC_F_NOGRAD = 4, LC_F_RANDOM = 8, LC_F_MIXED = 16, LC_F_HALF = 32, LC_F_INTERNAL = 64,
       LC_F_STRIDED = 128, LC_F_ROWS = 256, LC_F_POINT = 512, LC_F_BINARY = 1024, LC_F_COMPARE = 2048, LC_F_VIEW = 4096,
       LC_F_GRAD = 8192 /* a pointwise gradient kernel */, LC_F_OPERANDS = 16384, LC_F_RESULT = 32768,
       LC_F_NEITHER = 65536 };

typedef struct lc_rule lc_rule;
typedef struct lc_row {
    const char *name, *signature, *doc;
    uint32_t flags;
    const lc_rule *rule;
    int8_t n_x, n_f, n_i, n_y, has_list, has_s;
    int8_t n_y_visible;
    char kind[LC_MAX_IN];          /* 'T' 'I' 'A' */
    bool optional[LC_MAX_IN];
    char x_name[LC_MAX_IN][16];
    char y_kind[LC_MAX_OUT];
    bool y_hidden[LC_MAX_OUT];
} lc_row;
const lc_row *lc_row_of(int op);

/* ---- dispatch.c ------------------------------------------------------------------------------------------------------ */
/* One op call inside the core. x and list are borrowed; y are references owned by whoever made the frame. k is what the kernel
 * sees in place of x: the dispatcher starts it as x, a shape rule may put an expanded or copied view there (lc_substitute), and
 * the dispatcher puts contiguous or widened copies. */
typedef struct lc_frame {
    int op;
    const lc_row *row;
    lc_tensor *x[LC_MAX_IN];
    lc_tensor *y[LC_MAX_OUT];
    lc_tensor *k[LC_MAX_IN];
    uint32_t k_owned;      /* bits: k[i] is ours to release */
    lc_tensor *const *list;
    int n_list;
    double f[LC_MAX_F];
    int32_t i[LC_MAX_I];
    const char *s;
    uint64_t seed, offset; /* RANDOM rows */
    bool recording;        /* the call will be recorded on the tape */
    bool done;             /* set by a shape rule that did the work itself: no kernel runs */
    bool skip[LC_MAX_OUT]; /* results that are not wanted; the kernel sees them absent */
} lc_frame;

void lc_frame_init(lc_frame *c, int op);               /* absent inputs, zero scalars */
lc_status lc_run(lc_frame *c);                         /* checks, infers, runs, records; c->y filled */
lc_status lc_out(lc_frame *c, int i, int dtype, int ndim, const int32_t *dims);       /* a fresh contiguous result */
lc_status lc_out_like(lc_frame *c, int i, const lc_tensor *t);                        /* shape and dtype of t, contiguous */
lc_status lc_out_permuted(lc_frame *c, int i, int dtype, int ndim, const int32_t *dims, const int *memory_order);
lc_status lc_op_error(const lc_frame *c, lc_status code, const char *format, ...);    /* names the op and lists its operands */
const char *lc_current_op(void);
void lc_substitute(lc_frame *c, int i, lc_tensor *t);  /* the kernel sees t (a reference that passes to the frame) for x[i] */
lc_status lc_broadcast_dims(const lc_frame *c, const lc_tensor *a, const lc_tensor *b, int *ndim, int32_t *dims);
lc_tensor *lc_expanded(lc_tensor *t, int ndim, const int32_t *dims); /* a view broadcast to dims, which must be possible */

/* What an op means: shape rule, gradient rule. */
typedef struct lc_back {
    lc_node *node;
    lc_tensor *g[LC_MAX_OUT];   /* gradients of its results; NULL: none came */
    lc_tensor **gx;             /* to be filled with references: of inputs, then of list elements; NULL stays "none" */
    const bool *need;           /* which of them are wanted */
    bool *whole;                /* set by lc_back_pending */
} lc_back;
lc_tensor *lc_back_pending(lc_back *b, int i);
struct lc_rule {
    lc_status (*shape)(lc_frame *c);   /* checks, makes c->y; of a view also the whole work */
    lc_status (*backward)(lc_back *b); /* NULL: not differentiable */
    uint32_t save_x, save_y;           /* bits: what the backward reads */
    bool broadcast;                    /* the kernel sees all inputs in the shape of y[0], or of x[0] when in place */
    void (*after)(lc_frame *c);        /* after the kernel, e.g. to drop reduced dims */
    void (*save)(const lc_frame *c, uint32_t *save_x, uint32_t *save_y); /* narrows the two masks to what this call needs */
};

/* ---- autograd.c ------------------------------------------------------------------------------------------------------ */
typedef struct lc_edge {
    lc_node *node;   /* maker of the input, or */
    lc_tensor *leaf; /* a leaf that wants its gradient; both NULL: none */
    int32_t out;
    int32_t ndim, dim[LC_MAX_DIMS]; /* the input's shape */
    uint8_t dtype;
} lc_edge;

struct lc_node {
    int32_t refs;
    int32_t op;       /* -1: a Lua node */
    int32_t lua_id;
    uint64_t seq;
    bool freed;
    int32_t n_in, n_x, n_out; /* edges; saved inputs; results */
    double f[LC_MAX_F];
    int32_t i[LC_MAX_I];
    uint64_t seed, offset;
    lc_edge *edge;            /* n_in */
    lc_tensor **x, **y;       /* saved, NULL where not */
    uint32_t *version;        /* of the saved x, then y */
    lc_tensor **g;            /* gradients gathered so far, n_out; NULL before the first */
    lc_edge *out;             /* n_out: shapes and dtypes of the results */
    lc_backward *owner;
    int32_t device;
};
extern bool lc_grad_enabled;
bool lc_wants_grad(const lc_tensor *t);
lc_status lc_record(lc_frame *c);
void lc_node_release(lc_node *n);

/* ---- random.c, threads.c, options.c ---------------------------------------------------------------------------------- */
void lc_rng_take(uint64_t elements, uint64_t *seed, uint64_t *offset);
void lc_parallel(int64_t n, int64_t grain, void (*body)(void *ctx, int64_t begin, int64_t end, int thread), void *ctx);
int lc_thread_count(void);
int lc_option_value(int which);

#endif
