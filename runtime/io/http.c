/* http.c: an HTTP client on libcurl, opened at run time: several transfers at once, each into memory or onto the end of a
 * file whose SHA-256 is kept as it grows. It follows no redirect and retries nothing: who may see which header, when to
 * ask again and what an answer means are the caller's (lua/lolcats/hub). Nothing of the caller's is called back; it pulls
 * with lc_http_wait. The few constants and prototypes of libcurl stand here (its ABI is fixed), so no header is needed. */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "digest.h"
#include "library.h"

/* ---- libcurl
 * --------------------------------------------------------------------------------------------------------- */

typedef struct curl_message {
    int kind; /* 1: a transfer ended */
    void *easy;
    union { void *other; int result; } data;
} curl_message;

typedef struct curl_list curl_list;

enum {
    OPT_WRITEDATA = 10001, OPT_URL = 10002, OPT_ERRORBUFFER = 10010, OPT_USERAGENT = 10018, OPT_HTTPHEADER = 10023,
    OPT_HEADERDATA = 10029, OPT_CAINFO = 10065, OPT_PRIVATE = 10103, OPT_WRITEFUNCTION = 20011, OPT_HEADERFUNCTION = 20079,
    OPT_LOW_SPEED_LIMIT = 19, OPT_LOW_SPEED_TIME = 20, OPT_NOBODY = 44, OPT_CONNECTTIMEOUT = 78, OPT_HTTP_VERSION = 84, OPT_BUFFERSIZE = 98,
    OPT_NOSIGNAL = 99, OPT_PROTOCOLS = 181, INFO_STATUS = 0x200002, INFO_PRIVATE = 0x100015, INFO_REDIRECT = 0x10001f
};

static int (*curl_global_init)(long flags);
static void *(*curl_easy_init)(void);
static void (*curl_easy_cleanup)(void *easy);
static int (*curl_easy_setopt)(void *easy, int option, ...);
static int (*curl_easy_getinfo)(void *easy, int info, ...);
static const char *(*curl_easy_strerror)(int code);
static curl_list *(*curl_slist_append)(curl_list *list, const char *line);
static void (*curl_slist_free_all)(curl_list *list);
static void *(*curl_multi_init)(void);
static int (*curl_multi_cleanup)(void *multi);
static int (*curl_multi_add_handle)(void *multi, void *easy);
static int (*curl_multi_remove_handle)(void *multi, void *easy);
static int (*curl_multi_perform)(void *multi, int *running);
static int (*curl_multi_poll)(void *multi, void *extra, unsigned n, int milliseconds, int *ready);
static curl_message *(*curl_multi_info_read)(void *multi, int *left);

static lc_status open_curl(void) {
    static const char *const names[] = {"libcurl.so.4", "libcurl-gnutls.so.4", "libcurl.so", NULL};
    static const lc_symbol symbols[] = {
        {"curl_global_init", &curl_global_init},   {"curl_easy_init", &curl_easy_init},
        {"curl_easy_cleanup", &curl_easy_cleanup}, {"curl_easy_setopt", &curl_easy_setopt},
        {"curl_easy_getinfo", &curl_easy_getinfo}, {"curl_easy_strerror", &curl_easy_strerror},
        {"curl_slist_append", &curl_slist_append}, {"curl_slist_free_all", &curl_slist_free_all},
        {"curl_multi_init", &curl_multi_init},     {"curl_multi_cleanup", &curl_multi_cleanup},
        {"curl_multi_add_handle", &curl_multi_add_handle}, {"curl_multi_remove_handle", &curl_multi_remove_handle},
        {"curl_multi_perform", &curl_multi_perform},       {"curl_multi_poll", &curl_multi_poll},
        {"curl_multi_info_read", &curl_multi_info_read},   {NULL, NULL}};
    static bool ready;
    if (ready) return LC_OK;
    LC_TRY(lc_library_open(names, symbols, "downloading", "libcurl4"));
    if (curl_global_init(3) != 0) return lc_fail(LC_EIO, "libcurl cannot be started");
    ready = true;
    return LC_OK;
}

/* ---- transfers
 * ------------------------------------------------------------------------------------------------------- */

enum { TRANSFERS_MAX = 64, BODY_MAX = 64 << 20, HEADERS_MAX = 1 << 18 };

typedef struct bytes {
    char *data;
    size_t count, room;
} bytes;

typedef struct transfer {
    void *easy;
    curl_list *headers;
    bytes head, body;
    char error[256];   /* why it ended without the whole answer */
    char said[256];    /* what libcurl says of it */
    char *path;
    int fd;
    bool to_file;    /* the status is one whose body belongs into the file */
    bool ended, reported, failed, whole_head;
    long status;
    uint64_t at; /* bytes of the file that are good, all in `hash` */
    lc_sha256_state hash;
} transfer;

struct lc_http {
    void *multi;
    char *agent;
    transfer *transfer[TRANSFERS_MAX];
};

static bool append(bytes *b, const char *data, size_t n, size_t most) {
    if (n > most || b->count > most - n) return false;
    if (b->room - b->count <= n) {
        size_t room = (b->count + n) * 2 + 256;
        char *grown = lc_resize(b->data, room, 1);
        if (!grown) return false;
        b->data = grown;
        b->room = room;
    }
    memcpy(b->data + b->count, data, n);
    b->count += n;
    b->data[b->count] = 0;
    return true;
}

static size_t refuse(transfer *t, const char *format, const char *a, const char *b) {
    snprintf(t->error, sizeof t->error, format, a, b);
    t->failed = true;
    return 0;
}

/* One header line at a time, status lines among them; a new status line begins a new answer. */
static size_t on_header(char *data, size_t size, size_t n, void *ctx) {
    transfer *t = ctx;
    (void)size;
    if (n >= 5 && memcmp(data, "HTTP/", 5) == 0) t->head.count = 0;
    return append(&t->head, data, n, HEADERS_MAX) ? n : refuse(t, "the header is too long%s%s", "", "");
}

static const char *find_header(const transfer *t, const char *name, size_t *length) {
    size_t n = strlen(name);
    const char *line = t->head.data;
    while (line && *line) {
        const char *end = strchr(line, '\n');
        if (strncasecmp(line, name, n) == 0 && line[n] == ':') {
            const char *value = line + n + 1, *stop = end ? end : line + strlen(line);
            while (value < stop && isspace((unsigned char)*value)) value++;
            while (stop > value && isspace((unsigned char)stop[-1])) stop--;
            *length = (size_t)(stop - value);
            return value;
        }
        line = end ? end + 1 : NULL;
    }
    return NULL;
}

/* Where the body of an answer to a request for a file goes, known with its first byte: 206 continues the file, where it
 * names the place we asked for; 200 begins it anew; anything else is a message, kept in memory. */
static bool place_body(transfer *t) {
    size_t n = 0;
    t->whole_head = true;
    curl_easy_getinfo(t->easy, INFO_STATUS, &t->status);
    if (t->fd < 0 || (t->status != 200 && t->status != 206)) return true;
    const char *range = t->status == 206 ? find_header(t, "content-range", &n) : NULL;
    unsigned long long from = 0;
    if (t->status == 206 && (!range || sscanf(range, "bytes %llu-", &from) != 1 || from != t->at)) {
        refuse(t, "the server sent another part than was asked for%s%s", "", "");
        return false;
    }
    if (t->status == 200 && t->at > 0) {
        lc_sha256_begin(&t->hash);
        t->at = 0;
    }
    t->to_file = true;
    if (ftruncate(t->fd, (off_t)t->at) == 0 && lseek(t->fd, (off_t)t->at, SEEK_SET) >= 0) return true;
    refuse(t, "cannot write %s: %s", t->path, strerror(errno));
    return false;
}

static size_t on_body(char *data, size_t size, size_t n, void *ctx) {
    transfer *t = ctx;
    (void)size;
    if (!t->whole_head && !place_body(t)) return 0;
    if (!t->to_file) return append(&t->body, data, n, BODY_MAX) ? n : refuse(t, "the answer is too long%s%s", "", "");
    for (size_t done = 0; done < n;) {
        ssize_t wrote = write(t->fd, data + done, n - done);
        if (wrote < 0 && errno == EINTR) continue;
        if (wrote < 0) return refuse(t, "cannot write %s: %s", t->path, strerror(errno));
        lc_sha256_add(&t->hash, data + done, (size_t)wrote);
        t->at += (uint64_t)wrote;
        done += (size_t)wrote;
    }
    return n;
}

static void free_transfer(lc_http *h, transfer *t) {
    if (!t) return;
    if (t->easy) {
        if (!t->ended) curl_multi_remove_handle(h->multi, t->easy);
        curl_easy_cleanup(t->easy);
    }
    if (t->headers) curl_slist_free_all(t->headers);
    if (t->fd >= 0) close(t->fd);
    free(t->head.data);
    free(t->body.data);
    free(t->path);
    free(t);
}

/* Opens the file that grows, takes its lock, and hashes what is there of it. */
static lc_status open_target(transfer *t, const char *path) {
    struct stat st;
    t->path = lc_strdup(path);
    if (!t->path) return LC_ENOMEM;
    t->fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (t->fd < 0) return lc_fail(LC_EIO, "cannot write %s: %s", path, strerror(errno));
    if (flock(t->fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
        return lc_fail(LC_EIO, "cannot write %s: another process is writing it", path);
    if (fstat(t->fd, &st) != 0 || !S_ISREG(st.st_mode)) return lc_fail(LC_EIO, "cannot write %s: it is no file", path);
    lc_sha256_begin(&t->hash);
    LC_TRY(lc_sha256_add_file(&t->hash, t->fd, path, (uint64_t)st.st_size));
    t->at = (uint64_t)st.st_size;
    return LC_OK;
}

static lc_status add_headers(transfer *t, const char *lines) {
    char line[8192];
    while (lines && *lines) {
        size_t n = strcspn(lines, "\n");
        if (n >= sizeof line) return lc_fail(LC_EARG, "a header line of %d characters", (int)n);
        memcpy(line, lines, n);
        line[n] = 0;
        curl_list *longer = curl_slist_append(t->headers, line);
        if (!longer) return lc_fail(LC_ENOMEM, "no memory for a request");
        t->headers = longer;
        lines += n + (lines[n] == '\n');
    }
    return LC_OK;
}

static const char *ca_file(void) {
    static const char *const names[] = {"REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", NULL};
    for (int i = 0; names[i]; i++) {
        const char *path = getenv(names[i]);
        if (path && *path) return path;
    }
    return NULL;
}

static lc_status set_up(lc_http *h, transfer *t, const char *method, const char *url, const char *headers) {
    char range[64];
    t->easy = curl_easy_init();
    if (!t->easy) return lc_fail(LC_ENOMEM, "no memory for a request");
    LC_TRY(add_headers(t, headers));
    if (t->fd >= 0 && t->at > 0) {
        snprintf(range, sizeof range, "Range: bytes=%llu-", (unsigned long long)t->at);
        LC_TRY(add_headers(t, range));
    }
    curl_easy_setopt(t->easy, OPT_URL, url);
    curl_easy_setopt(t->easy, OPT_NOBODY, strcmp(method, "HEAD") == 0 ? 1L : 0L);
    curl_easy_setopt(t->easy, OPT_HTTPHEADER, t->headers);
    curl_easy_setopt(t->easy, OPT_USERAGENT, h->agent);
    curl_easy_setopt(t->easy, OPT_ERRORBUFFER, t->said);
    curl_easy_setopt(t->easy, OPT_PRIVATE, t);
    curl_easy_setopt(t->easy, OPT_WRITEFUNCTION, on_body);
    curl_easy_setopt(t->easy, OPT_WRITEDATA, t);
    curl_easy_setopt(t->easy, OPT_HEADERFUNCTION, on_header);
    curl_easy_setopt(t->easy, OPT_HEADERDATA, t);
    curl_easy_setopt(t->easy, OPT_NOSIGNAL, 1L);
    curl_easy_setopt(t->easy, OPT_CONNECTTIMEOUT, 10L);
    curl_easy_setopt(t->easy, OPT_LOW_SPEED_LIMIT, 1L); /* half a minute without a byte: the connection is dead */
    curl_easy_setopt(t->easy, OPT_LOW_SPEED_TIME, 30L);
    curl_easy_setopt(t->easy, OPT_BUFFERSIZE, 1L << 18);
    curl_easy_setopt(t->easy, OPT_PROTOCOLS, 3L);    /* http and https */
    curl_easy_setopt(t->easy, OPT_HTTP_VERSION, 2L); /* 1.1: a connection for each file is faster than one for all */
    if (ca_file()) curl_easy_setopt(t->easy, OPT_CAINFO, ca_file());
    return curl_multi_add_handle(h->multi, t->easy) == 0 ? LC_OK : lc_fail(LC_EIO, "libcurl refused a request");
}

/* ---- the interface
 * --------------------------------------------------------------------------------------------------- */

int lc_http_open(lc_http **out, const char *agent) {
    if (!out || !agent) return lc_fail(LC_EARG, "lc_http_open: expected a name for this program");
    *out = NULL;
    LC_TRY(open_curl());
    lc_http *h = lc_alloc(1, sizeof *h);
    if (!h) return LC_ENOMEM;
    h->agent = lc_strdup(agent);
    h->multi = h->agent ? curl_multi_init() : NULL;
    if (!h->multi) {
        free(h->agent);
        free(h);
        return lc_fail(LC_ENOMEM, "no memory for an HTTP client");
    }
    *out = h;
    return LC_OK;
}

void lc_http_close(lc_http *h) {
    if (!h) return;
    for (int i = 0; i < TRANSFERS_MAX; i++) free_transfer(h, h->transfer[i]);
    curl_multi_cleanup(h->multi);
    free(h->agent);
    free(h);
}

int lc_http_start(lc_http *h, int32_t *id, const char *method, const char *url, const char *headers, const char *path) {
    if (!h || !id || !method || !url) return lc_fail(LC_EARG, "lc_http_start: expected a client, a method and a URL");
    int at = 0;
    while (at < TRANSFERS_MAX && h->transfer[at]) at++;
    if (at == TRANSFERS_MAX) return lc_fail(LC_EARG, "more than %d transfers at once", TRANSFERS_MAX);
    transfer *t = lc_alloc(1, sizeof *t);
    if (!t) return LC_ENOMEM;
    t->fd = -1;
    lc_status status = path ? open_target(t, path) : LC_OK;
    if (status == LC_OK) status = set_up(h, t, method, url, headers);
    if (status != LC_OK) {
        t->ended = true; /* not added, or refused */
        free_transfer(h, t);
        return status;
    }
    h->transfer[at] = t;
    *id = at;
    return LC_OK;
}

static void take_ended(lc_http *h) {
    int left;
    for (curl_message *m; (m = curl_multi_info_read(h->multi, &left));) {
        transfer *t = NULL;
        int result = m->data.result;
        if (m->kind != 1) continue;
        curl_easy_getinfo(m->easy, INFO_PRIVATE, &t);
        if (!t->whole_head && result == 0) place_body(t); /* an answer without a body */
        curl_easy_getinfo(t->easy, INFO_STATUS, &t->status);
        if (result != 0 && !t->failed)
            snprintf(t->error, sizeof t->error, "%s", t->said[0] ? t->said : curl_easy_strerror(result));
        curl_multi_remove_handle(h->multi, t->easy);
        t->ended = true;
    }
}

int lc_http_wait(lc_http *h, double seconds, int32_t *id) {
    if (!h || !id || !(seconds >= 0)) return lc_fail(LC_EARG, "lc_http_wait: expected a client and a time");
    *id = -1;
    for (int turn = 0; turn < 2; turn++) {
        int running;
        if (lc_interrupt) return lc_fail(LC_EINTR, "interrupted");
        curl_multi_perform(h->multi, &running);
        take_ended(h);
        for (int i = 0; i < TRANSFERS_MAX; i++) {
            transfer *t = h->transfer[i];
            if (!t || !t->ended || t->reported) continue;
            t->reported = true;
            *id = i;
            return LC_OK;
        }
        if (turn == 0) curl_multi_poll(h->multi, NULL, 0, (int)(seconds * 1000), NULL);
    }
    return LC_OK;
}

static transfer *want(const lc_http *h, int32_t id) {
    return h && id >= 0 && id < TRANSFERS_MAX ? h->transfer[id] : NULL;
}

int lc_http_status(const lc_http *h, int32_t id) {
    const transfer *t = want(h, id);
    return t ? (int)t->status : 0;
}

const char *lc_http_error(const lc_http *h, int32_t id) {
    const transfer *t = want(h, id);
    return t ? t->error : "no such transfer";
}

const char *lc_http_header(const lc_http *h, int32_t id, const char *name, int32_t *length) {
    const transfer *t = want(h, id);
    size_t n = 0;
    const char *value = t && name && t->head.data ? find_header(t, name, &n) : NULL;
    if (length) *length = (int32_t)n;
    return value;
}

const char *lc_http_redirect(const lc_http *h, int32_t id) {
    const transfer *t = want(h, id);
    const char *url = NULL;
    if (t) curl_easy_getinfo(t->easy, INFO_REDIRECT, &url);
    return url;
}

const char *lc_http_body(const lc_http *h, int32_t id, double *length) {
    const transfer *t = want(h, id);
    if (length) *length = t ? (double)t->body.count : 0;
    return t && t->body.data ? t->body.data : "";
}

double lc_http_bytes(const lc_http *h, int32_t id) {
    const transfer *t = want(h, id);
    return t ? (double)t->at : 0;
}

int lc_http_sync(lc_http *h, int32_t id, char *hex65) {
    transfer *t = want(h, id);
    if (!t || t->fd < 0 || !hex65) return lc_fail(LC_EARG, "lc_http_sync: expected a transfer into a file");
    lc_sha256_state s = t->hash;
    lc_sha256_end(&s, hex65);
    return fsync(t->fd) == 0 ? LC_OK : lc_fail(LC_EIO, "cannot write %s: %s", t->path, strerror(errno));
}

void lc_http_end(lc_http *h, int32_t id) {
    if (!want(h, id)) return;
    free_transfer(h, h->transfer[id]);
    h->transfer[id] = NULL;
}
