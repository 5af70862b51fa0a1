// Stands in for the toolkit's header: the part of the runtime and of the device's language that the kernels use, over emulator.h.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>  // before printf is renamed
#include <cstring>

#include "../emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_size())
#define gridDim (::emulator::grid_size())
constexpr int warpSize = 32;

#define printf(...) ::emulator::print(__VA_ARGS__)

inline void __trap() { emulator::trap(); }
inline void __nanosleep(unsigned) { emulator::yield(); }
inline void __syncthreads() { emulator::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::sync_warp(mask); }
// Fences order one thread's accesses; here each access is done when the next begins.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// Collectives of a warp. A lane outside the segment of `width` lanes is the lane itself, but __shfl_sync's, which CUDA takes modulo width,
// is refused: nobody means that.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  emulator::check_segment("__shfl_sync", width);
  if (source < 0 || source >= width) emulator::fail("__shfl_sync: lane " + std::to_string(source) + " is outside a segment of " + std::to_string(width));
  return emulator::shuffle("__shfl_sync", mask, value, (emulator::lane() & ~(width - 1)) + source);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  emulator::check_segment("__shfl_up_sync", width);
  const int lane = emulator::lane(), source = lane - static_cast<int>(delta);
  return emulator::shuffle("__shfl_up_sync", mask, value, source < (lane & ~(width - 1)) ? lane : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  emulator::check_segment("__shfl_down_sync", width);
  const int lane = emulator::lane(), source = lane + static_cast<int>(delta);
  return emulator::shuffle("__shfl_down_sync", mask, value, source > (lane | (width - 1)) ? lane : source);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  emulator::check_segment("__shfl_xor_sync", width);
  const int lane = emulator::lane(), source = lane ^ bits;
  return emulator::shuffle("__shfl_xor_sync", mask, value, source > (lane | (width - 1)) ? lane : source);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* values = emulator::meet("__ballot_sync", mask, predicate != 0);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= (mask >> i & 1u) && values[i] ? 1u << i : 0u;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T>
T __ldg(const T* address) {
  return *address;
}

// The operand's type is the address's, as with CUDA's overloads.
template <class T>
using Same = std::common_type_t<T>;
template <class T>
T atomicAdd(T* address, Same<T> value) {
  return emulator::atomic(emulator::Atomic::add, address, T(value));
}
template <class T>
T atomicExch(T* address, Same<T> value) {
  return emulator::atomic(emulator::Atomic::exchange, address, T(value));
}
template <class T>
T atomicCAS(T* address, Same<T> expected, Same<T> value) {
  return emulator::atomic(emulator::Atomic::compare_exchange, address, T(value), T(expected));
}
template <class T>
T atomicMin(T* address, Same<T> value) {
  return emulator::atomic(emulator::Atomic::minimum, address, T(value));
}
template <class T>
T atomicMax(T* address, Same<T> value) {
  return emulator::atomic(emulator::Atomic::maximum, address, T(value));
}
template <class T>
T atomicOr(T* address, Same<T> value) {
  return emulator::atomic(emulator::Atomic::bit_or, address, T(value));
}
template <class T>
T atomicAnd(T* address, Same<T> value) {
  return emulator::atomic(emulator::Atomic::bit_and, address, T(value));
}

// CUDA has min and max in the global namespace, for arguments of one type.
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// A failed launch has thrown already, so that there is never an error to ask for.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid argument"; }
