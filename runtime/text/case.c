/* case.c: upper, lower and title case of whole texts, with the mappings that make two characters of one and the sigma
 * at a word's end: what Python's string methods do, which chat templates call. */
#include <string.h>
#include <utf8proc.h>

#include "tokenizer.h"

static lc_status put_one(lc_tok_buf *out, utf8proc_int32_t c, bool title) {
    return lc_tok_put_char(out, (uint32_t)(title ? utf8proc_totitle(c) : utf8proc_toupper(c)));
}

/* Of a character without a capital of its own, such as a sharp s or a ligature, the capitals of its case folding. */
static lc_status put_upper(lc_tok_buf *out, uint32_t cp, bool title) {
    utf8proc_int32_t c = (utf8proc_int32_t)cp, folded[8];
    utf8proc_category_t g = utf8proc_category(c);
    int last = 0;
    utf8proc_ssize_t n = cp < 0x80 || g == UTF8PROC_CATEGORY_LU || (title && cp != 0xDF && utf8proc_totitle(c) != c) ||
                                 (title && g == UTF8PROC_CATEGORY_LT)
                             ? 1
                             : utf8proc_decompose_char(c, folded, 8, UTF8PROC_CASEFOLD, &last);
    if (n < 2 || n > 8) return put_one(out, c, title);
    LC_TRY(put_one(out, folded[0], title));
    for (utf8proc_ssize_t i = 1; i < n; i++)
        LC_TRY(title ? lc_tok_put_char(out, (uint32_t)folded[i]) : put_one(out, folded[i], false));
    return LC_OK;
}

static bool is_cased(uint32_t c) {
    utf8proc_int32_t x = (utf8proc_int32_t)c;
    utf8proc_category_t g = utf8proc_category(x);
    return g == UTF8PROC_CATEGORY_LU || g == UTF8PROC_CATEGORY_LL || g == UTF8PROC_CATEGORY_LT ||
           utf8proc_tolower(x) != x || utf8proc_toupper(x) != x;
}

/* Characters that a look for cased neighbours passes over. */
static bool is_ignored(uint32_t c) {
    utf8proc_category_t g = utf8proc_category((utf8proc_int32_t)c);
    return g == UTF8PROC_CATEGORY_MN || g == UTF8PROC_CATEGORY_ME || g == UTF8PROC_CATEGORY_CF ||
           g == UTF8PROC_CATEGORY_LM || g == UTF8PROC_CATEGORY_SK || c == '\'' || c == 0x2019 || c == '.' || c == ':' ||
           c == 0xB7;
}

static bool ends_word(const char *s, size_t n, size_t at, size_t len) {
    size_t i = at, size;
    while (i) {
        do i--;
        while (i && ((unsigned char)s[i] & 0xC0) == 0x80);
        uint32_t c = lc_tok_char(s + i, &size);
        if (is_ignored(c)) continue;
        if (!is_cased(c)) return false;
        for (i = at + len; i < n; i += size) {
            c = lc_tok_char(s + i, &size);
            if (!is_ignored(c)) return !is_cased(c);
        }
        return true;
    }
    return false;
}

static lc_status put_lower(const char *s, size_t n, size_t at, size_t len, lc_tok_buf *out) {
    uint32_t c = lc_tok_char(s + at, &len);
    if (c == 0x130) return lc_tok_put(out, "i\xCC\x87", 3);
    if (c == 0x3A3) return lc_tok_put_char(out, ends_word(s, n, at, len) ? 0x3C2 : 0x3C3);
    return lc_tok_put_char(out, (uint32_t)utf8proc_tolower((utf8proc_int32_t)c));
}

int lc_text_case(const char *text, double length, int how, char **out, int32_t *out_length) {
    lc_tok_buf valid = {0}, b = {0};
    size_t n = (size_t)length;
    *out = NULL, *out_length = 0;
    if (!(length >= 0 && length < 1 << 29)) return lc_fail(LC_EARG, "a text of %.0f bytes; at most 512 MiB", length);
    lc_status status = lc_tok_put_lossy(&valid, text, n);
    bool after = false; /* behind a cased letter: no title here */
    for (size_t at = 0, len; at < valid.len && status == LC_OK; at += len) {
        uint32_t c = lc_tok_char(valid.p + at, &len);
        bool first = how == 'c' ? at == 0 : how == 't' && !after;
        after = is_cased(c);
        status = how == 'u' || first ? put_upper(&b, c, first) : put_lower(valid.p, valid.len, at, len, &b);
    }
    lc_free(valid.p);
    if (status == LC_OK && b.len >= INT32_MAX) status = lc_fail(LC_EARG, "a text of over 2 GiB");
    if (status == LC_OK) status = lc_tok_put(&b, "", 1);
    if (status != LC_OK) return lc_free(b.p), status;
    *out = b.p, *out_length = (int32_t)b.len - 1;
    return LC_OK;
}
