/* options.c: the switches that select a fast path's plain twin, by name. */
#include <string.h>

#include "core.h"

static int values[LC_OPTION_COUNT];
static const char *const names[LC_OPTION_COUNT] = {"plain_attention", "plain_hybrid", "plain_linear", "plain_loss", "plain_pointwise"};

int lc_option_value(int which) { return which >= 0 && which < LC_OPTION_COUNT ? values[which] : 0; }

int lc_set_option(const char *name, int value) {
    for (int i = 0; i < LC_OPTION_COUNT; i++)
        if (!strcmp(name, names[i])) {
            values[i] = value;
            return LC_OK;
        }
    return lc_fail(LC_EARG, "no option \"%s\"", name);
}

int lc_get_option(const char *name) {
    for (int i = 0; i < LC_OPTION_COUNT; i++)
        if (!strcmp(name, names[i])) return values[i];
    return -1;
}
