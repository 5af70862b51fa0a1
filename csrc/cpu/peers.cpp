// Rows into and out of the memory of other ranks on this machine.
#include "../kernels.h"
#include "math.h"
#include "parallel.h"

namespace moetrain::cpu {

void push_rows(const PushArgs& a) {
  if (a.row_bytes == 0) return;
  const char* x = static_cast<const char*>(a.x);
  parallel_for(a.num_pairs, rows_per_piece(a.row_bytes / 4), [&](int64_t begin, int64_t end) {
    int64_t w = 0;
    for (int64_t p = begin; p < end; ++p) {
      while (p >= a.begins[w + 1]) ++w;
      char* to = reinterpret_cast<char*>(a.buffers[w]) + (int64_t{a.places[w]} + p - a.begins[w]) * a.row_bytes;
      std::memcpy(to, x + (a.tokens ? a.tokens[p] : p) * a.row_bytes, a.row_bytes);
    }
  });
}

namespace {

template <class T>
MOETRAIN_INLINE void pull_rows_of(const PullArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t t = begin; t < end; ++t) {
    T* out = static_cast<T*>(a.out) + t * a.dim;
    for (int64_t start = 0; start < a.dim; start += kBlock) {
      const int64_t size = std::min(kBlock, a.dim - start);
      A sum[kBlock] = {};
      for (int32_t j = a.row_offsets[t]; j < a.row_offsets[t + 1]; ++j) {
        const int64_t p = a.positions[j];
        int64_t w = 0;
        while (p >= a.begins[w + 1]) ++w;
        const T* row = reinterpret_cast<const T*>(a.buffers[w]) + (int64_t{a.places[w]} + p - a.begins[w]) * a.dim + start;
        for (int64_t i = 0; i < size; ++i) sum[i] += load(row[i]);
      }
      MOETRAIN_INDEPENDENT
      for (int64_t i = 0; i < size; ++i) store(out[start + i], sum[i]);
    }
  }
}

}  // namespace

MOETRAIN_ROW_KERNEL(pull_rows, PullArgs, pull_rows_of, a.num_tokens, rows_per_piece(a.dim))

}  // namespace moetrain::cpu
