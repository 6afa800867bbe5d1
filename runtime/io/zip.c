/* zip.c: reads the directory of a zip archive: the end record, its zip64 form, the central directory, and of each entry
 * the local header that says where its data begins. */
#include "zip.h"

#include <stdlib.h>
#include <string.h>

enum {
    END_BYTES = 22,
    END64_BYTES = 56,
    LOCATOR_BYTES = 20,
    CENTRAL_BYTES = 46,
    LOCAL_BYTES = 30,
    MAX_ENTRIES = 1 << 22
};

static uint64_t little(const uint8_t *p, int n) {
    uint64_t value = 0;
    while (n-- > 0) value = value << 8 | p[n];
    return value;
}

typedef struct directory {
    uint64_t offset, bytes, count, end; /* end: where what follows the directory begins */
} directory;

/* The last end record; a comment may follow it. */
static lc_status find_end(const lc_zip *z, size_t *out) {
    size_t least = z->size > END_BYTES + 65535 ? z->size - END_BYTES - 65535 : 0;
    for (size_t at = z->size >= END_BYTES ? z->size - END_BYTES + 1 : 0; at-- > least;)
        if (memcmp(z->data + at, "PK\005\006", 4) == 0 && at + END_BYTES + little(z->data + at + 20, 2) == z->size) {
            *out = at;
            return LC_OK;
        }
    return lc_fail(LC_EPARSE, "a zip archive without its central directory; the file of %.0f bytes is cut",
                   (double)z->size);
}

static lc_status read_end64(const lc_zip *z, size_t end, directory *d) {
    const uint8_t *locator = z->data + end - LOCATOR_BYTES;
    if (end < LOCATOR_BYTES || memcmp(locator, "PK\006\007", 4) != 0) return LC_OK;
    uint64_t at = little(locator + 8, 8);
    if (at > end - LOCATOR_BYTES || end - LOCATOR_BYTES - at < END64_BYTES ||
        memcmp(z->data + at, "PK\006\006", 4) != 0)
        return lc_fail(LC_EPARSE, "the zip64 end record is not at byte %.0f, where its locator places it", (double)at);
    const uint8_t *p = z->data + at;
    if (little(p + 16, 4) || little(p + 20, 4)) return lc_fail(LC_EPARSE, "a zip archive of several disks");
    *d = (directory){little(p + 48, 8), little(p + 40, 8), little(p + 32, 8), at};
    return LC_OK;
}

static lc_status read_end(const lc_zip *z, directory *d) {
    size_t end = 0;
    LC_TRY(find_end(z, &end));
    const uint8_t *p = z->data + end;
    *d = (directory){little(p + 16, 4), little(p + 12, 4), little(p + 10, 2), end};
    bool wide = d->offset == UINT32_MAX || d->bytes == UINT32_MAX || d->count == UINT16_MAX;
    if ((little(p + 4, 2) || little(p + 6, 2)) && !wide) return lc_fail(LC_EPARSE, "a zip archive of several disks");
    if (wide || (end >= LOCATOR_BYTES && memcmp(p - LOCATOR_BYTES, "PK\006\007", 4) == 0))
        LC_TRY(read_end64(z, end, d));
    if (d->offset > d->end || d->bytes > d->end - d->offset)
        return lc_fail(LC_EPARSE, "its central directory (%.0f bytes at %.0f) does not lie before byte %.0f",
                       (double)d->bytes, (double)d->offset, (double)d->end);
    if (d->count > d->bytes / CENTRAL_BYTES || d->count > MAX_ENTRIES)
        return lc_fail(LC_EPARSE, "%.0f zip entries cannot stand in a directory of %.0f bytes", (double)d->count,
                       (double)d->bytes);
    return LC_OK;
}

/* The 8-byte values of the zip64 extra field stand for those 4-byte ones that are all ones, in this order. */
static lc_status widen(const uint8_t *extra, size_t bytes, uint64_t *value[3]) {
    size_t at = 0;
    bool wanted = false;
    for (int i = 0; i < 3; i++) wanted = wanted || *value[i] == UINT32_MAX;
    while (wanted && at + 4 <= bytes) {
        size_t n = (size_t)little(extra + at + 2, 2), inner = at + 4;
        if (n > bytes - inner) break;
        for (int i = 0; little(extra + at, 2) == 1 && i < 3; i++) {
            if (*value[i] != UINT32_MAX) continue;
            if (inner + 8 > at + 4 + n) return lc_fail(LC_EPARSE, "a zip64 field that is too short");
            *value[i] = little(extra + inner, 8);
            inner += 8;
        }
        at += 4 + n;
    }
    return LC_OK;
}

static bool leaves_folder(const char *name, size_t n) {
    if (n == 0 || name[0] == '/' || memchr(name, '\\', n) || memchr(name, 0, n) || (n > 1 && name[1] == ':'))
        return true;
    for (size_t at = 0; at < n;) {
        const char *slash = memchr(name + at, '/', n - at);
        size_t part = slash ? (size_t)(slash - name) - at : n - at;
        if (part == 2 && memcmp(name + at, "..", 2) == 0) return true;
        at += part + 1;
    }
    return false;
}

static lc_status find_data(const lc_zip *z, const directory *d, uint64_t local, uint64_t packed, lc_zip_entry *e) {
    int shown = e->name_bytes < 200 ? (int)e->name_bytes : 200;
    if (local > d->offset || d->offset - local < LOCAL_BYTES || memcmp(z->data + local, "PK\003\004", 4) != 0)
        return lc_fail(LC_EPARSE, "zip entry '%.*s': no local header at byte %.0f", shown, e->name, (double)local);
    const uint8_t *p = z->data + local;
    e->offset = local + LOCAL_BYTES + little(p + 26, 2) + little(p + 28, 2);
    if (packed != e->bytes) return lc_fail(LC_EPARSE, "zip entry '%.*s': its two sizes differ", shown, e->name);
    if (e->offset > d->offset || e->bytes > d->offset - e->offset)
        return lc_fail(LC_EPARSE, "zip entry '%.*s': %.0f bytes at %.0f do not lie before the directory at byte %.0f",
                       shown, e->name, (double)e->bytes, (double)e->offset, (double)d->offset);
    return LC_OK;
}

static lc_status read_entry(const lc_zip *z, const directory *d, uint64_t *at, lc_zip_entry *e) {
    const uint8_t *p = z->data + *at;
    uint64_t left = d->offset + d->bytes - *at;
    if (left < CENTRAL_BYTES || memcmp(p, "PK\001\002", 4) != 0)
        return lc_fail(LC_EPARSE, "no zip directory entry at byte %.0f", (double)*at);
    uint64_t name = little(p + 28, 2), extra = little(p + 30, 2), comment = little(p + 32, 2);
    if (name + extra + comment > left - CENTRAL_BYTES)
        return lc_fail(LC_EPARSE, "a zip directory entry is cut at byte %.0f", (double)*at);
    uint64_t packed = little(p + 20, 4), local = little(p + 42, 4);
    *e = (lc_zip_entry){.name = (const char *)p + CENTRAL_BYTES,
                        .name_bytes = (uint32_t)name,
                        .crc = (uint32_t)little(p + 16, 4),
                        .bytes = little(p + 24, 4)};
    int shown = name < 200 ? (int)name : 200;
    LC_TRY(widen(p + CENTRAL_BYTES + name, (size_t)extra, (uint64_t *[3]){&e->bytes, &packed, &local}));
    if (leaves_folder(e->name, (size_t)name))
        return lc_fail(LC_EPARSE, "the zip entry '%.*s' leaves the archive's folder", shown, e->name);
    if (little(p + 8, 2) & 1) return lc_fail(LC_EPARSE, "zip entry '%.*s' is encrypted", shown, e->name);
    if (little(p + 10, 2) != 0)
        return lc_fail(LC_EPARSE, "zip entry '%.*s' is compressed; torch.save stores entries as they are", shown,
                       e->name);
    *at += CENTRAL_BYTES + name + extra + comment;
    return find_data(z, d, local, packed, e);
}

static int compare_names(const void *a, const void *b) {
    const lc_zip_entry *x = a, *y = b;
    uint32_t n = x->name_bytes < y->name_bytes ? x->name_bytes : y->name_bytes;
    int order = memcmp(x->name, y->name, n);
    return order ? order : x->name_bytes < y->name_bytes ? -1 : x->name_bytes > y->name_bytes;
}

static int compare_places(const void *a, const void *b) {
    const lc_zip_entry *x = a, *y = b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

static lc_status check_entries(lc_zip *z) {
    size_t n = (size_t)z->count;
    if (n < 2) return LC_OK;
    qsort(z->entry, n, sizeof *z->entry, compare_places);
    for (size_t i = 1; i < n; i++)
        if (z->entry[i].bytes && z->entry[i - 1].offset + z->entry[i - 1].bytes > z->entry[i].offset)
            return lc_fail(LC_EPARSE, "two zip entries overlap at byte %.0f", (double)z->entry[i].offset);
    qsort(z->entry, n, sizeof *z->entry, compare_names);
    for (size_t i = 1; i < n; i++)
        if (compare_names(&z->entry[i - 1], &z->entry[i]) == 0)
            return lc_fail(LC_EPARSE, "the zip entry '%.*s' occurs twice",
                           z->entry[i].name_bytes < 200 ? (int)z->entry[i].name_bytes : 200, z->entry[i].name);
    return LC_OK;
}

lc_status lc_zip_open(lc_zip *z, const uint8_t *data, size_t bytes) {
    directory d = {0};
    *z = (lc_zip){.data = data, .size = bytes};
    LC_TRY(read_end(z, &d));
    z->entry = lc_alloc(d.count ? (size_t)d.count : 1, sizeof *z->entry);
    if (!z->entry) return LC_ENOMEM;
    lc_status status = LC_OK;
    for (uint64_t at = d.offset; status == LC_OK && (uint64_t)z->count < d.count;)
        status = read_entry(z, &d, &at, &z->entry[z->count++]);
    if (status == LC_OK) status = check_entries(z);
    if (status != LC_OK) lc_zip_close(z);
    return status;
}

void lc_zip_close(lc_zip *z) {
    free(z->entry);
    *z = (lc_zip){0};
}

const lc_zip_entry *lc_zip_find(const lc_zip *z, const char *name, size_t bytes) {
    lc_zip_entry wanted = {.name = name, .name_bytes = (uint32_t)bytes};
    return z->count ? bsearch(&wanted, z->entry, (size_t)z->count, sizeof *z->entry, compare_names) : NULL;
}
