/* digest.c: bytes to bytes: SHA-256 (FIPS 180-4), in one piece, in many or of a file, and gzip unpacking with a limit. */
#define _GNU_SOURCE
#include "digest.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <zlib.h>

#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#endif

/* ---- SHA-256
 * --------------------------------------------------------------------------------------------------------- */

/* The first 32 bits of the fractional parts of the cube roots of the first 64 primes. */
static const uint32_t sha_k[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static inline uint32_t turn(uint32_t x, int n) { return x >> n | x << (32 - n); }

static void sha_blocks_plain(uint32_t h[8], const uint8_t *p, size_t blocks) {
    for (; blocks > 0; blocks--, p += 64) {
        uint32_t w[64], s[8];
        for (int i = 0; i < 16; i++)
            w[i] = (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 | (uint32_t)p[4 * i + 2] << 8 | p[4 * i + 3];
        for (int i = 16; i < 64; i++) {
            uint32_t a = w[i - 15], b = w[i - 2];
            w[i] = w[i - 16] + (turn(a, 7) ^ turn(a, 18) ^ a >> 3) + w[i - 7] + (turn(b, 17) ^ turn(b, 19) ^ b >> 10);
        }
        memcpy(s, h, sizeof s);
        for (int i = 0; i < 64; i++) {
            uint32_t e = s[4], a = s[0];
            uint32_t t1 = s[7] + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + ((e & s[5]) ^ (~e & s[6])) + sha_k[i] + w[i];
            uint32_t t2 = (turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
            memmove(s + 1, s, 7 * sizeof *s);
            s[4] += t1;
            s[0] = t1 + t2;
        }
        for (int i = 0; i < 8; i++) h[i] += s[i];
    }
}

#ifdef __x86_64__
/* The same by the processor's own instructions. They keep the state as the words a b e f and c d g h. */
__attribute__((target("sha,sse4.1"))) static void sha_blocks_ni(uint32_t h[8], const uint8_t *p, size_t blocks) {
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    __m128i abcd = _mm_loadu_si128((const __m128i *)h), efgh = _mm_loadu_si128((const __m128i *)(h + 4));
    __m128i low = _mm_shuffle_epi32(abcd, 0xb1), high = _mm_shuffle_epi32(efgh, 0x1b);
    __m128i x = _mm_alignr_epi8(low, high, 8), y = _mm_blend_epi16(high, low, 0xf0); /* abef, cdgh */
    for (; blocks > 0; blocks--, p += 64) {
        __m128i x0 = x, y0 = y, w[4];
        for (int i = 0; i < 4; i++) w[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)p + i), swap);
        for (int i = 0; i < 16; i++) {
            __m128i k = _mm_add_epi32(w[i & 3], _mm_loadu_si128((const __m128i *)sha_k + i));
            y = _mm_sha256rnds2_epu32(y, x, k);
            x = _mm_sha256rnds2_epu32(x, y, _mm_shuffle_epi32(k, 0x0e));
            if (i >= 12) continue;
            __m128i next = _mm_add_epi32(_mm_sha256msg1_epu32(w[i & 3], w[(i + 1) & 3]),
                                         _mm_alignr_epi8(w[(i + 3) & 3], w[(i + 2) & 3], 4));
            w[i & 3] = _mm_sha256msg2_epu32(next, w[(i + 3) & 3]);
        }
        x = _mm_add_epi32(x, x0);
        y = _mm_add_epi32(y, y0);
    }
    low = _mm_shuffle_epi32(x, 0x1b), high = _mm_shuffle_epi32(y, 0xb1);
    _mm_storeu_si128((__m128i *)h, _mm_blend_epi16(low, high, 0xf0));
    _mm_storeu_si128((__m128i *)(h + 4), _mm_alignr_epi8(high, low, 8));
}

static bool has_sha(void) {
    static int known; /* 1 no, 2 yes */
    unsigned a, b, c, d;
    if (!known)
        known = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1) && __builtin_cpu_supports("sse4.1") ? 2 : 1;
    return known == 2;
}
#endif

static void sha_blocks(uint32_t h[8], const uint8_t *p, size_t blocks) {
#ifdef __x86_64__
    if (has_sha()) {
        sha_blocks_ni(h, p, blocks);
        return;
    }
#endif
    sha_blocks_plain(h, p, blocks);
}

void lc_sha256_begin(lc_sha256_state *s) {
    static const uint32_t start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memcpy(s->h, start, sizeof start);
    s->bytes = 0;
}

void lc_sha256_add(lc_sha256_state *s, const void *data, size_t bytes) {
    const uint8_t *p = data;
    size_t held = (size_t)(s->bytes % 64);
    s->bytes += bytes;
    if (held > 0) {
        size_t n = bytes < 64 - held ? bytes : 64 - held;
        memcpy(s->block + held, p, n);
        p += n;
        bytes -= n;
        if (held + n < 64) return;
        sha_blocks(s->h, s->block, 1);
    }
    sha_blocks(s->h, p, bytes / 64);
    if (bytes % 64) memcpy(s->block, p + bytes / 64 * 64, bytes % 64);
}

void lc_sha256_end(lc_sha256_state *s, char *hex65) {
    uint8_t last[128] = {0};
    size_t held = (size_t)(s->bytes % 64), size = held < 56 ? 64 : 128;
    uint64_t bits = s->bytes * 8;
    memcpy(last, s->block, held);
    last[held] = 0x80;
    for (int i = 0; i < 8; i++) last[size - 1 - (size_t)i] = (uint8_t)(bits >> 8 * i);
    sha_blocks(s->h, last, size / 64);
    for (int i = 0; i < 64; i++) hex65[i] = "0123456789abcdef"[s->h[i / 8] >> (28 - 4 * (i % 8)) & 15];
    hex65[64] = 0;
}

lc_status lc_sha256_add_file(lc_sha256_state *s, int fd, const char *path, uint64_t bytes) {
    enum { PIECE = 1 << 20 };
    uint8_t *piece = lc_alloc(PIECE, 1);
    if (!piece) return LC_ENOMEM;
    lc_status status = LC_OK;
    while (bytes > 0 && status == LC_OK) {
        ssize_t got = read(fd, piece, bytes < PIECE ? (size_t)bytes : PIECE);
        if (got < 0 && errno == EINTR && !lc_interrupt) continue;
        if (lc_interrupt)
            status = lc_fail(LC_EINTR, "interrupted");
        else if (got <= 0)
            status = lc_fail(LC_EIO, "cannot read %s: %s", path, got < 0 ? strerror(errno) : "it ends too early");
        else
            lc_sha256_add(s, piece, (size_t)got), bytes -= (uint64_t)got;
    }
    free(piece);
    return status;
}

int lc_sha256(const void *data, double length, char *hex65) {
    lc_sha256_state s;
    if ((!data && length > 0) || !(length >= 0) || !hex65)
        return lc_fail(LC_EARG, "lc_sha256: expected data and room for the result");
    lc_sha256_begin(&s);
    if (length > 0) lc_sha256_add(&s, data, (size_t)length);
    lc_sha256_end(&s, hex65);
    return LC_OK;
}

int lc_sha256_file(const char *path, char *hex65) {
    struct stat st;
    lc_sha256_state s;
    if (!path || !hex65) return lc_fail(LC_EARG, "lc_sha256_file: expected a path");
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return lc_fail(LC_EIO, "cannot open %s: %s", path, strerror(errno));
    lc_sha256_begin(&s);
    lc_status status = fstat(fd, &st) == 0 && S_ISREG(st.st_mode) ? LC_OK : lc_fail(LC_EIO, "%s is no file", path);
    if (status == LC_OK) status = lc_sha256_add_file(&s, fd, path, (uint64_t)st.st_size);
    if (status == LC_OK) lc_sha256_end(&s, hex65);
    close(fd);
    return status;
}

/* ---- gzip
 * ------------------------------------------------------------------------------------------------------------ */

typedef struct unpacking {
    z_stream z;
    char *text;
    size_t room, count, limit;
} unpacking;

static lc_status make_room(unpacking *u) {
    if (u->count < u->room) return LC_OK;
    size_t room = u->room ? u->room * 2 : 65536;
    if (room > u->limit + 1) room = u->limit + 1; /* one more byte shows that there is more */
    if (u->count > u->limit)
        return lc_fail(LC_EPARSE, "the gzip data unpack to more than %.0f bytes", (double)u->limit);
    char *grown = lc_resize(u->text, room + 1, 1);
    if (!grown) return LC_ENOMEM;
    u->text = grown;
    u->room = room;
    return LC_OK;
}

static lc_status unpack(unpacking *u, const char *data, size_t left) {
    int status = Z_OK;
    u->z.next_in = (Bytef *)(uintptr_t)data;
    for (;;) {
        if (u->z.avail_in == 0) {
            uInt now = left > (1u << 30) ? 1u << 30 : (uInt)left;
            u->z.avail_in = now;
            left -= now;
        }
        if (status == Z_STREAM_END) { /* another member may follow; zeros that pad the file may, too */
            while (u->z.avail_in && *u->z.next_in == 0) u->z.next_in++, u->z.avail_in--;
            if (u->z.avail_in == 0 && left == 0) return LC_OK;
            if (u->z.avail_in == 0) continue;
            inflateReset(&u->z);
        }
        LC_TRY(make_room(u));
        size_t space = u->room - u->count;
        u->z.next_out = (Bytef *)u->text + u->count;
        u->z.avail_out = space > (1u << 30) ? 1u << 30 : (uInt)space;
        uInt before = u->z.avail_out;
        status = inflate(&u->z, Z_NO_FLUSH);
        u->count += before - u->z.avail_out;
        if (u->count > u->limit)
            return lc_fail(LC_EPARSE, "the gzip data unpack to more than %.0f bytes", (double)u->limit);
        if (status == Z_MEM_ERROR) return lc_fail(LC_ENOMEM, "no memory to unpack gzip data");
        if (status == Z_BUF_ERROR && u->z.avail_in == 0 && left == 0)
            return lc_fail(LC_EPARSE, "the gzip data are cut short");
        if (status != Z_OK && status != Z_STREAM_END && status != Z_BUF_ERROR)
            return lc_fail(LC_EPARSE, "not gzip data: %s", u->z.msg ? u->z.msg : "no valid stream");
    }
}

int lc_gunzip(const char *data, double length, double limit, char **out, double *out_length) {
    if (!data || !(length >= 0) || !(limit >= 0 && limit < 1e18) || !out || !out_length)
        return lc_fail(LC_EARG, "lc_gunzip: expected data and a limit");
    *out = NULL;
    *out_length = 0;
    unpacking u = {.limit = (size_t)limit};
    if (inflateInit2(&u.z, 16 + MAX_WBITS) != Z_OK) return lc_fail(LC_ENOMEM, "no memory to unpack gzip data");
    lc_status status = unpack(&u, data, (size_t)length);
    inflateEnd(&u.z);
    if (status != LC_OK) {
        free(u.text);
        return status;
    }
    if (u.text) u.text[u.count] = 0;
    *out = u.text;
    *out_length = (double)u.count;
    return LC_OK;
}
