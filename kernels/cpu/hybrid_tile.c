/* hybrid_tile.c: see hybrid_tile.h. The product keeps a block of C in registers while it walks along k. */
#include "hybrid_tile.h"

#define INLINE static inline __attribute__((always_inline))

#if LC_VBYTES == 64
enum { MR = 8 };
#else
enum { MR = 4 };
#endif

/* C block of mr rows and nv vectors; mr, nv, and one of ra and ca, are constants where this is inlined. */
INLINE void block(const int mr, const int nv, int64_t k, const real *restrict a, int64_t ra, int64_t ca,
                  const real *restrict b, int64_t ldb, real *restrict c, int64_t ldc, int add) {
    vreal acc[8][2];
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 2
        for (int j = 0; j < nv; j++) acc[i][j] = (vreal){0};
    for (int64_t p = 0; p < k; p++) {
        vreal row[2];
#pragma GCC unroll 2
        for (int j = 0; j < nv; j++) row[j] = vload(b + j * VL);
#pragma GCC unroll 8
        for (int i = 0; i < mr; i++) {
            vreal x = vset(a[i * ra]);
#pragma GCC unroll 2
            for (int j = 0; j < nv; j++) acc[i][j] += x * row[j];
        }
        a += ca, b += ldb;
    }
#pragma GCC unroll 8
    for (int i = 0; i < mr; i++)
#pragma GCC unroll 2
        for (int j = 0; j < nv; j++) {
            real *to = c + i * ldc + j * VL;
            vstore(to, add ? vload(to) + acc[i][j] : acc[i][j]);
        }
}

INLINE void rows(const int mr, int64_t n, int64_t k, const real *a, int64_t ra, int64_t ca, const real *b, int64_t ldb,
                 real *c, int64_t ldc, int add) {
    int64_t j = 0;
    for (; j + 2 * VL <= n; j += 2 * VL) block(mr, 2, k, a, ra, ca, b + j, ldb, c + j, ldc, add);
    if (j < n) block(mr, 1, k, a, ra, ca, b + j, ldb, c + j, ldc, add);
}

INLINE void gemm(int64_t m, int64_t n, int64_t k, const real *a, int64_t ra, int64_t ca, const real *b, int64_t ldb,
                 real *c, int64_t ldc, int add) {
    int64_t i = 0;
    for (; i + MR <= m; i += MR) rows(MR, n, k, a + i * ra, ra, ca, b, ldb, c + i * ldc, ldc, add);
    if (MR > 4 && i + 4 <= m) rows(4, n, k, a + i * ra, ra, ca, b, ldb, c + i * ldc, ldc, add), i += 4;
    for (; i < m; i++) rows(1, n, k, a + i * ra, ra, ca, b, ldb, c + i * ldc, ldc, add);
}

void K(tile_gemm)(int64_t m, int64_t n, int64_t k, const real *a, int64_t ra, int64_t ca, const real *b, int64_t ldb,
                  real *c, int64_t ldc, int add) {
    if (ca == 1)
        gemm(m, n, k, a, ra, 1, b, ldb, c, ldc, add);
    else if (ra == 1)
        gemm(m, n, k, a, 1, ca, b, ldb, c, ldc, add);
    else
        gemm(m, n, k, a, ra, ca, b, ldb, c, ldc, add);
}

/* Lanes that the step of width s takes from a pair of rows: for the first of the pair, for the second. */
#define FIRST(l, s)  ((l) & (s) ? VL + (l) - (s) : (l))
#define SECOND(l, s) ((l) & (s) ? VL + (l) : (l) + (s))
#define LANES(which, s)                                                                                                \
    {                                                                                                                  \
        which(0, s), which(1, s), which(2, s), which(3, s), which(4, s), which(5, s), which(6, s), which(7, s),        \
            which(8, s), which(9, s), which(10, s), which(11, s), which(12, s), which(13, s), which(14, s),            \
            which(15, s)                                                                                               \
    }
static const lane_int lanes[4][2][16] = {{LANES(FIRST, 1), LANES(SECOND, 1)},
                                         {LANES(FIRST, 2), LANES(SECOND, 2)},
                                         {LANES(FIRST, 4), LANES(SECOND, 4)},
                                         {LANES(FIRST, 8), LANES(SECOND, 8)}};

/* VL x VL: each step exchanges the off-diagonal s x s blocks of every pair of rows s apart. */
INLINE void transpose_block(const real *from, int64_t ld, real *to, int64_t ldt) {
    vreal r[VL];
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) r[i] = vload(from + i * ld);
#pragma GCC unroll 4
    for (int step = 0; step < 4; step++) {
        const int s = 1 << step;
        if (s >= VL) break;
        vint first = vint_load(lanes[step][0]), second = vint_load(lanes[step][1]);
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++)
            if (!(i & s)) {
                vreal x = r[i], y = r[i + s];
                r[i] = __builtin_shuffle(x, y, first), r[i + s] = __builtin_shuffle(x, y, second);
            }
    }
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) vstore(to + i * ldt, r[i]);
}

void K(tile_transpose)(int64_t cols, const real *from, int64_t ld, real *to) {
    for (int64_t e = 0; e < cols; e += VL)
        for (int64_t t = 0; t < TILE; t += VL) transpose_block(from + t * ld + e, ld, to + e * TILE + t, TILE);
}

void K(tile_transpose_back)(int64_t cols, const real *from, real *to, int64_t ld) {
    for (int64_t e = 0; e < cols; e += VL)
        for (int64_t t = 0; t < TILE; t += VL) transpose_block(from + e * TILE + t, TILE, to + t * ld + e, ld);
}
