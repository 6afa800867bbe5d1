/* pickle_globals.c: the whole list of what a pickle may name: torch's dtypes and storages, what rebuilds tensors and
 * parameters, OrderedDict, and the records of torch's distributed checkpoints. */
#include <string.h>

#include "pickle.h"
#include "quant.h"

static const lc_torch_dtype dtypes[] = {
    {"float32", "FloatStorage", LC_F32, 4},
    {"float64", "DoubleStorage", LC_F64, 8},
    {"float16", "HalfStorage", LC_F16, 2},
    {"bfloat16", "BFloat16Storage", LC_BF16, 2},
    {"int64", "LongStorage", LC_I64, 8},
    {"int32", "IntStorage", LC_I32, 4},
    {"int16", "ShortStorage", LC_STORE_I16, 2},
    {"int8", "CharStorage", LC_STORE_I8, 1},
    {"uint8", "ByteStorage", LC_U8, 1},
    {"bool", "BoolStorage", LC_U8, 1},
    {"uint16", NULL, LC_STORE_U16, 2},
    {"uint32", NULL, LC_STORE_U32, 4},
    {"uint64", NULL, LC_STORE_U64, 8},
    {"complex64", "ComplexFloatStorage", LC_STORE_UNKNOWN, 8},
    {"complex128", "ComplexDoubleStorage", LC_STORE_UNKNOWN, 16},
    {"complex32", NULL, LC_STORE_UNKNOWN, 4},
    {"float8_e4m3fn", NULL, LC_STORE_UNKNOWN, 1},
    {"float8_e5m2", NULL, LC_STORE_UNKNOWN, 1},
    {"float8_e4m3fnuz", NULL, LC_STORE_UNKNOWN, 1},
    {"float8_e5m2fnuz", NULL, LC_STORE_UNKNOWN, 1},
    {"float8_e8m0fnu", NULL, LC_STORE_UNKNOWN, 1},
};

#define DCP   "torch.distributed.checkpoint.metadata"
#define SHARD "torch.distributed._shard.sharded_tensor.metadata" /* before PyTorch 2.3 */

static const lc_pickle_global globals[] = {
    {"collections", "OrderedDict", LC_PR_ORDERED_DICT},
    {"torch._utils", "_rebuild_tensor", LC_PR_TENSOR},
    {"torch._utils", "_rebuild_tensor_v2", LC_PR_TENSOR},
    {"torch._utils", "_rebuild_tensor_v3", LC_PR_TENSOR_V3},
    {"torch._utils", "_rebuild_parameter", LC_PR_PARAMETER},
    {"torch._utils", "_rebuild_parameter_with_state", LC_PR_PARAMETER},
    {"torch._tensor", "_rebuild_from_type_v2", LC_PR_TYPED},
    {"torch", "Tensor", LC_PR_CLASS},
    {"torch.nn.parameter", "Parameter", LC_PR_CLASS},
    {"torch.nn.parameter", "Buffer", LC_PR_CLASS},
    {"torch", "Size", LC_PR_SIZE},
    {"torch", "device", LC_PR_TEXT},
    {"torch.storage", "UntypedStorage", LC_PR_UNTYPED},
    {"torch", "UntypedStorage", LC_PR_UNTYPED},
    {"torch.serialization", "_get_layout", LC_PR_TEXT},
    {"_codecs", "encode", LC_PR_ENCODE},
    {"pathlib", "PosixPath", LC_PR_PATH, true},
    {"pathlib._local", "PosixPath", LC_PR_PATH, true},
    {"pathlib", "WindowsPath", LC_PR_PATH, true},
    {"pathlib._local", "WindowsPath", LC_PR_PATH, true},
    {DCP, "_MEM_FORMAT_ENCODING", LC_PR_IGNORED, true},
    {DCP, "Metadata", LC_PR_RECORD, true},
    {DCP, "MetadataIndex", LC_PR_RECORD, true},
    {DCP, "TensorStorageMetadata", LC_PR_RECORD, true},
    {DCP, "BytesStorageMetadata", LC_PR_RECORD, true},
    {DCP, "ChunkStorageMetadata", LC_PR_RECORD, true},
    {DCP, "TensorProperties", LC_PR_RECORD, true},
    {DCP, "StorageMeta", LC_PR_RECORD, true},
    {SHARD, "TensorProperties", LC_PR_RECORD, true},
    {SHARD, "MEM_FORMAT_ENCODING", LC_PR_IGNORED, true},
    {"torch.distributed.checkpoint.filesystem", "_StorageInfo", LC_PR_RECORD, true},
};

static bool same(const char *known, const uint8_t *s, size_t n) {
    return strlen(known) == n && memcmp(known, s, n) == 0;
}

static bool find_torch(const uint8_t *module, size_t module_bytes, const uint8_t *name, size_t n,
                       lc_pickle_global *out) {
    bool torch = same("torch", module, module_bytes), cuda = same("torch.cuda", module, module_bytes);
    for (size_t i = 0; (torch || cuda) && i < sizeof dtypes / sizeof *dtypes; i++) {
        const lc_torch_dtype *d = &dtypes[i];
        if (torch && same(d->name, name, n)) {
            *out = (lc_pickle_global){"torch", d->name, LC_PR_DTYPE, false, d};
            return true;
        }
        if (d->storage && same(d->storage, name, n)) {
            *out = (lc_pickle_global){"torch", d->storage, LC_PR_STORAGE, false, d};
            return true;
        }
    }
    return false;
}

bool lc_pickle_find_global(const uint8_t *module, size_t module_bytes, const uint8_t *name, size_t name_bytes,
                           lc_pickle_global *out) {
    if (find_torch(module, module_bytes, name, name_bytes, out)) return true;
    for (size_t i = 0; i < sizeof globals / sizeof *globals; i++)
        if (same(globals[i].module, module, module_bytes) && same(globals[i].name, name, name_bytes)) {
            *out = globals[i];
            return true;
        }
    return false;
}

const lc_torch_dtype *lc_torch_dtype_of_store(int store) {
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        if (dtypes[i].store == store && store != LC_STORE_UNKNOWN) return &dtypes[i];
    return NULL;
}

const lc_torch_dtype *lc_torch_dtype_named(const char *name, size_t length) {
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        if (same(dtypes[i].name, (const uint8_t *)name, length)) return &dtypes[i];
    return NULL;
}
