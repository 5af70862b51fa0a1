// Rows to routes and back: permute (gather), combine (weighted sum per token) and its backward.
#include "../kernels.h"
#include "math.h"
#include "parallel.h"

namespace moetrain::cpu {

void permute(const PermuteArgs& a) {
  const int64_t element = a.dtype == DType::f64 ? 8 : a.dtype == DType::f32 ? 4 : 2;
  const int64_t row_bytes = a.dim * element;
  if (row_bytes == 0) return;
  const char* x = static_cast<const char*>(a.x);
  char* out = static_cast<char*>(a.out);
  parallel_for(a.num_routes, rows_per_piece(a.dim), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) std::memcpy(out + r * row_bytes, x + a.tokens[r] * row_bytes, row_bytes);
  });
}

namespace {

template <class T>
MOETRAIN_INLINE void combine_rows(const CombineArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* rows = static_cast<const T*>(a.rows);
  const A* weights = static_cast<const A*>(a.weights);
  for (int64_t t = begin; t < end; ++t) {
    T* out = static_cast<T*>(a.out) + t * a.dim;
    for (int64_t start = 0; start < a.dim; start += kBlock) {
      const int64_t size = std::min(kBlock, a.dim - start);
      A sum[kBlock] = {};
      for (int32_t j = a.row_offsets[t]; j < a.row_offsets[t + 1]; ++j) {
        const int64_t p = a.positions[j];
        const A weight = weights ? weights[p] : A(1);
        const T* row = rows + p * a.dim + start;
        for (int64_t i = 0; i < size; ++i) sum[i] += weight * load(row[i]);
      }
      MOETRAIN_INDEPENDENT
      for (int64_t i = 0; i < size; ++i) store(out[start + i], sum[i]);
    }
  }
}

template <class T>
MOETRAIN_INLINE void combine_backward_rows(const CombineBackwardArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A* weights = static_cast<const A*>(a.weights);
  for (int64_t r = begin; r < end; ++r) {
    const T* grad = static_cast<const T*>(a.grad) + a.tokens[r] * a.dim;
    T* grad_row = static_cast<T*>(a.grad_rows) + r * a.dim;
    const A weight = weights ? weights[r] : A(1);
    MOETRAIN_INDEPENDENT
    for (int64_t i = 0; i < a.dim; ++i) store(grad_row[i], weight * load(grad[i]));
    if (!a.grad_weights) continue;

    const T* row = static_cast<const T*>(a.rows) + r * a.dim;
    LaneSum<A> sum;
    for (int64_t start = 0; start < a.dim; start += kBlock) {
      const int64_t size = std::min(kBlock, a.dim - start);
      A products[kBlock];
      for (int64_t i = 0; i < size; ++i) products[i] = load(grad[start + i]) * load(row[start + i]);
      for (int64_t i = size; i < kBlock; ++i) products[i] = A(0);
      sum.add(products);
    }
    static_cast<A*>(a.grad_weights)[r] = sum.total();
  }
}

}  // namespace

MOETRAIN_ROW_KERNEL(combine, CombineArgs, combine_rows, a.num_tokens, rows_per_piece(a.dim))
MOETRAIN_ROW_KERNEL(combine_backward, CombineBackwardArgs, combine_backward_rows, a.num_routes, rows_per_piece(a.dim))

}  // namespace moetrain::cpu
