/* selftest.cu: small kernels, right and wrong, for the test of the emulator (test_emulator.c). */
#include "../../kernels/cuda/device.cuh"
#include "selftest.h"

__global__ void index_kernel(int *out, int64_t n) {
    int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    int64_t i = block * (int)(blockDim.x * blockDim.y * blockDim.z) + thread;
    if (i < n) out[i] = (int)i;
}
void selftest_index(int *out) { LC_LAUNCH(index_kernel, dim3(2, 3, 4), dim3(7, 3, 2), 0, out, SELFTEST_N); }

template <class R, int LANES> __global__ void __launch_bounds__(256) sum_kernel(const R *x, R *out, int n) {
    __shared__ R room[LANES];
    R v = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) v += x[i];
    v = block_reduce(v, op_sum(), (R)0, room);
    if (!threadIdx.x) *out = v;
}
void selftest_sum(const float *x, float *out) { LC_LAUNCH((sum_kernel<float, 32>), 1, 256, 0, x, out, SELFTEST_N); }

__global__ void collectives_kernel(int *wrong) {
    unsigned all = 0xffffffffu;
    int l = threadIdx.x & 31, bad = 0;
    bad += __shfl_sync(all, l, 5) != 5;
    bad += __shfl_sync(all, l, 3, 8) != (l & ~7) + 3;
    bad += __shfl_xor_sync(all, (double)l, 4) != (l ^ 4);
    bad += __shfl_up_sync(all, l, 3) != (l < 3 ? l : l - 3);
    bad += __shfl_down_sync(all, (int64_t)l, 2u, 16) != ((l & 15) < 14 ? l + 2 : l);
    bad += __ballot_sync(all, l % 3 == 0) != 0x49249249u;
    bad += !__any_sync(all, l == 7) + __any_sync(all, l == 32) + __all_sync(all, l != 7) + !__all_sync(all, l < 32);
    bad += __reduce_max_sync(all, l - 40) != -9;
    bad += __reduce_add_sync(all, 1u) != 32;
    bad += __match_any_sync(all, l / 16) != (l < 16 ? 0xffffu : 0xffff0000u);
    if (l < 8) bad += __shfl_sync(0xffu, l, 7) != 7; /* some lanes alone */
    __syncwarp();
    bad += __syncthreads_count(l < 10) != 10 * (int)(blockDim.x / 32);
    atomicAdd(wrong, bad);
}
void selftest_collectives(int *wrong) { LC_LAUNCH(collectives_kernel, 2, 64, 0, wrong); }

template <int ALLOWED> __global__ void dynamic_kernel(int *out, int words) {
    LC_SHARED(memory);
    int *w = (int *)memory;
    for (int i = threadIdx.x; i < words; i += blockDim.x) w[i] = i;
    __syncthreads();
    if (!threadIdx.x) *out = w[words - 1];
}
void selftest_dynamic(int bytes, int allow, int *out) {
    if (allow && allow_shared(dynamic_kernel<1>, bytes)) return;
    if (allow) LC_LAUNCH(dynamic_kernel<1>, 1, 96, bytes, out, bytes / 4);
    else LC_LAUNCH(dynamic_kernel<0>, 1, 96, bytes, out, bytes / 4);
}

__global__ void stale_kernel(float *out) {
    __shared__ float room[32];
    LC_SHARED(memory);
    if (blockIdx.x) out[0] = room[3] + 1, out[1] = ((float *)memory)[5];
    else room[3] = 0, ((float *)memory)[5] = 0;
}
void selftest_stale(float *out) { LC_LAUNCH(stale_kernel, 2, 1, 128, out); }

__global__ void race_kernel(int *out, int fixed) {
    __shared__ int room[64];
    int i = threadIdx.x;
    room[i] = -1;
    __syncthreads();
    room[i] = i;
    if (fixed) __syncthreads();
    out[i] = room[i ^ 1];
}
void selftest_race(int fixed, int *out) { LC_LAUNCH(race_kernel, 1, 64, 0, out, fixed); }

__global__ void copies_kernel(int *out, int wait) {
    __shared__ __align__(16) int from[64], to[64];
    int i = threadIdx.x;
    for (int n = 0; n < 4; n++) from[4 * i + n] = 4 * i + n;
    __syncthreads();
    lc_emu_copy(&to[4 * i], &from[4 * i], 16, 16);
    lc_emu_copy_commit();
    lc_emu_copy_wait(wait ? 0 : 1);
    __syncthreads();
    for (int n = 0; n < 4; n++) out[4 * i + n] = to[4 * i + n];
}
void selftest_copies(int wait, int *out) { LC_LAUNCH(copies_kernel, 1, 16, 0, out, wait); }

__global__ void uneven_kernel() {
    if (threadIdx.x >= 32) return;
    __syncthreads();
}
void selftest_uneven_barrier(void) { LC_LAUNCH(uneven_kernel, 1, 64, 0); }

__global__ void lost_kernel() {
    int v = threadIdx.x;
    if (v < 16) v = __shfl_xor_sync(0xffffffffu, v, 1);
    __syncthreads();
}
void selftest_lost_lane(void) { LC_LAUNCH(lost_kernel, 1, 32, 0); }

__global__ void beyond_kernel(int *out) {
    LC_SHARED(memory);
    memory[64 + threadIdx.x] = 1;
    *out = 1;
}
void selftest_beyond(int *out) { LC_LAUNCH(beyond_kernel, 1, 1, 64, out); }

__global__ void misaligned_kernel(int *x) {
    int4 v = *(const int4 *)(x + 1);
    x[0] = v.x;
}
void selftest_misaligned(int *x) { LC_LAUNCH(misaligned_kernel, 1, 1, 0, x); }

void selftest_stack(void) {
    int here = 0;
    LC_LAUNCH(misaligned_kernel, 1, 1, 0, &here);
}
