// The arguments of merge_states. For Spec see caches.h; Given has merge_states' parameters.
#pragma once

#include <cinttypes>
#include <cstdint>

#include "shared/caches.h"
#include "shared/decode_checks.h"
#include "shared/overlap.h"

namespace pa {

struct MergeArguments {
  Array outs, lses, out, lse;  // lse.tensor.data is nullptr where none was given
  int64_t num_parts, num_tokens;

  bool has_lse() const { return lse.tensor.data != nullptr; }
};

template <typename Spec, typename Given>
MergeArguments CheckMerge(const Inputs& in) {
  const ArgumentCheck<Spec> check{in, in.Int(Given::kAsUint16)};
  const bool in_float32 = Same(in.Tensor(Given::kOuts).dtype, kFloat32);
  MergeArguments args;
  args.outs =
      check(Given::kOuts, in_float32 ? kFloat32 : Spec::kOutDType, {-1, -1, Spec::kNumHeads, Spec::kValueDim}, "any");
  args.num_parts = args.outs.shape[0], args.num_tokens = args.outs.shape[1];
  if (args.num_parts < 1) Raise("ValueError", "outs: expected one part at least, got none");
  if (args.num_parts > INT32_MAX || args.num_tokens > INT32_MAX) {
    Raise("ValueError", "outs: expected up to 2**31 - 1 parts and tokens, got %" PRId64 " and %" PRId64, args.num_parts,
          args.num_tokens);
  }
  args.lses = check(Given::kLses, kFloat32, {args.num_parts, args.num_tokens, Spec::kNumHeads});
  args.out = CheckOut<Spec, Given>(check, args.num_tokens);
  CheckDistinctElements("out", args.out);
  if (!in.IsNone(Given::kLse)) {
    args.lse = check(Given::kLse, kFloat32, {args.num_tokens, Spec::kNumHeads});
    CheckDistinctElements("lse", args.lse);
    CheckNoOverlap("lse", args.lse, "out", args.out);
  }
  for (const Named& input : {Named{"outs", &args.outs}, Named{"lses", &args.lses}}) {
    CheckNoOverlap("out", args.out, input.name, *input.array);
    if (args.has_lse()) CheckNoOverlap("lse", args.lse, input.name, *input.array);
  }
  return args;
}

}  // namespace pa
