/* tokenizer_added.c: added tokens: texts that become one id whatever the model says, special ones among them. They are
 * found by a byte trie, at each place the longest; those marked `normalized` are searched for, normalized themselves,
 * in the normalized text. */
#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>

/* Ids follow the reference: the model's id when it has the text, else the next free one, whatever the file says. */
lc_status lc_tok_add_token(lc_tokenizer *t, const char *s, size_t n, const lc_tok_added *flags) {
    int32_t next = t->model_count, found = -1;
    if (!n) return LC_OK;
    for (int32_t i = 0; i < t->n_added; i++) {
        const lc_tok_added *a = &t->added[i];
        if (a->content.len == n && !memcmp(t->text.p + a->content.at, s, n)) found = i;
        if (a->id >= next) next = a->id + 1;
    }
    int32_t id = found >= 0 ? t->added[found].id : lc_tok_vocab_find(t, s, n);
    if (id < 0) id = next;
    size_t room = (size_t)t->added_room;
    LC_TRY(lc_tok_grow((void **)&t->added, &room, (size_t)t->n_added, 1, sizeof *t->added));
    t->added_room = (int32_t)room;
    lc_tok_added *a = &t->added[t->n_added++];
    *a = *flags;
    a->id = id;
    a->content = a->normal = (lc_tok_str){(uint32_t)t->text.len, (uint32_t)n};
    LC_TRY(lc_tok_put(&t->text, s, n));
    LC_TRY(lc_tok_put(&t->text, "", 1));
    if (id >= t->size) t->size = id + 1;
    return LC_OK;
}

static int32_t trie_child(const lc_tok_trie *trie, int32_t node, unsigned char byte, int32_t **link) {
    const int32_t *at = node < 0 ? &trie->root[byte] : &trie->p[node].child;
    while (*at >= 0 && trie->p[*at].byte != byte) at = &trie->p[*at].next;
    *link = (int32_t *)at;
    return *at;
}

lc_status lc_tok_trie_add(lc_tok_trie *trie, const char *s, size_t n, int32_t token) {
    int32_t node = -1;
    for (size_t i = 0; i < n; i++) {
        LC_TRY(LC_TOK_ROOM(trie, 1)); /* before the link is taken: it may point into the array */
        int32_t *link, child = trie_child(trie, node, (unsigned char)s[i], &link);
        if (child < 0) {
            *link = child = (int32_t)trie->len;
            trie->p[trie->len++] = (struct lc_tok_trie_node){-1, -1, -1, (unsigned char)s[i]};
        }
        node = child;
    }
    if (n && trie->p[node].token < 0) trie->p[node].token = token; /* of equal texts the first wins */
    return LC_OK;
}

/* Of the added tokens with one id or content the last one's flags count. */
static lc_status index_ids(lc_tokenizer *t) {
    t->added_of = lc_alloc((size_t)t->size + 1, sizeof *t->added_of);
    if (!t->added_of) return LC_ENOMEM;
    for (int32_t i = 0; i < t->size; i++) t->added_of[i] = -1;
    for (int32_t i = 0; i < t->n_added; i++) t->added_of[t->added[i].id] = i;
    if (t->size > t->token_room || !t->token) {
        lc_tok_str *grown = lc_resize(t->token, (size_t)t->size + 1, sizeof *grown);
        if (!grown) return LC_ENOMEM;
        t->token = grown;
        for (int32_t i = t->token_room; i <= t->size; i++) grown[i] = (lc_tok_str){UINT32_MAX, 0};
        t->token_room = t->size;
    }
    return LC_OK;
}

lc_status lc_tok_added_index(lc_tokenizer *t) {
    LC_TRY(index_ids(t));
    for (int i = 0; i < 256; i++) t->raw.root[i] = t->normal.root[i] = -1;
    for (int pass = 0; pass < 2; pass++) { /* special ones first */
        for (int32_t i = 0; i < t->n_added; i++) {
            lc_tok_added *a = &t->added[i];
            if (a->special == (pass != 0)) continue;
            if (!a->normalized) {
                LC_TRY(lc_tok_trie_add(&t->raw, t->text.p + a->content.at, a->content.len, i));
                continue;
            }
            const char *s;
            size_t n;
            LC_TRY(lc_tok_normalize(t, t->text.p + a->content.at, a->content.len, &s, &n));
            if (n != a->content.len || memcmp(s, t->text.p + a->content.at, n)) {
                a->normal = (lc_tok_str){(uint32_t)t->text.len, (uint32_t)n};
                LC_TRY(lc_tok_put(&t->text, s, n));
                LC_TRY(lc_tok_put(&t->text, "", 1));
            }
            LC_TRY(lc_tok_trie_add(&t->normal, t->text.p + a->normal.at, a->normal.len, i));
        }
    }
    return LC_OK;
}

int32_t lc_tok_trie_longest(const lc_tok_trie *trie, const char *s, size_t n, size_t *len) {
    int32_t node = -1, best = -1, *link;
    for (size_t i = 0; i < n; i++) {
        node = trie_child(trie, node, (unsigned char)s[i], &link);
        if (node < 0) break;
        if (trie->p[node].token >= 0) best = trie->p[node].token, *len = i + 1;
    }
    return best;
}

static size_t char_before(const char *s, size_t at) {
    do at--;
    while (at && ((unsigned char)s[at] & 0xC0) == 0x80);
    return at;
}

static bool stands_alone(const char *s, size_t n, size_t start, size_t end) {
    size_t len;
    if (start && lc_tok_is(LC_TOK_WORD, lc_tok_char(s + char_before(s, start), &len))) return false;
    return end == n || !lc_tok_is(LC_TOK_WORD, lc_tok_char(s + end, &len));
}

static lc_status put_piece(lc_tok_pieces *out, size_t at, size_t len, int32_t id) {
    LC_TRY(LC_TOK_ROOM(out, 1));
    out->p[out->len++] = (lc_tok_piece){at, len, id};
    return LC_OK;
}

lc_status lc_tok_cut_added(lc_tokenizer *t, const lc_tok_trie *trie, const char *s, size_t n, bool parse_special,
                           lc_tok_pieces *out) {
    size_t done = 0, at = 0, len = 0;
    out->len = 0;
    while (at < n && trie->len) {
        while (at < n && trie->root[(unsigned char)s[at]] < 0) at++;
        if (at == n) break;
        int32_t which = lc_tok_trie_longest(trie, s + at, n - at, &len);
        if (which < 0) {
            at++;
            continue;
        }
        size_t start = at, end = at + len;
        at = end;
        /* the flags are those of the id's last entry, as in the reference */
        const lc_tok_added *a = &t->added[t->added_of[t->added[which].id]];
        if (t->added[which].special && !parse_special) continue;
        if (a->single_word && !stands_alone(s, n, start, end)) continue;
        size_t size, before;
        while (a->lstrip && start > done &&
               lc_tok_is(LC_TOK_SPACE, lc_tok_char(s + (before = char_before(s, start)), &size)))
            start = before;
        if (a->lstrip && start < done) start = done;
        while (a->rstrip && end < n && lc_tok_is(LC_TOK_SPACE, lc_tok_char(s + end, &size))) end += size;
        if (start > done) LC_TRY(put_piece(out, done, start - done, -1));
        /* a token inside white space that the one before took is found once more; only an empty one is dropped */
        if (end > start) LC_TRY(put_piece(out, start, end - start, a->id));
        done = end;
    }
    return done < n ? put_piece(out, done, n - done, -1) : LC_OK;
}
