// Lengths and slots, and the errors about every index that a kernel follows.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cstdint>

#include "shared/arrays.h"
#include "shared/errors.h"
#include "shared/window.h"

namespace pa {

constexpr int64_t kMaxContextLen = int64_t{1} << 30;  // keeps the kernels' token arithmetic within int32

// Errors about an index, found in the call that `where` names; "" for this one.
[[noreturn]] inline void RaiseContextLen(int64_t seq, int64_t context_len, int64_t capacity, const char* where = "") {
  Raise("ValueError",
        "context_lens: expected a length from 0 to %" PRId64 " for sequence %" PRId64 ", got %" PRId64 "%s", capacity,
        seq, context_len, where);
}

[[noreturn]] inline void RaiseBlockId(int64_t seq, int64_t position, int64_t block, int64_t num_blocks,
                                      const char* where = "", bool of_prefix = false) {
  Raise("IndexError",
        "%s: expected a block id in [0, %" PRId64 "), got %" PRId64 " for %s %" PRId64 " at position %" PRId64 "%s",
        of_prefix ? "prefix_table" : "block_table", num_blocks, block, of_prefix ? "prefix" : "sequence", seq, position,
        where);
}

[[noreturn]] inline void RaiseRow(int64_t seq, int64_t begin, int64_t end, int64_t num_entries,
                                  const char* where = "") {
  Raise("ValueError",
        "block_table[0]: expected numbers from 0 to %" PRId64 " that never fall, got %" PRId64 " and then %" PRId64
        " for sequence %" PRId64 "%s",
        num_entries, begin, end, seq, where);
}

[[noreturn]] inline void RaiseSlot(int64_t token, int64_t slot, int64_t num_slots, const char* where = "") {
  Raise("IndexError",
        "slot_mapping: expected -1 or a slot in [0, %" PRId64 "), got %" PRId64 " for token %" PRId64 "%s", num_slots,
        slot, token, where);
}

// An entry of an array of int32 or int64.
inline int64_t IndexAt(const Array& array, int64_t at) {
  const void* const data = array.tensor.data;
  return array.tensor.dtype.bits == 32 ? static_cast<const int32_t*>(data)[at] : static_cast<const int64_t*>(data)[at];
}

inline int32_t CheckContextLen(int64_t seq, int64_t context_len, int64_t capacity) {
  if (context_len < 0 || context_len > capacity) RaiseContextLen(seq, context_len, capacity);
  return static_cast<int32_t>(context_len);
}

// Every slot is -1 or within the caches. They go to `to`, where that is not nullptr.
inline void CheckSlots(const Array& slot_mapping, int64_t num_slots, int64_t* to = nullptr) {
  for (int64_t token = 0; token < slot_mapping.shape[0]; ++token) {
    const int64_t slot = IndexAt(slot_mapping, token);
    if (slot < -1 || slot >= num_slots) RaiseSlot(token, slot, num_slots);
    if (to != nullptr) to[token] = slot;
  }
}

}  // namespace pa
