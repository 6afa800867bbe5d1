/* elementwise.cuh: how kernels that treat every element alike get at their operands. A span is a walk in 32-bit
 * arithmetic over bytes, with divisions by multiplication; what is too large for that is cut into several launches.
 * Where the last dim of every operand lies in one piece (or is one value, broadcast) and all is aligned, elements are
 * replaced by vectors of several: the same walk then counts vectors, so column slices and broadcast rows are as fast as
 * plain arrays. Anything else goes element by element. */
#ifndef LC_ELEMENTWISE_CUH
#define LC_ELEMENTWISE_CUH

#include "device.cuh"

enum { LC_THREADS = 256 }; /* of a block, in all elementwise kernels */

#define LC_KERNEL __global__ void __launch_bounds__(LC_THREADS)
/* Read where it lies: indexed by run-time numbers, a copy would go to local memory. */
#define LC_SPAN(n) const __grid_constant__ span<n>

/* N operands of one shape; operand 0 is the result. Items are elements, or vectors of `width` of them. */
template <int N> struct span {
    uint32_t total, dim[LC_VIEW_DIMS], magic[LC_VIEW_DIMS];
    int32_t ndim, shift[LC_VIEW_DIMS], stride[N][LC_VIEW_DIMS]; /* strides in bytes */
    uint32_t splat;                                             /* bit o: operand o has one value for a whole vector */
    int64_t first; /* position of item 0 in the whole, in row-major order */
    char *p[N];
    __device__ __forceinline__ void at(uint32_t e, int32_t (&offset)[N]) const {
#pragma unroll
        for (int o = 0; o < N; o++) offset[o] = 0;
#pragma unroll 1
        for (int i = ndim - 1; i > 0; i--) {
            uint32_t q = ((uint32_t)((uint64_t)e * magic[i] >> 32) + e) >> shift[i], r = e - q * dim[i];
#pragma unroll
            for (int o = 0; o < N; o++) offset[o] += (int32_t)r * stride[o][i];
            e = q;
        }
#pragma unroll
        for (int o = 0; o < N; o++) offset[o] += (int32_t)e * stride[o][0];
    }
};

/* Operands before they are cut. */
template <int N> struct operands {
    walk<N> w; /* strides in items of the operand's own element size */
    char *p[N];
    int64_t bytes[N]; /* an element */
    uint32_t splat;
    int64_t first;
};

/* Views of one shape. Absent ones may not be among them. */
template <int N> static inline operands<N> make_operands(const lc_view *const (&v)[N]) {
    operands<N> a;
    a.w = make_walk<N>(v);
    a.splat = 0;
    a.first = 0;
    for (int o = 0; o < N; o++) {
        a.p[o] = (char *)v[o]->data;
        a.bytes[o] = lc_dtype_traits(v[o]->dtype)->bytes;
    }
    return a;
}

/* Makes items of `width` elements, if that can be; elements of a single dim that fill no vector are left over: *rest.
 * Splats only where allowed (bit o). */
template <int N> static inline bool make_vectors(operands<N> *a, int width, uint32_t may_splat, int64_t *rest) {
    int last = a->w.ndim - 1;
    uint32_t splat = 0;
    *rest = last == 0 ? a->w.dim[0] % width : 0;
    if (last > 0 && a->w.dim[last] % width) return false;
    for (int o = 0; o < N; o++) {
        const int64_t *stride = a->w.stride[o];
        if (stride[last] == 0 && (may_splat >> o & 1)) {
            splat |= 1u << o;
            continue;
        }
        if (stride[last] != 1 || (uintptr_t)a->p[o] % (uintptr_t)(a->bytes[o] * width)) return false;
        for (int i = 0; i < last; i++)
            if (stride[i] % width) return false;
    }
    a->splat = splat;
    a->w.dim[last] /= width;
    a->w.total = last == 0 ? a->w.dim[0] : a->w.total / width;
    for (int o = 0; o < N; o++) a->w.stride[o][last] *= width;
    return true;
}

/* The last `rest` elements of operands of a single dim. */
template <int N> static inline void keep_rest(operands<N> *a, int64_t rest) {
    int64_t skip = a->w.dim[0] - rest;
    for (int o = 0; o < N; o++) a->p[o] += skip * a->w.stride[o][0] * a->bytes[o];
    a->first += skip;
    a->w.dim[0] = a->w.total = rest;
}

template <int N> static inline bool fits_span(const operands<N> *a) {
    const int64_t most = INT32_MAX;
    if (a->w.total > most) return false;
    for (int o = 0; o < N; o++) {
        int64_t reach = 0;
        for (int i = 0; i < a->w.ndim; i++) reach += (a->w.dim[i] - 1) * a->w.stride[o][i];
        if (reach > most / a->bytes[o]) return false;
    }
    return true;
}

template <int N> static inline span<N> make_span(const operands<N> *a) {
    span<N> s;
    s.total = (uint32_t)a->w.total;
    s.ndim = a->w.ndim;
    s.splat = a->splat;
    s.first = a->first;
    for (int i = 0; i < s.ndim; i++) { /* e / dim = (high(e * magic) + e) >> shift for e below 2^31 */
        uint64_t d = (uint64_t)a->w.dim[i];
        int shift = 0;
        while (((uint64_t)1 << shift) < d) shift++;
        s.dim[i] = (uint32_t)d;
        s.shift[i] = shift;
        s.magic[i] = (uint32_t)(((((uint64_t)1 << shift) - d) << 32) / d + 1);
    }
    for (int o = 0; o < N; o++) {
        s.p[o] = a->p[o];
        for (int i = 0; i < s.ndim; i++) s.stride[o][i] = (int32_t)(a->w.stride[o][i] * a->bytes[o]);
    }
    return s;
}

/* launch(span) for all of it, in as few parts as 32 bits allow. */
template <int N, class F> static void each_span(const operands<N> &a, F launch) {
    if (a.w.total <= 0) return;
    if (fits_span(&a)) {
        launch(make_span(&a));
        return;
    }
    int d = 0;
    int64_t inner = 1;
    while (a.w.dim[d] == 1) d++;
    for (int i = d + 1; i < a.w.ndim; i++) inner *= a.w.dim[i];
    operands<N> part = a;
    int64_t half = a.w.dim[d] / 2;
    part.w.dim[d] = half;
    part.w.total = half * inner;
    each_span(part, launch);
    for (int o = 0; o < N; o++) part.p[o] += half * a.w.stride[o][d] * a.bytes[o];
    part.w.dim[d] = a.w.dim[d] - half;
    part.w.total = part.w.dim[d] * inner;
    part.first += half * inner;
    each_span(part, launch);
}

/* vectors(span) for what can be taken `width` elements at a time, elements(span) for the rest. */
template <int N, class V, class E>
static void each_vector(const operands<N> &a, int width, uint32_t may_splat, V vectors, E elements) {
    operands<N> v = a;
    int64_t rest;
    if (width < 2 || !make_vectors(&v, width, may_splat, &rest)) {
        each_span(a, elements);
        return;
    }
    each_span(v, vectors);
    if (!rest) return;
    operands<N> left = a;
    keep_rest(&left, rest);
    each_span(left, elements);
}

/* for (each item of the thread) */
#define LC_EACH(i, total)                                                                                              \
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, step_ = gridDim.x * blockDim.x; i < (total); i += step_)

/* ---- vectors ----------------------------------------------------------------------------------------------------- */
template <int BYTES> struct raw_of;
template <> struct raw_of<16> { typedef uint4 type; };
template <> struct raw_of<8> { typedef uint2 type; };
template <> struct raw_of<4> { typedef uint32_t type; };
template <> struct raw_of<2> { typedef uint16_t type; };
template <> struct raw_of<1> { typedef uint8_t type; };

template <class T> struct word_of; /* the elements of a word of four bytes */
template <> struct word_of<float> {
    static __device__ __forceinline__ void open(uint32_t w, float *x) { memcpy(x, &w, 4); }
    static __device__ __forceinline__ uint32_t close(float a, float) {
        uint32_t w;
        memcpy(&w, &a, 4);
        return w;
    }
};
template <> struct word_of<bf16> {
    static __device__ __forceinline__ void open(uint32_t w, float *x) {
        uint32_t low = w << 16, high = w & 0xffff0000u;
        memcpy(&x[0], &low, 4);
        memcpy(&x[1], &high, 4);
    }
    static __device__ __forceinline__ uint32_t close(float a, float b) {
        __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
        uint32_t w;
        memcpy(&w, &h, 4);
        return w;
    }
};
template <> struct word_of<f16> {
    static __device__ __forceinline__ void open(uint32_t w, float *x) {
        __half2 h;
        memcpy(&h, &w, 4);
        float2 f = __half22float2(h);
        x[0] = f.x, x[1] = f.y;
    }
    static __device__ __forceinline__ uint32_t close(float a, float b) {
        __half2 h = __floats2half2_rn(a, b);
        uint32_t w;
        memcpy(&w, &h, 4);
        return w;
    }
};

/* V floats that lie as elements of T */
template <class T, int V> struct vector_of {
    typedef typename raw_of<sizeof(T) * V>::type raw;
    enum { words = sizeof(raw) / 4, each = 4 / sizeof(T) };
    static __device__ __forceinline__ raw get(const char *p) { return *(const raw *)p; }
    static __device__ __forceinline__ void open(const raw &r, float (&x)[V]) {
        uint32_t w[words];
        memcpy(w, &r, sizeof r);
#pragma unroll
        for (int i = 0; i < words; i++) word_of<T>::open(w[i], x + i * each);
    }
    static __device__ __forceinline__ void put(char *p, const float (&x)[V]) {
        uint32_t w[words];
#pragma unroll
        for (int i = 0; i < words; i++) w[i] = word_of<T>::close(x[i * each], x[i * each + each - 1]);
        raw r;
        memcpy(&r, w, sizeof r);
        *(raw *)p = r;
    }
};

#endif
