// The arguments of attend. For Spec see caches.h; Given has attend's parameters.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cstdint>

#include "shared/decode_checks.h"
#include "shared/indices.h"
#include "shared/queries.h"

namespace pa {

// Rows of query, out and lse are query tokens.
struct AttendArguments : DecodeArguments {
  Array query_start_loc, tree_mask;  // tree_mask.tensor.data is nullptr where none was given
  Array positions;                   // of query tokens in their sequences, int32 [num_tokens]
  bool causal = true;

  bool has_tree() const { return tree_mask.tensor.data != nullptr; }
};

// All that ragged calls have in common, but query_start_loc and the contents of indices.
template <typename Spec, typename Given>
AttendArguments CheckRagged(const ArgumentCheck<Spec>& check) {
  AttendArguments args;
  args.query = check(Given::kQuery, Spec::kDType, {-1, Spec::kNumHeads, Spec::kHeadDim}, "num_tokens");
  const int64_t num_tokens = args.query.shape[0];
  if (num_tokens > INT32_MAX) {
    Raise("ValueError", "query: expected up to 2**31 - 1 query tokens, got %" PRId64, num_tokens);
  }
  args.batch = check.Indices(Given::kContextLens, kInt32, {-1}, "batch").shape[0];
  CheckAttention<Spec, Given>(check, num_tokens, args);
  return args;
}

template <typename Spec, typename Given>
void CheckQueryStartLoc(const ArgumentCheck<Spec>& check, AttendArguments& args) {
  args.query_start_loc = check.Indices(Given::kQueryStartLoc, kInt32, {args.batch + 1});
  CheckNotWritten(args, {"query_start_loc", &args.query_start_loc});
}

// All but the contents of indices.
template <typename Spec, typename Given>
AttendArguments CheckAttend(const Inputs& in) {
  const ArgumentCheck<Spec> check{in, in.Int(Given::kAsUint16)};
  AttendArguments args = CheckRagged<Spec, Given>(check);
  CheckQueryStartLoc<Spec, Given>(check, args);
  args.causal = in.Int(Given::kCausal) != 0;
  if (in.IsNone(Given::kTreeMask)) return args;
  const DLDataType given = in.Tensor(Given::kTreeMask).dtype;
  if (!Same(given, kBool) && !Same(given, kUint8)) {
    Raise("TypeError", "tree_mask: expected dtype bool or uint8, got %s", DTypeText(given).c_str());
  }
  args.tree_mask = check(Given::kTreeMask, given, {-1}, "the sum of n * n");
  args.tree_mask.tensor.dtype = kUint8;
  CheckNotWritten(args, {"tree_mask", &args.tree_mask});
  if (!args.causal) Raise("ValueError", "tree_mask: expected causal=True beside it, got causal=False");
  return args;
}

// Lengths within what there are blocks for, and query tokens that are the last of their sequences; of a sequence of no
// tokens up to `of_none`. Those that are int64 go to lens_to and starts_to.
template <typename CapacityOf>
void CheckLengths(const Array& context_lens, const Array& query_start_loc, const CapacityOf& capacity_of,
                  int64_t num_tokens, int32_t* lens_to, int32_t* starts_to, int64_t of_none = 0) {
  const int64_t batch = context_lens.shape[0];
  int64_t begin = IndexAt(query_start_loc, 0);
  if (begin != 0) Raise("ValueError", "query_start_loc: expected 0 first, got %" PRId64, begin);
  if (starts_to != nullptr) starts_to[0] = 0;
  for (int64_t seq = 0; seq < batch; ++seq) {
    const int64_t context_len = CheckContextLen(seq, IndexAt(context_lens, seq), capacity_of(seq));
    const int64_t end = IndexAt(query_start_loc, seq + 1);
    if (end < begin) {
      Raise("ValueError",
            "query_start_loc: expected numbers that never fall, got %" PRId64 " after %" PRId64 " at position %" PRId64,
            end, begin, seq + 1);
    }
    if (end - begin > std::max<int64_t>(context_len, of_none)) {
      Raise("ValueError",
            "query_start_loc: expected up to %" PRId64 " query tokens of sequence %" PRId64
            ", its tokens in context_lens, got %" PRId64,
            context_len, seq, end - begin);
    }
    if (lens_to != nullptr) lens_to[seq] = static_cast<int32_t>(context_len);
    if (starts_to != nullptr) starts_to[seq + 1] = static_cast<int32_t>(end);
    begin = end;
  }
  if (num_tokens >= 0 && begin != num_tokens) {
    Raise("ValueError", "query_start_loc: expected num_tokens last, %" PRId64 ", got %" PRId64, num_tokens, begin);
  }
}

// A mask of [n, n] for each sequence of n query tokens, and ids within the cache of all blocks that its query tokens
// see together. Those of sequences without query tokens are not looked at.
template <typename Spec>
void CheckQueries(const AttendArguments& args, const Queries& queries, int32_t* table_to) {
  int64_t tree_end = 0;
  for (int64_t seq = 0; seq < queries.batch; ++seq) tree_end += queries.Count(seq) * queries.Count(seq);
  if (args.has_tree() && args.tree_mask.shape[0] != tree_end) {
    Raise("ValueError",
          "tree_mask: expected shape [%" PRId64 "], n * n for each sequence of n query tokens, got [%" PRId64 "]",
          tree_end, args.tree_mask.shape[0]);
  }
  int64_t tree_start = 0;
  for (int64_t seq = 0; seq < queries.batch; ++seq) {
    const int64_t count = queries.Count(seq), context_len = queries.context_lens[seq];
    if (count > 0 && queries.IsDecode<Spec>(seq, tree_start)) {
      CheckRuns(args.block_table, seq, Seen<Spec>(context_len, queries.FirstKey(seq)), args.num_blocks, table_to);
    } else if (count > 0) {
      const SeenTogether<Spec> seen(queries, seq, 0, count);
      CheckRuns(args.block_table, seq, seen, args.num_blocks, table_to);
    }
    tree_start += count * count;
  }
}

}  // namespace pa
