/* doc.c: the document tree of doc.h: its builder, its accessors for C and Lua, and what JSON and YAML share about text.
 */
#define _GNU_SOURCE
#include "doc_build.h"

#include <locale.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

/* ---- text
 * ------------------------------------------------------------------------------------------------------------ */

static size_t utf8_length(const unsigned char *s, size_t left) {
    unsigned c = s[0];
    if (c < 0xc2 || c > 0xf4) return 0;
    if (c < 0xe0) return left >= 2 && (s[1] & 0xc0) == 0x80 ? 2 : 0;
    if (c < 0xf0) {
        if (left < 3 || (s[1] & 0xc0) != 0x80 || (s[2] & 0xc0) != 0x80) return 0;
        return (c == 0xe0 && s[1] < 0xa0) || (c == 0xed && s[1] > 0x9f) ? 0 : 3;
    }
    if (left < 4 || (s[1] & 0xc0) != 0x80 || (s[2] & 0xc0) != 0x80 || (s[3] & 0xc0) != 0x80) return 0;
    return (c == 0xf0 && s[1] < 0x90) || (c == 0xf4 && s[1] > 0x8f) ? 0 : 4;
}

ptrdiff_t lc_utf8_invalid(const char *text, size_t len) {
    const unsigned char *s = (const unsigned char *)text;
    size_t i = 0;
    while (i < len) {
        uint64_t word;
        while (len - i >= 8 && (memcpy(&word, s + i, 8), !(word & 0x8080808080808080u))) i += 8;
        if (i == len) break;
        size_t n = s[i] < 0x80 ? 1 : utf8_length(s + i, len - i);
        if (n == 0) return (ptrdiff_t)i;
        i += n;
    }
    return -1;
}

void lc_doc_place(const char *text, size_t len, size_t offset, int *line, int *column) {
    *line = *column = 1;
    for (size_t i = 0; i < offset && i < len; i++) {
        if (text[i] == '\n') {
            ++*line;
            *column = 1;
        } else if ((text[i] & 0xc0) != 0x80) {
            ++*column;
        }
    }
}

/* ---- builder
 * --------------------------------------------------------------------------------------------------------- */

lc_status lc_doc_build_start(lc_doc_build *b, size_t text_room) {
    memset(b, 0, sizeof *b);
    b->duplicate = -1;
    b->text_room = text_room + 2;
    b->text = malloc(b->text_room);
    if (!b->text) return b->status = lc_fail(LC_ENOMEM, "no memory for a document of %.0f bytes", (double)text_room);
    b->text[b->text_len++] = 0; /* offset 0: the key of what has none */
    /* A seed nobody can guess: the table stays fast also on keys that were chosen against it. */
    if (getrandom(&b->seed, sizeof b->seed, GRND_NONBLOCK) != (ssize_t)sizeof b->seed) b->seed = 0x9e3779b97f4a7c15u;
    return LC_OK;
}

void lc_doc_build_drop(lc_doc_build *b) {
    free(b->node);
    free(b->text);
    free(b->slot);
    memset(b, 0, sizeof *b);
}

lc_status lc_doc_build_end(lc_doc_build *b, struct lc_doc **out) {
    struct lc_doc *d = lc_alloc(1, sizeof *d);
    if (!d) {
        lc_doc_build_drop(b);
        return LC_ENOMEM;
    }
    char *text = realloc(b->text, b->text_len + 1);
    lc_doc_node *node = realloc(b->node, (size_t)b->count * sizeof *node);
    *d = (struct lc_doc){.node = node ? node : b->node, .count = b->count, .text = text ? text : b->text};
    b->node = NULL;
    b->text = NULL;
    lc_doc_build_drop(b);
    *out = d;
    return LC_OK;
}

int32_t lc_doc_build_node(lc_doc_build *b, lc_doc_kind_t kind) {
    if (b->count == b->room) {
        int64_t room = b->room ? (int64_t)b->room * 2 : 64;
        lc_doc_node *node = room > INT32_MAX ? NULL : lc_resize(b->node, (size_t)room, sizeof *node);
        if (!node) {
            b->status = room > INT32_MAX ? lc_fail(LC_ENOMEM, "a document of more than 2^30 values") : LC_ENOMEM;
            return -1;
        }
        b->node = node;
        b->room = (int32_t)room;
    }
    int32_t index = b->count++;
    b->node[index] =
        (lc_doc_node){.kind = (uint8_t)kind, .next = -1, .first = -1, .key = b->key, .key_len = b->key_len};
    if (b->depth > 0) {
        int32_t parent = b->open[b->depth - 1], *tail = &b->tail[b->depth - 1];
        if (*tail < 0) {
            b->node[parent].first = index;
        } else {
            b->node[*tail].next = index;
        }
        *tail = index;
        b->node[parent].count++;
    }
    b->key = b->key_len = 0;
    return index;
}

static lc_status build_text(lc_doc_build *b, const char *text, size_t len, uint32_t *at, uint32_t *length) {
    if (b->text_room - b->text_len <= len) {
        size_t room = (b->text_room + len + 1) * 2;
        if (room > UINT32_MAX) return b->status = lc_fail(LC_EPARSE, "a document of more than 4 GB of text");
        char *grown = lc_resize(b->text, room, 1);
        if (!grown) return b->status = LC_ENOMEM;
        b->text = grown;
        b->text_room = room;
    }
    if (len) memcpy(b->text + b->text_len, text, len);
    b->text[b->text_len + len] = 0;
    *at = (uint32_t)b->text_len;
    *length = (uint32_t)len;
    b->text_len += len + 1;
    return LC_OK;
}

lc_status lc_doc_build_key(lc_doc_build *b, const char *text, size_t len) {
    return build_text(b, text, len, &b->key, &b->key_len);
}

lc_status lc_doc_build_string(lc_doc_build *b, const char *text, size_t len) {
    lc_doc_node *n = lc_doc_build_last(b);
    return build_text(b, text, len, &n->str, &n->str_len);
}

/* strtod follows the process's locale, which a line editor may have set; here the decimal point is always a point. */
static double plain_strtod(const char *s) {
    locale_t plain = newlocale(LC_ALL_MASK, "C", (locale_t)0);
    if (!plain) return strtod(s, NULL);
    double value = strtod_l(s, NULL, plain);
    freelocale(plain);
    return value;
}

bool lc_doc_build_number(lc_doc_build *b, const char *text, size_t len) {
    lc_doc_node *n = lc_doc_build_last(b);
    const char *s = text, *end = text + len;
    bool minus = s < end && *s == '-';
    uint64_t value = 0;
    if (s < end && (*s == '-' || *s == '+')) s++;
    const char *digits = s;
    while (s < end && *s >= '0' && *s <= '9' && s - digits < 18) value = value * 10 + (uint64_t)(*s++ - '0');
    if (s == end && s > digits) {
        double exact = (double)value;
        n->number = minus ? -exact : exact;
        n->is_integer = (uint64_t)exact == value;
        return true;
    }
    char small[64], *copy = len < sizeof small ? small : malloc(len + 1);
    if (!copy) return false;
    memcpy(copy, text, len);
    copy[len] = 0;
    n->number = plain_strtod(copy);
    if (copy != small) free(copy);
    return isfinite(n->number);
}

bool lc_doc_build_open(lc_doc_build *b) {
    if (b->depth == LC_DOC_DEPTH) return false;
    b->open[b->depth] = b->count - 1;
    b->tail[b->depth++] = -1;
    return true;
}

static uint64_t mix(uint64_t a, uint64_t b) {
    __extension__ unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

uint64_t lc_hash_bytes(const char *s, size_t len, uint64_t seed) {
    uint64_t h = seed ^ len, word;
    for (; len >= 8; len -= 8, s += 8) {
        memcpy(&word, s, 8);
        h = mix(h ^ word, 0x9fb21c651e98df25u);
    }
    word = 0;
    memcpy(&word, s, len);
    return mix(h ^ word ^ seed, 0xd6e8feb86659fd93u);
}

static bool same_key(const lc_doc_build *b, const lc_doc_node *x, const lc_doc_node *y) {
    return x->key_len == y->key_len && memcmp(b->text + x->key, b->text + y->key, x->key_len) == 0;
}

/* The first child whose key an earlier one has, or -1; -2 when there is no memory. */
static int32_t find_duplicate(lc_doc_build *b, int32_t object) {
    int32_t count = b->node[object].count, first = b->node[object].first;
    if (count <= 8) {
        for (int32_t i = first; i >= 0; i = b->node[i].next)
            for (int32_t k = first; k != i; k = b->node[k].next)
                if (same_key(b, &b->node[i], &b->node[k])) return i;
        return -1;
    }
    size_t slots = 32;
    while (slots < (size_t)count * 2) slots *= 2;
    if (slots > b->slots) {
        free(b->slot);
        b->slots = slots;
        b->slot = lc_alloc(slots, sizeof *b->slot);
        if (!b->slot) {
            b->slots = 0;
            return -2;
        }
    } else {
        memset(b->slot, 0, slots * sizeof *b->slot);
    }
    for (int32_t i = first; i >= 0; i = b->node[i].next) {
        const lc_doc_node *n = &b->node[i];
        size_t at = lc_hash_bytes(b->text + n->key, n->key_len, b->seed) & (slots - 1);
        for (; b->slot[at]; at = (at + 1) & (slots - 1))
            if (same_key(b, n, &b->node[b->slot[at] - 1])) return i;
        b->slot[at] = (uint32_t)i + 1;
    }
    return -1;
}

lc_status lc_doc_build_close(lc_doc_build *b) {
    int32_t closed = b->open[--b->depth];
    if (b->node[closed].kind != LC_DOC_OBJECT) return LC_OK;
    int32_t twice = find_duplicate(b, closed);
    if (twice == -2) return b->status = LC_ENOMEM;
    if (twice < 0) return LC_OK;
    b->duplicate = twice;
    return LC_EPARSE;
}

/* ---- accessors
 * ------------------------------------------------------------------------------------------------------- */

static const lc_doc_node *doc_at(const struct lc_doc *d, int32_t node) {
    return d && node >= 0 && node < d->count ? &d->node[node] : NULL;
}

int lc_doc_parse(lc_doc **out, const char *format, const char *name, const char *text, double length) {
    if (!out || !format || !name || (!text && length > 0) || !(length >= 0 && length <= 9007199254740992.0))
        return lc_fail(LC_EARG, "lc_doc_parse: expected a format, a name, and a text with its length");
    *out = NULL;
    if (!text) text = "";
    if (strcmp(format, "json") == 0) return lc_json_parse(name, text, (size_t)length, out);
    if (strcmp(format, "yaml") == 0) return lc_yaml_parse(name, text, (size_t)length, out);
    return lc_fail(LC_EARG, "unknown document format '%s'; expected \"json\" or \"yaml\"", format);
}

void lc_doc_free(lc_doc *d) {
    if (!d) return;
    free(d->node);
    free(d->text);
    free(d);
}

int lc_doc_kind(const lc_doc *d, int32_t node) {
    const lc_doc_node *n = doc_at(d, node);
    return n ? n->kind : LC_DOC_NULL;
}

int32_t lc_doc_first(const lc_doc *d, int32_t node) {
    const lc_doc_node *n = doc_at(d, node);
    return n ? n->first : -1;
}

int32_t lc_doc_next(const lc_doc *d, int32_t node) {
    const lc_doc_node *n = doc_at(d, node);
    return n ? n->next : -1;
}

int32_t lc_doc_size(const lc_doc *d, int32_t node) {
    const lc_doc_node *n = doc_at(d, node);
    return n ? n->count : 0;
}

double lc_doc_number(const lc_doc *d, int32_t node) {
    const lc_doc_node *n = doc_at(d, node);
    return n ? n->number : 0;
}

int lc_doc_is_integer(const lc_doc *d, int32_t node) {
    const lc_doc_node *n = doc_at(d, node);
    return n && n->is_integer;
}

const char *lc_doc_string(const lc_doc *d, int32_t node, int32_t *length) {
    const lc_doc_node *n = doc_at(d, node);
    bool is_string = n && n->kind == LC_DOC_STRING;
    if (length) *length = is_string ? (int32_t)n->str_len : 0;
    return is_string ? d->text + n->str : NULL;
}

const char *lc_doc_key(const lc_doc *d, int32_t node, int32_t *length) {
    const lc_doc_node *n = doc_at(d, node);
    if (length) *length = n ? (int32_t)n->key_len : 0;
    return n ? d->text + n->key : NULL;
}

int32_t lc_doc_get(const struct lc_doc *d, int32_t object, const char *key) {
    const lc_doc_node *n = doc_at(d, object);
    size_t len = strlen(key);
    if (!n || n->kind != LC_DOC_OBJECT) return -1;
    for (int32_t i = n->first; i >= 0; i = d->node[i].next)
        if (d->node[i].key_len == len && memcmp(d->text + d->node[i].key, key, len) == 0) return i;
    return -1;
}

const char *lc_doc_str(const struct lc_doc *d, int32_t node) { return lc_doc_string(d, node, NULL); }
