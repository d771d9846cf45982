// Key and value caches as kernels see them, and the checks of arguments that calls have in common.
//
// A Spec has what a library was compiled for: kDevice, kNumHeads, kNumKVHeads, kHeadDim, kValueDim, kBlockSize, kDType,
// kOutDType, kWideRange, kSharedKV, kWindow, kAlibi, kSinks, kSlotsApart, kKeyCache, kValueCache, kRowAxis, kHeadAxis,
// kWordElements, kCacheAlignment. Where the caches hold codes it has kHasScales, kTokenScales, kCacheDType and
// kScaleShape besides.
#pragma once

#include <cinttypes>
#include <cstdint>
#include <type_traits>

#include "shared/arrays.h"
#include "shared/errors.h"
#include "shared/ffi.h"

namespace pa {

struct Keys;
struct Values;
struct KeyScales;
struct ValueScales;

// Whether the caches of a Spec hold codes: Spec::kHasScales, of a Spec that has it.
template <typename Spec, typename = void>
constexpr bool kHasScales = false;
template <typename Spec>
constexpr bool kHasScales<Spec, std::enable_if_t<Spec::kHasScales>> = true;

// Whether each head of each token has a scale, which append_kv writes.
template <typename Spec, typename = void>
constexpr bool kTokenScales = false;
template <typename Spec>
constexpr bool kTokenScales<Spec, std::enable_if_t<Spec::kTokenScales>> = true;

// The type of the caches' elements.
template <typename Spec>
constexpr DLDataType CacheDType() {
  if constexpr (kHasScales<Spec>) {
    return Spec::kCacheDType;
  } else {
    return Spec::kDType;
  }
}

// Strides of a cache, in elements. Each, of Keys and of Values, is a type of its own: none is taken for another.
template <typename Of>
struct BlockStride {
  int64_t elements;
};

template <typename Of>
struct RowStride {
  int64_t elements;
};

template <typename Of>
struct HeadStride {
  int64_t elements;
};

// A cache as one span of memory, with the strides of its blocks, of the rows in a block and of its heads.
template <typename Of>
struct Cache {
  Array memory;
  BlockStride<Of> block_stride;
  RowStride<Of> row_stride;
  HeadStride<Of> head_stride;
};

// Kernels read rows in words of so many bytes.
inline void CheckAligned(const char* name, const Array& array, int64_t bytes) {
  if (array.empty()) return;
  const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(array.tensor.data) % bytes);
  if (past != 0) {
    Raise("ValueError",
          "%s: expected data aligned to %" PRId64 " bytes, got an address %" PRId64 " past a multiple of %" PRId64,
          name, bytes, past, bytes);
  }
  const int64_t itemsize = array.tensor.dtype.bits / 8;
  for (int i = 0; i + 1 < array.tensor.ndim; ++i) {
    if (array.strides[i] * itemsize % bytes != 0) {
      Raise("ValueError", "%s: expected strides in multiples of %" PRId64 " elements (%" PRId64 " bytes), got %s", name,
            bytes / itemsize, bytes, ListText(array.strides, array.tensor.ndim).c_str());
    }
  }
}

// A checked cache as the kernels see it: layouts differ in their strides alone. Its elements are read in words.
template <typename Spec, typename Of>
Cache<Of> AsCache(const char* name, const Array& array) {
  if constexpr (Spec::kCacheAlignment > 0) CheckAligned(name, array, Spec::kCacheAlignment);
  Cache<Of> cache{array, {array.strides[0]}, {array.strides[Spec::kRowAxis]}, {array.strides[Spec::kHeadAxis]}};
  cache.memory.tensor.ndim = 1;
  cache.memory.shape[0] = array.empty() ? 0 : 1;  // where it begins is all that the kernels take from it
  cache.memory.strides[0] = 1;
  if constexpr (Spec::kWordElements > 1) {
    for (int64_t* stride : {&cache.block_stride.elements, &cache.row_stride.elements, &cache.head_stride.elements}) {
      if (*stride % Spec::kWordElements != 0 && !array.empty()) {
        Raise("ValueError", "%s: expected strides in multiples of %" PRId64 " elements, got %s", name,
              Spec::kWordElements, ListText(array.strides, array.tensor.ndim).c_str());
      }
      *stride /= Spec::kWordElements;
    }
    cache.memory.tensor.dtype = kInt32;
  }
  return cache;
}

// The values that are the first elements of their keys.
inline Cache<Values> ValuesIn(const Cache<Keys>& keys) {
  return {keys.memory, {keys.block_stride.elements}, {keys.row_stride.elements}, {keys.head_stride.elements}};
}

// CheckArray for the arguments of a call. Bit i of as_uint16 says that argument i holds bfloat16 and is declared
// uint16, or that it holds codes of the caches' float8 and is declared uint8: for arrays of libraries that have no such
// type in DLPack.
template <typename Spec>
struct ArgumentCheck {
  const Inputs& in;
  int64_t as_uint16;

  Array operator()(const Parameter& of, DLDataType dtype, const Extents& shape, const char* any = nullptr) const {
    return OfView(of, in.Tensor(of), dtype, shape, any);
  }
  // The same of a view of the argument.
  [[gnu::noinline]] Array OfView(const Parameter& of, const DLTensor& given, DLDataType dtype, const Extents& shape,
                                 const char* any = nullptr) const {
    const bool as_unsigned = as_uint16 >> of.position & 1;
    DLDataType holds = as_unsigned && Same(given.dtype, kUint16) ? kBfloat16 : given.dtype;
    if constexpr (kHasScales<Spec>) {
      if (as_unsigned && Same(given.dtype, kUint8)) holds = CacheDType<Spec>();
    }
    return CheckArray(of.name, given, holds, dtype, shape, Spec::kDevice, any);
  }
  // An array of indices, int32 or int64 on a CPU, where those that kernels do not read are converted, else of dtype.
  Array Indices(const Parameter& of, DLDataType dtype, const Extents& shape, const char* any = nullptr) const {
    const DLDataType given = in.Tensor(of).dtype;
    if (Spec::kDevice.type != kDLCPU) return (*this)(of, dtype, shape, any);
    if (!Same(given, kInt32) && !Same(given, kInt64)) {
      Raise("TypeError", "%s: expected dtype int32 or int64, got %s", of.name, DTypeText(given).c_str());
    }
    return (*this)(of, given, shape, any);
  }
  // An argument that a library does not take, since its spec has something, or has it not.
  [[gnu::noinline]] void None(const Parameter& of, const char* has) const {
    if (in.IsNone(of)) return;
    const DLTensor& given = in.Tensor(of);
    Raise("TypeError", "%s: expected None, since the spec has %s, got an array of shape %s", of.name, has,
          ListText(given.shape, given.ndim).c_str());
  }
};

// key_cache and value_cache of a call. Where the values are in the keys, value_cache is what they are of key_cache.
template <typename Spec, typename Given>
void CheckCaches(const ArgumentCheck<Spec>& check, Array* key_cache, Array* value_cache) {
  *key_cache = check(Given::kKeyCache, CacheDType<Spec>(), Spec::kKeyCache, "num_blocks");
  if constexpr (Spec::kSharedKV) {
    check.None(Given::kValueCache, "shared_kv");
    *value_cache = *key_cache;
    value_cache->shape[3] = Spec::kValueDim;
  } else {
    *value_cache = check(Given::kValueCache, CacheDType<Spec>(), Spec::kValueCache, "num_blocks");
    if (value_cache->shape[0] != key_cache->shape[0]) {
      Raise("ValueError", "value_cache: expected as many blocks as key_cache, %" PRId64 ", got %" PRId64,
            key_cache->shape[0], value_cache->shape[0]);
    }
  }
}

// The scales of keys, or of values, in strides as those of a cache: 0 where there is no such axis. Their memory is as
// it was checked, and AsSpan's as kernels see it.
template <typename Of, typename Spec>
Cache<Of> CheckScales(const ArgumentCheck<Spec>& check, const Parameter& of, [[maybe_unused]] int64_t num_blocks) {
  if constexpr (kTokenScales<Spec>) {
    if constexpr (Spec::kScaleShape.count == 4) {  // with a zero point beside each
      const Array scales = check(of, kFloat32, {num_blocks, Spec::kNumKVHeads, Spec::kBlockSize, 2});
      if (Spec::kBlockSize > 1 && scales.strides[2] != 2 && !scales.empty()) {
        Raise("ValueError", "%s: expected the slots of a block side by side (stride 2), got stride %" PRId64, of.name,
              scales.strides[2]);
      }
      return {scales, {scales.strides[0]}, {2}, {scales.strides[1]}};
    } else {
      const Array scales = check(of, kFloat32, {num_blocks, Spec::kNumKVHeads, Spec::kBlockSize});
      return {scales, {scales.strides[0]}, {scales.strides[2]}, {scales.strides[1]}};
    }
  } else if constexpr (kHasScales<Spec>) {
    const Array scales = check(of, kFloat32, Spec::kScaleShape);
    return {scales, {0}, {0}, {scales.shape[0] == 1 ? 0 : scales.strides[0]}};
  } else {
    check.None(of, "no kv_dtype");
    return {};
  }
}

template <typename Of>
Cache<Of> AsSpan(Cache<Of> scales) {
  scales.memory.tensor.ndim = 1;
  scales.memory.shape[0] = scales.memory.tensor.data == nullptr ? 0 : 1;
  scales.memory.strides[0] = 1;
  return scales;
}

// Both caches of a call as kernels see them.
struct Caches {
  Cache<Keys> keys;
  Cache<Values> values;
};

template <typename Spec>
Caches AsCaches(const Array& key_cache, const Array& value_cache) {
  const auto keys = AsCache<Spec, Keys>("key_cache", key_cache);
  if constexpr (Spec::kSharedKV) {
    return {keys, ValuesIn(keys)};
  } else {
    return {keys, AsCache<Spec, Values>("value_cache", value_cache)};
  }
}

}  // namespace pa
