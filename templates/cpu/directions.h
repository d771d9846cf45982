// What a caller directs of one call beside its arguments: threads of its own, and memory.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

#include "cpu/floating_point.h"
#include "cpu/scratch.h"

namespace pa {

// Run task(work, 0) ... task(work, count - 1), each once, on up to num_threads threads, and return when all have.
using CallersParallelFor = void (*)(void* context, int64_t count, int64_t num_threads,
                                    void (*task)(void* work, int64_t index), void* work);

struct Directions {
  CallersParallelFor parallel_for;  // nullptr: the library's own way
  void* context;
  size_t kernel_bytes;  // of scratch that a thread's kernels need
  bool is_given;        // whether the stack call_workspace is in the caller's memory, and kernels' scratch is to be
  bool measures;        // whether the call ends before its kernels: call_workspace.most() says what it needs
};

// Those of the call that this thread makes; nullptr where there are none.
inline thread_local const Directions* directions = nullptr;

// Run body(context, i) on the caller's threads.
inline void RunOnCallers(const Directions& given, void (*body)(const void*, int64_t), const void* context,
                         int64_t count, int64_t num_threads) {
  struct Work {
    void (*body)(const void*, int64_t);
    const void* context;
    std::atomic<bool> failed{false};  // for want of memory, the one way in which a body fails
  } work{body, context};
  given.parallel_for(
      given.context, count, num_threads,
      [](void* self, int64_t index) {
        Work& work = *static_cast<Work*>(self);
        const DefaultFloatingPoint state;
        try {
          work.body(work.context, index);
        } catch (const std::bad_alloc&) {
          work.failed = true;
        }
      },
      &work);
  if (work.failed) throw std::bad_alloc();
}

// The kernels' scratch of a call that has been given its memory: so much for each of its threads.
class KernelSlots {
 public:
  KernelSlots(int64_t count, size_t bytes)
      : count_(count), bytes_(bytes), taken_(call_workspace, count), memory_(call_workspace, count * bytes) {
    for (int64_t i = 0; i < count; ++i) new (&taken_.data()[i]) std::atomic<bool>(false);
  }
  // What it takes of the stack.
  static void Measure(int64_t count, size_t bytes) {
    call_workspace.CountOnce(ScratchStack::Needed(count * sizeof(std::atomic<bool>)) + count * bytes);
  }

  // While it lives the kernels of this thread have a slot.
  class Taken {
   public:
    explicit Taken(const KernelSlots& slots) : slots_(slots) {
      while (slots.taken_.data()[slot_].exchange(true)) slot_ = (slot_ + 1) % slots.count_;
      before_ = kernel_scratch.Use(slots.memory_.data() + slot_ * slots.bytes_, slots.bytes_);
    }
    Taken(const Taken&) = delete;
    Taken& operator=(const Taken&) = delete;
    ~Taken() {
      kernel_scratch.UseAgain(before_);
      slots_.taken_.data()[slot_].store(false);
    }

   private:
    const KernelSlots& slots_;
    int64_t slot_ = 0;
    ScratchStack::Given before_;
  };

 private:
  const int64_t count_;
  const size_t bytes_;
  const Borrowed<std::atomic<bool>> taken_;
  const Borrowed<char> memory_;
};

}  // namespace pa
