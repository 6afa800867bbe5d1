/* fuzz_gguf.c: the GGUF reader must take any bytes: a file whose every tensor and metadata value can be read, or an
 * error. */
#include "fuzz_file.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const uint8_t magic[8] = {'G', 'G', 'U', 'F', size % 4 == 1 ? 1 : 3}; /* version 1 counts otherwise */
    return fuzz_file(magic, data, size);
}
