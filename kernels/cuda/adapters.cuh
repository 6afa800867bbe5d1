/* adapters.cuh: the skinny products of low-rank adapters beside half activations, as few launches: what `projections` and its gradient
 * ask for before their large products. Adapters are f32 and are read as they are. */
#ifndef LC_ADAPTERS_CUH
#define LC_ADAPTERS_CUH

#include "device.cuh"

enum { ADAPTER_PARTS = 3, ADAPTER_TILES = 6 /* of 8 ranks, in all */ };

/* One adapter: a [rank, in], b [out, rank] f32; ranks are multiples of 8. x: what its ranks are sums over: of the forward the input
 * [rows, in], of the gradient that of its result [rows, out]. Parts that are not there have rank 0. */
struct adapter_part {
    const void *x;
    int64_t ld_x;
    const float *a, *b;
    int32_t rank, out;
    float scale;
    void *y; /* forward: the result, [rows, out] */
    int64_t ld_y;
};
struct adapter_job {
    adapter_part part[ADAPTER_PARTS];
    int32_t rows, in;
    const void *add; /* forward: joins the first result; NULL: none */
    int64_t ld_add;
    void *low;       /* [rows, sum of ranks] */
    void *gx;        /* gradient: [rows, in] = sum of low_i a_i; NULL: not wanted */
};

/* Do the kernels take it? Shapes alone, and what the pointers are aligned to. back: a job of the gradient. */
bool adapters_take(const adapter_job *j, bool back);
/* Forward: low = x [a_1 a_2 a_3]^T, y_i = scale_i low_i b_i^T (+ add). Gradient: low_i = scale_i x_i b_i, gx = low [a_1; a_2; a_3]. */
int adapters_run(const adapter_job *j, int dtype, bool back);

#endif
