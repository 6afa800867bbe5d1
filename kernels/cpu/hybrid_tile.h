/* hybrid_tile.h: products, transposes and row copies of small tiles that fit the caches: what the chunked attention
 * kernels are made of. A tile holds TILE = 64 tokens; "transposed" means [features][TILE], so that what is done for
 * each token is done for VL tokens at once. */
#ifndef LC_HYBRID_TILE_H
#define LC_HYBRID_TILE_H

#include "feature_map.h"
#include "simd.h"

#if LC_DOUBLE
typedef int64_t lane_int; /* as wide as real: the element of vint */
#else
typedef int32_t lane_int;
#endif

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static inline vint vint_load(const lane_int *p) {
    vint v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline vint vint_set(lane_int x) { return x - (vint){0}; }
static inline vint vint_iota(lane_int from) {
    vint v;
    for (int i = 0; i < VL; i++) v[i] = from + i;
    return v;
}

/* C [m, n] = A B, or += when add: A(i, p) at a[i * ra + p * ca], p < k; B [k, n] and C rows ldb and ldc apart; n a
 * multiple of VL. */
void K(tile_gemm)(int64_t m, int64_t n, int64_t k, const real *a, int64_t ra, int64_t ca, const real *b, int64_t ldb,
                  real *c, int64_t ldc, int add);

/* to [cols][TILE] = from [TILE][ld] transposed; ld a multiple of VL, of which cols rounded up to VL are read and
 * written. */
void K(tile_transpose)(int64_t cols, const real *from, int64_t ld, real *to);
/* The way back: to [TILE][ld] from [cols][TILE]; rows of `to` past cols up to a multiple of VL get what follows in
 * `from`. */
void K(tile_transpose_back)(int64_t cols, const real *from, real *to, int64_t ld);

/* One row of d, padded with zeros to dp. */
static inline void copy_row(real *to, const real *from, int64_t d, int64_t dp) {
    int64_t e = 0;
    for (; e + VL <= d; e += VL) vstore(to + e, vload(from + e));
    for (; e < d; e++) to[e] = from[e];
    for (; e < dp; e++) to[e] = 0;
}

#endif
