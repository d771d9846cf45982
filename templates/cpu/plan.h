// The plan of a call: which work items there are. A Spec has kBlockSize, kWindow, and
//   kSplitBlocks   blocks of one range of a long sequence,
//   kBatchChunk    sequences, of which a work item keeps to one chunk,
//   kItemTokens    tokens after which a work item takes no further sequence.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/scratch.h"
#include "shared/window.h"

namespace pa {

// What one thread computes at a time: all heads of consecutive sequences of one chunk, of each what its query sees of
// the blocks [block_begin, block_end).
struct WorkItem {
  int64_t batch_start, num_seqs;
  int64_t block_begin, block_end;
  int64_t partial_start;  // slot of the first sequence's partial result; -1 where the kernels write out and lse
  int64_t num_tokens;     // KV tokens that it reads
};

// Slots of partial results: so many, one `step` after another.
struct Slots {
  int64_t start, step, count;
};

// The partial results of one query token, in the order in which they are merged: those of a prefix that its sequence
// shares, and those of its own keys.
struct TokenPartials {
  Slots shared, own;

  int64_t count() const { return shared.count + own.count; }
};

// Whether sequences are cut at multiples of kSplitBlocks, as attend cuts them: Spec::kCutsAlike, of a Spec that has it.
template <typename Spec, typename = void>
constexpr bool kCutsAlike = false;
template <typename Spec>
constexpr bool kCutsAlike<Spec, std::enable_if_t<Spec::kCutsAlike>> = true;

// How the blocks of a sequence that its query sees are cut into ranges: those of each run of blocks into ranges of
// equal numbers of them, or, where it cuts alike, at fixed positions. By the sequence's own length alone. Where
// sequences are not cut, there is one range, from the first such block to the last.
template <typename Spec>
struct Cut {
  static constexpr bool kIsCut = Spec::kSplitBlocks < INT64_MAX;

  Seen<Spec> seen;
  Interval runs[Seen<Spec>::kMost] = {};
  int64_t steps[Seen<Spec>::kMost] = {1};       // blocks of a range of each run
  int64_t run_ranges[Seen<Spec>::kMost] = {1};  // ranges of each run
  int64_t num_ranges = 1;

  explicit Cut(int64_t context_len, int64_t first_key = 0) : seen(context_len, first_key) {
    if (seen.count == 0) return;
    num_ranges = 0;
    const int num_runs = kIsCut ? seen.count : 1;
    for (int run = 0; run < num_runs; ++run) {
      runs[run] = {seen.blocks[run].begin, seen.blocks[kIsCut ? run : seen.count - 1].end};
      const int64_t blocks = runs[run].end - Origin(run), splits = (blocks - 1) / Spec::kSplitBlocks + 1;
      steps[run] = kCutsAlike<Spec> ? Spec::kSplitBlocks : (blocks - 1) / splits + 1;
      run_ranges[run] = (blocks - 1) / steps[run] + 1;
      num_ranges += run_ranges[run];
    }
  }
  // The blocks of a range.
  Interval Range(int64_t i) const {
    int run = 0;
    for (; i >= run_ranges[run]; ++run) i -= run_ranges[run];
    const int64_t begin = Origin(run) + i * steps[run];
    return {std::max(begin, runs[run].begin), std::min(begin + steps[run], runs[run].end)};
  }
  // The block that the ranges of a run are counted from.
  int64_t Origin(int run) const {
    return kCutsAlike<Spec> ? runs[run].begin / Spec::kSplitBlocks * Spec::kSplitBlocks : runs[run].begin;
  }
  // The tokens that are read of them.
  int64_t Tokens(const Interval& range) const {
    int64_t tokens = 0;
    for (int run = 0; run < seen.count; ++run) {
      const int64_t begin = std::max(range.begin, seen.blocks[run].begin) * Spec::kBlockSize;
      const int64_t end = std::min(range.end, seen.blocks[run].end) * Spec::kBlockSize;
      tokens += std::max<int64_t>(std::min(end, seen.keys.end) - std::max(begin, seen.keys.begin), 0);
    }
    return tokens;
  }
  // Partial results that are to be merged.
  int64_t num_partials() const { return num_ranges == 1 ? 0 : num_ranges; }
};

template <typename Spec, typename Takes>
int64_t CountRanges(const int32_t* context_lens, int64_t batch, const Takes& takes, const int32_t* first_keys) {
  int64_t count = 0;
  for (int64_t seq = 0; seq < batch; ++seq) {
    if (takes(seq)) count += Cut<Spec>(context_lens[seq], first_keys == nullptr ? 0 : first_keys[seq]).num_ranges;
  }
  return count;
}

// A pure function of the lengths. Since a sequence's ranges depend on its own length alone, its result is the same in
// any batch; how sequences share items only balances the work. Sequence b has the partial results partial_begin[b] to
// partial_begin[b + 1].
template <typename Spec>
class Plan {
 public:
  Plan(const int32_t* context_lens, int64_t batch) : Plan(context_lens, batch, [](int64_t) { return true; }) {}
  // Of those sequences alone that it takes; of each the keys from first_keys on, where they are not nullptr. Where keys
  // are left out, all results are partial.
  template <typename Takes>
  Plan(const int32_t* context_lens, int64_t batch, const Takes& takes, const int32_t* first_keys = nullptr)
      : partial_begin_(call_workspace, batch + 1),
        items_(call_workspace, CountRanges<Spec>(context_lens, batch, takes, first_keys)) {
    WorkItem* const first = items_.data();
    WorkItem* const last = AddItems(context_lens, batch, takes, first_keys, first);
    for (const WorkItem* item = first; item != last; ++item) num_tokens += item->num_tokens;
    // Longest first, for any number of threads.
    std::sort(first, last, [](const WorkItem& a, const WorkItem& b) {
      if (a.num_tokens != b.num_tokens) return a.num_tokens > b.num_tokens;
      return a.batch_start != b.batch_start ? a.batch_start < b.batch_start : a.block_begin < b.block_begin;
    });
    num_items = last - first;
  }

  const WorkItem& item(int64_t i) const { return items_.data()[i]; }
  int64_t partial_begin(int64_t seq) const { return partial_begin_.data()[seq]; }
  int64_t partials_of(int64_t seq) const { return partial_begin(seq + 1) - partial_begin(seq); }
  TokenPartials PartialsOf(int64_t seq) const { return {{}, {partial_begin(seq), 1, partials_of(seq)}}; }

  int64_t num_partials = 0, num_items = 0;
  int64_t num_tokens = 0;  // of all items together

 private:
  // Write partial_begin and the items, in order; return their end.
  template <typename Takes>
  WorkItem* AddItems(const int32_t* context_lens, int64_t batch, const Takes& takes, const int32_t* first_keys,
                     WorkItem* items) {
    WorkItem* end = items;
    int64_t open_key = 0;     // the first key of the last item's sequences
    bool open_whole = false;  // whether it has all ranges of them
    for (int64_t seq = 0; seq < batch; ++seq) {
      partial_begin_.data()[seq] = num_partials;
      if (!takes(seq)) continue;
      const int64_t first_key = first_keys == nullptr ? 0 : first_keys[seq];
      const Cut<Spec> cut(context_lens[seq], first_key);
      const int64_t partials = first_key > 0 ? cut.num_ranges : cut.num_partials();
      for (int64_t i = 0; i < cut.num_ranges; ++i) {
        const auto [begin, stop] = cut.Range(i);
        const int64_t tokens = cut.Tokens({begin, stop});
        WorkItem* open = end == items ? nullptr : end - 1;
        const bool joins = cut.num_ranges == 1 && seq % Spec::kBatchChunk != 0 && open != nullptr && open_whole &&
                           open_key == first_key && open->batch_start + open->num_seqs == seq &&
                           open->num_tokens + tokens <= Spec::kItemTokens;
        if (joins) {
          // An empty sequence has no block to begin at.
          if (tokens > 0) open->block_begin = open->num_tokens > 0 ? std::min(open->block_begin, begin) : begin;
          open->num_seqs += 1;
          open->num_tokens += tokens;
          open->block_end = std::max(open->block_end, stop);
        } else {
          *end++ = {seq, 1, begin, stop, partials == 0 ? -1 : num_partials + i, tokens};
          open_key = first_key, open_whole = cut.num_ranges == 1;
        }
      }
      num_partials += partials;
    }
    partial_begin_.data()[batch] = num_partials;
    return end;
  }

  Borrowed<int64_t> partial_begin_;  // [batch + 1]
  Borrowed<WorkItem> items_;
};

}  // namespace pa
