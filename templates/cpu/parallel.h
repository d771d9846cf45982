// How a call is spread over threads.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cstdint>

#include "cpu/cpu_set.h"
#include "cpu/interface.h"
#include "cpu/openmp.h"
#include "cpu/pool.h"
#include "shared/errors.h"
#include "shared/ffi.h"

namespace pa {

// How the work items of a call are spread.
struct Threads {
  int64_t limit;  // threads at most, the caller's own among them
  Threading threading;
  const CpuSet* cpus;  // of the pool's threads; nullptr: those of whoever starts them
};

// How a call is to be spread.
template <typename Parameters>
Threads CheckThreads(const Inputs& in) {
  const int64_t limit = in.Int(Parameters::kNumThreads), threading = in.Int(Parameters::kThreading),
                cpus = in.Int(Parameters::kCpus);
  if (limit < 1) Raise("ValueError", "num_threads: expected at least 1, got %" PRId64, limit);
  if (threading < 0 || threading >= kNumThreading) {
    Raise("ValueError", "threading: expected 0 to %d, got %" PRId64, kNumThreading - 1, threading);
  }
  if (threading == kOpenmp) CheckOpenMP();
  return {limit, static_cast<Threading>(threading), CpuSet::Numbered(cpus)};
}

// Run body(0) ... body(count - 1), each once: on this thread alone, on OpenMP's team, or on the pool's threads and
// this.
template <typename Body>
void ParallelFor(int64_t count, const Threads& threads, const Body& body) {
  const int64_t num_threads = std::min({threads.limit, count, int64_t{1024}});
  if (num_threads > 1) {
    auto call = [](const void* context, int64_t i) { (*static_cast<const Body*>(context))(i); };
    const bool forced = threads.threading == kOpenmp;
    if (threads.threading != kOwn && RunOnTeam(call, &body, count, num_threads, forced)) return;
    return pool->Run(call, &body, count, num_threads, threads.cpus);
  }
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace pa
