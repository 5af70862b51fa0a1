// The operators' CPU kernels, each the emulated CUDA kernel of the same name; a line per kernel. The same kernels for ctypes: emulated_NAME
// takes the address of the arguments and returns null or what went wrong.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "../../csrc/kernels.h"

namespace {

template <class Args>
const char* call(void (*kernel)(const Args&, void*), const void* args) {
  static thread_local std::string error;
  try {
    kernel(*static_cast<const Args*>(args), nullptr);
    return nullptr;
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
}

// With a workspace of exactly the size that it asks for.
void route_with_workspace(const moetrain::RouteArgs& args, void* stream) {
  const size_t bytes = moetrain::cuda::route_workspace(args.num_tokens, args.num_experts);
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, bytes) != 0) throw std::bad_alloc();
  const std::unique_ptr<void, void (*)(void*)> owner(memory, &std::free);
  std::memset(memory, 0xa5, bytes);
  moetrain::RouteArgs with = args;
  with.workspace = memory;
  moetrain::cuda::route(with, stream);
}

}  // namespace

#define FOR_CTYPES(NAME, KERNEL, ARGS) \
  extern "C" __attribute__((visibility("default"))) const char* emulated_##NAME(const void* args) { return call<moetrain::ARGS>(KERNEL, args); }
#define FORWARD(NAME, ARGS)                                                                \
  void moetrain::cpu::NAME(const moetrain::ARGS& args) { moetrain::cuda::NAME(args, nullptr); } \
  FOR_CTYPES(NAME, moetrain::cuda::NAME, ARGS)

FORWARD(permute, PermuteArgs)
FORWARD(combine, CombineArgs)
FORWARD(combine_backward, CombineBackwardArgs)
FORWARD(swiglu, SwigluArgs)
FORWARD(swiglu_backward, SwigluBackwardArgs)
FORWARD(swiglu_dot, SwigluDotArgs)
FORWARD(push_rows, PushArgs)
FORWARD(pull_rows, PullArgs)
FOR_CTYPES(route, route_with_workspace, RouteArgs)

namespace moetrain::cpu {

// The CPU's kernel counts first. Here the CUDA kernel must notice by itself, before this says the right number.
int64_t route(const RouteArgs& args) {
  int64_t ones = 0;
  for (int64_t i = 0; i < args.num_tokens * args.num_experts; ++i) ones += args.mask[i] != 0;
  const bool fits = args.padded ? ones <= args.num_routes : ones == args.num_routes;
  try {
    route_with_workspace(args, nullptr);
  } catch (const std::exception& error) {
    if (fits || !std::strstr(error.what(), "num_routes")) throw;
    return ones;
  }
  if (!fits) throw std::runtime_error("the CUDA kernel took a wrong num_routes");
  return ones;
}

// No block of experts on CUDA: they are computed from the operators above and torch's products, as a router's logits are.
bool has_experts(DType) { return false; }
int64_t experts_row_elements(DType, int64_t) { std::abort(); }
int64_t experts_scratch(const ExpertsArgs&, ExpertsPass) { std::abort(); }
void experts_forward(const ExpertsArgs&) { std::abort(); }
void experts_backward(const ExpertsArgs&) { std::abort(); }
void experts_probe(const ExpertsArgs&) { std::abort(); }
int64_t wide_linear_packed(const WideLinearArgs&) { std::abort(); }
int64_t wide_linear_scratch(const WideLinearArgs&) { std::abort(); }
void wide_linear(const WideLinearArgs&) { std::abort(); }
void wide_linear_backward(const WideLinearArgs&) { std::abort(); }

}  // namespace moetrain::cpu
