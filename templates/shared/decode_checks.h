// The arguments of decode. For Spec see caches.h; Given has decode's parameters.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>

#include "shared/block_table.h"
#include "shared/caches.h"
#include "shared/overlap.h"

namespace pa {

// The scale of scores in two factors, so that products of queries with keys are about as large as the scores that come
// of them. query is a power of two up to 1, by which queries are multiplied, exactly, when they are loaded. scores is
// the rest: from 1 to 2, more where the scale itself is, less where it is below the normal numbers of float32.
struct Scale {
  float query, scores;
};

// wide_range: whether products of elements can come near the ends of float32; where not, all of the scale is scores.
inline Scale SplitScale(double scale, bool wide_range) {
  if (!wide_range) return {1, static_cast<float>(scale)};
  if (scale == 0) return {0, 0};
  float power = std::max(std::abs(static_cast<float>(scale)), std::numeric_limits<float>::min());
  uint32_t bits;
  __builtin_memcpy(&bits, &power, sizeof(bits));
  bits &= 0xFF800000;  // its exponent alone
  __builtin_memcpy(&power, &bits, sizeof(bits));
  power = std::min(power, 1.0f);
  return {power, static_cast<float>(scale / power)};
}

struct DecodeArguments {
  Array query;
  Cache<Keys> key_cache;
  Cache<Values> value_cache;
  BlockTable block_table;
  Array context_lens, out, lse;  // lse.tensor.data is nullptr where none was given
  Array alibi_slopes, sinks;     // where the spec has alibi, and sinks
  Cache<KeyScales> key_scale;    // where its caches hold codes
  Cache<ValueScales> value_scale;
  int64_t batch, num_blocks;
  Scale scale;

  bool has_lse() const { return lse.tensor.data != nullptr; }
  // Of a sequence, once the lengths are as kernels read them.
  int64_t ContextLen(int64_t seq) const { return static_cast<const int32_t*>(context_lens.tensor.data)[seq]; }
};

// out of decode. Where its heads are given side by side, in rows of num_heads * value_dim, this is a view that tells
// them apart.
template <typename Spec, typename Given>
Array CheckOut(const ArgumentCheck<Spec>& check, int64_t batch) {
  constexpr int64_t kHeads = Spec::kNumHeads, kDim = Spec::kValueDim;
  if (check.in.Tensor(Given::kOut).ndim != 2) return check(Given::kOut, Spec::kOutDType, {batch, kHeads, kDim});
  Array out = check(Given::kOut, Spec::kOutDType, {batch, kHeads * kDim});
  out.tensor.ndim = 3;
  out.shape[1] = kHeads, out.strides[1] = kDim;
  out.shape[2] = kDim, out.strides[2] = 1;
  return out;
}

// What decode writes has no byte of an input.
inline void CheckNotWritten(const DecodeArguments& args, const Named& input) {
  CheckNoOverlap("out", args.out, input.name, *input.array);
  if (args.has_lse()) CheckNoOverlap("lse", args.lse, input.name, *input.array);
}

// What decode writes has no byte of what it reads, and no two elements in one place.
inline void CheckWritten(const DecodeArguments& args, const Array& key_cache, const Array& value_cache) {
  CheckDistinctElements("out", args.out);
  if (args.has_lse()) {
    CheckDistinctElements("lse", args.lse);
    CheckNoOverlap("lse", args.lse, "out", args.out);
  }
  const bool is_pair = args.block_table.is_pair;
  for (const Named& input :
       {Named{"query", &args.query}, Named{"key_cache", &key_cache}, Named{"value_cache", &value_cache},
        Named{is_pair ? "block_table[1]" : "block_table", &args.block_table.entries},
        Named{"context_lens", &args.context_lens}}) {
    CheckNotWritten(args, input);
  }
  if (is_pair) CheckNotWritten(args, {"block_table[0]", &args.block_table.row_starts});
}

// An array with a number for each query head, which decode takes where the spec has it (kHas).
template <bool kHas, typename Spec>
Array CheckHeads(const ArgumentCheck<Spec>& check, const Parameter& of, const char* has_no,
                 const DecodeArguments& args) {
  if constexpr (kHas) {
    const Array heads = check(of, kFloat32, {Spec::kNumHeads});
    CheckNotWritten(args, {of.name, &heads});
    return heads;
  } else {
    check.None(of, has_no);
    return {};
  }
}

// All but query and the indices, which may not be for this CPU to read, of a call that has num_rows query tokens and
// args.batch sequences.
template <typename Spec, typename Given>
void CheckAttention(const ArgumentCheck<Spec>& check, int64_t num_rows, DecodeArguments& args) {
  const Inputs& in = check.in;
  const double scale = in.Float(Given::kScale);
  Array key_cache, value_cache;
  CheckCaches<Spec, Given>(check, &key_cache, &value_cache);
  args.num_blocks = key_cache.shape[0];
  args.block_table = CheckTable<Spec, Given>(check, args.batch);
  args.context_lens = check.Indices(Given::kContextLens, kInt32, {args.batch});
  args.out = CheckOut<Spec, Given>(check, num_rows);
  if (!in.IsNone(Given::kLse)) args.lse = check(Given::kLse, kFloat32, {num_rows, Spec::kNumHeads});
  if (!(std::abs(static_cast<float>(scale)) <= std::numeric_limits<float>::max())) {
    Raise("ValueError", "%s: expected a finite float32, got %g", Given::kScale.name, scale);
  }
  args.scale = SplitScale(scale, Spec::kWideRange);
  CheckWritten(args, key_cache, value_cache);
  args.alibi_slopes = CheckHeads<Spec::kAlibi>(check, Given::kAlibiSlopes, "no alibi", args);
  args.sinks = CheckHeads<Spec::kSinks>(check, Given::kSinks, "no sinks", args);
  const auto key_scale = CheckScales<KeyScales>(check, Given::kKeyScale, args.num_blocks);
  const auto value_scale = CheckScales<ValueScales>(check, Given::kValueScale, args.num_blocks);
  if constexpr (kHasScales<Spec>) {
    CheckNotWritten(args, {"key_scale", &key_scale.memory});
    CheckNotWritten(args, {"value_scale", &value_scale.memory});
    args.key_scale = AsSpan(key_scale), args.value_scale = AsSpan(value_scale);
  }
  const Caches caches = AsCaches<Spec>(key_cache, value_cache);
  args.key_cache = caches.keys, args.value_cache = caches.values;
}

template <typename Spec, typename Given>
DecodeArguments CheckDecode(const Inputs& in) {
  const ArgumentCheck<Spec> check{in, in.Int(Given::kAsUint16)};
  DecodeArguments args;
  args.query = check(Given::kQuery, Spec::kDType, {-1, Spec::kNumHeads, Spec::kHeadDim}, "batch");
  args.batch = args.query.shape[0];
  CheckAttention<Spec, Given>(check, args.batch, args);
  return args;
}

}  // namespace pa
