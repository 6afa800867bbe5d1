/* quant.h: element formats that files hold, beyond the dtypes that tensors have, and their conversion. No tensors here.
 */
#ifndef LC_QUANT_H
#define LC_QUANT_H

#include "../../kernels/quant.h"
#include "../core/base.h"

/* What a file's tensor is made of: an lc_dtype, or one of these, which lc_file_read converts and no tensor stores. */
enum {
    LC_STORE_I8 = 64,
    LC_STORE_I16,
    LC_STORE_U16,
    LC_STORE_U32,
    LC_STORE_U64,
    LC_STORE_IQ4_XS = LC_K_FILE_IQ4_XS,
    LC_STORE_UNKNOWN = -1
};

/* Elements a block and bytes a block of a stored format; 0 for LC_STORE_UNKNOWN. */
int lc_store_block(int store);
int lc_store_block_bytes(int store);

/* Can values of format `from` be converted to tensor dtype `to`? Floats and blocks to floats; integers to floats and
 * integers; anything to itself. */
bool lc_convertible(int from, int to);

/* Converts n values, whole blocks; neither side needs alignment. Rounds to nearest even. LC_EDTYPE where it is not
 * convertible, LC_EARG where an integer does not fit. */
lc_status lc_convert(int from, const void *in, int to, void *out, int64_t n);

#endif
