/* device.cuh: what the CUDA kernels share: element types and their conversions, views as kernels get them, walks over strided
 * operands, reductions over a warp and a block, launches. Kernels compute in float (in double for f64 operands) and round once,
 * when they store. Included by .cu files only. */
#ifndef LC_DEVICE_CUH
#define LC_DEVICE_CUH

#ifdef LC_EMULATED
#include "emulated.h" /* tests/cuda_emulator: threads as fibers */
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda.h"

typedef __nv_bfloat16 bf16;
typedef __half f16;

/* ---- element types --------------------------------------------------------------------------------------------------- */
template <class T> struct lc_real_of { typedef float type; };
template <> struct lc_real_of<double> { typedef double type; };
template <class T> using real_of = typename lc_real_of<T>::type; /* what a kernel computes in */

template <class R, class T> __device__ __forceinline__ R load(T v) { return (R)v; }
template <> __device__ __forceinline__ float load<float, bf16>(bf16 v) { return __bfloat162float(v); }
template <> __device__ __forceinline__ float load<float, f16>(f16 v) { return __half2float(v); }
template <> __device__ __forceinline__ double load<double, bf16>(bf16 v) { return __bfloat162float(v); }
template <> __device__ __forceinline__ double load<double, f16>(f16 v) { return __half2float(v); }

template <class T, class R> __device__ __forceinline__ T store(R v) { return (T)v; }
template <> __device__ __forceinline__ bf16 store<bf16, float>(float v) { return __float2bfloat16_rn(v); }
template <> __device__ __forceinline__ f16 store<f16, float>(float v) { return __float2half_rn(v); }
template <> __device__ __forceinline__ bf16 store<bf16, double>(double v) { return __double2bfloat16(v); }
template <> __device__ __forceinline__ f16 store<f16, double>(double v) { return __double2half(v); }

/* Runs the statements with T standing for the element type; returns LC_K_UNSUPPORTED for another dtype. */
#define LC_FLOATS(dtype, ...)                                                                                                    \
    switch (dtype) {                                                                                                             \
    case LC_K_F32: { typedef float T; __VA_ARGS__ } break;                                                                       \
    case LC_K_BF16: { typedef bf16 T; __VA_ARGS__ } break;                                                                       \
    case LC_K_F16: { typedef f16 T; __VA_ARGS__ } break;                                                                         \
    case LC_K_F64: { typedef double T; __VA_ARGS__ } break;                                                                      \
    default: return LC_K_UNSUPPORTED;                                                                                            \
    }

/* ---- launches -------------------------------------------------------------------------------------------------------- */
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
/* Blocks for a grid-stride loop over n items, `each` a block. */
static inline unsigned grid_for(int64_t n, int64_t each) {
    int64_t blocks = ceil_div(n, each), most = (int64_t)lc_cuda_now->sms * 16;
    return (unsigned)(blocks < 1 ? 1 : blocks > most ? most : blocks);
}
#ifndef LC_EMULATED
#define LC_LAUNCH(kernel, grid, block, shared, ...) kernel<<<grid, block, shared, lc_cuda_now->stream>>>(__VA_ARGS__)
/* The block's dynamic shared memory as char *name. */
#define LC_SHARED(name)                                                                                                          \
    extern __shared__ int4 lc_shared_memory[];                                                                                   \
    char *name = (char *)lc_shared_memory
#endif

/* A launch that from sm_90 on may begin while the one before it still runs (programmatic dependent launch), where early says so; the kernel
 * waits for that one's end by itself (wait_for_previous, mma.cuh). */
template <class... P, class... A>
static inline void launch_early(bool early, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, const A &...argument) {
#ifdef LC_EMULATED
    (void)early;
    LC_LAUNCH(kernel, grid, block, shared, argument...);
#else
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t c = {};
    c.gridDim = grid, c.blockDim = block, c.dynamicSmemBytes = shared, c.stream = lc_cuda_now->stream;
    c.attrs = &attribute, c.numAttrs = early && lc_cuda_now->major >= 9 ? 1 : 0;
    cudaLaunchKernelEx(&c, kernel, static_cast<P>(argument)...);
#endif
}

/* Lets a kernel use more dynamic shared memory than 48 KB. */
template <class F> static inline int allow_shared(F kernel, size_t bytes) {
    if (bytes <= 48 * 1024) return 0;
    return lc_cuda_check(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes), "shared memory");
}

/* ---- views ----------------------------------------------------------------------------------------------------------- */
static inline int64_t view_numel(const lc_view *v) {
    int64_t n = 1;
    for (int i = 0; i < v->ndim; i++) n *= v->dim[i];
    return n;
}
static inline int64_t view_rows(const lc_view *v) { /* all dims but the last */
    int64_t n = 1;
    for (int i = 0; i + 1 < v->ndim; i++) n *= v->dim[i];
    return n;
}
static inline bool view_contiguous(const lc_view *v) {
    int64_t expect = 1;
    for (int i = v->ndim - 1; i >= 0; i--) {
        if (v->dim[i] != 1 && v->stride[i] != expect) return false;
        expect *= v->dim[i];
    }
    return true;
}

/* A walk over up to N operands of one shape (broadcast dims have stride 0), in row-major order, with dims of 1 dropped and dims that
 * all operands hold in one piece merged: how a strided elementwise kernel finds its elements. Strides count elements. */
template <int N> struct walk {
    int ndim;
    int64_t total, dim[LC_VIEW_DIMS], stride[N][LC_VIEW_DIMS];
    __device__ __forceinline__ void at(int64_t e, int64_t (&offset)[N]) const {
#pragma unroll
        for (int o = 0; o < N; o++) offset[o] = 0;
        for (int i = ndim - 1; i > 0; i--) {
            int64_t q = e / dim[i], r = e - q * dim[i];
#pragma unroll
            for (int o = 0; o < N; o++) offset[o] += r * stride[o][i];
            e = q;
        }
#pragma unroll
        for (int o = 0; o < N; o++) offset[o] += e * stride[o][0];
    }
    bool contiguous() const { /* every operand in one piece */
        for (int o = 0; o < N; o++)
            if (ndim > 1 || stride[o][0] != 1) return total <= 1;
        return true;
    }
};

template <int N> static inline walk<N> make_walk(const lc_view *const (&v)[N]) {
    walk<N> w;
    w.ndim = 0;
    w.total = 1;
    for (int i = 0; i < v[0]->ndim; i++) {
        int64_t d = v[0]->dim[i];
        w.total *= d;
        if (d == 1) continue;
        int at = w.ndim - 1;
        bool merge = at >= 0;
        for (int o = 0; o < N && merge; o++) merge = w.stride[o][at] == v[o]->stride[i] * d;
        if (merge) w.dim[at] *= d;
        else w.dim[at = w.ndim++] = d;
        for (int o = 0; o < N; o++) w.stride[o][at] = v[o]->stride[i];
    }
    if (!w.ndim) {
        w.ndim = 1;
        w.dim[0] = 1;
        for (int o = 0; o < N; o++) w.stride[o][0] = 1;
    }
    return w;
}

/* ---- reductions ------------------------------------------------------------------------------------------------------ */
struct op_sum { template <class R> __device__ __forceinline__ R operator()(R a, R b) const { return a + b; } };
struct op_max { template <class R> __device__ __forceinline__ R operator()(R a, R b) const { return a > b || a != a ? a : b; } };

template <class F, class R> __device__ __forceinline__ R warp_reduce(R v, F f) { /* all lanes get the result */
#pragma unroll
    for (int o = 16; o; o >>= 1) v = f(v, __shfl_xor_sync(0xffffffffu, v, o));
    return v;
}

/* All threads get the result; blockDim.x a multiple of 32; the order of the sum is fixed. `room` holds 32 values. */
template <class F, class R> __device__ __forceinline__ R block_reduce(R v, F f, R none, R *room) {
    int lane = threadIdx.x & 31, w = threadIdx.x >> 5, n = blockDim.x >> 5;
    v = warp_reduce(v, f);
    __syncthreads();
    if (!lane) room[w] = v;
    __syncthreads();
    return warp_reduce(lane < n ? room[lane] : none, f);
}

/* ---- faults ---------------------------------------------------------------------------------------------------------- */
/* For kernels that look at ids: the report shows at the next synchronisation. The kernel must go on with a harmless value. */
struct fault_to {
    lc_cuda_fault *slot;
    int op;
    __device__ __forceinline__ void report(int64_t value, int64_t limit, int64_t at) const {
        if (atomicCAS((int *)&slot->set, 0, 1)) return;
        slot->op = op;
        slot->value = value;
        slot->limit = limit;
        slot->at = at;
        __threadfence_system();
    }
};
static inline fault_to fault_here() {
    const lc_cuda_device *d = lc_cuda_now;
    return {d->fault_on_device, d->last_op[(d->op_count - 1) % LC_CUDA_LAST_OPS]};
}

#endif
