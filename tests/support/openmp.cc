// The least of an OpenMP runtime, whose answers a test sets through variables: which functions it has that the library
// looks for, and what it says of a team.

#include <pthread.h>

#include <vector>

extern "C" {

int regions = 0;        // that have run
int threads = 2;        // of a team
int is_in_parallel = 0;

void GOMP_parallel(void (*function)(void*), void* argument, unsigned num_threads, unsigned) {
  struct Work {
    void (*function)(void*);
    void* argument;
  } work{function, argument};
  __atomic_fetch_add(&regions, 1, __ATOMIC_RELAXED);
  std::vector<pthread_t> team(num_threads - 1);
  auto run = [](void* given) -> void* {
    const Work* work = static_cast<Work*>(given);
    work->function(work->argument);
    return nullptr;
  };
  for (pthread_t& member : team) pthread_create(&member, nullptr, run, &work);
  run(&work);
  for (pthread_t member : team) pthread_join(member, nullptr);
}

int omp_in_parallel() { return is_in_parallel; }

#ifndef INCOMPLETE
int omp_get_max_threads() { return threads; }
#endif
}
