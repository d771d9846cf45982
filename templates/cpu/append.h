// What append_kv does beside its kernels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/scratch.h"
#include "shared/append_checks.h"
#include "shared/arrays.h"

namespace pa {

// The same memory, declared unsigned integers: the kernels move bits.
inline Array AsBits(Array array) {
  array.tensor.dtype.code = kDLUInt;
  return array;
}

// CheckSlotsApart on a copy of the slots.
inline void CheckSharedSlots(const Array& slot_mapping, const Sharing& sharing) {
  if (sharing.unit == 0) return;
  const int64_t count = slot_mapping.shape[0];
  const Borrowed<int64_t> slots(call_workspace, count);
  std::copy_n(static_cast<const int64_t*>(slot_mapping.tensor.data), count, slots.data());
  CheckSlotsApart(slots.data(), count, sharing);
}

constexpr int64_t kFewBytes =
    int64_t{1} << 18;  // new keys and values that one thread writes sooner than others wake up

// Whether so many new tokens are for one thread alone.
template <typename Spec>
bool AreFew(int64_t num_tokens) {
  const int64_t elements = Spec::kNumKVHeads * (Spec::kHeadDim + (Spec::kSharedKV ? 0 : Spec::kValueDim));
  return num_tokens * elements * (Spec::kDType.bits / 8) < kFewBytes;
}

}  // namespace pa
