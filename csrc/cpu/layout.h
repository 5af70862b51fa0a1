// Copies into the layouts that brgemm reads. T is float or bfloat16; an "even" size is one rounded up to whole pairs of
// bfloat16, or itself for float.
#pragma once

#include <cstdint>

#include "math.h"

namespace moetrain::cpu {

template <class T>
constexpr int64_t kPair = 4 / sizeof(T);

template <class T>
constexpr int64_t even(int64_t size) {
  return (size + kPair<T> - 1) / kPair<T> * kPair<T>;
}

constexpr int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// Rows of a matrix (num_rows, ..) that lie ld apart: row k is data + index[k] * ld, or data + k * ld without an index.
template <class T>
struct Rows {
  const T* data;
  int64_t ld;
  const int32_t* index;

  const T* operator[](int64_t k) const { return data + (index ? index[k] : k) * ld; }
  Rows from(int64_t first) const { return index ? Rows{data, ld, index + first} : Rows{data + first * ld, ld, nullptr}; }
};

// out[k] (ldo apart) = rows[k][0 .. width), then zeros up to ldo.
void gather(Rows<float> rows, int64_t num_rows, int64_t width, float* out, int64_t ldo);
void gather(Rows<bfloat16> rows, int64_t num_rows, int64_t width, bfloat16* out, int64_t ldo);

// B of brgemm, (even K, N), in panels of `columns` columns, each of `padded` rows, one after the other: B[k][j] = rows[k][j] for k < K, zero up
// to `padded` rows. A row is read once, whole.
void pack_rows(Rows<float> rows, int64_t K, int64_t padded, int64_t N, int64_t columns, float* panels);
void pack_rows(Rows<bfloat16> rows, int64_t K, int64_t padded, int64_t N, int64_t columns, bfloat16* panels);

// B of brgemm again, transposed: B[k][j] = w[j * ldw + k].
void pack_transposed(const float* w, int64_t ldw, int64_t K, int64_t N, float* panel, int64_t ldb);
void pack_transposed(const bfloat16* w, int64_t ldw, int64_t K, int64_t N, bfloat16* panel, int64_t ldb);

// out[j * ldo + i] = c[i * ldc + j] for i < m, j < n.
void transpose_floats(const float* c, int64_t ldc, int64_t m, int64_t n, float* out, int64_t ldo);

// A of brgemm from a panel that `pack_rows` made, of M columns ldp apart and `padded` rows: out[j * ldo + k] = row k, column j.
void transpose_packed(const float* panel, int64_t ldp, int64_t padded, int64_t M, float* out, int64_t ldo);
void transpose_packed(const bfloat16* panel, int64_t ldp, int64_t padded, int64_t M, bfloat16* out, int64_t ldo);

}  // namespace moetrain::cpu
