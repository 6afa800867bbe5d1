/* tokenizer_decode.c: from ids back to text. Each decoder turns a list of strings into another, as in the reference;
 * the result is their concatenation, with U+FFFD for what is no UTF-8. */
#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>

typedef struct strings { /* the strings stand one after another in `text` */
    lc_tok_buf text;
    lc_tok_spans part;
} strings;

static const char *part(const strings *x, size_t i) { return x->text.p ? x->text.p + x->part.p[i].at : ""; }

static lc_status end_part(strings *x, size_t from) { return lc_tok_put_span(&x->part, from, x->text.len - from); }

static lc_status put_part(strings *x, const char *s, size_t n) {
    size_t from = x->text.len;
    LC_TRY(lc_tok_put(&x->text, s, n));
    return end_part(x, from);
}

/* All strings' bytes into one: GPT-2's alphabet back to bytes, but for strings that hold other characters. */
static lc_status byte_level(const strings *in, strings *out) {
    lc_tok_buf raw = {0};
    lc_status status = LC_OK;
    for (size_t i = 0; i < in->part.len && status == LC_OK; i++) {
        const char *s = part(in, i);
        size_t n = in->part.p[i].len, from = raw.len, at = 0;
        for (size_t len; at < n && status == LC_OK; at += len) {
            int b = lc_tok_char_byte(lc_tok_char(s + at, &len));
            if (b < 0) break;
            char c = (char)b;
            status = lc_tok_put(&raw, &c, 1);
        }
        if (at < n && status == LC_OK) {
            raw.len = from;
            status = lc_tok_put(&raw, s, n);
        }
    }
    size_t from = out->text.len;
    if (status == LC_OK) status = lc_tok_put_lossy(&out->text, raw.p, raw.len);
    free(raw.p);
    return status == LC_OK ? end_part(out, from) : status;
}

static int hex_digit(char c) {
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
}

static int byte_token(const char *s, size_t n) { /* of "<0x41>"; else -1 */
    if (n != 6 || memcmp(s, "<0x", 3) || s[5] != '>') return -1;
    int high = s[3] == '+' ? 0 : hex_digit(s[3]), low = hex_digit(s[4]); /* a plus passes in the reference too */
    return high < 0 || low < 0 ? -1 : high << 4 | low;
}

static lc_status flush_bytes(lc_tok_buf *run, strings *out) {
    if (!run->len) return LC_OK;
    if (lc_tok_utf8_valid(run->p, run->len))
        LC_TRY(put_part(out, run->p, run->len));
    else
        for (size_t i = 0; i < run->len; i++) LC_TRY(put_part(out, "\xEF\xBF\xBD", 3));
    run->len = 0;
    return LC_OK;
}

static lc_status byte_fallback(const strings *in, strings *out) {
    lc_tok_buf run = {0};
    lc_status status = LC_OK;
    for (size_t i = 0; i < in->part.len && status == LC_OK; i++) {
        const char *s = part(in, i);
        size_t n = in->part.p[i].len;
        int b = byte_token(s, n);
        if (b >= 0) {
            char c = (char)b;
            status = lc_tok_put(&run, &c, 1);
            continue;
        }
        status = flush_bytes(&run, out);
        if (status == LC_OK) status = put_part(out, s, n);
    }
    if (status == LC_OK) status = flush_bytes(&run, out);
    free(run.p);
    return status;
}

static lc_status replace_all(const lc_tok_dec *k, const char *s, size_t n, strings *out) {
    lc_tok_search x = {0};
    size_t done = 0, from = out->text.len;
    for (bool found;; done = x.end) {
        LC_TRY(lc_tok_search_next(&k->pattern, s, n, &x, &found));
        if (!found) break;
        LC_TRY(lc_tok_put(&out->text, s + done, x.start - done));
        LC_TRY(lc_tok_put(&out->text, k->text, k->text_len));
    }
    LC_TRY(lc_tok_put(&out->text, s + done, n - done));
    return end_part(out, from);
}

static size_t count_chars(const char *s, size_t n) {
    size_t count = 0;
    for (size_t i = 0; i < n; i++) count += ((unsigned char)s[i] & 0xC0) != 0x80;
    return count;
}

/* Takes at most `start` of the character off the front and `stop` off the end of one string. */
static lc_status strip(const lc_tok_dec *k, const char *s, size_t n, strings *out) {
    size_t len;
    for (int32_t i = 0; i < k->start && n && lc_tok_char(s, &len) == k->the_char; i++) s += len, n -= len;
    size_t most = count_chars(s, n);
    for (int32_t i = 0; i < k->stop && most && n; i++, most--) {
        size_t at = n - 1;
        while (at && ((unsigned char)s[at] & 0xC0) == 0x80) at--;
        if (lc_tok_char(s + at, &len) != k->the_char) break;
        n = at;
    }
    return put_part(out, s, n);
}

static lc_status metaspace(const lc_tok_dec *k, const char *s, size_t n, bool first, strings *out) {
    size_t from = out->text.len;
    for (size_t at = 0, len; at < n; at += len) {
        if (lc_tok_char(s + at, &len) != k->the_char)
            LC_TRY(lc_tok_put(&out->text, s + at, len));
        else if (!first || k->prepend == LC_PREPEND_NEVER)
            LC_TRY(lc_tok_put(&out->text, " ", 1));
    }
    return end_part(out, from);
}

/* The end-of-word suffix becomes a space, and nothing in the last string. */
static lc_status bpe_suffix(const lc_tok_dec *k, const char *s, size_t n, bool last, strings *out) {
    lc_tok_dec as = *k;
    as.text = " ";
    as.text_len = last ? 0 : 1;
    return replace_all(&as, s, n, out);
}

static lc_status decode_one(const lc_tok_dec *k, const strings *in, strings *out) {
    if (k->kind == LC_DEC_BYTE_LEVEL) return byte_level(in, out);
    if (k->kind == LC_DEC_BYTE_FALLBACK) return byte_fallback(in, out);
    if (k->kind == LC_DEC_FUSE) return put_part(out, in->text.p, in->text.len);
    for (size_t i = 0; i < in->part.len; i++) {
        const char *s = part(in, i);
        size_t n = in->part.p[i].len;
        if (k->kind == LC_DEC_REPLACE)
            LC_TRY(replace_all(k, s, n, out));
        else if (k->kind == LC_DEC_STRIP)
            LC_TRY(strip(k, s, n, out));
        else if (k->kind == LC_DEC_METASPACE)
            LC_TRY(metaspace(k, s, n, i == 0, out));
        else
            LC_TRY(bpe_suffix(k, s, n, i + 1 == in->part.len, out));
    }
    return LC_OK;
}

/* A token's text as the reference decodes it, which for a normalized added token is its normalized text; is that
 * special? */
static const lc_tok_str *token_text(const lc_tokenizer *t, int32_t id, bool *special) {
    *special = false;
    if (id < 0 || id >= t->size) return NULL;
    int32_t at = t->added_of[id];
    const lc_tok_str *s = at >= 0 ? &t->added[at].normal : &t->token[id];
    if (s->at == UINT32_MAX) return NULL;
    for (int32_t i = 0; at >= 0 && i < t->n_added && !*special; i++)
        *special =
            t->added[i].special && t->added[i].content.len == s->len &&
            (t->added[i].content.at == s->at || !memcmp(t->text.p + t->added[i].content.at, t->text.p + s->at, s->len));
    return s;
}

static lc_status run(lc_tokenizer *t, const int32_t *ids, int32_t count, bool skip_special, strings x[2],
                     lc_tok_buf *out) {
    bool special;
    for (int32_t i = 0; i < count; i++) {
        const lc_tok_str *s = token_text(t, ids[i], &special);
        if (s && !(special && skip_special)) LC_TRY(put_part(&x[0], t->text.p + s->at, s->len));
    }
    int now = 0;
    for (int32_t i = 0; i < t->n_dec; i++, now = !now) {
        x[!now].text.len = x[!now].part.len = 0;
        LC_TRY(decode_one(&t->dec[i], &x[now], &x[!now]));
        if (x[!now].text.len > (size_t)1 << 30)
            return lc_fail(LC_EPARSE, "%s: its decoders make over 1 GiB of text", t->name);
    }
    if (t->has_decoder) return lc_tok_put_lossy(out, x[now].text.p, x[now].text.len);
    for (size_t i = 0; i < x[now].part.len; i++) {
        if (i) LC_TRY(lc_tok_put(out, " ", 1));
        LC_TRY(lc_tok_put_lossy(out, part(&x[now], i), x[now].part.p[i].len));
    }
    return LC_OK;
}

lc_status lc_tok_decode(lc_tokenizer *t, const int32_t *ids, int32_t count, bool skip_special, lc_tok_buf *out) {
    if (t->spm.own) return lc_tok_spm_decode(t, ids, count, out);
    strings x[2] = {{{0}, {0}}, {{0}, {0}}};
    lc_status status = run(t, ids, count, skip_special, x, out);
    for (int i = 0; i < 2; i++) free(x[i].text.p), free(x[i].part.p);
    return status;
}
