// Tensors that functions of scores close over: a library has their bytes, and each device that is asked gets a copy.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>

#include "cuda/device.h"
#include "cuda/driver.h"

namespace pa {

inline CUdeviceptr CopyToDevice(const void* data, int64_t num_bytes) {
  const RelaxedCapture relaxed;
  CUdeviceptr memory;
  CUstream stream;
  PA_DRIVER(cuMemAlloc_v2, &memory, num_bytes);
  PA_DRIVER(cuStreamCreate, &stream, CU_STREAM_NON_BLOCKING);  // one that no other stream waits for
  PA_DRIVER(cuMemcpyHtoDAsync_v2, memory, data, num_bytes, stream);
  PA_DRIVER(cuStreamSynchronize, stream);
  PA_DRIVER(cuStreamDestroy_v2, stream);
  return memory;
}

// Where a table is on the current device, whose id this is. `data` is this library's, and one for each call of this.
template <const char* data>
CUdeviceptr TableOn(int id, int64_t num_bytes) {
  static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;
  static std::atomic<CUdeviceptr> made[kMaxDevices];
  if (const CUdeviceptr table = made[id].load(std::memory_order_acquire)) return table;
  struct Lock {
    Lock() { pthread_mutex_lock(&making); }
    ~Lock() { pthread_mutex_unlock(&making); }
  } const lock;
  if (made[id].load(std::memory_order_acquire) == 0) {
    made[id].store(CopyToDevice(data, num_bytes), std::memory_order_release);
  }
  return made[id].load(std::memory_order_acquire);
}

}  // namespace pa
