/* main.c: starts LuaJIT, opens the module "lolcats.program" and hands the command line to lua/lolcats/main.lua, whose
 * number is the exit status: 0, 1 error, 2 usage, 3 environment, 130 interrupted. Everything a user sees of the command
 * line is there. */
#include <errno.h>
#include <locale.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <lauxlib.h>
#include <lua.h>
#include <lualib.h>

#include "lolcats.h"
#include "program/program.h"

static int open_program(lua_State *L) {
    lua_newtable(L);
    lc_module_loader(L);
    lc_module_signals(L);
    lc_module_term(L);
    lc_module_edit(L);
    return 1;
}

/* Runs protected: require "lolcats.main"(argv...) -> status. */
static int run(lua_State *L) {
    int argc = (int)lua_tointeger(L, 1);
    char **argv = lua_touserdata(L, 2);
    luaL_openlibs(L);
    lua_getglobal(L, "package");
    lua_getfield(L, -1, "preload");
    lua_pushcfunction(L, open_program);
    lua_setfield(L, -2, "lolcats.program");
    lua_pop(L, 2);
    lc_loader_install(L);
    lua_getglobal(L, "require");
    lua_pushliteral(L, "lolcats.main");
    lua_call(L, 1, 1);
    luaL_checkstack(L, argc, "too many arguments");
    for (int i = 1; i < argc; i++) lua_pushstring(L, argv[i]);
    lua_call(L, argc - 1, 1);
    return 1;
}

/* What was printed must have arrived: a full disk behind `> file` is an error. A reader that went away is not. */
static int flush_output(int status) {
    if (fflush(stdout) == 0 && !ferror(stdout)) return status;
    if (errno == EPIPE || status != 0) return status;
    fprintf(stderr, "lolcats: standard output could not be written: %s\n", strerror(errno));
    return 3;
}

int main(int argc, char **argv) {
    const char *locale = setlocale(LC_CTYPE, ""); /* for line editing; numbers keep their point */
    if (!locale || strcmp(locale, "C") == 0 || strcmp(locale, "POSIX") == 0) setlocale(LC_CTYPE, "C.UTF-8");
    lua_State *L = luaL_newstate();
    if (!L) {
        fputs("lolcats: not enough memory to start\n", stderr);
        return 3;
    }
    lc_signals_install(L);
    lua_pushcfunction(L, run);
    lua_pushinteger(L, argc);
    lua_pushlightuserdata(L, argv);
    int status = 1;
    if (lua_pcall(L, 2, 1, 0) == 0) {
        status = (int)lua_tointeger(L, -1);
    } else {
        const char *message = lua_tostring(L, -1);
        fprintf(stderr, "lolcats: %s\n", message ? message : "the start-up failed with an error that is not a string");
    }
    status = flush_output(status);
    lua_close(L);
    return status;
}
