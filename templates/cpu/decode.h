// A call of decode as the kernels take it. For Spec see caches.h and plan.h, and kThreadTokens: KV tokens of work items
// that are worth one more thread. Given has decode's parameters.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/converted.h"
#include "cpu/floating_point.h"
#include "cpu/interface.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cpu/scratch.h"
#include "shared/decode_checks.h"
#include "shared/indices.h"

namespace pa {

// The arguments, all of which are checked before anything is written, the plan, and the threads that it is worth. Each
// array of indices is int32 or int64 by itself; here it is as kernels read it. There is an lse, be one given or not.
template <typename Spec, typename Given = DecodeParameters>
class DecodeCall {
 private:
  const DefaultFloatingPoint state_;

 public:
  Threads threads;
  DecodeArguments args;

 private:
  const ConvertedTable block_table_;
  const Converted<int32_t> context_lens_;

 public:
  const Plan<Spec> plan;

  explicit DecodeCall(const Inputs& in)
      : threads(CheckThreads<Given>(in)),
        args(CheckDecode<Spec, Given>(in)),
        block_table_(args.block_table),
        context_lens_(args.context_lens),
        plan(CheckedLens(), args.batch),
        unused_lse_(call_workspace, args.has_lse() ? 0 : args.batch * Spec::kNumHeads) {
    if (!args.has_lse()) args.lse = Array(unused_lse_.data(), {args.batch, Spec::kNumHeads});
    threads.limit = std::min(threads.limit, plan.num_tokens / Spec::kThreadTokens + 1);
  }

 private:
  const int32_t* CheckedLens() {
    CheckIndices<Spec>(args.block_table, args.context_lens, args.num_blocks, context_lens_.to(), block_table_.to());
    args.block_table = block_table_.AsRead(args.batch), args.context_lens = context_lens_.array;
    return static_cast<const int32_t*>(args.context_lens.tensor.data);
  }

  const Borrowed<float> unused_lse_;
};

}  // namespace pa
