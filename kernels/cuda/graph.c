/* graph.c: kernels recorded once and replayed with one call, which spares the host its launches and the device the gaps between them.
 * What a kernel is given by value is recorded with it, so a step that is to be replayed reads what changes from device memory. */
#include "cuda.h"

int lc_cuda_recording;

int lc_cuda_record_begin(int device) {
    if (lc_cuda_select(device)) return 1;
    lc_cuda_now->chain_ends = 1;
    /* relaxed: the core may have to ask for memory meanwhile */
    if (lc_cuda_check(cudaStreamBeginCapture(lc_cuda_now->stream, cudaStreamCaptureModeRelaxed), "recording a graph")) return 1;
    lc_cuda_recording = 1;
    return 0;
}

int lc_cuda_record_end(int device, void **graph) {
    cudaGraph_t g = NULL;
    cudaGraphExec_t e = NULL;
    if (lc_cuda_select(device)) return 1;
    lc_cuda_recording = 0;
    lc_cuda_now->chain_ends = 1;
    cudaError_t rc = cudaStreamEndCapture(lc_cuda_now->stream, &g);
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
