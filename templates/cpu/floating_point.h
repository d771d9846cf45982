// The floating-point state that results are computed in.
#pragma once

#include <cstdint>

namespace pa {

// While it lives this thread rounds to nearest, computes with subnormal numbers and traps nothing, whatever its caller
// has set: threads get that from whoever starts them, and a result would depend on which of them computes it.
class DefaultFloatingPoint {
 public:
  DefaultFloatingPoint() : callers_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(kDefault); }
  DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;
  DefaultFloatingPoint& operator=(const DefaultFloatingPoint&) = delete;
  ~DefaultFloatingPoint() { __builtin_ia32_ldmxcsr(callers_); }

 private:
  static constexpr uint32_t kDefault = 0x1F80;  // of MXCSR, as a program starts
  uint32_t callers_;
};

}  // namespace pa
