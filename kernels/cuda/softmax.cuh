/* softmax.cuh: the running maximum of a row and the sum of exponentials below it, taken in one reading: for softmax and
 * for the losses. Included by .cu files only. */
#ifndef LC_SOFTMAX_CUH
#define LC_SOFTMAX_CUH

#include "reduce.cuh"

/* m: the largest so far (NaN aside); s: the sum of exp(x - m), with 0 for m where that is not finite. */
template <class R> struct peak { R m, s; };
template <class R> __device__ __forceinline__ peak<R> peak_none() { return {-(R)INFINITY, (R)0}; }

template <class R> __device__ __forceinline__ void peak_raise(peak<R> &p, R m) {
    if (!(m > p.m)) return;
    if (p.s != 0) p.s *= real_exp(finite_or_0(p.m) - finite_or_0(m)); /* NaN stays */
    p.m = m;
}

template <class R, int V> __device__ __forceinline__ void peak_take(peak<R> &p, const R (&v)[V]) {
    R m = v[0], sum = 0;
#pragma unroll
    for (int i = 1; i < V; i++) m = v[i] > m || m != m ? v[i] : m;
    peak_raise(p, m);
    R shift = finite_or_0(p.m);
#pragma unroll
    for (int i = 0; i < V; i++) sum += real_exp(v[i] - shift);
    p.s += sum;
}

template <class R> __device__ __forceinline__ peak<R> peak_join(peak<R> a, peak<R> b) {
    R m = a.m > b.m ? a.m : b.m;
    peak_raise(a, m);
    peak_raise(b, m);
    a.s += b.s;
    return a;
}

/* All lanes get the result. */
template <class R> __device__ __forceinline__ peak<R> warp_peak(peak<R> p) {
#pragma unroll
    for (int o = 16; o; o >>= 1) {
        peak<R> q = {__shfl_xor_sync(0xffffffffu, p.m, o), __shfl_xor_sync(0xffffffffu, p.s, o)};
        p = peak_join(p, q);
    }
    return p;
}

/* All threads get the result; room holds 64 values. */
template <class R> __device__ __forceinline__ peak<R> block_peak(peak<R> p, R *room) {
    int lane = threadIdx.x & 31, w = threadIdx.x >> 5, n = blockDim.x >> 5;
    p = warp_peak(p);
    __syncthreads();
    if (!lane) room[w] = p.m, room[32 + w] = p.s;
    __syncthreads();
    if (lane < n)
        p = {room[lane], room[32 + lane]};
    else
        p = peak_none<R>();
    return warp_peak(p);
}

#endif
