// Block tables, lengths and slots: every index that a kernel follows.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cstdint>

#include "shared/arrays.h"
#include "shared/errors.h"
#include "shared/window.h"

namespace pa {

constexpr int64_t kMaxContextLen = int64_t{1} << 30;  // keeps the kernels' token arithmetic within int32

// Tokens that a row of block_table can name, and the kernels can count.
inline int64_t Capacity(const Array& block_table, int64_t block_size) {
  return std::min(block_table.shape[1] * block_size, kMaxContextLen);
}

// Errors about an index, found in the call that `where` names; "" for this one.
[[noreturn]] inline void RaiseContextLen(int64_t seq, int64_t context_len, int64_t capacity, const char* where = "") {
  Raise("ValueError",
        "context_lens: expected a length from 0 to %" PRId64 " for sequence %" PRId64 ", got %" PRId64 "%s", capacity,
        seq, context_len, where);
}

[[noreturn]] inline void RaiseBlockId(int64_t seq, int64_t position, int64_t block, int64_t num_blocks,
                                      const char* where = "") {
  Raise("IndexError",
        "block_table: expected a block id in [0, %" PRId64 "), got %" PRId64 " for sequence %" PRId64
        " at position %" PRId64 "%s",
        num_blocks, block, seq, position, where);
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

// Check the used block ids of a sequence, those at positions [first, used) of its row. int64 ones go to `to`.
template <typename Index>
void CheckBlockIds(int64_t seq, const Index* row, int64_t first, int64_t used, int64_t num_blocks, int32_t* to) {
  for (int64_t i = first; i < used; ++i) {
    if (row[i] < 0 || row[i] >= num_blocks) RaiseBlockId(seq, i, row[i], num_blocks);
    if (sizeof(Index) != sizeof(int32_t)) to[i] = static_cast<int32_t>(row[i]);
  }
}

// The same of a run of a sequence's blocks. Entries that are int64 are read once: what has been checked goes, row by
// row, to `to`.
inline void CheckBlocks(const Array& block_table, int64_t seq, const Interval& blocks, int64_t num_blocks,
                        int32_t* to) {
  const int64_t num_ids = std::min(num_blocks, int64_t{1} << 31);  // block ids of 32 bits
  const int64_t start = seq * block_table.strides[0];
  if (block_table.tensor.dtype.bits == 32) {
    const auto* row = static_cast<const int32_t*>(block_table.tensor.data) + start;
    CheckBlockIds(seq, row, blocks.begin, blocks.end, num_ids, nullptr);
  } else {
    const auto* row = static_cast<const int64_t*>(block_table.tensor.data) + start;
    CheckBlockIds(seq, row, blocks.begin, blocks.end, num_ids, to + seq * block_table.shape[1]);
  }
}

// The same of all runs of Runs.
template <typename Seen>
void CheckRuns(const Array& block_table, int64_t seq, const Seen& seen, int64_t num_blocks, int32_t* to) {
  for (int i = 0; i < seen.count; ++i) CheckBlocks(block_table, seq, seen.blocks[i], num_blocks, to);
}

// Lengths within the block table, and every used block id within the cache. Unused entries are not looked at: those
// past a sequence's length, and those of blocks that its query does not see. Lengths that are int64 go to lens_to.
template <typename Spec>
void CheckIndices(const Array& block_table, const Array& context_lens, int64_t num_blocks, int32_t* lens_to = nullptr,
                  int32_t* table_to = nullptr) {
  const int64_t capacity = Capacity(block_table, Spec::kBlockSize);
  for (int64_t seq = 0; seq < context_lens.shape[0]; ++seq) {
    const int64_t context_len = CheckContextLen(seq, IndexAt(context_lens, seq), capacity);
    if (lens_to != nullptr) lens_to[seq] = static_cast<int32_t>(context_len);
    CheckRuns(block_table, seq, Seen<Spec>(context_len), num_blocks, table_to);
  }
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
