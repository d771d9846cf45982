// The arrays that functions of scores read: inputs of a call, and tables that are part of the library.
#pragma once

#include <cinttypes>
#include <cstdint>
#include <initializer_list>

#include "shared/decode_checks.h"

namespace pa {

constexpr int64_t kBatch = -1;  // in the shape of an input: as many as the call has sequences

// Whether elements lie side by side in C's order. Along an axis of one element nothing is stepped over.
inline bool IsContiguous(const DLTensor& given) {
  int64_t stride = 1;
  for (int i = given.ndim - 1; given.strides != nullptr && i >= 0; stride *= given.shape[i--]) {
    if (given.shape[i] != 1 && given.strides[i] != stride) return false;
  }
  return true;
}

// An input of a call, in one axis: of this dtype and shape, its elements side by side, none of which decode writes.
template <typename Spec>
Array CheckInput(const ArgumentCheck<Spec>& check, const Parameter& of, DLDataType dtype,
                 std::initializer_list<int64_t> shape, const DecodeArguments& args) {
  DLTensor given = check.in.Tensor(of);
  int64_t expected[8], elements = 1;  // INT64_MAX: more than can be counted
  int ndim = 0;
  for (int64_t extent : shape) expected[ndim++] = extent == kBatch ? args.batch : extent;
  bool matches = given.ndim == ndim;
  for (int i = 0; matches && i < ndim; ++i) {
    matches = expected[i] == given.shape[i];
    if (__builtin_mul_overflow(elements, expected[i], &elements)) elements = INT64_MAX;
  }
  if (!matches) {
    Raise("ValueError", "%s: expected shape %s, got %s", of.name, ListText(expected, ndim).c_str(),
          ListText(given.shape, given.ndim).c_str());
  }
  if (elements > INT32_MAX) {
    Raise("ValueError", "%s: expected up to 2**31 - 1 elements, got %" PRId64, of.name, elements);
  }
  if (elements != 0 && !IsContiguous(given)) {
    Raise("ValueError", "%s: expected elements side by side in C's order, got shape %s with strides %s", of.name,
          ListText(given.shape, ndim).c_str(), ListText(given.strides, ndim).c_str());
  }
  given.ndim = 1, given.shape = &elements, given.strides = nullptr;
  const Array array = check.OfView(of, given, dtype, {elements});
  CheckNotWritten(args, {of.name, &array});
  return array;
}

}  // namespace pa
