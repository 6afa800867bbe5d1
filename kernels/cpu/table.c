/* table.c: the CPU's kernels of one variant as the table that the core dispatches by, made from the op table: a row
 * without its kernel fails the link. Work functions are weak: a kernel that needs no scratch memory has none. With
 * LC_TABLE_WEAK, for tests that link some kernel files only, missing kernels are NULL. */
#include "cpu.h"

#ifdef LC_TABLE_WEAK
#define LC_MAYBE __attribute__((weak))
#else
#define LC_MAYBE
#endif

#define DECLARE(name)                                                                                                  \
    extern int K(name)(const lc_kargs *k) LC_MAYBE;                                                                    \
    extern size_t K(name##_work)(const lc_kargs *k) __attribute__((weak));
#define UNARY(name, sig, flags, doc)      DECLARE(name) DECLARE(name##_grad)
#define UNARY_FLAT(name, sig, flags, doc) DECLARE(name)
#define BINARY(name, sig, flags, doc)     DECLARE(name) DECLARE(name##_grad_a) DECLARE(name##_grad_b)
#define COMPARE(name, sig, flags, doc)    DECLARE(name)
#define OP(name, sig, flags, doc)         DECLARE(name)
#include "../../runtime/ops.def"

extern const lc_kernel K(table)[LC_OP_COUNT];

#define ENTRY(name)                       [LC_OP_##name] = {K(name), K(name##_work)},
#define UNARY(name, sig, flags, doc)      ENTRY(name) ENTRY(name##_grad)
#define UNARY_FLAT(name, sig, flags, doc) ENTRY(name)
#define BINARY(name, sig, flags, doc)     ENTRY(name) ENTRY(name##_grad_a) ENTRY(name##_grad_b)
#define COMPARE(name, sig, flags, doc)    ENTRY(name)
#define OP(name, sig, flags, doc)         ENTRY(name)
const lc_kernel K(table)[LC_OP_COUNT] = {
#include "../../runtime/ops.def"
};
