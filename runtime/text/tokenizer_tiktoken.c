/* tokenizer_tiktoken.c: builds a tokenizer from tiktoken's tokenizer.model: a line for each token, its bytes in base64,
 * a space, and its rank, which is its id. What the file does not say, how texts are cut into words and which special
 * tokens follow, is known by the number of ranks. Bytes are kept in GPT-2's alphabet, as a tokenizer.json of the same
 * model has them, so that both run alike. */
#include "tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../io/doc.h"

#define LETTERS "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}"
#define REST    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define UPPER   "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
#define LOWER   "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
#define ENDING  "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

const char lc_tok_llama3_regex[] = LETTERS "{1,3}" REST;
const char lc_tok_qwen_regex[] = LETTERS REST;
const char lc_tok_o200k_regex[] =
    "[^\\r\\n\\p{L}\\p{N}]?" UPPER "*" LOWER "+" ENDING "|[^\\r\\n\\p{L}\\p{N}]?" UPPER "+" LOWER "*" ENDING
    "|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

/* special: names in order, "*" for reserved ones, which are numbered in turn up to `specials`. */
static const struct known {
    int32_t ranks, specials;
    const char *regex, *bos, *eos, *special[12];
} known[] = {
    {128000,
     256,
     lc_tok_llama3_regex,
     "<|begin_of_text|>",
     "<|end_of_text|>",
     {"<|begin_of_text|>", "<|end_of_text|>", "*", "*", "*", "*", "<|start_header_id|>", "<|end_header_id|>", "*",
      "<|eot_id|>"}},
    {151643, 208, lc_tok_qwen_regex, NULL, NULL, {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_*|>"}},
    {200000, 0, lc_tok_o200k_regex, "<|begin_of_text|>", "<|end_of_text|>", {NULL}}};

typedef struct line {
    size_t number, at; /* at: its first byte's place in the file */
    const char *text;
    size_t text_len;
    int32_t rank;
} line;

static int sextet(char c) {
    return c >= 'A' && c <= 'Z'   ? c - 'A'
           : c >= 'a' && c <= 'z' ? c - 'a' + 26
           : c >= '0' && c <= '9' ? c - '0' + 52
           : c == '+'             ? 62
           : c == '/'             ? 63
                                  : -1;
}

/* Appends what `n` characters of base64 stand for: as bytes, or in GPT-2's alphabet. False: it is no base64. */
bool lc_tok_base64(const char *s, size_t n, bool alphabet, lc_tok_buf *out, lc_status *status) {
    size_t pad = n >= 1 && s[n - 1] == '=' ? 1 + (n >= 2 && s[n - 2] == '=') : 0;
    uint32_t bits = 0;
    int have = 0;
    *status = LC_OK;
    if (n % 4 || pad == n) return n == 0;
    for (size_t i = 0; i < n - pad; i++) {
        int v = sextet(s[i]);
        if (v < 0) return false;
        bits = bits << 6 | (uint32_t)v, have += 6;
        if (have < 8) continue;
        have -= 8;
        unsigned char b = (unsigned char)(bits >> have);
        char c = (char)b;
        *status = alphabet ? lc_tok_put_char(out, lc_tok_byte_char(b)) : lc_tok_put(out, &c, 1);
        if (*status != LC_OK) return true;
    }
    return !(bits & ((1u << have) - 1));
}

/* The next line that is not empty; false at the end. */
static lc_status next_line(const char *data, size_t n, size_t *at, line *x, bool *more) {
    for (*more = false; *at < n && !*more;) {
        const char *s = data + *at, *stop = memchr(s, '\n', n - *at);
        size_t len = stop ? (size_t)(stop - s) : n - *at, digits = 0;
        x->number++, x->at = *at;
        *at += len + 1;
        if (len && s[len - 1] == '\r') len--;
        if (!len) continue;
        const char *space = memchr(s, ' ', len);
        int64_t rank = 0;
        for (size_t i = space ? (size_t)(space - s) + 1 : len; i < len && rank < INT32_MAX; i++, digits++) {
            if (s[i] < '0' || s[i] > '9') return lc_fail(LC_EPARSE, "line %zu: its rank is no number", x->number);
            rank = rank * 10 + (s[i] - '0');
        }
        if (!digits || rank >= 1 << 24)
            return lc_fail(LC_EPARSE, "line %zu: expected base64, a space, and a rank below 16 million", x->number);
        x->text = s, x->text_len = (size_t)(space - s), x->rank = (int32_t)rank;
        *more = true;
    }
    return LC_OK;
}

static lc_status vocabulary(lc_tokenizer *t, const char *data, size_t n) {
    int32_t count = 0, max = -1;
    line x = {0};
    lc_tok_buf token = {0};
    lc_status status;
    bool more;
    for (size_t at = 0;; count++) {
        LC_TRY(next_line(data, n, &at, &x, &more));
        if (!more) break;
        if (x.rank > max) max = x.rank;
    }
    if (!count) return lc_fail(LC_EPARSE, "it holds no tokens");
    LC_TRY(lc_tok_vocab_start(t, count, max));
    x = (line){0};
    for (size_t at = 0;;) {
        status = next_line(data, n, &at, &x, &more);
        if (status != LC_OK || !more) break;
        token.len = 0;
        if (!lc_tok_base64(x.text, x.text_len, true, &token, &status) || !token.len)
            status = lc_fail(LC_EPARSE, "line %zu: expected a token's bytes in base64", x.number);
        if (status == LC_OK && lc_tok_vocab_find(t, token.p, token.len) >= 0)
            status = lc_fail(LC_EPARSE, "line %zu: the token of an earlier line", x.number);
        if (status == LC_OK) status = lc_tok_vocab_add(t, token.p, token.len, x.rank);
        if (status != LC_OK) break;
    }
    free(token.p);
    if (status == LC_OK && t->model_count != t->size)
        return lc_fail(LC_EPARSE, "%d tokens, but ranks up to %d", (int)t->model_count, (int)t->size - 1);
    return status;
}

static lc_status special_tokens(lc_tokenizer *t, const struct known *k) {
    char name[64];
    int reserved = 0;
    for (int32_t i = 0; i < k->specials; i++) {
        const char *s = i < 12 && k->special[i] ? k->special[i] : "*";
        if (!strcmp(s, "*") && k->regex == lc_tok_llama3_regex)
            snprintf(name, sizeof name, "<|reserved_special_token_%d|>", reserved++);
        else if (strchr(s, '*')) /* the rest of Qwen's */
            snprintf(name, sizeof name, "<|extra_%d|>", reserved++);
        else
            snprintf(name, sizeof name, "%s", s);
        lc_tok_added a = {.special = true};
        LC_TRY(lc_tok_add_token(t, name, strlen(name), &a));
    }
    return LC_OK;
}

static lc_status put_template(lc_tokenizer *t, const struct known *k, const lc_tok_options *how) {
    int32_t items[4], n = 0, bos = k->bos ? lc_tokenizer_id(t, k->bos) : -1,
                      eos = k->eos ? lc_tokenizer_id(t, k->eos) : -1;
    if (bos >= 0 && how->add_bos != 0) items[n++] = bos;
    items[n++] = -1;
    if (eos >= 0 && how->add_eos == 1) items[n++] = eos;
    items[n] = -2;
    return n > 1 ? lc_tok_add_post(t, items) : LC_OK;
}

static lc_status load(lc_tokenizer *t, const char *data, size_t n, const lc_tok_options *how) {
    const struct known *k = NULL;
    LC_TRY(vocabulary(t, data, n));
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].ranks == t->size) k = &known[i];
    if (!k)
        return lc_fail(LC_EPARSE,
                       "a tiktoken file of %d ranks: how its texts are cut is known for 128000 (Llama 3), "
                       "151643 (Qwen) and 200000 (Llama 4)",
                       (int)t->size);
    t->ignore_merges = true; /* a word that is a token is taken whole */
    LC_TRY(lc_tok_merges_derive(t, NULL, NULL, LC_MERGES_BY_ID));
    LC_TRY(lc_tok_add_split(t, k->regex, LC_SPLIT_ISOLATED, false));
    LC_TRY(lc_tok_add_byte_level(t, false, false));
    lc_tok_dec *dec;
    LC_TRY(lc_tok_add_dec(t, &dec));
    dec->kind = LC_DEC_BYTE_LEVEL;
    int32_t list = how->d ? lc_doc_get(how->d, 0, "added_tokens") : -1;
    if (list < 0) LC_TRY(special_tokens(t, k));
    LC_TRY(lc_tok_added_from_doc(t, how->d, list));
    LC_TRY(put_template(t, k, how));
    return lc_tok_finish(t);
}

lc_status lc_tok_from_tiktoken(lc_tokenizer **out, const char *name, const char *data, size_t n,
                               const lc_tok_options *how) {
    lc_tokenizer *t = NULL;
    *out = NULL;
    lc_status status = lc_tok_new(&t, name);
    if (status == LC_OK) {
        status = load(t, data, n, how);
        if (status != LC_OK) status = lc_fail_in(status, "%s: ", name);
    }
    if (status != LC_OK) return lc_tokenizer_free(t), status;
    *out = t;
    return LC_OK;
}
