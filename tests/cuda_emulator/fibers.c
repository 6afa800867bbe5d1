/* fibers.c: the scheduler of the emulator: blocks one by one, a fiber a thread, barriers, warp collectives, asynchronous copies, and
 * what is wrong with a launch: limits exceeded, barriers that not all threads reach, collectives whose lanes do not meet, faults. */
#define _GNU_SOURCE
#include "emulator.h"

#include <dlfcn.h>
#include <link.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

enum { FRESH, RUNNABLE, AT_BARRIER, AT_WARP, DONE };
enum { SHARED_STATIC_LIMIT = 48 << 10, SHARED_ROOM = 256 << 10, PAGE = 4096, POISON = 0xff };

lc_emu_thread *lc_emu_now;
uint3 lc_emu_block_index;
dim3 lc_emu_block_dim, lc_emu_grid_dim;
char *lc_emu_shared;
int lc_emu_order;
sigjmp_buf lc_emu_recover;
volatile int lc_emu_recoverable;

static lc_emu_thread threads[LC_EMU_THREADS];
static uint32_t arrived[LC_EMU_THREADS / LC_EMU_WARP]; /* lanes that wait in a collective */
static int passed[LC_EMU_BARRIERS]; /* threads that have arrived at a barrier and gone on */
static int thread_count;
static struct { const char *name; void (*body)(void *); void *ctx; } launch;
static char *shared_room, *stacks;
static char error_text[900];
static int has_error, aborted;
static uint64_t random_state;

/* ---- errors ---------------------------------------------------------------------------------------------------------- */
static void describe_thread(char *to, size_t room) {
    if (!lc_emu_now) snprintf(to, room, "kernel %s", launch.name ? launch.name : "?");
    else
        snprintf(to, room, "kernel %s, block (%u, %u, %u), thread (%u, %u, %u)", launch.name, lc_emu_block_index.x, lc_emu_block_index.y,
                 lc_emu_block_index.z, lc_emu_now->index.x, lc_emu_now->index.y, lc_emu_now->index.z);
}

void lc_emu_describe(char *to, size_t room) { describe_thread(to, room); }

static void set_error(const char *format, va_list list) {
    if (has_error) return; /* the first one stays */
    char where[300], what[500];
    describe_thread(where, sizeof where);
    vsnprintf(what, sizeof what, format, list);
    snprintf(error_text, sizeof error_text, "%s: %s", where, what);
    has_error = 1;
}

const char *lc_emu_error(void) {
    if (!has_error) return NULL;
    has_error = 0;
    return error_text;
}

/* ---- switching stacks ------------------------------------------------------------------------------------------------ */
#if defined(__x86_64__)
void lc_emu_switch(void **save, void *to);
/* Saves what a called function must keep on this stack, and takes the other's. */
__asm__(".text\n.p2align 4\n.hidden lc_emu_switch\n.globl lc_emu_switch\n.type lc_emu_switch,@function\nlc_emu_switch:\n"
        "    pushq %rbp\n    pushq %rbx\n    pushq %r12\n    pushq %r13\n    pushq %r14\n    pushq %r15\n"
        "    movq %rsp, (%rdi)\n    movq %rsi, %rsp\n"
        "    popq %r15\n    popq %r14\n    popq %r13\n    popq %r12\n    popq %rbx\n    popq %rbp\n"
        "    ret\n.size lc_emu_switch,.-lc_emu_switch\n");
static void *scheduler_stack;
static void thread_main(void);

static void begin_fiber(lc_emu_thread *t) {
    void **top = (void **)((char *)t->stack + LC_EMU_STACK - 64);
    top[0] = (void *)thread_main; /* where ret goes; the stack is then 8 beside a multiple of 16, as after a call */
    top[1] = NULL;
    memset(top - 6, 0, 6 * sizeof *top);
    t->stack_pointer = top - 6;
}
static inline void to_fiber(lc_emu_thread *t) { lc_emu_switch(&scheduler_stack, t->stack_pointer); }
static inline void to_scheduler(lc_emu_thread *t) { lc_emu_switch(&t->stack_pointer, scheduler_stack); }
#else
static ucontext_t scheduler_context, contexts[LC_EMU_THREADS];
static void thread_main(void);

static void begin_fiber(lc_emu_thread *t) {
    ucontext_t *c = &contexts[t->flat];
    getcontext(c);
    c->uc_stack.ss_sp = t->stack;
    c->uc_stack.ss_size = LC_EMU_STACK;
    c->uc_link = NULL;
    makecontext(c, thread_main, 0);
}
static inline void to_fiber(lc_emu_thread *t) { swapcontext(&scheduler_context, &contexts[t->flat]); }
static inline void to_scheduler(lc_emu_thread *t) { swapcontext(&contexts[t->flat], &scheduler_context); }
#endif

static void thread_main(void) {
    launch.body(launch.ctx);
    lc_emu_now->state = DONE;
    to_scheduler(lc_emu_now);
}

static void resume(lc_emu_thread *t) {
    if (t->state == FRESH) begin_fiber(t);
    t->state = RUNNABLE;
    lc_emu_now = t;
    to_fiber(t);
    lc_emu_now = NULL;
}

void lc_emu_fail(const char *format, ...) {
    va_list list;
    va_start(list, format);
    set_error(format, list);
    va_end(list);
    aborted = 1;
    if (lc_emu_now) to_scheduler(lc_emu_now); /* never to come back */
}

/* ---- the order of things --------------------------------------------------------------------------------------------- */
static uint32_t random_below(uint32_t n) { /* splitmix64 */
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ (z >> 31)) % n);
}

static void permute(uint16_t *at, int n) {
    for (int i = 0; i < n; i++) at[i] = (uint16_t)(lc_emu_order == LC_EMU_REVERSE ? n - 1 - i : i);
    if (lc_emu_order != LC_EMU_RANDOM) return;
    for (int i = n - 1; i > 0; i--) {
        uint32_t j = random_below((uint32_t)i + 1);
        uint16_t swap = at[i];
        at[i] = at[j];
        at[j] = swap;
    }
}

/* Block number i of n: a permutation without a table. */
static uint64_t block_at(uint64_t i, uint64_t n, uint64_t first) {
    if (lc_emu_order == LC_EMU_REVERSE) return n - 1 - i;
    return (i + first) % n;
}

/* ---- asynchronous copies --------------------------------------------------------------------------------------------- */
struct lc_emu_copy { void *to; const void *from; int bytes, copied, group; };

static void make_copy(const struct lc_emu_copy *c) {
    memcpy(c->to, c->from, (size_t)c->copied);
    memset((char *)c->to + c->copied, 0, (size_t)(c->bytes - c->copied));
}

void lc_emu_copy(void *to, const void *from, int bytes, int copied) {
    lc_emu_thread *t = lc_emu_now;
    struct lc_emu_copy c = {to, from, bytes, copied, t->copy_group};
    if (((uintptr_t)to | (uintptr_t)from) % (uintptr_t)bytes) lc_emu_fail("an asynchronous copy of %d bytes is not aligned", bytes);
    if (lc_emu_order == LC_EMU_REVERSE) {
        make_copy(&c);
        return;
    }
    if (t->copy_count == t->copy_room) {
        int room = t->copy_room ? 2 * t->copy_room : 64;
        struct lc_emu_copy *copies = realloc(t->copies, (size_t)room * sizeof *copies);
        if (!copies) lc_emu_fail("out of memory");
        t->copies = copies;
        t->copy_room = room;
    }
    t->copies[t->copy_count++] = c;
}

void lc_emu_copy_commit(void) { lc_emu_now->copy_group++; }

void lc_emu_copy_wait(int pending) {
    lc_emu_thread *t = lc_emu_now;
    int n = 0, done = t->copy_group - pending; /* groups below this number must be there */
    while (n < t->copy_count && t->copies[n].group < done) make_copy(&t->copies[n++]);
    t->copy_count -= n;
    if (n) memmove(t->copies, t->copies + n, (size_t)t->copy_count * sizeof *t->copies);
}

/* ---- waiting --------------------------------------------------------------------------------------------------------- */
int lc_emu_barrier(int id, int expected, int said) {
    lc_emu_thread *t = lc_emu_now;
    if (id < 0 || id >= LC_EMU_BARRIERS) lc_emu_fail("barrier %d: a block has %d", id, LC_EMU_BARRIERS);
    t->barrier = id;
    t->expected = expected ? expected : thread_count;
    t->said = said != 0;
    t->state = AT_BARRIER;
    to_scheduler(t);
    return t->said;
}

void lc_emu_arrive(int id, int expected) {
    if (id < 0 || id >= LC_EMU_BARRIERS) lc_emu_fail("barrier %d: a block has %d", id, LC_EMU_BARRIERS);
    if (++passed[id] > expected) lc_emu_fail("barrier %d: more than the %d threads that it is for have arrived", id, expected);
}

void lc_emu_collective(uint32_t mask, const char *what, lc_emu_collective_fn collect, void *record) {
    lc_emu_thread *t = lc_emu_now, *warp = t - t->lane;
    uint32_t w = t->flat / LC_EMU_WARP;
    if (!(mask >> t->lane & 1)) lc_emu_fail("%s: the mask %08x is without this lane, %u", what, mask, t->lane);
    t->mask = mask;
    t->what = what;
    t->collect = collect;
    t->record = record;
    arrived[w] |= 1u << t->lane;
    if ((arrived[w] & mask) == mask) {
        void *all[LC_EMU_WARP];
        int meet = 1;
        for (int i = 0; i < LC_EMU_WARP; i++) {
            all[i] = mask >> i & 1 ? warp[i].record : NULL;
            if (mask >> i & 1) meet &= warp[i].mask == mask && warp[i].collect == collect;
        }
        if (meet) {
            collect(all, mask);
            arrived[w] &= ~mask;
            for (int i = 0; i < LC_EMU_WARP; i++)
                if (mask >> i & 1) warp[i].state = RUNNABLE;
            return;
        }
    }
    t->state = AT_WARP;
    to_scheduler(t);
}

uint32_t lc_emu_active(void) {
    uint32_t mask = 0, first = lc_emu_now->flat - lc_emu_now->lane;
    for (uint32_t i = 0; i < LC_EMU_WARP && first + i < (uint32_t)thread_count; i++)
        if (threads[first + i].state != DONE) mask |= 1u << i;
    return mask;
}

static const char *state_text(const lc_emu_thread *t, char *to, size_t room) {
    if (t->state == DONE) return "has returned";
    if (t->state == AT_BARRIER) snprintf(to, room, "waits at barrier %d for %d threads", t->barrier, t->expected);
    else if (t->state == AT_WARP) snprintf(to, room, "waits in %s for lanes %08x", t->what, t->mask);
    else return "runs";
    return to;
}

/* Two threads that wait for each other in vain. */
static void stuck(const lc_emu_thread *a, const lc_emu_thread *b) {
    char one[80], other[80];
    lc_emu_fail("block (%u, %u, %u): thread (%u, %u, %u) %s, but thread (%u, %u, %u) %s", lc_emu_block_index.x, lc_emu_block_index.y,
                lc_emu_block_index.z, a->index.x, a->index.y, a->index.z, state_text(a, one, sizeof one), b->index.x, b->index.y, b->index.z,
                state_text(b, other, sizeof other));
}

/* ---- a block --------------------------------------------------------------------------------------------------------- */
/* Runs the lanes of a warp until each has returned or waits at a barrier. */
static void run_warp(int w) {
    int first = w * LC_EMU_WARP, n = thread_count - first < LC_EMU_WARP ? thread_count - first : LC_EMU_WARP;
    uint16_t order[LC_EMU_WARP];
    permute(order, n);
    for (int again = 1; again;) {
        again = 0;
        for (int i = 0; i < n; i++) {
            lc_emu_thread *t = &threads[first + order[i]];
            if (t->state > RUNNABLE) continue;
            resume(t);
            if (aborted) return;
            again = 1;
        }
    }
    for (int i = 0; i < n; i++) {
        lc_emu_thread *t = &threads[first + i];
        if (t->state != AT_WARP) continue;
        for (int j = 0; j < LC_EMU_WARP; j++) {
            if (!(t->mask >> j & 1)) continue;
            if (j >= n) lc_emu_fail("%s: lane %d of mask %08x is beyond the block's %d threads", t->what, j, t->mask, thread_count);
            else if (t[j - i].state != AT_WARP || t[j - i].mask != t->mask || t[j - i].collect != t->collect) stuck(t, &t[j - i]);
            if (aborted) return;
        }
    }
}

/* Opens the barriers that are complete; 0 if there is none and threads still wait. */
static int open_barriers(void) {
    int waiting[LC_EMU_BARRIERS], said[LC_EMU_BARRIERS] = {0}, opened = 0, done = 0;
    memcpy(waiting, passed, sizeof waiting);
    for (int i = 0; i < thread_count; i++) {
        const lc_emu_thread *t = &threads[i];
        if (t->state == AT_BARRIER) waiting[t->barrier]++, said[t->barrier] += t->said;
        else done++;
    }
    if (done == thread_count) return 1;
    for (int i = 0; i < thread_count; i++) {
        lc_emu_thread *t = &threads[i];
        if (t->state != AT_BARRIER || waiting[t->barrier] != t->expected) continue;
        t->said = said[t->barrier];
        t->state = RUNNABLE;
        passed[t->barrier] = 0;
        opened = 1;
    }
    return opened;
}

static void barrier_error(void) {
    const lc_emu_thread *a = NULL;
    for (int i = 0; i < thread_count && !a; i++)
        if (threads[i].state == AT_BARRIER) a = &threads[i];
    for (int i = 0; i < thread_count; i++)
        if (threads[i].state != AT_BARRIER || threads[i].barrier != a->barrier || threads[i].expected != a->expected) {
            stuck(a, &threads[i]);
            return;
        }
    lc_emu_fail("barrier %d waits for %d threads of a block of %d", a->barrier, a->expected, thread_count);
}

static void run_block(void) {
    uint16_t order[LC_EMU_THREADS / LC_EMU_WARP];
    int warps = (thread_count + LC_EMU_WARP - 1) / LC_EMU_WARP;
    for (int i = 0; i < thread_count; i++) {
        threads[i].state = FRESH;
        threads[i].copy_count = threads[i].copy_group = 0;
    }
    memset(arrived, 0, sizeof arrived);
    memset(passed, 0, sizeof passed);
    for (;;) {
        int live = 0;
        permute(order, warps);
        for (int w = 0; w < warps; w++) {
            run_warp(order[w]);
            if (aborted) return;
        }
        for (int i = 0; i < thread_count && !live; i++) live = threads[i].state != DONE;
        if (!live) return;
        if (!open_barriers()) {
            barrier_error();
            return;
        }
    }
}

/* ---- shared memory --------------------------------------------------------------------------------------------------- */
/* Variables in shared memory are thread-local ones of this library: so all of them lie in one piece, which is found here. */
static __thread char in_the_piece;
static char *static_shared;
static size_t static_shared_bytes;

static int find_piece(struct dl_phdr_info *info, size_t size, void *unused) {
    (void)size, (void)unused;
    char *p = info->dlpi_tls_data;
    for (int i = 0; i < info->dlpi_phnum && p; i++) {
        const ElfW(Phdr) *h = &info->dlpi_phdr[i];
        if (h->p_type != PT_TLS || &in_the_piece < p || &in_the_piece >= p + h->p_memsz) continue;
        static_shared = p;
        static_shared_bytes = h->p_memsz;
        return 1;
    }
    return 0;
}

static void poison_shared(size_t bytes) {
    memset(lc_emu_shared, POISON, bytes);
    memset(static_shared, POISON, static_shared_bytes);
}

/* ---- a launch -------------------------------------------------------------------------------------------------------- */
static struct { const void *kernel; size_t bytes; } allowed[256];
static int allowed_count;

void lc_emu_allow_shared(const void *kernel, size_t bytes) {
    for (int i = 0; i < allowed_count; i++)
        if (allowed[i].kernel == kernel) {
            allowed[i].bytes = bytes;
            return;
        }
    if (allowed_count == 256) allowed_count = 0;
    allowed[allowed_count].kernel = kernel;
    allowed[allowed_count++].bytes = bytes;
}

static int check_limits(const void *kernel, dim3 grid, dim3 block, size_t shared) {
    size_t most = SHARED_STATIC_LIMIT;
    uint64_t n = (uint64_t)block.x * block.y * block.z;
    for (int i = 0; i < allowed_count; i++)
        if (allowed[i].kernel == kernel && allowed[i].bytes > most) most = allowed[i].bytes;
    if (!n || n > LC_EMU_THREADS || block.z > 64) lc_emu_fail("a block of (%u, %u, %u) threads", block.x, block.y, block.z);
    else if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
        lc_emu_fail("a grid of (%u, %u, %u) blocks", grid.x, grid.y, grid.z);
    else if (shared > most || shared > SHARED_ROOM)
        lc_emu_fail("%zu bytes of shared memory, where %zu are allowed (allow_shared allows more)", shared, most);
    return aborted;
}

static void name_threads(dim3 block) {
    thread_count = (int)(block.x * block.y * block.z);
    for (int i = 0; i < thread_count; i++) {
        lc_emu_thread *t = &threads[i];
        uint32_t n = (uint32_t)i;
        t->index.x = n % block.x;
        t->index.y = n / block.x % block.y;
        t->index.z = n / block.x / block.y;
        t->flat = n;
        t->lane = n % LC_EMU_WARP;
        t->stack = stacks + (size_t)i * (LC_EMU_STACK + PAGE) + PAGE;
    }
}

void lc_emu_launch(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared, void (*body)(void *), void *ctx) {
    if (has_error) return; /* what follows a failed kernel is not run */
    launch.name = name, launch.body = body, launch.ctx = ctx;
    aborted = 0;
    if (check_limits(kernel, grid, block, shared)) return;
    lc_emu_grid_dim = grid;
    lc_emu_block_dim = block;
    lc_emu_shared = shared_room + SHARED_ROOM - (shared + 15) / 16 * 16;
    name_threads(block);
    lc_emu_open_memory(1);
    uint64_t n = (uint64_t)grid.x * grid.y * grid.z, first = lc_emu_order == LC_EMU_RANDOM ? random_below((uint32_t)n) : 0;
    for (uint64_t i = 0; i < n && !aborted; i++) {
        uint64_t b = block_at(i, n, first);
        lc_emu_block_index.x = (unsigned)(b % grid.x);
        lc_emu_block_index.y = (unsigned)(b / grid.x % grid.y);
        lc_emu_block_index.z = (unsigned)(b / grid.x / grid.y);
        poison_shared((shared + 15) / 16 * 16);
        run_block();
    }
    lc_emu_open_memory(0);
    launch.name = NULL;
}

void lc_emu_end_launch(void) {
    lc_emu_now = NULL;
    aborted = 1;
    lc_emu_open_memory(0);
    launch.name = NULL;
}

/* ---- faults ---------------------------------------------------------------------------------------------------------- */
static void on_fault(int number, siginfo_t *info, void *context) {
    if (!lc_emu_recoverable) {
        signal(number, SIG_DFL); /* the instruction faults again */
        return;
    }
    const void *at = number == SIGSEGV || number == SIGBUS ? info->si_addr : NULL, *code = NULL;
    Dl_info from = {0};
#if defined(__x86_64__)
    code = (const void *)((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP];
#else
    (void)context;
#endif
    if (code) dladdr(code, &from);
    aborted = 1;
    char text[500];
    snprintf(text, sizeof text, "%s%s at code offset 0x%zx of %s (%s)", number == SIGILL ? "a check failed (alignment, bounds, shift or overflow)"
             : number == SIGFPE ? "an integer division by zero" : "touched ", at ? lc_emu_where(at) : number == SIGSEGV ? "a wild address" : "",
             code ? (size_t)((const char *)code - (const char *)from.dli_fbase) : 0, from.dli_fname ? from.dli_fname : "?",
             from.dli_sname ? from.dli_sname : "addr2line -Cfie finds the line");
    lc_emu_thread *now = lc_emu_now;
    char where[300];
    if (launch.name) describe_thread(where, sizeof where);
    else snprintf(where, sizeof where, "host code");
    lc_emu_now = now;
    if (!has_error) snprintf(error_text, sizeof error_text, "%s: %s", where, text);
    has_error = 1;
    siglongjmp(lc_emu_recover, 1);
}

static void handle_faults(void) {
    static char stack[64 << 10];
    stack_t alternate = {.ss_sp = stack, .ss_size = sizeof stack};
    sigaltstack(&alternate, NULL);
    struct sigaction a = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    sigaction(SIGSEGV, &a, NULL);
    sigaction(SIGBUS, &a, NULL);
    sigaction(SIGILL, &a, NULL);
    sigaction(SIGFPE, &a, NULL);
}

void lc_emu_start(void) {
    const char *order = getenv("LOLCATS_EMULATOR_ORDER");
    if (order && !strncmp(order, "random", 6)) {
        lc_emu_order = LC_EMU_RANDOM;
        random_state = order[6] == ':' ? strtoull(order + 7, NULL, 10) : 0;
    } else {
        lc_emu_order = order && !strcmp(order, "reverse") ? LC_EMU_REVERSE : LC_EMU_FORWARD;
    }
    if (stacks) return;
    size_t each = LC_EMU_STACK + PAGE; /* a closed page below each stack */
    stacks = mmap(NULL, each * LC_EMU_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    for (size_t i = 0; i < LC_EMU_THREADS; i++) mprotect(stacks + i * each, PAGE, PROT_NONE);
    shared_room = mmap(NULL, SHARED_ROOM + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(shared_room + SHARED_ROOM, PAGE, PROT_NONE);
    in_the_piece = 1;
    dl_iterate_phdr(find_piece, NULL);
    handle_faults();
}
