/* Counts the calls that change files of one folder, and at the n-th kills the process or fails: LD_PRELOADed.
 *
 * fault_arm(pattern, log, n, error, from_then_on) arms it; a path counts if fnmatch(pattern, path) without
 * FNM_PATHNAME, so that a star spans folders. Each counted call is a line of `log`, written before the call is made, so
 * that the log outlives the process. At the n-th (from 1; 0 is never) the process gets SIGKILL where `error` is 0, else
 * the call fails with `error`. A full disk lets files be deleted: unlink and rmdir do not count where it is ENOSPC.
 *
 * Not seen: what is asked of the kernel past libc. strace shows one such call in a save: safetensors' Rust renames its
 * temporary file inside the checkpoint that is being written.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char armed[PATH_MAX];
static int is_armed, log_fd = -1, at, code, sticky;
static volatile int counted;

void fault_disarm(void) { is_armed = 0; }

void fault_arm(const char *pattern, const char *log, int n, int error, int from_then_on) {
    is_armed = 0;
    snprintf(armed, sizeof armed, "%s", pattern);
    if (log_fd >= 0) close(log_fd);
    log_fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    counted = 0, at = n, code = error, sticky = from_then_on;
    is_armed = 1;
}

/* Whether the call is to fail; it does not return where the process is to die. */
static int fault(const char *call, const char *path) {
    char line[PATH_MAX + 64];
    int deletes = !strncmp(call, "unlink", 6) || !strcmp(call, "rmdir");
    if (!is_armed || fnmatch(armed, path, 0) || (code == ENOSPC && deletes)) return 0;
    int now = __sync_add_and_fetch(&counted, 1);
    int length = snprintf(line, sizeof line, "%s %s\n", call, path);
    syscall(SYS_write, log_fd, line, length);
    if (!at || !(now == at || (sticky && now > at))) return 0;
    if (!code) syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    errno = code;
    return 1;
}

static int on_fd(const char *call, int fd) {
    char link[64], path[PATH_MAX];
    if (!is_armed || fd < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int saved = errno;
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = saved;
    if (length <= 0) return 0;
    path[length] = 0;
    return fault(call, path);
}

static int on_path(const char *call, int folder, const char *name) {
    char path[2 * PATH_MAX], link[64];
    if (!is_armed || !name) return 0;
    if (name[0] == '/') return fault(call, name);
    int saved = errno;
    ssize_t length;
    if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    length = readlink(link, path, PATH_MAX - 1);
    errno = saved;
    if (length <= 0) return 0;
    snprintf(path + length, sizeof path - length, "/%s", name);
    return fault(call, path);
}

#define NEXT(name) static __typeof__(&name) next; if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define BY_FD(type, name, declared, given)                                                                             \
    type name declared {                                                                                               \
        NEXT(name);                                                                                                    \
        return on_fd(#name, fd) ? -1 : next given;                                                                     \
    }
#define BY_PATH(name, declared, given, folder, path)                                                                   \
    int name declared {                                                                                                \
        NEXT(name);                                                                                                    \
        return on_path(#name, folder, path) ? -1 : next given;                                                         \
    }

BY_FD(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
BY_FD(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t where), (fd, data, size, where))
BY_FD(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t where), (fd, data, size, where))
BY_FD(ssize_t, writev, (int fd, const struct iovec *parts, int number), (fd, parts, number))
BY_FD(ssize_t, pwritev, (int fd, const struct iovec *parts, int number, off_t where), (fd, parts, number, where))
BY_FD(ssize_t, pwritev64, (int fd, const struct iovec *parts, int number, off64_t where), (fd, parts, number, where))
BY_FD(int, fsync, (int fd), (fd))
BY_FD(int, fdatasync, (int fd), (fd))
BY_FD(int, ftruncate, (int fd, off_t size), (fd, size))
BY_FD(int, ftruncate64, (int fd, off64_t size), (fd, size))
BY_FD(int, fallocate, (int fd, int mode, off_t from, off_t size), (fd, mode, from, size))
BY_FD(int, fallocate64, (int fd, int mode, off64_t from, off64_t size), (fd, mode, from, size))

ssize_t sendfile(int fd, int source, off_t *from, size_t size);
ssize_t sendfile64(int fd, int source, off64_t *from, size_t size);
BY_FD(ssize_t, sendfile, (int fd, int source, off_t *from, size_t size), (fd, source, from, size))
BY_FD(ssize_t, sendfile64, (int fd, int source, off64_t *from, size_t size), (fd, source, from, size))

ssize_t copy_file_range(int source, off64_t *from, int fd, off64_t *to, size_t size, unsigned flags) {
    NEXT(copy_file_range);
    return on_fd("copy_file_range", fd) ? -1 : next(source, from, fd, to, size, flags);
}
int posix_fallocate(int fd, off_t from, off_t size) {
    NEXT(posix_fallocate);
    return on_fd("posix_fallocate", fd) ? code : next(fd, from, size);
}
int posix_fallocate64(int fd, off64_t from, off64_t size) {
    NEXT(posix_fallocate64);
    return on_fd("posix_fallocate64", fd) ? code : next(fd, from, size);
}

BY_PATH(rename, (const char *from, const char *to), (from, to), AT_FDCWD, to)
BY_PATH(renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), b, to)
BY_PATH(renameat2, (int a, const char *from, int b, const char *to, unsigned flags), (a, from, b, to, flags), b, to)
/* A folder that is there is not made, and is said to be there before a disk is found full. */
int mkdir(const char *path, mode_t mode) {
    NEXT(mkdir);
    return faccessat(AT_FDCWD, path, F_OK, 0) && on_path("mkdir", AT_FDCWD, path) ? -1 : next(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    NEXT(mkdirat);
    return faccessat(folder, path, F_OK, 0) && on_path("mkdirat", folder, path) ? -1 : next(folder, path, mode);
}
BY_PATH(unlink, (const char *path), (path), AT_FDCWD, path)
BY_PATH(unlinkat, (int folder, const char *path, int flags), (folder, path, flags), folder, path)
BY_PATH(rmdir, (const char *path), (path), AT_FDCWD, path)
BY_PATH(symlink, (const char *to, const char *path), (to, path), AT_FDCWD, path)
BY_PATH(symlinkat, (const char *to, int folder, const char *path), (to, folder, path), folder, path)
BY_PATH(link, (const char *from, const char *path), (from, path), AT_FDCWD, path)
BY_PATH(linkat, (int a, const char *from, int b, const char *path, int flags), (a, from, b, path, flags), b, path)
BY_PATH(truncate, (const char *path, off_t size), (path, size), AT_FDCWD, path)
BY_PATH(truncate64, (const char *path, off64_t size), (path, size), AT_FDCWD, path)

#define MAKES (O_CREAT | O_TRUNC)
#define MODE                                                                                                           \
    mode_t mode = 0;                                                                                                   \
    if (flags & (O_CREAT | __O_TMPFILE)) {                                                                             \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode = va_arg(more, mode_t);                                                                                   \
        va_end(more);                                                                                                  \
    }
#define OPEN(name, declared, folder, given)                                                                            \
    int name declared {                                                                                                \
        NEXT(name);                                                                                                    \
        MODE                                                                                                           \
        return (flags & MAKES) && on_path(#name, folder, path) ? -1 : next given;                                      \
    }
OPEN(open, (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode))
OPEN(open64, (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode))
OPEN(openat, (int folder, const char *path, int flags, ...), folder, (folder, path, flags, mode))
OPEN(openat64, (int folder, const char *path, int flags, ...), folder, (folder, path, flags, mode))

/* libstdc++ opens with it and then calls write itself. */
#define FOPEN(name)                                                                                                    \
    FILE *name(const char *path, const char *mode) {                                                                   \
        NEXT(name);                                                                                                    \
        return mode[0] != 'r' && on_path(#name, AT_FDCWD, path) ? NULL : next(path, mode);                             \
    }
FOPEN(fopen)
FOPEN(fopen64)
