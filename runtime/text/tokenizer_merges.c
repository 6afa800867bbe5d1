/* tokenizer_merges.c: merges for vocabularies that come without a list of them: every way to cut a piece into two
 * others is a merge, and its rank follows from the piece's score or id. What is the same among them is written down
 * once: SentencePiece's models in both ways of running them, GGUF's "llama", and tiktoken. */
#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>

typedef struct scored {
    float score;
    int32_t id;
} scored;

typedef struct cut {
    int32_t a, b, made;
    uint32_t rank, left, right; /* characters of the halves */
} cut;

typedef struct cuts {
    cut *p;
    size_t len, room;
} cuts;

static int by_score(const void *a, const void *b) {
    const scored *x = a, *y = b;
    return x->score > y->score ? -1 : x->score < y->score ? 1 : (x->id > y->id) - (x->id < y->id);
}

/* The order of Hugging Face's converter among pieces of one score: long halves first, then as it lists them. */
static int as_converted(const void *a, const void *b) {
    const cut *x = a, *y = b;
    if (x->left != y->left) return x->left > y->left ? -1 : 1;
    if (x->right != y->right) return x->right > y->right ? -1 : 1;
    if (x->made != y->made) return x->made < y->made ? -1 : 1;
    if (x->a != y->a) return x->a < y->a ? -1 : 1;
    return (x->b > y->b) - (x->b < y->b);
}

/* ---- lone characters --------------------------------------------------------------------------------------------- */

static int by_code(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

int32_t lc_tok_lone(const lc_tokenizer *t, uint32_t cp) {
    if (!t->spm.n_lone) return -1;
    uint32_t *at = bsearch(&cp, t->spm.lone, (size_t)t->spm.n_lone, sizeof cp, by_code);
    return at ? LC_TOK_LONE + (int32_t)(at - t->spm.lone) : -1;
}

/* SentencePiece joins symbols by their text: a character may join others without being a piece. */
static lc_status find_lone(lc_tokenizer *t, const uint8_t *skip) {
    lc_tok_spm *k = &t->spm;
    size_t room = 0, len, count = 0;
    for (int32_t i = 0; i < t->size; i++) {
        const char *s = t->text.p + t->token[i].at;
        size_t n = t->token[i].len, last = n - 1;
        if (t->token[i].at == UINT32_MAX || !n || (skip && skip[i])) continue;
        while (last && ((unsigned char)s[last] & 0xC0) == 0x80) last--;
        for (int side = 0; side < 2; side++) {
            uint32_t cp = lc_tok_char(side ? s + last : s, &len);
            if (lc_tok_vocab_find(t, side ? s + last : s, len) >= 0) continue;
            LC_TRY(lc_tok_grow((void **)&k->lone, &room, count, 1, sizeof *k->lone));
            k->lone[count++] = cp;
        }
    }
    if (count) qsort(k->lone, count, sizeof *k->lone, by_code);
    for (size_t i = 0; i < count; i++)
        if (!i || k->lone[i] != k->lone[i - 1]) k->lone[k->n_lone++] = k->lone[i];
    return LC_OK;
}

static int32_t half(const lc_tokenizer *t, const char *s, size_t n, bool single) {
    size_t len;
    int32_t id = lc_tok_vocab_find(t, s, n);
    return id < 0 && single ? lc_tok_lone(t, lc_tok_char(s, &len)) : id;
}

/* ---- cutting ----------------------------------------------------------------------------------------------------- */

static bool stays_whole(const lc_tokenizer *t, int32_t id) {
    return id < t->size && t->spm.own && t->spm.type && t->spm.type[id] == LC_PIECE_USER;
}

static lc_status cuts_of(const lc_tokenizer *t, int32_t id, uint32_t rank, cuts *out) {
    if (t->token[id].at == UINT32_MAX) return LC_OK;
    const char *s = t->text.p + t->token[id].at;
    size_t n = t->token[id].len, len;
    uint32_t chars = 0, all = 0;
    if (lc_tok_vocab_find(t, s, n) != id) return LC_OK; /* a text that stands twice: the first counts */
    for (size_t i = 0; i < n; i++) all += ((unsigned char)s[i] & 0xC0) != 0x80;
    for (size_t at = 0; at < n;) {
        lc_tok_char(s + at, &len);
        at += len, chars++;
        if (at >= n) break;
        int32_t a = half(t, s, at, chars == 1), b = a < 0 ? -1 : half(t, s + at, n - at, all - chars == 1);
        if (a < 0 || b < 0 || stays_whole(t, a) || stays_whole(t, b)) continue;
        LC_TRY(LC_TOK_ROOM(out, 1));
        out->p[out->len++] = (cut){a, b, id, rank, chars, all - chars};
    }
    return LC_OK;
}

static lc_status by_scores(lc_tokenizer *t, const float *score, const uint8_t *skip, bool converted, cuts *out) {
    scored *order = lc_alloc((size_t)t->size + 1, sizeof *order);
    if (!order) return LC_ENOMEM;
    int32_t n = 0, group = 0;
    size_t group_at = 0;
    lc_status status = LC_OK;
    for (int32_t i = 0; i < t->size; i++)
        if (!(skip && skip[i])) order[n++] = (scored){score[i], i};
    qsort(order, (size_t)n, sizeof *order, by_score);
    for (int32_t i = 0; i < n && status == LC_OK; i++) {
        if (order[i].score != order[group].score) group = i, group_at = out->len;
        status = cuts_of(t, order[i].id, (uint32_t)group, out); /* equal scores: the leftmost goes first */
        bool last = i + 1 == n || order[i + 1].score != order[group].score;
        if (!converted || !last || status != LC_OK) continue;
        if (out->len > group_at) qsort(out->p + group_at, out->len - group_at, sizeof *out->p, as_converted);
        for (size_t j = group_at; j < out->len; j++) out->p[j].rank = (uint32_t)j;
    }
    lc_free(order);
    return status;
}

lc_status lc_tok_merges_derive(lc_tokenizer *t, const float *score, const uint8_t *skip, lc_tok_merge_order order) {
    cuts all = {0};
    lc_status status = t->spm.own ? find_lone(t, skip) : LC_OK;
    if (status == LC_OK && order != LC_MERGES_BY_ID)
        status = by_scores(t, score, skip, order == LC_MERGES_CONVERTED, &all);
    else
        for (int32_t i = 0; i < t->size && status == LC_OK; i++) status = cuts_of(t, i, (uint32_t)i, &all);
    if (status == LC_OK) status = lc_tok_merges_start(t, all.len);
    for (size_t i = 0; i < all.len && status == LC_OK; i++)
        status = lc_tok_merge_add(t, all.p[i].a, all.p[i].b, all.p[i].rank, all.p[i].made);
    free(all.p);
    return status;
}

/* ---- the pipeline of a Llama ------------------------------------------------------------------------------------- */

static lc_status text_copy(const char *s, char **out, size_t *n) {
    *out = lc_strdup(s);
    *n = strlen(s);
    return *out ? LC_OK : LC_ENOMEM;
}

/* Spaces become U+2581 and back again, and bytes of <0x..> tokens become characters. */
lc_status lc_tok_sentencepiece_steps(lc_tokenizer *t, lc_tok_prepend prefix) {
    static const char space[] = "\xE2\x96\x81";
    lc_tok_norm *norm;
    lc_tok_pre *pre;
    lc_tok_dec *dec;
    if (prefix == LC_PREPEND_FIRST) {
        LC_TRY(lc_tok_add_pre(t, &pre));
        pre->kind = LC_PRE_METASPACE, pre->the_char = 0x2581, pre->prepend = prefix;
    } else {
        if (prefix == LC_PREPEND_ALWAYS) {
            LC_TRY(lc_tok_add_norm(t, &norm));
            norm->kind = LC_NORM_PREPEND;
            LC_TRY(text_copy(space, &norm->text, &norm->text_len));
        }
        LC_TRY(lc_tok_add_norm(t, &norm));
        norm->kind = LC_NORM_REPLACE;
        LC_TRY(lc_tok_pattern_literal(&norm->pattern, " ", 1));
        LC_TRY(text_copy(space, &norm->text, &norm->text_len));
    }
    LC_TRY(lc_tok_add_dec(t, &dec));
    dec->kind = LC_DEC_REPLACE;
    LC_TRY(lc_tok_pattern_literal(&dec->pattern, space, 3));
    LC_TRY(text_copy(" ", &dec->text, &dec->text_len));
    LC_TRY(lc_tok_add_dec(t, &dec));
    dec->kind = LC_DEC_BYTE_FALLBACK;
    LC_TRY(lc_tok_add_dec(t, &dec));
    dec->kind = LC_DEC_FUSE;
    if (prefix == LC_PREPEND_NEVER) return LC_OK;
    LC_TRY(lc_tok_add_dec(t, &dec));
    dec->kind = LC_DEC_STRIP, dec->the_char = ' ', dec->start = 1;
    return LC_OK;
}
