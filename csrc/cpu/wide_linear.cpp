// A router's logits in float32 from hidden states in bfloat16, and their backward: narrow products, a few experts wide, of a large matrix that is
// widened block by block where it is used.
//
// Each sum has one owner and one order: over D by steps of kDepth, over tokens by steps of kTokens.
#include <algorithm>

#include "../kernels.h"
#include "brgemm.h"
#include "finish.h"
#include "layout.h"
#include "math.h"
#include "tasks.h"

namespace moetrain::cpu {

namespace {

constexpr int64_t kRows = 64;      // tokens of a block's product
constexpr int64_t kDepth = 512;    // of D at a time: a widened block stays in a core's second cache
constexpr int64_t kTokens = 128;   // at a time of a sum over tokens
constexpr int64_t kRowStep = 8;    // the last block's rows are rounded up to this: each size is a kernel that is compiled and kept
constexpr int64_t kLeastTask = 2;  // panels
constexpr int64_t kMostTask = 4;

// out[r][j] = x[r][j] for j < n, zeros from `rows` up to `padded` rows.
MOETRAIN_MULTIVERSION void widen(const bfloat16* x, int64_t ldx, int64_t rows, int64_t padded, int64_t n, float* out, int64_t ldo) {
  for (int64_t r = 0; r < padded; ++r) {
    MOETRAIN_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) out[r * ldo + j] = r < rows ? load(x[r * ldx + j]) : 0.0f;
  }
}

int64_t rows_of(const WideLinearArgs& a, int64_t t) { return std::min(kRows, a.num_tokens - t); }

struct ForwardScratch {
  float *x, *c;
  ForwardScratch(Scratch& s, const WideLinearArgs& a)
      : x(s.take<float>(kRows * std::min(kDepth, a.dim))), c(s.take<float>(kRows * kColumns)) {}
};

struct RowsScratch {
  float *grad, *c;
  RowsScratch(Scratch& s, const WideLinearArgs& a) : grad(s.take<float>(kRows * a.num_experts)), c(s.take<float>(kRows * kMostTask * kColumns)) {}
};

struct WeightScratch {
  float *x, *sums;
  WeightScratch(Scratch& s, const WideLinearArgs& a)
      : x(s.take<float>(kTokens * kMostTask * kColumns)), sums(s.take<float>(a.num_experts * kMostTask * kColumns)) {}
};

// The transposed weight in panels of kColumns experts, each (D, kColumns).
float* panel_of(const WideLinearArgs& a, int64_t e) { return a.packed + e * a.dim; }

void logits_of_block(const WideLinearArgs& a, int64_t t, char* memory) {
  Scratch scratch(memory);
  const ForwardScratch s(scratch, a);
  const bfloat16* x = static_cast<const bfloat16*>(a.x) + t * a.dim;
  const int64_t rows = rows_of(a, t), padded = round_up(rows, kRowStep), E = a.num_experts;
  float* out = a.logits + t * E;
  if (a.dim == 0) std::fill_n(out, rows * E, 0.0f);
  for (int64_t d = 0; d < a.dim; d += kDepth) {
    const int64_t K = std::min(kDepth, a.dim - d);
    widen(x + d, a.dim, rows, padded, K, s.x, K);
    for (int64_t e = 0; e < E; e += kColumns) {
      const int64_t n = std::min(kColumns, E - e);
      const float* panel = panel_of(a, e) + d * kColumns;
      if (rows == padded) {
        brgemm(rows, n, K, s.x, K, panel, kColumns, out + e, E, d > 0);
        continue;
      }
      for (int64_t r = 0; r < rows && d > 0; ++r) std::copy_n(out + r * E + e, n, s.c + r * kColumns);
      brgemm(padded, n, K, s.x, K, panel, kColumns, s.c, kColumns, d > 0);
      store_end(s.c, kColumns, rows, n, out + e, E);
    }
  }
}

// grad_x of a block: grad (rows, E) @ W (E, D), W in panels of kColumns of D, each (E, kColumns).
void grad_x_of_block(const WideLinearArgs& a, int64_t t, char* memory) {
  Scratch scratch(memory);
  const RowsScratch s(scratch, a);
  const int64_t rows = rows_of(a, t), padded = round_up(rows, kRowStep), E = a.num_experts;
  bfloat16* out = static_cast<bfloat16*>(a.grad_x) + t * a.dim;
  const float* grad = a.grad + t * E;
  if (rows < padded) {
    std::copy_n(grad, rows * E, s.grad);
    std::fill_n(s.grad + rows * E, (padded - rows) * E, 0.0f);
    grad = s.grad;
  }
  constexpr int64_t step = kMostTask * kColumns;
  for (int64_t d0 = 0; d0 < a.dim; d0 += step) {
    const int64_t d1 = std::min(a.dim, d0 + step);
    for (int64_t d = d0; d < d1; d += kColumns) {
      brgemm(padded, std::min(kColumns, d1 - d), E, grad, E, a.packed + d * E, kColumns, s.c + d - d0, step, false);
    }
    store_end(s.c, step, rows, d1 - d0, out + d0, a.dim);
  }
}

// grad (T, E) transposed, in steps of kTokens tokens: (E, kTokens) each, zeros behind the last token.
void turn(const WideLinearArgs& a, int64_t t, float* out) {
  const int64_t rows = std::min(kTokens, a.num_tokens - t), E = a.num_experts;
  transpose_floats(a.grad + t * E, E, rows, E, out, kTokens);
  for (int64_t e = 0; e < E; ++e) std::fill_n(out + e * kTokens + rows, kTokens - rows, 0.0f);
}

// Columns d0 .. d1 of grad_weight: grad^T (E, T) @ x (T, D). turned: all steps of `turn`.
void grad_weight_of_columns(const WideLinearArgs& a, const float* turned, int64_t d0, int64_t d1, char* memory) {
  Scratch scratch(memory);
  const WeightScratch s(scratch, a);
  const bfloat16* x = static_cast<const bfloat16*>(a.x);
  const int64_t E = a.num_experts;
  if (a.num_tokens == 0) std::fill_n(s.sums, round_up(d1 - d0, kColumns) * E, 0.0f);
  for (int64_t t = 0; t < a.num_tokens; t += kTokens) {
    const int64_t rows = std::min(kTokens, a.num_tokens - t);
    for (int64_t d = d0; d < d1; d += kColumns) {
      const int64_t n = std::min(kColumns, d1 - d);
      float *panel = s.x + (d - d0) * kTokens, *sums = s.sums + (d - d0) * E;
      widen(x + t * a.dim + d, a.dim, rows, kTokens, n, panel, kColumns);
      for (int64_t e = 0; e < E; e += kColumns) {
        brgemm(
            std::min(kColumns, E - e), n, kTokens, turned + t * E + e * kTokens, kTokens, panel, kColumns, sums + e * kColumns, kColumns, t > 0);
      }
    }
  }
  for (int64_t d = d0; d < d1; d += kColumns) {
    store_end(s.sums + (d - d0) * E, kColumns, E, std::min(kColumns, d1 - d), a.grad_weight + d, a.dim);
  }
}

int64_t turned_numbers(const WideLinearArgs& a) { return a.grad_weight ? round_up(a.num_tokens, kTokens) * a.num_experts : 0; }

}  // namespace

int64_t wide_linear_packed(const WideLinearArgs& a) {
  if (!a.grad) return round_up(a.num_experts, kColumns) * a.dim;
  return turned_numbers(a) + (a.grad_x ? a.num_experts * round_up(a.dim, kColumns) : 0);
}

int64_t wide_linear_scratch(const WideLinearArgs& a) {
  Scratch forward(nullptr), rows(nullptr), weight(nullptr);
  if (!a.grad) ForwardScratch(forward, a);
  if (a.grad_x) RowsScratch(rows, a);
  if (a.grad_weight) WeightScratch(weight, a);
  return std::max({forward.used(), rows.used(), weight.used()});
}

void wide_linear(const WideLinearArgs& a) {
  for_tasks(a.threads, DType::f32, pieces(a.num_experts, kColumns) * pieces(a.dim, kDepth), [&](int64_t task, char*) {
    const int64_t e = task % pieces(a.num_experts, kColumns) * kColumns, d = task / pieces(a.num_experts, kColumns) * kDepth;
    pack_transposed(
        a.weight + e * a.dim + d, a.dim, std::min(kDepth, a.dim - d), std::min(kColumns, a.num_experts - e), panel_of(a, e) + d * kColumns, kColumns);
  });
  for_tasks(a.threads, DType::f32, pieces(a.num_tokens, kRows), [&](int64_t task, char* memory) { logits_of_block(a, task * kRows, memory); });
}

void wide_linear_backward(const WideLinearArgs& a) {
  float *turned = a.packed, *panels = a.packed + turned_numbers(a);
  if (a.grad_weight) {
    for_tasks(a.threads, DType::f32, pieces(a.num_tokens, kTokens), [&](int64_t task, char*) {
      turn(a, task * kTokens, turned + task * kTokens * a.num_experts);
    });
    // Few wide tasks read x in longer rows; each thread wants one.
    const int64_t panels_of_x = pieces(a.dim, kColumns);
    const int64_t width = std::clamp(panels_of_x / a.threads.number, kLeastTask, kMostTask) * kColumns;
    for_tasks(a.threads, DType::f32, pieces(a.dim, width), [&](int64_t task, char* memory) {
      grad_weight_of_columns(a, turned, task * width, std::min(a.dim, (task + 1) * width), memory);
    });
  }
  if (a.grad_x) {
    WideLinearArgs b = a;
    b.packed = panels;
    pack_rows(Rows<float>{a.weight, a.dim, nullptr}, a.num_experts, a.num_experts, a.dim, kColumns, panels);
    for_tasks(a.threads, DType::f32, pieces(a.num_tokens, kRows), [&](int64_t task, char* memory) { grad_x_of_block(b, task * kRows, memory); });
  }
}

}  // namespace moetrain::cpu
