/* test_emulator.c: that the emulator runs right kernels rightly in every order, and says what is wrong with wrong ones. Needs no
 * test library: it is built wherever the emulator is. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "emulator.h"
#include "selftest.h"

static int failures;

static void expect(int ok, const char *what) {
    if (!ok) failures++;
    if (!ok) fprintf(stderr, "FAILED (order %d): %s\n", lc_emu_order, what);
}

/* The last launch went well, or its error holds this text. */
static void expect_error(const char *part, const char *what) {
    const char *text = lc_emu_error();
    expect(part ? text && strstr(text, part) != NULL : !text, what);
    if (text && (!part || !strstr(text, part))) fprintf(stderr, "    the error: %s\n", text);
}

static int out[SELFTEST_N];
static float x[SELFTEST_N], y[2];

static void right_kernels(void) {
    float sum = 0;
    for (int i = 0; i < SELFTEST_N; i++) out[i] = -1, x[i] = (float)(i % 17), sum += x[i];
    selftest_index(out);
    int same = 1;
    for (int i = 0; i < SELFTEST_N; i++) same &= out[i] == i;
    expect(same, "indices over three dims");
    selftest_sum(x, y);
    expect(y[0] == sum, "a sum over a block");
    out[0] = 0;
    selftest_collectives(out);
    expect(out[0] == 0, "shuffles, votes, reductions");
    selftest_dynamic(48 << 10, 0, out);
    expect(out[0] == (48 << 8) - 1, "48 KB of shared memory");
    selftest_dynamic(100 << 10, 1, out);
    expect(out[0] == (100 << 8) - 1, "100 KB of shared memory");
    selftest_race(1, out);
    for (int i = 0; i < 64; i++) same &= out[i] == (i ^ 1);
    expect(same, "a barrier");
    selftest_copies(1, out);
    for (int i = 0; i < 64; i++) same &= out[i] == i;
    expect(same, "asynchronous copies");
    expect_error(NULL, "right kernels");
}

static void wrong_kernels(void) {
    if (!sigsetjmp(lc_emu_recover, 0)) {
        lc_emu_recoverable = 1;
        selftest_beyond(out);
    } else {
        lc_emu_end_launch();
    }
    expect_error("touched", "writing behind shared memory");
    if (!sigsetjmp(lc_emu_recover, 0)) selftest_misaligned(out);
    else lc_emu_end_launch();
    expect_error("alignment", "a misaligned vector");
    lc_emu_recoverable = 0;
    selftest_dynamic(49 << 10, 0, out);
    selftest_race(1, out);
    expect_error("allow_shared", "more than 48 KB without asking");
    selftest_uneven_barrier();
    expect_error("has returned", "a barrier that some threads do not reach");
    selftest_lost_lane();
    expect_error("__shfl_xor_sync", "a shuffle that some lanes do not reach");
    selftest_stack();
    expect_error("stack", "an address of the host's stack");
    selftest_race(1, out);
    expect_error(NULL, "a right kernel after wrong ones");
}

int main(void) {
    static const char *const orders[] = {"forward", "reverse", "random:1", "random:2"};
    static int race[4][64];
    for (int i = 0; i < 4; i++) {
        setenv("LOLCATS_EMULATOR_ORDER", orders[i], 1);
        lc_emu_start();
        right_kernels();
        wrong_kernels();
        selftest_race(0, race[i]);
        selftest_copies(0, out);
        if (lc_emu_order != LC_EMU_REVERSE) expect(out[1] == -1, "a missing wait shows");
        if (lc_emu_order == LC_EMU_FORWARD) {
            selftest_stale(y);
            expect(isnan(y[0]) && isnan(y[1]), "shared memory of the block before is gone");
        }
    }
    expect(memcmp(race[0], race[1], sizeof race[0]) != 0, "a missing barrier shows in the order");
    expect(memcmp(race[2], race[3], sizeof race[0]) != 0, "random orders differ");
    printf("%s\n", failures ? "failed" : "the emulator is right, and finds what is wrong");
    return failures != 0;
}
