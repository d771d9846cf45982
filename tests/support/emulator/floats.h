// Conversions between float32 and the two 16-bit formats, to nearest even, and from a format of 8 bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulator {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline float widen_bf16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

inline uint16_t narrow_bf16(float value) {
  if (std::isnan(value)) return 0x7fff;
  uint32_t bits = bits_of(value);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float widen_f16(uint16_t bits) {
  uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  float magnitude = float_of(rest << 13) * 0x1p112f;  // moves the exponent; right for subnormals too
  return float_of(sign | bits_of(magnitude));
}

inline float widen_e4m3(uint8_t code) {
  int exponent = code >> 3 & 15, digits = code & 7;
  float magnitude = exponent > 0 ? std::ldexp(8.0f + digits, exponent - 10) : std::ldexp(float(digits), -9);
  if (exponent == 15 && digits == 7) magnitude = NAN;
  return std::copysign(magnitude, code & 0x80 ? -1.0f : 1.0f);
}

inline uint16_t narrow_f16(float value) {
  if (std::isnan(value)) return 0x7fff;
  uint16_t sign = bits_of(value) >> 16 & 0x8000;
  float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) return sign | uint16_t(bits_of(magnitude + 0.5f) - bits_of(0.5f));  // steps of 2^-24
  uint32_t bits = bits_of(magnitude) - (112u << 23);
  return sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13;
}

}  // namespace emulator
