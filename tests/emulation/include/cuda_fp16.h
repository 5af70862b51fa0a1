// __half as the kernels use it: made and read by conversions, without operators.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }

inline float __half2float(__half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  float value;
  if (magnitude < 0x0400u) {  // 0 and the subnormals: multiples of 2^-24
    value = static_cast<float>(magnitude) * 0x1p-24f;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  // Infinity and NaN keep all ones in the exponent; other exponents move from a bias of 15 to one of 127.
  const uint32_t exponent = magnitude >= 0x7c00u ? 0xffu - 0x1fu : 127u - 15u;
  const uint32_t bits = sign | ((magnitude << 13) + (exponent << 23));
  std::memcpy(&value, &bits, 4);
  return value;
}

// To the nearest, ties to even; a NaN becomes 0x7fff, as on the device.
inline __half __float2half_rn(float x) {
  if (x != x) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and more: infinity
  if (bits < 0x38800000u) {  // below 2^-14: a float sum with 0.5 = 2^-24 * 2^23 rounds to a multiple of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000u))};
  }
  const uint32_t rounded = bits + 0x0fffu + (bits >> 13 & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - ((127u - 15u) << 23)) >> 13))};
}
inline __half __float2half(float x) { return __float2half_rn(x); }
