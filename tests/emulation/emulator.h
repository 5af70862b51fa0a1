// What the emulated kernels call: launches, the place of a thread in its launch, barriers, collectives of a warp and atomics.
//
// A launch runs on the host thread that makes it and is over when it returns. All that is found wrong is thrown from it as
// std::runtime_error, with the kernel, the thread and, where it is known, the line. What is checked and what isn't: __init__.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = struct CUstream_st*;

namespace emulator {

// What stands between <<< and >>>.
struct Config {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
  Config(dim3 grid, dim3 block, size_t shared_bytes = 0, cudaStream_t stream = nullptr)
      : grid(grid), block(block), shared_bytes(shared_bytes), stream(stream) {}
};

using Body = void (*)(const void* closure);
// `closure` is read by all threads and written by none.
void run(const char* kernel, const Config& config, Body body, const void* closure, size_t closure_bytes);

template <class... Parameters, class... Arguments>
void launch(const char* name, const Config& config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const auto call = [kernel, values = std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)] { std::apply(kernel, values); };
  using Call = decltype(call);
  run(name, config, [](const void* closure) { (*static_cast<Call*>(closure))(); }, &call, sizeof(call));
}

// They don't change while a thread runs, so the compiler may keep them.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) dim3 block_size();
__attribute__((const)) dim3 grid_size();

[[noreturn]] void trap();
int print(const char* format, ...) __attribute__((format(printf, 1, 2)));
void yield();  // lets other threads run
void sync_block();
void sync_warp(uint32_t mask);
// Memory of the block, full of noise when it is first asked for. `number` tells the variables of a file apart.
void* shared(int number, size_t bytes);
void* dynamic_shared();
// Waits for all lanes of the mask, then returns the values they brought, by lane; good until the thread's next collective.
const uint64_t* meet(const char* what, uint32_t mask, uint64_t value);
int lane();
// The value that lane `source` brought.
uint64_t exchange(const char* what, uint32_t mask, uint64_t value, int source);
void check_segment(const char* what, int width);
[[noreturn]] void fail(const std::string& what);

template <class T>
T shuffle(const char* what, uint32_t mask, T value, int source) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8, "shuffles move numbers of at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(what, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// The old value. Each is one step and orders nothing else, as CUDA's are.
enum class Atomic { add, exchange, compare_exchange, minimum, maximum, bit_or, bit_and };
uint64_t atomic(Atomic kind, void* address, size_t bytes, bool is_signed, uint64_t operand, uint64_t expected = 0);

template <class T>
T atomic(Atomic kind, T* address, T operand, T expected = T()) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "integers only: a sum of floats would depend on the order of threads");
  return static_cast<T>(atomic(kind, address, sizeof(T), std::is_signed_v<T>, static_cast<uint64_t>(operand), static_cast<uint64_t>(expected)));
}

}  // namespace emulator
