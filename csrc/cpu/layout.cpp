// See layout.h. Everything transposed goes through 16 x 16 blocks of 32-bit numbers: floats, or pairs of bfloat16 whose two
// rows were interleaved before.
#include "layout.h"

#include <algorithm>

namespace moetrain::cpu {

namespace {

#if defined(__GNUC__) && !defined(__clang__)
#define MOETRAIN_VECTORS 1
typedef uint32_t Vector __attribute__((vector_size(64)));
typedef uint32_t UnalignedVector __attribute__((vector_size(64), aligned(4), may_alias));

// Lanes of (a, b): where bit D of the lane's number is clear, a's own lane (FIRST) or the one D further; else b's D before, or its own.
template <int D, bool FIRST>
MOETRAIN_INLINE void exchange(const Vector& a, const Vector& b, Vector& out) {
  Vector lanes;
  for (uint32_t j = 0; j < 16; ++j) lanes[j] = FIRST ? (j & D ? 16 + j - D : j) : (j & D ? 16 + j : j + D);
  out = __builtin_shuffle(a, b, lanes);
}

template <int D>
MOETRAIN_INLINE void exchange_all(Vector* rows) {
  for (int i = 0; i < 16; ++i) {
    if (i & D) continue;
    const Vector a = rows[i], b = rows[i + D];
    exchange<D, true>(a, b, rows[i]);
    exchange<D, false>(a, b, rows[i + D]);
  }
}
#endif

// out[c * ldo + r] = in[r * ldi + c] for r < 16, c < 16.
MOETRAIN_INLINE void transpose_block(const uint32_t* in, int64_t ldi, uint32_t* out, int64_t ldo) {
#ifdef MOETRAIN_VECTORS
  Vector rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = *reinterpret_cast<const UnalignedVector*>(in + i * ldi);
  exchange_all<1>(rows);
  exchange_all<2>(rows);
  exchange_all<4>(rows);
  exchange_all<8>(rows);
  for (int i = 0; i < 16; ++i) *reinterpret_cast<UnalignedVector*>(out + i * ldo) = rows[i];
#else
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 16; ++c) out[c * ldo + r] = in[r * ldi + c];
  }
#endif
}

MOETRAIN_MULTIVERSION void transpose_words(const uint32_t* in, int64_t ldi, int64_t rows, int64_t columns, uint32_t* out, int64_t ldo) {
  const int64_t whole_rows = rows / 16 * 16, whole_columns = columns / 16 * 16;
  for (int64_t r = 0; r < whole_rows; r += 16) {
    for (int64_t c = 0; c < whole_columns; c += 16) transpose_block(in + r * ldi + c, ldi, out + c * ldo + r, ldo);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) out[c * ldo + r] = in[r * ldi + c];
  }
}

// Rows further on lie anywhere, so their reading begins now, into the second cache: the first has too few places for what is under way.
constexpr int64_t kAhead = 16;
MOETRAIN_INLINE void prefetch(const void* data, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(data) + at, 0, 2);
}

// Rows 2 p and 2 p + 1 as pairs, for p < pairs, K rows in all; a row that does not exist is 0. Panel after panel of `columns` pairs, each
// panel `pairs` rows high.
MOETRAIN_MULTIVERSION void interleave(
    const uint16_t* data, int64_t ld, const int32_t* index, int64_t K, int64_t pairs, int64_t N, int64_t columns, uint32_t* panels) {
  const auto row = [&](int64_t k) { return data + (index ? index[k] : k) * ld; };
  for (int64_t p = 0; p < pairs; ++p) {
    const int64_t k = 2 * p;
    for (int64_t next = k + kAhead; next < std::min(K, k + kAhead + 2); ++next) prefetch(row(next), N * sizeof(uint16_t));
    const uint16_t* first = k < K ? row(k) : nullptr;
    const uint16_t* second = k + 1 < K ? row(k + 1) : nullptr;
    for (int64_t j0 = 0; j0 < N; j0 += columns) {
      const int64_t n = std::min(columns, N - j0);
      uint32_t* out = panels + j0 * pairs + p * columns;
      if (second) {
        MOETRAIN_INDEPENDENT
        for (int64_t j = 0; j < n; ++j) out[j] = first[j0 + j] | static_cast<uint32_t>(second[j0 + j]) << 16;
      } else if (first) {
        MOETRAIN_INDEPENDENT
        for (int64_t j = 0; j < n; ++j) out[j] = first[j0 + j];
      } else {
        std::memset(out, 0, n * sizeof(uint32_t));
      }
    }
  }
}

template <class T>
void gather_rows(Rows<T> rows, int64_t num_rows, int64_t width, T* out, int64_t ldo) {
  for (int64_t k = 0; k < num_rows; ++k, out += ldo) {
    constexpr int64_t ahead = 4;  // of whole rows; the pieces that `interleave` reads are shorter
    if (k + ahead < num_rows) prefetch(rows[k + ahead], width * sizeof(T));
    if (width > 0) std::memcpy(out, rows[k], width * sizeof(T));
    if (ldo > width) std::memset(out + width, 0, (ldo - width) * sizeof(T));
  }
}

}  // namespace

void gather(Rows<float> rows, int64_t num_rows, int64_t width, float* out, int64_t ldo) { gather_rows(rows, num_rows, width, out, ldo); }
void gather(Rows<bfloat16> rows, int64_t num_rows, int64_t width, bfloat16* out, int64_t ldo) {
  gather_rows(rows, num_rows, width, out, ldo);
}

void pack_rows(Rows<float> rows, int64_t K, int64_t padded, int64_t N, int64_t columns, float* panels) {
  for (int64_t k = 0; k < padded; ++k) {
    for (int64_t j = 0; j < N; j += columns) {
      const int64_t bytes = std::min(columns, N - j) * sizeof(float);
      float* out = panels + j * padded + k * columns;
      k < K ? std::memcpy(out, rows[k] + j, bytes) : std::memset(out, 0, bytes);
    }
  }
}

void pack_rows(Rows<bfloat16> rows, int64_t K, int64_t padded, int64_t N, int64_t columns, bfloat16* panels) {
  interleave(
      reinterpret_cast<const uint16_t*>(rows.data), rows.ld, rows.index, K, padded / 2, N, columns, reinterpret_cast<uint32_t*>(panels));
}

void pack_transposed(const float* w, int64_t ldw, int64_t K, int64_t N, float* panel, int64_t ldb) {
  transpose_words(reinterpret_cast<const uint32_t*>(w), ldw, N, K, reinterpret_cast<uint32_t*>(panel), ldb);
}

void pack_transposed(const bfloat16* w, int64_t ldw, int64_t K, int64_t N, bfloat16* panel, int64_t ldb) {
  if (K % 2 == 0 && ldw % 2 == 0) {
    // Two numbers that follow each other in a row of w are a pair already.
    transpose_words(reinterpret_cast<const uint32_t*>(w), ldw / 2, N, K / 2, reinterpret_cast<uint32_t*>(panel), ldb);
    return;
  }
  for (int64_t k = 0; k < K + K % 2; ++k) {
    for (int64_t j = 0; j < N; ++j) panel[(k / 2 * ldb + j) * 2 + k % 2] = k < K ? w[j * ldw + k] : bfloat16{0};
  }
}

void transpose_floats(const float* c, int64_t ldc, int64_t m, int64_t n, float* out, int64_t ldo) {
  transpose_words(reinterpret_cast<const uint32_t*>(c), ldc, m, n, reinterpret_cast<uint32_t*>(out), ldo);
}

void transpose_packed(const float* panel, int64_t ldp, int64_t padded, int64_t M, float* out, int64_t ldo) {
  transpose_words(reinterpret_cast<const uint32_t*>(panel), ldp, padded, M, reinterpret_cast<uint32_t*>(out), ldo);
}

void transpose_packed(const bfloat16* panel, int64_t ldp, int64_t padded, int64_t M, bfloat16* out, int64_t ldo) {
  transpose_words(reinterpret_cast<const uint32_t*>(panel), ldp, padded / 2, M, reinterpret_cast<uint32_t*>(out), ldo / 2);
}

}  // namespace moetrain::cpu
