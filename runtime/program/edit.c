/* edit.c: line editing by libedit, with history and completion. The completer is a Lua function, called through the
 * classic API from inside el_gets, itself called from Lua: an ordinary C function calling Lua, no FFI. */
#define _GNU_SOURCE /* ppoll, memfd_create */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <wchar.h>

#include <histedit.h>
#include <lauxlib.h>
#include <lua.h>

#include "lolcats.h"
#include "program/program.h"

enum { COMPLETER = 2, HISTORY_SIZE = 5000, LIST_MAX = 200 };

static EditLine *editor;
static History *history_list;
static lua_State *state; /* while a line is being read */
static const char *prompt_text = "> ";
static char history_path[4096];

static char *show_prompt(EditLine *e) {
    (void)e;
    return (char *)prompt_text;
}

/* Lists the candidates that stand as strings 1..n in the table on top of the stack. */
static void list_candidates(lua_State *L, int n) {
    fputc('\n', stdout);
    int width = 0, columns = 80, rows;
    el_get(editor, EL_GETTC, "co", &columns, NULL);
    int shown = n < LIST_MAX ? n : LIST_MAX;
    for (int i = 1; i <= shown; i++) {
        lua_rawgeti(L, -1, i);
        int w = (int)lua_objlen(L, -1);
        width = w > width ? w : width;
        lua_pop(L, 1);
    }
    int across = columns / (width + 2);
    if (across < 1) across = 1;
    rows = (shown + across - 1) / across;
    for (int r = 0; r < rows; r++) {
        for (int i = r + 1; i <= shown; i += rows) {
            lua_rawgeti(L, -1, i);
            printf("%-*s", i + rows <= shown ? width + 2 : 0, lua_tostring(L, -1));
            lua_pop(L, 1);
        }
        fputc('\n', stdout);
    }
    if (n > shown) printf("... and %d more\n", n - shown);
    fflush(stdout);
}

/* The completer gets the text before the cursor; returns what to insert (or ""), and the candidates to list (or
 * nil). */
static unsigned char complete(EditLine *e, int key) {
    (void)key;
    lua_State *L = state;
    const LineInfo *line = el_line(e);
    if (!L || !lua_isfunction(L, COMPLETER)) return CC_ERROR;
    int top = lua_gettop(L);
    unsigned char result = CC_ERROR;
    lua_pushvalue(L, COMPLETER);
    lua_pushlstring(L, line->buffer, (size_t)(line->cursor - line->buffer));
    if (lua_pcall(L, 1, 2, 0) == 0) {
        const char *insert = lua_tostring(L, -2);
        if (insert && *insert && el_insertstr(e, insert) == 0) {
            result = CC_REFRESH;
        } else if (lua_istable(L, -1) && lua_objlen(L, -1) > 0) {
            list_candidates(L, (int)lua_objlen(L, -1));
            result = CC_REDISPLAY;
        }
    }
    lua_settop(L, top);
    return result;
}

/* Waits for a byte from the terminal; 0 after Ctrl-C. It is held back but for the wait itself, else one that comes just
 * before it would be noticed only at the next key. */
static int wait_for_key(void) {
    sigset_t interrupt, old;
    sigemptyset(&interrupt);
    sigaddset(&interrupt, SIGINT);
    pthread_sigmask(SIG_BLOCK, &interrupt, &old);
    int ready = 0;
    while (!lc_interrupt && ready == 0) {
        struct pollfd p = {.fd = STDIN_FILENO, .events = POLLIN};
        int n = ppoll(&p, 1, NULL, &old);
        ready = n > 0 || (n < 0 && errno != EINTR); /* any other error is read()'s to tell */
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return ready;
}

/* The editor's source of characters: 1 and a character, 0 at the end, -1 after Ctrl-C or an error. */
static int next_char(EditLine *e, wchar_t *out) {
    mbstate_t shift = {0};
    (void)e;
    for (;;) {
        char byte;
        if (!wait_for_key()) {
            errno = EINTR;
            return -1;
        }
        ssize_t n = read(STDIN_FILENO, &byte, 1);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return (int)n;
        size_t used = mbrtowc(out, &byte, 1, &shift);
        if (used == (size_t)-2) continue; /* a character of several bytes, not yet whole */
        if (used != (size_t)-1) return 1;
        memset(&shift, 0, sizeof shift); /* not one of this locale: leave it out */
    }
}

static void open_editor(void) {
    HistEvent event;
    editor = el_init("lolcats", stdin, stdout, stderr);
    history_list = history_init();
    if (!editor || !history_list) return;
    history(history_list, &event, H_SETSIZE, HISTORY_SIZE);
    history(history_list, &event, H_SETUNIQUE, 1);
    el_set(editor, EL_EDITOR, "emacs");
    el_set(editor, EL_PROMPT, show_prompt);
    el_set(editor, EL_HIST, history, history_list);
    el_set(editor, EL_SIGNAL, 0);
    el_set(editor, EL_GETCFN, next_char);
    el_set(editor, EL_ADDFN, "lolcats-complete", "completes names", complete);
    el_source(editor, NULL); /* the user's ~/.editrc */
    el_set(editor, EL_BIND, "\t", "lolcats-complete", NULL);
    el_set(editor, EL_BIND, "^R", "em-inc-search-prev", NULL);
    el_set(editor, EL_BIND, "\033[3~", "ed-delete-next-char", NULL);
    el_set(editor, EL_BIND, "\033[1;5C", "em-next-word", NULL);
    el_set(editor, EL_BIND, "\033[1;5D", "ed-prev-word", NULL);
}

/* read_line(prompt, completer) -> the line without its newline; nil at the end of input; false after Ctrl-C. */
static int program_read_line(lua_State *L) {
    prompt_text = luaL_checkstring(L, 1);
    lua_settop(L, 2);
    if (!editor) open_editor();
    if (!editor) return luaL_error(L, "the line editor could not be started");
    lc_signals_take();
    state = L;
    int n = 0;
    errno = 0;
    el_set(editor, EL_PREP_TERM, 1); /* before the prompt: a Ctrl-D typed at it must not reach a cooked terminal */
    const char *line = el_gets(editor, &n);
    state = NULL;
    if (lc_signals_take()) {
        el_reset(editor);
        fputc('\n', stdout);
        lua_pushboolean(L, 0);
    } else if (!line || n <= 0) {
        lua_pushnil(L);
    } else {
        if (line[n - 1] == '\n') n--;
        lua_pushlstring(L, line, (size_t)n);
    }
    return 1;
}

/* history_open(path): loads it, and saves there from now on. */
static int program_history_open(lua_State *L) {
    const char *path = luaL_checkstring(L, 1);
    HistEvent event;
    if (!editor) open_editor();
    if (!history_list || strlen(path) >= sizeof history_path) return 0;
    strcpy(history_path, path);
    history(history_list, &event, H_LOAD, path);
    return 0;
}

/* Writes the history aside and renames it: a full disk must not cost the one there is. */
static int save_history(void) {
    HistEvent event;
    int fd = memfd_create("history", MFD_CLOEXEC); /* libedit wants a file with a number */
    FILE *memory = fd >= 0 ? fdopen(fd, "w+") : NULL;
    if (!memory) {
        if (fd >= 0) close(fd);
        return LC_ENOMEM;
    }
    int status = LC_ENOMEM;
    long length = history(history_list, &event, H_SAVE_FP, memory) >= 0 && fflush(memory) == 0 ? ftell(memory) : -1;
    char *text = length > 0 ? malloc((size_t)length) : NULL;
    rewind(memory);
    if (text && fread(text, 1, (size_t)length, memory) == (size_t)length) {
        mode_t old = umask(077); /* what a user types is the user's own */
        status = lc_write_file(history_path, text, (double)length);
        umask(old);
    }
    free(text);
    fclose(memory);
    return status;
}

/* history_add(text) -> nil, or why it could not be saved: one entry, of one line or several; saved at once. */
static int program_history_add(lua_State *L) {
    const char *text = luaL_checkstring(L, 1);
    HistEvent event;
    if (!history_list) return 0;
    history(history_list, &event, H_ENTER, text);
    if (!history_path[0]) return 0;
    int status = save_history();
    if (status == LC_OK) return 0;
    lua_pushstring(L, status == LC_ENOMEM ? "out of memory" : lc_error_message());
    return 1;
}

void lc_module_edit(lua_State *L) {
    lua_pushcfunction(L, program_read_line);
    lua_setfield(L, -2, "read_line");
    lua_pushcfunction(L, program_history_open);
    lua_setfield(L, -2, "history_open");
    lua_pushcfunction(L, program_history_add);
    lua_setfield(L, -2, "history_add");
}
