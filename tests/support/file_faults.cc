// Preloaded into a build and the programs that it starts: counts the file operations under one directory, and at one of
// them fails or kills. What is asked for, and what happened, is in a file that all the processes map: FAULTS names it.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

namespace {

struct Faults {         // as tests/faulty_builds.py packs it
  int64_t operations;   // so far, under root
  int64_t nth;          // the one to fail at, from 1; 0 for none
  int32_t error;        // errno, or 0 to kill
  int32_t victim;       // process, or -group, that is killed
  int32_t stays;        // whether every later operation that takes space fails as well, as on a full disk
  int32_t hits;         // how many failed
  char root[1024];
  char what[1024];      // the first that failed: its name and path
};

Faults* MapFaults() {
  const char* name = getenv("FAULTS");
  int file = name ? static_cast<int>(syscall(SYS_openat, AT_FDCWD, name, O_RDWR | O_CLOEXEC)) : -1;
  void* memory = file < 0 ? MAP_FAILED : mmap(nullptr, sizeof(Faults), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (memory == MAP_FAILED) abort();
  return static_cast<Faults*>(memory);
}

// Whether an operation on a path under root is to fail; it may not return.
bool Fails(const char* operation, const char* path, bool takes_space) {
  static Faults* const faults = MapFaults();
  char full[2 * PATH_MAX];
  if (path[0] != '/') {
    char here[PATH_MAX];
    if (!getcwd(here, sizeof here)) return false;
    snprintf(full, sizeof full, "%s/%s", here, path);
    path = full;
  }
  if (!faults->root[0] || strncmp(path, faults->root, strlen(faults->root)) != 0) return false;
  int64_t count = __atomic_add_fetch(&faults->operations, 1, __ATOMIC_SEQ_CST);
  bool hit = faults->nth && (count == faults->nth || (faults->stays && takes_space && count > faults->nth));
  if (!hit) return false;
  if (__atomic_add_fetch(&faults->hits, 1, __ATOMIC_SEQ_CST) == 1) {
    snprintf(faults->what, sizeof faults->what, "%s %s", operation, path + strlen(faults->root));
  }
  if (!faults->error) {
    kill(faults->victim, SIGKILL);
    return false;
  }
  errno = faults->error;
  return true;
}

bool FailsAt(const char* operation, int directory, const char* path, bool takes_space) {
  if (path[0] == '/' || directory == AT_FDCWD) return Fails(operation, path, takes_space);
  char link[64], full[2 * PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
  ssize_t length = readlink(link, full, PATH_MAX);
  if (length <= 0 || full[0] != '/') return false;  // a pipe or a socket
  snprintf(full + length, sizeof full - length, "%s%s", path[0] ? "/" : "", path);
  return Fails(operation, full, takes_space);
}

bool FailsOn(const char* operation, int file, bool takes_space) {
  int before = errno;
  bool fails = FailsAt(operation, file, "", takes_space);
  if (!fails) errno = before;
  return fails;
}

// Of what goes through a buffer of the C library one after another, only the first counts.
bool FailsOn(const char* operation, FILE* file, bool takes_space) {
  static FILE* last = nullptr;
  bool same = file == last && (operation[1] == 'r' || operation[1] == 'w');  // fread, fwrite
  last = file;
  if (!file || same || !FailsOn(operation, fileno(file), takes_space)) return false;
  file->_flags |= 0x20;  // what ferror() looks at
  return true;
}

bool IsFile(int file) {
  struct stat status;
  int before = errno;
  bool is = fstat(file, &status) == 0 && S_ISREG(status.st_mode);
  errno = before;
  return is;
}

bool IsFile(FILE* file) { return IsFile(fileno(file)); }

template <typename F>
F* Real(F*, const char* name) {
  return reinterpret_cast<F*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

#define REAL(name) static const auto real = Real(&name, #name)

extern "C" {

#define OPEN(name, at, parameters, arguments)                                          \
  int name parameters {                                                                \
    va_list rest;                                                                      \
    va_start(rest, flags);                                                             \
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;          \
    va_end(rest);                                                                      \
    REAL(name);                                                                        \
    return FailsAt("open", at, path, (flags & O_CREAT) != 0) ? -1 : real arguments;    \
  }

OPEN(open, AT_FDCWD, (const char* path, int flags, ...), (path, flags, mode))
OPEN(open64, AT_FDCWD, (const char* path, int flags, ...), (path, flags, mode))
OPEN(openat, at, (int at, const char* path, int flags, ...), (at, path, flags, mode))
OPEN(openat64, at, (int at, const char* path, int flags, ...), (at, path, flags, mode))

// Those that take a path, or a directory and a path, and those on an open file.
#define ON_PATH(type, failed, name, space, path, parameters, arguments)     \
  type name parameters {                                                   \
    REAL(name);                                                            \
    return Fails(#name, path, space) ? failed : real arguments;            \
  }
#define AT_PATH(name, space, at, path, parameters, arguments)               \
  int name parameters {                                                    \
    REAL(name);                                                            \
    return FailsAt(#name, at, path, space) ? -1 : real arguments;          \
  }
#define ON_FILE(type, failed, name, space, file, parameters, arguments)     \
  type name parameters {                                                   \
    REAL(name);                                                            \
    return FailsOn(#name, file, space) ? failed : real arguments;          \
  }

ON_PATH(FILE*, nullptr, fopen, mode[0] != 'r', path, (const char* path, const char* mode), (path, mode))
ON_PATH(FILE*, nullptr, fopen64, mode[0] != 'r', path, (const char* path, const char* mode), (path, mode))
ON_PATH(DIR*, nullptr, opendir, false, path, (const char* path), (path))
ON_PATH(int, -1, mkdir, true, path, (const char* path, mode_t mode), (path, mode))
ON_PATH(int, -1, rmdir, false, path, (const char* path), (path))
ON_PATH(int, -1, unlink, false, path, (const char* path), (path))
ON_PATH(int, -1, rename, true, to, (const char* from, const char* to), (from, to))
AT_PATH(mkdirat, true, at, path, (int at, const char* path, mode_t mode), (at, path, mode))
AT_PATH(unlinkat, false, at, path, (int at, const char* path, int flags), (at, path, flags))
AT_PATH(renameat, true, at, to, (int from_at, const char* from, int at, const char* to), (from_at, from, at, to))
ON_FILE(DIR*, nullptr, fdopendir, false, file, (int file), (file))
ON_FILE(ssize_t, -1, read, false, file, (int file, void* to, size_t size), (file, to, size))
ON_FILE(ssize_t, -1, write, true, file, (int file, const void* from, size_t size), (file, from, size))
ON_FILE(ssize_t, -1, pwrite64, true, file, (int file, const void* from, size_t size, off64_t at), (file, from, size, at))
ON_FILE(ssize_t, -1, writev, true, file, (int file, const struct iovec* from, int n), (file, from, n))
ON_FILE(int, -1, ftruncate, true, file, (int file, off_t size), (file, size))
ON_FILE(int, -1, ftruncate64, true, file, (int file, off64_t size), (file, size))
ON_FILE(int, -1, fchmod, false, file, (int file, mode_t mode), (file, mode))
ON_FILE(int, -1, fsync, true, file, (int file), (file))
ON_FILE(int, -1, flock, false, file, (int file, int what), (file, what))
ON_FILE(size_t, 0, fread, false, file, (void* to, size_t size, size_t n, FILE* file), (to, size, n, file))
ON_FILE(size_t, 0, fwrite, true, file, (const void* from, size_t size, size_t n, FILE* file), (from, size, n, file))
ON_FILE(int, EOF, fflush, true, file, (FILE* file), (file))

// These let go of what they have even where they fail. Directories have nothing left to write then.
#define CLOSE(name, type)                                 \
  int name(type file) {                                   \
    REAL(name);                                           \
    int error = IsFile(file) && FailsOn(#name, file, true) ? errno : 0;   \
    int result = real(file);                              \
    if (!error) return result;                            \
    errno = error;                                        \
    return -1;                                            \
  }

CLOSE(close, int)
CLOSE(fclose, FILE*)

}  // extern "C"
