/* threads.c: the CPU pool. One caller hands out one job at a time; parts of it are taken in order by whoever is free, so a core
 * that another process holds up delays its part only. Workers spin for some microseconds after a job, then sleep: a barrier that
 * spins on is what turns a busy neighbour into a tenfold slowdown. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "core.h"

enum { MAX_THREADS = 256, SPINS = 4000, PARTS_PER_THREAD = 4 };

typedef void body_fn(void *ctx, int64_t begin, int64_t end, int thread);

static struct {
    pthread_t worker[MAX_THREADS + 1];
    unsigned first_job[MAX_THREADS + 1]; /* the job counter when the worker was made */
    int threads, started;
    pthread_mutex_t lock;
    pthread_cond_t wake, done;
    body_fn *body;
    void *ctx;
    int64_t n, parts;
    atomic_llong next;         /* part to be taken */
    atomic_int active;         /* workers inside the job */
    atomic_uint job;           /* number of the job; workers wait for it to change */
    int sleeping;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER};

static _Thread_local int inside; /* a parallel body may call parallel: it runs inline */

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void take_parts(int thread) {
    inside = 1;
    for (;;) {
        int64_t p = atomic_fetch_add(&pool.next, 1);
        if (p >= pool.parts) break;
        int64_t begin = pool.n * p / pool.parts, end = pool.n * (p + 1) / pool.parts;
        if (begin < end) pool.body(pool.ctx, begin, end, thread);
    }
    inside = 0;
}

static void *work(void *arg) {
    int thread = (int)(intptr_t)arg;
    unsigned seen = pool.first_job[thread];
    for (;;) {
        for (int s = 0; s < SPINS && atomic_load_explicit(&pool.job, memory_order_acquire) == seen; s++) relax();
        if (atomic_load(&pool.job) == seen) {
            pthread_mutex_lock(&pool.lock);
            pool.sleeping++;
            while (atomic_load(&pool.job) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
            pool.sleeping--;
            pthread_mutex_unlock(&pool.lock);
        }
        seen = atomic_load(&pool.job);
        if (thread < pool.threads) take_parts(thread);
        if (atomic_fetch_sub(&pool.active, 1) == 1) { /* the last one out */
            pthread_mutex_lock(&pool.lock);
            pthread_cond_signal(&pool.done);
            pthread_mutex_unlock(&pool.lock);
        }
    }
    return NULL;
}

int lc_thread_count(void) {
    if (!pool.threads) {
        const char *env = getenv("LOLCATS_THREADS");
        int n = env ? atoi(env) : 0;
        if (n <= 0) {
            cpu_set_t set;
            n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : (int)sysconf(_SC_NPROCESSORS_ONLN);
        }
        pool.threads = n < 1 ? 1 : n > MAX_THREADS ? MAX_THREADS : n;
    }
    return pool.threads;
}

int lc_threads(int n) {
    lc_thread_count();
    if (n > 0) pool.threads = n > MAX_THREADS ? MAX_THREADS : n;
    return pool.threads;
}

static void start_workers(void) {
    while (pool.started < pool.threads - 1) {
        pthread_attr_t a;
        pthread_attr_init(&a);
        pthread_attr_setdetachstate(&a, PTHREAD_CREATE_DETACHED);
        pool.first_job[pool.started + 1] = atomic_load(&pool.job); /* it waits for the next one */
        int failed = pthread_create(&pool.worker[pool.started], &a, work, (void *)(intptr_t)(pool.started + 1));
        pthread_attr_destroy(&a);
        if (failed) {
            pool.threads = pool.started + 1;
            return;
        }
        pool.started++;
    }
}

void lc_parallel(int64_t n, int64_t grain, void (*body)(void *, int64_t, int64_t, int), void *ctx) {
    if (n <= 0) return;
    int threads = lc_thread_count();
    if (grain < 1) grain = 1;
    int64_t parts = (n + grain - 1) / grain;
    if (threads == 1 || parts == 1 || inside) {
        body(ctx, 0, n, 0);
        return;
    }
    if (parts > (int64_t)threads * PARTS_PER_THREAD) parts = (int64_t)threads * PARTS_PER_THREAD;
    if (pool.started < threads - 1) start_workers();
    pool.body = body;
    pool.ctx = ctx;
    pool.n = n;
    pool.parts = parts;
    atomic_store(&pool.next, 0);
    atomic_store(&pool.active, pool.started);
    pthread_mutex_lock(&pool.lock);
    atomic_fetch_add(&pool.job, 1);
    if (pool.sleeping) pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    take_parts(0);
    for (int s = 0; s < SPINS && atomic_load_explicit(&pool.active, memory_order_acquire); s++) relax();
    if (atomic_load(&pool.active)) {
        pthread_mutex_lock(&pool.lock);
        while (atomic_load(&pool.active)) pthread_cond_wait(&pool.done, &pool.lock);
        pthread_mutex_unlock(&pool.lock);
    }
}
