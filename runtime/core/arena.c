/* arena.c: one piece of memory handed out in parts of any size: the smallest hole that fits, holes joined as they meet. For work that
 * takes and gives back the same sizes each time, as a recorded step does: its parts need little more than the most that is in use at
 * once, where lists of blocks by size need the most of each size. */
#include <stdlib.h>
#include <string.h>

#include "core.h"

enum { ARENA_HOLES = 512, ARENA_UNIT = 4096 };

struct lc_arena {
    char *base;
    size_t size, in_use;
    int holes;
    struct { size_t at, bytes; } hole[ARENA_HOLES]; /* by address, none beside the next */
};

lc_arena *lc_arena_new(void *base, size_t bytes) {
    lc_arena *a = lc_alloc(1, sizeof *a);
    if (!a) return NULL;
    a->base = base;
    a->size = bytes / ARENA_UNIT * ARENA_UNIT;
    a->in_use = 0;
    a->holes = 1;
    a->hole[0].at = 0;
    a->hole[0].bytes = a->size;
    return a;
}

void *lc_arena_base(const lc_arena *a) { return a->base; }
size_t lc_arena_in_use(const lc_arena *a) { return a->in_use; }
bool lc_arena_holds(const lc_arena *a, const void *p) { return (const char *)p >= a->base && (const char *)p < a->base + a->size; }

void *lc_arena_take(lc_arena *a, size_t bytes, size_t *granted) {
    size_t need = (bytes + ARENA_UNIT - 1) / ARENA_UNIT * ARENA_UNIT;
    int best = -1;
    for (int i = 0; i < a->holes; i++)
        if (a->hole[i].bytes >= need && (best < 0 || a->hole[i].bytes < a->hole[best].bytes)) best = i;
    if (best < 0 || !need) return NULL;
    void *p = a->base + a->hole[best].at;
    a->hole[best].at += need;
    a->hole[best].bytes -= need;
    if (!a->hole[best].bytes) {
        a->holes--;
        memmove(&a->hole[best], &a->hole[best + 1], (size_t)(a->holes - best) * sizeof a->hole[0]);
    }
    a->in_use += need;
    *granted = need;
    return p;
}

/* A part as it was granted. With too many holes to note one more it is lost until the arena goes. */
void lc_arena_give(lc_arena *a, void *p, size_t granted) {
    size_t at = (size_t)((char *)p - a->base);
    int i = 0;
    a->in_use -= granted;
    while (i < a->holes && a->hole[i].at < at) i++;
    bool before = i > 0 && a->hole[i - 1].at + a->hole[i - 1].bytes == at;
    bool after = i < a->holes && at + granted == a->hole[i].at;
    if (before) {
        a->hole[i - 1].bytes += granted;
        if (!after) return;
        a->hole[i - 1].bytes += a->hole[i].bytes;
        a->holes--;
        memmove(&a->hole[i], &a->hole[i + 1], (size_t)(a->holes - i) * sizeof a->hole[0]);
    } else if (after) {
        a->hole[i].at = at;
        a->hole[i].bytes += granted;
    } else if (a->holes < ARENA_HOLES) {
        memmove(&a->hole[i + 1], &a->hole[i], (size_t)(a->holes - i) * sizeof a->hole[0]);
        a->hole[i].at = at;
        a->hole[i].bytes = granted;
        a->holes++;
    }
}
