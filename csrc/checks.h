// Checks of operator arguments. Each failure raises RuntimeError with operator, tensor, what was expected and what was found.
#pragma once

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>

namespace moetrain {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] inline void fail(
    const char* op, const char* tensor, const std::string& expected, const std::string& found) {
  throw std::runtime_error(
      std::string("moetrain::") + op + ": " + tensor + ": expected " + expected + ", found " + found);
}

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool: return "bool";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    default: return torch::headeronly::toString(dtype);
  }
}

inline std::string device_name(const Tensor& tensor) {
  return tensor.is_cpu() ? "cpu" : (tensor.is_cuda() ? "cuda:" : "device ") + std::to_string(tensor.get_device_index());
}

constexpr int64_t kAnySize = -1;

template <class Sizes>
std::string shape_name(const Sizes& sizes) {
  std::ostringstream text;
  const char* separator = "(";
  for (const int64_t size : sizes) {
    text << separator;
    separator = ", ";
    size == kAnySize ? text << "any" : text << size;
  }
  text << (sizes.size() == 0 ? "()" : ")");
  return text.str();
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() != dtype) fail(op, name, dtype_name(dtype), dtype_name(tensor.scalar_type()));
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  const auto found = tensor.sizes();
  bool same = found.size() == sizes.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) {
    same = sizes.begin()[i] == kAnySize || sizes.begin()[i] == found[i];
  }
  if (!same) fail(op, name, "shape " + shape_name(sizes), shape_name(found));
}

inline void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  if (!(tensor.device() == like.device())) fail(op, name, device_name(like), device_name(tensor));
}

// The name in the message is the name of the variable.
#define CHECK_DTYPE(op, tensor, dtype) ::moetrain::check_dtype(op, #tensor, tensor, dtype)
#define CHECK_SHAPE(op, tensor, ...) ::moetrain::check_shape(op, #tensor, tensor, {__VA_ARGS__})
#define CHECK_DEVICE(op, tensor, like) ::moetrain::check_device(op, #tensor, tensor, like)

}  // namespace moetrain
