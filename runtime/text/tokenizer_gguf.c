/* tokenizer_gguf.c: builds a tokenizer from a GGUF's tokenizer.ggml.* metadata. Two models are known: "gpt2",
 * byte-level BPE whose pre-tokenizer is named by tokenizer.ggml.pre, and "llama", SentencePiece BPE, whose pieces carry
 * scores instead of a list of merges: every split of a piece into two pieces is a merge, and its rank is the piece's
 * place by score. */
#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>

#define UPPER "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
#define LOWER "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
#define OTHER "[^\\r\\n\\p{L}\\p{N}]?"

static const char tekken[] = OTHER UPPER "*" LOWER "+|" OTHER UPPER "+" LOWER "*|\\p{N}"
                                         "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

/* Names of tokenizer.ggml.pre. A NULL regex is GPT-2's. NFC: texts are normalized, which the file does not say but the
 * model's own tokenizer does. */
enum { DIGITS = 1, WHOLE = 2, BOS = 4, NFC = 8 }; /* digits one by one; words that are tokens whole; BOS unless told */
static const struct pre {
    const char *name, *regex;
    int how;
} known[] = {{"smollm", NULL, DIGITS},
             {"starcoder", NULL, DIGITS},
             {"refact", NULL, DIGITS},
             {"command-r", NULL, DIGITS},
             {"codeshell", NULL, DIGITS},
             {"exaone", NULL, DIGITS},
             {"gpt-2", NULL, 0},
             {"phi-2", NULL, 0},
             {"mpt", NULL, 0},
             {"olmo", NULL, 0},
             {"jais", NULL, 0},
             {"llama-bpe", lc_tok_llama3_regex, WHOLE | BOS},
             {"llama3", lc_tok_llama3_regex, WHOLE | BOS},
             {"llama-v3", lc_tok_llama3_regex, WHOLE | BOS},
             {"dbrx", lc_tok_llama3_regex, 0},
             {"smaug-bpe", lc_tok_llama3_regex, 0},
             {"qwen2", lc_tok_qwen_regex, NFC},
             {"deepseek-r1-qwen", lc_tok_qwen_regex, NFC},
             {"stablelm2", lc_tok_qwen_regex, 0},
             {"gpt-4o", lc_tok_o200k_regex, 0},
             {"llama4", lc_tok_o200k_regex, BOS},
             {"tekken", tekken, WHOLE | BOS}};

typedef struct loader {
    lc_tokenizer *t;
    const lc_file *f;
    int tokens, types, scores, merges; /* metadata entries, -1: absent */
    int32_t count;
    lc_tok_buf clean;
} loader;

/* ---- metadata ---------------------------------------------------------------------------------------------------- */

static int list(const loader *x, const char *key, int32_t *count) {
    int at = lc_file_meta_find(x->f, key);
    if (at < 0 || lc_file_meta_kind(x->f, at) != 4) return -1;
    *count = lc_file_meta_size(x->f, at);
    return at;
}

static double number(const loader *x, const char *key, double otherwise) {
    int at = lc_file_meta_find(x->f, key);
    if (at < 0) return otherwise;
    int kind = lc_file_meta_kind(x->f, at);
    return kind == 1 || kind == 2 ? lc_file_meta_number(x->f, at, -1) : otherwise;
}

static int32_t id_of(const loader *x, const char *key) {
    double id = number(x, key, -1);
    return id >= 0 && id < x->count ? (int32_t)id : -1;
}

static const char *string_of(const loader *x, const char *key, int32_t *n) {
    int at = lc_file_meta_find(x->f, key);
    *n = 0;
    return at < 0 || lc_file_meta_kind(x->f, at) != 3 ? NULL : lc_file_meta_string(x->f, at, -1, n);
}

/* A token's text; what is no UTF-8 becomes U+FFFD, since everything behind takes texts to be UTF-8. */
static lc_status token_text(loader *x, int list_at, int32_t i, const char **s, size_t *n) {
    int32_t len = 0;
    *s = lc_file_meta_string(x->f, list_at, i, &len);
    if (!*s || len < 0) return lc_fail(LC_EPARSE, "%s, entry %d: no text", lc_file_meta_key(x->f, list_at), (int)i);
    *n = (size_t)len;
    if (lc_tok_utf8_valid(*s, *n)) return LC_OK;
    x->clean.len = 0;
    LC_TRY(lc_tok_put_lossy(&x->clean, *s, *n));
    *s = x->clean.p, *n = x->clean.len;
    return LC_OK;
}

static int type_of(const loader *x, int32_t id) {
    return x->types < 0 ? LC_PIECE_NORMAL : (int)lc_file_meta_number(x->f, x->types, id);
}

/* ---- the model --------------------------------------------------------------------------------------------------- */

static lc_status vocabulary(loader *x) {
    int32_t n = 0;
    x->tokens = list(x, "tokenizer.ggml.tokens", &x->count);
    if (x->tokens < 0 || x->count < 1) return lc_fail(LC_EPARSE, "tokenizer.ggml.tokens is missing");
    x->types = list(x, "tokenizer.ggml.token_type", &n);
    if (x->types >= 0 && n != x->count)
        return lc_fail(LC_EPARSE, "tokenizer.ggml.token_type has %d entries for %d tokens", (int)n, (int)x->count);
    x->scores = list(x, "tokenizer.ggml.scores", &n);
    if (x->scores >= 0 && n != x->count)
        return lc_fail(LC_EPARSE, "tokenizer.ggml.scores has %d entries for %d tokens", (int)n, (int)x->count);
    LC_TRY(lc_tok_vocab_start(x->t, x->count, x->count - 1));
    for (int32_t i = 0; i < x->count; i++) {
        const char *s;
        size_t len;
        LC_TRY(token_text(x, x->tokens, i, &s, &len));
        LC_TRY(lc_tok_vocab_add(x->t, s, len, i));
    }
    return LC_OK;
}

static lc_status listed_merges(loader *x) {
    int32_t count = 0;
    lc_tok_buf joined = {0};
    x->merges = list(x, "tokenizer.ggml.merges", &count);
    if (x->merges < 0) return lc_fail(LC_EPARSE, "tokenizer.ggml.merges is missing");
    LC_TRY(lc_tok_merges_start(x->t, (size_t)count));
    lc_status status = LC_OK;
    for (int32_t i = 0; i < count && status == LC_OK; i++) {
        const char *s;
        size_t n;
        status = token_text(x, x->merges, i, &s, &n);
        if (status != LC_OK) break;
        const char *space = n ? memchr(s + 1, ' ', n - 1) : NULL;
        if (!space) {
            status = lc_fail(LC_EPARSE, "tokenizer.ggml.merges, entry %d: it is not two texts", (int)i);
            break;
        }
        size_t left = (size_t)(space - s), right = n - left - 1;
        joined.len = 0;
        status = lc_tok_put(&joined, s, left);
        if (status == LC_OK) status = lc_tok_put(&joined, space + 1, right);
        if (status != LC_OK) break;
        int32_t a = lc_tok_vocab_find(x->t, s, left), b = lc_tok_vocab_find(x->t, space + 1, right),
                made = lc_tok_vocab_find(x->t, joined.p, joined.len);
        if (a < 0 || b < 0 || made < 0)
            status = lc_fail(LC_EPARSE, "tokenizer.ggml.merges, entry %d: '%.*s' has parts that are no tokens", (int)i,
                             (int)n, s);
        else
            status = lc_tok_merge_add(x->t, a, b, (uint32_t)i, made);
    }
    free(joined.p);
    return status;
}

static bool can_be_made(const loader *x, int32_t id) {
    int type = type_of(x, id);
    return type == LC_PIECE_NORMAL || type == LC_PIECE_USER || type == LC_PIECE_UNUSED;
}

static lc_status scored_merges(loader *x) {
    if (x->scores < 0) return lc_fail(LC_EPARSE, "tokenizer.ggml.scores is missing");
    float *score = lc_alloc((size_t)x->count, sizeof *score);
    uint8_t *skip = lc_alloc((size_t)x->count, 1);
    lc_status status = score && skip ? LC_OK : LC_ENOMEM;
    for (int32_t i = 0; i < x->count && status == LC_OK; i++) {
        double v = lc_file_meta_number(x->f, x->scores, i);
        if (!(v - v == 0)) status = lc_fail(LC_EPARSE, "tokenizer.ggml.scores, entry %d: it is not finite", (int)i);
        score[i] = (float)v;
        skip[i] = !can_be_made(x, i);
    }
    if (status == LC_OK) status = lc_tok_merges_derive(x->t, score, skip, LC_MERGES_LEFTMOST);
    lc_free(score), lc_free(skip);
    return status;
}

/* ---- special tokens and templates -------------------------------------------------------------------------------- */

static lc_status added_tokens(loader *x) {
    for (int32_t i = 0; i < x->count; i++) {
        int type = type_of(x, i);
        if (type != LC_PIECE_CONTROL && type != LC_PIECE_USER && type != LC_PIECE_UNKNOWN) continue;
        const char *s = x->t->text.p + x->t->token[i].at;
        lc_tok_added a = {.special = type != LC_PIECE_USER};
        if (lc_tok_vocab_find(x->t, s, x->t->token[i].len) != i) continue;
        lc_tok_buf copy = {0}; /* the text moves while it grows */
        lc_status status = lc_tok_put(&copy, s, x->t->token[i].len);
        if (status == LC_OK) status = lc_tok_add_token(x->t, copy.p, copy.len, &a);
        free(copy.p);
        LC_TRY(status);
    }
    return LC_OK;
}

static lc_status add_template(loader *x, bool bos_by_default) {
    int32_t items[4], n = 0, bos = id_of(x, "tokenizer.ggml.bos_token_id"),
                      eos = id_of(x, "tokenizer.ggml.eos_token_id");
    bool add_bos = number(x, "tokenizer.ggml.add_bos_token", bos_by_default) != 0 && bos >= 0;
    bool add_eos = number(x, "tokenizer.ggml.add_eos_token", 0) != 0 && eos >= 0;
    if (add_bos) items[n++] = bos;
    items[n++] = -1;
    if (add_eos) items[n++] = eos;
    items[n] = -2;
    return add_bos || add_eos ? lc_tok_add_post(x->t, items) : LC_OK;
}

/* ---- the two kinds ----------------------------------------------------------------------------------------------- */

static lc_status byte_level(loader *x) {
    int32_t n;
    const char *name = string_of(x, "tokenizer.ggml.pre", &n);
    if (!name) return lc_fail(LC_EPARSE, "tokenizer.ggml.pre is missing: how the text is cut into words is not known");
    const struct pre *pre = NULL;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strlen(known[i].name) == (size_t)n && !memcmp(known[i].name, name, (size_t)n)) pre = &known[i];
    if (!pre)
        return lc_fail(LC_EPARSE, "pre-tokenizer '%.*s' (tokenizer.ggml.pre) is not supported", (int)(n > 60 ? 60 : n),
                       name);
    LC_TRY(listed_merges(x));
    x->t->ignore_merges = pre->how & WHOLE;
    lc_tok_norm *nfc;
    if (pre->how & NFC) {
        LC_TRY(lc_tok_add_norm(x->t, &nfc));
        nfc->kind = LC_NORM_NFC;
    }
    lc_tok_pre *digits;
    if (pre->how & DIGITS) {
        LC_TRY(lc_tok_add_pre(x->t, &digits));
        digits->kind = LC_PRE_CLASS, digits->klass = LC_TOK_NUMERIC, digits->behavior = LC_SPLIT_ISOLATED;
    }
    if (pre->regex) LC_TRY(lc_tok_add_split(x->t, pre->regex, LC_SPLIT_ISOLATED, false));
    LC_TRY(lc_tok_add_byte_level(x->t, number(x, "tokenizer.ggml.add_space_prefix", 0) != 0, !pre->regex));
    lc_tok_dec *k;
    LC_TRY(lc_tok_add_dec(x->t, &k));
    k->kind = LC_DEC_BYTE_LEVEL;
    return add_template(x, pre->how & BOS);
}

static lc_status sentencepiece(loader *x) {
    LC_TRY(scored_merges(x));
    x->t->byte_fallback = x->t->fuse_unk = true;
    x->t->unk = id_of(x, "tokenizer.ggml.unknown_token_id");
    bool prefix = number(x, "tokenizer.ggml.add_space_prefix", 1) != 0;
    LC_TRY(lc_tok_sentencepiece_steps(x->t, prefix ? LC_PREPEND_ALWAYS : LC_PREPEND_NEVER));
    return add_template(x, true);
}

static lc_status load(loader *x) {
    int32_t n;
    const char *model = string_of(x, "tokenizer.ggml.model", &n);
    if (!model) return lc_fail(LC_EPARSE, "tokenizer.ggml.model is missing: the file holds no tokenizer");
    bool gpt2 = n == 4 && !memcmp(model, "gpt2", 4), llama = n == 5 && !memcmp(model, "llama", 5);
    if (!gpt2 && !llama)
        return lc_fail(LC_EPARSE, "tokenizer model '%.*s' is not supported", (int)(n > 60 ? 60 : n), model);
    LC_TRY(vocabulary(x));
    LC_TRY(gpt2 ? byte_level(x) : sentencepiece(x));
    LC_TRY(added_tokens(x));
    return lc_tok_finish(x->t);
}

int lc_tokenizer_from_gguf(lc_tokenizer **out, const lc_file *f) {
    loader x = {.f = f};
    *out = NULL;
    if (!f) return lc_fail(LC_EARG, "tokenizer: no file");
    lc_status status = lc_tok_new(&x.t, "GGUF tokenizer");
    if (status == LC_OK) status = load(&x);
    free(x.clean.p);
    if (status != LC_OK) return lc_tokenizer_free(x.t), lc_fail_in(status, "GGUF tokenizer: ");
    *out = x.t;
    return LC_OK;
}
