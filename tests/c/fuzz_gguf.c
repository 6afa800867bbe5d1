/* fuzz_gguf.c: the GGUF reader must take any bytes: a file whose every tensor and metadata value can be read, or an
 * error. */
#include "fuzz_file.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const uint8_t magic[8] = {'G', 'G', 'U', 'F', 3};
    return fuzz_file(magic, data, size);
}
