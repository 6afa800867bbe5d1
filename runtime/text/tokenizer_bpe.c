/* tokenizer_bpe.c: the model of a tokenizer: vocabulary and merges as flat hash tables, byte pair encoding of one word,
 * and the cache of words. Merging follows the reference to the letter, stale queue entries included: candidates wait in
 * a heap ordered by rank, then position, and one is still good when the pair now standing there makes the same token.
 * O(n log n) in the word.
 *
 * Without a pre-tokenizer a whole text is one word. It is cut first where no merge can ever join the two characters
 * that meet, which changes nothing in the result and makes the pieces short enough for the cache. */
#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>

uint64_t lc_tok_hash(const char *s, size_t n) {
    uint64_t h = 0x9E3779B97F4A7C15u ^ n, w;
    for (; n >= 8; s += 8, n -= 8) {
        memcpy(&w, s, 8);
        h = (h ^ w) * 0xD6E8FEB86659FD93u;
        h ^= h >> 32;
    }
    if (n) {
        w = 0;
        memcpy(&w, s, n);
        h = (h ^ w) * 0xD6E8FEB86659FD93u;
        h ^= h >> 32;
    }
    h *= 0xD6E8FEB86659FD93u;
    return h ^ h >> 32;
}

static uint32_t power_of_two(size_t n) {
    uint32_t p = 16;
    while (p < n && p < 1u << 30) p *= 2;
    return p;
}

/* ---- vocabulary -------------------------------------------------------------------------------------------------- */

lc_status lc_tok_vocab_start(lc_tokenizer *t, int32_t count, int32_t max_id) {
    /* ids are indices: a file whose ids are far apart would ask for memory that it does not deserve */
    if (max_id >= count * 4.0 + (1 << 20))
        return lc_fail(LC_EPARSE, "token id %d in a vocabulary of %d tokens", (int)max_id, (int)count);
    t->token_room = t->size = max_id + 1;
    t->token = lc_alloc((size_t)t->token_room + 1, sizeof *t->token);
    if (!t->token) return LC_ENOMEM;
    for (int32_t i = 0; i < t->size; i++) t->token[i].at = UINT32_MAX;
    uint32_t slots = power_of_two((size_t)count * 2);
    t->slot = lc_alloc(slots, sizeof *t->slot);
    if (!t->slot) return LC_ENOMEM;
    t->slot_mask = slots - 1;
    return LC_OK;
}

static uint32_t *vocab_slot(const lc_tokenizer *t, const char *s, size_t n) {
    uint32_t i = (uint32_t)lc_tok_hash(s, n) & t->slot_mask;
    for (; t->slot[i]; i = (i + 1) & t->slot_mask) {
        const lc_tok_str *w = &t->token[t->slot[i] - 1];
        if (w->len == n && !memcmp(t->text.p + w->at, s, n)) break;
    }
    return &t->slot[i];
}

lc_status lc_tok_vocab_add(lc_tokenizer *t, const char *s, size_t n, int32_t id) {
    if (id < 0 || id >= t->size) return lc_fail(LC_EPARSE, "token id %d out of range", (int)id);
    if (t->token[id].at != UINT32_MAX)
        return lc_fail(LC_EPARSE, "two tokens have id %d: '%.*s' and '%.*s'", (int)id, (int)t->token[id].len,
                       t->text.p + t->token[id].at, (int)n, s);
    uint32_t *slot = vocab_slot(t, s, n);
    bool seen = *slot != 0; /* a GGUF may hold a text twice: the first id is the one that is found */
    if (t->text.len + n > UINT32_MAX - 1) return lc_fail(LC_EPARSE, "the vocabulary's text is over 4 GiB");
    t->token[id] = (lc_tok_str){(uint32_t)t->text.len, (uint32_t)n};
    LC_TRY(lc_tok_put(&t->text, s, n));
    LC_TRY(lc_tok_put(&t->text, "", 1)); /* a NUL behind each: tokens are handed out as C strings too */
    if (!seen) *slot = (uint32_t)id + 1;
    t->model_count++;
    return LC_OK;
}

int32_t lc_tok_vocab_find(const lc_tokenizer *t, const char *s, size_t n) {
    return t->slot ? (int32_t)*vocab_slot(t, s, n) - 1 : -1;
}

/* ---- merges ------------------------------------------------------------------------------------------------------ */

static lc_tok_merge *merge_slot(const lc_tokenizer *t, uint32_t a, uint32_t b) {
    uint64_t h = ((uint64_t)a << 32 | b) * 0x9E3779B97F4A7C15u;
    uint32_t i = (uint32_t)(h >> 32) & t->merge_mask;
    for (; t->merge[i].a != UINT32_MAX; i = (i + 1) & t->merge_mask)
        if (t->merge[i].a == a && t->merge[i].b == b) break;
    return &t->merge[i];
}

lc_status lc_tok_merges_start(lc_tokenizer *t, size_t count) {
    if (count > 1u << 28) return lc_fail(LC_EPARSE, "%zu merges", count);
    uint32_t slots = power_of_two(count * 2);
    t->merge = lc_alloc(slots, sizeof *t->merge);
    if (!t->merge) return LC_ENOMEM;
    memset(t->merge, 0xFF, slots * sizeof *t->merge);
    t->merge_mask = slots - 1;
    return LC_OK;
}

lc_status lc_tok_merge_add(lc_tokenizer *t, int32_t a, int32_t b, uint32_t rank, int32_t made) {
    lc_tok_merge *m = merge_slot(t, (uint32_t)a, (uint32_t)b);
    if (m->a == UINT32_MAX && ++t->merge_count > t->merge_mask / 4 * 3)
        return lc_fail(LC_EBUG, "more merges than announced");
    *m = (lc_tok_merge){(uint32_t)a, (uint32_t)b, rank, (uint32_t)made};
    return LC_OK;
}

static uint32_t pair_bit(uint32_t left, uint32_t right) {
    return ((left * 0x9E3779B1u) ^ (right * 0x85EBCA77u)) >> 16 & (LC_TOK_CUT_BITS - 1);
}

/* Marks the characters that meet inside each merge. Two pairs may share a bit: then a place that could be cut is not.
 */
static lc_status mark_joinable(lc_tokenizer *t) {
    t->joinable = lc_alloc(LC_TOK_CUT_BITS / 8, 1);
    if (!t->joinable) return LC_ENOMEM;
    for (uint32_t i = 0; i <= t->merge_mask; i++) {
        const lc_tok_merge *m = &t->merge[i];
        if (m->a == UINT32_MAX || m->a >= LC_TOK_LONE || m->b >= LC_TOK_LONE)
            continue; /* no cuts beside those anyway */
        const lc_tok_str *a = &t->token[m->a], *b = &t->token[m->b];
        if (!a->len || !b->len) return LC_OK; /* can_cut stays off */
        size_t len, at = a->len - 1;
        while (at && ((unsigned char)t->text.p[a->at + at] & 0xC0) == 0x80) at--;
        uint32_t bit = pair_bit(lc_tok_char(t->text.p + a->at + at, &len), lc_tok_char(t->text.p + b->at, &len));
        t->joinable[bit / 8] |= (uint8_t)(1 << bit % 8);
    }
    t->can_cut = true;
    return LC_OK;
}

lc_status lc_tok_tables(lc_tokenizer *t) {
    char buf[8];
    for (uint32_t c = 0; c < LC_TOK_LOW_CHARS; c++) {
        size_t n = c < 0x80 ? 1 : 2;
        buf[0] = (char)(c < 0x80 ? c : 0xC0 | c >> 6);
        buf[1] = (char)(0x80 | (c & 63));
        t->low_char[c] = lc_tok_vocab_find(t, buf, n);
    }
    for (int i = 0; i < 256; i++) {
        static const char hex[] = "0123456789ABCDEF";
        char code[6] = {'<', '0', 'x', hex[i >> 4], hex[i & 15], '>'};
        t->byte_id[i] = lc_tok_vocab_find(t, code, 6);
    }
    t->cached = lc_alloc(LC_TOK_CACHE_SLOTS, sizeof *t->cached);
    if (!t->cached) return LC_ENOMEM;
    if (!t->merge) LC_TRY(lc_tok_merges_start(t, 0));
    /* what an unused piece is taken apart into depends on the whole word */
    if (!t->prefix && !t->suffix && !t->spm.halves && !t->unigram.on) LC_TRY(mark_joinable(t));
    return LC_OK;
}

/* ---- one word ---------------------------------------------------------------------------------------------------- */

static int32_t char_id(const lc_tokenizer *t, const char *s, size_t n, uint32_t cp) {
    return cp < LC_TOK_LOW_CHARS ? t->low_char[cp] : lc_tok_vocab_find(t, s, n);
}

static void add_symbol(lc_tokenizer *t, int32_t *count, int32_t id) {
    int32_t i = (*count)++;
    t->symbol[i] = (struct lc_tok_symbol){id, i - 1, i + 1};
}

/* With the word's first and last character written as the model wants them. */
static int32_t affixed_char_id(lc_tokenizer *t, const char *s, size_t n, bool first, bool last, lc_tok_buf *tmp) {
    tmp->len = 0;
    if (!first && t->prefix && lc_tok_put(tmp, t->prefix, strlen(t->prefix)) != LC_OK) return -1;
    if (lc_tok_put(tmp, s, n) != LC_OK) return -1;
    if (last && t->suffix && lc_tok_put(tmp, t->suffix, strlen(t->suffix)) != LC_OK) return -1;
    return lc_tok_vocab_find(t, tmp->p, tmp->len);
}

/* The word as one symbol a character, byte or unknown token. A held-back unknown token stands behind the bytes of
 * characters that follow it, as in the reference. */
static lc_status first_symbols(lc_tokenizer *t, const char *s, size_t n, int32_t *count) {
    LC_TRY(lc_tok_grow((void **)&t->symbol, &t->symbol_room, 0, n + 8, sizeof *t->symbol));
    bool affix = t->prefix || t->suffix, unk = false;
    lc_tok_buf *tmp = &t->affixed;
    *count = 0;
    for (size_t at = 0, len; at < n; at += len) {
        uint32_t cp = lc_tok_char(s + at, &len);
        int32_t id = affix ? affixed_char_id(t, s + at, len, at == 0, at + len == n, tmp) : char_id(t, s + at, len, cp);
        if (id < 0) id = lc_tok_lone(t, cp);
        if (id >= 0) {
            if (unk) add_symbol(t, count, t->unk);
            unk = false;
            add_symbol(t, count, id);
            continue;
        }
        if (t->byte_fallback) {
            const unsigned char *b = (const unsigned char *)(affix ? tmp->p : s + at);
            size_t m = affix ? tmp->len : len, i = 0;
            while (i < m && t->byte_id[b[i]] >= 0) i++;
            if (i == m) {
                if (affix)
                    LC_TRY(lc_tok_grow((void **)&t->symbol, &t->symbol_room, (size_t)*count, m + n + 8,
                                       sizeof *t->symbol));
                for (i = 0; i < m; i++) add_symbol(t, count, t->byte_id[b[i]]);
                continue;
            }
        }
        if (t->unk_missing) return lc_fail(LC_EPARSE, "%s: the unknown token is not in the vocabulary", t->name);
        if (t->unk < 0) continue; /* no unknown token: the character vanishes */
        if (unk && !t->fuse_unk) add_symbol(t, count, t->unk);
        unk = true;
    }
    if (unk) add_symbol(t, count, t->unk);
    if (*count) t->symbol[*count - 1].next = -1;
    return LC_OK;
}

static void heap_down(struct lc_tok_pending *h, size_t n, size_t i, struct lc_tok_pending x) {
    for (size_t c; (c = 2 * i + 1) < n; i = c) {
        if (c + 1 < n && h[c + 1].key < h[c].key) c++;
        if (h[c].key >= x.key) break;
        h[i] = h[c];
    }
    h[i] = x;
}

static void heap_push(lc_tokenizer *t, struct lc_tok_pending x) {
    size_t i = t->heap_len++;
    for (size_t up; i && t->heap[up = (i - 1) / 2].key > x.key; i = up) t->heap[i] = t->heap[up];
    t->heap[i] = x;
}

static const lc_tok_merge *merge_at(const lc_tokenizer *t, int32_t left, int32_t right) {
    const lc_tok_merge *m = merge_slot(t, (uint32_t)t->symbol[left].id, (uint32_t)t->symbol[right].id);
    return m->a == UINT32_MAX ? NULL : m;
}

static void note_halves(lc_tokenizer *t, const lc_tok_merge *m) {
    if (t->spm.halves && t->spm.type[m->made] == LC_PIECE_UNUSED)
        t->spm.halves[m->made] = (struct lc_tok_halves){(int32_t)m->a, (int32_t)m->b};
}

static void push_pair(lc_tokenizer *t, int32_t left, int32_t right) {
    const lc_tok_merge *m = merge_at(t, left, right);
    if (m) note_halves(t, m);
    if (m) heap_push(t, (struct lc_tok_pending){(uint64_t)m->rank << 32 | (uint32_t)left, (int32_t)m->made});
}

static lc_status merge_symbols(lc_tokenizer *t, int32_t count) {
    struct lc_tok_symbol *y = t->symbol;
    /* each merge takes one candidate and one symbol away and brings at most two candidates */
    LC_TRY(lc_tok_grow((void **)&t->heap, &t->heap_room, 0, 3 * (size_t)count + 8, sizeof *t->heap));
    t->heap_len = 0;
    for (int32_t i = 0; i + 1 < count; i++) {
        const lc_tok_merge *m = merge_at(t, i, i + 1);
        if (m) note_halves(t, m);
        if (m)
            t->heap[t->heap_len++] = (struct lc_tok_pending){(uint64_t)m->rank << 32 | (uint32_t)i, (int32_t)m->made};
    }
    for (size_t i = t->heap_len / 2; i-- > 0;) heap_down(t->heap, t->heap_len, i, t->heap[i]);
    while (t->heap_len) {
        struct lc_tok_pending top = t->heap[0];
        t->heap_len--;
        if (t->heap_len) heap_down(t->heap, t->heap_len, 0, t->heap[t->heap_len]);
        int32_t at = (int32_t)(uint32_t)top.key, right;
        if (y[at].id < 0 || (right = y[at].next) < 0) continue;
        const lc_tok_merge *m = merge_at(t, at, right);
        if (!m || (int32_t)m->made != top.made) continue;
        y[at].id = top.made;
        y[at].next = y[right].next;
        y[right].id = -1;
        if (y[at].next >= 0) y[y[at].next].prev = at;
        if (y[at].prev >= 0) push_pair(t, y[at].prev, at);
        if (y[at].next >= 0) push_pair(t, at, y[at].next);
    }
    return LC_OK;
}

/* An unused piece comes out as the pieces that it was made of. Those are shorter, so this ends. */
static lc_status put_used(lc_tokenizer *t, int32_t id) {
    if (id >= LC_TOK_LONE && t->byte_fallback) {
        lc_tok_buf *c = &t->affixed;
        c->len = 0;
        LC_TRY(lc_tok_put_char(c, t->spm.lone[id - LC_TOK_LONE]));
        for (size_t i = 0; i < c->len; i++) LC_TRY(lc_tok_put_id(&t->ids, t->byte_id[(unsigned char)c->p[i]]));
        return LC_OK;
    }
    if (id >= LC_TOK_LONE) id = t->unk;
    if (t->spm.n_lone && id == t->unk && t->ids.len > t->spm.from && t->ids.p[t->ids.len - 1] == id) return LC_OK;
    if (!t->spm.halves || t->spm.type[id] != LC_PIECE_UNUSED || t->spm.halves[id].a < 0)
        return lc_tok_put_id(&t->ids, id);
    LC_TRY(put_used(t, t->spm.halves[id].a));
    return put_used(t, t->spm.halves[id].b);
}

/* Plain BPE of one piece; appends to t->ids. */
static lc_status bpe_piece(lc_tokenizer *t, const char *s, size_t n) {
    int32_t count;
    LC_TRY(first_symbols(t, s, n, &count));
    if (!count) return LC_OK;
    if (count > 1) LC_TRY(merge_symbols(t, count));
    LC_TRY(LC_TOK_ROOM(&t->ids, (size_t)count));
    t->spm.from = t->ids.len;
    for (int32_t i = 0; i >= 0; i = t->symbol[i].next) LC_TRY(put_used(t, t->symbol[i].id));
    if (t->symbol_room > 1 << 20) { /* one giant word should not keep its memory */
        free(t->symbol), free(t->heap);
        t->symbol = NULL, t->heap = NULL, t->symbol_room = t->heap_room = 0;
    }
    return LC_OK;
}

/* ---- cache and cuts ---------------------------------------------------------------------------------------------- */

static bool cache_get(lc_tokenizer *t, const char *s, size_t n, uint32_t hash, lc_status *status) {
    const lc_tok_cached *c = &t->cached[hash % LC_TOK_CACHE_SLOTS];
    if (c->hash != hash || c->len != n || memcmp(t->cache_text.p + c->text, s, n)) return false;
    *status = c->count ? LC_TOK_ROOM(&t->ids, c->count) : LC_OK;
    if (*status != LC_OK || !c->count) return true;
    memcpy(t->ids.p + t->ids.len, t->cache_ids.p + c->ids, c->count * sizeof *t->ids.p);
    t->ids.len += c->count;
    return true;
}

static lc_status cache_put(lc_tokenizer *t, const char *s, size_t n, uint32_t hash, size_t from) {
    size_t count = t->ids.len - from;
    if (count > UINT16_MAX) return LC_OK;
    if (t->cache_text.len > 4 << 20 || t->cache_ids.len > 1 << 20) { /* start afresh */
        memset(t->cached, 0, LC_TOK_CACHE_SLOTS * sizeof *t->cached);
        t->cache_text.len = t->cache_ids.len = 0;
    }
    LC_TRY(LC_TOK_ROOM(&t->cache_ids, count));
    lc_tok_cached c = {hash, (uint32_t)t->cache_text.len, (uint32_t)t->cache_ids.len, (uint16_t)n, (uint16_t)count};
    LC_TRY(lc_tok_put(&t->cache_text, s, n));
    if (count) memcpy(t->cache_ids.p + t->cache_ids.len, t->ids.p + from, count * sizeof *t->ids.p);
    t->cache_ids.len += count;
    t->cached[hash % LC_TOK_CACHE_SLOTS] = c;
    return LC_OK;
}

static lc_status cached_piece(lc_tokenizer *t, const char *s, size_t n) {
    if (n > LC_TOK_CACHE_WORD) return bpe_piece(t, s, n);
    uint32_t hash = (uint32_t)lc_tok_hash(s, n);
    lc_status status = LC_OK;
    if (cache_get(t, s, n, hash, &status)) return status;
    size_t from = t->ids.len;
    LC_TRY(bpe_piece(t, s, n));
    return cache_put(t, s, n, hash, from);
}

/* Cuts a long word where nothing can join. Characters that are no tokens of their own become bytes or unknown tokens,
 * which have other neighbours: no cut beside them. */
static lc_status bpe_cut(lc_tokenizer *t, const char *s, size_t n, bool cached) {
    size_t start = 0, len;
    uint32_t cp = lc_tok_char(s, &len), before;
    bool known = char_id(t, s, len, cp) >= 0, known_before;
    for (size_t at = len; at < n; at += len) {
        before = cp, known_before = known;
        cp = lc_tok_char(s + at, &len);
        known = char_id(t, s + at, len, cp) >= 0;
        uint32_t bit = pair_bit(before, cp);
        if (!known || !known_before || (t->joinable[bit / 8] >> bit % 8 & 1)) continue;
        LC_TRY(cached ? cached_piece(t, s + start, at - start) : bpe_piece(t, s + start, at - start));
        start = at;
    }
    return cached ? cached_piece(t, s + start, n - start) : bpe_piece(t, s + start, n - start);
}

static lc_status bpe_whole(lc_tokenizer *t, const char *s, size_t n, bool is_long) {
    if (t->bytes_at_last) {
        t->word.len = 0;
        LC_TRY(LC_TOK_ROOM(&t->word, 2 * n));
        for (size_t i = 0; i < n; i++) {
            uint32_t c = lc_tok_byte_char((unsigned char)s[i]);
            if (c >= 0x80) t->word.p[t->word.len++] = (char)(0xC0 | c >> 6);
            t->word.p[t->word.len++] = (char)(c < 0x80 ? c : 0x80 | (c & 63));
        }
        s = t->word.p, n = t->word.len;
    }
    if (t->ignore_merges) {
        int32_t id = lc_tok_vocab_find(t, s, n);
        if (id >= 0) return lc_tok_put_id(&t->ids, id);
    }
    /* the cache knows whole words, as they come: pieces are the same thing only when words are not treated specially */
    if (is_long && t->can_cut) return bpe_cut(t, s, n, !t->bytes_at_last && !t->ignore_merges);
    return bpe_piece(t, s, n);
}

lc_status lc_tok_bpe(lc_tokenizer *t, const char *word, size_t n) {
    if (!n) return LC_OK;
    if (n > LC_TOK_CACHE_WORD) return bpe_whole(t, word, n, true);
    uint32_t hash = (uint32_t)lc_tok_hash(word, n);
    lc_status status = LC_OK;
    if (cache_get(t, word, n, hash, &status)) return status;
    size_t from = t->ids.len;
    LC_TRY(bpe_whole(t, word, n, false));
    return cache_put(t, word, n, hash, from);
}

/* A word by the tokenizer's model. User-defined pieces stay whole and join nothing. */
lc_status lc_tok_word(lc_tokenizer *t, const char *s, size_t n) {
    size_t done = 0, len;
    if (t->unigram.on) {
        if (!n || n > LC_TOK_CACHE_WORD) return n ? lc_tok_unigram_word(t, s, n) : LC_OK;
        uint32_t hash = (uint32_t)lc_tok_hash(s, n);
        lc_status status = LC_OK;
        if (cache_get(t, s, n, hash, &status)) return status;
        size_t from = t->ids.len;
        LC_TRY(lc_tok_unigram_word(t, s, n));
        return cache_put(t, s, n, hash, from);
    }
    for (size_t at = 0; at < n && t->user.len;) {
        int32_t id = lc_tok_trie_longest(&t->user, s + at, n - at, &len);
        if (id < 0) {
            lc_tok_char(s + at, &len);
            at += len;
            continue;
        }
        LC_TRY(lc_tok_bpe(t, s + done, at - done));
        LC_TRY(lc_tok_put_id(&t->ids, id));
        done = at += len;
    }
    return lc_tok_bpe(t, s + done, n - done);
}
