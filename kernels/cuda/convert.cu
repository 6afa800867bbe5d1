/* convert.cu: copies that change the dtype: `to`, and what copy.cu passes on. f32, bf16 and f16 among each other go
 * four elements at a time where the operands allow, all other pairs one by one. Quantised blocks are read out eight
 * elements a thread, so that a block of 32 is four threads' work and a super-block of 256 a warp's. */
#include "convert.cuh"
#include "copy.cuh"
#include "elementwise.cuh"
#include "quant.cuh"

/* ---- plain dtypes ------------------------------------------------------------------------------------------------ */
enum { AHEAD = 4 }; /* vectors that a thread has under way */

template <class S, class D> LC_KERNEL convert_vectors(LC_SPAN(2) s) {
    typedef vector_of<S, 4> from;
    uint32_t step = gridDim.x * blockDim.x;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < s.total; i += AHEAD * step) {
        typename from::raw raw[AHEAD];
        int32_t at[AHEAD][2];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            if (i + a * step >= s.total) continue;
            s.at(i + a * step, at[a]);
            raw[a] = from::get(s.p[1] + at[a][1]);
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            if (i + a * step >= s.total) continue;
            float x[4];
            from::open(raw[a], x);
            vector_of<D, 4>::put(s.p[0] + at[a][0], x);
        }
    }
}

LC_KERNEL convert_elements(LC_SPAN(2) s, int from, int to, int through) {
    LC_EACH(i, s.total) {
        int32_t at[2];
        s.at(i, at);
        convert_one(from, s.p[1] + at[1], to, s.p[0] + at[0], through);
    }
}

typedef void (*convert_fn)(span<2>);
static convert_fn vector_kernel(int from, int to) {
    static const convert_fn kernels[3][3] = {
        {NULL, convert_vectors<float, bf16>, convert_vectors<float, f16>},
        {convert_vectors<bf16, float>, NULL, convert_vectors<bf16, f16>},
        {convert_vectors<f16, float>, convert_vectors<f16, bf16>, NULL},
    };
    return from <= LC_K_F16 && to <= LC_K_F16 ? kernels[from][to] : NULL; /* f32, bf16, f16: 0, 1, 2 */
}

int lc_cuda_convert(const lc_kargs *k, const lc_view *dst, const lc_view *src) {
    const lc_view *const v[2] = {dst, src};
    if (lc_dtype_is_quant(dst->dtype) || lc_dtype_is_quant(src->dtype)) return LC_K_UNSUPPORTED;
    if (!view_numel(dst)) return LC_K_OK;
    int from = src->dtype, to = dst->dtype, through = convert_through(from, to);
    convert_fn kernel = vector_kernel(from, to);
    each_vector(
        make_operands<2>(v), kernel && !k->host->option(LC_OPTION_PLAIN_POINTWISE) ? 4 : 1, 0,
        [&](const span<2> &s) { LC_LAUNCH(kernel, grid_for(s.total, LC_THREADS * AHEAD), LC_THREADS, 0, s); },
        [&](const span<2> &s) {
            LC_LAUNCH(convert_elements, grid_for(s.total, LC_THREADS), LC_THREADS, 0, s, from, to, through);
        });
    return LC_K_OK;
}

/* ---- quantised dtypes -------------------------------------------------------------------------------------------- */
/* vectors: the result lies on the 16-byte grid */
__device__ __forceinline__ void put_eight(int dtype, char *out, int bytes, bool vectors, const float (&y)[8]) {
    if (vectors && dtype == LC_K_F32) {
        ((float4 *)out)[0] = make_float4(y[0], y[1], y[2], y[3]);
        ((float4 *)out)[1] = make_float4(y[4], y[5], y[6], y[7]);
    } else if (vectors && dtype == LC_K_BF16) {
        vector_of<bf16, 8>::put(out, y);
    } else if (vectors && dtype == LC_K_F16) {
        vector_of<f16, 8>::put(out, y);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) write_as<float>(dtype, out + i * bytes, y[i]);
    }
}

/* n groups of eight */
template <int Q>
LC_KERNEL dequantise(const uint8_t *blocks, int to, char *out, int bytes, bool vectors, int64_t n) {
    enum { groups = lc_quant<Q>::block / 8 };
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        float y[8];
        dequantise_eight<Q>(blocks + i / groups * lc_quant<Q>::bytes, (int)(i % groups), y);
        put_eight(to, out + 8 * i * bytes, bytes, vectors, y);
    }
}

int lc_cuda_dequantise(int dtype, const void *blocks, int to, void *out, int64_t n) {
    if (!lc_dtype_is_float(to)) return LC_K_UNSUPPORTED;
    int bytes = lc_dtype_traits(to)->bytes;
    bool vectors = (uintptr_t)out % 16 == 0;
    LC_QUANTS(dtype, {
        if (n % lc_quant<Q>::block) return LC_K_UNSUPPORTED;
        auto kernel = dequantise<Q>;
        if (n)
            LC_LAUNCH(kernel, grid_for(n / 8, LC_THREADS), LC_THREADS, 0, (const uint8_t *)blocks, to, (char *)out,
                      bytes, vectors, n / 8);
    })
    return LC_K_OK;
}

/* x -> y of another dtype */
extern "C" int lc_cuda_to(const lc_kargs *k) { return lc_cuda_copy_view(k, &k->y[0], &k->x[0]); }
