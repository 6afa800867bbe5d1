/* backend.c: the device "emulated:0": memory that only kernels may touch, and the ops of the CUDA table. It stands in for
 * kernels/cuda/backend.c. Each allocation ends at a closed page and begins as NaNs; it is open only while a kernel or a copy of an op
 * that it is an operand of runs, so that host code which reads device memory faults, as does a kernel that goes astray. Kernels run
 * when they are launched: errors come at once, except for ids out of range, which come at the next synchronisation as they do
 * on a GPU. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "../../kernels/abi.h"
#include "../../kernels/cuda/cuda.h"
#include "emulator.h"

lc_cuda_device *lc_cuda_now;
int lc_cuda_timing; /* nothing to time here */
const lc_host *lc_cuda_host;
static lc_cuda_fault fault;
static lc_cuda_device device = {.ready = 1, .major = 8, .minor = 0, .sms = 4, .shared_max = LC_EMU_SHARED_MAX, .total_bytes = (size_t)8 << 30,
                                .text = "CUDA kernels on the CPU, a fiber a thread", .fault = &fault, .fault_on_device = &fault};
static char error_text[1600];
static const lc_kargs *under_way; /* the op whose kernel runs */
static int under_way_op = -1;

/* ---- errors ---------------------------------------------------------------------------------------------------------- */
int lc_cuda_fail(const char *what, const char *why) {
    snprintf(error_text, sizeof error_text, "%.190s: %.1400s", what, why);
    return LC_K_DEVICE;
}

static cudaError_t launch_error;

cudaError_t cudaPeekAtLastError(void) {
    const char *text = lc_emu_error();
    if (text) {
        snprintf(error_text, sizeof error_text, "%s", text);
        launch_error = cudaErrorLaunchFailure;
    }
    return launch_error;
}

int lc_cuda_check(cudaError_t e, const char *what) {
    if (e == cudaSuccess) return LC_K_OK;
    if (e != launch_error) return lc_cuda_fail(what, cudaGetErrorString(e));
    launch_error = cudaSuccess; /* one kernel's fault is told once */
    char text[1400];
    snprintf(text, sizeof text, "%.1399s", error_text);
    return lc_cuda_fail(what, text);
}

int lc_cuda_check_blas(cublasStatus_t s, const char *what) {
    return s == CUBLAS_STATUS_SUCCESS ? LC_K_OK : lc_cuda_fail(what, cublasLtGetStatusString(s));
}

int lc_cuda_select(int index) {
    (void)index;
    lc_cuda_now = &device;
    return 0;
}

static int emulated_sync(int index) {
    lc_cuda_select(index);
    if (!fault.set) return 0;
    snprintf(error_text, sizeof error_text, "%s: value %lld at element %lld is outside [0, %lld)", lc_cuda_op_name(fault.op),
             (long long)fault.value, (long long)fault.at, (long long)fault.limit);
    memset(&fault, 0, sizeof fault);
    return LC_K_DEVICE;
}

/* ---- memory ---------------------------------------------------------------------------------------------------------- */
enum { PAGE = 4096, ALIGN = 16 }; /* the least that kernels may count on */
typedef struct block { char *map, *p; size_t map_bytes, bytes; int open; } block;
static block *blocks; /* in the order of their addresses */
static int block_count, block_room;

static int place_of(const void *p) { /* how many blocks begin at or before p */
    int lo = 0, hi = block_count;
    while (lo < hi) {
        int mid = (lo + hi) / 2;
        if (blocks[mid].map <= (const char *)p) lo = mid + 1;
        else hi = mid;
    }
    return lo;
}

static block *find_block(const void *p) {
    int i = place_of(p) - 1;
    return i >= 0 && (const char *)p < blocks[i].map + blocks[i].map_bytes ? &blocks[i] : NULL;
}

static int emulated_alloc(int index, size_t bytes, void **out) {
    (void)index;
    size_t data = (bytes + ALIGN - 1) / ALIGN * ALIGN, map = (data + PAGE - 1) / PAGE * PAGE;
    if (block_count == block_room) {
        int room = block_room ? 2 * block_room : 1024;
        block *more = realloc(blocks, (size_t)room * sizeof *more);
        if (!more) return 1;
        blocks = more;
        block_room = room;
    }
    char *p = mmap(NULL, map + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) {
        lc_cuda_fail("memory", "the host has no more");
        return 1;
    }
    memset(p, 0xff, map);
    mprotect(p, map + PAGE, PROT_NONE);
    int at = place_of(p);
    memmove(blocks + at + 1, blocks + at, (size_t)(block_count++ - at) * sizeof *blocks);
    blocks[at] = (block){p, p + map - data, map + PAGE, bytes, 0};
    *out = blocks[at].p;
    return 0;
}

static void emulated_release(int index, void *p, size_t bytes) {
    (void)index, (void)bytes;
    block *b = find_block(p);
    if (!b) return;
    munmap(b->map, b->map_bytes);
    memmove(b, b + 1, (size_t)(blocks + --block_count - b) * sizeof *b);
}

/* Opens (or closes) the block that p lies in; nothing for host memory. */
static void set_open(const void *p, int open) {
    block *b = p ? find_block(p) : NULL;
    if (!b || b->open == open) return;
    b->open = open;
    mprotect(b->map, b->map_bytes - PAGE, open ? PROT_READ | PROT_WRITE : PROT_NONE);
}

void lc_emu_open_memory(int on) {
    if (!under_way) return;
    for (int i = 0; i < under_way->n_x; i++) set_open(under_way->x[i].data, on);
    for (int i = 0; i < under_way->n_y; i++) set_open(under_way->y[i].data, on);
    for (int i = 0; i < under_way->n_list; i++) set_open(under_way->list[i].data, on);
    set_open(under_way->work, on);
}

const char *lc_emu_where(const void *p) {
    static char text[200];
    const block *b = find_block(p);
    if (!b) snprintf(text, sizeof text, "address %p, no device memory", p);
    else if ((const char *)p < b->p + b->bytes)
        snprintf(text, sizeof text, "device memory that is no operand here, or by the host (byte %zd of a block of %zu)",
                 (const char *)p - b->p, b->bytes);
    else snprintf(text, sizeof text, "%zd bytes behind the end of a block of %zu bytes", (const char *)p - (b->p + b->bytes), b->bytes);
    return text;
}

int lc_emu_on_host(const void *p) {
    const char *here = __builtin_frame_address(0);
    return (const char *)p > here - 4096 && (const char *)p < here + ((size_t)8 << 20);
}

static int emulated_copy(int index, void *to, const void *from, size_t bytes) {
    (void)index;
    set_open(to, 1);
    set_open(from, 1);
    memmove(to, from, bytes);
    set_open(to, 0);
    set_open(from, 0);
    return 0;
}

static int emulated_download(int index, void *to, const void *from, size_t bytes) {
    emulated_copy(index, to, from, bytes);
    return emulated_sync(index);
}

/* ---- ops ------------------------------------------------------------------------------------------------------------- */
static int run_op(const lc_kargs *k, int op) {
    under_way = k;
    under_way_op = op;
    int rc;
    if (!sigsetjmp(lc_emu_recover, 0)) {
        lc_emu_recoverable = 1;
        rc = lc_cuda_table[op].run(k);
    } else {
        lc_emu_end_launch();
        rc = lc_cuda_check(cudaGetLastError(), lc_cuda_op_name(op));
    }
    lc_emu_recoverable = 0;
    if (rc) cudaGetLastError(), launch_error = cudaSuccess;
    under_way = NULL;
    return rc;
}

static size_t ask_work(const lc_kargs *k, int op) {
    if (!sigsetjmp(lc_emu_recover, 0)) {
        lc_emu_recoverable = 1;
        lc_cuda_select(k->device);
        size_t n = lc_cuda_table[op].work ? lc_cuda_table[op].work(k) : 0;
        lc_emu_recoverable = 0;
        return n;
    }
    lc_emu_recoverable = 0;
    const char *text = lc_emu_error();
    fprintf(stderr, "emulator: the work function of %s faulted: %s\n", lc_cuda_op_name(op), text ? text : "?");
    return 0;
}

#define PAIR(op)                                                              \
    static int run_##op(const lc_kargs *k) { return run_op(k, LC_OP_##op); } \
    static size_t work_##op(const lc_kargs *k) { return ask_work(k, LC_OP_##op); }
#define UNARY(name, sig, flags, doc) PAIR(name) PAIR(name##_grad)
#define UNARY_FLAT(name, sig, flags, doc) PAIR(name)
#define BINARY(name, sig, flags, doc) PAIR(name) PAIR(name##_grad_a) PAIR(name##_grad_b)
#define COMPARE(name, sig, flags, doc) PAIR(name)
#define OP(name, sig, flags, doc) PAIR(name)
#include "../../runtime/ops.def"

static const lc_kernel table[LC_OP_COUNT] = {
#define ENTRY(op) [LC_OP_##op] = {run_##op, work_##op},
#define UNARY(name, sig, flags, doc) ENTRY(name) ENTRY(name##_grad)
#define UNARY_FLAT(name, sig, flags, doc) ENTRY(name)
#define BINARY(name, sig, flags, doc) ENTRY(name) ENTRY(name##_grad_a) ENTRY(name##_grad_b)
#define COMPARE(name, sig, flags, doc) ENTRY(name)
#define OP(name, sig, flags, doc) ENTRY(name)
#include "../../runtime/ops.def"
};

/* ---- entry ----------------------------------------------------------------------------------------------------------- */
static int emulated_count(void) { return 1; }
static const char *emulated_describe(int index) { return (void)index, device.text; }
static const char *emulated_last_error(void) { return error_text; }

__attribute__((visibility("default"))) int lc_plugin_open(const lc_host *host, lc_backend *out, const char **why);
int lc_plugin_open(const lc_host *host, lc_backend *out, const char **why) {
    *why = "";
    lc_cuda_host = host;
    lc_emu_start();
    const char *shared = getenv("LOLCATS_EMULATOR_SHARED"); /* KB a block may ask for: another GPU's kernels are taken */
    if (shared && atoi(shared) > 0 && atoi(shared) <= (int)(LC_EMU_SHARED_MAX >> 10)) device.shared_max = (size_t)atoi(shared) << 10;
    lc_backend b = {0};
    b.abi = lc_kernel_abi();
    b.kind = "emulated";
    b.count = emulated_count;
    b.describe = emulated_describe;
    b.alloc = emulated_alloc;
    b.release = emulated_release;
    b.upload = emulated_copy;
    b.download = emulated_download;
    b.copy = emulated_copy;
    b.sync = emulated_sync;
    b.last_error = emulated_last_error;
    b.kernels = table;
    *out = b;
    return 0;
}

void lc_cuda_time_op(int op, int after) { (void)op, (void)after; }
