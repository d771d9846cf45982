// What the programs that test the headers have in common: expectations, arguments of entry points, and specs.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "shared/caches.h"
#include "shared/window.h"

static int failures = 0;

#define EXPECT(condition)                                                \
  if (!(condition)) {                                                    \
    ++failures;                                                          \
    std::printf("%s:%d: expected %s\n", __FILE__, __LINE__, #condition); \
  }

// The error, as "kind: message", that something raises; "" where it raises none.
template <typename Body>
std::string Raised(const Body& body) {
  try {
    body();
  } catch (const pa::Error& error) {
    return std::string(error.kind) + ": " + error.message;
  }
  return "";
}

#define EXPECT_RAISES(message, statement)                                                                 \
  if (const std::string found = Raised([&] { statement; }); found != (message)) {                         \
    ++failures;                                                                                           \
    std::printf("%s:%d: expected \"%s\", got \"%s\"\n", __FILE__, __LINE__, std::string(message).c_str(), \
                found.c_str());                                                                           \
  }

// An array with memory, contiguous unless strides say otherwise.
struct Made {
  std::vector<int64_t> shape, strides;
  std::vector<char> memory;
  DLTensor tensor;

  Made(DLDataType dtype, std::vector<int64_t> extents, std::vector<int64_t> steps = {})
      : shape(extents), strides(steps), memory(1 << 16) {
    tensor = {memory.data(), {kDLCPU, 0}, static_cast<int>(shape.size()), dtype, shape.data(), nullptr, 0};
    if (!strides.empty()) tensor.strides = strides.data();
  }
  Made(const Made&) = delete;
  Made& operator=(const Made&) = delete;
  template <typename Element>
  Element* data() {
    return reinterpret_cast<Element*>(memory.data());
  }
};

inline TVMFFIAny Any(const DLTensor& tensor) {
  TVMFFIAny any{};
  any.type_index = kTVMFFIDLTensorPtr;
  any.v_ptr = const_cast<DLTensor*>(&tensor);
  return any;
}

inline TVMFFIAny Any(int64_t value) {
  TVMFFIAny any{};
  any.type_index = kTVMFFIInt;
  any.v_int64 = value;
  return any;
}

inline TVMFFIAny None() {
  TVMFFIAny any{};
  any.type_index = kTVMFFINone;
  return any;
}

// Heads of 6 elements in NHD, 2 of them for keys, in blocks of 4 tokens.
template <int64_t value_dim, bool shared_kv, int64_t window = 0, bool alibi = false, bool sinks = false>
struct SpecOf {
  static constexpr int64_t kNumHeads = 4, kNumKVHeads = 2, kHeadDim = 6, kValueDim = value_dim, kBlockSize = 4;
  static constexpr int64_t kWindow = window;
  static constexpr bool kAlibi = alibi, kSinks = sinks;
  static constexpr bool kSharedKV = shared_kv, kWideRange = true, kSlotsApart = true;
  static constexpr DLDataType kDType = pa::kFloat32, kOutDType = pa::kFloat32;
  static constexpr pa::Extents kKeyCache = {-1, 4, 2, 6}, kValueCache = {-1, 4, 2, value_dim};
  static constexpr int kRowAxis = 1, kHeadAxis = 2, kWordElements = 1;
  static constexpr int64_t kCacheAlignment = 0, kBatchChunk = 4, kSplitBlocks = 3, kItemTokens = 10;
  static constexpr int64_t kGroup = 2, kRangeBlocks = 3, kAttendRows = 4, kAttendTiles = 4, kAttendHeads = kNumKVHeads;
  static constexpr int64_t kThreadTokens = 7, kRowTile = 2, kTileTokens = 8;
  static constexpr pa::DeviceKind kDevice = pa::kCpu;
};

// The same with masks: the first 3 keys, the last 4, and 5 in between; and one that no key fulfils.
struct Union : SpecOf<3, false, -1> {
  static constexpr pa::Intervals<3> SeenKeys(int64_t context_len) {
    return {{{context_len - 4, context_len}, {0, 3}, {40, 45}}};
  }
  static constexpr pa::Intervals<3> SeenKeys(int64_t context_len, int64_t query_end) {
    return {{{query_end - 4, context_len}, {0, 3}, {40, 45}}};
  }
};

struct NoKeys : SpecOf<3, false, -1> {
  static constexpr pa::Intervals<1> SeenKeys(int64_t context_len) { return {{{1 << 30, context_len}}}; }
  static constexpr pa::Intervals<1> SeenKeys(int64_t context_len, int64_t) { return SeenKeys(context_len); }
};
