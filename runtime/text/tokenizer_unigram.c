/* tokenizer_unigram.c: the Unigram model: of all ways to write a word with pieces the one whose scores sum up highest,
 * by Viterbi's algorithm from left to right. SentencePiece and Hugging Face differ in how sums are rounded, in
 * user-defined pieces and in what becomes of unknown characters; both ways are here. O(n * longest piece). */
#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>

static struct lc_tok_edge *edge_at(const lc_tok_unigram *u, uint32_t node, uint32_t byte) {
    uint32_t i = (uint32_t)(((uint64_t)node << 8 | byte) * 0x9E3779B97F4A7C15u >> 32) & u->edge_mask;
    while (u->edge[i].to && (u->edge[i].node != node || u->edge[i].byte != byte)) i = (i + 1) & u->edge_mask;
    return &u->edge[i];
}

static lc_status start_edges(lc_tok_unigram *u, uint32_t slots) {
    u->edge = lc_alloc(slots, sizeof *u->edge);
    u->edge_mask = slots - 1;
    return u->edge ? LC_OK : LC_ENOMEM;
}

static lc_status grow_edges(lc_tok_unigram *u) {
    struct lc_tok_edge *old = u->edge;
    uint32_t n = u->edge_mask + 1;
    if (n >= 1u << 30) return lc_fail(LC_EPARSE, "a vocabulary of over 2^29 bytes");
    lc_status status = start_edges(u, n * 2);
    for (uint32_t i = 0; i < n && status == LC_OK; i++)
        if (old[i].to) *edge_at(u, old[i].node, old[i].byte) = old[i];
    free(old);
    return status;
}

static lc_status add_piece(lc_tok_unigram *u, size_t *room, const char *s, size_t n, int32_t id) {
    uint32_t node = 0;
    for (size_t i = 0; i < n; i++) {
        if (u->edges * 2 > u->edge_mask) LC_TRY(grow_edges(u));
        struct lc_tok_edge *e = edge_at(u, node, (unsigned char)s[i]);
        if (!e->to) {
            LC_TRY(lc_tok_grow((void **)&u->piece, room, u->nodes, 1, sizeof *u->piece));
            u->piece[u->nodes] = -1;
            *e = (struct lc_tok_edge){node, (unsigned char)s[i], u->nodes++};
            u->edges++;
        }
        node = e->to;
    }
    if (n > u->longest) u->longest = n;
    if (n) u->piece[node] = id; /* of equal texts the last counts, as in the reference */
    return LC_OK;
}

/* score [t->size] by id; pieces that `skip` marks are found nowhere. The caller sets unk_score and single. */
lc_status lc_tok_unigram_start(lc_tokenizer *t, const double *score, const uint8_t *skip) {
    lc_tok_unigram *u = &t->unigram;
    size_t room = 0;
    u->on = true;
    u->score = lc_alloc((size_t)t->size + 1, sizeof *u->score);
    if (!u->score) return LC_ENOMEM;
    memcpy(u->score, score, (size_t)t->size * sizeof *score);
    LC_TRY(start_edges(u, 1 << 12));
    LC_TRY(lc_tok_grow((void **)&u->piece, &room, 0, 1, sizeof *u->piece));
    u->piece[0] = -1, u->nodes = 1;
    for (int32_t i = 0; i < t->size; i++) {
        const lc_tok_str *w = &t->token[i];
        if (w->at == UINT32_MAX || (skip && skip[i])) continue;
        LC_TRY(add_piece(u, &room, t->text.p + w->at, w->len, i));
    }
    return LC_OK;
}

static void offer(const lc_tok_unigram *u, size_t from, size_t to, int32_t id, double score) {
    struct lc_tok_best *b = &u->best[to];
    if (b->from != UINT32_MAX && !(score > b->score)) return;
    *b = (struct lc_tok_best){score, id, (uint32_t)from};
}

/* Sums of a long text outgrow a float. Then SentencePiece counts anew from where it is, and so its ties are these. */
static void count_anew(lc_tok_unigram *u, size_t at, size_t n) {
    float here = (float)u->best[at].score;
    size_t end = n - at < u->longest ? n : at + u->longest;
    for (size_t i = at; i <= end; i++)
        if (u->best[i].from != UINT32_MAX) u->best[i].score = (float)u->best[i].score - here;
}

static lc_status fill(lc_tokenizer *t, const char *s, size_t n) {
    lc_tok_unigram *u = &t->unigram;
    for (size_t at = 0, len; at < n; at += len) {
        if (u->single && u->best[at].score < -100000) count_anew(u, at, n);
        double here = u->best[at].score;
        uint32_t node = 0;
        bool single = false;
        lc_tok_char(s + at, &len);
        for (size_t i = at; i < n; i++) {
            node = edge_at(u, node, (unsigned char)s[i])->to;
            if (!node) break;
            int32_t id = u->piece[node];
            if (id < 0) continue;
            size_t size = i + 1 - at;
            bool user = t->spm.own && t->spm.type && t->spm.type[id] == LC_PIECE_USER;
            double score = user ? (float)(0.1 * (double)size - 0.1) : u->score[id];
            offer(u, at, i + 1, id, u->single ? (double)((float)score + (float)here) : score + here);
            single = single || size == len;
        }
        if (single) continue;
        double score = u->single ? (double)((float)u->unk_score + (float)here) : u->unk_score + here;
        const struct lc_tok_best *b = &u->best[at + len];
        if (t->unk < 0 && (b->from == UINT32_MAX || score > b->score))
            return lc_fail(LC_EPARSE, "%s: a character has no token, and there is no unknown token", t->name);
        offer(u, at, at + len, t->unk, score);
    }
    return LC_OK;
}

static lc_status put_bytes(lc_tokenizer *t, const char *s, size_t n, bool *done) {
    *done = t->byte_fallback;
    for (size_t i = 0; i < n && *done; i++) *done = t->byte_id[(unsigned char)s[i]] >= 0;
    for (size_t i = 0; i < n && *done; i++) LC_TRY(lc_tok_put_id(&t->ids, t->byte_id[(unsigned char)s[i]]));
    return LC_OK;
}

/* A run of unknown characters. Hugging Face looks the whole run up once more. */
static lc_status put_unknown(lc_tokenizer *t, const char *s, size_t n) {
    int32_t id = t->unigram.single ? -1 : lc_tok_vocab_find(t, s, n);
    bool done;
    if (id >= 0) return lc_tok_put_id(&t->ids, id);
    LC_TRY(put_bytes(t, s, n, &done));
    return done ? LC_OK : lc_tok_put_id(&t->ids, t->unk);
}

lc_status lc_tok_unigram_word(lc_tokenizer *t, const char *s, size_t n) {
    lc_tok_unigram *u = &t->unigram;
    if (n >= UINT32_MAX) return lc_fail(LC_EARG, "%s: a word of over 4 GiB", t->name);
    LC_TRY(lc_tok_grow((void **)&u->best, &u->best_room, 0, n + 1, sizeof *u->best));
    u->best[0] = (struct lc_tok_best){0, 0, 0};
    for (size_t i = 1; i <= n; i++) u->best[i] = (struct lc_tok_best){0, 0, UINT32_MAX};
    LC_TRY(fill(t, s, n));
    u->path.len = 0;
    for (size_t end = n; end; end = u->best[end].from) {
        LC_TRY(LC_TOK_ROOM(&u->path, 1));
        u->path.p[u->path.len++] = (lc_tok_piece){u->best[end].from, end - u->best[end].from, u->best[end].id};
    }
    for (size_t i = u->path.len; i-- > 0;) {
        lc_tok_piece p = u->path.p[i];
        while (p.id == t->unk && i && u->path.p[i - 1].id == t->unk) p.len += u->path.p[--i].len;
        LC_TRY(p.id == t->unk ? put_unknown(t, s + p.at, p.len) : lc_tok_put_id(&t->ids, p.id));
    }
    if (u->best_room > 1 << 22) { /* one giant word should not keep its memory */
        free(u->best);
        u->best = NULL, u->best_room = 0;
    }
    return LC_OK;
}
