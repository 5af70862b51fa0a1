// What follows a product of blocks: float32 in, the tensors' type out, or added to sums. T is float or bfloat16.
#pragma once

#include <cstdint>

#include "math.h"

namespace moetrain::cpu {

constexpr int64_t kColumns = 64;  // of a panel of weights; gate and up together have twice as many

// c (rows, ..), rows ldc apart, panels of 2 kColumns, gate | up. Rounds n columns of each into gate and up, rows ld apart.
void forward_end(const float* c, int64_t ldc, int64_t rows, int64_t n, float* gate, float* up, int64_t ld);
void forward_end(const float* c, int64_t ldc, int64_t rows, int64_t n, bfloat16* gate, bfloat16* up, int64_t ld);

// weights * silu(gate) * up of rows (2 n) of pre-activations, to rows ldo apart, zeros behind.
void activation(const float* pre, int64_t rows, int64_t n, const float* weights, float* out, int64_t ldo);
void activation(const bfloat16* pre, int64_t rows, int64_t n, const float* weights, bfloat16* out, int64_t ldo);

// c (rows, n), rows ldc apart and of whole panels: the gradient of silu(gate) * up before the weight. Writes the gradients of gate and up (rows ld
// apart, as gate and up) and the weighted activation, and adds each row's <c, silu(gate) * up> to grad_weights.
void backward_end(
    const float* c, int64_t ldc, int64_t rows, int64_t n, const float* weights, const float* gate, const float* up, float* grad_gate,
    float* grad_up, int64_t ld, float* activation, int64_t ld_activation, float* grad_weights);
void backward_end(
    const float* c, int64_t ldc, int64_t rows, int64_t n, const float* weights, const bfloat16* gate, const bfloat16* up, bfloat16* grad_gate,
    bfloat16* grad_up, int64_t ld, bfloat16* activation, int64_t ld_activation, float* grad_weights);

// pre (rows, 2 kColumns): gate | up. c (rows, kColumns). out[r] += <c[r], silu(gate) * up>, n columns.
void probe_end(const float* pre, const float* c, int64_t rows, int64_t n, float* out);

// out (rows, n), rows ldo apart = c, rows ldc apart.
void store_end(const float* c, int64_t ldc, int64_t rows, int64_t n, float* out, int64_t ldo);
void store_end(const float* c, int64_t ldc, int64_t rows, int64_t n, bfloat16* out, int64_t ldo);

// The same past the caches where whole lines can be written so: gradients of weights are large and nobody reads them soon.
void stream_end(const float* c, int64_t ldc, int64_t rows, int64_t n, float* out, int64_t ldo);
void stream_end(const float* c, int64_t ldc, int64_t rows, int64_t n, bfloat16* out, int64_t ldo);

// Sums of rows in float32: row t lies at data + (t - first) * ld.
struct Sums {
  float* data;
  int64_t ld;
  int64_t first;
};

// The same in half the memory beside a bfloat16 result: this holds the upper half of each sum, which is a float32 cut off, and `low` the other.
struct SplitSums {
  bfloat16* high;
  int64_t ld;
  uint16_t* low;
  int64_t ld_low;
  int64_t first;
};

// The first `rows` rows of them.
void clear(const Sums& sums, int64_t rows, int64_t n);
void clear(const SplitSums& sums, int64_t rows, int64_t n);

// Begins to read n columns of a row from column j on.
void prefetch(const Sums& sums, int64_t row, int64_t j, int64_t n);
void prefetch(const SplitSums& sums, int64_t row, int64_t j, int64_t n);

// sums[tokens[r]], columns j0 .. j0 + n, += c[r], rows of c ldc apart.
void add_rows(const float* c, int64_t ldc, int64_t rows, int64_t n, const int32_t* tokens, const Sums& sums, int64_t j0);
void add_rows(const float* c, int64_t ldc, int64_t rows, int64_t n, const int32_t* tokens, const SplitSums& sums, int64_t j0);

// The halves of the first `rows` rows are no longer needed: rounds the result.
void round_sums(const SplitSums& sums, int64_t rows, int64_t n);

}  // namespace moetrain::cpu
