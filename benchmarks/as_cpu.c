/* The library behind as_cpu.py: glibc's linker tells it of every library before any code of that runs (rtld-audit(7)).
 * `cpuid` in the places that AS_CPU_PLACES lists is replaced by `ud2`, as long and illegal; the handler of that signal
 * asks the real CPU and takes out what AS_CPU_CLEARS lists.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <limits.h>
#include <link.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

static unsigned clears[2][4]; /* of leaf 7: [subleaf][eax, ebx, ecx, edx] */

static void cpuid_instead(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *code = (const unsigned char *)registers[REG_RIP];
    unsigned leaf = registers[REG_RAX], subleaf = registers[REG_RCX], r[4];
    if (code[0] != 0x0f || code[1] != 0x0b) {
        signal(number, SIG_DFL); /* comes again, and ends the process as it would have */
        return;
    }
    __cpuid_count(leaf, subleaf, r[0], r[1], r[2], r[3]);
    for (int i = 0; i < 4 && leaf == 7 && subleaf < 2; i++) r[i] &= ~clears[subleaf][i];
    registers[REG_RAX] = r[0], registers[REG_RBX] = r[1], registers[REG_RCX] = r[2], registers[REG_RDX] = r[3];
    registers[REG_RIP] += 2;
    (void)info;
}

static void fail(const char *what) {
    perror(what);
    _exit(1);
}

unsigned la_version(unsigned version) {
    struct sigaction action = {.sa_sigaction = cpuid_instead, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    unsigned *c = &clears[0][0];
    const char *list = getenv("AS_CPU_CLEARS");
    if (!list || sscanf(list, "%x,%x,%x,%x,%x,%x,%x,%x", c, c + 1, c + 2, c + 3, c + 4, c + 5, c + 6, c + 7) != 8)
        fail("AS_CPU_CLEARS");
    if (sigaction(SIGILL, &action, NULL)) fail("sigaction");
    return version;
}

unsigned la_objopen(struct link_map *map, Lmid_t space, uintptr_t *cookie) {
    char path[PATH_MAX], line[PATH_MAX + 32];
    long page = sysconf(_SC_PAGESIZE);
    FILE *places = fopen(getenv("AS_CPU_PLACES"), "r");
    (void)space, (void)cookie;
    if (!places) fail("AS_CPU_PLACES");
    if (!realpath(map->l_name, path)) *path = 0;
    while (*path && fgets(line, sizeof line, places)) { /* "address path\n" */
        char *name = strchr(line, ' ') + 1;
        name[strcspn(name, "\n")] = 0;
        if (strcmp(name, path)) continue;
        unsigned char *code = (unsigned char *)map->l_addr + strtoul(line, NULL, 16);
        void *start = (void *)((uintptr_t)code & -page);
        size_t length = ((uintptr_t)(code + 1) & -page) + page - (uintptr_t)start;
        if (code[0] != 0x0f || code[1] != 0xa2) fail("as_cpu: a library has changed");
        if (mprotect(start, length, PROT_READ | PROT_WRITE | PROT_EXEC)) fail("mprotect");
        code[1] = 0x0b;
        if (mprotect(start, length, PROT_READ | PROT_EXEC)) fail("mprotect");
    }
    fclose(places);
    return 0;
}
