// A call of merge_states as the kernels take it. For Spec see caches.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/floating_point.h"
#include "cpu/interface.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "shared/merge_checks.h"

namespace pa {

// The arguments, all of which are checked before anything is written. There is an lse, be one given or not.
template <typename Spec>
class MergeCall {
  const DefaultFloatingPoint state_;
  const Threads threads_;

 public:
  MergeArguments args;

  explicit MergeCall(const Inputs& in)
      : threads_(CheckThreads<MergeStatesParameters>(in)),
        args(CheckMerge<Spec, MergeStatesParameters>(in)),
        unused_lse_(call_workspace, args.has_lse() ? 0 : args.num_tokens * Spec::kNumHeads) {
    if (!args.has_lse()) args.lse = Array(unused_lse_.data(), {args.num_tokens, Spec::kNumHeads});
  }

  bool in_float32() const { return Same(args.outs.tensor.dtype, kFloat32); }
  // Run merge(token) for all tokens, each once; a thread takes at least some tokens at a time.
  template <typename Merge>
  void ForTokens(const Merge& merge) const {
    constexpr int64_t kBytes = int64_t{1} << 18;  // of outs, which one thread reads in some 20 us
    const int64_t token_bytes = args.num_parts * Spec::kNumHeads * Spec::kValueDim * (args.outs.tensor.dtype.bits / 8);
    const int64_t tokens = std::max<int64_t>(kBytes / token_bytes, 1);
    ParallelFor((args.num_tokens - 1 + tokens) / tokens, threads_, [&](int64_t i) {
      const int64_t end = std::min((i + 1) * tokens, args.num_tokens);
      for (int64_t token = i * tokens; token < end; ++token) merge(token);
    });
  }

 private:
  const Borrowed<float> unused_lse_;
};

}  // namespace pa
