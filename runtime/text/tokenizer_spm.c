/* tokenizer_spm.c: builds a tokenizer from SentencePiece's tokenizer.model, a protobuf message ModelProto that is read
 * by hand: pieces (1), trainer_spec (2), normalizer_spec (3), denormalizer_spec (5). BPE and Unigram models are run in
 * two ways: as Hugging Face's converter would have it (control symbols in a text are recognized, the space in front
 * comes back after each of them), or as SentencePiece's own library does, whose decoding is here too. */
#define _GNU_SOURCE /* memmem */
#include "tokenizer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../io/doc.h"

enum { MODEL_UNIGRAM = 1, MODEL_BPE, MODEL_WORD, MODEL_CHAR, PIECE_LIMIT = 8000 };

/* ---- protobuf ---------------------------------------------------------------------------------------------------- */

typedef struct message {
    const unsigned char *p;
    size_t at, end;
} message;

typedef struct field {
    uint32_t number;
    unsigned type;  /* 0 varint, 1 eight bytes, 2 bytes, 5 four bytes */
    uint64_t value; /* of types 0, 1 and 5 */
    message inner;  /* of type 2 */
    size_t at;
} field;

static lc_status bad(size_t at, const char *expected) {
    return lc_fail(LC_EPARSE, "byte %zu: expected %s", at, expected);
}

static lc_status varint(message *m, uint64_t *out) {
    size_t from = m->at;
    *out = 0;
    for (int shift = 0; shift < 64 && m->at < m->end; shift += 7) {
        unsigned char b = m->p[m->at++];
        *out |= (uint64_t)(b & 127) << shift;
        if (b < 128) return LC_OK;
    }
    return bad(from, "a number of at most ten bytes before the message's end");
}

static lc_status fixed(message *m, size_t n, uint64_t *out) {
    if (m->end - m->at < n) return bad(m->at, "a number of fixed size before the message's end");
    *out = 0;
    for (size_t i = 0; i < n; i++) *out |= (uint64_t)m->p[m->at + i] << 8 * i;
    m->at += n;
    return LC_OK;
}

static lc_status next_field(message *m, field *f) {
    uint64_t head, n;
    f->at = m->at;
    LC_TRY(varint(m, &head));
    f->number = (uint32_t)(head >> 3), f->type = head & 7;
    if (!f->number || head >> 32) return bad(f->at, "a field number from 1 to 2^29");
    switch (f->type) {
    case 0: return varint(m, &f->value);
    case 1: return fixed(m, 8, &f->value);
    case 5: return fixed(m, 4, &f->value);
    case 2:
        LC_TRY(varint(m, &n));
        if (n > m->end - m->at) return bad(f->at, "a field that ends inside its message (is the file cut short?)");
        f->inner = (message){m->p, m->at, m->at + (size_t)n};
        m->at += (size_t)n;
        return LC_OK;
    }
    return bad(f->at, "a field of a known type (this is no SentencePiece model)");
}

static lc_status need(const field *f, unsigned type, const char *what) {
    return f->type == type ? LC_OK : bad(f->at, what);
}

/* ---- the message ------------------------------------------------------------------------------------------------- */

typedef struct piece {
    size_t at, len; /* text */
    float score;
    uint8_t type;
} piece;

typedef struct text {
    const char *p;
    size_t len;
} text;

typedef struct spec { /* of a normalizer */
    text map;
    bool prefix, strip, escape;
} spec;

typedef struct loader {
    lc_tokenizer *t;
    const unsigned char *data;
    const lc_tok_options *how;
    piece *piece;
    size_t count, room;
    uint64_t model_type;
    bool byte_fallback, suffix;
    text unk_surface, bos, eos;
    spec norm, denorm;
} loader;

static text text_of(const field *f) {
    return (text){(const char *)f->inner.p + f->inner.at, f->inner.end - f->inner.at};
}

static lc_status read_piece(loader *x, message m) {
    piece p = {.type = LC_PIECE_NORMAL};
    size_t from = m.at;
    while (m.at < m.end) {
        field f;
        LC_TRY(next_field(&m, &f));
        if (f.number == 1) {
            LC_TRY(need(&f, 2, "a piece's text"));
            p.at = f.inner.at, p.len = f.inner.end - f.inner.at;
        } else if (f.number == 2) {
            LC_TRY(need(&f, 5, "a piece's score"));
            uint32_t bits = (uint32_t)f.value;
            memcpy(&p.score, &bits, 4);
        } else if (f.number == 3) {
            LC_TRY(need(&f, 0, "a piece's type"));
            if (f.value < 1 || f.value > 6) return bad(f.at, "a piece's type from 1 to 6");
            p.type = (uint8_t)f.value;
        }
    }
    if (!p.len || p.len >= PIECE_LIMIT) return bad(from, "a piece with a text of 1 to 7,999 bytes");
    if (!isfinite(p.score)) return bad(from, "a piece with a finite score");
    const char *s = (const char *)x->data + p.at;
    if (memchr(s, 0, p.len) || !lc_tok_utf8_valid(s, p.len)) return bad(p.at, "a piece's text in UTF-8 without NUL");
    LC_TRY(lc_tok_grow((void **)&x->piece, &x->room, x->count, 1, sizeof *x->piece));
    x->piece[x->count++] = p;
    return LC_OK;
}

static lc_status read_trainer(loader *x, message m) {
    while (m.at < m.end) {
        field f;
        LC_TRY(next_field(&m, &f));
        switch (f.number) {
        case 3:
            LC_TRY(need(&f, 0, "model_type, a number"));
            x->model_type = f.value;
            break;
        case 24:
            LC_TRY(need(&f, 0, "treat_whitespace_as_suffix, a number"));
            x->suffix = f.value != 0;
            break;
        case 35:
            LC_TRY(need(&f, 0, "byte_fallback, a number"));
            x->byte_fallback = f.value != 0;
            break;
        case 44:
            LC_TRY(need(&f, 2, "unk_surface, a text"));
            x->unk_surface = text_of(&f);
            break;
        case 46:
            LC_TRY(need(&f, 2, "bos_piece, a text"));
            x->bos = text_of(&f);
            break;
        case 47:
            LC_TRY(need(&f, 2, "eos_piece, a text"));
            x->eos = text_of(&f);
            break;
        default: break;
        }
    }
    return LC_OK;
}

static lc_status read_spec(spec *k, message m) {
    while (m.at < m.end) {
        field f;
        LC_TRY(next_field(&m, &f));
        if (f.number == 2) {
            LC_TRY(need(&f, 2, "precompiled_charsmap, bytes"));
            k->map = text_of(&f);
        } else if (f.number >= 3 && f.number <= 5) {
            LC_TRY(need(&f, 0, "a normalizer's switch, a number"));
            *(f.number == 3 ? &k->prefix : f.number == 4 ? &k->strip : &k->escape) = f.value != 0;
        }
    }
    return LC_OK;
}

static lc_status read_model(loader *x, message m) {
    x->model_type = MODEL_UNIGRAM; /* the format's defaults */
    x->bos = (text){"<s>", 3}, x->eos = (text){"</s>", 4};
    x->norm = x->denorm = (spec){.prefix = true, .strip = true, .escape = true};
    while (m.at < m.end) {
        field f;
        LC_TRY(next_field(&m, &f));
        if (f.number > 5) continue; /* self-test data and extensions */
        if (f.number != 4) LC_TRY(need(&f, 2, "a message (this is no SentencePiece model)"));
        if (f.number == 1) LC_TRY(read_piece(x, f.inner));
        if (f.number == 2) LC_TRY(read_trainer(x, f.inner));
        if (f.number == 3) LC_TRY(read_spec(&x->norm, f.inner));
        if (f.number == 5) LC_TRY(read_spec(&x->denorm, f.inner));
    }
    return x->count ? LC_OK : lc_fail(LC_EPARSE, "it holds no pieces");
}

/* ---- the vocabulary ---------------------------------------------------------------------------------------------- */

static bool is_normal(uint8_t type) {
    return type == LC_PIECE_NORMAL || type == LC_PIECE_USER || type == LC_PIECE_UNUSED;
}

static int byte_of(const char *s, size_t n) {
    static const char hex[] = "0123456789ABCDEF";
    if (n != 6 || memcmp(s, "<0x", 3) || s[5] != '>') return -1;
    const char *a = memchr(hex, s[3], 16), *b = memchr(hex, s[4], 16);
    return a && b ? (int)(a - hex) << 4 | (int)(b - hex) : -1;
}

static lc_status add_pieces(loader *x) {
    lc_tokenizer *t = x->t;
    int bytes = 0;
    for (size_t i = 0; i < x->count; i++) {
        const piece *p = &x->piece[i];
        const char *s = (const char *)x->data + p->at;
        int32_t before = lc_tok_vocab_find(t, s, p->len);
        if (before >= 0 && is_normal(x->piece[before].type) == is_normal(p->type))
            return lc_fail(LC_EPARSE, "byte %zu: piece %zu has the text of piece %d, '%.*s'", p->at, i, (int)before,
                           (int)(p->len > 60 ? 60 : p->len), s);
        if (p->type == LC_PIECE_UNKNOWN && t->unk >= 0)
            return lc_fail(LC_EPARSE, "byte %zu: a second unknown piece", p->at);
        if (p->type == LC_PIECE_UNKNOWN) t->unk = (int32_t)i;
        if (p->type == LC_PIECE_BYTE && (!x->byte_fallback || byte_of(s, p->len) < 0))
            return lc_fail(LC_EPARSE, "byte %zu: '%.*s' is no byte's piece, or byte_fallback is off", p->at,
                           (int)(p->len > 60 ? 60 : p->len), s);
        bytes += p->type == LC_PIECE_BYTE;
        LC_TRY(lc_tok_vocab_add(t, s, p->len, (int32_t)i));
    }
    if (t->unk < 0) return lc_fail(LC_EPARSE, "it has no unknown piece");
    if (x->byte_fallback && bytes != 256)
        return lc_fail(LC_EPARSE, "byte_fallback is on, but there are %d byte pieces instead of 256", bytes);
    return LC_OK;
}

static lc_status types(loader *x) {
    lc_tok_spm *k = &x->t->spm;
    bool unused = false;
    k->type = lc_alloc(x->count, 1);
    if (!k->type) return LC_ENOMEM;
    for (size_t i = 0; i < x->count; i++) {
        k->type[i] = x->piece[i].type;
        unused = unused || k->type[i] == LC_PIECE_UNUSED;
    }
    if (!unused || x->model_type != MODEL_BPE || !k->own) return LC_OK;
    k->halves = lc_alloc(x->count, sizeof *k->halves);
    if (!k->halves) return LC_ENOMEM;
    memset(k->halves, 0xFF, x->count * sizeof *k->halves);
    return LC_OK;
}

static lc_status vocabulary(loader *x) {
    if (x->count > 1 << 24) return lc_fail(LC_EPARSE, "%zu pieces; at most 16 million", x->count);
    LC_TRY(lc_tok_vocab_start(x->t, (int32_t)x->count, (int32_t)x->count - 1));
    LC_TRY(add_pieces(x));
    return types(x);
}

static lc_status bpe(loader *x) {
    lc_tokenizer *t = x->t;
    float *score = lc_alloc(x->count, sizeof *score);
    uint8_t *skip = lc_alloc(x->count, 1);
    lc_status status = score && skip ? LC_OK : LC_ENOMEM;
    for (size_t i = 0; i < x->count && status == LC_OK; i++) {
        score[i] = x->piece[i].score;
        skip[i] = t->spm.own && !is_normal(x->piece[i].type);
    }
    if (status == LC_OK)
        status = lc_tok_merges_derive(t, score, skip, t->spm.own ? LC_MERGES_LEFTMOST : LC_MERGES_CONVERTED);
    lc_free(score), lc_free(skip);
    t->fuse_unk = true, t->byte_fallback = x->byte_fallback;
    return status;
}

static lc_status unigram(loader *x) {
    lc_tokenizer *t = x->t;
    lc_tok_unigram *u = &t->unigram;
    double *score = lc_alloc(x->count, sizeof *score), low = INFINITY;
    uint8_t *skip = lc_alloc(x->count, 1);
    lc_status status = score && skip ? LC_OK : LC_ENOMEM;
    for (size_t i = 0; i < x->count && status == LC_OK; i++) {
        const piece *p = &x->piece[i];
        score[i] = p->score;
        skip[i] = t->spm.own && (!is_normal(p->type) || p->type == LC_PIECE_UNUSED);
        if ((!t->spm.own || p->type == LC_PIECE_NORMAL) && score[i] < low) low = score[i];
    }
    if (status == LC_OK) status = lc_tok_unigram_start(t, score, skip);
    lc_free(score), lc_free(skip);
    u->single = t->spm.own;
    u->unk_score = u->single ? (double)((float)low - 10.0f) : low - 10;
    if (!isfinite(u->unk_score)) u->unk_score = 0;
    t->byte_fallback = x->byte_fallback;
    return status;
}

/* ---- the two ways to run it -------------------------------------------------------------------------------------- */

static lc_status own_steps(loader *x) {
    lc_tokenizer *t = x->t;
    lc_tok_spm *k = &t->spm;
    lc_tok_norm *norm;
    if (x->denorm.map.len) return lc_fail(LC_EPARSE, "its denormalizer_spec is not supported");
    k->prefix = x->norm.prefix, k->strip = x->norm.strip, k->escape = x->norm.escape, k->suffix = x->suffix;
    LC_TRY(lc_tok_charsmap_set(&k->map, x->norm.map.p, x->norm.map.len));
    if (x->unk_surface.p) {
        k->unk_surface = lc_alloc(x->unk_surface.len + 1, 1);
        if (!k->unk_surface) return LC_ENOMEM;
        memcpy(k->unk_surface, x->unk_surface.p, x->unk_surface.len);
    }
    for (int i = 0; i < 256; i++) t->user.root[i] = -1;
    for (size_t i = 0; i < x->count; i++)
        if (x->piece[i].type == LC_PIECE_USER)
            LC_TRY(lc_tok_trie_add(&t->user, (const char *)x->data + x->piece[i].at, x->piece[i].len, (int32_t)i));
    LC_TRY(lc_tok_add_norm(t, &norm));
    norm->kind = LC_NORM_SPM;
    return LC_OK;
}

static lc_status regex_norm(lc_tokenizer *t, const char *regex, const char *with) {
    lc_tok_norm *norm;
    LC_TRY(lc_tok_add_norm(t, &norm));
    norm->kind = LC_NORM_REPLACE;
    norm->text = lc_strdup(with);
    norm->text_len = strlen(with);
    return norm->text ? lc_tok_pattern_regex(&norm->pattern, regex, strlen(regex)) : LC_ENOMEM;
}

/* What the converter writes for a Unigram model. */
static lc_status converted_unigram(loader *x) {
    lc_tokenizer *t = x->t;
    lc_tok_norm *norm;
    lc_tok_pre *pre;
    lc_tok_dec *dec;
    if (x->norm.strip) {
        LC_TRY(lc_tok_add_norm(t, &norm));
        norm->kind = LC_NORM_STRIP, norm->right = true;
        LC_TRY(regex_norm(t, " {2,}", "\xE2\x96\x81"));
    }
    LC_TRY(lc_tok_add_pre(t, &pre));
    pre->kind = LC_PRE_METASPACE, pre->the_char = 0x2581, pre->split = true;
    pre->prepend = x->norm.prefix ? LC_PREPEND_ALWAYS : LC_PREPEND_NEVER;
    if (x->byte_fallback) {
        LC_TRY(lc_tok_add_dec(t, &dec));
        dec->kind = LC_DEC_BYTE_FALLBACK;
    }
    LC_TRY(lc_tok_add_dec(t, &dec));
    dec->kind = LC_DEC_METASPACE, dec->the_char = 0x2581, dec->prepend = pre->prepend;
    return LC_OK;
}

static lc_status converted_steps(loader *x) {
    lc_tok_norm *norm;
    if (x->norm.map.len) {
        LC_TRY(lc_tok_add_norm(x->t, &norm));
        norm->kind = LC_NORM_CHARSMAP;
        LC_TRY(lc_tok_charsmap_set(&norm->map, x->norm.map.p, x->norm.map.len));
    }
    if (x->model_type == MODEL_UNIGRAM) return converted_unigram(x);
    if (x->norm.strip) LC_TRY(regex_norm(x->t, " {2,}", " "));
    return lc_tok_sentencepiece_steps(x->t, !x->norm.prefix       ? LC_PREPEND_NEVER
                                            : x->how->legacy == 0 ? LC_PREPEND_FIRST
                                                                  : LC_PREPEND_ALWAYS);
}

static lc_status added_tokens(loader *x) {
    for (size_t i = 0; i < x->count; i++) {
        uint8_t type = x->piece[i].type;
        bool special = type == LC_PIECE_CONTROL || type == LC_PIECE_UNKNOWN;
        if (!special && (type != LC_PIECE_USER || x->t->spm.own)) continue;
        lc_tok_added a = {.special = special};
        LC_TRY(lc_tok_add_token(x->t, (const char *)x->data + x->piece[i].at, x->piece[i].len, &a));
    }
    if (!x->how->d) return LC_OK;
    return lc_tok_added_from_doc(x->t, x->how->d, lc_doc_get(x->how->d, 0, "added_tokens"));
}

static lc_status bos_and_eos(loader *x) {
    int32_t items[4], n = 0, bos = lc_tok_vocab_find(x->t, x->bos.p, x->bos.len),
                      eos = lc_tok_vocab_find(x->t, x->eos.p, x->eos.len);
    if (bos >= 0 && x->how->add_bos != 0) items[n++] = bos;
    items[n++] = -1;
    if (eos >= 0 && x->how->add_eos == 1) items[n++] = eos;
    items[n] = -2;
    return n > 1 ? lc_tok_add_post(x->t, items) : LC_OK;
}

static lc_status load(loader *x, size_t n) {
    static const char *const names[] = {"WORD", "CHAR"};
    LC_TRY(read_model(x, (message){x->data, 0, n}));
    if (x->model_type == MODEL_WORD || x->model_type == MODEL_CHAR)
        return lc_fail(LC_EPARSE, "a SentencePiece model of type %s is not supported; BPE and UNIGRAM are",
                       names[x->model_type - MODEL_WORD]);
    if (x->model_type != MODEL_UNIGRAM && x->model_type != MODEL_BPE)
        return lc_fail(LC_EPARSE, "its model_type is none of UNIGRAM, BPE, WORD, CHAR");
    x->t->spm.own = x->how->own;
    LC_TRY(vocabulary(x));
    LC_TRY(x->model_type == MODEL_BPE ? bpe(x) : unigram(x));
    LC_TRY(x->how->own ? own_steps(x) : converted_steps(x));
    LC_TRY(added_tokens(x));
    LC_TRY(bos_and_eos(x));
    return lc_tok_finish(x->t);
}

lc_status lc_tok_from_spm(lc_tokenizer **out, const char *name, const char *data, size_t n, const lc_tok_options *how) {
    loader x = {.data = (const unsigned char *)data, .how = how};
    *out = NULL;
    lc_status status = lc_tok_new(&x.t, name);
    if (status == LC_OK) {
        status = load(&x, n);
        if (status != LC_OK) status = lc_fail_in(status, "%s: ", name);
    }
    free(x.piece);
    if (status != LC_OK) return lc_tokenizer_free(x.t), status;
    *out = x.t;
    return LC_OK;
}

/* ---- decoding as the library does -------------------------------------------------------------------------------- */

static lc_status put_piece(const char *s, size_t n, lc_tok_buf *out) {
    static const char mark[] = "\xE2\x96\x81";
    while (n) {
        const char *hit = memmem(s, n, mark, 3);
        size_t run = hit ? (size_t)(hit - s) : n;
        LC_TRY(lc_tok_put(out, s, run));
        if (hit) LC_TRY(lc_tok_put(out, " ", 1));
        s += run + (hit ? 3 : 0), n -= run + (hit ? 3 : 0);
    }
    return LC_OK;
}

/* A run of byte pieces: whole characters, and U+FFFD for each byte that belongs to none. */
static lc_status put_run(const char *s, size_t n, lc_tok_buf *out) {
    uint32_t cp;
    for (size_t at = 0, len; at < n; at += len) {
        bool good = lc_tok_utf8(s + at, n - at, &cp, &len);
        if (!good) len = 1;
        LC_TRY(good ? lc_tok_put(out, s + at, len) : lc_tok_put(out, "\xEF\xBF\xBD", 3));
    }
    return LC_OK;
}

/* Added tokens, of which the library knows nothing, are written as they are. The space that the first piece begins with
 * is not the text's. */
lc_status lc_tok_spm_decode(const lc_tokenizer *t, const int32_t *ids, int32_t count, lc_tok_buf *out) {
    const lc_tok_spm *k = &t->spm;
    size_t from = out->len;
    bool at_start = true, took = false;
    lc_tok_buf run = {0};
    lc_status status = LC_OK;
    for (int32_t i = 0; i < count && status == LC_OK; i++) {
        if (ids[i] < 0 || ids[i] >= t->size) continue;
        const lc_tok_str *w = &t->token[ids[i]];
        bool foreign = ids[i] >= t->model_count;
        if (foreign && t->added_of[ids[i]] >= 0) w = &t->added[t->added_of[ids[i]]].content;
        if (w->at == UINT32_MAX) continue;
        const char *s = t->text.p + w->at;
        size_t n = w->len;
        int type = foreign ? 0 : k->type[ids[i]];
        if (type == LC_PIECE_BYTE) {
            char c = (char)byte_of(s, n);
            status = lc_tok_put(&run, &c, 1);
            continue;
        }
        status = put_run(run.p, run.len, out);
        run.len = 0;
        if (took || out->len > from) at_start = false;
        took = false;
        if (type == LC_PIECE_CONTROL || status != LC_OK) continue;
        if (type == LC_PIECE_UNKNOWN) {
            const char *u = k->unk_surface ? k->unk_surface : " \xE2\x81\x87 ";
            status = lc_tok_put(out, u, strlen(u));
            continue;
        }
        if (at_start && (k->prefix || k->strip) && n >= 3 && !memcmp(s, "\xE2\x96\x81", 3)) {
            s += 3, n -= 3;
            took = !k->strip;
        }
        status = put_piece(s, n, out);
    }
    if (status == LC_OK) status = put_run(run.p, run.len, out);
    free(run.p);
    return status;
}
