// NVIDIA's driver.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "shared/errors.h"

namespace pa {

// The driver API, as far as it is used here: types, numbers and functions as its documentation has them. cuda.h comes
// with the toolkit alone, and a library of the toolkit's is not needed to run.
using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUstream = struct CUstream_st*;
using CUlibrary = struct CUlib_st*;
using CUkernel = struct CUkern_st*;
using CUfunction = struct CUfunc_st*;
using CUmemoryPool = struct CUmemPoolHandle_st*;

struct CUmemPoolProps {
  int allocType, handleTypes;
  struct {
    int type, id;
  } location;
  void* win32SecurityAttributes;
  size_t maxSize;
  unsigned short usage;
  unsigned char reserved[54];
};

enum : int {
  CUDA_SUCCESS = 0,
  CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
  CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
  CU_MEM_ALLOCATION_TYPE_PINNED = 1,
  CU_MEM_LOCATION_TYPE_DEVICE = 1,
  CU_MEMPOOL_ATTR_RELEASE_THRESHOLD = 4,
  CU_MEMHOSTALLOC_PORTABLE = 1,
  CU_MEMHOSTALLOC_DEVICEMAP = 2,
  CU_STREAM_CAPTURE_MODE_RELAXED = 2,
  CU_STREAM_NON_BLOCKING = 1,
};

// The functions, each with its parameters.
#define PA_DRIVER_FUNCTIONS(F)                                                                                     \
  F(cuGetErrorName, CUresult, const char**)                                                                        \
  F(cuGetErrorString, CUresult, const char**)                                                                      \
  F(cuInit, unsigned flags)                                                                                        \
  F(cuDriverGetVersion, int*)                                                                                      \
  F(cuDeviceGet, CUdevice*, int ordinal)                                                                           \
  F(cuDeviceGetAttribute, int*, int attribute, CUdevice)                                                           \
  F(cuDevicePrimaryCtxRetain, CUcontext*, CUdevice)                                                                \
  F(cuCtxPushCurrent_v2, CUcontext)                                                                                \
  F(cuCtxPopCurrent_v2, CUcontext*)                                                                                \
  F(cuThreadExchangeStreamCaptureMode, int*)                                                                       \
  F(cuLibraryLoadData, CUlibrary*, const void* image, int*, void**, unsigned, int*, void**, unsigned)              \
  F(cuLibraryGetKernel, CUkernel*, CUlibrary, const char* name)                                                    \
  F(cuKernelGetFunction, CUfunction*, CUkernel)                                                                    \
  F(cuFuncSetAttribute, CUfunction, int attribute, int value)                                                      \
  F(cuOccupancyMaxActiveBlocksPerMultiprocessor, int*, CUfunction, int threads, size_t shared_bytes)               \
  F(cuLaunchKernel, CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared_bytes, \
    CUstream, void** values, void** extra)                                                                         \
  F(cuMemAlloc_v2, CUdeviceptr*, size_t bytes)                                                                     \
  F(cuMemHostAlloc, void**, size_t bytes, unsigned flags)                                                          \
  F(cuMemHostGetDevicePointer_v2, CUdeviceptr*, void*, unsigned flags)                                             \
  F(cuMemPoolCreate, CUmemoryPool*, const CUmemPoolProps*)                                                         \
  F(cuMemPoolSetAttribute, CUmemoryPool, int attribute, void* value)                                               \
  F(cuMemAllocFromPoolAsync, CUdeviceptr*, size_t bytes, CUmemoryPool, CUstream)                                   \
  F(cuMemFreeAsync, CUdeviceptr, CUstream)                                                                         \
  F(cuMemsetD32Async, CUdeviceptr, unsigned value, size_t count, CUstream)                                         \
  F(cuMemcpyDtoHAsync_v2, void*, CUdeviceptr, size_t bytes, CUstream)                                              \
  F(cuMemcpyHtoDAsync_v2, CUdeviceptr, const void*, size_t bytes, CUstream)                                        \
  F(cuStreamCreate, CUstream*, unsigned flags)                                                                     \
  F(cuStreamDestroy_v2, CUstream)                                                                                  \
  F(cuStreamSynchronize, CUstream)                                                                                 \
  F(cuStreamIsCapturing, CUstream, int* status)

struct Driver {
#define PA_DECLARE(name, ...) CUresult (*name)(__VA_ARGS__);
  PA_DRIVER_FUNCTIONS(PA_DECLARE)
#undef PA_DECLARE
};

// The driver, found at the first call: a library can be loaded, and refuse bad arguments, where there is none.
inline const Driver& driver() {
  static const Driver loaded = [] {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW);
    if (library == nullptr) {
      Raise("RuntimeError", "target: this module needs a GPU and NVIDIA's driver, which is not there: %s", dlerror());
    }
    auto find = [library](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
      if (function == nullptr) {
        Raise("RuntimeError", "target: expected NVIDIA's driver for CUDA 12.0 or later, got one without %s", name);
      }
    };
    Driver found;
#define PA_FIND(name, ...) find(found.name, #name);
    PA_DRIVER_FUNCTIONS(PA_FIND)
#undef PA_FIND
    return found;
  }();
  return loaded;
}

// What a driver function returned, which must be success.
inline void Expect(CUresult result, const char* function) {
  if (result == CUDA_SUCCESS) return;
  const char *name = nullptr, *meaning = nullptr;
  driver().cuGetErrorName(result, &name);
  driver().cuGetErrorString(result, &meaning);
  Raise("RuntimeError", "%s: %s (%d): %s", function, name != nullptr ? name : "unknown error", result,
        meaning != nullptr ? meaning : "the driver has no words for it");
}

}  // namespace pa

// Call a function of the driver, which must succeed.
#define PA_DRIVER(function, ...) pa::Expect(pa::driver().function(__VA_ARGS__), #function)
