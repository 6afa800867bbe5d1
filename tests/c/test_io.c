/* test_io.c: documents, files of tensors, whole-file helpers. Every file read here is made here, but for one test that
 * reads the golden quantised tensors where LOLCATS_TEST_DATA (or ../shared) has them. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <zlib.h>

#include "io/doc.h"
#include "io/file.h"
#include "io/quant.h"

static char folder[64];

static const char *in_folder(const char *name) {
    static char path[4][256];
    static int turn;
    char *p = path[turn = (turn + 1) % 4];
    snprintf(p, sizeof path[0], "%s/%s", folder, name);
    return p;
}

static int make_folder(void **state) {
    (void)state;
    strcpy(folder, "/tmp/lolcats-io-XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int drop_folder(void **state) {
    (void)state;
    char *names;
    double length;
    if (lc_list_dir(folder, &names, &length) != LC_OK) return -1;
    for (const char *s = names; s < names + (size_t)length; s += strlen(s) + 1) lc_remove(in_folder(s));
    lc_free(names);
    return lc_remove(folder) == LC_OK ? 0 : -1;
}

static void assert_ok(int status) {
    if (status != LC_OK) fail_msg("%s", lc_error_message());
}

static void assert_fails(int status, int expected, const char *words) {
    if (status == LC_OK) fail_msg("succeeded; expected: %s", words);
    if (!strstr(lc_error_message(), words)) fail_msg("'%s' does not say '%s'", lc_error_message(), words);
    assert_int_equal(status, expected);
}

/* ---- documents
 * ------------------------------------------------------------------------------------------------------- */

static lc_doc *parse(const char *format, const char *text) {
    lc_doc *d;
    assert_ok(lc_doc_parse(&d, format, "t", text, (double)strlen(text)));
    return d;
}

static void refuse(const char *format, const char *text, const char *words) {
    lc_doc *d = (lc_doc *)&d;
    assert_fails(lc_doc_parse(&d, format, "t", text, (double)strlen(text)), LC_EPARSE, words);
    assert_null(d);
}

static double number_of(const lc_doc *d, const char *key) {
    int32_t node = lc_doc_get(d, 0, key);
    assert_int_equal(lc_doc_kind(d, node), LC_DOC_NUMBER);
    return lc_doc_number(d, node);
}

static void json_values(void **state) {
    (void)state;
    lc_doc *d = parse("json", " {\"a\":1,\"b\":-2.5e3,\"c\":\"\\u00e9\\ud83d\\ude00\\n\\u0000x\",\"d\":[true,false,"
                              "null,{},[]],\"\":9007199254740993}");
    int32_t length, node = lc_doc_get(d, 0, "c");
    assert_int_equal(lc_doc_kind(d, 0), LC_DOC_OBJECT);
    assert_int_equal(lc_doc_size(d, 0), 5);
    assert_true(number_of(d, "a") == 1 && number_of(d, "b") == -2500);
    assert_true(d->node[lc_doc_get(d, 0, "a")].is_integer && !d->node[lc_doc_get(d, 0, "b")].is_integer);
    assert_false(d->node[lc_doc_get(d, 0, "")].is_integer); /* no double holds it */
    assert_memory_equal(lc_doc_string(d, node, &length), "\xc3\xa9\xf0\x9f\x98\x80\n\0x", 10);
    assert_int_equal(length, 9);
    int32_t kinds[] = {LC_DOC_BOOL, LC_DOC_BOOL, LC_DOC_NULL, LC_DOC_OBJECT, LC_DOC_ARRAY}, i = 0;
    for (node = lc_doc_first(d, lc_doc_get(d, 0, "d")); node >= 0; node = lc_doc_next(d, node))
        assert_int_equal(lc_doc_kind(d, node), kinds[i++]);
    assert_int_equal(i, 5);
    assert_null(lc_doc_string(d, 99, &length));
    assert_int_equal(lc_doc_first(d, -1), -1);
    lc_doc_free(d);
}

static void json_errors(void **state) {
    (void)state;
    char deep[600];
    static const char *const cases[][2] = {
        {"", "t:1:1"},
        {"{\"a\":1,\n \"a\":2}", "t:2:7: not valid JSON: the key \"a\" occurs twice"},
        {"[1,]", "t:1:5"},
        {"[1] x", "trailing"},
        {"\"\\ud83d\"", "t:1:2: not valid JSON: an escape of half a surrogate pair"},
        {"\"\\ude00\"", "surrogate"},
        {"[\"\\\\ud83d\", \"\\uD83Dx\"]", "t:1:14"},
        {"[1e999]", "too large"},
        {"\"\xc3\x28\"", "t:1:2: not valid JSON: invalid UTF-8"},
        {"\"\xed\xa0\x80\"", "UTF-8"},
        {"\"\xc0\x80\"", "UTF-8"},
        {"[01]", "t:1:4"},
        {"NaN", "t:1:2"},
        {"/**/1", "comment"},
        {"{\"a\" 1}", "colon"},
        {"\"a\tb\"", "invalid character"},
        {"{\"a\":0,\"b\":0,\"c\":0,\"d\":0,\"e\":0,\"f\":0,\"g\":0,\"h\":0,\"i\":{\"j\":0},\"b\":0}", "the key \"b\""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) refuse("json", cases[i][0], cases[i][1]);
    memset(deep, '[', 300);
    deep[300] = 0;
    refuse("json", deep, "nested more than 256 deep");
    memset(deep + 256, ']', 256);
    deep[512] = 0;
    lc_doc_free(parse("json", deep));
    lc_doc *d;
    assert_fails(lc_doc_parse(&d, "toml", "t", "", 0), LC_EARG, "unknown document format");
}

static void json_many_keys(void **state) {
    (void)state;
    enum { KEYS = 200000 };
    char *text = malloc(KEYS * 24), *at = text;
    *at++ = '{';
    for (int i = 0; i < KEYS; i++) at += sprintf(at, "%s\"key%d\":%d", i ? "," : "", i, i);
    char *end = at;
    strcpy(at, "}");
    clock_t begin = clock(); /* this process's own time: neighbours do not count */
    lc_doc *d = parse("json", text);
    assert_int_equal(lc_doc_size(d, 0), KEYS);
    assert_true(clock() - begin < 5 * CLOCKS_PER_SEC); /* quadratic would be minutes */
    lc_doc_free(d);
    strcpy(end, ",\"key777\":0}");
    refuse("json", text, "the key \"key777\" occurs twice");
    free(text);
}

static void yaml_values(void **state) {
    (void)state;
    lc_doc *d = parse("yaml", "a: 1e-4\nb: .5\nc: 0x1f\nd: 0o17\ne: -7\nf: +5.\ng: &x {k: [1, two]}\nh: *x\n"
                              "i: [yes, '1', \"true\", 1_000, 12:30, .e3, -, 0xzz, 1e, !!str 3]\nj: [~, null]\n");
    assert_true(number_of(d, "a") == 1e-4 && number_of(d, "b") == 0.5 && number_of(d, "c") == 31);
    assert_true(number_of(d, "d") == 15 && number_of(d, "e") == -7 && number_of(d, "f") == 5);
    assert_true(d->node[lc_doc_get(d, 0, "e")].is_integer && !d->node[lc_doc_get(d, 0, "f")].is_integer);
    int32_t copy = lc_doc_get(d, lc_doc_get(d, 0, "h"), "k");
    assert_string_equal(lc_doc_str(d, lc_doc_next(d, lc_doc_first(d, copy))), "two");
    for (int32_t i = lc_doc_first(d, lc_doc_get(d, 0, "i")); i >= 0; i = lc_doc_next(d, i))
        assert_int_equal(lc_doc_kind(d, i), LC_DOC_STRING);
    lc_doc_free(d);
    d = parse("yaml", "# nothing\n");
    assert_int_equal(lc_doc_kind(d, 0), LC_DOC_NULL);
    lc_doc_free(d);
}

static void yaml_errors(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"a: 1\nb: 2\na: 3", "t:3:1: not valid YAML: this key occurs twice"},
        {"--- a\n--- b", "second document"},
        {"a: .inf", "finite"},
        {"a: &a [*a]", "inside"},
        {"a: *q", "anchor"},
        {"<<: 3", "merge"},
        {"? [a]\n: b", "key"},
        {"a: !!int 3", "tag"},
        {"a: [1", "flow sequence"},
        {"a: \"\xff\"", "UTF-8"},
        {"a: 1e999", "too large"},
        {"a: 1\n b: 2", "t:2:3"},
        {"a: &a [1,1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
         "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: "
         "[*e,*e,*e,*e,*e,*e,*e,*e,*e,*e]",
         "100000"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) refuse("yaml", cases[i][0], cases[i][1]);
}

/* ---- files made here
 * ------------------------------------------------------------------------------------------------- */

typedef struct bytes {
    uint8_t data[8192];
    size_t n;
} bytes;

static void put(bytes *b, const void *data, size_t n) {
    assert_true(b->n + n <= sizeof b->data);
    memcpy(b->data + b->n, data, n);
    b->n += n;
}

static void put_int(bytes *b, uint64_t value, int size) {
    for (int i = 0; i < size; i++) put(b, &(uint8_t){(uint8_t)(value >> 8 * i)}, 1);
}

static void put_string(bytes *b, const char *s) {
    put_int(b, strlen(s), 8);
    put(b, s, strlen(s));
}

static bytes safetensors(const char *header, size_t data) {
    bytes b = {.n = 0};
    put_int(&b, strlen(header), 8);
    put(&b, header, strlen(header));
    for (size_t i = 0; i < data; i++) put(&b, &(uint8_t){(uint8_t)i}, 1);
    return b;
}

/* Two tensors, "q" [2, 32] Q8_0 and "v" [3] F32, and metadata of several types. */
static bytes gguf(void) {
    bytes b = {.n = 0};
    put(&b, "GGUF\3\0\0\0", 8);
    put_int(&b, 2, 8);
    put_int(&b, 5, 8);
    put_string(&b, "general.architecture"), put_int(&b, 8, 4), put_string(&b, "llama");
    put_string(&b, "i8"), put_int(&b, 1, 4), put_int(&b, 0xfb, 1);
    put_string(&b, "words"), put_int(&b, 9, 4), put_int(&b, 8, 4), put_int(&b, 2, 8), put_string(&b, "one"),
        put_string(&b, "");
    put_string(&b, "f64"), put_int(&b, 12, 4), put(&b, &(double){2.5}, 8);
    put_string(&b, "u16s"), put_int(&b, 9, 4), put_int(&b, 2, 4), put_int(&b, 3, 8), put_int(&b, 0xffff00020001, 6);
    put_string(&b, "q"), put_int(&b, 2, 4), put_int(&b, 32, 8), put_int(&b, 2, 8), put_int(&b, 8, 4), put_int(&b, 0, 8);
    put_string(&b, "v"), put_int(&b, 1, 4), put_int(&b, 3, 8), put_int(&b, 0, 4), put_int(&b, 96, 8);
    while (b.n % 32) put_int(&b, 0, 1);
    for (int row = 0; row < 2; row++) {
        put_int(&b, 0x3800, 2); /* 0.5 as a half */
        for (int i = 0; i < 32; i++) put_int(&b, (uint64_t)(i - 16), 1);
    }
    while (b.n % 32) put_int(&b, 0, 1);
    put(&b, (float[]){1, 2, 3}, 12);
    return b;
}

static const char *save(const char *name, const bytes *b) {
    const char *path = in_folder(name);
    assert_ok(lc_write_file(path, (const char *)b->data, (double)b->n));
    return path;
}

static void check_gguf(const lc_file *f) {
    int32_t length;
    assert_string_equal(lc_file_format(f), "gguf");
    assert_int_equal(lc_file_count(f), 2);
    int q = lc_file_find(f, "q"), v = lc_file_find(f, "v");
    assert_int_equal(lc_file_dtype(f, q), LC_Q8_0);
    assert_string_equal(lc_file_dtype_name(f, q), "Q8_0");
    assert_int_equal(lc_file_ndim(f, q), 2);
    assert_int_equal(lc_file_dim(f, q, 0), 2);
    assert_int_equal(lc_file_dim(f, q, 1), 32);
    assert_true(lc_file_bytes(f, q) == 68 && lc_file_bytes(f, v) == 12);
    assert_true(lc_file_offset(f, v) == (double)f->bytes - 12);
    assert_int_equal(lc_file_find(f, "w"), -1);
    int words = lc_file_meta_find(f, "words");
    assert_int_equal(lc_file_meta_kind(f, words), LC_DOC_ARRAY);
    assert_int_equal(lc_file_meta_size(f, words), 2);
    assert_memory_equal(lc_file_meta_string(f, words, 0, &length), "one", 3);
    assert_int_equal(length, 3);
    assert_non_null(lc_file_meta_string(f, words, 1, &length));
    assert_int_equal(length, 0);
    assert_null(lc_file_meta_string(f, words, 2, &length));
    assert_true(lc_file_meta_number(f, lc_file_meta_find(f, "i8"), -1) == -5);
    assert_true(lc_file_meta_number(f, lc_file_meta_find(f, "f64"), -1) == 2.5);
    assert_true(lc_file_meta_number(f, lc_file_meta_find(f, "u16s"), 2) == 65535);
    assert_memory_equal(lc_file_meta_string(f, 0, -1, &length), "llama", 5);
}

static void gguf_reads(void **state) {
    (void)state;
    bytes b = gguf();
    lc_file *f;
    assert_ok(lc_file_open(&f, save("a.gguf", &b)));
    check_gguf(f);
    float out[64];
    assert_ok(lc_convert(LC_Q8_0, f->data + f->entry[0].offset, LC_F32, out, 64));
    for (int i = 0; i < 64; i++) assert_true(out[i] == 0.5f * (float)(i % 32 - 16));
    lc_file_close(f);
}

static const char *const two =
    "{\"__metadata__\":{\"format\":\"pt\"},\"b\":{\"dtype\":\"I16\",\"shape\":[2,1],\"data_offsets\":[8,12]},"
    "\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}  ";

static void safetensors_reads(void **state) {
    (void)state;
    bytes b = safetensors(two, 12);
    lc_file *f;
    int32_t length;
    assert_ok(lc_file_open(&f, save("a.safetensors", &b)));
    assert_string_equal(lc_file_format(f), "safetensors");
    assert_int_equal(lc_file_count(f), 2);
    int a = lc_file_find(f, "a"), i16 = lc_file_find(f, "b");
    assert_int_equal(lc_file_dtype(f, a), LC_F32);
    assert_int_equal(lc_file_dtype(f, i16), -1);
    assert_string_equal(lc_file_dtype_name(f, i16), "I16");
    assert_true(lc_file_offset(f, i16) == (double)(b.n - 4));
    assert_int_equal(lc_file_meta_count(f), 1);
    assert_string_equal(lc_file_meta_string(f, lc_file_meta_find(f, "format"), -1, &length), "pt");
    lc_handle t;
    assert_fails(lc_file_tensor(f, i16, &t), LC_EDTYPE, "'b' is I16");
    lc_file_close(f);
}

#define TENSOR(name, dtype, shape, from, to)                                                                           \
    "\"" name "\":{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":[" from "," to "]}"

static void safetensors_errors(void **state) {
    (void)state;
    static const struct {
        const char *header, *words;
    } cases[] = {
        {"[]", "begin with '{'"},
        {" {}", "begin with '{'"},
        {"{}", "the file has 18"},
        {"{", "begin with '{'"},
        {"{]", "not valid JSON"},
        {"{" TENSOR("a", "\"F32\"", "[3]", "0", "8") "}", "needs 12 bytes"},
        {"{" TENSOR("a", "\"F32\"", "[1]", "0", "4") "}", "end at byte"},
        {"{" TENSOR("a", "\"F33\"", "[2]", "0", "8") "}", "unknown dtype 'F33'"},
        {"{" TENSOR("a", "7", "[2]", "0", "8") "}", "no string \"dtype\""},
        {"{" TENSOR("a", "\"F32\"", "[-2]", "0", "8") "}", "dim 0"},
        {"{" TENSOR("a", "\"F32\"", "[2.5]", "0", "8") "}", "dim 0"},
        {"{" TENSOR("a", "\"F32\"", "[1,4611686018427387906]", "0", "8") "}", "dim 1"},
        {"{" TENSOR("a", "\"F32\"", "[94906267,94906267,94906267]", "0", "8") "}", "too large"},
        {"{" TENSOR("a", "\"F32\"", "[2]", "0", "12") "}", "with 8 bytes of data"},
        {"{" TENSOR("a", "\"F32\"", "[2]", "8", "0") "}", "[8, 0]"},
        {"{" TENSOR("a", "\"F32\"", "[1]", "0", "4") "," TENSOR("b", "\"F32\"", "[2]", "0", "8") "}", "inside"},
        {"{" TENSOR("a", "\"U8\"", "[4]", "0", "4") "," TENSOR("b", "\"U8\"", "[3]", "5", "8") "}", "no gap"},
        {"{" TENSOR("a", "\"U8\"", "[4]", "0", "4") "," TENSOR("a", "\"U8\"", "[4]", "4", "8") "}", "twice"},
        {"{" TENSOR("a\\u0000b", "\"F32\"", "[2]", "0", "8") "}", "zero byte"},
        {"{\"a\":5}", "no object"},
        {"{\"__metadata__\":{\"a\":1}}", "no string"},
        {"{\"__metadata__\":[]}", "no object"},
        {"{\"a\":{\"shape\":[2],\"data_offsets\":[0,8]}}", "dtype"},
        {"{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}", "shape"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8,9]}}", "data_offsets"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        bytes b = safetensors(cases[i].header, 8);
        lc_file *f;
        assert_fails(lc_file_open_memory(b.data, b.n, "t", &f), LC_EPARSE, cases[i].words);
        assert_null(f);
    }
    lc_file *f;
    assert_fails(lc_file_open(&f, in_folder("none")), LC_EIO, "No such file");
    assert_fails(lc_file_open(&f, folder), LC_EIO, "folder");
    assert_fails(lc_file_open(&f, "/dev/zero"), LC_EIO, "regular");
    assert_fails(lc_file_open_memory("PK\3\4aaaaaaaaaaa", 15, "t", &f), LC_EPARSE, "zip");
}

static void gguf_errors(void **state) {
    (void)state;
    static const struct {
        size_t at;
        int size;
        uint64_t value;
        const char *words;
    } cases[] = {
        {0, 1, 'H', "neither GGUF"},
        {4, 4, 0, "version 0"},
        {4, 4, 0x3000000, "big-endian"},
        {8, 8, ~0ull, "tensors cannot stand"},
        {16, 8, 1ull << 61, "values cannot stand"},
        {24, 8, 1ull << 62, "needs"},
        {24, 8, ~0ull, "needs"},
        {52, 4, 77, "unknown value type"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        bytes b = gguf();
        lc_file *f;
        for (int k = 0; k < cases[i].size; k++) b.data[cases[i].at + (size_t)k] = (uint8_t)(cases[i].value >> 8 * k);
        assert_fails(lc_file_open_memory(b.data, b.n, "t", &f), LC_EPARSE, cases[i].words);
    }
}

/* Opens an exact copy, so that a sanitizer sees one byte too many; reads all of it. */
static bool reads(const uint8_t *data, size_t n) {
    uint8_t *copy = malloc(n ? n : 1);
    float out[256];
    lc_file *f;
    if (n) memcpy(copy, data, n);
    bool good = lc_file_open_memory(copy, n, "t", &f) == LC_OK;
    for (int i = 0; good && i < lc_file_count(f); i++)
        if (lc_convertible(f->entry[i].store, LC_F32) && f->entry[i].bytes < 256)
            lc_convert(f->entry[i].store, copy + f->entry[i].offset, LC_F32, out,
                       4 * (int64_t)f->entry[i].bytes > 256 ? 0 : 1);
    if (good) lc_file_close(f);
    free(copy);
    return good;
}

static void damaged_files(void **state) {
    (void)state;
    bytes file[2] = {gguf(), safetensors(two, 12)};
    for (int k = 0; k < 2; k++) {
        bytes *b = &file[k];
        assert_true(reads(b->data, b->n));
        for (size_t n = 0; n < b->n; n++) assert_false(reads(b->data, n));
        for (size_t at = 0; at < b->n; at++) {
            uint8_t was = b->data[at];
            for (int bit = 0; bit < 8; bit++) {
                b->data[at] = was ^ (uint8_t)(1 << bit);
                reads(b->data, b->n); /* an error or not, but no crash */
            }
            b->data[at] = 255;
            reads(b->data, b->n);
            b->data[at] = was;
        }
    }
}

/* ---- conversion
 * ------------------------------------------------------------------------------------------------------ */

static uint32_t float_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

static void conversions(void **state) {
    (void)state;
    static const struct {
        float in;
        uint16_t half, bf16;
    } cases[] = {
        {0, 0, 0},
        {-0.0f, 0x8000, 0x8000},
        {1, 0x3c00, 0x3f80},
        {65504, 0x7bff, 0x4780},
        {65519.996f, 0x7bff, 0x4780},
        {65520, 0x7c00, 0x4780},
        {1e30f, 0x7c00, 0x714a},
        {-INFINITY, 0xfc00, 0xff80},
        {0x1p-24f, 1, 0x3380},
        {0x1p-25f, 0, 0x3300},
        {0x1.8p-24f, 2, 0x33c0},
        {0x1.000002p-25f, 1, 0x3300},
        {0x1.ffcp-15f, 0x0400, 0x3880},
        {1 + 0x1p-11f, 0x3c00, 0x3f80},
        {1 + 0x3p-11f, 0x3c02, 0x3f80},
        {1 + 0x1p-8f, 0x3c04, 0x3f80},
        {1 + 0x3p-8f, 0x3c0c, 0x3f82},
        {0x1.fffffep127f, 0x7c00, 0x7f80},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint16_t half, bf16;
        assert_ok(lc_convert(LC_F32, &cases[i].in, LC_F16, &half, 1));
        assert_ok(lc_convert(LC_F32, &cases[i].in, LC_BF16, &bf16, 1));
        if (half != cases[i].half || bf16 != cases[i].bf16) fail_msg("%a: %04x %04x", (double)cases[i].in, half, bf16);
    }
    uint16_t all[65536], back[65536];
    static float wide[65536];
    for (int i = 0; i < 65536; i++) all[i] = (uint16_t)i;
    for (int dtype = LC_BF16; dtype <= LC_F16; dtype++) {
        assert_ok(lc_convert(dtype, all, LC_F32, wide, 65536));
        assert_ok(lc_convert(LC_F32, wide, dtype, back, 65536));
        for (int i = 0; i < 65536; i++)
            if (isnan(wide[i]) ? !(back[i] & 0x3f) && !(back[i] & 0x240) : back[i] != all[i])
                fail_msg("%d: %04x", dtype, i);
    }
    int64_t big = 1ll << 40;
    int32_t small;
    double d;
    assert_fails(lc_convert(LC_I64, &big, LC_I32, &small, 1), LC_EARG, "does not fit");
    assert_ok(lc_convert(LC_I64, &big, LC_F64, &d, 1));
    assert_true(d == 0x1p40);
    assert_ok(lc_convert(LC_STORE_U64, &(uint64_t){~0ull}, LC_F64, &d, 1));
    assert_true(d == 0x1p64);
    assert_false(lc_convertible(LC_F32, LC_I32) || lc_convertible(LC_F32, LC_Q8_0) ||
                 lc_convertible(LC_STORE_UNKNOWN, LC_F32));
}

static const char *golden(const char *name) {
    static char path[2][512];
    static int turn;
    const char *data = getenv("LOLCATS_TEST_DATA");
    char *p = path[turn ^= 1];
    snprintf(p, sizeof path[0], "%s/golden/quant/%s", data ? data : "../shared", name);
    return p;
}

static void golden_blocks(void **state) {
    (void)state;
    static const char *const names[] = {"F16",  "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1",   "Q8_0",
                                        "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"};
    if (lc_path_kind(golden("all_types.gguf")) != 1) skip();
    lc_file *blocks, *values;
    assert_ok(lc_file_open(&blocks, golden("all_types.gguf")));
    assert_ok(lc_file_open(&values, golden("dequantised.safetensors")));
    static float out[2048];
    for (size_t k = 0; k < sizeof names / sizeof *names; k++) {
        char name[32];
        snprintf(name, sizeof name, "quant.%s", names[k]);
        const lc_file_entry *in = &blocks->entry[lc_file_find(blocks, name)],
                            *want = &values->entry[lc_file_find(values, names[k])];
        assert_ok(lc_convert(in->store, blocks->data + in->offset, LC_F32, out, 2048));
        if (memcmp(out, values->data + want->offset, sizeof out) != 0) fail_msg("%s differs", names[k]);
    }
    uint16_t half[19], bf16[19];
    const uint8_t *special = values->data + values->entry[lc_file_find(values, "special")].offset;
    assert_ok(lc_convert(LC_F32, special, LC_F16, half, 19));
    assert_ok(lc_convert(LC_F32, special, LC_BF16, bf16, 19));
    for (int i = 0; i < 19; i++) {
        float f;
        memcpy(&f, special + 4 * i, 4);
        const uint8_t *h = values->data + values->entry[lc_file_find(values, "special_f16_bits")].offset + 2 * i;
        const uint8_t *b = values->data + values->entry[lc_file_find(values, "special_bf16_bits")].offset + 2 * i;
        if (!isnan(f) && (half[i] != h[0] + 256 * h[1] || bf16[i] != b[0] + 256 * b[1]))
            fail_msg("special %d %08x", i, float_bits(f));
    }
    lc_file_close(blocks);
    lc_file_close(values);
}

/* ---- tensors
 * --------------------------------------------------------------------------------------------------------- */

static void tensors_of_files(void **state) {
    (void)state;
    bytes b = gguf();
    lc_file *f;
    lc_handle view, into;
    float out[64];
    assert_ok(lc_file_open(&f, save("a.gguf", &b)));
    assert_ok(lc_file_tensor(f, 1, &view));
    assert_ok(lc_new(&into, LC_F32, 0, 2, (int32_t[]){2, 32}));
    assert_ok(lc_file_read(f, 0, LC_F32, &into));
    assert_ok(lc_to_host(&into, out, sizeof out));
    for (int i = 0; i < 64; i++) assert_true(out[i] == 0.5f * (float)(i % 32 - 16));
    assert_fails(lc_file_read(f, 1, LC_F32, &into), LC_ESHAPE, "3 elements");
    assert_fails(lc_file_read(f, 0, LC_F16, &into), LC_EDTYPE, "Q8_0");
    lc_file_close(f); /* the view keeps the mapping */
    assert_int_equal(lc_dtype_of(&view), LC_F32);
    assert_ok(lc_to_host(&view, out, 12));
    assert_true(out[0] == 1 && out[2] == 3);
    assert_fails(lc_map_file(&into, in_folder("a.gguf"), (double)b.n - 8, LC_F32, 1, (int32_t[]){3}), LC_EARG,
                 "do not fit");
    lc_drop(&view);
    assert_ok(lc_map_file(&view, in_folder("a.gguf"), (double)b.n - 8, LC_F32, 1, (int32_t[]){2}));
    assert_ok(lc_to_host(&view, out, 8));
    assert_true(out[0] == 2 && out[1] == 3);
    lc_drop(&view);
    lc_drop(&into);
    b = safetensors("{\"ab\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}", 16); /* not aligned */
    assert_ok(lc_file_open(&f, save("b.safetensors", &b)));
    assert_ok(lc_file_tensor(f, 0, &view));
    assert_true((uintptr_t)lc_data(&view) % 4 == 0);
    assert_memory_equal(lc_data(&view), b.data + b.n - 16, 16);
    lc_drop(&view);
    lc_file_close(f);
}

static void safetensors_saves(void **state) {
    (void)state;
    const char *path = in_folder("s.safetensors"), *names[] = {"h\"i\n\\", "w", "e"};
    lc_handle t[3], view;
    lc_file *f;
    assert_ok(lc_from_host(&t[0], LC_U8, 0, 1, (int32_t[]){3}, "abc"));
    assert_ok(lc_from_host(&t[1], LC_F64, 0, 2, (int32_t[]){1, 2}, (double[]){1.5, -2}));
    assert_ok(lc_new(&t[2], LC_F32, 0, 2, (int32_t[]){0, 5}));
    assert_ok(lc_safetensors_save(path, 3, names, t, "{\"k\": \"v\"}"));
    assert_int_equal(lc_path_kind(in_folder("s.safetensors.tmp")), 0);
    assert_ok(lc_file_open(&f, path));
    assert_int_equal(lc_file_count(f), 3);
    assert_int_equal(lc_file_meta_find(f, "k"), 0);
    assert_ok(lc_file_tensor(f, lc_file_find(f, "w"), &view));
    assert_int_equal((uintptr_t)lc_data(&view) % 8, 0);
    assert_memory_equal(lc_data(&view), ((double[]){1.5, -2}), 16);
    lc_drop(&view);
    assert_true(lc_file_bytes(f, lc_file_find(f, names[0])) == 3 && lc_file_bytes(f, lc_file_find(f, "e")) == 0);
    lc_file_close(f);
    assert_fails(lc_safetensors_save(path, 1, names, t, "[1]"), LC_EARG, "object of strings");
    names[1] = names[2];
    assert_fails(lc_safetensors_save(path, 3, names, t, NULL), LC_EARG, "the name 'e'");
    assert_fails(lc_safetensors_save(in_folder("no/dir"), 1, names, t, NULL), LC_EIO, "No such file");
    for (int i = 0; i < 3; i++) lc_drop(&t[i]);
}

/* ---- whole files
 * ----------------------------------------------------------------------------------------------------- */

static void whole_files(void **state) {
    (void)state;
    char *data;
    double length;
    const char *path = in_folder("x");
    assert_ok(lc_write_file(path, "a\0b", 3));
    assert_int_equal(chmod(path, 0640), 0);
    assert_ok(lc_write_file(path, "new", 3));
    struct stat st;
    assert_true(stat(path, &st) == 0 && (st.st_mode & 0777) == 0640);
    assert_ok(lc_read_file(path, &data, &length));
    assert_true(length == 3 && memcmp(data, "new", 4) == 0);
    lc_free(data);
    assert_ok(lc_read_file("/proc/self/status", &data, &length)); /* its size says 0 */
    assert_true(length > 100);
    lc_free(data);
    assert_fails(lc_read_file(folder, &data, &length), LC_EIO, "folder");
    assert_fails(lc_write_file(folder, "", 0), LC_EIO, "folder");
    assert_ok(lc_write_file("/dev/null", "x", 1));
    assert_fails(lc_write_file("/dev/full", "x", 1), LC_EIO, "No space");
    assert_ok(lc_make_dirs(in_folder("d/e/f/")));
    assert_ok(lc_make_dirs(in_folder("d/e")));
    assert_int_equal(lc_path_kind(in_folder("d/e/f")), 2);
    assert_fails(lc_make_dirs(in_folder("x/y")), LC_EIO, "cannot make the folder");
    assert_ok(lc_write_file(in_folder("d/b"), "", 0));
    assert_ok(lc_rename(in_folder("d/b"), in_folder("d/a")));
    assert_ok(lc_list_dir(in_folder("d"), &data, &length));
    assert_true(length == 3 && memcmp(data, "a\0e", 4) == 0);
    lc_free(data);
    assert_fails(lc_remove(in_folder("d")), LC_EIO, "not empty");
    assert_ok(lc_remove(in_folder("d/a")));
    assert_ok(lc_remove(in_folder("d/e/f")));
    assert_ok(lc_remove(in_folder("d/e")));
    assert_ok(lc_remove(in_folder("d")));
}

static void locks(void **state) {
    (void)state;
    int32_t fd, second;
    assert_ok(lc_lock_file(in_folder("lock"), &fd));
    assert_fails(lc_lock_file(in_folder("lock"), &second), LC_EIO, "another process holds it");
    assert_ok(lc_unlock_file(fd));
    assert_ok(lc_lock_file(in_folder("lock"), &fd));
    assert_ok(lc_unlock_file(fd));
}

/* A disk that is full: no file of the child may grow past 4 KB. */
static void full_disk(void **state) {
    (void)state;
    const char *path = in_folder("kept"), *names[] = {"big"};
    char *data;
    double length;
    assert_ok(lc_write_file(path, "old", 3));
    pid_t child = fork();
    if (child == 0) {
        lc_handle t;
        signal(SIGXFSZ, SIG_IGN);
        setrlimit(RLIMIT_FSIZE, &(struct rlimit){4096, 4096});
        int bad = lc_new(&t, LC_F32, 0, 1, (int32_t[]){5000}) != LC_OK;
        bad |= lc_safetensors_save(path, 1, names, &t, NULL) != LC_EIO;
        bad |= !strstr(lc_error_message(), "the old file is untouched");
        static const char big[10000];
        bad |= lc_write_file(path, big, sizeof big) != LC_EIO;
        _exit(bad);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    assert_int_equal(lc_path_kind(in_folder("kept.tmp")), 0);
    assert_ok(lc_read_file(path, &data, &length));
    assert_string_equal(data, "old");
    lc_free(data);
}

static void digests(void **state) {
    (void)state;
    char hex[65];
    static char million[1000000];
    memset(million, 'a', sizeof million);
    assert_ok(lc_sha256("", 0, hex));
    assert_string_equal(hex, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    assert_ok(lc_sha256("abc", 3, hex));
    assert_string_equal(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    assert_ok(lc_sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 56, hex));
    assert_string_equal(hex, "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    assert_ok(lc_sha256(million, 1000000, hex));
    assert_string_equal(hex, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

static size_t gzip(const char *text, size_t n, char *out, size_t room) {
    z_stream z = {
        .next_in = (Bytef *)(uintptr_t)text, .avail_in = (uInt)n, .next_out = (Bytef *)out, .avail_out = (uInt)room};
    assert_int_equal(deflateInit2(&z, 9, Z_DEFLATED, 16 + 15, 8, Z_DEFAULT_STRATEGY), Z_OK);
    assert_int_equal(deflate(&z, Z_FINISH), Z_STREAM_END);
    deflateEnd(&z);
    return z.total_out;
}

static void gunzips(void **state) {
    (void)state;
    static char text[500000], packed[8192];
    char *out;
    double length;
    for (size_t i = 0; i < sizeof text; i++) text[i] = (char)(i % 7);
    size_t n = gzip(text, sizeof text, packed, sizeof packed);
    assert_ok(lc_gunzip(packed, (double)n, 500000, &out, &length));
    assert_true(length == 500000 && memcmp(out, text, sizeof text) == 0);
    lc_free(out);
    assert_fails(lc_gunzip(packed, (double)n, 499999, &out, &length), LC_EPARSE, "more than 499999 bytes");
    for (size_t cut = 0; cut < n; cut += 97)
        assert_fails(lc_gunzip(packed, (double)cut, 1e6, &out, &length), LC_EPARSE, "cut short");
    n += gzip("more", 4, packed + n, sizeof packed - n); /* a second member */
    assert_ok(lc_gunzip(packed, (double)n, 1e6, &out, &length));
    assert_true(length == 500004 && memcmp(out + 500000, "more", 5) == 0);
    lc_free(out);
    packed[n / 2] ^= 1;
    assert_int_equal(lc_gunzip(packed, (double)n, 1e6, &out, &length), LC_EPARSE);
    assert_fails(lc_gunzip("plain text", 10, 1e6, &out, &length), LC_EPARSE, "not gzip");
    n = gzip("", 0, packed, sizeof packed);
    assert_ok(lc_gunzip(packed, (double)n, 0, &out, &length));
    assert_true(length == 0 && out);
    lc_free(out);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(json_values),
        cmocka_unit_test(json_errors),
        cmocka_unit_test(json_many_keys),
        cmocka_unit_test(yaml_values),
        cmocka_unit_test(yaml_errors),
        cmocka_unit_test(gguf_reads),
        cmocka_unit_test(gguf_errors),
        cmocka_unit_test(safetensors_reads),
        cmocka_unit_test(safetensors_errors),
        cmocka_unit_test(damaged_files),
        cmocka_unit_test(conversions),
        cmocka_unit_test(golden_blocks),
        cmocka_unit_test(tensors_of_files),
        cmocka_unit_test(safetensors_saves),
        cmocka_unit_test(whole_files),
        cmocka_unit_test(locks),
        cmocka_unit_test(full_disk),
        cmocka_unit_test(digests),
        cmocka_unit_test(gunzips),
    };
    return cmocka_run_group_tests_name("io", tests, make_folder, drop_folder);
}
