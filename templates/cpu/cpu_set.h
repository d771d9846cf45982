// Sets of CPUs that threads are bound to.
#pragma once

#include <sched.h>

#include <atomic>
#include <cinttypes>
#include <cstddef>
#include <cstdint>
#include <new>

#include "shared/errors.h"

namespace pa {

// The CPUs that a thread of ours may run on. Each set that a process asks for is made once, has a number from 1 on, and
// stays.
class CpuSet {
 public:
  CpuSet(const int32_t* cpus, int64_t count)
      : bytes_(CPU_ALLOC_SIZE(cpus[count - 1] + 1)), mask_(CPU_ALLOC(cpus[count - 1] + 1)) {
    if (mask_ == nullptr) throw std::bad_alloc();
    CPU_ZERO_S(bytes_, mask_);
    for (int64_t i = 0; i < count; ++i) CPU_SET_S(cpus[i], bytes_, mask_);
  }
  CpuSet(const CpuSet&) = delete;
  CpuSet& operator=(const CpuSet&) = delete;

  // The number of a set of CPUs, ascending.
  static int64_t NumberOf(const int32_t* cpus, int64_t count) {
    auto* made = new CpuSet(cpus, count);
    made->next_ = newest_.load();
    do {
      for (const CpuSet* set = made->next_; set != nullptr; set = set->next_) {
        if (set->bytes_ != made->bytes_ || !CPU_EQUAL_S(set->bytes_, set->mask_, made->mask_)) continue;
        Delete(made);
        return set->number_;
      }
      made->number_ = made->next_ == nullptr ? 1 : made->next_->number_ + 1;
    } while (!newest_.compare_exchange_weak(made->next_, made));
    return made->number_;
  }

  // The set of a number; nullptr of 0, which binds no thread.
  static const CpuSet* Numbered(int64_t number) {
    const CpuSet* set = newest_.load();
    if (number == 0) return nullptr;
    while (set != nullptr && set->number_ != number) set = set->next_;
    if (set == nullptr) Raise("ValueError", "cpus: expected a number that cpu_set gave, got %" PRId64, number);
    return set;
  }

  // For a library that is unloaded: forget all sets.
  static void Release() {
    while (CpuSet* const set = newest_.load()) {
      newest_ = set->next_;
      Delete(set);
    }
  }

  // Bind the calling thread. It stays where it is if the system has taken all of these CPUs away since.
  void Bind() const { sched_setaffinity(0, bytes_, mask_); }

 private:
  static void Delete(CpuSet* set) {
    CPU_FREE(set->mask_);
    delete set;
  }

  inline static std::atomic<CpuSet*> newest_{nullptr};

  size_t bytes_;
  cpu_set_t* mask_;
  CpuSet* next_ = nullptr;
  int64_t number_ = 0;
};

}  // namespace pa
