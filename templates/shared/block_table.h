// The blocks of sequences: a table of rows of one length, or rows of any lengths one after another.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cstdint>

#include "shared/arrays.h"
#include "shared/caches.h"
#include "shared/errors.h"
#include "shared/indices.h"

namespace pa {

// Block i of a sequence stands in entries at [seq, row_starts[seq] + i]. Of a table all rows start at 0; of a pair
// (indptr, indices) row_starts are indptr, and all sequences share the one row of entries that indices is.
struct BlockTable {
  Array entries;     // [batch, max_blocks]; of a pair [1, as many as indices has]
  Array row_starts;  // [batch + 1]; of a table one 0
  bool is_pair;
  bool of_prefixes = false;  // whether it is prefix_table, whose rows are those of prefixes

  // How many blocks a sequence has entries for, and where in memory the first of them is, in elements.
  int64_t Blocks(int64_t seq) const {
    return is_pair ? IndexAt(row_starts, seq + 1) - IndexAt(row_starts, seq) : entries.shape[1];
  }
  int64_t Start(int64_t seq) const { return is_pair ? IndexAt(row_starts, seq) : seq * entries.strides[0]; }
  // The most that a row may have, whatever row_starts say.
  int64_t MostBlocks() const { return entries.shape[1]; }
  // Tokens that a sequence has blocks for, and the kernels can count.
  int64_t Capacity(int64_t seq, int64_t block_size) const { return Tokens(Blocks(seq), block_size); }
  static int64_t Tokens(int64_t blocks, int64_t block_size) {
    return std::min(std::min(blocks, kMaxContextLen) * block_size, kMaxContextLen);
  }

  // As kernels read it: a row of each for every sequence, which is always the same where they share it.
  void AsRead(int64_t batch) {
    if (is_pair) entries.shape[0] = batch, entries.strides[0] = 0;
    row_starts.shape[0] = batch;
    row_starts.strides[0] = is_pair ? 1 : 0;
  }
};

// Where indices that are not as kernels read them go, as they are checked; nullptr where they are.
struct TableTo {
  int32_t *entries = nullptr, *row_starts = nullptr;
};

inline Array NoRowStarts() {
  static int32_t zero = 0;
  Array starts;
  starts.tensor = {&zero, {kDLCPU, 0}, 1, kInt32, starts.shape, starts.strides, 0};
  starts.shape[0] = starts.strides[0] = 1;
  return starts;
}

// block_table of a call, or the pair in its place, without a look at what is in it.
template <typename Spec, typename Given>
BlockTable CheckTable(const ArgumentCheck<Spec>& check, int64_t batch) {
  if (check.in.IsNone(Given::kBlockIndptr) && check.in.IsNone(Given::kBlockIndices)) {
    return {check.Indices(Given::kBlockTable, kInt32, {batch, -1}, "max_blocks"), NoRowStarts(), false};
  }
  if (!check.in.IsNone(Given::kBlockTable)) {
    const DLTensor& given = check.in.Tensor(Given::kBlockTable);
    Raise("TypeError", "block_table: expected None beside block_indptr and block_indices, got an array of shape %s",
          ListText(given.shape, given.ndim).c_str());
  }
  const Array starts = check.Indices(Given::kBlockIndptr, kInt32, {batch + 1});
  Array entries = check.Indices(Given::kBlockIndices, kInt32, {-1}, "n");
  if (entries.shape[0] > INT32_MAX) {
    Raise("ValueError", "%s: expected up to 2**31 - 1 entries, got %" PRId64, Given::kBlockIndices.name,
          entries.shape[0]);
  }
  entries.tensor.ndim = 2;
  entries.shape[1] = entries.shape[0], entries.shape[0] = 1;
  entries.strides[1] = 1, entries.strides[0] = 0;
  return {entries, starts, true};
}

// The row starts of a pair: from 0 on, never falling, and within its entries.
inline void CheckRowStarts(const BlockTable& table, int32_t* to) {
  if (!table.is_pair) return;
  constexpr char kName[] = "block_table[0]";
  int64_t before = 0;
  for (int64_t i = 0; i < table.row_starts.shape[0]; ++i) {
    const int64_t start = IndexAt(table.row_starts, i);
    if (i == 0 && start != 0) Raise("ValueError", "%s: expected 0 first, got %" PRId64, kName, start);
    if (start < before) {
      Raise("ValueError",
            "%s: expected numbers that never fall, got %" PRId64 " after %" PRId64 " at position %" PRId64, kName,
            start, before, i);
    }
    if (start > table.MostBlocks()) {
      Raise("ValueError",
            "%s: expected numbers up to %" PRId64 ", the entries of block_table[1], got %" PRId64
            " at position %" PRId64,
            kName, table.MostBlocks(), start, i);
    }
    if (to != nullptr) to[i] = static_cast<int32_t>(start);
    before = start;
  }
}

// Check the used block ids of a sequence. int64 ones go to `to`.
template <typename Index>
void CheckBlockIds(const BlockTable& table, int64_t seq, const Index* row, const Interval& used, int64_t num_blocks,
                   int32_t* to) {
  for (int64_t i = used.begin; i < used.end; ++i) {
    if (row[i] < 0 || row[i] >= num_blocks) RaiseBlockId(seq, i, row[i], num_blocks, "", table.of_prefixes);
    if (sizeof(Index) != sizeof(int32_t)) to[i] = static_cast<int32_t>(row[i]);
  }
}

// The same of a run of a sequence's blocks. Entries that are int64 are read once: what has been checked goes, row by
// row, to `to`.
inline void CheckBlocks(const BlockTable& table, int64_t seq, const Interval& blocks, int64_t num_blocks, int32_t* to) {
  const int64_t num_ids = std::min(num_blocks, int64_t{1} << 31);  // block ids of 32 bits
  const int64_t start = table.Start(seq);
  if (table.entries.tensor.dtype.bits == 32) {
    const auto* row = static_cast<const int32_t*>(table.entries.tensor.data) + start;
    CheckBlockIds(table, seq, row, blocks, num_ids, nullptr);
  } else {
    const auto* row = static_cast<const int64_t*>(table.entries.tensor.data) + start;
    CheckBlockIds(table, seq, row, blocks, num_ids, to + (table.is_pair ? start : seq * table.entries.shape[1]));
  }
}

// The same of all runs of Runs.
template <typename Seen>
void CheckRuns(const BlockTable& table, int64_t seq, const Seen& seen, int64_t num_blocks, int32_t* to) {
  for (int i = 0; i < seen.count; ++i) CheckBlocks(table, seq, seen.blocks[i], num_blocks, to);
}

// Rows within the table, lengths within their rows, and every used block id within the cache. Unused entries are not
// looked at: those past a sequence's length, and those of blocks that its query does not see. Lengths that are int64 go
// to lens_to.
template <typename Spec>
void CheckIndices(const BlockTable& table, const Array& context_lens, int64_t num_blocks, int32_t* lens_to = nullptr,
                  const TableTo& table_to = {}) {
  CheckRowStarts(table, table_to.row_starts);
  for (int64_t seq = 0; seq < context_lens.shape[0]; ++seq) {
    const int64_t capacity = table.Capacity(seq, Spec::kBlockSize);
    const int64_t context_len = CheckContextLen(seq, IndexAt(context_lens, seq), capacity);
    if (lens_to != nullptr) lens_to[seq] = static_cast<int32_t>(context_len);
    CheckRuns(table, seq, Seen<Spec>(context_len), num_blocks, table_to.entries);
  }
}

}  // namespace pa
