/* table.c: the CUDA kernels as the table that the core dispatches by, made from the op table: a row without its kernel fails the
 * link. Each entry is a small function that notes the op, picks the device and looks for launch errors, so that kernels need not.
 * Work functions are weak: a kernel that needs no workspace has none. */
#include "cuda.h"

#ifdef LC_TABLE_WEAK /* while kernels are being written */
#define LC_MAYBE __attribute__((weak))
#else
#define LC_MAYBE
#endif

static int run(const lc_kargs *k, int op, lc_kernel_fn kernel) {
    if (!kernel) return LC_K_UNSUPPORTED;
    if (lc_cuda_select(k->device)) return LC_K_DEVICE;
    lc_cuda_now->last_op[lc_cuda_now->op_count++ % LC_CUDA_LAST_OPS] = (int16_t)op;
    if (lc_cuda_timing) lc_cuda_time_op(op, 0);
    int rc = kernel(k);
    if (lc_cuda_timing) lc_cuda_time_op(op, 1);
    if (rc) return rc;
    return lc_cuda_check(cudaGetLastError(), lc_cuda_op_name(op));
}

#define ROW(name)                                                                                  \
    extern int lc_cuda_##name(const lc_kargs *k) LC_MAYBE;                                         \
    extern size_t lc_cuda_##name##_work(const lc_kargs *k) __attribute__((weak));                  \
    static int run_##name(const lc_kargs *k) { return run(k, LC_OP_##name, lc_cuda_##name); }
#define UNARY(name, sig, flags, doc)      ROW(name) ROW(name##_grad)
#define UNARY_FLAT(name, sig, flags, doc) ROW(name)
#define BINARY(name, sig, flags, doc)     ROW(name) ROW(name##_grad_a) ROW(name##_grad_b)
#define COMPARE(name, sig, flags, doc)    ROW(name)
#define OP(name, sig, flags, doc)         ROW(name)
#include "../../runtime/ops.def"

#define ENTRY(name)                       [LC_OP_##name] = {run_##name, lc_cuda_##name##_work},
#define UNARY(name, sig, flags, doc)      ENTRY(name) ENTRY(name##_grad)
#define UNARY_FLAT(name, sig, flags, doc) ENTRY(name)
#define BINARY(name, sig, flags, doc)     ENTRY(name) ENTRY(name##_grad_a) ENTRY(name##_grad_b)
#define COMPARE(name, sig, flags, doc)    ENTRY(name)
#define OP(name, sig, flags, doc)         ENTRY(name)
const lc_kernel lc_cuda_table[LC_OP_COUNT] = {
#include "../../runtime/ops.def"
};

const char *lc_cuda_op_name(int op) {
    static const char *const name[LC_OP_COUNT] = {
#define N(name) [LC_OP_##name] = #name,
#define UNARY(name, sig, flags, doc)      N(name) N(name##_grad)
#define UNARY_FLAT(name, sig, flags, doc) N(name)
#define BINARY(name, sig, flags, doc)     N(name) N(name##_grad_a) N(name##_grad_b)
#define COMPARE(name, sig, flags, doc)    N(name)
#define VIEW(name, sig, flags, doc)       N(name)
#define OP(name, sig, flags, doc)         N(name)
#include "../../runtime/ops.def"
    };
    return op >= 0 && op < LC_OP_COUNT ? name[op] : "?";
}
