/* timing.c: what each op takes on the device, by pairs of events on its stream. Costs a microsecond or two an op, so only when asked
 * for (lc.profile). Times of neighbours do not overlap; what is missing to the whole is the device's idle time. */
#include <string.h>

#include "cuda.h"

enum { MOST = 1 << 15 }; /* ops that are timed; later ones are left out */

int lc_cuda_timing;
static struct { cudaEvent_t at[2]; int op; } pair[MOST];
static int made, used;

void lc_cuda_time_op(int op, int after) {
    if (used == MOST) return;
    if (!after && used == made) {
        if (cudaEventCreate(&pair[made].at[0]) != cudaSuccess || cudaEventCreate(&pair[made].at[1]) != cudaSuccess) {
            lc_cuda_timing = 0;
            return;
        }
        made++;
    }
    pair[used].op = op;
    cudaEventRecord(pair[used].at[after], lc_cuda_now->stream);
    if (after) used++;
}

const double *lc_cuda_timings(int device, int on) {
    static double seconds[LC_OP_COUNT];
    if (lc_cuda_select(device)) return NULL;
    cudaStreamSynchronize(lc_cuda_now->stream);
    memset(seconds, 0, sizeof seconds);
    for (int i = 0; !on && i < used; i++) {
        float ms = 0;
        if (cudaEventElapsedTime(&ms, pair[i].at[0], pair[i].at[1]) == cudaSuccess) seconds[pair[i].op] += ms * 1e-3;
    }
    used = 0;
    lc_cuda_timing = on;
    return seconds;
}
