/* hybrid_row.h: attention of one query at a time, for decoding: products of a row with many rows, straight from where
 * they lie. */
#ifndef LC_HYBRID_ROW_H
#define LC_HYBRID_ROW_H

#include "hybrid_tile.h"

#define LC_XOR16(w)                                                                                                    \
    {                                                                                                                  \
        0 ^ w, 1 ^ w, 2 ^ w, 3 ^ w, 4 ^ w, 5 ^ w, 6 ^ w, 7 ^ w, 8 ^ w, 9 ^ w, 10 ^ w, 11 ^ w, 12 ^ w, 13 ^ w, 14 ^ w,  \
            15 ^ w                                                                                                     \
    }
static const lane_int swap_lanes[4][16] = {LC_XOR16(1), LC_XOR16(2), LC_XOR16(4), LC_XOR16(8)};

/* The sum of all lanes in log2(VL) steps. */
static inline real lane_sum(vreal v) {
    for (int step = 0; 1 << step < VL; step++) v += __builtin_shuffle(v, vint_load(swap_lanes[step]));
    return v[0];
}

static inline real row_dot(int64_t d, const real *x, const real *y) {
    vreal a = vset(0), b = vset(0);
    real sum = 0;
    int64_t e = 0;
    for (; e + 2 * VL <= d; e += 2 * VL) a += vload(x + e) * vload(y + e), b += vload(x + e + VL) * vload(y + e + VL);
    for (; e + VL <= d; e += VL) a += vload(x + e) * vload(y + e);
    for (; e < d; e++) sum += x[e] * y[e];
    return sum + lane_sum(a + b);
}

/* out [n] = scale * x . row j, rows `stride` apart; four at a time. */
static inline void rows_dot(int64_t d, int64_t n, const real *x, const real *rows, int64_t stride, real scale,
                            real *out) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4, rows += 4 * stride) {
        vreal s[4] = {{0}, {0}, {0}, {0}};
        real tail[4] = {0, 0, 0, 0};
        int64_t e = 0;
        for (; e + VL <= d; e += VL) {
            vreal v = vload(x + e);
            for (int r = 0; r < 4; r++) s[r] += v * vload(rows + r * stride + e);
        }
        for (; e < d; e++)
            for (int r = 0; r < 4; r++) tail[r] += x[e] * rows[r * stride + e];
        for (int r = 0; r < 4; r++) out[j + r] = scale * (lane_sum(s[r]) + tail[r]);
    }
    for (; j < n; j++, rows += stride) out[j] = scale * row_dot(d, x, rows);
}

/* y [d] += sum of w [n] times rows, four vectors of y in registers. */
static inline void rows_sum(int64_t d, int64_t n, const real *w, const real *rows, int64_t stride, real *y) {
    int64_t e = 0;
    for (; e + 4 * VL <= d; e += 4 * VL) {
        vreal s[4];
        for (int r = 0; r < 4; r++) s[r] = vload(y + e + r * VL);
        for (int64_t j = 0; j < n; j++)
            for (int r = 0; r < 4; r++) s[r] += w[j] * vload(rows + j * stride + e + r * VL);
        for (int r = 0; r < 4; r++) vstore(y + e + r * VL, s[r]);
    }
    for (; e + VL <= d; e += VL) {
        vreal s = vload(y + e);
        for (int64_t j = 0; j < n; j++) s += w[j] * vload(rows + j * stride + e);
        vstore(y + e, s);
    }
    for (; e < d; e++)
        for (int64_t j = 0; j < n; j++) y[e] += w[j] * rows[j * stride + e];
}

/* w [n] = exp(w - max) in place; returns the sum. */
static inline real row_exp(int64_t n, real *w, real max) {
    vreal all = vset(0);
    real sum = 0;
    int64_t j = 0;
    for (; j + VL <= n; j += VL) {
        vreal e = vexp(vload(w + j) - max);
        vstore(w + j, e);
        all += e;
    }
    for (; j < n; j++) sum += w[j] = rexp(w[j] - max);
    return sum + lane_sum(all);
}

static inline real row_max(int64_t n, const real *w) {
    vreal all = vset(-INFINITY);
    real max;
    int64_t j = 0;
    for (; j + VL <= n; j += VL) all = vmax(all, vload(w + j));
    max = vhmax(all);
    for (; j < n; j++) max = LC_MAX(max, w[j]);
    return max;
}

#endif
