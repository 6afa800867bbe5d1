/* torch_parts.c: folders that torch.distributed.checkpoint wrote. .metadata is a pickle of records: of each tensor its size, dtype
 * and blocks; of each block the file, offset and length of what torch.save wrote of it. Opening checks that the blocks cover
 * each tensor exactly once and that every one is a tensor of its block's size. */
#include <stdlib.h>
#include <string.h>

#include "quant.h"
#include "torch.h"

lc_status lc_torch_parts_parse(struct lc_file *f, lc_part_opener open, void *ctx) {
    (void)f; (void)open; (void)ctx;
    return lc_fail(LC_EPARSE, "distributed checkpoints are not read yet");
}
