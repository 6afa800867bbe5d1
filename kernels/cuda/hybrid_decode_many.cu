/* hybrid_decode_many.cu: one token of hybrid attention for many rows, with state and cached keys and values in bf16, on the
 * tensor cores: bound by reading the states. As in hybrid_decode.cu a block serves four query heads of one key head of one row, and
 * cached keys, values and the heads' states flow through a ring of pieces of 16 KB; here a product of a head's row and a piece takes
 * the tensor cores' 16 rows for one, which still is a fifth of the instructions. What is multiplied with half operands (weights of the window,
 * features) goes in as two halves, high and low part in two rows, so that little of f32 is lost. A warp has columns of its own, so that
 * sums meet nowhere. The queries' features come from a kernel that takes 64 rows of a head at a time. */
#include "hybrid_decode.cuh"

enum { HEADS = 4, A_ROWS = 2 * HEADS, STRIDE = MOST_KEYS + 8 /* elements between rows of what is multiplied; few meet in a bank */ };

template <class T> __device__ __forceinline__ void store_parts(T *high, T *low, float v) {
    T h = store<T>(v);
    *high = h, *low = store<T>(v - load<float>(h));
}

/* ---- one token ------------------------------------------------------------------------------------------------------------ */
/* After the ring and decode_shared: rows g and g + HEADS are the high and low parts of head g. own, lin: each warp's share of the token's
 * own scores and of what the states add to the denominators. */
template <class T> struct operands_of {
    T q[HEADS][STRIDE], u[A_ROWS][STRIDE], features[A_ROWS][STRIDE];
    float own[DECODE_THREADS / 32], lin[DECODE_THREADS / 32];
};

/* Pieces lie as rows of D halves, whose 16-byte units are exchanged by row & 7 (mma.cuh). */
template <int D, class T> struct many {
    typedef decoder<D, HEADS, T, T> base;
    enum { PIECES = 6, UNITS = D / 8, PIECE_ROWS = PIECE / (2 * D), AT_ONCE = DECODE_THREADS / UNITS, TILES = D / 64 /* of 8 columns, a warp */ };
    base &t;
    operands_of<T> &o;
    const T *keys, *values; /* of the key head, cache row 0 */
    int first, ring_rows;   /* cache row of key lo */
    int place;              /* of this thread's unit in a piece */
    float2 zsum;            /* this thread's pair of the heads' sums */

    /* Rows that a product of n rows looks at. */
    static __device__ __forceinline__ int whole(int n) { return (n + 31) & ~31; }

    __device__ __forceinline__ void ask(int i) const {
        char *to = t.ring + i % PIECES * PIECE + place;
        const int row = threadIdx.x / UNITS, unit = threadIdx.x % UNITS;
        if (i < 2 * t.key_pieces) {
            const int part = i >= t.key_pieces ? i - t.key_pieces : i, left = t.old - part * PIECE_ROWS, n = left < PIECE_ROWS ? left : (int)PIECE_ROWS;
            const T *from = (i >= t.key_pieces ? values : keys) + unit * 8;
            for (int r = row; r < whole(n); r += AT_ONCE, to += DECODE_THREADS * 16) {
                int at = first + part * PIECE_ROWS + r;
                if (at >= ring_rows) at -= ring_rows;
                copy16(to, from + (r < n ? at : 0) * D, r < n);
            }
        } else if (i < t.pieces) {
            const int part = i - 2 * t.key_pieces;
            const T *from = t.state_of(t.h0 + part / t.head_pieces) + part % t.head_pieces * t.rows * D + threadIdx.x * 8;
#pragma unroll 4
            for (int r = row; r < t.rows; r += AT_ONCE, to += DECODE_THREADS * 16, from += DECODE_THREADS * 8) copy16(to, from, true);
        }
        copy_commit();
    }
    __device__ __forceinline__ const char *next() {
        copy_wait<PIECES - 2>();
        __syncthreads();
        ask(t.done + PIECES - 1);
        return t.ring + t.done++ % PIECES * PIECE;
    }
    __device__ __forceinline__ void begin() {
        const int n = t.a.F < PIECE_ROWS ? t.a.F : (int)PIECE_ROWS, row = threadIdx.x / UNITS;
        t.key_pieces = (t.old + PIECE_ROWS - 1) / PIECE_ROWS, t.rows = n, t.head_pieces = t.a.F / n;
        t.pieces = 2 * t.key_pieces + (t.lo > 0 ? HEADS * t.head_pieces : 0), t.done = 0;
        t.group = threadIdx.x / base::LANES, t.column = threadIdx.x % base::LANES * 8; /* for what enters the state */
        ring_rows = 2 * t.a.window, first = t.lo % ring_rows;
        keys = t.cached(0, 0), values = t.cached(1, 0);
        place = (row * UNITS + ((threadIdx.x % UNITS) ^ (row & 7))) * 16;
#pragma unroll 1
        for (int i = 0; i < PIECES - 1; i++) ask(i);
        zsum = make_float2(0, 0);
        if (t.lo > 0 && 2 * (int)threadIdx.x < HEADS * t.a.F) zsum = ((const float2 *)t.zsum_of(t.h0))[threadIdx.x];
    }

    /* A pair of queries, of the key and the value and of features each: everything is asked for before anything is waited for. */
    __device__ __forceinline__ void read_token(const float *features) {
        const int me = 2 * threadIdx.x, h = me / D, e = me % D, fh = me / t.a.F, fe = me % t.a.F;
        const bool has_q = me < HEADS * D, has_f = me < HEADS * t.a.F, has_v = me < D;
        uint32_t q = 0, k = 0, v = 0;
        float2 f = make_float2(0, 0);
        if (has_q) q = *(const uint32_t *)(t.a.q.template row<T>(t.b, t.h0 + h, t.at.start) + e);
        if (has_q) k = *(const uint32_t *)(t.a.k.template row<T>(t.b, t.kv_head(), t.at.start) + e);
        if (has_v) v = *(const uint32_t *)(t.a.v.template row<T>(t.b, t.kv_head(), t.at.start) + e);
        if (has_f) f = ((const float2 *)(features + ((int64_t)t.b * t.a.h + t.h0) * t.a.F))[threadIdx.x];
        const float2 q2 = unpack2<T>(q), k2 = unpack2<T>(k);
        if (has_q) *(uint32_t *)&o.q[h][e] = q;
        if (has_v) *(float2 *)&t.s.now[0][e] = k2, *(float2 *)&t.s.now[1][e] = unpack2<T>(v);
        if (has_f) {
            store_parts(&o.features[fh][fe], &o.features[fh + HEADS][fe], f.x);
            store_parts(&o.features[fh][fe + 1], &o.features[fh + HEADS][fe + 1], f.y);
        }
        const float own = warp_reduce(q2.x * k2.x + q2.y * k2.y, op_sum()), lin = warp_reduce(f.x * zsum.x + f.y * zsum.y, op_sum());
        if (threadIdx.x % 32 == 0) o.own[threadIdx.x / 32] = own, o.lin[threadIdx.x / 32] = lin;
    }

    /* A warp takes 8 keys at a time: [4 heads][D] x [8 keys][D]. */
    __device__ __forceinline__ void scores() {
        const int l = threadIdx.x % 32, g = l / 4, q = l % 4 * 2;
        uint32_t a[D / 16][4] = {};
#pragma unroll
        for (int k = 0; k < D / 16; k++)
            if (g < HEADS) a[k][0] = *(const uint32_t *)&o.q[g][16 * k + q], a[k][2] = *(const uint32_t *)&o.q[g][16 * k + 8 + q];
#pragma unroll 1
        for (int part = 0; part < t.key_pieces; part++) {
            const char *piece = next();
            const int left = t.old - part * PIECE_ROWS, n = left < PIECE_ROWS ? left : (int)PIECE_ROWS;
            for (int j = threadIdx.x / 32 * 8; j < n; j += 64) {
                float c[4] = {};
#pragma unroll
                for (int k = 0; k < D / 16; k += 2) {
                    uint32_t b[4];
                    matrix_load(b, piece + ((j + (l & 7)) * UNITS + ((2 * k + (l >> 3)) ^ (l & 7))) * 16);
                    mma16<T>(c, a[k], b[0], b[1]);
                    mma16<T>(c, a[k + 1], b[2], b[3]);
                }
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (g < HEADS && j + q + e < n) t.s.u[part * PIECE_ROWS + j + q + e][g] = c[e] * (float)t.a.scale;
            }
        }
    }

    __device__ __forceinline__ void weights(const hybrid_out &out) {
        const int i = threadIdx.x / 32;
        if (i < HEADS && threadIdx.x % 32 == 0) { /* warps of a head follow one another, or a head has half a warp */
            const int each = D / 64, many_f = t.a.F / 64;
            float own = 0, lin = 0;
            for (int w = 0; w < each; w++) own += o.own[i * each + w];
            for (int w = 0; w < many_f; w++) lin += o.lin[i * many_f + w];
            t.s.u[t.old][i] = own * (float)t.a.scale, t.s.lin[i] = lin;
        }
        __syncwarp();
        t.weights(out);
        __syncwarp();
        for (int j = threadIdx.x % 32; i < HEADS && j < whole(t.old); j += 32) store_parts(&o.u[i][j], &o.u[i + HEADS][j], j < t.old ? t.s.u[j][i] : 0.f);
    }

    /* c += rows [A_ROWS][n] x piece [n][the warp's columns], n a multiple of 32; of the rows those of head `only`, or all (-1). */
    __device__ __forceinline__ void product(float (&c)[TILES][4], const char *piece, const T *rows, int n, int only) const {
        const int l = threadIdx.x % 32, w = threadIdx.x / 32, g = l / 4;
        const bool mine = only < 0 || g % HEADS == only;
        const T *a_at = rows + g * STRIDE + l % 4 * 2;
        const char *b_at = piece + (TILES == 2 ? ((l & 15) * UNITS + ((2 * w + (l >> 4)) ^ (l & 7))) * 16 : (l * UNITS + (w ^ (l & 7))) * 16);
#pragma unroll 2
        for (int k = 0; k < n; k += 32) {
            uint32_t a[2][4] = {}, b[2][4];
            if (mine) {
                a[0][0] = *(const uint32_t *)(a_at + k), a[0][2] = *(const uint32_t *)(a_at + k + 8);
                a[1][0] = *(const uint32_t *)(a_at + k + 16), a[1][2] = *(const uint32_t *)(a_at + k + 24);
            }
            matrix_load_t(b[0], b_at + k * UNITS * 16);
            if (TILES == 2) {
                matrix_load_t(b[1], b_at + (k + 16) * UNITS * 16);
                mma16<T>(c[0], a[0], b[0][0], b[0][1]);
                mma16<T>(c[TILES - 1], a[0], b[0][2], b[0][3]);
                mma16<T>(c[0], a[1], b[1][0], b[1][1]);
                mma16<T>(c[TILES - 1], a[1], b[1][2], b[1][3]);
            } else {
                mma16<T>(c[0], a[0], b[0][0], b[0][1]);
                mma16<T>(c[0], a[1], b[0][2], b[0][3]);
            }
        }
    }

    __device__ __forceinline__ void sums(float (&c)[TILES][4]) {
#pragma unroll 1
        for (int part = 0; part < t.key_pieces; part++) {
            const char *piece = next();
            const int left = t.old - part * PIECE_ROWS;
            product(c, piece, &o.u[0][part * PIECE_ROWS], whole(left < PIECE_ROWS ? left : (int)PIECE_ROWS), -1);
        }
#pragma unroll 1
        for (int i = 0; i < HEADS; i++)
#pragma unroll 1
            for (int part = 0; t.lo > 0 && part < t.head_pieces; part++) {
                const char *piece = next();
                product(c, piece, &o.features[0][part * t.rows], t.rows, i);
            }
    }

    /* High and low parts meet, the token's own value is added, and the rows are written. */
    __device__ __forceinline__ void finish(float (&c)[TILES][4], const hybrid_out &out) const {
        const int l = threadIdx.x % 32, w = threadIdx.x / 32, g = l / 4;
        const int h = g % HEADS;
        const float own = t.s.u[t.old][h], scale = 1 / t.s.den[h];
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            float v[2];
#pragma unroll
            for (int e = 0; e < 2; e++) v[e] = c[n][e] + __shfl_xor_sync(0xffffffffu, c[n][e], 16);
            const int column = (w * TILES + n) * 8 + l % 4 * 2;
            if (g >= HEADS) continue;
#pragma unroll
            for (int e = 0; e < 2; e++) v[e] = (v[e] + own * t.s.now[1][column + e]) * scale;
            *(uint32_t *)(out.y.template row<T>(t.b, t.h0 + h, 0) + column) = pack2<T>(v[0], v[1]);
        }
    }
};

/* Grid b * h / HEADS. */
template <int D, class T>
__global__ void __launch_bounds__(DECODE_THREADS, 2) decode_many(hybrid a, carried c, hybrid_out o, const float *features, int ring) {
    LC_SHARED(shared);
    typedef decode_shared<D, HEADS> inner;
    next_may_start();
    int heads = a.h / HEADS, b = blockIdx.x / heads, h0 = blockIdx.x % heads * HEADS;
    hybrid_span at = span_of(a, c, b, threadIdx.x == 0 && h0 == 0);
    int lo = hybrid_lo(a, at.p0);
    decoder<D, HEADS, T, T> t = {a, c, shared, *(inner *)(shared + ring), at, b, h0, lo, at.p0 - lo};
    many<D, T> m = {t, *(operands_of<T> *)(shared + ring + sizeof(inner))};
    if (at.p1 == at.p0) {
        wait_for_previous();
        t.nothing(o);
        return;
    }
    m.begin();
    wait_for_previous();
    m.read_token(features);
    __syncthreads();
    m.scores();
    __syncthreads();
    m.weights(o);
    __syncthreads();
    float y[many<D, T>::TILES][4] = {};
    m.sums(y);
    m.finish(y, o);
    int gone = hybrid_lo(a, at.p0 + 1) - lo;
    if (gone > 0) {
        __syncthreads();
        t.absorb(gone);
    }
    t.remember();
}

/* ---- the queries' features ---------------------------------------------------------------------------------------------- */
enum { FEATURE_THREADS = 128, FEATURE_ROWS = 64 };

/* A row's inputs of the map, x [f / 8][2] a lane of four, become features: y = where the row's F features go, or NULL. */
template <int TILES> __device__ __forceinline__ void map_rows(const hybrid &a, const float (&x)[TILES][2], float lambda, float *y) {
    const int column = threadIdx.x % 4 * 2;
    const bool soft = a.map == MAP_SOFTMAX_DIM || a.map == MAP_EXP_DIM;
#pragma unroll 1
    for (int half = 0; half < (soft && a.full ? 2 : 1); half++) {
        const float sign = half ? -1.f : 1.f;
        float m = -INFINITY, sum = 0, scale = 1, e[TILES][2];
#pragma unroll
        for (int n = 0; n < TILES; n++) m = fmaxf(m, fmaxf(sign * x[n][0], sign * x[n][1]));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1)), m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float v = x[n][i];
                e[n][i] = soft ? exp2_fast((sign * v - m) * 1.4426950408889634f) : a.map == MAP_RELU ? fmaxf(v, 0.f) : v > 0 ? 1 + v : exp2_fast(v * 1.4426950408889634f);
                sum += e[n][i];
            }
        sum += __shfl_xor_sync(0xffffffffu, sum, 1), sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (a.map == MAP_SOFTMAX_DIM) scale = 1 / sum;
#pragma unroll
        for (int n = 0; n < TILES && y; n++) {
            const float v0 = fmaxf(e[n][0] * scale, (float)a.feature_eps), v1 = fmaxf(e[n][1] * scale, (float)a.feature_eps);
            *(float2 *)(y + half * a.f + n * 8 + column) = make_float2(lambda * v0, lambda * v1);
        }
    }
}

/* Grid [ceil(b / FEATURE_ROWS)][h]: features [b][h][F] of the queries, times lambda. f inputs of the map; tiles in shared memory: weights
 * [d][f], high and low parts, and queries [FEATURE_ROWS][d]. */
template <class T, int f> __global__ void __launch_bounds__(FEATURE_THREADS) many_features(hybrid a, float *features) {
    enum { TILES = f / 8, PANELS = (f + 63) / 64, QUADS = f == 32 ? 4 : 8 /* of weights, under way */ };
    LC_SHARED(shared);
    const int size = PANELS * a.d * 64;
    T *high = (T *)shared, *low = high + size, *q = low + size;
    const int h = blockIdx.x % a.h, b0 = blockIdx.x / a.h * FEATURE_ROWS, l = threadIdx.x % 32, w = threadIdx.x / 32;
    next_may_start();
#pragma unroll 1
    for (int first = threadIdx.x; first < a.d * f / 4; first += FEATURE_THREADS * QUADS) { /* d * f / 4 is a multiple of THREADS * QUADS */
        float4 v[QUADS];
#pragma unroll
        for (int u = 0; u < QUADS; u++) {
            const int i = first + u * FEATURE_THREADS;
            v[u] = load_quad(a.mq.p, a.mq.dtype, h * a.mq.s[1] + i / (f / 4) * a.mq.s[2] + i % (f / 4) * 4);
        }
#pragma unroll
        for (int u = 0; u < QUADS; u++) {
            const int i = first + u * FEATURE_THREADS, column = i % (f / 4) * 4;
            T *to = tile_at<128>(high + (column >> 6) * (a.d * 64), i / (f / 4), column & 63);
            const float part[4] = {v[u].x, v[u].y, v[u].z, v[u].w};
#pragma unroll
            for (int e = 0; e < 4; e++) store_parts(to + e, to + size + e, part[e]);
        }
    }
    wait_for_previous();
    for (int i = threadIdx.x; i < FEATURE_ROWS * a.d / 8; i += FEATURE_THREADS) {
        const int row = i / (a.d / 8), column = i % (a.d / 8) * 8;
        const bool in = b0 + row < a.b;
        copy16(tile_at<FEATURE_ROWS>(q, row, column), a.q.row<T>(in ? b0 + row : 0, h, 0) + column, in);
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    float c[TILES][4] = {};
#pragma unroll 1
    for (int k = 0; k < a.d; k += 16) {
        uint32_t x[4], b[4];
        fragment_a<FEATURE_ROWS>(x, q, w * 16, k);
#pragma unroll
        for (int n = 0; n < f; n += 16)
#pragma unroll
            for (int part = 0; part < 2; part++) {
                fragment_b_t<128>(b, (part ? low : high) + (n >> 6) * (a.d * 64), n & 63, k);
                mma16<T>(c[n / 8], x, b[0], b[1]);
                mma16<T>(c[n / 8 + 1], x, b[2], b[3]);
            }
    }
    const float bias = bias_of<float>(a.bq, a.bq_dtype, h), lambda = hybrid_lambda(a, hybrid_gamma<float>(a, h));
#pragma unroll
    for (int side = 0; side < 2; side++) {
        const int row = w * 16 + side * 8 + l / 4;
        float x[TILES][2];
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                x[n][i] = c[n][2 * side + i] + bias + (a.skip ? load<float>(*tile_at<FEATURE_ROWS>(q, row, n * 8 + l % 4 * 2 + i)) : 0.f);
        map_rows<TILES>(a, x, lambda, b0 + row < a.b ? features + ((int64_t)(b0 + row) * a.h + h) * a.F : NULL);
    }
}

/* ---- the host's side ------------------------------------------------------------------------------------------------------ */
template <int D, class T> static int many_ring(const hybrid &a) {
    const int room = ring_bytes<D, HEADS>(a), pieces = many<D, T>::PIECES * PIECE;
    return pieces > room ? pieces : room;
}
template <int D, class T> static size_t many_bytes(const hybrid &a) { return many_ring<D, T>(a) + sizeof(decode_shared<D, HEADS>) + sizeof(operands_of<T>); }

template <int D, class T, int f> static int run(const lc_kargs *k, const hybrid &a, const carried &c) {
    const int ring = many_ring<D, T>(a);
    const size_t bytes = many_bytes<D, T>(a);
    const size_t first = sizeof(T) * (2 * ((f + 63) / 64) * a.d * 64 + FEATURE_ROWS * a.d);
    float *features = (float *)k->work;
    if (allow_shared(decode_many<D, T>, bytes) || allow_shared(many_features<T, f>, first)) return LC_K_DEVICE;
    bool apart = true;
    for (int i = 9; i <= 13; i++) apart = apart && chain_apart(&k->x[i]);
    LC_LAUNCH_AFTER(chain_apart(&k->x[3]), (many_features<T, f>), (unsigned)(ceil_div(a.b, FEATURE_ROWS) * a.h), FEATURE_THREADS, first, a, features);
    chain_writes(features, (int64_t)a.b * a.h * a.F * 4);
    if (k->x[8].data) apart = apart && chain_apart(&k->x[8]);
    LC_LAUNCH_AFTER(apart, (decode_many<D, T>), (unsigned)(a.b * (a.h / HEADS)), DECODE_THREADS, bytes, a, c, hybrid_results(k),
                    (const float *)features, ring);
    for (int i = 0; i < 4; i++) chain_writes(&k->y[i]);
    for (int i = 9; i <= 11; i++) chain_writes(&k->x[i]);
    return LC_K_OK;
}

typedef int (*many_way)(const lc_kargs *k, const hybrid &a, const carried &c);
#define INPUTS(D) {run<D, bf16, 32>, run<D, bf16, 64>, run<D, bf16, 128>}
static const many_way ways[2][3] = {INPUTS(64), INPUTS(128)}; /* [d 128][f]; f16 would be more of the same */
static int input_way(const hybrid &a) { return a.f == 32 ? 0 : a.f == 64 ? 1 : a.f == 128 ? 2 : -1; }

/* Beside what hybrid_decode_fit asks for. */
bool hybrid_decode_many_fit(const lc_kargs *k, const hybrid &a) {
    const lc_view *x = k->x;
    const int dtype = x[9].dtype;
    if (dtype != LC_K_BF16 || x[11].dtype != dtype || x[0].dtype != dtype || k->y[0].dtype != dtype) return false;
    if (many_bytes<128, bf16>(a) > lc_cuda_now->shared_max) return false;
    if (a.group % HEADS || (int64_t)a.b * a.h / HEADS < 2 * lc_cuda_now->sms || a.F < 64 || input_way(a) < 0 || a.f > a.d) return false;
    uintptr_t odd = (uintptr_t)k->y[0].data | (uintptr_t)x[10].data;
    for (int i = 0; i < 3; i++) odd |= (uintptr_t)x[i].data | (uintptr_t)(x[i].stride[0] * 2) | (uintptr_t)(x[i].stride[1] * 2);
    for (int i = 1; i < 3; i++)
        if (x[i].dtype != dtype) return false;
    return odd % 16 == 0 && k->y[0].stride[0] % 2 == 0 && k->y[0].stride[1] % 2 == 0;
}

int hybrid_decode_many(const lc_kargs *k, const hybrid &a, const carried &c) {
    return ways[a.d == 128][input_way(a)](k, a, c);
}
