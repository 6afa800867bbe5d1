/* feature_map.h: the feature maps of hybrid attention (softmax_dim, exp_dim, pos_elu, relu), forward and backward: one
 * row at a time in double for the plain twins and for checks, and on tiles of 64 tokens for the fast kernels. A tile is
 * transposed, [f][64]: maxima and sums over the features are then sums of whole vectors. Clamping from below with eps
 * is the caller's last step in the row forms, part of the tile forms. */
#ifndef LC_FEATURE_MAP_H
#define LC_FEATURE_MAP_H

#include "cpu.h"

enum { MAP_NONE, MAP_SOFTMAX_DIM, MAP_EXP_DIM, MAP_POS_ELU, MAP_RELU };
enum { TILE = 64 }; /* tokens a tile */

/* Features that a map makes of f inputs. */
static inline int64_t map_features(int map, int full, int64_t f) {
    return full && (map == MAP_SOFTMAX_DIM || map == MAP_EXP_DIM) ? 2 * f : f;
}

/* a [F] = map(x [f]), not clamped. */
void K(map_row)(int map, int full, int64_t f, const double *x, double *a);
/* dx [f] from da [F], a as map_row left it; da is 0 where the clamp acted. */
void K(map_row_backward)(int map, int full, int64_t f, const double *x, const double *a, const double *da, double *dx);

/* One token: y [F] = map(x [f]), clamped; x is used up. */
void K(map_line)(int map, int full, int64_t f, real eps, real *x, real *y);

/* In place: x [f][64] becomes a [F][64], clamped into y [F][64] (y may be a when the unclamped values are not needed).
 */
void K(map_tile)(int map, int full, int64_t f, real eps, real *a, real *y);
/* dx [f][64] from a [F][64] (not clamped) and the gradient dy [F][64] of the clamped features; dy is used up, dx may be
 * dy. */
void K(map_tile_backward)(int map, int full, int64_t f, real eps, const real *a, real *dy);

#endif
