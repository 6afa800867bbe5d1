/* backend.c: the plugin's entry: devices, memory, copies, and errors. Everything of a device runs on its one stream. Kernel launches
 * are not waited for; what goes wrong in them shows at the next synchronisation, where the message names the ops that ran last. */
#include <stdio.h>
#include <string.h>

#include "../abi.h"
#include "cuda.h"

lc_cuda_device *lc_cuda_now;
const lc_host *lc_cuda_host;
static lc_cuda_device devices[LC_CUDA_DEVICES];
static int device_count;
static char error_text[1024];

/* ---- errors ---------------------------------------------------------------------------------------------------------- */
int lc_cuda_fail(const char *what, const char *why) {
    snprintf(error_text, sizeof error_text, "%s: %s", what, why);
    return LC_K_DEVICE;
}

int lc_cuda_check(cudaError_t e, const char *what) {
    if (e == cudaSuccess) return LC_K_OK;
    int n = snprintf(error_text, sizeof error_text, "%s: %s (%s)", what, cudaGetErrorString(e), cudaGetErrorName(e));
    const lc_cuda_device *d = lc_cuda_now;
    if (d && d->op_count && n > 0 && n < (int)sizeof error_text) {
        n += snprintf(error_text + n, sizeof error_text - (size_t)n, "; ops before it, the last first:");
        for (uint32_t i = 0; i < LC_CUDA_LAST_OPS && i < d->op_count && n < (int)sizeof error_text; i++)
            n += snprintf(error_text + n, sizeof error_text - (size_t)n, " %s",
                          lc_cuda_op_name(d->last_op[(d->op_count - 1 - i) % LC_CUDA_LAST_OPS]));
        if (n < (int)sizeof error_text)
            snprintf(error_text + n, sizeof error_text - (size_t)n, " (CUDA_LAUNCH_BLOCKING=1 finds the one)");
    }
    return LC_K_DEVICE;
}

int lc_cuda_check_blas(cublasStatus_t s, const char *what) {
    return s == CUBLAS_STATUS_SUCCESS ? LC_K_OK : lc_cuda_fail(what, cublasLtGetStatusString(s));
}

static const char *cuda_last_error(void) { return error_text; }

/* A fault that a kernel reported: told once. */
static int told_fault(lc_cuda_device *d) {
    lc_cuda_fault *f = d->fault;
    if (!f->set) return 0;
    snprintf(error_text, sizeof error_text, "%s: value %lld at element %lld is outside [0, %lld)", lc_cuda_op_name(f->op),
             (long long)f->value, (long long)f->at, (long long)f->limit);
    memset(f, 0, sizeof *f);
    return LC_K_DEVICE;
}

/* ---- devices --------------------------------------------------------------------------------------------------------- */
static int make_ready(lc_cuda_device *d) {
    if (lc_cuda_check(cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking), "cudaStreamCreate")) return 1;
    if (lc_cuda_check_blas(cublasLtCreate(&d->blas), "cublasLtCreate")) return 1;
    if (lc_cuda_check(cudaMalloc(&d->blas_work, LC_CUDA_BLAS_WORK + LC_CUDA_COUNTERS * LC_CUDA_COUNTER_BYTES), "cudaMalloc")) return 1;
    if (lc_cuda_check(cudaHostAlloc((void **)&d->fault, sizeof *d->fault, cudaHostAllocMapped), "cudaHostAlloc")) return 1;
    memset(d->fault, 0, sizeof *d->fault);
    if (lc_cuda_check(cudaHostGetDevicePointer((void **)&d->fault_on_device, d->fault, 0), "cudaHostGetDevicePointer")) return 1;
    d->ready = 1;
    return 0;
}

int lc_cuda_select(int device) {
    lc_cuda_device *d = &devices[device];
    if (lc_cuda_now == d) return 0;
    if (lc_cuda_check(cudaSetDevice(device), "cudaSetDevice")) return 1;
    lc_cuda_now = d;
    if (!d->ready && make_ready(d)) {
        lc_cuda_now = NULL;
        return 1;
    }
    return 0;
}

static int cuda_count(void) { return device_count; }
static const char *cuda_describe(int device) { return devices[device].text; }

static int not_recorded(const char *what) {
    return lc_cuda_recording ? lc_cuda_fail(what, "a graph is being recorded, which is for work on the device alone") : 0;
}

static int cuda_sync(int device) {
    if (lc_cuda_select(device) || not_recorded("waiting for the device")) return 1;
    if (lc_cuda_check(cudaStreamSynchronize(lc_cuda_now->stream), "waiting for the device")) return 1;
    return told_fault(lc_cuda_now);
}

/* ---- memory ---------------------------------------------------------------------------------------------------------- */
static int cuda_alloc(int device, size_t bytes, void **out) {
    if (lc_cuda_select(device)) return 1;
    cudaError_t e = cudaMalloc(out, bytes);
    if (e == cudaSuccess) return 0;
    cudaGetLastError(); /* out of memory is no lasting error */
    return lc_cuda_check(e, "cudaMalloc");
}

static void cuda_release(int device, void *p, size_t bytes) {
    (void)bytes;
    if (lc_cuda_select(device)) return;
    cudaFree(p); /* waits for the device */
}

static int cuda_memory(int device, size_t *free, size_t *total) {
    if (lc_cuda_select(device)) return 1;
    return lc_cuda_check(cudaMemGetInfo(free, total), "cudaMemGetInfo");
}

/* Large uploads go through two pieces of pinned memory in turn: threads fill one (from a mapped file, say) while the device reads the
 * other. The driver's own way with memory that is not pinned has a third of the rate. */
#define LC_STAGE ((size_t)16 << 20)

typedef struct stage_job {
    char *to;
    const char *from;
    size_t bytes;
} stage_job;
static void fill_stage(void *ctx, int64_t begin, int64_t end, int thread) {
    const stage_job *j = ctx;
    size_t a = (size_t)begin << 16, b = (size_t)end << 16;
    (void)thread;
    memcpy(j->to + a, j->from + a, (b < j->bytes ? b : j->bytes) - a);
}

static int make_stages(lc_cuda_device *d) {
    for (int i = 0; i < 2; i++) {
        if (d->stage[i]) continue;
        if (cudaEventCreateWithFlags(&d->staged[i], cudaEventDisableTiming) != cudaSuccess) return 1;
        if (cudaHostAlloc(&d->stage[i], LC_STAGE, cudaHostAllocDefault) != cudaSuccess) return 1;
    }
    return 0;
}

static int staged_upload(lc_cuda_device *d, char *to, const char *from, size_t bytes) {
    for (int i = 0; bytes; i ^= 1) {
        size_t n = bytes < LC_STAGE ? bytes : LC_STAGE;
        stage_job j = {d->stage[i], from, n};
        if (lc_cuda_check(cudaEventSynchronize(d->staged[i]), "copy to the device")) return 1;
        lc_cuda_host->parallel((int64_t)((n + 65535) >> 16), 16, fill_stage, &j);
        if (lc_cuda_check(cudaMemcpyAsync(to, d->stage[i], n, cudaMemcpyHostToDevice, d->stream), "copy to the device")) return 1;
        if (lc_cuda_check(cudaEventRecord(d->staged[i], d->stream), "copy to the device")) return 1;
        to += n, from += n, bytes -= n;
    }
    return 0;
}

static int cuda_upload(int device, void *to, const void *from, size_t bytes) {
    if (lc_cuda_select(device) || not_recorded("copy to the device")) return 1;
    if (bytes > LC_STAGE / 4) {
        if (!make_stages(lc_cuda_now)) return staged_upload(lc_cuda_now, to, from, bytes);
        cudaGetLastError(); /* no pinned memory to be had: the driver's way will do */
    }
    return lc_cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, lc_cuda_now->stream), "copy to the device");
}

static int cuda_download(int device, void *to, const void *from, size_t bytes) {
    if (lc_cuda_select(device) || not_recorded("copy from the device")) return 1;
    if (lc_cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, lc_cuda_now->stream), "copy from the device")) return 1;
    return cuda_sync(device);
}

static int cuda_copy(int device, void *to, const void *from, size_t bytes) {
    if (lc_cuda_select(device)) return 1;
    return lc_cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, lc_cuda_now->stream), "copy on the device");
}

/* ---- entry ----------------------------------------------------------------------------------------------------------- */
static int describe(lc_cuda_device *d, int index) {
    struct cudaDeviceProp p;
    if (cudaGetDeviceProperties(&p, index) != cudaSuccess) return 1;
    int driver = 0;
    cudaDriverGetVersion(&driver);
    d->index = index;
    d->major = p.major;
    d->minor = p.minor;
    d->sms = p.multiProcessorCount;
    d->shared_max = p.sharedMemPerBlockOptin;
    d->total_bytes = p.totalGlobalMem;
    snprintf(d->text, sizeof d->text, "%.64s, %.1f GiB, sm_%d%d, %d SMs, driver for CUDA %d.%d", p.name,
             (double)p.totalGlobalMem / (1 << 30), p.major, p.minor, p.multiProcessorCount, driver / 1000, driver % 1000 / 10);
    return 0;
}

__attribute__((visibility("default"))) int lc_plugin_open(const lc_host *host, lc_backend *out, const char **why);
int lc_plugin_open(const lc_host *host, lc_backend *out, const char **why) {
    static char reason[256];
    int n = 0;
    lc_cuda_host = host;
    *why = reason;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess) {
        snprintf(reason, sizeof reason, "%s", cudaGetErrorString(e));
        return 1;
    }
    for (int i = 0; i < n && device_count < LC_CUDA_DEVICES; i++) {
        lc_cuda_device *d = &devices[device_count];
        if (describe(d, i)) continue;
        if (d->major < 8) {
            snprintf(reason, sizeof reason, "%s is older than sm_80 (compute capability 8.0)", d->text);
            return 1;
        }
        device_count++;
    }
    if (!device_count) {
        snprintf(reason, sizeof reason, "no CUDA device");
        return 1;
    }
    lc_backend b = {0};
    b.abi = lc_kernel_abi();
    b.kind = "cuda";
    b.count = cuda_count;
    b.describe = cuda_describe;
    b.alloc = cuda_alloc;
    b.release = cuda_release;
    b.upload = cuda_upload;
    b.download = cuda_download;
    b.copy = cuda_copy;
    b.sync = cuda_sync;
    b.memory = cuda_memory;
    b.last_error = cuda_last_error;
    b.timing = lc_cuda_timings;
    b.record_begin = lc_cuda_record_begin;
    b.record_end = lc_cuda_record_end;
    b.replay = lc_cuda_replay;
    b.forget = lc_cuda_forget;
    b.kernels = lc_cuda_table;
    *out = b;
    return 0;
}
