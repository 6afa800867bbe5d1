/* test_sentencepiece.c: SentencePiece's and tiktoken's tokenizer.model on vocabularies small enough to work out by
 * hand, run in both ways, Unigram models and character maps; and what is refused, with the place where it stands. Real
 * models are compared with the libraries' own ids elsewhere. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "../../runtime/text/tokenizer.h"

#define MARK "\xE2\x96\x81"

/* ---- protobuf, written ------------------------------------------------------------------------------------------- */

typedef struct model {
    unsigned char data[1 << 16];
    size_t n;
} model;

static void put(model *m, const void *p, size_t n) {
    assert_true(m->n + n <= sizeof m->data);
    memcpy(m->data + m->n, p, n);
    m->n += n;
}

static void put_varint(model *m, uint64_t v) {
    for (; v >= 128; v >>= 7) put(m, &(unsigned char){(unsigned char)(v | 128)}, 1);
    put(m, &(unsigned char){(unsigned char)v}, 1);
}

static void put_bytes(model *m, int field, const void *p, size_t n) {
    put_varint(m, (uint64_t)field << 3 | 2), put_varint(m, n), put(m, p, n);
}

static void put_number(model *m, int field, uint64_t v) { put_varint(m, (uint64_t)field << 3), put_varint(m, v); }

static void put_piece(model *m, const char *text, float score, int type) {
    static model inner;
    inner.n = 0;
    put_bytes(&inner, 1, text, strlen(text));
    put_varint(&inner, 2 << 3 | 5), put(&inner, &score, 4);
    if (type != LC_PIECE_NORMAL) put_number(&inner, 3, (uint64_t)type);
    put_bytes(m, 1, inner.data, inner.n);
}

enum { UNIGRAM = 1, BPE = 2 };

typedef struct form {
    int kind;
    bool bytes, strip, suffix, no_prefix;
    const char *map;
    size_t map_len;
} form;

static void put_specs(model *m, form f) {
    static model inner;
    inner.n = 0;
    put_number(&inner, 3, (uint64_t)f.kind), put_number(&inner, 35, f.bytes), put_number(&inner, 24, f.suffix);
    put_bytes(m, 2, inner.data, inner.n);
    inner.n = 0;
    if (f.map) put_bytes(&inner, 2, f.map, f.map_len);
    put_number(&inner, 3, !f.no_prefix), put_number(&inner, 4, f.strip);
    put_bytes(m, 3, inner.data, inner.n);
}

/* <unk> 0, <s> 1, </s> 2, U+2581 3, a 4, b 5, ab 6, U+2581 ab 7, <u> 8 (user-defined), ba 9; bytes from 10 */
static void put_pieces(model *m, bool bytes, int type_of_ab) {
    put_piece(m, "<unk>", 0, LC_PIECE_UNKNOWN);
    put_piece(m, "<s>", 0, LC_PIECE_CONTROL);
    put_piece(m, "</s>", 0, LC_PIECE_CONTROL);
    put_piece(m, MARK, -4, LC_PIECE_NORMAL);
    put_piece(m, "a", -5, LC_PIECE_NORMAL);
    put_piece(m, "b", -6, LC_PIECE_NORMAL);
    put_piece(m, "ab", -1, type_of_ab);
    put_piece(m, MARK "ab", -2, LC_PIECE_NORMAL);
    put_piece(m, "<u>", 0, LC_PIECE_USER);
    put_piece(m, "ba", -3, LC_PIECE_NORMAL);
    for (int i = 0; i < 256 && bytes; i++) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", (unsigned)i);
        put_piece(m, name, 0, LC_PIECE_BYTE);
    }
}

static lc_tokenizer *load(const model *m, bool own) {
    lc_tok_options how = {.own = own, .add_bos = -1, .add_eos = -1, .legacy = -1};
    lc_tokenizer *t;
    if (lc_tok_from_bytes(&t, "test", (const char *)m->data, m->n, &how) != LC_OK) fail_msg("%s", lc_error_message());
    return t;
}

static lc_tokenizer *make(form f, bool own) {
    static model m;
    m.n = 0;
    put_pieces(&m, f.bytes, LC_PIECE_NORMAL), put_specs(&m, f);
    return load(&m, own);
}

static void expect(lc_tokenizer *t, const char *text, bool special, bool parse, const char *want) {
    int32_t *ids, count;
    char got[1024] = "";
    if (lc_tokenizer_encode(t, text, (double)strlen(text), special, parse, &ids, &count) != LC_OK)
        fail_msg("%s", lc_error_message());
    for (int32_t i = 0; i < count; i++) snprintf(got + strlen(got), 16, i ? " %d" : "%d", (int)ids[i]);
    lc_free(ids);
    if (strcmp(got, want)) fail_msg("'%s': expected %s, got %s", text, want, got);
}

static void expect_text(lc_tokenizer *t, const int32_t *ids, int32_t n, bool skip, const char *want) {
    char *got;
    int32_t length;
    assert_int_equal(lc_tokenizer_decode(t, ids, n, skip, &got, &length), LC_OK);
    assert_string_equal(got, want);
    lc_free(got);
}
#define TEXT(t, skip, want, ...)                                                                                       \
    expect_text(t, (const int32_t[]){__VA_ARGS__}, sizeof((int32_t[]){__VA_ARGS__}) / sizeof(int32_t), skip, want)

/* ---- BPE --------------------------------------------------------------------------------------------------------- */

static void as_the_library(void **state) {
    (void)state;
    lc_tokenizer *t = make((form){.kind = BPE}, true);
    expect(t, "ab", false, false, "7");
    expect(t, "", true, false, "1");
    expect(t, "  ab", false, false, "3 3 7");
    expect(t, "aab ba", false, false, "3 4 6 3 9");
    expect(t, "xx", false, false, "3 0"); /* a run of unknown characters is one unknown piece */
    expect(t, "a<u>b", false, false, "3 4 8 5");
    expect(t, "<s>ab", false, false, "3 0 6"); /* control symbols in a text are text */
    expect(t, "<s>ab", false, true, "1 7");
    TEXT(t, false, "ab ab", 7, 7);
    TEXT(t, false, "ab", 1, 7, 2); /* control symbols make no text */
    TEXT(t, false, "a \xE2\x81\x87 ", 3, 4, 0);
    TEXT(t, false, " ab", 3, 7);
    assert_true(lc_tokenizer_is_special(t, 1));
    lc_tokenizer_free(t);
}

static void as_hugging_face(void **state) {
    (void)state;
    lc_tokenizer *t = make((form){.kind = BPE, .bytes = true}, false);
    expect(t, "ab", true, true, "1 7");
    expect(t, "a<s>b", false, true, "3 4 1 3 5"); /* each part gets its space in front */
    expect(t, "a<u>b", false, true, "3 4 8 3 5");
    expect(t, "\xC3\xA9", false, true, "3 205 179");
    TEXT(t, false, "<s> ab</s>", 1, 7, 2);
    TEXT(t, true, "ab", 1, 7, 2);
    lc_tokenizer_free(t);
}

static void bytes(void **state) {
    (void)state;
    lc_tokenizer *t = make((form){.kind = BPE, .bytes = true}, true);
    expect(t,
           "\xC3\xA9"
           "a",
           false, false, "3 205 179 4");
    TEXT(t, false,
         "\xC3\xA9"
         "a",
         205, 179, 4);
    TEXT(t, false,
         "\xEF\xBF\xBD"
         "A\xEF\xBF\xBD",
         205, 10 + 'A', 179); /* what is whole in a run stays whole */
    lc_tokenizer_free(t);
    t = make((form){.kind = BPE, .bytes = true}, false);
    TEXT(t, false, "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD", 205, 10 + 'A', 179); /* here nothing does */
    lc_tokenizer_free(t);
}

static void spaces(void **state) {
    (void)state;
    lc_tokenizer *t = make((form){.kind = BPE, .strip = true}, true);
    expect(t, "  ab   b ", false, false, "7 3 5");
    expect(t, "   ", false, false, "");
    TEXT(t, false, "ab", 3, 7);
    lc_tokenizer_free(t);
    t = make((form){.kind = BPE, .suffix = true}, true);
    expect(t, "ab b", false, false, "6 3 5 3");
    lc_tokenizer_free(t);
    t = make((form){.kind = BPE, .no_prefix = true}, true);
    expect(t, "ab ab", false, false, "6 7");
    TEXT(t, false, " ab", 7);
    lc_tokenizer_free(t);
}

static void unused(void **state) {
    (void)state;
    static model m;
    m.n = 0;
    put_pieces(&m, false, LC_PIECE_UNUSED), put_specs(&m, (form){.kind = BPE});
    lc_tokenizer *t = load(&m, true);
    expect(t, "ab", false, false, "7"); /* on the way it serves */
    expect(t, "aab", false, false, "3 4 4 5");
    lc_tokenizer_free(t);
}

/* ---- Unigram and character maps ---------------------------------------------------------------------------------- */

static void unigram(void **state) {
    (void)state;
    for (int own = 0; own < 2; own++) {
        lc_tokenizer *t = make((form){.kind = UNIGRAM}, own);
        expect(t, "ab", false, false, "7");
        expect(t, "aab", false, false, "3 4 6"); /* -4 -5 -1 */
        expect(t, "aba", false, false, "7 4");   /* -2 -5, not -4 -5 -3 */
        expect(t, "xyab", false, false, "3 0 6");
        expect(t, "a<u>", false, own == 0, "3 4 8");
        lc_tokenizer_free(t);
    }
    lc_tokenizer *t = make((form){.kind = UNIGRAM, .bytes = true}, true);
    expect(t, "\xC3\xA9\xC3\xA9", false, false, "3 205 179 205 179");
    lc_tokenizer_free(t);
}

/* A map of one rule, B to b: units 0 and 'B' lead to a leaf whose value is an offset into the texts. */
static size_t one_rule(char *map) {
    uint32_t unit[256] = {0};
    unit[0] = 128u << 10;                        /* root: children at 128 */
    unit[128 ^ 'B'] = 'B' | 1u << 8 | 64u << 10; /* leaf at 128 ^ 'B' ^ 64 */
    unit[128 ^ 'B' ^ 64] = 1u << 31 | 0;
    memcpy(map, &(uint32_t){sizeof unit}, 4);
    memcpy(map + 4, unit, sizeof unit);
    memcpy(map + 4 + sizeof unit, "b", 2);
    return 4 + sizeof unit + 2;
}

static void character_map(void **state) {
    (void)state;
    static char map[2048];
    size_t n = one_rule(map);
    for (int own = 0; own < 2; own++) {
        lc_tokenizer *t = make((form){.kind = BPE, .map = map, .map_len = n}, own);
        expect(t, "aB", false, false, "7");
        lc_tokenizer_free(t);
    }
    lc_tok_charsmap m;
    for (size_t cut = 1; cut < 1040; cut += 13) { /* never read past the end, whatever the map says */
        lc_tok_buf out = {0};
        if (lc_tok_charsmap_set(&m, map, cut) == LC_OK) lc_tok_charsmap_apply(&m, "aBB", 3, &out);
        lc_tok_charsmap_drop(&m);
        free(out.p);
    }
}

/* ---- refusals ---------------------------------------------------------------------------------------------------- */

static void refuse(const void *data, size_t n, const char *says) {
    lc_tok_options how = {.add_bos = -1, .add_eos = -1, .legacy = -1};
    lc_tokenizer *t;
    assert_int_equal(lc_tok_from_bytes(&t, "test", data, n, &how), LC_EPARSE);
    assert_null(t);
    if (!strstr(lc_error_message(), says)) fail_msg("expected '%s' in: %s", says, lc_error_message());
    assert_non_null(strstr(lc_error_message(), "test: "));
}

static void refusals(void **state) {
    (void)state;
    static model m;
    refuse("", 0, "neither");
    refuse("\x89PNG", 4, "neither");
    refuse("\n\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x01", 12, "byte 1: expected a number");
    refuse("\n\x7F"
           "abc",
           5, "byte 0: expected a field that ends inside its message");
    m.n = 0, put_pieces(&m, false, LC_PIECE_NORMAL), put_specs(&m, (form){.kind = 4});
    refuse(m.data, m.n, "type CHAR is not supported");
    refuse(m.data, m.n - 1, "cut short");
    m.n = 0, put_pieces(&m, false, LC_PIECE_NORMAL), put_piece(&m, "ab", 0, 1), put_specs(&m, (form){.kind = BPE});
    refuse(m.data, m.n, "piece 10 has the text of piece 6, 'ab'");
    m.n = 0, put_pieces(&m, false, LC_PIECE_NORMAL), put_specs(&m, (form){.kind = BPE, .bytes = true});
    refuse(m.data, m.n, "0 byte pieces instead of 256");
    m.n = 0, put_pieces(&m, false, 7);
    refuse(m.data, m.n, "a piece's type from 1 to 6");
    m.n = 0, put_piece(&m, "a", 0, 1), put_specs(&m, (form){.kind = BPE});
    refuse(m.data, m.n, "no unknown piece");
    m.n = 0, put_piece(&m, "\xC3", 0, 1);
    refuse(m.data, m.n, "UTF-8");
    m.n = 0, put_piece(&m, "a", __builtin_nanf(""), 1);
    refuse(m.data, m.n, "finite score");
    m.n = 0, put_pieces(&m, false, 1), put_specs(&m, (form){.kind = BPE, .map = "\x10\0\0\0abcd", .map_len = 8});
    refuse(m.data, m.n, "character map: a trie of 16 bytes in 8 bytes");
}

static void tiktoken(void **state) {
    (void)state;
    static const char *const cases[][2] = {{"YQ== 0\nYg== x\n", "line 2: its rank is no number"},
                                           {"YQ== 0\nYg==\n", "line 2: expected base64"},
                                           {"YQ== 0\nYg= 1\n", "line 2: expected a token's bytes"},
                                           {"YQ== 0\n\nYQ== 1\n", "line 3: the token of an earlier line"},
                                           {"YQ== 0\nYg== 0\n", "two tokens have id 0"},
                                           {"YQ== 0\nYg== 2\n", "2 tokens, but ranks up to 2"},
                                           {"YQ== 99999999999\n", "line 1"},
                                           {"YQ== 0\nYg== 1\n", "2 ranks: how its texts are cut is known for 128000"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) refuse(cases[i][0], strlen(cases[i][0]), cases[i][1]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(as_the_library), cmocka_unit_test(as_hugging_face), cmocka_unit_test(bytes),
        cmocka_unit_test(spaces),         cmocka_unit_test(unused),          cmocka_unit_test(unigram),
        cmocka_unit_test(character_map),  cmocka_unit_test(refusals),        cmocka_unit_test(tiktoken)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
