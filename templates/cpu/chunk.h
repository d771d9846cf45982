// What the stages of the staged pipeline leave to each other.
#pragma once

#include <cstdint>

#include "cpu/scratch.h"
#include "shared/arrays.h"

namespace pa {

// Intermediates of kBatchChunk sequences and kRowTile heads of each, float32, on the thread that runs them: scores and
// probs of one logical block (kTileTokens), its state, and the state of all blocks before it.
template <typename Spec>
class Chunk {
  static constexpr int64_t kSeqs = Spec::kBatchChunk, kRows = Spec::kRowTile;
  static constexpr int64_t kTokens = Spec::kTileTokens, kDim = Spec::kValueDim;
  static constexpr int64_t kTileFloats = Aligned(kSeqs * kRows * kTokens), kAccFloats = Aligned(kSeqs * kRows * kDim);
  static constexpr int64_t kRowFloats = Aligned(kSeqs * kRows);

  const Borrowed<float> memory_{kernel_scratch, 2 * kTileFloats + 2 * kAccFloats + 4 * kRowFloats};
  float* next_ = memory_.data();

  Array Take(const Extents& extents) {
    const Array array(next_, extents);
    next_ += Aligned(array.shape[0] * array.strides[0]);
    return array;
  }

 public:
  const Array scores = Take({kSeqs, kRows, kTokens}), probs = Take({kSeqs, kRows, kTokens});
  const Array tile_acc = Take({kSeqs, kRows, kDim}), acc = Take({kSeqs, kRows, kDim});
  const Array tile_max = Take({kSeqs, kRows}), row_max = Take({kSeqs, kRows});
  const Array tile_sum = Take({kSeqs, kRows}), row_sum = Take({kSeqs, kRows});
};

}  // namespace pa
