// The floating-point state that results are computed in.
#pragma once

#include <cstdint>

namespace pa {

#if defined(__aarch64__)
// Of FPCR: to nearest, with subnormal numbers and plain NaN, bfloat16's products as they are without FEAT_EBF16.
constexpr uint64_t kDefaultState = 0;
inline uint64_t FloatingPointState() {
  uint64_t state;
  __asm__ volatile("mrs %0, fpcr" : "=r"(state));
  return state;
}
inline void SetFloatingPointState(uint64_t state) { __asm__ volatile("msr fpcr, %0" : : "r"(state) : "memory"); }
#else
constexpr uint32_t kDefaultState = 0x1F80;  // of MXCSR, as a program starts
inline uint32_t FloatingPointState() { return __builtin_ia32_stmxcsr(); }
inline void SetFloatingPointState(uint32_t state) { __builtin_ia32_ldmxcsr(state); }
#endif

// While it lives this thread rounds to nearest, computes with subnormal numbers and traps nothing, whatever its caller
// has set: threads get that from whoever starts them, and a result would depend on which of them computes it.
class DefaultFloatingPoint {
 public:
  DefaultFloatingPoint() : callers_(FloatingPointState()) { SetFloatingPointState(kDefaultState); }
  DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;
  DefaultFloatingPoint& operator=(const DefaultFloatingPoint&) = delete;
  ~DefaultFloatingPoint() { SetFloatingPointState(callers_); }

 private:
  decltype(FloatingPointState()) callers_;
};

}  // namespace pa
