/* tokenizer.c: the public tokenizer functions of lolcats.h, the template of special tokens around a text, and what is
 * needed to build and free a tokenizer. The stages of the work are listed in tokenizer.h. */
#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>

/* ---- buffers ----------------------------------------------------------------------------------------------------- */

lc_status lc_tok_grow(void **p, size_t *room, size_t len, size_t more, size_t size) {
    if (*room >= len && *room - len >= more) return LC_OK;
    if (more > ((size_t)1 << 40) || len > ((size_t)1 << 40))
        return lc_fail(LC_ENOMEM, "tokenizer: no room for %zu elements", more);
    size_t want = len + more + (len + more) / 2 + 16;
    void *grown = lc_resize(*p, want, size);
    if (!grown) return LC_ENOMEM;
    *p = grown, *room = want;
    return LC_OK;
}

lc_status lc_tok_put(lc_tok_buf *b, const char *s, size_t n) {
    if (b->room - b->len < n) LC_TRY(LC_TOK_ROOM(b, n));
    if (n) memcpy(b->p + b->len, s, n);
    b->len += n;
    return LC_OK;
}

lc_status lc_tok_put_id(lc_tok_ids *b, int32_t id) {
    if (b->len == b->room) LC_TRY(LC_TOK_ROOM(b, 1));
    b->p[b->len++] = id;
    return LC_OK;
}

lc_status lc_tok_put_span(lc_tok_spans *b, size_t at, size_t len) {
    if (b->len == b->room) LC_TRY(LC_TOK_ROOM(b, 1));
    b->p[b->len++] = (lc_tok_span){at, len};
    return LC_OK;
}

/* ---- building ---------------------------------------------------------------------------------------------------- */

const char lc_tok_gpt2_regex[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

lc_status lc_tok_new(lc_tokenizer **out, const char *name) {
    lc_tokenizer *t = lc_alloc(1, sizeof *t);
    if (!t) return LC_ENOMEM;
    t->unk = -1;
    t->name = lc_strdup(name);
    if (!t->name) return lc_free(t), LC_ENOMEM;
    *out = t;
    return LC_OK;
}

/* Appends a zeroed element to one of the lists of components. */
static lc_status append(void **list, int32_t *count, size_t size, void **out) {
    char *grown = lc_resize(*list, (size_t)*count + 1, size);
    if (!grown) return LC_ENOMEM;
    *list = grown;
    *out = memset(grown + size * (size_t)(*count)++, 0, size);
    return LC_OK;
}

lc_status lc_tok_add_norm(lc_tokenizer *t, lc_tok_norm **out) {
    return append((void **)&t->norm, &t->n_norm, sizeof **out, (void **)out);
}

lc_status lc_tok_add_pre(lc_tokenizer *t, lc_tok_pre **out) {
    return append((void **)&t->pre, &t->n_pre, sizeof **out, (void **)out);
}

lc_status lc_tok_add_dec(lc_tokenizer *t, lc_tok_dec **out) {
    t->has_decoder = true;
    return append((void **)&t->dec, &t->n_dec, sizeof **out, (void **)out);
}

lc_status lc_tok_add_post(lc_tokenizer *t, const int32_t *items) {
    int32_t n = 0, **slot;
    while (items[n] != -2) n++;
    LC_TRY(append((void **)&t->post, &t->n_post, sizeof *t->post, (void **)&slot));
    *slot = lc_alloc((size_t)n + 1, sizeof **slot);
    if (!*slot) return LC_ENOMEM;
    memcpy(*slot, items, ((size_t)n + 1) * sizeof *items);
    return LC_OK;
}

lc_status lc_tok_add_split(lc_tokenizer *t, const char *regex, lc_tok_behavior behavior, bool invert) {
    lc_tok_pre *k;
    LC_TRY(lc_tok_add_pre(t, &k));
    k->kind = LC_PRE_PATTERN, k->behavior = behavior, k->invert = invert;
    return lc_tok_pattern_regex(&k->pattern, regex, strlen(regex));
}

lc_status lc_tok_add_byte_level(lc_tokenizer *t, bool prefix_space, bool use_regex) {
    lc_tok_pre *k;
    if (prefix_space) {
        LC_TRY(lc_tok_add_pre(t, &k));
        k->kind = LC_PRE_PREFIX_SPACE;
    }
    if (use_regex) LC_TRY(lc_tok_add_split(t, lc_tok_gpt2_regex, LC_SPLIT_ISOLATED, false));
    LC_TRY(lc_tok_add_pre(t, &k));
    k->kind = LC_PRE_BYTES;
    return LC_OK;
}

lc_status lc_tok_finish(lc_tokenizer *t) {
    static const char pad[4] = "";
    t->bytes_at_last = t->n_pre && t->pre[t->n_pre - 1].kind == LC_PRE_BYTES;
    LC_TRY(lc_tok_tables(t));
    LC_TRY(lc_tok_added_index(t));
    return lc_tok_put(&t->text, pad, sizeof pad);
}

void lc_tokenizer_free(lc_tokenizer *t) {
    if (!t) return;
    for (int32_t i = 0; i < t->n_norm; i++)
        lc_tok_pattern_drop(&t->norm[i].pattern), lc_tok_charsmap_drop(&t->norm[i].map), free(t->norm[i].text);
    lc_tok_charsmap_drop(&t->spm.map);
    for (int32_t i = 0; i < t->n_pre; i++) lc_tok_pattern_drop(&t->pre[i].pattern);
    for (int32_t i = 0; i < t->n_dec; i++) lc_tok_pattern_drop(&t->dec[i].pattern), free(t->dec[i].text);
    for (int32_t i = 0; i < t->n_post; i++) free(t->post[i]);
    void *const all[] = {t->name,
                         t->text.p,
                         t->token,
                         t->slot,
                         t->merge,
                         t->prefix,
                         t->suffix,
                         t->joinable,
                         t->added,
                         t->raw.p,
                         t->normal.p,
                         t->added_of,
                         t->norm,
                         t->pre,
                         t->dec,
                         t->post,
                         t->lossy.p,
                         t->norm_buf[0].p,
                         t->norm_buf[1].p,
                         t->pre_buf[0].p,
                         t->pre_buf[1].p,
                         t->word.p,
                         t->affixed.p,
                         t->pieces.p,
                         t->normal_pieces.p,
                         t->spans[0].p,
                         t->spans[1].p,
                         t->ids.p,
                         t->post_ids.p,
                         t->cached,
                         t->cache_text.p,
                         t->cache_ids.p,
                         t->symbol,
                         t->heap,
                         t->user.p,
                         t->spm.lone,
                         t->spm.type,
                         t->spm.halves,
                         t->spm.unk_surface,
                         t->unigram.score,
                         t->unigram.edge,
                         t->unigram.piece,
                         t->unigram.best,
                         t->unigram.path.p};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    free(t);
}

/* ---- encoding ---------------------------------------------------------------------------------------------------- */

static lc_status encode_plain(lc_tokenizer *t, const char *s, size_t n, bool at_start) {
    const char *text;
    lc_tok_spans *words;
    LC_TRY(lc_tok_pretokenize(t, s, n, at_start, &text, &words));
    for (size_t i = 0; i < words->len; i++) LC_TRY(lc_tok_word(t, text + words->p[i].at, words->p[i].len));
    return LC_OK;
}

static lc_status encode_piece(lc_tokenizer *t, const char *s, size_t n, bool at_start, bool parse_special) {
    if (t->n_norm) LC_TRY(lc_tok_normalize(t, s, n, &s, &n));
    if (!t->normal.len) return encode_plain(t, s, n, at_start);
    LC_TRY(lc_tok_cut_added(t, &t->normal, s, n, parse_special, &t->normal_pieces));
    for (size_t i = 0; i < t->normal_pieces.len; i++) {
        lc_tok_piece p = t->normal_pieces.p[i];
        LC_TRY(p.id >= 0 ? lc_tok_put_id(&t->ids, p.id) : encode_plain(t, s + p.at, p.len, at_start && p.at == 0));
    }
    return LC_OK;
}

static lc_status encode_text(lc_tokenizer *t, const char *s, size_t n, bool parse_special) {
    if (!lc_tok_utf8_valid(s, n)) {
        t->lossy.len = 0;
        LC_TRY(lc_tok_put_lossy(&t->lossy, s, n));
        s = t->lossy.p, n = t->lossy.len;
    }
    LC_TRY(lc_tok_cut_added(t, &t->raw, s, n, parse_special, &t->pieces));
    for (size_t i = 0; i < t->pieces.len; i++) {
        lc_tok_piece p = t->pieces.p[i];
        LC_TRY(p.id >= 0 ? lc_tok_put_id(&t->ids, p.id) : encode_piece(t, s + p.at, p.len, p.at == 0, parse_special));
    }
    return LC_OK;
}

static lc_status apply_templates(lc_tokenizer *t) {
    for (int32_t i = 0; i < t->n_post; i++) {
        t->post_ids.len = 0;
        for (const int32_t *item = t->post[i]; *item != -2; item++) {
            if (*item >= 0) {
                LC_TRY(lc_tok_put_id(&t->post_ids, *item));
                continue;
            }
            LC_TRY(LC_TOK_ROOM(&t->post_ids, t->ids.len));
            if (t->ids.len) memcpy(t->post_ids.p + t->post_ids.len, t->ids.p, t->ids.len * sizeof *t->ids.p);
            t->post_ids.len += t->ids.len;
        }
        lc_tok_ids swap = t->ids;
        t->ids = t->post_ids, t->post_ids = swap;
    }
    return LC_OK;
}

int lc_tokenizer_encode(lc_tokenizer *t, const char *text, double length, int add_special, int parse_special,
                        int32_t **ids, int32_t *count) {
    *ids = NULL, *count = 0;
    if (!t || !(length >= 0) || (!text && length > 0)) return lc_fail(LC_EARG, "encode: no tokenizer or no text");
    if (length > 1 << 29) return lc_fail(LC_EARG, "encode: a text of %.0f bytes; at most 512 MiB at once", length);
    t->ids.len = 0;
    LC_TRY(encode_text(t, text, (size_t)length, parse_special != 0));
    if (add_special) LC_TRY(apply_templates(t));
    if (t->ids.len > INT32_MAX) return lc_fail(LC_EARG, "encode: more than 2^31 tokens");
    *ids = lc_resize(NULL, t->ids.len + 1, sizeof **ids);
    if (!*ids) return LC_ENOMEM;
    if (t->ids.len) memcpy(*ids, t->ids.p, t->ids.len * sizeof **ids);
    *count = (int32_t)t->ids.len;
    return LC_OK;
}

int lc_tokenizer_decode(lc_tokenizer *t, const int32_t *ids, int32_t count, int skip_special, char **text,
                        int32_t *length) {
    lc_tok_buf out = {0};
    *text = NULL, *length = 0;
    if (!t || count < 0 || (!ids && count)) return lc_fail(LC_EARG, "decode: no tokenizer or no ids");
    lc_status status = lc_tok_decode(t, ids, count, skip_special != 0, &out);
    if (status == LC_OK && out.len >= INT32_MAX) status = lc_fail(LC_EARG, "decode: more than 2 GiB of text");
    if (status == LC_OK) status = lc_tok_put(&out, "", 1);
    if (status != LC_OK) return free(out.p), status;
    *text = out.p, *length = (int32_t)out.len - 1;
    return LC_OK;
}

/* ---- questions --------------------------------------------------------------------------------------------------- */

int lc_tokenizer_size(const lc_tokenizer *t) { return t ? t->size : 0; }

int32_t lc_tokenizer_id(const lc_tokenizer *t, const char *token) {
    size_t n = strlen(token);
    for (int32_t i = 0; i < t->n_added; i++)
        if (t->added[i].content.len == n && !memcmp(t->text.p + t->added[i].content.at, token, n))
            return t->added[i].id;
    return lc_tok_vocab_find(t, token, n);
}

const char *lc_tokenizer_token(const lc_tokenizer *t, int32_t id, int32_t *length) {
    *length = 0;
    if (!t || id < 0 || id >= t->size) return NULL;
    const lc_tok_str *s = t->added_of[id] >= 0 ? &t->added[t->added_of[id]].content : &t->token[id];
    if (s->at == UINT32_MAX) return NULL;
    *length = (int32_t)s->len;
    return t->text.p + s->at;
}

int lc_tokenizer_is_special(const lc_tokenizer *t, int32_t id) {
    return t && id >= 0 && id < t->size && t->added_of[id] >= 0 && t->added[t->added_of[id]].special;
}
