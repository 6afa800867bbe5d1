/* base.c: the thread's last error, status names, checked allocation. */
#include "base.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "core.h"

volatile int lc_interrupt = 0;

enum { MESSAGE_SIZE = 4096 };
static _Thread_local char message[MESSAGE_SIZE];

const char *lc_error_message(void) { return message; }

#ifndef LC_VERSION
#define LC_VERSION "unknown"
#endif
const char *lc_version(void) { return LC_VERSION; }

const char *lc_status_name(int status) {
    static const char *const names[] = {"OK", "EARG", "ESHAPE", "EDTYPE", "EDEVICE", "ENOMEM", "EIO", "EPARSE",
                                        "EGRAD", "EINTR", "ENONFINITE", "ENOKERNEL", "ESTALE", "EBUG"};
    return status >= 0 && status <= LC_EBUG ? names[status] : "EUNKNOWN";
}

/* vsnprintf with %T for tensors: the format is cut at each %T, the pieces are printed in turn. va_copy per piece would lose the
 * place in the list, so tensors must come before any other argument of their piece; lc_fail's callers keep to that: all %T
 * arguments are fetched in order as the scan meets them. */
static void format_message(char *out, size_t size, const char *format, va_list list) {
    size_t at = 0;
    const char *p = format;
    while (*p && at + 1 < size) {
        if (p[0] != '%') {
            out[at++] = *p++;
        } else if (p[1] == '%') {
            out[at++] = '%';
            p += 2;
        } else if (p[1] == 'T') {
            lc_tensor_describe(va_arg(list, const lc_tensor *), out + at, size - at);
            at += strlen(out + at);
            p += 2;
        } else { /* one conversion: copy its spec, print it with the argument of the right type */
            char spec[32];
            size_t n = 0;
            int longs = 0, stars = 0;
            spec[n++] = *p++;
            while (*p && !strchr("diouxXcsfgeGEp", *p) && n < sizeof spec - 2) {
                if (*p == 'l' || *p == 'j') longs++;
                if (*p == 'z' || *p == 't') longs = 1;
                if (*p == '*') stars++;
                spec[n++] = *p++;
            }
            char kind = *p ? *p++ : 's';
            spec[n++] = kind;
            spec[n] = 0;
            int star = stars ? va_arg(list, int) : 0;
            int w = 0;
#define PRINT(type) (stars ? snprintf(out + at, size - at, spec, star, va_arg(list, type)) \
                           : snprintf(out + at, size - at, spec, va_arg(list, type)))
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
            if (strchr("diouxX", kind)) w = longs ? PRINT(long) : PRINT(int);
            else if (kind == 'c') w = PRINT(int);
            else if (kind == 's') w = PRINT(const char *);
            else if (kind == 'p') w = PRINT(void *);
            else w = PRINT(double);
#pragma GCC diagnostic pop
#undef PRINT
            if (w > 0) at += (size_t)w;
            if (at >= size) at = size - 1;
        }
    }
    out[at < size ? at : size - 1] = 0;
}

lc_status lc_fail(lc_status code, const char *format, ...) {
    char text[MESSAGE_SIZE]; /* an argument may be the old message */
    va_list list;
    va_start(list, format);
    format_message(text, sizeof text, format, list);
    va_end(list);
    memcpy(message, text, sizeof text);
    return code;
}

lc_status lc_fail_in(lc_status code, const char *format, ...) {
    char text[MESSAGE_SIZE];
    va_list list;
    va_start(list, format);
    int n = vsnprintf(text, sizeof text, format, list);
    va_end(list);
    if (n < 0) n = 0;
    if (n >= MESSAGE_SIZE) n = MESSAGE_SIZE - 1;
    snprintf(text + n, sizeof text - (size_t)n, "%s", message);
    memcpy(message, text, sizeof text);
    return code;
}

void *lc_alloc(size_t n, size_t size) {
    void *p = calloc(n ? n : 1, size ? size : 1);
    if (!p) lc_fail(LC_ENOMEM, "out of memory: %zu x %zu bytes", n, size);
    return p;
}

void *lc_resize(void *p, size_t n, size_t size) {
    size_t bytes;
    void *q = __builtin_mul_overflow(n, size, &bytes) ? NULL : realloc(p, bytes ? bytes : 1);
    if (!q) lc_fail(LC_ENOMEM, "out of memory: %zu x %zu bytes", n, size);
    return q;
}

char *lc_strdup(const char *s) {
    size_t n = strlen(s) + 1;
    char *p = lc_alloc(n, 1);
    if (p) memcpy(p, s, n);
    return p;
}

double lc_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

double lc_peak_rss(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return 1024.0 * (double)u.ru_maxrss;
}
