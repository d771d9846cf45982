// The query tokens of ragged calls: which of them are a sequence's, and which keys they see. For Spec see caches.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "shared/window.h"

namespace pa {

// The query tokens of a call, of which those of a sequence are the last of its context. Arrays as kernels read them,
// checked.
struct Queries {
  const int32_t* context_lens;     // [batch]
  const int32_t* query_start_loc;  // [batch + 1]
  int64_t batch;
  bool causal;
  const uint8_t* tree_mask;  // which of its sequence's query tokens each one sees; nullptr: those up to itself, or,
                             // where the call is not causal, all

  int64_t Begin(int64_t seq) const { return query_start_loc[seq]; }
  int64_t Count(int64_t seq) const { return Begin(seq + 1) - Begin(seq); }
  // The position of a sequence's first query token.
  int64_t FirstPos(int64_t seq) const { return context_lens[seq] - Count(seq); }
  // Whether a query token may see keys after its own position.
  bool SeesAhead() const { return !causal || tree_mask != nullptr; }
  // Whether a sequence has one query token, which sees what that of decode sees; tree_start: of its mask.
  bool IsDecode(int64_t seq, int64_t tree_start) const {
    return Count(seq) == 1 && (tree_mask == nullptr || tree_mask[tree_start] != 0);
  }
};

// The keys from the first that is seen by one of a sequence's query tokens, those at the positions begin to end - 1, to
// the last. Those between may be seen by none of them. A query token with a mask sees no key after itself.
template <typename Spec>
Interval KeysSeen(int64_t begin, int64_t end, [[maybe_unused]] int64_t context_len, [[maybe_unused]] bool sees_ahead) {
  if constexpr (Spec::kWindow >= 0) {
    return {SeenKeys<Spec>(begin + 1).at[0].begin, sees_ahead ? context_len : end};
  } else {
    Interval keys = {0, 0};
    for (int64_t pos = begin; pos < end; ++pos) {
      const Interval seen = Seen<Spec>(pos + 1).keys;
      if (seen.end == 0) continue;
      keys = keys.end == 0 ? seen : Interval{std::min(keys.begin, seen.begin), std::max(keys.end, seen.end)};
    }
    return keys;
  }
}

// The logical blocks that hold these keys.
template <typename Spec>
constexpr Interval BlocksOf(const Interval& keys) {
  if (keys.end <= keys.begin) return {0, 0};
  return {keys.begin / Spec::kBlockSize, (keys.end - 1) / Spec::kBlockSize + 1};
}

}  // namespace pa
