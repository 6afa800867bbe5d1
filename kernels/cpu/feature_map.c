/* feature_map.c: see feature_map.h. Gradients follow PyTorch: the clamp passes where the value is at least eps, ties of a maximum share. */
#include "feature_map.h"

#include "simd.h"

/* ---- rows, in double --------------------------------------------------------------------------------------------------- */
static double row_max(int64_t f, const double *x, double sign) {
    double m = -INFINITY;
    for (int64_t i = 0; i < f; i++) m = LC_MAX(m, sign * x[i]);
    return m;
}

/* exp(sign x - max), divided by its sum when `normalise` */
static void row_exp(int64_t f, const double *x, double sign, int normalise, double *a) {
    double m = row_max(f, x, sign), sum = 0;
    for (int64_t i = 0; i < f; i++) sum += a[i] = exp(sign * x[i] - m);
    if (normalise)
        for (int64_t i = 0; i < f; i++) a[i] /= sum;
}

void K(map_row)(int map, int full, int64_t f, const double *x, double *a) {
    if (map == MAP_SOFTMAX_DIM || map == MAP_EXP_DIM) {
        row_exp(f, x, 1, map == MAP_SOFTMAX_DIM, a);
        if (full) row_exp(f, x, -1, map == MAP_SOFTMAX_DIM, a + f);
        return;
    }
    for (int64_t i = 0; i < f; i++) a[i] = map == MAP_RELU ? LC_MAX(x[i], 0) : x[i] > 0 ? 1 + x[i] : exp(x[i]);
}

static void row_exp_backward(int map, int64_t f, const double *x, double sign, const double *a, const double *da, double *dx) {
    double dot = 0, m = row_max(f, x, sign);
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
