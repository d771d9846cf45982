// A call of attend_shared_prefix as the kernels take it. For Spec see decode.h and attend_plan.h; Given has its
// parameters.
#pragma once

#include <cstdint>
#include <numeric>

#include "cpu/attend.h"
#include "cpu/converted.h"
#include "cpu/entry_points.h"
#include "cpu/floating_point.h"
#include "cpu/interface.h"
#include "cpu/parallel.h"
#include "cpu/partials.h"
#include "cpu/scratch.h"
#include "cpu/shared_plan.h"
#include "shared/prefix_checks.h"

namespace pa {

// Indices that were not given: numbers that count up from 0, or 0 and another one.
class Counted {
 public:
  Counted(Array& given, int64_t count, int64_t step) : memory_(call_workspace, count) {
    if (given.tensor.data != nullptr) return;
    for (int64_t i = 0; i < count; ++i) memory_.data()[i] = static_cast<int32_t>(i * step);
    given = InOneAxis(memory_.data(), kInt32, count);
  }

 private:
  const Borrowed<int32_t> memory_;
};

inline const int32_t* Int32s(const Converted<int32_t>& converted) {
  return static_cast<const int32_t*>(converted.array.tensor.data);
}

// The arguments, all of which are checked before anything is written, the plan, and the threads that it is worth. There
// is an lse, be one given or not.
template <typename Spec, typename Given>
class SharedPrefixCall {
 private:
  const DefaultFloatingPoint state_;

 public:
  Threads threads;
  PrefixArguments args;              // of sequences and their own keys
  AttendArguments of_prefixes = {};  // the same of prefixes

 private:
  const Counted one_token_each_, one_prefix_;
  const ConvertedTable block_table_, prefix_table_;
  const Converted<int32_t> context_lens_, query_start_loc_, prefix_len_, prefix_start_loc_;

 public:
  const SharedQueries queries;
  const SharedPlan<Spec> plan;
  const Partials<Spec> partials;

  explicit SharedPrefixCall(const Inputs& in)
      : threads(CheckThreads<Given>(in)),
        args(CheckSharedPrefix<Spec, Given>(in)),
        one_token_each_(args.query_start_loc, args.batch + 1, 1),
        one_prefix_(args.prefix_start_loc, 2, args.batch),
        block_table_(args.block_table),
        prefix_table_(args.prefix_table),
        context_lens_(args.context_lens),
        query_start_loc_(args.query_start_loc),
        prefix_len_(args.prefix_len),
        prefix_start_loc_(args.prefix_start_loc),
        queries(CheckedLengths(), Int32s(prefix_len_), Int32s(prefix_start_loc_), args.num_prefixes()),
        plan((CheckBlocks(), queries), threads.limit),
        partials(plan.num_partials, 0, [](int64_t) { return 0; }),
        unused_lse_(call_workspace, args.has_lse() ? 0 : args.query.shape[0] * Spec::kNumHeads) {
    if (!args.has_lse()) args.lse = Array(unused_lse_.data(), {args.query.shape[0], Spec::kNumHeads});
    args.context_lens = context_lens_.array;
    args.positions = queries.positions.Of(args.query.shape[0]);
    args.tree_mask = UnusedMask();
    args.block_table = block_table_.AsRead(args.batch);
    of_prefixes = args;
    of_prefixes.block_table = prefix_table_.AsRead(args.num_prefixes());
    of_prefixes.context_lens = prefix_len_.array;
    threads.limit = plan.num_threads;
  }

 private:
  // Lengths and starts, as kernels read them.
  Queries CheckedLengths() {
    const BlockTable& table = args.block_table;
    CheckRowStarts(table, block_table_.to().row_starts);
    CheckLengths(
        args.context_lens, args.query_start_loc, [&](int64_t seq) { return table.Capacity(seq, Spec::kBlockSize); },
        args.query.shape[0], context_lens_.to(), query_start_loc_.to());
    CheckPrefixLens(args.prefix_len, args.prefix_table.Capacity(0, Spec::kBlockSize), Spec::kBlockSize,
                    prefix_len_.to());
    CheckPrefixStartLoc(args.prefix_start_loc, args.batch, prefix_start_loc_.to());
    return {Int32s(context_lens_), Int32s(query_start_loc_), args.batch, true, nullptr};
  }
  void CheckBlocks() {
    CheckAfterPrefixes(queries.own, Int32s(prefix_start_loc_), args.num_prefixes());
    CheckPrefixBlocks<Spec>(args.prefix_table, queries.of_prefixes, args.num_blocks, prefix_table_.to().entries);
    CheckQueries<Spec>(args, queries.own, block_table_.to().entries);
  }

  const Borrowed<float> unused_lse_;
};

// shared_prefix_plan: the work items that attend_shared_prefix would run, as AttendPlanText has those of attend. The
// lines of prefixes have the numbers of kPrefixPlanFields.
template <typename Spec>
void SharedPrefixPlanText(const Inputs& in, TVMFFIAny* result) {
  using Given = SharedPrefixPlanParameters;
  const ArgumentCheck<Spec> check{in, 0};
  const Array given_lens = check.Indices(Given::kContextLens, kInt32, {-1}, "batch");
  const Array given_prefixes = check.Indices(Given::kPrefixLen, kInt32, {-1}, "prefixes");
  const int64_t batch = given_lens.shape[0], prefixes = given_prefixes.shape[0], threads = in.Int(Given::kNumThreads);
  Array given_starts, given_groups;
  if (!in.IsNone(Given::kQueryStartLoc)) given_starts = check.Indices(Given::kQueryStartLoc, kInt32, {batch + 1});
  if (!in.IsNone(Given::kPrefixStartLoc)) given_groups = check.Indices(Given::kPrefixStartLoc, kInt32, {prefixes + 1});
  if (given_groups.tensor.data == nullptr) CheckOnePrefix(prefixes);
  const Counted one_token_each(given_starts, batch + 1, 1), one_prefix(given_groups, 2, batch);
  const Converted<int32_t> lens(given_lens), starts(given_starts), of_prefixes(given_prefixes), groups(given_groups);
  CheckLengths(given_lens, given_starts, [](int64_t) { return kMaxContextLen; }, -1, lens.to(), starts.to());
  CheckPrefixLens(given_prefixes, kMaxContextLen, Spec::kBlockSize, of_prefixes.to());
  CheckPrefixStartLoc(given_groups, batch, groups.to());
  const Queries given = {Int32s(lens), Int32s(starts), batch, true, nullptr};
  const SharedQueries queries(given, Int32s(of_prefixes), Int32s(groups), prefixes);
  CheckAfterPrefixes(queries.own, Int32s(groups), prefixes);
  const SharedPlan<Spec> plan(queries, threads);
  PlanLines lines(plan.num_dealt);
  for (int64_t i = 0; i < plan.prefixes.num_dealt; ++i) lines.Add(plan.PrefixItem(i), kPrefixPlanFields);
  for (int64_t i = 0; i < plan.own.num_dealt; ++i) {
    if (const WorkItem* one = plan.own.OfDecode(i)) {
      lines.Add(*one, kPlanFields);
    } else {
      lines.Add(plan.own.item(i), kAttendPlanFields);
    }
  }
  lines.Return(result);
}

}  // namespace pa
