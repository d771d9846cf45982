// What CUDA asks of arguments beyond what every target does.
#pragma once

#include <cinttypes>
#include <cstdint>
#include <initializer_list>

#include "cuda/interface.h"
#include "shared/append_checks.h"
#include "shared/arrays.h"
#include "shared/errors.h"
#include "shared/ffi.h"

namespace pa {

constexpr int64_t kMaxTokens = int64_t{1} << 30;  // of append_kv

// The device that all of a call's arrays are on; the first of them says which.
inline int CheckSameDevice(std::initializer_list<Named> arrays) {
  const Named& first = *arrays.begin();
  const int expected = first.array->tensor.device.device_id;
  for (const Named& given : arrays) {
    const int found = given.array->tensor.device.device_id;
    if (given.array->tensor.device.device_type == kDLCUDA && found != expected) {
      Raise("ValueError", "%s: expected an array on CUDA device %d, where %s is, got one on device %d", given.name,
            expected, first.name, found);
    }
  }
  return expected;
}

inline void CheckCount(const char* name, const char* extent, int64_t count, int64_t most) {
  if (count > most)
    Raise("ValueError", "%s: expected %s of at most %" PRId64 ", got %" PRId64, name, extent, most, count);
}

// Of caches that share blocks, a kernel does not see which slots are written.
inline void CheckNotShared(const Sharing& sharing) {
  if (sharing.unit == 0) return;
  Raise("ValueError",
        "value_cache: expected memory apart from key_cache's, got blocks that they share: which of their slots are "
        "written, "
        "check 'host' looks at, and 'device' does not");
}

// Who is to look at the indices of a call.
inline Check CheckOf(const Inputs& in, const Parameter& check) {
  const int64_t value = in.Int(check);
  if (value < 0 || value >= kNumChecks) {
    Raise("ValueError", "%s: expected 0 to %d, got %" PRId64, check.name, kNumChecks - 1, value);
  }
  return static_cast<Check>(value);
}

}  // namespace pa
