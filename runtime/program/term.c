/* term.c: what the terminal is like: whether a stream is one, and how wide. */
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <lauxlib.h>
#include <lua.h>

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

void lc_module_term(lua_State *L) {
    lua_pushcfunction(L, program_is_terminal);
    lua_setfield(L, -2, "is_terminal");
    lua_pushcfunction(L, program_width);
    lua_setfield(L, -2, "width");
}
