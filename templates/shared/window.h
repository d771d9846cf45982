// Which keys the query token of a sequence, its last, sees. For Spec see caches.h.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pa {

// Positions of keys, or blocks, from begin to end - 1; none where end is not beyond begin.
struct Interval {
  int64_t begin, end;
};

template <int kCount>
struct Intervals {
  Interval at[kCount];
};

// The quotient rounded down; divisor > 0.
constexpr int64_t FloorDivide(int64_t dividend, int64_t divisor) {
  return dividend / divisor - (dividend % divisor < 0 ? 1 : 0);
}

// What is seen of a sequence of context_len tokens: all keys where Spec::kWindow is 0, the last kWindow ones where it
// is positive, and otherwise those in the union of Spec::SeenKeys(context_len), as far as the sequence has them.
template <typename Spec>
constexpr auto SeenKeys(int64_t context_len) {
  if constexpr (Spec::kWindow < 0) {
    return Spec::SeenKeys(context_len);
  } else {
    const int64_t begin = Spec::kWindow == 0 ? 0 : std::max<int64_t>(context_len - Spec::kWindow, 0);
    return Intervals<1>{{{begin, context_len}}};
  }
}

// The logical blocks that hold the keys of up to kIntervals intervals. Those between and before them may have been
// freed: their ids are neither read nor checked.
template <int64_t kBlockSize, int kIntervals>
struct Runs {
  static constexpr int kMost = kIntervals;

  Interval keys = {0, 0};       // from the first key to the last
  Interval blocks[kMost] = {};  // ascending, with blocks between them
  int count = 0;

  // One interval more: with those that it meets it becomes one.
  constexpr void Add(Interval added) {
    if (added.end <= added.begin) return;
    keys = count == 0 ? added : Interval{std::min(keys.begin, added.begin), std::max(keys.end, added.end)};
    added = {added.begin / kBlockSize, (added.end - 1) / kBlockSize + 1};
    int kept = 0;
    for (int i = 0; i < count; ++i) {
      if (blocks[i].end < added.begin || added.end < blocks[i].begin) {
        blocks[kept++] = blocks[i];
      } else {
        added = {std::min(blocks[i].begin, added.begin), std::max(blocks[i].end, added.end)};
      }
    }
    int at = kept;
    for (; at > 0 && added.begin < blocks[at - 1].begin; --at) blocks[at] = blocks[at - 1];
    blocks[at] = added;
    count = kept + 1;
  }
};

// Those that the query token of a sequence sees, from first_key on.
template <typename Spec>
struct Seen : Runs<Spec::kBlockSize, sizeof(SeenKeys<Spec>(0)) / sizeof(Interval)> {
  explicit constexpr Seen(int64_t context_len, int64_t first_key = 0) {
    const auto seen = SeenKeys<Spec>(context_len);
    for (const Interval& each : seen.at) this->Add({std::max(each.begin, first_key), std::min(each.end, context_len)});
  }
};

}  // namespace pa
