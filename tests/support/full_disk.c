/* For LD_PRELOAD: makes the n-th operation that changes files below a folder fail, in all processes of a command.

   The state is a file that all of them map: see struct state, and support/full_disk.py, which writes it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

struct state {
    int64_t count;      /* operations so far */
    int64_t fails;      /* the operation that fails, from 0; -1: none */
    int64_t error;      /* its errno */
    int64_t stays;      /* whether everything that needs space fails from then on, as on a full disk */
    char folder[1024];  /* only what lies below it counts */
    char failed[1024];  /* operation and path that failed first */
};

static struct state *state;

static void begin_with(const char *file) {
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    int descriptor = real(file, O_RDWR);
    if (descriptor < 0) abort();
    void *memory = mmap(NULL, sizeof(struct state), PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (memory == MAP_FAILED) abort();
    close(descriptor);
    state = memory;
}

/* Called in a forked process; others find the file's name in their environment. */
void full_disk_begin(const char *file) { begin_with(file); }

__attribute__((constructor)) static void begin(void) {
    const char *file = getenv("FULL_DISK");
    if (file && *file) begin_with(file);
}

static int below(const char *path) {
    size_t length = strlen(state->folder);
    return strncmp(path, state->folder, length) == 0 && (path[length] == '/' || path[length] == 0);
}

/* Whether this operation on `path` has to fail; errno is set. `needs_space`: as opposed to a rename or a fsync. */
static int fails(const char *name, const char *path, int needs_space) {
    if (!state || !below(path)) return 0;
    int64_t number = __atomic_fetch_add(&state->count, 1, __ATOMIC_SEQ_CST);
    if (state->fails < 0 || number < state->fails) return 0;
    if (number > state->fails && !(state->stays && needs_space)) return 0;
    if (number == state->fails) snprintf(state->failed, sizeof state->failed, "%s %s", name, path);
    errno = (int)state->error;
    return 1;
}

static int fails_at(const char *name, int folder, const char *path, int needs_space) {
    char whole[2 * PATH_MAX], place[PATH_MAX];
    if (!state) return 0;
    if (path[0] == '/') return fails(name, path, needs_space);
    if (folder == AT_FDCWD) {
        if (!getcwd(place, sizeof place)) return 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, place, sizeof place - 1);
        if (length < 0) return 0;
        place[length] = 0;
    }
    snprintf(whole, sizeof whole, "%s/%s", place, path);
    return fails(name, whole, needs_space);
}

static int fails_on(const char *name, int descriptor, int needs_space) {
    char link[64], path[PATH_MAX];
    if (!state) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(name, path, needs_space);
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define OPENS(name)                                                                                      \
    int name(const char *path, int flags, ...) {                                                         \
        REAL(name);                                                                                      \
        mode_t mode = 0;                                                                                 \
        if (flags & (O_CREAT | __O_TMPFILE)) {                                                           \
            va_list rest;                                                                                \
            va_start(rest, flags);                                                                       \
            mode = va_arg(rest, mode_t);                                                                 \
            va_end(rest);                                                                                \
        }                                                                                                \
        if ((flags & O_CREAT) && state && access(path, F_OK) && fails_at("create", AT_FDCWD, path, 1)) return -1; \
        return real(path, flags, mode);                                                                  \
    }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name)                                                                                   \
    int name(int folder, const char *path, int flags, ...) {                                             \
        REAL(name);                                                                                      \
        mode_t mode = 0;                                                                                 \
        if (flags & (O_CREAT | __O_TMPFILE)) {                                                           \
            va_list rest;                                                                                \
            va_start(rest, flags);                                                                       \
            mode = va_arg(rest, mode_t);                                                                 \
            va_end(rest);                                                                                \
        }                                                                                                \
        if ((flags & O_CREAT) && state && faccessat(folder, path, F_OK, 0) && fails_at("create", folder, path, 1)) \
            return -1;                                                                                   \
        return real(folder, path, flags, mode);                                                          \
    }
OPENS_AT(openat)
OPENS_AT(openat64)

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    if (state && access(path, F_OK) && fails_at("mkdir", AT_FDCWD, path, 1)) return -1;
    return real(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(mkdirat);
    if (fails_at("mkdir", folder, path, 1)) return -1;
    return real(folder, path, mode);
}
int rename(const char *from, const char *to) {
    REAL(rename);
    if (fails_at("rename", AT_FDCWD, to, 0)) return -1;
    return real(from, to);
}
int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    REAL(renameat);
    if (fails_at("rename", to_folder, to, 0)) return -1;
    return real(from_folder, from, to_folder, to);
}
int link(const char *from, const char *to) {
    REAL(link);
    if (fails_at("link", AT_FDCWD, to, 1)) return -1;
    return real(from, to);
}
int symlink(const char *from, const char *to) {
    REAL(symlink);
    if (fails_at("symlink", AT_FDCWD, to, 1)) return -1;
    return real(from, to);
}
int fsync(int descriptor) {
    REAL(fsync);
    if (fails_on("fsync", descriptor, 0)) return -1;
    return real(descriptor);
}
int fdatasync(int descriptor) {
    REAL(fdatasync);
    if (fails_on("fsync", descriptor, 0)) return -1;
    return real(descriptor);
}
ssize_t write(int descriptor, const void *from, size_t size) {
    REAL(write);
    if (size && fails_on("write", descriptor, 1)) {
        /* the disk takes the first half, and nothing of what the caller tries next */
        int64_t first = __atomic_load_n(&state->count, __ATOMIC_SEQ_CST) - 1 == state->fails;
        int kept = errno;
        if (first && size > 1 && kept == ENOSPC) {
            state->stays = 1;
            return real(descriptor, from, size / 2);
        }
        errno = kept;
        return -1;
    }
    return real(descriptor, from, size);
}
ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    REAL(writev);
    if (fails_on("write", descriptor, 1)) return -1;
    return real(descriptor, parts, count);
}
ssize_t pwrite(int descriptor, const void *from, size_t size, off_t at) {
    REAL(pwrite);
    if (fails_on("write", descriptor, 1)) return -1;
    return real(descriptor, from, size, at);
}
ssize_t pwrite64(int descriptor, const void *from, size_t size, off64_t at) {
    REAL(pwrite64);
    if (fails_on("write", descriptor, 1)) return -1;
    return real(descriptor, from, size, at);
}
ssize_t sendfile(int out, int in, off_t *at, size_t size) {
    static ssize_t (*real)(int, int, off_t *, size_t);
    if (!real) real = (ssize_t(*)(int, int, off_t *, size_t))dlsym(RTLD_NEXT, "sendfile");
    if (fails_on("write", out, 1)) return -1;
    return real(out, in, at, size);
}
ssize_t sendfile64(int out, int in, off64_t *at, size_t size) {
    static ssize_t (*real)(int, int, off64_t *, size_t);
    if (!real) real = (ssize_t(*)(int, int, off64_t *, size_t))dlsym(RTLD_NEXT, "sendfile64");
    if (fails_on("write", out, 1)) return -1;
    return real(out, in, at, size);
}
ssize_t copy_file_range(int in, off64_t *at, int out, off64_t *to, size_t size, unsigned flags) {
    static ssize_t (*real)(int, off64_t *, int, off64_t *, size_t, unsigned);
    if (!real) real = (ssize_t(*)(int, off64_t *, int, off64_t *, size_t, unsigned))dlsym(RTLD_NEXT, "copy_file_range");
    if (fails_on("write", out, 1)) return -1;
    return real(in, at, out, to, size, flags);
}
int fallocate(int descriptor, int mode, off_t at, off_t size) {
    REAL(fallocate);
    if (fails_on("allocate", descriptor, 1)) return -1;
    return real(descriptor, mode, at, size);
}
int posix_fallocate(int descriptor, off_t at, off_t size) {
    REAL(posix_fallocate);
    if (fails_on("allocate", descriptor, 1)) return errno;
    return real(descriptor, at, size);
}
