/* hybrid_backward_usual.cuh: what the two walks over the usual call (is_usual, head dim 128, terrace) share. Where hybrid_backward_tile's
 * groups each take some columns of every step, here each has steps of its own, so that products and exponentials of different groups
 * run side by side, and nearly all barriers are between two of them:
 *   FEATURES  features of the block's own rows and their gradient; on the keys' side dv;
 *   STATE, STATE + 1  the features of the other side, one half each, and their rows of the state; the copies from memory; the
 *             gradient of the map's weights;
 *   WINDOW    weights of the window and their gradient, and with them dq or dk.
 * A walk either makes rows (ROWS: dq, dk, dv; four groups) or gradients of the maps (three groups, x among it). A chunk has one barrier of
 * all, at its end. In products a warp has 16 of 64 rows, of which a lane has two, row() and row() + 8. */
#ifndef LC_HYBRID_BACKWARD_USUAL_CUH
#define LC_HYBRID_BACKWARD_USUAL_CUH

#include "hybrid_backward_tile.cuh"

/* Elsewhere a block has too little shared memory for them: nothing need be compiled. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define LC_USUAL_RUNS 0
#else
#define LC_USUAL_RUNS 1
#endif

namespace hybrid_backward_usual {

enum { DIM = 128, INPUTS = 64, FEATURED = 128, TILE = 64 * DIM, PART = FEATURED * (DIM + 1), LOADERS = 256 };
enum { FEATURES, STATE, WINDOW = 3 };                    /* groups */
enum { INNER = 1, FREE = 3, INPUT_GRADIENT, NEAR, ROOM, WEIGHTS, SCORES }; /* barriers; INNER + 1 too */
/* Tiles in shared memory: q, g, k, v of two chunks each, both maps' weights, the state, features, gradients of the map's inputs, half of
 * what the window's side makes (the rest stays in registers, or lies where features did). */
constexpr size_t shared_tiles = 2 * (size_t)(14 * TILE);

template <bool ROWS> constexpr int threads_of = ROWS ? 512 : 384;
/* The thread's number, asked for anew in every chunk: what the compiler would compute from it ahead takes registers in all of them. */
__device__ __forceinline__ int own_number() {
    int tid = threadIdx.x;
#ifndef LC_EMULATED
    asm volatile("" : "+r"(tid));
#endif
    return tid;
}
/* These are computed here, not where they are used. */
template <int N> __device__ __forceinline__ void hold(uint32_t (&a)[N][4]) {
#ifndef LC_EMULATED
#pragma unroll
    for (int j = 0; j < N; j++) asm volatile("" : "+r"(a[j][0]), "+r"(a[j][1]), "+r"(a[j][2]), "+r"(a[j][3]));
#endif
}
__device__ __forceinline__ int strip_of(int tid) { return tid >> 5 & 3; }
__device__ __forceinline__ int lane_row(int tid) { return (tid >> 5 & 3) * 16 + ((tid & 31) >> 2); }
__device__ __forceinline__ int lane_col(int tid) { return 2 * (tid & 3); }
/* [16][16 N] of a warp, as fragments, into a tile of ROWS rows, from row m and column n on. */
template <int ROWS, int N> __device__ __forceinline__ void put_fragments(bf16 *tile, int m, int n, uint32_t (&a)[N][4], int tid) {
    int l = tid & 31;
#pragma unroll
    for (int j = 0; j < N; j++) matrix_store(tile + fragment_at<ROWS>(m, n + 16 * j, l & 15, l >> 4), a[j]);
}

/* What both walks know, apart from registers, which are dear: the state's Z or P by chunk & 1; values of rows by chunk & 1 where a
 * walk wants them here; where rows begin, in memory: the inputs', their values', the results'. */
struct shared_rows_of {
    float z[FEATURED], value[4][2][64]; /* values: RZ, DELTA, SHIFT and one more */
    const bf16 *of[4];
    float *values;
    bf16 *result[2];
    float sum[4], lambda;
};
constexpr size_t shared_usual = shared_tiles + sizeof(shared_rows_of);

struct usual_block {
    const gradients &o;
    const fast &p;
    char *memory;
    int len, c0, c1; /* tokens from the first one on; chunks of the segment */

    __device__ __forceinline__ usual_block(const gradients &o, const fast &p, char *memory) : o(o), p(p), memory(memory) {
        const hybrid &a = o.a;
        chunk_range s = range();
        len = s.len, c0 = s.c0, c1 = s.c1;
        if (threadIdx.x) return;
        shared_rows_of &r = rows();
        r.lambda = hybrid_lambda<float>(a, hybrid_gamma<float>(a, s.h));
        r.of[OF_Q] = a.q.row<bf16>(s.b, s.h, s.s0), r.of[OF_G] = o.g.row<bf16>(s.b, s.h, s.s0);
        r.of[OF_K] = a.k.row<bf16>(s.b, s.hk, s.s0), r.of[OF_V] = a.v.row<bf16>(s.b, s.hk, s.s0);
        r.values = p.values + s.head * a.t + s.s0;
    }
    __device__ __forceinline__ chunk_range range() const {
        return chunk_range(o.a, p.segments, blockIdx.x / p.segments, blockIdx.x % p.segments);
    }
    __device__ __forceinline__ bf16 *tile(int n) const { return (bf16 *)memory + n * TILE; }
    __device__ __forceinline__ bf16 *q(int c) const { return tile(c & 1); }
    __device__ __forceinline__ bf16 *g(int c) const { return tile(2 + (c & 1)); }
    __device__ __forceinline__ bf16 *k(int c) const { return tile(4 + (c & 1)); }
    __device__ __forceinline__ bf16 *v(int c) const { return tile(6 + (c & 1)); }
    __device__ __forceinline__ bf16 *weights_q() const { return tile(8); }
    __device__ __forceinline__ bf16 *weights_k() const { return tile(9); }
    __device__ __forceinline__ bf16 *state() const { return tile(10); }
    __device__ __forceinline__ bf16 *feature() const { return tile(12); }
    __device__ __forceinline__ bf16 *dpre() const { return tile(13); }
    __device__ __forceinline__ bf16 *far_weights() const { return tile(13) + TILE / 2; }
    __device__ __forceinline__ shared_rows_of &rows() const { return *(shared_rows_of *)(memory + shared_tiles); }

    static __device__ __forceinline__ bool loads() { return threadIdx.x >= 128 && threadIdx.x < 384; } /* the groups of the state */
    /* By those: chunk c, whose rows that do not exist are zeros. */
    __device__ __forceinline__ void load(bf16 *to, int what, const rows4 &x, int c, int tid) const {
        int first = (tid - 128) / 16, col = tid % 16 * 8, there = c < 0 ? 0 : len - c * 64, stride = (int)x.s[2];
        const bf16 *from = rows().of[what] + ((int64_t)c * (64 * stride) + (first * stride + col));
        to = tile_at<64>(to, first, col);
#pragma unroll
        for (int i = 0; i < 64; i += 16) copy16(to + i * 64, from + i * stride, first + i < there);
    }
    __device__ __forceinline__ void load_queries(int c, int tid) const { load(q(c), OF_Q, o.a.q, c, tid), load(g(c), OF_G, o.g, c, tid); }
    __device__ __forceinline__ void load_keys(int c, int tid) const { load(k(c), OF_K, o.a.k, c, tid), load(v(c), OF_V, o.a.v, c, tid); }
    template <bool ROWS> __device__ __forceinline__ void load_maps(int h) const {
        if (threadIdx.x < 256) load_weights<DIM, INPUTS, 256>(weights_q(), o.a.mq, h, INPUTS, threadIdx.x);
        if (ROWS ? threadIdx.x >= 256 : threadIdx.x < 256) load_weights<DIM, INPUTS, 256>(weights_k(), o.a.mk, h, INPUTS, threadIdx.x % 256);
    }
    __device__ __forceinline__ float *value_at(int what, int c, int row) const {
        return rows().values + ((int64_t)what * o.a.b * o.a.h * o.a.t + c * 64 + row);
    }
    /* Values of chunk c's rows, by those who load: the first three and value `last`; zeros do for rows that do not exist. */
    __device__ __forceinline__ void load_values(int c, int last, int tid) const {
        int what = (tid - 128) >> 6, row = tid & 63;
        copy4(&rows().value[what][c & 1][row], value_at(what == 3 ? last : what, c, row), c * 64 + row < len);
    }
    /* Rows of chunk c of result `which`, of which row 0 is the first token's; 64 columns from n on. */
    __device__ __forceinline__ void put_result(int which, int c, int n, int stride, const float (&acc)[8][4], int tid) const {
        int row = lane_row(tid), there = len - c * 64;
        const bool odd = tid & 1;
        bf16 *to = rows().result[which] + ((int64_t)c * (64 * stride) + (row * stride + n + (tid & 2) * 2 + (odd ? 8 : 0)));
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 8; j += 2) { /* two lanes exchange, so that four have 32 bytes of a row */
                uint32_t lo = pack2<bf16>(acc[j][2 * i], acc[j][2 * i + 1]), hi = pack2<bf16>(acc[j + 1][2 * i], acc[j + 1][2 * i + 1]);
                uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? lo : hi, 1);
                if (row + 8 * i < there) *(uint2 *)(to + 8 * i * stride + 8 * j) = odd ? make_uint2(other, hi) : make_uint2(lo, other);
            }
    }
};

/* ---- the state: S or R, its half of the features' rows, all columns ----------------------------------------------------- */
struct state_rows {
    float sum[16][4], z[1][4]; /* z in column 0, and, where they come weighed, in column 1 too */
    int first;                 /* row */
    __device__ __forceinline__ void clear_all(int half, int strip) { first = 64 * half + 16 * strip, clear(sum), clear(z); }
    __device__ __forceinline__ void add(const float *part) {
        const float *from = part + (first >> 6) * (16 * 512) + threadIdx.x % 128 * 4;
#pragma unroll
        for (int j = 0; j < 16; j++) {
            float4 v = *(const float4 *)(from + 512 * j);
            sum[j][0] += v.x, sum[j][1] += v.y, sum[j][2] += v.z, sum[j][3] += v.w;
        }
        if (threadIdx.x & 3) return;
        from = part + FEATURED * DIM + first + ((threadIdx.x & 31) >> 2);
        z[0][0] += from[0], z[0][2] += from[8];
    }
    __device__ __forceinline__ void leave(float *part) const {
        float *to = part + (first >> 6) * (16 * 512) + threadIdx.x % 128 * 4;
#pragma unroll
        for (int j = 0; j < 16; j++) *(float4 *)(to + 512 * j) = make_float4(sum[j][0], sum[j][1], sum[j][2], sum[j][3]);
        put_z(part + FEATURED * DIM, threadIdx.x);
    }
    __device__ __forceinline__ void put(bf16 *tile, int tid) const {
        uint32_t a[8][4];
        as_fragments<DIM>(a, sum);
        put_fragments<FEATURED>(tile, first, 0, a, tid);
    }
    __device__ __forceinline__ void put_z(float *to, int tid) const {
        if (tid & 3) return;
        int row = first + ((tid & 31) >> 2);
        to[row] = z[0][0] + z[0][1], to[row + 8] = z[0][2] + z[0][3];
    }
    /* z += sums over the rows of the features' tile, weighed (NULL: all 1) as two halves each. */
    __device__ __forceinline__ void add_z(const bf16 *feature, const float *weight, int tid) {
        int g = (tid & 31) >> 2, l = tid & 31;
#pragma unroll
        for (int k = 0; k < 64; k += 16) {
            uint32_t a[4], b[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (!weight) {
                    b[i] = g == 0 ? 0x3f803f80u : 0u;
                    continue;
                }
                float2 w = *(const float2 *)(weight + k + 8 * i + lane_col(tid));
                uint32_t high = pack2<bf16>(w.x, w.y);
                float2 h = unpack2<bf16>(high);
                b[i] = g == 0 ? high : g == 1 ? pack2<bf16>(w.x - h.x, w.y - h.y) : 0u;
            }
            matrix_load_t(a, feature + fragment_at<64>(k, first, (l & 7) + (l >> 4) * 8, l >> 3 & 1));
            mma16<bf16>(z[0], a, b[0], b[1]);
        }
    }
};

/* Inputs of the map [64][64] become the features of x or of -x, times `by` of their rows, in their half of the tile. */
__device__ __forceinline__ void put_features(bf16 *tile, int half, const float (&by)[2], float (&v)[8][4], int tid) {
    const float sign = half ? -LC_LOG2E : LC_LOG2E;
    float most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) v[n][j] *= sign, most[j >> 1] = fmaxf(most[j >> 1], v[n][j]);
    most[0] = quad_max(most[0]), most[1] = quad_max(most[1]);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) v[n][j] = exp2_fast(v[n][j] - most[j >> 1]), sum[j >> 1] += v[n][j];
    sum[0] = inverse(quad_sum(sum[0])) * by[0], sum[1] = inverse(quad_sum(sum[1])) * by[1];
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) v[n][j] *= sum[j >> 1];
    uint32_t a[4][4];
    as_fragments<64>(a, v);
    put_fragments<64>(tile, 16 * strip_of(tid), 64 * half, a, tid);
}

/* ---- features of both signs of the rows of a warp, and their gradient ---------------------------------------------------- */
struct both_features {
    uint32_t e[2][8][2];  /* exponentials, as f16, of x and of -x */
    float by[2][2];       /* [sign][row]: over their sums */
    __device__ __forceinline__ void make(const float (&x)[8][4]) {
        float end[2][2] = {{-INFINITY, -INFINITY}, {INFINITY, INFINITY}}, sum[2][2] = {{0, 0}, {0, 0}};
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) end[0][j >> 1] = fmaxf(end[0][j >> 1], x[n][j]), end[1][j >> 1] = fminf(end[1][j >> 1], x[n][j]);
#pragma unroll
        for (int i = 0; i < 2; i++) end[0][i] = -quad_max(end[0][i]) * LC_LOG2E, end[1][i] = -quad_max(-end[1][i]) * LC_LOG2E;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float u[2], w[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    u[j] = exp2_fast(fmaf(x[n][2 * i + j], LC_LOG2E, end[0][i])), w[j] = exp2_fast(fmaf(x[n][2 * i + j], -LC_LOG2E, end[1][i]));
                    sum[0][i] += u[j], sum[1][i] += w[j];
                }
                e[0][n][i] = pack2<f16>(u[0], u[1]), e[1][n][i] = pack2<f16>(w[0], w[1]);
            }
#pragma unroll
        for (int sign = 0; sign < 2; sign++)
#pragma unroll
            for (int i = 0; i < 2; i++) by[sign][i] = inverse(quad_sum(sum[sign][i]));
    }
    /* d: of the features of x (sign 0) or of -x, to be less `less` [2] times z [64]: becomes what the map's inputs get; dot: += features
     * times gradients. */
    __device__ __forceinline__ void gradient(int sign, float (&d)[8][4], const float *z, const float (&less)[2], const float (&times)[2],
                                             float (&dot)[2], int tid) const {
        float mean[2] = {0, 0}, all[2];
#pragma unroll
        for (int n = 0; n < 8; n++) {
            float2 zs = *(const float2 *)(z + 8 * n + lane_col(tid));
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float2 f = unpack2<f16>(e[sign][n][i]);
                d[n][2 * i] -= less[i] * zs.x, d[n][2 * i + 1] -= less[i] * zs.y;
                mean[i] += f.x * d[n][2 * i] + f.y * d[n][2 * i + 1];
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            mean[i] = quad_sum(mean[i]) * by[sign][i], all[i] = (sign ? -by[sign][i] : by[sign][i]) * times[i];
            dot[i] += mean[i] * times[i];
        }
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float2 f = unpack2<f16>(e[sign][n][i]);
                d[n][2 * i] = f.x * all[i] * (d[n][2 * i] - mean[i]), d[n][2 * i + 1] = f.y * all[i] * (d[n][2 * i + 1] - mean[i]);
            }
    }
    __device__ __forceinline__ void hold() {
#ifndef LC_EMULATED
#pragma unroll
        for (int n = 0; n < 16; n++) asm volatile("" : "+r"(e[n >> 3][n & 7][0]), "+r"(e[n >> 3][n & 7][1]));
#endif
    }
    /* The features themselves, as a product's operand. */
    __device__ __forceinline__ void fragments(uint32_t (&a)[8][4]) const {
#pragma unroll
        for (int n = 0; n < 16; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float2 f = unpack2<f16>(e[n >> 3][n & 7][i]);
                a[n / 2][n % 2 * 2 + i] = pack2<bf16>(f.x * by[n >> 3][i], f.y * by[n >> 3][i]);
            }
    }
};

__device__ __forceinline__ void add_to(float (&x)[8][4], const uint32_t (&y)[4][4]) {
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float2 v = unpack2<bf16>(y[n / 2][n % 2 * 2 + i]);
            x[n][2 * i] += v.x, x[n][2 * i + 1] += v.y;
        }
}
/* [16][64] of a warp into its rows of a tile of 64 columns. */
__device__ __forceinline__ void put_inputs(bf16 *tile, const float (&v)[8][4], int tid) {
    uint32_t a[4][4];
    as_fragments<64>(a, v);
    put_fragments<64>(tile, 16 * strip_of(tid), 0, a, tid);
}

/* The gradient of a map's weights: 64 of the 128 rows of a head's x, summed over the chunks. */
struct weights_rows {
    float sum[8][4];
    __device__ __forceinline__ void absorb(const bf16 *x, const bf16 *dpre, int half) {
        products_begin(sum);
        group_product<64, 64, 64, ACROSS_K, 64, ACROSS_K>(sum, x, 64 * half, dpre, 0);
        products_end(sum);
    }
    __device__ __forceinline__ void put(float *to, int half) const { /* as held<DIM, INPUTS>::put does */
#pragma unroll
        for (int j = 0; j < 8; j++)
            *(float4 *)(to + (half * 8 + j) * 512 + threadIdx.x % 128 * 4) = make_float4(sum[j][0], sum[j][1], sum[j][2], sum[j][3]);
    }
};

} // namespace hybrid_backward_usual

#endif
