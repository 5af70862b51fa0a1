// See finish.h.
#include "finish.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace moetrain::cpu {

namespace {

constexpr int64_t kStreamed = 512;  // columns that are written past the caches at once

template <class T>
MOETRAIN_INLINE void finish_forward(const float* c, int64_t ldc, int64_t rows, int64_t n, T* gate, T* up, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t side = 0; side < 2; ++side) {
      T* out = (side ? up : gate) + r * ld;
      for (int64_t j0 = 0; j0 < n; j0 += kColumns) {
        const float* row = c + r * ldc + 2 * j0 + side * kColumns;
        const int64_t width = std::min(kColumns, n - j0);
        MOETRAIN_INDEPENDENT
        for (int64_t j = 0; j < width; ++j) store(out[j0 + j], row[j]);
      }
    }
  }
}

template <class T>
MOETRAIN_INLINE void activate(const T* pre, int64_t rows, int64_t n, const float* weights, T* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; ++r) {
    const T *gate = pre + r * 2 * n, *up = gate + n;
    const float weight = weights[r];
    MOETRAIN_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) {
      const float g = load(gate[j]);
      store(out[r * ldo + j], weight * (g * sigmoid(g) * load(up[j])));
    }
    for (int64_t j = n; j < ldo; ++j) out[r * ldo + j] = T{};
  }
}

MOETRAIN_INLINE float sum_of(const float* products) {
  float lanes[16] = {};
  for (int64_t j = 0; j < kColumns; j += 16) {
    for (int64_t lane = 0; lane < 16; ++lane) lanes[lane] += products[j + lane];
  }
  for (int64_t width = 8; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

// With s = sigmoid(g): silu'(g) = s + g s (1 - s).
template <class T>
MOETRAIN_INLINE void finish_backward(
    const float* c, int64_t ldc, int64_t rows, int64_t n, const float* weights, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t ld,
    T* activation, int64_t ld_activation, float* grad_weights) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* grad = c + r * ldc;
    const T *g_row = gate + r * ld, *u_row = up + r * ld;
    T *dg_row = grad_gate + r * ld, *du_row = grad_up + r * ld, *a_row = activation + r * ld_activation;
    const float weight = weights[r];
    for (int64_t j0 = 0; j0 < n; j0 += kColumns) {
      const int64_t end = std::min(n, j0 + kColumns);
      float products[kColumns];
      MOETRAIN_INDEPENDENT
      for (int64_t j = j0; j < end; ++j) {
        const float g = load(g_row[j]), u = load(u_row[j]), s = sigmoid(g);
        const float silu = g * s, a = silu * u, upstream = weight * grad[j];
        products[j - j0] = grad[j] * a;
        store(a_row[j], weight * a);
        store(du_row[j], upstream * silu);
        store(dg_row[j], upstream * u * (s + silu * (1.0f - s)));
      }
      for (int64_t j = end - j0; j < kColumns; ++j) products[j] = 0.0f;
      grad_weights[r] += sum_of(products);
    }
  }
}

template <class T>
MOETRAIN_INLINE void store_rows(const float* c, int64_t ldc, int64_t rows, int64_t n, T* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; ++r) {
    MOETRAIN_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) store(out[r * ldo + j], c[r * ldc + j]);
  }
}

MOETRAIN_INLINE float sum_at(bfloat16 high, uint16_t low) { return bit_cast<float>(static_cast<uint32_t>(high.bits) << 16 | low); }

}  // namespace

#define MOETRAIN_FINISHES(T)                                                                                                            \
  MOETRAIN_MULTIVERSION void forward_end(const float* c, int64_t ldc, int64_t rows, int64_t n, T* gate, T* up, int64_t ld) {            \
    finish_forward(c, ldc, rows, n, gate, up, ld);                                                                                      \
  }                                                                                                                                     \
  MOETRAIN_MULTIVERSION void activation(const T* pre, int64_t rows, int64_t n, const float* w, T* out, int64_t ldo) {                   \
    activate(pre, rows, n, w, out, ldo);                                                                                                \
  }                                                                                                                                     \
  MOETRAIN_MULTIVERSION void backward_end(                                                                                              \
      const float* c, int64_t ldc, int64_t rows, int64_t n, const float* w, const T* gate, const T* up, T* dg, T* du, int64_t ld, T* a, \
      int64_t lda, float* dw) {                                                                                                         \
    finish_backward(c, ldc, rows, n, w, gate, up, dg, du, ld, a, lda, dw);                                                              \
  }                                                                                                                                     \
  MOETRAIN_MULTIVERSION void store_end(const float* c, int64_t ldc, int64_t rows, int64_t n, T* out, int64_t ldo) {                     \
    store_rows(c, ldc, rows, n, out, ldo);                                                                                              \
  }
MOETRAIN_FINISHES(float)
MOETRAIN_FINISHES(bfloat16)

MOETRAIN_MULTIVERSION void probe_end(const float* pre, const float* c, int64_t rows, int64_t n, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    const float *gate = pre + r * 2 * kColumns, *up = gate + kColumns, *grad = c + r * kColumns;
    float products[kColumns];
    MOETRAIN_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) products[j] = grad[j] * (gate[j] * sigmoid(gate[j]) * up[j]);
    for (int64_t j = n; j < kColumns; ++j) products[j] = 0.0f;
    out[r] += sum_of(products);
  }
}

void stream_end(const float* c, int64_t ldc, int64_t rows, int64_t n, bfloat16* out, int64_t ldo) {
#ifdef __SSE2__
  constexpr int64_t kLine = 64 / sizeof(bfloat16);
  if (n % kLine == 0 && ldo % kLine == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
    alignas(64) bfloat16 row[kStreamed];
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j0 = 0; j0 < n; j0 += kStreamed) {
        const int64_t width = std::min(kStreamed, n - j0);
        store_end(c + r * ldc + j0, ldc, 1, width, row, ldo);
        const __m128i* from = reinterpret_cast<const __m128i*>(row);
        __m128i* to = reinterpret_cast<__m128i*>(out + r * ldo + j0);
        for (int64_t i = 0; i < width / 8; ++i) _mm_stream_si128(to + i, _mm_load_si128(from + i));
      }
    }
    _mm_sfence();
    return;
  }
#endif
  store_end(c, ldc, rows, n, out, ldo);
}
void stream_end(const float* c, int64_t ldc, int64_t rows, int64_t n, float* out, int64_t ldo) { store_end(c, ldc, rows, n, out, ldo); }

void clear(const Sums& sums, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r) std::fill_n(sums.data + r * sums.ld, n, 0.0f);
}
void clear(const SplitSums& sums, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r) {
    std::fill_n(sums.high + r * sums.ld, n, bfloat16{0});
    std::fill_n(sums.low + r * sums.ld_low, n, uint16_t{0});
  }
}

void prefetch(const Sums& sums, int64_t row, int64_t j, int64_t n) {
  for (const float *at = sums.data + (row - sums.first) * sums.ld + j, *end = at + n; at < end; at += 16) __builtin_prefetch(at, 1, 2);
}
void prefetch(const SplitSums& sums, int64_t row, int64_t j, int64_t n) {
  for (const bfloat16 *at = sums.high + (row - sums.first) * sums.ld + j, *end = at + n; at < end; at += 32) __builtin_prefetch(at, 1, 2);
  for (const uint16_t *at = sums.low + (row - sums.first) * sums.ld_low + j, *end = at + n; at < end; at += 32) __builtin_prefetch(at, 1, 2);
}

MOETRAIN_MULTIVERSION void add_rows(const float* c, int64_t ldc, int64_t rows, int64_t n, const int32_t* tokens, const Sums& sums, int64_t j0) {
  for (int64_t r = 0; r < rows; ++r) {
    float* sum = sums.data + (tokens[r] - sums.first) * sums.ld + j0;
    const float* row = c + r * ldc;
    MOETRAIN_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) sum[j] += row[j];
  }
}

MOETRAIN_MULTIVERSION void add_rows(const float* c, int64_t ldc, int64_t rows, int64_t n, const int32_t* tokens, const SplitSums& sums, int64_t j0) {
  for (int64_t r = 0; r < rows; ++r) {
    bfloat16* high = sums.high + (tokens[r] - sums.first) * sums.ld + j0;
    uint16_t* low = sums.low + (tokens[r] - sums.first) * sums.ld_low + j0;
    const float* row = c + r * ldc;
    MOETRAIN_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) {
      const uint32_t bits = bit_cast<uint32_t>(sum_at(high[j], low[j]) + row[j]);
      high[j].bits = static_cast<uint16_t>(bits >> 16);
      low[j] = static_cast<uint16_t>(bits);
    }
  }
}

MOETRAIN_MULTIVERSION void round_sums(const SplitSums& sums, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r) {
    bfloat16* high = sums.high + r * sums.ld;
    const uint16_t* low = sums.low + r * sums.ld_low;
    MOETRAIN_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) store(high[j], sum_at(high[j], low[j]));
  }
}

}  // namespace moetrain::cpu
