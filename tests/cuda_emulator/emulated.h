/* emulated.h: lets a C++ compiler for the CPU compile CUDA kernels: the toolkit's headers as the host sees them, and what only the
 * device has: indices, launches, shared memory, barriers, warp collectives, atomics, intrinsics. Included first by
 * kernels/cuda/device.cuh under LC_EMULATED. What fibers do stands in emulator.h. An intrinsic that is missing is added here. */
#ifndef LC_EMULATED_H
#define LC_EMULATED_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#include <cuda_runtime.h>

#include "emulator.h"
#include "intrinsics.h"

/* ---- the language ------------------------------------------------------------------------------------------------------ */
#undef __shared__
#define __shared__ static thread_local /* one OS thread runs the blocks; so all of them lie in one piece that can be filled */
#define __launch_bounds__(...)
#define threadIdx (lc_emu_now->index)
#define blockIdx lc_emu_block_index
#define blockDim lc_emu_block_dim
#define gridDim lc_emu_grid_dim
enum { warpSize = LC_EMU_WARP };

#define LC_SHARED(name) char *name = lc_emu_shared

/* ---- launches ---------------------------------------------------------------------------------------------------------- */
template <class P> static inline void lc_emu_check_argument(const P &) {}
template <class P> static inline void lc_emu_check_argument(P *const &p) {
    if (lc_emu_on_host((const void *)p)) lc_emu_fail("an argument points into the host's stack");
}
/* Arguments are converted once, as for a launch; each thread gets its own copy. */
template <class... P>
static inline void lc_emu_launch_kernel(const char *name, dim3 grid, dim3 block, size_t shared, void (*kernel)(P...),
                                        std::common_type_t<P>... argument) {
    auto body = [&] { kernel(argument...); };
    (lc_emu_check_argument(argument), ...);
    lc_emu_launch(name, (const void *)kernel, grid, block, shared, [](void *f) { (*(decltype(body) *)f)(); }, &body);
}
#define LC_LAUNCH(kernel, grid, block, shared, ...)                                                                              \
    lc_emu_launch_kernel(#kernel, dim3(grid), dim3(block), (size_t)(shared), kernel __VA_OPT__(, ) __VA_ARGS__)

template <class F> static inline cudaError_t cudaFuncSetAttribute(F *kernel, cudaFuncAttribute which, int value) {
    return cudaFuncSetAttribute((const void *)kernel, which, value);
}
template <class F>
static inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, F *kernel, int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(n, (const void *)kernel, threads, shared);
}

/* ---- barriers ---------------------------------------------------------------------------------------------------------- */
static inline void __syncthreads() { lc_emu_barrier(0, 0, 0); }
static inline int __syncthreads_count(int p) { return lc_emu_barrier(0, 0, p); }
static inline int __syncthreads_or(int p) { return lc_emu_barrier(0, 0, p) != 0; }
static inline int __syncthreads_and(int p) { return lc_emu_barrier(0, 0, !p) == 0; }
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __threadfence_system() {}

/* ---- collectives of a warp --------------------------------------------------------------------------------------------- */
static inline void lc_emu_nothing(void *const *, uint32_t) {}
static inline void __syncwarp(unsigned mask = 0xffffffffu) { lc_emu_collective(mask, "__syncwarp", lc_emu_nothing, NULL); }
static inline unsigned __activemask() { return lc_emu_active(); }

/* Every lane's value to every lane of a full warp: for what mma.cuh's twins need. Prefer a collective of one's own. */
template <class V> struct lc_emu_all {
    V mine;
    V all[32];
    static void collect(void *const *r, uint32_t mask) {
        for (int to = 0; to < 32; to++)
            for (int i = 0; i < 32 && (mask >> to & 1); i++)
                if (mask >> i & 1) ((lc_emu_all *)r[to])->all[i] = ((lc_emu_all *)r[i])->mine;
    }
};

/* from: the lane whose value a lane gets. A lane outside of the mask has no value to give. */
template <class V> struct lc_emu_shuffle {
    V mine, got;
    int from;
    static void collect(void *const *r, uint32_t mask) {
        for (int i = 0; i < 32; i++) {
            if (!(mask >> i & 1)) continue;
            lc_emu_shuffle *to = (lc_emu_shuffle *)r[i];
            if (mask >> to->from & 1) to->got = ((lc_emu_shuffle *)r[to->from])->mine;
            else memset((void *)&to->got, 0xff, sizeof to->got);
        }
    }
};
template <class V> static inline V lc_emu_shuffle_from(const char *what, unsigned mask, V v, int from) {
    static_assert(sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8, "a shuffle moves 2, 4 or 8 bytes");
    lc_emu_shuffle<V> s = {v, v, from};
    lc_emu_collective(mask, what, lc_emu_shuffle<V>::collect, &s);
    return s.got;
}
template <class V> static inline V __shfl_sync(unsigned mask, V v, int from, int width = 32) {
    int lane = (int)lc_emu_now->lane;
    return lc_emu_shuffle_from("__shfl_sync", mask, v, (lane & ~(width - 1)) | (from & (width - 1)));
}
template <class V> static inline V __shfl_xor_sync(unsigned mask, V v, int with, int width = 32) {
    int lane = (int)lc_emu_now->lane, from = lane ^ with;
    return lc_emu_shuffle_from("__shfl_xor_sync", mask, v, from < (lane | (width - 1)) + 1 && from < 32 ? from : lane);
}
template <class V> static inline V __shfl_up_sync(unsigned mask, V v, unsigned by, int width = 32) {
    int lane = (int)lc_emu_now->lane, from = lane - (int)by;
    return lc_emu_shuffle_from("__shfl_up_sync", mask, v, from >= (lane & ~(width - 1)) ? from : lane);
}
template <class V> static inline V __shfl_down_sync(unsigned mask, V v, unsigned by, int width = 32) {
    int lane = (int)lc_emu_now->lane, from = lane + (int)by;
    return lc_emu_shuffle_from("__shfl_down_sync", mask, v, from <= (lane | (width - 1)) ? from : lane);
}

struct lc_emu_vote {
    uint64_t mine, got;
    static void ballot(void *const *r, uint32_t mask) {
        uint64_t all = 0;
        for (int i = 0; i < 32; i++)
            if (mask >> i & 1) all |= (uint64_t)(((lc_emu_vote *)r[i])->mine != 0) << i;
        tell(r, mask, all);
    }
    template <class O> static void fold(void *const *r, uint32_t mask) {
        uint64_t v = 0;
        for (int i = 0, first = 1; i < 32; i++) {
            if (!(mask >> i & 1)) continue;
            v = first ? ((lc_emu_vote *)r[i])->mine : O()(v, ((lc_emu_vote *)r[i])->mine);
            first = 0;
        }
        tell(r, mask, v);
    }
    static void match(void *const *r, uint32_t mask) {
        for (int i = 0; i < 32; i++) {
            if (!(mask >> i & 1)) continue;
            lc_emu_vote *to = (lc_emu_vote *)r[i];
            to->got = 0;
            for (int j = 0; j < 32; j++)
                if (mask >> j & 1 && ((lc_emu_vote *)r[j])->mine == to->mine) to->got |= (uint64_t)1 << j;
        }
    }
    static void tell(void *const *r, uint32_t mask, uint64_t v) {
        for (int i = 0; i < 32; i++)
            if (mask >> i & 1) ((lc_emu_vote *)r[i])->got = v;
    }
};
static inline uint64_t lc_emu_vote_by(const char *what, unsigned mask, uint64_t mine, lc_emu_collective_fn by) {
    lc_emu_vote v = {mine, 0};
    lc_emu_collective(mask, what, by, &v);
    return v.got;
}
static inline unsigned __ballot_sync(unsigned mask, int p) { return (unsigned)lc_emu_vote_by("__ballot_sync", mask, p != 0, lc_emu_vote::ballot); }
static inline int __any_sync(unsigned mask, int p) { return lc_emu_vote_by("__any_sync", mask, p != 0, lc_emu_vote::ballot) != 0; }
static inline int __all_sync(unsigned mask, int p) { return lc_emu_vote_by("__all_sync", mask, p == 0, lc_emu_vote::ballot) == 0; }
template <class V> static inline unsigned __match_any_sync(unsigned mask, V v) {
    uint64_t u = 0;
    memcpy(&u, &v, sizeof v);
    return (unsigned)lc_emu_vote_by("__match_any_sync", mask, u, lc_emu_vote::match);
}
#define LC_EMU_REDUCE(name, V, expression)                                                                                       \
    struct lc_emu_##name { uint64_t operator()(uint64_t x, uint64_t y) const { V a = (V)x, b = (V)y; return (uint64_t)(V)(expression); } }; \
    static inline V name(unsigned mask, V v) { return (V)lc_emu_vote_by(#name, mask, (uint64_t)v, lc_emu_vote::fold<lc_emu_##name>); }
LC_EMU_REDUCE(__reduce_and_sync, unsigned, a & b)
LC_EMU_REDUCE(__reduce_or_sync, unsigned, a | b)
LC_EMU_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef LC_EMU_REDUCE
#define LC_EMU_REDUCE(name, V, expression)                                                                                       \
    struct lc_emu_##name##_##V { uint64_t operator()(uint64_t x, uint64_t y) const { V a = (V)x, b = (V)y; return (uint64_t)(V)(expression); } }; \
    static inline V name(unsigned mask, V v) { return (V)lc_emu_vote_by(#name, mask, (uint64_t)v, lc_emu_vote::fold<lc_emu_##name##_##V>); }
LC_EMU_REDUCE(__reduce_add_sync, unsigned, a + b)
LC_EMU_REDUCE(__reduce_add_sync, int, (unsigned)a + (unsigned)b)
LC_EMU_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
LC_EMU_REDUCE(__reduce_min_sync, int, a < b ? a : b)
LC_EMU_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
LC_EMU_REDUCE(__reduce_max_sync, int, a > b ? a : b)
#undef LC_EMU_REDUCE

/* ---- atomics: one OS thread, and fibers change only where they wait ---------------------------------------------------- */
#define LC_EMU_ATOMIC(name, expression)                                                                                          \
    template <class V> static inline V name(V *p, std::common_type_t<V> v) {                                                     \
        V old = *p;                                                                                                              \
        *p = (V)(expression);                                                                                                    \
        return old;                                                                                                              \
    }
LC_EMU_ATOMIC(atomicAdd, old + v)
LC_EMU_ATOMIC(atomicSub, old - v)
LC_EMU_ATOMIC(atomicExch, v)
LC_EMU_ATOMIC(atomicMax, old > v ? old : v)
LC_EMU_ATOMIC(atomicMin, old < v ? old : v)
LC_EMU_ATOMIC(atomicAnd, old & v)
LC_EMU_ATOMIC(atomicOr, old | v)
LC_EMU_ATOMIC(atomicXor, old ^ v)
#undef LC_EMU_ATOMIC
template <class V> static inline V atomicCAS(V *p, std::common_type_t<V> expected, std::common_type_t<V> v) {
    V old = *p;
    if (old == (V)expected) *p = v;
    return old;
}

#endif
