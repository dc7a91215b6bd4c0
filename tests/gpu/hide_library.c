/* Makes the loader deny that a library exists, for tests of what a program says then.
   LD_AUDIT=libhide.so HIDE_LIBRARY=libcublasLt PROGRAM */
#define _GNU_SOURCE
#include <link.h>
#include <stdlib.h>
#include <string.h>

unsigned int la_version(unsigned int version) { return version; }

char *la_objsearch(const char *name, uintptr_t *cookie, unsigned int flag) {
    const char *hidden = getenv("HIDE_LIBRARY");
    (void)cookie;
    (void)flag;
    return hidden && strstr(name, hidden) ? NULL : (char *)name;
}
