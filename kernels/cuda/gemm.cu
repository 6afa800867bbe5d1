/* gemm.cu: matrix products: cuBLASLt with its choice of algorithm asked for once a problem and remembered, and the plain kernel that
 * takes whatever cuBLASLt does not. Row-major throughout: what cuBLASLt sees, column-major, is the transposed problem. */
#include <stdlib.h>
#include <string.h>

#include "gemm.cuh"

/* ---- the plain kernel ------------------------------------------------------------------------------------------------ */
enum { TILE = 64, STEP = 16, PLAIN_THREADS = 256 };

static __device__ __forceinline__ int64_t batch_at(const lc_cuda_operand &o, const lc_cuda_product &p, int64_t z) {
    int64_t at = 0;
#pragma unroll
    for (int i = LC_PRODUCT_BATCH - 1; i >= 0; i--) {
        if (i >= p.nb) continue;
        at += z % p.dim[i] * o.step[i];
        z /= p.dim[i];
    }
    return at;
}

/* A tile [rows of o from r0, STEP of the other dim from k0] into room[k][r]; what lies outside is 0. Neighbouring threads read along
 * the dim that is contiguous. */
template <class R>
static __device__ __forceinline__ void read_tile(R (*room)[TILE + 1], const lc_cuda_operand &o, int64_t base, int64_t rs, int64_t ks,
                                                 int64_t r0, int64_t rows, int64_t k0, int64_t k) {
    for (int e = (int)threadIdx.x; e < TILE * STEP; e += PLAIN_THREADS) {
        int r = ks == 1 ? e / STEP : e % TILE, i = ks == 1 ? e % STEP : e / TILE;
        bool in = r0 + r < rows && k0 + i < k;
        room[i][r] = in ? load_any<R>(o.data, o.dtype, base + (r0 + r) * rs + (k0 + i) * ks) : (R)0;
    }
}

/* A block of 256 threads makes a tile of 64 x 64, each thread 4 x 4 of it (rows ty + 16 i, columns tx + 16 j), 16 of k at a time. */
template <class R> static __global__ void __launch_bounds__(PLAIN_THREADS) plain_product(const lc_cuda_product p, int64_t batch) {
    __shared__ R a[STEP][TILE + 1], b[STEP][TILE + 1];
    const int64_t columns = (p.n + TILE - 1) / TILE, tiles = columns * ((p.m + TILE - 1) / TILE);
    const int tx = (int)threadIdx.x % 16, ty = (int)threadIdx.x / 16;
    for (int64_t job = blockIdx.x; job < tiles * batch; job += gridDim.x) {
        const int64_t z = job / tiles, tile = job - z * tiles, m0 = tile / columns * TILE, n0 = tile % columns * TILE;
        const int64_t at_a = batch_at(p.a, p, z), at_b = batch_at(p.b, p, z);
        R sum[4][4] = {};
        for (int64_t k0 = 0; k0 < p.k; k0 += STEP) {
            __syncthreads();
            read_tile(a, p.a, at_a, p.a.rs, p.a.cs, m0, p.m, k0, p.k);
            read_tile(b, p.b, at_b, p.b.cs, p.b.rs, n0, p.n, k0, p.k);
            __syncthreads();
#pragma unroll
            for (int k = 0; k < STEP; k++)
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int j = 0; j < 4; j++) sum[i][j] += a[k][ty + 16 * i] * b[k][tx + 16 * j];
        }
        const int64_t at_c = p.c.data ? batch_at(p.c, p, z) : 0, at_d = batch_at(p.d, p, z);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int64_t r = m0 + ty + 16 * i, c = n0 + tx + 16 * j;
                if (r >= p.m || c >= p.n) continue;
                R v = (R)p.alpha * sum[i][j];
                if (p.bias) v += load_any<R>(p.bias, p.bias_dtype, c);
                if (p.c.data) v += (R)p.beta * load_any<R>(p.c.data, p.c.dtype, at_c + r * p.c.rs + c * p.c.cs);
                store_any<R>(p.d.data, p.d.dtype, at_d + r * p.d.rs + c * p.d.cs, v);
            }
    }
}

static int64_t batch_of(const lc_cuda_product *p) {
    int64_t n = 1;
    for (int i = 0; i < p->nb; i++) n *= p->dim[i];
    return n;
}

static int run_plain(const lc_cuda_product *p) {
    const int64_t batch = batch_of(p), jobs = ceil_div(p->m, TILE) * ceil_div(p->n, TILE) * batch;
    const unsigned grid = (unsigned)(jobs < (1 << 30) ? jobs : (1 << 30));
    if (p->a.dtype == LC_K_F64 || p->d.dtype == LC_K_F64) LC_LAUNCH(plain_product<double>, grid, PLAIN_THREADS, 0, *p, batch);
    else LC_LAUNCH(plain_product<float>, grid, PLAIN_THREADS, 0, *p, batch);
    return LC_K_OK;
}

/* ---- conversion ------------------------------------------------------------------------------------------------------ */
/* c [m, n] of every batch index to d, converted. */
static __global__ void spread(const lc_cuda_product p, int64_t total) {
    for (int64_t e = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; e < total; e += (int64_t)gridDim.x * blockDim.x) {
        const int64_t row = e / p.n, j = e - row * p.n, z = row / p.m, i = row - z * p.m;
        const int64_t from = batch_at(p.c, p, z) + i * p.c.rs + j * p.c.cs, to = batch_at(p.d, p, z) + i * p.d.rs + j * p.d.cs;
        if (p.d.dtype == LC_K_F64) store_any<double>(p.d.data, p.d.dtype, to, load_any<double>(p.c.data, p.c.dtype, from));
        else store_any<float>(p.d.data, p.d.dtype, to, load_any<float>(p.c.data, p.c.dtype, from));
    }
}

static int run_spread(const lc_cuda_product *p) {
    const int64_t total = p->m * p->n * batch_of(p);
    if (total) LC_LAUNCH(spread, grid_for(total, 256), 256, 0, *p, total);
    return LC_K_OK;
}

/* Eight elements a thread, rows one after the other. `eights` is cols / 8. */
template <class To, class From>
static __global__ void convert_eights(To *to, int64_t ld_to, const From *from, int64_t ld_from, int64_t rows, int64_t eights) {
    for (int64_t e = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; e < rows * eights; e += (int64_t)gridDim.x * blockDim.x) {
        const int64_t r = e / eights, at = (e - r * eights) * 8;
        alignas(16) From in[8];
        alignas(16) To out[8];
#pragma unroll
        for (int i = 0; i < (int)sizeof in / 16; i++) ((int4 *)in)[i] = ((const int4 *)(from + r * ld_from + at))[i];
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = store<To>(load<float>(in[i]));
#pragma unroll
        for (int i = 0; i < (int)sizeof out / 16; i++) ((int4 *)(to + r * ld_to + at))[i] = ((const int4 *)out)[i];
    }
}

static bool aligned16(const void *p, int64_t ld, int dtype) { return !(((uintptr_t)p | (uintptr_t)(ld * dtype_bytes(dtype))) & 15); }

extern "C" int lc_cuda_convert(void *to, int to_dtype, int64_t ld_to, const void *from, int from_dtype, int64_t ld_from, int64_t rows,
                               int64_t cols) {
    if (!rows || !cols) return LC_K_OK;
    if (cols % 8 == 0 && aligned16(to, ld_to, to_dtype) && aligned16(from, ld_from, from_dtype)) {
        const unsigned grid = grid_for(rows * cols / 8, 256);
#define PAIR(TO, To, FROM, From)                                                                                                 \
    if (to_dtype == TO && from_dtype == FROM) {                                                                                  \
        LC_LAUNCH((convert_eights<To, From>), grid, 256, 0, (To *)to, ld_to, (const From *)from, ld_from, rows, cols / 8);       \
        return LC_K_OK;                                                                                                          \
    }
        PAIR(LC_K_BF16, bf16, LC_K_F32, float)
        PAIR(LC_K_F16, f16, LC_K_F32, float)
        PAIR(LC_K_F32, float, LC_K_BF16, bf16)
        PAIR(LC_K_F32, float, LC_K_F16, f16)
        PAIR(LC_K_BF16, bf16, LC_K_BF16, bf16)
#undef PAIR
    }
    lc_cuda_product p = {};
    p.m = rows, p.n = cols;
    p.c.data = (void *)from, p.c.dtype = from_dtype, p.c.rs = ld_from, p.c.cs = 1;
    p.d.data = to, p.d.dtype = to_dtype, p.d.rs = ld_to, p.d.cs = 1;
    return run_spread(&p);
}

/* ---- cuBLASLt -------------------------------------------------------------------------------------------------------- */
/* A problem as cuBLASLt's choice depends on it. Operands in our order; zeroed before it is filled: it is hashed as bytes. */
struct blas_key {
    int64_t m, n, k, batch, ld[4], step[4]; /* a, b, c, d */
    int32_t device, ta, tb, in, out, bias, accumulate;
    int32_t align[4];
};
struct blas_plan {
    blas_key key;
    int used, supported;
    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t a, b, c, d;
    cublasLtMatmulAlgo_t algo;
    size_t room; /* workspace that algo wants */
};
enum { PLANS = 2048 }; /* a power of two; forgotten all at once when three quarters are taken */
static blas_plan *plans;
static int plan_count;

static void forget_plan(blas_plan *p) {
    if (p->op) cublasLtMatmulDescDestroy(p->op);
    cublasLtMatrixLayout_t all[4] = {p->a, p->b, p->c, p->d};
    for (int i = 0; i < 4; i++)
        if (all[i]) cublasLtMatrixLayoutDestroy(all[i]);
    memset(p, 0, sizeof *p);
}

static uint32_t hash_key(const blas_key *key) {
    uint64_t h = 1469598103934665603u, w;
    for (size_t i = 0; i + 8 <= sizeof *key; i += 8) {
        memcpy(&w, (const char *)key + i, 8);
        h = (h ^ w) * 0x9e3779b97f4a7c15u;
        h ^= h >> 29;
    }
    return (uint32_t)(h >> 16);
}

/* The place of a key: where it stands, or an empty one (used 0). NULL: no memory. */
static blas_plan *find_plan(const blas_key *key) {
    if (!plans && !(plans = (blas_plan *)calloc(PLANS, sizeof *plans))) return NULL;
    if (plan_count >= PLANS / 4 * 3) {
        for (int i = 0; i < PLANS; i++) forget_plan(&plans[i]);
        plan_count = 0;
    }
    uint32_t at = hash_key(key) % PLANS;
    while (plans[at].used && memcmp(&plans[at].key, key, sizeof *key)) at = (at + 1) % PLANS;
    return &plans[at];
}

static cudaDataType_t blas_type(int dtype) {
    return dtype == LC_K_BF16 ? CUDA_R_16BF : dtype == LC_K_F16 ? CUDA_R_16F : dtype == LC_K_F64 ? CUDA_R_64F : CUDA_R_32F;
}

/* The layout of a row-major matrix [rows, ld >= cols] as cuBLASLt sees it: [cols, rows], column-major. */
static cublasStatus_t make_layout(cublasLtMatrixLayout_t *out, int dtype, int64_t rows, int64_t cols, int64_t ld, int64_t batch,
                                  int64_t step) {
    cublasStatus_t s = cublasLtMatrixLayoutCreate(out, blas_type(dtype), (uint64_t)cols, (uint64_t)rows, ld);
    int32_t count = (int32_t)batch;
    if (!s && batch > 1) s = cublasLtMatrixLayoutSetAttribute(*out, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count);
    if (!s && batch > 1) s = cublasLtMatrixLayoutSetAttribute(*out, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &step, sizeof step);
    return s;
}

static cublasStatus_t make_op(blas_plan *p, const void *bias) {
    const blas_key *k = &p->key;
    const bool wide = k->in == LC_K_F64;
    cublasOperation_t first = k->tb ? CUBLAS_OP_T : CUBLAS_OP_N, second = k->ta ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasStatus_t s = cublasLtMatmulDescCreate(&p->op, wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F, wide ? CUDA_R_64F : CUDA_R_32F);
    if (!s) s = cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first);
    if (!s) s = cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second);
    if (s || !k->bias) return s;
    cublasLtEpilogue_t with_bias = CUBLASLT_EPILOGUE_BIAS;
    s = cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_EPILOGUE, &with_bias, sizeof with_bias);
    if (!s) s = cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
    return s;
}

/* What cuBLASLt may choose from: our workspace, pointers as aligned as these, and of the ways to add up parts of k the one that adds
 * in f32, in a fixed order. */
static cublasStatus_t make_preference(cublasLtMatmulPreference_t *out, const blas_key *k) {
    static const cublasLtMatmulPreferenceAttributes_t align[4] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    uint64_t room = LC_CUDA_BLAS_WORK;
    uint32_t scheme = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    cublasStatus_t s = cublasLtMatmulPreferenceCreate(out);
    if (!s) s = cublasLtMatmulPreferenceSetAttribute(*out, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &room, sizeof room);
    if (!s) s = cublasLtMatmulPreferenceSetAttribute(*out, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &scheme, sizeof scheme);
    for (int i = 0; i < 4 && !s; i++) {
        uint32_t bytes = (uint32_t)k->align[i];
        s = cublasLtMatmulPreferenceSetAttribute(*out, align[i], &bytes, sizeof bytes);
    }
    return s;
}

/* Fills an empty place. A problem that cuBLASLt does not do is remembered as such. */
static int make_plan(blas_plan *p, const blas_key *k, const void *bias) {
    cublasLtMatmulPreference_t preference = NULL;
    cublasLtMatmulHeuristicResult_t found;
    int count = 0;
    p->key = *k;
    cublasStatus_t s = make_op(p, bias);
    if (!s) s = make_layout(&p->a, k->in, k->ta ? k->k : k->m, k->ta ? k->m : k->k, k->ld[0], k->batch, k->step[0]);
    if (!s) s = make_layout(&p->b, k->in, k->tb ? k->n : k->k, k->tb ? k->k : k->n, k->ld[1], k->batch, k->step[1]);
    if (!s) s = make_layout(&p->c, k->out, k->m, k->n, k->ld[2], k->batch, k->step[2]);
    if (!s) s = make_layout(&p->d, k->out, k->m, k->n, k->ld[3], k->batch, k->step[3]);
    if (!s) s = make_preference(&preference, k);
    if (!s) s = cublasLtMatmulAlgoGetHeuristic(lc_cuda_now->blas, p->op, p->b, p->a, p->c, p->d, preference, 1, &found, &count);
    if (preference) cublasLtMatmulPreferenceDestroy(preference);
    bool refused = s == CUBLAS_STATUS_NOT_SUPPORTED || s == CUBLAS_STATUS_INVALID_VALUE || (!s && !count);
    if (s && !refused) {
        forget_plan(p);
        return lc_cuda_check_blas(s, "cublasLtMatmulAlgoGetHeuristic");
    }
    p->supported = !refused;
    if (p->supported) p->algo = found.algo, p->room = found.workspaceSize;
    p->used = 1;
    plan_count++;
    return LC_K_OK;
}

static int32_t alignment_of(const void *p) {
    for (int32_t a = 256; a > 2; a /= 2)
        if (!((uintptr_t)p % (uintptr_t)a)) return a == 256 ? 256 : a > 16 ? 16 : a;
    return 2;
}

/* The widest products count their tiles in a few bytes of the workspace, which cuBLASLt sets to zero before them. In a graph each has
 * bytes of its own, so that one node at the start can zero them all (graph.c). */
static void *workspace_for(const blas_plan *p) {
    lc_cuda_device *d = lc_cuda_now;
    if (!p->room || p->room > LC_CUDA_COUNTER_BYTES || !d->counters_left) return d->blas_work;
    return (char *)d->blas_work + LC_CUDA_BLAS_WORK + (LC_CUDA_COUNTERS - d->counters_left--) * LC_CUDA_COUNTER_BYTES;
}

/* One strided batch. a, b: ta, tb with leading dims key->ld. LC_K_UNSUPPORTED: the plain kernel must. */
static int run_blas(const blas_key *key, double alpha, double beta, const void *a, const void *b, const void *c, void *d, const void *bias) {
    blas_plan *p = find_plan(key);
    if (!p) return LC_K_NOMEM;
    if (!p->used) {
        int rc = make_plan(p, key, bias);
        if (rc) return rc;
    } else if (p->supported && bias) {
        cublasStatus_t s = cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
        if (s) return lc_cuda_check_blas(s, "cublasLtMatmulDescSetAttribute");
    }
    if (!p->supported) return LC_K_UNSUPPORTED;
    const float alpha32 = (float)alpha, beta32 = (float)beta;
    const bool wide = key->in == LC_K_F64;
    void *work = workspace_for(p);
    cublasStatus_t s = cublasLtMatmul(lc_cuda_now->blas, p->op, wide ? (const void *)&alpha : &alpha32, b, p->b, a, p->a,
                                      wide ? (const void *)&beta : &beta32, c, p->c, d, p->d, &p->algo, work,
                                      work == lc_cuda_now->blas_work ? LC_CUDA_BLAS_WORK : LC_CUDA_COUNTER_BYTES, lc_cuda_now->stream);
    if (s == CUBLAS_STATUS_NOT_SUPPORTED) {
        p->supported = 0;
        return LC_K_UNSUPPORTED;
    }
    return lc_cuda_check_blas(s, "cublasLtMatmul");
}

/* Is [rows, cols] row-major (*t 0) or stored transposed (*t 1), and with what leading dimension? */
static bool matrix_layout(const lc_cuda_operand *o, int64_t rows, int64_t cols, int32_t *t, int64_t *ld) {
    if ((o->cs == 1 || cols == 1) && (rows == 1 || o->rs >= cols)) return *t = 0, *ld = rows == 1 ? cols : o->rs, true;
    if ((o->rs == 1 || rows == 1) && (cols == 1 || o->cs >= rows)) return *t = 1, *ld = cols == 1 ? rows : o->cs, true;
    return false;
}

/* Batch dims that every operand walks with one stride become one; those of size 1 go. */
static void merge_batch(lc_cuda_product *p) {
    lc_cuda_operand *o[4] = {&p->a, &p->b, &p->c, &p->d};
    int n = 0;
    for (int i = 0; i < p->nb; i++) {
        if (p->dim[i] == 1) continue;
        bool merge = n > 0;
        for (int j = 0; j < 4 && merge; j++) merge = o[j]->step[n - 1] == o[j]->step[i] * p->dim[i];
        int at = merge ? n - 1 : n++;
        p->dim[at] = merge ? p->dim[at] * p->dim[i] : p->dim[i];
        for (int j = 0; j < 4; j++) o[j]->step[at] = o[j]->step[i];
    }
    p->nb = n;
}

static void *moved(const lc_cuda_operand *o, int64_t by) { return (char *)o->data + by * dtype_bytes(o->dtype); }

/* d's columns contiguous, c of d's layout kind and dtype: one call of cuBLASLt for each index of all batch dims but the largest. */
static int run_batches(lc_cuda_product *p) {
    blas_key key;
    memset(&key, 0, sizeof key);
    int32_t plain_c = 0, plain_d = 0;
    if (!p->c.data) p->c = p->d;
    merge_batch(p);
    if (!matrix_layout(&p->a, p->m, p->k, &key.ta, &key.ld[0]) || !matrix_layout(&p->b, p->k, p->n, &key.tb, &key.ld[1]) ||
        !matrix_layout(&p->c, p->m, p->n, &plain_c, &key.ld[2]) || !matrix_layout(&p->d, p->m, p->n, &plain_d, &key.ld[3]) ||
        plain_c || plain_d)
        return LC_K_UNSUPPORTED;
    key.m = p->m, key.n = p->n, key.k = p->k;
    key.device = lc_cuda_now->index;
    key.in = p->a.dtype, key.out = p->d.dtype, key.bias = p->bias != NULL, key.accumulate = p->beta != 0;
    int inner = 0;
    for (int i = 1; i < p->nb; i++)
        if (p->dim[i] > p->dim[inner]) inner = i;
    key.batch = p->nb ? p->dim[inner] : 1;
    if (key.batch > INT32_MAX) return LC_K_UNSUPPORTED;
    lc_cuda_operand *o[4] = {&p->a, &p->b, &p->c, &p->d};
    for (int j = 0; j < 4; j++) key.step[j] = p->nb ? o[j]->step[inner] : 0;
    const int64_t calls = batch_of(p) / key.batch;
    for (int64_t z = 0; z < calls; z++) {
        void *at[4];
        for (int j = 0; j < 4; j++) {
            int64_t by = 0, rest = z;
            for (int i = p->nb - 1; i >= 0; i--) {
                if (i == inner) continue;
                by += rest % p->dim[i] * o[j]->step[i];
                rest /= p->dim[i];
            }
            at[j] = moved(o[j], by);
            key.align[j] = alignment_of(at[j]);
        }
        int rc = run_blas(&key, p->alpha, p->beta, at[0], at[1], at[2], at[3], p->bias);
        if (rc == LC_K_UNSUPPORTED && z > 0) return lc_cuda_fail("cublasLtMatmul", "one product of a batch was refused, others not");
        if (rc) return rc;
    }
    return LC_K_OK;
}

static void transpose_operand(lc_cuda_operand *o) {
    int64_t t = o->rs;
    o->rs = o->cs, o->cs = t;
}

/* Brings a problem into the form that run_batches takes. */
static int try_blas(const lc_cuda_product *given) {
    lc_cuda_product p = *given;
    const bool half = p.a.dtype == LC_K_BF16 || p.a.dtype == LC_K_F16;
    if (p.a.dtype != p.b.dtype || !(p.d.dtype == p.a.dtype || (half && p.d.dtype == LC_K_F32))) return LC_K_UNSUPPORTED;
    if (p.bias && p.bias_dtype != p.d.dtype) return LC_K_UNSUPPORTED;
    if (p.d.cs != 1 && p.n > 1) { /* columns contiguous: the transposed problem */
        if (p.bias) return LC_K_UNSUPPORTED;
        lc_cuda_operand t = p.a;
        p.a = p.b, p.b = t;
        int64_t m = p.m;
        p.m = p.n, p.n = m;
        transpose_operand(&p.a), transpose_operand(&p.b), transpose_operand(&p.c), transpose_operand(&p.d);
    }
    if (p.d.cs != 1 && p.n > 1) return LC_K_UNSUPPORTED;
    const bool c_fits = p.c.dtype == p.d.dtype && (p.c.cs == 1 || p.n == 1) && (p.c.rs >= p.n || p.m == 1);
    if (p.c.data && !c_fits) { /* broadcast or converted: copied into place first */
        int rc = run_spread(&p);
        if (rc) return rc;
        p.c = p.d;
        rc = run_batches(&p);
        return rc == LC_K_UNSUPPORTED ? run_plain(&p) : rc;
    }
    return run_batches(&p);
}

/* Batches that share b and whose rows continue one another are one product of more rows. */
extern "C" void lc_cuda_product_fold(lc_cuda_product *p) {
    lc_cuda_operand *o[3] = {&p->a, &p->d, &p->c};
    for (; p->nb > 0; p->nb--) {
        const int at = p->nb - 1;
        if (p->dim[at] != 1) {
            if (p->b.step[at] != 0) return;
            for (int i = 0; i < 3; i++)
                if (o[i]->data && p->m != 1 && o[i]->step[at] != o[i]->rs * p->m) return;
            for (int i = 0; i < 3 && p->m == 1; i++) o[i]->rs = o[i]->step[at];
            p->m *= p->dim[at];
        }
    }
}

/* ---- entries --------------------------------------------------------------------------------------------------------- */
extern "C" int lc_cuda_product_run(const lc_cuda_product *given) {
    lc_cuda_product p = *given;
    if (!lc_dtype_is_float(p.a.dtype) || !lc_dtype_is_float(p.b.dtype) || !lc_dtype_is_float(p.d.dtype)) return LC_K_UNSUPPORTED;
    if (p.m < 1 || p.n < 1 || batch_of(&p) < 1) return LC_K_OK;
    if (!p.c.data || p.beta == 0) memset(&p.c, 0, sizeof p.c), p.beta = 0;
    lc_cuda_product_fold(&p);
    if (p.k > 0 && !lc_cuda_host->option(LC_OPTION_PLAIN_LINEAR)) {
        int rc = try_blas(&p);
        if (rc != LC_K_UNSUPPORTED) return rc;
    }
    return run_plain(&p);
}

static lc_cuda_operand operand(const void *data, int dtype, int64_t ld, int transposed, int64_t step) {
    lc_cuda_operand o = {};
    o.data = (void *)data, o.dtype = dtype, o.step[0] = step;
    o.rs = transposed ? 1 : ld, o.cs = transposed ? ld : 1;
    return o;
}

extern "C" int lc_cuda_gemm_batched(int ta, int tb, int64_t m, int64_t n, int64_t k, double alpha, const void *a, int a_dtype, int64_t lda,
                                    int64_t a_step, const void *b, int b_dtype, int64_t ldb, int64_t b_step, double beta, const void *c,
                                    int64_t ldc, int64_t c_step, void *d, int d_dtype, int64_t ldd, int64_t d_step, int64_t batch) {
    lc_cuda_product p = {};
    p.m = m, p.n = n, p.k = k, p.alpha = alpha, p.beta = beta;
    p.a = operand(a, a_dtype, lda, ta, a_step), p.b = operand(b, b_dtype, ldb, tb, b_step);
    p.c = operand(c, d_dtype, ldc, 0, c_step), p.d = operand(d, d_dtype, ldd, 0, d_step);
    p.nb = batch != 1, p.dim[0] = batch;
    return lc_cuda_product_run(&p);
}

extern "C" int lc_cuda_gemm(int ta, int tb, int64_t m, int64_t n, int64_t k, double alpha, const void *a, int a_dtype, int64_t lda,
                            const void *b, int b_dtype, int64_t ldb, double beta, const void *c, int64_t ldc, void *d, int d_dtype,
                            int64_t ldd) {
    return lc_cuda_gemm_batched(ta, tb, m, n, k, alpha, a, a_dtype, lda, 0, b, b_dtype, ldb, 0, beta, c, ldc, 0, d, d_dtype, ldd, 0, 1);
}
