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

// B of brgemm, (even K, N) in a panel whose rows are ldb apart: B[k][j] = rows[k][j] for k < K, zero up to `padded` rows.
void pack_rows(Rows<float> rows, int64_t K, int64_t padded, int64_t N, float* panel, int64_t ldb);
void pack_rows(Rows<bfloat16> rows, int64_t K, int64_t padded, int64_t N, bfloat16* panel, int64_t ldb);

// B of brgemm again, transposed: B[k][j] = w[j * ldw + k].
void pack_transposed(const float* w, int64_t ldw, int64_t K, int64_t N, float* panel, int64_t ldb);
void pack_transposed(const bfloat16* w, int64_t ldw, int64_t K, int64_t N, bfloat16* panel, int64_t ldb);

// A of brgemm, transposed: out[j * ldo + k] = rows[k][j] for k < K, zero for k up to `padded`. scratch: padded * M elements.
void transpose(Rows<float> rows, int64_t K, int64_t padded, int64_t M, float* out, int64_t ldo, float* scratch);
void transpose(Rows<bfloat16> rows, int64_t K, int64_t padded, int64_t M, bfloat16* out, int64_t ldo, bfloat16* scratch);

}  // namespace moetrain::cpu
