/* dtype.h: element types as kernels see them, and the block traits of the quantised ones, in one table. The ids repeat lc_dtype of
 * runtime/lolcats.h (a test compares them). */
#ifndef LC_DTYPE_H
#define LC_DTYPE_H

#include <stddef.h>
#include <stdint.h>

enum {
    LC_K_F32, LC_K_BF16, LC_K_F16, LC_K_F64, LC_K_I32, LC_K_I64, LC_K_U8,
    LC_K_Q4_0, LC_K_Q4_1, LC_K_Q5_0, LC_K_Q5_1, LC_K_Q8_0, LC_K_Q2_K, LC_K_Q3_K, LC_K_Q4_K, LC_K_Q5_K, LC_K_Q6_K, LC_K_IQ4_NL,
    LC_K_COUNT
};

typedef struct lc_dtype_trait {
    const char *name, *long_name;
    int32_t block, bytes; /* elements a block, bytes a block */
} lc_dtype_trait;

static inline const lc_dtype_trait *lc_dtype_traits(int dtype) {
    static const lc_dtype_trait table[LC_K_COUNT] = {
        {"f32", "float32", 1, 4}, {"bf16", "bfloat16", 1, 2}, {"f16", "float16", 1, 2}, {"f64", "float64", 1, 8},
        {"i32", "int32", 1, 4}, {"i64", "int64", 1, 8}, {"u8", "uint8", 1, 1},
        {"q4_0", "q4_0", 32, 18}, {"q4_1", "q4_1", 32, 20}, {"q5_0", "q5_0", 32, 22}, {"q5_1", "q5_1", 32, 24},
        {"q8_0", "q8_0", 32, 34}, {"q2_k", "q2_k", 256, 84}, {"q3_k", "q3_k", 256, 110}, {"q4_k", "q4_k", 256, 144},
        {"q5_k", "q5_k", 256, 176}, {"q6_k", "q6_k", 256, 210}, {"iq4_nl", "iq4_nl", 32, 18},
    };
    return dtype >= 0 && dtype < LC_K_COUNT ? &table[dtype] : 0;
}
static inline int lc_dtype_is_float(int dtype) { return dtype >= LC_K_F32 && dtype <= LC_K_F64; }
static inline int lc_dtype_is_quant(int dtype) { return dtype >= LC_K_Q4_0 && dtype < LC_K_COUNT; }

#endif
