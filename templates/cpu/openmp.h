// The team of an OpenMP runtime that the process has loaded.
#pragma once

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>

#include "cpu/floating_point.h"
#include "cpu/pool.h"
#include "shared/errors.h"

namespace pa {

// The functions of an OpenMP runtime that this process has loaded: GCC's, LLVM's and Intel's all have them. The library
// is linked to none.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned,
                   unsigned);  // GOMP_parallel: function, its argument, threads, flags
  int (*in_parallel)();
  int (*max_threads)();
  const char* path;
  void* library;
  const OpenMP* older;
};

// Looks for the runtime, and again when the process has loaded a library since.
class OpenMPFinder {
 public:
  // The runtime whose team the process's other libraries use, or nullptr. If there are several, that is the one that
  // the global scope has, such as one that is preloaded or torch's, else the one that was loaded first.
  const OpenMP* Find() {
    unsigned long long loads = 0;
    dl_iterate_phdr(ReadLoads, &loads);
    if (loads != seen_loads_.load(std::memory_order_acquire)) {
      pthread_mutex_lock(&mutex_);
      found_.store(Look(), std::memory_order_relaxed);
      seen_loads_.store(loads, std::memory_order_release);
      pthread_mutex_unlock(&mutex_);
    }
    return found_.load(std::memory_order_relaxed);
  }
  // For a library that is unloaded: forget what was found.
  void Release() {
    seen_loads_ = 0, found_ = nullptr;
    while (newest_ != nullptr) {
      const OpenMP* const seen = newest_;
      newest_ = seen->older;
      dlclose(seen->library);
      delete seen;
    }
  }

 private:
  // How many libraries the process has ever loaded.
  static int ReadLoads(dl_phdr_info* info, size_t, void* loads) {
    *static_cast<unsigned long long*>(loads) = info->dlpi_adds;
    return 1;
  }

  // The first library whose name is that of a runtime.
  static int ReadName(dl_phdr_info* info, size_t, void* path) {
    const char* slash = std::strrchr(info->dlpi_name, '/');
    const char* name = slash == nullptr ? info->dlpi_name : slash + 1;
    for (const char* runtime : {"libgomp", "libiomp5", "libomp"}) {
      if (std::strncmp(name, runtime, std::strlen(runtime)) != 0) continue;
      *static_cast<const char**>(path) = info->dlpi_name;
      return 1;
    }
    return 0;
  }

  const OpenMP* Look() {
    Dl_info global;
    const char* path = nullptr;
    void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    if (symbol != nullptr && dladdr(symbol, &global) != 0) {
      path = global.dli_fname;
    } else {
      dl_iterate_phdr(ReadName, &path);
    }
    void* library = path == nullptr ? nullptr : dlopen(path, RTLD_NOW | RTLD_NOLOAD);  // it stays loaded
    if (library == nullptr) return nullptr;
    OpenMP runtime{};
    const bool complete = Get(library, "GOMP_parallel", &runtime.parallel) &&
                          Get(library, "omp_in_parallel", &runtime.in_parallel) &&
                          Get(library, "omp_get_max_threads", &runtime.max_threads);
    const OpenMP* seen = newest_;
    while (complete && seen != nullptr && seen->parallel != runtime.parallel) seen = seen->older;
    if (!complete || seen != nullptr) {
      dlclose(library);  // it is held once
      return complete ? seen : nullptr;
    }
    runtime.path = path;
    runtime.library = library;
    runtime.older = newest_;
    return newest_ = new OpenMP(runtime);
  }

  template <typename Function>
  static bool Get(void* library, const char* name, Function* function) {
    void* symbol = dlsym(library, name);
    std::memcpy(function, &symbol, sizeof symbol);
    return symbol != nullptr;
  }

  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
  std::atomic<unsigned long long> seen_loads_{0};
  std::atomic<const OpenMP*> found_{nullptr};
  const OpenMP* newest_ = nullptr;
};

inline OpenMPFinder openmp_finder;

// Whether this process was a child of fork(), with no program of its own since, when it loaded the library. Its parent
// may have had a team, whose threads the runtime then takes to be here, and waits for.
inline const bool born_by_fork = [] {
  constexpr unsigned kForkedNoExec = 0x40;  // PF_FORKNOEXEC among the flags, field 9 of /proc/self/stat
  char text[512];
  std::FILE* file = std::fopen("/proc/self/stat", "r");
  if (file == nullptr) return false;
  const size_t size = std::fread(text, 1, sizeof text - 1, file);
  std::fclose(file);
  text[size] = '\0';
  const char* after_name = std::strrchr(text, ')');
  unsigned flags = 0;
  const bool read = after_name != nullptr && std::sscanf(after_name + 1, " %*c %*d %*d %*d %*d %*d %u", &flags) == 1;
  return read && (flags & kForkedNoExec) != 0;
}();

// A child of fork() has none of its parent's team. Where its own was begun anew nobody can tell but who says so: with
// forced a process that was born by fork, before it loaded the library, counts as one that has.
inline const OpenMP* OpenMPOfThisProcess(bool forced) {
  return forked || (born_by_fork && !forced) ? nullptr : openmp_finder.Find();
}

// For a call that is to run on OpenMP's team.
inline void CheckOpenMP() {
  if (forked)
    Raise("RuntimeError", "threading: expected a process with OpenMP's team for 'openmp', got a child of fork()");
  if (OpenMPOfThisProcess(true) == nullptr) {
    Raise("RuntimeError",
          "threading: expected a loaded OpenMP runtime for 'openmp' (libgomp, libiomp5 or libomp), got none");
  }
}

// The runtime that a call from this thread runs on, not from within a parallel region, which has its threads already.
// Unless it is forced to, it does not run on a team of one, which leaves no other threads waiting on the CPUs.
inline const OpenMP* Team(bool forced) {
  const OpenMP* runtime = OpenMPOfThisProcess(forced);
  if (runtime == nullptr || runtime->in_parallel()) return nullptr;
  return forced || runtime->max_threads() > 1 ? runtime : nullptr;
}

// Run body(context, 0) ... body(context, count - 1) on up to num_threads threads of a team, where there is one and no
// other call is on it: each thread that calls a runtime gets a team of its own, and two of them would share the CPUs.
inline bool RunOnTeam(void (*body)(const void*, int64_t), const void* context, int64_t count, int64_t num_threads,
                      bool forced) {
  static std::atomic_flag busy = ATOMIC_FLAG_INIT;
  const OpenMP* team = Team(forced);
  if (team == nullptr || busy.test_and_set(std::memory_order_acquire)) return false;
  struct Job {
    void (*body)(const void*, int64_t);
    const void* context;
    int64_t count, num_threads;
    std::atomic<int64_t> joined{0}, next{0};
    std::atomic<bool> failed{false};  // for want of memory, the one way in which a body fails

    void Work() {
      if (joined.fetch_add(1) >= num_threads) return;
      const DefaultFloatingPoint state;
      for (int64_t i; (i = next.fetch_add(1)) < count;) {
        try {
          body(context, i);
        } catch (const std::bad_alloc&) {
          failed = true;
        }
      }
    }
  } job{body, context, count, num_threads};
  // The whole team, whose size a runtime changes by ending threads and starting others.
  team->parallel([](void* self) { static_cast<Job*>(self)->Work(); }, &job, static_cast<unsigned>(team->max_threads()),
                 0);
  busy.clear(std::memory_order_release);
  if (job.failed) throw std::bad_alloc();
  return true;
}

}  // namespace pa
