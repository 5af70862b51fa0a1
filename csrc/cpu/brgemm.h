// Products of small blocks, C = A B or C += A B, by the micro-kernels of torch's oneDNN (batch-reduce GEMM).
#pragma once

#include <cstdint>

#include "math.h"

namespace moetrain::cpu {

// Whether torch has the kernels, and this processor runs them: tried once per dtype, on a product whose result is known.
bool has_brgemm(DType dtype);

// A: (M, K) rows lda apart. C: (M, N) float32, rows ldc apart. B: (K, N) rows ldb apart; for bfloat16 pairs of rows are
// interleaved, (K / 2, ldb, 2), and K is even. Each new combination of sizes compiles a kernel, which is kept: callers keep
// them few.
void brgemm(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb, float* C, int64_t ldc, bool add);
void brgemm(int64_t M, int64_t N, int64_t K, const bfloat16* A, int64_t lda, const bfloat16* B, int64_t ldb, float* C, int64_t ldc, bool add);

// After a thread's last product: gives the processor's matrix unit back, where it has one (AMX).
void brgemm_release(DType dtype);

}  // namespace moetrain::cpu
