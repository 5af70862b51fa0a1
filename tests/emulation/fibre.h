// A stack with a function that runs on it until it goes to another fibre. setcontext starts one. After that GCC's two builtins go back and
// forth: swapcontext would ask the kernel for the signal mask each time, and AddressSanitizer would clear its notes of the whole stack.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <memory>
#include <stdexcept>
#include <vector>

namespace emulator {

class Fibre {
 public:
  Fibre() = default;  // the host thread's own
  Fibre(char* stack, size_t bytes, void (*body)()) : body_(body), stack_(stack), bytes_(bytes) { reset(); }
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // The next time it is gone to, its function starts anew. What was on its stack is forgotten without destructors.
  void reset() {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = bytes_;
    context_.uc_link = nullptr;
    makecontext(&context_, body_, 0);
    started_ = false;
  }

  bool holds(const void* address) const { return address >= stack_ && address < stack_ + bytes_; }

  // From this one, which runs, to another; returns when somebody goes to this one.
  __attribute__((noinline)) void go(Fibre& to) {
    started_ = true;
    if (__builtin_setjmp(place_) == 0) to.enter();
  }

 private:
  [[noreturn]] __attribute__((noinline)) void enter() {
    if (started_) __builtin_longjmp(place_, 1);
    started_ = true;
    setcontext(&context_);
    __builtin_unreachable();
  }

  void (*body_)() = nullptr;
  char* stack_ = nullptr;
  size_t bytes_ = 0;
  bool started_ = false;
  void* place_[5] = {};
  ucontext_t context_;
};

// Many of them, with stacks side by side and a page between that can't be touched.
class Fibres {
 public:
  explicit Fibres(size_t most) : most_(most) {}
  Fibres(const Fibres&) = delete;
  Fibres& operator=(const Fibres&) = delete;
  ~Fibres() {
    if (memory_) munmap(memory_, most_ * kBytes);
  }

  Fibre& add(void (*body)()) {
    if (!memory_) {
      void* memory = mmap(nullptr, most_ * kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory for stacks");
      memory_ = static_cast<char*>(memory);
    }
    char* stack = memory_ + fibres_.size() * kBytes;
    mprotect(stack, kGuard, PROT_NONE);
    fibres_.push_back(std::make_unique<Fibre>(stack + kGuard, kBytes - kGuard, body));
    return *fibres_.back();
  }

  bool hold(const void* address) const { return address >= memory_ && address < memory_ + fibres_.size() * kBytes; }
  auto begin() const { return fibres_.begin(); }
  auto end() const { return fibres_.end(); }

 private:
  static constexpr size_t kBytes = 128 << 10, kGuard = 4096;
  size_t most_;
  char* memory_ = nullptr;
  std::vector<std::unique_ptr<Fibre>> fibres_;
};

}  // namespace emulator
