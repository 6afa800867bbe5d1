/* parquet_page.c: from the bytes of a column to its pages: headers, checksums, unpacking (zlib, and snappy, Zstandard, LZ4 and
 * brotli by libraries opened when first met), and the levels that say where a value is missing or repeated. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include <zlib.h>

#include "library.h"
#include "parquet.h"

enum { PAGE_MAX = 1 << 29 };

/* ---- unpacking
 * ------------------------------------------------------------------------------------------------------- */

static int (*snappy_uncompress)(const char *from, size_t packed, char *into, size_t *bytes);
static size_t (*ZSTD_decompress)(void *into, size_t room, const void *from, size_t packed);
static int (*LZ4_decompress_safe)(const char *from, char *into, int packed, int room);
static int (*BrotliDecoderDecompress)(size_t packed, const uint8_t *from, size_t *bytes, uint8_t *into);

static lc_status open_snappy(void) {
    static const char *const names[] = {"libsnappy.so.1", NULL};
    static const lc_symbol symbols[] = {{"snappy_uncompress", &snappy_uncompress}, {NULL, NULL}};
    return snappy_uncompress ? LC_OK : lc_library_open(names, symbols, "reading parquet pages packed with snappy", "libsnappy1v5");
}

static lc_status open_zstd(void) {
    static const char *const names[] = {"libzstd.so.1", NULL};
    static const lc_symbol symbols[] = {{"ZSTD_decompress", &ZSTD_decompress}, {NULL, NULL}};
    return ZSTD_decompress ? LC_OK : lc_library_open(names, symbols, "reading parquet pages packed with Zstandard", "libzstd1");
}

static lc_status open_lz4(void) {
    static const char *const names[] = {"liblz4.so.1", NULL};
    static const lc_symbol symbols[] = {{"LZ4_decompress_safe", &LZ4_decompress_safe}, {NULL, NULL}};
    return LZ4_decompress_safe ? LC_OK : lc_library_open(names, symbols, "reading parquet pages packed with LZ4", "liblz4-1");
}

static lc_status open_brotli(void) {
    static const char *const names[] = {"libbrotlidec.so.1", NULL};
    static const lc_symbol symbols[] = {{"BrotliDecoderDecompress", &BrotliDecoderDecompress}, {NULL, NULL}};
    return BrotliDecoderDecompress ? LC_OK
                                   : lc_library_open(names, symbols, "reading parquet pages packed with brotli", "libbrotli1");
}

static bool unpack_gzip(const uint8_t *from, size_t packed, uint8_t *into, size_t bytes) {
    z_stream z = {.next_in = (Bytef *)(uintptr_t)from, .avail_in = (uInt)packed, .next_out = into, .avail_out = (uInt)bytes};
    if (inflateInit2(&z, 32 + MAX_WBITS) != Z_OK) return false;
    int status = inflate(&z, Z_FINISH);
    while (status == Z_STREAM_END && z.avail_in > 0 && inflateReset(&z) == Z_OK) status = inflate(&z, Z_FINISH);
    bool good = status == Z_STREAM_END && z.avail_out == 0;
    inflateEnd(&z);
    return good;
}

lc_status lc_parquet_unpack(int codec, const uint8_t *from, size_t packed, uint8_t *into, size_t bytes) {
    static const char *const names[] = {"plain", "snappy", "gzip", "LZO", "brotli", "LZ4 (the old kind)", "Zstandard", "LZ4"};
    size_t got = bytes;
    bool good = false;
    switch (codec) {
    case 0:
        good = packed == bytes;
        if (good) memcpy(into, from, bytes);
        break;
    case 1:
        LC_TRY(open_snappy());
        good = snappy_uncompress((const char *)from, packed, (char *)into, &got) == 0 && got == bytes;
        break;
    case 2: good = unpack_gzip(from, packed, into, bytes); break;
    case 4:
        LC_TRY(open_brotli());
        good = BrotliDecoderDecompress(packed, from, &got, into) == 1 && got == bytes;
        break;
    case 6:
        LC_TRY(open_zstd());
        good = ZSTD_decompress(into, bytes, from, packed) == bytes;
        break;
    case 7:
        LC_TRY(open_lz4());
        good = LZ4_decompress_safe((const char *)from, (char *)into, (int)packed, (int)bytes) == (int)bytes;
        break;
    default:
        return lc_fail(LC_EPARSE, "a page is packed with %s, which is not read (uncompressed, snappy, gzip, Zstandard, LZ4 and brotli are)",
                       codec >= 0 && codec <= 7 ? names[codec] : "an unknown codec");
    }
    return good ? LC_OK : lc_fail(LC_EPARSE, "a page does not unpack (%s) to the %.0f bytes that it announces", names[codec], (double)bytes);
}

/* ---- runs (Encodings.md, RLE = 3)
 * ------------------------------------------------------------------------------------ */

static bool run_begin(pq_runs *r) {
    thrift_in t = {.at = r->at, .end = r->end};
    uint64_t head = lc_thrift_varint(&t);
    if (t.bad || head >> 1 == 0) return false;
    if (r->packed) r->packed = false;
    r->at = t.at;
    uint64_t n = head >> 1;
    if (head & 1) {
        uint64_t room = (uint64_t)(r->end - r->at);
        if (n > INT32_MAX) return false;
        r->packed = true;
        r->left = n * 8;
        r->bit = 0;
        if (r->width > 0 && r->left > room * 8 / (uint64_t)r->width) r->left = room * 8 / (uint64_t)r->width; /* the last may be cut */
        return r->left > 0;
    }
    int bytes = (r->width + 7) / 8;
    if (r->end - r->at < bytes) return false;
    r->value = 0;
    for (int i = 0; i < bytes; i++) r->value |= (uint32_t)r->at[i] << 8 * i;
    r->at += bytes;
    r->left = n;
    return r->width == 32 || r->value >> r->width == 0;
}

bool lc_parquet_run_next(pq_runs *r, uint32_t *value) {
    if (r->left == 0) {
        if (r->packed) r->at += (r->bit + 7) / 8;
        if (r->at > r->end || !run_begin(r)) return false;
    }
    r->left--;
    if (!r->packed) {
        *value = r->value;
        return true;
    }
    const uint8_t *p = r->at + r->bit / 8;
    uint64_t word = 0, shift = r->bit % 8;
    size_t room = (size_t)(r->end - p);
    if (r->width > 0) memcpy(&word, p, room < 8 ? room : 8);
    *value = (uint32_t)(word >> shift & (((uint64_t)1 << r->width) - 1));
    r->bit += (uint64_t)r->width;
    return true;
}

static int bits_for(int level) {
    int n = 0;
    while (level >> n) n++;
    return n;
}

/* ---- pages
 * ----------------------------------------------------------------------------------------------------------- */

typedef struct page_header {
    int64_t kind, bytes, packed, values, encoding, def_encoding, rep_encoding, def_bytes, rep_bytes;
    uint32_t crc;
    bool has_crc, is_packed, has_part;
} page_header;

static int64_t number(thrift_in *t, int type) {
    if (type >= THRIFT_BYTE && type <= THRIFT_I64 && type != THRIFT_BYTE) return lc_thrift_int(t);
    lc_thrift_skip(t, type);
    t->bad = true;
    return 0;
}

/* data_page_header (5), dictionary_page_header (7) or data_page_header_v2 (8): their first fields are the same. */
static void read_page_part(thrift_in *t, page_header *h, int part) {
    int id = 0, type;
    h->has_part = true;
    while (lc_thrift_field(t, &id, &type)) {
        bool two = part == 8;
        if (id == 1) h->values = number(t, type);
        else if (id == (two ? 4 : 2)) h->encoding = number(t, type);
        else if (!two && id == 3 && part == 5) h->def_encoding = number(t, type);
        else if (!two && id == 4 && part == 5) h->rep_encoding = number(t, type);
        else if (two && id == 5) h->def_bytes = number(t, type);
        else if (two && id == 6) h->rep_bytes = number(t, type);
        else if (two && id == 7 && type <= THRIFT_FALSE) h->is_packed = type == THRIFT_TRUE;
        else lc_thrift_skip(t, type);
    }
}

static lc_status read_header(pq_column *c, page_header *h) {
    thrift_in t = {.at = c->at, .end = c->end};
    int id = 0, type;
    *h = (page_header){.kind = -1, .bytes = -1, .packed = -1, .is_packed = true, .def_encoding = 3, .rep_encoding = 3};
    while (lc_thrift_field(&t, &id, &type)) {
        if (id == 1) h->kind = number(&t, type);
        else if (id == 2) h->bytes = number(&t, type);
        else if (id == 3) h->packed = number(&t, type);
        else if (id == 4) h->crc = (uint32_t)number(&t, type), h->has_crc = true;
        else if ((id == 5 || id == 7 || id == 8) && type == THRIFT_STRUCT) read_page_part(&t, h, id);
        else lc_thrift_skip(&t, type);
    }
    if (t.bad) return lc_fail(LC_EPARSE, "a page's header is cut short or damaged");
    if (h->bytes < 0 || h->packed < 0 || h->packed > t.end - t.at)
        return lc_fail(LC_EPARSE, "a page of %.0f bytes, where its column has %.0f left", (double)h->packed, (double)(t.end - t.at));
    if (h->bytes > PAGE_MAX) return lc_fail(LC_EPARSE, "a page of %.0f bytes; at most 512 MiB are read", (double)h->bytes);
    if (h->values < 0 || h->values > INT32_MAX) return lc_fail(LC_EPARSE, "a page with %.0f values", (double)h->values);
    if (h->def_bytes < 0 || h->rep_bytes < 0 || h->def_bytes + h->rep_bytes > h->packed || h->def_bytes + h->rep_bytes > h->bytes)
        return lc_fail(LC_EPARSE, "a page whose levels are longer than itself");
    c->at = t.at;
    if (h->has_crc && crc32(0, c->at, (uInt)h->packed) != h->crc)
        return lc_fail(LC_EPARSE, "a page's checksum is not what it announces: the file is damaged");
    return LC_OK;
}

/* No compressor makes more of its input than this; what announces more is not worth the memory. */
static bool is_bomb(int codec, int64_t packed, int64_t bytes) {
    int64_t most = codec == 1 ? 128 : codec == 7 ? 300 : codec == 2 ? 1100 : 1 << 20;
    return bytes > (packed + 64) * most;
}

static lc_status unpack_page(pq_column *c, const page_header *h, uint8_t **page, size_t *room) {
    size_t bytes = (size_t)h->bytes, packed = (size_t)h->packed, levels = (size_t)(h->def_bytes + h->rep_bytes);
    if (h->is_packed && is_bomb(c->codec, h->packed, h->bytes))
        return lc_fail(LC_EPARSE, "a page of %.0f bytes announces %.0f unpacked", (double)packed, (double)bytes);
    if (*room < bytes + 8) {
        free(*page);
        *room = 0;
        *page = lc_alloc(bytes + 8, 1);
        if (!*page) return LC_ENOMEM;
        *room = bytes + 8;
    }
    if (levels) memcpy(*page, c->at, levels); /* version 2: the levels stand unpacked before the values */
    if (bytes == levels) return LC_OK;
    return lc_parquet_unpack(h->is_packed ? c->codec : 0, c->at + levels, packed - levels, *page + levels, bytes - levels);
}

/* Levels of a page of version 1: a length and runs, or (the old BIT_PACKED) none of either. */
static lc_status levels_v1(pq_runs *r, int most, int64_t encoding, const uint8_t **at, const uint8_t *end) {
    uint32_t length;
    *r = (pq_runs){.width = bits_for(most)};
    if (most == 0) return LC_OK;
    if (encoding != 3) return lc_fail(LC_EPARSE, "levels in an encoding that is no longer written");
    if (end - *at < 4) return lc_fail(LC_EPARSE, "a page too short for its levels");
    memcpy(&length, *at, 4);
    *at += 4;
    if (length > (size_t)(end - *at)) return lc_fail(LC_EPARSE, "a page whose levels are longer than itself");
    r->at = *at;
    *at += length;
    r->end = *at;
    return LC_OK;
}

static lc_status begin_page(pq_column *c, const page_header *h) {
    LC_TRY(unpack_page(c, h, &c->page, &c->page_room));
    const uint8_t *at = c->page, *end = c->page + h->bytes;
    if (h->kind == 3) {
        c->rep = (pq_runs){.at = at, .end = at + h->rep_bytes, .width = bits_for(c->node->rep)};
        c->def = (pq_runs){.at = at + h->rep_bytes, .end = at + h->rep_bytes + h->def_bytes, .width = bits_for(c->node->def)};
        at += h->rep_bytes + h->def_bytes;
    } else {
        LC_TRY(levels_v1(&c->rep, c->node->rep, h->rep_encoding, &at, end));
        LC_TRY(levels_v1(&c->def, c->node->def, h->def_encoding, &at, end));
    }
    if (h->values > c->values) return lc_fail(LC_EPARSE, "more values in the pages than in the column");
    c->values -= h->values;
    c->left = h->values;
    return lc_parquet_values_begin(c, (int)h->encoding, at, end, h->values);
}

static lc_status next_page(pq_column *c) {
    page_header h;
    LC_TRY(read_header(c, &h));
    if ((h.kind == 0 || h.kind == 2 || h.kind == 3) && !h.has_part) return lc_fail(LC_EPARSE, "a page without its header's second part");
    if (h.kind == 2) {
        size_t room = 0;
        if (c->dictionary) return lc_fail(LC_EPARSE, "a second dictionary in one column");
        LC_TRY(unpack_page(c, &h, &c->dictionary, &room));
        LC_TRY(lc_parquet_dictionary(c, c->dictionary, (size_t)h.bytes, h.values));
    } else if (h.kind == 0 || h.kind == 3) {
        LC_TRY(begin_page(c, &h));
    } else if (h.kind != 1) { /* an index page says nothing that is needed here */
        return lc_fail(LC_EPARSE, "a page of an unknown kind");
    }
    c->at += h.packed;
    return LC_OK;
}

lc_status lc_parquet_peek(pq_column *c, bool *there) {
    uint32_t def = 0, rep = 0;
    *there = true;
    if (c->have) return LC_OK;
    while (c->left == 0) {
        if (c->values == 0) {
            *there = false;
            return LC_OK;
        }
        if (c->at >= c->end) return lc_fail(LC_EPARSE, "the pages end %.0f values too early", (double)c->values);
        LC_TRY(next_page(c));
    }
    if (c->node->rep > 0 && !lc_parquet_run_next(&c->rep, &rep)) return lc_fail(LC_EPARSE, "a page's repetition levels are cut short");
    if (c->node->def > 0 && !lc_parquet_run_next(&c->def, &def)) return lc_fail(LC_EPARSE, "a page's definition levels are cut short");
    if (rep > (uint32_t)c->node->rep || def > (uint32_t)c->node->def) return lc_fail(LC_EPARSE, "a level is higher than the schema allows");
    c->left--;
    c->have = true;
    c->now_def = (int)def;
    c->now_rep = (int)rep;
    return LC_OK;
}
