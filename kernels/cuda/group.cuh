/* group.cuh: products by a warpgroup (4 warps from a multiple of 4 on) in halves: acc [64][N] += A [64][K] B [K][N], on Hopper by wgmma,
 * which reads its operands from shared memory by itself, elsewhere by mma16, each warp its 16 rows. Warp r of the group holds rows 16 r
 * .. 16 r + 15 of acc in mma16's layout either way. Tiles lie as mma.cuh says, which is Hopper's 128-byte swizzle.
 *
 * Order: what threads wrote to shared memory (by stores or copy16) and a product is to read needs shared_fence() in each writing thread
 * before the barrier. Products of a group run after group_begin(); group_end() waits for all of them: until then neither acc nor the
 * operands may be touched, and other work (exponentials of another accumulator) may go on. */
#ifndef LC_GROUP_CUH
#define LC_GROUP_CUH

#include "mma.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !defined(LC_EMULATED)
#define LC_WGMMA 1
#else
#define LC_WGMMA 0
#endif

/* ---- wgmma ----------------------------------------------------------------------------------------------------------- */
#if LC_WGMMA
/* PTX ISA, "Matrix descriptor": address, leading and stride offsets in units of 16 bytes, 128-byte swizzle. Rows of 128 bytes come in
 * eights, 1024 bytes apart (the stride); `leading` bytes lie between panels of 64 columns where columns are the product's m or n. `at`:
 * how many halves after the tile's begin, added last: from step to step only the low word changes, by a constant. */
__device__ __forceinline__ uint64_t group_tile(const void *tile, int leading, int at) {
    uint32_t low = (shared_address(tile) >> 4 | (uint32_t)(leading >> 4) << 16) + (uint32_t)(at >> 3);
    return (uint64_t)(1024 >> 4 | 1 << 30) << 32 | low;
}
template <int N, class T> struct group_mma;
#define LC_ACC4(i) "+f"(acc[i][0]), "+f"(acc[i][1]), "+f"(acc[i][2]), "+f"(acc[i][3])
#define LC_ACC8(i) LC_ACC4(i), LC_ACC4(i + 1)
#define LC_ACC16(i) LC_ACC4(i), LC_ACC4(i + 1), LC_ACC4(i + 2), LC_ACC4(i + 3)
#define LC_ACC64 LC_ACC16(0), LC_ACC16(4), LC_ACC16(8), LC_ACC16(12)
#define LC_REGISTERS8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LC_REGISTERS16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LC_REGISTERS32 LC_REGISTERS16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LC_REGISTERS64 LC_REGISTERS32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
/* A and B in shared memory, or A in registers. */
#define LC_GROUP_MMA(N, T, TYPE, REGISTERS, A, B, TRANSPOSE, A4, B4, TRANSPOSE4, ...)                                           \
    template <> struct group_mma<N, T> {                                                                                        \
        template <int TA, int TB, int ADD> static __device__ __forceinline__ void run(float (&acc)[N / 8][4], uint64_t a, uint64_t b) { \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, " A ", " B          \
                         ", " TRANSPOSE ";" : __VA_ARGS__ : "l"(a), "l"(b), "n"(ADD), "n"(TA), "n"(TB));                        \
        }                                                                                                                       \
        template <int TB, int ADD> static __device__ __forceinline__ void run(float (&acc)[N / 8][4], const uint32_t (&a)[4], uint64_t b) { \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, {" A4 "}, " B4      \
                         ", " TRANSPOSE4 ";" : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADD), "n"(TB)); \
        }                                                                                                                       \
    };
LC_GROUP_MMA(8, bf16, "bf16", "%0, %1, %2, %3", "%4", "%5", "%6, 1, 1, %7, %8", "%4, %5, %6, %7", "%8", "%9, 1, 1, %10", LC_ACC4(0))
LC_GROUP_MMA(16, bf16, "bf16", LC_REGISTERS8, "%8", "%9", "%10, 1, 1, %11, %12", "%8, %9, %10, %11", "%12", "%13, 1, 1, %14", LC_ACC8(0))
LC_GROUP_MMA(32, bf16, "bf16", LC_REGISTERS16, "%16", "%17", "%18, 1, 1, %19, %20", "%16, %17, %18, %19", "%20", "%21, 1, 1, %22", LC_ACC16(0))
LC_GROUP_MMA(64, bf16, "bf16", LC_REGISTERS32, "%32", "%33", "%34, 1, 1, %35, %36", "%32, %33, %34, %35", "%36", "%37, 1, 1, %38", LC_ACC16(0), LC_ACC16(4))
LC_GROUP_MMA(128, bf16, "bf16", LC_REGISTERS64, "%64", "%65", "%66, 1, 1, %67, %68", "%64, %65, %66, %67", "%68", "%69, 1, 1, %70", LC_ACC64)
LC_GROUP_MMA(32, f16, "f16", LC_REGISTERS16, "%16", "%17", "%18, 1, 1, %19, %20", "%16, %17, %18, %19", "%20", "%21, 1, 1, %22", LC_ACC16(0))
LC_GROUP_MMA(64, f16, "f16", LC_REGISTERS32, "%32", "%33", "%34, 1, 1, %35, %36", "%32, %33, %34, %35", "%36", "%37, 1, 1, %38", LC_ACC16(0), LC_ACC16(4))
LC_GROUP_MMA(128, f16, "f16", LC_REGISTERS64, "%64", "%65", "%66, 1, 1, %67, %68", "%64, %65, %66, %67", "%68", "%69, 1, 1, %70", LC_ACC64)
#endif

__device__ __forceinline__ void shared_fence() {
#if LC_WGMMA
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ __forceinline__ void group_begin() {
#if LC_WGMMA
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
/* Ends a batch of products without waiting for it; group_wait<N> waits until at most N batches are under way. */
__device__ __forceinline__ void group_commit() {
#if LC_WGMMA
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int N> __device__ __forceinline__ void group_wait() {
#if LC_WGMMA
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#endif
}
__device__ __forceinline__ void group_end() {
    group_commit();
    group_wait<0>();
}
/* A barrier of `groups` groups alone; number: 1 .. 15. What a product is to read needs shared_fence() before. */
__device__ __forceinline__ void groups_meet(int number, int groups) {
#ifdef LC_EMULATED
    lc_emu_barrier(number, groups * 128, 0);
#else
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(groups * 128) : "memory");
#endif
}
/* The same for those who need not wait: threads of `groups` groups in all arrive or meet there. */
__device__ __forceinline__ void groups_arrive(int number, int groups) {
#ifdef LC_EMULATED
    lc_emu_arrive(number, groups * 128);
#else
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(groups * 128) : "memory");
#endif
}
/* 1 / x and log2(x), within 1 ulp and 2^-21, for numbers that are normal. */
__device__ __forceinline__ float inverse(float x) {
#ifdef LC_EMULATED
    return 1 / x;
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}
__device__ __forceinline__ float log2_fast(float x) {
#ifdef LC_EMULATED
    return log2f(x);
#else
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}
/* The larger; NaN stays NaN. */
__device__ __forceinline__ float at_least(float v, float least) {
#ifdef LC_EMULATED
    return v < least ? least : v;
#else
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(v), "f"(least));
    return y;
#endif
}
/* 4 bytes of shared memory by their address there, as shared_place() tells it: what is exchanged by a row's number changes a few bits of it. */
#ifdef LC_EMULATED
typedef uintptr_t shared_at;
__device__ __forceinline__ shared_at shared_place(const void *p) { return (shared_at)p; }
__device__ __forceinline__ void shared_put(shared_at to, uint32_t v) { *(uint32_t *)to = v; }
__device__ __forceinline__ uint32_t shared_get(shared_at from) { return *(const uint32_t *)from; }
#else
typedef uint32_t shared_at;
__device__ __forceinline__ shared_at shared_place(const void *p) { return shared_address(p); }
__device__ __forceinline__ void shared_put(shared_at to, uint32_t v) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(v) : "memory"); }
__device__ __forceinline__ uint32_t shared_get(shared_at from) {
    uint32_t v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
    return v;
}
#endif
/* Keeps the compiler from moving uses of acc across what it cannot see. */
template <int N> __device__ __forceinline__ void group_hold(float (&acc)[N][4]) {
#if LC_WGMMA
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(acc[i][0]), "+f"(acc[i][1]), "+f"(acc[i][2]), "+f"(acc[i][3])::"memory");
#endif
}

/* ---- products -------------------------------------------------------------------------------------------------------- */
/* How an operand's tile lies. A: ALONG_K [m][k], ACROSS_K [k][m]; B: ALONG_K [n][k], ACROSS_K [k][n]. */
enum { ALONG_K, ACROSS_K };

/* One step of 16 along k: acc += A B, or with ADD 0 acc = A B. ra, rb: rows of the tiles. Rows m .. m + 63 of A (m a multiple of 64 ACROSS_K, of 8 ALONG_K), columns n .. n + N
 * - 1 of B (the same), k a multiple of 16. */
template <int N, int RA, int LA, int RB, int LB, int ADD = 1, class T>
__device__ __forceinline__ void group_step(float (&acc)[N / 8][4], const T *a, int m, const T *b, int n, int k) {
#if LC_WGMMA
    int pa = LA == ALONG_K ? (k >> 6) * (RA * 64) + m * 64 + (k & 63) : (m >> 6) * (RA * 64) + k * 64;
    int pb = LB == ALONG_K ? (k >> 6) * (RB * 64) + n * 64 + (k & 63) : (n >> 6) * (RB * 64) + k * 64 + (n & 63);
    group_mma<N, T>::template run<LA, LB, ADD>(acc, group_tile(a, 16, pa), group_tile(b, LB == ALONG_K ? 16 : RB * 128, pb));
#else
#pragma unroll
    for (int i = 0; !ADD && i < N / 8; i++) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0;
    uint32_t x[4], y[4];
    int row = m + (threadIdx.x >> 5 & 3) * 16;
    if (LA == ALONG_K) fragment_a<RA>(x, a, row, k);
    else fragment_a_t<RA>(x, a, row, k);
    if constexpr (N == 8) { /* ALONG_K alone */
        int l = threadIdx.x & 31;
        const T *at = tile_at<RB>(b, n + l / 4, k + l % 4 * 2), *next = tile_at<RB>(b, n + l / 4, k + 8 + l % 4 * 2);
        mma16<T>(acc[0], x, *(const uint32_t *)at, *(const uint32_t *)next);
    }
#pragma unroll
    for (int i = 0; i < N / 16; i++) {
        if (LB == ALONG_K) fragment_b<RB>(y, b, n + 16 * i, k);
        else fragment_b_t<RB>(y, b, n + 16 * i, k);
        mma16<T>(acc[2 * i], x, y[0], y[1]);
        mma16<T>(acc[2 * i + 1], x, y[2], y[3]);
    }
#endif
}

/* acc += A B over K. */
template <int N, int K, int RA, int LA, int RB, int LB, class T>
__device__ __forceinline__ void group_product(float (&acc)[N / 8][4], const T *a, int m, const T *b, int n) {
#pragma unroll
    for (int k = 0; k < K; k += 16) group_step<N, RA, LA, RB, LB>(acc, a, m, b, n, k);
}

/* acc = A B over K. */
template <int N, int K, int RA, int LA, int RB, int LB, class T>
__device__ __forceinline__ void group_product_new(float (&acc)[N / 8][4], const T *a, int m, const T *b, int n) {
    group_step<N, RA, LA, RB, LB, 0>(acc, a, m, b, n, 0);
#pragma unroll
    for (int k = 16; k < K; k += 16) group_step<N, RA, LA, RB, LB>(acc, a, m, b, n, k);
}

/* acc += A B (ADD 0: acc = A B) with A in registers, as fragments of the warp's 16 rows: a[k / 16]. */
template <int N, int RB, int LB, int ADD, class T>
__device__ __forceinline__ void group_step(float (&acc)[N / 8][4], const uint32_t (&a)[4], const T *b, int n, int k) {
#if LC_WGMMA
    int pb = LB == ALONG_K ? (k >> 6) * (RB * 64) + n * 64 + (k & 63) : (n >> 6) * (RB * 64) + k * 64 + (n & 63);
    group_mma<N, T>::template run<LB, ADD>(acc, a, group_tile(b, LB == ALONG_K ? 16 : RB * 128, pb));
#else
#pragma unroll
    for (int i = 0; !ADD && i < N / 8; i++) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0;
    uint32_t y[4];
#pragma unroll
    for (int i = 0; i < N / 16; i++) {
        if (LB == ALONG_K) fragment_b<RB>(y, b, n + 16 * i, k);
        else fragment_b_t<RB>(y, b, n + 16 * i, k);
        mma16<T>(acc[2 * i], a, y[0], y[1]);
        mma16<T>(acc[2 * i + 1], a, y[2], y[3]);
    }
#endif
}
template <int N, int K, int RB, int LB, class T>
__device__ __forceinline__ void group_product(float (&acc)[N / 8][4], const uint32_t (&a)[K / 16][4], const T *b, int n) {
#pragma unroll
    for (int k = 0; k < K; k += 16) group_step<N, RB, LB, 1>(acc, a[k / 16], b, n, k);
}
template <int N, int K, int RB, int LB, class T>
__device__ __forceinline__ void group_product_new(float (&acc)[N / 8][4], const uint32_t (&a)[K / 16][4], const T *b, int n) {
    group_step<N, RB, LB, 0>(acc, a[0], b, n, 0);
#pragma unroll
    for (int k = 16; k < K; k += 16) group_step<N, RB, LB, 1>(acc, a[k / 16], b, n, k);
}

/* Four registers of each of four lanes, transposed: the lane's i-th of the result is its quad's lane i's register (lane % 4). */
__device__ __forceinline__ void quad_transpose(uint32_t (&v)[4]) {
    bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        uint32_t x = __shfl_xor_sync(0xffffffffu, odd ? v[i] : v[i + 1], 1);
        (odd ? v[i] : v[i + 1]) = x;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t x = __shfl_xor_sync(0xffffffffu, high ? v[i] : v[i + 2], 2);
        (high ? v[i] : v[i + 2]) = x;
    }
}

/* An accumulator [16][N] of a warp as fragments for the product after it. */
template <int N, class T = bf16> __device__ __forceinline__ void as_fragments(uint32_t (&a)[N / 16][4], const float (&x)[N / 8][4]) {
#pragma unroll
    for (int j = 0; j < N / 16; j++) {
        a[j][0] = pack2<T>(x[2 * j][0], x[2 * j][1]);
        a[j][1] = pack2<T>(x[2 * j][2], x[2 * j][3]);
        a[j][2] = pack2<T>(x[2 * j + 1][0], x[2 * j + 1][1]);
        a[j][3] = pack2<T>(x[2 * j + 1][2], x[2 * j + 1][3]);
    }
}

#endif
