// Where in their sequences the query tokens of a call are.
#pragma once

#include <cstdint>

#include "cpu/scratch.h"
#include "shared/arrays.h"
#include "shared/queries.h"

namespace pa {

// The position of each query token of a call, [num_tokens], in memory that is borrowed for the call.
class Positions {
 public:
  explicit Positions(const Queries& queries) : memory_(call_workspace, queries.Begin(queries.batch)) {
    int32_t* position = memory_.data();
    for (int64_t seq = 0; seq < queries.batch; ++seq) {
      for (int64_t nth = 0; nth < queries.Count(seq); ++nth) {
        *position++ = static_cast<int32_t>(queries.FirstPos(seq) + nth);
      }
    }
  }
  const int32_t* data() const { return memory_.data(); }
  // As kernels take them.
  Array Of(int64_t num_tokens) const { return InOneAxis(memory_.data(), kInt32, num_tokens); }

 private:
  const Borrowed<int32_t> memory_;
};

}  // namespace pa
