/* Counts the calls that change files below a folder, and lets one of them fail.

   Loaded before libc (LD_PRELOAD), so calls from Python, Rust and C++ are all seen. Disarmed it only
   forwards. Armed by `faults_arm`, every call that would change something below the folder takes the
   next number and is entered on a board that the parent process shares. At the number that was asked
   for, the process is killed before the call or in the middle of it; or the disk is full from then
   on: this call and every later one that takes space fail with ENOSPC.

   Not seen: stores into mapped memory, and what stdio writes by itself after an fopen. */

#define _GNU_SOURCE
#undef _FORTIFY_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { OFF, WATCH, KILL, KILL_TORN, FULL, FULL_TORN };
enum kind { CREATE, OPEN, WRITE, TRUNCATE, COPY, RENAME, UNLINK, RMDIR, MKDIR, LINK };
enum action { PROCEED, FAIL, HALF };

#define NAME 200

struct entry {
    int kind;
    int mark;
    long long size;
    char path[NAME];
};

struct board {
    long long count;
    struct entry entries[];
};

static char prefix[PATH_MAX];
static size_t prefix_length;
static enum mode mode = OFF;
static long long chosen, capacity;
static int full;
static struct board *board;

/* What the harness wants to see beside every call: the number of the stage the work is in. */
int faults_mark;

void faults_arm(const char *folder, struct board *shared, long long entries, long long number,
                int how)
{
    snprintf(prefix, sizeof prefix, "%s/", folder);
    prefix_length = strlen(prefix);
    board = shared;
    capacity = entries;
    chosen = number;
    full = 0;
    mode = how;
}

void faults_disarm(void)
{
    mode = OFF;
}

/* -- which file is meant ---------------------------------------------------------------------- */

static int absolute(int folder, const char *path, char *found)
{
    char link[64];
    if (path[0] == '/')
        return snprintf(found, PATH_MAX, "%s", path) < PATH_MAX;
    if (folder == AT_FDCWD)
        snprintf(link, sizeof link, "/proc/self/cwd");
    else
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, found, PATH_MAX - 2);
    if (length < 0)
        return 0;
    return length + snprintf(found + length, PATH_MAX - length, "/%s", path) < PATH_MAX;
}

static int below(const char *path)
{
    return strncmp(path, prefix, prefix_length) == 0;
}

static int watched_path(int folder, const char *path, char *found)
{
    return mode != OFF && path && absolute(folder, path, found) && below(found);
}

static int watched_file(int file, char *found)
{
    char link[64];
    if (mode == OFF || file <= 2)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, found, PATH_MAX - 1);
    if (length < 0)
        return 0;
    found[length] = 0;
    return below(found);
}

/* -- what happens to a call ------------------------------------------------------------------- */

static void killed(void)
{
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

static enum action next(enum kind kind, const char *path, long long size)
{
    int takes_space = kind != OPEN && kind != RENAME && kind != UNLINK && kind != RMDIR;
    long long number = __atomic_fetch_add(&board->count, 1, __ATOMIC_SEQ_CST);
    if (number < capacity) {
        struct entry *entry = &board->entries[number];
        entry->kind = kind;
        entry->mark = faults_mark;
        entry->size = size;
        snprintf(entry->path, NAME, "%s", path + prefix_length);
    }
    if (number == chosen) {
        if (mode == KILL)
            killed();
        if (mode == KILL_TORN)
            return HALF;
        if (mode == FULL || mode == FULL_TORN)
            full = 1;
        if (mode == FULL_TORN && takes_space && size > 1)
            return HALF;
    }
    if (full && takes_space) {
        errno = ENOSPC;
        return FAIL;
    }
    return PROCEED;
}

static void after_half(void)
{
    if (mode == KILL_TORN)
        killed();
}

/* -- opening ---------------------------------------------------------------------------------- */

static int changes(int flags)
{
    return (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);
}

static int refused_open(int folder, const char *path, int flags)
{
    char found[PATH_MAX];
    if (!changes(flags) || !watched_path(folder, path, found))
        return 0;
    int is_new = flags & O_CREAT && syscall(SYS_faccessat, AT_FDCWD, found, F_OK) != 0;
    return next(is_new ? CREATE : OPEN, found, 0) == FAIL;
}

static int opened(int folder, const char *path, int flags, mode_t permissions)
{
    if (refused_open(folder, path, flags))
        return -1;
    return syscall(SYS_openat, folder, path, flags, permissions);
}

#define PERMISSIONS(flags)                                     \
    mode_t permissions = 0;                                    \
    if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) { \
        va_list rest;                                          \
        va_start(rest, flags);                                 \
        permissions = va_arg(rest, mode_t);                    \
        va_end(rest);                                          \
    }

int open(const char *path, int flags, ...)
{
    PERMISSIONS(flags)
    return opened(AT_FDCWD, path, flags, permissions);
}

int open64(const char *path, int flags, ...)
{
    PERMISSIONS(flags)
    return opened(AT_FDCWD, path, flags, permissions);
}

int openat(int folder, const char *path, int flags, ...)
{
    PERMISSIONS(flags)
    return opened(folder, path, flags, permissions);
}

int openat64(int folder, const char *path, int flags, ...)
{
    PERMISSIONS(flags)
    return opened(folder, path, flags, permissions);
}

int __open_2(const char *path, int flags) { return opened(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return opened(AT_FDCWD, path, flags, 0); }
int __openat_2(int folder, const char *path, int flags) { return opened(folder, path, flags, 0); }
int __openat64_2(int folder, const char *path, int flags) { return opened(folder, path, flags, 0); }

#define CREATING (O_CREAT | O_WRONLY | O_TRUNC)
int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, CREATING, mode); }
int creat64(const char *path, mode_t mode) { return opened(AT_FDCWD, path, CREATING, mode); }

static FILE *file_opened(const char *name, const char *path, const char *how)
{
    int flags = how[0] == 'w'   ? O_WRONLY | O_CREAT | O_TRUNC
                : how[0] == 'a' ? O_WRONLY | O_CREAT
                : strchr(how, '+') ? O_RDWR
                                   : O_RDONLY;
    if (refused_open(AT_FDCWD, path, flags))
        return NULL;
    FILE *(*real)(const char *, const char *) = dlsym(RTLD_NEXT, name);
    return real(path, how);
}

FILE *fopen(const char *path, const char *how) { return file_opened("fopen", path, how); }
FILE *fopen64(const char *path, const char *how) { return file_opened("fopen64", path, how); }

/* -- writing ---------------------------------------------------------------------------------- */

static ssize_t written(int file, const void *bytes, size_t count)
{
    return syscall(SYS_write, file, bytes, count);
}

ssize_t write(int file, const void *bytes, size_t count)
{
    char found[PATH_MAX];
    if (count == 0 || !watched_file(file, found))
        return written(file, bytes, count);
    enum action action = next(WRITE, found, count);
    if (action == FAIL)
        return -1;
    if (action == PROCEED)
        return written(file, bytes, count);
    ssize_t half = written(file, bytes, count / 2);
    after_half();
    return half;
}

static ssize_t written_at(int file, const void *bytes, size_t count, off_t offset)
{
    char found[PATH_MAX];
    enum action action = PROCEED;
    if (count && watched_file(file, found))
        action = next(WRITE, found, count);
    if (action == FAIL)
        return -1;
    if (action == HALF)
        count /= 2;
    ssize_t done = syscall(SYS_pwrite64, file, bytes, count, offset);
    if (action == HALF)
        after_half();
    return done;
}

ssize_t pwrite(int file, const void *bytes, size_t count, off_t offset)
{
    return written_at(file, bytes, count, offset);
}

ssize_t pwrite64(int file, const void *bytes, size_t count, off64_t offset)
{
    return written_at(file, bytes, count, offset);
}

ssize_t writev(int file, const struct iovec *parts, int count)
{
    char found[PATH_MAX];
    long long size = 0;
    for (int i = 0; i < count; i++)
        size += parts[i].iov_len;
    if (size == 0 || !watched_file(file, found))
        return syscall(SYS_writev, file, parts, count);
    enum action action = next(WRITE, found, size);
    if (action == FAIL)
        return -1;
    if (action == PROCEED)
        return syscall(SYS_writev, file, parts, count);
    int first = 0;
    while (parts[first].iov_len == 0)
        first++;
    ssize_t half = written(file, parts[first].iov_base, (parts[first].iov_len + 1) / 2);
    after_half();
    return half;
}

static ssize_t copied(int from, int to, size_t *count)
{
    char found[PATH_MAX];
    struct stat source;
    if (!watched_file(to, found))
        return 0;
    size_t size = *count;
    if (fstat(from, &source) == 0 && S_ISREG(source.st_mode)) {
        off_t left = source.st_size - lseek(from, 0, SEEK_CUR);
        if (left == 0) /* only asks for the end */
            return 0;
        if (left > 0 && (size_t)left < size)
            size = left;
    }
    enum action action = next(COPY, found, size);
    if (action == HALF)
        *count = size > 1 ? size / 2 : 1;
    return action == FAIL ? -1 : action == HALF;
}

static ssize_t sent(int to, int from, off_t *offset, size_t count)
{
    ssize_t half = copied(from, to, &count);
    if (half < 0)
        return -1;
    ssize_t done = syscall(SYS_sendfile, to, from, offset, count);
    if (half)
        after_half();
    return done;
}

ssize_t sendfile(int to, int from, off_t *offset, size_t count)
{
    return sent(to, from, offset, count);
}

ssize_t sendfile64(int to, int from, off64_t *offset, size_t count)
{
    return sent(to, from, offset, count);
}

ssize_t copy_file_range(int from, off64_t *in, int to, off64_t *out, size_t count, unsigned flags)
{
    ssize_t half = copied(from, to, &count);
    if (half < 0)
        return -1;
    ssize_t done = syscall(SYS_copy_file_range, from, in, to, out, count, flags);
    if (half)
        after_half();
    return done;
}

static int cut_file(int file, off_t length)
{
    char found[PATH_MAX];
    if (watched_file(file, found) && next(TRUNCATE, found, 0) == FAIL)
        return -1;
    return syscall(SYS_ftruncate, file, length);
}

int ftruncate(int file, off_t length) { return cut_file(file, length); }
int ftruncate64(int file, off64_t length) { return cut_file(file, length); }

static int cut_path(const char *path, off_t length)
{
    char found[PATH_MAX];
    if (watched_path(AT_FDCWD, path, found) && next(TRUNCATE, found, 0) == FAIL)
        return -1;
    return syscall(SYS_truncate, path, length);
}

int truncate(const char *path, off_t length) { return cut_path(path, length); }
int truncate64(const char *path, off64_t length) { return cut_path(path, length); }

static int reserved(int file, int how, off_t offset, off_t length)
{
    char found[PATH_MAX];
    if (watched_file(file, found) && next(TRUNCATE, found, 0) == FAIL)
        return -1;
    return syscall(SYS_fallocate, file, how, offset, length);
}

int fallocate(int file, int how, off_t offset, off_t length)
{
    return reserved(file, how, offset, length);
}

int fallocate64(int file, int how, off64_t offset, off64_t length)
{
    return reserved(file, how, offset, length);
}

int posix_fallocate(int file, off_t offset, off_t length)
{
    return reserved(file, 0, offset, length) ? errno : 0;
}

int posix_fallocate64(int file, off64_t offset, off64_t length)
{
    return reserved(file, 0, offset, length) ? errno : 0;
}

/* -- names ------------------------------------------------------------------------------------ */

static int named(enum kind kind, int folder, const char *path)
{
    char found[PATH_MAX];
    return watched_path(folder, path, found) && next(kind, found, 0) == FAIL;
}

static int renamed(int from_folder, const char *from, int to_folder, const char *to, unsigned flags)
{
    char found[PATH_MAX];
    if (watched_path(to_folder, to, found) || watched_path(from_folder, from, found))
        next(RENAME, found, 0);
    return syscall(SYS_renameat2, from_folder, from, to_folder, to, flags);
}

int rename(const char *from, const char *to) { return renamed(AT_FDCWD, from, AT_FDCWD, to, 0); }

int renameat(int from_folder, const char *from, int to_folder, const char *to)
{
    return renamed(from_folder, from, to_folder, to, 0);
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags)
{
    return renamed(from_folder, from, to_folder, to, flags);
}

int unlinkat(int folder, const char *path, int flags)
{
    named(flags & AT_REMOVEDIR ? RMDIR : UNLINK, folder, path);
    return syscall(SYS_unlinkat, folder, path, flags);
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int remove(const char *path)
{
    int done = unlinkat(AT_FDCWD, path, 0);
    return done && errno == EISDIR ? unlinkat(AT_FDCWD, path, AT_REMOVEDIR) : done;
}

int mkdirat(int folder, const char *path, mode_t permissions)
{
    if (named(MKDIR, folder, path))
        return -1;
    return syscall(SYS_mkdirat, folder, path, permissions);
}

int mkdir(const char *path, mode_t permissions) { return mkdirat(AT_FDCWD, path, permissions); }

int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags)
{
    if (named(LINK, to_folder, to))
        return -1;
    return syscall(SYS_linkat, from_folder, from, to_folder, to, flags);
}

int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

int symlinkat(const char *target, int folder, const char *path)
{
    if (named(LINK, folder, path))
        return -1;
    return syscall(SYS_symlinkat, target, folder, path);
}

int symlink(const char *target, const char *path) { return symlinkat(target, AT_FDCWD, path); }
