/* fuzz_tokenizer.c: a tokenizer may be any bytes, and so may the text and the ids it is given: an error or an answer,
 * no crash and no hang. The first byte says what the rest is: 'j' a tokenizer.json, a NUL and a text; 'g' a GGUF; 's'
 * and 'S' a SentencePiece model, run in the one way or the other; 't' tiktoken's lines; 'c' a text to NUL and a
 * character map; 'r' a regular expression, a NUL and a text; anything else a text for one of the tokenizers below. */
#define _GNU_SOURCE /* strnlen */
#include <stdlib.h>
#include <string.h>

#include "../../runtime/io/file.h"
#include "../../runtime/text/tokenizer.h"

static const char *const fixed[] = {
    "{\"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": true}, \"decoder\": {\"type\": \"ByteLevel\"},"
    "\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"b\": 1, \"ab\": 2, \"\\u0120\": 3, \"\\u0120a\": 4, "
    "\"aa\": 5, \"1\": 6},"
    "\"merges\": [\"a b\", \"\\u0120 a\", \"a a\"]}}",
    "{\"normalizer\": {\"type\": \"Sequence\", \"normalizers\": [{\"type\": \"NFC\"}, {\"type\": \"Prepend\", "
    "\"prepend\": \"_\"},"
    "{\"type\": \"Replace\", \"pattern\": {\"String\": \" \"}, \"content\": \"_\"}]}, \"decoder\": {\"type\": "
    "\"Sequence\","
    "\"decoders\": [{\"type\": \"ByteFallback\"}, {\"type\": \"Fuse\"}, {\"type\": \"Strip\", \"content\": \" \", "
    "\"start\": 1, \"stop\": 1}]},"
    "\"added_tokens\": [{\"content\": \"<s>\", \"special\": true, \"lstrip\": true, \"rstrip\": true}, {\"content\": "
    "\"ab a\","
    "\"single_word\": true}], \"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"b\": 1, \"ab\": 2, \"_\": 3, "
    "\"_a\": 4, \"<u>\": 5,"
    "\"<0xC3>\": 6, \"<0xA9>\": 7, \"<0xFF>\": 8}, \"merges\": [\"a b\", \"_ a\"], \"byte_fallback\": true, "
    "\"unk_token\": \"<u>\","
    "\"fuse_unk\": true}}",
    "{\"pre_tokenizer\": {\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"Metaspace\", \"replacement\": "
    "\"_\"},"
    "{\"type\": \"Punctuation\", \"behavior\": \"MergedWithPrevious\"}, {\"type\": \"Digits\"}, {\"type\": "
    "\"Whitespace\"}]},"
    "\"decoder\": {\"type\": \"Metaspace\", \"replacement\": \"_\"}, \"normalizer\": {\"type\": \"NFKD\"},"
    "\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"b#\": 1, \"#ab#\": 2, \"#b#\": 3, \"##ab#\": 4, \"a#b#\": "
    "5}, \"merges\": [],"
    "\"continuing_subword_prefix\": \"#\", \"end_of_word_suffix\": \"#\", \"unk_token\": \"a\"}}"};

static void use(lc_tokenizer *t, const char *text, size_t n) {
    for (int mode = 0; mode < 4; mode++) {
        int32_t *ids, count, length;
        char *back;
        if (lc_tokenizer_encode(t, text, (double)n, mode & 1, mode & 2, &ids, &count) != LC_OK) continue;
        for (int32_t i = 0; i < count; i++)
            if (ids[i] < 0) abort();
        if (lc_tokenizer_decode(t, ids, count, mode & 1, &back, &length) == LC_OK) {
            if (!lc_tok_utf8_valid(back, (size_t)length)) abort();
            lc_free(back);
        }
        lc_free(ids);
    }
    int32_t odd[64], length, n_odd = (int32_t)(n / 4 > 64 ? 64 : n / 4); /* any bytes as ids, mostly small ones */
    char *back;
    for (int32_t i = 0; i < n_odd; i++) {
        memcpy(&odd[i], text + 4 * i, 4);
        if (i % 8) odd[i] &= 15;
    }
    if (lc_tokenizer_decode(t, odd, n_odd, 0, &back, &length) == LC_OK) lc_free(back);
}

static const char sample[] = "ab </s>\xC3\xA9\xFF 12 <0x41>  a\xE2\x96\x81 ab\xEF\xAC\x81"
                             "e\xCC\x81<sep>";

static void fuzz_spm(const char *s, size_t n, bool own) {
    lc_tok_options how = {.own = own, .add_bos = -1, .add_eos = 1, .legacy = own};
    lc_tokenizer *t;
    if (lc_tok_from_spm(&t, "fuzz", s, n, &how) != LC_OK) return;
    use(t, sample, sizeof sample - 1);
    use(t, s, n > 200 ? 200 : n);
    lc_tokenizer_free(t);
}

static void fuzz_tiktoken(const char *s, size_t n) {
    lc_tok_options how = {.add_bos = -1, .add_eos = -1, .legacy = -1};
    lc_tokenizer *t;
    if (lc_tok_from_bytes(&t, "fuzz", s, n, &how) == LC_OK) lc_tokenizer_free(t);
}

static void fuzz_charsmap(const char *s, size_t n) {
    size_t len = strnlen(s, n);
    lc_tok_charsmap m = {0};
    lc_tok_buf out = {0};
    if (len < n && lc_tok_charsmap_set(&m, s + len + 1, n - len - 1) == LC_OK) {
        lc_tok_charsmap_apply(&m, sample + 10, sizeof sample - 11, &out);
        if (lc_tok_utf8_valid(s, len)) lc_tok_charsmap_apply(&m, s, len, &out);
        if (!lc_tok_utf8_valid(out.p, out.len)) abort();
        struct lc_tokenizer t = {.spm = {.prefix = true, .strip = true, .escape = true, .map = m}};
        if (lc_tok_utf8_valid(s, len)) lc_tok_spm_normalize(&t, s, len, &out);
        if (!lc_tok_utf8_valid(out.p, out.len)) abort();
    }
    lc_tok_charsmap_drop(&m);
    free(out.p);
}

static void fuzz_json(const char *s, size_t n) {
    size_t len = strnlen(s, n);
    lc_tokenizer *t;
    if (lc_tok_from_json(&t, "fuzz", s, len) != LC_OK) return;
    use(t, s + len, n - len);
    for (int32_t i = -1; i < 20; i++) {
        int32_t m;
        lc_tokenizer_token(t, i, &m), lc_tokenizer_is_special(t, i);
    }
    lc_tokenizer_free(t);
}

static void fuzz_regex(const char *s, size_t n) {
    size_t len = strnlen(s, n);
    lc_tok_pattern p = {0};
    lc_tok_search x = {0};
    bool found = true;
    if (lc_tok_pattern_regex(&p, s, len) == LC_OK && lc_tok_utf8_valid(s + len, n - len))
        for (int i = 0; i < 100 && found; i++)
            if (lc_tok_search_next(&p, s + len, n - len, &x, &found) != LC_OK) break;
    lc_tok_pattern_drop(&p);
}

static void fuzz_gguf(const char *s, size_t n) {
    struct lc_file *f;
    lc_tokenizer *t;
    if (lc_file_open_memory(s, n, "fuzz", &f) != LC_OK) return;
    if (lc_tokenizer_from_gguf(&t, f) == LC_OK) {
        use(t, sample, sizeof sample - 1);
        lc_tokenizer_free(t);
    }
    lc_file_close(f);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static lc_tokenizer *t[sizeof fixed / sizeof *fixed];
    if (!size) return 0;
    const char *s = (const char *)data + 1;
    if (data[0] == 'j') return fuzz_json(s, size - 1), 0;
    if (data[0] == 'g') return fuzz_gguf(s, size - 1), 0;
    if (data[0] == 's' || data[0] == 'S') return fuzz_spm(s, size - 1, data[0] == 'S'), 0;
    if (data[0] == 't') return fuzz_tiktoken(s, size - 1), 0;
    if (data[0] == 'c') return fuzz_charsmap(s, size - 1), 0;
    if (data[0] == 'r') return fuzz_regex(s, size - 1), 0;
    size_t which = data[0] % (sizeof fixed / sizeof *fixed);
    if (!t[which] && lc_tok_from_json(&t[which], "fixed", fixed[which], strlen(fixed[which])) != LC_OK) abort();
    use(t[which], s, size - 1);
    return 0;
}
