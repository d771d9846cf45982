// Memory that threads keep from call to call, for the host and, by TVM's workspace hooks, for the kernels.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

// TVM's kernels call their workspace through these two pointers. The kernels' object file defines them where it needs
// them.
extern "C" {
extern void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int)__attribute__((weak));
extern int (*__TVMBackendFreeWorkspace)(int, int, void*) __attribute__((weak));
}

namespace pa {

// Buffers that are taken and given back last in, first out. A thread keeps what it has once been given: after the first
// call nothing is allocated. Or they lie in memory that a caller has given for a while.
class ScratchStack {
 public:
  void* Push(size_t num_bytes) {
    num_bytes = Whole(num_bytes);
    if (given_.memory != nullptr) return PushGiven(num_bytes);
    if (depth_ == size_) Grow();
    Buffer& buffer = buffers_[depth_];
    if (buffer.capacity < num_bytes) {
      std::free(buffer.data);
      buffer.capacity = num_bytes;
      buffer.data = std::aligned_alloc(64, buffer.capacity);
      if (buffer.data == nullptr) {
        buffer.capacity = 0;
        throw std::bad_alloc();
      }
    }
    buffer.size = num_bytes;
    ++depth_;
    Count(num_bytes);
    return buffer.data;
  }
  void Pop() {
    if (given_.memory != nullptr) return PopGiven();
    given_.held -= buffers_[--depth_].size + kHead;
  }
  void Release() {
    for (size_t i = 0; i < size_; ++i) std::free(buffers_[i].data);
    std::free(buffers_);
    *this = ScratchStack();
  }

  // Memory of a caller: its bytes, where the next buffer begins in it, and the last; and the bytes of buffers, what
  // lies before each among them. Without it buffers are in memory of the stack's own, and counted likewise.
  struct Given {
    char* memory;
    size_t end, top, last;
    size_t held, most;
  };

  // From here on buffers lie in these bytes, which begin at a multiple of 64; with nullptr in memory of the stack's
  // own. Those that it has stay where they are: what was used before, which this returns, is to be used again for them.
  Given Use(char* memory, size_t num_bytes) { return UseAgain({memory, num_bytes, 0, 0, 0, 0}); }
  Given UseAgain(const Given& given) {
    const Given before = given_;
    given_ = given;
    return before;
  }
  // The bytes of such memory that were needed since then, be it used or not.
  size_t most() const { return given_.most; }
  // As if so many bytes had been taken and given back.
  void CountOnce(size_t num_bytes) {
    Count(Whole(num_bytes));
    given_.held -= Whole(num_bytes) + kHead;
  }
  // What buffers of so many bytes need.
  static constexpr size_t Needed(size_t num_bytes) { return Whole(num_bytes) + kHead; }

 private:
  struct Buffer {
    void* data;
    size_t capacity, size;
  };

  static constexpr size_t kHead = 64;  // bytes before a buffer in memory that was given: where the last one begins

  // To a kernel that needs nothing nullptr would be an error.
  static constexpr size_t Whole(size_t num_bytes) { return (std::max<size_t>(num_bytes, 1) + 63) / 64 * 64; }

  void Count(size_t num_bytes) {
    given_.held += num_bytes + kHead;
    given_.most = std::max(given_.most, given_.held);
  }
  void* PushGiven(size_t num_bytes) {
    if (given_.end - given_.top < num_bytes + kHead) throw std::bad_alloc();
    new (given_.memory + given_.top) size_t{given_.last};
    given_.last = given_.top, given_.top += num_bytes + kHead;
    Count(num_bytes);
    return given_.memory + given_.last + kHead;
  }
  void PopGiven() {
    given_.held -= given_.top - given_.last;
    given_.top = given_.last;
    given_.last = *reinterpret_cast<const size_t*>(given_.memory + given_.top);
  }
  void Grow();

  Buffer* buffers_ = nullptr;
  size_t size_ = 0, depth_ = 0;
  Given given_{};
};

// Without constructor or destructor, so that each access is one to memory and no look whether they have run.
inline thread_local ScratchStack kernel_scratch;  // of the kernels that run on this thread
inline thread_local ScratchStack call_workspace;  // of the decode call made on this thread

// The threads that have memory of their own. A thread gives it back when it ends, and all of them when the library is
// unloaded.
class ScratchOwners {
 public:
  // This thread has memory from now on.
  void Add() {
    if (this_thread.is_known) return;
    pthread_mutex_lock(&mutex_);
    if (!has_key_) has_key_ = pthread_key_create(&key_, [](void*) { Forget(); }) == 0;
    if (has_key_ && pthread_setspecific(key_, this) == 0) {
      this_thread = {&kernel_scratch, &call_workspace, newest_, nullptr, true};
      if (newest_ != nullptr) newest_->newer = &this_thread;
      newest_ = &this_thread;
    }
    pthread_mutex_unlock(&mutex_);
  }
  // When no call runs, and none will.
  void ReleaseAll() {
    pthread_mutex_lock(&mutex_);
    if (has_key_) pthread_key_delete(key_);
    has_key_ = false;
    while (newest_ != nullptr) Release(*newest_);
    pthread_mutex_unlock(&mutex_);
  }
  // In a child of fork(), which has one of the threads.
  void KeepThisThread() {
    pthread_mutex_init(&mutex_, nullptr);
    newest_ = this_thread.is_known ? &this_thread : nullptr;
    this_thread.older = this_thread.newer = nullptr;
  }

 private:
  struct Owner {
    ScratchStack *kernels, *call;
    Owner *older, *newer;
    bool is_known;
  };
  inline static thread_local Owner this_thread{};

  static void Forget();
  void Release(Owner& owner) {
    owner.kernels->Release();
    owner.call->Release();
    if (owner.older != nullptr) owner.older->newer = owner.newer;
    (owner.newer != nullptr ? owner.newer->older : newest_) = owner.older;
    owner = {};
  }

  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_key_t key_ = 0;
  bool has_key_ = false;
  Owner* newest_ = nullptr;
};

inline ScratchOwners scratch_owners;

inline void ScratchOwners::Forget() {
  pthread_mutex_lock(&scratch_owners.mutex_);
  if (this_thread.is_known) scratch_owners.Release(this_thread);
  pthread_mutex_unlock(&scratch_owners.mutex_);
}

inline void ScratchStack::Grow() {
  scratch_owners.Add();
  auto* grown = static_cast<Buffer*>(std::realloc(buffers_, (size_ + 1) * sizeof(Buffer)));
  if (grown == nullptr) throw std::bad_alloc();
  buffers_ = grown;
  buffers_[size_++] = {nullptr, 0, 0};
}

// Kernels ask for their scratch through TVM's workspace hooks. One that is given none returns an error.
inline void* AllocWorkspace(int, int, uint64_t num_bytes, int, int) noexcept {
  try {
    return kernel_scratch.Push(num_bytes);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

inline int FreeWorkspace(int, int, void*) noexcept {
  kernel_scratch.Pop();
  return 0;
}

// A number of floats rounded up to whole 64-byte lines: kernels take their intermediates to be aligned to that.
constexpr int64_t Aligned(int64_t num_floats) { return (num_floats + 15) / 16 * 16; }

// Memory for a number of elements, borrowed from a stack until the end of the scope and not initialised.
template <typename Element>
class Borrowed {
 public:
  Borrowed(ScratchStack& stack, int64_t count)
      : stack_(stack), data_(static_cast<Element*>(stack.Push(count * sizeof(Element)))) {}
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  ~Borrowed() { stack_.Pop(); }
  Element* data() const { return data_; }

 private:
  ScratchStack& stack_;
  Element* data_;
};

inline const bool workspace_installed = [] {
  if (&__TVMBackendAllocWorkspace != nullptr) __TVMBackendAllocWorkspace = AllocWorkspace;
  if (&__TVMBackendFreeWorkspace != nullptr) __TVMBackendFreeWorkspace = FreeWorkspace;
  return true;
}();

}  // namespace pa
