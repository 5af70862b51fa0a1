// The one file in csrc/cpu that knows torch: its thread pool.
#include "parallel.h"

#include <torch/csrc/stable/ops.h>

namespace moetrain::cpu {

void detail::parallel_for(int64_t size, int64_t grain, RangeBody body, const void* closure) {
  if (size <= 0) return;
  torch::stable::parallel_for(0, size, grain, [=](int64_t begin, int64_t end) { body(begin, end, closure); });
}

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

}  // namespace moetrain::cpu
