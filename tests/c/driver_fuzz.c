/* driver_fuzz.c: drives a fuzz target where clang's libFuzzer is not at hand. Takes libFuzzer's arguments that the
 * tests use (-max_total_time=S, -runs=N, -seed=N, files and folders), keeps inputs that reach new code, by gcc's
 * -fsanitize-coverage=trace-pc, and mutates them. The input of a crash is kept as crash-<target>, a file to give the
 * program again. */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv) __attribute__((weak));

#define LC_MIN_SIZE(a, b) ((a) < (b) ? (a) : (b))

enum { MAP_SIZE = 1 << 16, INPUT_MAX_SIZE = 1 << 16, CORPUS_MAX = 4096 };

static uint8_t reached[MAP_SIZE], known[MAP_SIZE];
static struct { uint8_t *data; size_t size; } corpus[CORPUS_MAX];
static int n_corpus;
static uint64_t random_state = 88172645463325252u;

void __sanitizer_cov_trace_pc(void);
__attribute__((no_sanitize_address)) void __sanitizer_cov_trace_pc(void) {
    static __thread uintptr_t before;
    uintptr_t here = (uintptr_t)__builtin_return_address(0);
    reached[(here ^ before) * 0x9E3779B97F4A7C15u >> 48] = 1;
    before = here >> 1;
}

static uint64_t next_random(uint64_t below) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return below ? random_state % below : 0;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void keep(const uint8_t *data, size_t size) {
    int i = n_corpus < CORPUS_MAX ? n_corpus++ : (int)next_random(CORPUS_MAX);
    uint8_t *copy = malloc(size + 1);
    if (!copy) return;
    memcpy(copy, data, size);
    free(corpus[i].data);
    corpus[i].data = copy;
    corpus[i].size = size;
}

/* The sanitizers call this before they end the program: the input that did it is kept as a file. */
static const uint8_t *current;
static size_t current_size;
static const char *target = "fuzz";
void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak));

static void keep_crash(void) {
    char path[4096];
    const char *folder = getenv("LOLCATS_TEST_BUILD");
    snprintf(path, sizeof path, "%s%scrash-%s", folder ? folder : "", folder ? "/tests/" : "", target);
    FILE *f = fopen(path, "wb");
    if (!f) return;
    fwrite(current, 1, current_size, f);
    fclose(f);
    fprintf(stderr, "the input was kept: %s\n", path);
}

/* Runs one input; the copy has no slack, so that reading past the end is seen. Returns whether new code was reached. */
static int run(const uint8_t *data, size_t size) {
    uint8_t *exact = malloc(size ? size : 1);
    if (!exact) return 0;
    memcpy(exact, data, size);
    current = exact;
    current_size = size;
    memset(reached, 0, sizeof reached);
    LLVMFuzzerTestOneInput(exact, size);
    free(exact);
    int fresh = 0;
    for (int i = 0; i < MAP_SIZE; i++)
        if (reached[i] && !known[i]) known[i] = 1, fresh = 1;
    return fresh;
}

static size_t put_number(uint8_t *data, size_t size) {
    static const uint64_t odd[] = {0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fffffff, 0x80000000u, 0xffffffffu,
                                   0x7fffffffffffffffu, 0x8000000000000000u, 0xffffffffffffffffu, 0xfffffffffffffff8u};
    size_t width = (size_t)1 << next_random(4);
    if (size < width) return size;
    uint64_t value = odd[next_random(sizeof odd / sizeof *odd)];
    memcpy(data + next_random(size - width + 1), &value, width);
    return size;
}

static size_t mutate(uint8_t *data, size_t size) {
    size_t at = next_random(size + 1), n;
    const uint8_t *other;
    switch (next_random(8)) {
    case 0: /* a bit */
        if (at < size) data[at] ^= (uint8_t)(1u << next_random(8));
        return size;
    case 1: /* a byte */
        if (at < size) data[at] = (uint8_t)next_random(256);
        return size;
    case 2: return put_number(data, size);
    case 3: /* cut */
        n = next_random(LC_MIN_SIZE(size - at, 64) + 1);
        memmove(data + at, data + at + n, size - at - n);
        return size - n;
    case 4: /* repeat a part */
        n = next_random(LC_MIN_SIZE(size - at, 64) + 1);
        if (size + n > INPUT_MAX_SIZE) return size;
        memmove(data + at + n, data + at, size - at);
        return size + n;
    case 5: /* insert a byte that formats care for */
        if (size + 1 > INPUT_MAX_SIZE) return size;
        memmove(data + at + 1, data + at, size - at);
        data[at] = (uint8_t)"{}[]\",:\\0123456789-+eE.tfn \n\t&*#|>'!%@"[next_random(39)];
        return size + 1;
    case 6: /* splice */
        if (!n_corpus) return size;
        n = next_random((uint64_t)n_corpus);
        other = corpus[n].data;
        n = LC_MIN_SIZE(corpus[n].size, INPUT_MAX_SIZE - at);
        memcpy(data + at, other, n);
        return at + n > size || next_random(2) ? at + n : size;
    default: /* truncate */
        return next_random(4) ? size : at;
    }
}

static void load(const char *path) {
    struct stat st;
    if (stat(path, &st) != 0) return;
    if (S_ISDIR(st.st_mode)) {
        DIR *d = opendir(path);
        for (struct dirent *e; d && (e = readdir(d));) {
            char inner[4096];
            if (e->d_name[0] == '.') continue;
            snprintf(inner, sizeof inner, "%s/%s", path, e->d_name);
            load(inner);
        }
        if (d) closedir(d);
        return;
    }
    static uint8_t data[INPUT_MAX_SIZE];
    FILE *f = fopen(path, "rb");
    if (!f) return;
    size_t size = fread(data, 1, sizeof data, f);
    fclose(f);
    run(data, size);
    keep(data, size);
}

int main(int argc, char **argv) {
    double limit = 0;
    long runs = -1, done = 0;
    if (LLVMFuzzerInitialize) LLVMFuzzerInitialize(&argc, &argv);
    const char *slash = strrchr(argv[0], '/');
    target = slash ? slash + 1 : argv[0];
    if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(keep_crash);
    for (int i = 1; i < argc; i++) {
        if (sscanf(argv[i], "-max_total_time=%lf", &limit) == 1) continue;
        if (sscanf(argv[i], "-runs=%ld", &runs) == 1) continue;
        if (sscanf(argv[i], "-seed=%lu", (unsigned long *)&random_state) == 1) continue;
        if (argv[i][0] != '-') load(argv[i]);
    }
    if (!n_corpus) keep((const uint8_t *)"", 0);
    int loaded = n_corpus;
    static uint8_t input[INPUT_MAX_SIZE + 16];
    double start = now();
    while ((limit > 0 && now() - start < limit) || (runs > 0 && done < runs)) {
        int pick = next_random(3) ? (int)next_random((uint64_t)n_corpus) : n_corpus - 1;
        size_t size = corpus[pick].size;
        memcpy(input, corpus[pick].data, size);
        for (uint64_t n = 1 + next_random(8); n; n--) size = mutate(input, size);
        if (run(input, size)) keep(input, size);
        done++;
    }
    printf("%ld runs, %d inputs given, %d that reached new code, no failure\n", done, loaded, n_corpus - loaded);
    return 0;
}
