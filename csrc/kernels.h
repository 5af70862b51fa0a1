// The kernels as the operators see them: plain pointers and sizes, no torch. csrc/cpu/ and csrc/cuda/ implement the same list.
//
// Letters: T tokens, D model dim, F expert dim, E experts, R routes ((token, expert) pairs, sorted by expert, then token).
// Every pointer is to dense row-major memory on the device of the kernel. Index arrays are int32, so T, E and R stay below
// 2^31; offsets into (R, D) arrays are computed in int64. `acc` is double for f64 data and float for everything else.
// A kernel may be called with any size zero and then touches nothing that has no elements.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moetrain {

enum class DType { f32, bf16, f16, f64 };

// Mask to routes. A stable counting sort: the result does not depend on the number of threads or blocks.
struct RouteArgs {
  const uint8_t* mask;   // (T, E), 0 or not
  int64_t num_tokens;    // T
  int64_t num_experts;   // E
  int64_t num_routes;    // R, the number of ones in mask according to the caller, or with `padded` room for at least as many
  bool padded;           // what is left of tokens and positions is 0
  int32_t* tokens;       // (R,) token of each route
  int32_t* counts;       // (E,) routes per expert
  int32_t* row_offsets;  // (T + 1,) routes before each token
  int32_t* positions;    // (R,) by token, then expert: place of each of the token's routes in `tokens`
  void* workspace;       // CUDA only: cuda::route_workspace(T, E) bytes, aligned to 256
};

// out[r] = x[tokens[r]]
struct PermuteArgs {
  DType dtype;
  const void* x;          // (T, D)
  const int32_t* tokens;  // (R,)
  int64_t num_tokens;     // T
  int64_t num_routes;     // R
  int64_t dim;            // D
  void* out;              // (R, D)
};

// out[t] = sum over j in [row_offsets[t], row_offsets[t + 1]) of weights[p] * rows[p], p = positions[j], in ascending j in acc.
struct CombineArgs {
  DType dtype;
  const void* rows;            // (R, D)
  const int32_t* row_offsets;  // (T + 1,)
  const int32_t* positions;    // (R,)
  const void* weights;         // (R,) acc, or null for 1
  int64_t num_tokens;          // T
  int64_t num_routes;          // R
  int64_t dim;                 // D
  void* out;                   // (T, D)
};

// grad_rows[r] = weights[r] * grad[tokens[r]]; grad_weights[r] = <grad[tokens[r]], rows[r]>
struct CombineBackwardArgs {
  DType dtype;
  const void* grad;       // (T, D)
  const void* rows;       // (R, D), or null when grad_weights is null
  const int32_t* tokens;  // (R,)
  const void* weights;    // (R,) acc, or null for 1
  int64_t num_tokens;     // T
  int64_t num_routes;     // R
  int64_t dim;            // D
  void* grad_rows;        // (R, D)
  void* grad_weights;     // (R,) acc, or null
};

// out = weights * silu(gate) * up
struct SwigluArgs {
  DType dtype;
  const void* gate_up;  // (R, 2 F): gate | up
  const void* weights;  // (R,) acc, or null for 1
  int64_t num_rows;     // R
  int64_t dim;          // F
  void* out;            // (R, F)
};

struct SwigluBackwardArgs {
  DType dtype;
  const void* grad;     // (R, F)
  const void* gate_up;  // (R, 2 F)
  const void* weights;  // (R,) acc, or null for 1
  int64_t num_rows;     // R
  int64_t dim;          // F
  void* grad_gate_up;   // (R, 2 F)
  void* grad_weights;   // (R,) acc: <grad, silu(gate) * up>, or null
  void* activation;     // (R, F): the forward output again
};

// out[r] = <grad[r], silu(gate[r]) * up[r]>
struct SwigluDotArgs {
  DType dtype;
  const void* grad;     // (R, F)
  const void* gate_up;  // (R, 2 F)
  int64_t num_rows;     // R
  int64_t dim;          // F
  void* out;            // (R,) acc
};

// Rows of this rank straight into the ranks' buffers: row p goes to the rank w with begins[w] <= p < begins[w + 1], as row
// places[w] + p - begins[w] of its buffer. Every buffer can be written from here (shared memory, or a GPU's peer memory).
struct PushArgs {
  const void* x;           // (N, row_bytes)
  const int32_t* tokens;   // (P,) row of x of each row sent, or null for all N in their order
  const int32_t* begins;   // (W + 1,) rising from 0 to P
  const int32_t* places;   // (W,)
  const int64_t* buffers;  // (W,) addresses, each aligned to 16
  int64_t num_rows;        // N
  int64_t num_pairs;       // P
  int64_t num_ranks;       // W
  int64_t row_bytes;
  int64_t capacity;        // bytes of a buffer
};

// The way back: out[t] = sum over j in [row_offsets[t], row_offsets[t + 1]) of the row that `push` would write for p = positions[j], in ascending j in
// acc.
struct PullArgs {
  DType dtype;
  const int32_t* row_offsets;  // (T + 1,)
  const int32_t* positions;    // (P,)
  const int32_t* begins;       // (W + 1,)
  const int32_t* places;       // (W,)
  const int64_t* buffers;      // (W,) addresses of (.., D), each aligned to 16
  int64_t num_tokens;          // T
  int64_t num_pairs;           // P
  int64_t num_ranks;           // W
  int64_t dim;                 // D
  int64_t capacity;            // bytes of a buffer
  void* out;                   // (T, D)
};

// Threads that may work, and scratch for each of them.
struct Threads {
  int64_t number;
  void* memory;  // aligned to 64
  int64_t bytes_per_thread;
};

// The experts' SwiGLU FFNs over a route list, CPU, float32 and bfloat16. out[t] = sum over the routes r of t of
// weights[r] (silu(x G^T) * (x U^T)) V^T, with x = rows[tokens[r]], G | U and V the expert's matrices; and its derivatives. The probe pass
// computes grad_weights alone, from rows and grad. Rows "+ 8" are never read for a result: blocks of rows are rounded up.
enum class ExpertsPass { forward, backward, probe };
struct ExpertsArgs {
  DType dtype;
  const void* rows;       // (N, D)
  const void* gate_up;    // (E, 2 F, D)
  const void* down;       // (E, D, F)
  const float* weights;   // (R,); not of the probe pass
  const int32_t* tokens;  // (R,) sorted by expert, then token
  const int32_t* counts;  // (E,) adding up to R at most; rows of later routes are neither read nor written
  const void* grad;       // (N, D): of out; backward and probe
  int64_t num_rows;       // N
  int64_t num_routes;     // R
  int64_t num_experts;    // E
  int64_t dim;            // D
  int64_t expert_dim;     // F
  void* pre;              // (R, 2 F): written by forward, read by backward
  void* activation;       // (R + 8, experts_row_elements(F)), temporary; backward
  void* grad_pre;         // (R + 8, 2 F), temporary; backward
  void* out;              // (N, D); forward
  void* grad_rows;        // (N, D), or null; backward, as those below
  void* grad_gate_up;     // (E, 2 F, D), or null
  void* grad_down;        // (E, D, F), or null
  float* grad_weights;    // (R,): <grad[tokens[r]], output of the expert before its weight>; of later routes not written
  Threads threads;        // each with experts_scratch() bytes
};

// The k largest of each row, the largest first; among equals the lower expert. CPU.
struct LargestArgs {
  const float* scores;  // (T, E)
  int64_t num_tokens;   // T
  int64_t num_experts;  // E
  int64_t k;            // 0 to E
  int64_t* experts;     // (T, k)
};

// out = each active score over the sum of its row's active scores, which counts as 1 where it is not positive; 0 elsewhere. With `grad`: the derivative
// with respect to the scores. CPU.
struct ShareArgs {
  const float* scores;    // (T, E)
  const uint8_t* active;  // (T, E), 0 or not
  const float* grad;      // (T, E): of the shares, or null
  int64_t num_tokens;     // T
  int64_t num_experts;    // E
  float* out;             // (T, E)
};

// How many are not 0 in each column and in each row. CPU.
struct CountArgs {
  const uint8_t* mask;  // (T, E)
  int64_t num_tokens;   // T
  int64_t num_experts;  // E
  int32_t* of_experts;  // (E,)
  int32_t* of_tokens;   // (T,)
};

// A router's logits from narrower hidden states, CPU: logits = x W^T of x in bfloat16 and W in float32, computed in float32; and its derivatives.
struct WideLinearArgs {
  const void* x;          // (T, D) bfloat16
  const float* weight;    // (E, D)
  const float* grad;      // (T, E): of the logits; backward
  int64_t num_tokens;     // T
  int64_t num_experts;    // E
  int64_t dim;            // D
  float* logits;          // (T, E); forward
  void* grad_x;           // (T, D) bfloat16, or null; backward
  float* grad_weight;     // (E, D), or null; backward
  float* packed;          // wide_linear_packed() numbers, temporary
  Threads threads;        // each with wide_linear_scratch() bytes
};

namespace cpu {
// Returns how many ones the mask has. When that is not num_routes, or with `padded` is more, nothing is written.
int64_t route(const RouteArgs& args);
void permute(const PermuteArgs& args);
void combine(const CombineArgs& args);
void combine_backward(const CombineBackwardArgs& args);
void swiglu(const SwigluArgs& args);
void swiglu_backward(const SwigluBackwardArgs& args);
void swiglu_dot(const SwigluDotArgs& args);
void push_rows(const PushArgs& args);
void pull_rows(const PullArgs& args);
bool has_experts(DType dtype);  // whether this torch on this processor has what the passes below are made of
int64_t experts_row_elements(DType dtype, int64_t dim);
int64_t experts_scratch(const ExpertsArgs& args, ExpertsPass pass);
void experts_forward(const ExpertsArgs& args);
void experts_backward(const ExpertsArgs& args);
void experts_probe(const ExpertsArgs& args);
void largest(const LargestArgs& args);
void share(const ShareArgs& args);
void count(const CountArgs& args);
int64_t wide_linear_packed(const WideLinearArgs& args);
int64_t wide_linear_scratch(const WideLinearArgs& args);
void wide_linear(const WideLinearArgs& args);
void wide_linear_backward(const WideLinearArgs& args);
}  // namespace cpu

// `stream` is a cudaStream_t. A kernel never waits for the device. Launch errors are thrown as std::runtime_error.
namespace cuda {
size_t route_workspace(int64_t num_tokens, int64_t num_experts);
void route(const RouteArgs& args, void* stream);
void permute(const PermuteArgs& args, void* stream);
void combine(const CombineArgs& args, void* stream);
void combine_backward(const CombineBackwardArgs& args, void* stream);
void swiglu(const SwigluArgs& args, void* stream);
void swiglu_backward(const SwigluBackwardArgs& args, void* stream);
void swiglu_dot(const SwigluDotArgs& args, void* stream);
void push_rows(const PushArgs& args, void* stream);
void pull_rows(const PullArgs& args, void* stream);
}  // namespace cuda

}  // namespace moetrain
