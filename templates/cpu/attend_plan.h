// The plan of a call of attend: its work items, by the work that they are. For Spec see plan.h, and
//   kRangeBlocks   blocks of one range: where the keys of several query tokens are cut, whatever the query tokens,
//   kAttendRows    rows of a row tile: query tokens with one head each, of one kv head,
//   kAttendTiles   row tiles of a work item,
//   kAttendHeads   kv heads of a work item.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "cpu/plan.h"
#include "cpu/scratch.h"
#include "shared/queries.h"

namespace pa {

constexpr int64_t kItemsOfThread = 2;  // items that a thread has at least, where work can be divided
constexpr int64_t kFlopsOfByte = 8;    // FLOPs that take as long as to read a byte
constexpr int64_t kMostPartialFloats = int64_t{1} << 24;

// What one thread computes at a time: some query tokens of a sequence with the heads of some kv heads, over the blocks
// [block_begin, block_end).
struct AttendItem {
  int64_t seq, token_begin, num_query;
  int64_t first_pos;  // the position of query token token_begin in its sequence
  int64_t kv_head_begin, num_kv_heads;
  int64_t block_begin, block_end;
  int64_t range_begin;    // the block from which on the kernels count ranges and tiles: that of block_begin's range
  int64_t work;           // how long it takes, in FLOPs, be it to compute or to read
  int64_t partial_start;  // slot of the partial result of token_begin, before those of the others; -1 where the kernels
                          // write out and lse
  int64_t merge, merge_start, num_ranges;  // of these tokens: the number of their merge, its first slot, their ranges
  int64_t tree_start, tree_size;  // where the row of token_begin is in tree_mask, -1 without one, and of what length

  // The partial results of its nth query token, where it leaves such.
  TokenPartials PartialsOf(int64_t nth) const { return {{}, {merge_start + nth, num_query, num_ranges}}; }
};

// The largest of the fewest parts of a count that are about equal, and no larger than most.
constexpr int64_t EvenShare(int64_t count, int64_t most) {
  const int64_t parts = (count - 1) / most + 1;
  return (count - 1) / parts + 1;
}

// How many query tokens of a sequence an item takes with how many kv heads: as many tokens as fill its row tiles, whole
// tiles of them, and as many heads as there is room for then.
template <typename Spec>
struct Shares {
  int64_t tokens, heads;

  explicit Shares(int64_t num_query) {
    constexpr int64_t kWhole =
        Spec::kAttendRows / std::gcd(Spec::kAttendRows, Spec::kGroup);  // tokens that fill row tiles
    constexpr int64_t kFit = std::max<int64_t>(Spec::kAttendTiles * Spec::kAttendRows / Spec::kGroup, 1);
    constexpr int64_t kMost = kFit < kWhole ? kFit : kFit / kWhole * kWhole;
    tokens = std::min(kMost, (EvenShare(num_query, kMost) - 1) / kWhole * kWhole + kWhole);
    const int64_t tiles = (std::min(tokens, num_query) * Spec::kGroup - 1) / Spec::kAttendRows + 1;
    heads = EvenShare(Spec::kNumKVHeads, std::clamp<int64_t>(Spec::kAttendTiles / tiles, 1, Spec::kAttendHeads));
  }
};

// How long so many query tokens of one item take over these keys: a row tile computes the keys up to the last one that
// its last token sees.
template <typename Spec>
int64_t WorkOf(const AttendItem& item, const Interval& keys, bool sees_ahead) {
  constexpr int64_t kDim = Spec::kHeadDim + Spec::kValueDim;
  constexpr int64_t kTokenBytes = (Spec::kSharedKV ? Spec::kHeadDim : kDim) * (Spec::kDType.bits / 8);
  if (keys.end <= keys.begin) return 0;
  const int64_t rows = item.num_query * Spec::kGroup;
  int64_t computed = 0;
  for (int64_t row = 0; row < rows; row += Spec::kAttendRows) {
    const int64_t last = item.first_pos + (std::min(row + Spec::kAttendRows, rows) - 1) / Spec::kGroup;
    computed += std::max<int64_t>((sees_ahead ? keys.end : std::min(last + 1, keys.end)) - keys.begin, 0);
  }
  const int64_t flops = 2 * kDim * Spec::kAttendRows * computed, bytes = (keys.end - keys.begin) * kTokenBytes;
  return item.num_kv_heads * std::max(flops, kFlopsOfByte * bytes);
}

// A pure function of the lengths, of how many threads there may be, and of which single query tokens are as those of
// decode: `decode` plans these. Of prefixes it plans the items of all query tokens after them. How query tokens and
// heads share items, and whether one item or several take the ranges of a token's keys, only balances the work: no bit
// of a result depends on it. Partial results take up to kMostPartialFloats, whatever the lengths.
template <typename Spec>
class AttendPlan {
 public:
  AttendPlan(const Queries& queries, int64_t most_threads)
      : queries_(queries),
        tree_starts_(call_workspace, queries.batch),
        decode(
            queries.context_lens, TreeStarts(), [&](int64_t seq) { return IsDecode(seq); }, queries.first_keys),
        num_threads(Measure(most_threads)),
        items_(call_workspace, num_items),
        merge_items_(call_workspace, num_merges - queries.batch),
        dealt_(call_workspace, num_items + decode.num_items) {
    VisitItems([&](const AttendItem& item, int64_t merge_items) {
      items_.data()[num_dealt++] = item;
      if (merge_items > 0) merge_items_.data()[item.merge - queries_.batch] = merge_items;
    });
    Deal();
  }

  // What is dealt as number i, the longest first: an item of decode, or else, where that is nullptr, item(i).
  const WorkItem* OfDecode(int64_t i) const {
    const int64_t at = dealt_.data()[i] - num_items;
    return at < 0 ? nullptr : &decode.item(at);
  }
  const AttendItem& item(int64_t i) const { return items_.data()[dealt_.data()[i]]; }
  // Work items that a merge waits for. The first merges are those of decode's sequences, by their numbers.
  int64_t ItemsOf(int64_t merge) const {
    return merge < queries_.batch ? decode.partials_of(merge) : merge_items_.data()[merge - queries_.batch];
  }

 private:
  const Queries queries_;
  const Borrowed<int64_t> tree_starts_;  // [batch]
  int64_t num_items = 0;                 // of several query tokens
  int64_t target_ = INT64_MAX;           // of the work of one of them

 public:
  const Plan<Spec> decode;
  int64_t num_partials = 0, num_merges = 0, num_dealt = 0;
  const int64_t num_threads;  // that the work is worth

 private:
  static constexpr int64_t kTokenFlops = 2 * Spec::kNumHeads * (Spec::kHeadDim + Spec::kValueDim);

  // Where the mask of each sequence begins. Returns the batch.
  int64_t TreeStarts() const {
    int64_t start = 0;
    for (int64_t seq = 0; seq < queries_.batch; ++seq) {
      tree_starts_.data()[seq] = start;
      start += queries_.Count(seq) * queries_.Count(seq);
    }
    return queries_.batch;
  }
  bool IsDecode(int64_t seq) const { return queries_.template IsDecode<Spec>(seq, tree_starts_.data()[seq]); }

  // How many threads the work is worth, and how many items it is then divided into.
  int64_t Measure(int64_t most_threads) {
    double work = static_cast<double>(decode.num_tokens) * kTokenFlops;
    VisitItems([&](const AttendItem& item, int64_t) { work += static_cast<double>(item.work); });
    const double worth = work / static_cast<double>(Spec::kThreadTokens * kTokenFlops) + 1;
    const int64_t threads = worth < static_cast<double>(most_threads) ? static_cast<int64_t>(worth) : most_threads;
    if (threads > 1) target_ = static_cast<int64_t>(work / static_cast<double>(threads * kItemsOfThread));
    VisitItems([&](const AttendItem&, int64_t) { ++num_items; });
    return threads;
  }

  // visit(item, 0) for all items of several query tokens in order; or, where they leave partial results, the number of
  // those that are merged together.
  template <typename Visit>
  void VisitItems(const Visit& visit) {
    num_partials = decode.num_partials, num_merges = queries_.batch;
    for (int64_t seq = 0; seq < queries_.batch; ++seq) {
      const int64_t count = queries_.Count(seq);
      if (count == 0 || IsDecode(seq) || (queries_.OfPrefixes() && queries_.context_lens[seq] == 0)) continue;
      const Shares<Spec> shares(count);
      for (int64_t first = 0; first < count; first += shares.tokens) {
        AttendItem item = {};
        item.seq = seq, item.token_begin = queries_.Begin(seq) + first, item.first_pos = queries_.Position(seq, first);
        item.num_query = std::min(shares.tokens, count - first), item.num_kv_heads = shares.heads;
        item.tree_start = queries_.tree_mask == nullptr ? -1 : tree_starts_.data()[seq] + first * count;
        item.tree_size = count;
        VisitTokens(item, visit);
      }
    }
  }

  // The same for the query tokens of an item, which has all but its heads and blocks.
  template <typename Visit>
  void VisitTokens(AttendItem item, const Visit& visit) {
    constexpr int64_t kFloats = Spec::kNumHeads * (Spec::kValueDim + 2);
    const int64_t base = queries_.FirstKey(item.seq) / Spec::kBlockSize;
    const Interval keys =
        SeenTogether<Spec>(queries_, item.seq, item.token_begin - queries_.Begin(item.seq), item.num_query).keys;
    const Interval blocks = keys.end > keys.begin ? BlocksOf<Spec>(keys) : Interval{base, base};
    const bool sees_all = queries_.SeesAhead() || queries_.OfPrefixes();
    const int64_t work = WorkOf<Spec>(item, keys, sees_all), first = (blocks.begin - base) / Spec::kRangeBlocks;
    const int64_t ranges = std::max<int64_t>((blocks.end - base - 1) / Spec::kRangeBlocks + 1 - first, 1);
    const int64_t partials = num_partials - decode.num_partials + ranges * item.num_query;
    // What is merged with a prefix is one partial result, so that it does not depend on where it is split.
    const bool may_split = ranges > 1 && base == 0;
    const bool is_split = may_split && work > target_ && partials <= kMostPartialFloats / kFloats;
    const bool leaves_partials = is_split || queries_.LeavesPartials(item.seq);
    const double parts = static_cast<double>(is_split ? work / ranges : work) / static_cast<double>(target_);
    const int64_t heads =
        EvenShare(Spec::kNumKVHeads, parts <= 1 ? item.num_kv_heads : std::max<int64_t>(item.num_kv_heads / parts, 1));
    const int64_t merge_items = is_split ? ranges * ((Spec::kNumKVHeads - 1) / heads + 1) : 0;
    item.merge = num_merges, item.merge_start = num_partials, item.num_ranges = is_split ? ranges : 1;
    for (int64_t range = 0; range < item.num_ranges; ++range) {
      item.range_begin = base + (first + range) * Spec::kRangeBlocks;
      item.block_begin = std::max(blocks.begin, item.range_begin);
      item.block_end = is_split ? std::min(blocks.end, item.range_begin + Spec::kRangeBlocks) : blocks.end;
      item.partial_start = leaves_partials ? num_partials + range * item.num_query : -1;
      const Interval read = {std::max(keys.begin, item.block_begin * Spec::kBlockSize),
                             std::min(keys.end, item.block_end * Spec::kBlockSize)};
      for (int64_t head = 0; head < Spec::kNumKVHeads; head += heads) {
        item.kv_head_begin = head, item.num_kv_heads = std::min(heads, Spec::kNumKVHeads - head);
        item.work = WorkOf<Spec>(item, read, sees_all);
        visit(static_cast<const AttendItem&>(item), merge_items);
      }
    }
    if (is_split) ++num_merges;
    if (leaves_partials) num_partials += item.num_ranges * item.num_query;
  }

  // The longest first, of both kinds.
  void Deal() {
    constexpr int64_t kTokenBytes =
        Spec::kNumKVHeads * (Spec::kHeadDim + (Spec::kSharedKV ? 0 : Spec::kValueDim)) * (Spec::kDType.bits / 8);
    constexpr int64_t kTokenWork = std::max(kTokenFlops, kFlopsOfByte * kTokenBytes);
    int64_t* const order = dealt_.data();
    std::iota(order, order + num_items, int64_t{0});
    std::sort(order, order + num_items, [&](int64_t a, int64_t b) {
      const int64_t one = items_.data()[a].work, other = items_.data()[b].work;
      return one != other ? one > other : a < b;
    });
    // Items of decode are in their order already. From behind each finds its place among the others.
    num_dealt = num_items + decode.num_items;
    int64_t left = num_items;
    for (int64_t one = decode.num_items - 1; one >= 0; --one) {
      const int64_t work = decode.item(one).num_tokens * kTokenWork;
      for (; left > 0 && items_.data()[order[left - 1]].work < work; --left) order[left + one] = order[left - 1];
      order[left + one] = num_items + one;
    }
  }

  const Borrowed<AttendItem> items_;
  const Borrowed<int64_t> merge_items_, dealt_;
};

}  // namespace pa
