/* hybrid_units.cuh: hybrid attention of the usual call (is_usual: head dim 128, 64 softmax features of each sign, terrace of 64) by units
 * that know nothing of each other. A first kernel (hybrid_units_states.cu) leaves in memory, for every chunk of 64 tokens of every query
 * head, the state its queries read (side QUERIES: S, Z over the keys of chunks <= c - 2) and, for gradients, the one its keys read (side
 * KEYS: R, P over the queries of chunks >= c + 2), as the tiles in bf16 that products read. Then a unit is one chunk of one head: nothing is
 * carried from chunk to chunk, no two groups of a block wait for each other, and the work of a sequence fills the machine at any length.
 * The states take 64 KiB a unit: calls are worked on in slices of heads whose states stay within UNITS_BYTES. */
#ifndef LC_HYBRID_UNITS_CUH
#define LC_HYBRID_UNITS_CUH

#include "hybrid_backward_tile.cuh"

namespace hybrid_units {

enum { DIM = 128, INPUTS = 64, FEATURED = 128, TILE = 64 * DIM, STATE = FEATURED * DIM };
enum { QUERIES, KEYS };                       /* sides: of the state's readers */
enum { UNITS_BYTES = 256 << 20 };             /* of states at a time, unless one group of heads has more */

/* A slice: heads (b * h + head) first .. first + count - 1, whole groups that share keys. */
struct slice {
    int first, count, chunks;                 /* chunks of a row without padding: ceil(t / 64) */
    bf16 *state[2];                           /* [count][chunks][STATE], tiles [FEATURED][DIM]; nothing where the sum is empty */
    float *z[2];                              /* [count][chunks][FEATURED]: Z and P */
    bf16 *map[2];                             /* [h][TILE]: the query and the key map's weights, tiles [DIM][INPUTS]; of the call's heads */
    __device__ __forceinline__ int64_t at(int64_t head, int c) const { return (head - first) * chunks + c; }
    __device__ __forceinline__ bf16 *state_of(int side, int64_t head, int c) const { return (side ? state[1] : state[0]) + at(head, c) * STATE; }
    __device__ __forceinline__ float *z_of(int side, int64_t head, int c) const { return (side ? z[1] : z[0]) + at(head, c) * FEATURED; }
    __device__ __forceinline__ bf16 *map_of(int which, int h) const { return (which ? map[1] : map[0]) + (int64_t)h * TILE; }
};

} // namespace hybrid_units

#endif
