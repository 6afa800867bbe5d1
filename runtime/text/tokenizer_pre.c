/* tokenizer_pre.c: normalizers and pre-tokenizers: what happens to a text before the model sees its words. A
 * pre-tokenizer turns a list of words (spans of one text) into another; those that change characters write a new text.
 */
#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

/* ---- normalizers ------------------------------------------------------------------------------------------------- */

static bool is_ascii(const char *s, size_t n) {
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)s[i] >= 0x80) return false;
    return true;
}

static lc_status form_of(lc_tok_norm_kind kind, const char *s, size_t n, lc_tok_buf *out) {
    if (is_ascii(s, n)) return lc_tok_put(out, s, n);
    int options = UTF8PROC_STABLE;
    options |= kind == LC_NORM_NFC || kind == LC_NORM_NFKC ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE;
    if (kind == LC_NORM_NFKC || kind == LC_NORM_NFKD) options |= UTF8PROC_COMPAT;
    utf8proc_uint8_t *made = NULL;
    utf8proc_ssize_t len =
        utf8proc_map((const utf8proc_uint8_t *)s, (utf8proc_ssize_t)n, &made, (utf8proc_option_t)options);
    if (len < 0) return lc_fail(LC_ENOMEM, "Unicode normalization: %s", utf8proc_errmsg(len));
    lc_status status = lc_tok_put(out, (const char *)made, (size_t)len);
    free(made);
    return status;
}

static lc_status unicode_form(lc_tok_norm_kind kind, const char *s, size_t n, lc_tok_buf *out) {
    size_t done = 0;
    for (size_t at = 0, len; at < n; at += len) {
        if (!lc_tok_has_no_form(lc_tok_char(s + at, &len))) continue;
        LC_TRY(form_of(kind, s + done, at - done, out));
        LC_TRY(lc_tok_put(out, s + at, len));
        done = at + len;
    }
    return form_of(kind, s + done, n - done, out);
}

static lc_status lower(const char *s, size_t n, lc_tok_buf *out) {
    for (size_t at = 0, len; at < n; at += len) {
        uint32_t c = lc_tok_char(s + at, &len);
        if (c == 0x130)
            LC_TRY(lc_tok_put(out, "i\xCC\x87", 3)); /* the one letter whose lower case is two characters */
        else
            LC_TRY(lc_tok_put_char(out, lc_tok_lower(c)));
    }
    return LC_OK;
}

static lc_status replace(const lc_tok_pattern *p, const char *with, size_t with_len, const char *s, size_t n,
                         lc_tok_buf *out) {
    lc_tok_search x = {0};
    size_t done = 0;
    for (bool found;; done = x.end) {
        LC_TRY(lc_tok_search_next(p, s, n, &x, &found));
        if (!found) return lc_tok_put(out, s + done, n - done);
        LC_TRY(lc_tok_put(out, s + done, x.start - done));
        LC_TRY(lc_tok_put(out, with, with_len));
    }
}

static void strip(const lc_tok_norm *k, const char **s, size_t *n) {
    size_t len;
    while (k->left && *n && lc_tok_is(LC_TOK_SPACE, lc_tok_char(*s, &len))) *s += len, *n -= len;
    while (k->right && *n) {
        size_t at = *n - 1;
        while (at && ((unsigned char)(*s)[at] & 0xC0) == 0x80) at--;
        if (!lc_tok_is(LC_TOK_SPACE, lc_tok_char(*s + at, &len))) break;
        *n = at;
    }
}

/* SentencePiece's nmt rules as the reference has them: control characters go, odd spaces become spaces. */
static lc_status nmt(const char *s, size_t n, lc_tok_buf *out) {
    for (size_t at = 0, len; at < n; at += len) {
        uint32_t c = lc_tok_char(s + at, &len);
        if ((c >= 1 && c <= 8) || c == 0xB || (c >= 0xE && c <= 0x1F) || c == 0x7F || c == 0x8F || c == 0x9F) continue;
        bool space = c == 9 || c == 10 || c == 12 || c == 13 || c == 0x1680 || (c >= 0x200B && c <= 0x200F) ||
                     c == 0x2028 || c == 0x2029 || c == 0x2581 || c == 0xFEFF || c == 0xFFFD;
        LC_TRY(space ? lc_tok_put(out, " ", 1) : lc_tok_put(out, s + at, len));
    }
    return LC_OK;
}

static lc_status normalize_one(const lc_tokenizer *t, const lc_tok_norm *k, const char *s, size_t n, lc_tok_buf *out) {
    switch (k->kind) {
    case LC_NORM_NFC:
    case LC_NORM_NFD:
    case LC_NORM_NFKC:
    case LC_NORM_NFKD: return unicode_form(k->kind, s, n, out);
    case LC_NORM_LOWER: return lower(s, n, out);
    case LC_NORM_PREPEND:
        if (n) LC_TRY(lc_tok_put(out, k->text, k->text_len));
        return lc_tok_put(out, s, n);
    case LC_NORM_REPLACE: return replace(&k->pattern, k->text, k->text_len, s, n, out);
    case LC_NORM_STRIP: strip(k, &s, &n); return lc_tok_put(out, s, n);
    case LC_NORM_STRIP_ACCENTS:
        for (size_t at = 0, len; at < n; at += len)
            if (!lc_tok_is_accent(lc_tok_char(s + at, &len))) LC_TRY(lc_tok_put(out, s + at, len));
        return LC_OK;
    case LC_NORM_BYTES:
        for (size_t i = 0; i < n; i++) LC_TRY(lc_tok_put_char(out, lc_tok_byte_char((unsigned char)s[i])));
        return LC_OK;
    case LC_NORM_NMT: return nmt(s, n, out);
    case LC_NORM_CHARSMAP: return lc_tok_charsmap_apply(&k->map, s, n, out);
    case LC_NORM_SPM: return lc_tok_spm_normalize(t, s, n, out);
    }
    return lc_fail(LC_EBUG, "unknown normalizer %d", (int)k->kind);
}

lc_status lc_tok_normalize(lc_tokenizer *t, const char *s, size_t n, const char **out, size_t *out_len) {
    size_t limit = n * 64 + (1 << 20); /* replacements that feed each other could grow a text without end */
    for (int32_t i = 0; i < t->n_norm; i++) {
        lc_tok_buf *b = &t->norm_buf[i & 1];
        b->len = 0;
        LC_TRY(normalize_one(t, &t->norm[i], s, n, b));
        if (b->len > limit)
            return lc_fail(LC_EPARSE, "%s: its normalizers blow a text up from %zu to %zu bytes", t->name, n, b->len);
        s = b->p ? b->p : "", n = b->len;
    }
    *out = s, *out_len = n;
    return LC_OK;
}

/* ---- splitting --------------------------------------------------------------------------------------------------- */

/* Takes matches and what lies between them, in order, and keeps what the behaviour says. */
typedef struct splitter {
    lc_tok_spans *out;
    size_t base; /* spans before this belong to other words */
    lc_tok_behavior behavior;
    bool invert, before; /* was the event before this a match? */
} splitter;

static lc_status event(splitter *x, size_t at, size_t len, bool match) {
    if (x->invert) match = !match;
    bool joins = false;
    switch (x->behavior) {
    case LC_SPLIT_REMOVED:
        if (match) return LC_OK;
        break;
    case LC_SPLIT_ISOLATED: break;
    case LC_SPLIT_PREVIOUS: joins = match && !x->before; break;
    case LC_SPLIT_NEXT: joins = !match && x->before; break;
    case LC_SPLIT_CONTIGUOUS: joins = match == x->before; break;
    }
    x->before = match;
    if (joins && x->out->len > x->base) {
        x->out->p[x->out->len - 1].len += len;
        return LC_OK;
    }
    return lc_tok_put_span(x->out, at, len);
}

static lc_status split_pattern(splitter *x, const lc_tok_pattern *p, const char *text, lc_tok_span word) {
    lc_tok_search m = {0};
    size_t done = 0;
    for (bool found;; done = m.end) {
        LC_TRY(lc_tok_search_next(p, text + word.at, word.len, &m, &found));
        if (!found) break;
        if (m.start > done) LC_TRY(event(x, word.at + done, m.start - done, false));
        LC_TRY(event(x, word.at + m.start, m.end - m.start, true));
    }
    return done < word.len ? event(x, word.at + done, word.len - done, false) : LC_OK;
}

static lc_status split_class(splitter *x, const lc_tok_pre *k, const char *text, lc_tok_span word) {
    size_t done = 0, len;
    const char *s = text + word.at;
    for (size_t at = 0; at < word.len; at += len) {
        uint32_t c = lc_tok_char(s + at, &len);
        if (!(k->klass == LC_TOK_THE_CHAR ? c == k->the_char : lc_tok_is(k->klass, c))) continue;
        if (at > done) LC_TRY(event(x, word.at + done, at - done, false));
        LC_TRY(event(x, word.at + at, len, true));
        done = at + len;
    }
    return done < word.len ? event(x, word.at + done, word.len - done, false) : LC_OK;
}

static lc_status split_words(const lc_tok_pre *k, const char *text, const lc_tok_spans *in, lc_tok_spans *out) {
    for (size_t i = 0; i < in->len; i++) {
        splitter x = {out, out->len, k->behavior, k->invert, false};
        LC_TRY(k->kind == LC_PRE_PATTERN ? split_pattern(&x, &k->pattern, text, in->p[i])
                                         : split_class(&x, k, text, in->p[i]));
        size_t keep = x.base; /* empty words go, but only now: they took part in joining */
        for (size_t j = x.base; j < out->len; j++)
            if (out->p[j].len) out->p[keep++] = out->p[j];
        out->len = keep;
    }
    return LC_OK;
}

/* ---- pre-tokenizers that change characters ----------------------------------------------------------------------- */

static lc_status prefix_space(const char *text, const lc_tok_spans *in, lc_tok_buf *b, lc_tok_spans *out) {
    for (size_t i = 0; i < in->len; i++) {
        const char *s = text + in->p[i].at;
        size_t from = b->len;
        if (s[0] != ' ') LC_TRY(lc_tok_put(b, " ", 1));
        LC_TRY(lc_tok_put(b, s, in->p[i].len));
        LC_TRY(lc_tok_put_span(out, from, b->len - from));
    }
    return LC_OK;
}

static lc_status bytes(const char *text, const lc_tok_spans *in, lc_tok_buf *b, lc_tok_spans *out) {
    for (size_t i = 0; i < in->len; i++) {
        size_t from = b->len;
        for (size_t j = 0; j < in->p[i].len; j++)
            LC_TRY(lc_tok_put_char(b, lc_tok_byte_char((unsigned char)text[in->p[i].at + j])));
        LC_TRY(lc_tok_put_span(out, from, b->len - from));
    }
    return LC_OK;
}

/* Spaces become the replacement; words then start at each of them. */
static lc_status metaspace(const lc_tok_pre *k, const char *text, const lc_tok_spans *in, bool at_start, lc_tok_buf *b,
                           lc_tok_spans *out) {
    for (size_t i = 0; i < in->len; i++) {
        const char *s = text + in->p[i].at;
        size_t n = in->p[i].len, from = b->len, len;
        uint32_t first = n ? lc_tok_char(s, &len) : 0;
        bool prepend = k->prepend == LC_PREPEND_ALWAYS ||
                       (k->prepend == LC_PREPEND_FIRST && at_start && i == 0 && in->p[i].at == 0);
        if (prepend && first != ' ' && first != k->the_char) LC_TRY(lc_tok_put_char(b, k->the_char));
        for (size_t j = 0, run; j < n; j += run) {
            const char *space = memchr(s + j, ' ', n - j);
            run = space ? (size_t)(space - (s + j)) : n - j;
            LC_TRY(lc_tok_put(b, s + j, run));
            if (!space) continue;
            LC_TRY(lc_tok_put_char(b, k->the_char));
            run++;
        }
        lc_tok_span whole = {from, b->len - from};
        if (!k->split) {
            LC_TRY(lc_tok_put_span(out, whole.at, whole.len));
            continue;
        }
        splitter x = {out, out->len, LC_SPLIT_NEXT, false, false};
        lc_tok_pre by = {.klass = LC_TOK_THE_CHAR, .the_char = k->the_char};
        LC_TRY(split_class(&x, &by, b->p, whole));
    }
    return LC_OK;
}

lc_status lc_tok_pretokenize(lc_tokenizer *t, const char *s, size_t n, bool at_start, const char **text,
                             lc_tok_spans **words) {
    lc_tok_spans *in = &t->spans[0], *out = &t->spans[1];
    int which = 0;
    in->len = 0;
    if (n) LC_TRY(lc_tok_put_span(in, 0, n));
    for (int32_t i = 0; i < t->n_pre; i++) {
        const lc_tok_pre *k = &t->pre[i];
        if (t->bytes_at_last && i + 1 == t->n_pre) break; /* the model maps the words that its cache does not know */
        lc_tok_buf *b = &t->pre_buf[which];
        out->len = 0;
        if (k->kind == LC_PRE_PATTERN || k->kind == LC_PRE_CLASS) {
            LC_TRY(split_words(k, s, in, out));
        } else {
            b->len = 0;
            if (k->kind == LC_PRE_PREFIX_SPACE)
                LC_TRY(prefix_space(s, in, b, out));
            else if (k->kind == LC_PRE_BYTES)
                LC_TRY(bytes(s, in, b, out));
            else
                LC_TRY(metaspace(k, s, in, at_start, b, out));
            s = b->p ? b->p : "";
            which = !which;
        }
        lc_tok_spans *swap = in;
        in = out, out = swap;
    }
    *text = s, *words = in;
    return LC_OK;
}
