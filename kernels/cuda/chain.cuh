/* chain.cuh: launches in a chain: LC_LAUNCH_AFTER lets a kernel begin while those before it still run (programmatic dependent launch,
 * from sm_90 on), so that its start, and what it may read ahead, cost no time. Such a kernel calls next_may_start() first of all, and
 * wait_for_previous() (mma.cuh) before it reads what another kernel may have written and before it writes anything: when that returns,
 * all kernels before it have ended. What it reads earlier (a weight) must not be the work of a launch still under way: `apart` says so,
 * and chain_apart() finds out. So every kernel that lets the next one start is launched in this way, and its launch is followed by
 * chain_writes() for all that it writes. A launch by LC_LAUNCH waits for all before it. A chain lasts while op follows op with such
 * launches alone, and an ordinary launch ends it when the list of writes is full. */
#ifndef LC_CHAIN_CUH
#define LC_CHAIN_CUH

#include "device.cuh"
#include "mma.cuh"

enum { CHAIN_LAUNCHES = 512, CHAIN_WRITES = 64 };
struct lc_chain {
    int launches, count;
    uint32_t op; /* of the last launch: lc_cuda_device.op_count */
    struct { const char *from, *to; } at[CHAIN_WRITES]; /* what its launches write */
};
inline lc_chain lc_chains[LC_CUDA_DEVICES];

static inline bool chain_goes_on(bool apart) {
    lc_chain *d = &lc_chains[lc_cuda_now->index];
    bool follows = lc_cuda_now->op_count - d->op <= 1 && !lc_cuda_now->chain_ends; /* else launches came between */
    lc_cuda_now->chain_ends = 0;
    d->op = lc_cuda_now->op_count;
    if (apart && follows && lc_cuda_now->major >= 9 && d->launches < CHAIN_LAUNCHES && d->count < CHAIN_WRITES) {
        d->launches++;
        return true;
    }
    d->launches = d->count = 0;
    return false;
}
static inline void chain_writes(const void *p, int64_t bytes) {
    lc_chain *d = &lc_chains[lc_cuda_now->index];
    if (!p || bytes <= 0) return;
    for (int i = 0; i < d->count; i++) /* a step writes the same blocks of memory layer after layer */
        if (d->at[i].from <= (const char *)p && d->at[i].to >= (const char *)p + bytes) return;
    if (d->count == CHAIN_WRITES) d->count--, d->launches = CHAIN_LAUNCHES; /* the next one waits, whatever it reads */
    d->at[d->count].from = (const char *)p;
    d->at[d->count++].to = (const char *)p + bytes;
}
static inline bool chain_apart(const void *p, int64_t bytes) {
    const lc_chain *d = &lc_chains[lc_cuda_now->index];
    for (int i = 0; p && i < d->count; i++)
        if ((const char *)p < d->at[i].to && (const char *)p + bytes > d->at[i].from) return false;
    return true;
}
/* The same for what a view spans. */
static inline int64_t view_reach(const lc_view *v) { /* bytes; strides are not negative */
    int64_t reach = 1;
    for (int i = 0; i < v->ndim; i++) {
        if (!v->dim[i]) return 0;
        reach += (v->dim[i] - 1) * v->stride[i];
    }
    return v->data ? reach * lc_dtype_traits(v->dtype)->bytes : 0;
}
static inline void chain_writes(const lc_view *v) { chain_writes(v->data, view_reach(v)); }
static inline bool chain_apart(const lc_view *v) { return chain_apart(v->data, view_reach(v)); }

#ifdef LC_EMULATED /* which knows kernels by name */
#define LC_LAUNCH_AFTER(apart, kernel, grid, block, shared, ...) (chain_goes_on(apart), LC_LAUNCH(kernel, grid, block, shared, __VA_ARGS__))
#else
#define LC_LAUNCH_AFTER(apart, kernel, grid, block, shared, ...) launch_early(chain_goes_on(apart), kernel, grid, block, shared, __VA_ARGS__)
#endif

#endif
