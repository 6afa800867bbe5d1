/* sample.c: random fills and dropout, on the stream that philox.h defines. The result of element i depends on seed,
 * offset and i alone. */
#include "convert.h"
#include "scalar_math.h"
#include "walk.h"

#include "../philox.h"

#define KERNEL(name)                                                                                                   \
    int K(name)(const lc_kargs *k);                                                                                    \
    int K(name)(const lc_kargs *k)

enum { GROUP = 256 }; /* elements made at a time: 64 counters */

enum { UNIFORM, NORMAL };

typedef struct job {
    uint64_t seed, offset;
    int64_t total;
    int kind;
    double a, b; /* low and high, or mean and deviation; probability and scale for dropout */
    walk w;      /* random fills: the tensor */
    int dtype;
    const real *x; /* dropout */
    real *y;
    lc_view mask;
} job;

/* 32 random bits for each of the elements from group g on; lc_philox for 64 counters side by side. */
static void random_bits(const job *j, int64_t g, uint32_t *restrict out) {
    uint32_t c0[GROUP / 4], c1[GROUP / 4], c2[GROUP / 4], c3[GROUP / 4];
    uint64_t first = j->offset + (uint64_t)g * (GROUP / 4);
    uint32_t seed0 = (uint32_t)j->seed, seed1 = (uint32_t)(j->seed >> 32);
    for (int i = 0; i < GROUP / 4; i++) {
        c0[i] = (uint32_t)(first + (uint64_t)i), c1[i] = (uint32_t)((first + (uint64_t)i) >> 32);
        c2[i] = c3[i] = 0;
    }
    for (uint32_t r = 0; r < 10; r++) {
#pragma omp simd
        for (int i = 0; i < GROUP / 4; i++)
            lc_philox_round(&c0[i], &c1[i], &c2[i], &c3[i], seed0 + r * 0x9E3779B9u, seed1 + r * 0xBB67AE85u);
    }
    for (int i = 0; i < GROUP / 4; i++)
        out[4 * i] = c0[i], out[4 * i + 1] = c1[i], out[4 * i + 2] = c2[i], out[4 * i + 3] = c3[i];
}

static void uniform_group(const job *j, const uint32_t *bits, real *out) {
    real low = (real)j->a, high = (real)j->b, range = (real)(j->b - j->a);
#pragma omp simd
    for (int i = 0; i < GROUP; i++) {
        real v = low + range * lc_uniform(bits[i]);
        out[i] = v < high ? v : low; /* rounding may reach the open end */
    }
}

static void normal_group(const job *j, const uint32_t *bits, real *out) {
    real mean = (real)j->a, deviation = (real)j->b;
#pragma omp simd
    for (int i = 0; i < GROUP / 2; i++) {
        real z0, z1;
        lc_normal_pair(bits[2 * i], bits[2 * i + 1], &z0, &z1);
        out[2 * i] = mean + deviation * z0;
        out[2 * i + 1] = mean + deviation * z1;
    }
}

typedef struct write_job {
    const real *values; /* of the elements from `begin` on */
    int64_t begin;
    int dtype;
} write_job;

static void write_row(void *ctx, char *const *p, const int64_t *step, int64_t n, int64_t at) {
    const write_job *j = (const write_job *)ctx;
    uint64_t raw[GROUP];
    row_from_real(j->dtype, j->values + (at - j->begin), raw, n);
    walk_scatter(p[0], step[0], raw, n, lc_dtype_traits(j->dtype)->bytes);
}

static void fill_groups(void *ctx, int64_t begin, int64_t end, int thread) {
    const job *j = (const job *)ctx;
    (void)thread;
    for (int64_t g = begin; g < end; g++) {
        uint32_t bits[GROUP];
        real values[GROUP];
        random_bits(j, g, bits);
        if (j->kind == UNIFORM)
            uniform_group(j, bits, values);
        else
            normal_group(j, bits, values);
        write_job write = {values, g * GROUP, j->dtype};
        walk_range(&j->w, g * GROUP, LC_MIN((g + 1) * GROUP, j->total), write_row, &write);
    }
}

static int fill(const lc_kargs *k, int kind) {
    const lc_view *v[1] = {&k->x[0]};
    if (!lc_dtype_is_float(v[0]->dtype)) return LC_K_UNSUPPORTED;
    job j = {.seed = k->seed, .offset = k->offset, .kind = kind, .a = k->f[0], .b = k->f[1], .dtype = v[0]->dtype};
    walk_make(&j.w, 1, v, 1);
    j.total = j.w.total;
    run_parts(k, (j.total + GROUP - 1) / GROUP, 16, fill_groups, &j);
    return LC_K_OK;
}

/* x[0] = uniform in [f[0], f[1]) */
KERNEL(uniform_) { return fill(k, UNIFORM); }
/* x[0] = f[0] + f[1] * normal */
KERNEL(normal_) { return fill(k, NORMAL); }

static void dropout_groups(void *ctx, int64_t begin, int64_t end, int thread) {
    const job *j = (const job *)ctx;
    real p = (real)j->a, scale = (real)j->b;
    (void)thread;
    for (int64_t g = begin; g < end; g++) {
        uint32_t bits[GROUP];
        real keep[GROUP];
        int64_t at = g * GROUP, n = LC_MIN((int64_t)GROUP, j->total - at);
        random_bits(j, g, bits);
        for (int i = 0; i < GROUP; i++) keep[i] = lc_uniform(bits[i]) < p ? 0 : scale;
        for (int64_t i = 0; i < n; i++) j->y[at + i] = j->x[at + i] * keep[i];
        if (!j->mask.data) continue;
        if (j->mask.dtype == LC_K_U8)
            for (int64_t i = 0; i < n; i++) ((uint8_t *)j->mask.data)[at + i] = keep[i] != 0;
        else
            memcpy((real *)j->mask.data + at, keep, (size_t)n * sizeof(real));
    }
}

/* x -> y = x * mask, mask = 0 with probability f[0], else 1 / (1 - f[0]); all contiguous. The mask y[1], if wanted, is
 * real and holds the factors themselves, so that the backward is a product; as uint8 it says only what was kept. */
KERNEL(dropout) {
    const lc_view *mask = &k->y[1];
    if (k->x[0].dtype != LC_K_REAL || k->y[0].dtype != LC_K_REAL) return LC_K_UNSUPPORTED;
    if (mask->data && mask->dtype != LC_K_REAL && mask->dtype != LC_K_U8) return LC_K_UNSUPPORTED;
    double p = k->f[0];
    job j = {.seed = k->seed, .offset = k->offset, .a = p, .b = p < 1 ? 1 / (1 - p) : 0, .mask = *mask};
    j.x = (const real *)k->x[0].data;
    j.y = (real *)k->y[0].data;
    j.total = view_numel(&k->x[0]);
    run_parts(k, (j.total + GROUP - 1) / GROUP, 16, dropout_groups, &j);
    return LC_K_OK;
}
