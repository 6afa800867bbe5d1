/* term.c: what the surroundings are like: whether a stream is a terminal, and how wide; what a folder holds. */
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <lauxlib.h>
#include <lua.h>

#include "lolcats.h"
#include "program/program.h"

/* is_terminal(fd) -> boolean; fd 0, 1 or 2. */
static int program_is_terminal(lua_State *L) {
    lua_pushboolean(L, isatty((int)luaL_checkinteger(L, 1)));
    return 1;
}

/* width(fd) -> columns: COLUMNS, else the terminal's, else 80. */
static int program_width(lua_State *L) {
    int fd = (int)luaL_optinteger(L, 1, 1);
    const char *given = getenv("COLUMNS");
    int columns = given ? atoi(given) : 0;
    struct winsize size;
    if (columns <= 0 && ioctl(fd, TIOCGWINSZ, &size) == 0) columns = size.ws_col;
    lua_pushinteger(L, columns > 0 ? columns : 80);
    return 1;
}

/* list_dir(path) -> sorted names, folders with a slash; nil when it cannot be read. */
static int program_list_dir(lua_State *L) {
    const char *path = luaL_checkstring(L, 1);
    char *names;
    double length;
    if (lc_list_dir(path, &names, &length) != LC_OK) {
        lua_pushnil(L);
        return 1;
    }
    lua_newtable(L);
    int n = 0;
    for (const char *p = names; p < names + (size_t)length; p += strlen(p) + 1) {
        lua_pushfstring(L, "%s/%s", path, p);
        int is_folder = lc_path_kind(lua_tostring(L, -1)) == 2;
        lua_pop(L, 1);
        lua_pushfstring(L, is_folder ? "%s/" : "%s", p);
        lua_rawseti(L, -2, ++n);
    }
    lc_free(names);
    return 1;
}

/* make_dirs(path) -> did it work? */
static int program_make_dirs(lua_State *L) {
    lua_pushboolean(L, lc_make_dirs(luaL_checkstring(L, 1)) == LC_OK);
    return 1;
}

void lc_module_term(lua_State *L) {
    lua_pushcfunction(L, program_is_terminal);
    lua_setfield(L, -2, "is_terminal");
    lua_pushcfunction(L, program_width);
    lua_setfield(L, -2, "width");
    lua_pushcfunction(L, program_list_dir);
    lua_setfield(L, -2, "list_dir");
    lua_pushcfunction(L, program_make_dirs);
    lua_setfield(L, -2, "make_dirs");
}
