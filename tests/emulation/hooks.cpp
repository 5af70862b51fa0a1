// What the compiler calls: for each load and store of the kernels (-fsanitize=thread, whose library isn't linked) and for undefined
// behaviour (-fsanitize=alignment,bounds,...). Host code in the same files calls them too, and is let through.
#include <cstdio>
#include <cstdlib>

#include "machine.h"

namespace {

inline void touch(void* address, size_t bytes, bool write, bool is_volatile, const void* code) {
  emulator::Machine& machine = emulator::Machine::here();
  if (!machine.current) return;
  machine.touch(address, bytes, write, is_volatile, code);
  if (is_volatile) machine.yield();  // so that a loop that waits for another thread's write ends
}

struct Location {
  const char* file;
  uint32_t line, column;
};

[[noreturn]] void undefined(const char* what, const void* data) {
  const Location& at = *static_cast<const Location*>(data);  // what every description begins with
  const std::string text = std::string(what) + " at " + at.file + ":" + std::to_string(at.line);
  if (emulator::Machine::here().current) emulator::fail(text);
  std::fprintf(stderr, "emulator: on the host: %s\n", text.c_str());
  std::abort();
}

struct Mismatch {
  Location at;
  const void* type;
  unsigned char log_alignment, kind;
};

}  // namespace

#define HOOK extern "C" __attribute__((visibility("hidden"))) void
#define ACCESS(BYTES)                                                                                                                \
  HOOK __tsan_read##BYTES(void* p) { touch(p, BYTES, false, false, __builtin_return_address(0)); }                                   \
  HOOK __tsan_write##BYTES(void* p) { touch(p, BYTES, true, false, __builtin_return_address(0)); }                                   \
  HOOK __tsan_volatile_read##BYTES(void* p) { touch(p, BYTES, false, true, __builtin_return_address(0)); }                           \
  HOOK __tsan_volatile_write##BYTES(void* p) { touch(p, BYTES, true, true, __builtin_return_address(0)); }                           \
  HOOK __tsan_unaligned_read##BYTES(void* p) { touch(p, BYTES, false, false, __builtin_return_address(0)); }                         \
  HOOK __tsan_unaligned_write##BYTES(void* p) { touch(p, BYTES, true, false, __builtin_return_address(0)); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
HOOK __tsan_read_range(void* p, size_t bytes) { touch(p, bytes, false, false, __builtin_return_address(0)); }
HOOK __tsan_write_range(void* p, size_t bytes) { touch(p, bytes, true, false, __builtin_return_address(0)); }
HOOK __tsan_init() {}

HOOK __ubsan_handle_type_mismatch_v1_abort(void* data, void* address) {
  const unsigned bytes = 1u << static_cast<const Mismatch*>(data)->log_alignment;
  undefined(("an access that needs an address aligned to " + std::to_string(bytes) + " bytes, found " + std::to_string(reinterpret_cast<uintptr_t>(address) % bytes) + " more").c_str(), data);
}
HOOK __ubsan_handle_out_of_bounds_abort(void* data, void*) { undefined("an index out of an array's bounds", data); }
HOOK __ubsan_handle_shift_out_of_bounds_abort(void* data, void*, void*) { undefined("a shift by too much or of a negative number", data); }
HOOK __ubsan_handle_add_overflow_abort(void* data, void*, void*) { undefined("a signed overflow of +", data); }
HOOK __ubsan_handle_sub_overflow_abort(void* data, void*, void*) { undefined("a signed overflow of -", data); }
HOOK __ubsan_handle_mul_overflow_abort(void* data, void*, void*) { undefined("a signed overflow of *", data); }
HOOK __ubsan_handle_divrem_overflow_abort(void* data, void*, void*) { undefined("a division by 0 or a signed overflow of /", data); }
HOOK __ubsan_handle_negate_overflow_abort(void* data, void*) { undefined("a signed overflow of -", data); }
