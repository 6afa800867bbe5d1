/* quant.h: the block-quantised formats as numbers, for kernels that read quantised weights and for the readers of files. */
#ifndef LC_KERNELS_QUANT_H
#define LC_KERNELS_QUANT_H

#include "dtype.h"

enum { LC_K_FILE_IQ4_XS = 69 }; /* found in files, not a tensor dtype */

/* n values of a block-quantised dtype; n counts whole blocks. blocks need no alignment. Other dtypes: nothing happens. */
void lc_dequantise(int dtype, const void *blocks, float *out, int64_t n);

/* n values into blocks of Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0, as the gguf package does. Other dtypes: nothing happens. */
void lc_quantise(int dtype, const float *in, void *blocks, int64_t n);

#endif
