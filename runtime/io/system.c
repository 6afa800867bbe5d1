/* system.c: files and folders as wholes: atomic writing, reading, listing, locks. What is written stands complete and
 * synced under its name or not at all. */
#define _GNU_SOURCE
#include "system.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

void lc_free(void *p) { free(p); }

/* ---- writing aside
 * --------------------------------------------------------------------------------------------------- */

static lc_status aside_fail(const lc_aside *a, const char *what) {
    int why = errno;
    bool kept = a->temp && access(a->path, F_OK) == 0;
    return lc_fail(LC_EIO, "cannot %s %s: %s%s", what, a->path, strerror(why),
                   kept ? "; the old file is untouched" : "");
}

/* The temporary file has a fixed name, so that a killed writer's remains are reused and not piled up; the lock keeps
 * two living writers apart. The file that was locked may have been renamed by its writer meanwhile: then it is not the
 * one at `temp`. */
static lc_status open_temp(lc_aside *a) {
    for (int tries = 0; tries < 100; tries++) {
        struct stat mine, named;
        a->fd = open(a->temp, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
        if (a->fd < 0) return aside_fail(a, "write");
        if (flock(a->fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
            return lc_fail(LC_EIO, "cannot write %s: another process is writing it", a->path);
        if (fstat(a->fd, &mine) == 0 && stat(a->temp, &named) == 0 && mine.st_ino == named.st_ino &&
            mine.st_dev == named.st_dev)
            return ftruncate(a->fd, 0) == 0 ? LC_OK : aside_fail(a, "write");
        close(a->fd);
        a->fd = -1;
    }
    return lc_fail(LC_EIO, "cannot write %s: %s keeps changing", a->path, a->temp);
}

static void aside_forget(lc_aside *a) {
    if (a->fd >= 0) close(a->fd);
    free(a->path);
    free(a->temp);
    *a = (lc_aside){.fd = -1};
}

static lc_status aside_open(lc_aside *a) {
    struct stat st;
    bool there = stat(a->path, &st) == 0;
    if (there && S_ISDIR(st.st_mode)) return lc_fail(LC_EIO, "cannot write %s: it is a folder", a->path);
    if (there && !S_ISREG(st.st_mode)) {
        a->fd = open(a->path, O_WRONLY | O_CLOEXEC);
        return a->fd >= 0 ? LC_OK : aside_fail(a, "write");
    }
    size_t length = strlen(a->path) + sizeof ".tmp";
    a->temp = lc_alloc(length, 1);
    if (!a->temp) return LC_ENOMEM;
    snprintf(a->temp, length, "%s.tmp", a->path);
    LC_TRY(open_temp(a));
    if (there) (void)!fchmod(a->fd, st.st_mode & 0777); /* fails on another owner's file: then it is ours now */
    return LC_OK;
}

lc_status lc_aside_begin(lc_aside *a, const char *path) {
    *a = (lc_aside){.fd = -1, .path = lc_strdup(path)};
    if (!a->path) return LC_ENOMEM;
    lc_status status = aside_open(a);
    if (status != LC_OK) aside_forget(a); /* the temporary file may be another writer's: it stays */
    return status;
}

lc_status lc_aside_write(lc_aside *a, const void *data, size_t bytes) {
    const char *at = data;
    while (bytes > 0) {
        ssize_t done = write(a->fd, at, bytes < (1u << 30) ? bytes : 1u << 30);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return aside_fail(a, "write");
        at += done;
        bytes -= (size_t)done;
    }
    return LC_OK;
}

/* Makes the rename itself last. Some file systems cannot sync a folder; that is no failure. */
static void sync_folder(const char *path) {
    char *folder = lc_strdup(path);
    if (!folder) return;
    char *slash = strrchr(folder, '/');
    if (slash) slash[slash == folder] = 0;
    int fd = open(slash ? folder : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0) {
        (void)!fsync(fd);
        close(fd);
    }
    free(folder);
}

lc_status lc_aside_commit(lc_aside *a) {
    lc_status status = LC_OK;
    if (a->temp) {
        if (fsync(a->fd) != 0 || rename(a->temp, a->path) != 0) status = aside_fail(a, "write");
        if (status == LC_OK)
            sync_folder(a->path);
        else
            unlink(a->temp);
    }
    aside_forget(a);
    return status;
}

void lc_aside_abandon(lc_aside *a) {
    if (a->fd >= 0 && a->temp) unlink(a->temp);
    aside_forget(a);
}

int lc_write_file(const char *path, const char *data, double length) {
    lc_aside a;
    if (!path || (!data && length > 0) || !(length >= 0))
        return lc_fail(LC_EARG, "lc_write_file: expected a path and data");
    LC_TRY(lc_aside_begin(&a, path));
    lc_status status = lc_aside_write(&a, data, (size_t)length);
    if (status == LC_OK) return lc_aside_commit(&a);
    lc_aside_abandon(&a);
    return status;
}

/* ---- reading
 * --------------------------------------------------------------------------------------------------------- */

/* Reads to the end whatever the file is: sizes of pipes and of /proc tell nothing. */
static lc_status read_all(int fd, const char *path, char **data, double *length) {
    struct stat st;
    size_t room = 65536, n = 0;
    if (fstat(fd, &st) == 0 && S_ISDIR(st.st_mode)) return lc_fail(LC_EIO, "cannot read %s: it is a folder", path);
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size > 0) room = (size_t)st.st_size + 1;
    char *text = lc_resize(NULL, room + 1, 1);
    if (!text) return LC_ENOMEM;
    for (;;) {
        if (n == room) {
            char *grown = lc_resize(text, room * 2 + 1, 1);
            if (!grown) {
                free(text);
                return LC_ENOMEM;
            }
            text = grown;
            room *= 2;
        }
        ssize_t got = read(fd, text + n, room - n);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) {
            free(text);
            return lc_fail(LC_EIO, "cannot read %s: %s", path, strerror(errno));
        }
        if (got == 0) break;
        n += (size_t)got;
    }
    text[n] = 0;
    *data = text;
    *length = (double)n;
    return LC_OK;
}

int lc_read_file(const char *path, char **data, double *length) {
    if (!path || !data || !length) return lc_fail(LC_EARG, "lc_read_file: expected a path");
    *data = NULL;
    *length = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return lc_fail(LC_EIO, "cannot open %s: %s", path, strerror(errno));
    lc_status status = read_all(fd, path, data, length);
    close(fd);
    return status;
}

/* ---- folders
 * --------------------------------------------------------------------------------------------------------- */

int lc_path_kind(const char *path) {
    struct stat st;
    if (!path || stat(path, &st) != 0) return 0;
    return S_ISREG(st.st_mode) ? 1 : S_ISDIR(st.st_mode) ? 2 : 3;
}

static lc_status make_dir(const char *path) {
    if (mkdir(path, 0777) == 0) return LC_OK;
    int why = errno;
    if (why == EEXIST && lc_path_kind(path) == 2) return LC_OK;
    return lc_fail(LC_EIO, "cannot make the folder %s: %s", path,
                   why == EEXIST ? "there is a file of that name" : strerror(why));
}

int lc_make_dirs(const char *path) {
    if (!path || !*path) return lc_fail(LC_EARG, "lc_make_dirs: expected a path");
    if (lc_path_kind(path) == 2) return LC_OK;
    char *part = lc_strdup(path);
    if (!part) return LC_ENOMEM;
    lc_status status = LC_OK;
    for (char *s = part + 1; status == LC_OK && *s; s++) {
        if (*s != '/') continue;
        *s = 0;
        if (lc_path_kind(part) != 2) status = make_dir(part);
        *s = '/';
    }
    if (status == LC_OK) status = make_dir(part);
    free(part);
    return status;
}

typedef struct name_list {
    char **name;
    size_t count, room, bytes;
} name_list;

static lc_status list_add(name_list *list, const char *name) {
    if (list->count == list->room) {
        size_t room = list->room ? list->room * 2 : 64;
        char **grown = lc_resize(list->name, room, sizeof *grown);
        if (!grown) return LC_ENOMEM;
        list->name = grown;
        list->room = room;
    }
    char *copy = lc_strdup(name);
    if (!copy) return LC_ENOMEM;
    list->name[list->count++] = copy;
    list->bytes += strlen(copy) + 1;
    return LC_OK;
}

static int by_name(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

static lc_status list_join(name_list *list, char **names, double *length) {
    char *text = lc_alloc(list->bytes + 1, 1), *at = text;
    if (!text) return LC_ENOMEM;
    if (list->count) qsort(list->name, list->count, sizeof *list->name, by_name);
    for (size_t i = 0; i < list->count; i++) {
        size_t n = strlen(list->name[i]) + 1;
        memcpy(at, list->name[i], n);
        at += n;
    }
    *names = text;
    *length = list->bytes ? (double)(list->bytes - 1) : 0;
    return LC_OK;
}

int lc_list_dir(const char *path, char **names, double *length) {
    if (!path || !names || !length) return lc_fail(LC_EARG, "lc_list_dir: expected a path");
    *names = NULL;
    *length = 0;
    DIR *dir = opendir(path);
    if (!dir) return lc_fail(LC_EIO, "cannot list %s: %s", path, strerror(errno));
    name_list list = {0};
    lc_status status = LC_OK;
    struct dirent *entry;
    while (status == LC_OK && (errno = 0, entry = readdir(dir)))
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            status = list_add(&list, entry->d_name);
    if (status == LC_OK && errno) status = lc_fail(LC_EIO, "cannot list %s: %s", path, strerror(errno));
    closedir(dir);
    if (status == LC_OK) status = list_join(&list, names, length);
    for (size_t i = 0; i < list.count; i++) free(list.name[i]);
    free(list.name);
    return status;
}

int lc_remove(const char *path) {
    if (!path) return lc_fail(LC_EARG, "lc_remove: expected a path");
    return remove(path) == 0 ? LC_OK : lc_fail(LC_EIO, "cannot remove %s: %s", path, strerror(errno));
}

int lc_rename(const char *from, const char *to) {
    if (!from || !to) return lc_fail(LC_EARG, "lc_rename: expected two paths");
    if (rename(from, to) != 0) return lc_fail(LC_EIO, "cannot rename %s to %s: %s", from, to, strerror(errno));
    sync_folder(to);
    return LC_OK;
}

int lc_make_link(const char *target, const char *path) {
    char temp[4096];
    if (!target || !path) return lc_fail(LC_EARG, "lc_make_link: expected two paths");
    if (snprintf(temp, sizeof temp, "%s.%d.tmp", path, (int)getpid()) >= (int)sizeof temp)
        return lc_fail(LC_EIO, "cannot make the link %s: the name is too long", path);
    unlink(temp);
    if (symlink(target, temp) == 0 && rename(temp, path) == 0) return LC_OK;
    int why = errno;
    unlink(temp);
    return lc_fail(LC_EIO, "cannot make the link %s: %s", path, strerror(why));
}

double lc_disk_free(const char *path) {
    struct statvfs v;
    return path && statvfs(path, &v) == 0 ? (double)v.f_bavail * (double)v.f_frsize : -1;
}

/* ---- locks
 * ----------------------------------------------------------------------------------------------------------- */

int lc_lock_file(const char *path, int32_t *fd) {
    if (!path || !fd) return lc_fail(LC_EARG, "lc_lock_file: expected a path");
    *fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (*fd < 0) return lc_fail(LC_EIO, "cannot open the lock %s: %s", path, strerror(errno));
    struct stat st;
    bool held = flock(*fd, LOCK_EX | LOCK_NB) == 0;
    if (held && fstat(*fd, &st) == 0 && st.st_nlink > 0) return LC_OK;
    int why = held ? EWOULDBLOCK : errno; /* held, but its last holder removed the file: the lock of no name */
    close(*fd);
    *fd = -1;
    return lc_fail(LC_EIO, "cannot lock %s: %s", path, why == EWOULDBLOCK ? "another process holds it" : strerror(why));
}

int lc_unlock_file(int32_t fd) {
    if (fd < 0) return lc_fail(LC_EARG, "lc_unlock_file: no lock");
    return close(fd) == 0 ? LC_OK : lc_fail(LC_EIO, "cannot give back a lock: %s", strerror(errno));
}
