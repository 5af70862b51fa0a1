// The operators of the namespace `moetrain`: all schemas, and for each the checks, the allocation and the call of its kernel.
//
// An operator function serves the CPU and CUDA alike; those for the CPU alone are in ops_cpu.cpp. Arguments may have any strides; they are made
// contiguous here, because gradients often arrive expanded. Python wrappers, shapes without data and gradient formulas are in moetrain/ops.py.
#include <Python.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "kernels.h"
#include "tensors.h"

STABLE_TORCH_LIBRARY(moetrain, m) {
  m.def("route(Tensor mask, SymInt num_routes, bool padded=False) -> (Tensor tokens, Tensor counts, Tensor row_offsets, Tensor positions)");
  m.def("permute(Tensor x, Tensor tokens, Tensor row_offsets, Tensor positions) -> Tensor");
  m.def("combine(Tensor rows, Tensor tokens, Tensor row_offsets, Tensor positions, Tensor? weights) -> Tensor");
  m.def(
      "combine_backward(Tensor grad, Tensor tokens, Tensor? rows, Tensor? weights) -> (Tensor grad_rows, Tensor grad_weights)");
  m.def("swiglu(Tensor gate_up, Tensor? weights) -> Tensor");
  m.def(
      "swiglu_backward(Tensor grad, Tensor gate_up, Tensor? weights) -> "
      "(Tensor grad_gate_up, Tensor grad_weights, Tensor activation)");
  m.def("swiglu_dot(Tensor grad, Tensor gate_up) -> Tensor");
  m.def("push_rows(Tensor x, Tensor? tokens, Tensor begins, Tensor places, Tensor buffers, int capacity) -> ()");
  m.def("pull_rows(Tensor like, Tensor row_offsets, Tensor positions, Tensor begins, Tensor places, Tensor buffers, int capacity) -> Tensor");
  m.def("has_experts(Tensor like) -> bool");
  m.def(
      "experts(Tensor rows, Tensor gate_up, Tensor down, Tensor weights, Tensor tokens, Tensor counts) -> (Tensor out, Tensor pre)");
  m.def(
      "experts_backward(Tensor grad, Tensor rows, Tensor gate_up, Tensor down, Tensor weights, Tensor pre, Tensor tokens, Tensor counts, "
      "bool[3] needs) -> (Tensor grad_rows, Tensor grad_gate_up, Tensor grad_down, Tensor grad_weights)");
  m.def("largest(Tensor scores, int k) -> Tensor");
  m.def("share(Tensor scores, Tensor active) -> Tensor");
  m.def("share_backward(Tensor grad, Tensor scores, Tensor active) -> Tensor");
  m.def("count(Tensor mask) -> (Tensor of_experts, Tensor of_tokens)");
  m.def("wide_linear(Tensor x, Tensor weight) -> Tensor");
  m.def("wide_linear_backward(Tensor grad, Tensor x, Tensor weight, bool[2] needs) -> (Tensor grad_x, Tensor grad_weight)");
  m.def("experts_probe(Tensor grad, Tensor rows, Tensor gate_up, Tensor down, Tensor tokens, Tensor counts) -> Tensor");
}

namespace moetrain {
namespace {

// Calls cpu::KERNEL(args) or cuda::KERNEL(args, stream), whichever `tensor` lives on.
#ifdef USE_CUDA
void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}
#define LAUNCH(KERNEL, tensor, args)                                                     \
  do {                                                                                   \
    if ((tensor).is_cuda()) {                                                            \
      const torch::stable::accelerator::DeviceGuard guard((tensor).get_device_index());  \
      cuda::KERNEL(args, current_stream(tensor));                                        \
    } else {                                                                             \
      cpu::KERNEL(args);                                                                 \
    }                                                                                    \
  } while (false)
#else
#define LAUNCH(KERNEL, tensor, args) cpu::KERNEL(args)
#endif

// row_offsets must rise from 0 to the number of routes, which with padding is less than there are rows.
void check_offsets(const char* op, const Tensor& row_offsets, int64_t num_routes) {
  if (!row_offsets.is_cpu()) return;
  const int32_t* values = static_cast<const int32_t*>(row_offsets.const_data_ptr());
  const int64_t size = row_offsets.numel();
  if (values[0] == 0 && values[size - 1] <= num_routes && std::is_sorted(values, values + size)) return;
  fail(op, "row_offsets", "offsets that rise from 0 to at most " + std::to_string(num_routes),
       std::to_string(values[0]) + " to " + std::to_string(values[size - 1]) + ", or a fall between");
}

int64_t tokens_of(const char* op, const Tensor& row_offsets) {
  check_shape(op, "row_offsets", row_offsets, {kAnySize});
  if (row_offsets.size(0) == 0) fail(op, "row_offsets", "shape (T + 1)", "(0)");
  return row_offsets.size(0) - 1;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> route(Tensor mask, int64_t num_routes, bool padded) {
  const char* op = "route";
  CHECK_DTYPE(op, mask, ScalarType::Bool);
  CHECK_SHAPE(op, mask, kAnySize, kAnySize);
  mask = contiguous(mask);
  const int64_t num_tokens = mask.size(0), num_experts = mask.size(1);
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  if (num_tokens >= limit || num_experts >= limit) {
    fail(op, "mask", "fewer than 2^31 - 1 rows and columns", shape_name(mask.sizes()));
  }
  // Padding is of token 0, which must be there.
  const int64_t most = padded && num_tokens > 0 ? limit : std::min(limit, mask.numel());
  if (num_routes < 0 || num_routes > most) {
    const std::string expected = "0 to " + std::to_string(most) + " for a mask of shape " + shape_name(mask.sizes());
    fail(op, "num_routes", expected, std::to_string(num_routes));
  }

  Tensor tokens = empty({num_routes}, ScalarType::Int, mask);
  Tensor counts = empty({num_experts}, ScalarType::Int, mask);
  Tensor row_offsets = empty({num_tokens + 1}, ScalarType::Int, mask);
  Tensor positions = empty({num_routes}, ScalarType::Int, mask);

  RouteArgs args{};
  args.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  args.num_tokens = num_tokens;
  args.num_experts = num_experts;
  args.num_routes = num_routes;
  args.padded = padded;
  args.tokens = static_cast<int32_t*>(tokens.mutable_data_ptr());
  args.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  args.row_offsets = static_cast<int32_t*>(row_offsets.mutable_data_ptr());
  args.positions = static_cast<int32_t*>(positions.mutable_data_ptr());
#ifdef USE_CUDA
  if (mask.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(mask.get_device_index());
    const int64_t bytes = static_cast<int64_t>(cuda::route_workspace(num_tokens, num_experts));
    Tensor workspace = empty({bytes}, ScalarType::Byte, mask);
    args.workspace = workspace.mutable_data_ptr();
    cuda::route(args, current_stream(mask));
    return {tokens, counts, row_offsets, positions};
  }
#endif
  const int64_t found = cpu::route(args);
  if (padded ? found > num_routes : found != num_routes) {
    const std::string expected = (padded ? "at least " : "") + std::to_string(found) + " (the number of ones in mask)";
    fail(op, "num_routes", expected, std::to_string(num_routes));
  }
  return {tokens, counts, row_offsets, positions};
}

Tensor permute(Tensor x, Tensor tokens, Tensor row_offsets, Tensor positions) {
  const char* op = "permute";
  const DType dtype = data_dtype(op, "x", x);
  CHECK_SHAPE(op, x, kAnySize, kAnySize);
  CHECK_SHAPE(op, tokens, kAnySize);
  const int64_t num_tokens = x.size(0), dim = x.size(1), num_routes = tokens.size(0);
  tokens = checked_index(op, "tokens", tokens, num_routes, x);
  checked_index(op, "row_offsets", row_offsets, num_tokens + 1, x);  // read by the backward only
  checked_index(op, "positions", positions, num_routes, x);
  check_range(op, "tokens", tokens, num_tokens);
  x = contiguous(x);

  Tensor out = empty({num_routes, dim}, x.scalar_type(), x);
  PermuteArgs args{};
  args.dtype = dtype;
  args.x = x.const_data_ptr();
  args.tokens = static_cast<const int32_t*>(tokens.const_data_ptr());
  args.num_tokens = num_tokens;
  args.num_routes = num_routes;
  args.dim = dim;
  args.out = out.mutable_data_ptr();
  LAUNCH(permute, x, args);
  return out;
}

Tensor combine(Tensor rows, Tensor tokens, Tensor row_offsets, Tensor positions, OptionalTensor weights) {
  const char* op = "combine";
  const DType dtype = data_dtype(op, "rows", rows);
  CHECK_SHAPE(op, rows, kAnySize, kAnySize);
  const int64_t num_routes = rows.size(0), dim = rows.size(1), num_tokens = tokens_of(op, row_offsets);
  checked_index(op, "tokens", tokens, num_routes, rows);  // read by the backward only
  row_offsets = checked_index(op, "row_offsets", row_offsets, num_tokens + 1, rows);
  positions = checked_index(op, "positions", positions, num_routes, rows);
  weights = checked_weights(op, weights, rows, num_routes);
  check_offsets(op, row_offsets, num_routes);
  check_range(op, "positions", positions, num_routes);
  rows = contiguous(rows);

  Tensor out = empty({num_tokens, dim}, rows.scalar_type(), rows);
  CombineArgs args{};
  args.dtype = dtype;
  args.rows = rows.const_data_ptr();
  args.row_offsets = static_cast<const int32_t*>(row_offsets.const_data_ptr());
  args.positions = static_cast<const int32_t*>(positions.const_data_ptr());
  args.weights = data_or_null(weights);
  args.num_tokens = num_tokens;
  args.num_routes = num_routes;
  args.dim = dim;
  args.out = out.mutable_data_ptr();
  LAUNCH(combine, rows, args);
  return out;
}

std::tuple<Tensor, Tensor> combine_backward(Tensor grad, Tensor tokens, OptionalTensor rows, OptionalTensor weights) {
  const char* op = "combine_backward";
  const DType dtype = data_dtype(op, "grad", grad);
  CHECK_SHAPE(op, grad, kAnySize, kAnySize);
  CHECK_SHAPE(op, tokens, kAnySize);
  const int64_t num_tokens = grad.size(0), dim = grad.size(1), num_routes = tokens.size(0);
  tokens = checked_index(op, "tokens", tokens, num_routes, grad);
  weights = checked_weights(op, weights, grad, num_routes);
  check_range(op, "tokens", tokens, num_tokens);
  if (rows) {
    check_device(op, "rows", *rows, grad);
    check_dtype(op, "rows", *rows, grad.scalar_type());
    check_shape(op, "rows", *rows, {num_routes, dim});
    rows = contiguous(*rows);
  }
  grad = contiguous(grad);

  Tensor grad_rows = empty({num_routes, dim}, grad.scalar_type(), grad);
  Tensor grad_weights = empty({rows ? num_routes : 0}, acc_dtype(grad), grad);
  CombineBackwardArgs args{};
  args.dtype = dtype;
  args.grad = grad.const_data_ptr();
  args.rows = data_or_null(rows);
  args.tokens = static_cast<const int32_t*>(tokens.const_data_ptr());
  args.weights = data_or_null(weights);
  args.num_tokens = num_tokens;
  args.num_routes = num_routes;
  args.dim = dim;
  args.grad_rows = grad_rows.mutable_data_ptr();
  args.grad_weights = rows ? grad_weights.mutable_data_ptr() : nullptr;
  LAUNCH(combine_backward, grad, args);
  return {grad_rows, grad_weights};
}

// (R, 2 F) -> F
int64_t half_width(const char* op, const Tensor& gate_up) {
  check_shape(op, "gate_up", gate_up, {kAnySize, kAnySize});
  if (gate_up.size(1) % 2 != 0) fail(op, "gate_up", "an even number of columns, gate | up", shape_name(gate_up.sizes()));
  return gate_up.size(1) / 2;
}

Tensor swiglu(Tensor gate_up, OptionalTensor weights) {
  const char* op = "swiglu";
  const DType dtype = data_dtype(op, "gate_up", gate_up);
  const int64_t dim = half_width(op, gate_up), num_rows = gate_up.size(0);
  weights = checked_weights(op, weights, gate_up, num_rows);
  gate_up = contiguous(gate_up);

  Tensor out = empty({num_rows, dim}, gate_up.scalar_type(), gate_up);
  SwigluArgs args{};
  args.dtype = dtype;
  args.gate_up = gate_up.const_data_ptr();
  args.weights = data_or_null(weights);
  args.num_rows = num_rows;
  args.dim = dim;
  args.out = out.mutable_data_ptr();
  LAUNCH(swiglu, gate_up, args);
  return out;
}

Tensor checked_grad(const char* op, const Tensor& grad, const Tensor& gate_up, int64_t dim) {
  check_device(op, "grad", grad, gate_up);
  check_dtype(op, "grad", grad, gate_up.scalar_type());
  check_shape(op, "grad", grad, {gate_up.size(0), dim});
  return contiguous(grad);
}

std::tuple<Tensor, Tensor, Tensor> swiglu_backward(Tensor grad, Tensor gate_up, OptionalTensor weights) {
  const char* op = "swiglu_backward";
  const DType dtype = data_dtype(op, "gate_up", gate_up);
  const int64_t dim = half_width(op, gate_up), num_rows = gate_up.size(0);
  grad = checked_grad(op, grad, gate_up, dim);
  weights = checked_weights(op, weights, gate_up, num_rows);
  gate_up = contiguous(gate_up);

  Tensor grad_gate_up = empty({num_rows, 2 * dim}, gate_up.scalar_type(), gate_up);
  Tensor grad_weights = empty({weights ? num_rows : 0}, acc_dtype(gate_up), gate_up);
  Tensor activation = empty({num_rows, dim}, gate_up.scalar_type(), gate_up);
  SwigluBackwardArgs args{};
  args.dtype = dtype;
  args.grad = grad.const_data_ptr();
  args.gate_up = gate_up.const_data_ptr();
  args.weights = data_or_null(weights);
  args.num_rows = num_rows;
  args.dim = dim;
  args.grad_gate_up = grad_gate_up.mutable_data_ptr();
  args.grad_weights = weights ? grad_weights.mutable_data_ptr() : nullptr;
  args.activation = activation.mutable_data_ptr();
  LAUNCH(swiglu_backward, gate_up, args);
  return {grad_gate_up, grad_weights, activation};
}

Tensor swiglu_dot(Tensor grad, Tensor gate_up) {
  const char* op = "swiglu_dot";
  const DType dtype = data_dtype(op, "gate_up", gate_up);
  const int64_t dim = half_width(op, gate_up), num_rows = gate_up.size(0);
  grad = checked_grad(op, grad, gate_up, dim);
  gate_up = contiguous(gate_up);

  Tensor out = empty({num_rows}, acc_dtype(gate_up), gate_up);
  SwigluDotArgs args{};
  args.dtype = dtype;
  args.grad = grad.const_data_ptr();
  args.gate_up = gate_up.const_data_ptr();
  args.num_rows = num_rows;
  args.dim = dim;
  args.out = out.mutable_data_ptr();
  LAUNCH(swiglu_dot, gate_up, args);
  return out;
}

// Where each rank's rows begin here and there, and the addresses of the ranks' buffers. Tensors are kept here as long as their pointers are used.
struct Peers {
  Tensor begins, places, buffers;
  int64_t num_ranks;

  Peers(const char* op, const Tensor& begins_, const Tensor& places_, const Tensor& buffers_, int64_t num_pairs, const Tensor& like)
      : begins(begins_), places(places_), buffers(buffers_), num_ranks(buffers_.numel()) {
    begins = checked_index(op, "begins", begins, num_ranks + 1, like);
    places = checked_index(op, "places", places, num_ranks, like);
    check_device(op, "buffers", buffers, like);
    check_dtype(op, "buffers", buffers, ScalarType::Long);
    check_shape(op, "buffers", buffers, {num_ranks});
    buffers = contiguous(buffers);
    check_begins(op, num_pairs);
  }

  // On CUDA the kernels check both: looking here would wait for the device.
  void check_begins(const char* op, int64_t num_pairs) const {
    if (!begins.is_cpu() || (begin()[0] == 0 && begin()[num_ranks] == num_pairs && std::is_sorted(begin(), begin() + num_ranks + 1))) return;
    fail(op, "begins", "offsets that rise from 0 to " + std::to_string(num_pairs), "others");
  }

  void check_room(const char* op, int64_t row_bytes, int64_t capacity) const {
    if (!begins.is_cpu()) return;
    for (int64_t w = 0; w < num_ranks; ++w) {
      const int64_t last = int64_t{place()[w]} + begin()[w + 1] - begin()[w];
      if (place()[w] >= 0 && last * row_bytes <= capacity) continue;
      fail(op, "places", "rows within a buffer of " + std::to_string(capacity) + " bytes", "row " + std::to_string(last) + " of " + std::to_string(row_bytes));
    }
  }

  const int32_t* begin() const { return static_cast<const int32_t*>(begins.const_data_ptr()); }
  const int32_t* place() const { return static_cast<const int32_t*>(places.const_data_ptr()); }
  const int64_t* buffer() const { return static_cast<const int64_t*>(buffers.const_data_ptr()); }
};

void push_rows(Tensor x, OptionalTensor tokens, Tensor begins, Tensor places, Tensor buffers, int64_t capacity) {
  const char* op = "push_rows";
  CHECK_SHAPE(op, x, kAnySize, kAnySize);
  const int64_t num_rows = x.size(0), num_pairs = tokens ? tokens->numel() : num_rows;
  if (tokens) {
    tokens = checked_index(op, "tokens", *tokens, num_pairs, x);
    check_range(op, "tokens", *tokens, num_rows);
  }
  const Peers peers(op, begins, places, buffers, num_pairs, x);
  x = contiguous(x);
  const int64_t row_bytes = x.size(1) * static_cast<int64_t>(x.element_size());
  peers.check_room(op, row_bytes, capacity);
  PushArgs args{};
  args.x = x.const_data_ptr();
  args.tokens = static_cast<const int32_t*>(data_or_null(tokens));
  args.begins = peers.begin(), args.places = peers.place(), args.buffers = peers.buffer();
  args.num_rows = num_rows;
  args.num_pairs = num_pairs;
  args.num_ranks = peers.num_ranks;
  args.row_bytes = row_bytes;
  args.capacity = capacity;
  LAUNCH(push_rows, x, args);
}

Tensor pull_rows(Tensor like, Tensor row_offsets, Tensor positions, Tensor begins, Tensor places, Tensor buffers, int64_t capacity) {
  const char* op = "pull_rows";
  CHECK_SHAPE(op, like, kAnySize, kAnySize);
  const DType dtype = data_dtype(op, "like", like);
  const int64_t num_tokens = tokens_of(op, row_offsets), num_pairs = positions.numel(), dim = like.size(1);
  row_offsets = checked_index(op, "row_offsets", row_offsets, num_tokens + 1, like);
  positions = checked_index(op, "positions", positions, num_pairs, like);
  check_offsets(op, row_offsets, num_pairs);
  check_range(op, "positions", positions, num_pairs);
  const Peers peers(op, begins, places, buffers, num_pairs, like);
  peers.check_room(op, dim * static_cast<int64_t>(like.element_size()), capacity);
  Tensor out = empty({num_tokens, dim}, like.scalar_type(), like);
  PullArgs args{};
  args.dtype = dtype;
  args.row_offsets = static_cast<const int32_t*>(row_offsets.const_data_ptr());
  args.positions = static_cast<const int32_t*>(positions.const_data_ptr());
  args.begins = peers.begin(), args.places = peers.place(), args.buffers = peers.buffer();
  args.num_tokens = num_tokens;
  args.num_pairs = num_pairs;
  args.num_ranks = peers.num_ranks;
  args.dim = dim;
  args.capacity = capacity;
  args.out = out.mutable_data_ptr();
  LAUNCH(pull_rows, like, args);
  return out;
}

#define REGISTER_ALL(m)                                 \
  m.impl("route", TORCH_BOX(&route));                   \
  m.impl("permute", TORCH_BOX(&permute));               \
  m.impl("combine", TORCH_BOX(&combine));               \
  m.impl("combine_backward", TORCH_BOX(&combine_backward)); \
  m.impl("swiglu", TORCH_BOX(&swiglu));                 \
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward)); \
  m.impl("swiglu_dot", TORCH_BOX(&swiglu_dot));         \
  m.impl("push_rows", TORCH_BOX(&push_rows));           \
  m.impl("pull_rows", TORCH_BOX(&pull_rows))

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moetrain, CPU, m) { REGISTER_ALL(m); }
#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(moetrain, CUDA, m) { REGISTER_ALL(m); }
#endif

}  // namespace moetrain

// An empty module: importing it loads this library, whose static initialisers register the operators.
extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "moetrain's operators, registered with torch.", -1, nullptr};
  return PyModule_Create(&module);
}
