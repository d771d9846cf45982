// Calls of kernels, by the names of their parameters.
#pragma once

#include <tvm/ffi/c_api.h>

#include <cstdint>
#include <new>
#include <type_traits>

#include "shared/arrays.h"
#include "shared/caches.h"

namespace pa {

// Arrays and numbers as kernels take them.
inline TVMFFIAny Packed(const Array& array) {
  TVMFFIAny any{};
  any.type_index = kTVMFFIDLTensorPtr;
  any.v_ptr = const_cast<DLTensor*>(&array.tensor);
  return any;
}

inline TVMFFIAny Packed(int64_t value) {
  TVMFFIAny any{};
  any.type_index = kTVMFFIInt;
  any.v_int64 = value;
  return any;
}

inline TVMFFIAny Packed(float value) {
  TVMFFIAny any{};
  any.type_index = kTVMFFIFloat;
  any.v_float64 = value;
  return any;
}

template <template <typename> typename Stride, typename Of>
TVMFFIAny Packed(Stride<Of> stride) {
  return Packed(stride.elements);
}

// One argument of a kernel, of this type and no other: numbers are not converted, nor one kind of stride to another.
template <typename Value>
struct Passed {
  TVMFFIAny any;

  Passed(const Value& value) : any(Packed(value)) {}
  template <typename Other>
  Passed(const Other&) = delete;
};

// A kernel as TVM compiles it.
using KernelFunction = int(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);

// Call a kernel with its arguments: a struct of them, each Passed, in the kernel's order.
template <typename Kernel>
void Call(const Kernel& arguments) {
  static_assert(std::is_standard_layout_v<Kernel> && sizeof(Kernel) % sizeof(TVMFFIAny) == 0);
  const auto* first = reinterpret_cast<const TVMFFIAny*>(&arguments);
  TVMFFIAny result{};
  const int status = Kernel::kFunction(nullptr, first, sizeof(Kernel) / sizeof(TVMFFIAny), &result);
  if (status != 0) throw std::bad_alloc();  // it was given no scratch
}

}  // namespace pa
