/* tokenizer_regex.c: patterns. tokenizer.json holds regular expressions in Oniguruma's Ruby syntax; they are translated
 * into PCRE2's, so that what matches is the same: white space, word characters and letters by Unicode's current lists,
 * possessive and counted quantifiers, (?m), \h. What cannot be carried over exactly (class intersections, nested
 * classes, subroutine calls) is refused. */
#define _GNU_SOURCE           /* memmem */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "tokenizer.h"

#include <ctype.h>
#include <pcre2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SPACES "\\t-\\r \\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}\\x{205F}\\x{3000}"

/* ---- translation ------------------------------------------------------------------------------------------------- */

typedef struct translation {
    const char *s;
    size_t n, at;
    lc_tok_buf *out;
    size_t atom;      /* where the last quantifiable thing starts in the output */
    size_t group[64]; /* where each open group started */
    int depth;
} translation;

static lc_status put(translation *x, const char *s) { return lc_tok_put(x->out, s, strlen(s)); }

static lc_status refuse(const translation *x, const char *what) {
    return lc_fail(LC_EPARSE, "regular expression: %s is not supported (at byte %zu of '%.*s')", what, x->at,
                   (int)(x->n > 200 ? 200 : x->n), x->s);
}

static const char *word_class(void) { return "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}"; }

/* Characters younger than PCRE2's tables. */
static lc_status put_late(translation *x, const char *property) {
    if (!strcmp(property, "alnum")) LC_TRY(put_late(x, "L"));
    if (!strcmp(property, "alnum")) return put_late(x, "Nd");
    if (!strcmp(property, "punct")) LC_TRY(put_late(x, "P"));
    if (!strcmp(property, "punct")) return put_late(x, "S");
    return put(x, lc_tok_late_ranges(property, strlen(property)));
}

/* [items], with what PCRE2's tables lack; `property` names the list of late characters. */
static lc_status put_set(translation *x, bool in_class, bool negated, const char *items, const char *property) {
    if (in_class && negated) return refuse(x, "a negated escape inside [...]");
    if (!in_class) LC_TRY(put(x, negated ? "[^" : "["));
    LC_TRY(put(x, items));
    LC_TRY(put_late(x, property));
    if (!in_class && !strcmp(property, "word")) LC_TRY(put(x, lc_tok_late_ranges("word in Latin-1", 15)));
    return in_class ? LC_OK : put(x, "]");
}

/* \p{..} or \P{..}; x->at stands behind the p. */
static lc_status property(translation *x, bool in_class, bool negated) {
    char name[32], items[48];
    size_t n = 0;
    if (x->at >= x->n || x->s[x->at] != '{') return refuse(x, "\\p without {");
    const char *end = memchr(x->s + x->at, '}', x->n - x->at);
    size_t from = x->at + 1;
    if (from < x->n && x->s[from] == '^') negated = !negated, from++;
    if (!end) return refuse(x, "\\p{ without }");
    n = (size_t)(end - (x->s + from));
    if (end < x->s + from || n == 0 || n >= sizeof name) return refuse(x, "this \\p{...}");
    memcpy(name, x->s + from, n);
    name[n] = 0;
    for (size_t i = 0; i < n; i++)
        if (!isalnum((unsigned char)name[i]) && name[i] != '_' && name[i] != '&') return refuse(x, "this \\p{...}");
    x->at = (size_t)(end - x->s) + 1;
    static const char *const plain[] = {"Any",         "Alphabetic", "Lowercase",  "Uppercase",
                                        "White_Space", "Emoji",      "Ideographic"};
    bool script = n > 2;
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++) script = script && strcmp(name, plain[i]);
    /* names longer than a category are scripts; PCRE2 would else take the script's extensions too */
    snprintf(items, sizeof items, "\\%c{%s%s}", in_class && negated ? 'P' : 'p', script ? "sc:" : "", name);
    if (in_class && negated) {
        if (*lc_tok_late_ranges(name, n)) return refuse(x, "\\P{...} inside [...]");
        return put(x, items);
    }
    return put_set(x, in_class, negated, items, name);
}

/* x->at stands on the backslash. */
static lc_status escape(translation *x, bool in_class) {
    if (x->at + 1 >= x->n) return refuse(x, "a backslash at the end");
    char c = x->s[x->at + 1], tmp[16];
    x->at += 2;
    switch (c) {
    case 's': return put_set(x, in_class, false, SPACES, "");
    case 'S': return in_class ? put(x, "\\P{White_Space}") : put_set(x, false, true, SPACES, "");
    case 'w':
    case 'W': return put_set(x, in_class, c == 'W', word_class(), "word");
    case 'd':
    case 'D': return put_set(x, in_class, c == 'D', "\\p{Nd}", "Nd");
    case 'h':
    case 'H': return put_set(x, in_class, c == 'H', "0-9a-fA-F", "");
    case 'p':
    case 'P': return property(x, in_class, c == 'P');
    case 'v': return put(x, "\\x0B");
    case 'x':
        LC_TRY(put(x, "\\x"));
        if (x->at < x->n && x->s[x->at] == '{') /* not a quantifier */
            do LC_TRY(lc_tok_put(x->out, x->s + x->at, 1));
            while (x->s[x->at++] != '}' && x->at < x->n);
        return LC_OK;
    case 'u':
        for (size_t i = 0; i < 4; i++)
            if (x->at + i >= x->n || !isxdigit((unsigned char)x->s[x->at + i]))
                return refuse(x, "\\u without four digits");
        snprintf(tmp, sizeof tmp, "\\x{%.4s}", x->s + x->at);
        x->at += 4;
        return put(x, tmp);
    case 'b':
    case 'B':
        if (in_class) return c == 'b' ? put(x, "\\x08") : refuse(x, "\\B inside [...]");
        for (int side = 0; side < 2; side++) { /* by our own word characters */
            LC_TRY(put(x, side ? "|(?<!" : "(?:(?<="));
            LC_TRY(put_set(x, false, false, word_class(), "word"));
            LC_TRY(put(x, (side == 0) == (c == 'b') ? ")(?!" : ")(?="));
            LC_TRY(put_set(x, false, false, word_class(), "word"));
            LC_TRY(put(x, side ? "))" : ")"));
        }
        return LC_OK;
    case 'g':
    case 'k':
    case 'K':
    case 'C':
    case 'Q':
    case 'E':
    case 'N':
    case 'O':
    case 'y':
    case 'Y':
    case 'c':
    case 'M': snprintf(tmp, sizeof tmp, "\\%c", c); return refuse(x, tmp);
    default: /* PCRE2 refuses letters that it does not know */ LC_TRY(put(x, "\\")); return lc_tok_put(x->out, &c, 1);
    }
}

/* x->at stands on the opening bracket. */
static lc_status class_of(translation *x) {
    /* what Oniguruma takes the names for; graph and print depend on unassigned characters and are refused */
    static const struct {
        const char *name, *items, *late;
    } posix[] = {{"alnum", "\\p{Alphabetic}\\p{Nd}", "alnum"},
                 {"alpha", "\\p{Alphabetic}", "L"},
                 {"ascii", "\\x00-\\x7F", ""},
                 {"blank", "\\p{Zs}\\t", ""},
                 {"cntrl", "\\p{Cc}", ""},
                 {"digit", "\\p{Nd}", "Nd"},
                 {"lower", "\\p{Lowercase}", "Ll"},
                 {"punct", "\\p{P}\\p{S}", "punct"},
                 {"space", SPACES, ""},
                 {"upper", "\\p{Uppercase}", "Lu"},
                 {"xdigit", "0-9A-Fa-f", ""},
                 {"word", "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}", "word"}};
    LC_TRY(put(x, "["));
    x->at++;
    if (x->at < x->n && x->s[x->at] == '^') {
        LC_TRY(put(x, "^"));
        x->at++;
    }
    for (bool first = true;; first = false) {
        if (x->at >= x->n) return refuse(x, "[ without ]");
        const char *p = x->s + x->at;
        size_t rest = x->n - x->at;
        if (*p == ']' && !first) break;
        if (*p == '\\') {
            LC_TRY(escape(x, true));
        } else if (*p == '[') {
            bool known = false;
            for (size_t i = 0; i < sizeof posix / sizeof *posix && !known; i++) {
                size_t n = strlen(posix[i].name);
                known = rest > n + 4 && p[1] == ':' && !memcmp(p + 2, posix[i].name, n) && p[n + 2] == ':' &&
                        p[n + 3] == ']';
                if (!known) continue;
                x->at += n + 4;
                LC_TRY(put(x, posix[i].items));
                LC_TRY(put_late(x, posix[i].late));
            }
            if (!known) return refuse(x, "[ inside [...]");
        } else if (*p == '&' && rest > 1 && p[1] == '&') {
            return refuse(x, "&& inside [...]");
        } else {
            LC_TRY(lc_tok_put(x->out, p, 1));
            x->at++;
        }
    }
    x->at++;
    return put(x, "]");
}

/* x->at stands on the parenthesis. */
static lc_status open_group(translation *x) {
    if (x->depth == 64) return refuse(x, "a parenthesis this deep");
    x->group[x->depth++] = x->out->len;
    LC_TRY(put(x, "("));
    x->at++;
    if (x->at >= x->n || x->s[x->at] != '?') return LC_OK;
    LC_TRY(put(x, "?"));
    for (x->at++; x->at < x->n; x->at++) { /* flags; Ruby's m is what others call s */
        char c = x->s[x->at];
        if (c != 'i' && c != 'm' && c != '-') break;
        LC_TRY(put(x, c == 'm' ? "s" : c == 'i' ? "i" : "-"));
    }
    if (x->at >= x->n) return refuse(x, "an open (?");
    char c = x->s[x->at];
    if (c == ':' || c == '=' || c == '!' || c == '>' || c == ')') {
        if (c == ')') return LC_OK; /* flags for the rest of the group */
        x->at++;
        return lc_tok_put(x->out, &c, 1);
    }
    if (c == '<') {
        LC_TRY(put(x, "<"));
        x->at++;
        return LC_OK;
    }
    return refuse(x, "this kind of (?");
}

/* {n,m}: Ruby's `{,m}` counts from 0, `{n}?` is optional and `{n,m}+` repeats. x->at stands on the brace. */
static lc_status braces(translation *x, bool *done) {
    size_t i = x->at + 1, comma = 0, digits = 0;
    for (; i < x->n && (isdigit((unsigned char)x->s[i]) || (x->s[i] == ',' && !comma)); i++)
        if (x->s[i] == ',')
            comma = i;
        else
            digits++;
    *done = i < x->n && x->s[i] == '}' && digits;
    if (!*done) return LC_OK;
    char next = i + 1 < x->n ? x->s[i + 1] : 0;
    bool wrap = next == '+' || (next == '?' && !comma);
    if (wrap) {
        LC_TRY(LC_TOK_ROOM(x->out, 3));
        memmove(x->out->p + x->atom + 3, x->out->p + x->atom, x->out->len - x->atom);
        memcpy(x->out->p + x->atom, "(?:", 3);
        x->out->len += 3;
    }
    LC_TRY(put(x, comma == x->at + 1 ? "{0" : "{"));
    LC_TRY(lc_tok_put(x->out, x->s + x->at + 1, i - x->at));
    if (wrap) LC_TRY(put(x, ")"));
    x->at = i + 1;
    return LC_OK;
}

static lc_status translate_one(translation *x) {
    char c = x->s[x->at];
    size_t here = x->out->len;
    bool done = false;
    if (c == '\\')
        LC_TRY(escape(x, false));
    else if (c == '[')
        LC_TRY(class_of(x));
    else if (c == '(')
        return open_group(x);
    else if (c == ')') {
        x->at++;
        if (x->depth) here = x->group[--x->depth];
        LC_TRY(put(x, ")"));
    } else if (c == '*' || c == '+' || c == '?') {
        x->at++;
        return lc_tok_put(x->out, &c, 1); /* the atom stays */
    } else if (c == '{') {
        LC_TRY(braces(x, &done));
        if (done) return LC_OK;
        x->at++;
        LC_TRY(put(x, "\\{"));
    } else {
        size_t len;
        lc_tok_char(x->s + x->at, &len);
        LC_TRY(lc_tok_put(x->out, x->s + x->at, len));
        x->at += len;
    }
    x->atom = here;
    return LC_OK;
}

lc_status lc_tok_regex_translate(const char *regex, size_t n, lc_tok_buf *out) {
    if (!lc_tok_utf8_valid(regex, n)) return lc_fail(LC_EPARSE, "regular expression is not UTF-8");
    translation x = {.s = regex, .n = n, .out = out};
    x.atom = out->len;
    while (x.at < n) LC_TRY(translate_one(&x));
    return LC_OK;
}

/* ---- patterns ---------------------------------------------------------------------------------------------------- */

lc_status lc_tok_pattern_literal(lc_tok_pattern *p, const char *s, size_t n) {
    if (!n) return lc_fail(LC_EPARSE, "an empty string is no pattern");
    p->literal = lc_alloc(n + 1, 1);
    if (!p->literal) return LC_ENOMEM;
    memcpy(p->literal, s, n);
    p->literal_len = n;
    return LC_OK;
}

static lc_status compile(lc_tok_pattern *p, const char *regex, size_t n, const lc_tok_buf *text) {
    pcre2_compile_context *context = pcre2_compile_context_create(NULL);
    if (!context) return lc_fail(LC_ENOMEM, "regular expression: no memory");
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    int error = 0;
    PCRE2_SIZE where = 0;
    pcre2_code *code =
        pcre2_compile((PCRE2_SPTR)(text->p ? text->p : ""), text->len,
                      PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &error, &where, context);
    pcre2_compile_context_free(context);
    if (!code) {
        PCRE2_UCHAR why[160];
        pcre2_get_error_message(error, why, sizeof why);
        return lc_fail(LC_EPARSE, "regular expression '%.*s': %s", (int)(n > 200 ? 200 : n), regex, (const char *)why);
    }
    p->code = code;
    p->data = pcre2_match_data_create_from_pattern(code, NULL);
    if (!p->data) return lc_fail(LC_ENOMEM, "regular expression: no memory");
    p->jit = pcre2_jit_compile(code, PCRE2_JIT_COMPLETE) == 0; /* without it the interpreter does */
    return LC_OK;
}

lc_status lc_tok_pattern_regex(lc_tok_pattern *p, const char *regex, size_t n) {
    lc_tok_buf text = {0};
    lc_status status = lc_tok_regex_translate(regex, n, &text);
    if (status == LC_OK) status = compile(p, regex, n, &text);
    free(text.p);
    return status;
}

void lc_tok_pattern_drop(lc_tok_pattern *p) {
    free(p->literal);
    if (p->data) pcre2_match_data_free(p->data);
    if (p->code) pcre2_code_free(p->code);
    memset(p, 0, sizeof *p);
}

static lc_status find_regex(const lc_tok_pattern *p, const char *s, size_t n, size_t from, size_t *start, size_t *end,
                            bool *found) {
    int r = p->jit ? pcre2_jit_match(p->code, (PCRE2_SPTR)s, n, from, PCRE2_NO_UTF_CHECK, p->data, NULL)
                   : pcre2_match(p->code, (PCRE2_SPTR)s, n, from, PCRE2_NO_UTF_CHECK, p->data, NULL);
    if (r == PCRE2_ERROR_JIT_STACKLIMIT)
        r = pcre2_match(p->code, (PCRE2_SPTR)s, n, from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, p->data, NULL);
    *found = r >= 0;
    if (r < 0)
        return r == PCRE2_ERROR_NOMATCH ? LC_OK : lc_fail(LC_EPARSE, "regular expression gave up (PCRE2 error %d)", r);
    const PCRE2_SIZE *o = pcre2_get_ovector_pointer(p->data);
    *start = o[0], *end = o[1];
    if (*end < *start) *end = *start; /* \K inside a lookahead */
    return LC_OK;
}

lc_status lc_tok_search_next(const lc_tok_pattern *p, const char *s, size_t n, lc_tok_search *x, bool *found) {
    if (p->literal) {
        const char *hit = x->from <= n ? memmem(s + x->from, n - x->from, p->literal, p->literal_len) : NULL;
        *found = hit != NULL;
        if (hit) x->start = (size_t)(hit - s), x->from = x->end = x->start + p->literal_len;
        return LC_OK;
    }
    for (*found = false; x->from <= n;) {
        size_t start = 0, end = 0, len = 1;
        LC_TRY(find_regex(p, s, n, x->from, &start, &end, found));
        if (!*found) return LC_OK;
        if (start == end && x->any && end == x->end) { /* an empty match right behind the last one */
            *found = false;
            if (x->from < n) lc_tok_char(s + x->from, &len);
            x->from += len;
            continue;
        }
        x->start = start, x->end = x->from = end, x->any = true;
        return LC_OK;
    }
    return LC_OK;
}
