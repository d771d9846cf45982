// A call on a GPU: its stream, its memory, and launches.
#pragma once

#include <tvm/ffi/extra/c_env_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "cuda/device.h"
#include "cuda/driver.h"
#include "shared/arrays.h"
#include "shared/block_table.h"
#include "shared/errors.h"
#include "shared/overlap.h"

namespace pa {

inline CUdeviceptr Address(const Array& array) { return reinterpret_cast<CUdeviceptr>(array.tensor.data); }

// The stream that a call is made on, in whose order its memory is taken and given back.
struct Call {
  const Device& device;
  const Current current;
  const CUstream stream;
  const CUdeviceptr report;  // this call's

  Call(Device& on, int id)
      : device(on),
        current(on.context),
        stream(static_cast<CUstream>(TVMFFIEnvGetStream(kDLCUDA, id))),
        report(on.reports_seen + on.calls++ % kNumReports * sizeof(Report)) {}

  // values: addresses of the kernel's arguments.
  template <typename Spec>
  void Launch(int kernel, int64_t blocks, void** values) const {
    const KernelInfo& info = Spec::kKernels[kernel];
    PA_DRIVER(cuLaunchKernel, device.kernels[kernel], static_cast<unsigned>(blocks), 1, 1, info.threads, 1, 1,
              info.shared_bytes, stream, values, nullptr);
  }
};

// Ranges that a sequence may have, at most, whatever its length is: kernels/plan.py cuts.
template <typename Spec>
int64_t MostRanges(const BlockTable& table) {
  const int64_t tokens = BlockTable::Tokens(table.MostBlocks(), Spec::kBlockSize);
  return std::min((tokens + Spec::kRangeTokens - 1) / Spec::kRangeTokens, Spec::kMostRanges + 1);
}

// Device memory from now until what has been launched by the end of the scope is done.
class Workspace {
 public:
  Workspace(const Call& call, int64_t num_bytes) : call_(call) {
    PA_DRIVER(cuMemAllocFromPoolAsync, &memory_, num_bytes, call.device.pool, call.stream);
    next_ = memory_;
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { driver().cuMemFreeAsync(memory_, call_.stream); }

  static constexpr int64_t Aligned(int64_t num_bytes) { return (num_bytes + 255) / 256 * 256; }
  // The next so many bytes of it.
  CUdeviceptr Take(int64_t num_bytes) {
    const CUdeviceptr taken = next_;
    next_ += Aligned(num_bytes);
    return taken;
  }

 private:
  const Call& call_;
  CUdeviceptr memory_ = 0, next_ = 0;
};

// An array of the device's, copied for this CPU to read once Wait has returned.
class HostCopy {
 public:
  HostCopy(const Call& call, const Array& from) : array(from) {
    const Span span(from);
    if (span.low == span.high) return;
    memory_ = std::malloc(span.high - span.low);
    if (memory_ == nullptr) throw std::bad_alloc();
    array.tensor.data = static_cast<char*>(memory_) + (reinterpret_cast<intptr_t>(from.tensor.data) - span.low);
    const CUresult result = driver().cuMemcpyDtoHAsync_v2(memory_, span.low, span.high - span.low, call.stream);
    if (result != CUDA_SUCCESS) std::free(memory_);
    Expect(result, "cuMemcpyDtoHAsync");
  }
  HostCopy(const HostCopy&) = delete;
  HostCopy& operator=(const HostCopy&) = delete;
  ~HostCopy() { std::free(memory_); }

  Array array;

 private:
  void* memory_ = nullptr;
};

// For a call that waits for the stream. choices: the ways to check that do not.
inline void CheckNotCapturing(const Call& call, const char* choices) {
  int status = 0;
  PA_DRIVER(cuStreamIsCapturing, call.stream, &status);
  if (status != 0) {
    Raise("ValueError", "check: expected %s while the stream is captured into a graph, got 'host'", choices);
  }
}

}  // namespace pa
