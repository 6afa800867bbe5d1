/* optim.c: optimizer steps, in place, in PyTorch's arithmetic and order of operations (torch.optim, one tensor at a
 * time). Parameters and moments are contiguous and real; gradients may be of any float dtype. Learning rate and step
 * may come as 0-dim tensors, so that a recorded graph can be replayed. */
#include "convert.h"
#include "walk.h"

#define KERNEL(name)                                                                                                   \
    int K(name)(const lc_kargs *k);                                                                                    \
    int K(name)(const lc_kargs *k)

enum { GRAIN = 16384, PIECE = 512 };

typedef struct job {
    real *p, *m, *v;
    const char *g;
    int g_dtype;
    int64_t g_bytes;
    real lr, beta1, beta2, eps, decay, keep, step_size, bias2_root, one_minus_beta2, lerp;
    real momentum, dampened;
    int decoupled, nesterov, first;
} job;

/* The gradient of elements [at, at + n), in real. */
static const real *gradient(const job *j, int64_t at, int64_t n, real *buf) {
    const char *g = j->g + at * j->g_bytes;
    if (j->g_dtype == LC_K_REAL) return (const real *)g;
    row_to_real(j->g_dtype, g, buf, n);
    return buf;
}

static void adamw_piece(const job *restrict j, real *restrict p, const real *restrict g, real *restrict m,
                        real *restrict v, int64_t n) {
    const real keep = j->keep, decay = j->decay, lerp = j->lerp, beta2 = j->beta2, rest2 = j->one_minus_beta2;
    const real root = j->bias2_root, eps = j->eps, size = -j->step_size;
    const int near = lerp < (real)0.5;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        real gi = g[i] + decay * p[i], pi = p[i] * keep; /* one of decay and 1 - keep is 0 */
        real mi = near ? m[i] + lerp * (gi - m[i]) : gi - (gi - m[i]) * (1 - lerp);
        real vi = v[i] * beta2 + rest2 * gi * gi;
        real denominator = (LC_DOUBLE ? (real)sqrt(vi) : (real)sqrtf((float)vi)) / root + eps;
        m[i] = mi;
        v[i] = vi;
        p[i] = pi + size * mi / denominator;
    }
}

static void adamw_part(void *ctx, int64_t begin, int64_t end, int thread) {
    const job *j = (const job *)ctx;
    real buf[PIECE];
    (void)thread;
    for (int64_t at = begin; at < end; at += PIECE) {
        int64_t n = LC_MIN(end - at, (int64_t)PIECE);
        adamw_piece(j, j->p + at, gradient(j, at, n, buf), j->m + at, j->v + at, n);
    }
}

static int usable(const lc_view *v, int is_gradient) {
    return view_contiguous(v) && (v->dtype == LC_K_REAL || (is_gradient && lc_dtype_is_float(v->dtype)));
}

/* x = p, g, m, v [n], lr, step; f = lr, beta1, beta2, eps, weight_decay; i = step (from 1), decoupled */
KERNEL(adamw_) {
    const lc_view *x = k->x;
    if (!usable(&x[0], 0) || !usable(&x[1], 1) || !usable(&x[2], 0) || !usable(&x[3], 0)) return LC_K_UNSUPPORTED;
    double lr = scalar_or(&x[4], k->f[0]), step = scalar_or(&x[5], k->i[0]), beta1 = k->f[1], beta2 = k->f[2];
    double decay = k->f[4];
    int decoupled = k->i[1];
    job j = {.p = (real *)x[0].data, .m = (real *)x[2].data, .v = (real *)x[3].data, .g = (const char *)x[1].data};
    j.g_dtype = x[1].dtype;
    j.g_bytes = view_bytes(&x[1]);
    j.keep = (real)(decoupled ? 1 - lr * decay : 1);
    j.decay = (real)(decoupled ? 0 : decay);
    j.lerp = (real)(1 - beta1);
    j.beta2 = (real)beta2;
    j.one_minus_beta2 = (real)(1 - beta2);
    j.eps = (real)k->f[3];
    j.step_size = (real)(lr / (1 - pow(beta1, step)));
    j.bias2_root = (real)sqrt(1 - pow(beta2, step));
    run_parts(k, view_numel(&x[0]), GRAIN, adamw_part, &j);
    return LC_K_OK;
}

static void sgd_piece(const job *restrict j, real *restrict p, const real *restrict g, real *restrict buf, int64_t n) {
    const real lr = -j->lr, decay = j->decay, momentum = j->momentum, dampened = j->dampened;
    if (!buf) {
        for (int64_t i = 0; i < n; i++) p[i] += lr * (g[i] + decay * p[i]);
        return;
    }
    const int first = j->first, nesterov = j->nesterov;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        real gi = g[i] + decay * p[i];
        real b = first ? gi : buf[i] * momentum + dampened * gi;
        buf[i] = b;
        p[i] += lr * (nesterov ? gi + momentum * b : b);
    }
}

static void sgd_part(void *ctx, int64_t begin, int64_t end, int thread) {
    const job *j = (const job *)ctx;
    real buf[PIECE];
    (void)thread;
    for (int64_t at = begin; at < end; at += PIECE) {
        int64_t n = LC_MIN(end - at, (int64_t)PIECE);
        sgd_piece(j, j->p + at, gradient(j, at, n, buf), j->m ? j->m + at : NULL, n);
    }
}

/* x = p, g, buf (needed with momentum) [n], lr, step; f = lr, momentum, dampening, weight_decay; i = step (from 1),
 * nesterov. The first step fills buf with the gradient, undampened. */
KERNEL(sgd_) {
    const lc_view *x = k->x;
    double momentum = k->f[1];
    int has_buf = momentum != 0 && x[2].data;
    if (!usable(&x[0], 0) || !usable(&x[1], 1) || (momentum != 0 && !has_buf)) return LC_K_UNSUPPORTED;
    if (has_buf && !usable(&x[2], 0)) return LC_K_UNSUPPORTED;
    job j = {.p = (real *)x[0].data, .m = has_buf ? (real *)x[2].data : NULL, .g = (const char *)x[1].data};
    j.g_dtype = x[1].dtype;
    j.g_bytes = view_bytes(&x[1]);
    j.lr = (real)scalar_or(&x[3], k->f[0]);
    j.first = scalar_or(&x[4], k->i[0]) <= 1;
    j.momentum = (real)momentum;
    j.dampened = (real)(1 - k->f[2]);
    j.decay = (real)k->f[3];
    j.nesterov = k->i[1];
    run_parts(k, view_numel(&x[0]), GRAIN, sgd_part, &j);
    return LC_K_OK;
}
