/* hybrid_backward.cu: the entry points of hybrid attention's gradient: takes the call apart and picks the plain twin or the
 * tensor-core kernels. */
#include "hybrid_backward.cuh"

static bool fast(const lc_kargs *k, const gradients *o) {
    return !(k->host && k->host->option(LC_OPTION_PLAIN_HYBRID)) && hybrid_backward_fast_takes(o);
}

extern "C" size_t lc_cuda_hybrid_attention_backward_work(const lc_kargs *k) {
    gradients o;
    if (gradients_open(&o, k)) return 0;
    return fast(k, &o) ? hybrid_backward_fast_work(&o) : hybrid_backward_plain_work(&o);
}

extern "C" int lc_cuda_hybrid_attention_backward(const lc_kargs *k) {
    gradients o;
    int rc = gradients_open(&o, k);
    if (rc) return rc;
    return fast(k, &o) ? hybrid_backward_fast(&o, k->work) : hybrid_backward_plain(&o, k->work);
}
