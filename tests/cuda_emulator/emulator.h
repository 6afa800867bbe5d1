/* emulator.h: CUDA threads as fibers on the CPU: what the scheduler (fibers.c), the pretended device (backend.c) and the compiled
 * kernels (through emulated.h) share. One OS thread runs the blocks of a launch one after another; inside a block each CUDA thread
 * is a fiber that runs until it waits for others. LOLCATS_EMULATOR_ORDER=forward|reverse|random:SEED sets the order of blocks, of
 * warps and of lanes between two waits: a result that depends on it shows a missing barrier. */
#ifndef LC_EMULATOR_H
#define LC_EMULATOR_H

#include <cuda_runtime_api.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { LC_EMU_WARP = 32, LC_EMU_THREADS = 1024, LC_EMU_STACK = 64 << 10, LC_EMU_BARRIERS = 16 };
enum { LC_EMU_FORWARD, LC_EMU_REVERSE, LC_EMU_RANDOM };
#define LC_EMU_SHARED_MAX ((size_t)227 << 10) /* what a block may ask for on sm_90 */

/* What runs when all lanes of a collective have arrived: once, with every lane's record (NULL for lanes not in the mask). */
typedef void (*lc_emu_collective_fn)(void *const record[32], uint32_t mask);

typedef struct lc_emu_thread {
    uint3 index;         /* threadIdx */
    uint32_t flat, lane; /* in the block, in the warp */
    int state, barrier, expected, said;
    uint32_t mask;                /* of the collective that is waited for */
    lc_emu_collective_fn collect; /* likewise */
    const char *what;
    void *record, *stack_pointer, *stack;
    struct lc_emu_copy *copies; /* asynchronous copies under way */
    int copy_count, copy_room, copy_group;
} lc_emu_thread;

extern lc_emu_thread *lc_emu_now; /* the running thread; NULL outside of kernels */
extern uint3 lc_emu_block_index;
extern dim3 lc_emu_block_dim, lc_emu_grid_dim;
extern char *lc_emu_shared; /* the block's dynamic shared memory; a closed page follows its end */
extern int lc_emu_order;

/* Runs a kernel; what goes wrong is the device's error (lc_emu_fail), as with an asynchronous launch. */
void lc_emu_launch(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared, void (*body)(void *), void *ctx);
void lc_emu_allow_shared(const void *kernel, size_t bytes);

/* Waits for `expected` threads of the block (0: all) at named barrier id. Returns how many said not 0. */
int lc_emu_barrier(int id, int expected, int said);
/* Counts at named barrier id as one that waits, and goes on. */
void lc_emu_arrive(int id, int expected);
/* Waits for the lanes of mask, then `collect` runs once for all. Mask and collect must be the same for each. */
void lc_emu_collective(uint32_t mask, const char *what, lc_emu_collective_fn collect, void *record);
uint32_t lc_emu_active(void);

/* cp.async: `copied` bytes, then zeros up to `bytes`. Forward, copies are made as late as the program permits; reverse, at once. */
void lc_emu_copy(void *to, const void *from, int bytes, int copied);
void lc_emu_copy_commit(void);
void lc_emu_copy_wait(int pending);

/* Ends the kernel under way (does not return there) and leaves the text as the device's error. */
__attribute__((format(printf, 1, 2))) void lc_emu_fail(const char *format, ...);

/* ---- between fibers.c and backend.c ------------------------------------------------------------------------------------ */
const char *lc_emu_error(void); /* NULL: none since the last call */
extern sigjmp_buf lc_emu_recover; /* where a fault in a kernel or in its host code continues, if lc_emu_recoverable */
extern volatile int lc_emu_recoverable;
void lc_emu_open_memory(int on);  /* around a launch: backend.c opens the operands of the op */
const char *lc_emu_where(const void *p); /* what lies at an address, in words */
void lc_emu_end_launch(void);     /* after a fault */
void lc_emu_start(void);          /* reads the environment, installs handlers */
void lc_emu_describe(char *to, size_t room);
int lc_emu_on_host(const void *p); /* a pointer into this thread's stack: no kernel may be given one */

#ifdef __cplusplus
}
#endif
#endif
