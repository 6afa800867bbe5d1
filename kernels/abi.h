/* abi.h: a number that changes when the op table or the ABI's structs do. Core and plugin each compute it as they were built; a
 * plugin whose number differs is refused. */
#ifndef LC_ABI_H
#define LC_ABI_H

#include "kernel.h"

static inline uint64_t lc_kernel_abi(void) {
    static const char *const text[] = {
#define UNARY(name, sig, flags, doc) "U" #name ":" sig,
#define UNARY_FLAT(name, sig, flags, doc) "u" #name ":" sig,
#define BINARY(name, sig, flags, doc) "B" #name ":" sig,
#define COMPARE(name, sig, flags, doc) "C" #name ":" sig,
#define VIEW(name, sig, flags, doc) "V" #name ":" sig,
#define OP(name, sig, flags, doc) "O" #name ":" sig,
#include "../runtime/ops.def"
    };
    uint64_t h = 1469598103934665603u ^ sizeof(lc_kargs) ^ (uint64_t)sizeof(lc_backend) << 16 ^ (uint64_t)sizeof(lc_host) << 32;
    for (size_t i = 0; i < sizeof text / sizeof *text; i++)
        for (const char *p = text[i]; *p; p++) h = (h ^ (unsigned char)*p) * 1099511628211u; /* FNV-1a */
    return h;
}

#endif
