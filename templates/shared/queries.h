// The query tokens of ragged calls: which of them are a sequence's, and which keys they see. For Spec see caches.h, and
//   SeenKeys(length, query_end)   where Spec::kWindow is negative: the union of intervals that has the keys which a
//   query
//                                 token at position query_end - 1 sees of the first `length` ones of its sequence.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "shared/window.h"

namespace pa {

// Whether single query tokens are taken as several of a sequence are: Spec::kInvariant, of a Spec that has it.
template <typename Spec, typename = void>
constexpr bool kIsInvariant = false;
template <typename Spec>
constexpr bool kIsInvariant<Spec, std::enable_if_t<Spec::kInvariant>> = true;

// The query tokens of a call, of which those of a sequence are the last of its context. Arrays as kernels read them,
// checked.
struct Queries {
  const int32_t* context_lens;     // [batch]
  const int32_t* query_start_loc;  // [batch + 1]
  int64_t batch;
  bool causal;
  const uint8_t* tree_mask;  // which of its sequence's query tokens each one sees; nullptr: those up to itself, or,
                             // where the call is not causal, all
  const int32_t* first_keys = nullptr;  // [batch]: the keys before are those of a prefix; nullptr: none are
  const int32_t* positions = nullptr;   // [num_tokens]. Where they are given, sequences are prefixes, whose query
                                        // tokens are those of several sequences, all of them after the prefix

  int64_t Begin(int64_t seq) const { return query_start_loc[seq]; }
  int64_t Count(int64_t seq) const { return Begin(seq + 1) - Begin(seq); }
  // The position of a sequence's first query token.
  int64_t FirstPos(int64_t seq) const { return context_lens[seq] - Count(seq); }
  // That of a query token of it, the nth.
  int64_t Position(int64_t seq, int64_t nth) const {
    return positions == nullptr ? FirstPos(seq) + nth : positions[Begin(seq) + nth];
  }
  int64_t FirstKey(int64_t seq) const { return first_keys == nullptr ? 0 : first_keys[seq]; }
  bool OfPrefixes() const { return positions != nullptr; }
  // Whether all that is computed for a sequence's query tokens is partial results.
  bool LeavesPartials(int64_t seq) const { return OfPrefixes() || FirstKey(seq) > 0; }
  // Whether a query token may see keys after its own position.
  bool SeesAhead() const { return !causal || tree_mask != nullptr; }
  // Whether a sequence has one query token, which sees what that of decode sees and is taken as there; tree_start: of
  // its mask.
  template <typename Spec>
  bool IsDecode(int64_t seq, int64_t tree_start) const {
    return !kIsInvariant<Spec> && Count(seq) == 1 && !OfPrefixes() &&
           (tree_mask == nullptr || tree_mask[tree_start] != 0);
  }
};

// The intervals of keys that a query token sees of the first `length` ones of its sequence.
template <typename Spec>
constexpr auto SeenKeys(int64_t length, int64_t query_end) {
  if constexpr (Spec::kWindow < 0) {
    return Spec::SeenKeys(length, query_end);
  } else {
    return Intervals<1>{{{SeenKeys<Spec>(query_end).at[0].begin, length}}};
  }
}

// What some of a sequence's query tokens see together, `count` of them from the nth on: of each interval from where the
// first of them begins to where the last one ends. Keys between may be seen by none of them.
template <typename Spec>
struct SeenTogether : Runs<Spec::kBlockSize, sizeof(SeenKeys<Spec>(0, 0)) / sizeof(Interval)> {
  SeenTogether(const Queries& queries, int64_t seq, int64_t nth, int64_t count) {
    constexpr int kCount = SeenTogether::kMost;
    Interval hulls[kCount] = {};
    const int64_t context_len = queries.context_lens[seq], first_key = queries.FirstKey(seq);
    // Without a mask the first one begins first, and the last one ends last.
    const int64_t step = Spec::kWindow < 0 || queries.OfPrefixes() ? 1 : std::max<int64_t>(count - 1, 1);
    for (int64_t token = nth; token < nth + count; token += step) {
      const int64_t query_end = queries.Position(seq, token) + 1,
                    length = queries.SeesAhead() ? context_len : query_end;
      const auto seen = SeenKeys<Spec>(length, query_end);
      for (int i = 0; i < kCount; ++i) {
        const Interval keys = {std::max(seen.at[i].begin, first_key), std::min({seen.at[i].end, length, context_len})};
        if (keys.end <= keys.begin) continue;
        const bool is_first = hulls[i].end == 0;
        hulls[i] = is_first ? keys : Interval{std::min(hulls[i].begin, keys.begin), std::max(hulls[i].end, keys.end)};
      }
    }
    for (const Interval& hull : hulls) this->Add(hull);
  }
};

// The logical blocks that hold these keys.
template <typename Spec>
constexpr Interval BlocksOf(const Interval& keys) {
  if (keys.end <= keys.begin) return {0, 0};
  return {keys.begin / Spec::kBlockSize, (keys.end - 1) / Spec::kBlockSize + 1};
}

}  // namespace pa
