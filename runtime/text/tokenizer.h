/* tokenizer.h: what the files of the tokenizer share; internal to runtime/text. A text goes through these stages, which
 * are those of Hugging Face's pipeline, because tokenizer.json describes that pipeline and ids must be equal to its:
 *
 *   added tokens cut out (tokenizer_added.c) -> normalizers (tokenizer_pre.c, tokenizer_charsmap.c), added tokens again
 * on the normalized text -> pre-tokenizers, which leave words (tokenizer_pre.c) -> BPE (tokenizer_bpe.c) or Unigram
 * (tokenizer_unigram.c) of each word -> post-processor's template (tokenizer.c)
 *
 * and back through the decoders (tokenizer_decode.c). Built from tokenizer.json by tokenizer_load.c, from a GGUF's
 * metadata by tokenizer_gguf.c, from SentencePiece's tokenizer.model by tokenizer_spm.c, from tiktoken's by
 * tokenizer_tiktoken.c; tokenizer_open.c tells them apart. A SentencePiece model runs as Hugging Face runs it, or as
 * its own library does. A tokenizer holds scratch buffers: one thread at a time. */
#ifndef LC_TOKENIZER_H
#define LC_TOKENIZER_H

#include "../core/base.h"

/* ---- growing buffers ---- */
typedef struct lc_tok_buf {
    char *p;
    size_t len, room;
} lc_tok_buf;
typedef struct lc_tok_ids {
    int32_t *p;
    size_t len, room;
} lc_tok_ids;
typedef struct lc_tok_span {
    size_t at, len;
} lc_tok_span; /* a word, in whatever text it was cut from */
typedef struct lc_tok_spans {
    lc_tok_span *p;
    size_t len, room;
} lc_tok_spans;
typedef struct lc_tok_piece {
    size_t at, len;
    int32_t id;
} lc_tok_piece; /* id -1: text, else an added token */
typedef struct lc_tok_pieces {
    lc_tok_piece *p;
    size_t len, room;
} lc_tok_pieces;

/* Makes room for `more` elements after `len`. */
lc_status lc_tok_grow(void **p, size_t *room, size_t len, size_t more, size_t size);
#define LC_TOK_ROOM(b, more) lc_tok_grow((void **)&(b)->p, &(b)->room, (b)->len, more, sizeof *(b)->p)

lc_status lc_tok_put(lc_tok_buf *b, const char *s, size_t n);
lc_status lc_tok_put_char(lc_tok_buf *b, uint32_t cp);
lc_status lc_tok_put_id(lc_tok_ids *b, int32_t id);
lc_status lc_tok_put_span(lc_tok_spans *b, size_t at, size_t len);

/* ---- Unicode (tokenizer_unicode.c) ---- */
/* Reads one character of at least one byte. False: no UTF-8; *len is then the length of what one U+FFFD stands for. */
bool lc_tok_utf8(const char *s, size_t n, uint32_t *cp, size_t *len);
static inline uint32_t lc_tok_char(const char *s, size_t *len) { /* of text known to be valid */
    const unsigned char *u = (const unsigned char *)s;
    if (u[0] < 0x80) return *len = 1, u[0];
    if (u[0] < 0xE0) return *len = 2, (uint32_t)(u[0] & 31) << 6 | (u[1] & 63);
    if (u[0] < 0xF0) return *len = 3, (uint32_t)(u[0] & 15) << 12 | (uint32_t)(u[1] & 63) << 6 | (u[2] & 63);
    return *len = 4,
           (uint32_t)(u[0] & 7) << 18 | (uint32_t)(u[1] & 63) << 12 | (uint32_t)(u[2] & 63) << 6 | (u[3] & 63);
}
bool lc_tok_utf8_valid(const char *s, size_t n);
lc_status lc_tok_put_lossy(lc_tok_buf *b, const char *s, size_t n); /* invalid bytes become U+FFFD */
typedef enum { LC_TOK_NUMERIC, LC_TOK_SPACE, LC_TOK_PUNCT, LC_TOK_WORD, LC_TOK_THE_CHAR } lc_tok_class;
bool lc_tok_is(lc_tok_class c, uint32_t cp);
bool lc_tok_is_accent(uint32_t cp);
bool lc_tok_has_no_form(uint32_t cp); /* normalization leaves it and stops at it */
uint32_t lc_tok_lower(uint32_t c);
/* Ranges, as PCRE2 class text, that belong to a property but that PCRE2's Unicode 14 does not know; "" when none. */
const char *lc_tok_late_ranges(const char *property, size_t len);
uint32_t lc_tok_byte_char(unsigned char byte); /* GPT-2's alphabet: the character that stands for a byte */
int lc_tok_char_byte(uint32_t cp);             /* and back; -1: none */

/* ---- patterns (tokenizer_regex.c): a literal or an Oniguruma regular expression, run by PCRE2 ---- */
typedef struct lc_tok_pattern {
    char *literal; /* or NULL */
    size_t literal_len;
    void *code, *data; /* pcre2_code, pcre2_match_data */
    bool jit;
} lc_tok_pattern;
lc_status lc_tok_pattern_literal(lc_tok_pattern *p, const char *s, size_t n);
lc_status lc_tok_pattern_regex(lc_tok_pattern *p, const char *regex, size_t n);
void lc_tok_pattern_drop(lc_tok_pattern *p);
typedef struct lc_tok_search {
    size_t from, start, end;
    bool any;
} lc_tok_search; /* start zeroed */
/* The next match in s; LC_OK with *found. Empty matches right behind a match are passed over. */
lc_status lc_tok_search_next(const lc_tok_pattern *p, const char *s, size_t n, lc_tok_search *at, bool *found);
lc_status lc_tok_regex_translate(const char *regex, size_t n,
                                 lc_tok_buf *out); /* Oniguruma (Ruby) to PCRE2; for tests */

/* ---- SentencePiece's character map (tokenizer_charsmap.c): a double-array trie of rules, and what they write ---- */
typedef struct lc_tok_charsmap {
    char *blob; /* or NULL */
    size_t units, text_len;
    const char *text;
} lc_tok_charsmap;
lc_status lc_tok_charsmap_set(lc_tok_charsmap *m, const char *blob, size_t n); /* copies; empty: no map */
void lc_tok_charsmap_drop(lc_tok_charsmap *m);
/* As Hugging Face applies it; lc_tok_spm_normalize does it as SentencePiece. */
lc_status lc_tok_charsmap_apply(const lc_tok_charsmap *m, const char *s, size_t n, lc_tok_buf *out);

/* ---- components ---- */
typedef enum {
    LC_NORM_NFC,
    LC_NORM_NFD,
    LC_NORM_NFKC,
    LC_NORM_NFKD,
    LC_NORM_LOWER,
    LC_NORM_PREPEND,
    LC_NORM_REPLACE,
    LC_NORM_STRIP,
    LC_NORM_STRIP_ACCENTS,
    LC_NORM_BYTES,
    LC_NORM_NMT,
    LC_NORM_CHARSMAP, /* as Hugging Face applies it */
    LC_NORM_SPM       /* all of SentencePiece's own normalizer; its rules are lc_tokenizer.spm's */
} lc_tok_norm_kind;
typedef struct lc_tok_norm {
    lc_tok_norm_kind kind;
    lc_tok_pattern pattern;
    lc_tok_charsmap map;
    char *text;
    size_t text_len;
    bool left, right;
} lc_tok_norm;

typedef enum {
    LC_SPLIT_REMOVED,
    LC_SPLIT_ISOLATED,
    LC_SPLIT_PREVIOUS,
    LC_SPLIT_NEXT,
    LC_SPLIT_CONTIGUOUS
} lc_tok_behavior;
typedef enum { LC_PRE_PATTERN, LC_PRE_CLASS, LC_PRE_PREFIX_SPACE, LC_PRE_METASPACE, LC_PRE_BYTES } lc_tok_pre_kind;
typedef enum { LC_PREPEND_ALWAYS, LC_PREPEND_FIRST, LC_PREPEND_NEVER } lc_tok_prepend;
typedef struct lc_tok_pre {
    lc_tok_pre_kind kind;
    lc_tok_behavior behavior;
    bool invert, split;
    lc_tok_class klass;
    uint32_t the_char; /* of LC_TOK_THE_CHAR, and the Metaspace replacement */
    lc_tok_prepend prepend;
    lc_tok_pattern pattern;
} lc_tok_pre;

typedef enum {
    LC_DEC_BYTE_LEVEL,
    LC_DEC_REPLACE,
    LC_DEC_BYTE_FALLBACK,
    LC_DEC_FUSE,
    LC_DEC_STRIP,
    LC_DEC_METASPACE,
    LC_DEC_BPE
} lc_tok_dec_kind;
typedef struct lc_tok_dec {
    lc_tok_dec_kind kind;
    lc_tok_pattern pattern;
    char *text;
    size_t text_len;
    uint32_t the_char;
    int32_t start, stop;
    lc_tok_prepend prepend;
} lc_tok_dec;

/* ---- vocabulary and added tokens ---- */
typedef struct lc_tok_str {
    uint32_t at, len;
} lc_tok_str; /* in lc_tokenizer.text; at UINT32_MAX: absent */
typedef struct lc_tok_merge {
    uint32_t a, b, rank, made;
} lc_tok_merge; /* a UINT32_MAX: an empty slot */
typedef struct lc_tok_added {
    lc_tok_str content, normal; /* normal: what is searched for and decoded to */
    int32_t id;
    bool special, single_word, lstrip, rstrip, normalized;
} lc_tok_added;
typedef struct lc_tok_trie {
    struct lc_tok_trie_node {
        int32_t child, next, token;
        unsigned char byte;
    } * p;
    size_t len, room;
    int32_t root[256];
} lc_tok_trie;

/* What SentencePiece's own library needs besides; types are those of its file, and of GGUF's token_type. */
enum { LC_PIECE_NORMAL = 1, LC_PIECE_UNKNOWN, LC_PIECE_CONTROL, LC_PIECE_USER, LC_PIECE_UNUSED, LC_PIECE_BYTE };
typedef struct lc_tok_spm {
    bool own;                              /* runs as that library does */
    bool prefix, strip, escape, suffix;    /* add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces */
    char *unk_surface;                     /* what the unknown token is decoded to; NULL: " U+2047 " */
    uint8_t *type;                         /* [size] or NULL */
    lc_tok_charsmap map;
    uint32_t *lone; /* characters that are no pieces, but begin or end one, sorted; as symbols LC_TOK_LONE + i */
    int32_t n_lone;
    size_t from; /* where the ids of the word at hand begin */
    struct lc_tok_halves {
        int32_t a, b;
    } * halves; /* [size] or NULL: of what an unused piece was last made, for taking it apart again */
} lc_tok_spm;

/* The Unigram model: a trie of all pieces as a hash table of edges, and the best path through a word. */
typedef struct lc_tok_unigram {
    bool on, single;  /* single: sums are rounded to float, as SentencePiece does */
    double *score;    /* [size] */
    double unk_score; /* of a character that is no piece */
    size_t longest;   /* bytes of the longest piece */
    struct lc_tok_edge {
        uint32_t node, byte, to;
    } * edge; /* to 0: an empty slot */
    uint32_t edge_mask, edges, nodes;
    int32_t *piece; /* [nodes] id that ends at a node, -1 */
    struct lc_tok_best {
        double score;
        int32_t id;
        uint32_t from;
    } * best;
    size_t best_room;
    lc_tok_pieces path;
} lc_tok_unigram;

enum { LC_TOK_LONE = 1 << 28 };
int32_t lc_tok_lone(const lc_tokenizer *t, uint32_t cp); /* the symbol of a lone character, -1 */

enum { LC_TOK_CACHE_SLOTS = 1 << 15, LC_TOK_CACHE_WORD = 48, LC_TOK_LOW_CHARS = 0x800, LC_TOK_CUT_BITS = 1 << 16 };
typedef struct lc_tok_cached {
    uint32_t hash, text, ids;
    uint16_t len, count;
} lc_tok_cached;

struct lc_tokenizer {
    char *name;                /* for messages */
    lc_tok_buf text;           /* the bytes of all tokens */
    lc_tok_str *token;         /* [size] by id: the model's own */
    int32_t size, model_count; /* size: ids end here, added tokens included; model_count: tokens of the model */
    int32_t token_room;
    uint32_t *slot; /* hash table over the model's tokens: id + 1 */
    uint32_t slot_mask;
    lc_tok_merge *merge; /* hash table */
    uint32_t merge_mask, merge_count;
    int32_t low_char[LC_TOK_LOW_CHARS]; /* id of a character's token, -1: none */
    int32_t byte_id[256];               /* of <0x00> .. <0xFF> */
    int32_t unk;                        /* -1: none */
    bool unk_missing;                   /* named, but not in the vocabulary: an error when it is needed */
    bool fuse_unk, byte_fallback, ignore_merges, bytes_at_last, can_cut;
    char *prefix, *suffix; /* continuing_subword_prefix, end_of_word_suffix, or NULL */
    uint8_t *joinable;     /* bit set over hashed character pairs that some merge joins */

    lc_tok_added *added;
    int32_t n_added, added_room;
    lc_tok_trie raw, normal;
    lc_tok_trie user; /* SentencePiece's user-defined pieces, which stay whole */
    lc_tok_spm spm;
    lc_tok_unigram unigram;
    int32_t *added_of; /* [size] index into added, -1 */

    lc_tok_norm *norm;
    lc_tok_pre *pre;
    lc_tok_dec *dec;
    int32_t n_norm, n_pre, n_dec;
    bool has_decoder;
    int32_t **post; /* templates applied in turn: ids with -1 for the text so far, ended by -2 */
    int32_t n_post;

    /* scratch */
    lc_tok_buf lossy, norm_buf[2], pre_buf[2], word, affixed;
    lc_tok_pieces pieces, normal_pieces;
    lc_tok_spans spans[2];
    lc_tok_ids ids, post_ids;
    lc_tok_cached *cached;
    lc_tok_buf cache_text;
    lc_tok_ids cache_ids;
    struct lc_tok_symbol {
        int32_t id, prev, next;
    } * symbol;
    size_t symbol_room;
    struct lc_tok_pending {
        uint64_t key;
        int32_t made;
    } * heap; /* key: rank << 32 | position */
    size_t heap_len, heap_room;
};

/* ---- building (tokenizer_bpe.c, tokenizer_added.c, tokenizer.c) ---- */
lc_status lc_tok_new(lc_tokenizer **out, const char *name);
lc_status lc_tok_vocab_start(lc_tokenizer *t, int32_t count, int32_t max_id);
lc_status lc_tok_vocab_add(lc_tokenizer *t, const char *s, size_t n, int32_t id);
int32_t lc_tok_vocab_find(const lc_tokenizer *t, const char *s, size_t n); /* the model's id, -1 */
lc_status lc_tok_merges_start(lc_tokenizer *t, size_t count);
lc_status lc_tok_merge_add(lc_tokenizer *t, int32_t a, int32_t b, uint32_t rank, int32_t made);
lc_status lc_tok_add_token(lc_tokenizer *t, const char *s, size_t n, const lc_tok_added *flags);
lc_status lc_tok_add_norm(lc_tokenizer *t, lc_tok_norm **out);
lc_status lc_tok_add_pre(lc_tokenizer *t, lc_tok_pre **out);
lc_status lc_tok_add_dec(lc_tokenizer *t, lc_tok_dec **out);
lc_status lc_tok_add_post(lc_tokenizer *t, const int32_t *items); /* copies; ended by -2 */
lc_status lc_tok_add_split(lc_tokenizer *t, const char *regex, lc_tok_behavior behavior, bool invert);
lc_status lc_tok_add_byte_level(lc_tokenizer *t, bool prefix_space, bool use_regex);
lc_status lc_tok_finish(lc_tokenizer *t); /* tables that need the whole */
/* For every piece that can be cut into two others, a merge; by_id: ranks are ids (tiktoken), else by score, best first.
 * Equal scores: the leftmost pair first (SentencePiece), or the order of Hugging Face's converter. Pieces whose `skip`
 * is set are not made. */
typedef enum { LC_MERGES_BY_ID, LC_MERGES_LEFTMOST, LC_MERGES_CONVERTED } lc_tok_merge_order;
lc_status lc_tok_merges_derive(lc_tokenizer *t, const float *score, const uint8_t *skip, lc_tok_merge_order order);
/* Normalizers and decoders of a Llama: a space in front of every part of a text, of the first only, or of none. */
lc_status lc_tok_sentencepiece_steps(lc_tokenizer *t, lc_tok_prepend prefix);
lc_status lc_tok_unigram_start(lc_tokenizer *t, const double *score, const uint8_t *skip);
/* What opening a file may be told: a JSON object with style ("hf" or "sentencepiece"), added_tokens (as in
 * tokenizer.json), add_bos, add_eos, legacy (false: of a converted BPE model only the first part of a text gets a space
 * in front). `how` may be NULL. */
typedef struct lc_tok_options {
    const struct lc_doc *d; /* or NULL */
    bool own;
    int add_bos, add_eos, legacy; /* -1: as the file says */
} lc_tok_options;
lc_status lc_tok_from_json(lc_tokenizer **out, const char *name, const char *json, size_t n);
lc_status lc_tok_from_spm(lc_tokenizer **out, const char *name, const char *data, size_t n, const lc_tok_options *how);
lc_status lc_tok_from_tiktoken(lc_tokenizer **out, const char *name, const char *data, size_t n,
                               const lc_tok_options *how);
lc_status lc_tok_from_bytes(lc_tokenizer **out, const char *name, const char *data, size_t n,
                            const lc_tok_options *how); /* any kind of file */
bool lc_tok_base64(const char *s, size_t n, bool alphabet, lc_tok_buf *out, lc_status *status);
lc_status lc_tok_added_from_doc(lc_tokenizer *t, const struct lc_doc *d, int32_t list); /* a list of added_tokens */
extern const char lc_tok_gpt2_regex[], lc_tok_llama3_regex[], lc_tok_qwen_regex[], lc_tok_o200k_regex[];

/* ---- running ---- */
lc_status lc_tok_normalize(lc_tokenizer *t, const char *s, size_t n, const char **out, size_t *out_len);
/* Cuts s into words, which are spans of *text (either s or a scratch buffer). */
lc_status lc_tok_pretokenize(lc_tokenizer *t, const char *s, size_t n, bool at_start, const char **text,
                             lc_tok_spans **words);
lc_status lc_tok_word(lc_tokenizer *t, const char *word, size_t n); /* by the model; appends to t->ids */
lc_status lc_tok_bpe(lc_tokenizer *t, const char *word, size_t n);
lc_status lc_tok_unigram_word(lc_tokenizer *t, const char *word, size_t n);
lc_status lc_tok_spm_normalize(const lc_tokenizer *t, const char *s, size_t n, lc_tok_buf *out);
lc_status lc_tok_spm_decode(const lc_tokenizer *t, const int32_t *ids, int32_t count, lc_tok_buf *out);
lc_status lc_tok_tables(lc_tokenizer *t);                          /* of the BPE; by lc_tok_finish */
lc_status lc_tok_added_index(lc_tokenizer *t);
lc_status lc_tok_trie_add(lc_tok_trie *trie, const char *s, size_t n, int32_t token); /* roots set to -1 before */
int32_t lc_tok_trie_longest(const lc_tok_trie *trie, const char *s, size_t n, size_t *len); /* -1: none starts here */
lc_status lc_tok_cut_added(lc_tokenizer *t, const lc_tok_trie *trie, const char *s, size_t n, bool parse_special,
                           lc_tok_pieces *out);
lc_status lc_tok_decode(lc_tokenizer *t, const int32_t *ids, int32_t count, bool skip_special, lc_tok_buf *out);

uint64_t lc_tok_hash(const char *s, size_t n);

#endif
