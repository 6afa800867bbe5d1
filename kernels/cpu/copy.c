/* copy.c: copies, conversions between dtypes, fills, and accumulation in place. Operands may have any strides and, but
 * for quantised input of `to`, any of the plain dtypes. Same-dtype pieces are moved by size alone, transposed ones tile
 * by tile. */
#include "convert.h"
#include "walk.h"

enum { TILE = 64 };

#define KERNEL(name)                                                                                                   \
    int K(name)(const lc_kargs *k);                                                                                    \
    int K(name)(const lc_kargs *k)

/* ---- strided copy with conversion -------------------------------------------------------------------------------- */

typedef struct copy_job {
    int from, to; /* dtypes */
    int64_t from_bytes, to_bytes;
} copy_job;

/* dst: operand 0, src: operand 1. */
static void copy_row(void *ctx, char *const *p, const int64_t *step, int64_t n, int64_t at) {
    const copy_job *j = (const copy_job *)ctx;
    (void)at;
    int in_piece = step[1] == j->from_bytes, out_piece = step[0] == j->to_bytes;
    if (in_piece && out_piece) {
        convert_row(j->from, p[1], j->to, p[0], n);
        return;
    }
    uint64_t in[WALK_BLOCK], out[WALK_BLOCK];
    for (int64_t i = 0; i < n; i += WALK_BLOCK) {
        int64_t m = LC_MIN(n - i, (int64_t)WALK_BLOCK);
        const void *src = walk_piece(p[1] + i * step[1], step[1], m, j->from_bytes, in);
        char *dst = p[0] + i * step[0];
        if (j->from == j->to) {
            walk_scatter(dst, step[0], src, m, j->to_bytes);
        } else {
            convert_row(j->from, src, j->to, out_piece ? (void *)dst : (void *)out, m);
            if (!out_piece) walk_scatter(dst, step[0], out, m, j->to_bytes);
        }
    }
}

/* Tiles of a copy whose source is in one piece along dim `across` and whose result is so along the last. */
typedef struct tile_job {
    copy_job copy;
    const walk *w;
    int across;
    int64_t tiles_across, tiles_last;
} tile_job;

static void transpose_tile(const void *src, int64_t step, int64_t rows, int64_t columns, int64_t bytes, void *out) {
    /* src [rows, columns] with rows `step` bytes apart -> out [columns, TILE] */
    for (int64_t r = 0; r < rows; r++)
        walk_scatter((char *)out + r * bytes, TILE * bytes, (const char *)src + r * step, columns, bytes);
}

static void copy_tiles(void *ctx, int64_t begin, int64_t end, int thread) {
    const tile_job *j = (const tile_job *)ctx;
    const walk *w = j->w;
    const copy_job *c = &j->copy;
    int last = w->ndim - 1, across = j->across;
    uint64_t tile[TILE * TILE];
    (void)thread;
    for (int64_t t = begin; t < end; t++) {
        int64_t l = t % j->tiles_last * TILE, a = t / j->tiles_last % j->tiles_across * TILE;
        int64_t rest = t / j->tiles_last / j->tiles_across;
        char *dst = w->base[0] + l * w->step[0][last] + a * w->step[0][across];
        const char *src = w->base[1] + l * w->step[1][last] + a * w->step[1][across];
        for (int i = last - 1; i >= 0; i--) {
            if (i == across) continue;
            dst += rest % w->dim[i] * w->step[0][i];
            src += rest % w->dim[i] * w->step[1][i];
            rest /= w->dim[i];
        }
        int64_t rows = LC_MIN(w->dim[last] - l, (int64_t)TILE), columns = LC_MIN(w->dim[across] - a, (int64_t)TILE);
        transpose_tile(src, w->step[1][last], rows, columns, c->from_bytes, tile);
        for (int64_t i = 0; i < columns; i++)
            convert_row(c->from, (char *)tile + i * TILE * c->from_bytes, c->to, dst + i * w->step[0][across], rows);
    }
}

/* Finds the dim along which the source is in one piece, if a tiled copy pays. */
static int find_across(const walk *w, const copy_job *c) {
    int last = w->ndim - 1;
    if (w->step[0][last] != c->to_bytes || w->step[1][last] == c->from_bytes || w->dim[last] < 8) return -1;
    for (int i = 0; i < last; i++)
        if (w->step[1][i] == c->from_bytes && w->dim[i] >= 8) return i;
    return -1;
}

static int copy_view(const lc_kargs *k, const lc_view *dst, const lc_view *src) {
    int64_t total = view_numel(dst);
    if (total == 0) return LC_K_OK;
    if (lc_dtype_is_quant(dst->dtype) || lc_dtype_is_quant(src->dtype)) return LC_K_UNSUPPORTED;
    copy_job c = {src->dtype, dst->dtype, view_bytes(src), view_bytes(dst)};
    if (total <= WALK_SERIAL && view_contiguous(dst) && view_contiguous(src)) {
        convert_row(c.from, src->data, c.to, dst->data, total);
        return LC_K_OK;
    }
    const lc_view *v[2] = {dst, src};
    walk w;
    walk_make(&w, 2, v, 1);
    int across = find_across(&w, &c);
    if (across >= 0) {
        tile_job j = {c, &w, across, (w.dim[across] + TILE - 1) / TILE, (w.dim[w.ndim - 1] + TILE - 1) / TILE};
        int64_t tiles = total / (w.dim[across] * w.dim[w.ndim - 1]) * j.tiles_across * j.tiles_last;
        if (total <= WALK_SERIAL)
            copy_tiles(&j, 0, tiles, 0);
        else
            k->host->parallel(tiles, LC_MAX(1, WALK_SERIAL / (TILE * TILE)), copy_tiles, &j);
        return LC_K_OK;
    }
    walk_lengthen(&w);
    walk_all(k, &w, copy_row, &c);
    return LC_K_OK;
}

/* Blocks are moved or read out as they lie. */
typedef struct block_job {
    const lc_view *from;
    const lc_view *to;
} block_job;

static void dequantise_part(void *ctx, int64_t begin, int64_t end, int thread) {
    const block_job *j = (const block_job *)ctx;
    const lc_dtype_trait *t = lc_dtype_traits(j->from->dtype);
    (void)thread;
    convert_row(j->from->dtype, (const char *)j->from->data + begin * t->bytes, j->to->dtype,
                (char *)j->to->data + begin * t->block * view_bytes(j->to), (end - begin) * t->block);
}

static int copy_quantised(const lc_kargs *k, const lc_view *dst, const lc_view *src) {
    const lc_dtype_trait *t = lc_dtype_traits(src->dtype);
    int64_t n = view_numel(src);
    if (!view_contiguous(src) || !view_contiguous(dst) || n % t->block) return LC_K_UNSUPPORTED;
    if (dst->dtype != src->dtype && !lc_dtype_is_float(dst->dtype)) return LC_K_UNSUPPORTED;
    block_job j = {src, dst};
    if (dst->dtype == src->dtype)
        memcpy(dst->data, src->data, (size_t)(n / t->block * t->bytes));
    else if (n > 0)
        k->host->parallel(n / t->block, 4096 / t->block, dequantise_part, &j);
    return LC_K_OK;
}

/* x -> y, same shape. Also `to`, which converts. */
static int copy_any(const lc_kargs *k, const lc_view *dst, const lc_view *src) {
    return lc_dtype_is_quant(src->dtype) ? copy_quantised(k, dst, src) : copy_view(k, dst, src);
}
KERNEL(clone) { return copy_any(k, &k->y[0], &k->x[0]); }
KERNEL(to) { return copy_any(k, &k->y[0], &k->x[0]); }
KERNEL(copy_) { return copy_any(k, &k->x[0], &k->x[1]); }

/* list of tensors -> y, joined along dim i[0] */
KERNEL(cat) {
    int dim = k->i[0];
    int64_t at = 0;
    for (int n = 0; n < k->n_list; n++) {
        lc_view part = k->y[0];
        if (k->list[n].dim[dim] == 0) continue;
        part.dim[dim] = k->list[n].dim[dim];
        part.data = (char *)part.data + at * part.stride[dim] * view_bytes(&part);
        int status = copy_view(k, &part, &k->list[n]);
        if (status != LC_K_OK) return status;
        at += k->list[n].dim[dim];
    }
    return LC_K_OK;
}

/* ---- fills ------------------------------------------------------------------------------------------------------- */

typedef struct fill_job {
    int dtype;
    int64_t bytes, columns;
    double start, step;
    uint64_t value;
} fill_job;

static void fill_row(void *ctx, char *const *p, const int64_t *step, int64_t n, int64_t at) {
    const fill_job *j = (const fill_job *)ctx;
    (void)at;
    if (j->value == 0 && step[0] == j->bytes) {
        memset(p[0], 0, (size_t)(n * j->bytes));
        return;
    }
    uint64_t values[WALK_BLOCK];
    int64_t block = LC_MIN(n, (int64_t)WALK_BLOCK);
    walk_gather(values, &j->value, 0, block, j->bytes);
    for (int64_t i = 0; i < n; i += block)
        walk_scatter(p[0] + i * step[0], step[0], values, LC_MIN(block, n - i), j->bytes);
}

static int fill_with(const lc_kargs *k, int ordered, walk_fn row, fill_job *j) {
    const lc_view *v[1] = {&k->x[0]};
    if (lc_dtype_is_quant(v[0]->dtype)) return LC_K_UNSUPPORTED;
    j->dtype = v[0]->dtype;
    j->bytes = view_bytes(v[0]);
    convert_row(LC_K_F64, &j->start, j->dtype, &j->value, 1);
    walk w;
    walk_make(&w, 1, v, ordered);
    walk_all(k, &w, row, j);
    return LC_K_OK;
}

KERNEL(fill_) {
    fill_job j = {.start = k->f[0]};
    return fill_with(k, 0, fill_row, &j);
}

static void arange_row(void *ctx, char *const *p, const int64_t *step, int64_t n, int64_t at) {
    const fill_job *j = (const fill_job *)ctx;
    double values[WALK_BLOCK];
    uint64_t out[WALK_BLOCK];
    for (int64_t i = 0; i < n; i += WALK_BLOCK) {
        int64_t m = LC_MIN(n - i, (int64_t)WALK_BLOCK);
        for (int64_t e = 0; e < m; e++) values[e] = j->start + (double)(at + i + e) * j->step;
        convert_row(LC_K_F64, values, j->dtype, out, m);
        walk_scatter(p[0] + i * step[0], step[0], out, m, j->bytes);
    }
}

KERNEL(arange_) {
    fill_job j = {.start = k->f[0], .step = k->f[1]};
    return fill_with(k, 1, arange_row, &j);
}

/* x [.., rows, columns]: zeros, then ones down the diagonal */
KERNEL(eye_) {
    fill_job j = {.start = 0};
    int status = fill_with(k, 0, fill_row, &j), d = k->x[0].ndim;
    if (status != LC_K_OK || d < 2 || view_numel(&k->x[0]) == 0) return status;
    lc_kargs diagonal = *k;
    lc_view *v = &diagonal.x[0];
    v->dim[d - 2] = LC_MIN(v->dim[d - 2], v->dim[d - 1]);
    v->stride[d - 2] += v->stride[d - 1];
    v->ndim = d - 1;
    j.start = 1;
    return fill_with(&diagonal, 0, fill_row, &j);
}

/* x [.., rows, columns] -> y: 0 where column > row + i[0] */
KERNEL(tril) {
    int status = copy_view(k, &k->y[0], &k->x[0]), d = k->y[0].ndim;
    if (status != LC_K_OK || view_numel(&k->y[0]) == 0) return status;
    fill_job j = {.start = 0};
    int64_t rows = k->y[0].dim[d - 2], columns = k->y[0].dim[d - 1];
    lc_kargs rest = *k;
    rest.x[0] = k->y[0];
    lc_view *v = &rest.x[0];
    v->dim[d - 2] = 1;
    for (int64_t r = 0; r < rows; r++) {
        int64_t keep = LC_MAX(0, LC_MIN(columns, r + k->i[0] + 1));
        v->dim[d - 1] = columns - keep;
        v->data = (char *)k->y[0].data + (r * v->stride[d - 2] + keep * v->stride[d - 1]) * view_bytes(v);
        if (keep < columns) status = fill_with(&rest, 0, fill_row, &j);
    }
    return status;
}

/* ---- accumulation in place --------------------------------------------------------------------------------------- */

typedef struct add_job {
    int to, from;
    int64_t to_bytes, from_bytes;
    double scale;
} add_job;

static void add_real_row(real *restrict x, const real *restrict from, real scale, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] += scale * from[i];
}

/* x (operand 0) += scale * from (operand 1), in real, or in double where one of them is f64 */
static void add_row(void *ctx, char *const *p, const int64_t *step, int64_t n, int64_t at) {
    const add_job *j = (const add_job *)ctx;
    (void)at;
    if (j->to == LC_K_REAL && j->from == LC_K_REAL && step[0] == j->to_bytes && step[1] == j->from_bytes &&
        p[0] != p[1]) {
        add_real_row((real *)p[0], (const real *)p[1], (real)j->scale, n);
        return;
    }
    int wide = LC_DOUBLE || j->to == LC_K_F64 || j->from == LC_K_F64;
    uint64_t raw_x[WALK_BLOCK], raw_from[WALK_BLOCK];
    union {
        float f[WALK_BLOCK];
        double d[WALK_BLOCK];
    } x, from;
    for (int64_t i = 0; i < n; i += WALK_BLOCK) {
        int64_t m = LC_MIN(n - i, (int64_t)WALK_BLOCK);
        char *place = p[0] + i * step[0];
        int direct = step[0] == j->to_bytes;
        void *to = direct ? (void *)place : (void *)raw_x;
        const void *old = walk_piece(place, step[0], m, j->to_bytes, raw_x);
        const void *more = walk_piece(p[1] + i * step[1], step[1], m, j->from_bytes, raw_from);
        if (wide) {
            row_to_f64(j->to, old, x.d, m);
            row_to_f64(j->from, more, from.d, m);
            for (int64_t e = 0; e < m; e++) x.d[e] += j->scale * from.d[e];
            row_from_f64(j->to, x.d, to, m);
        } else {
            float scale = (float)j->scale;
            row_to_f32(j->to, old, x.f, m);
            row_to_f32(j->from, more, from.f, m);
            for (int64_t e = 0; e < m; e++) x.f[e] += scale * from.f[e];
            row_from_f32(j->to, x.f, to, m);
        }
        if (!direct) walk_scatter(place, step[0], raw_x, m, j->to_bytes);
    }
}

/* x[0] += f[0] * x[1] */
KERNEL(add_) {
    const lc_view *v[2] = {&k->x[0], &k->x[1]};
    if (!lc_dtype_is_float(v[0]->dtype) || lc_dtype_is_quant(v[1]->dtype)) return LC_K_UNSUPPORTED;
    add_job j = {v[0]->dtype, v[1]->dtype, view_bytes(v[0]), view_bytes(v[1]), k->f[0]};
    walk w;
    walk_make(&w, 2, v, 0);
    walk_all(k, &w, add_row, &j);
    return LC_K_OK;
}

static void scale_row(void *ctx, char *const *p, const int64_t *step, int64_t n, int64_t at) {
    const add_job *j = (const add_job *)ctx;
    real scale = (real)j->scale, values[WALK_BLOCK];
    uint64_t raw[WALK_BLOCK];
    (void)at;
    if (j->to == LC_K_REAL && step[0] == j->to_bytes) {
        for (int64_t i = 0; i < n; i++) ((real *)p[0])[i] *= scale;
        return;
    }
    for (int64_t i = 0; i < n; i += WALK_BLOCK) {
        int64_t m = LC_MIN(n - i, (int64_t)WALK_BLOCK);
        char *to = p[0] + i * step[0];
        walk_gather(raw, to, step[0], m, j->to_bytes);
        row_to_real(j->to, raw, values, m);
        for (int64_t e = 0; e < m; e++) values[e] *= scale;
        row_from_real(j->to, values, raw, m);
        walk_scatter(to, step[0], raw, m, j->to_bytes);
    }
}

/* x[0] *= f[0], or the scalar x[1] */
KERNEL(scale_) {
    const lc_view *v[1] = {&k->x[0]};
    if (!lc_dtype_is_float(v[0]->dtype)) return LC_K_UNSUPPORTED;
    add_job j = {.to = v[0]->dtype, .to_bytes = view_bytes(v[0]), .scale = scalar_or(&k->x[1], k->f[0])};
    walk w;
    walk_make(&w, 1, v, 0);
    walk_all(k, &w, scale_row, &j);
    return LC_K_OK;
}

/* x_i += from_i, all contiguous */
KERNEL(add_pairs_) {
    for (int i = 0; i < 6; i += 2) {
        if (!k->x[i].data) continue;
        if (k->x[i].dtype != LC_K_REAL || k->x[i + 1].dtype != LC_K_REAL) return LC_K_UNSUPPORTED;
        add_real_row(k->x[i].data, k->x[i + 1].data, 1, view_numel(&k->x[i]));
    }
    return LC_K_OK;
}
