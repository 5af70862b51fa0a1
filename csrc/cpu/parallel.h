// Splits a range over torch's threads, so that the kernels obey torch.set_num_threads without including torch.
#pragma once

#include <cstdint>

namespace moetrain::cpu {

namespace detail {
using RangeBody = void (*)(int64_t begin, int64_t end, const void* closure);
void parallel_for(int64_t size, int64_t grain, RangeBody body, const void* closure);
}  // namespace detail

int num_threads();

// Calls body(begin, end) on disjoint pieces of [0, size), none smaller than `grain` unless the range itself is.
// `body` must not throw.
template <class Body>
void parallel_for(int64_t size, int64_t grain, const Body& body) {
  detail::parallel_for(
      size, grain,
      [](int64_t begin, int64_t end, const void* closure) { (*static_cast<const Body*>(closure))(begin, end); },
      &body);
}

// Rows per piece so that a piece is worth a thread: about 32k elements.
inline int64_t rows_per_piece(int64_t row_elements) {
  const int64_t rows = 32768 / (row_elements > 0 ? row_elements : 1);
  return rows > 0 ? rows : 1;
}

}  // namespace moetrain::cpu
