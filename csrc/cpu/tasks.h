// Tasks that threads take one after the other, and the scratch of each thread.
#pragma once

#include <atomic>
#include <cstdint>

#include "../kernels.h"
#include "brgemm.h"
#include "layout.h"
#include "parallel.h"

namespace moetrain::cpu {

constexpr int64_t pieces(int64_t size, int64_t piece) { return size == 0 ? 0 : (size + piece - 1) / piece; }

// Hands out one thread's scratch piece by piece. Without memory it only counts.
class Scratch {
 public:
  explicit Scratch(char* memory) : memory_(memory) {}
  template <class T>
  T* take(int64_t size) {
    char* piece = memory_ + used_;
    used_ += round_up(size * sizeof(T), 64) + 64;  // an odd number of cache lines between pieces of round sizes
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// Threads take task after task. body(task, scratch of the thread) on whole tasks, in no order; `dtype` is that of its products.
template <class Body>
void for_tasks(const Threads& threads, DType dtype, int64_t num_tasks, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel_for(threads.number, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t task = next++; task < num_tasks; task = next++) body(task, static_cast<char*>(threads.memory) + thread * threads.bytes_per_thread);
    }
    brgemm_release(dtype);
  });
}

}  // namespace moetrain::cpu
