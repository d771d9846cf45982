// GPUs: what a library makes of each and keeps. A Spec has
//   kKernels, kNumKernels           the KernelInfo of each of its kernels,
//   kArch, kArchName, kExactArch    what machine code is for: compute capability times ten, "sm_90", and whether that
//                                   alone,
//   kWaves, kHeadTiles, kCudaDecode where sequences are cut into ranges (else kWaves is 0), thread blocks of a launch
//                                   by how many a GPU runs at once; those of one worker; and the kernel.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cstdint>
#include <limits>

#include "cuda/driver.h"
#include "cuda/interface.h"
#include "shared/errors.h"
#include "shared/indices.h"

// The kernels: machine code and PTX, as the driver takes them.
extern "C" const unsigned char pa_kernels_image[] __attribute__((visibility("hidden")));

namespace pa {

// A kernel of a library, and how it is launched.
struct KernelInfo {
  const char* name;
  int threads, shared_bytes;  // of a thread block
};

constexpr int kMaxKernels = 16;

constexpr int kNumReports = 16;

// What a call needs of a device, made at the first call on it and kept: the driver has an end of its own.
struct Device {
  std::atomic<bool> made{false};
  CUdevice device;
  CUcontext context;
  CUfunction kernels[kMaxKernels];
  CUmemoryPool pool;         // keeps what is given back: after the first calls nothing is allocated
  CUdeviceptr zero;          // the status of calls that no kernel checks
  Report* reports;           // calls take them in turn
  CUdeviceptr reports_seen;  // the same by the device's address
  int64_t extra_workers;     // of decode and attend, more than sequences, where these are cut
  std::atomic<uint32_t> calls{0};
};

// A context is current while this lives.
class Current {
 public:
  explicit Current(CUcontext context) { PA_DRIVER(cuCtxPushCurrent_v2, context); }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  ~Current() {
    CUcontext popped;
    driver().cuCtxPopCurrent_v2(&popped);
  }
};

// While this lives the thread may allocate and load, even where its stream is captured into a graph.
class RelaxedCapture {
 public:
  RelaxedCapture() { PA_DRIVER(cuThreadExchangeStreamCaptureMode, &mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;
  ~RelaxedCapture() { driver().cuThreadExchangeStreamCaptureMode(&mode_); }

 private:
  int mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

// Refuse a GPU that machine code for kArch, and the PTX beside it, unless kExactArch, are not for.
template <typename Spec>
void CheckCapability(CUdevice device, int id) {
  int major = 0, minor = 0;
  PA_DRIVER(cuDeviceGetAttribute, &major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device);
  PA_DRIVER(cuDeviceGetAttribute, &minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device);
  const int found = 10 * major + minor;
  if (Spec::kExactArch ? found != Spec::kArch : found < Spec::kArch) {
    Raise("RuntimeError", "target: this module is built for %s%s, and CUDA device %d is sm_%d", Spec::kArchName,
          Spec::kExactArch ? "" : " and later", id, found);
  }
}

inline CUlibrary LoadedImage() {
  static const CUlibrary library = [] {
    CUlibrary loaded;
    PA_DRIVER(cuLibraryLoadData, &loaded, pa_kernels_image, nullptr, nullptr, 0, nullptr, nullptr, 0);
    return loaded;
  }();
  return library;
}

// Get the kernels ready.
template <typename Spec>
void LoadKernels(Device* device) {
  static_assert(Spec::kNumKernels <= kMaxKernels);
  for (int i = 0; i < Spec::kNumKernels; ++i) {
    const KernelInfo& info = Spec::kKernels[i];
    CUkernel kernel;
    CUfunction& function = device->kernels[i];
    PA_DRIVER(cuLibraryGetKernel, &kernel, LoadedImage(), info.name);
    PA_DRIVER(cuKernelGetFunction, &function, kernel);  // loads it: now, and not when it is first launched
    PA_DRIVER(cuFuncSetAttribute, function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, info.shared_bytes);
  }
}

// Workers of decode more than sequences, so that its thread blocks fill the GPU about kWaves times.
template <typename Spec>
int64_t ExtraWorkers(const Device& device) {
  const KernelInfo& info = Spec::kKernels[Spec::kCudaDecode];
  int sms = 0, blocks = 0;  // blocks: that an SM runs at once
  PA_DRIVER(cuDeviceGetAttribute, &sms, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device.device);
  PA_DRIVER(cuOccupancyMaxActiveBlocksPerMultiprocessor, &blocks, device.kernels[Spec::kCudaDecode], info.threads,
            info.shared_bytes);
  return std::max<int64_t>(1, Spec::kWaves * sms * blocks / Spec::kHeadTiles);
}

inline void MakePool(Device* device) {
  CUmemPoolProps props{};
  props.allocType = CU_MEM_ALLOCATION_TYPE_PINNED;
  props.location = {CU_MEM_LOCATION_TYPE_DEVICE, device->device};
  uint64_t keep = std::numeric_limits<uint64_t>::max();
  PA_DRIVER(cuMemPoolCreate, &device->pool, &props);
  PA_DRIVER(cuMemPoolSetAttribute, device->pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, &keep);
}

inline void MakeStatus(Device* device) {
  CUstream stream;
  PA_DRIVER(cuMemAlloc_v2, &device->zero, sizeof(int32_t));
  PA_DRIVER(cuStreamCreate, &stream, CU_STREAM_NON_BLOCKING);  // one that no other stream waits for
  PA_DRIVER(cuMemsetD32Async, device->zero, 0, 1, stream);
  PA_DRIVER(cuStreamSynchronize, stream);
  PA_DRIVER(cuStreamDestroy_v2, stream);
  void* reports;
  PA_DRIVER(cuMemHostAlloc, &reports, kNumReports * sizeof(Report),
            CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP);
  device->reports = static_cast<Report*>(reports);
  std::fill_n(device->reports, kNumReports, Report{});
  PA_DRIVER(cuMemHostGetDevicePointer_v2, &device->reports_seen, reports, 0);
}

template <typename Spec>
void MakeDevice(Device* device, int id) {
  PA_DRIVER(cuInit, 0);
  PA_DRIVER(cuDeviceGet, &device->device, id);
  CheckCapability<Spec>(device->device, id);
  PA_DRIVER(cuDevicePrimaryCtxRetain, &device->context, device->device);
  const Current current(device->context);
  const RelaxedCapture relaxed;
  LoadKernels<Spec>(device);
  if constexpr (Spec::kWaves > 0) device->extra_workers = ExtraWorkers<Spec>(*device);
  MakePool(device);
  MakeStatus(device);
}

constexpr int kMaxDevices = 64;
inline Device devices[kMaxDevices];  // by their ids

template <typename Spec>
Device& DeviceOf(int id) {
  static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;
  if (id < 0 || id >= kMaxDevices) Raise("ValueError", "device: expected an id in [0, %d), got %d", kMaxDevices, id);
  Device& device = devices[id];
  if (device.made.load(std::memory_order_acquire)) return device;
  struct Lock {
    Lock() { pthread_mutex_lock(&making); }
    ~Lock() { pthread_mutex_unlock(&making); }
  } const lock;
  if (!device.made.load(std::memory_order_acquire)) {
    MakeDevice<Spec>(&device, id);
    device.made.store(true, std::memory_order_release);
  }
  return device;
}

// Errors about the query tokens of attend, found in the call that `where` names; "" for this one.
[[noreturn]] inline void RaiseQueries(int64_t seq, int64_t begin, int64_t end, int64_t most, const char* where = "") {
  Raise("ValueError",
        "query_start_loc: expected numbers from 0 to num_tokens that never fall, of sequence %" PRId64 " up to %" PRId64
        " query tokens (at most its tokens, and %" PRId64 " on a GPU), got %" PRId64 " and then %" PRId64 "%s",
        seq, most, kMostQueries, begin, end, where);
}

[[noreturn]] inline void RaiseTree(int64_t cells, int64_t expected, const char* where = "") {
  Raise("ValueError",
        "tree_mask: expected shape [%" PRId64 "], n * n for each sequence of n query tokens, got [%" PRId64 "]%s",
        expected, cells, where);
}

// Raise what a kernel has reported of an earlier call, once.
inline void RaiseReported(const Device& device) {
  constexpr char kWhere[] = " in an earlier call, which wrote nothing";
  for (int i = 0; i < kNumReports; ++i) {
    Report& report = device.reports[i];
    if (__atomic_load_n(&report.code, __ATOMIC_ACQUIRE) == Report::kNothing) continue;
    const Report seen = report;
    switch (__atomic_exchange_n(&report.code, Report::kNothing, __ATOMIC_ACQ_REL)) {
      case Report::kContextLen:
        RaiseContextLen(seen.index, seen.value, seen.limit, kWhere);
      case Report::kBlockId:
        RaiseBlockId(seen.index, seen.position, seen.value, seen.limit, kWhere);
      case Report::kRow:
        RaiseRow(seen.index, seen.position, seen.value, seen.limit, kWhere);
      case Report::kQueries:
        RaiseQueries(seen.index, seen.position, seen.value, seen.limit, kWhere);
      case Report::kTree:
        RaiseTree(seen.value, seen.limit, kWhere);
      case Report::kSlot:
        RaiseSlot(seen.index, seen.value, seen.limit, kWhere);
    }
  }
}

inline void RaiseAllReported() {
  for (const Device& device : devices) {
    if (device.made.load(std::memory_order_acquire)) RaiseReported(device);
  }
}

}  // namespace pa
