/* toolkit.c: the functions of the CUDA runtime and of cuBLASLt that kernels' host code calls, as the emulator answers them. cuBLASLt
 * says that it supports nothing, so products fall back to our own kernels. */
#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <string.h>

#include "emulator.h"

/* ---- the runtime ------------------------------------------------------------------------------------------------------- */
cudaError_t cudaGetLastError(void) { return cudaPeekAtLastError(); } /* backend.c clears it when it has the text */
const char *cudaGetErrorString(cudaError_t e) { return e == cudaErrorInvalidValue ? "invalid argument" : "unspecified launch failure"; }
const char *cudaGetErrorName(cudaError_t e) { return e == cudaErrorInvalidValue ? "cudaErrorInvalidValue" : "cudaErrorLaunchFailure"; }

cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute which, int value) {
    if (which == cudaFuncAttributeMaxDynamicSharedMemorySize) {
        if (value < 0 || (size_t)value > LC_EMU_SHARED_MAX) return cudaErrorInvalidValue;
        lc_emu_allow_shared(kernel, (size_t)value);
    }
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *kernel, int threads, size_t shared) {
    (void)kernel;
    int by_threads = threads > 0 ? 2048 / threads : 0, by_shared = (int)((LC_EMU_SHARED_MAX + 1024) / (shared + 1024));
    *n = by_threads < by_shared ? by_threads : by_shared;
    if (*n > 32) *n = 32;
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream) {
    (void)stream;
    lc_emu_open_memory(1);
    memset(p, value, bytes);
    lc_emu_open_memory(0);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    (void)stream, (void)kind;
    lc_emu_open_memory(1);
    memmove(to, from, bytes);
    lc_emu_open_memory(0);
    return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              enum cudaMemcpyKind kind, cudaStream_t stream) {
    (void)stream, (void)kind;
    lc_emu_open_memory(1);
    for (size_t i = 0; i < height; i++) memmove((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
    lc_emu_open_memory(0);
    return cudaSuccess;
}

/* ---- cuBLASLt ---------------------------------------------------------------------------------------------------------- */
const char *cublasLtGetStatusString(cublasStatus_t s) { return s == CUBLAS_STATUS_NOT_SUPPORTED ? "not supported by the emulator" : "?"; }

#define NONE(name, ...)                                                                                                           \
    cublasStatus_t name(__VA_ARGS__) { return CUBLAS_STATUS_NOT_SUPPORTED; }
#pragma GCC diagnostic ignored "-Wunused-parameter"
NONE(cublasLtCreate, cublasLtHandle_t *h)
NONE(cublasLtDestroy, cublasLtHandle_t h)
NONE(cublasLtMatmulDescCreate, cublasLtMatmulDesc_t *d, cublasComputeType_t c, cudaDataType_t s)
NONE(cublasLtMatmulDescDestroy, cublasLtMatmulDesc_t d)
NONE(cublasLtMatmulDescSetAttribute, cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t a, const void *p, size_t n)
NONE(cublasLtMatrixLayoutCreate, cublasLtMatrixLayout_t *l, cudaDataType t, uint64_t rows, uint64_t cols, int64_t ld)
NONE(cublasLtMatrixLayoutDestroy, cublasLtMatrixLayout_t l)
NONE(cublasLtMatrixLayoutSetAttribute, cublasLtMatrixLayout_t l, cublasLtMatrixLayoutAttribute_t a, const void *p, size_t n)
NONE(cublasLtMatmulPreferenceCreate, cublasLtMatmulPreference_t *p)
NONE(cublasLtMatmulPreferenceDestroy, cublasLtMatmulPreference_t p)
NONE(cublasLtMatmulPreferenceSetAttribute, cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t a, const void *v, size_t n)
NONE(cublasLtMatmulAlgoGetHeuristic, cublasLtHandle_t h, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t la, cublasLtMatrixLayout_t lb,
     cublasLtMatrixLayout_t lc, cublasLtMatrixLayout_t ld, cublasLtMatmulPreference_t p, int n, cublasLtMatmulHeuristicResult_t r[], int *got)
NONE(cublasLtMatmul, cublasLtHandle_t h, cublasLtMatmulDesc_t d, const void *alpha, const void *a, cublasLtMatrixLayout_t la, const void *b,
     cublasLtMatrixLayout_t lb, const void *beta, const void *c, cublasLtMatrixLayout_t lc, void *y, cublasLtMatrixLayout_t ly,
     const cublasLtMatmulAlgo_t *algo, void *work, size_t bytes, cudaStream_t stream)
