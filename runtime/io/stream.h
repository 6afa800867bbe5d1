/* stream.h: bytes of a file from its beginning to its end, unpacked on the way where they are gzip or Zstandard, in a
 * memory that does not grow with the file. */
#ifndef LC_STREAM_H
#define LC_STREAM_H

#include "../core/base.h"

typedef struct lc_stream lc_stream;

/* By content: gzip (RFC 1952, any number of members), Zstandard (through libzstd, opened at run time), or as it is. */
lc_status lc_stream_open(const char *path, lc_stream **out);
lc_status lc_stream_open_memory(const void *data, size_t bytes, const char *name, lc_stream **out); /* data outlives it */
/* Up to `room` bytes; *got 0: the end. Damaged or cut data are LC_EPARSE with the offset in the file. */
lc_status lc_stream_read(lc_stream *s, void *into, size_t room, size_t *got);
const char *lc_stream_name(const lc_stream *s);
void lc_stream_close(lc_stream *s);

#endif
