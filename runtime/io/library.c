/* library.c: opens shared libraries at run time and says what to install where one is missing. */
#define _GNU_SOURCE
#include "library.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

lc_status lc_library_open(const char *const *names, const lc_symbol *symbols, const char *use, const char *package) {
    void *library = NULL;
    for (int i = 0; !library && names[i]; i++) library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return lc_fail(LC_EIO, "%s needs the library %s, which is not on this machine (Debian: apt-get install %s)", use,
                       names[0], package);
    for (const lc_symbol *s = symbols; s->name; s++) {
        void *found = dlsym(library, s->name);
        if (!found) return lc_fail(LC_EIO, "%s: the library %s has no %s: it is too old", use, names[0], s->name);
        memcpy(s->to, &found, sizeof found);
    }
    return LC_OK;
}
