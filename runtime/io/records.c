/* records.c: records of a file, one at a time and in a memory that holds one: lines of JSON, the values of a JSON text,
 * rows of a CSV or parquet file, pieces of a plain text. Text files may be packed (stream.h). Errors say file, line and
 * column, counted in the unpacked text. */
#define _GNU_SOURCE
#include "records.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "doc_build.h"
#include "file.h"
#include "stream.h"

enum { RECORD_MAX = 1 << 29, TEXT_PIECE = 4 << 20 };

typedef enum { JSON_LINES, JSON_VALUES, CSV, TEXT, PARQUET } records_kind;

struct lc_records {
    records_kind kind;
    char *name;
    lc_stream *stream;
    char *text; /* what is read: [at, end) is not used yet */
    size_t at, end, room;
    bool ended;
    double line; /* of text[at], from 1 */
    int column;
    char delimiter;
    lc_doc *header; /* CSV: the names */
    bool in_array, after_value, closed;
    lc_mapping *map;
    lc_parquet *parquet;
};

/* ---- the window
 * ------------------------------------------------------------------------------------------------------ */

/* Reads more behind what is there. *more is false at the end of the file. */
static lc_status read_more(lc_records *r, bool *more) {
    size_t held = r->end - r->at, got = 0;
    *more = false;
    if (r->ended) return LC_OK;
    if (held > RECORD_MAX)
        return lc_fail(LC_EPARSE, "%s:%.0f: one record of more than %d bytes", r->name, r->line, RECORD_MAX);
    if (r->at > 0 && held < r->at) { /* no byte is moved more often than it is read */
        memmove(r->text, r->text + r->at, held);
        r->at = 0;
        r->end = held;
    }
    if (r->room - r->end < 65536) {
        size_t room = r->room ? r->room * 2 : 1 << 18;
        char *grown = lc_resize(r->text, room, 1);
        if (!grown) return LC_ENOMEM;
        r->text = grown;
        r->room = room;
    }
    LC_TRY(lc_stream_read(r->stream, r->text + r->end, r->room - r->end, &got));
    r->end += got;
    r->ended = got == 0;
    *more = got > 0;
    return LC_OK;
}

static void step(lc_records *r, size_t n) {
    for (const char *s = r->text + r->at, *stop = s + n; s < stop; s++) {
        if (*s == '\n') {
            r->line++;
            r->column = 1;
        } else if ((*s & 0xc0) != 0x80) {
            r->column++;
        }
    }
    r->at += n;
}

/* The length of the text up to and with the next line break at or after `from`, or to the end of the file. */
static lc_status find_line(lc_records *r, size_t from, size_t *length) {
    for (size_t seen = from;;) {
        size_t held = r->end - r->at;
        const char *hit = seen < held ? memchr(r->text + r->at + seen, '\n', held - seen) : NULL;
        bool more = false;
        if (hit) {
            *length = (size_t)(hit + 1 - (r->text + r->at));
            return LC_OK;
        }
        if (seen < held) seen = held;
        LC_TRY(read_more(r, &more));
        if (!more) {
            *length = r->end - r->at;
            return LC_OK;
        }
    }
}

static bool is_space(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

/* The next character that is no white space; 0 at the end of the file. */
static lc_status next_char(lc_records *r, char *c) {
    for (;;) {
        size_t n = 0, held = r->end - r->at;
        bool more;
        while (n < held && is_space(r->text[r->at + n])) n++;
        step(r, n);
        if (n < held) {
            *c = r->text[r->at];
            return LC_OK;
        }
        LC_TRY(read_more(r, &more));
        if (more) continue;
        *c = 0;
        return LC_OK;
    }
}

/* ---- JSON
 * ------------------------------------------------------------------------------------------------------------ */

static lc_status next_line_of_json(lc_records *r, lc_doc **record) {
    for (;;) {
        size_t n, used;
        LC_TRY(find_line(r, 0, &n));
        if (n == 0) return LC_OK;
        const char *line = r->text + r->at;
        for (used = n; used > 0 && is_space(line[used - 1]); used--) continue;
        if (used > 0) LC_TRY(lc_json_parse_at(r->name, r->line, r->column, line, used, record));
        step(r, n);
        if (*record) return LC_OK;
    }
}

/* How far a value reaches that begins at text[at]: over strings and brackets, without judging what is in them. */
static lc_status find_value(lc_records *r, size_t *length) {
    size_t n = 0, depth = 0;
    bool quoted = false, escaped = false;
    for (;; n++) {
        bool more;
        if (n == r->end - r->at) LC_TRY(read_more(r, &more));
        if (n == r->end - r->at) break;
        char c = r->text[r->at + n];
        if (quoted) {
            if (escaped) escaped = false;
            else if (c == '\\') escaped = true;
            else if (c == '"') quoted = false;
            if (!quoted && depth == 0) {
                n++;
                break;
            }
        } else if (c == '"') {
            quoted = true;
        } else if (c == '{' || c == '[') {
            depth++;
        } else if (c == '}' || c == ']') {
            if (depth == 0) break;
            if (--depth == 0) {
                n++;
                break;
            }
        } else if (depth == 0 && (c == ',' || is_space(c))) {
            break;
        }
    }
    *length = n;
    return LC_OK;
}

static lc_status json_wrong(const lc_records *r, const char *why) {
    return lc_fail(LC_EPARSE, "%s:%.0f:%d: not valid JSON: %s", r->name, r->line, r->column, why);
}

/* The elements of one array, or the values that stand one after another. */
static lc_status next_value(lc_records *r, lc_doc **record) {
    char c;
    size_t n;
    LC_TRY(next_char(r, &c));
    if (!r->in_array && !r->after_value && c == '[') {
        r->in_array = true;
        step(r, 1);
        LC_TRY(next_char(r, &c));
        if (c == ']') r->closed = true;
        if (c == ']') step(r, 1);
    } else if (r->in_array && !r->closed) {
        if (c != ',' && c != ']') return json_wrong(r, c ? "expected , or ] after a value of the array" : "the array is cut short");
        r->closed = c == ']';
        step(r, 1);
    }
    LC_TRY(next_char(r, &c));
    if (r->closed && c) return json_wrong(r, "something follows the array");
    if (r->closed || (!c && !r->in_array)) return LC_OK;
    if (!c) return json_wrong(r, "the array is cut short");
    LC_TRY(find_value(r, &n));
    if (n == 0) return json_wrong(r, "expected a value");
    LC_TRY(lc_json_parse_at(r->name, r->line, r->column, r->text + r->at, n, record));
    r->after_value = true;
    step(r, n);
    return LC_OK;
}

/* ---- CSV (RFC 4180, with any delimiter)
 * ------------------------------------------------------------------------------ */

typedef struct csv_field { size_t from, length; bool quoted; } csv_field;

typedef struct csv_row {
    csv_field *field;
    int count, room;
    size_t length; /* of the row, with its line break */
} csv_row;

static lc_status csv_add(csv_row *row, csv_field f) {
    if (row->count == row->room) {
        int room = row->room ? row->room * 2 : 32;
        if (room > 1 << 20) return lc_fail(LC_EPARSE, "more than 2^20 fields");
        csv_field *grown = lc_resize(row->field, (size_t)room, sizeof *grown);
        if (!grown) return LC_ENOMEM;
        row->field = grown;
        row->room = room;
    }
    row->field[row->count++] = f;
    return LC_OK;
}

static lc_status csv_peek(lc_records *r, size_t n, int *c) {
    bool more = true;
    while (n >= r->end - r->at && more) LC_TRY(read_more(r, &more));
    *c = n < r->end - r->at ? (unsigned char)r->text[r->at + n] : -1;
    return LC_OK;
}

static lc_status csv_wrong(lc_records *r, size_t at, const char *why) {
    step(r, at); /* for the place; the reader is of no use after this */
    return lc_fail(LC_EPARSE, "%s:%.0f:%d: not valid CSV: %s", r->name, r->line, r->column, why);
}

/* One field from *n on; *n ends at what ended it. */
static lc_status csv_field_at(lc_records *r, size_t *n, csv_field *f) {
    int c;
    size_t begin = *n;
    *f = (csv_field){.from = begin};
    LC_TRY(csv_peek(r, *n, &c));
    if (c != '"') {
        for (; c >= 0 && c != r->delimiter && c != '\n'; ++*n) LC_TRY(csv_peek(r, *n + 1, &c));
        f->length = *n - begin;
        if (c != r->delimiter && f->length > 0 && r->text[r->at + *n - 1] == '\r') f->length--;
        return LC_OK;
    }
    f->quoted = true;
    f->from = ++*n;
    for (;; ++*n) {
        LC_TRY(csv_peek(r, *n, &c));
        if (c < 0) return csv_wrong(r, begin, "the quote that opens here is not closed");
        if (c != '"') continue;
        f->length = *n - f->from;
        LC_TRY(csv_peek(r, ++*n, &c));
        if (c == '"') continue;
        if (c == '\r') LC_TRY(csv_peek(r, ++*n, &c));
        if (c < 0 || c == r->delimiter || c == '\n') return LC_OK;
        return csv_wrong(r, *n, "a character after the closing quote (a quote inside a field is doubled)");
    }
}

/* The next row that is not empty; row->count 0 at the end. */
static lc_status csv_next_row(lc_records *r, csv_row *row) {
    for (;;) {
        size_t n = 0;
        int c;
        row->count = 0;
        LC_TRY(csv_peek(r, 0, &c));
        if (c < 0) return LC_OK;
        for (;; n++) {
            csv_field f;
            LC_TRY(csv_field_at(r, &n, &f));
            LC_TRY(csv_add(row, f));
            LC_TRY(csv_peek(r, n, &c));
            if (c != r->delimiter) break;
        }
        row->length = n + (c == '\n');
        if (row->count > 1 || row->field[0].length > 0 || row->field[0].quoted) return LC_OK;
        step(r, row->length);
    }
}

static lc_status csv_value(char *row, lc_doc_build *b, csv_field f) {
    char *text = row + f.from;
    size_t length = f.length;
    if (f.quoted) { /* the doubled quotes become one, in place: the row is read once */
        size_t to = 0;
        for (size_t i = 0; i < f.length; i++) {
            text[to++] = text[i];
            if (text[i] == '"') i++;
        }
        length = to;
    }
    if (lc_doc_build_node(b, LC_DOC_STRING) < 0) return b->status;
    return lc_doc_build_string(b, text, length);
}

static lc_status csv_object(lc_records *r, const csv_row *row, lc_doc_build *b) {
    char *text = r->text + r->at;
    int32_t name = r->header ? r->header->node[0].first : -1;
    if (r->header && row->count != r->header->node[0].count)
        return lc_fail(LC_EPARSE, "%s:%.0f: %d fields where the header has %d", r->name, r->line, row->count,
                       (int)r->header->node[0].count);
    ptrdiff_t bad = lc_utf8_invalid(text, row->length);
    if (bad >= 0) return csv_wrong(r, (size_t)bad, "invalid UTF-8");
    step(r, row->length); /* now, while the line breaks stand where they are */
    if (lc_doc_build_node(b, r->header ? LC_DOC_OBJECT : LC_DOC_ARRAY) < 0) return b->status;
    lc_doc_build_open(b);
    for (int i = 0; i < row->count; i++) {
        if (r->header) {
            const lc_doc_node *n = &r->header->node[name];
            LC_TRY(lc_doc_build_key(b, r->header->text + n->str, n->str_len));
            name = n->next;
        }
        LC_TRY(csv_value(text, b, row->field[i]));
    }
    lc_status status = lc_doc_build_close(b);
    if (status != LC_OK && b->duplicate >= 0)
        return lc_fail(LC_EPARSE, "%s:1: the name '%.80s' occurs twice in the header", r->name,
                       b->text + b->node[b->duplicate].key);
    return status;
}

static lc_status csv_record(lc_records *r, lc_doc **out) {
    csv_row row = {0};
    lc_doc_build b;
    lc_status status = csv_next_row(r, &row);
    if (status == LC_OK && row.count > 0) {
        status = lc_doc_build_start(&b, row.length + 64);
        if (status == LC_OK) status = csv_object(r, &row, &b);
        if (status == LC_OK)
            status = lc_doc_build_end(&b, out);
        else
            lc_doc_build_drop(&b);
    }
    free(row.field);
    return status;
}

/* ---- plain text
 * ------------------------------------------------------------------------------------------------------ */

/* About four megabytes, cut after a line. */
static lc_status next_piece(lc_records *r, lc_doc **record) {
    size_t n;
    bool more = true;
    while (more && r->end - r->at <= TEXT_PIECE) LC_TRY(read_more(r, &more));
    if (r->end == r->at) return LC_OK;
    LC_TRY(find_line(r, TEXT_PIECE, &n));
    ptrdiff_t bad = lc_utf8_invalid(r->text + r->at, n);
    if (bad >= 0) {
        step(r, (size_t)bad);
        return lc_fail(LC_EPARSE, "%s:%.0f:%d: invalid UTF-8; a text in another encoding must be converted first", r->name,
                       r->line, r->column);
    }
    lc_doc_build b;
    LC_TRY(lc_doc_build_start(&b, n));
    if (lc_doc_build_node(&b, LC_DOC_STRING) < 0 || lc_doc_build_string(&b, r->text + r->at, n) != LC_OK) {
        lc_status status = b.status;
        lc_doc_build_drop(&b);
        return status;
    }
    step(r, n);
    return lc_doc_build_end(&b, record);
}

/* ---- opening
 * --------------------------------------------------------------------------------------------------------- */

static bool ends_with(const char *name, size_t n, const char *with) {
    size_t m = strlen(with);
    return n >= m && strncasecmp(name + n - m, with, m) == 0;
}

/* The format by a file's name, without what names its packing; NULL: not known. */
static const char *format_of(const char *name) {
    static const char *const known[][2] = {{".jsonl", "jsonl"}, {".ndjson", "jsonl"}, {".json", "json"}, {".csv", "csv"},
                                           {".tsv", "tsv"},     {".txt", "text"},     {".text", "text"}, {".md", "text"},
                                           {".parquet", "parquet"}};
    size_t n = strlen(name);
    if (ends_with(name, n, ".gz")) n -= 3;
    else if (ends_with(name, n, ".zst")) n -= 4;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (ends_with(name, n, known[i][0])) return known[i][1];
    return NULL;
}

static lc_status set_format(lc_records *r, const char *format) {
    static const char *const names[] = {"jsonl", "json", "csv", "text", "parquet"};
    if (!format) format = format_of(r->name);
    if (!format)
        return lc_fail(LC_EARG, "%s: which format? Names end in .jsonl, .json, .csv, .tsv, .txt or .parquet, and may be followed "
                       "by .gz or .zst", r->name);
    r->delimiter = strcmp(format, "tsv") == 0 ? '\t' : ',';
    if (r->delimiter == '\t') format = "csv";
    for (int i = 0; i < 5; i++)
        if (strcmp(format, names[i]) == 0) {
            r->kind = (records_kind)i;
            return LC_OK;
        }
    return lc_fail(LC_EARG, "no format '%s': there are jsonl, json, csv, tsv, text and parquet", format);
}

static lc_status begin_text(lc_records *r) {
    bool more = true;
    while (more && r->end < 3) LC_TRY(read_more(r, &more));
    if (r->end >= 3 && memcmp(r->text, "\xef\xbb\xbf", 3) == 0) r->at = 3; /* a byte order mark */
    if (r->kind != CSV) return LC_OK;
    LC_TRY(csv_record(r, &r->header));
    return r->header ? LC_OK : lc_fail(LC_EPARSE, "%s: the file is empty; a header with the names of the columns was expected", r->name);
}

static lc_status begin(lc_records *r, const void *data, size_t bytes, const char *columns) {
    if (r->kind == PARQUET && !data) {
        LC_TRY(lc_mapping_open(r->name, &r->map));
        data = r->map->data ? r->map->data : (const uint8_t *)"";
        bytes = r->map->bytes;
    }
    if (r->kind == PARQUET) return lc_parquet_open(data, bytes, r->name, columns, &r->parquet);
    if (data) LC_TRY(lc_stream_open_memory(data, bytes, r->name, &r->stream));
    else LC_TRY(lc_stream_open(r->name, &r->stream));
    return begin_text(r);
}

static lc_status open_records(const void *data, size_t bytes, const char *name, const char *format, const char *columns,
                              lc_records **out) {
    *out = NULL;
    lc_records *r = lc_alloc(1, sizeof *r);
    if (!r) return LC_ENOMEM;
    r->line = r->column = 1;
    r->name = lc_strdup(name);
    lc_status status = r->name ? set_format(r, format) : LC_ENOMEM;
    if (status == LC_OK) status = begin(r, data, bytes, columns && *columns ? columns : NULL);
    if (status != LC_OK) {
        lc_records_close(r);
        return status;
    }
    *out = r;
    return LC_OK;
}

int lc_records_open(lc_records **out, const char *path, const char *format, const char *columns) {
    if (!out || !path) return lc_fail(LC_EARG, "lc_records_open: expected a path");
    return open_records(NULL, 0, path, format, columns, out);
}

lc_status lc_records_open_memory(const void *data, size_t bytes, const char *name, const char *format, lc_records **out) {
    return open_records(data ? data : "", bytes, name, format, NULL, out);
}

void lc_records_close(lc_records *r) {
    if (!r) return;
    lc_parquet_close(r->parquet);
    lc_mapping_drop(r->map);
    lc_stream_close(r->stream);
    lc_doc_free(r->header);
    free(r->text);
    free(r->name);
    free(r);
}

double lc_records_count(const lc_records *r) { return r && r->kind == PARQUET ? lc_parquet_rows(r->parquet) : -1; }

int lc_records_next(lc_records *r, lc_doc **record) {
    if (!r || !record) return lc_fail(LC_EARG, "lc_records_next: expected an open file");
    *record = NULL;
    switch (r->kind) {
    case JSON_LINES: return next_line_of_json(r, record);
    case JSON_VALUES: return next_value(r, record);
    case CSV: return csv_record(r, record);
    case TEXT: return next_piece(r, record);
    case PARQUET: return lc_parquet_next(r->parquet, record);
    }
    return lc_fail(LC_EBUG, "records of no kind");
}
