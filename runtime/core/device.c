/* device.c: the CPU, and plugins: shared libraries opened at the first mention of their kind of device, refused with a reason when
 * they were built for another op table, and never closed (live driver threads). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../../kernels/abi.h"
#include "core.h"

enum { MAX_PLUGINS = 4 };
static lc_device devices[LC_MAX_DEVICES] = {{"cpu", NULL, 0}};
static int device_count = 1;
static struct {
    char kind[16], why[512];
    lc_backend backend;
    bool tried, ok;
} plugins[MAX_PLUGINS];
static int plugin_count;

static const lc_kernel *cpu_f32, *cpu_f64;
static const char *cpu_isa;

const lc_host lc_host_services = {lc_parallel, lc_thread_count, lc_option_value};

static void choose_isa(const char *isa) {
    cpu_isa = isa;
    cpu_f32 = lc_cpu_kernels(isa, 0);
    cpu_f64 = lc_cpu_kernels(isa, 1);
}

const char *lc_cpu_isa(const char *force) {
    if (!cpu_f32) {
        const char *env = getenv("LOLCATS_ISA");
        choose_isa(lc_cpu_best_isa());
        if (env && *env && lc_cpu_kernels(env, 0)) choose_isa(env);
    }
    if (force) {
        if (!lc_cpu_kernels(force, 0)) {
            lc_fail(LC_EARG, "no kernels for \"%s\" here", force);
            return "";
        }
        choose_isa(force);
    }
    return cpu_isa;
}

const char *lc_cpu_gemm(const char *force) {
    const char *why;
    return lc_cpu_gemm_provider(force, &why);
}

const char *lc_cpu_gemm_why(void) {
    const char *why = "";
    lc_cpu_gemm_provider(NULL, &why);
    return why ? why : "";
}

const lc_kernel *lc_device_kernel(int device, int op, bool is_double) {
    const lc_backend *b = devices[device].backend;
    if (b) return &b->kernels[op];
    if (!cpu_f32) lc_cpu_isa(NULL);
    return is_double ? &cpu_f64[op] : &cpu_f32[op];
}

const lc_device *lc_device_get(int device) { return &devices[device < 0 || device >= device_count ? 0 : device]; }
int lc_device_count(void) { return device_count; }
const char *lc_device_name(int device) { return device >= 0 && device < device_count ? devices[device].name : ""; }

const char *lc_device_describe(int device) {
    if (device < 0 || device >= device_count) return "";
    const lc_device *d = &devices[device];
    static char text[64];
    if (d->backend) return d->backend->describe(d->index);
    snprintf(text, sizeof text, "%d threads, %s", lc_thread_count(), lc_cpu_isa(NULL));
    return text;
}

int lc_device_sync(int device) {
    if (device < 0 || device >= device_count) return lc_fail(LC_EDEVICE, "no device %d", device);
    const lc_device *d = &devices[device];
    if (d->backend && d->backend->sync(d->index)) return lc_fail(LC_EDEVICE, "%s: %s", d->name, d->backend->last_error());
    return LC_OK;
}

/* ---- plugins --------------------------------------------------------------------------------------------------------- */
static int find_plugin(const char *kind) {
    for (int i = 0; i < plugin_count; i++)
        if (!strcmp(plugins[i].kind, kind)) return i;
    if (plugin_count == MAX_PLUGINS) return -1;
    snprintf(plugins[plugin_count].kind, sizeof plugins[0].kind, "%s", kind);
    return plugin_count++;
}

static lc_status open_plugin(int p, const char *path) {
    plugins[p].tried = true;
    void *lib = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!lib) {
        snprintf(plugins[p].why, sizeof plugins[p].why, "%s", dlerror());
        return lc_fail(LC_EDEVICE, "%s", plugins[p].why);
    }
    lc_plugin_open_fn open;
    *(void **)&open = dlsym(lib, "lc_plugin_open");
    const char *why = "it exports no lc_plugin_open";
    lc_backend b;
    memset(&b, 0, sizeof b);
    if (!open || open(&lc_host_services, &b, &why)) {
        snprintf(plugins[p].why, sizeof plugins[p].why, "%s: %s", path, why);
        return lc_fail(LC_EDEVICE, "%s", plugins[p].why);
    }
    if (b.abi != lc_kernel_abi()) {
        snprintf(plugins[p].why, sizeof plugins[p].why, "%s was built for another version (abi %016lx, expected %016lx)", path,
                 (unsigned long)b.abi, (unsigned long)lc_kernel_abi());
        return lc_fail(LC_EDEVICE, "%s", plugins[p].why);
    }
    plugins[p].backend = b;
    plugins[p].ok = true;
    plugins[p].why[0] = 0;
    for (int i = 0; i < b.count() && device_count < LC_MAX_DEVICES; i++) {
        lc_device *d = &devices[device_count++];
        snprintf(d->name, sizeof d->name, "%.15s:%d", b.kind, i);
        d->backend = &plugins[p].backend;
        d->index = i;
    }
    return LC_OK;
}

int lc_load_plugin(const char *path) {
    const char *base = strrchr(path, '/');
    char kind[16] = "plugin";
    sscanf(base ? base + 1 : path, "liblolcats_%15[a-z]", kind);
    int p = find_plugin(kind);
    if (p < 0) return lc_fail(LC_EDEVICE, "more than %d plugins", MAX_PLUGINS);
    if (plugins[p].ok) return LC_OK;
    return open_plugin(p, path);
}

/* Looks in LOLCATS_PLUGINS, beside the executable, and in ../lib/lolcats. */
static lc_status load_kind(const char *kind) {
    int p = find_plugin(kind);
    if (p < 0) return lc_fail(LC_EDEVICE, "more than %d plugins", MAX_PLUGINS);
    if (plugins[p].ok) return LC_OK;
    char self[1024], path[1400];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    self[n > 0 ? n : 0] = 0;
    char *slash = strrchr(self, '/');
    if (slash) *slash = 0;
    const char *env = getenv("LOLCATS_PLUGINS");
    const char *const folder[] = {env, self, "lib/lolcats"};
    for (int i = 0; i < 3; i++) {
        if (!folder[i] || !*folder[i]) continue;
        if (i == 2) snprintf(path, sizeof path, "%s/../%s/liblolcats_%s.so", self, folder[i], kind);
        else snprintf(path, sizeof path, "%s/liblolcats_%s.so", folder[i], kind);
        if (access(path, R_OK) == 0) return open_plugin(p, path);
    }
    snprintf(plugins[p].why, sizeof plugins[p].why, "liblolcats_%s.so is not beside the program, in ../lib/lolcats or in LOLCATS_PLUGINS", kind);
    return lc_fail(LC_EDEVICE, "%s", plugins[p].why);
}

const char *lc_plugin_why(const char *kind) {
    int p = find_plugin(kind);
    if (p < 0) return "too many plugins";
    if (!plugins[p].tried && !plugins[p].ok) load_kind(kind);
    return plugins[p].why;
}

static int named_device(const char *name) {
    for (int i = 0; i < device_count; i++)
        if (!strcmp(devices[i].name, name)) return i;
    return -1;
}

int lc_device_find(const char *name) {
    char kind[16] = "", full[40];
    int index = 0;
    if (sscanf(name, "%15[a-z]:%d", kind, &index) < 1 || strlen(name) > 20) {
        lc_fail(LC_EDEVICE, "no device \"%.40s\"; devices are cpu, cuda, cuda:1", name);
        return -1;
    }
    if (!strcmp(name, "cpu")) return 0;
    snprintf(full, sizeof full, "%s:%d", kind, index);
    int d = named_device(full);
    if (d >= 0) return d;
    if (load_kind(kind) != LC_OK) {
        lc_fail_in(LC_EDEVICE, "no device %s: ", full);
        return -1;
    }
    d = named_device(full);
    if (d < 0) lc_fail(LC_EDEVICE, "no device %s: %d of that kind", full, plugins[find_plugin(kind)].backend.count());
    return d;
}
