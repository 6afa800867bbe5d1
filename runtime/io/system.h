/* system.h: whole-file helpers for C: the atomic writer that lc_write_file and the safetensors writer share. */
#ifndef LC_SYSTEM_H
#define LC_SYSTEM_H

#include "../core/base.h"

/* A file being written aside. Nothing at `path` changes before lc_aside_commit has synced and renamed it. */
typedef struct lc_aside {
    char *path, *temp; /* temp NULL: path is a device or a pipe, written directly */
    int fd;
} lc_aside;

lc_status lc_aside_begin(lc_aside *a, const char *path);
lc_status lc_aside_write(lc_aside *a, const void *data, size_t bytes);
lc_status lc_aside_commit(lc_aside *a);
void lc_aside_abandon(lc_aside *a); /* removes what was written; does nothing after a commit */

#endif
