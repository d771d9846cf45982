// A call of decode whose query tokens are taken as attend takes several of a sequence. For Spec see attend_plan.h;
// Given has decode's parameters.
#pragma once

#include <cstdint>
#include <numeric>

#include "cpu/attend.h"
#include "cpu/attend_plan.h"
#include "cpu/converted.h"
#include "cpu/floating_point.h"
#include "cpu/interface.h"
#include "cpu/parallel.h"
#include "cpu/partials.h"
#include "cpu/positions.h"
#include "cpu/scratch.h"
#include "shared/attend_checks.h"
#include "shared/decode_checks.h"
#include "shared/indices.h"

namespace pa {

// As AttendCall, for one query token of each sequence, one of no tokens among them: its query token is at position -1
// and sees nothing.
template <typename Spec, typename Given = DecodeParameters>
class InvariantDecode {
 private:
  const DefaultFloatingPoint state_;

 public:
  Threads threads;
  AttendArguments args;

 private:
  const ConvertedTable block_table_;
  const Converted<int32_t> context_lens_;
  const Borrowed<int32_t> starts_;  // [batch + 1]

 public:
  const Queries queries;

 private:
  const Positions positions_;

 public:
  const AttendPlan<Spec> plan;
  const Partials<Spec> partials;

  explicit InvariantDecode(const Inputs& in)
      : threads(CheckThreads<Given>(in)),
        args(CheckedArguments(in)),
        block_table_(args.block_table),
        context_lens_(args.context_lens),
        starts_(call_workspace, args.batch + 1),
        queries(CheckedQueries()),
        positions_(queries),
        plan(queries, threads.limit),
        partials(plan.num_partials, plan.num_merges, [&](int64_t merge) { return plan.ItemsOf(merge); }),
        unused_lse_(call_workspace, args.has_lse() ? 0 : args.batch * Spec::kNumHeads) {
    if (!args.has_lse()) args.lse = Array(unused_lse_.data(), {args.batch, Spec::kNumHeads});
    args.positions = positions_.Of(args.batch);
    threads.limit = plan.num_threads;
  }

  // Keys that the query token of an item may see.
  int64_t NumKeys(const AttendItem& item, int64_t) const { return queries.context_lens[item.seq]; }

 private:
  static AttendArguments CheckedArguments(const Inputs& in) {
    AttendArguments args = {};
    static_cast<DecodeArguments&>(args) = CheckDecode<Spec, Given>(in);
    args.tree_mask = UnusedMask(), args.causal = true;
    return args;
  }
  Queries CheckedQueries() {
    CheckIndices<Spec>(args.block_table, args.context_lens, args.num_blocks, context_lens_.to(), block_table_.to());
    args.block_table = block_table_.AsRead(args.batch), args.context_lens = context_lens_.array;
    std::iota(starts_.data(), starts_.data() + args.batch + 1, 0);
    return {static_cast<const int32_t*>(args.context_lens.tensor.data), starts_.data(), args.batch, true, nullptr};
  }

  const Borrowed<float> unused_lse_;
};

}  // namespace pa
