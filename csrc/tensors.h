// What the operator functions have in common: dtypes, allocation, and checks of the arguments that many of them take.
#pragma once

#include <algorithm>
#include <optional>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "kernels.h"

namespace moetrain {

using torch::stable::contiguous;
using OptionalTensor = std::optional<Tensor>;

inline DType data_dtype(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype == ScalarType::Float) return DType::f32;
  if (dtype == ScalarType::BFloat16) return DType::bf16;
  if (dtype == ScalarType::Double) return DType::f64;
  if (dtype == ScalarType::Half && tensor.is_cuda()) return DType::f16;
  const char* expected =
      tensor.is_cuda() ? "float32, bfloat16, float16 or float64" : "float32, bfloat16 or float64 (on the CPU)";
  fail(op, name, expected, dtype_name(dtype));
}

inline ScalarType acc_dtype(const Tensor& data) {
  return data.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  return torch::stable::empty({sizes.begin(), sizes.size()}, dtype, std::nullopt, like.device());
}

// Weights are one acc number per row, or none, which means 1.
inline OptionalTensor checked_weights(const char* op, const OptionalTensor& weights, const Tensor& data, int64_t num_rows) {
  if (!weights) return std::nullopt;
  check_device(op, "weights", *weights, data);
  check_dtype(op, "weights", *weights, acc_dtype(data));
  check_shape(op, "weights", *weights, {num_rows});
  return contiguous(*weights);
}

inline const void* data_or_null(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

inline Tensor checked_index(const char* op, const char* name, const Tensor& index, int64_t size, const Tensor& like) {
  check_device(op, name, index, like);
  check_dtype(op, name, index, ScalarType::Int);
  check_shape(op, name, index, {size});
  return contiguous(index);
}

// Refuses indices outside [0, bound), so that a wrong route table can't read or write foreign memory. On CUDA the kernels
// check the same where they use an index: looking here would wait for the device.
inline void check_range(const char* op, const char* name, const Tensor& index, int64_t bound) {
  if (!index.is_cpu() || index.numel() == 0) return;
  const int32_t* values = static_cast<const int32_t*>(index.const_data_ptr());
  const int64_t size = index.numel();
  uint32_t largest = 0;  // a negative index is a large unsigned number
  for (int64_t i = 0; i < size; ++i) largest = std::max(largest, static_cast<uint32_t>(values[i]));
  if (largest < bound) return;
  fail(op, name, "indices in [0, " + std::to_string(bound) + ")", std::to_string(static_cast<int32_t>(largest)));
}

// Like `empty`, in huge pages if the system has them and the tensor is large: it is written whole and at once, and a fault for each 4 KiB of
// fresh memory costs as much as filling it.
inline Tensor empty_large(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  Tensor tensor = empty(sizes, dtype, like);
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (start + page - 1) / page * page, last = (start + tensor.numel() * tensor.element_size()) / page * page;
  // A refusal changes nothing.
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

}  // namespace moetrain
