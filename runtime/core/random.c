/* random.c: the generator is a key and a counter, nothing else: Philox4x32-10 gives four numbers a count (kernels/philox.h). A
 * random op takes as many counts as it needs; both numbers go into checkpoints. */
#include "core.h"

static uint64_t key = 0, counter = 0;

void lc_rng_take(uint64_t elements, uint64_t *seed, uint64_t *offset) {
    *seed = key;
    *offset = counter;
    counter += (elements + 3) / 4;
}

int lc_seed(double seed) {
    if (!(seed >= 0 && seed <= 9007199254740992.0)) return lc_fail(LC_EARG, "a seed is an integer from 0 to 2^53, not %g", seed);
    key = (uint64_t)seed;
    counter = 0;
    return LC_OK;
}

int lc_rng_get(double *seed, double *offset) {
    *seed = (double)key;
    *offset = (double)counter;
    return LC_OK;
}

int lc_rng_set(double seed, double offset) {
    LC_TRY((lc_status)lc_seed(seed));
    if (!(offset >= 0 && offset <= 9007199254740992.0)) return lc_fail(LC_EARG, "an offset is an integer from 0 to 2^53, not %g", offset);
    counter = (uint64_t)offset;
    return LC_OK;
}
