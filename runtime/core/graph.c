/* graph.c: what a device has recorded, to be run again with one call. The memory that was taken while recording belongs to the graph
 * (memory.c keeps it back): each run writes it anew. One graph is recorded at a time. */
#include <stdlib.h>

#include "core.h"

struct lc_graph {
    int device;
    void *recorded; /* the back-end's */
    lc_keep *memory;
};
static int recording = -1; /* the device */
static double next_room;

void lc_graph_room(double bytes) { next_room = bytes; }

int lc_graph_recording(void) { return recording; }

static lc_status device_error(const lc_device *d) { return lc_fail(LC_EDEVICE, "%s: %s", d->name, d->backend->last_error()); }

int lc_graph_begin(int device) {
    const lc_device *d = lc_device_get(device);
    if (device < 0 || device >= lc_device_count()) return lc_fail(LC_EDEVICE, "no device %d", device);
    if (recording >= 0) return lc_fail(LC_EARG, "a graph is being recorded already");
    if (!d->backend || !d->backend->record_begin) return lc_fail(LC_ENOKERNEL, "%s records no graphs", d->name);
    double room = next_room;
    next_room = 0;
    LC_TRY(lc_keep_begin(device, room));
    if (d->backend->record_begin(d->index)) {
        lc_keep_free(lc_keep_end());
        return device_error(d);
    }
    recording = device;
    return LC_OK;
}

int lc_graph_end(lc_graph **out) {
    if (recording < 0) return lc_fail(LC_EARG, "no graph is being recorded");
    const lc_device *d = lc_device_get(recording);
    lc_graph *g = out ? lc_alloc(1, sizeof *g) : NULL;
    void *recorded = NULL;
    int bad = d->backend->record_end(d->index, g ? &recorded : NULL);
    lc_keep *memory = lc_keep_end();
    int device = recording;
    recording = -1;
    if (bad || !g) {
        lc_keep_free(memory);
        free(g);
        return bad ? device_error(d) : out ? LC_ENOMEM : LC_OK;
    }
    g->device = device;
    g->recorded = recorded;
    g->memory = memory;
    *out = g;
    return LC_OK;
}

int lc_graph_run(lc_graph *g) {
    const lc_device *d = lc_device_get(g->device);
    if (lc_interrupt) return lc_fail(LC_EINTR, "interrupted");
    if (recording == g->device) return lc_fail(LC_EARG, "a graph is being recorded; another one cannot run meanwhile");
    return d->backend->replay(d->index, g->recorded) ? device_error(d) : LC_OK;
}

void lc_graph_free(lc_graph *g) {
    if (!g) return;
    const lc_device *d = lc_device_get(g->device);
    d->backend->forget(d->index, g->recorded);
    lc_keep_free(g->memory);
    free(g);
}
