// Results of ranges of a sequence, before they are merged.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>

#include "cpu/plan.h"
#include "cpu/scratch.h"
#include "shared/arrays.h"

namespace pa {

// Partial results, one slot for each range of a sequence: float32 row_max and row_sum [slots, kNumHeads] and acc
// [slots, kNumHeads, kValueDim].
template <typename Spec>
class Partials {
 public:
  Partials(const Plan<Spec>& plan, int64_t batch)
      : rows_(Aligned(plan.num_partials * Spec::kNumHeads)),
        memory_(call_workspace, Aligned(plan.num_partials * Spec::kNumHeads * Spec::kValueDim) + 2 * rows_),
        missing_(call_workspace, batch),
        max(memory_.data(), {plan.num_partials, Spec::kNumHeads}),
        sum(memory_.data() + rows_, {plan.num_partials, Spec::kNumHeads}),
        acc(memory_.data() + 2 * rows_, {plan.num_partials, Spec::kNumHeads, Spec::kValueDim}) {
    for (int64_t seq = 0; seq < batch; ++seq) new (&missing_.data()[seq]) std::atomic<int32_t>(plan.partials_of(seq));
  }
  // Whether a work item, whose results are there, was the last of its sequence to leave a partial one. Whoever computes
  // that merges all of them, in their order.
  bool Complete(const WorkItem& item) const {
    return item.partial_start >= 0 && --missing_.data()[item.batch_start] == 0;
  }

 private:
  int64_t rows_;
  Borrowed<float> memory_;
  Borrowed<std::atomic<int32_t>> missing_;  // of each sequence, partial results not yet computed

 public:
  const Array max, sum, acc;
};

}  // namespace pa
