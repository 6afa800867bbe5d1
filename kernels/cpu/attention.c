/* attention.c: causal softmax attention and its gradient: the plain twin (option plain_attention), decoding (few
 * queries), and the entry points; the rest is hybrid_forward.c and hybrid_backward.c, of which it is the case without a
 * linear term. q [b, h, t, d], k and v [b, g, s, d]; the last query sits on key `length` - 1, so query i on key i +
 * length - t. */
#include "hybrid_row.h"

#include "hybrid.h"

typedef struct softmax_call {
    int64_t b, h, g, t, s, d, group, window, offset; /* offset: key position of query 0 */
    double scale;
    const lc_view *q, *k, *v, *start;
} softmax_call;

static int softmax_open(softmax_call *a, const lc_kargs *k, const lc_view *q, const lc_view *start,
                        const lc_view *length) {
    *a = (softmax_call){.q = q, .k = q + 1, .v = q + 2, .start = start, .window = k->i[0]};
    for (int n = 0; n < 3; n++)
        if (q[n].data && q[n].dtype != LC_K_REAL) return LC_K_UNSUPPORTED;
    a->b = q->dim[0], a->h = q->dim[1], a->t = q->dim[2], a->d = q->dim[3], a->g = a->k->dim[1], a->s = a->k->dim[2];
    a->scale = k->f[0] != 0 ? k->f[0] : 1 / sqrt((double)a->d);
    a->group = a->g ? a->h / a->g : 1;
    int64_t filled = length ? (int64_t)scalar_or(length, (double)a->s) : a->s;
    if (filled > a->s || filled < 0) {
        if (k->fault) *k->fault = (lc_fault){filled, a->s + 1, 0};
        return LC_K_RANGE;
    }
    a->offset = filled - a->t;
    return LC_K_OK;
}

/* The keys that query i sees: first .. last, none when last < first. */
static void visible(const softmax_call *a, int64_t b, int64_t i, int64_t *first, int64_t *last) {
    *last = i + a->offset;
    *first = start_of(a->start, b, a->s);
    if (a->window > 0) *first = LC_MAX(*first, *last - a->window + 1);
}

/* ---- plain
 * ------------------------------------------------------------------------------------------------------------- */
static double dot(int64_t n, const real *x, const real *y) {
    double s = 0;
    for (int64_t i = 0; i < n; i++) s += (double)x[i] * y[i];
    return s;
}

/* u [s]: softmax weights of one row; returns log-sum-exp. */
static double plain_weights(const softmax_call *a, int64_t b, int64_t h, int64_t i, int64_t first, int64_t last,
                            double *u) {
    double m = -INFINITY, sum = 0;
    for (int64_t j = first; j <= last; j++) {
        u[j] = a->scale * dot(a->d, row_at(a->q, b, h, i), row_at(a->k, b, h / a->group, j));
        m = LC_MAX(m, u[j]);
    }
    for (int64_t j = first; j <= last; j++) sum += u[j] = exp(u[j] - m);
    for (int64_t j = first; j <= last; j++) u[j] /= sum;
    return last < first ? 0 : m + log(sum);
}

static int plain_forward(const lc_kargs *k, const softmax_call *a) {
    double *u = k->work, *acc = u + a->s;
    for (int64_t n = 0; n < a->b * a->h * a->t; n++) {
        int64_t i = n % a->t, h = n / a->t % a->h, b = n / a->t / a->h, first, last;
        visible(a, b, i, &first, &last);
        double lse = plain_weights(a, b, h, i, first, last, u);
        for (int64_t e = 0; e < a->d; e++) acc[e] = 0;
        for (int64_t j = first; j <= last; j++) {
            const real *v = row_at(a->v, b, h / a->group, j);
            for (int64_t e = 0; e < a->d; e++) acc[e] += u[j] * v[e];
        }
        real *y = row_at(&k->y[0], b, h, i);
        for (int64_t e = 0; e < a->d; e++) y[e] = (real)acc[e];
        if (k->y[1].data) *row_at(&k->y[1], b, h, i) = (real)lse;
    }
    return LC_K_OK;
}

static void zero_view(const lc_view *v) {
    int64_t rows = v->data ? view_rows(v) : 0;
    for (int64_t r = 0; r < rows; r++)
        memset((real *)v->data + view_row_offset(v, r), 0, (size_t)v->dim[3] * sizeof(real));
}

static void plain_row_backward(const softmax_call *a, const lc_kargs *k, int64_t b, int64_t h, int64_t i, double *u,
                               double *gk, double *gv) {
    int64_t first, last, hk = h / a->group;
    double *du = u + a->s, *gq = du + a->s, sum = 0;
    visible(a, b, i, &first, &last);
    plain_weights(a, b, h, i, first, last, u);
    const real *g = row_at(&k->x[0], b, h, i), *q = row_at(a->q, b, h, i);
    for (int64_t j = first; j <= last; j++) sum += u[j] * (du[j] = dot(a->d, g, row_at(a->v, b, hk, j)));
    for (int64_t e = 0; e < a->d; e++) gq[e] = 0;
    for (int64_t j = first; j <= last; j++) {
        double ds = a->scale * u[j] * (du[j] - sum);
        const real *key = row_at(a->k, b, hk, j);
        for (int64_t e = 0; e < a->d; e++) {
            gq[e] += ds * key[e];
            gk[j * a->d + e] += ds * q[e];
            gv[j * a->d + e] += u[j] * g[e];
        }
    }
    if (!k->y[0].data) return;
    for (int64_t e = 0; e < a->d; e++) row_at(&k->y[0], b, h, i)[e] = (real)gq[e];
}

static int plain_backward(const lc_kargs *k, const softmax_call *a) {
    double *u = k->work, *gk = u + 2 * a->s + a->d, *gv = gk + a->s * a->d;
    for (int n = 0; n < 3; n++) zero_view(&k->y[n]);
    for (int64_t n = 0; n < a->b * a->g; n++) {
        int64_t b = n / a->g, g = n % a->g;
        memset(gk, 0, (size_t)(2 * a->s * a->d) * sizeof(double));
        for (int64_t h = g * a->group; h < (g + 1) * a->group; h++)
            for (int64_t i = 0; i < a->t; i++) plain_row_backward(a, k, b, h, i, u, gk, gv);
        for (int64_t j = 0; j < a->s; j++)
            for (int64_t e = 0; e < a->d; e++) {
                if (k->y[1].data) row_at(&k->y[1], b, g, j)[e] = (real)gk[j * a->d + e];
                if (k->y[2].data) row_at(&k->y[2], b, g, j)[e] = (real)gv[j * a->d + e];
            }
    }
    return LC_K_OK;
}

static size_t plain_work(const softmax_call *a, int backward) {
    return (size_t)(2 * a->s + a->d + (backward ? 2 * a->s * a->d : 0)) * sizeof(double);
}

/* ---- few queries: rows where they lie, in parts of the keys, so that memory is read once for all heads of a group
 * ------------ */
enum { FEW = 4, PART = 256 };

typedef struct few_job {
    const lc_kargs *k;
    const softmax_call *call;
    int64_t parts, width; /* parts of the keys; reals of a partial result: d sums of values, maximum, sum of weights */
    real *partial;        /* [b, h, t, parts][width] */
} few_job;

static size_t few_plan(few_job *job, const lc_kargs *k, const softmax_call *a) {
    arena w = {k->work, 0};
    *job = (few_job){.k = k, .call = a, .parts = LC_MAX((a->s + PART - 1) / PART, 1), .width = round_up(a->d + 2, VL)};
    job->partial = carve(&w, (size_t)(a->b * a->h * a->t * job->parts * job->width) * sizeof(real));
    return w.used;
}

/* Items (b, key head, part): all queries that read these keys. */
static void few_body(void *ctx, int64_t begin, int64_t end, int thread) {
    const few_job *job = ctx;
    const softmax_call *a = job->call;
    real u[PART];
    (void)thread;
    for (int64_t n = begin; n < end; n++) {
        int64_t part = n % job->parts, g = n / job->parts % a->g, b = n / job->parts / a->g;
        for (int64_t m = 0; m < a->group * a->t; m++) {
            int64_t i = m % a->t, h = g * a->group + m / a->t, first, last;
            real *out = job->partial + (((b * a->h + h) * a->t + i) * job->parts + part) * job->width;
            visible(a, b, i, &first, &last);
            first = LC_MAX(first, part * PART), last = LC_MIN(last, part * PART + PART - 1);
            memset(out, 0, (size_t)a->d * sizeof(real));
            out[a->d] = -INFINITY, out[a->d + 1] = 0;
            if (last < first) continue;
            int64_t keys = last - first + 1;
            rows_dot(a->d, keys, row_at(a->q, b, h, i), row_at(a->k, b, g, first), a->k->stride[2], (real)a->scale, u);
            out[a->d] = row_max(keys, u), out[a->d + 1] = row_exp(keys, u, out[a->d]);
            rows_sum(a->d, keys, u, row_at(a->v, b, g, first), a->v->stride[2], out);
        }
    }
}

/* Items (b, h, query): the parts brought to one maximum. */
static void few_join(void *ctx, int64_t begin, int64_t end, int thread) {
    const few_job *job = ctx;
    const softmax_call *a = job->call;
    (void)thread;
    for (int64_t n = begin; n < end; n++) {
        int64_t i = n % a->t, h = n / a->t % a->h, b = n / a->t / a->h;
        const real *part = job->partial + n * job->parts * job->width;
        real max = -INFINITY, sum = 0, *y = row_at(&job->k->y[0], b, h, i);
        memset(y, 0, (size_t)a->d * sizeof(real));
        for (int64_t p = 0; p < job->parts; p++) max = LC_MAX(max, part[p * job->width + a->d]);
        for (int64_t p = 0; p < job->parts && max != -INFINITY; p++)
            sum += rexp(part[p * job->width + a->d] - max) * part[p * job->width + a->d + 1];
        for (int64_t p = 0; p < job->parts && sum != 0; p++) {
            real by = rexp(part[p * job->width + a->d] - max) / sum;
            rows_sum(a->d, 1, &by, part + p * job->width, 0, y);
        }
        if (job->k->y[1].data) *row_at(&job->k->y[1], b, h, i) = sum != 0 ? max + (real)log((double)sum) : 0;
    }
}

static int few_forward(const lc_kargs *k, const softmax_call *a) {
    few_job job;
    few_plan(&job, k, a);
    k->host->parallel(a->b * a->g * job.parts, 3, few_body, &job); /* a part takes about ten microseconds */
    k->host->parallel(a->b * a->h * a->t, 64, few_join, &job);
    return LC_K_OK;
}

/* ---- entry
 * ------------------------------------------------------------------------------------------------------------- */
static int plain_wanted(const lc_kargs *k) { return k->host && k->host->option(LC_OPTION_PLAIN_ATTENTION); }

/* The same call as hybrid attention with the window alone. */
static void as_hybrid(const softmax_call *a, hybrid *out) {
    static const lc_view none;
    *out = (hybrid){.b = a->b,
                    .h = a->h,
                    .g = a->g,
                    .t = a->t,
                    .d = a->d,
                    .group = a->group,
                    .mk_group = 1,
                    .softmax = 1,
                    .window = a->window > 0 ? a->window : 1,
                    .kind = a->window > 0 ? KIND_SLIDING : KIND_CAUSAL,
                    .offset = a->offset,
                    .scale = a->scale,
                    .q = a->q,
                    .k = a->k,
                    .v = a->v,
                    .start = a->start,
                    .mq = &none,
                    .mk = &none,
                    .bq = &none,
                    .bk = &none,
                    .factors = &none};
}

size_t K(attention_work)(const lc_kargs *k) {
    softmax_call a;
    hybrid call;
    if (softmax_open(&a, k, k->x, k->x + 3, k->x + 4)) return 0;
    if (plain_wanted(k)) return plain_work(&a, 0);
    if (a.t <= FEW) {
        lc_kargs empty = *k;
        empty.work = NULL;
        return few_plan(&(few_job){0}, &empty, &a);
    }
    as_hybrid(&a, &call);
    return K(chunked_forward_work)(k, &call);
}

int K(attention)(const lc_kargs *k) {
    softmax_call a;
    hybrid call;
    int status = softmax_open(&a, k, k->x, k->x + 3, k->x + 4);
    if (status) return status;
    if (plain_wanted(k)) return plain_forward(k, &a);
    if (a.t <= FEW) return few_forward(k, &a);
    as_hybrid(&a, &call);
    return K(chunked_forward)(k, &call);
}

size_t K(attention_backward_work)(const lc_kargs *k) {
    softmax_call a;
    hybrid call;
    if (softmax_open(&a, k, k->x + 1, k->x + 6, NULL)) return 0;
    as_hybrid(&a, &call);
    return plain_wanted(k) ? plain_work(&a, 1) : K(chunked_backward_work)(k, &call);
}

int K(attention_backward)(const lc_kargs *k) {
    softmax_call a;
    hybrid call;
    int status = softmax_open(&a, k, k->x + 1, k->x + 6, NULL);
    saved from = {k->x, k->x + 4, k->x + 5, NULL, NULL};
    if (status) return status;
    as_hybrid(&a, &call);
    return plain_wanted(k) ? plain_backward(k, &a) : K(chunked_backward)(k, &call, &from);
}
