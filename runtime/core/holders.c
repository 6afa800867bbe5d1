/* holders.c: who holds a device's memory, for the message when it runs out: live storages by the names of their tensors (numbers of layers
 * taken together), by what their tensors are gradients of, by the op whose result the tape keeps, by scope. */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"

enum { LABEL = 96, MOST = 512, SHOWN = 6 };
typedef struct holder {
    char label[LABEL];
    double bytes;
    int count;
} holder;
typedef struct labelled {
    const lc_storage *storage;
    const lc_tensor *best; /* of its tensors the one that says most */
    const char *of;        /* the name of the tensor whose gradient lies here */
    int worth;
} labelled;

/* A name with its numbers between dots as *: model.layers.*.mlp.gate_up. */
static void common_name(const char *name, char *out, size_t size) {
    size_t n = 0;
    for (const char *p = name; *p && n + 1 < size; p++) {
        bool number = isdigit((unsigned char)*p) && (p == name || p[-1] == '.');
        const char *end = p;
        while (number && isdigit((unsigned char)*end)) end++;
        if (number && (*end == '.' || !*end)) {
            out[n++] = '*';
            p = end - 1;
        } else {
            out[n++] = *p;
        }
    }
    out[n] = 0;
}

static labelled *place_of(labelled *table, size_t room, const lc_storage *s) {
    size_t i = ((uintptr_t)s >> 4) * 0x9e3779b97f4a7c15u % room;
    while (table[i].storage && table[i].storage != s) i = (i + 1) % room;
    return &table[i];
}

static void note(labelled *table, size_t room, const lc_tensor *t, const char *gradient_of) {
    labelled *l = place_of(table, room, t->storage);
    int worth = gradient_of ? 4 : t->name ? 3 : t->node && t->node->op >= 0 ? 2 : 1;
    l->storage = t->storage;
    if (worth < l->worth || (worth == l->worth && lc_tensor_numel(t) <= lc_tensor_numel(l->best))) return; /* the whole before its parts */
    l->worth = worth;
    l->best = t;
    l->of = gradient_of;
}

static void label_of(const labelled *l, char *out) {
    char name[LABEL / 2];
    if (l->of) {
        common_name(l->of, name, sizeof name);
        snprintf(out, LABEL, "gradients of %s", name);
    } else if (l->best->name) {
        common_name(l->best->name, out, LABEL);
    } else if (l->worth == 2) {
        snprintf(out, LABEL, "results of %s, for its gradient", lc_row_of(l->best->node->op)->name);
    } else if (l->best->scope) {
        snprintf(out, LABEL, "tensors without a name in scope %d", l->best->scope);
    } else {
        snprintf(out, LABEL, "tensors without a name outside scopes");
    }
}

static int by_bytes(const void *a, const void *b) {
    double x = ((const holder *)a)->bytes, y = ((const holder *)b)->bytes;
    return x < y ? 1 : x > y ? -1 : 0;
}

static int gather(holder *list, const labelled *table, size_t room) {
    int n = 0;
    for (size_t i = 0; i < room; i++) {
        const labelled *l = &table[i];
        char label[LABEL];
        int at = 0;
        if (!l->storage) continue;
        label_of(l, label);
        while (at < n && strcmp(list[at].label, label)) at++;
        if (at == MOST) at = MOST - 1;
        if (at == n) {
            memcpy(list[n].label, label, LABEL);
            list[n].bytes = list[n].count = 0;
            n++;
        }
        list[at].bytes += (double)l->storage->bytes;
        list[at].count++;
    }
    return n;
}

void lc_memory_holders(int device, char *out, size_t size) {
    uint32_t live = 0, all = lc_header_count();
    for (uint32_t i = 0; i < all; i++) live += lc_header_at(i)->storage != NULL;
    size_t room = (size_t)live * 2 + 16, n = 0;
    labelled *table = calloc(room, sizeof *table);
    holder *list = malloc(MOST * sizeof *list);
    out[0] = 0;
    if (table && list) {
        for (uint32_t i = 0; i < all; i++) {
            const lc_tensor *t = lc_header_at(i);
            if (!t->storage) continue;
            if (t->storage->device == device && !t->storage->release) note(table, room, t, NULL);
            if (t->name && t->grad && t->grad->storage->device == device) note(table, room, t->grad, t->name);
        }
        int count = gather(list, table, room), rest = 0;
        double kept = lc_kept_bytes(device), others = 0;
        if (kept > 0 && count < MOST) {
            snprintf(list[count].label, LABEL, "recorded graphs");
            list[count].bytes = kept, list[count++].count = 1;
        }
        qsort(list, (size_t)count, sizeof *list, by_bytes);
        for (int i = 0; i < count && n < size; i++) {
            if (i >= SHOWN) others += list[i].bytes, rest += list[i].count;
            else n += (size_t)snprintf(out + n, size - n, "\n    %9.1f MB  %s (%d)", list[i].bytes / 1e6, list[i].label, list[i].count);
        }
        if (rest && n < size) snprintf(out + n, size - n, "\n    %9.1f MB  in %d others", others / 1e6, rest);
    }
    free(table);
    free(list);
}
