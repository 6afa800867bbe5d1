/* hybrid.c: the entry points of hybrid attention: takes the call apart and picks the plain twin or the chunked kernels.
 */
#include "hybrid.h"

static int plain_wanted(const lc_kargs *k) { return k->host && k->host->option(LC_OPTION_PLAIN_HYBRID); }

size_t K(hybrid_attention_work)(const lc_kargs *k) {
    hybrid a;
    if (hybrid_open(&a, k, k->x)) return 0;
    if (k->x[9].data) return K(stateful_forward_work)(k, &a);
    return plain_wanted(k) ? K(hybrid_plain_work)(&a) : K(chunked_forward_work)(k, &a);
}

int K(hybrid_attention)(const lc_kargs *k) {
    hybrid a;
    int status = hybrid_open(&a, k, k->x);
    if (status) return status;
    if (k->x[14].data || k->x[15].data) return LC_K_UNSUPPORTED; /* gates, sinks */
    if (k->x[9].data) return K(stateful_forward)(k, &a);
    return plain_wanted(k) ? K(hybrid_plain)(k, &a) : K(chunked_forward)(k, &a);
}

size_t K(hybrid_attention_backward_work)(const lc_kargs *k) {
    hybrid a;
    if (hybrid_open(&a, k, k->x + 1)) return 0;
    return plain_wanted(k) ? K(hybrid_plain_backward_work)(&a) : K(chunked_backward_work)(k, &a);
}

int K(hybrid_attention_backward)(const lc_kargs *k) {
    hybrid a;
    int status = hybrid_open(&a, k, k->x + 1);
    saved from = {k->x, k->x + 10, k->x + 11, k->x + 12, k->x + 13};
    if (status) return status;
    return plain_wanted(k) ? K(hybrid_plain_backward)(k, &a) : K(chunked_backward)(k, &a, &from);
}
