/* convert.c: element conversion between what files store and what tensors hold, in pieces that stay in the cache.
 * Floats pass through float (double where the source is wider), integers through int64. */
#include "quant.h"

#include <string.h>

#include "../../kernels/dtype.h"

enum { PIECE = 4096 }; /* elements; a multiple of every block length */

static bool is_block(int store) {
    return store == LC_STORE_IQ4_XS || (store < LC_STORE_I8 && lc_dtype_is_quant(store));
}

static bool is_integer(int store) {
    return (store >= LC_I32 && store <= LC_U8) || (store >= LC_STORE_I8 && store <= LC_STORE_U64);
}

static bool is_float(int store) { return store >= LC_F32 && store <= LC_F64; }

bool lc_convertible(int from, int to) {
    if (from < 0) return false;
    if (from == to) return true;
    if (is_float(to)) return is_float(from) || is_block(from) || is_integer(from);
    return is_integer(to) && to < LC_STORE_I8 && is_integer(from);
}

/* ---- single values
 * --------------------------------------------------------------------------------------------------- */

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float from_half(uint16_t h) {
    uint32_t exponent = h >> 10 & 31u, fraction = h & 0x3ffu, sign = (h & 0x8000u) << 16;
    uint32_t small = bits_of((float)fraction * 0x1p-24f);
    uint32_t large = ((exponent == 31 ? 255u : exponent + 112) << 23) | fraction << 13;
    return float_of(sign | (exponent == 0 ? small : large));
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40u;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

static inline uint16_t to_half(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (size >> 13 & 0x3ffu));
    if (size >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and up round to infinity */
    if (size < 0x38800000u) { /* below the least normal: adding 0.5 leaves the rounded fraction in the low bits */
        return (uint16_t)(sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000u));
    }
    return (uint16_t)(sign | (size - 0x38000000u + 0xfffu + (size >> 13 & 1)) >> 13);
}

/* ---- pieces
 * ---------------------------------------------------------------------------------------------------------- */

static void read_ints(int from, const uint8_t *in, int64_t *out, int64_t n) {
#define READ(type)                                                                                                     \
    for (int64_t i = 0; i < n; i++) {                                                                                  \
        type v;                                                                                                        \
        memcpy(&v, in + i * (int64_t)sizeof v, sizeof v);                                                              \
        out[i] = (int64_t)v;                                                                                           \
    }                                                                                                                  \
    return
    switch (from) {
    case LC_I32: READ(int32_t);
    case LC_I64: READ(int64_t);
    case LC_U8: READ(uint8_t);
    case LC_STORE_I8: READ(int8_t);
    case LC_STORE_I16: READ(int16_t);
    case LC_STORE_U16: READ(uint16_t);
    case LC_STORE_U32: READ(uint32_t);
    default: READ(uint64_t);
    }
#undef READ
}

static lc_status write_ints(int from, const int64_t *in, int to, uint8_t *out, int64_t n) {
    int64_t least = to == LC_I32 ? INT32_MIN : to == LC_U8 ? 0 : INT64_MIN;
    int64_t most = to == LC_I32 ? INT32_MAX : to == LC_U8 ? UINT8_MAX : INT64_MAX;
    for (int64_t i = 0; i < n; i++) {
        int64_t v = in[i];
        if (v < least || v > most || (from == LC_STORE_U64 && v < 0))
            return lc_fail(LC_EARG, "an integer does not fit in %s", lc_dtype_traits(to)->name);
        if (to == LC_I32) {
            int32_t w = (int32_t)v;
            memcpy(out + i * 4, &w, 4);
        } else if (to == LC_U8) {
            out[i] = (uint8_t)v;
        } else {
            memcpy(out + i * 8, &v, 8);
        }
    }
    return LC_OK;
}

static void ints_to_doubles(int from, const int64_t *in, double *out, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = from == LC_STORE_U64 ? (double)(uint64_t)in[i] : (double)in[i];
}

static void read_floats(int from, const uint8_t *in, float *out, int64_t n) {
    uint16_t h;
    if (from == LC_F32) {
        memcpy(out, in, (size_t)n * 4);
    } else if (from == LC_BF16) {
        for (int64_t i = 0; i < n; i++) {
            memcpy(&h, in + 2 * i, 2);
            out[i] = float_of((uint32_t)h << 16);
        }
    } else if (from == LC_F16) {
        for (int64_t i = 0; i < n; i++) {
            memcpy(&h, in + 2 * i, 2);
            out[i] = from_half(h);
        }
    } else {
        lc_dequantise(from, in, out, n);
    }
}

static void write_floats(const float *in, int to, uint8_t *out, int64_t n) {
    for (int64_t i = 0; to == LC_F64 && i < n; i++) {
        double d = in[i];
        memcpy(out + 8 * i, &d, 8);
    }
    for (int64_t i = 0; to == LC_BF16 && i < n; i++) {
        uint16_t h = to_bf16(in[i]);
        memcpy(out + 2 * i, &h, 2);
    }
    for (int64_t i = 0; to == LC_F16 && i < n; i++) {
        uint16_t h = to_half(in[i]);
        memcpy(out + 2 * i, &h, 2);
    }
    if (to == LC_F32) memcpy(out, in, (size_t)n * 4);
}

static void write_doubles(const double *in, int to, uint8_t *out, int64_t n) {
    float narrow[PIECE];
    if (to == LC_F64) {
        memcpy(out, in, (size_t)n * 8);
        return;
    }
    for (int64_t i = 0; i < n; i++) narrow[i] = (float)in[i];
    write_floats(narrow, to, out, n);
}

static lc_status convert_piece(int from, const uint8_t *in, int to, uint8_t *out, int64_t n) {
    union {
        float f[PIECE];
        double d[PIECE];
    } real;
    if (is_integer(from)) {
        int64_t whole[PIECE];
        read_ints(from, in, whole, n);
        if (is_integer(to)) return write_ints(from, whole, to, out, n);
        ints_to_doubles(from, whole, real.d, n);
        write_doubles(real.d, to, out, n);
    } else if (from == LC_F64) {
        memcpy(real.d, in, (size_t)n * 8);
        write_doubles(real.d, to, out, n);
    } else {
        read_floats(from, in, real.f, n);
        write_floats(real.f, to, out, n);
    }
    return LC_OK;
}

lc_status lc_convert(int from, const void *in, int to, void *out, int64_t n) {
    const uint8_t *source = in;
    uint8_t *target = out;
    if (!lc_convertible(from, to))
        return lc_fail(LC_EDTYPE, "no conversion from this format to %s",
                       lc_dtype_traits(to) ? lc_dtype_traits(to)->name : "this one");
    int64_t block = lc_store_block(from), bytes = lc_store_block_bytes(from);
    if (from == to) {
        memcpy(out, in, (size_t)(n / block * bytes));
        return LC_OK;
    }
    if (to == LC_F32 && is_block(from) && (uintptr_t)out % sizeof(float) == 0) {
        lc_dequantise(from, in, out, n);
        return LC_OK;
    }
    for (int64_t done = 0; done < n; done += PIECE) {
        int64_t now = n - done < PIECE ? n - done : PIECE;
        LC_TRY(convert_piece(from, source + done / block * bytes, to, target + done * lc_store_block_bytes(to), now));
    }
    return LC_OK;
}

int lc_store_block(int store) {
    if (store == LC_STORE_IQ4_XS) return 256;
    if (store >= LC_STORE_I8) return 1;
    const lc_dtype_trait *t = lc_dtype_traits(store);
    return t ? t->block : 0;
}

int lc_store_block_bytes(int store) {
    static const int extra[] = {1, 2, 2, 4, 8, 136};
    if (store >= LC_STORE_I8 && store <= LC_STORE_IQ4_XS) return extra[store - LC_STORE_I8];
    const lc_dtype_trait *t = lc_dtype_traits(store);
    return t ? t->bytes : 0;
}
