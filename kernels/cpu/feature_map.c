/* feature_map.c: see feature_map.h. Gradients follow PyTorch: the clamp passes where the value is at least eps, ties of
 * a maximum share. */
#include "feature_map.h"

#include "hybrid_row.h"

/* ---- rows, in double
 * --------------------------------------------------------------------------------------------------- */
static double signed_max(int64_t f, const double *x, double sign) {
    double m = -INFINITY;
    for (int64_t i = 0; i < f; i++) m = LC_MAX(m, sign * x[i]);
    return m;
}

/* exp(sign x - max), divided by its sum when `normalise` */
static void plain_exp(int64_t f, const double *x, double sign, int normalise, double *a) {
    double m = signed_max(f, x, sign), sum = 0;
    for (int64_t i = 0; i < f; i++) sum += a[i] = exp(sign * x[i] - m);
    if (normalise)
        for (int64_t i = 0; i < f; i++) a[i] /= sum;
}

void K(map_row)(int map, int full, int64_t f, const double *x, double *a) {
    if (map == MAP_SOFTMAX_DIM || map == MAP_EXP_DIM) {
        plain_exp(f, x, 1, map == MAP_SOFTMAX_DIM, a);
        if (full) plain_exp(f, x, -1, map == MAP_SOFTMAX_DIM, a + f);
        return;
    }
    for (int64_t i = 0; i < f; i++) a[i] = map == MAP_RELU ? LC_MAX(x[i], 0) : x[i] > 0 ? 1 + x[i] : exp(x[i]);
}

static void row_exp_backward(int map, int64_t f, const double *x, double sign, const double *a, const double *da,
                             double *dx) {
    double dot = 0, m = signed_max(f, x, sign);
    for (int64_t i = 0; i < f; i++) dot += a[i] * da[i];
    if (map == MAP_SOFTMAX_DIM) {
        for (int64_t i = 0; i < f; i++) dx[i] += sign * a[i] * (da[i] - dot);
        return;
    }
    int64_t ties = 0;
    for (int64_t i = 0; i < f; i++) ties += sign * x[i] == m;
    for (int64_t i = 0; i < f; i++) dx[i] += sign * (a[i] * da[i] - (sign * x[i] == m ? dot / (double)ties : 0));
}

void K(map_row_backward)(int map, int full, int64_t f, const double *x, const double *a, const double *da, double *dx) {
    for (int64_t i = 0; i < f; i++) dx[i] = 0;
    if (map == MAP_SOFTMAX_DIM || map == MAP_EXP_DIM) {
        row_exp_backward(map, f, x, 1, a, da, dx);
        if (full) row_exp_backward(map, f, x, -1, a + f, da + f, dx);
        return;
    }
    for (int64_t i = 0; i < f; i++) dx[i] = map == MAP_RELU ? (x[i] > 0 ? da[i] : 0) : x[i] > 0 ? da[i] : a[i] * da[i];
}

/* ---- one token in real
 * ------------------------------------------------------------------------------------------------- */
static void line_exp(int map, int64_t f, real eps, real *y) {
    real sum = row_exp(f, y, row_max(f, y)), by = map == MAP_SOFTMAX_DIM ? 1 / sum : 1;
    for (int64_t i = 0; i < f; i++) y[i] = LC_MAX(y[i] * by, eps);
}

void K(map_line)(int map, int full, int64_t f, real eps, real *x, real *y) {
    for (int64_t i = 0; i < f; i++) y[i] = x[i];
    if (map == MAP_SOFTMAX_DIM || map == MAP_EXP_DIM) {
        for (int64_t i = 0; full && i < f; i++) y[f + i] = -x[i];
        line_exp(map, f, eps, y);
        if (full) line_exp(map, f, eps, y + f);
        return;
    }
    for (int64_t i = 0; i < f; i++) {
        real v = map == MAP_RELU ? LC_MAX(x[i], 0) : x[i] > 0 ? 1 + x[i] : rexp(x[i]);
        y[i] = LC_MAX(v, eps);
    }
}

/* ---- tiles, transposed: [f][TILE]
 * -------------------------------------------------------------------------------------- */

/* One vector of tokens: exp(sign (x - extreme)) over f rows into a, which may be x; returns the sums. */
static inline vreal column_exp(int64_t f, const real *x, real sign, vreal extreme, real *a) {
    vreal sum = vset(0);
    for (int64_t i = 0; i < f; i++) {
        vreal e = vexp_down((vload(x + i * TILE) - extreme) * sign);
        vstore(a + i * TILE, e);
        sum += e;
    }
    return sum;
}

static inline void column_finish(int64_t f, vreal by, vreal eps, real *a, real *y) {
    for (int64_t i = 0; i < f; i++) {
        vreal v = vload(a + i * TILE) * by;
        vstore(a + i * TILE, v);
        vstore(y + i * TILE, vmax(v, eps));
    }
}

static void tile_exp(int map, int full, int64_t f, real eps, real *a, real *y) {
    for (int64_t t = 0; t < TILE; t += VL) {
        vreal hi = vload(a + t), lo = hi, one = vset(1);
        for (int64_t i = 1; i < f; i++) {
            vreal x = vload(a + i * TILE + t);
            hi = vmax(hi, x), lo = vmin(lo, x);
        }
        vreal low_sum = full ? column_exp(f, a + t, -1, lo, a + f * TILE + t) : one;
        vreal high_sum = column_exp(f, a + t, 1, hi, a + t);
        column_finish(f, map == MAP_SOFTMAX_DIM ? one / high_sum : one, vset(eps), a + t, y + t);
        if (full)
            column_finish(f, map == MAP_SOFTMAX_DIM ? one / low_sum : one, vset(eps), a + f * TILE + t,
                          y + f * TILE + t);
    }
}

void K(map_tile)(int map, int full, int64_t f, real eps, real *a, real *y) {
    if (!f) return;
    if (map == MAP_SOFTMAX_DIM || map == MAP_EXP_DIM) {
        tile_exp(map, full, f, eps, a, y);
        return;
    }
    for (int64_t n = 0; n < f * TILE; n += VL) {
        vreal x = vload(a + n), v;
        if (map == MAP_RELU)
            v = vmax(x, vset(0));
        else
            v = vselect(x > 0, 1 + x, vexp(x));
        vstore(a + n, v);
        vstore(y + n, vmax(v, vset(eps)));
    }
}

/* One vector of tokens of a half: dx = or += sign * (its gradient). a and dy [f][TILE]. */
static inline void column_backward(int map, int64_t f, real sign, vreal eps, const real *a, const real *dy, real *dx,
                                   int add) {
    vreal dot = vset(0), ties = vset(0), one = vset(1), zero = vset(0);
    for (int64_t i = 0; i < f; i++) {
        vreal v = vload(a + i * TILE);
        dot += vselect(v >= eps, v * vload(dy + i * TILE), zero);
        if (map == MAP_EXP_DIM) ties += vselect(v == one, one, zero);
    }
    if (map == MAP_EXP_DIM) dot = dot / ties; /* the extreme itself has the value 1 */
    for (int64_t i = 0; i < f; i++) {
        vreal v = vload(a + i * TILE), d = vselect(v >= eps, vload(dy + i * TILE), zero), r;
        if (map == MAP_EXP_DIM)
            r = v * d - vselect(v == one, dot, zero);
        else
            r = v * (d - dot);
        vstore(dx + i * TILE, add ? vload(dx + i * TILE) + sign * r : sign * r);
    }
}

void K(map_tile_backward)(int map, int full, int64_t f, real eps, const real *a, real *dy) {
    if (map == MAP_SOFTMAX_DIM || map == MAP_EXP_DIM) {
        for (int64_t t = 0; t < TILE; t += VL) {
            column_backward(map, f, 1, vset(eps), a + t, dy + t, dy + t, 0);
            if (full) column_backward(map, f, -1, vset(eps), a + f * TILE + t, dy + f * TILE + t, dy + t, 1);
        }
        return;
    }
    for (int64_t n = 0; n < f * TILE; n += VL) {
        vreal v = vload(a + n), slope = vset(1), zero = vset(0);
        if (map == MAP_RELU)
            slope = vselect(v > 0, slope, zero);
        else
            slope = vmin(v, slope); /* above 1: x > 0 */
        vstore(dy + n, vselect(v >= eps, vload(dy + n) * slope, zero));
    }
}
