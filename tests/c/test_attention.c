/* test_attention.c: the CPU's attention kernels against their plain twins, finite differences, themselves in chunks and
 * themselves on other numbers of threads, for every instruction set of this machine and in double. Shapes are drawn at
 * random from a fixed seed. */
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "../../kernels/kernel.h"

/* ---- a host
 * ------------------------------------------------------------------------------------------------------------ */
static int n_threads = 2, plain;

typedef struct share {
    void (*body)(void *, int64_t, int64_t, int);
    void *ctx;
    int64_t begin, end;
    int thread;
} share;

static void *run_share(void *p) {
    share *s = p;
    if (s->end > s->begin) s->body(s->ctx, s->begin, s->end, s->thread);
    return NULL;
}

static void host_parallel(int64_t n, int64_t grain, void (*body)(void *, int64_t, int64_t, int), void *ctx) {
    pthread_t id[16];
    share s[16];
    (void)grain;
    for (int t = 0; t < n_threads; t++) s[t] = (share){body, ctx, n * t / n_threads, n * (t + 1) / n_threads, t};
    for (int t = 1; t < n_threads; t++) assert_int_equal(pthread_create(&id[t], NULL, run_share, &s[t]), 0);
    run_share(&s[0]);
    for (int t = 1; t < n_threads; t++) pthread_join(id[t], NULL);
}
static int host_threads(void) { return n_threads; }
static int host_option(int which) { return which <= LC_OPTION_PLAIN_HYBRID ? plain : 0; }
static const lc_host host = {host_parallel, host_threads, host_option};

/* ---- tensors
 * ----------------------------------------------------------------------------------------------------------- */
enum { POOL = 4096 };
static void *pool[POOL];
static int n_pool;
static uint64_t seed;

static double uniform(void) { /* in [0, 1) */
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (double)(seed >> 33) / 2147483648.0;
}
static double normal(void) { return sqrt(-2 * log(uniform() + 1e-12)) * cos(6.283185307 * uniform()); }
static int64_t pick(int64_t lo, int64_t hi) { return lo + (int64_t)(uniform() * (double)(hi - lo + 1)); }

static void *keep(size_t bytes) {
    assert_true(n_pool < POOL);
    void *p = calloc(1, bytes ? bytes : 1);
    assert_non_null(p);
    return pool[n_pool++] = p;
}
static void drop_all(void) {
    while (n_pool) free(pool[--n_pool]);
}

static size_t item(int dtype) { return dtype == LC_K_F64 ? 8 : 4; }

static lc_view tensor(int dtype, int ndim, const int64_t *dim) {
    lc_view v = {.dtype = dtype, .ndim = ndim};
    int64_t n = 1;
    for (int i = ndim - 1; i >= 0; i--) v.dim[i] = dim[i], v.stride[i] = n, n *= dim[i];
    v.data = keep((size_t)n * item(dtype));
    return v;
}
#define TENSOR(dtype, ...) tensor(dtype, (int)(sizeof((int64_t[]){__VA_ARGS__}) / 8), (int64_t[]){__VA_ARGS__})

/* [b, h, t, d], in memory [b, t, h, d] when `swapped`. */
static lc_view rows4(int dtype, int64_t b, int64_t h, int64_t t, int64_t d, int swapped) {
    if (!swapped) return TENSOR(dtype, b, h, t, d);
    lc_view v = TENSOR(dtype, b, t, h, d);
    int64_t s = v.stride[1];
    v.dim[1] = h, v.dim[2] = t, v.stride[1] = v.stride[2], v.stride[2] = s;
    return v;
}

static int64_t numel(const lc_view *v) {
    int64_t n = 1;
    for (int i = 0; i < v->ndim; i++) n *= v->dim[i];
    return v->data ? n : 0;
}
static int64_t place(const lc_view *v, int64_t n) {
    int64_t at = 0;
    for (int i = v->ndim - 1; i >= 0; i--) at += n % v->dim[i] * v->stride[i], n /= v->dim[i];
    return at;
}
static double get(const lc_view *v, int64_t n) {
    int64_t at = place(v, n);
    return v->dtype == LC_K_F64   ? ((double *)v->data)[at]
           : v->dtype == LC_K_I32 ? ((int32_t *)v->data)[at]
                                  : ((float *)v->data)[at];
}
static void put(const lc_view *v, int64_t n, double x) {
    int64_t at = place(v, n);
    if (v->dtype == LC_K_F64)
        ((double *)v->data)[at] = x;
    else if (v->dtype == LC_K_I32)
        ((int32_t *)v->data)[at] = (int32_t)x;
    else
        ((float *)v->data)[at] = (float)x;
}
static void randomise(const lc_view *v, double scale) {
    for (int64_t n = 0; n < numel(v); n++) put(v, n, scale * normal());
}
static lc_view like(const lc_view *v) { /* same shape and strides, filled with what no kernel would leave */
    lc_view w = *v;
    int64_t n = numel(v);
    w.data = keep((size_t)n * item(v->dtype));
    for (int64_t i = 0; i < n; i++) put(&w, i, 7777);
    return w;
}
static lc_view sub(lc_view v, int dim, int64_t from, int64_t n) {
    v.data = (char *)v.data + (size_t)(from * v.stride[dim]) * item(v.dtype);
    v.dim[dim] = n;
    return v;
}

/* Largest difference, relative to the largest entry (at least `floor`). */
static double difference(const lc_view *a, const lc_view *b, double floor) {
    double d = 0, m = floor + 1e-30;
    for (int64_t n = 0; n < numel(a); n++) {
        double x = get(a, n), y = get(b, n);
        if (x != x || y != y) return INFINITY;
        d = fmax(d, fabs(x - y)), m = fmax(m, fabs(y));
    }
    return d / m;
}

/* ---- calls
 * ------------------------------------------------------------------------------------------------------------- */
typedef struct target {
    const char *isa;
    int is_double;
} target;

static int supported(const char *isa) { return lc_cpu_kernels(isa, 0) != NULL; } /* built in, and the machine has it */
static const target targets[] = {{"generic", 1}, {"generic", 0}, {"avx2", 0}, {"avx512", 0}, {"avx512bf16", 0}};
enum { N_TARGETS = sizeof targets / sizeof *targets };
static int dtype_of(const target *t) { return t->is_double ? LC_K_F64 : LC_K_F32; }
static double tolerance(const target *t) { return t->is_double ? 1e-10 : 3e-5; }

static int call(const target *t, int op, lc_kargs *k) {
    const lc_kernel *kernel = &lc_cpu_kernels(t->isa, t->is_double)[op];
    k->host = &host;
    k->work = NULL, k->work_bytes = kernel->work ? kernel->work(k) : 0;
    size_t n = (k->work_bytes + 63) / 64 * 64;
    char *work = aligned_alloc(64, n + 64);
    assert_non_null(work);
    memset(work, 0xa5, n + 64);
    k->work = work;
    int status = kernel->run(k);
    for (size_t i = 0; i < 64; i++) assert_int_equal((unsigned char)work[n + i], 0xa5);
    free(work);
    return status;
}

enum { NONE, SOFTMAX_DIM, EXP_DIM, POS_ELU, RELU };

typedef struct shape {
    int64_t b, h, g, t, d, f;
    int map, full, skip, bias, window, kind, affine, pad, swapped, shared_mk, no_features;
} shape;

typedef struct problem { /* inputs of the forward, in the op's order; gradients follow q k v mq mk bq bk factors */
    shape s;
    lc_view x[16], y[4], g, grad[8];
    double f[3];
    int32_t i[6];
} problem;

static void say(const shape *s, const target *t, const char *what) {
    print_message(
        "%s: %s%s b %d h %d g %d t %d d %d f %d map %d full %d skip %d bias %d window %d kind %d affine %d pad %d\n",
        what, t->isa, t->is_double ? " double" : "", (int)s->b, (int)s->h, (int)s->g, (int)s->t, (int)s->d, (int)s->f,
        s->map, s->full, s->skip, s->bias, s->window, s->kind, s->affine, s->pad);
}

static problem make(const shape *s, const target *t) {
    problem p = {.s = *s, .f = {0, 1e-12, 1e-12}, .i = {s->map, s->full, s->skip, s->window, s->kind, s->affine}};
    int dt = dtype_of(t);
    p.x[0] = rows4(dt, s->b, s->h, s->t, s->d, s->swapped);
    p.x[1] = rows4(dt, s->b, s->g, s->t, s->d, s->swapped), p.x[2] = rows4(dt, s->b, s->g, s->t, s->d, s->swapped);
    if (s->map == NONE && !s->no_features) {
        p.x[3] = rows4(dt, s->b, s->h, s->t, s->f, s->swapped);
        p.x[4] = rows4(dt, s->b, s->shared_mk ? s->g : s->h, s->t, s->f, s->swapped);
    } else if (!s->no_features)
        p.x[3] = TENSOR(dt, s->h, s->d, s->f), p.x[4] = TENSOR(dt, s->h, s->d, s->f);
    if (s->bias) p.x[5] = TENSOR(dt, s->h), p.x[6] = TENSOR(dt, 1, s->h, 1, 1);
    if (s->window) p.x[7] = TENSOR(dt, 1, s->h, 1, 1);
    for (int n = 0; n < 8; n++)
        randomise(&p.x[n], n == 3 || n == 4 ? (s->map == NONE ? 1 : 1.2 / sqrt((double)s->d)) : 1);
    for (int n = 3; s->map == NONE && n < 5; n++)
        for (int64_t e = 0; e < numel(&p.x[n]); e++) put(&p.x[n], e, fabs(get(&p.x[n], e)) + 0.05);
    if (s->pad) {
        p.x[8] = TENSOR(LC_K_I32, s->b);
        for (int64_t b = 0; b < s->b; b++) put(&p.x[8], b, (double)pick(0, s->t));
    }
    p.y[0] = rows4(dt, s->b, s->h, s->t, s->d, 1);
    p.y[1] = TENSOR(dt, s->b, s->h, s->t), p.y[2] = TENSOR(LC_K_I32, s->b, s->h, s->t),
    p.y[3] = TENSOR(dt, s->b, s->h, s->t);
    p.g = rows4(dt, s->b, s->h, s->t, s->d, s->swapped);
    randomise(&p.g, 1);
    for (int n = 0; n < 8; n++)
        if (p.x[n].data) p.grad[n] = like(&p.x[n]);
    return p;
}

static void forward(const target *t, problem *p) {
    lc_kargs k = {.f = p->f, .i = p->i};
    memcpy(k.x, p->x, sizeof p->x), memcpy(k.y, p->y, sizeof p->y);
    assert_int_equal(call(t, LC_OP_hybrid_attention, &k), LC_K_OK);
}

/* wanted: bit n for gradient n. */
static void backward(const target *t, problem *p, int wanted) {
    lc_kargs k = {.f = p->f, .i = p->i};
    k.x[0] = p->g, k.x[10] = p->y[0], k.x[11] = p->y[1], k.x[12] = p->y[2], k.x[13] = p->y[3];
    memcpy(k.x + 1, p->x, 9 * sizeof(lc_view));
    for (int n = 0; n < 8; n++)
        if (wanted >> n & 1) k.y[n] = p->grad[n];
    assert_int_equal(call(t, LC_OP_hybrid_attention_backward, &k), LC_K_OK);
}

static shape random_shape(void) {
    static const int widths[] = {1, 3, 8, 16, 20, 64, 72}, windows[] = {0, 1, 2, 4, 7, 16, 33, 64, 64, 100, 128, 1000};
    shape s = {.b = pick(1, 2), .g = pick(1, 2)};
    s.h = s.g * pick(1, 3), s.t = pick(0, 9) ? pick(1, 330) : pick(0, 3);
    s.d = widths[pick(0, 6)], s.f = widths[pick(0, 5)];
    s.map = (int)pick(0, 4), s.full = (int)pick(0, 1), s.bias = s.map && pick(0, 1), s.window = windows[pick(0, 11)];
    s.skip = s.map && !pick(0, 3);
    if (s.skip) s.f = s.d;
    s.kind = (int)pick(0, 1), s.affine = s.window && pick(0, 1), s.pad = !pick(0, 2), s.swapped = (int)pick(0, 1);
    s.shared_mk = (int)pick(0, 1), s.no_features = s.window && !pick(0, 9);
    if (s.no_features) s.bias = s.skip = s.map = 0;
    return s;
}

static void hold(const target *t, const shape *s, const char *what, const lc_view *a, const lc_view *b, double limit,
                 double floor) {
    double d = difference(a, b, floor);
    if (d <= limit) return;
    say(s, t, what);
    fail_msg("%s: differs by %.3g, at most %.3g expected", what, d, limit);
}

static const char *grad_name[] = {"gq", "gk", "gv", "gmq", "gmk", "gbq", "gbk", "gfactors"};

static void fast_and_plain(const target *t, const shape *s) {
    problem a = make(s, t), b = a;
    for (int n = 0; n < 4; n++) b.y[n] = like(&a.y[n]);
    for (int n = 0; n < 8; n++)
        if (a.x[n].data) b.grad[n] = like(&a.x[n]);
    plain = 1, forward(t, &b), backward(t, &b, 255);
    plain = 0, forward(t, &a);
    hold(t, s, "y", &a.y[0], &b.y[0], tolerance(t), 1e-3);
    hold(t, s, "row maximum", &a.y[1], &b.y[1], tolerance(t), 1e-1);
    hold(t, s, "denominator", &a.y[3], &b.y[3], tolerance(t), 1e-3);
    if (t->is_double) hold(t, s, "argmax", &a.y[2], &b.y[2], 0, 1);
    memcpy(a.y[2].data, b.y[2].data, (size_t)numel(&a.y[2]) * 4); /* a near tie may fall either way in float */
    int wanted = pick(0, 2) ? 255 : (int)pick(1, 255);
    backward(t, &a, wanted);
    double scale = 0; /* of all gradients: one that is zero by nature is held to it */
    for (int n = 0; n < 8; n++)
        for (int64_t e = 0; e < numel(&b.grad[n]); e++) scale = fmax(scale, fabs(get(&b.grad[n], e)));
    for (int n = 0; n < 8; n++)
        if (wanted >> n & 1) hold(t, s, grad_name[n], &a.grad[n], &b.grad[n], 20 * tolerance(t), 1e-2 * scale);
    drop_all();
}

static void test_fast_and_plain(void **state) {
    (void)state;
    for (int n = 0; n < N_TARGETS; n++) {
        if (!supported(targets[n].isa)) continue;
        seed = 1;
        for (int i = 0; i < 60; i++) {
            shape s = random_shape();
            n_threads = (int)pick(1, 4);
            fast_and_plain(&targets[n], &s);
        }
    }
}

/* ---- gradients against differences
 * --------------------------------------------------------------------------------------- */
static double loss(const target *t, problem *p) { /* y . g */
    double sum = 0;
    forward(t, p);
    for (int64_t n = 0; n < numel(&p->y[0]); n++) sum += get(&p->y[0], n) * get(&p->g, n);
    return sum;
}

static void test_finite_differences(void **state) {
    (void)state;
    const target *t = &targets[0];
    seed = 2;
    for (int i = 0; i < 40; i++) {
        shape s = random_shape();
        s.t = pick(1, 24), s.d = pick(1, 9), s.f = s.skip ? s.d : pick(1, 6), s.window = (int)pick(0, 9);
        s.affine = s.affine && s.window;
        if (!s.window) s.no_features = 0;
        problem p = make(&s, t);
        for (plain = 0; plain < 2; plain++) {
            forward(t, &p), backward(t, &p, 255);
            for (int n = 0; n < 8; n++)
                for (int trial = 0; numel(&p.x[n]) && trial < 4; trial++) {
                    int64_t e = pick(0, numel(&p.x[n]) - 1);
                    double x = get(&p.x[n], e), h = 1e-5, up, down, expected = get(&p.grad[n], e);
                    put(&p.x[n], e, x + h), up = loss(t, &p);
                    put(&p.x[n], e, x - h), down = loss(t, &p);
                    put(&p.x[n], e, x);
                    if (fabs((up - down) / (2 * h) - expected) <= 2e-5 * (1 + fabs(expected))) continue;
                    say(&s, t, grad_name[n]);
                    fail_msg("%s[%d]: %.9g, by differences %.9g", grad_name[n], (int)e, expected,
                             (up - down) / (2 * h));
                }
        }
        drop_all();
    }
    plain = 0;
}

/* ---- in chunks
 * ----------------------------------------------------------------------------------------------------------- */
typedef struct memory {
    lc_view state, zsum, cache, slot, pos;
} memory;

static memory remember(const shape *s, int dt, int64_t F, int64_t n) {
    int64_t hm = s->shared_mk ? s->g : s->h;
    memory m = {TENSOR(dt, n, s->h, F, s->d), TENSOR(dt, n, s->h, F), {0}, TENSOR(LC_K_I32, s->b), TENSOR(LC_K_I32, n)};
    if (s->window && s->map) m.cache = TENSOR(dt, n, 2, s->g, 2 * s->window, s->d);
    if (s->window && !s->map) m.cache = TENSOR(dt, n, 2 * s->window * (2 * s->g * s->d + hm * F));
    for (int64_t b = 0; b < s->b; b++) put(&m.slot, b, (double)(n - 1 - b));
    return m;
}

/* Tokens from .. from + n - 1 of p through the state; results land in p->y[0]. */
static void chunk(const target *t, problem *p, const memory *m, int64_t from, int64_t n) {
    lc_kargs k = {.f = p->f, .i = p->i};
    memcpy(k.x, p->x, sizeof p->x);
    for (int x = 0; x < 5; x++)
        if (k.x[x].data && (x < 3 || p->s.map == NONE)) k.x[x] = sub(k.x[x], 2, from, n);
    for (int y = 0; y < 4; y++) k.y[y] = sub(p->y[y], 2, from, n);
    if (from) k.x[8].data = NULL; /* the padding is over */
    k.x[9] = m->state, k.x[10] = m->zsum, k.x[11] = m->cache, k.x[12] = m->slot, k.x[13] = m->pos;
    assert_int_equal(call(t, LC_OP_hybrid_attention, &k), LC_K_OK);
    for (int64_t b = 0; b < p->s.b; b++) {
        int64_t slot = (int64_t)get(&m->slot, b), start = !from && p->x[8].data ? (int64_t)get(&p->x[8], b) : 0;
        put(&m->pos, slot, get(&m->pos, slot) + (double)(n - start));
    }
}

static void in_chunks(const target *t, const shape *s) {
    static const int64_t lengths[] = {1, 1, 1, 2, 3, 5, 17, 64, 65, 130};
    int64_t first = s->t;
    problem a = make(s, t), b = a;
    if (s->pad) /* the first chunk holds all padding */
        for (int64_t n = 0; n < s->b; n++) put(&a.x[8], n, fmin(get(&a.x[8], n), (double)(first / 2)));
    b.y[0] = like(&a.y[0]);
    int64_t F = s->f * (s->full && (s->map == SOFTMAX_DIM || s->map == EXP_DIM) ? 2 : 1);
    memory m = remember(s, dtype_of(t), F, s->b + 1), once = remember(s, dtype_of(t), F, s->b + 1);
    plain = 0, forward(t, &a);
    for (int64_t at = 0; at < s->t;) {
        int64_t n = at || !s->pad ? lengths[pick(0, 9)] : first / 2 + pick(0, 9);
        plain = !pick(0, 3);
        n = n < s->t - at ? n : s->t - at;
        chunk(t, &b, &m, at, n), at += n;
    }
    hold(t, s, "in chunks", &b.y[0], &a.y[0], 3 * tolerance(t), 1e-3);
    plain = 0;
    if (s->t) chunk(t, &b, &once, 0, s->t);
    hold(t, s, "in one chunk", &b.y[0], &a.y[0], 3 * tolerance(t), 1e-3);
    hold(t, s, "state", &m.state, &once.state, 3 * tolerance(t), 1e-3);
    hold(t, s, "zsum", &m.zsum, &once.zsum, 3 * tolerance(t), 1e-3);
    hold(t, s, "cache", &m.cache, &once.cache, 0, 1e-3);
    drop_all();
}

static void test_chunks(void **state) {
    (void)state;
    for (int n = 0; n < N_TARGETS; n++) {
        if (!supported(targets[n].isa)) continue;
        seed = 3;
        for (int i = 0; i < 40; i++) {
            shape s = random_shape();
            if (s.no_features) continue;
            n_threads = (int)pick(1, 4);
            in_chunks(&targets[n], &s);
        }
    }
}

static void test_bad_slot(void **state) {
    (void)state;
    shape s = {.b = 1, .h = 1, .g = 1, .t = 1, .d = 8, .f = 4, .map = RELU, .window = 2};
    const target *t = &targets[1];
    problem p = make(&s, t);
    memory m = remember(&s, LC_K_F32, 4, 2);
    lc_fault fault = {0};
    lc_kargs k = {.f = p.f, .i = p.i, .fault = &fault};
    memcpy(k.x, p.x, sizeof p.x), memcpy(k.y, p.y, sizeof p.y);
    k.x[9] = m.state, k.x[10] = m.zsum, k.x[11] = m.cache, k.x[12] = m.slot, k.x[13] = m.pos;
    put(&m.slot, 0, 2);
    assert_int_equal(call(t, LC_OP_hybrid_attention, &k), LC_K_RANGE);
    assert_int_equal(fault.value, 2);
    assert_int_equal(fault.limit, 2);
    drop_all();
}

/* ---- softmax
 * ----------------------------------------------------------------------------------------------------------- */
typedef struct softmax_problem {
    lc_view q, k, v, start, length, y, lse, g, grad[3];
    double f[1];
    int32_t i[1];
} softmax_problem;

static void softmax_forward(const target *t, const softmax_problem *p) {
    lc_kargs k = {.f = p->f, .i = p->i};
    k.x[0] = p->q, k.x[1] = p->k, k.x[2] = p->v, k.x[3] = p->start, k.x[4] = p->length, k.y[0] = p->y, k.y[1] = p->lse;
    assert_int_equal(call(t, LC_OP_attention, &k), LC_K_OK);
}

static void softmax_backward(const target *t, const softmax_problem *p) {
    lc_kargs k = {.f = p->f, .i = p->i};
    k.x[0] = p->g, k.x[1] = p->q, k.x[2] = p->k, k.x[3] = p->v, k.x[4] = p->y, k.x[5] = p->lse, k.x[6] = p->start;
    memcpy(k.y, p->grad, sizeof p->grad);
    assert_int_equal(call(t, LC_OP_attention_backward, &k), LC_K_OK);
}

static void softmax_case(const target *t) {
    shape s = random_shape();
    int dt = dtype_of(t);
    int64_t keys = s.t + (pick(0, 1) ? pick(0, 200) : 0);
    if (!pick(0, 2)) s.t = pick(1, 6);
    softmax_problem a = {.f = {pick(0, 1) ? 0 : 0.3}, .i = {s.window > 200 ? 0 : s.window}}, b;
    a.q = rows4(dt, s.b, s.h, s.t, s.d, s.swapped), a.k = rows4(dt, s.b, s.g, keys, s.d, s.swapped),
    a.v = rows4(dt, s.b, s.g, keys, s.d, s.swapped);
    a.g = rows4(dt, s.b, s.h, s.t, s.d, s.swapped);
    a.y = rows4(dt, s.b, s.h, s.t, s.d, 1), a.lse = TENSOR(dt, s.b, s.h, s.t);
    randomise(&a.q, 1), randomise(&a.k, 1), randomise(&a.v, 1), randomise(&a.g, 1);
    if (s.pad) {
        a.start = TENSOR(LC_K_I32, s.b);
        for (int64_t n = 0; n < s.b; n++) put(&a.start, n, (double)pick(0, keys));
    }
    a.grad[0] = like(&a.q), a.grad[1] = like(&a.k), a.grad[2] = like(&a.v);
    int cut = keys && !pick(0, 2);
    if (cut) { /* a cache longer than filled; what lies behind must not matter */
        lc_view zero = {.dtype = LC_K_I32};
        a.length = zero, a.length.data = keep(4);
        *(int32_t *)a.length.data = (int32_t)pick(1, keys);
        for (int64_t n = 0; n < numel(&a.k); n++)
            if (n / s.d % keys >= *(int32_t *)a.length.data) put(&a.k, n, NAN), put(&a.v, n, NAN);
    }
    b = a, b.y = like(&a.y), b.lse = like(&a.lse);
    for (int n = 0; n < 3; n++) b.grad[n] = like(&a.grad[n]);
    plain = 1, softmax_forward(t, &b);
    if (!cut && s.t <= keys) softmax_backward(t, &b);
    plain = 0, softmax_forward(t, &a);
    hold(t, &s, "softmax y", &a.y, &b.y, tolerance(t), 1e-3);
    hold(t, &s, "softmax lse", &a.lse, &b.lse, tolerance(t), 1e-1);
    if (!cut && s.t <= keys) {
        softmax_backward(t, &a);
        double scale = 0;
        for (int n = 0; n < 3; n++)
            for (int64_t e = 0; e < numel(&b.grad[n]); e++) scale = fmax(scale, fabs(get(&b.grad[n], e)));
        for (int n = 0; n < 3; n++)
            hold(t, &s, n ? n > 1 ? "softmax gv" : "softmax gk" : "softmax gq", &a.grad[n], &b.grad[n],
                 20 * tolerance(t), 1e-2 * scale);
    }
    drop_all();
}

static void test_softmax(void **state) {
    (void)state;
    for (int n = 0; n < N_TARGETS; n++) {
        if (!supported(targets[n].isa)) continue;
        seed = 4;
        for (int i = 0; i < 60; i++) n_threads = (int)pick(1, 4), softmax_case(&targets[n]);
    }
}

static void test_softmax_differences(void **state) {
    (void)state;
    const target *t = &targets[0];
    seed = 5;
    for (int i = 0; i < 10; i++) {
        int64_t n = pick(1, 12), d = pick(1, 7), more = pick(0, 5);
        softmax_problem p = {.f = {0},
                             .i = {(int)pick(0, 4)},
                             .q = TENSOR(LC_K_F64, 1, 2, n, d),
                             .k = TENSOR(LC_K_F64, 1, 1, n + more, d),
                             .v = TENSOR(LC_K_F64, 1, 1, n + more, d),
                             .y = TENSOR(LC_K_F64, 1, 2, n, d),
                             .lse = TENSOR(LC_K_F64, 1, 2, n)};
        lc_view *x[3] = {&p.q, &p.k, &p.v};
        p.g = like(&p.q);
        for (int m = 0; m < 3; m++) randomise(x[m], 1), p.grad[m] = like(x[m]);
        randomise(&p.g, 1);
        softmax_forward(t, &p), softmax_backward(t, &p);
        for (int m = 0; m < 3; m++)
            for (int64_t e = 0; e < numel(x[m]); e++) {
                double v = get(x[m], e), sum[2] = {0, 0};
                for (int side = 0; side < 2; side++) {
                    put(x[m], e, v + (side ? -1e-5 : 1e-5));
                    softmax_forward(t, &p);
                    for (int64_t o = 0; o < numel(&p.y); o++) sum[side] += get(&p.y, o) * get(&p.g, o);
                }
                put(x[m], e, v);
                assert_true(fabs((sum[0] - sum[1]) / 2e-5 - get(&p.grad[m], e)) < 1e-5);
            }
        drop_all();
    }
}

/* ---- the number of threads changes nothing
 * ------------------------------------------------------------------------------- */
static void test_threads(void **state) {
    (void)state;
    const target *t = supported("avx512") ? &targets[3] : supported("avx2") ? &targets[2] : &targets[1];
    shape s = {
        .b = 1, .h = 6, .g = 2, .t = 500, .d = 64, .f = 32, .map = SOFTMAX_DIM, .full = 1, .window = 64, .swapped = 1};
    for (s.kind = 0; s.kind < 2; s.kind++) {
        problem p = make(&s, t), q = p;
        for (int n = 0; n < 4; n++) q.y[n] = like(&p.y[n]);
        for (int n = 0; n < 8; n++)
            if (p.x[n].data) q.grad[n] = like(&p.x[n]);
        n_threads = 1, forward(t, &p), backward(t, &p, 255);
        for (n_threads = 2; n_threads < 8; n_threads++) {
            forward(t, &q), backward(t, &q, 255);
            for (int n = 0; n < 4; n++) assert_true(difference(&p.y[n], &q.y[n], 0) == 0);
            for (int n = 0; n < 8; n++) assert_true(difference(&p.grad[n], &q.grad[n], 0) == 0);
        }
        drop_all();
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fast_and_plain), cmocka_unit_test(test_finite_differences),
        cmocka_unit_test(test_chunks),         cmocka_unit_test(test_bad_slot),
        cmocka_unit_test(test_softmax),        cmocka_unit_test(test_softmax_differences),
        cmocka_unit_test(test_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
