// A stack with a function that runs on it until it goes to another fibre. setcontext starts one. After that GCC's two builtins go back and
// forth: swapcontext would ask the kernel for the signal mask each time, and AddressSanitizer would clear its notes of the whole stack.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <stdexcept>

namespace emulator {

class Fibre {
 public:
  static constexpr size_t kStack = 128 << 10;  // with a page at its low end that can't be touched
  static constexpr size_t kGuard = 4096;

  Fibre() = default;  // the host thread's own
  explicit Fibre(void (*body)()) : body_(body) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory for another stack");
    stack_ = static_cast<char*>(memory);
    mprotect(stack_, kGuard, PROT_NONE);
    reset();
  }
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;
  ~Fibre() {
    if (stack_) munmap(stack_, kStack);
  }

  // The next time it is gone to, its function starts anew. What was on its stack is forgotten without destructors.
  void reset() {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStack;
    context_.uc_link = nullptr;
    makecontext(&context_, body_, 0);
    started_ = false;
  }

  bool holds(const void* address) const { return address >= stack_ && address < stack_ + kStack; }

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
  bool started_ = false;
  void* place_[5] = {};
  ucontext_t context_;
};

}  // namespace emulator
