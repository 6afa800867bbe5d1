/* stream.c: the one way from a file's bytes to readers that take them piece by piece: plain, gzip (zlib), Zstandard
 * (libzstd, opened when first met). */
#define _GNU_SOURCE
#include "stream.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <zlib.h>

#include "library.h"

enum { PIECE = 1 << 17 };

typedef struct zstd_in { const void *data; size_t size, at; } zstd_in;
typedef struct zstd_out { void *data; size_t size, at; } zstd_out;

static void *(*ZSTD_createDStream)(void);
static size_t (*ZSTD_freeDStream)(void *z);
static size_t (*ZSTD_decompressStream)(void *z, zstd_out *out, zstd_in *in);
static unsigned (*ZSTD_isError)(size_t code);
static const char *(*ZSTD_getErrorName)(size_t code);

struct lc_stream {
    char *name;
    int fd;               /* -1: memory */
    const uint8_t *in;    /* what is read and not used yet */
    size_t left;
    uint64_t read;        /* bytes taken from the file so far, with those left */
    bool ended;           /* of the file */
    enum { PLAIN, GZIP, ZSTD } kind;
    bool whole;           /* a gzip member or a Zstandard frame has just ended: the file may, too */
    z_stream z;
    bool z_open;
    void *zstd;
    uint8_t piece[PIECE];
};

static lc_status refill(lc_stream *s) {
    if (s->left > 0 || s->ended) return LC_OK;
    ssize_t got = 0;
    if (s->fd >= 0) do {
            if (lc_interrupt) return lc_fail(LC_EINTR, "interrupted");
            got = read(s->fd, s->piece, PIECE);
        } while (got < 0 && errno == EINTR);
    if (got < 0) return lc_fail(LC_EIO, "cannot read %s: %s", s->name, strerror(errno));
    s->in = s->piece;
    s->left = (size_t)got;
    s->read += (uint64_t)got;
    s->ended = got == 0;
    return LC_OK;
}

static lc_status open_zstd(lc_stream *s) {
    static const char *const names[] = {"libzstd.so.1", NULL};
    static const lc_symbol symbols[] = {{"ZSTD_createDStream", &ZSTD_createDStream},
                                        {"ZSTD_freeDStream", &ZSTD_freeDStream},
                                        {"ZSTD_decompressStream", &ZSTD_decompressStream},
                                        {"ZSTD_isError", &ZSTD_isError},
                                        {"ZSTD_getErrorName", &ZSTD_getErrorName},
                                        {NULL, NULL}};
    if (!ZSTD_getErrorName) LC_TRY(lc_library_open(names, symbols, "reading Zstandard files", "libzstd1"));
    s->zstd = ZSTD_createDStream();
    return s->zstd ? LC_OK : lc_fail(LC_ENOMEM, "no memory to unpack %s", s->name);
}

static lc_status begin(lc_stream *s) {
    LC_TRY(refill(s));
    if (s->left >= 2 && s->in[0] == 0x1f && s->in[1] == 0x8b) {
        s->kind = GZIP;
        if (inflateInit2(&s->z, 16 + MAX_WBITS) != Z_OK) return lc_fail(LC_ENOMEM, "no memory to unpack %s", s->name);
        s->z_open = true;
    } else if (s->left >= 4 && memcmp(s->in, "\x28\xb5\x2f\xfd", 4) == 0) {
        s->kind = ZSTD;
        LC_TRY(open_zstd(s));
    }
    return LC_OK;
}

static lc_status new_stream(const char *name, lc_stream **out) {
    *out = NULL;
    lc_stream *s = lc_alloc(1, sizeof *s);
    if (!s) return LC_ENOMEM;
    s->fd = -1;
    s->name = lc_strdup(name);
    if (!s->name) {
        free(s);
        return LC_ENOMEM;
    }
    *out = s;
    return LC_OK;
}

static lc_status begin_or_close(lc_stream **s) {
    lc_status status = begin(*s);
    if (status == LC_OK) return LC_OK;
    lc_stream_close(*s);
    *s = NULL;
    return status;
}

lc_status lc_stream_open(const char *path, lc_stream **out) {
    struct stat st;
    LC_TRY(new_stream(path, out));
    lc_stream *s = *out;
    s->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (s->fd < 0 || (fstat(s->fd, &st) == 0 && S_ISDIR(st.st_mode))) {
        lc_status status = lc_fail(LC_EIO, "cannot read %s: %s", path, s->fd < 0 ? strerror(errno) : "it is a folder");
        lc_stream_close(s);
        *out = NULL;
        return status;
    }
    return begin_or_close(out);
}

lc_status lc_stream_open_memory(const void *data, size_t bytes, const char *name, lc_stream **out) {
    LC_TRY(new_stream(name, out));
    (*out)->in = data;
    (*out)->left = bytes;
    (*out)->read = bytes;
    return begin_or_close(out);
}

void lc_stream_close(lc_stream *s) {
    if (!s) return;
    if (s->z_open) inflateEnd(&s->z);
    if (s->zstd) ZSTD_freeDStream(s->zstd);
    if (s->fd >= 0) close(s->fd);
    free(s->name);
    free(s);
}

const char *lc_stream_name(const lc_stream *s) { return s->name; }

static lc_status damaged(const lc_stream *s, const char *what, const char *why) {
    return lc_fail(LC_EPARSE, "%s: damaged %s data before byte %.0f: %s", s->name, what, (double)(s->read - s->left), why);
}

static lc_status read_gzip(lc_stream *s, void *into, size_t room, size_t *got) {
    s->z.next_out = into;
    s->z.avail_out = (uInt)room;
    while (s->z.avail_out == room) {
        LC_TRY(refill(s));
        while (s->whole && s->left > 0 && *s->in == 0) s->in++, s->left--; /* zeros may pad the file */
        if (s->whole && s->left == 0 && !s->ended) continue;
        if (s->left == 0) return s->whole ? LC_OK : damaged(s, "gzip", "they are cut short");
        if (s->whole) inflateReset(&s->z);
        uInt now = s->left > PIECE ? PIECE : (uInt)s->left;
        s->z.next_in = (Bytef *)(uintptr_t)s->in;
        s->z.avail_in = now;
        int status = inflate(&s->z, Z_NO_FLUSH);
        s->in += now - s->z.avail_in;
        s->left -= now - s->z.avail_in;
        s->whole = status == Z_STREAM_END;
        if (status == Z_MEM_ERROR) return lc_fail(LC_ENOMEM, "no memory to unpack %s", s->name);
        if (status != Z_OK && status != Z_STREAM_END && status != Z_BUF_ERROR)
            return damaged(s, "gzip", s->z.msg ? s->z.msg : "no valid stream");
        if (s->whole && s->z.avail_out == room) continue; /* an empty member */
    }
    *got = room - s->z.avail_out;
    return LC_OK;
}

static lc_status read_zstd(lc_stream *s, void *into, size_t room, size_t *got) {
    zstd_out out = {into, room, 0};
    while (out.at == 0) {
        LC_TRY(refill(s));
        if (s->left == 0 && s->whole) return LC_OK;
        zstd_in in = {s->in, s->left, 0};
        size_t status = ZSTD_decompressStream(s->zstd, &out, &in);
        s->in += in.at;
        s->left -= in.at;
        if (ZSTD_isError(status)) return damaged(s, "Zstandard", ZSTD_getErrorName(status));
        s->whole = status == 0;
        if (s->ended && in.at == 0 && out.at == 0) {
            if (s->whole) return LC_OK;
            return damaged(s, "Zstandard", "they are cut short");
        }
    }
    *got = out.at;
    return LC_OK;
}

lc_status lc_stream_read(lc_stream *s, void *into, size_t room, size_t *got) {
    *got = 0;
    if (room > 1u << 30) room = 1u << 30;
    if (room == 0) return LC_OK;
    if (lc_interrupt) return lc_fail(LC_EINTR, "interrupted");
    if (s->kind == GZIP) return read_gzip(s, into, room, got);
    if (s->kind == ZSTD) return read_zstd(s, into, room, got);
    LC_TRY(refill(s));
    size_t n = s->left < room ? s->left : room;
    memcpy(into, s->in, n);
    s->in += n;
    s->left -= n;
    *got = n;
    return LC_OK;
}
