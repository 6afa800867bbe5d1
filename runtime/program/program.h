/* program.h: what the files of the program share. The program owns main(), the only lua_State there is, signals and the
 * terminal; it is the only C that includes lua.h. What Lua sees of it is the module "lolcats.program". */
#ifndef LC_PROGRAM_H
#define LC_PROGRAM_H

#include <stddef.h>

struct lua_State;

/* A file carried inside the program, by its path in the source tree. A row of NULLs ends the list. */
typedef struct lc_embedded {
    const char *name, *begin, *end;
} lc_embedded;

extern const lc_embedded lc_embedded_files[];

/* loader.c: the source tree that the program runs from ("" when none), and `require` for lolcats.*. */
const char *lc_program_tree(void);
const char *lc_program_path(void);
void lc_loader_install(struct lua_State *L);

/* signals.c: Ctrl-C sets lc_interrupt, which stops ops, and a hook, which stops Lua between ops. */
void lc_signals_install(struct lua_State *L);
int lc_signals_take(void); /* was there an interrupt since the last call? clears it */

/* Functions of the module, one list a file; each is added to the table on top of the stack. */
void lc_module_loader(struct lua_State *L);
void lc_module_signals(struct lua_State *L);
void lc_module_term(struct lua_State *L);
void lc_module_edit(struct lua_State *L);

#endif
