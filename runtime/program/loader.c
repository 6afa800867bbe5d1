/* loader.c: finds Lua sources. Every module, recipe and example is embedded in the program; when the program runs from
 * the tree it was built in (<tree>/build*), or LOLCATS_LUA_PATH names a folder lua/ of one, the tree's files win, so
 * that an edit needs no build. Chunks are named by their path in the tree in both cases: messages are the same. */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <lauxlib.h>
#include <lua.h>

#include "lolcats.h"
#include "program/program.h"

static char tree[PATH_MAX], executable[PATH_MAX];

static int is_tree(const char *folder) {
    char path[PATH_MAX + 32];
    snprintf(path, sizeof path, "%s/lua/lolcats/main.lua", folder);
    return access(path, R_OK) == 0;
}

static void find_tree(void) {
    static int done;
    if (done) return;
    done = 1;
    ssize_t n = readlink("/proc/self/exe", executable, sizeof executable - 1);
    executable[n > 0 ? n : 0] = 0;
    const char *given = getenv("LOLCATS_LUA_PATH");
    char *slash;
    if (given) {
        if (*given) snprintf(tree, sizeof tree, "%s/..", given); /* empty: the embedded files alone */
    } else if (n > 0) {
        memcpy(tree, executable, sizeof tree);
        if ((slash = strrchr(tree, '/'))) *slash = 0;
        slash = strrchr(tree, '/');
        if (slash && strncmp(slash, "/build", 6) == 0) *slash = 0;
        else tree[0] = 0;
    }
    if (tree[0] && !is_tree(tree)) tree[0] = 0;
}

const char *lc_program_tree(void) {
    find_tree();
    return tree;
}

const char *lc_program_path(void) {
    find_tree();
    return executable;
}

static const lc_embedded *find_embedded(const char *name) {
    for (const lc_embedded *f = lc_embedded_files; f->name; f++)
        if (strcmp(f->name, name) == 0) return f;
    return NULL;
}

/* Pushes the text of a file named by its path in the tree; 0 and nothing pushed when there is none. */
static int push_source(lua_State *L, const char *name) {
    char path[PATH_MAX + 512];
    FILE *file = NULL;
    if (lc_program_tree()[0]) {
        snprintf(path, sizeof path, "%s/%s", tree, name);
        file = fopen(path, "rb");
    }
    if (file) {
        luaL_Buffer b;
        luaL_buffinit(L, &b);
        size_t n;
        do {
            n = fread(luaL_prepbuffer(&b), 1, LUAL_BUFFERSIZE, file);
            luaL_addsize(&b, n);
        } while (n > 0);
        fclose(file);
        luaL_pushresult(&b);
        return 1;
    }
    const lc_embedded *f = find_embedded(name);
    if (!f) return 0;
    lua_pushlstring(L, f->begin, (size_t)(f->end - f->begin));
    return 1;
}

static int return_upvalue(lua_State *L) {
    lua_pushvalue(L, lua_upvalueindex(1));
    return 1;
}

/* package.loaders entry for lolcats and lolcats.*. */
static int search(lua_State *L) {
    const char *module = luaL_checkstring(L, 1);
    if (strcmp(module, "lolcats") != 0 && strncmp(module, "lolcats.", 8) != 0) {
        lua_pushliteral(L, "");
        return 1;
    }
    if (strcmp(module, "lolcats.header") == 0) { /* always the text that this program was compiled with */
        const lc_embedded *f = find_embedded("lua/lolcats/header.txt");
        lua_pushlstring(L, f->begin, (size_t)(f->end - f->begin));
        lua_pushcclosure(L, return_upvalue, 1);
        return 1;
    }
    char base[256], name[300], chunk[302];
    if (strlen(module) >= sizeof base || strstr(module, "..") || strchr(module, '/'))
        return luaL_error(L, "bad module name '%s'", module);
    snprintf(base, sizeof base, "%s", module);
    for (char *p = base; *p; p++)
        if (*p == '.') *p = '/';
    for (int init = 0; init < 2; init++) {
        snprintf(name, sizeof name, "lua/%s%s.lua", base, init ? "/init" : "");
        if (!push_source(L, name)) continue;
        size_t n;
        const char *text = lua_tolstring(L, -1, &n);
        snprintf(chunk, sizeof chunk, "@%s", name);
        if (luaL_loadbuffer(L, text, n, chunk) != 0) return lua_error(L);
        return 1;
    }
    lua_pushfstring(L, "\n\tno file 'lua/%s.lua', in the program or its source tree", base);
    return 1;
}

void lc_loader_install(lua_State *L) {
    /* table.insert(package.loaders, 2, search): after package.preload, before files of the same name elsewhere */
    lua_getglobal(L, "package");
    lua_getfield(L, -1, "loaders");
    for (int i = (int)lua_objlen(L, -1); i >= 2; i--) {
        lua_rawgeti(L, -1, i);
        lua_rawseti(L, -2, i + 1);
    }
    lua_pushcfunction(L, search);
    lua_rawseti(L, -2, 2);
    lua_pop(L, 2);
}

/* source(name) -> text of "recipes/chat.lua", or nil. */
static int program_source(lua_State *L) {
    const char *name = luaL_checkstring(L, 1);
    if (strstr(name, "..") || !push_source(L, name)) lua_pushnil(L);
    return 1;
}

/* files() -> the names of all embedded files. */
static int program_files(lua_State *L) {
    lua_newtable(L);
    int n = 0;
    for (const lc_embedded *f = lc_embedded_files; f->name; f++) {
        lua_pushstring(L, f->name);
        lua_rawseti(L, -2, ++n);
    }
    return 1;
}

void lc_module_loader(lua_State *L) {
    lua_pushcfunction(L, program_source);
    lua_setfield(L, -2, "source");
    lua_pushcfunction(L, program_files);
    lua_setfield(L, -2, "files");
    lua_pushstring(L, lc_program_path());
    lua_setfield(L, -2, "path");
    if (lc_program_tree()[0]) {
        lua_pushstring(L, lc_program_tree());
        lua_setfield(L, -2, "tree");
    }
    lua_pushliteral(L, LC_VERSION);
    lua_setfield(L, -2, "version");
}
