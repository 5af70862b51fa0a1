// torch exports the functions below (ATen/native/CPUBlas.h) but not through its stable ABI. They are declared here by hand and
// weakly, so that the library also loads with a torch that lacks them; has_brgemm then says no.
#include "brgemm.h"

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__linux__)
#define MOETRAIN_WEAK __attribute__((weak, visibility("default")))
#define MOETRAIN_BRGEMM 1
#endif

#ifdef MOETRAIN_BRGEMM
namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {
MOETRAIN_WEAK void brgemm(
    int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* A, const float* B, float* C, bool is_vnni);
MOETRAIN_WEAK void brgemm(
    int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const c10::BFloat16* A, const c10::BFloat16* B, float* C,
    bool is_vnni);
MOETRAIN_WEAK void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas
#endif

namespace moetrain::cpu {

namespace {

// No sum over nothing reaches oneDNN.
bool is_empty(int64_t M, int64_t N, int64_t K, float* C, int64_t ldc, bool add) {
  if (K > 0) return M == 0 || N == 0;
  for (int64_t i = 0; i < M && !add; ++i) std::fill_n(C + i * ldc, N, 0.0f);
  return true;
}

#ifdef MOETRAIN_BRGEMM
using Float = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const float*, const float*, float*, bool);
using Half = void (*)(
    int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const c10::BFloat16*, const c10::BFloat16*, float*, bool);
const Float torch_float = at::native::cpublas::brgemm;
const Half torch_bfloat16 = at::native::cpublas::brgemm;

// A (3, 4) of i + k, B (4, 2) of k - j: small whole numbers, which both dtypes hold exactly.
template <class T>
bool works() {
  T a[12], b[8];
  for (int i = 0; i < 3; ++i) {
    for (int k = 0; k < 4; ++k) store(a[i * 4 + k], static_cast<float>(i + k));
  }
  for (int k = 0; k < 4; ++k) {
    for (int j = 0; j < 2; ++j) store(b[sizeof(T) == 2 ? (k / 2) * 4 + j * 2 + k % 2 : k * 2 + j], static_cast<float>(k - j));
  }
  float c[6];
  try {
    brgemm(3, 2, 4, a, 4, b, 2, c, 2, false);
    brgemm(3, 2, 4, a, 4, b, 2, c, 2, true);
  } catch (...) {
    return false;
  }
  brgemm_release(sizeof(T) == 2 ? DType::bf16 : DType::f32);
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 2; ++j) {
      float expected = 0;
      for (int k = 0; k < 4; ++k) expected += 2.0f * static_cast<float>((i + k) * (k - j));
      if (c[i * 2 + j] != expected) return false;
    }
  }
  return true;
}
#endif

}  // namespace

#ifdef MOETRAIN_BRGEMM

bool has_brgemm(DType dtype) {
  if (!torch_float || !torch_bfloat16 || !at::native::cpublas::brgemm_release) return false;
  static const bool f32 = works<float>(), bf16 = works<bfloat16>();
  return dtype == DType::f32 ? f32 : dtype == DType::bf16 ? bf16 : false;
}

void brgemm(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb, float* C, int64_t ldc, bool add) {
  if (is_empty(M, N, K, C, ldc, add)) return;
  torch_float(M, N, K, lda, ldb, ldc, add, A, B, C, false);
}

void brgemm(int64_t M, int64_t N, int64_t K, const bfloat16* A, int64_t lda, const bfloat16* B, int64_t ldb, float* C, int64_t ldc, bool add) {
  if (is_empty(M, N, K, C, ldc, add)) return;
  torch_bfloat16(
      M, N, K, lda, ldb, ldc, add, reinterpret_cast<const c10::BFloat16*>(A), reinterpret_cast<const c10::BFloat16*>(B), C, true);
}

void brgemm_release(DType dtype) { at::native::cpublas::brgemm_release(dtype == DType::bf16); }

#else

bool has_brgemm(DType) { return false; }
void brgemm(int64_t M, int64_t N, int64_t K, const float*, int64_t, const float*, int64_t, float* C, int64_t ldc, bool add) {
  is_empty(M, N, K, C, ldc, add);
}
void brgemm(int64_t M, int64_t N, int64_t K, const bfloat16*, int64_t, const bfloat16*, int64_t, float* C, int64_t ldc, bool add) {
  is_empty(M, N, K, C, ldc, add);
}
void brgemm_release(DType) {}

#endif

}  // namespace moetrain::cpu
