/* lolcats.h: the public C interface, and the text that Lua reads.
 *
 * What stands between the two ffi marks is both compiled and handed to LuaJIT's parser at start-up, so it keeps to the C that
 * both read: no macros, no struct by value, no function pointers, no 64-bit integer results, at most 8 parameters. Structs are
 * opaque but for two: lc_handle, Lua's name for a tensor, and lc_args, the record of one op call.
 *
 * Conventions. A function returns a status; LC_OK is 0; on anything else lc_error_message() says what, with shapes. Counts and
 * byte sizes are double, dims int32_t. A function that hands out a handle gives the caller one reference, to be dropped by
 * lc_drop, or by the end of the scope in which it was made; one that takes a handle borrows it. Dims count from 0 here (Lua's
 * binder converts), and so do integers inside tensors. One thread at a time. */
#ifndef LOLCATS_H
#define LOLCATS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/*<ffi>*/

/* ---- status ---------------------------------------------------------------------------------------------------------- */
typedef enum lc_status {
    LC_OK, LC_EARG, LC_ESHAPE, LC_EDTYPE, LC_EDEVICE, LC_ENOMEM, LC_EIO, LC_EPARSE,
    LC_EGRAD, LC_EINTR, LC_ENONFINITE, LC_ENOKERNEL, LC_ESTALE, LC_EBUG
} lc_status;

const char *lc_error_message(void);
const char *lc_status_name(int status);
const char *lc_version(void);
extern volatile int lc_interrupt; /* set by SIGINT; every op call returns LC_EINTR while it is not 0 */

/* ---- tensors --------------------------------------------------------------------------------------------------------- */
typedef enum lc_dtype {
    LC_F32, LC_BF16, LC_F16, LC_F64, LC_I32, LC_I64, LC_U8,
    LC_Q4_0, LC_Q4_1, LC_Q5_0, LC_Q5_1, LC_Q8_0, LC_Q2_K, LC_Q3_K, LC_Q4_K, LC_Q5_K, LC_Q6_K, LC_IQ4_NL,
    LC_DTYPE_COUNT
} lc_dtype;

enum { LC_MAX_DIMS = 6, LC_MAX_IN = 16, LC_MAX_OUT = 12, LC_MAX_F = 12, LC_MAX_I = 24 };

/* Names a tensor by slot and generation; generation 0 names none. A stale handle (its scope ended, or dropped) is LC_ESTALE. */
typedef struct lc_handle { uint32_t _slot, _gen; } lc_handle;

/* One op call: what the row's signature lists, in its order, in the array of its kind. */
typedef struct lc_args {
    lc_handle x[16];   /* input tensors; generation 0 = absent */
    lc_handle y[12];   /* results, filled by lc_call */
    lc_handle *list;   /* the one tensor list that a row may have */
    int32_t n_list;
    int32_t n_y;       /* results filled */
    double f[12];      /* real scalars */
    int32_t i[24];     /* integers, booleans, dims; a shape as its length, then its dims */
    const char *s;     /* the one string that a row may have */
} lc_args;

int lc_new(lc_handle *out, int dtype, int device, int ndim, const int32_t *dims);    /* zeroed */
int lc_from_host(lc_handle *out, int dtype, int device, int ndim, const int32_t *dims, const void *data);
int lc_to_host(const lc_handle *t, void *data, double bytes); /* row-major; bytes must be the tensor's */
int lc_item(const lc_handle *t, double *out);                 /* the value of a tensor of one element */
int lc_ndim(const lc_handle *t);                              /* -1 when stale, as the next four */
int32_t lc_dim(const lc_handle *t, int dim);
double lc_stride(const lc_handle *t, int dim);
int lc_dtype_of(const lc_handle *t);
int lc_device_of(const lc_handle *t);
double lc_numel(const lc_handle *t);
double lc_storage_bytes(const lc_handle *t);
void *lc_data(const lc_handle *t);   /* host address of the first element; NULL unless the device is the CPU */
int lc_is_contiguous(const lc_handle *t);
double lc_storage_id(const lc_handle *t); /* equal for views of one storage */
int lc_set_name(const lc_handle *t, const char *name);
const char *lc_name(const lc_handle *t); /* "" when it has none */
int lc_alive(const lc_handle *t);
int lc_alias(lc_handle *out, const lc_handle *t);  /* a new handle for the same data, cut from the tape */
int lc_set_data(const lc_handle *t, const lc_handle *from); /* t becomes a view of from's storage: same shape, dtype */
void lc_drop(lc_handle *t);
double lc_dtype_bytes(int dtype, double n); /* bytes of n elements, whole blocks */
const char *lc_dtype_name(int dtype);
int lc_dtype_id(const char *name);          /* -1 when unknown; takes "float32", "f32", "bfloat16", ... */
int lc_map_file(lc_handle *out, const char *path, double offset, int dtype, int ndim, const int32_t *dims); /* read-only mmap */

/* ---- scopes and memory ----------------------------------------------------------------------------------------------- */
int lc_scope_push(void);             /* depth after */
int lc_scope_pop(void);              /* drops what was made since the push and not promoted */
int lc_scope_depth(void);
int lc_promote(const lc_handle *t, int levels); /* moves the handle up; at depth 0 the caller owns it */
int lc_scope_of(const lc_handle *t); /* depth at which the handle will be dropped; 0 = by its owner */
double lc_memory(int device, const char *what);  /* "live" "cached" "peak" "limit" "rise", bytes; -1 for an unknown word */
int lc_memory_reset_peak(int device);
int lc_memory_mark(int device);                  /* from here "rise" counts: the most in use since, above what was in use then */
int lc_memory_limit(int device, double bytes);   /* allocation past it fails with LC_ENOMEM; 0 = none */
int lc_trim(int device);                         /* gives cached blocks back to the system */
extern double lc_debt;                           /* bytes allocated outside scopes since the caller last set it to 0 */
double lc_peak_rss(void);                        /* of the process, bytes */

/* ---- ops ------------------------------------------------------------------------------------------------------------- */
int lc_op_count(void);
const char *lc_op_name(int op);
const char *lc_op_signature(int op);
const char *lc_op_doc(int op);
int lc_op_has(int op, const char *flag); /* "point" "binary" "compare" "view" "inplace" "nograd" "nondiff" "random" "mixed" "internal" */
int lc_op_find(const char *name);        /* -1 when there is none */
int lc_op_has_kernel(int op, int device);
int lc_op_arity(int op, const char *kind); /* "T": tensors in, "out": results, "list", "f", "i", "s" */
int lc_call(int op, lc_args *args);

/* ---- devices --------------------------------------------------------------------------------------------------------- */
int lc_device_count(void);                 /* 1 = the CPU alone */
const char *lc_device_name(int device);    /* "cpu", "cuda:0", "mock:0" */
const char *lc_device_describe(int device);
int lc_device_find(const char *name);      /* loads the plugin at first mention; -1 with a message */
int lc_device_sync(int device);
int lc_load_plugin(const char *path);
typedef struct lc_graph lc_graph;
void lc_graph_room(double bytes);          /* what the next recording takes at once for its larger blocks; 0, as it is: nothing */
int lc_graph_begin(int device);            /* its kernels are recorded, not run; LC_ENOKERNEL: it records none */
int lc_graph_end(lc_graph **out);          /* NULL: forgets what was recorded */
int lc_graph_run(lc_graph *g);             /* all of it once more, on the memory that it was recorded with */
void lc_graph_free(lc_graph *g);
const char *lc_plugin_why(const char *kind); /* why the plugin of that kind is not in use; "" when it is */
int lc_threads(int n);                     /* sets the number of CPU threads (0: only ask); returns it */
const char *lc_cpu_isa(const char *force); /* "generic" "avx2" "avx512" "avx512bf16"; NULL: only ask */
const char *lc_cpu_gemm(const char *force); /* "onednn" "own"; NULL: only ask */
const char *lc_cpu_gemm_why(void);         /* where oneDNN was found, or why not */
int lc_set_option(const char *name, int value); /* switches of plain twins: "plain_attention", "plain_linear", ... */
int lc_get_option(const char *name);            /* -1 when unknown */

/* ---- autograd -------------------------------------------------------------------------------------------------------- */
int lc_grad_mode(int on);                  /* -1: only ask; returns the old value */
int lc_require_grad(const lc_handle *t, int on);
int lc_requires_grad(const lc_handle *t);
int lc_grad(lc_handle *out, const lc_handle *t);        /* generation 0 when there is none */
int lc_set_grad(const lc_handle *t, const lc_handle *g); /* NULL drops it */
int lc_detach(lc_handle *out, const lc_handle *t);
typedef struct lc_backward lc_backward;
int lc_backward_begin(lc_backward **out, const lc_handle *loss, const lc_handle *gradient);
int lc_backward_next(lc_backward *b, int32_t *lua_node); /* runs; *lua_node = 0: done, else the id of a node that Lua runs */
int lc_backward_grad(lc_backward *b, int i, lc_handle *out);        /* gradient of the waiting node's result i, or none */
int lc_backward_needs(lc_backward *b, int i);                       /* is the gradient of its input i wanted? */
int lc_backward_give(lc_backward *b, int i, const lc_handle *gradient); /* for its input i */
void lc_backward_free(lc_backward *b);
/* A node that Lua runs backward: `id` > 0 comes back from lc_backward_next. Results are given new history in place. */
int lc_lua_node(int32_t id, int n_in, const lc_handle *in, int n_out, const lc_handle *out);
int lc_lua_node_dead(int32_t *id); /* pulls the id of a Lua node whose graph was freed; 0 when there is none */

/* ---- random numbers -------------------------------------------------------------------------------------------------- */
int lc_seed(double seed);                      /* 0 .. 2^53 */
int lc_rng_get(double *seed, double *offset);
int lc_rng_set(double seed, double offset);

/* ---- diagnosis ------------------------------------------------------------------------------------------------------- */
int lc_check_finite(int on);                   /* every op's results are looked at; the first bad one is LC_ENONFINITE */
int lc_profile(int on);                        /* times every op; 1 starts afresh */
const char *lc_profile_report(void);           /* one line an op: name, calls, seconds, hidden copies */
double lc_now(void);                           /* monotonic seconds */

/* ---- documents: JSON and YAML ---------------------------------------------------------------------------------------- */
typedef struct lc_doc lc_doc;
int lc_doc_parse(lc_doc **out, const char *format, const char *name, const char *text, double length); /* "json" | "yaml" */
void lc_doc_free(lc_doc *d);
int lc_doc_kind(const lc_doc *d, int32_t node);   /* 0 null 1 bool 2 number 3 string 4 array 5 object; node 0 is the root */
int32_t lc_doc_first(const lc_doc *d, int32_t node);
int32_t lc_doc_next(const lc_doc *d, int32_t node);
int32_t lc_doc_size(const lc_doc *d, int32_t node);
double lc_doc_number(const lc_doc *d, int32_t node);
int lc_doc_is_integer(const lc_doc *d, int32_t node); /* a number written without fraction or exponent */
const char *lc_doc_string(const lc_doc *d, int32_t node, int32_t *length);
const char *lc_doc_key(const lc_doc *d, int32_t node, int32_t *length);

/* ---- files of tensors: safetensors, GGUF, PyTorch ---------------------------------------------------------------------- */
typedef struct lc_file lc_file;
int lc_file_open(lc_file **out, const char *path);   /* by content; mapped read-only; every offset is checked here */
void lc_file_close(lc_file *f);                      /* tensors made from it keep the mapping alive */
const char *lc_file_format(const lc_file *f);        /* "safetensors" | "gguf" | "torch" */
int lc_file_count(const lc_file *f);
const char *lc_file_tensor_name(const lc_file *f, int i);
int lc_file_find(const lc_file *f, const char *name); /* -1 when there is none */
int lc_file_dtype(const lc_file *f, int i);
const char *lc_file_dtype_name(const lc_file *f, int i); /* as the file spells it */
int lc_file_ndim(const lc_file *f, int i);
int32_t lc_file_dim(const lc_file *f, int i, int dim);   /* row-major order, slowest first, also for GGUF */
double lc_file_offset(const lc_file *f, int i);
double lc_file_bytes(const lc_file *f, int i);
int lc_file_tensor(const lc_file *f, int i, lc_handle *out); /* a view of the mapping, in the file's dtype */
int lc_file_read(const lc_file *f, int i, int dtype, const lc_handle *into); /* converts into an existing CPU tensor's storage */
const lc_doc *lc_file_extra(const lc_file *f);       /* PyTorch: an object of what is no tensor, the file's own; NULL: none */
int lc_file_described(const lc_file *f);             /* PyTorch: its metadata is that of a safetensors file it was made from */
int lc_file_meta_count(const lc_file *f);
const char *lc_file_meta_key(const lc_file *f, int i);
int lc_file_meta_kind(const lc_file *f, int i);      /* as lc_doc_kind; arrays are 4 */
int lc_file_meta_find(const lc_file *f, const char *key);
double lc_file_meta_number(const lc_file *f, int i, int32_t element); /* element -1: the value itself */
const char *lc_file_meta_string(const lc_file *f, int i, int32_t element, int32_t *length);
int32_t lc_file_meta_size(const lc_file *f, int i);  /* elements of an array */

/* Writes aside, syncs, renames. The header is built from n names and tensors (CPU or device) and `metadata`, a JSON object
 * of strings or NULL. */
int lc_safetensors_save(const char *path, int n, const char *const *names, const lc_handle *tensors, const char *metadata);

/* A file of tensors in the making; format "safetensors" | "torch" | "gguf". What is added is borrowed until lc_writer_finish, which
 * writes aside, syncs, renames. lc_writer_free comes after it in any case. */
typedef struct lc_writer lc_writer;
int lc_writer_open(lc_writer **out, const char *path, const char *format);
int lc_writer_tensor(lc_writer *w, const char *name, const lc_handle *tensor);
int lc_writer_stored(lc_writer *w, const char *name, const lc_file *f, int i, int dtype); /* dtype -1: as it is stored */
int lc_writer_describe(lc_writer *w, const char *key, const char *text, double length);   /* safetensors' __metadata__; NULL: an empty one */
/* A plain value beside the tensors. kind: torch: as lc_doc_kind (-1: a float); gguf: its value type, 9 an array of what follows. */
int lc_writer_value(lc_writer *w, const char *key, int kind, double number, const char *text, double length);
int lc_writer_element(lc_writer *w, int kind, double number, const char *text, double length);
int lc_writer_copy_value(lc_writer *w, const lc_file *f, int i);  /* a metadata value of a GGUF */
int lc_writer_wrap(lc_writer *w, const char *key);                /* torch: the dict of tensors stands under this key */
int lc_writer_finish(lc_writer *w);
void lc_writer_free(lc_writer *w);

/* Whole-file helpers. lc_write_file writes aside, syncs, renames. lc_read_file: caller frees with lc_free. */
int lc_write_file(const char *path, const char *data, double length);
int lc_read_file(const char *path, char **data, double *length);
void lc_free(void *p);
int lc_path_kind(const char *path);                  /* 0 nothing, 1 file, 2 folder, 3 other; follows links */
int lc_make_dirs(const char *path);
int lc_list_dir(const char *path, char **names, double *length); /* names separated by NUL, sorted; caller frees */
int lc_remove(const char *path);                     /* a file or an empty folder */
int lc_rename(const char *from, const char *to);
int lc_lock_file(const char *path, int32_t *fd);     /* LC_EIO when another process holds it; released with the process */
int lc_unlock_file(int32_t fd);
int lc_sha256(const void *data, double length, char *hex65);
int lc_sha256_file(const char *path, char *hex65);
int lc_make_link(const char *target, const char *path); /* a symbolic link; one that is there is replaced at once */
double lc_disk_free(const char *path);               /* bytes that may be written in a folder; -1: not known */
int lc_gunzip(const char *data, double length, double limit, char **out, double *out_length);

/* ---- records: .jsonl, .json, .csv, .tsv, .txt (each also .gz or .zst) and .parquet, one at a time ------------------------ */
typedef struct lc_records lc_records;
/* format: NULL, by the name; "jsonl", "json" (one array, or values one after another), "csv", "tsv" (a header, then rows of strings),
 * "text" (pieces of about 4 MB cut after a line), "parquet". columns: of a parquet file, each ended by a line break; NULL: all. */
int lc_records_open(lc_records **out, const char *path, const char *format, const char *columns);
int lc_records_next(lc_records *r, lc_doc **record);       /* the caller frees it; NULL at the end */
double lc_records_count(const lc_records *r);              /* of a parquet file; else -1 */
void lc_records_close(lc_records *r);

/* ---- HTTP: what the Hub client asks and fetches ------------------------------------------------------------------------ */
typedef struct lc_http lc_http;
int lc_http_open(lc_http **out, const char *agent);  /* LC_EIO: there is no libcurl; agent: how this program calls itself */
void lc_http_close(lc_http *h);                      /* what is under way ends; files keep what they have */
/* Begins a request; *id (below 64) names it until lc_http_end. method: GET or HEAD. headers: lines "Name: value". path: NULL, the
 * answer's body to memory (64 MiB at most); else a 200 or 206 goes to the end of that file, from its end on (Range), under a lock. */
int lc_http_start(lc_http *h, int32_t *id, const char *method, const char *url, const char *headers, const char *path);
int lc_http_wait(lc_http *h, double seconds, int32_t *id); /* one that ended, each once, or -1; LC_EINTR on Ctrl-C */
int lc_http_status(const lc_http *h, int32_t id);          /* 404; 0 when no answer came */
const char *lc_http_error(const lc_http *h, int32_t id);   /* why the answer is not whole; "" when it is */
const char *lc_http_header(const lc_http *h, int32_t id, const char *name, int32_t *length); /* not ended by NUL; NULL: none */
const char *lc_http_redirect(const lc_http *h, int32_t id);                  /* where a 3xx points, absolute; NULL: nowhere */
const char *lc_http_body(const lc_http *h, int32_t id, double *length);
double lc_http_bytes(const lc_http *h, int32_t id);        /* in the file now */
int lc_http_sync(lc_http *h, int32_t id, char *hex65);     /* the file is on disk; its SHA-256 */
void lc_http_end(lc_http *h, int32_t id);

/* ---- text ------------------------------------------------------------------------------------------------------------ */
typedef struct lc_tokenizer lc_tokenizer;
int lc_tokenizer_open(lc_tokenizer **out, const char *path);  /* tokenizer.json; tokenizer.model of SentencePiece or tiktoken */
/* With options, a JSON object (NULL: none). style: "hf", or "sentencepiece" for a model of its as its own library runs it.
 * For a tokenizer.model also added_tokens (a list as in tokenizer.json), add_bos, add_eos, and legacy (false: a space only
 * in front of a text's first part). */
int lc_tokenizer_open_with(lc_tokenizer **out, const char *path, const char *how);
int lc_tokenizer_from_gguf(lc_tokenizer **out, const lc_file *f);        /* tokenizer.ggml.* of a GGUF */
void lc_tokenizer_free(lc_tokenizer *t);
int lc_tokenizer_size(const lc_tokenizer *t);                            /* ids run from 0 to this, exclusive */
/* Encodes; *ids is malloc'ed (lc_free). add_special: apply the post-processor (BOS and such). parse_special: special-token
 * text in `text` becomes its id. */
int lc_tokenizer_encode(lc_tokenizer *t, const char *text, double length, int add_special, int parse_special, int32_t **ids,
                        int32_t *count);
int lc_tokenizer_decode(lc_tokenizer *t, const int32_t *ids, int32_t count, int skip_special, char **text, int32_t *length);
int32_t lc_tokenizer_id(const lc_tokenizer *t, const char *token);       /* exact content; -1 when there is none */
const char *lc_tokenizer_token(const lc_tokenizer *t, int32_t id, int32_t *length); /* as in the file; NULL: no such id */
int lc_tokenizer_is_special(const lc_tokenizer *t, int32_t id);
/* UTF-8 in upper case ('u'), lower case ('l'), or as a title ('t': each first letter of a run of letters; 'c': of the text) with
 * Unicode's full mappings, as Python's str methods; *out is malloc'ed. */
int lc_text_case(const char *text, double length, int how, char **out, int32_t *out_length);

/* Does a regular expression match the whole of a text? */
int lc_regex_match(const char *pattern, const char *text, int *matched);

/* Picks a token from n logits in host memory. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition 1 are off.
 * `recent` are the ids that the repetition penalty looks at. uniform is a number in [0, 1). */
typedef struct lc_sampling { double temperature, top_p, min_p, repetition; int32_t top_k; } lc_sampling;
int32_t lc_sample(const float *logits, int32_t n, const lc_sampling *how, const int32_t *recent, int32_t n_recent, double uniform);

/*</ffi>*/

#ifdef __cplusplus
}
#endif
#endif
