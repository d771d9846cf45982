// What emitted CUDA C sees in place of CUDA's headers: qualifiers, built-in variables, types and functions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "floats.h"
#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__
#define __align__(bytes) alignas(bytes)
#define __grid_constant__
#define __CUDACC__ 1

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())
constexpr int warpSize = 32;

#define CUDART_INF_F INFINITY
#define CUDART_NAN_F NAN

#define INLINE static inline __attribute__((always_inline))

// ---- 16-bit floats -------------------------------------------------------------------------------------------------

#define FLOAT16(type, pair, widen, narrow) \
  struct type { \
    uint16_t bits; \
    type() = default; \
    type(float value) : bits(emulator::narrow(value)) {} \
    type(double value) : type(float(value)) {} \
    type(int value) : type(float(value)) {} \
    operator float() const { return emulator::widen(bits); } \
  }; \
  struct alignas(4) pair { \
    type x, y; \
    pair() = default; \
    pair(type x, type y) : x(x), y(y) {} \
  }; \
  INLINE type operator+(type a, type b) { return float(a) + float(b); } \
  INLINE type operator-(type a, type b) { return float(a) - float(b); } \
  INLINE type operator*(type a, type b) { return float(a) * float(b); } \
  INLINE type operator/(type a, type b) { return float(a) / float(b); } \
  INLINE bool __hgt(type a, type b) { return float(a) > float(b); } \
  INLINE bool __hlt(type a, type b) { return float(a) < float(b); }
FLOAT16(__half, __half2, widen_f16, narrow_f16)
FLOAT16(__nv_bfloat16, __nv_bfloat162, widen_bf16, narrow_bf16)
#undef FLOAT16
using half = __half;
using nv_bfloat16 = __nv_bfloat16;
using half2 = __half2;
using nv_bfloat162 = __nv_bfloat162;

INLINE float __half2float(__half value) { return value; }
INLINE __half __float2half(float value) { return value; }
INLINE __half __float2half_rn(float value) { return value; }
INLINE float __bfloat162float(__nv_bfloat16 value) { return value; }
INLINE __nv_bfloat16 __float2bfloat16(float value) { return value; }
INLINE __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
INLINE uint16_t __half_as_ushort(__half value) { return value.bits; }
INLINE uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
INLINE __half __ushort_as_half(uint16_t bits) {
  __half value;
  value.bits = bits;
  return value;
}
INLINE __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) {
  __nv_bfloat16 value;
  value.bits = bits;
  return value;
}

// ---- vectors -------------------------------------------------------------------------------------------------------

#define VECTORS(name, type) \
  struct alignas(2 * sizeof(type)) name##2 { \
    type x, y; \
  }; \
  struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { \
    type x, y, z, w; \
  }; \
  INLINE name##2 make_##name##2(type x, type y) { return {x, y}; } \
  INLINE name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
VECTORS(char, signed char)
VECTORS(uchar, unsigned char)
VECTORS(short, short)
VECTORS(ushort, unsigned short)
VECTORS(int, int)
VECTORS(uint, unsigned)
VECTORS(float, float)
VECTORS(longlong, long long)
VECTORS(ulonglong, unsigned long long)
#undef VECTORS
using uint3 = emulator::Dim;
using dim3 = emulator::Dim;

// ---- functions -----------------------------------------------------------------------------------------------------

// What a __shared__ declaration becomes; `declaration` is a name of its own.
template <typename T>
INLINE T& shared_variable(const char* declaration) {
  return *static_cast<T*>(emulator::static_shared(declaration, sizeof(T)));
}

using std::max;
using std::min;
INLINE float max(float a, float b) { return fmaxf(a, b); }  // of a NaN and a number, the number
INLINE float min(float a, float b) { return fminf(a, b); }

template <typename To, typename From>
INLINE To emulator_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}
INLINE int __float_as_int(float value) { return emulator_bits<int>(value); }
INLINE unsigned __float_as_uint(float value) { return emulator_bits<unsigned>(value); }
INLINE float __int_as_float(int value) { return emulator_bits<float>(value); }
INLINE float __uint_as_float(unsigned value) { return emulator_bits<float>(value); }
#define __expf expf  // the C library has functions of these names
#define __logf logf
#define __log2f log2f
INLINE float __fdividef(float a, float b) { return a / b; }
INLINE float __frcp_rn(float value) { return 1 / value; }
INLINE float rsqrtf(float value) { return 1 / sqrtf(value); }
INLINE int __popc(unsigned value) { return __builtin_popcount(value); }
INLINE int __clz(int value) { return value ? __builtin_clz(value) : 32; }
INLINE int __ffs(int value) { return __builtin_ffs(value); }

template <typename T>
INLINE T __ldg(const T* address) {
  emulator::check(address, sizeof(T), emulator::Access::constant);
  return *address;
}
template <typename T>
INLINE size_t __cvta_generic_to_shared(const T* address) {
  return emulator::shared_address(address);
}

INLINE void __syncthreads() { emulator::block_barrier(0, 0); }
INLINE void __syncwarp(unsigned mask = ~0u) { emulator::warp_barrier(mask); }
INLINE void __threadfence() {}
INLINE void __threadfence_block() {}
INLINE unsigned __ballot_sync(unsigned mask, int value) { return emulator::vote(emulator::Vote::ballot, mask, value); }
INLINE int __any_sync(unsigned mask, int value) { return emulator::vote(emulator::Vote::any, mask, value); }
INLINE int __all_sync(unsigned mask, int value) { return emulator::vote(emulator::Vote::all, mask, value); }
INLINE unsigned __reduce_add_sync(unsigned mask, unsigned value) { return emulator::sum_of(mask, value); }
INLINE int __reduce_add_sync(unsigned mask, int value) { return emulator::sum_of(mask, value); }

#define SHUFFLE(name, kind) \
  template <typename T> \
  INLINE T name(unsigned mask, T value, int operand, int width = 32) { \
    uint64_t word = 0; \
    memcpy(&word, &value, sizeof value); \
    word = emulator::shuffle(emulator::Shuffle::kind, mask, word, operand, width); \
    memcpy(&value, &word, sizeof value); \
    return value; \
  }
SHUFFLE(__shfl_sync, indexed)
SHUFFLE(__shfl_up_sync, up)
SHUFFLE(__shfl_down_sync, down)
SHUFFLE(__shfl_xor_sync, exclusive_or)
#undef SHUFFLE

// One thread runs at a time, so that any read and write without a switch between is atomic.
#define ATOMIC(name, result) \
  template <typename T> \
  __attribute__((noinline, no_sanitize("thread"))) T name(T* address, T value) { \
    emulator::check_aligned(address, sizeof(T), emulator::Access::write); \
    T old = *address; \
    *address = result; \
    return old; \
  }
ATOMIC(atomicAdd, old + value)
ATOMIC(atomicMax, std::max(old, value))
ATOMIC(atomicMin, std::min(old, value))
ATOMIC(atomicOr, old | value)
ATOMIC(atomicExch, value)
#undef ATOMIC
template <typename T>
__attribute__((noinline, no_sanitize("thread"))) T atomicCAS(T* address, T expected, T value) {
  emulator::check_aligned(address, sizeof(T), emulator::Access::write);
  T old = *address;
  if (old == expected) *address = value;
  return old;
}

#include "ptx.h"
