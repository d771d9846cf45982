// Arrays as kernels take them, and the checks of a single one.
#pragma once

#include <sys/mman.h>
#include <tvm/ffi/c_api.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>

#include "shared/errors.h"

namespace pa {

constexpr DLDataType kInt32 = {kDLInt, 32, 1};
constexpr DLDataType kInt64 = {kDLInt, 64, 1};
constexpr DLDataType kFloat32 = {kDLFloat, 32, 1};
constexpr DLDataType kBfloat16 = {kDLBfloat, 16, 1};
constexpr DLDataType kUint8 = {kDLUInt, 8, 1};
constexpr DLDataType kUint16 = {kDLUInt, 16, 1};
constexpr DLDataType kBool = {kDLBool, 8, 1};

// The kind of device whose memory arrays have to be in.
struct DeviceKind {
  DLDeviceType type;
  const char* name;
};

constexpr DeviceKind kCpu = {kDLCPU, "CPU"};
constexpr DeviceKind kCuda = {kDLCUDA, "CUDA"};

// The extents of an array; -1: any.
struct Extents {
  int64_t values[4];
  int count;

  constexpr Extents(std::initializer_list<int64_t> extents) : values{}, count(0) {
    for (int64_t extent : extents) values[count++] = extent;
  }
};

// An array as the kernels take it: explicit strides, no byte offset.
struct Array {
  DLTensor tensor;
  int64_t shape[4];
  int64_t strides[4];  // in elements

  Array() : tensor{} {}
  // A contiguous float32 array over memory of the host's own.
  Array(float* data, const Extents& extents) {
    tensor = {data, {kDLCPU, 0}, extents.count, kFloat32, shape, strides, 0};
    std::copy_n(extents.values, extents.count, shape);
    int64_t stride = 1;
    for (int i = tensor.ndim - 1; i >= 0; stride *= shape[i--]) strides[i] = stride;
  }
  // Out of line, for calls copy arrays in many places.
  [[gnu::noinline]] Array(const Array& other) { *this = other; }
  [[gnu::noinline]] Array& operator=(const Array& other) {
    tensor = other.tensor;
    __builtin_memcpy(shape, other.shape, sizeof shape);
    __builtin_memcpy(strides, other.strides, sizeof strides);
    tensor.shape = shape;
    tensor.strides = strides;
    return *this;
  }
  bool empty() const { return std::find(shape, shape + tensor.ndim, 0) != shape + tensor.ndim; }
};

// So many elements side by side, as kernels take an array of any number of axes.
inline Array InOneAxis(const void* data, DLDataType dtype, int64_t elements) {
  Array array;
  array.tensor = {const_cast<void*>(data), {kDLCPU, 0}, 1, dtype, array.shape, array.strides, 0};
  array.shape[0] = elements;
  array.strides[0] = 1;
  return array;
}

struct Named {
  const char* name;
  const Array* array;
};

// A shape or strides, such as [4, 16, 128]; any is the name of an extent below 0.
inline Text ListText(const int64_t* values, int count, const char* any = nullptr) {
  Text text;
  text.Add("[");
  for (int i = 0; i < count; ++i) {
    if (i > 0) text.Add(", ");
    if (any != nullptr && values[i] < 0) {
      text.Add("%s", any);
    } else {
      text.Add("%" PRId64, values[i]);
    }
  }
  return text.Add("]");
}

inline Text DTypeText(DLDataType dtype) {
  // By DLPack's codes. From the eighth on the name says how many bits there are.
  static const char* const kNames[] = {"int",
                                       "uint",
                                       "float",
                                       "handle",
                                       "bfloat",
                                       "complex",
                                       "bool",
                                       "float8_e3m4",
                                       "float8_e4m3",
                                       "float8_e4m3b11fnuz",
                                       "float8_e4m3fn",
                                       "float8_e4m3fnuz",
                                       "float8_e5m2",
                                       "float8_e5m2fnuz",
                                       "float8_e8m0fnu",
                                       "float6_e2m3fn",
                                       "float6_e3m2fn",
                                       "float4_e2m1fn"};
  Text text;
  if (dtype.code >= sizeof kNames / sizeof *kNames) {
    text.Add("an unknown type of %d bits (DLPack code %d)", dtype.bits, dtype.code);
  } else if (dtype.code >= kDLBool) {
    text.Add("%s", kNames[dtype.code]);
  } else {
    text.Add("%s%d", kNames[dtype.code], dtype.bits);
  }
  return dtype.lanes == 1 ? text : text.Add("x%d", dtype.lanes);
}

inline bool Same(DLDataType a, DLDataType b) { return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes; }

// Whether there can be memory where an array begins. One whose memory has been given back, or that never had any,
// begins at 0, and a view of it where its offset ends.
inline bool HasMemory(const Array& array) {
  constexpr uintptr_t kFirst = 1 << 16;  // the system maps nothing before
  const auto address = reinterpret_cast<uintptr_t>(array.tensor.data);
  if (address < kFirst) return false;
  // Offsets end below this. A CPU's program that is position independent has nothing there, of others the system knows.
  constexpr uintptr_t kOffsets = uintptr_t{1} << 40, kPage = 4096;
  if (address >= kOffsets || array.tensor.device.device_type != kDLCPU) return true;
  unsigned char resident;
  return mincore(reinterpret_cast<void*>(address & -kPage), 1, &resident) == 0 || errno != ENOMEM;
}

// Elements of an array lie within fewer bytes than any CPU or GPU can address.
[[gnu::noinline, gnu::cold]] inline void CheckFits(const char* name, const DLTensor& given) {
  constexpr int64_t kMost = int64_t{1} << 56;
  uint64_t contiguous = 1;
  int64_t elements = 1, reach;
  bool fits = true;
  for (int i = given.ndim - 1; fits && i >= 0; --i) {
    const int64_t stride = given.strides != nullptr ? given.strides[i] : static_cast<int64_t>(contiguous);
    fits = !__builtin_mul_overflow(given.shape[i] - 1, stride, &reach) && -kMost < reach && reach < kMost;
    contiguous *= given.shape[i];
    if (fits) elements += std::abs(reach);
  }
  if (fits && elements <= kMost / (given.dtype.bits / 8)) return;
  Raise("ValueError", "%s: expected bytes that fit in an address space of 56 bits, got shape %s with strides %s", name,
        ListText(given.shape, given.ndim).c_str(),
        given.strides == nullptr ? "of C's order" : ListText(given.strides, given.ndim).c_str());
}

// The bits of an axis' extent and stride. Where no axis has bits at kFarBits or above, elements fit: CheckFits, which
// takes longer, need not be asked.
constexpr uint64_t kFarBits = uint64_t{1} << 25;
[[gnu::always_inline]] inline uint64_t BitsOf(int64_t extent, int64_t stride) {
  return static_cast<uint64_t>(extent | (stride ^ stride >> 63));
}

// Check dtype, device, rank and shape (any is the name of an extent that may be any), that there is memory, which
// elements can span, the stride of the last axis, and alignment.
inline Array CheckArray(const char* name, const DLTensor& given, DLDataType given_dtype, DLDataType dtype,
                        const Extents& expected, const DeviceKind& device, const char* any = nullptr) {
  const int ndim = given.ndim;
  if (!Same(given_dtype, dtype)) {
    Raise("TypeError", "%s: expected dtype %s, got %s", name, DTypeText(dtype).c_str(), DTypeText(given_dtype).c_str());
  }
  if (given.device.device_type != device.type) {
    Raise("ValueError", "%s: expected an array in %s memory (device type %d), got device type %d", name, device.name,
          device.type, given.device.device_type);
  }
  bool matches = ndim == expected.count;
  for (int i = 0; matches && i < ndim; ++i) {
    matches = expected.values[i] < 0 || expected.values[i] == given.shape[i];
  }
  if (!matches) {
    Raise("ValueError", "%s: expected shape %s, got %s", name, ListText(expected.values, expected.count, any).c_str(),
          ListText(given.shape, ndim).c_str());
  }
  Array array;
  array.tensor = {
      static_cast<char*>(given.data) + given.byte_offset, given.device, ndim, dtype, array.shape, array.strides, 0};
  uint64_t contiguous = 1, bits = 0;
  for (int i = ndim - 1; i >= 0; --i) {
    array.shape[i] = given.shape[i];
    array.strides[i] = given.strides != nullptr ? given.strides[i] : static_cast<int64_t>(contiguous);
    if (given.shape[i] == 1) array.strides[i] = i == ndim - 1 ? 1 : 0;  // never stepped over
    bits |= BitsOf(given.shape[i], array.strides[i]);
    contiguous *= given.shape[i];
  }
  if (array.empty()) {
    array.strides[ndim - 1] = 1;
    return array;
  }
  if (!HasMemory(array)) {
    Raise("ValueError", "%s: expected an array with memory, got one without: its address is %p", name,
          array.tensor.data);
  }
  if (array.strides[ndim - 1] != 1) {
    Raise("ValueError", "%s: expected a contiguous last axis (stride 1), got stride %" PRId64, name,
          array.strides[ndim - 1]);
  }
  if (bits >= kFarBits) CheckFits(name, array.tensor);
  const int itemsize = dtype.bits / 8;
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(array.tensor.data) % itemsize);
  if (past != 0) {
    Raise("ValueError",
          "%s: expected data aligned to its elements of %d bytes, got an address %d past a multiple of %d", name,
          itemsize, past, itemsize);
  }
  return array;
}

}  // namespace pa
