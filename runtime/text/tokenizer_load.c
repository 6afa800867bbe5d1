/* tokenizer_load.c: builds a tokenizer from Hugging Face's tokenizer.json. Every component is either run exactly or
 * refused by its name; `truncation` and `padding` are passed over, because they say how a batch is laid out and not
 * what a text's ids are. */
#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>

#include "../io/doc.h"

typedef struct loader {
    lc_tokenizer *t;
    const struct lc_doc *d;
} loader;

/* ---- reading the document ---------------------------------------------------------------------------------------- */

static int32_t get(const loader *x, int32_t object, const char *key) {
    return object < 0 || x->d->node[object].kind != LC_DOC_OBJECT ? -1 : lc_doc_get(x->d, object, key);
}

static bool is_null(const loader *x, int32_t node) { return node < 0 || x->d->node[node].kind == LC_DOC_NULL; }

static bool flag(const loader *x, int32_t object, const char *key, bool otherwise) {
    int32_t node = get(x, object, key);
    return is_null(x, node) ? otherwise : x->d->node[node].number != 0;
}

static const char *text_of(const loader *x, int32_t node, size_t *n) {
    if (node < 0 || x->d->node[node].kind != LC_DOC_STRING) return *n = 0, NULL;
    *n = x->d->node[node].str_len;
    return x->d->text + x->d->node[node].str;
}

static lc_status need_text(const loader *x, int32_t object, const char *key, const char *of, const char **s,
                           size_t *n) {
    *s = text_of(x, get(x, object, key), n);
    return *s ? LC_OK : lc_fail(LC_EPARSE, "%s has no text \"%s\"", of, key);
}

static bool is(const loader *x, int32_t node, const char *name) {
    size_t n;
    const char *s = text_of(x, node, &n);
    return s && n == strlen(name) && !memcmp(s, name, n);
}

static lc_status need_char(const loader *x, int32_t object, const char *key, const char *of, uint32_t *c) {
    const char *s;
    size_t n, len = 0;
    LC_TRY(need_text(x, object, key, of, &s, &n));
    if (n) *c = lc_tok_char(s, &len);
    return n && len == n ? LC_OK : lc_fail(LC_EPARSE, "%s: \"%s\" is not one character", of, key);
}

static lc_status need_id(const loader *x, int32_t node, const char *of, int32_t *id) {
    if (node >= 0) {
        const lc_doc_node *v = &x->d->node[node];
        if (v->kind == LC_DOC_NUMBER && v->is_integer && v->number >= 0 && v->number < INT32_MAX)
            return *id = (int32_t)v->number, LC_OK;
    }
    return lc_fail(LC_EPARSE, "%s: a token id that is no number from 0 to 2^31", of);
}

static lc_status copy_text(const char *s, size_t n, char **out, size_t *out_len) {
    *out = lc_alloc(n + 1, 1);
    if (!*out) return LC_ENOMEM;
    memcpy(*out, s, n);
    *out_len = n;
    return LC_OK;
}

/* {"String": ".."} or {"Regex": ".."} */
static lc_status pattern_of(const loader *x, int32_t object, const char *of, lc_tok_pattern *p) {
    int32_t node = get(x, object, "pattern");
    size_t n;
    const char *s = text_of(x, get(x, node, "String"), &n);
    if (s) return lc_tok_pattern_literal(p, s, n);
    s = text_of(x, get(x, node, "Regex"), &n);
    if (s) return lc_tok_pattern_regex(p, s, n);
    return lc_fail(LC_EPARSE, "%s: its pattern is neither String nor Regex", of);
}

static lc_status unsupported(const loader *x, const char *what, int32_t type) {
    size_t n;
    const char *s = text_of(x, type, &n);
    if (!s) return lc_fail(LC_EPARSE, "%s without a type", what);
    return lc_fail(LC_EPARSE, "%s '%.*s' is not supported", what, (int)(n > 60 ? 60 : n), s);
}

static lc_status charsmap(const char *s, size_t n, lc_tok_charsmap *map) {
    lc_tok_buf blob = {0};
    lc_status status;
    if (!lc_tok_base64(s, n, false, &blob, &status))
        status = lc_fail(LC_EPARSE, "normalizer Precompiled: its character map is not base64");
    if (status == LC_OK) status = lc_tok_charsmap_set(map, blob.p, blob.len);
    free(blob.p);
    return status;
}

/* ---- normalizers ------------------------------------------------------------------------------------------------- */

static lc_status normalizer(loader *x, int32_t node) {
    static const struct {
        const char *name;
        lc_tok_norm_kind kind;
    } plain[] = {{"NFC", LC_NORM_NFC},        {"NFD", LC_NORM_NFD},         {"NFKC", LC_NORM_NFKC},
                 {"NFKD", LC_NORM_NFKD},      {"Lowercase", LC_NORM_LOWER}, {"StripAccents", LC_NORM_STRIP_ACCENTS},
                 {"ByteLevel", LC_NORM_BYTES},
                 {"Nmt", LC_NORM_NMT}};
    if (is_null(x, node)) return LC_OK;
    int32_t type = get(x, node, "type");
    if (is(x, type, "Sequence")) {
        int32_t list = get(x, node, "normalizers");
        for (int32_t i = list < 0 ? -1 : x->d->node[list].first; i >= 0; i = x->d->node[i].next)
            LC_TRY(normalizer(x, i));
        return LC_OK;
    }
    lc_tok_norm *k;
    LC_TRY(lc_tok_add_norm(x->t, &k));
    const char *s;
    size_t n;
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++)
        if (is(x, type, plain[i].name)) return k->kind = plain[i].kind, LC_OK;
    if (is(x, type, "Prepend")) {
        k->kind = LC_NORM_PREPEND;
        LC_TRY(need_text(x, node, "prepend", "normalizer Prepend", &s, &n));
        return copy_text(s, n, &k->text, &k->text_len);
    }
    if (is(x, type, "Replace")) {
        k->kind = LC_NORM_REPLACE;
        LC_TRY(pattern_of(x, node, "normalizer Replace", &k->pattern));
        LC_TRY(need_text(x, node, "content", "normalizer Replace", &s, &n));
        return copy_text(s, n, &k->text, &k->text_len);
    }
    if (is(x, type, "Strip")) {
        k->kind = LC_NORM_STRIP;
        k->left = flag(x, node, "strip_left", true), k->right = flag(x, node, "strip_right", true);
        return LC_OK;
    }
    if (is(x, type, "Precompiled")) {
        k->kind = LC_NORM_CHARSMAP;
        LC_TRY(need_text(x, node, "precompiled_charsmap", "normalizer Precompiled", &s, &n));
        return charsmap(s, n, &k->map);
    }
    return unsupported(x, "normalizer", type);
}

/* ---- pre-tokenizers ---------------------------------------------------------------------------------------------- */

static lc_status behavior_of(const loader *x, int32_t node, lc_tok_behavior otherwise, lc_tok_behavior *out) {
    static const char *const name[] = {"Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"};
    int32_t value = get(x, node, "behavior");
    *out = otherwise;
    if (is_null(x, value)) return LC_OK;
    for (int i = 0; i < 5; i++)
        if (is(x, value, name[i])) return *out = (lc_tok_behavior)i, LC_OK;
    return unsupported(x, "split behavior", value);
}

static lc_status by_class(loader *x, lc_tok_class klass, lc_tok_behavior behavior, uint32_t the_char) {
    lc_tok_pre *k;
    LC_TRY(lc_tok_add_pre(x->t, &k));
    k->kind = LC_PRE_CLASS, k->klass = klass, k->behavior = behavior, k->the_char = the_char;
    return LC_OK;
}

static lc_status prepend_of(const loader *x, int32_t node, lc_tok_prepend *out) {
    int32_t scheme = get(x, node, "prepend_scheme");
    bool space = flag(x, node, "add_prefix_space", true);
    *out = space ? LC_PREPEND_ALWAYS : LC_PREPEND_NEVER;
    if (is_null(x, scheme)) return LC_OK;
    if (is(x, scheme, "always"))
        *out = LC_PREPEND_ALWAYS;
    else if (is(x, scheme, "first"))
        *out = LC_PREPEND_FIRST;
    else if (is(x, scheme, "never"))
        *out = LC_PREPEND_NEVER;
    else
        return unsupported(x, "prepend scheme", scheme);
    if (!space && *out != LC_PREPEND_NEVER)
        return lc_fail(LC_EPARSE, "Metaspace: add_prefix_space is false but prepend_scheme is not \"never\"");
    return LC_OK;
}

static lc_status split(loader *x, int32_t node) {
    lc_tok_pre *k;
    LC_TRY(lc_tok_add_pre(x->t, &k));
    k->kind = LC_PRE_PATTERN;
    k->invert = flag(x, node, "invert", false);
    LC_TRY(behavior_of(x, node, LC_SPLIT_REMOVED, &k->behavior));
    return pattern_of(x, node, "pre-tokenizer Split", &k->pattern);
}

static lc_status metaspace(loader *x, int32_t node) {
    lc_tok_pre *k;
    LC_TRY(lc_tok_add_pre(x->t, &k));
    k->kind = LC_PRE_METASPACE;
    k->split = flag(x, node, "split", true);
    LC_TRY(need_char(x, node, "replacement", "pre-tokenizer Metaspace", &k->the_char));
    return prepend_of(x, node, &k->prepend);
}

/* \w of the reference's other regular expression library, which differs from Oniguruma's in a few characters */
#define RUST_WORD "\\p{Alphabetic}\\p{L}\\p{M}\\p{Nd}\\p{Pc}\\x{200C}\\x{200D}"

static lc_status pre_tokenizer(loader *x, int32_t node) {
    if (is_null(x, node)) return LC_OK;
    int32_t type = get(x, node, "type");
    lc_tok_behavior behavior;
    uint32_t c;
    if (is(x, type, "Sequence")) {
        int32_t list = get(x, node, "pretokenizers");
        for (int32_t i = list < 0 ? -1 : x->d->node[list].first; i >= 0; i = x->d->node[i].next)
            LC_TRY(pre_tokenizer(x, i));
        return LC_OK;
    }
    if (is(x, type, "Split")) return split(x, node);
    if (is(x, type, "Metaspace")) return metaspace(x, node);
    if (is(x, type, "ByteLevel"))
        return lc_tok_add_byte_level(x->t, flag(x, node, "add_prefix_space", true), flag(x, node, "use_regex", true));
    if (is(x, type, "Digits"))
        return by_class(x, LC_TOK_NUMERIC,
                        flag(x, node, "individual_digits", false) ? LC_SPLIT_ISOLATED : LC_SPLIT_CONTIGUOUS, 0);
    if (is(x, type, "Whitespace"))
        return lc_tok_add_split(x->t, "[" RUST_WORD "]+|[^\\s" RUST_WORD "]+", LC_SPLIT_REMOVED, true);
    if (is(x, type, "WhitespaceSplit")) return by_class(x, LC_TOK_SPACE, LC_SPLIT_REMOVED, 0);
    if (is(x, type, "Punctuation")) {
        LC_TRY(behavior_of(x, node, LC_SPLIT_ISOLATED, &behavior));
        return by_class(x, LC_TOK_PUNCT, behavior, 0);
    }
    if (is(x, type, "BertPreTokenizer")) {
        LC_TRY(by_class(x, LC_TOK_SPACE, LC_SPLIT_REMOVED, 0));
        return by_class(x, LC_TOK_PUNCT, LC_SPLIT_ISOLATED, 0);
    }
    if (is(x, type, "CharDelimiterSplit")) {
        LC_TRY(need_char(x, node, "delimiter", "pre-tokenizer CharDelimiterSplit", &c));
        return by_class(x, LC_TOK_THE_CHAR, LC_SPLIT_REMOVED, c);
    }
    return unsupported(x, "pre-tokenizer", type);
}

/* ---- decoders ---------------------------------------------------------------------------------------------------- */

static lc_status count_of(const loader *x, int32_t node, const char *key, int32_t *out) {
    int32_t at = get(x, node, key);
    *out = 0;
    return is_null(x, at) ? LC_OK : need_id(x, at, "decoder Strip", out);
}

static lc_status decoder(loader *x, int32_t node) {
    if (is_null(x, node)) return LC_OK;
    int32_t type = get(x, node, "type");
    const char *s;
    size_t n;
    x->t->has_decoder = true;
    if (is(x, type, "Sequence")) {
        int32_t list = get(x, node, "decoders");
        for (int32_t i = list < 0 ? -1 : x->d->node[list].first; i >= 0; i = x->d->node[i].next) LC_TRY(decoder(x, i));
        return LC_OK;
    }
    lc_tok_dec *k;
    LC_TRY(lc_tok_add_dec(x->t, &k));
    if (is(x, type, "ByteLevel")) return k->kind = LC_DEC_BYTE_LEVEL, LC_OK;
    if (is(x, type, "ByteFallback")) return k->kind = LC_DEC_BYTE_FALLBACK, LC_OK;
    if (is(x, type, "Fuse")) return k->kind = LC_DEC_FUSE, LC_OK;
    if (is(x, type, "Replace")) {
        k->kind = LC_DEC_REPLACE;
        LC_TRY(pattern_of(x, node, "decoder Replace", &k->pattern));
        LC_TRY(need_text(x, node, "content", "decoder Replace", &s, &n));
        return copy_text(s, n, &k->text, &k->text_len);
    }
    if (is(x, type, "Strip")) {
        k->kind = LC_DEC_STRIP;
        LC_TRY(count_of(x, node, "start", &k->start));
        LC_TRY(count_of(x, node, "stop", &k->stop));
        return need_char(x, node, "content", "decoder Strip", &k->the_char);
    }
    if (is(x, type, "Metaspace")) {
        k->kind = LC_DEC_METASPACE;
        LC_TRY(need_char(x, node, "replacement", "decoder Metaspace", &k->the_char));
        return prepend_of(x, node, &k->prepend);
    }
    if (is(x, type, "BPEDecoder")) {
        k->kind = LC_DEC_BPE;
        s = text_of(x, get(x, node, "suffix"), &n);
        return s ? lc_tok_pattern_literal(&k->pattern, s, n) : lc_tok_pattern_literal(&k->pattern, "</w>", 4);
    }
    return unsupported(x, "decoder", type);
}

/* ---- post-processors --------------------------------------------------------------------------------------------- */

/* The ids that a template's special token stands for. */
static lc_status template_token(loader *x, int32_t tokens, const char *name, size_t n, lc_tok_ids *items) {
    for (int32_t i = tokens < 0 ? -1 : x->d->node[tokens].first; i >= 0; i = x->d->node[i].next) {
        const lc_doc_node *v = &x->d->node[i];
        bool same =
            x->d->node[tokens].kind == LC_DOC_OBJECT && v->key_len == n && !memcmp(x->d->text + v->key, name, n);
        if (!same && x->d->node[tokens].kind == LC_DOC_ARRAY) { /* the older form: a list of tokens */
            size_t len;
            const char *id = text_of(x, get(x, i, "id"), &len);
            same = id && len == n && !memcmp(id, name, n);
        }
        if (!same) continue;
        int32_t list = get(x, i, "ids"), id;
        for (int32_t j = list < 0 ? -1 : x->d->node[list].first; j >= 0; j = x->d->node[j].next) {
            LC_TRY(need_id(x, j, "post-processor TemplateProcessing", &id));
            LC_TRY(lc_tok_put_id(items, id));
        }
        return LC_OK;
    }
    return lc_fail(LC_EPARSE, "post-processor TemplateProcessing: token '%.*s' is not among its special tokens",
                   (int)(n > 60 ? 60 : n), name);
}

static lc_status template_sequence(const char *name, size_t n, lc_tok_ids *items) {
    if (n && name[0] == 'B')
        return lc_fail(LC_EPARSE, "post-processor TemplateProcessing: a second sequence in \"single\"");
    return lc_tok_put_id(items, -1);
}

/* "[CLS] $A [SEP]": the short form of a template. */
static lc_status template_words(loader *x, int32_t tokens, const char *s, size_t n, lc_tok_ids *items) {
    for (size_t at = 0; at < n;) {
        size_t end = at;
        while (end < n && s[end] != ' ') end++;
        size_t len = end - at;
        for (size_t i = at + 1; i + 1 < end; i++)
            if (s[i] == ':' && s[i + 1] >= '0' && s[i + 1] <= '9') len = i - at; /* a type id */
        if (len && s[at] == '$')
            LC_TRY(template_sequence(s + at + 1, len - 1, items));
        else if (len)
            LC_TRY(template_token(x, tokens, s + at, len, items));
        at = end + 1;
    }
    return LC_OK;
}

static lc_status template_items(loader *x, int32_t node, lc_tok_ids *items) {
    int32_t single = get(x, node, "single"), tokens = get(x, node, "special_tokens");
    size_t n;
    const char *s = text_of(x, single, &n);
    if (s) return template_words(x, tokens, s, n, items);
    if (single < 0 || x->d->node[single].kind != LC_DOC_ARRAY)
        return lc_fail(LC_EPARSE, "post-processor TemplateProcessing has no list \"single\"");
    for (int32_t i = x->d->node[single].first; i >= 0; i = x->d->node[i].next) {
        int32_t special = get(x, i, "SpecialToken"), sequence = get(x, i, "Sequence");
        s = text_of(x, get(x, special >= 0 ? special : sequence, "id"), &n);
        if (!s)
            return lc_fail(LC_EPARSE,
                           "post-processor TemplateProcessing: an item that is neither SpecialToken nor Sequence");
        LC_TRY(special >= 0 ? template_token(x, tokens, s, n, items) : template_sequence(s, n, items));
    }
    return LC_OK;
}

/* ["</s>", 2] under `key` */
static lc_status pair_id(loader *x, int32_t node, const char *key, lc_tok_ids *items) {
    int32_t pair = get(x, node, key), id;
    if (pair < 0 || x->d->node[pair].kind != LC_DOC_ARRAY || x->d->node[pair].count != 2)
        return lc_fail(LC_EPARSE, "post-processor: \"%s\" is not [token, id]", key);
    LC_TRY(need_id(x, x->d->node[x->d->node[pair].first].next, "post-processor", &id));
    return lc_tok_put_id(items, id);
}

static lc_status post_items(loader *x, int32_t node, int32_t type, lc_tok_ids *items) {
    if (is(x, type, "TemplateProcessing")) {
        LC_TRY(template_items(x, node, items));
    } else {
        LC_TRY(pair_id(x, node, "cls", items));
        LC_TRY(lc_tok_put_id(items, -1));
        LC_TRY(pair_id(x, node, "sep", items));
    }
    LC_TRY(lc_tok_put_id(items, -2));
    return lc_tok_add_post(x->t, items->p);
}

static lc_status post_processor(loader *x, int32_t node) {
    if (is_null(x, node)) return LC_OK;
    int32_t type = get(x, node, "type");
    if (is(x, type, "Sequence")) {
        int32_t list = get(x, node, "processors");
        for (int32_t i = list < 0 ? -1 : x->d->node[list].first; i >= 0; i = x->d->node[i].next)
            LC_TRY(post_processor(x, i));
        return LC_OK;
    }
    if (is(x, type, "ByteLevel")) return LC_OK; /* moves offsets only */
    if (!is(x, type, "TemplateProcessing") && !is(x, type, "BertProcessing") && !is(x, type, "RobertaProcessing"))
        return unsupported(x, "post-processor", type);
    lc_tok_ids items = {0};
    lc_status status = post_items(x, node, type, &items);
    free(items.p);
    return status;
}

/* ---- the model --------------------------------------------------------------------------------------------------- */

static lc_status vocabulary(loader *x, int32_t model) {
    int32_t vocab = get(x, model, "vocab"), id, max = -1;
    if (vocab < 0 || x->d->node[vocab].kind != LC_DOC_OBJECT)
        return lc_fail(LC_EPARSE, "the model has no object \"vocab\"");
    for (int32_t i = x->d->node[vocab].first; i >= 0; i = x->d->node[i].next) {
        LC_TRY(need_id(x, i, "model.vocab", &id));
        if (id > max) max = id;
    }
    LC_TRY(lc_tok_vocab_start(x->t, x->d->node[vocab].count, max));
    for (int32_t i = x->d->node[vocab].first; i >= 0; i = x->d->node[i].next) {
        const lc_doc_node *v = &x->d->node[i];
        LC_TRY(lc_tok_vocab_add(x->t, x->d->text + v->key, v->key_len, (int32_t)v->number));
    }
    return LC_OK;
}

/* "a b" or ["a", "b"] */
static lc_status merge_halves(const loader *x, int32_t node, const char *half[2], size_t len[2]) {
    const lc_doc_node *v = &x->d->node[node];
    if (v->kind == LC_DOC_ARRAY && v->count == 2) {
        half[0] = text_of(x, v->first, &len[0]);
        half[1] = text_of(x, x->d->node[v->first].next, &len[1]);
        if (half[0] && half[1]) return LC_OK;
    } else if (v->kind == LC_DOC_STRING) {
        const char *s = x->d->text + v->str, *space = memchr(s, ' ', v->str_len);
        if (space && !memchr(space + 1, ' ', v->str_len - (size_t)(space + 1 - s))) {
            half[0] = s, len[0] = (size_t)(space - s);
            half[1] = space + 1, len[1] = v->str_len - len[0] - 1;
            return LC_OK;
        }
    }
    return lc_fail(LC_EPARSE, "it is not two texts");
}

static lc_status one_merge(loader *x, int32_t node, uint32_t rank, lc_tok_buf *joined) {
    lc_tokenizer *t = x->t;
    const char *half[2] = {NULL, NULL};
    size_t len[2] = {0, 0}, skip = t->prefix ? strlen(t->prefix) : 0;
    int32_t id[3];
    LC_TRY(merge_halves(x, node, half, len));
    if (len[1] < skip) return lc_fail(LC_EPARSE, "its second half is shorter than continuing_subword_prefix");
    joined->len = 0;
    LC_TRY(lc_tok_put(joined, half[0], len[0]));
    LC_TRY(lc_tok_put(joined, half[1] + skip, len[1] - skip));
    id[0] = lc_tok_vocab_find(t, half[0], len[0]);
    id[1] = lc_tok_vocab_find(t, half[1], len[1]);
    id[2] = lc_tok_vocab_find(t, joined->p ? joined->p : "", joined->len);
    if (id[0] < 0 || id[1] < 0 || id[2] < 0)
        return lc_fail(LC_EPARSE, "'%.*s' is not in the vocabulary",
                       (int)(id[0] < 0   ? len[0]
                             : id[1] < 0 ? len[1]
                                         : joined->len),
                       id[0] < 0   ? half[0]
                       : id[1] < 0 ? half[1]
                                   : joined->p);
    return lc_tok_merge_add(t, id[0], id[1], rank, id[2]);
}

static lc_status merges(loader *x, int32_t model) {
    int32_t list = get(x, model, "merges");
    uint32_t rank = 0;
    lc_tok_buf joined = {0};
    if (list < 0 || x->d->node[list].kind != LC_DOC_ARRAY)
        return lc_fail(LC_EPARSE, "the model has no list \"merges\"");
    LC_TRY(lc_tok_merges_start(x->t, (size_t)x->d->node[list].count));
    lc_status status = LC_OK;
    for (int32_t i = x->d->node[list].first; i >= 0 && status == LC_OK; i = x->d->node[i].next) {
        status = one_merge(x, i, rank++, &joined);
        if (status != LC_OK) status = lc_fail_in(status, "model.merges, entry %u: ", rank - 1);
    }
    free(joined.p);
    return status;
}

static lc_status affix(loader *x, int32_t model, const char *key, char **out) {
    size_t n;
    const char *s = text_of(x, get(x, model, key), &n);
    if (!s || !n) return LC_OK;
    *out = lc_strdup(s);
    return *out ? LC_OK : LC_ENOMEM;
}

/* [["<unk>", 0.0], ["a", -3.2], ..] */
static lc_status scored_pieces(loader *x, int32_t vocab, double *score) {
    int32_t id = 0;
    for (int32_t i = x->d->node[vocab].first; i >= 0; i = x->d->node[i].next, id++) {
        const lc_doc_node *pair = &x->d->node[i];
        bool good = pair->kind == LC_DOC_ARRAY && pair->count == 2;
        const lc_doc_node *s = good ? &x->d->node[pair->first] : NULL, *v = good ? &x->d->node[s->next] : NULL;
        if (!good || s->kind != LC_DOC_STRING || v->kind != LC_DOC_NUMBER)
            return lc_fail(LC_EPARSE, "model.vocab, entry %d: it is not [text, score]", (int)id);
        score[id] = v->number;
        LC_TRY(lc_tok_vocab_add(x->t, x->d->text + s->str, s->str_len, id));
    }
    return LC_OK;
}

static lc_status unigram(loader *x, int32_t node) {
    lc_tokenizer *t = x->t;
    int32_t vocab = get(x, node, "vocab"), unk = get(x, node, "unk_id");
    if (vocab < 0 || x->d->node[vocab].kind != LC_DOC_ARRAY)
        return lc_fail(LC_EPARSE, "the Unigram model has no list \"vocab\"");
    int32_t count = x->d->node[vocab].count;
    if (!is_null(x, unk)) LC_TRY(need_id(x, unk, "unk_id", &t->unk));
    if (t->unk >= count) return lc_fail(LC_EPARSE, "unk_id is %d in a vocabulary of %d", (int)t->unk, (int)count);
    LC_TRY(lc_tok_vocab_start(t, count, count - 1));
    double *score = lc_alloc((size_t)count + 1, sizeof *score), low = 0;
    if (!score) return LC_ENOMEM;
    lc_status status = scored_pieces(x, vocab, score);
    if (status == LC_OK) status = lc_tok_unigram_start(t, score, NULL);
    for (int32_t i = 0; i < count; i++)
        if (!i || score[i] < low) low = score[i];
    lc_free(score);
    t->unigram.unk_score = low - 10;
    t->byte_fallback = flag(x, node, "byte_fallback", false);
    return status;
}

static lc_status model(loader *x, int32_t node) {
    lc_tokenizer *t = x->t;
    int32_t type = get(x, node, "type"), dropout = get(x, node, "dropout"), vocab = get(x, node, "vocab");
    size_t n;
    if (node < 0 || x->d->node[node].kind != LC_DOC_OBJECT) return lc_fail(LC_EPARSE, "it has no object \"model\"");
    if (is(x, type, "Unigram") || (is_null(x, type) && vocab >= 0 && x->d->node[vocab].kind == LC_DOC_ARRAY))
        return unigram(x, node);
    if (!is_null(x, type) && !is(x, type, "BPE")) return unsupported(x, "model", type);
    if (!is_null(x, dropout) && x->d->node[dropout].number != 0)
        return lc_fail(LC_EPARSE, "model BPE with dropout is not supported: ids would be random");
    t->fuse_unk = flag(x, node, "fuse_unk", false);
    t->byte_fallback = flag(x, node, "byte_fallback", false);
    t->ignore_merges = flag(x, node, "ignore_merges", false);
    LC_TRY(affix(x, node, "continuing_subword_prefix", &t->prefix));
    LC_TRY(affix(x, node, "end_of_word_suffix", &t->suffix));
    LC_TRY(vocabulary(x, node));
    LC_TRY(merges(x, node));
    const char *unk = text_of(x, get(x, node, "unk_token"), &n);
    if (unk) t->unk = lc_tok_vocab_find(t, unk, n);
    t->unk_missing = unk && t->unk < 0;
    return LC_OK;
}

static lc_status added_tokens(loader *x, int32_t list) {
    for (int32_t i = is_null(x, list) ? -1 : x->d->node[list].first; i >= 0; i = x->d->node[i].next) {
        const char *s;
        size_t n;
        LC_TRY(need_text(x, i, "content", "an added token", &s, &n));
        lc_tok_added a = {.special = flag(x, i, "special", false),
                          .single_word = flag(x, i, "single_word", false),
                          .lstrip = flag(x, i, "lstrip", false),
                          .rstrip = flag(x, i, "rstrip", false)};
        a.normalized = flag(x, i, "normalized", !a.special);
        LC_TRY(lc_tok_add_token(x->t, s, n, &a));
    }
    return LC_OK;
}

/* Added tokens that stand in a file beside the tokenizer's; their ids must be those they would get. */
lc_status lc_tok_added_from_doc(lc_tokenizer *t, const struct lc_doc *d, int32_t list) {
    loader x = {t, d};
    if (list < 0) return LC_OK;
    LC_TRY(added_tokens(&x, list));
    for (int32_t i = d->node[list].first; i >= 0; i = d->node[i].next) {
        int32_t node = get(&x, i, "id"), id;
        size_t n;
        if (is_null(&x, node)) continue;
        LC_TRY(need_id(&x, node, "an added token", &id));
        const char *s = text_of(&x, get(&x, i, "content"), &n);
        if (n && lc_tokenizer_id(t, s) != id)
            return lc_fail(LC_EPARSE, "added token '%.*s' should have id %d, but gets %d", (int)(n > 60 ? 60 : n), s,
                           (int)id, (int)lc_tokenizer_id(t, s));
    }
    return LC_OK;
}

static lc_status load(loader *x) {
    if (x->d->node[0].kind != LC_DOC_OBJECT) return lc_fail(LC_EPARSE, "a tokenizer.json is an object");
    LC_TRY(model(x, get(x, 0, "model")));
    LC_TRY(normalizer(x, get(x, 0, "normalizer")));
    LC_TRY(pre_tokenizer(x, get(x, 0, "pre_tokenizer")));
    LC_TRY(post_processor(x, get(x, 0, "post_processor")));
    LC_TRY(decoder(x, get(x, 0, "decoder")));
    LC_TRY(added_tokens(x, get(x, 0, "added_tokens")));
    return lc_tok_finish(x->t);
}

lc_status lc_tok_from_json(lc_tokenizer **out, const char *name, const char *json, size_t n) {
    struct lc_doc *d;
    loader x = {0};
    *out = NULL;
    LC_TRY(lc_json_parse(name, json, n, &d));
    x.d = d;
    lc_status status = lc_tok_new(&x.t, name);
    if (status == LC_OK) {
        status = load(&x);
        if (status != LC_OK) status = lc_fail_in(status, "%s: ", name);
    }
    lc_doc_free(d);
    if (status != LC_OK) return lc_tokenizer_free(x.t), status;
    *out = x.t;
    return LC_OK;
}
