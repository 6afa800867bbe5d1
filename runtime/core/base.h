/* base.h: status codes with a message, and checked allocation. Everything in runtime/ may include it; it includes nothing
 * of ours but the public header. A function that can fail returns an lc_status; the message stands in thread-local storage
 * (lc_error_message) until the next failure on that thread. Nothing here, or anywhere in runtime/, aborts on bad input. */
#ifndef LC_BASE_H
#define LC_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../lolcats.h"

/* Records a message and returns `code`. printf format; besides, %T takes a const lc_tensor * (dtype, shape, device, name). */
lc_status lc_fail(lc_status code, const char *format, ...);

/* Puts context in front of the message that lc_fail left: "model.gguf: " + what was said. Returns `code` unchanged. */
lc_status lc_fail_in(lc_status code, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* malloc family that fails with LC_ENOMEM and a message naming the size; a NULL result means the status is set.
 * lc_alloc returns zeroed memory. Overflow of n * size is an error, not a small allocation. */
void *lc_alloc(size_t n, size_t size);
void *lc_resize(void *p, size_t n, size_t size);
char *lc_strdup(const char *s);

/* `return` on failure, keeping status and message. */
#define LC_TRY(call)                        \
    do {                                    \
        lc_status lc_try_ = (call);         \
        if (lc_try_ != LC_OK) return lc_try_; \
    } while (0)

#endif
