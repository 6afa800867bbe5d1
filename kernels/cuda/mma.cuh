/* mma.cuh: the tensor cores and asynchronous copies as small functions: all of the plugin's inline PTX. Each has a portable twin for
 * the emulator. Also the layout of tiles in shared memory that they like: rows of 64 halves (128 bytes), the 16-byte pieces of a row
 * exchanged by row & 7, so that neither rows nor columns of 8 x 8 matrices meet in a bank. A tile of more columns is several such
 * panels of [rows][64], one after the other. Tiles start at multiples of 1024 bytes. */
#ifndef LC_MMA_CUH
#define LC_MMA_CUH

#include "device.cuh"

/* ---- numbers --------------------------------------------------------------------------------------------------------- */
template <class T> struct pair_of;
template <> struct pair_of<bf16> { typedef __nv_bfloat162 type; };
template <> struct pair_of<f16> { typedef __half2 type; };

/* Two floats as halves in one register, the first in the low bits. */
template <class T> __device__ __forceinline__ uint32_t pack2(float lo, float hi);
template <class T> __device__ __forceinline__ float2 unpack2(uint32_t v);
template <> __device__ __forceinline__ uint32_t pack2<bf16>(float lo, float hi) {
    __nv_bfloat162 p = __floats2bfloat162_rn(lo, hi);
    uint32_t u;
    memcpy(&u, &p, 4);
    return u;
}
template <> __device__ __forceinline__ uint32_t pack2<f16>(float lo, float hi) {
    __half2 p = __floats2half2_rn(lo, hi);
    uint32_t u;
    memcpy(&u, &p, 4);
    return u;
}
template <> __device__ __forceinline__ float2 unpack2<bf16>(uint32_t v) {
    return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
}
template <> __device__ __forceinline__ float2 unpack2<f16>(uint32_t v) {
    __half2 p;
    memcpy(&p, &v, 4);
    return __half22float2(p);
}

/* The larger of each half; NaN stays NaN. */
__device__ __forceinline__ uint32_t at_least2(uint32_t v, uint32_t least) {
#ifdef LC_EMULATED
    float2 x = unpack2<bf16>(v), y = unpack2<bf16>(least);
    return pack2<bf16>(x.x < y.x ? y.x : x.x, x.y < y.y ? y.y : x.y);
#else
    uint32_t r;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(least));
    return r;
#endif
}

/* Sums of both halves, each rounded. */
__device__ __forceinline__ uint32_t add2(uint32_t a, uint32_t b) {
#ifdef LC_EMULATED
    float2 x = unpack2<bf16>(a), y = unpack2<bf16>(b);
    return pack2<bf16>(x.x + y.x, x.y + y.y);
#else
    __nv_bfloat162 x, y;
    memcpy(&x, &a, 4), memcpy(&y, &b, 4);
    x = __hadd2(x, y);
    memcpy(&a, &x, 4);
    return a;
#endif
}

__device__ __forceinline__ float exp2_fast(float x) { /* 2 ulp; 0 for -inf */
#ifdef LC_EMULATED
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

/* ---- asynchronous copies to shared memory ---------------------------------------------------------------------------- */
#ifdef LC_EMULATED
__device__ __forceinline__ void copy16(void *to, const void *from, bool valid) { lc_emu_copy(to, from, 16, valid ? 16 : 0); }
__device__ __forceinline__ void copy4(void *to, const void *from, bool valid) { lc_emu_copy(to, from, 4, valid ? 4 : 0); }
__device__ __forceinline__ void copy_commit() { lc_emu_copy_commit(); }
template <int N> __device__ __forceinline__ void copy_wait() { lc_emu_copy_wait(N); }
#else
__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
/* 16 bytes, both aligned; zeros when not valid (from must still be an address). */
__device__ __forceinline__ void copy16(void *to, const void *from, bool valid) {
    int n = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(n) : "memory");
}
__device__ __forceinline__ void copy4(void *to, const void *from, bool valid) { /* the same with 4 bytes */
    int n = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(n) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* Until at most N groups of this thread are under way; a barrier must follow before others read. */
template <int N> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
#endif

/* ---- kernels in a chain: chain.cuh ------------------------------------------------------------------------------------ */
__device__ __forceinline__ void next_may_start() {
#if !defined(LC_EMULATED) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if !defined(LC_EMULATED) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/* Brings what is about to be read into the second-level cache: both multiples of 16. */
__device__ __forceinline__ void read_ahead(const void *p, uint32_t bytes) {
#if !defined(LC_EMULATED) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes));
#endif
    (void)p, (void)bytes;
}

/* ---- 8 x 8 matrices of halves from shared memory --------------------------------------------------------------------- */
/* Lane l gives the address of row l & 7 of matrix l / 8 (16 bytes); r[m] gets elements (l / 4, 2 (l % 4) + 0, 1) of matrix m, or,
 * transposed, elements (2 (l % 4) + 0, 1, l / 4). */
#ifdef LC_EMULATED
struct emulated_matrix {
    const char *row;
    uint32_t *r;
    bool transposed;
};
static inline void emulated_matrix_load(void *const record[32], uint32_t) {
    for (int lane = 0; lane < 32; lane++)
        for (int m = 0; m < 4; m++) {
            emulated_matrix *to = (emulated_matrix *)record[lane];
            char *r = (char *)&to->r[m];
            for (int i = 0; i < 2; i++) {
                int row = to->transposed ? lane % 4 * 2 + i : lane / 4, col = to->transposed ? lane / 4 : lane % 4 * 2 + i;
                memcpy(r + 2 * i, ((emulated_matrix *)record[8 * m + row])->row + 2 * col, 2);
            }
        }
}
__device__ __forceinline__ void matrix_load(uint32_t (&r)[4], const void *row) {
    emulated_matrix m = {(const char *)row, r, false};
    lc_emu_collective(0xffffffffu, "ldmatrix", emulated_matrix_load, &m);
}
__device__ __forceinline__ void matrix_load_t(uint32_t (&r)[4], const void *row) {
    emulated_matrix m = {(const char *)row, r, true};
    lc_emu_collective(0xffffffffu, "ldmatrix.trans", emulated_matrix_load, &m);
}
#else
__device__ __forceinline__ void matrix_load(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void matrix_load_t(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
#endif

/* The way back of matrix_load: 16 bytes of row l & 7 of matrix l / 8 by lane l's address, from all lanes' r. */
#ifdef LC_EMULATED
static inline void emulated_matrix_store(void *const record[32], uint32_t) {
    for (int lane = 0; lane < 32; lane++)
        for (int m = 0; m < 4; m++)
            memcpy((char *)((emulated_matrix *)record[8 * m + lane / 4])->row + lane % 4 * 4, &((emulated_matrix *)record[lane])->r[m], 4);
}
__device__ __forceinline__ void matrix_store(void *row, uint32_t (&r)[4]) {
    emulated_matrix m = {(const char *)row, r, false};
    lc_emu_collective(0xffffffffu, "stmatrix", emulated_matrix_store, &m);
}
#else
__device__ __forceinline__ void matrix_store(void *row, const uint32_t (&r)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
                 ::"r"(shared_address(row)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
#else
    uint32_t at = shared_address(row), lane = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < 4; m++) {
        uint32_t to = __shfl_sync(0xffffffffu, at, 8 * m + lane / 4) + lane % 4 * 4;
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(r[m]) : "memory");
    }
#endif
}
#endif

/* ---- products -------------------------------------------------------------------------------------------------------- */
/* c [16][8] += a [16][16] b [16][8]. Lane l, g = l / 4, q = l % 4: a[0..3] rows g, g + 8, g, g + 8 and columns 2q, 2q, 2q + 8, 2q + 8
 * (and the next); b0, b1 rows 2q, 2q + 8 (and the next) of column g; c[0..3] (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1). */
#ifdef LC_EMULATED
struct emulated_mma {
    float *c;
    const uint32_t *a;
    uint32_t b[2];
};
template <class T> static inline void emulated_mma16(void *const record[32], uint32_t) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const emulated_mma *m = (const emulated_mma *)record[lane];
        int g = lane / 4, q = lane % 4 * 2;
        for (int i = 0; i < 4; i++) {
            float2 v = unpack2<T>(m->a[i]);
            a[g + i % 2 * 8][q + i / 2 * 8] = v.x, a[g + i % 2 * 8][q + i / 2 * 8 + 1] = v.y;
        }
        for (int i = 0; i < 2; i++) {
            float2 v = unpack2<T>(m->b[i]);
            b[q + 8 * i][g] = v.x, b[q + 8 * i + 1][g] = v.y;
        }
    }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            float *c = &((const emulated_mma *)record[lane])->c[i], sum = 0;
            for (int k = 0; k < 16; k++) sum += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
            *c += sum;
        }
}
template <class T> __device__ __forceinline__ void mma16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulated_mma m = {c, a, {b0, b1}};
    lc_emu_collective(0xffffffffu, "mma.m16n8k16", emulated_mma16<T>, &m);
}
#else
template <class T> __device__ __forceinline__ void mma16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> __device__ __forceinline__ void mma16<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ __forceinline__ void mma16<f16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

/* ---- tiles ----------------------------------------------------------------------------------------------------------- */
/* Element (row, col) of a tile of ROWS rows. */
template <int ROWS, class T> __device__ __forceinline__ T *tile_at(T *tile, int row, int col) {
    return tile + (col >> 6) * (ROWS * 64) + row * 64 + ((((col >> 3) & 7) ^ (row & 7)) << 3) + (col & 7);
}

/* Fragments, ready for mma16; m, n and k are multiples of 16. Tiles named [x][y] hold y along a row. The row in a group of 8 and the
 * piece are the lane's alone, so that what changes from step to step is a constant. */
template <int ROWS> __device__ __forceinline__ int fragment_at(int row, int col, int lane_row, int lane_piece) {
    return (col >> 6) * (ROWS * 64) + (row + lane_row) * 64 + ((((lane_row & 7) ^ lane_piece) << 3) ^ (col & 48));
}
/* a: rows m .. m + 15, columns k .. k + 15 of a tile [m][k]. */
template <int ROWS, class T> __device__ __forceinline__ void fragment_a(uint32_t (&a)[4], const T *tile, int m, int k) {
    int l = threadIdx.x & 31;
    matrix_load(a, tile + fragment_at<ROWS>(m, k, l & 15, l >> 4));
}
/* a: the same from a tile [k][m]. */
template <int ROWS, class T> __device__ __forceinline__ void fragment_a_t(uint32_t (&a)[4], const T *tile, int m, int k) {
    int l = threadIdx.x & 31;
    matrix_load_t(a, tile + fragment_at<ROWS>(k, m, (l & 7) + (l >> 4) * 8, l >> 3 & 1));
}
/* The way back of fragment_a. */
template <int ROWS, class T> __device__ __forceinline__ void fragment_put(T *tile, int m, int k, uint32_t (&a)[4]) {
    int l = threadIdx.x & 31;
    matrix_store(tile + fragment_at<ROWS>(m, k, l & 15, l >> 4), a);
}
/* b[0], b[1]: columns n .. n + 7; b[2], b[3]: columns n + 8 .. n + 15; from a tile [n][k]. */
template <int ROWS, class T> __device__ __forceinline__ void fragment_b(uint32_t (&b)[4], const T *tile, int n, int k) {
    int l = threadIdx.x & 31;
    matrix_load(b, tile + fragment_at<ROWS>(n, k, (l & 7) + (l >> 4) * 8, l >> 3 & 1));
}
/* b: the same from a tile [k][n]. */
template <int ROWS, class T> __device__ __forceinline__ void fragment_b_t(uint32_t (&b)[4], const T *tile, int n, int k) {
    int l = threadIdx.x & 31;
    matrix_load_t(b, tile + fragment_at<ROWS>(k, n, (l & 7) + (l >> 3 & 1) * 8, l >> 4));
}

#endif
