/* selftest.h: small kernels, right and wrong, that test the emulator itself. Each entry launches one on memory of the host and leaves
 * the result there. */
#ifndef LC_SELFTEST_H
#define LC_SELFTEST_H

#ifdef __cplusplus
extern "C" {
#endif

enum { SELFTEST_N = 1000 };
void selftest_index(int *out);                    /* SELFTEST_N numbers over x, y and z */
void selftest_sum(const float *x, float *out);    /* of SELFTEST_N, by shuffles and shared memory */
void selftest_collectives(int *wrong);            /* counts what is not as documented */
void selftest_dynamic(int bytes, int allow, int *out);
void selftest_stale(float *out);                  /* reads shared memory that was not written */
void selftest_race(int fixed, int *out);          /* 64 numbers; without the barrier the order shows */
void selftest_copies(int wait, int *out);         /* 64 numbers by asynchronous copies, with and without the wait */
void selftest_uneven_barrier(void);               /* half of the threads leave before a barrier */
void selftest_lost_lane(void);                    /* a shuffle of all lanes by half of them */
void selftest_beyond(int *out);                   /* writes behind dynamic shared memory */
void selftest_misaligned(int *x);                 /* reads 16 bytes at an address of 4 */
void selftest_stack(void);                        /* gives a kernel an address of the host's stack */

#ifdef __cplusplus
}
#endif
#endif
