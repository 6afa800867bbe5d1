/* parquet_values.c: the encodings of values in a page (Encodings.md): PLAIN, dictionaries, runs of booleans, the three DELTA
 * ones and BYTE_STREAM_SPLIT; one value at a time. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "parquet.h"

enum { PLAIN = 0, PLAIN_DICTIONARY = 2, RLE = 3, DELTA_INTS = 5, DELTA_LENGTHS = 6, DELTA_STRINGS = 7, DICTIONARY = 8, SPLIT = 9 };

static lc_status short_page(void) { return lc_fail(LC_EPARSE, "a page's values are cut short"); }

static size_t width_of(const pq_column *c) {
    switch (c->type) {
    case PQ_INT32: case PQ_FLOAT: return 4;
    case PQ_INT64: case PQ_DOUBLE: return 8;
    case PQ_INT96: return 12;
    case PQ_FIXED: return (size_t)c->type_length;
    default: return 0;
    }
}

/* ---- PLAIN
 * ----------------------------------------------------------------------------------------------------------- */

static lc_status plain(const pq_column *c, const uint8_t **at, const uint8_t *end, pq_value *v) {
    uint32_t length;
    size_t n = width_of(c);
    *v = (pq_value){0};
    if (c->type == PQ_BYTES) {
        if (end - *at < 4) return short_page();
        memcpy(&length, *at, 4);
        *at += 4;
        n = length;
    }
    if (n > (size_t)(end - *at)) return short_page();
    v->bytes = *at;
    v->length = n;
    if (n <= 8 && c->type != PQ_BYTES && c->type != PQ_FIXED) memcpy(&v->bits, *at, n);
    *at += n;
    return LC_OK;
}

static lc_status plain_boolean(pq_column *c, pq_value *v) {
    const uint8_t *p = c->in + c->bit / 8;
    if (p >= c->in_end) return short_page();
    *v = (pq_value){.bits = *p >> (c->bit % 8) & 1};
    c->bit++;
    return LC_OK;
}

/* ---- dictionaries
 * ---------------------------------------------------------------------------------------------------- */

lc_status lc_parquet_dictionary(pq_column *c, const uint8_t *from, size_t bytes, int64_t count) {
    const uint8_t *at = from, *end = from + bytes;
    size_t least = c->type == PQ_BYTES ? 4 : width_of(c);
    if (c->type == PQ_BOOLEAN) return lc_fail(LC_EPARSE, "a dictionary of booleans");
    if (least == 0 ? count > 1 << 20 : (size_t)count > bytes / least)
        return lc_fail(LC_EPARSE, "a dictionary of %.0f values in %.0f bytes", (double)count, (double)bytes);
    free(c->word);
    c->words = 0;
    c->word = lc_alloc((size_t)count + 1, sizeof *c->word);
    if (!c->word) return LC_ENOMEM;
    for (; c->words < (uint32_t)count; c->words++) LC_TRY(plain(c, &at, end, &c->word[c->words]));
    return LC_OK;
}

static lc_status from_dictionary(pq_column *c, pq_value *v) {
    uint32_t index;
    if (!lc_parquet_run_next(&c->runs, &index)) return short_page();
    if (index >= c->words) return lc_fail(LC_EPARSE, "value %.0f of a dictionary of %.0f", (double)index, (double)c->words);
    *v = c->word[index];
    return LC_OK;
}

/* ---- DELTA_BINARY_PACKED
 * --------------------------------------------------------------------------------------------- */

static uint64_t zigzag(thrift_in *t) { return (uint64_t)lc_thrift_int(t); }

static lc_status delta_begin(pq_delta *d, const uint8_t *from, const uint8_t *end) {
    thrift_in t = {.at = from, .end = end};
    uint64_t block = lc_thrift_varint(&t);
    *d = (pq_delta){.end = end};
    d->miniblocks = lc_thrift_varint(&t);
    d->left = lc_thrift_varint(&t);
    d->value = zigzag(&t);
    d->at = t.at;
    if (t.bad || d->miniblocks == 0 || d->miniblocks > 1 << 16 || block == 0 || block > 1 << 24 || block % d->miniblocks ||
        d->left > INT32_MAX)
        return lc_fail(LC_EPARSE, "the head of delta-encoded values is damaged");
    d->per_mini = block / d->miniblocks;
    d->mini = d->miniblocks;
    return LC_OK;
}

static lc_status delta_miniblock(pq_delta *d) {
    if (d->bit) d->at += ((uint64_t)d->width * d->per_mini + 7) / 8;
    d->bit = 0;
    if (d->at > d->end) return short_page();
    if (d->mini == d->miniblocks) {
        thrift_in t = {.at = d->at, .end = d->end};
        d->min_delta = zigzag(&t);
        if (t.bad || (size_t)(t.end - t.at) < d->miniblocks) return short_page();
        d->widths = t.at;
        d->at = t.at + d->miniblocks;
        d->mini = 0;
    }
    d->width = d->widths[d->mini++];
    if (d->width > 64) return lc_fail(LC_EPARSE, "delta-encoded values of %d bits", d->width);
    d->in_mini = d->per_mini;
    return LC_OK;
}

static lc_status delta_next(pq_delta *d, uint64_t *value) {
    if (d->left == 0) return short_page();
    d->left--;
    if (!d->begun) {
        d->begun = true;
        *value = d->value;
        return LC_OK;
    }
    if (d->in_mini == 0) LC_TRY(delta_miniblock(d));
    d->in_mini--;
    uint64_t delta = 0;
    if (d->width > 0) {
        uint64_t at = d->bit / 8, last = (d->bit + (uint64_t)d->width - 1) / 8;
        if (last >= (uint64_t)(d->end - d->at)) return short_page();
        for (uint64_t i = last + 1; i-- > at;) { /* a value of 64 bits may lie in 9 bytes */
            unsigned shift = (unsigned)(8 * (i - at));
            uint64_t byte = d->at[i];
            if (i == at) delta |= byte >> d->bit % 8;
            else delta |= byte << (shift - d->bit % 8);
        }
        if (d->width < 64) delta &= ((uint64_t)1 << d->width) - 1;
        d->bit += (uint64_t)d->width;
    }
    d->value += d->min_delta + delta;
    *value = d->value;
    return LC_OK;
}

/* Where the bytes behind delta-encoded values begin: the values are read to their end for that, on a copy. */
static lc_status delta_after(const pq_delta *from, const uint8_t **after) {
    pq_delta d = *from;
    uint64_t value;
    while (d.left > 0) LC_TRY(delta_next(&d, &value));
    if (d.bit) d.at += ((uint64_t)d.width * d.per_mini + 7) / 8;
    /* miniblocks after the last value have no bytes, but the last block names their widths */
    if (d.at > d.end) return short_page();
    *after = d.at;
    return LC_OK;
}

static lc_status delta_text(pq_column *c, pq_delta *lengths, pq_value *v) {
    uint64_t length;
    LC_TRY(delta_next(lengths, &length));
    if (length > (uint64_t)(c->in_end - c->text)) return short_page();
    *v = (pq_value){.bytes = c->text, .length = (size_t)length};
    c->text += length;
    return LC_OK;
}

/* DELTA_BYTE_ARRAY: as many bytes of the value before as the prefix says, then the suffix. */
static lc_status delta_string(pq_column *c, pq_value *v) {
    uint64_t prefix;
    LC_TRY(delta_next(&c->delta, &prefix));
    LC_TRY(delta_text(c, &c->suffix, v));
    if (prefix > c->last_length) return lc_fail(LC_EPARSE, "a value shares more bytes than the one before it has");
    size_t n = (size_t)prefix + v->length;
    if (n > 1u << 30) return lc_fail(LC_EPARSE, "a value of more than 1 GiB");
    if (n + 1 > c->last_room) {
        uint8_t *grown = lc_resize(c->last, 2 * n + 64, 1);
        if (!grown) return LC_ENOMEM;
        c->last = grown;
        c->last_room = 2 * n + 64;
    }
    if (v->length) memcpy(c->last + prefix, v->bytes, v->length);
    c->last_length = n;
    *v = (pq_value){.bytes = c->last, .length = n};
    return LC_OK;
}

/* ---- BYTE_STREAM_SPLIT
 * ----------------------------------------------------------------------------------------------- */

static lc_status split_value(pq_column *c, pq_value *v) {
    size_t n = width_of(c);
    if (c->index >= c->split) return short_page();
    if (n + 1 > c->last_room) {
        uint8_t *grown = lc_resize(c->last, n + 64, 1);
        if (!grown) return LC_ENOMEM;
        c->last = grown;
        c->last_room = n + 64;
    }
    for (size_t i = 0; i < n; i++) c->last[i] = c->in[i * c->split + c->index];
    c->index++;
    *v = (pq_value){.bytes = c->last, .length = n};
    if (n <= 8 && c->type != PQ_FIXED) memcpy(&v->bits, c->last, n);
    return LC_OK;
}

/* ---- one page's values
 * ----------------------------------------------------------------------------------------------- */

static lc_status begin_runs(pq_column *c, const uint8_t *from, const uint8_t *end) {
    if (from == end) { /* no value at all: every entry is null */
        c->runs = (pq_runs){.at = from, .end = end};
        return LC_OK;
    }
    if (*from > 32) return lc_fail(LC_EPARSE, "indices of %d bits", *from);
    c->runs = (pq_runs){.at = from + 1, .end = end, .width = *from};
    return LC_OK;
}

static lc_status begin_booleans(pq_column *c, const uint8_t *from, const uint8_t *end) {
    uint32_t length;
    if (from == end) return begin_runs(c, from, end);
    if (end - from < 4) return short_page();
    memcpy(&length, from, 4);
    if (length > (size_t)(end - from - 4)) return short_page();
    c->runs = (pq_runs){.at = from + 4, .end = from + 4 + length, .width = 1};
    return LC_OK;
}

static lc_status begin_delta(pq_column *c, const uint8_t *from, const uint8_t *end) {
    c->delta = c->suffix = (pq_delta){0};
    c->last_length = 0;
    if (from == end) return LC_OK;
    LC_TRY(delta_begin(&c->delta, from, end));
    if (c->encoding == DELTA_INTS) return LC_OK;
    LC_TRY(delta_after(&c->delta, &c->text));
    if (c->encoding == DELTA_LENGTHS) return LC_OK;
    LC_TRY(delta_begin(&c->suffix, c->text, end));
    return delta_after(&c->suffix, &c->text);
}

static bool fits(const pq_column *c, int encoding) {
    bool bytes = c->type == PQ_BYTES;
    switch (encoding) {
    case PLAIN: return true;
    case PLAIN_DICTIONARY: case DICTIONARY: return c->type != PQ_BOOLEAN;
    case RLE: return c->type == PQ_BOOLEAN;
    case DELTA_INTS: return c->type == PQ_INT32 || c->type == PQ_INT64;
    case DELTA_LENGTHS: return bytes;
    case DELTA_STRINGS: return bytes || c->type == PQ_FIXED;
    case SPLIT: return !bytes && c->type != PQ_BOOLEAN && c->type != PQ_INT96 && width_of(c) > 0;
    default: return false;
    }
}

lc_status lc_parquet_values_begin(pq_column *c, int encoding, const uint8_t *from, const uint8_t *end, int64_t entries) {
    if (!fits(c, encoding))
        return lc_fail(LC_EPARSE, "values in encoding %d, which is not read for their type (PLAIN, dictionaries, RLE, DELTA and "
                       "BYTE_STREAM_SPLIT are)", encoding);
    c->encoding = encoding;
    c->in = from;
    c->in_end = end;
    c->bit = c->index = 0;
    c->split = width_of(c) ? (size_t)(end - from) / width_of(c) : 0;
    c->entries = entries;
    if (encoding == PLAIN_DICTIONARY || encoding == DICTIONARY) return begin_runs(c, from, end);
    if (encoding == RLE) return begin_booleans(c, from, end);
    if (encoding >= DELTA_INTS && encoding <= DELTA_STRINGS) return begin_delta(c, from, end);
    return LC_OK;
}

lc_status lc_parquet_value(pq_column *c, pq_value *v) {
    uint32_t bit;
    *v = (pq_value){0};
    switch (c->encoding) {
    case PLAIN: return c->type == PQ_BOOLEAN ? plain_boolean(c, v) : plain(c, &c->in, c->in_end, v);
    case PLAIN_DICTIONARY: case DICTIONARY: return from_dictionary(c, v);
    case RLE:
        if (!lc_parquet_run_next(&c->runs, &bit)) return short_page();
        v->bits = bit;
        return LC_OK;
    case DELTA_INTS: return delta_next(&c->delta, &v->bits);
    case DELTA_LENGTHS: return delta_text(c, &c->delta, v);
    case DELTA_STRINGS: return delta_string(c, v);
    case SPLIT: return split_value(c, v);
    default: return lc_fail(LC_EBUG, "values of no encoding");
    }
}
