// Threads of our own.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <new>

#include "cpu/cpu_set.h"
#include "cpu/floating_point.h"
#include "cpu/scratch.h"

namespace pa {

// Threads that help a decode call. The caller works as well and returns when every index is done, not when every helper
// has come: a helper that the system starts late finds nothing left, and holds nobody up.
class ThreadPool {
 public:
  // Run body(context, 0) ... body(context, count - 1), each once, on up to num_threads threads, of which this is one.
  // The others are bound to cpus, unless it is nullptr: a thread starts with the CPUs of whoever starts it, perhaps but
  // one.
  void Run(void (*body)(const void*, int64_t), const void* context, int64_t count, int64_t num_threads,
           const CpuSet* cpus) {
    pthread_mutex_lock(&mutex_);
    Job* job = NewJob();
    if (job == nullptr) {
      pthread_mutex_unlock(&mutex_);
      throw std::bad_alloc();
    }
    job->body = body, job->context = context, job->count = count, job->cpus = cpus;
    job->helpers = num_threads - 1, job->users = 1;
    job->next = 0, job->done = 0;
    job->failed = false;
    while (num_workers_ < job->helpers && !stopping_ && AddWorker()) ++num_workers_;
    jobs_.Append(job);
    pthread_mutex_unlock(&mutex_);
    for (int64_t i = 1; i < num_threads; ++i) pthread_cond_signal(&wake_);
    Work(*job);
    pthread_mutex_lock(&mutex_);
    jobs_.Remove(job);
    while (job->done != count) pthread_cond_wait(&finished_, &mutex_);
    const bool failed = job->failed;
    Release(job);
    pthread_mutex_unlock(&mutex_);
    if (failed) throw std::bad_alloc();
  }

  // End the workers, for a library that is unloaded: they finish what they have begun. Calls then run without.
  void Stop() {
    pthread_mutex_lock(&mutex_);
    stopping_ = true;
    pthread_cond_broadcast(&wake_);
    pthread_mutex_unlock(&mutex_);
    while (newest_ != nullptr) {
      Worker* const ended = newest_;
      newest_ = ended->older;
      pthread_join(ended->thread, nullptr);
      delete ended;
    }
    pthread_mutex_lock(&mutex_);
    while (unused_.first != nullptr) {
      Job* const job = unused_.first;
      unused_.Remove(job);
      delete job;
    }
    pthread_mutex_unlock(&mutex_);
  }

 private:
  struct Worker {
    pthread_t thread;
    Worker* older;
  };

  struct Job {
    void (*body)(const void*, int64_t);
    const void* context;
    int64_t count;
    const CpuSet* cpus;
    int64_t helpers;  // that may still join
    int64_t users;    // threads that hold it
    std::atomic<int64_t> next, done;
    std::atomic<bool> failed;  // for want of memory, the one way in which a body fails
    Job* link;
  };

  // A queue through Job::link.
  struct Queue {
    Job* first = nullptr;

    void Append(Job* job) {
      Job** end = &first;
      while (*end != nullptr) end = &(*end)->link;
      *end = job;
      job->link = nullptr;
    }
    void Remove(Job* job) {
      Job** at = &first;
      while (*at != nullptr && *at != job) at = &(*at)->link;
      if (*at != nullptr) *at = job->link;
    }
  };

  // A job that was used before, or else a new one.
  Job* NewJob() {
    Job* job = unused_.first;
    if (job == nullptr) return new (std::nothrow) Job;
    unused_.Remove(job);
    return job;
  }

  void Release(Job* job) {
    if (--job->users == 0) unused_.Append(job);
  }

  void Work(Job& job) {
    for (int64_t i; (i = job.next.fetch_add(1)) < job.count;) {
      try {
        job.body(job.context, i);
      } catch (const std::bad_alloc&) {
        job.failed = true;
      }
      if (job.done.fetch_add(1) + 1 == job.count) {
        pthread_mutex_lock(&mutex_);
        pthread_cond_broadcast(&finished_);
        pthread_mutex_unlock(&mutex_);
      }
    }
  }

  // Start a worker; where the system refuses, the threads there are do the work.
  bool AddWorker() {
    auto* const worker = new (std::nothrow) Worker{{}, newest_};
    if (worker == nullptr) return false;
    auto serve = [](void* self) -> void* {
      static_cast<ThreadPool*>(self)->Serve();
      return nullptr;
    };
    if (pthread_create(&worker->thread, nullptr, serve, this) != 0) {
      delete worker;
      return false;
    }
    newest_ = worker;
    return true;
  }

  void Serve() {
    const DefaultFloatingPoint state;
    const CpuSet* bound = nullptr;
    pthread_mutex_lock(&mutex_);
    for (;;) {
      while (jobs_.first == nullptr && !stopping_) pthread_cond_wait(&wake_, &mutex_);
      if (jobs_.first == nullptr) break;
      Job* job = jobs_.first;
      ++job->users;
      if (--job->helpers == 0) jobs_.Remove(job);
      pthread_mutex_unlock(&mutex_);
      if (job->cpus != nullptr && job->cpus != bound) (bound = job->cpus)->Bind();
      Work(*job);
      pthread_mutex_lock(&mutex_);
      Release(job);
    }
    pthread_mutex_unlock(&mutex_);
  }

  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t wake_ = PTHREAD_COND_INITIALIZER, finished_ = PTHREAD_COND_INITIALIZER;
  Queue jobs_;    // those that want helpers
  Queue unused_;  // kept, so that a call allocates nothing
  Worker* newest_ = nullptr;
  int64_t num_workers_ = 0;
  bool stopping_ = false;
};

// Whether this process is a child of fork() since it loaded the library.
inline bool forked = false;

// Never destroyed, as its threads are not, but where a library is unloaded: that calls Stop, and any other is linked so
// that it stays loaded. A child of fork() has none of the threads, and starts a pool of its own.
inline ThreadPool pool;

inline const bool is_forked_right = [] {
  pthread_atfork(nullptr, nullptr, [] {
    forked = true;
    new (&pool) ThreadPool;
    scratch_owners.KeepThisThread();
  });
  return true;
}();

}  // namespace pa
