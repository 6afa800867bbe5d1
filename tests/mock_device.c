/* mock_device.c: a plugin that pretends to be an accelerator, for machines without one. Its memory is closed (PROT_NONE) and opened
 * only while one of its kernels or copies runs, so host code that touches device memory, a missing copy or an op on the wrong
 * device faults at once. Its kernels are the CPU's. It takes f32, f64 and integers; where the CPU's kernel leaves halves to the
 * dispatcher it refuses them. Copies and kernels count, and LOLCATS_MOCK_BYTES limits its memory. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "../kernels/abi.h"
#include "../kernels/kernel.h"

enum { MAX_BLOCKS = 1 << 16 };
static struct { char *p; size_t bytes; } blocks[MAX_BLOCKS];
static int block_count;
static size_t in_use, limit;
static const lc_kernel *cpu[2];
struct mock_graph;
static struct mock_graph *recording;
static lc_kernel table[LC_OP_COUNT];

static size_t whole_pages(size_t n) { return (n + 4095) & ~(size_t)4095; }

static int find_block(const void *p) {
    for (int i = block_count - 1; i >= 0; i--)
        if ((const char *)p >= blocks[i].p && (const char *)p < blocks[i].p + blocks[i].bytes) return i;
    return -1;
}

static int set_access(const void *p, int access) {
    int i = p ? find_block(p) : -1;
    if (i < 0) return p != NULL;
    return mprotect(blocks[i].p, blocks[i].bytes, access);
}

static int mock_alloc(int device, size_t bytes, void **out) {
    (void)device;
    bytes = whole_pages(bytes);
    if (block_count == MAX_BLOCKS || (limit && in_use + bytes > limit)) return 1;
    void *p = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return 1;
    blocks[block_count].p = p;
    blocks[block_count++].bytes = bytes;
    in_use += bytes;
    *out = p;
    return 0;
}

static void mock_release(int device, void *p, size_t bytes) {
    (void)device;
    (void)bytes;
    int i = find_block(p);
    if (i < 0) return;
    in_use -= blocks[i].bytes;
    munmap(blocks[i].p, blocks[i].bytes);
    blocks[i] = blocks[--block_count];
}

static int mock_copy(int device, void *to, const void *from, size_t bytes) {
    (void)device;
    if (recording) return 1;
    int a = find_block(to), b = find_block(from);
    if (a >= 0 && set_access(to, PROT_READ | PROT_WRITE)) return 1;
    if (b >= 0 && a != b && set_access(from, PROT_READ)) return 1;
    memmove(to, from, bytes);
    if (a >= 0) set_access(to, PROT_NONE);
    if (b >= 0) set_access(from, PROT_NONE);
    return 0;
}

/* All operands' memory opened, or closed again. An operand outside the device's memory is the fault to be found. */
static int access_all(const lc_kargs *k, int access) {
    for (int i = 0; i < k->n_x; i++)
        if (set_access(k->x[i].data, access)) return 1;
    for (int i = 0; i < k->n_y; i++)
        if (set_access(k->y[i].data, access)) return 1;
    for (int i = 0; i < k->n_list; i++)
        if (set_access(k->list[i].data, access)) return 1;
    return set_access(k->work, access);
}

static int is_double(const lc_kargs *k) {
    for (int i = 0; i < k->n_x; i++)
        if (k->x[i].data && k->x[i].dtype == LC_K_F64) return 1;
    for (int i = 0; i < k->n_y; i++)
        if (k->y[i].data && k->y[i].dtype == LC_K_F64) return 1;
    for (int i = 0; i < k->n_list; i++)
        if (k->list[i].dtype == LC_K_F64) return 1;
    return 0;
}

static int has_half(const lc_kargs *k) {
    for (int i = 0; i < k->n_x; i++)
        if (k->x[i].data && (k->x[i].dtype == LC_K_BF16 || k->x[i].dtype == LC_K_F16)) return 1;
    return 0;
}

/* ---- graphs: calls kept whole, and made again ---- */
typedef struct mock_call {
    lc_kargs k;
    int op;
    double f[12]; /* as many as an op may have: lc_args */
    int32_t i[24];
    lc_view *list;
} mock_call;
typedef struct mock_graph {
    int count;
    mock_call call[4096];
} mock_graph;

static int record(const lc_kargs *k, int op) {
    if (recording->count == 4096 || k->s) return LC_K_UNSUPPORTED;
    mock_call *c = &recording->call[recording->count++];
    c->k = *k;
    c->op = op;
    memcpy(c->f, k->f, sizeof c->f);
    memcpy(c->i, k->i, sizeof c->i);
    c->list = k->n_list ? malloc((size_t)k->n_list * sizeof *c->list) : NULL;
    if (c->list) memcpy(c->list, k->list, (size_t)k->n_list * sizeof *c->list);
    return LC_K_OK;
}

static int run_kernel(const lc_kargs *k, int op, int half_is_fine) {
    if (recording) return record(k, op);
    if (has_half(k) && !half_is_fine) return LC_K_UNSUPPORTED;
    if (access_all(k, PROT_READ | PROT_WRITE)) {
        access_all(k, PROT_NONE);
        return LC_K_DEVICE;
    }
    int rc = cpu[is_double(k)][op].run(k);
    access_all(k, PROT_NONE);
    return rc;
}

static size_t ask_work(const lc_kargs *k, int op) {
    const lc_kernel *c = &cpu[is_double(k)][op];
    if (!c->work || access_all(k, PROT_READ)) return 0; /* a work function may look at small operands */
    size_t n = c->work(k);
    access_all(k, PROT_NONE);
    return n;
}

static int mock_record_begin(int device) {
    (void)device;
    return !(recording = calloc(1, sizeof *recording));
}
static void mock_forget(int device, void *graph) {
    (void)device;
    mock_graph *g = graph;
    for (int i = 0; i < g->count; i++) free(g->call[i].list);
    free(g);
}
static int mock_record_end(int device, void **graph) {
    if (graph) *graph = recording;
    else mock_forget(device, recording);
    recording = NULL;
    return 0;
}
static int mock_replay(int device, void *graph) {
    (void)device;
    mock_graph *g = graph;
    for (int i = 0; i < g->count; i++) {
        mock_call *c = &g->call[i];
        lc_fault fault = {0, 0, 0};
        c->k.f = c->f, c->k.i = c->i, c->k.list = c->list, c->k.fault = &fault;
        if (run_kernel(&c->k, c->op, 1)) return 1;
    }
    return 0;
}

/* One pair of functions an op, since a kernel is not told its op. */
enum { INPLACE = 0, NODIFF = 0, NOGRAD = 0, RANDOM = 0, MIXED = 0, INTERNAL = 0, STRIDED = 0, ROWS = 0, OPERANDS = 0, RESULT = 0, NEITHER = 0, HALF = 1 };
#define PAIR(op, flags)                                                                          \
    static int run_##op(const lc_kargs *k) { return run_kernel(k, LC_OP_##op, ((flags) & HALF)); } \
    static size_t work_##op(const lc_kargs *k) { return ask_work(k, LC_OP_##op); }
#define UNARY(name, sig, flags, doc) PAIR(name, flags) PAIR(name##_grad, flags)
#define UNARY_FLAT(name, sig, flags, doc) PAIR(name, flags)
#define BINARY(name, sig, flags, doc) PAIR(name, flags) PAIR(name##_grad_a, flags) PAIR(name##_grad_b, flags)
#define COMPARE(name, sig, flags, doc) PAIR(name, flags)
#define OP(name, sig, flags, doc) PAIR(name, flags)
#include "../runtime/ops.def"

static void fill_table(void) {
#define ENTRY(op) table[LC_OP_##op].run = run_##op, table[LC_OP_##op].work = work_##op;
#define UNARY(name, sig, flags, doc) ENTRY(name) ENTRY(name##_grad)
#define UNARY_FLAT(name, sig, flags, doc) ENTRY(name)
#define BINARY(name, sig, flags, doc) ENTRY(name) ENTRY(name##_grad_a) ENTRY(name##_grad_b)
#define COMPARE(name, sig, flags, doc) ENTRY(name)
#define OP(name, sig, flags, doc) ENTRY(name)
#include "../runtime/ops.def"
}

static int mock_count(void) { return 2; }
static int mock_sync(int device) { return (void)device, 0; }
static const char *mock_error(void) { return "an operand is not in device memory"; }
static const char *mock_describe(int device) { return device ? "second mock device" : "mock device: closed memory, the CPU's kernels"; }

__attribute__((visibility("default"))) int lc_plugin_open(const lc_host *host, lc_backend *out, const char **why);
int lc_plugin_open(const lc_host *host, lc_backend *out, const char **why) {
    (void)host;
    const char *env = getenv("LOLCATS_MOCK_BYTES");
    if (getenv("LOLCATS_MOCK_ABSENT")) {
        *why = "no mock device: LOLCATS_MOCK_ABSENT is set";
        return 1;
    }
    limit = env ? strtoull(env, NULL, 10) : 0;
    cpu[0] = lc_cpu_kernels(lc_cpu_best_isa(), 0);
    cpu[1] = lc_cpu_kernels(lc_cpu_best_isa(), 1);
    fill_table();
    *out = (lc_backend){.abi = lc_kernel_abi() ^ (getenv("LOLCATS_MOCK_STALE") ? 1u : 0u), .kind = "mock", .count = mock_count,
                        .describe = mock_describe, .alloc = mock_alloc, .release = mock_release, .upload = mock_copy,
                        .download = mock_copy, .copy = mock_copy, .sync = mock_sync, .last_error = mock_error, .kernels = table,
                        .record_begin = mock_record_begin, .record_end = mock_record_end, .replay = mock_replay, .forget = mock_forget};
    return 0;
}
