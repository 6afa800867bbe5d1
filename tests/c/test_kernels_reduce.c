/* test_kernels_reduce.c: the CPU kernels of reduction and index rows: sums of millions of terms, every set of dims in
 * several layouts, ties and NaN, faults; and the choice of a variant. */
#include "kernel_harness.h"

/* ---- reductions -------------------------------------------------------------------------------------------------- */

static void test_sum_accuracy(void **state) {
    (void)state;
    enum { N = 3000017 };
    EACH_VARIANT(v) {
        lc_kargs k = new_call();
        long double exact = 0, squares = 0;
        double first = 0;
        k.x[0] = view_new(real_of(v), DIMS(N)), k.y[0] = view_new(real_of(v), DIMS(1));
        for (int i = 0; i < N; i++)
            put(&k.x[0], i, 0.1 + 1e-3 * (i % 7)), exact += get(&k.x[0], i), squares += pow(get(&k.x[0], i), 2);
        for (host_parts = 1; host_parts <= 7; host_parts += 3) {
            CALL(v, sum, &k);
            assert_true(fabs((double)(get(&k.y[0], 0) / exact - 1)) < (v->is_double ? 1e-13 : 1.2e-7));
            if (host_parts > 1) assert_true(get(&k.y[0], 0) == first);
            first = get(&k.y[0], 0);
        }
        host_parts = 3;
        lc_view list[2] = {k.x[0], k.x[0]};
        k.list = list, k.n_list = 2;
        k.y[0].ndim = 0;
        CALL(v, sum_squares, &k);
        assert_true(fabs((double)(get(&k.y[0], 0) / (2 * squares) - 1)) < (v->is_double ? 1e-12 : 1e-7));
        put(&k.x[0], 5, NAN), put(&k.x[0], N - 1, -INFINITY), put(&k.x[0], N / 2, INFINITY);
        CALL(v, count_nonfinite, &k);
        assert_true(get(&k.y[0], 0) == 3);
        /* columns: a long sum for each */
        put(&k.x[0], 5, 0), put(&k.x[0], N - 1, 0), put(&k.x[0], N / 2, 0);
        int32_t dims[8] = {1, 0};
        k.i = dims;
        k.x[0] = view(k.x[0].data, k.x[0].dtype, DIMS(N / 16, 16));
        lc_view y = view_new(real_of(v), DIMS(1, 16));
        free(k.y[0].data);
        k.y[0] = y;
        CALL(v, sum, &k);
        for (int c = 0; c < 16; c++) {
            exact = 0;
            for (int i = 0; i < N / 16; i++) exact += get(&k.x[0], (int64_t)i * 16 + c);
            assert_true(fabs((double)(get(&y, c) / exact - 1)) < (v->is_double ? 1e-13 : 2e-7));
        }
        free(k.x[0].data), free(y.data);
    }
}

/* All sets of dims of a 4-dim tensor, in three layouts, against loops in double. */
static void test_reductions(void **state) {
    (void)state;
    EACH_VARIANT(v) {
        lc_view base = view_noise(real_of(v), DIMS(3, 5, 9, 37));
        put(&base, 77, NAN);
        for (int layout = 0; layout < 3; layout++) {
            lc_view x = layout == 0 ? base : layout == 1 ? swap(base, 1, 3) : swap(base, 0, 2);
            for (int set = 1; set < 16; set++) {
                int32_t dims[8] = {0};
                int64_t kept[4];
                for (int d = 0; d < 4; d++) {
                    kept[d] = set >> d & 1 ? 1 : x.dim[d];
                    if (set >> d & 1) dims[++dims[0]] = d;
                }
                for (int op = 0; op < 4; op++) {
                    lc_kargs k = new_call();
                    lc_view y = view_new(real_of(v), 4, kept), want = view_new(LC_K_F64, 4, kept);
                    double count = (double)view_numel(&x) / (double)view_numel(&y);
                    for (int64_t e = 0; e < view_numel(&want); e++)
                        put(&want, e, op == 2 ? -INFINITY : op == 3 ? INFINITY : 0);
                    for (int64_t e = 0; e < view_numel(&x); e++) {
                        int64_t rest = e, to = 0, step = 1;
                        for (int d = 3; d >= 0; d--) {
                            to += (set >> d & 1 ? 0 : rest % x.dim[d]) * step;
                            step *= kept[d];
                            rest /= x.dim[d];
                        }
                        double d = get(&x, e), old = get(&want, to);
                        if (op < 2)
                            put(&want, to, old + (op ? d / count : d));
                        else if (d != d || old != old)
                            put(&want, to, NAN);
                        else
                            put(&want, to, op == 2 ? fmax(old, d) : fmin(old, d));
                    }
                    k.x[0] = x, k.y[0] = y, k.i = dims;
                    assert_int_equal(call(v, (int[]){LC_OP_sum, LC_OP_mean, LC_OP_amax, LC_OP_amin}[op], &k), LC_K_OK);
                    same(&y, &want, 1e-5);
                    free(y.data), free(want.data);
                }
            }
        }
        free(base.data);
        lc_kargs k = new_call();
        lc_view ints = view_noise(LC_K_I32, DIMS(50, 60)), y = view_new(real_of(v), DIMS(1, 1));
        double total = 0;
        for (int e = 0; e < 3000; e++) total += get(&ints, e);
        k.x[0] = ints, k.y[0] = y;
        CALL(v, sum, &k);
        assert_true(get(&y, 0) == total);
        free(ints.data), free(y.data);
    }
}

/* Softmax and its relatives along each dim, their gradient by the definition. */
static void test_softmax(void **state) {
    (void)state;
    EACH_VARIANT(v) {
        double tolerance = v->is_double ? 1e-12 : 2e-6;
        for (int dim = 0; dim < 3; dim++) {
            const int64_t shape[3] = {4, 67, 83};
            int64_t reduced[3] = {4, 67, 83}, n = shape[dim], inner = dim == 2 ? 1 : dim == 1 ? 83 : 67 * 83;
            reduced[dim] = 1;
            int32_t i[2] = {dim, 0};
            lc_kargs k = new_call();
            k.i = i;
            lc_view x = view_noise(real_of(v), 3, shape), g = view_noise(real_of(v), 3, shape),
                    y = view_new(real_of(v), 3, shape);
            lc_view ly = view_new(real_of(v), 3, shape), gx = view_new(real_of(v), 3, shape),
                    lgx = view_new(real_of(v), 3, shape);
            lc_view lse = view_new(real_of(v), 3, reduced), best = view_new(LC_K_I32, 3, reduced),
                    cs = view_new(real_of(v), 3, shape);
            put(&x, 11, -INFINITY);
            k.x[0] = x;
            k.y[0] = y, assert_int_equal(call(v, LC_OP_softmax, &k), LC_K_OK);
            k.y[0] = ly, assert_int_equal(call(v, LC_OP_log_softmax, &k), LC_K_OK);
            k.y[0] = lse, assert_int_equal(call(v, LC_OP_logsumexp, &k), LC_K_OK);
            k.y[0] = best, assert_int_equal(call(v, LC_OP_argmax, &k), LC_K_OK);
            k.y[0] = cs, assert_int_equal(call(v, LC_OP_cumsum, &k), LC_K_OK);
            k.x[0] = g, k.x[1] = y, k.y[0] = gx;
            CALL(v, softmax_backward, &k);
            i[1] = 1, k.x[1] = ly, k.y[0] = lgx;
            CALL(v, softmax_backward, &k);
            for (int64_t r = 0; r < view_numel(&lse); r++) {
                int64_t at = r / inner * n * inner + r % inner, top = 0;
                double s = 0, dot = 0, sum_g = 0, run = 0;
                for (int64_t e = 0; e < n; e++) s += exp(get(&x, at + e * inner)), sum_g += get(&g, at + e * inner);
                for (int64_t e = 0; e < n; e++) dot += get(&g, at + e * inner) * exp(get(&x, at + e * inner)) / s;
                for (int64_t e = 0; e < n; e++) {
                    double xe = get(&x, at + e * inner), p = exp(xe) / s, ge = get(&g, at + e * inner);
                    if (xe > get(&x, at + top * inner)) top = e;
                    assert_true(fabs(get(&y, at + e * inner) - p) <= tolerance * p);
                    assert_true(xe == -INFINITY || fabs(get(&ly, at + e * inner) - log(p)) <= tolerance);
                    assert_true(fabs(get(&gx, at + e * inner) - p * (ge - dot)) <= tolerance);
                    assert_true(fabs(get(&lgx, at + e * inner) - (ge - p * sum_g)) <= tolerance);
                    run += xe;
                    assert_true(run == get(&cs, at + e * inner) ||
                                fabs(get(&cs, at + e * inner) - run) <= tolerance * 10);
                }
                assert_true(fabs(get(&lse, r) - log(s)) <= tolerance);
                assert_true(get(&best, r) == top);
            }
            free(x.data), free(g.data), free(y.data), free(ly.data), free(gx.data), free(lgx.data), free(lse.data),
                free(best.data);
            free(cs.data);
        }
    }
}

static void test_arg_ties(void **state) {
    (void)state;
    EACH_VARIANT(v) {
        lc_kargs k = new_call();
        lc_view x = view_new(real_of(v), DIMS(3000)), y = view_new(LC_K_I32, DIMS(1));
        k.x[0] = x, k.y[0] = y;
        CALL(v, argmax, &k);
        assert_true(get(&y, 0) == 0);
        put(&x, 1500, 2), put(&x, 2500, 2), put(&x, 700, -1), put(&x, 2999, -1);
        CALL(v, argmax, &k);
        assert_true(get(&y, 0) == 1500);
        CALL(v, argmin, &k);
        assert_true(get(&y, 0) == 700);
        put(&x, 2600, NAN), put(&x, 2601, NAN);
        CALL(v, argmax, &k);
        assert_true(get(&y, 0) == 2600);
        CALL(v, argmin, &k);
        assert_true(get(&y, 0) == 2600);
        free(x.data), free(y.data);
    }
}

/* ---- indices ----------------------------------------------------------------------------------------------------- */

static void test_embedding(void **state) {
    (void)state;
    EACH_VARIANT(v) {
        int32_t ids[6] = {3, 0, 3, 9, 1, 3};
        lc_view want = view_new(real_of(v), DIMS(10, 20));
        for (int dtype = LC_K_F32; dtype <= LC_K_F64; dtype++) {
            lc_kargs k = new_call();
            lc_view w = view_noise(dtype, DIMS(10, 20)), y = view_new(real_of(v), DIMS(2, 3, 20));
            k.x[0] = w, k.x[1] = view(ids, LC_K_I32, DIMS(2, 3)), k.y[0] = y;
            CALL(v, embedding, &k);
            for (int e = 0; e < 120; e++) assert_true(fabs(get(&y, e) - get(&w, ids[e / 20] * 20 + e % 20)) < 1e-7);
            free(w.data), free(y.data);
        }
        lc_kargs k = new_call();
        lc_view g = view_noise(real_of(v), DIMS(6, 20)), y = view_noise(real_of(v), DIMS(10, 20));
        for (int e = 0; e < 120; e++)
            put(&want, ids[e / 20] * 20 + e % 20, get(&want, ids[e / 20] * 20 + e % 20) + get(&g, e));
        k.x[0] = g, k.x[1] = view(ids, LC_K_I32, DIMS(6)), k.y[0] = y;
        CALL(v, embedding_backward, &k);
        same(&y, &want, 1e-6);
        for (int bad = 0; bad < 2; bad++) {
            ids[4] = bad ? -1 : 10;
            assert_int_equal(call(v, LC_OP_embedding_backward, &k), LC_K_RANGE);
            assert_int_equal(fault.value, ids[4]);
            assert_int_equal(fault.limit, 10);
            assert_int_equal(fault.at, 4);
        }
        free(g.data), free(y.data), free(want.data);
    }
}

static void test_index(void **state) {
    (void)state;
    EACH_VARIANT(v) {
        for (int dim = 0; dim < 3; dim++) {
            const int64_t shape[3] = {6, 7, 8};
            int64_t picked[3] = {6, 7, 8};
            int32_t i[1] = {dim};
            int64_t four[4] = {5, 0, 2, 5};
            lc_kargs k = new_call();
            picked[dim] = 4;
            lc_view x = view_noise(real_of(v), 3, shape), y = view_new(real_of(v), 3, picked),
                    ids = view_new(LC_K_I64, 3, picked);
            lc_view src = view_noise(real_of(v), 3, picked), z = view_new(real_of(v), 3, shape),
                    sum = view_new(LC_K_F64, 3, shape);
            k.i = i, k.x[0] = x, k.x[1] = view(four, LC_K_I64, DIMS(4)), k.y[0] = y;
            CALL(v, index_select, &k);
            for (int64_t e = 0; e < 336; e++) put(&sum, e, get(&x, e));
            for (int64_t e = 0; e < view_numel(&y); e++) {
                int64_t pos[3] = {e / (picked[1] * picked[2]), e / picked[2] % picked[1], e % picked[2]};
                put(&ids, e, (double)((e * 7 + e / 5) % 6));
                pos[dim] = four[pos[dim]];
                assert_true(get(&y, e) == get(&x, (pos[0] * 7 + pos[1]) * 8 + pos[2]));
                pos[dim] = (e * 7 + e / 5) % 6;
                int64_t to = (pos[0] * 7 + pos[1]) * 8 + pos[2];
                put(&sum, to, get(&sum, to) + get(&src, e));
            }
            k.x[1] = ids;
            CALL(v, gather, &k);
            for (int64_t e = 0; e < view_numel(&y); e++) {
                int64_t pos[3] = {e / (picked[1] * picked[2]), e / picked[2] % picked[1], e % picked[2]};
                pos[dim] = (int64_t)get(&ids, e);
                assert_true(get(&y, e) == get(&x, (pos[0] * 7 + pos[1]) * 8 + pos[2]));
            }
            k.x[2] = src, k.y[0] = z;
            CALL(v, scatter_add, &k);
            same(&z, &sum, 1e-6);
            put(&ids, 33, 1e6);
            assert_int_equal(call(v, LC_OP_gather, &k), LC_K_RANGE);
            assert_int_equal(fault.value, 1000000);
            assert_int_equal(fault.at, 33);
            assert_int_equal(call(v, LC_OP_scatter_add, &k), LC_K_RANGE);
            free(x.data), free(y.data), free(ids.data), free(src.data), free(z.data), free(sum.data);
        }
    }
}

static void test_where(void **state) {
    (void)state;
    EACH_VARIANT(v) {
        lc_kargs k = new_call();
        double f[1] = {-INFINITY};
        lc_view mask = view_noise(LC_K_U8, DIMS(40)), a = view_noise(real_of(v), DIMS(30, 40)),
                b = view_noise(real_of(v), DIMS(40, 30));
        lc_view y = view_new(real_of(v), DIMS(30, 40));
        for (int e = 0; e < 40; e += 3) put(&mask, e, 0);
        mask.ndim = 2, mask.dim[0] = 30, mask.dim[1] = 40, mask.stride[0] = 0, mask.stride[1] = 1;
        b = swap(b, 0, 1);
        k.f = f, k.x[0] = mask, k.x[1] = a, k.x[2] = b, k.y[0] = y;
        CALL(v, where, &k);
        for (int e = 0; e < 1200; e++) assert_true(get(&y, e) == get(get(&mask, e) != 0 ? &a : &b, e));
        k.x[0] = b, k.x[1] = mask;
        CALL(v, masked_fill, &k);
        for (int e = 0; e < 1200; e++) assert_true(get(&y, e) == (get(&mask, e) != 0 ? -INFINITY : get(&b, e)));
        free(mask.data), free(a.data), free(b.data), free(y.data);
    }
}

/* ---- back-end ---------------------------------------------------------------------------------------------------- */

static void test_backend(void **state) {
    (void)state;
    assert_non_null(lc_cpu_kernels("generic", 0));
    assert_non_null(lc_cpu_kernels(lc_cpu_best_isa(), 0));
    assert_null(lc_cpu_kernels("z80", 0));
    assert_null(lc_cpu_kernels(NULL, 0));
    assert_null(lc_cpu_kernels("generic", 0)[LC_OP_reshape].run);
    print_message("best: %s\n", lc_cpu_best_isa());
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sum_accuracy), cmocka_unit_test(test_reductions), cmocka_unit_test(test_softmax),
        cmocka_unit_test(test_arg_ties),     cmocka_unit_test(test_embedding),  cmocka_unit_test(test_index),
        cmocka_unit_test(test_where),        cmocka_unit_test(test_backend),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
