// Results of ranges of keys, before they are merged.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>

#include "cpu/plan.h"
#include "cpu/scratch.h"
#include "shared/arrays.h"

namespace pa {

// Partial results, one slot for each range of the keys of a query token: float32 row_max and row_sum [slots, kNumHeads]
// and acc [slots, kNumHeads, kValueDim]. Those that are merged together are a merge, each with a number: in decode that
// of its sequence.
template <typename Spec>
class Partials {
 public:
  Partials(const Plan<Spec>& plan, int64_t batch)
      : Partials(plan.num_partials, batch, [&](int64_t seq) { return plan.partials_of(seq); }) {}
  // So many slots, of so many merges, each of as many work items as it says.
  template <typename Items>
  Partials(int64_t slots, int64_t merges, const Items& items_of)
      : rows_(Aligned(slots * Spec::kNumHeads)),
        memory_(call_workspace, Aligned(slots * Spec::kNumHeads * Spec::kValueDim) + 2 * rows_),
        missing_(call_workspace, merges),
        max(memory_.data(), {slots, Spec::kNumHeads}),
        sum(memory_.data() + rows_, {slots, Spec::kNumHeads}),
        acc(memory_.data() + 2 * rows_, {slots, Spec::kNumHeads, Spec::kValueDim}) {
    for (int64_t i = 0; i < merges; ++i) new (&missing_.data()[i]) std::atomic<int32_t>(items_of(i));
  }
  // Whether a work item of this merge, whose results are there, was the last one. Whoever computes that merges all of
  // them, in their order.
  bool Complete(int64_t merge) const { return --missing_.data()[merge] == 0; }

 private:
  int64_t rows_;
  Borrowed<float> memory_;
  Borrowed<std::atomic<int32_t>> missing_;  // of each merge, work items not yet computed

 public:
  const Array max, sum, acc;
};

}  // namespace pa
