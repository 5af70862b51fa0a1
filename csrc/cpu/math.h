// Element types, exp and sums for the CPU kernels, written so that the compiler's vectoriser takes them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../kernels.h"

// A function marked so is compiled for AVX-512, AVX2+FMA and the baseline, and the loader picks one. Everything it calls must
// be inlined into it (MOETRAIN_INLINE), or the callee is compiled for the baseline only.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define MOETRAIN_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MOETRAIN_MULTIVERSION
#endif
#define MOETRAIN_INLINE inline __attribute__((always_inline))

// Before a loop that writes outputs: they are fresh memory, so no iteration reads what another wrote. Without this the check
// for overlap of many pointers stops the vectoriser.
#if defined(__clang__)
#define MOETRAIN_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define MOETRAIN_INDEPENDENT _Pragma("GCC ivdep")
#else
#define MOETRAIN_INDEPENDENT
#endif

namespace moetrain::cpu {

struct bfloat16 {
  uint16_t bits;
};

template <class To, class From>
MOETRAIN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T>
struct AccOf {
  using type = T;
};
template <>
struct AccOf<bfloat16> {
  using type = float;
};
template <class T>
using acc_t = typename AccOf<T>::type;

MOETRAIN_INLINE float load(float x) { return x; }
MOETRAIN_INLINE double load(double x) { return x; }
MOETRAIN_INLINE float load(bfloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

MOETRAIN_INLINE void store(float& to, float x) { to = x; }
MOETRAIN_INLINE void store(double& to, double x) { to = x; }
// Round to nearest, ties to even; a NaN stays a (quiet) NaN, which the rounding carry could turn into infinity.
MOETRAIN_INLINE void store(bfloat16& to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const uint32_t is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = static_cast<uint16_t>((is_nan ? bits | 0x400000u : rounded) >> 16);
}

// exp(x) for x <= 0 (or NaN). float: n = round(x / ln 2), r = x - n ln 2 with ln 2 in two parts,
// 2^n * (1 + r + r^2 P(r)) with P of degree 5 fitted at Chebyshev nodes (relative error 2.3e-10, so rounding decides).
// Below the smallest normal number the result is 0. double: the C library.
MOETRAIN_INLINE float exp_nonpositive(float x) {
  const float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x / ln 2) in the low bits
  const float shifted = x * 1.44269504f + round_magic;
  const float n = shifted - round_magic;
  const float r = (x - n * 0.693145752f) - n * 1.42860682e-6f;
  float p = 0.0001989933371f;
  p = p * r + 0.001393368817f;
  p = p * r + 0.008333298378f;
  p = p * r + 0.04166646302f;
  p = p * r + 0.1666666717f;
  p = p * r + 0.5f;
  const float e = 1.0f + (r + (r * r) * p);
  const float scale = bit_cast<float>((bit_cast<uint32_t>(shifted) + 127u) << 23);
  return x < -87.33654f ? 0.0f : e * scale;
}
MOETRAIN_INLINE double exp_nonpositive(double x) { return std::exp(x); }

// 1 / (1 + exp(-x)), by exp(-|x|) so that nothing overflows.
template <class A>
MOETRAIN_INLINE A sigmoid(A x) {
  const A e = exp_nonpositive(x < A(0) ? x : -x);
  return (x < A(0) ? e : A(1)) / (A(1) + e);
}

// A sum in a fixed order with room for vectors: products are added block by block to kLanes running sums, and those are added
// pairwise at the end. The order depends on the length only.
constexpr int64_t kBlock = 256;
constexpr int64_t kLanes = 64;

template <class A>
struct LaneSum {
  A lanes[kLanes] = {};

  // Adds block[0 .. kBlock).
  MOETRAIN_INLINE void add(const A* block) {
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += block[i + lane];
    }
  }

  MOETRAIN_INLINE A total() {
    for (int64_t width = kLanes / 2; width > 0; width /= 2) {
      for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    return lanes[0];
  }
};

// Defines NAME(args): ROWS<T>(args, begin, end) for the dtype of args, compiled for every instruction set, over torch's
// threads in pieces of GRAIN rows.
#define MOETRAIN_ROW_KERNEL(NAME, ARGS, ROWS, SIZE, GRAIN)                                                   \
  MOETRAIN_MULTIVERSION void NAME##_f32(const ARGS& a, int64_t begin, int64_t end) {                         \
    ROWS<float>(a, begin, end);                                                                              \
  }                                                                                                          \
  MOETRAIN_MULTIVERSION void NAME##_bf16(const ARGS& a, int64_t begin, int64_t end) {                        \
    ROWS<bfloat16>(a, begin, end);                                                                           \
  }                                                                                                          \
  MOETRAIN_MULTIVERSION void NAME##_f64(const ARGS& a, int64_t begin, int64_t end) {                         \
    ROWS<double>(a, begin, end);                                                                             \
  }                                                                                                          \
  void NAME(const ARGS& a) {                                                                                 \
    auto* const rows = a.dtype == DType::f64 ? NAME##_f64 : a.dtype == DType::bf16 ? NAME##_bf16 : NAME##_f32; \
    parallel_for(SIZE, GRAIN, [&](int64_t begin, int64_t end) { rows(a, begin, end); });                     \
  }

}  // namespace moetrain::cpu
