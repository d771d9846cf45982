// Which bytes arrays have in common.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cstdint>
#include <cstdlib>

#include "shared/arrays.h"
#include "shared/errors.h"

namespace pa {

// The bytes that an array spans, lowest and one past the highest. Some of them may belong to no element.
struct Span {
  intptr_t low, high;

  explicit Span(const Array& array) : low(reinterpret_cast<intptr_t>(array.tensor.data)), high(low) {
    if (array.empty()) return;
    const intptr_t itemsize = array.tensor.dtype.bits / 8;
    high += itemsize;
    for (int i = 0; i < array.tensor.ndim; ++i) {
      const intptr_t reach = (array.shape[i] - 1) * array.strides[i] * itemsize;
      (reach < 0 ? low : high) += reach;
    }
  }
};

struct Axis {
  int64_t stride, extent;  // stride: its absolute value
};

// Sums of strides, each taken from 0 times up to its axis' extent - 1.
class Sums {
 public:
  // One more axis. Two of one stride are one axis, of as many steps as both.
  void Add(int64_t stride, int64_t extent) {
    const Axis axis{std::abs(stride), extent};
    if (axis.stride == 0 || axis.extent == 1) return;
    for (int i = 0; i < count_; ++i) {
      if (axes_[i].stride == axis.stride) return void(axes_[i].extent += axis.extent - 1);
    }
    int at = count_++;
    for (; at > 0 && axes_[at - 1].stride < axis.stride; --at) axes_[at] = axes_[at - 1];
    axes_[at] = axis;
  }
  // Whether one of the sums lies in [first, last]. Where strides are nested, as those of views into one buffer are,
  // this takes a few steps. In general it is a hard problem: after some hundred steps the answer is yes.
  [[gnu::cold]] bool Meet(int64_t first, int64_t last) const {
    int steps = 1000;
    return Meet(0, first, last, &steps);
  }

 private:
  // The same for the axes from `at` on, which are in the order of their strides, the largest first.
  [[gnu::cold]] bool Meet(int at, int64_t first, int64_t last, int* steps) const {
    if (first <= 0 && 0 <= last) return true;
    if (at == count_ || last < 0) return false;
    int64_t rest = 0;  // what the axes after this one reach
    for (int i = at + 1; i < count_; ++i) rest += axes_[i].stride * (axes_[i].extent - 1);
    const Axis axis = axes_[at];
    int64_t times = std::max<int64_t>(0, (first - rest + axis.stride - 1) / axis.stride);
    for (; times < axis.extent && times * axis.stride <= last; ++times) {
      const int64_t taken = times * axis.stride;
      if (--*steps < 0 || Meet(at + 1, first - taken, last - taken, steps)) return true;
    }
    return false;
  }

  Axis axes_[8];
  int count_ = 0;
};

// Whether two arrays have a byte in common. Their rows along the last axis, which is contiguous, are taken whole: one
// of the first array's begins at its lowest plus a sum of its strides, one of the second's at its highest minus such a
// sum.
inline bool Overlap(const Array& a, const Array& b) {
  const Span span_a(a), span_b(b);
  if (std::max(span_a.low, span_b.low) >= std::min(span_a.high, span_b.high)) return false;
  Sums sums;
  intptr_t row_bytes[2];
  int which = 0;
  for (const Array* array : {&a, &b}) {
    const intptr_t itemsize = array->tensor.dtype.bits / 8;
    const int last = array->tensor.ndim - 1;
    for (int i = 0; i < last; ++i) sums.Add(array->strides[i] * itemsize, array->shape[i]);
    row_bytes[which++] = array->shape[last] * itemsize;
  }
  const intptr_t apart = span_b.high - row_bytes[1] - span_a.low;  // from a's lowest row to b's highest
  return sums.Meet(apart - row_bytes[0] + 1, apart + row_bytes[1] - 1);
}

[[gnu::noinline]] inline void CheckNoOverlap(const char* name, const Array& written, const char* other_name,
                                             const Array& other) {
  if (!Overlap(written, other)) return;
  const Span span(written), theirs(other);
  Raise("ValueError",
        "%s: expected memory apart from %s's bytes [%" PRIdPTR ", %" PRIdPTR "), got bytes [0, %" PRIdPTR ")", name,
        other_name, theirs.low - span.low, theirs.high - span.low, span.high - span.low);
}

// Each element of a written array must have a place of its own: each axis must step over all that those of smaller
// strides reach.
inline void CheckDistinctElements(const char* name, const Array& array) {
  if (array.empty()) return;
  Axis axes[4];  // in the order of their strides
  const int ndim = array.tensor.ndim;
  for (int i = 0; i < ndim; ++i) {
    const Axis axis{std::abs(array.strides[i]), array.shape[i]};
    int at = i;
    for (; at > 0 && axes[at - 1].stride > axis.stride; --at) axes[at] = axes[at - 1];
    axes[at] = axis;
  }
  int64_t reach = 1;
  for (int i = 0; i < ndim; ++i) {
    if (axes[i].extent > 1 && axes[i].stride < reach) {
      Raise("ValueError", "%s: expected elements that do not overlap, got shape %s with strides %s", name,
            ListText(array.shape, ndim).c_str(), ListText(array.strides, ndim).c_str());
    }
    reach += axes[i].stride * (axes[i].extent - 1);
  }
}

}  // namespace pa
