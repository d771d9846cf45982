// Indices of either type, for kernels that read one.
#pragma once

#include <cstdint>

#include "cpu/scratch.h"
#include "shared/arrays.h"
#include "shared/block_table.h"

namespace pa {

// Indices in the type that kernels read. Where they are given in another, they are converted as they are checked, into
// memory that is borrowed for the call.
template <typename Index>
class Converted {
 public:
  explicit Converted(const Array& given)
      : array(given), converted_(call_workspace, IsNative(given) ? 0 : Count(given)) {
    if (IsNative(given)) return;
    const int last = given.tensor.ndim - 1;
    array.tensor.data = converted_.data();
    array.tensor.dtype.bits = 8 * sizeof(Index);
    if (last == 1) array.strides[0] = given.shape[1];
  }
  // Where they are to be converted to; nullptr where they are not.
  Index* to() const { return array.tensor.data == converted_.data() ? converted_.data() : nullptr; }

  Array array;

 private:
  static bool IsNative(const Array& given) { return given.tensor.dtype.bits == 8 * sizeof(Index); }
  static int64_t Count(const Array& given) { return given.shape[0] * (given.tensor.ndim == 1 ? 1 : given.shape[1]); }

  Borrowed<Index> converted_;
};

// The same of a block table.
class ConvertedTable {
 public:
  explicit ConvertedTable(const BlockTable& given)
      : entries_(given.entries), row_starts_(given.row_starts), is_pair_(given.is_pair) {}

  TableTo to() const { return {entries_.to(), row_starts_.to()}; }
  BlockTable AsRead(int64_t batch) const {
    BlockTable table{entries_.array, row_starts_.array, is_pair_};
    table.AsRead(batch);
    return table;
  }

 private:
  const Converted<int32_t> entries_, row_starts_;
  const bool is_pair_;
};

}  // namespace pa
