/* graph.c: kernels recorded once and replayed with one call, which spares the host its launches and the device the gaps between them.
 * What a kernel is given by value is recorded with it, so a step that is to be replayed reads what changes from device memory. */
#include <stdlib.h>

#include "cuda.h"

int lc_cuda_recording;

/* ---- counters of products -------------------------------------------------------------------------------------------- */
/* cuBLASLt zeroes a counter of a few bytes before each of the widest products: a node that the device stops at for 6 us. Recorded
 * products have counters of their own (gemm.cu), so all of these nodes can go for one that zeroes the whole region at the start. */
#if CUDART_VERSION >= 13000
#define LC_EDGES NULL,
#else
#define LC_EDGES
#endif

static const char *counters_of(const lc_cuda_device *d) { return (const char *)d->blas_work + LC_CUDA_BLAS_WORK; }

static int zeroes_counter(cudaGraphNode_t node) {
    enum cudaGraphNodeType type;
    struct cudaMemsetParams p;
    if (cudaGraphNodeGetType(node, &type) || type != cudaGraphNodeTypeMemset || cudaGraphMemsetNodeGetParams(node, &p)) return 0;
    const char *from = counters_of(lc_cuda_now), *at = p.dst;
    return at >= from && at < from + LC_CUDA_COUNTERS * LC_CUDA_COUNTER_BYTES && p.value == 0 && p.height <= 1 &&
           p.width * p.elementSize <= LC_CUDA_COUNTER_BYTES;
}

/* What follows a node comes after what is before it, and the node goes. A node with many neighbours stays as it is. */
static cudaError_t bypass(cudaGraph_t g, cudaGraphNode_t node) {
    cudaGraphNode_t before[8], after[8];
    size_t n = 8, m = 8;
    cudaError_t rc = cudaGraphNodeGetDependencies(node, NULL, LC_EDGES &n);
    if (!rc) rc = cudaGraphNodeGetDependentNodes(node, NULL, LC_EDGES &m);
    if (rc || n > 8 || m > 8) return rc;
    if (n) rc = cudaGraphNodeGetDependencies(node, before, LC_EDGES &n);
    if (m && !rc) rc = cudaGraphNodeGetDependentNodes(node, after, LC_EDGES &m);
    for (size_t i = 0; i < n && !rc; i++)
        for (size_t j = 0; j < m && !rc; j++) rc = cudaGraphAddDependencies(g, &before[i], &after[j], LC_EDGES 1);
    return rc ? rc : cudaGraphDestroyNode(node);
}

/* One node before all others that zeroes the counters given out. */
static cudaError_t zero_first(cudaGraph_t g, size_t counters) {
    cudaGraphNode_t first, root[64];
    size_t n = 64;
    struct cudaMemsetParams p = {.dst = (void *)counters_of(lc_cuda_now), .elementSize = 4, .width = counters * LC_CUDA_COUNTER_BYTES / 4,
                                 .height = 1};
    cudaError_t rc = cudaGraphGetRootNodes(g, NULL, &n);
    if (rc || n > 64) return rc ? rc : cudaErrorNotSupported;
    if (n) rc = cudaGraphGetRootNodes(g, root, &n);
    if (!rc) rc = cudaGraphAddMemsetNode(&first, g, NULL, 0, &p);
    for (size_t i = 0; i < n && !rc; i++) rc = cudaGraphAddDependencies(g, &first, &root[i], LC_EDGES 1);
    return rc;
}

static cudaError_t join_counters(cudaGraph_t g, size_t counters) {
    size_t n = 0;
    cudaError_t rc = counters ? cudaGraphGetNodes(g, NULL, &n) : cudaSuccess;
    cudaGraphNode_t *nodes = n && !rc ? malloc(n * sizeof *nodes) : NULL;
    if (!nodes) return rc;
    rc = cudaGraphGetNodes(g, nodes, &n);
    for (size_t i = 0; i < n && !rc; i++)
        if (zeroes_counter(nodes[i])) rc = bypass(g, nodes[i]);
    free(nodes);
    return rc ? rc : zero_first(g, counters);
}

/* ---- recording ------------------------------------------------------------------------------------------------------- */

int lc_cuda_record_begin(int device) {
    if (lc_cuda_select(device)) return 1;
    lc_cuda_now->chain_ends = 1;
    /* relaxed: the core may have to ask for memory meanwhile */
    if (lc_cuda_check(cudaStreamBeginCapture(lc_cuda_now->stream, cudaStreamCaptureModeRelaxed), "recording a graph")) return 1;
    lc_cuda_recording = 1;
    lc_cuda_now->counters_left = LC_CUDA_COUNTERS;
    return 0;
}

int lc_cuda_record_end(int device, void **graph) {
    cudaGraph_t g = NULL;
    cudaGraphExec_t e = NULL;
    if (lc_cuda_select(device)) return 1;
    lc_cuda_recording = 0;
    lc_cuda_now->chain_ends = 1;
    const size_t counters = LC_CUDA_COUNTERS - (size_t)lc_cuda_now->counters_left;
    lc_cuda_now->counters_left = 0;
    cudaError_t rc = cudaStreamEndCapture(lc_cuda_now->stream, &g);
    if (rc == cudaSuccess && graph) rc = join_counters(g, counters);
    if (rc == cudaSuccess && graph) rc = cudaGraphInstantiate(&e, g, 0);
    if (g) cudaGraphDestroy(g);
    if (rc != cudaSuccess) cudaGetLastError(); /* the stream is as it was before */
    if (!graph) return 0;
    *graph = e;
    return lc_cuda_check(rc, "recording a graph");
}

int lc_cuda_replay(int device, void *graph) {
    if (lc_cuda_select(device)) return 1;
    lc_cuda_now->chain_ends = 1;
    return lc_cuda_check(cudaGraphLaunch(graph, lc_cuda_now->stream), "running a graph");
}

void lc_cuda_forget(int device, void *graph) {
    if (!lc_cuda_select(device)) cudaGraphExecDestroy(graph);
}
