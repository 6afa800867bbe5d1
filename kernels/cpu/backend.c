/* backend.c: picks one of the tables that table.c makes, one a variant. Compiled once. Tables are weak, so that a build
 * with fewer variants, or for another architecture, links; what the machine cannot run is not handed out. */
#include "../kernel.h"

#include <string.h>

extern const lc_kernel lc_generic_f32_table[LC_OP_COUNT] __attribute__((weak));
extern const lc_kernel lc_generic_f64_table[LC_OP_COUNT] __attribute__((weak));
extern const lc_kernel lc_avx2_f32_table[LC_OP_COUNT] __attribute__((weak));
extern const lc_kernel lc_avx512_f32_table[LC_OP_COUNT] __attribute__((weak));
extern const lc_kernel lc_avx512bf16_f32_table[LC_OP_COUNT] __attribute__((weak));

#if defined(__x86_64__)
#include <cpuid.h>

/* clang's __builtin_cpu_supports does not know f16c. Its registers are AVX's. */
static int has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

/* __builtin_cpu_supports also asks whether the system saves the registers. */
static int machine_has(const char *isa) {
    if (strcmp(isa, "generic") == 0) return 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (strcmp(isa, "avx2") == 0) return avx2;
    if (strcmp(isa, "avx512") == 0) return avx512;
    if (strcmp(isa, "avx512bf16") == 0) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    return 0;
}

/* NULL for a name that is unknown, not built in, or beyond this machine. Double is for checks: one table serves all. */
const lc_kernel *lc_cpu_kernels(const char *isa, int is_double) {
    if (!isa || !machine_has(isa)) return NULL;
    if (is_double) return lc_generic_f64_table;
    if (strcmp(isa, "generic") == 0) return lc_generic_f32_table;
    if (strcmp(isa, "avx2") == 0) return lc_avx2_f32_table;
    if (strcmp(isa, "avx512") == 0) return lc_avx512_f32_table;
    if (strcmp(isa, "avx512bf16") == 0) return lc_avx512bf16_f32_table;
    return NULL;
}

const char *lc_cpu_best_isa(void) {
    static const char *const order[] = {"avx512bf16", "avx512", "avx2"};
    for (int i = 0; i < 3; i++)
        if (lc_cpu_kernels(order[i], 0)) return order[i];
    return "generic";
}
