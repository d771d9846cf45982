// A call of append_kv as the kernels take it. For Spec see caches.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/converted.h"
#include "cpu/floating_point.h"
#include "cpu/interface.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "shared/append_checks.h"
#include "shared/arrays.h"
#include "shared/indices.h"

namespace pa {

// The same memory, declared unsigned integers: the kernels move bits.
inline Array AsBits(Array array) {
  array.tensor.dtype.code = kDLUInt;
  return array;
}

// New keys or values as kernels take them: as bits, or, where they make codes of them, as numbers.
template <typename Spec>
Array AsNew(const Array& array) {
  return kHasScales<Spec> ? array : AsBits(array);
}

// CheckSlotsApart on a copy of the slots.
inline void CheckSharedSlots(const Array& slot_mapping, const Sharing& sharing) {
  if (sharing.unit == 0) return;
  const int64_t count = slot_mapping.shape[0];
  const Borrowed<int64_t> slots(call_workspace, count);
  std::copy_n(static_cast<const int64_t*>(slot_mapping.tensor.data), count, slots.data());
  CheckSlotsApart(slots.data(), count, sharing);
}

constexpr int64_t kFewBytes =
    int64_t{1} << 18;  // new keys and values that one thread writes sooner than others wake up

// Whether so many new tokens are for one thread alone.
template <typename Spec>
bool AreFew(int64_t num_tokens) {
  const int64_t elements = Spec::kNumKVHeads * (Spec::kHeadDim + (Spec::kSharedKV ? 0 : Spec::kValueDim));
  return num_tokens * elements * (Spec::kDType.bits / 8) < kFewBytes;
}

// The arguments, all of which are checked before anything is written, and the threads that they are worth. Arrays are
// declared as bits. Each array of indices is int32 or int64 by itself; here it is as kernels read it.
template <typename Spec>
class AppendCall {
 public:
  explicit AppendCall(const Inputs& in)
      : threads_(CheckThreads<AppendKvParameters>(in)),
        args_(CheckAppend<Spec, AppendKvParameters>(in)),
        slots_(args_.slot_mapping),
        key(AsNew<Spec>(args_.key)),
        value(AsNew<Spec>(args_.value)),
        key_cache(AsBits(args_.key_cache)),
        value_cache(AsBits(args_.value_cache)),
        slot_mapping(slots_.array) {
    CheckSlots(args_.slot_mapping, args_.num_slots, slots_.to());
    CheckSharedSlots(slot_mapping, args_.sharing);
  }

  // Run write_key(key, key_cache, head_begin, num_heads) for all kv heads, and write_value, where one is given, for the
  // values. The work is divided by heads and never by tokens, and a kernel takes the tokens in their order: of two with
  // the same slot the later stays, at any number of threads.
  template <typename WriteKey, typename... WriteValue>
  void ForHeads(const WriteKey& write_key, const WriteValue&... write_value) const {
    const int64_t num_tokens = key.shape[0];
    if (num_tokens == 0) return;
    const bool few = AreFew<Spec>(num_tokens);
    const int64_t num_heads = few ? Spec::kNumKVHeads : 1;
    Threads threads = threads_;
    if (few) threads.limit = 1;
    constexpr int64_t kCaches = 1 + sizeof...(write_value);
    ParallelFor(kCaches * (Spec::kNumKVHeads / num_heads), threads, [&](int64_t i) {
      const int64_t head_begin = i / kCaches * num_heads;
      if (i % kCaches == 0) {
        write_key(key, key_cache, head_begin, num_heads);
      } else {
        (write_value(value, value_cache, head_begin, num_heads), ...);
      }
    });
  }

 private:
  const DefaultFloatingPoint state_;
  const Threads threads_;
  const AppendArguments args_;
  const Converted<int64_t> slots_;

 public:
  const Array key, value, key_cache, value_cache;
  const Array& slot_mapping;

  const Cache<KeyScales>& key_scale() const { return args_.key_scale; }
  const Cache<ValueScales>& value_scale() const { return args_.value_scale; }
};

}  // namespace pa
