/* kernel.h: the ABI between the core and its back-ends. A kernel sees views (pointer, dtype, shape, strides) and scalars; never
 * a tensor, the tape or an error string. Everything under kernels/ includes headers of kernels/ only, and the op table, which is
 * data. A plugin (a device's shared library) exports lc_plugin_open and fills an lc_backend. */
#ifndef LC_KERNEL_H
#define LC_KERNEL_H

#include <stddef.h>
#include <stdint.h>

#include "dtype.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { LC_VIEW_DIMS = 6, LC_KARGS_IN = 16, LC_KARGS_OUT = 12 };

/* Op ids. UNARY and BINARY rows bring their gradient kernels along: NAME_grad; NAME_grad_a and NAME_grad_b. */
typedef enum lc_op {
#define UNARY(name, sig, flags, doc) LC_OP_##name, LC_OP_##name##_grad,
#define UNARY_FLAT(name, sig, flags, doc) LC_OP_##name,
#define BINARY(name, sig, flags, doc) LC_OP_##name, LC_OP_##name##_grad_a, LC_OP_##name##_grad_b,
#define COMPARE(name, sig, flags, doc) LC_OP_##name,
#define VIEW(name, sig, flags, doc) LC_OP_##name,
#define OP(name, sig, flags, doc) LC_OP_##name,
#include "../runtime/ops.def"
    LC_OP_COUNT
} lc_op;

/* One operand. Strides count elements. Block-quantised dtypes are contiguous along the last dim, in whole blocks, and their
 * strides count elements too. data NULL: the operand is absent (an input not given, a result not wanted). */
typedef struct lc_view {
    void *data;
    int32_t dtype; /* lc_dtype of lolcats.h, repeated as LC_K_* in dtype.h */
    int32_t ndim;
    int64_t dim[LC_VIEW_DIMS];
    int64_t stride[LC_VIEW_DIMS];
} lc_view;

/* A slot that the core keeps with each storage for a kernel's own copy of it: packed or repacked weights, descriptors. The core
 * calls release and clears the slot when the storage's data change or go. kind tells the kernels' layouts apart (0: empty). */
typedef struct lc_prepared {
    void *data;
    size_t bytes;
    int32_t kind;
    void (*release)(void *data);
} lc_prepared;

/* Filled by a kernel that returns LC_K_RANGE: the offending value, and the limit that it must stay below. */
typedef struct lc_fault {
    int64_t value, limit, at;
} lc_fault;

/* What the core offers to kernels. */
typedef struct lc_host {
    /* Calls body(ctx, begin, end, thread) over disjoint parts of [0, n), each at least `grain` long, on up to threads() threads,
     * and returns when all are done. The partition depends on n, grain and the number of threads alone. */
    void (*parallel)(int64_t n, int64_t grain, void (*body)(void *ctx, int64_t begin, int64_t end, int thread), void *ctx);
    int (*threads)(void);
    int (*option)(int which); /* LC_OPTION_* */
} lc_host;

/* Switches that select a fast path's plain twin (0: fast, 1: plain). Names in runtime/core/options.c. */
enum { LC_OPTION_PLAIN_ATTENTION, LC_OPTION_PLAIN_HYBRID, LC_OPTION_PLAIN_LINEAR, LC_OPTION_PLAIN_LOSS, LC_OPTION_PLAIN_POINTWISE,
       LC_OPTION_COUNT };

typedef struct lc_kargs {
    lc_view x[LC_KARGS_IN];
    lc_view y[LC_KARGS_OUT];
    int32_t n_x, n_y; /* slots that the row has; data is NULL in the rest */
    const lc_view *list;
    int32_t n_list;
    const double *f;  /* scalars in the order of the row's signature, as in lc_args */
    const int32_t *i;
    const char *s;
    uint64_t seed, offset; /* Philox key and first counter, for rows flagged RANDOM */
    void *work;            /* workspace of the size that the kernel's work function asked for; 64-byte aligned */
    size_t work_bytes;
    lc_prepared *prepared[LC_KARGS_IN]; /* of each input's storage; NULL where there is none */
    lc_fault *fault;
    const lc_host *host;
    int32_t device; /* the back-end's own number */
} lc_kargs;

typedef enum { LC_K_OK = 0, LC_K_UNSUPPORTED, LC_K_NOMEM, LC_K_RANGE, LC_K_DEVICE } lc_kstatus;

typedef int (*lc_kernel_fn)(const lc_kargs *k);
typedef size_t (*lc_work_fn)(const lc_kargs *k); /* views are filled, work is not */

typedef struct lc_kernel {
    lc_kernel_fn run; /* NULL: this back-end has none */
    lc_work_fn work;  /* NULL: no workspace */
} lc_kernel;

/* A back-end: memory and kernels of one kind of device. Copies are between host and device (either may be the host). */
typedef struct lc_backend {
    uint64_t abi;     /* lc_kernel_abi() as the plugin was built */
    const char *kind; /* "cuda", "mock" */
    int (*count)(void);
    const char *(*describe)(int device);
    int (*alloc)(int device, size_t bytes, void **out);
    void (*release)(int device, void *p, size_t bytes);
    int (*upload)(int device, void *to, const void *from, size_t bytes);
    int (*download)(int device, void *to, const void *from, size_t bytes);
    int (*copy)(int device, void *to, const void *from, size_t bytes);
    int (*sync)(int device);
    int (*memory)(int device, size_t *free, size_t *total); /* bytes of the device; NULL: not known */
    const char *(*last_error)(void);
    /* NULL, or: on 1 begins to time kernels, on 0 ends it, waits, and returns the device's seconds of each op, LC_OP_COUNT of them. */
    const double *(*timing)(int device, int on);
    /* NULL, or graphs: from record_begin to record_end the device's kernels are recorded instead of run, and copies from and to the
     * host fail. record_end gives what was recorded (graph NULL: forgets it); replay runs it again, on the same memory. */
    int (*record_begin)(int device);
    int (*record_end)(int device, void **graph);
    int (*replay)(int device, void *graph);
    void (*forget)(int device, void *graph);
    const lc_kernel *kernels; /* LC_OP_COUNT of them */
} lc_backend;

/* Exported by a plugin. Returns 0, or not 0 with *why set to static text (no driver, no device). */
typedef int (*lc_plugin_open_fn)(const lc_host *host, lc_backend *out, const char **why);

/* The CPU's kernels for one instruction set ("generic", "avx2", "avx512", "avx512bf16"), in float or in double arithmetic. */
__attribute__((visibility("default"))) const lc_kernel *lc_cpu_kernels(const char *isa, int is_double);
/* The best instruction set of this machine. */
__attribute__((visibility("default"))) const char *lc_cpu_best_isa(void);
/* GEMM provider: "onednn" or "own"; NULL asks. Returns the one in use; *why says where it was found or why not. */
const char *lc_cpu_gemm_provider(const char *force, const char **why);

#ifdef __cplusplus
}
#endif
#endif
