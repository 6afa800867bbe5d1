/* tokenizer_open.c: opens a tokenizer file of any kind, told apart by its first bytes, with the options that a folder's
 * other files may give. */
#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>

#include "../io/doc.h"

static lc_status three_way(const struct lc_doc *d, const char *key, int *out) {
    int32_t node = lc_doc_get(d, 0, key);
    *out = -1;
    if (node < 0 || d->node[node].kind == LC_DOC_NULL) return LC_OK;
    if (d->node[node].kind != LC_DOC_BOOL) return lc_fail(LC_EARG, "tokenizer: \"%s\" is not true or false", key);
    *out = d->node[node].number != 0;
    return LC_OK;
}

static lc_status options(const struct lc_doc *d, lc_tok_options *how) {
    *how = (lc_tok_options){.d = d, .add_bos = -1, .add_eos = -1, .legacy = -1};
    if (!d) return LC_OK;
    if (d->node[0].kind != LC_DOC_OBJECT) return lc_fail(LC_EARG, "tokenizer: options are an object");
    const char *style = lc_doc_str(d, lc_doc_get(d, 0, "style"));
    how->own = style && !strcmp(style, "sentencepiece");
    if (style && !how->own && strcmp(style, "hf"))
        return lc_fail(LC_EARG, "tokenizer: style '%s' is neither 'hf' nor 'sentencepiece'", style);
    LC_TRY(three_way(d, "add_bos", &how->add_bos));
    LC_TRY(three_way(d, "add_eos", &how->add_eos));
    return three_way(d, "legacy", &how->legacy);
}

/* Base64, a space and a digit on the first line. */
static bool is_tiktoken(const char *s, size_t n) {
    size_t i = 0;
    while (i < n && i < 1 << 16 && s[i] > ' ' && s[i] != '{' && s[i] != '"') i++;
    return i && i + 1 < n && s[i] == ' ' && s[i + 1] >= '0' && s[i + 1] <= '9';
}

static bool is_json(const char *s, size_t n) {
    size_t i = n >= 3 && !memcmp(s, "\xEF\xBB\xBF", 3) ? 3 : 0;
    while (i < n && (s[i] == ' ' || s[i] == '\n' || s[i] == '\r' || s[i] == '\t')) i++;
    return i < n && s[i] == '{';
}

lc_status lc_tok_from_bytes(lc_tokenizer **out, const char *name, const char *data, size_t n,
                            const lc_tok_options *how) {
    size_t len = strlen(name);
    bool json = is_json(data, n) || (len > 5 && !strcmp(name + len - 5, ".json"));
    *out = NULL;
    if (json && how->own)
        return lc_fail(LC_EARG, "%s: style 'sentencepiece' is for a SentencePiece tokenizer.model", name);
    if (json) return lc_tok_from_json(out, name, data, n);
    if (is_tiktoken(data, n)) return lc_tok_from_tiktoken(out, name, data, n, how);
    if (n > 2 && data[0] == '\n') return lc_tok_from_spm(out, name, data, n, how);
    return lc_fail(LC_EPARSE, "%s: it is neither a tokenizer.json nor a tokenizer.model of SentencePiece or tiktoken",
                   name);
}

int lc_tokenizer_open_with(lc_tokenizer **out, const char *path, const char *how) {
    struct lc_doc *d = NULL;
    lc_tok_options o;
    char *data = NULL;
    double length;
    *out = NULL;
    if (how) LC_TRY(lc_json_parse("tokenizer options", how, strlen(how), &d));
    lc_status status = options(d, &o);
    if (status == LC_OK) status = lc_read_file(path, &data, &length);
    if (status == LC_OK) status = lc_tok_from_bytes(out, path, data, (size_t)length, &o);
    lc_free(data);
    if (d) lc_doc_free(d);
    return status;
}

int lc_tokenizer_open(lc_tokenizer **out, const char *path) { return lc_tokenizer_open_with(out, path, NULL); }
