/* cuda.h: what the plugin's files share on the host side, in C and in CUDA C++. A device has one stream, on which all of its copies
 * and kernels run in order; so the core's cache of freed blocks is stream-ordered by itself. */
#ifndef LC_CUDA_H
#define LC_CUDA_H

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include "../kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { LC_CUDA_DEVICES = 16, LC_CUDA_LAST_OPS = 8 };

/* What a kernel reports of an operand out of range: the first report wins. Lies in pinned host memory that the device sees; read at
 * the next synchronisation. */
typedef struct lc_cuda_fault {
    int32_t set, op;
    int64_t value, limit, at;
} lc_cuda_fault;

typedef struct lc_cuda_device {
    int index, ready;
    int major, minor, sms;
    size_t shared_max;        /* dynamic shared memory a block may ask for */
    size_t total_bytes;
    char text[160];
    cudaStream_t stream;
    cublasLtHandle_t blas;
    void *blas_work;          /* for cuBLASLt alone; LC_CUDA_BLAS_WORK bytes, then LC_CUDA_COUNTERS counters (graph.c) */
    int counters_left;        /* while a graph is recorded: how many are not given out yet */
    lc_cuda_fault *fault, *fault_on_device;
    void *stage[2];           /* pinned memory through which large uploads go; NULL until the first */
    cudaEvent_t staged[2];    /* when the device has read it */
    int16_t last_op[LC_CUDA_LAST_OPS]; /* a ring, for errors that come late */
    uint32_t op_count;
    int chain_ends;           /* the next launch waits for all before it (chain.cuh) */
} lc_cuda_device;

#define LC_CUDA_BLAS_WORK ((size_t)64 << 20)
/* Small workspaces, each for one product of a recorded graph. */
#define LC_CUDA_COUNTERS 1024
#define LC_CUDA_COUNTER_BYTES ((size_t)256)

/* The device of the kernel call that is under way. */
extern lc_cuda_device *lc_cuda_now;
extern const lc_host *lc_cuda_host;

/* While ops are timed (timing.c): called before and after each. */
extern int lc_cuda_timing;
void lc_cuda_time_op(int op, int after);
const double *lc_cuda_timings(int device, int on);

/* Graphs (graph.c). While one is recorded nothing may wait for the device or copy from or to the host. */
extern int lc_cuda_recording;
int lc_cuda_record_begin(int device);
int lc_cuda_record_end(int device, void **graph);
int lc_cuda_replay(int device, void *graph);
void lc_cuda_forget(int device, void *graph);

/* Makes a device current, and ready at its first use; 0, or LC_K_DEVICE with the text recorded. */
int lc_cuda_select(int device);
/* Records text for last_error and returns LC_K_DEVICE. */
int lc_cuda_fail(const char *what, const char *why);
/* 0, or LC_K_DEVICE with the text recorded. */
int lc_cuda_check(cudaError_t e, const char *what);
int lc_cuda_check_blas(cublasStatus_t s, const char *what);

extern const lc_kernel lc_cuda_table[LC_OP_COUNT];
const char *lc_cuda_op_name(int op);

#ifdef __cplusplus
}
#endif
#endif
