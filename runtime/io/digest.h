/* digest.h: SHA-256 of bytes that come in pieces, for what downloads and hashes whole files. */
#ifndef LC_DIGEST_H
#define LC_DIGEST_H

#include "../core/base.h"

typedef struct lc_sha256_state {
    uint32_t h[8];
    uint64_t bytes; /* taken so far */
    uint8_t block[64];
} lc_sha256_state;

void lc_sha256_begin(lc_sha256_state *s);
void lc_sha256_add(lc_sha256_state *s, const void *data, size_t bytes);
void lc_sha256_end(lc_sha256_state *s, char *hex65); /* 64 digits and a NUL */

/* Adds `bytes` bytes of an open file from its place on. LC_EIO when the file ends before, LC_EINTR on Ctrl-C. */
lc_status lc_sha256_add_file(lc_sha256_state *s, int fd, const char *path, uint64_t bytes);

#endif
