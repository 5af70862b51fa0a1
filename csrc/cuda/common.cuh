// What the CUDA kernels share: error checks, element types, vector loads, the sum over a warp, and launch shapes.
//
// Every row kernel gives one warp to a row. A block is kWarps warps; threadIdx.x is the lane, threadIdx.y the warp.
#pragma once

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../kernels.h"

namespace moetrain::cuda {

inline void check(cudaError_t status, const char* what, const char* file, int line) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(
      std::string("moetrain: ") + what + ": " + cudaGetErrorString(status) + " (" + file + ":" + std::to_string(line) + ")");
}
#define CUDA_CHECK(call) ::moetrain::cuda::check((call), #call, __FILE__, __LINE__)
#define CUDA_CHECK_LAUNCH() CUDA_CHECK(cudaGetLastError())

// For wrong indices. The alternatives are reading foreign memory or waiting for the device, so it prints and stops the
// kernel; the next CUDA call raises.
#define DEVICE_CHECK(condition, message)                                \
  do {                                                                  \
    if (!(condition)) {                                                 \
      printf("moetrain: %s (block %d)\n", message, (int)blockIdx.x);    \
      __trap();                                                         \
    }                                                                   \
  } while (false)

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using acc_t = typename AccOf<T>::type;

__device__ __forceinline__ float load(float x) { return x; }
__device__ __forceinline__ double load(double x) { return x; }
__device__ __forceinline__ float load(__half x) { return __half2float(x); }
__device__ __forceinline__ float load(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void store(float& to, float x) { to = x; }
__device__ __forceinline__ void store(double& to, double x) { to = x; }
__device__ __forceinline__ void store(__half& to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void store(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// 1 / (1 + exp(-x)), by exp(-|x|) so that nothing overflows.
__device__ __forceinline__ float sigmoid(float x) {
  const float e = expf(-fabsf(x));
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}
__device__ __forceinline__ double sigmoid(double x) {
  const double e = exp(-fabs(x));
  return (x < 0.0 ? e : 1.0) / (1.0 + e);
}

// N elements moved by one instruction.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T values[N];
};
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <int N, class T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

constexpr int kLanes = 32;
constexpr int kWarps = 8;

// The sum over the lanes, in lane 0, always in the same order.
template <class A>
__device__ __forceinline__ A warp_sum(A value) {
  for (int distance = kLanes / 2; distance > 0; distance /= 2) value += __shfl_down_sync(0xffffffffu, value, distance);
  return value;
}

// The row of this warp; may be past the end.
__device__ __forceinline__ int64_t warp_row() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y; }

inline dim3 block_of_warps() { return dim3(kLanes, kWarps); }

// One warp per row and, where a row's columns are independent, one lane per pack (up to a bound; kernels stride by the grid).
inline dim3 grid_of_warps(int64_t num_rows, int64_t packs_per_row = 0) {
  const int64_t across = (packs_per_row + kLanes - 1) / kLanes;
  const int64_t y = across < 1 ? 1 : across > 64 ? 64 : across;
  return dim3(static_cast<unsigned>((num_rows + kWarps - 1) / kWarps), static_cast<unsigned>(y));
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Calls body(T{}) with the element type of dtype.
template <class Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::f64: return body(double{});
    case DType::f16: return body(__half{});
    case DType::bf16: return body(__nv_bfloat16{});
  }
}

template <int N>
struct PackSize {
  static constexpr int value = N;
};

// Calls body(T{}, PackSize<N>{}): N elements are 16 bytes if `dim` is a multiple of that and all pointers are aligned (null
// is), else N = 1.
template <class Body, class... Pointers>
void with_packs(DType dtype, int64_t dim, const Body& body, Pointers... pointers) {
  with_type(dtype, [&](auto zero) {
    constexpr int n = 16 / sizeof(zero);
    if (dim % n == 0 && (aligned(pointers) && ...)) {
      body(zero, PackSize<n>{});
    } else {
      body(zero, PackSize<1>{});
    }
  });
}

}  // namespace moetrain::cuda
