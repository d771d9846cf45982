// The plan of a call of attend_shared_prefix: prefixes with the query tokens of all their sequences, the sequences' own
// keys, and what is merged for each query token. For Spec see attend_plan.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/attend_plan.h"
#include "cpu/parallel.h"
#include "cpu/positions.h"
#include "cpu/scratch.h"

namespace pa {

// The query tokens of a call as those of its sequences, which have keys of their own, and as those of its prefixes.
// Arrays are as kernels read them, checked: lengths of prefixes, and the sequences that each has.
class SharedQueries {
  const Borrowed<int32_t> first_keys_, token_starts_;

 public:
  const Queries own;
  const Positions positions;
  const Queries of_prefixes;

  SharedQueries(const Queries& given, const int32_t* prefix_len, const int32_t* prefix_start_loc, int64_t num_prefixes)
      : first_keys_(call_workspace, given.batch),
        token_starts_(call_workspace, num_prefixes + 1),
        own{given.context_lens, given.query_start_loc, given.batch, true, nullptr, first_keys_.data(), nullptr},
        positions(given),
        of_prefixes{prefix_len, token_starts_.data(), num_prefixes, true, nullptr, nullptr, positions.data()} {
    token_starts_.data()[0] = 0;
    for (int64_t prefix = 0; prefix < num_prefixes; ++prefix) {
      const int64_t begin = prefix_start_loc[prefix], end = prefix_start_loc[prefix + 1];
      std::fill(first_keys_.data() + begin, first_keys_.data() + end, prefix_len[prefix]);
      token_starts_.data()[prefix + 1] = given.query_start_loc[end];
    }
  }
};

// A pure function of the lengths and of how many threads there may be. Each query token has one partial result of its
// prefix or several, of ranges in their order, and those of its own keys, as decode cuts them; where a sequence has
// several query tokens, one. So no bit of a result depends on the batch or the threads.
template <typename Spec>
class SharedPlan {
 public:
  const AttendPlan<Spec> prefixes, own;
  const int64_t num_dealt, num_partials, num_threads;

  SharedPlan(const SharedQueries& queries, int64_t most_threads)
      : prefixes(queries.of_prefixes, most_threads),
        own(queries.own, most_threads),
        num_dealt(prefixes.num_dealt + own.num_dealt),
        num_partials(own.num_partials + prefixes.num_partials),
        num_threads(std::min(most_threads, prefixes.num_threads + own.num_threads - 1)),
        num_tokens_(queries.own.Begin(queries.own.batch)),
        of_tokens_(call_workspace, num_tokens_) {
    std::fill_n(of_tokens_.data(), num_tokens_, TokenPartials{});
    for (int64_t i = 0; i < prefixes.num_dealt; ++i) {
      const AttendItem item = PrefixItem(i);
      for (int64_t nth = 0; nth < item.num_query; ++nth) {
        of_tokens_.data()[item.token_begin + nth].shared = item.PartialsOf(nth).own;
      }
    }
    for (int64_t i = 0; i < own.num_dealt; ++i) AddOwn(queries.own, i);
  }

  // An item of a prefix: its slots are behind those of sequences' own keys.
  AttendItem PrefixItem(int64_t i) const {
    AttendItem item = prefixes.item(i);
    item.partial_start += own.num_partials, item.merge_start += own.num_partials;
    return item;
  }
  // merge(token, partials) for all query tokens that have partial results, each once; a thread takes some at a time.
  template <typename Merge>
  void ForTokens(const Threads& threads, const Merge& merge) const {
    constexpr int64_t kBytes = int64_t{1} << 17;  // of partial results, which one thread reads in some 10 us
    constexpr int64_t kTokens = std::max<int64_t>(kBytes / (8 * Spec::kNumHeads * (Spec::kValueDim + 2)), 1);
    ParallelFor((num_tokens_ + kTokens - 1) / kTokens, threads, [&](int64_t i) {
      const int64_t end = std::min((i + 1) * kTokens, num_tokens_);
      for (int64_t token = i * kTokens; token < end; ++token) {
        const TokenPartials& partials = of_tokens_.data()[token];
        if (partials.count() > 0) merge(token, partials);
      }
    });
  }

 private:
  // What item i of sequences' own keys leaves.
  void AddOwn(const Queries& queries, int64_t i) {
    if (const WorkItem* one = own.OfDecode(i)) {
      for (int64_t seq = one->batch_start; seq < one->batch_start + one->num_seqs; ++seq) {
        of_tokens_.data()[queries.Begin(seq)].own = {own.decode.partial_begin(seq), 1, own.decode.partials_of(seq)};
      }
      return;
    }
    const AttendItem& item = own.item(i);
    if (item.partial_start < 0) return;
    for (int64_t nth = 0; nth < item.num_query; ++nth) {
      of_tokens_.data()[item.token_begin + nth].own = item.PartialsOf(nth).own;
    }
  }

  const int64_t num_tokens_;
  const Borrowed<TokenPartials> of_tokens_;
};

}  // namespace pa
