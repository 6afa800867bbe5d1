/* memory.c: storages, the caching allocator under them, and scopes. Freed blocks are kept by size class and handed out again, so
 * that a training step touches the same pages as the one before (fresh pages cost more than the arithmetic on them). Classes
 * stand an eighth of an octave apart: at most 1/8 is lost to rounding. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "core.h"

enum { CLASSES = 8 * 40, MAP_FROM = 1 << 18, MAX_SCOPES = 256 };

typedef struct free_list {
    void **item;
    int32_t count, room;
} free_list;

static struct pool {
    free_list list[CLASSES];
    double live, cached, peak, limit, kept; /* kept: of live, what stays with graphs */
    double mark, high;                      /* live at the last mark, and the most since */
} pools[LC_MAX_DEVICES];

/* Blocks given back while a graph is recorded (graph.c): they count as live until it is freed. Larger ones are parts of an arena. */
enum { ARENA_FROM = 1 << 20 };
struct lc_keep {
    int device;
    bool ended;     /* freed, but for parts of the arena that somebody still holds */
    lc_arena *arena;
    size_t room;    /* of the arena */
    lc_keep *next;  /* those with an arena */
    free_list list[CLASSES];
};
static lc_keep *keeping, *with_arena;

double lc_debt = 0;

/* ---- size classes ---------------------------------------------------------------------------------------------------- */
/* Class k holds blocks of (8 + k % 8) << (k / 8) units of 64 bytes, from 1 unit up: small sizes take the first classes. */
static int class_of(size_t bytes, size_t *granted) {
    size_t units = (bytes + 63) / 64;
    if (units <= 8) {
        if (!units) units = 1;
        *granted = units * 64;
        return (int)units - 1;
    }
    int shift = 63 - __builtin_clzll((unsigned long long)(units - 1)) - 3; /* units in (8 << shift, 16 << shift] */
    size_t step = (size_t)1 << shift, q = (units + step - 1) / step;       /* 9 .. 16 */
    *granted = q * step * 64;
    return 8 + shift * 8 + (int)(q - 9);
}

static size_t class_bytes(int k) { return k < 8 ? (size_t)(k + 1) * 64 : (size_t)(9 + k % 8) << (k / 8 - 1 + 6); }

/* ---- the system below ------------------------------------------------------------------------------------------------ */
static void *system_alloc(int device, size_t bytes) {
    const lc_device *d = lc_device_get(device);
    void *p = NULL;
    if (d->backend) return d->backend->alloc(d->index, bytes, &p) ? NULL : p;
    if (bytes < MAP_FROM) {
        void *p;
        return posix_memalign(&p, 64, bytes) == 0 ? p : NULL; /* of any size, unlike aligned_alloc */
    }
    p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return NULL;
    if (bytes >= (size_t)4 << 20) madvise(p, bytes, MADV_HUGEPAGE);
    return p;
}

static void system_free(int device, void *p, size_t bytes) {
    const lc_device *d = lc_device_get(device);
    if (d->backend) d->backend->release(d->index, p, bytes);
    else if (bytes < MAP_FROM) free(p);
    else munmap(p, bytes);
}

/* ---- the cache ------------------------------------------------------------------------------------------------------- */
/* LOLCATS_EXACT_MEMORY: every block has its own size and goes back at once, for tools that find reads and writes beyond them. */
static bool exact_memory(void) {
    static int on = -1;
    if (on < 0) on = getenv("LOLCATS_EXACT_MEMORY") != NULL;
    return on;
}

static bool push_block(free_list *l, void *p) {
    if (l->count == l->room) {
        int32_t room = l->room ? 2 * l->room : 16;
        void **item = realloc(l->item, (size_t)room * sizeof *item);
        if (!item) return false;
        l->item = item;
        l->room = room;
    }
    l->item[l->count++] = p;
    return true;
}

static lc_status no_memory(int device, size_t bytes, bool over) {
    const lc_device *d = lc_device_get(device);
    size_t left = 0, all = 0;
    char rest[80] = "";
    if (over) snprintf(rest, sizeof rest, " (limit reached)");
    else if (d->backend && d->backend->memory && !d->backend->memory(d->index, &left, &all)) /* other processes may hold some */
        snprintf(rest, sizeof rest, ", %.1f of the device's %.1f MB are free", (double)left / 1e6, (double)all / 1e6);
    return lc_fail(LC_ENOMEM, "out of memory on %s: %.1f MB wanted by %s, %.1f MB in use here%s", d->name, (double)bytes / 1e6, lc_current_op(),
                   pools[device].live / 1e6, rest);
}

/* The piece of memory that the larger blocks of a recording are cut from. Without it they are blocks like others. */
static void make_arena(lc_keep *k, double room) {
    struct pool *p = &pools[k->device];
    size_t bytes = ((size_t)room >> 16 << 16) + 65536;
    if (room < ARENA_FROM) return;
    lc_trim(k->device); /* what steps before this one have used */
    if (p->limit > 0 && p->live + (double)bytes > p->limit) return;
    void *base = system_alloc(k->device, bytes);
    if (!base) return;
    if (!(k->arena = lc_arena_new(base, bytes))) {
        system_free(k->device, base, bytes);
        return;
    }
    k->room = bytes;
    k->next = with_arena;
    with_arena = k;
    p->live += (double)bytes;
    p->kept += (double)bytes;
    if (p->live > p->peak) p->peak = p->live;
}

static void end_arena(lc_keep *k) {
    lc_keep **at = &with_arena;
    while (*at != k) at = &(*at)->next;
    *at = k->next;
    pools[k->device].live -= (double)k->room;
    pools[k->device].kept -= (double)k->room;
    system_free(k->device, lc_arena_base(k->arena), k->room);
    free(k->arena);
    free(k);
}

/* Was it part of an arena? Then it is so again. */
static bool given_to_arena(int device, void *ptr, size_t granted) {
    for (lc_keep *k = with_arena; k; k = k->next) {
        if (k->device != device || !lc_arena_holds(k->arena, ptr)) continue;
        lc_arena_give(k->arena, ptr, granted);
        pools[device].kept += (double)granted;
        if (k->ended && !lc_arena_in_use(k->arena)) end_arena(k);
        return true;
    }
    return false;
}

lc_status lc_scratch(int device, size_t bytes, void **out, size_t *granted) {
    struct pool *p = &pools[device];
    if (keeping && keeping->device == device && keeping->arena && bytes >= ARENA_FROM && (*out = lc_arena_take(keeping->arena, bytes, granted))) {
        p->kept -= (double)*granted;
        return LC_OK;
    }
    int k = class_of(bytes, granted);
    if (k >= CLASSES) return lc_fail(LC_ENOMEM, "an allocation of %.1f GB", (double)bytes / 1e9);
    if (keeping && keeping->device == device && keeping->list[k].count) {
        *out = keeping->list[k].item[--keeping->list[k].count];
        p->kept -= (double)*granted;
        return LC_OK;
    }
    if (exact_memory()) *granted = bytes;
    free_list *l = &p->list[k];
    if (l->count) {
        *out = l->item[--l->count];
        p->cached -= (double)*granted;
    } else {
        bool over = p->limit > 0 && p->live + p->cached + (double)*granted > p->limit;
        if (over && p->live + (double)*granted <= p->limit) {
            lc_trim(device);
            over = false;
        }
        *out = over ? NULL : system_alloc(device, *granted);
        if (!*out && !over) {
            lc_trim(device);
            *out = system_alloc(device, *granted);
        }
        if (!*out) return no_memory(device, bytes, over);
    }
    p->live += (double)*granted;
    if (p->live > p->peak) p->peak = p->live;
    if (p->live > p->high) p->high = p->live;
    return LC_OK;
}

void lc_scratch_release(int device, void *ptr, size_t granted) {
    struct pool *p = &pools[device];
    size_t again;
    if (with_arena && given_to_arena(device, ptr, granted)) return;
    int k = class_of(granted, &again);
    if (keeping && keeping->device == device && again == granted && push_block(&keeping->list[k], ptr)) {
        p->kept += (double)granted;
        return;
    }
    p->live -= (double)granted;
    if (exact_memory() || !push_block(&p->list[k], ptr)) system_free(device, ptr, granted);
    else p->cached += (double)granted;
}

double lc_kept_bytes(int device) { return pools[device].kept; }

lc_status lc_keep_begin(int device, double room) {
    if (exact_memory()) return lc_fail(LC_ENOKERNEL, "with LOLCATS_EXACT_MEMORY no block may stay with a graph");
    keeping = lc_alloc(1, sizeof *keeping);
    if (!keeping) return LC_ENOMEM;
    memset(keeping, 0, sizeof *keeping);
    keeping->device = device;
    make_arena(keeping, room);
    return LC_OK;
}

lc_keep *lc_keep_end(void) {
    lc_keep *k = keeping;
    keeping = NULL;
    return k;
}

void lc_keep_free(lc_keep *k) {
    for (int i = 0; k && i < CLASSES; i++) {
        while (k->list[i].count) {
            pools[k->device].kept -= (double)class_bytes(i);
            lc_scratch_release(k->device, k->list[i].item[--k->list[i].count], class_bytes(i));
        }
        free(k->list[i].item);
    }
    if (k && k->arena) {
        k->ended = true;
        if (!lc_arena_in_use(k->arena)) end_arena(k);
        return;
    }
    free(k);
}

int lc_trim(int device) {
    if (device < 0 || device >= LC_MAX_DEVICES) return lc_fail(LC_EDEVICE, "no device %d", device);
    struct pool *p = &pools[device];
    for (int k = 0; k < CLASSES; k++) {
        while (p->list[k].count) system_free(device, p->list[k].item[--p->list[k].count], class_bytes(k));
    }
    p->cached = 0;
    return LC_OK;
}

/* ---- storages -------------------------------------------------------------------------------------------------------- */
static lc_storage *free_storages; /* linked by ctx */

static lc_storage *storage_header(void) {
    lc_storage *s = free_storages;
    if (s) free_storages = s->ctx;
    else s = lc_alloc(1, sizeof *s);
    if (s) memset(s, 0, sizeof *s);
    return s;
}

lc_status lc_storage_new(int device, size_t bytes, lc_storage **out) {
    lc_storage *s = storage_header();
    if (!s) return LC_ENOMEM;
    lc_status rc = lc_scratch(device, bytes ? bytes : 1, &s->ptr, &s->bytes);
    if (rc != LC_OK) {
        s->ctx = free_storages;
        free_storages = s;
        return rc;
    }
    s->refs = 1;
    s->device = device;
    if (lc_scope_depth() == 0) lc_debt += (double)s->bytes;
    *out = s;
    return LC_OK;
}

lc_status lc_storage_wrap(void *ptr, size_t bytes, void (*release)(void *ctx), void *ctx, lc_storage **out) {
    lc_storage *s = storage_header();
    if (!s) return LC_ENOMEM;
    s->refs = 1;
    s->ptr = ptr;
    s->bytes = bytes;
    s->readonly = 1;
    s->release = release;
    s->ctx = ctx;
    *out = s;
    return LC_OK;
}

static void drop_prepared(lc_storage *s) {
    if (s->prepared.data && s->prepared.release) s->prepared.release(s->prepared.data);
    memset(&s->prepared, 0, sizeof s->prepared);
}

void lc_storage_release(lc_storage *s) {
    if (--s->refs > 0) return;
    drop_prepared(s);
    if (s->release) s->release(s->ctx);
    else if (!s->readonly) lc_scratch_release(s->device, s->ptr, s->bytes);
    s->ctx = free_storages;
    free_storages = s;
}

void lc_storage_written(lc_storage *s) {
    s->version++;
    if (s->prepared.data) drop_prepared(s);
}

/* ---- scopes ---------------------------------------------------------------------------------------------------------- */
static lc_tensor *scope_list[MAX_SCOPES + 1];
static int depth;

int lc_scope_depth(void) { return depth; }

int lc_scope_push(void) {
    if (depth < MAX_SCOPES) depth++;
    scope_list[depth] = NULL;
    return depth;
}

void lc_scope_forget(lc_tensor *t) {
    if (!t->scope) return;
    if (t->prev) t->prev->next = t->next;
    else scope_list[t->scope] = t->next;
    if (t->next) t->next->prev = t->prev;
    t->prev = t->next = NULL;
    t->scope = 0;
}

static void adopt_at(lc_tensor *t, int level) {
    t->scope = level;
    if (!level) return;
    t->prev = NULL;
    t->next = scope_list[level];
    if (t->next) t->next->prev = t;
    scope_list[level] = t;
}

void lc_scope_adopt(lc_tensor *t) { adopt_at(t, depth); }

int lc_scope_pop(void) {
    if (depth == 0) return lc_fail(LC_EARG, "no scope to end");
    lc_tensor *t = scope_list[depth];
    scope_list[depth] = NULL;
    depth--;
    while (t) {
        lc_tensor *next = t->next;
        t->prev = t->next = NULL;
        t->scope = 0;
        t->has_handle = 0;
        t->gen++;
        lc_release(t);
        t = next;
    }
    return LC_OK;
}

int lc_promote(const lc_handle *h, int levels) {
    lc_tensor *t = lc_get(h);
    if (!t) return LC_ESTALE;
    int to = t->scope - levels;
    if (to < 0) to = 0;
    if (t->scope == to) return LC_OK;
    lc_scope_forget(t);
    adopt_at(t, to);
    return LC_OK;
}

int lc_scope_of(const lc_handle *h) {
    lc_tensor *t = lc_get(h);
    return t ? t->scope : -1;
}

/* ---- counters -------------------------------------------------------------------------------------------------------- */
double lc_memory(int device, const char *what) {
    if (device < 0 || device >= LC_MAX_DEVICES) return -1;
    const struct pool *p = &pools[device];
    if (!strcmp(what, "live")) return p->live;
    if (!strcmp(what, "cached")) return p->cached;
    if (!strcmp(what, "peak")) return p->peak;
    if (!strcmp(what, "limit")) return p->limit;
    if (!strcmp(what, "rise")) return p->high - p->mark;
    if (!strcmp(what, "free") || !strcmp(what, "total")) { /* of the device itself; 0: not known */
        const lc_device *d = lc_device_get(device);
        size_t left = 0, all = 0;
        if (!d->backend || !d->backend->memory || d->backend->memory(d->index, &left, &all)) return 0;
        return what[0] == 'f' ? (double)left + p->cached : (double)all;
    }
    return -1;
}

int lc_memory_reset_peak(int device) {
    if (device < 0 || device >= LC_MAX_DEVICES) return lc_fail(LC_EDEVICE, "no device %d", device);
    pools[device].peak = pools[device].live;
    return LC_OK;
}

int lc_memory_mark(int device) {
    if (device < 0 || device >= LC_MAX_DEVICES) return lc_fail(LC_EDEVICE, "no device %d", device);
    pools[device].mark = pools[device].high = pools[device].live;
    return LC_OK;
}

int lc_memory_limit(int device, double bytes) {
    if (device < 0 || device >= LC_MAX_DEVICES) return lc_fail(LC_EDEVICE, "no device %d", device);
    pools[device].limit = bytes;
    return LC_OK;
}
