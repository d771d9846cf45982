// The arguments of attend_shared_prefix. For Spec see caches.h; Given has its parameters.
#pragma once

#include <cinttypes>
#include <cstdint>

#include "shared/attend_checks.h"

namespace pa {

// Prefix p has the first prefix_len[p] tokens of the sequences prefix_start_loc[p] to prefix_start_loc[p + 1] - 1, in
// the blocks of row p of table.
struct PrefixArguments : AttendArguments {
  BlockTable prefix_table;
  Array prefix_len, prefix_start_loc;  // .tensor.data is nullptr where none was given, as that of query_start_loc

  int64_t num_prefixes() const { return prefix_len.shape[0]; }
};

// prefix_table; that of one prefix may be its row.
template <typename Spec, typename Given>
Array CheckPrefixTable(const ArgumentCheck<Spec>& check) {
  if (check.in.Tensor(Given::kPrefixTable).ndim != 1) {
    return check.Indices(Given::kPrefixTable, kInt32, {-1, -1}, "any");
  }
  Array table = check.Indices(Given::kPrefixTable, kInt32, {-1}, "max_blocks");
  table.tensor.ndim = 2;
  table.shape[1] = table.shape[0], table.strides[1] = 1;
  table.shape[0] = 1, table.strides[0] = 0;
  return table;
}

// Without prefix_start_loc all sequences have one prefix.
inline void CheckOnePrefix(int64_t num_prefixes) {
  if (num_prefixes != 1) {
    Raise("ValueError", "prefix_start_loc: expected an array, or one prefix, got None with %" PRId64 " prefixes",
          num_prefixes);
  }
}

// All but the contents of indices.
template <typename Spec, typename Given>
PrefixArguments CheckSharedPrefix(const Inputs& in) {
  const ArgumentCheck<Spec> check{in, in.Int(Given::kAsUint16)};
  PrefixArguments args;
  static_cast<AttendArguments&>(args) = CheckRagged<Spec, Given>(check);
  if (!in.IsNone(Given::kQueryStartLoc)) {
    CheckQueryStartLoc<Spec, Given>(check, args);
  } else if (args.query.shape[0] != args.batch) {
    Raise("ValueError",
          "query_start_loc: expected an array, or as many query tokens as sequences, got None with %" PRId64
          " query tokens and %" PRId64 " sequences",
          args.query.shape[0], args.batch);
  }
  args.prefix_table = {CheckPrefixTable<Spec, Given>(check), NoRowStarts(), false, true};
  const int64_t prefixes = args.prefix_table.entries.shape[0];
  args.prefix_len = check.Indices(Given::kPrefixLen, kInt32, {prefixes});
  CheckNotWritten(args, {"prefix_table", &args.prefix_table.entries});
  CheckNotWritten(args, {"prefix_len", &args.prefix_len});
  if (!in.IsNone(Given::kPrefixStartLoc)) {
    args.prefix_start_loc = check.Indices(Given::kPrefixStartLoc, kInt32, {prefixes + 1});
    CheckNotWritten(args, {"prefix_start_loc", &args.prefix_start_loc});
  } else {
    CheckOnePrefix(prefixes);
  }
  return args;
}

// Prefixes of whole blocks, each no longer than its row. Those that are int64 go to `to`.
inline void CheckPrefixLens(const Array& prefix_len, int64_t capacity, int64_t block_size, int32_t* to) {
  for (int64_t prefix = 0; prefix < prefix_len.shape[0]; ++prefix) {
    const int64_t len = IndexAt(prefix_len, prefix);
    if (len < 0 || len > capacity) {
      Raise("ValueError", "prefix_len: expected a length from 0 to %" PRId64 " for prefix %" PRId64 ", got %" PRId64,
            capacity, prefix, len);
    }
    if (len % block_size != 0) {
      Raise("ValueError",
            "prefix_len: expected whole blocks of %" PRId64 " tokens for prefix %" PRId64 ", got %" PRId64 " tokens",
            block_size, prefix, len);
    }
    if (to != nullptr) to[prefix] = static_cast<int32_t>(len);
  }
}

// Each sequence has one prefix. Those that are int64 go to `to`.
inline void CheckPrefixStartLoc(const Array& prefix_start_loc, int64_t batch, int32_t* to) {
  int64_t before = 0;
  for (int64_t i = 0; i < prefix_start_loc.shape[0]; ++i) {
    const int64_t start = IndexAt(prefix_start_loc, i);
    if (i == 0 && start != 0) Raise("ValueError", "prefix_start_loc: expected 0 first, got %" PRId64, start);
    if (start < before) {
      Raise("ValueError",
            "prefix_start_loc: expected numbers that never fall, got %" PRId64 " after %" PRId64
            " at position %" PRId64,
            start, before, i);
    }
    if (start > batch) {
      Raise("ValueError",
            "prefix_start_loc: expected numbers up to %" PRId64 ", the sequences, got %" PRId64 " at position %" PRId64,
            batch, start, i);
    }
    if (to != nullptr) to[i] = static_cast<int32_t>(start);
    before = start;
  }
  if (before != batch) Raise("ValueError", "prefix_start_loc: expected %" PRId64 " last, got %" PRId64, batch, before);
}

// The query tokens of all sequences are after their prefixes.
inline void CheckAfterPrefixes(const Queries& queries, const int32_t* prefix_start_loc, int64_t num_prefixes) {
  for (int64_t prefix = 0; prefix < num_prefixes; ++prefix) {
    for (int64_t seq = prefix_start_loc[prefix]; seq < prefix_start_loc[prefix + 1]; ++seq) {
      const int64_t count = queries.Count(seq), len = queries.FirstKey(seq);
      if (count == 0 || queries.context_lens[seq] >= len + count) continue;
      Raise("ValueError",
            "context_lens: expected at least %" PRId64 " for sequence %" PRId64 ", %" PRId64
            " tokens of prefix %" PRId64 " and %" PRId64 " query tokens after it, got %" PRId32,
            len + count, seq, len, prefix, count, queries.context_lens[seq]);
    }
  }
}

// Ids within the cache of all blocks of prefixes that query tokens see.
template <typename Spec>
void CheckPrefixBlocks(const BlockTable& table, const Queries& of_prefixes, int64_t num_blocks, int32_t* to) {
  for (int64_t prefix = 0; prefix < of_prefixes.batch; ++prefix) {
    const int64_t count = of_prefixes.Count(prefix);
    if (count > 0) CheckRuns(table, prefix, SeenTogether<Spec>(of_prefixes, prefix, 0, count), num_blocks, to);
  }
}

}  // namespace pa
