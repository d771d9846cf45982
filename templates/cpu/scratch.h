// Memory that threads keep from call to call, for the host and, by TVM's workspace hooks, for the kernels.
#pragma once

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
// call nothing is allocated.
class ScratchStack {
 public:
  void* Push(size_t num_bytes) {
    if (depth_ == size_) Grow();
    Buffer& buffer = buffers_[depth_];
    num_bytes = std::max<size_t>(num_bytes, 1);  // to a kernel that needs nothing nullptr would be an error
    if (buffer.capacity < num_bytes) {
      std::free(buffer.data);
      buffer.capacity = (num_bytes + 63) / 64 * 64;
      buffer.data = std::aligned_alloc(64, buffer.capacity);
      if (buffer.data == nullptr) {
        buffer.capacity = 0;
        throw std::bad_alloc();
      }
    }
    ++depth_;
    return buffer.data;
  }
  void Pop() { --depth_; }
  void Release() {
    for (size_t i = 0; i < size_; ++i) std::free(buffers_[i].data);
    std::free(buffers_);
    *this = ScratchStack();
  }

 private:
  struct Buffer {
    void* data;
    size_t capacity;
  };

  void Grow();

  Buffer* buffers_ = nullptr;
  size_t size_ = 0, depth_ = 0;
};

// Without constructor or destructor, so that each access is one to memory and no look whether they have run.
inline thread_local ScratchStack kernel_scratch;  // of the kernels that run on this thread
inline thread_local ScratchStack call_workspace;  // of the decode call made on this thread

// Gives this thread's memory back when it ends.
struct ScratchRelease {
  ~ScratchRelease() {
    kernel_scratch.Release();
    call_workspace.Release();
  }
};

inline void ScratchStack::Grow() {
  thread_local const ScratchRelease at_exit;
  auto* grown = static_cast<Buffer*>(std::realloc(buffers_, (size_ + 1) * sizeof(Buffer)));
  if (grown == nullptr) throw std::bad_alloc();
  buffers_ = grown;
  buffers_[size_++] = {nullptr, 0};
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
