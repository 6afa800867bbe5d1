/* signals.c: Ctrl-C. The first one asks: it sets lc_interrupt, at which the next op fails with LC_EINTR, and a count
 * hook, which stops Lua code that calls no op. LuaJIT runs no hook inside compiled code, so a compiled loop without ops
 * goes on; a second Ctrl-C, within a second or while the first still waits, ends the program at once with status 130.
 * Files survive that: they are written aside and renamed. A mapped file that somebody cuts off ends the program with a
 * message. */
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <lauxlib.h>
#include <lua.h>

#include "lolcats.h"
#include "program/program.h"

static lua_State *state;
static pthread_t main_thread;
static double last_signal = -10;
static const char error_key; /* its address keys the registry entry */

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Runs before every interpreted instruction once a signal came, until it raises or an op has taken the interrupt. The
 * core's Lua is left alone: its few lines between two calls of C keep scopes and switches in balance. */
static void stop_lua(lua_State *L, lua_Debug *ar) {
    if (lc_interrupt && lua_getinfo(L, "S", ar) &&
        (strncmp(ar->source, "@lua/lolcats/core/", 18) == 0 || strncmp(ar->source, "=lolcats", 8) == 0))
        return;
    lua_sethook(L, NULL, 0, 0);
    if (!lc_interrupt) return; /* an op has already failed with it */
    lc_interrupt = 0;
    lua_pushlightuserdata(L, (void *)&error_key);
    lua_rawget(L, LUA_REGISTRYINDEX);
    if (lua_isnil(L, -1)) lua_pushliteral(L, "interrupted");
    lua_error(L);
}

static void on_interrupt(int signal) {
    if (!pthread_equal(pthread_self(), main_thread)) {
        pthread_kill(main_thread, signal);
        return;
    }
    double now = seconds();
    if (lc_interrupt || now - last_signal < 1) {
        static const char bye[] = "\nlolcats: stopped\n";
        if (write(2, bye, sizeof bye - 1) < 0) _exit(130);
        _exit(130);
    }
    last_signal = now;
    lc_interrupt = 1;
    lua_sethook(state, stop_lua, LUA_MASKCOUNT, 1);
}

int lc_signals_take(void) {
    int was = lc_interrupt;
    lc_interrupt = 0;
    last_signal = -10;
    lua_sethook(state, NULL, 0, 0);
    return was;
}

static void on_bus_error(int signal) {
    static const char why[] = "\nlolcats: a file that is being read (a model or a checkpoint) was cut off or replaced "
                              "in place, or its disk failed\n";
    (void)signal;
    if (write(2, why, sizeof why - 1) < 0) _exit(3);
    _exit(3);
}

void lc_signals_install(lua_State *L) {
    state = L;
    main_thread = pthread_self();
    struct sigaction action;
    memset(&action, 0, sizeof action);
    sigemptyset(&action.sa_mask);
    struct sigaction old;
    action.sa_handler = SIG_IGN; /* a reader that leaves must not end a training run; writes report it */
    sigaction(SIGPIPE, &action, NULL);
    action.sa_handler = on_bus_error;
    sigaction(SIGBUS, &action, NULL);
    sigaction(SIGINT, NULL, &old);
    if (old.sa_handler == SIG_IGN) return; /* started in the background: stays immune */
    action.sa_handler = on_interrupt;
    sigaction(SIGINT, &action, NULL);
}

/* on_interrupt(value): what the hook raises. */
static int program_on_interrupt(lua_State *L) {
    luaL_checkany(L, 1);
    lua_pushlightuserdata(L, (void *)&error_key);
    lua_pushvalue(L, 1);
    lua_rawset(L, LUA_REGISTRYINDEX);
    return 0;
}

/* interrupted() -> was there a Ctrl-C that nothing has answered? Clears it. */
static int program_interrupted(lua_State *L) {
    lua_pushboolean(L, lc_signals_take());
    return 1;
}

/* drop_scopes(): ends scopes that an error left open; returns how many. */
static int program_drop_scopes(lua_State *L) {
    int n = 0;
    while (lc_scope_depth() > 0 && n < 1000000) {
        if (lc_scope_pop() != LC_OK) break;
        n++;
    }
    lua_pushinteger(L, n);
    return 1;
}

/* grad_mode(on): whether ops record gradients. */
static int program_grad_mode(lua_State *L) {
    lc_grad_mode(lua_toboolean(L, 1));
    return 0;
}

void lc_module_signals(lua_State *L) {
    lua_pushcfunction(L, program_on_interrupt);
    lua_setfield(L, -2, "on_interrupt");
    lua_pushcfunction(L, program_interrupted);
    lua_setfield(L, -2, "interrupted");
    lua_pushcfunction(L, program_drop_scopes);
    lua_setfield(L, -2, "drop_scopes");
    lua_pushcfunction(L, program_grad_mode);
    lua_setfield(L, -2, "grad_mode");
}
