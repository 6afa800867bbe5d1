/* zip.h: the directory of a zip archive in memory whose entries are stored as they are (as torch.save writes them).
 * Nothing is unpacked and nothing is allocated but the list, so there is no bomb to fear: an entry is a range of the
 * file. */
#ifndef LC_ZIP_H
#define LC_ZIP_H

#include "../core/base.h"

typedef struct lc_zip_entry {
    const char *name; /* in the archive, not ended by NUL */
    uint32_t name_bytes, crc;
    uint64_t offset, bytes; /* of the data */
} lc_zip_entry;

typedef struct lc_zip {
    const uint8_t *data;
    size_t size;
    lc_zip_entry *entry; /* sorted by name */
    int count;
} lc_zip;

/* Follows APPNOTE 6.3 with zip64; refuses compressed and encrypted entries, several disks, names that leave the
 * archive's folder or occur twice, entries that overlap. On failure there is nothing to free. */
lc_status lc_zip_open(lc_zip *z, const uint8_t *data, size_t bytes);
void lc_zip_close(lc_zip *z);
const lc_zip_entry *lc_zip_find(const lc_zip *z, const char *name, size_t bytes); /* NULL when there is none */

#endif
