// Which keys the query token of a sequence, its last, sees. For Spec see caches.h.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pa {

// Position of the first key that is seen: all keys are where Spec::kWindow is 0, otherwise the last kWindow ones.
template <typename Spec>
constexpr int64_t FirstSeen(int64_t context_len) {
  return Spec::kWindow == 0 ? 0 : std::max<int64_t>(context_len - Spec::kWindow, 0);
}

// The logical block that holds it. Those before it may have been freed: their ids are neither read nor checked.
template <typename Spec>
constexpr int64_t FirstBlock(int64_t context_len) {
  return FirstSeen<Spec>(context_len) / Spec::kBlockSize;
}

}  // namespace pa
