/* gemm_onednn.c: compiled once for all instruction sets. Owns the choice of the GEMM provider, oneDNN's entry points
 * (opened at run time, when first forced; the few prototypes stand here, so no header is needed to build), and each
 * thread's scratch memory. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../kernel.h"

void *lc_cpu_scratch(size_t bytes);
size_t lc_cpu_panel_bytes(void);
int lc_onednn_sgemm(int trans_a, int trans_b, int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
                    const float *b, int64_t ldb, float beta, float *c, int64_t ldc);
int lc_onednn_active(void);

/* ---- scratch --------------------------------------------------------------------------------------------------- */

static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;
static _Thread_local void *scratch;
static _Thread_local size_t scratch_size;

static void scratch_make_key(void) { pthread_key_create(&scratch_key, free); }

void *lc_cpu_scratch(size_t bytes) {
    if (bytes <= scratch_size) return scratch;
    pthread_once(&scratch_once, scratch_make_key);
    void *p = NULL;
    if (posix_memalign(&p, 64, (bytes + 4095) & ~(size_t)4095)) return NULL;
    free(scratch);
    scratch = p;
    scratch_size = bytes;
    pthread_setspecific(scratch_key, p); /* frees it when the thread ends */
    return p;
}

size_t lc_cpu_panel_bytes(void) {
    static size_t bytes;
    size_t b = __atomic_load_n(&bytes, __ATOMIC_RELAXED);
    if (b) return b;
    long l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
    b = l2 <= 0 ? 256u << 10 : (size_t)l2 / 2;
    b = b < 128u << 10 ? 128u << 10 : b > 1024u << 10 ? 1024u << 10 : b;
    __atomic_store_n(&bytes, b, __ATOMIC_RELAXED);
    return b;
}

/* ---- provider -------------------------------------------------------------------------------------------------- */

typedef int (*dnn_sgemm_fn)(char ta, char tb, int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
                            const float *b, int64_t ldb, float beta, float *c, int64_t ldc);

static dnn_sgemm_fn dnn_sgemm;
static void (*omp_threads)(int);
static char dnn_why[256] =
    "not asked for: the own GEMM, as fast and of one summation order for any number of threads, is the default";
static int dnn_tried, dnn_active;

static void dnn_open(void) {
    static const char *const names[] = {"libdnnl.so.2", "libdnnl.so.3"};
    dnn_tried = 1;
    setenv("OMP_NUM_THREADS", "1", 0); /* our pool's workers call it, each alone */
    for (int i = 0; i < 2; i++) {
        void *lib = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
        if (!lib) {
            const char *e = dlerror();
            snprintf(dnn_why, sizeof dnn_why, "%s", e ? e : "cannot be opened");
            continue;
        }
        *(void **)&dnn_sgemm = dlsym(lib, "dnnl_sgemm");
        *(void **)&omp_threads = dlsym(RTLD_DEFAULT, "omp_set_num_threads");
        if (!omp_threads) *(void **)&omp_threads = dlsym(lib, "omp_set_num_threads");
        snprintf(dnn_why, sizeof dnn_why, dnn_sgemm ? "%s" : "%s has no dnnl_sgemm", names[i]);
        if (dnn_sgemm) return;
    }
}

const char *lc_cpu_gemm_provider(const char *force, const char **why) {
    if (force && strcmp(force, "onednn") == 0) {
        if (!dnn_tried) dnn_open();
        dnn_active = dnn_sgemm != NULL;
    } else if (force) {
        dnn_active = 0;
    }
    if (why) *why = dnn_why;
    return dnn_active ? "onednn" : "own";
}

int lc_onednn_active(void) { return dnn_active; }

int lc_onednn_sgemm(int trans_a, int trans_b, int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
                    const float *b, int64_t ldb, float beta, float *c, int64_t ldc) {
    static _Thread_local int told;
    if (!told && omp_threads) omp_threads(1);
    told = 1;
    return dnn_sgemm(trans_a ? 'T' : 'N', trans_b ? 'T' : 'N', m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
