// cub::DeviceScan::ExclusiveSum as the kernels use it. It spoils its whole workspace, so that a workspace that overlaps something shows.
#pragma once

#include <cstring>

#include <cuda_runtime.h>

namespace cub {

struct DeviceScan {
  // With `temp` null it only says how many bytes it wants. The output may be the input, but not overlap it otherwise.
  template <class T>
  static cudaError_t ExclusiveSum(void* temp, size_t& temp_bytes, const T* in, T* out, int size, cudaStream_t = nullptr) {
    const size_t wanted = 767 + static_cast<size_t>(size) / 32;
    if (!temp) {
      temp_bytes = wanted;
      return cudaSuccess;
    }
    if (temp_bytes < wanted || size < 0) return cudaErrorInvalidValue;
    if (in != out && in < out + size && out < in + size) return cudaErrorInvalidValue;
    std::memset(temp, 0xa5, wanted);
    T sum = T();
    for (int i = 0; i < size; ++i) {
      const T value = in[i];
      out[i] = sum;
      sum += value;
    }
    return cudaSuccess;
  }
};

}  // namespace cub
