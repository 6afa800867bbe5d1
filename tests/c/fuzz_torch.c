/* fuzz_torch.c: the readers of torch.save's files must take any bytes. The first byte says how the rest is taken: as a file, or as
 * what follows the head of a legacy file (object, list of storages, storages), which no checksum guards. */
#include "fuzz_file.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const uint8_t head[] = "\x80\x02\x8a\x0al\xfc\x9c\x46\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}X\x0d\0\0\0little_endian\x88s.";
    size_t n = sizeof head - 1;
    if (size == 0) return 0;
    if (data[0] != 'L') return fuzz_bytes(data + 1, size - 1);
    uint8_t *whole = malloc(n + size);
    if (!whole) return 0;
    memcpy(whole, head, n);
    memcpy(whole + n, data + 1, size - 1);
    fuzz_bytes(whole, n + size - 1);
    free(whole);
    return 0;
}
