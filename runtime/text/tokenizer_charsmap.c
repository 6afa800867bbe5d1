/* tokenizer_charsmap.c: SentencePiece's precompiled character map and the normalizers made of it: the one of its own
 * library, and the one by which Hugging Face imitates it. The map is <bytes of the trie: u32><trie><texts, each ended
 * by NUL>, little-endian; the trie is a darts-clone double array whose values are offsets into the texts. A unit holds
 * its label in bits 0..7 and 31, a leaf mark in bit 8, and the offset to its children in bits 10..30, shifted by 8 when
 * bit 9 is set. All of it comes from files: no index is trusted. */
#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

static uint32_t unit_at(const lc_tok_charsmap *m, size_t i) {
    const unsigned char *u = (const unsigned char *)m->blob + 4 + 4 * i;
    return (uint32_t)u[0] | (uint32_t)u[1] << 8 | (uint32_t)u[2] << 16 | (uint32_t)u[3] << 24;
}

lc_status lc_tok_charsmap_set(lc_tok_charsmap *m, const char *blob, size_t n) {
    memset(m, 0, sizeof *m);
    if (!n) return LC_OK;
    const unsigned char *u = (const unsigned char *)blob;
    uint32_t trie = n < 4 ? 0 : (uint32_t)u[0] | (uint32_t)u[1] << 8 | (uint32_t)u[2] << 16 | (uint32_t)u[3] << 24;
    if (n < 4 || trie < 4 || trie % 4 || trie > n - 4)
        return lc_fail(LC_EPARSE, "character map: a trie of %u bytes in %zu bytes", (unsigned)trie, n);
    m->blob = lc_alloc(n + 1, 1); /* a NUL behind ends the last text */
    if (!m->blob) return LC_ENOMEM;
    memcpy(m->blob, blob, n);
    m->units = trie / 4;
    m->text = m->blob + 4 + trie, m->text_len = n - 4 - trie;
    return lc_tok_utf8_valid(m->text, m->text_len) ? LC_OK
                                                   : lc_fail(LC_EPARSE, "character map: its texts are not UTF-8");
}

void lc_tok_charsmap_drop(lc_tok_charsmap *m) {
    free(m->blob);
    memset(m, 0, sizeof *m);
}

static size_t children(uint32_t unit) { return (unit >> 10) << ((unit & 1u << 9) >> 6); }

/* The rule for a beginning of s: the longest, or the shortest. The text that it writes, or NULL; *len bytes are used.
 */
static const char *find_rule(const lc_tok_charsmap *m, const char *s, size_t n, bool longest, size_t *len) {
    if (!m->blob) return NULL;
    const char *found = NULL;
    size_t at = children(unit_at(m, 0));
    for (size_t i = 0; i < n && s[i]; i++) {
        at ^= (unsigned char)s[i];
        if (at >= m->units) break;
        uint32_t unit = unit_at(m, at);
        if ((unit & (1u << 31 | 0xFF)) != (unsigned char)s[i]) break;
        at ^= children(unit);
        if (!(unit >> 8 & 1) || at >= m->units) continue;
        size_t value = unit_at(m, at) & ~(1u << 31);
        /* an offset into the middle of a character would make text that is no UTF-8 */
        if (value >= m->text_len || ((unsigned char)m->text[value] & 0xC0) == 0x80) continue;
        found = m->text + value, *len = i + 1;
        if (!longest) break;
    }
    return found;
}

/* ---- Hugging Face's ---------------------------------------------------------------------------------------------- */

/* A whole short grapheme is replaced by the rule of its shortest beginning, else each character by its own; that is
 * what the reference does. */
static lc_status put_grapheme(const lc_tok_charsmap *m, const char *s, size_t n, lc_tok_buf *out) {
    size_t used, len;
    const char *to = n < 6 ? find_rule(m, s, n, false, &used) : NULL;
    if (to) return lc_tok_put(out, to, strlen(to));
    for (size_t at = 0; at < n; at += len) {
        lc_tok_char(s + at, &len);
        to = find_rule(m, s + at, len, false, &used);
        LC_TRY(to ? lc_tok_put(out, to, strlen(to)) : lc_tok_put(out, s + at, len));
    }
    return LC_OK;
}

lc_status lc_tok_charsmap_apply(const lc_tok_charsmap *m, const char *s, size_t n, lc_tok_buf *out) {
    utf8proc_int32_t state = 0;
    for (size_t at = 0, end, len, next; at < n; at = end) {
        uint32_t c = lc_tok_char(s + at, &len), d;
        for (end = at + len; end < n; end += next, c = d) {
            d = lc_tok_char(s + end, &next);
            bool plain = c < 0x80 && d < 0x80; /* only CR LF belong together */
            if (plain ? !(c == '\r' && d == '\n')
                      : utf8proc_grapheme_break_stateful((utf8proc_int32_t)c, (utf8proc_int32_t)d, &state))
                break;
        }
        state = 0;
        LC_TRY(put_grapheme(m, s + at, end - at, out));
    }
    return LC_OK;
}

/* ---- SentencePiece's own ----------------------------------------------------------------------------------------- */

static const char mark[] = "\xE2\x96\x81"; /* U+2581, which stands for a space */

static lc_status put_space(const lc_tok_spm *k, lc_tok_buf *out) {
    return k->escape ? lc_tok_put(out, mark, 3) : lc_tok_put(out, " ", 1);
}

/* What the beginning of s becomes, and how much of s that was: a user-defined piece as it stands, a rule, a character.
 */
static const char *next_part(const lc_tokenizer *t, const char *s, size_t n, size_t *made, size_t *used) {
    if (t->user.len && lc_tok_trie_longest(&t->user, s, n, used) >= 0) return *made = *used, s;
    const char *to = find_rule(&t->spm.map, s, n, true, used);
    if (to) return *made = strlen(to), to;
    lc_tok_char(s, used);
    return *made = *used, s;
}

static lc_status put_part(const lc_tok_spm *k, const char *s, size_t n, lc_tok_buf *out) {
    while (n) {
        const char *space = memchr(s, ' ', n);
        size_t run = space ? (size_t)(space - s) : n;
        LC_TRY(lc_tok_put(out, s, run));
        if (space) LC_TRY(put_space(k, out));
        s += run + (space != NULL), n -= run + (space != NULL);
    }
    return LC_OK;
}

lc_status lc_tok_spm_normalize(const lc_tokenizer *t, const char *s, size_t n, lc_tok_buf *out) {
    const lc_tok_spm *k = &t->spm;
    size_t made, used, from = out->len, width = k->escape ? 3 : 1;
    while (k->strip && n) {
        const char *p = next_part(t, s, n, &made, &used);
        if (made != 1 || *p != ' ') break;
        s += used, n -= used;
    }
    if (!n) return LC_OK;
    if (!k->suffix && k->prefix) LC_TRY(put_space(k, out));
    if (!t->user.len && !k->map.blob && !k->strip) {
        LC_TRY(put_part(k, s, n, out));
        n = 0;
    }
    for (bool after_space = k->strip; n; s += used, n -= used) {
        const char *p = next_part(t, s, n, &made, &used);
        while (after_space && made && *p == ' ') p++, made--;
        if (!made) continue;
        LC_TRY(put_part(k, p, made, out));
        after_space = k->strip && p[made - 1] == ' ';
    }
    while (k->strip && out->len - from >= width && !memcmp(out->p + out->len - width, k->escape ? mark : " ", width))
        out->len -= width;
    return k->suffix && k->prefix ? put_space(k, out) : LC_OK;
}
