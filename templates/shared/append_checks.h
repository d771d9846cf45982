// The arguments of append_kv. For Spec see caches.h; Given has append_kv's parameters.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cstdint>
#include <cstdlib>

#include "shared/caches.h"
#include "shared/indices.h"
#include "shared/overlap.h"

namespace pa {

// How two caches share memory, in units of so many slots: unit u of value_cache is unit u + distance of key_cache.
struct Sharing {
  int64_t unit = 0;  // 0: they share none
  int64_t distance = 0;
};

struct AppendArguments {
  Array key, value, key_cache, value_cache, slot_mapping;  // where the values are in the keys, views of those
  Cache<KeyScales> key_scale;                              // where the caches hold codes
  Cache<ValueScales> value_scale;
  Sharing sharing;
  int64_t num_slots;
};

// Key and value caches may be views of one buffer in which a block, or a slot, of the one lies beside that of the
// other. And they may be views of the same blocks, some of which hold keys and others values. Then whether two slots
// meet is for CheckSlotsApart to see; that is, where all blocks have the same size and distances, and the blocks of the
// one cache begin where those of the other do: otherwise too much would have to be compared, and they are refused.
//
// slots_apart: whether the elements of one slot lie apart from those of another, as rows do. Packed, any slot of keys
// and any one of values in a block have an element in common.
inline Sharing CheckCachesApart(const Array& key_cache, const Array& value_cache, int64_t block_size,
                                bool slots_apart) {
  if (!Overlap(key_cache, value_cache)) return {};
  const int64_t stride = key_cache.strides[0] * (key_cache.tensor.dtype.bits / 8);
  Array key_block = key_cache, value_block = value_cache;
  key_block.shape[0] = value_block.shape[0] = 1;
  const Span key(key_block), value(value_block);
  const intptr_t step = value.low - key.low;
  const bool same_blocks = stride != 0 && value_cache.strides[0] == key_cache.strides[0] && step != 0 &&
                           step % stride == 0 && key.high - key.low <= std::abs(stride) &&
                           value.high - value.low == key.high - key.low;
  if (!same_blocks) CheckNoOverlap("value_cache", value_cache, "key_cache", key_cache);
  const bool same_slots =
      slots_apart && std::equal(key_cache.strides + 1, key_cache.strides + 4, value_cache.strides + 1);
  return same_slots ? Sharing{1, step / stride * block_size} : Sharing{block_size, step / stride};
}

// No slot of value_cache is in the place of one of key_cache, of those that a call writes, which are sorted here.
inline void CheckSlotsApart(int64_t* slots, int64_t count, const Sharing& sharing) {
  std::qsort(slots, count, sizeof *slots, [](const void* a, const void* b) {
    const int64_t one = *static_cast<const int64_t*>(a), other = *static_cast<const int64_t*>(b);
    return static_cast<int>(one > other) - static_cast<int>(one < other);
  });
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = (slots[i] / sharing.unit + sharing.distance) * sharing.unit;
    if (slots[i] < 0 || first < 0) continue;
    const int64_t* const met = std::lower_bound(slots, slots + count, first);
    if (met != slots + count && *met < first + sharing.unit) {
      Raise("ValueError",
            "value_cache: expected memory apart from key_cache's in all slots that are written, got slot %" PRId64
            " in the %s of key_cache's slot %" PRId64,
            slots[i], sharing.unit == 1 ? "place" : "block", *met);
    }
  }
}

// The scales of codes, which are apart from all else where they are written, and else from what is.
template <typename Spec, typename Given>
void CheckScalesApart(const ArgumentCheck<Spec>& check, AppendArguments& args) {
  args.key_scale = CheckScales<KeyScales>(check, Given::kKeyScale, args.key_cache.shape[0]);
  args.value_scale = CheckScales<ValueScales>(check, Given::kValueScale, args.key_cache.shape[0]);
  if constexpr (kHasScales<Spec>) {
    const Named others[] = {{"key_cache", &args.key_cache},
                            {"value_cache", &args.value_cache},
                            {"key", &args.key},
                            {"value", &args.value},
                            {"slot_mapping", &args.slot_mapping}};
    const Named scales[] = {{"key_scale", &args.key_scale.memory}, {"value_scale", &args.value_scale.memory}};
    for (const Named& scale : scales) {
      for (const Named& other : others) {
        if (kTokenScales<Spec> || &other - others < 2)
          CheckNoOverlap(scale.name, *scale.array, other.name, *other.array);
      }
      if (kTokenScales<Spec>) CheckDistinctElements(scale.name, *scale.array);
    }
    if (kTokenScales<Spec>) CheckNoOverlap("value_scale", *scales[1].array, "key_scale", *scales[0].array);
    args.key_scale = AsSpan(args.key_scale), args.value_scale = AsSpan(args.value_scale);
  }
}

// All but the slots, which may not be for this CPU to read.
template <typename Spec, typename Given>
AppendArguments CheckAppend(const Inputs& in) {
  const ArgumentCheck<Spec> check{in, in.Int(Given::kAsUint16)};
  AppendArguments args;
  args.key = check(Given::kKey, Spec::kDType, {-1, Spec::kNumKVHeads, Spec::kHeadDim}, "num_tokens");
  const int64_t num_tokens = args.key.shape[0];
  if constexpr (Spec::kSharedKV) {
    check.None(Given::kValue, "shared_kv");
    args.value = args.key;
    args.value.shape[2] = Spec::kValueDim;
  } else {
    args.value = check(Given::kValue, Spec::kDType, {num_tokens, Spec::kNumKVHeads, Spec::kValueDim});
  }
  CheckCaches<Spec, Given>(check, &args.key_cache, &args.value_cache);
  args.slot_mapping = check.Indices(Given::kSlotMapping, kInt64, {num_tokens});
  CheckDistinctElements("key_cache", args.key_cache);
  args.num_slots = args.key_cache.shape[0] * Spec::kBlockSize;
  if constexpr (!Spec::kSharedKV) {
    CheckDistinctElements("value_cache", args.value_cache);
    args.sharing = CheckCachesApart(args.key_cache, args.value_cache, Spec::kBlockSize, Spec::kSlotsApart);
  }
  const Named caches[] = {{"key_cache", &args.key_cache}, {"value_cache", &args.value_cache}};
  const Named inputs[] = {{"key", &args.key}, {"value", &args.value}, {"slot_mapping", &args.slot_mapping}};
  for (const Named& cache : caches) {
    for (const Named& input : inputs) CheckNoOverlap(cache.name, *cache.array, input.name, *input.array);
  }
  CheckScalesApart<Spec, Given>(check, args);
  return args;
}

}  // namespace pa
