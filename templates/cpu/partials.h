// Results of ranges of a sequence, before they are merged.
#pragma once

#include <cstdint>

#include "cpu/scratch.h"
#include "shared/arrays.h"

namespace pa {

// Partial results, one slot for each range of a sequence: float32 row_max and row_sum [slots, kNumHeads] and acc
// [slots, kNumHeads, kValueDim].
template <typename Spec>
class Partials {
 public:
  explicit Partials(int64_t slots)
      : rows_(Aligned(slots * Spec::kNumHeads)),
        memory_(call_workspace, Aligned(slots * Spec::kNumHeads * Spec::kValueDim) + 2 * rows_),
        max(memory_.data(), {slots, Spec::kNumHeads}),
        sum(memory_.data() + rows_, {slots, Spec::kNumHeads}),
        acc(memory_.data() + 2 * rows_, {slots, Spec::kNumHeads, Spec::kValueDim}) {}

 private:
  int64_t rows_;
  Borrowed<float> memory_;

 public:
  const Array max, sum, acc;
};

}  // namespace pa
