// The query tokens of attend on a GPU: how many a sequence may have, and errors about them.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cstdint>

#include "cuda/call.h"
#include "cuda/interface.h"
#include "shared/attend_checks.h"
#include "shared/errors.h"

namespace pa {

constexpr int64_t kMaxQueries = int64_t{1} << 25;  // of a call: keeps what kernels count of trees within int32

// The indices of attend, by this CPU: of copies, for which the stream is waited for. table: as the caller gave it.
template <typename Spec>
void CheckQueriesOnHost(const Call& call, const BlockTable& table, const AttendArguments& args) {
  const HostCopy entries(call, table.entries), context_lens(call, args.context_lens);
  const HostCopy query_start_loc(call, args.query_start_loc);
  const HostCopy row_starts(call, table.is_pair ? table.row_starts : Array());
  const HostCopy tree_mask(call, args.has_tree() ? args.tree_mask : Array());
  PA_DRIVER(cuStreamSynchronize, call.stream);
  AttendArguments copied = args;
  copied.block_table = {entries.array, table.is_pair ? row_starts.array : table.row_starts, table.is_pair};
  CheckRowStarts(copied.block_table, nullptr);
  CheckLengths(
      context_lens.array, query_start_loc.array,
      [&](int64_t seq) { return copied.block_table.Capacity(seq, Spec::kBlockSize); }, args.query.shape[0], nullptr,
      nullptr);
  const Queries queries = {static_cast<const int32_t*>(context_lens.array.tensor.data),
                           static_cast<const int32_t*>(query_start_loc.array.tensor.data), args.batch, args.causal,
                           args.has_tree() ? static_cast<const uint8_t*>(tree_mask.array.tensor.data) : nullptr};
  for (int64_t seq = 0; seq < args.batch; ++seq) {
    if (queries.Count(seq) <= kMostQueries) continue;
    RaiseQueries(seq, queries.Begin(seq), queries.Begin(seq + 1), kMostQueries);
  }
  CheckQueries<Spec>(copied, queries, nullptr);
}

}  // namespace pa
