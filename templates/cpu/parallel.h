// How a call is spread over threads.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cstdint>

#include "cpu/cpu_set.h"
#include "cpu/directions.h"
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

// Run body(0) ... body(count - 1), each once: on this thread alone, on the caller's threads, on OpenMP's team, or on
// the pool's threads and this.
template <typename Body>
void Spread(int64_t count, const Threads& threads, int64_t num_threads, const Body& body) {
  if (num_threads > 1) {
    auto call = [](const void* context, int64_t i) { (*static_cast<const Body*>(context))(i); };
    if (directions != nullptr && directions->parallel_for != nullptr) {
      return RunOnCallers(*directions, call, &body, count, num_threads);
    }
    const bool forced = threads.threading == kOpenmp;
    if (threads.threading != kOwn && RunOnTeam(call, &body, count, num_threads, forced)) return;
    return pool.Run(call, &body, count, num_threads, threads.cpus);
  }
  for (int64_t i = 0; i < count; ++i) body(i);
}

// The same with the memory that the caller directs; not at all where it is to be measured.
template <typename Body>
void ParallelFor(int64_t count, const Threads& threads, const Body& body) {
  const int64_t num_threads = std::min({threads.limit, count, int64_t{1024}});
  const Directions* const given = directions;
  if (given == nullptr || num_threads < 1 || !(given->is_given || given->measures)) {
    return Spread(count, threads, num_threads, body);
  }
  if (given->measures) return KernelSlots::Measure(num_threads, given->kernel_bytes);
  const KernelSlots slots(num_threads, given->kernel_bytes);
  Spread(count, threads, num_threads, [&](int64_t i) {
    const KernelSlots::Taken slot(slots);
    body(i);
  });
}

}  // namespace pa
