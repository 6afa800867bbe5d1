/* gemv.c: a few rows times a weight [n, k], the product of decoding, whose cost is reading the weight. Threads split
 * the weight's rows; two of them are read side by side, 32 elements at a time, and multiplied with up to four rows of
 * a. Floats are widened in registers. Of q8_0, q4_0 and q4_1 only the integers are: a block's scale multiplies its sum,
 * and its offset the sum of a over the block, which is made once. Other dtypes go through row_to_real a piece at a
 * time. Sums are in `real`. */
#include "gemm.h"

enum { STEP = 32, NVEC = STEP / VL, ROWS = 2, LOT = 64, PIECE = 512, MIN_BYTES = 1 << 15, AHEAD = 8192 };

typedef struct gemv_job {
    const gemm_call *g;
    int64_t c_rs, c_cs, add_rs, add_cs;
    int64_t ahead;    /* bytes from a weight row to what is prefetched meanwhile */
    const real *sums; /* from make_sums, for dtypes with an offset */
    int64_t sums_ld;
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

/* ---- 32 elements of a row as vectors --------------------------------------------------------------------------- */

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
static inline vreal from_bf16(const uint16_t *p) {
    return (vreal)_mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}
static inline vreal from_f16(const uint16_t *p) { return (vreal)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
static inline void read_i8(const uint8_t *p, vreal *w) {
    for (int l = 0; l < 2; l++) {
        w[l] = (vreal)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(p + 16 * l))));
    }
}
static inline void read_u4(const uint8_t *p, vreal *w) { /* the permutation reads the low four bits of its index */
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p));
    w[0] = (vreal)_mm512_permutexvar_ps(q, values);
    w[1] = (vreal)_mm512_permutexvar_ps(_mm512_srli_epi32(q, 4), values);
}
#elif LC_VBYTES == 32
static inline vreal from_bf16(const uint16_t *p) {
    return (vreal)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
}
static inline vreal from_f16(const uint16_t *p) { return (vreal)_mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
static inline void read_i8(const uint8_t *p, vreal *w) {
    for (int l = 0; l < 4; l++) {
        w[l] = (vreal)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(p + 8 * l))));
    }
}
static inline void read_u4(const uint8_t *p, vreal *w) {
    for (int l = 0; l < 2; l++) {
        __m256i q = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(p + 8 * l)));
        w[l] = (vreal)_mm256_cvtepi32_ps(_mm256_and_si256(q, _mm256_set1_epi32(15)));
        w[l + 2] = (vreal)_mm256_cvtepi32_ps(_mm256_srli_epi32(q, 4));
    }
}
#else
static inline vreal from_bf16(const uint16_t *p) {
    return (vreal){bf16_to_f32(p[0]), bf16_to_f32(p[1]), bf16_to_f32(p[2]), bf16_to_f32(p[3])};
}
static inline vreal from_f16(const uint16_t *p) {
    return (vreal){f16_to_f32(p[0]), f16_to_f32(p[1]), f16_to_f32(p[2]), f16_to_f32(p[3])};
}
static inline void read_i8(const uint8_t *p, vreal *w) {
    float t[STEP];
    for (int i = 0; i < STEP; i++) t[i] = (float)(int8_t)p[i];
    memcpy(w, t, sizeof t);
}
static inline void read_u4(const uint8_t *p, vreal *w) {
    float t[STEP];
    for (int i = 0; i < 16; i++) t[i] = (float)(p[i] & 15), t[i + 16] = (float)(p[i] >> 4);
    memcpy(w, t, sizeof t);
}
#endif
#endif

static inline __attribute__((always_inline)) void read_step(const int dtype, const void *row, int64_t k, vreal *w) {
#pragma GCC unroll 16
    for (int l = 0; l < NVEC; l++) {
#if !LC_DOUBLE
        if (dtype == LC_K_BF16)
            w[l] = from_bf16((const uint16_t *)row + k + l * VL);
        else if (dtype == LC_K_F16)
            w[l] = from_f16((const uint16_t *)row + k + l * VL);
        else
#endif
            w[l] = vload((const real *)row + k + l * VL);
    }
    (void)dtype;
}

/* ---- rows ------------------------------------------------------------------------------------------------------ */

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
static inline __attribute__((always_inline)) void dot_rows(const gemv_job *w, int64_t i0, int64_t j, const int rows,
                                                           const int m, const int dtype) {
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
        for (int r = 0; r < rows; r++) {
            const int size = dtype == LC_K_BF16 || dtype == LC_K_F16 ? 2 : sizeof(real);
            const char *next = (const char *)b[r] + k * size + w->ahead;
            read_step(dtype, b[r], k, v[r]);
#pragma GCC unroll 4
            for (int at = 0; at < STEP * size; at += 64) __builtin_prefetch(next + at);
        }
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

/* ---- rows of blocks -------------------------------------------------------------------------------------------- */

#if !LC_DOUBLE
/* Halves that stand before a block's integers: d, or d and o. */
#define HALVES(dtype) ((dtype) == LC_K_Q4_1 ? 2 : 1)

/* Scales (and offsets, in turn) of n <= LOT blocks as floats, on with zeros to a whole vector. Four halves meet in a
 * register: through memory they would be stored one by one and loaded as a vector, which waits for the stores to leave
 * the core. */
static inline __attribute__((always_inline)) void read_scales(const int dtype, const int size, const uint8_t *p,
                                                              int64_t n, float *d) {
    const int per = HALVES(dtype), blocks = 4 / per;
    int64_t i = 0;
    for (; i + blocks <= n; i += blocks, p += blocks * size) {
        uint64_t u = 0;
#pragma GCC unroll 4
        for (int l = 0; l < blocks; l++) {
            uint32_t v = 0;
            memcpy(&v, p + l * size, (size_t)per * 2);
            u |= (uint64_t)v << (16 * per * l);
        }
#if defined(__F16C__)
        _mm_storeu_ps(d + i * per, _mm_cvtph_ps(_mm_cvtsi64_si128((long long)u)));
#else
        for (int l = 0; l < 4; l++) d[i * per + l] = f16_to_f32((uint16_t)(u >> 16 * l));
#endif
    }
    for (; i < n; i++, p += size)
        for (int l = 0; l < per; l++) d[i * per + l] = half_at(p + 2 * l);
    for (i = n * per; i % VL; i++) d[i] = 0;
}

/* As dot_rows, for blocks of 32 with scale d and offset o: sum of (d q + o) a = d sum(q a) + o sum(a), block by block.
 * The offset of q4_0 is -8 d. */
static inline __attribute__((always_inline)) void dot_blocks(const gemv_job *w, int64_t i0, int64_t j, const int rows,
                                                             const int m, const int dtype) {
    const gemm_call *g = w->g;
    const int size = dtype == LC_K_Q8_0 ? 34 : dtype == LC_K_Q4_0 ? 18 : 20, per = HALVES(dtype);
    const int64_t lda = g->a_rs, blocks = g->k / STEP;
    const real *a = (const real *)g->a + i0 * lda;
    vreal acc[ROWS * GEMV_ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < rows * m; i++) acc[i] = (vreal){0};
    for (int64_t at = 0; at < blocks; at += LOT) {
        const int64_t n = LC_MIN(blocks - at, LOT);
        const uint8_t *p[ROWS];
        float d[ROWS][2 * LOT];
#pragma GCC unroll 2
        for (int r = 0; r < rows; r++) {
            p[r] = (const uint8_t *)gemm_at(g->b, dtype, (j + r) * g->b_cs) + at * size;
            read_scales(dtype, size, p[r], n, d[r]);
        }
        for (int64_t k = 0; k < n; k++) {
            vreal q[ROWS][NVEC];
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++) {
                if (dtype == LC_K_Q8_0)
                    read_i8(p[r] + k * size + 2 * per, q[r]);
                else
                    read_u4(p[r] + k * size + 2 * per, q[r]);
                __builtin_prefetch(p[r] + k * size + w->ahead);
            }
#pragma GCC unroll 8
            for (int i = 0; i < m; i++) {
                const real *x = a + i * lda + (at + k) * STEP;
#pragma GCC unroll 2
                for (int r = 0; r < rows; r++) {
                    vreal s = vload(x) * q[r][0];
#pragma GCC unroll 8
                    for (int l = 1; l < NVEC; l++) s += vload(x + l * VL) * q[r][l];
                    acc[r * m + i] += s * d[r][k * per];
                }
            }
        }
        if (dtype == LC_K_Q8_0) continue;
        for (int64_t k = 0; k < n * per; k += VL)
#pragma GCC unroll 8
            for (int i = 0; i < m; i++)
#pragma GCC unroll 2
                for (int r = 0; r < rows; r++)
                    acc[r * m + i] += vload(w->sums + (i0 + i) * w->sums_ld + at * per + k) * vload(d[r] + k);
    }
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < m; i++) put(w, i0 + i, j + r, sum_lanes(acc[r * m + i]));
}

/* What the scales and offsets, as they stand in a row, are multiplied with: for q4_0 -8 times each block's sum of a,
 * for q4_1 zero and the sum in turn; rows padded to whole vectors. In the calling thread's scratch. */
static void make_sums(gemv_job *w) {
    const gemm_call *g = w->g;
    const int per = HALVES(g->b_dtype);
    const int64_t blocks = g->k / STEP, ld = (blocks * per + VL - 1) / VL * VL;
    real *sums = lc_cpu_scratch((size_t)(g->m * ld + 1) * sizeof(real));
    w->sums = sums, w->sums_ld = ld;
    if (!sums) return;
    memset(sums, 0, (size_t)(g->m * ld) * sizeof(real));
    for (int64_t i = 0; i < g->m; i++)
        for (int64_t b = 0; b < blocks; b++) {
            vreal s = {0};
            for (int l = 0; l < NVEC; l++) s += vload((const real *)g->a + i * g->a_rs + b * STEP + l * VL);
            sums[i * ld + b * per + per - 1] = sum_lanes(s) * (per == 1 ? -8 : 1);
        }
}
#endif

/* ---- bodies ---------------------------------------------------------------------------------------------------- */

/* m rows are taken by four, then two and one; from the second on the weight's rows come from the first-level cache. */
#define DOT(dtype, rows, m)                                                                                            \
    static void dot_##dtype##_##rows##_##m(const gemv_job *w, int64_t i, int64_t j) {                                  \
        if (lc_dtype_is_float(LC_K_##dtype))                                                                           \
            dot_rows(w, i, j, rows, m, LC_K_##dtype);                                                                  \
        else                                                                                                           \
            DOT_BLOCKS(w, i, j, rows, m, LC_K_##dtype);                                                                \
    }
#define BODY(dtype)                                                                                                    \
    DOT(dtype, 1, 1)                                                                                                   \
    DOT(dtype, 1, 2) DOT(dtype, 1, 4) DOT(dtype, 2, 1) DOT(dtype, 2, 2)                                                \
        DOT(dtype, 2, 4) static void body_##dtype(void *ctx, int64_t begin, int64_t end, int thread) {                 \
        const gemv_job *w = ctx;                                                                                       \
        const int64_t m = w->g->m;                                                                                     \
        (void)thread;                                                                                                  \
        for (int64_t j = begin; j < end; j += 2) {                                                                     \
            const int two = end - j > 1;                                                                               \
            int64_t i = 0;                                                                                             \
            for (; i + 4 <= m; i += 4) two ? dot_##dtype##_2_4(w, i, j) : dot_##dtype##_1_4(w, i, j);                  \
            if (m & 2) two ? dot_##dtype##_2_2(w, i, j) : dot_##dtype##_1_2(w, i, j);                                  \
            if (m & 1) two ? dot_##dtype##_2_1(w, m - 1, j) : dot_##dtype##_1_1(w, m - 1, j);                          \
        }                                                                                                              \
    }
#if LC_DOUBLE
#define DOT_BLOCKS(...) (void)0
#else
#define DOT_BLOCKS dot_blocks
#endif
typedef void (*body_fn)(void *ctx, int64_t begin, int64_t end, int thread);
#if LC_DOUBLE
BODY(F64)
static const body_fn bodies[LC_K_COUNT] = {[LC_K_F64] = body_F64};
#else
BODY(F32)
BODY(BF16) BODY(F16) BODY(Q8_0) BODY(Q4_0) BODY(Q4_1) static const body_fn bodies[LC_K_COUNT] = {
    [LC_K_F32] = body_F32,   [LC_K_BF16] = body_BF16, [LC_K_F16] = body_F16,
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
    gemv_job w = {.g = g, .c_rs = c_rs, .c_cs = c_cs, .add_rs = add_rs, .add_cs = add_cs};
    body_fn body = bodies[g->b_dtype] ? bodies[g->b_dtype] : body_any;
    const lc_dtype_trait *t = lc_dtype_traits(g->b_dtype);
    const int64_t row = g->b_cs / t->block * t->bytes;
    w.ahead = ROWS * row * (row > 0 ? (AHEAD + ROWS * row - 1) / (ROWS * row) : 0);
#if !LC_DOUBLE
    if (g->b_dtype == LC_K_Q4_0 || g->b_dtype == LC_K_Q4_1) {
        make_sums(&w);
        if (!w.sums) body = body_any;
    }
#endif
    const int64_t grain = MIN_BYTES / (g->k / t->block * t->bytes + 1) / ROWS * ROWS + ROWS;
    if (host && g->n >= 2 * grain)
        host->parallel(g->n, grain, body, &w);
    else
        body(&w, 0, g->n, 0);
}
