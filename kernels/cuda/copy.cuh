/* copy.cuh: copies between views of one shape, for the kernels' own use: any plain dtypes and strides, or quantised
 * blocks to a float dtype; on the stream. */
#ifndef LC_COPY_CUH
#define LC_COPY_CUH

#include "device.cuh"

int lc_cuda_copy_view(const lc_kargs *k, const lc_view *dst, const lc_view *src); /* copy.cu */
int lc_cuda_convert(const lc_kargs *k, const lc_view *dst, const lc_view *src);   /* convert.cu: dtypes that differ */

#endif
