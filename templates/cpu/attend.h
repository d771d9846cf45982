// A call of attend as the kernels take it. For Spec see decode.h and attend_plan.h; Given has attend's parameters.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/attend_plan.h"
#include "cpu/converted.h"
#include "cpu/entry_points.h"
#include "cpu/floating_point.h"
#include "cpu/interface.h"
#include "cpu/parallel.h"
#include "cpu/partials.h"
#include "cpu/positions.h"
#include "cpu/scratch.h"
#include "shared/attend_checks.h"

namespace pa {

// Rows of an array from another one on, as if there were as many before it.
inline Array MovedBy(const Array& array, int64_t rows) {
  Array moved = array;
  moved.tensor.data = static_cast<char*>(array.tensor.data) + rows * array.strides[0] * (array.tensor.dtype.bits / 8);
  return moved;
}

// A tree_mask where there is none.
inline Array UnusedMask() {
  static float unused;
  Array mask(&unused, {1});
  mask.tensor.dtype = kUint8;
  return mask;
}

// The arguments as decode's kernels take them for an item of its plan, whose sequences have their query tokens side by
// side: row `seq` of query, out and lse is that of the token of it. These have a row for each sequence, as kernels are
// told: the extents of a spec's inputs may be the batch.
inline DecodeArguments RowsOf(const AttendArguments& args, const Queries& queries, const WorkItem& item) {
  DecodeArguments rows = args;
  const int64_t seq = item.batch_start;
  for (Array* array : {&rows.query, &rows.out, &rows.lse}) {
    *array = MovedBy(*array, queries.Begin(seq) - seq);
    array->shape[0] = args.batch;
  }
  return rows;
}

// The arguments, all of which are checked before anything is written, the plan, and the threads that it is worth. Each
// array of indices is int32 or int64 by itself; here it is as kernels read it. There is an lse, and a tree_mask, be one
// given or not.
template <typename Spec, typename Given = AttendParameters>
class AttendCall {
 private:
  const DefaultFloatingPoint state_;

 public:
  Threads threads;
  AttendArguments args;

 private:
  const ConvertedTable block_table_;
  const Converted<int32_t> context_lens_, query_start_loc_;

 public:
  const Queries queries;

 private:
  const Positions positions_;

 public:
  const AttendPlan<Spec> plan;
  const Partials<Spec> partials;

  explicit AttendCall(const Inputs& in)
      : threads(CheckThreads<Given>(in)),
        args(CheckAttend<Spec, Given>(in)),
        block_table_(args.block_table),
        context_lens_(args.context_lens),
        query_start_loc_(args.query_start_loc),
        queries(CheckedQueries()),
        positions_(queries),
        plan(queries, threads.limit),
        partials(plan.num_partials, plan.num_merges, [&](int64_t merge) { return plan.ItemsOf(merge); }),
        unused_lse_(call_workspace, args.has_lse() ? 0 : args.query.shape[0] * Spec::kNumHeads) {
    if (!args.has_lse()) args.lse = Array(unused_lse_.data(), {args.query.shape[0], Spec::kNumHeads});
    args.positions = positions_.Of(args.query.shape[0]);
    threads.limit = plan.num_threads;
  }

  // Keys that the nth query token of an item may see.
  int64_t NumKeys(const AttendItem& item, int64_t nth) const {
    return queries.SeesAhead() ? queries.context_lens[item.seq] : item.first_pos + nth + 1;
  }

 private:
  Queries CheckedQueries() {
    const BlockTable& table = args.block_table;
    CheckRowStarts(table, block_table_.to().row_starts);
    CheckLengths(
        args.context_lens, args.query_start_loc, [&](int64_t seq) { return table.Capacity(seq, Spec::kBlockSize); },
        args.query.shape[0], context_lens_.to(), query_start_loc_.to());
    args.context_lens = context_lens_.array, args.query_start_loc = query_start_loc_.array;
    const Queries checked = {static_cast<const int32_t*>(args.context_lens.tensor.data),
                             static_cast<const int32_t*>(args.query_start_loc.tensor.data), args.batch, args.causal,
                             static_cast<const uint8_t*>(args.tree_mask.tensor.data)};
    CheckQueries<Spec>(args, checked, block_table_.to().entries);
    args.block_table = block_table_.AsRead(args.batch);
    if (!args.has_tree()) args.tree_mask = UnusedMask();
    return checked;
  }

  const Borrowed<float> unused_lse_;
};

// attend_plan: the work items that attend would run, as PlanText has those of decode. The lines of items of several
// query tokens have the numbers of kAttendPlanFields.
template <typename Spec>
void AttendPlanText(const Inputs& in, TVMFFIAny* result) {
  using Given = AttendPlanParameters;
  const ArgumentCheck<Spec> check{in, 0};
  const Array given_lens = check.Indices(Given::kContextLens, kInt32, {-1}, "batch");
  const int64_t batch = given_lens.shape[0], threads = in.Int(Given::kNumThreads);
  const Array given_starts = check.Indices(Given::kQueryStartLoc, kInt32, {batch + 1});
  const Converted<int32_t> lens(given_lens), starts(given_starts);
  // Decode takes a sequence of no tokens; where these are its items too, so does a plan.
  CheckLengths(
      given_lens, given_starts, [](int64_t) { return kMaxContextLen; }, -1, lens.to(), starts.to(),
      kIsInvariant<Spec> ? 1 : 0);
  const Queries queries = {static_cast<const int32_t*>(lens.array.tensor.data),
                           static_cast<const int32_t*>(starts.array.tensor.data), batch, true, nullptr};
  const AttendPlan<Spec> plan(queries, threads);
  PlanLines lines(plan.num_dealt);
  for (int64_t i = 0; i < plan.num_dealt; ++i) {
    if (const WorkItem* one = plan.OfDecode(i)) {
      lines.Add(*one, kPlanFields);
    } else {
      lines.Add(plan.item(i), kAttendPlanFields);
    }
  }
  lines.Return(result);
}

}  // namespace pa
