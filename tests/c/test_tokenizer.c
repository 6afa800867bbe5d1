/* test_tokenizer.c: the tokenizer on vocabularies small enough to work out by hand, its refusals, and the sampler. Real
 * tokenizers are compared with golden ids elsewhere. */
#define _DEFAULT_SOURCE /* mkstemp */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "../../runtime/text/tokenizer.h"

/* ---- helpers ----------------------------------------------------------------------------------------------------- */

#define MODEL(vocab, merges, more)                                                                                     \
    "\"model\": {\"type\": \"BPE\", \"vocab\": {" vocab "}, \"merges\": [" merges "]" more "}"

static lc_tokenizer *load(const char *json) {
    lc_tokenizer *t = NULL;
    lc_status status = lc_tok_from_json(&t, "test", json, strlen(json));
    if (status != LC_OK) fail_msg("%s", lc_error_message());
    return t;
}

/* ids as "1 2 3", so that a failure shows both lists */
static const char *ids_of(lc_tokenizer *t, const char *text, size_t n, int add_special, int parse_special) {
    static char out[4096];
    int32_t *ids, count;
    if (lc_tokenizer_encode(t, text, (double)n, add_special, parse_special, &ids, &count) != LC_OK)
        return lc_error_message();
    size_t at = 0;
    out[0] = 0;
    for (int32_t i = 0; i < count && at + 16 < sizeof out; i++)
        at += (size_t)snprintf(out + at, sizeof out - at, i ? " %d" : "%d", (int)ids[i]);
    lc_free(ids);
    return out;
}

static void expect(lc_tokenizer *t, const char *text, const char *ids) {
    assert_string_equal(ids_of(t, text, strlen(text), 0, 1), ids);
}

static void expect_text(lc_tokenizer *t, const int32_t *ids, int32_t count, int skip_special, const char *text) {
    char *out;
    int32_t length;
    assert_int_equal(lc_tokenizer_decode(t, ids, count, skip_special, &out, &length), LC_OK);
    assert_string_equal(out, text);
    assert_int_equal(length, strlen(text));
    lc_free(out);
}
#define TEXT(t, skip, text, ...)                                                                                       \
    expect_text(t, (const int32_t[]){__VA_ARGS__}, sizeof((int32_t[]){__VA_ARGS__}) / sizeof(int32_t), skip, text)

static void expect_refusal(const char *json, const char *says) {
    lc_tokenizer *t = NULL;
    assert_int_equal(lc_tok_from_json(&t, "test", json, strlen(json)), LC_EPARSE);
    assert_null(t);
    if (!strstr(lc_error_message(), says)) fail_msg("expected '%s' in: %s", says, lc_error_message());
}

/* ---- byte-level -------------------------------------------------------------------------------------------------- */

#define BYTE_LEVEL                                                                                                     \
    "\"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"use_regex\": true},"                  \
    "\"decoder\": {\"type\": \"ByteLevel\"},"
#define BYTE_VOCAB                                                                                                     \
    "\"h\": 0, \"e\": 1, \"l\": 2, \"o\": 3, \"\\u0120\": 4, \"w\": 5, \"he\": 6, \"ll\": 7, \"hell\": 8, \"hello\": " \
    "9,"                                                                                                               \
    "\"\\u0120w\": 10, \"\\u00c3\": 11, \"\\u00a9\": 12, \"\\u00c3\\u00a9\": 13, \"\\u010a\": 14"
#define BYTE_MERGES "\"h e\", \"l l\", \"he ll\", [\"hell\", \"o\"], \"\\u0120 w\", \"\\u00c3 \\u00a9\""

static void byte_level(void **state) {
    (void)state;
    lc_tokenizer *t = load("{" BYTE_LEVEL MODEL(BYTE_VOCAB, BYTE_MERGES, "") "}");
    assert_int_equal(lc_tokenizer_size(t), 15);
    expect(t, "", "");
    expect(t, "hello", "9");
    expect(t, "hello hello", "9 4 9");
    expect(t, "hello wo", "9 10 3");
    expect(t, "hellhe", "8 6");
    expect(t, "h\xC3\xA9", "0 13");
    expect(t, "  w\n", "4 10 14");
    expect(t, "xhx", "0"); /* characters that are no tokens vanish when there is no unknown token */
    TEXT(t, 0, "hello wo", 9, 10, 3);
    TEXT(t, 0, "\xC3\xA9", 13);
    TEXT(t, 0, "\xC3\xA9", 11, 12); /* halves of a character meet again */
    TEXT(t, 0,
         "h\xEF\xBF\xBD"
         "e",
         0, 11, 1);
    TEXT(t, 0, "he", 0, 99, -1, 1); /* unknown ids are passed over */
    int32_t n;
    assert_string_equal(lc_tokenizer_token(t, 10, &n), "\xC4\xA0w");
    assert_int_equal(n, 3);
    assert_null(lc_tokenizer_token(t, 15, &n));
    assert_int_equal(lc_tokenizer_id(t, "hello"), 9);
    assert_int_equal(lc_tokenizer_id(t, "nothing"), -1);
    lc_tokenizer_free(t);
}

static void merge_order(void **state) {
    (void)state;
    /* ranks decide, then the leftmost; with ignore_merges a word that is a token is taken whole, reachable or not */
    const char *json =
        "{%s" MODEL("\"a\": 0, \"b\": 1, \"ab\": 2, \"ba\": 3, \"aa\": 4, \"abab\": 5, \"bb\": 6, \"aabb\": 7",
                    "\"b a\", \"a a\", \"a b\", \"ab ab\"", "%s") "}";
    char text[1024];
    snprintf(text, sizeof text, json, "", "");
    lc_tokenizer *t = load(text);
    expect(t, "abab", "0 3 1");
    expect(t, "aaa", "4 0");
    expect(t, "aabb", "4 1 1");
    lc_tokenizer_free(t);
    snprintf(text, sizeof text, json, "", ", \"ignore_merges\": true");
    t = load(text);
    expect(t, "aabb", "7");
    expect(t, "aabba", "4 1 3");
    lc_tokenizer_free(t);
}

static void invalid_utf8(void **state) {
    (void)state;
    lc_tokenizer *t = load("{" MODEL("\"a\": 0, \"\\ufffd\": 1, \"\\u00e9\": 2", "", "") "}");
    assert_string_equal(ids_of(t,
                               "a\xFF"
                               "a",
                               3, 0, 1),
                        "0 1 0");
    assert_string_equal(ids_of(t,
                               "\xE2\x82"
                               "a",
                               3, 0, 1),
                        "1 0"); /* a cut character is one U+FFFD */
    assert_string_equal(ids_of(t,
                               "\xF0\x80\x80"
                               "a",
                               4, 0, 1),
                        "1 1 1 0");                                   /* an impossible start is one for each byte */
    assert_string_equal(ids_of(t, "\xED\xA0\x80", 3, 0, 1), "1 1 1"); /* so is a surrogate */
    assert_string_equal(ids_of(t, "\xC3\xA9\xC3", 3, 0, 1), "2 1");
    assert_string_equal(ids_of(t, "a\0a", 3, 0, 1), "0 0");
    lc_tokenizer_free(t);
}

/* ---- SentencePiece style ----------------------------------------------------------------------------------------- */

#define SPM                                                                                                            \
    "\"normalizer\": {\"type\": \"Sequence\", \"normalizers\": [{\"type\": \"Prepend\", \"prepend\": \"\\u2581\"},"    \
    "{\"type\": \"Replace\", \"pattern\": {\"String\": \" \"}, \"content\": \"\\u2581\"}]},"                           \
    "\"decoder\": {\"type\": \"Sequence\", \"decoders\": [{\"type\": \"Replace\", \"pattern\": {\"String\": "          \
    "\"\\u2581\"},"                                                                                                    \
    "\"content\": \" \"}, {\"type\": \"ByteFallback\"}, {\"type\": \"Fuse\"}, {\"type\": \"Strip\", \"content\": \" "  \
    "\","                                                                                                              \
    "\"start\": 1, \"stop\": 0}]},"
#define SPM_VOCAB                                                                                                      \
    "\"<unk>\": 0, \"<s>\": 1, \"</s>\": 2, \"<0xC3>\": 3, \"<0xA9>\": 4, \"\\u2581\": 5, \"a\": 6, \"b\": 7, "        \
    "\"ab\": 8,"                                                                                                       \
    "\"\\u2581ab\": 9, \"\\u2581\\u2581\": 10"
#define SPM_ADDED                                                                                                      \
    "\"added_tokens\": [{\"id\": 0, \"content\": \"<unk>\", \"special\": true, \"normalized\": false},"                \
    "{\"id\": 1, \"content\": \"<s>\", \"special\": true, \"normalized\": false},"                                     \
    "{\"id\": 2, \"content\": \"</s>\", \"special\": true, \"normalized\": false}],"
#define SPM_TEMPLATE                                                                                                   \
    "\"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": [{\"SpecialToken\": {\"id\": \"<s>\"}},"       \
    "{\"Sequence\": {\"id\": \"A\"}}], \"special_tokens\": {\"<s>\": {\"ids\": [1]}}},"
#define SPM_MODEL(more)                                                                                                \
    MODEL(SPM_VOCAB, "\"a b\", \"\\u2581 ab\", \"\\u2581 \\u2581\"",                                                   \
          ", \"unk_token\": \"<unk>\", \"byte_fallback\": true" more)

static void sentencepiece(void **state) {
    (void)state;
    lc_tokenizer *t = load("{" SPM SPM_ADDED SPM_TEMPLATE SPM_MODEL(", \"fuse_unk\": true") "}");
    expect(t, "ab", "9");
    expect(t, "ab ab", "9 9");
    expect(t, "a", "5 6");
    expect(t, " ab", "5 9");
    expect(t, "\xC3\xA9", "5 3 4");
    expect(t, "xyz", "5 0"); /* no byte tokens for them: one fused unknown token */
    expect(t, "ab</s>ab", "9 2 9");
    assert_string_equal(ids_of(t, "ab", 2, 1, 1), "1 9");
    assert_string_equal(ids_of(t, "", 0, 1, 1), "1");
    assert_string_equal(ids_of(t, "<s>", 3, 0, 0), "5 0");
    assert_true(lc_tokenizer_is_special(t, 1));
    assert_false(lc_tokenizer_is_special(t, 9));
    TEXT(t, 0, "ab ab", 9, 9);
    TEXT(t, 0, "<s> ab</s>", 1, 9, 2);
    TEXT(t, 1, "ab", 1, 9, 2);
    TEXT(t, 0, "a\xC3\xA9", 6, 3, 4);
    TEXT(t, 0,
         "a\xEF\xBF\xBD\xEF\xBF\xBD"
         "b",
         6, 3, 3, 7);
    lc_tokenizer_free(t);
    t = load("{" SPM SPM_MODEL("") "}");
    expect(t, "xyz", "5 0 0 0");
    lc_tokenizer_free(t);
}

static void metaspace(void **state) {
    (void)state;
    const char *json =
        "{\"pre_tokenizer\": {\"type\": \"Metaspace\", \"replacement\": \"\\u2581\", \"prepend_scheme\": \"%s\"},"
        "\"decoder\": {\"type\": \"Metaspace\", \"replacement\": \"\\u2581\", \"prepend_scheme\": \"%s\"},"
        "\"added_tokens\": [{\"id\": 9, \"content\": \"<x>\", \"special\": true}]," MODEL(
            "\"\\u2581\": 0, \"a\": 1, \"b\": 2, \"\\u2581a\": 3", "\"\\u2581 a\"", "") "}";
    static const char *const want[3][2] = {{"always", "3 3 4 3"}, {"first", "3 3 4 1"}, {"never", "1 3 4 1"}};
    for (int i = 0; i < 3; i++) {
        char text[1024];
        snprintf(text, sizeof text, json, want[i][0], want[i][0]);
        lc_tokenizer *t = load(text);
        expect(t, "a a<x>a", want[i][1]);
        TEXT(t, 0, i == 2 ? " a b" : "a b", 3, 0, 2);
        lc_tokenizer_free(t);
    }
}

/* ---- added tokens ------------------------------------------------------------------------------------------------ */

static void added_tokens(void **state) {
    (void)state;
    lc_tokenizer *t = load(
        "{\"added_tokens\": [{\"content\": \"<l>\", \"lstrip\": true}, {\"content\": \"<r>\", \"rstrip\": true},"
        "{\"content\": \"word\", \"single_word\": true}, {\"content\": \"<s>\", \"special\": true},"
        "{\"content\": \"<s>a\", \"normalized\": false}]," MODEL(
            "\"a\": 0, \" \": 1, \"w\": 2, \"o\": 3, \"r\": 4, \"d\": 5, \"<\": 6, \"s\": 7, \">\": 8", "", "") "}");
    assert_int_equal(lc_tokenizer_size(t), 14); /* ids 9 to 13 are new */
    expect(t, "a <l> a", "0 9 1 0");
    expect(t, "a <r> a", "0 1 10 0");
    expect(t, "a\xE2\x80\x80<l>", "0 9"); /* any white space */
    expect(t, "a word a", "0 1 11 1 0");
    expect(t, "aword", "0 2 3 4 5");
    expect(t, "word", "11");
    expect(t, "word\xCC\xB0", "2 3 4 5"); /* a combining mark is part of the word */
    expect(t, "<s><s>a", "12 13");        /* the longest */
    assert_string_equal(ids_of(t, "<s>d<s>a", 8, 0, 0), "6 7 8 5 13");
    TEXT(t, 1, "a w", 0, 12, 2);
    TEXT(t, 0, "a <s> w", 0, 12, 2); /* without a decoder tokens are joined by spaces */
    lc_tokenizer_free(t);
}

static void normalized_tokens(void **state) {
    (void)state;
    lc_tokenizer *t = load("{\"normalizer\": {\"type\": \"Lowercase\"},"
                           "\"added_tokens\": [{\"content\": \"Aa\", \"normalized\": true, \"special\": true},"
                           "{\"content\": \"BB\", \"normalized\": false}]," MODEL("\"a\": 0, \"b\": 1", "", "") "}");
    expect(t, "AA", "2");
    expect(t, "aaBBbb", "2 3 1 1");
    TEXT(t, 1, "aa BB", 2, 3); /* what it decodes to is no special token's text */
    lc_tokenizer_free(t);
}

/* ---- pre-tokenizers ---------------------------------------------------------------------------------------------- */

/* The words of a text, with bars between. */
static const char *words(lc_tokenizer *t, const char *s) {
    static char out[1024];
    const char *text;
    lc_tok_spans *w;
    if (lc_tok_pretokenize(t, s, strlen(s), true, &text, &w) != LC_OK) return lc_error_message();
    size_t at = 0;
    out[0] = 0;
    for (size_t i = 0; i < w->len; i++)
        at += (size_t)snprintf(out + at, sizeof out - at, i ? "|%.*s" : "%.*s", (int)w->p[i].len, text + w->p[i].at);
    return out;
}

static void pre_tokenizers(void **state) {
    static const char *const cases[][3] = {
        {"{\"type\": \"Digits\", \"individual_digits\": true}", "ab12c\xC2\xBD", "ab|1|2|c|\xC2\xBD"},
        {"{\"type\": \"Digits\", \"individual_digits\": false}", "ab12c3", "ab|12|c|3"},
        {"{\"type\": \"Punctuation\"}", "a, b!!", "a|,| b|!|!"},
        {"{\"type\": \"Punctuation\", \"behavior\": \"Contiguous\"}", "a, b!!", "a|,| b|!!"},
        {"{\"type\": \"Whitespace\"}", " a_1, b\xCC\xB0!? ", "a_1|,|b\xCC\xB0|!?"},
        {"{\"type\": \"WhitespaceSplit\"}",
         " a,\xE3\x80\x80"
         "b\n",
         "a,|b"},
        {"{\"type\": \"BertPreTokenizer\"}", "a b,c", "a|b|,|c"},
        {"{\"type\": \"CharDelimiterSplit\", \"delimiter\": \"-\"}", "a-b--c", "a|b|c"},
        {"{\"type\": \"Split\", \"pattern\": {\"String\": \"ab\"}, \"behavior\": \"Removed\"}", "xabyab", "x|y"},
        {"{\"type\": \"Split\", \"pattern\": {\"String\": \"-\"}, \"behavior\": \"MergedWithPrevious\"}", "a-b--c",
         "a-|b-|-|c"},
        {"{\"type\": \"Split\", \"pattern\": {\"String\": \"-\"}, \"behavior\": \"MergedWithNext\"}", "a-b--c",
         "a|-b|-|-c"},
        {"{\"type\": \"Split\", \"pattern\": {\"Regex\": \"\\\\d\"}, \"behavior\": \"Removed\", \"invert\": true}",
         "a1b22", "1|2|2"},
        {"{\"type\": \"Split\", \"pattern\": {\"Regex\": \"\\\\p{N}{1,3}\"}, \"behavior\": \"Isolated\"}", "1234567",
         "123|456|7"},
        /* Ruby's {n,m}+ repeats, \h is a hexadecimal digit, \s knows no Mongolian vowel separator */
        {"{\"type\": \"Split\", \"pattern\": {\"Regex\": \"\\\\d{1,2}+\"}, \"behavior\": \"Isolated\"}", "a12345",
         "a|12345"},
        {"{\"type\": \"Split\", \"pattern\": {\"Regex\": \"\\\\h+\"}, \"behavior\": \"Isolated\"}", "xyfacez",
         "xy|face|z"},
        {"{\"type\": \"Split\", \"pattern\": {\"Regex\": \"\\\\s\"}, \"behavior\": \"Removed\"}",
         "a\xE1\xA0\x8E"
         "b c",
         "a\xE1\xA0\x8E"
         "b|c"},
        {"{\"type\": \"Split\", \"pattern\": {\"Regex\": \"a*\"}, \"behavior\": \"Isolated\"}", "baac", "b|aa|c"},
        {"{\"type\": \"Split\", \"pattern\": {\"Regex\": \"(?i:'S)\"}, \"behavior\": \"Isolated\"}", "it's", "it|'s"},
        {"{\"type\": \"Split\", \"pattern\": {\"Regex\": \"\\\\bx\\\\B\"}, \"behavior\": \"Isolated\"}", "x xy",
         "x |x|y"},
        /* a letter of Unicode 16 */
        {"{\"type\": \"Split\", \"pattern\": {\"Regex\": \"\\\\p{L}+\"}, \"behavior\": \"Isolated\"}",
         "1\xF0\x96\xB5\x80"
         "1",
         "1|\xF0\x96\xB5\x80|1"},
        {"{\"type\": \"ByteLevel\", \"add_prefix_space\": true}", "I'll go  on", " I|'ll| go| | on"},
        {"{\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"WhitespaceSplit\"}, {\"type\": \"Punctuation\"}]}",
         "a,b c", "a|,|b|c"}};
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char json[1024];
        snprintf(json, sizeof json, "{\"pre_tokenizer\": %s, %s}", cases[i][0], MODEL("\"a\": 0", "", ""));
        lc_tokenizer *t = load(json);
        const char *got = words(t, cases[i][1]);
        if (strcmp(got, cases[i][2]))
            fail_msg("%s on '%s': expected '%s', got '%s'", cases[i][0], cases[i][1], cases[i][2], got);
        lc_tokenizer_free(t);
    }
}

static void normalizers(void **state) {
    static const char *const cases[][3] = {
        {"{\"type\": \"NFC\"}", "e\xCC\x81", "\xC3\xA9"},
        {"{\"type\": \"NFD\"}", "\xC3\xA9", "e\xCC\x81"},
        {"{\"type\": \"NFKC\"}", "\xEF\xAC\x81", "fi"},
        {"{\"type\": \"Sequence\", \"normalizers\": [{\"type\": \"NFD\"}, {\"type\": \"StripAccents\"}]}", "\xC3\xA9",
         "e"},
        {"{\"type\": \"Lowercase\"}", "A\xC3\x89\xC4\xB0", "a\xC3\xA9i\xCC\x87"},
        {"{\"type\": \"Strip\", \"strip_left\": true, \"strip_right\": false}",
         " \xC2\xA0"
         "a ",
         "a "},
        {"{\"type\": \"Strip\", \"strip_left\": false, \"strip_right\": true}", " a \xE3\x80\x80", " a"},
        {"{\"type\": \"Replace\", \"pattern\": {\"Regex\": \"\\\\s+\"}, \"content\": \"_\"}", "a \n b", "a_b"},
        {"{\"type\": \"Prepend\", \"prepend\": \"x\"}", "a", "xa"},
        {"{\"type\": \"Prepend\", \"prepend\": \"x\"}", "", ""}};
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char json[1024], got[256];
        snprintf(json, sizeof json, "{\"normalizer\": %s, %s}", cases[i][0], MODEL("\"a\": 0", "", ""));
        lc_tokenizer *t = load(json);
        const char *out;
        size_t n;
        assert_int_equal(lc_tok_normalize(t, cases[i][1], strlen(cases[i][1]), &out, &n), LC_OK);
        snprintf(got, sizeof got, "%.*s", (int)n, out);
        assert_string_equal(got, cases[i][2]);
        lc_tokenizer_free(t);
    }
}

/* ---- size -------------------------------------------------------------------------------------------------------- */

/* Of this process, so that neighbours do not count. */
static double seconds(lc_tokenizer *t, const char *text, size_t n) {
    int32_t *ids, count;
    clock_t start = clock();
    assert_int_equal(lc_tokenizer_encode(t, text, (double)n, 0, 1, &ids, &count), LC_OK);
    lc_free(ids);
    return (double)(clock() - start) / CLOCKS_PER_SEC;
}

/* Words without end: all of one letter, of letters that merge in every way, and of spaces. */
static void long_words(void **state) {
    (void)state;
    size_t n = 400000;
    char *text = malloc(n);
    lc_tokenizer *t[2] = {load("{" MODEL("\"a\": 0, \"b\": 1, \"aa\": 2, \"ab\": 3, \"aaaa\": 4, \"ba\": 5, \"bb\": 6",
                                         "\"a a\", \"a b\", \"aa aa\", \"b a\", \"b b\"", "") "}"),
                          load("{" BYTE_LEVEL MODEL(BYTE_VOCAB, BYTE_MERGES, "") "}")};
    for (int kind = 0; kind < 4; kind++) {
        uint32_t random = 1;
        for (size_t i = 0; i < n; i++) {
            random = random * 1664525 + 1013904223;
            text[i] = kind == 0 ? 'a' : kind == 1 ? "ab"[random >> 31] : kind == 2 ? ' ' : (i + 1) % 1000 ? ' ' : 'w';
        }
        for (int i = 0; i < 2; i++) assert_true(seconds(t[i], text, n) < 20); /* quadratic would take hours */
    }
    lc_tokenizer_free(t[0]), lc_tokenizer_free(t[1]);
    free(text);
}

/* Cutting and caching are the fast twins of plain merging. */
static void cuts_change_nothing(void **state) {
    (void)state;
    const char *json = "{" SPM MODEL(SPM_VOCAB ", \"c\": 11, \"bc\": 12, \"c\\u2581\": 13, \"aa\": 14",
                                     "\"a b\", \"\\u2581 ab\", \"b c\", \"a a\", \"c \\u2581\", \"\\u2581 \\u2581\"",
                                     ", \"unk_token\": \"<unk>\", \"byte_fallback\": true") "}";
    lc_tokenizer *fast = load(json), *plain = load(json);
    assert_true(fast->can_cut);
    plain->can_cut = false;
    uint32_t random = 7;
    for (int round = 0; round < 300; round++) {
        char text[800];
        size_t n = 0;
        while (n < 700) {
            static const char *const parts[] = {"a", "b", "c", " ", "\xC3\xA9", "x", "ab", "  "};
            random = random * 1664525 + 1013904223;
            n += (size_t)snprintf(text + n, sizeof text - n, "%s", parts[random >> 29]);
        }
        char want[4096];
        snprintf(want, sizeof want, "%s", ids_of(plain, text, n, 0, 1));
        assert_string_equal(ids_of(fast, text, n, 0, 1), want);
        memset(plain->cached, 0, LC_TOK_CACHE_SLOTS * sizeof *plain->cached);
    }
    lc_tokenizer_free(fast), lc_tokenizer_free(plain);
}

/* ---- refusals ---------------------------------------------------------------------------------------------------- */

static void refusals(void **state) {
    (void)state;
#define OK_MODEL MODEL("\"a\": 0", "", "")
    expect_refusal("", "test");
    expect_refusal("[]", "object");
    expect_refusal("{\"model\": 3}", "model");
    expect_refusal("{\"model\": {\"type\": \"WordPiece\"}}", "model 'WordPiece' is not supported");
    expect_refusal("{\"model\": {\"type\": \"Unigram\"}}", "no list \"vocab\"");
    expect_refusal("{\"model\": {\"type\": \"Unigram\", \"vocab\": [[\"a\", 0], [\"b\"]]}}", "entry 1");
    expect_refusal("{\"model\": {\"type\": \"Unigram\", \"unk_id\": 1, \"vocab\": [[\"a\", 0]]}}", "unk_id is 1");
    expect_refusal("{\"model\": {\"type\": \"BPE\", \"merges\": []}}", "vocab");
    expect_refusal("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": -1}, \"merges\": []}}", "token id");
    expect_refusal("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0.5}, \"merges\": []}}", "token id");
    expect_refusal("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 2000000000}, \"merges\": []}}", "2000000000");
    expect_refusal("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"b\": 0}, \"merges\": []}}",
                   "two tokens have id 0");
    expect_refusal("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}, \"merges\": [\"a b\"]}}", "entry 0");
    expect_refusal("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}, \"merges\": [\"a\"]}}", "two texts");
    expect_refusal("{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}, \"merges\": [], \"dropout\": 0.1}}",
                   "dropout");
    expect_refusal("{\"normalizer\": {\"type\": \"Precompiled\"}, " OK_MODEL "}", "precompiled_charsmap");
    expect_refusal("{\"normalizer\": {\"type\": \"Precompiled\", \"precompiled_charsmap\": \"/////w==\"}, " OK_MODEL
                   "}",
                   "character map: a trie of 4294967295 bytes");
    expect_refusal("{\"normalizer\": {\"type\": \"BertNormalizer\"}, " OK_MODEL "}", "normalizer 'BertNormalizer'");
    expect_refusal("{\"pre_tokenizer\": {\"type\": \"UnicodeScripts\"}, " OK_MODEL "}",
                   "pre-tokenizer 'UnicodeScripts'");
    expect_refusal("{\"decoder\": {\"type\": \"CTC\"}, " OK_MODEL "}", "decoder 'CTC'");
    expect_refusal("{\"post_processor\": {\"type\": \"Magic\"}, " OK_MODEL "}", "post-processor 'Magic'");
    expect_refusal(
        "{\"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": [{\"SpecialToken\": {\"id\": \"<s>\"}}],"
        "\"special_tokens\": {}}, " OK_MODEL "}",
        "'<s>' is not among");
    expect_refusal("{\"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"Regex\": \"a(b\"}, \"behavior\": "
                   "\"Isolated\"}, " OK_MODEL "}",
                   "regular expression 'a(b'");
    expect_refusal("{\"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"Regex\": \"[a&&b]\"}, \"behavior\": "
                   "\"Isolated\"}, " OK_MODEL "}",
                   "&&");
    expect_refusal(
        "{\"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"Regex\": \"a\"}, \"behavior\": \"Odd\"}, " OK_MODEL
        "}",
        "'Odd'");
    expect_refusal("{\"pre_tokenizer\": {\"type\": \"Metaspace\", \"replacement\": \"ab\"}, " OK_MODEL "}",
                   "one character");
    lc_tokenizer *t = load("{" MODEL("\"a\": 0", "", ", \"unk_token\": \"<gone>\"") "}");
    expect(t, "a", "0");
    assert_non_null(strstr(ids_of(t, "b", 1, 0, 1), "unknown token"));
    lc_tokenizer_free(t);
    /* replacements that feed each other */
    char json[2048] = "{\"normalizer\": {\"type\": \"Sequence\", \"normalizers\": [";
    for (int i = 0; i < 12; i++)
        strcat(json, "{\"type\": \"Replace\", \"pattern\": {\"String\": \"a\"}, \"content\": \"aaaaaaaa\"},");
    strcpy(json + strlen(json) - 1, "]}, " OK_MODEL "}");
    t = load(json);
    assert_non_null(strstr(ids_of(t, "aaaaaaaa", 8, 0, 1), "blow"));
    lc_tokenizer_free(t);
}

/* ---- GGUF -------------------------------------------------------------------------------------------------------- */

typedef struct gguf {
    unsigned char data[8192];
    size_t n;
    uint64_t count;
} gguf;

static void put(gguf *g, const void *p, size_t n) {
    memcpy(g->data + g->n, p, n);
    g->n += n;
}
static void put_number(gguf *g, uint64_t v, size_t bytes) { put(g, &v, bytes); }
static void put_string(gguf *g, const char *s) { put_number(g, strlen(s), 8), put(g, s, strlen(s)); }
static void put_key(gguf *g, const char *key, uint32_t type) {
    put_string(g, key), put_number(g, type, 4);
    g->count++;
}
static void put_strings(gguf *g, const char *key, const char *const *s, size_t n) {
    put_key(g, key, 9), put_number(g, 8, 4), put_number(g, n, 8);
    for (size_t i = 0; i < n; i++) put_string(g, s[i]);
}

static lc_tokenizer *load_gguf(gguf *g, const char *refused) {
    char path[] = "/tmp/lolcats-test-XXXXXX";
    memcpy(g->data, "GGUF", 4);
    memcpy(g->data + 4, &(uint32_t){3}, 4);
    memset(g->data + 8, 0, 8);
    memcpy(g->data + 16, &g->count, 8);
    while (g->n % 32) g->data[g->n++] = 0;
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, g->data, g->n), g->n);
    close(fd);
    lc_file *f;
    if (lc_file_open(&f, path) != LC_OK) fail_msg("%s", lc_error_message());
    unlink(path);
    lc_tokenizer *t;
    int status = lc_tokenizer_from_gguf(&t, f);
    lc_file_close(f);
    if (refused && (status == LC_OK || !strstr(lc_error_message(), refused)))
        fail_msg("expected '%s': %s", refused, lc_error_message());
    if (!refused && status != LC_OK) fail_msg("%s", lc_error_message());
    return t;
}

static void gguf_byte_level(void **state) {
    (void)state;
    static const char *const tokens[] = {"<s>", "h", "e", "1", "\xC4\xA0", "he", "\xC4\xA0he", "<tool>"},
                             *const merges[] = {"h e", "\xC4\xA0 he"};
    for (int round = 0; round < 2; round++) {
        gguf g = {.n = 24};
        put_key(&g, "tokenizer.ggml.model", 8), put_string(&g, "gpt2");
        put_key(&g, "tokenizer.ggml.pre", 8), put_string(&g, round ? "klingon" : "smollm");
        put_strings(&g, "tokenizer.ggml.tokens", tokens, 8);
        put_key(&g, "tokenizer.ggml.token_type", 9), put_number(&g, 5, 4), put_number(&g, 8, 8);
        for (int i = 0; i < 8; i++) put_number(&g, i == 0 ? 3 : i == 7 ? 4 : 1, 4);
        put_strings(&g, "tokenizer.ggml.merges", merges, 2);
        put_key(&g, "tokenizer.ggml.bos_token_id", 4), put_number(&g, 0, 4);
        put_key(&g, "tokenizer.ggml.add_bos_token", 7), put_number(&g, 1, 1);
        lc_tokenizer *t = load_gguf(&g, round ? "'klingon'" : NULL);
        if (!t) continue;
        expect(t, "he he11<s><tool>", "5 6 3 3 0 7");
        assert_string_equal(ids_of(t, "he", 2, 1, 1), "0 5");
        assert_true(lc_tokenizer_is_special(t, 0));
        assert_false(lc_tokenizer_is_special(t, 7));
        TEXT(t, 1, "he he", 0, 5, 6);
        lc_tokenizer_free(t);
    }
}

static void gguf_scores(void **state) {
    (void)state;
    static const char *const tokens[] = {"<unk>",
                                         "<s>",
                                         "</s>",
                                         "<0xC3>",
                                         "<0xA9>",
                                         "\xE2\x96\x81",
                                         "a",
                                         "b",
                                         "ab",
                                         "bb",
                                         "\xE2\x96\x81"
                                         "a"};
    static const float scores[] = {0, 0, 0, 0, 0, -10, -11, -12, -3, -2, -4};
    static const int types[] = {2, 3, 3, 6, 6, 1, 1, 1, 1, 1, 1};
    gguf g = {.n = 24};
    put_key(&g, "tokenizer.ggml.model", 8), put_string(&g, "llama");
    put_strings(&g, "tokenizer.ggml.tokens", tokens, 11);
    put_key(&g, "tokenizer.ggml.scores", 9), put_number(&g, 6, 4), put_number(&g, 11, 8),
        put(&g, scores, sizeof scores);
    put_key(&g, "tokenizer.ggml.token_type", 9), put_number(&g, 5, 4), put_number(&g, 11, 8),
        put(&g, types, sizeof types);
    put_key(&g, "tokenizer.ggml.bos_token_id", 4), put_number(&g, 1, 4);
    put_key(&g, "tokenizer.ggml.unknown_token_id", 4), put_number(&g, 0, 4);
    lc_tokenizer *t = load_gguf(&g, NULL);
    expect(t, "a", "10");
    expect(t, "abb", "10 9"); /* bb has the best score, then the piece with the space */
    expect(t, "ab", "5 8");
    expect(t, "b\xC3\xA9", "5 7 3 4");
    expect(t, "</s>a", "2 10");
    assert_string_equal(ids_of(t, "a", 1, 1, 1), "1 10");
    TEXT(t, 1, "abb\xC3\xA9", 1, 10, 9, 3, 4);
    lc_tokenizer_free(t);
    gguf none = {.n = 24};
    load_gguf(&none, "tokenizer.ggml.model is missing");
}

/* ---- sampler ----------------------------------------------------------------------------------------------------- */

static void sampler(void **state) {
    (void)state;
    float logits[] = {1, 3, 2, -1, 3};
    lc_sampling how = {.temperature = 0, .top_p = 1, .repetition = 1};
    assert_int_equal(lc_sample(logits, 5, &how, NULL, 0, 0.5), 1); /* greedy; of equals the first */
    int32_t recent[] = {1, 1, 99, -1};
    how.repetition = 2;
    assert_int_equal(lc_sample(logits, 5, &how, recent, 4, 0.5), 4); /* 3 / 2, once */
    how = (lc_sampling){.temperature = 1, .top_p = 1, .repetition = 1, .top_k = 2};
    for (int i = 0; i < 10; i++) assert_int_equal(lc_sample(logits, 5, &how, NULL, 0, i / 10.0), i < 5 ? 1 : 4);
    how = (lc_sampling){.temperature = 1, .top_p = 0.3, .repetition = 1};
    assert_int_equal(lc_sample(logits, 5, &how, NULL, 0, 0.999), 1);
    how = (lc_sampling){.temperature = 1, .top_p = 1, .min_p = 0.5, .repetition = 1};
    for (int i = 0; i < 10; i++) {
        int32_t id = lc_sample(logits, 5, &how, NULL, 0, i / 10.0);
        assert_true(id == 1 || id == 4);
    }
    how = (lc_sampling){.temperature = 0.5, .top_p = 1, .repetition = 1};
    double total = 0, weight[5];
    for (int i = 0; i < 5; i++) total += weight[i] = __builtin_exp(logits[i] / 0.5);
    int seen[5] = {0};
    for (int i = 0; i < 10000; i++) seen[lc_sample(logits, 5, &how, NULL, 0, i / 10000.0)]++;
    for (int i = 0; i < 5; i++) assert_true(__builtin_fabs(seen[i] - 10000 * weight[i] / total) <= 2);
    float broken[] = {__builtin_nanf(""), -__builtin_inff(), 0, __builtin_nanf("")};
    assert_int_equal(lc_sample(broken, 4, &how, NULL, 0, 0.99), 2);
    float nothing[] = {-__builtin_inff(), -__builtin_inff()};
    assert_int_equal(lc_sample(nothing, 2, &how, NULL, 0, 0.5), 0);
    assert_int_equal(lc_sample(logits, 0, &how, NULL, 0, 0.5), -1);
}

/* top-p over a vocabulary big enough that only its head is sorted */
static void sampler_large(void **state) {
    (void)state;
    enum { N = 50000 };
    float *logits = malloc(N * sizeof *logits);
    for (int i = 0; i < N; i++) logits[i] = -(float)((i * 7919) % N) * 1e-4f;
    lc_sampling how = {.temperature = 1, .top_p = 0.5, .repetition = 1};
    double total = 0, reached = 0;
    for (int i = 0; i < N; i++) total += __builtin_exp(-i * 1e-4);
    int keep = 0;
    while (reached < 0.5 * total) reached += __builtin_exp(-keep++ * 1e-4);
    int32_t id = lc_sample(logits, N, &how, NULL, 0, 0.9999999);
    assert_in_range(((int64_t)id * 7919) % N, keep - 3, keep);
    free(logits);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(byte_level),        cmocka_unit_test(merge_order),         cmocka_unit_test(invalid_utf8),
        cmocka_unit_test(sentencepiece),     cmocka_unit_test(metaspace),           cmocka_unit_test(added_tokens),
        cmocka_unit_test(normalized_tokens), cmocka_unit_test(pre_tokenizers),      cmocka_unit_test(normalizers),
        cmocka_unit_test(long_words),        cmocka_unit_test(cuts_change_nothing), cmocka_unit_test(refusals),
        cmocka_unit_test(gguf_byte_level),   cmocka_unit_test(gguf_scores),         cmocka_unit_test(sampler),
        cmocka_unit_test(sampler_large)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
