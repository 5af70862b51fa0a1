// The operators that have kernels for the CPU alone: the experts' block, and a router's product and choice. Schemas are in ops.cpp.
#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "kernels.h"
#include "tensors.h"

namespace moetrain {
namespace {

bool has_experts(Tensor like) {
  const ScalarType dtype = like.scalar_type();
  return (dtype == ScalarType::Float && cpu::has_experts(DType::f32)) || (dtype == ScalarType::BFloat16 && cpu::has_experts(DType::bf16));
}

// Scratch for each of the threads; the memory lives as long as what is returned.
Tensor allocate(Threads& threads, int64_t bytes_per_thread, const Tensor& like) {
  Tensor memory = empty_large({bytes_per_thread * threads.number}, ScalarType::Byte, like);
  threads.memory = memory.mutable_data_ptr();
  threads.bytes_per_thread = bytes_per_thread;
  return memory;
}

// The checked arguments of a pass, contiguous, and its scratch. Tensors are kept here as long as the pointers in `args` are used.
struct Experts {
  Tensor rows, gate_up, down, tokens, counts;
  int64_t num_padded = 0;  // routes at the end of the list that are none
  ExpertsArgs args{};

  Experts(const char* op, Tensor rows_, Tensor gate_up_, Tensor down_, Tensor tokens_, Tensor counts_)
      : rows(rows_), gate_up(gate_up_), down(down_), tokens(tokens_), counts(counts_) {
    if (!has_experts(rows)) fail(op, "rows", "float32 or bfloat16 and a torch with oneDNN's brgemm", dtype_name(rows.scalar_type()));
    args.dtype = data_dtype(op, "rows", rows);
    CHECK_SHAPE(op, rows, kAnySize, kAnySize);
    CHECK_SHAPE(op, down, kAnySize, kAnySize, kAnySize);
    CHECK_SHAPE(op, tokens, kAnySize);
    args.num_rows = rows.size(0), args.dim = rows.size(1), args.num_routes = tokens.size(0);
    args.num_experts = down.size(0), args.expert_dim = down.size(2);
    matrix(op, "gate_up", gate_up, {args.num_experts, 2 * args.expert_dim, args.dim});
    matrix(op, "down", down, {args.num_experts, args.dim, args.expert_dim});
    rows = contiguous(rows);
    tokens = checked_index(op, "tokens", tokens, args.num_routes, rows);
    counts = checked_index(op, "counts", counts, args.num_experts, rows);
    check_range(op, "tokens", tokens, args.num_rows);
    args.rows = rows.const_data_ptr(), args.gate_up = gate_up.const_data_ptr(), args.down = down.const_data_ptr();
    args.tokens = static_cast<const int32_t*>(tokens.const_data_ptr());
    args.counts = static_cast<const int32_t*>(counts.const_data_ptr());
    int64_t total = 0;
    for (int64_t e = 0; e < args.num_experts; ++e) total += args.counts[e] < 0 ? -(int64_t{1} << 40) : args.counts[e];
    if (total < 0 || total > args.num_routes) {
      fail(op, "counts", "counts >= 0 that add up to at most " + std::to_string(args.num_routes), "others");
    }
    num_padded = args.num_routes - total;
    // Forward finds the routes of a range of tokens by bisection.
    for (const int32_t *at = args.tokens, *count = args.counts; count < args.counts + args.num_experts; at += *count++) {
      if (!std::is_sorted(at, at + *count)) fail(op, "tokens", "each expert's tokens in ascending order, as route gives them", "others");
    }
  }

  void matrix(const char* op, const char* name, Tensor& tensor, std::initializer_list<int64_t> shape) {
    check_device(op, name, tensor, rows);
    check_dtype(op, name, tensor, rows.scalar_type());
    check_shape(op, name, tensor, shape);
    tensor = contiguous(tensor);
  }

  // (R,) for the kernels to write: 0 for routes that are none, which they leave alone.
  Tensor per_route() {
    Tensor numbers = empty_large({args.num_routes}, ScalarType::Float, rows);
    std::fill_n(static_cast<float*>(numbers.mutable_data_ptr()) + args.num_routes - num_padded, num_padded, 0.0f);
    return numbers;
  }

  Tensor temporary(int64_t columns) { return empty_large({args.num_routes + 8, columns}, rows.scalar_type(), rows); }

  void run(void (*kernel)(const ExpertsArgs&), ExpertsPass pass) {
    args.threads.number = torch::stable::get_num_threads();
    const Tensor memory = allocate(args.threads, cpu::experts_scratch(args, pass), rows);
    kernel(args);
  }
};

std::tuple<Tensor, Tensor> experts(Tensor rows, Tensor gate_up, Tensor down, Tensor weights, Tensor tokens, Tensor counts) {
  const char* op = "experts";
  Experts e(op, rows, gate_up, down, tokens, counts);
  ExpertsArgs& a = e.args;
  weights = *checked_weights(op, weights, e.rows, a.num_routes);
  Tensor out = empty_large({a.num_rows, a.dim}, e.rows.scalar_type(), e.rows);
  Tensor pre = empty_large({a.num_routes, 2 * a.expert_dim}, e.rows.scalar_type(), e.rows);
  a.weights = static_cast<const float*>(weights.const_data_ptr());
  a.out = out.mutable_data_ptr();
  a.pre = pre.mutable_data_ptr();
  e.run(cpu::experts_forward, ExpertsPass::forward);
  return {out, pre};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> experts_backward(
    Tensor grad, Tensor rows, Tensor gate_up, Tensor down, Tensor weights, Tensor pre, Tensor tokens, Tensor counts,
    std::vector<bool> needs) {
  const char* op = "experts_backward";
  Experts e(op, rows, gate_up, down, tokens, counts);
  ExpertsArgs& a = e.args;
  weights = *checked_weights(op, weights, e.rows, a.num_routes);
  e.matrix(op, "grad", grad, {a.num_rows, a.dim});
  e.matrix(op, "pre", pre, {a.num_routes, 2 * a.expert_dim});
  const ScalarType dtype = e.rows.scalar_type();
  // What is not wanted comes back empty.
  Tensor grad_rows = needs[0] ? empty_large({a.num_rows, a.dim}, dtype, rows) : empty({0}, dtype, rows);
  Tensor grad_gate_up = needs[1] ? empty_large({a.num_experts, 2 * a.expert_dim, a.dim}, dtype, rows) : empty({0}, dtype, rows);
  Tensor grad_down = needs[2] ? empty_large({a.num_experts, a.dim, a.expert_dim}, dtype, rows) : empty({0}, dtype, rows);
  Tensor grad_weights = e.per_route();
  Tensor activation = e.temporary(cpu::experts_row_elements(a.dtype, a.expert_dim)), grad_pre = e.temporary(2 * a.expert_dim);
  a.weights = static_cast<const float*>(weights.const_data_ptr());
  a.grad = grad.const_data_ptr();
  a.pre = pre.mutable_data_ptr();
  a.activation = activation.mutable_data_ptr();
  a.grad_pre = grad_pre.mutable_data_ptr();
  a.grad_rows = needs[0] ? grad_rows.mutable_data_ptr() : nullptr;
  a.grad_gate_up = needs[1] ? grad_gate_up.mutable_data_ptr() : nullptr;
  a.grad_down = needs[2] ? grad_down.mutable_data_ptr() : nullptr;
  a.grad_weights = static_cast<float*>(grad_weights.mutable_data_ptr());
  e.run(cpu::experts_backward, ExpertsPass::backward);
  return {grad_rows, grad_gate_up, grad_down, grad_weights};
}

Tensor experts_probe(Tensor grad, Tensor rows, Tensor gate_up, Tensor down, Tensor tokens, Tensor counts) {
  const char* op = "experts_probe";
  Experts e(op, rows, gate_up, down, tokens, counts);
  ExpertsArgs& a = e.args;
  e.matrix(op, "grad", grad, {a.num_rows, a.dim});
  Tensor out = e.per_route();
  a.grad = grad.const_data_ptr();
  a.grad_weights = static_cast<float*>(out.mutable_data_ptr());
  e.run(cpu::experts_probe, ExpertsPass::probe);
  return out;
}

// The checked arguments of a router's product, contiguous. Tensors are kept here as long as the pointers in `args` are used.
struct WideLinear {
  Tensor x, weight;
  WideLinearArgs args{};

  WideLinear(const char* op, Tensor x_, Tensor weight_) : x(x_), weight(weight_) {
    CHECK_DTYPE(op, x, ScalarType::BFloat16);
    CHECK_DTYPE(op, weight, ScalarType::Float);
    CHECK_DEVICE(op, weight, x);
    if (!cpu::has_experts(DType::f32)) fail(op, "x", "a torch with oneDNN's brgemm", "none");
    CHECK_SHAPE(op, x, kAnySize, kAnySize);
    check_shape(op, "weight", weight, {kAnySize, x.size(1)});
    x = contiguous(x);
    weight = contiguous(weight);
    args.num_tokens = x.size(0), args.dim = x.size(1), args.num_experts = weight.size(0);
    args.x = x.const_data_ptr();
    args.weight = static_cast<const float*>(weight.const_data_ptr());
    args.threads.number = torch::stable::get_num_threads();
  }
};

Tensor wide_linear(Tensor x, Tensor weight) {
  WideLinear w("wide_linear", x, weight);
  WideLinearArgs& a = w.args;
  Tensor logits = empty({a.num_tokens, a.num_experts}, ScalarType::Float, x);
  Tensor packed = empty_large({cpu::wide_linear_packed(a)}, ScalarType::Float, x);
  a.logits = static_cast<float*>(logits.mutable_data_ptr());
  a.packed = static_cast<float*>(packed.mutable_data_ptr());
  const Tensor memory = allocate(a.threads, cpu::wide_linear_scratch(a), x);
  cpu::wide_linear(a);
  return logits;
}

std::tuple<Tensor, Tensor> wide_linear_backward(Tensor grad, Tensor x, Tensor weight, std::vector<bool> needs) {
  const char* op = "wide_linear_backward";
  WideLinear w(op, x, weight);
  WideLinearArgs& a = w.args;
  CHECK_DEVICE(op, grad, x);
  CHECK_DTYPE(op, grad, ScalarType::Float);
  CHECK_SHAPE(op, grad, a.num_tokens, a.num_experts);
  grad = contiguous(grad);
  Tensor grad_x = needs[0] ? empty_large({a.num_tokens, a.dim}, ScalarType::BFloat16, x) : empty({0}, ScalarType::BFloat16, x);
  Tensor grad_weight = needs[1] ? empty_large({a.num_experts, a.dim}, ScalarType::Float, x) : empty({0}, ScalarType::Float, x);
  a.grad = static_cast<const float*>(grad.const_data_ptr());
  a.grad_x = needs[0] ? grad_x.mutable_data_ptr() : nullptr;
  a.grad_weight = needs[1] ? static_cast<float*>(grad_weight.mutable_data_ptr()) : nullptr;
  Tensor packed = empty_large({cpu::wide_linear_packed(a)}, ScalarType::Float, x);
  a.packed = static_cast<float*>(packed.mutable_data_ptr());
  const Tensor memory = allocate(a.threads, cpu::wide_linear_scratch(a), x);
  cpu::wide_linear_backward(a);
  return {grad_x, grad_weight};
}

Tensor largest(Tensor scores, int64_t k) {
  const char* op = "largest";
  CHECK_DTYPE(op, scores, ScalarType::Float);
  CHECK_SHAPE(op, scores, kAnySize, kAnySize);
  LargestArgs args{};
  args.num_tokens = scores.size(0), args.num_experts = scores.size(1), args.k = k;
  if (k < 0 || k > args.num_experts) fail(op, "k", "0 to " + std::to_string(args.num_experts), std::to_string(k));
  scores = contiguous(scores);
  Tensor experts = empty({args.num_tokens, k}, ScalarType::Long, scores);
  args.scores = static_cast<const float*>(scores.const_data_ptr());
  args.experts = static_cast<int64_t*>(experts.mutable_data_ptr());
  if (k > 0) cpu::largest(args);
  return experts;
}

Tensor shares(const char* op, Tensor scores, Tensor active, OptionalTensor grad) {
  CHECK_DTYPE(op, scores, ScalarType::Float);
  CHECK_SHAPE(op, scores, kAnySize, kAnySize);
  CHECK_DEVICE(op, active, scores);
  CHECK_DTYPE(op, active, ScalarType::Bool);
  ShareArgs args{};
  args.num_tokens = scores.size(0), args.num_experts = scores.size(1);
  CHECK_SHAPE(op, active, args.num_tokens, args.num_experts);
  if (grad) {
    check_device(op, "grad", *grad, scores);
    check_dtype(op, "grad", *grad, ScalarType::Float);
    check_shape(op, "grad", *grad, {args.num_tokens, args.num_experts});
    grad = contiguous(*grad);
  }
  scores = contiguous(scores);
  active = contiguous(active);
  Tensor out = empty({args.num_tokens, args.num_experts}, ScalarType::Float, scores);
  args.scores = static_cast<const float*>(scores.const_data_ptr());
  args.active = static_cast<const uint8_t*>(active.const_data_ptr());
  args.grad = static_cast<const float*>(data_or_null(grad));
  args.out = static_cast<float*>(out.mutable_data_ptr());
  cpu::share(args);
  return out;
}

Tensor share(Tensor scores, Tensor active) { return shares("share", scores, active, std::nullopt); }
Tensor share_backward(Tensor grad, Tensor scores, Tensor active) { return shares("share_backward", scores, active, grad); }

std::tuple<Tensor, Tensor> count(Tensor mask) {
  const char* op = "count";
  CHECK_DTYPE(op, mask, ScalarType::Bool);
  CHECK_SHAPE(op, mask, kAnySize, kAnySize);
  CountArgs args{};
  args.num_tokens = mask.size(0), args.num_experts = mask.size(1);
  mask = contiguous(mask);
  Tensor of_experts = empty({args.num_experts}, ScalarType::Int, mask), of_tokens = empty({args.num_tokens}, ScalarType::Int, mask);
  args.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  args.of_experts = static_cast<int32_t*>(of_experts.mutable_data_ptr());
  args.of_tokens = static_cast<int32_t*>(of_tokens.mutable_data_ptr());
  cpu::count(args);
  return {of_experts, of_tokens};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moetrain, CPU, m) {
  m.impl("has_experts", TORCH_BOX(&has_experts));
  m.impl("experts", TORCH_BOX(&experts));
  m.impl("experts_backward", TORCH_BOX(&experts_backward));
  m.impl("experts_probe", TORCH_BOX(&experts_probe));
  m.impl("largest", TORCH_BOX(&largest));
  m.impl("share", TORCH_BOX(&share));
  m.impl("share_backward", TORCH_BOX(&share_backward));
  m.impl("count", TORCH_BOX(&count));
  m.impl("wide_linear", TORCH_BOX(&wide_linear));
  m.impl("wide_linear_backward", TORCH_BOX(&wide_linear_backward));
}

}  // namespace moetrain
