/* loss.cuh: what the losses share: labels, the number of them that count, and the end of a mean over these. A label
 * that is `ignore` takes no part; one outside [0, v) is reported where labels are counted and then left out too. */
#ifndef LC_LOSS_CUH
#define LC_LOSS_CUH

#include "softmax.cuh"

typedef struct lc_labels {
    const void *data;
    int dtype;
    int64_t n, v, ignore;
} lc_labels;

static inline lc_labels labels_of(const lc_view *v, int64_t vocabulary, int64_t ignore) {
    return {v->data, v->dtype, view_numel(v), vocabulary, ignore};
}

/* The label of row r, or -1 where the row does not count. */
__device__ __forceinline__ int64_t label_of(const lc_labels &l, int64_t r) {
    int64_t label = id_at(l.data, l.dtype, r);
    return label == l.ignore || label < 0 || label >= l.v ? -1 : label;
}

/* How many labels count, for all threads of the block; reports the bad ones. */
__device__ __forceinline__ double count_labels(const lc_labels &l, const fault_to &fault, double *room) {
    double count = 0;
    for (int64_t r = threadIdx.x; r < l.n; r += blockDim.x) {
        int64_t label = id_at(l.data, l.dtype, r);
        if (label == l.ignore) continue;
        if (label < 0 || label >= l.v)
            fault.report(label, l.v, r);
        else
            count++;
    }
    return block_reduce(count, op_sum(), 0.0, room);
}

/* each = 1 / count, 0 when none counts; one block */
static __global__ void __launch_bounds__(512) loss_count(const lc_labels l, double *each, const fault_to fault) {
    __shared__ double room[32];
    double count = count_labels(l, fault, room);
    if (!threadIdx.x) *each = count > 0 ? 1 / count : 0;
}

/* y = sum of the rows' losses / how many count, 0 when none does; one block. A bad label's loss is 0. */
static __global__ void __launch_bounds__(512)
    loss_mean(const double *loss, const lc_labels l, void *y, int y_dtype, const fault_to fault) {
    __shared__ double room[32];
    double count = count_labels(l, fault, room), sum = 0;
    for (int64_t r = threadIdx.x; r < l.n; r += blockDim.x) sum += loss[r];
    sum = block_reduce(sum, op_sum(), 0.0, room);
    if (!threadIdx.x) put_any(y, y_dtype, 0, count > 0 ? sum / count : 0.0);
}

#endif
