/* test_kernels_basic.c: the CPU kernels of pointwise, copy, random and optimizer rows. Checks what a generated whole-op
 * test would miss: the random stream's known answers, every half, accuracy of the elementary functions, odd strides and
 * lengths, independence of the number of parts. */
#include "kernel_harness.h"

/* ---- random stream ----------------------------------------------------------------------------------------------- */

/* Known answers of the authors' Random123. */
static void test_philox(void **state) {
    (void)state;
    uint32_t a[4] = {0}, b[4] = {~0u, ~0u, ~0u, ~0u}, c[4] = {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344};
    const uint32_t ra[4] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
    const uint32_t rb[4] = {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd};
    const uint32_t rc[4] = {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1};
    lc_philox_rounds(a, 0, 0);
    lc_philox_rounds(b, ~0u, ~0u);
    lc_philox_rounds(c, 0xa4093822, 0x299f31d0);
    assert_memory_equal(a, ra, 16);
    assert_memory_equal(b, rb, 16);
    assert_memory_equal(c, rc, 16);
}

static void test_random_fills(void **state) {
    (void)state;
    enum { N = 100003 };
    lc_view first[2] = {{0}, {0}};
    double parameters[2][2] = {{-1, 3}, {2, 0.5}};
    EACH_VARIANT(v) {
        for (int normal = 0; normal < 2; normal++) {
            lc_kargs k = new_call();
            lc_view x = view_new(real_of(v), DIMS(N));
            k.f = parameters[normal];
            k.seed = 42;
            k.offset = 0xfffffff0u;
            k.x[0] = x;
            host_parts = v->is_double ? 1 : 5;
            assert_int_equal(call(v, normal ? LC_OP_normal_ : LC_OP_uniform_, &k), LC_K_OK);
            double mean = 0, variance = 0;
            for (int i = 0; i < N; i++) mean += get(&x, i) / N;
            for (int i = 0; i < N; i++) variance += pow(get(&x, i) - mean, 2) / N;
            assert_true(fabs(mean - (normal ? 2 : 1)) < 0.01);
            assert_true(fabs(variance - (normal ? 0.25 : 16. / 12)) < 0.01);
            for (int i = 0; i < N && !normal; i++) assert_true(get(&x, i) >= -1 && get(&x, i) < 3);
            if (first[normal].data) {
                same(&x, &first[normal], 1e-6);
                free(x.data);
            } else {
                first[normal] = x;
            }
            /* an offset of c counters is a shift by 4 c elements; strides do not matter */
            lc_view part = view_new(real_of(v), DIMS(7, 5));
            k.x[0] = swap(part, 0, 1);
            k.offset += 3;
            assert_int_equal(call(v, normal ? LC_OP_normal_ : LC_OP_uniform_, &k), LC_K_OK);
            for (int i = 0; i < 35; i++) assert_true(fabs(get(&k.x[0], i) - get(&first[normal], 12 + i)) < 1e-5);
            free(part.data);
        }
    }
    host_parts = 3;
    free(first[0].data);
    free(first[1].data);
}

static void test_dropout(void **state) {
    (void)state;
    EACH_VARIANT(v) {
        lc_kargs k = new_call();
        double p[1] = {0.25};
        k.f = p;
        k.seed = 7;
        k.x[0] = view_noise(real_of(v), DIMS(10001));
        k.y[0] = view_new(real_of(v), DIMS(10001));
        k.y[1] = view_new(real_of(v), DIMS(10001));
        CALL(v, dropout, &k);
        int zeros = 0;
        for (int i = 0; i < 10001; i++) {
            double m = get(&k.y[1], i);
            zeros += m == 0;
            assert_true(m == 0 || fabs(m - 1 / 0.75) < 1e-6);
            assert_true(fabs(get(&k.y[0], i) - m * get(&k.x[0], i)) < 1e-6);
        }
        assert_in_range(zeros, 2350, 2650);
        p[0] = 1;
        CALL(v, dropout, &k);
        for (int i = 0; i < 10001; i++) assert_true(get(&k.y[0], i) == 0);
        free(k.x[0].data), free(k.y[0].data), free(k.y[1].data);
    }
}

/* ---- conversions ------------------------------------------------------------------------------------------------- */

static double half_value(unsigned h) { /* from the definition */
    int exponent = h >> 10 & 31, fraction = h & 1023;
    double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                  : exponent     ? ldexp(1024 + fraction, exponent - 25)
                                 : ldexp(fraction, -24);
    return h & 0x8000 ? -size : size;
}

static void test_halves(void **state) {
    (void)state;
    for (unsigned h = 0; h < 65536; h++) {
        double d = half_value(h);
        float f = f16_to_f32((uint16_t)h), b = bf16_to_f32((uint16_t)h);
        assert_true(d != d ? f != f : (double)f == d);
        if (f == f) assert_int_equal(f32_to_f16(f), h);
        if (b == b) assert_int_equal(f32_to_bf16(b), h);
        if (f != f) assert_true(f16_to_f32(f32_to_f16(f)) != f);
        if (b != b) assert_true(bf16_to_f32(f32_to_bf16(b)) != b);
        /* midway to the next half goes to the even one, a little less or more to the nearer */
        if ((h & 0x7fff) >= 0x7c00) continue;
        double next = (h & 0x7fff) == 0x7bff ? (h & 0x8000 ? -65536. : 65536.) : half_value(h + 1),
               middle = (d + next) / 2;
        assert_int_equal(f32_to_f16((float)middle), h & 1 ? h + 1 : h);
        assert_int_equal(f32_to_f16(nextafterf((float)middle, (float)d)), h);
        assert_int_equal(f32_to_f16(nextafterf((float)middle, (float)next)), h + 1);
        assert_int_equal(f64_to_f16(nextafter(middle, next)), h + 1);
        assert_int_equal(f64_to_f16(nextafter(middle, d)), h);
    }
    for (unsigned h = 0; h < 0x7f80; h++) {
        float d = bf16_to_f32((uint16_t)h), next = bf16_to_f32((uint16_t)(h + 1));
        double middle = ((double)d + (h == 0x7f7f ? 0x1p128 : (double)next)) / 2;
        assert_int_equal(f64_to_bf16(middle), h & 1 ? h + 1 : h);
        assert_int_equal(f64_to_bf16(nextafter(middle, INFINITY)), h + 1);
        assert_int_equal(f64_to_bf16(nextafter(middle, 0)), h);
        assert_int_equal(f64_to_bf16(-nextafter(middle, 0)), h | 0x8000);
    }
    assert_int_equal(f32_to_f16(1e30f), 0x7c00);
    assert_int_equal(f32_to_f16(-1e30f), 0xfc00);
}

/* Every variant's `to` over all halves agrees with the scalar functions, and so do the limits of integers. */
static void test_to(void **state) {
    (void)state;
    EACH_VARIANT(v) {
        for (int half = LC_K_BF16; half <= LC_K_F16; half++) {
            lc_kargs k = new_call();
            lc_view h = view_new(half, DIMS(65536)), f = view_new(LC_K_F32, DIMS(65536)),
                    back = view_new(half, DIMS(65536));
            for (int i = 0; i < 65536; i++) ((uint16_t *)h.data)[i] = (uint16_t)i;
            k.x[0] = h, k.y[0] = f;
            CALL(v, to, &k);
            k.x[0] = f, k.y[0] = back;
            CALL(v, to, &k);
            for (int i = 0; i < 65536; i++) {
                float x = ((float *)f.data)[i],
                      want = half == LC_K_F16 ? f16_to_f32((uint16_t)i) : bf16_to_f32((uint16_t)i);
                assert_true(x == want || (x != x && want != want));
                if (x == x) assert_int_equal(((uint16_t *)back.data)[i], i);
            }
            free(h.data), free(f.data), free(back.data);
        }
        float odd[6] = {NAN, INFINITY, -INFINITY, -1.5f, 254.9f, 3e9f};
        uint8_t bytes[6], want_bytes[6] = {0, 255, 0, 0, 254, 255};
        int32_t ints[6], want_ints[6] = {0, INT32_MAX, INT32_MIN, -1, 254, INT32_MAX};
        int64_t wide[6] = {-1, 300, 1ll << 40 | 5, 0, 7, INT64_MIN};
        int32_t narrow[6], want_narrow[6] = {-1, 300, 5, 0, 7, 0};
        lc_kargs k = new_call();
        k.x[0] = view(odd, LC_K_F32, DIMS(6)), k.y[0] = view(bytes, LC_K_U8, DIMS(6));
        CALL(v, to, &k);
        assert_memory_equal(bytes, want_bytes, 6);
        k.y[0] = view(ints, LC_K_I32, DIMS(6));
        CALL(v, to, &k);
        assert_memory_equal(ints, want_ints, 24);
        k.x[0] = view(wide, LC_K_I64, DIMS(6)), k.y[0] = view(narrow, LC_K_I32, DIMS(6));
        CALL(v, to, &k);
        assert_memory_equal(narrow, want_narrow, 24);
    }
}

/* Copies between all pairs of dtypes and layouts: transposed, reversed, stepped, small and large enough for tiles and
 * parts. */
static void test_copies(void **state) {
    (void)state;
    const int64_t shapes[][3] = {{1, 1, 1}, {2, 3, 5}, {3, 70, 45}, {40, 41, 33}, {5, 700, 2}, {0, 3, 4}};
    EACH_VARIANT(v) {
        for (int s = 0; s < 6; s++) {
            for (int pair = 0; pair < 49; pair++) {
                int from = pair / 7, to = pair % 7;
                if (s == 3 && from != to && pair % 5) continue;
                lc_view x = view_noise(from, 3, shapes[s]);
                for (int layout = 0; layout < 4; layout++) {
                    lc_view seen = layout == 3 ? x : swap(x, layout % 2, 2);
                    if (layout == 3) seen.dim[2] = (seen.dim[2] + 1) / 2, seen.stride[2] *= 2;
                    lc_view y = view_new(to, 3, seen.dim);
                    lc_kargs k = new_call();
                    k.x[0] = seen, k.y[0] = y;
                    CALL(v, to, &k);
                    for (int64_t e = 0; e < view_numel(&y); e++) {
                        double d = get(&seen, e), got;
                        row_from_f64(to, &d, &got, 1);
                        assert_memory_equal(&got, place(&y, e), (size_t)view_bytes(&y));
                    }
                    free(y.data);
                    if (layout == 2 && from == to) { /* back again, into the strided one */
                        lc_view z = view_new(from, 3, shapes[s]), again = swap(z, 0, 2);
                        k.x[0] = again, k.x[1] = seen;
                        CALL(v, copy_, &k);
                        assert_memory_equal(z.data, x.data, (size_t)(view_numel(&x) * view_bytes(&x)));
                        free(z.data);
                    }
                }
                free(x.data);
            }
        }
    }
}

static void test_fills(void **state) {
    (void)state;
    EACH_VARIANT(v) {
        for (int dtype = 0; dtype < 7; dtype++) {
            lc_view x = view_new(dtype, DIMS(3, 4, 6)), y = view_new(dtype, DIMS(3, 6, 4)), t = swap(x, 1, 2);
            lc_kargs k = new_call();
            double f[2] = {3, 1};
            int32_t i[1] = {-1};
            k.f = f, k.i = i, k.x[0] = t;
            CALL(v, arange_, &k);
            for (int e = 0; e < 72; e++) assert_true(get(&t, e) == 3 + e);
            k.y[0] = y;
            CALL(v, tril, &k);
            for (int e = 0; e < 72; e++) assert_true(get(&y, e) == (e % 4 <= e / 4 % 6 - 1 ? 3 + e : 0));
            CALL(v, eye_, &k);
            for (int e = 0; e < 72; e++) assert_true(get(&t, e) == (e % 4 == e / 4 % 6));
            f[0] = 2;
            CALL(v, fill_, &k);
            for (int e = 0; e < 72; e++) assert_true(get(&t, e) == 2);
            lc_view list[3] = {t, view_noise(dtype, DIMS(3, 1, 4)), t}, joined = view_new(dtype, DIMS(3, 13, 4));
            k.list = list, k.n_list = 3, k.y[0] = joined, i[0] = 1;
            CALL(v, cat, &k);
            for (int e = 0; e < 156; e++) {
                int row = e / 4 % 13;
                assert_true(get(&joined, e) == (row == 6 ? get(&list[1], e / 52 * 4 + e % 4) : 2));
            }
            free(x.data), free(y.data), free(list[1].data), free(joined.data);
        }
    }
}

static void test_accumulation(void **state) {
    (void)state;
    EACH_VARIANT(v) {
        for (int to = LC_K_F32; to <= LC_K_F64; to++) {
            for (int from = LC_K_F32; from <= LC_K_U8; from++) {
                lc_view x = view_noise(to, DIMS(30, 700)), x2 = view_noise(from, DIMS(700)),
                        before = view_new(LC_K_F64, DIMS(30, 700));
                lc_kargs k = new_call();
                double f[1] = {0.5};
                lc_view row = x2;
                row.ndim = 2, row.dim[0] = 30, row.dim[1] = 700, row.stride[0] = 0, row.stride[1] = 1;
                for (int e = 0; e < 21000; e++) put(&before, e, get(&x, e) + 0.5 * get(&row, e));
                k.f = f, k.x[0] = x, k.x[1] = row;
                CALL(v, add_, &k);
                same(&x, &before, to == LC_K_BF16 ? 4e-3 : to == LC_K_F16 ? 5e-4 : to == LC_K_F64 ? 1e-15 : 1e-6);
                free(x.data), free(x2.data), free(before.data);
            }
        }
        lc_kargs k = new_call();
        float factor = 4;
        lc_view x = view_noise(real_of(v), DIMS(6, 9)), copy = view_new(real_of(v), DIMS(6, 9));
        for (int e = 0; e < 54; e++) put(&copy, e, 4 * get(&x, e));
        k.x[0] = swap(x, 0, 1), k.x[1] = view(&factor, LC_K_F32, 0, NULL);
        CALL(v, scale_, &k);
        same(&x, &copy, 0);
        free(x.data), free(copy.data);
    }
}

/* ---- pointwise --------------------------------------------------------------------------------------------------- */

static double f_gelu(double x) { return x * 0.5 * erfc(-x * 0.70710678118654752440); }
static double f_silu(double x) { return x / (1 + exp(-x)); }
static double f_sigmoid(double x) { return 1 / (1 + exp(-x)); }
static double f_softplus(double x) { return x > 20 ? x : log1p(exp(x)); }
static double f_elu(double x) { return x > 0 ? x : expm1(x); }

/* Largest relative error over a range, in units of 2^-24 (half an ulp of a number a little above 1). */
static double worst(const variant *v, int op, double (*exact)(double), double from, double to) {
    enum { N = 40001 };
    lc_kargs k = new_call();
    double f[4] = {1, 20}, error = 0;
    k.f = f;
    k.x[0] = view_new(real_of(v), DIMS(N)), k.y[0] = view_new(real_of(v), DIMS(N));
    for (int i = 0; i < N; i++) put(&k.x[0], i, from + (to - from) * i / (N - 1));
    assert_int_equal(call(v, op, &k), LC_K_OK);
    for (int i = 0; i < N; i++) {
        double want = exact(get(&k.x[0], i)), got = get(&k.y[0], i);
        if (fabs(want) < 1.2e-38 && fabs(got) < 1.2e-38) continue;
        error = fmax(error, want == got ? 0 : fabs(got - want) / fabs(want));
    }
    free(k.x[0].data), free(k.y[0].data);
    return error * 0x1p24;
}

static void test_accuracy(void **state) {
    (void)state;
    const struct {
        int op;
        double (*exact)(double);
        double from, to, limit;
        const char *name;
    } rows[] = {
        {LC_OP_exp, exp, -87, 88.7, 3, "exp"},
        {LC_OP_exp, exp, -1e-3, 1e-3, 2, "exp near 0"},
        {LC_OP_log, log, 1e-30, 10, 3, "log"},
        {LC_OP_log, log, 0.9, 1.1, 3, "log near 1"},
        {LC_OP_log, log, 1e-44, 1e-38, 3, "log of denormals"},
        {LC_OP_tanh, tanh, -12, 12, 4, "tanh"},
        {LC_OP_tanh, tanh, -1e-4, 1e-4, 3, "tanh near 0"},
        {LC_OP_sigmoid, f_sigmoid, -80, 30, 5, "sigmoid"},
        {LC_OP_silu, f_silu, -80, 30, 6, "silu"},
        {LC_OP_gelu, f_gelu, -12.5, 12.5, 12, "gelu"},
        {LC_OP_gelu, f_gelu, -1e-3, 1e-3, 8, "gelu near 0"},
        {LC_OP_softplus, f_softplus, -80, 30, 6, "softplus"},
        {LC_OP_elu, f_elu, -20, 1, 4, "elu"},
        {LC_OP_elu, f_elu, -1e-3, 0, 3, "elu near 0"},
    };
    EACH_VARIANT(v) {
        for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
            double error = worst(v, rows[r].op, rows[r].exact, rows[r].from, rows[r].to);
            if (getenv("LOLCATS_TEST_VERBOSE"))
                printf("%-10s f%d %-18s %.3g\n", v->isa, v->is_double ? 64 : 32, rows[r].name, error);
            if (error > (v->is_double ? 1e-6 : rows[r].limit))
                fail_msg("%s on %s: error %g", rows[r].name, v->isa, error);
        }
    }
}

static void test_edges(void **state) {
    (void)state;
    const struct {
        int op;
        double x, y;
    } rows[] = {
        {LC_OP_exp, 1000, INFINITY},
        {LC_OP_exp, -1000, 0},
        {LC_OP_exp, -INFINITY, 0},
        {LC_OP_exp, NAN, NAN},
        {LC_OP_log, 0, -INFINITY},
        {LC_OP_log, -1, NAN},
        {LC_OP_log, INFINITY, INFINITY},
        {LC_OP_log, NAN, NAN},
        {LC_OP_tanh, 1e30, 1},
        {LC_OP_tanh, -INFINITY, -1},
        {LC_OP_tanh, NAN, NAN},
        {LC_OP_sigmoid, -1e30, 0},
        {LC_OP_sigmoid, INFINITY, 1},
        {LC_OP_relu, NAN, NAN},
        {LC_OP_relu, -3, 0},
        {LC_OP_gelu, 50, 50},
        {LC_OP_gelu, -50, 0},
        {LC_OP_gelu, NAN, NAN},
        {LC_OP_softplus, 1e9, 1e9},
        {LC_OP_softplus, -1e9, 0},
        {LC_OP_elu, -1e9, -1},
        {LC_OP_elu, 5, 5},
        {LC_OP_round, 2.5, 2},
        {LC_OP_round, -3.5, -4},
        {LC_OP_floor, -0.5, -1},
        {LC_OP_sign, -7, -1},
        {LC_OP_rsqrt, 4, 0.5},
    };
    EACH_VARIANT(v) {
        for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
            lc_kargs k = new_call();
            double f[4] = {1, 20};
            k.f = f;
            k.x[0] = view_new(real_of(v), DIMS(19)), k.y[0] = view_new(real_of(v), DIMS(19)); /* vectors and a rest */
            lc_view want = view_new(real_of(v), DIMS(19));
            for (int i = 0; i < 19; i++) put(&k.x[0], i, rows[r].x), put(&want, i, rows[r].y);
            assert_int_equal(call(v, rows[r].op, &k), LC_K_OK);
            same(&k.y[0], &want, 1e-30);
            free(k.x[0].data), free(k.y[0].data), free(want.data);
        }
    }
}

/* All gradients of the table's pointwise rows against central differences, in f64 and at the same points in f32. */
static void check_gradient(const variant *v, int op, int grad, int n_in, int which, const char *name) {
    enum { N = 12 };
    static const double points[N] = {-2.3, -1.1, -0.4, 0.3, 0.55, 1.1, 1.9, 2.6, 0.9, -0.8, 1.3, 3.4};
    const variant exact = {"generic", 1};
    double f[4] = {0.75, 2}, x[2][N], y[3][N], h = 1e-6, g[N], gx[N];
    for (int side = -1; side <= 1; side++) {
        lc_kargs k = new_call();
        for (int i = 0; i < N; i++) x[0][i] = points[i], x[1][i] = points[(i * 5 + 3) % N];
        for (int i = 0; i < N; i++) x[which][i] += side * h, g[i] = 0.5 + i;
        k.f = f, k.x[0] = view(x[0], LC_K_F64, DIMS(N)), k.x[1] = view(x[1], LC_K_F64, DIMS(N));
        k.y[0] = view(y[side + 1], LC_K_F64, DIMS(N));
        assert_int_equal(call(&exact, op, &k), LC_K_OK);
        for (int i = 0; i < N; i++) x[which][i] -= side * h;
    }
    double *data[5] = {g, x[0], n_in == 2 ? x[1] : y[1], y[1], gx};
    lc_kargs k = new_call();
    float narrow[5][N];
    k.f = f;
    for (int o = 0; o < 5; o++)
        for (int i = 0; i < N; i++) narrow[o][i] = (float)data[o][i];
    for (int o = 0; o < n_in + 2; o++)
        k.x[o] = view(v->is_double ? (void *)data[o] : (void *)narrow[o], real_of(v), DIMS(N));
    k.y[0] = view(v->is_double ? (void *)gx : (void *)narrow[4], real_of(v), DIMS(N));
    assert_int_equal(call(v, grad, &k), LC_K_OK);
    for (int i = 0; i < N; i++) {
        double want = g[i] * (y[2][i] - y[0][i]) / (2 * h), got = v->is_double ? gx[i] : (double)narrow[4][i];
        if (want == want && !(fabs(got - want) <= (v->is_double ? 1e-7 : 3e-5) * (1 + fabs(want))))
            fail_msg("%s on %s at %g, %g: %.9g, expected %.9g", name, v->isa, x[0][i], x[1][i], got, want);
    }
}

static void test_gradients(void **state) {
    (void)state;
    EACH_VARIANT(v) {
#define UNARY(name, sig, flags, doc) check_gradient(v, LC_OP_##name, LC_OP_##name##_grad, 1, 0, #name);
#define BINARY(name, sig, flags, doc)                                                                                  \
    check_gradient(v, LC_OP_##name, LC_OP_##name##_grad_a, 2, 0, #name " for a");                                      \
    check_gradient(v, LC_OP_##name, LC_OP_##name##_grad_b, 2, 1, #name " for b");
#include "../../runtime/ops.def"
    }
}

/* Broadcast, transposed and stepped operands against the plain twin, for a forward, a four-operand gradient and a
 * comparison. */
static void test_strides(void **state) {
    (void)state;
    EACH_VARIANT(v) {
        for (int c = 0; c < 9; c++) {
            int64_t n = c % 3 == 2 ? 1300 : 13;
            lc_view base = view_noise(real_of(v), DIMS(7, 11, n)), a = base, b = view_noise(real_of(v), DIMS(7, 11, n));
            if (c / 3 == 1) a = swap(view(base.data, base.dtype, DIMS(7, n, 11)), 1, 2);
            if (c % 3 == 0) b.stride[0] = b.stride[2] = 0;
            if (c % 3 == 1) b.stride[0] = b.stride[1] = 0;
            if (c / 3 == 2) a.dim[2] = b.dim[2] = n = (n + 1) / 2, a.stride[2] = 2;
            lc_kargs k = new_call();
            lc_view y[2] = {view_new(real_of(v), DIMS(7, 11, n)), view_new(real_of(v), DIMS(7, 11, n))};
            lc_view m[2] = {view_new(LC_K_U8, DIMS(7, 11, n)), view_new(LC_K_U8, DIMS(7, 11, n))};
            const int ops[] = {LC_OP_sub, LC_OP_swiglu_grad_a, LC_OP_lt, LC_OP_exp};
            for (int o = 0; o < 4; o++) {
                for (host_plain = 0; host_plain < 2; host_plain++) {
                    k.x[0] = a, k.x[1] = b, k.x[2] = a, k.x[3] = (lc_view){0};
                    k.y[0] = o == 2 ? m[host_plain] : y[host_plain];
                    assert_int_equal(call(v, ops[o], &k), LC_K_OK);
                }
                host_plain = 0;
                if (o == 2)
                    same(&m[0], &m[1], 0);
                else
                    same(&y[0], &y[1], 2e-7);
                if (o == 0)
                    for (int64_t e = 0; e < view_numel(&y[0]); e++)
                        assert_true(fabs(get(&y[0], e) - (get(&a, e) - get(&b, e))) < 1e-6);
            }
            free(base.data), free(b.data), free(y[0].data), free(y[1].data), free(m[0].data), free(m[1].data);
        }
        lc_kargs k = new_call();
        int64_t wide[3] = {1ll << 60, (1ll << 60) + 1, -5}, other[3] = {(1ll << 60) + 1, (1ll << 60) + 1, -6};
        uint8_t out[3], less[3] = {1, 0, 0}, equal[3] = {0, 1, 0};
        k.x[0] = view(wide, LC_K_I64, DIMS(3)), k.x[1] = view(other, LC_K_I64, DIMS(3)),
        k.y[0] = view(out, LC_K_U8, DIMS(3));
        CALL(v, lt, &k);
        assert_memory_equal(out, less, 3);
        CALL(v, eq, &k);
        assert_memory_equal(out, equal, 3);
    }
}

/* ---- optimizers -------------------------------------------------------------------------------------------------- */

/* Two steps by hand: lr 0.1, beta 0.9 and 0.99, eps 1e-8, decay 0.5; p = 1, gradients 2 and -1. */
static void test_adamw(void **state) {
    (void)state;
    EACH_VARIANT(v) {
        for (int decoupled = 0; decoupled < 2; decoupled++) {
            double p = 1, m = 0, s = 0, gradient[2] = {2, -1}, tolerance = v->is_double ? 1e-14 : 1e-6;
            double f[5] = {123, 0.9, 0.99, 1e-8, 0.5};
            int32_t i[2] = {99, decoupled};
            double lr = 0.1;
            int32_t step = 0;
            lc_kargs k = new_call();
            k.f = f, k.i = i;
            for (int x = 0; x < 4; x++) k.x[x] = view_new(real_of(v), DIMS(37));
            k.x[4] = view(&lr, LC_K_F64, 0, NULL), k.x[5] = view(&step, LC_K_I32, 0, NULL);
            for (int e = 0; e < 37; e++) put(&k.x[0], e, 1);
            for (step = 1; step <= 2; step++) {
                double g = gradient[step - 1] + (decoupled ? 0 : 0.5 * p);
                if (decoupled) p *= 1 - 0.1 * 0.5;
                m = 0.9 * m + 0.1 * g;
                s = 0.99 * s + 0.01 * g * g;
                p -= 0.1 * (m / (1 - pow(0.9, step))) / (sqrt(s / (1 - pow(0.99, step))) + 1e-8);
                for (int e = 0; e < 37; e++) put(&k.x[1], e, gradient[step - 1]);
                CALL(v, adamw_, &k);
                for (int e = 0; e < 37; e++) {
                    assert_true(fabs(get(&k.x[0], e) - p) <= tolerance);
                    assert_true(fabs(get(&k.x[2], e) - m) <= tolerance && fabs(get(&k.x[3], e) - s) <= tolerance);
                }
            }
            if (decoupled && v->is_double) assert_true(fabs(p - 0.780830057736142) < 1e-14);
            for (int x = 0; x < 4; x++) free(k.x[x].data);
        }
    }
}

static void test_sgd(void **state) {
    (void)state;
    EACH_VARIANT(v) {
        for (int c = 0; c < 3; c++) { /* plain, momentum with dampening, Nesterov */
            double f[4] = {0.1, c ? 0.9 : 0, c == 1 ? 0.5 : 0, 0.01}, p = 1, b = 0;
            int32_t i[2] = {0, c == 2};
            lc_kargs k = new_call();
            k.f = f, k.i = i;
            for (int x = 0; x < 3; x++) k.x[x] = view_new(real_of(v), DIMS(21));
            for (int e = 0; e < 21; e++) put(&k.x[0], e, 1), put(&k.x[1], e, 2), put(&k.x[2], e, 55);
            for (i[0] = 1; i[0] <= 3; i[0]++) {
                double g = 2 + 0.01 * p;
                b = i[0] == 1 ? g : f[1] * b + (1 - f[2]) * g;
                p -= 0.1 * (c == 0 ? g : c == 1 ? b : g + 0.9 * b);
                CALL(v, sgd_, &k);
                for (int e = 0; e < 21; e++) assert_true(fabs(get(&k.x[0], e) - p) <= (v->is_double ? 1e-14 : 1e-6));
            }
            for (int x = 0; x < 3; x++) free(k.x[x].data);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_philox), cmocka_unit_test(test_random_fills), cmocka_unit_test(test_dropout),
        cmocka_unit_test(test_halves), cmocka_unit_test(test_to),           cmocka_unit_test(test_copies),
        cmocka_unit_test(test_fills),  cmocka_unit_test(test_accumulation), cmocka_unit_test(test_accuracy),
        cmocka_unit_test(test_edges),  cmocka_unit_test(test_gradients),    cmocka_unit_test(test_strides),
        cmocka_unit_test(test_adamw),  cmocka_unit_test(test_sgd),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
