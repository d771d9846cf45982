// The entry points beside decode and append_kv.
#pragma once

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "cpu/converted.h"
#include "cpu/cpu_set.h"
#include "cpu/interface.h"
#include "cpu/kernel_call.h"
#include "cpu/openmp.h"
#include "cpu/plan.h"
#include "shared/caches.h"
#include "shared/ffi.h"
#include "shared/indices.h"

namespace pa {

// The text of a plan, one line an item.
class PlanLines {
 public:
  explicit PlanLines(int64_t count) : text_(call_workspace, count * kMostBytes), end_(text_.data()) {}

  template <typename Item, size_t kCount>
  void Add(const Item& item, int64_t Item::* const (&fields)[kCount]) {
    static_assert(kCount * 21 <= kMostBytes);
    for (int64_t Item::* field : fields) end_ += std::sprintf(end_, "%" PRId64 " ", item.*field);
    end_[-1] = '\n';
  }
  void Return(TVMFFIAny* result) const { ReturnText(text_.data(), end_ - text_.data(), result); }

 private:
  static constexpr int64_t kMostBytes = 12 * 21 + 1;

  const Borrowed<char> text_;
  char* end_;
};

// plan: the work items that decode would run, in the order in which they are dealt out, as text: one line an item, with
// the numbers of kPlanFields.
template <typename Spec>
void PlanText(const Inputs& in, TVMFFIAny* result) {
  const Array given = ArgumentCheck<Spec>{in, 0}.Indices(PlanParameters::kContextLens, kInt32, {-1}, "batch");
  const Converted<int32_t> lens(given);
  for (int64_t seq = 0; seq < given.shape[0]; ++seq) {
    const int32_t context_len = CheckContextLen(seq, IndexAt(given, seq), kMaxContextLen);
    if (lens.to() != nullptr) lens.to()[seq] = context_len;
  }
  const Plan<Spec> plan(static_cast<const int32_t*>(lens.array.tensor.data), given.shape[0]);
  PlanLines lines(plan.num_items);
  for (int64_t i = 0; i < plan.num_items; ++i) lines.Add(plan.item(i), kPlanFields);
  lines.Return(result);
}

// cpu_set: the number by which decode and append_kv are told these CPUs, int32 [count], ascending.
template <typename Spec>
void MakeCpuSet(const Inputs& in, TVMFFIAny* result) {
  const Array cpus = ArgumentCheck<Spec>{in, 0}(CpuSetParameters::kCpus, kInt32, {-1}, "count");
  if (cpus.empty()) Raise("ValueError", "cpus: expected one CPU at least, got none");
  *result = Packed(CpuSet::NumberOf(static_cast<const int32_t*>(cpus.tensor.data), cpus.shape[0]));
}

// openmp: the path of the OpenMP runtime whose team a call from this thread would run on, or "".
inline void OpenMPText(const Inputs&, TVMFFIAny* result) {
  const OpenMP* runtime = Team(false);
  const char* path = runtime == nullptr ? "" : runtime->path;
  ReturnText(path, std::strlen(path), result);
}

// view_as_bfloat16: the same memory, declared bfloat16 instead of uint16.
inline void ViewAsBFloat16(const Inputs& in, TVMFFIAny* result) {
  constexpr Parameter kTensor = ViewAsBfloat16Parameters::kTensor;
  DLTensor view = in.Tensor(kTensor);
  if (!Same(view.dtype, kUint16)) {
    Raise("TypeError", "%s: expected dtype uint16, got %s", kTensor.name, DTypeText(view.dtype).c_str());
  }
  view.dtype = kBfloat16;
  TVMFFIObjectHandle handle = nullptr;
  if (TVMFFITensorCreateUnsafeView(in.Object(kTensor), &view, &handle) != 0) throw std::bad_alloc();
  result->type_index = kTVMFFITensor;
  result->v_obj = static_cast<TVMFFIObject*>(handle);
}

}  // namespace pa
