/* A disk that fails or a process that dies at a chosen step, for a process started with LD_PRELOAD.

   Every call that changes files below FAULT_DIR is a step. `faults_kill_at(n, torn)` kills the process before its n-th
   step from now on; where the step is a write with `torn` = 1 after half of its bytes, 2 after its first page. `faults_fail(error, what)` makes
   steps fail with that errno: what = 1 writes, 2 syncs, 3 both; an error of 0 heals the disk. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define WRITES 1
#define SYNCS 2

static long steps, kill_at;
static int tear, failure, failing;

void faults_kill_at(long step, int torn) { steps = 0; tear = torn; kill_at = step; }
long faults_steps(void) { return steps; }
void faults_fail(int error, int what) { failure = error; failing = error ? what : 0; }

static size_t part(size_t size) { return tear == 2 && size > 4096 ? 4096 : size / 2; }

static int below(const char *path) {
    const char *directory = getenv("FAULT_DIR");
    return directory && strncmp(path, directory, strlen(directory)) == 0;
}

static int is_ours(int handle) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

static int is_ours_at(int directory, const char *path) {
    return path[0] == '/' ? below(path) : directory == AT_FDCWD ? 0 : is_ours(directory);
}

/* Whether the step is the last one: a write then does a part of its work first. */
static int dies(void) { return __atomic_add_fetch(&steps, 1, __ATOMIC_SEQ_CST) == kill_at; }
static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }
static int fails(int what) { if (failing & what) errno = failure; return failing & what; }

#define REAL(name) __typeof__(&name) real = (__typeof__(&name)) dlsym(RTLD_NEXT, #name)

#define WRITE(name, parameters, whole, half)      \
    ssize_t name parameters {                     \
        REAL(name);                               \
        if (is_ours(handle)) {                    \
            if (fails(WRITES)) return -1;         \
            if (dies()) { if (tear) (void)!half; die(); } \
        }                                         \
        return whole;                             \
    }

WRITE(write, (int handle, const void *bytes, size_t size), real(handle, bytes, size), real(handle, bytes, part(size)))
WRITE(pwrite, (int handle, const void *bytes, size_t size, off_t place), real(handle, bytes, size, place),
      real(handle, bytes, part(size), place))
WRITE(pwrite64, (int handle, const void *bytes, size_t size, off64_t place), real(handle, bytes, size, place),
      real(handle, bytes, part(size), place))
WRITE(writev, (int handle, const struct iovec *parts, int count), real(handle, parts, count),
      real(handle, parts, count / 2))
WRITE(sendfile, (int handle, int from, off_t *place, size_t size), real(handle, from, place, size),
      real(handle, from, place, part(size)))
WRITE(sendfile64, (int handle, int from, off64_t *place, size_t size), real(handle, from, place, size),
      real(handle, from, place, part(size)))

#define STEP(name, parameters, ours, what, call)  \
    int name parameters {                         \
        REAL(name);                               \
        if (ours) {                               \
            if (fails(what)) return -1;           \
            if (dies()) die();                    \
        }                                         \
        return call;                              \
    }

STEP(fsync, (int handle), is_ours(handle), SYNCS, real(handle))
STEP(fdatasync, (int handle), is_ours(handle), SYNCS, real(handle))
STEP(ftruncate, (int handle, off_t size), is_ours(handle), WRITES, real(handle, size))
STEP(ftruncate64, (int handle, off64_t size), is_ours(handle), WRITES, real(handle, size))
STEP(rename, (const char *from, const char *to), below(to), WRITES, real(from, to))
STEP(renameat, (int a, const char *from, int b, const char *to), is_ours_at(b, to), WRITES, real(a, from, b, to))
STEP(unlink, (const char *path), below(path), WRITES, real(path))
STEP(unlinkat, (int directory, const char *path, int flags), is_ours_at(directory, path), WRITES,
     real(directory, path, flags))
STEP(rmdir, (const char *path), below(path), WRITES, real(path))
STEP(mkdir, (const char *path, mode_t mode), below(path), WRITES, real(path, mode))

/* Opening a file is a step where that makes it or cuts it. */
#define OPEN(name, parameters, directory, call)   \
    int name parameters {                         \
        REAL(name);                               \
        mode_t mode = 0;                          \
        if (flags & (O_CREAT | O_TMPFILE)) {      \
            va_list rest;                         \
            va_start(rest, flags);                \
            mode = va_arg(rest, mode_t);          \
            va_end(rest);                         \
        }                                         \
        if (((flags & O_TRUNC) || ((flags & O_CREAT) && access(path, F_OK))) && is_ours_at(directory, path)) { \
            if (fails(WRITES)) return -1;         \
            if (dies()) die();                    \
        }                                         \
        return call;                              \
    }

OPEN(open, (const char *path, int flags, ...), AT_FDCWD, real(path, flags, mode))
OPEN(open64, (const char *path, int flags, ...), AT_FDCWD, real(path, flags, mode))
OPEN(openat, (int at, const char *path, int flags, ...), at, real(at, path, flags, mode))
OPEN(openat64, (int at, const char *path, int flags, ...), at, real(at, path, flags, mode))
