// Preloaded into a run: system calls that change files under $FAULT_ROOT are counted, and the one of number $FAULT_AT
// fails with $FAULT_ERRNO. Each is a line of $FAULT_LOG: its name, its path, and "failed" where it was the one.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long count;

// Whether this call, of `name` on `path`, is to fail.
static int fails(const char* name, const char* path) {
  const char *root = getenv("FAULT_ROOT"), *at = getenv("FAULT_AT"), *log = getenv("FAULT_LOG");
  if (!root || !path || strncmp(path, root, strlen(root)) != 0) return 0;
  pthread_mutex_lock(&lock);
  const long number = ++count;
  const int chosen = at && number == atol(at);
  if (log) {
    char line[PATH_MAX + 64];
    const int length = snprintf(line, sizeof line, "%s %s%s\n", name, path, chosen ? " failed" : "");
    const int fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND, 0666);
    if (fd >= 0) {
      if (syscall(SYS_write, fd, line, length) != length) abort();
      syscall(SYS_close, fd);
    }
  }
  pthread_mutex_unlock(&lock);
  if (chosen) errno = atoi(getenv("FAULT_ERRNO"));
  return chosen;
}

static int fails_at(const char* name, int fd) {
  char link[64], path[PATH_MAX];
  if (!getenv("FAULT_ROOT")) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  path[length < 0 ? 0 : length] = 0;
  return fails(name, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void* data, size_t size) { return fails_at("write", fd) ? -1 : REAL(write)(fd, data, size); }
int fsync(int fd) { return fails_at("fsync", fd) ? -1 : REAL(fsync)(fd); }
int ftruncate(int fd, off_t size) { return fails_at("ftruncate", fd) ? -1 : REAL(ftruncate)(fd, size); }
int ftruncate64(int fd, off64_t size) { return fails_at("ftruncate", fd) ? -1 : REAL(ftruncate64)(fd, size); }
int rename(const char* from, const char* to) { return fails("rename", to) ? -1 : REAL(rename)(from, to); }
int unlink(const char* path) { return fails("unlink", path) ? -1 : REAL(unlink)(path); }
int mkdir(const char* path, mode_t mode) { return fails("mkdir", path) ? -1 : REAL(mkdir)(path, mode); }

#define OPEN(name)                                            \
  int name(const char* path, int flags, ...) {                \
    va_list rest;                                             \
    va_start(rest, flags);                                    \
    const mode_t mode = flags & O_CREAT ? va_arg(rest, int) : 0; \
    va_end(rest);                                             \
    if (flags & O_CREAT && fails("open", path)) return -1;    \
    return REAL(name)(path, flags, mode);                     \
  }
OPEN(open)
OPEN(open64)
