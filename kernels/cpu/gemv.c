/* gemv.c: a few rows times a weight [n, k], the product of decoding, whose cost is reading the weight. Threads split the weight's
 * rows; ROWS of them are read side by side, 32 elements at a time, widened or dequantised in registers and multiplied with all rows
 * of a. Dtypes without a fast reader go through row_to_real a piece at a time. Sums are in `real`. */
#include "gemm.h"

enum { STEP = 32, NVEC = STEP / VL, ROWS = 2, PIECE = 512, MIN_BYTES = 1 << 15 };

typedef struct gemv_job {
    const gemm_call *g;
    int64_t c_rs, c_cs, add_rs, add_cs;
} gemv_job;

static inline real sum_lanes(vreal v) {
#if LC_VBYTES == 64 && !LC_DOUBLE
    return _mm512_reduce_add_ps((__m512)v);
#elif LC_VBYTES == 32 && !LC_DOUBLE
    __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
    return vsum(v);
#endif
}

static inline void put(const gemv_job *w, int64_t i, int64_t j, real s) {
    const gemm_call *g = w->g;
    s *= g->alpha;
    if (g->add) s += g->beta * g->add[i * w->add_rs + j * w->add_cs];
    if (g->bias) s += g->bias[j];
    g->c[i * w->c_rs + j * w->c_cs] = s;
}

/* ---- 32 elements of a row as vectors ------------------------------------------------------------------------------------- */

#if !LC_DOUBLE
static inline float half_at(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    return f16_to_f32(h);
#endif
}

#if LC_VBYTES == 64
static inline vreal from_i8(__m128i q) { return (vreal)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q)); }
static inline void widen_i8(__m128i low, __m128i high, vreal *w) { w[0] = from_i8(low), w[1] = from_i8(high); }
static inline vreal from_bf16(const uint16_t *p) {
    return (vreal)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}
static inline vreal from_f16(const uint16_t *p) { return (vreal)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
#elif LC_VBYTES == 32
static inline vreal from_i8(__m128i q) { return (vreal)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)); }
static inline void widen_i8(__m128i low, __m128i high, vreal *w) {
    w[0] = from_i8(low), w[1] = from_i8(_mm_unpackhi_epi64(low, low));
    w[2] = from_i8(high), w[3] = from_i8(_mm_unpackhi_epi64(high, high));
}
static inline vreal from_bf16(const uint16_t *p) {
    return (vreal)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
}
static inline vreal from_f16(const uint16_t *p) { return (vreal)_mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
#else
static inline vreal from_bf16(const uint16_t *p) { return (vreal){bf16_to_f32(p[0]), bf16_to_f32(p[1]), bf16_to_f32(p[2]), bf16_to_f32(p[3])}; }
static inline vreal from_f16(const uint16_t *p) {
    return (vreal){f16_to_f32(p[0]), f16_to_f32(p[1]), f16_to_f32(p[2]), f16_to_f32(p[3])};
}
#endif

#if LC_VBYTES > 16
static inline __attribute__((always_inline)) void read_quant(const int dtype, const uint8_t *p, vreal *w) {
    __m128i q = _mm_loadu_si128((const void *)(p + (dtype == LC_K_Q4_1 ? 4 : 2)));
    vreal d = vset(half_at(p));
    if (dtype == LC_K_Q8_0) {
        widen_i8(q, _mm_loadu_si128((const void *)(p + 18)), w);
    } else {
        __m128i mask = _mm_set1_epi8(15), low = _mm_and_si128(q, mask), high = _mm_and_si128(_mm_srli_epi16(q, 4), mask);
        if (dtype == LC_K_Q4_0) low = _mm_sub_epi8(low, _mm_set1_epi8(8)), high = _mm_sub_epi8(high, _mm_set1_epi8(8));
        widen_i8(low, high, w);
    }
    vreal m = vset(dtype == LC_K_Q4_1 ? half_at(p + 2) : 0);
#pragma GCC unroll 4
    for (int j = 0; j < NVEC; j++) w[j] = dtype == LC_K_Q4_1 ? w[j] * d + m : w[j] * d;
}
#else
static inline __attribute__((always_inline)) void read_quant(const int dtype, const uint8_t *p, vreal *w) {
    float d = half_at(p), m = dtype == LC_K_Q4_1 ? half_at(p + 2) : 0, t[STEP];
    const uint8_t *q = p + (dtype == LC_K_Q4_1 ? 4 : 2);
    int zero = dtype == LC_K_Q4_0 ? 8 : 0;
    for (int i = 0; i < 16; i++) {
        t[i] = d * (float)(dtype == LC_K_Q8_0 ? (int8_t)q[i] : (q[i] & 15) - zero) + m;
        t[i + 16] = d * (float)(dtype == LC_K_Q8_0 ? (int8_t)q[i + 16] : (q[i] >> 4) - zero) + m;
    }
    for (int j = 0; j < NVEC; j++) w[j] = vload(t + j * VL);
}
#endif
#endif

static inline __attribute__((always_inline)) void read_step(const int dtype, const void *row, int64_t k, vreal *w) {
#if !LC_DOUBLE
    if (dtype == LC_K_Q8_0 || dtype == LC_K_Q4_0 || dtype == LC_K_Q4_1) {
        read_quant(dtype, (const uint8_t *)row + k / 32 * (dtype == LC_K_Q8_0 ? 34 : dtype == LC_K_Q4_0 ? 18 : 20), w);
        return;
    }
#endif
#pragma GCC unroll 16
    for (int j = 0; j < NVEC; j++) {
#if !LC_DOUBLE
        if (dtype == LC_K_BF16) w[j] = from_bf16((const uint16_t *)row + k + j * VL);
        else if (dtype == LC_K_F16) w[j] = from_f16((const uint16_t *)row + k + j * VL);
        else
#endif
            w[j] = vload((const real *)row + k + j * VL);
    }
    (void)dtype;
}

/* ---- rows ---------------------------------------------------------------------------------------------------------------- */

/* The last k % STEP elements of one row of each side. */
static __attribute__((noinline)) real dot_rest(const gemm_call *g, int64_t i, int64_t j) {
    const real *a = (const real *)g->a + i * g->a_rs;
    const int64_t whole = g->k / STEP * STEP, n = g->k - whole;
    real rest[STEP], s = 0;
    row_to_real(g->b_dtype, gemm_at(g->b, g->b_dtype, j * g->b_cs + whole), rest, n);
    for (int64_t k = 0; k < n; k++) s += a[whole + k] * rest[k];
    return s;
}

/* Rows [j, j + rows) of the weight against rows [i0, i0 + m) of a. */
static inline __attribute__((always_inline)) void dot_rows(const gemv_job *w, int64_t i0, int64_t j, const int rows, const int m,
                                                           const int dtype) {
    const gemm_call *g = w->g;
    const int chains = rows * m >= 8 ? 1 : 2;
    const int64_t lda = g->a_rs, whole = g->k / STEP * STEP;
    const real *a = (const real *)g->a + i0 * lda;
    const void *b[ROWS];
    vreal acc[ROWS * GEMV_ROWS * 2];
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++) b[r] = gemm_at(g->b, dtype, (j + r) * g->b_cs);
#pragma GCC unroll 32
    for (int i = 0; i < rows * m * chains; i++) acc[i] = (vreal){0};
    for (int64_t k = 0; k < whole; k += STEP) {
        vreal v[ROWS][NVEC];
#pragma GCC unroll 2
        for (int r = 0; r < rows; r++) read_step(dtype, b[r], k, v[r]);
#pragma GCC unroll 8
        for (int i = 0; i < m; i++)
#pragma GCC unroll 16
            for (int l = 0; l < NVEC; l++) {
                vreal x = vload(a + i * lda + k + l * VL);
#pragma GCC unroll 2
                for (int r = 0; r < rows; r++) acc[(r * m + i) * chains + l % chains] += x * v[r][l];
            }
    }
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < m; i++) {
            real s = sum_lanes(chains > 1 ? acc[(r * m + i) * 2] + acc[(r * m + i) * 2 + 1] : acc[r * m + i]);
            if (whole < g->k) s += dot_rest(g, i0 + i, j + r);
            put(w, i0 + i, j + r, s);
        }
}

/* m rows are taken by four, then two and one; from the second on the weight's rows come from the first-level cache. */
#define DOT(dtype, rows, m) \
    static void dot_##dtype##_##rows##_##m(const gemv_job *w, int64_t i, int64_t j) { dot_rows(w, i, j, rows, m, LC_K_##dtype); }
#define BODY(dtype)                                                                                        \
    DOT(dtype, 1, 1) DOT(dtype, 1, 2) DOT(dtype, 1, 4) DOT(dtype, 2, 1) DOT(dtype, 2, 2) DOT(dtype, 2, 4)  \
    static void body_##dtype(void *ctx, int64_t begin, int64_t end, int thread) {                          \
        const gemv_job *w = ctx;                                                                           \
        const int64_t m = w->g->m;                                                                         \
        (void)thread;                                                                                      \
        for (int64_t j = begin; j < end; j += 2) {                                                         \
            const int two = end - j > 1;                                                                   \
            int64_t i = 0;                                                                                 \
            for (; i + 4 <= m; i += 4) two ? dot_##dtype##_2_4(w, i, j) : dot_##dtype##_1_4(w, i, j);      \
            if (m & 2) two ? dot_##dtype##_2_2(w, i, j) : dot_##dtype##_1_2(w, i, j);                      \
            if (m & 1) two ? dot_##dtype##_2_1(w, m - 1, j) : dot_##dtype##_1_1(w, m - 1, j);              \
        }                                                                                                  \
    }
typedef void (*body_fn)(void *ctx, int64_t begin, int64_t end, int thread);
#if LC_DOUBLE
BODY(F64)
static const body_fn bodies[LC_K_COUNT] = {[LC_K_F64] = body_F64};
#else
BODY(F32) BODY(BF16) BODY(F16) BODY(Q8_0) BODY(Q4_0) BODY(Q4_1)
static const body_fn bodies[LC_K_COUNT] = {
    [LC_K_F32] = body_F32, [LC_K_BF16] = body_BF16, [LC_K_F16] = body_F16,
    [LC_K_Q8_0] = body_Q8_0, [LC_K_Q4_0] = body_Q4_0, [LC_K_Q4_1] = body_Q4_1,
};
#endif

static void body_any(void *ctx, int64_t begin, int64_t end, int thread) {
    const gemv_job *w = ctx;
    const gemm_call *g = w->g;
    (void)thread;
    for (int64_t j = begin; j < end; j++) {
        vreal acc[GEMV_ROWS] = {{0}};
        real s[GEMV_ROWS] = {0}, piece[PIECE];
        for (int64_t k = 0; k < g->k; k += PIECE) {
            int64_t n = LC_MIN(g->k - k, PIECE), l;
            row_to_real(g->b_dtype, gemm_at(g->b, g->b_dtype, j * g->b_cs + k), piece, n);
            for (int64_t i = 0; i < g->m; i++) {
                const real *a = (const real *)g->a + i * g->a_rs + k;
                for (l = 0; l + VL <= n; l += VL) acc[i] += vload(a + l) * vload(piece + l);
                for (; l < n; l++) s[i] += a[l] * piece[l];
            }
        }
        for (int64_t i = 0; i < g->m; i++) put(w, i, j, s[i] + sum_lanes(acc[i]));
    }
}

void K(gemv_run)(const lc_host *host, const gemm_call *g, int64_t c_rs, int64_t c_cs, int64_t add_rs, int64_t add_cs) {
    gemv_job w = {g, c_rs, c_cs, add_rs, add_cs};
    body_fn body = bodies[g->b_dtype] ? bodies[g->b_dtype] : body_any;
    const lc_dtype_trait *t = lc_dtype_traits(g->b_dtype);
    double row = (double)g->k * t->bytes / t->block;
    int64_t grain = (int64_t)(MIN_BYTES / (row + 1)) / ROWS * ROWS + ROWS;
    if (host && g->n >= 2 * grain) host->parallel(g->n, grain, body, &w);
    else body(&w, 0, g->n, 0);
}
