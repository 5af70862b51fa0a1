// How a launch runs: blocks and threads in a random order, barriers and collectives that wait for all, and the checks of every access.
#include "machine.h"

#include <dlfcn.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <stdexcept>

// libasan's, where it is loaded: whether any of the bytes must not be touched, and where it starts.
extern "C" __attribute__((weak)) void* __asan_region_is_poisoned(void* address, size_t bytes);

namespace emulator {

namespace {

std::atomic<double> patience{20};  // seconds for threads that only spin

std::atomic<uint64_t> seed{[] {
  const char* text = std::getenv("MOETRAIN_EMULATION_SEED");
  return text ? std::strtoull(text, nullptr, 10) : 0;
}()};

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

std::string name(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

uint3 split(uint32_t number, dim3 size) { return {number % size.x, number / size.x % size.y, number / size.x / size.y}; }

std::string hex(uint32_t mask) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", mask);
  return text;
}

// " at FILE:LINE" of an instruction, if addr2line knows.
std::string place_of(const void* code) {
  Dl_info info;
  if (!dladdr(code, &info) || !info.dli_fname) return "";
  char command[1200];
  std::snprintf(command, sizeof(command), "env -u LD_PRELOAD addr2line -e '%s' %#zx 2>/dev/null", info.dli_fname,
                static_cast<size_t>(static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase)) - 1);
  FILE* pipe = popen(command, "r");
  if (!pipe) return "";
  char line[1000] = "";
  if (!std::fgets(line, sizeof(line), pipe)) line[0] = 0;
  pclose(pipe);
  std::string text(line);
  while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) text.pop_back();
  return text.empty() || text[0] == '?' ? "" : " at " + text;
}

}  // namespace

thread_local Machine* Machine::here_ = nullptr;

Machine* Machine::make() {
  static thread_local std::unique_ptr<Machine> machine = std::make_unique<Machine>();  // not itself: such fast memory is scarce
  return machine.get();
}

// --- launches ---

void Machine::run(const char* kernel, const Config& launch, Body body, const void* closure, size_t closure_bytes) {
  const auto refuse = [&](const std::string& what) { throw std::runtime_error(std::string("emulator: ") + kernel + ": " + what); };
  if (current) refuse("launched by a thread of a kernel");
  const dim3 grid = launch.grid, block = launch.block;
  // The limits of every architecture since 3.0, and the shared memory that needs no attribute.
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    refuse("a grid of " + name({grid.x, grid.y, grid.z}) + " blocks");
  }
  if (block.x == 0 || block.y == 0 || block.z == 0 || block.x > 1024 || block.y > 1024 || block.z > 64 || block.x * block.y * block.z > 1024) {
    refuse("a block of " + name({block.x, block.y, block.z}) + " threads");
  }
  if (launch.shared_bytes > 48 << 10) refuse(std::to_string(launch.shared_bytes) + " bytes of shared memory");
  const uint64_t num_blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  if (num_blocks >= uint64_t{1} << 32) refuse("too many blocks for the emulator");

  config = launch;
  kernel_ = kernel, body_ = body, closure_ = static_cast<const char*>(closure), closure_bytes_ = closure_bytes;
  random_.seed(static_cast<uint32_t>(seed * 0x9e3779b97f4a7c15u + ++launches_));
  order_.resize(num_blocks);
  std::iota(order_.begin(), order_.end(), 0u);
  for (size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[draw(static_cast<uint32_t>(i))]);
  limit_ = 1 + draw(kBlocks);
  idle_ = 0;
  printed.clear();
  error_.clear();
  while (admit_block()) {
  }
  Fibre& first = free_fibre();
  running_ = &first;
  host_.go(first);
  if (error_.empty() && !blocks_.empty()) error_ = "nobody can go on: " + who_waits();
  races_.clear();
  if (error_.empty()) return;
  abandon();
  refuse(error_);
}

// Blocks that wait their turn get it when others end, two or three side by side in most launches.
bool Machine::admit_block() {
  if (order_.empty() || blocks_.size() >= limit_) return false;
  if (spare_blocks_.empty()) spare_blocks_.push_back(std::make_unique<Block>());
  blocks_.push_back(std::move(spare_blocks_.back()));
  spare_blocks_.pop_back();
  Block& block = *blocks_.back();
  block.number = order_.back();
  order_.pop_back();
  block.index = split(block.number, config.grid);
  block.phase = 0;
  block.num_threads = block.num_live = static_cast<int>(config.block.x * config.block.y * config.block.z);
  block.num_at_barrier = 0;
  block.shared.clear();
  block.threads.resize(block.num_threads);
  block.warps.resize((block.num_threads + 31) / 32);
  for (size_t w = 0; w < block.warps.size(); ++w) {
    Warp& warp = block.warps[w];
    const int lanes = std::min<int>(32, block.num_threads - static_cast<int>(w) * 32);
    warp.lanes = lanes == 32 ? ~0u : (1u << lanes) - 1;
    warp.meetings.clear();
    for (int i = 0; i < 32; ++i) {
      // A lane that doesn't exist has always been waited for.
      for (int j = 0; j < 32; ++j) warp.clocks[i][j] = j >= lanes ? UINT32_MAX : i == j;
    }
  }
  for (int i = 0; i < block.num_threads; ++i) {
    Thread& thread = block.threads[i];
    thread.block = &block, thread.number = i, thread.index = split(static_cast<uint32_t>(i), config.block);
    thread.fibre = nullptr, thread.waits_for = nullptr, thread.is_done = false;
    ready_.push_back(&thread);
  }
  return true;
}

// After an error: fibres stand somewhere in the kernel, and start anew.
void Machine::abandon() {
  current = nullptr;
  running_ = nullptr;
  ready_.clear();
  order_.clear();
  for (auto& block : blocks_) spare_blocks_.push_back(std::move(block));
  blocks_.clear();
  free_.clear();
  for (auto& fibre : fibres_) {
    fibre->reset();
    free_.push_back(fibre.get());
  }
}

// --- who runs ---

Fibre& Machine::free_fibre() {
  if (free_.empty()) return fibres_.add(&Machine::work_here);
  Fibre& fibre = *free_.back();
  free_.pop_back();
  return fibre;
}

Thread* Machine::next() {
  if (ready_.empty()) return nullptr;
  std::swap(ready_[draw(static_cast<uint32_t>(ready_.size()))], ready_.back());
  Thread* thread = ready_.back();
  ready_.pop_back();
  return thread;
}

// A fibre's life: new threads here, waiting ones on the fibres they wait on, and back to the host if there is neither.
void Machine::work() {
  for (;;) {
    Thread* thread = next();
    if (thread && !thread->fibre) {
      current = thread;
      body_(closure_);
      end_thread();
      continue;
    }
    Fibre& self = *running_;
    free_.push_back(&self);
    if (thread) {
      current = thread;
      running_ = thread->fibre;
      thread->fibre = nullptr;
      self.go(*running_);
    } else {
      running_ = nullptr;
      self.go(host_);
    }
  }
}

// The running thread stays where it is until somebody puts it on the list and it is drawn.
void Machine::wait() {
  Fibre& self = *running_;
  current->fibre = &self;
  current = nullptr;
  running_ = &free_fibre();
  self.go(*running_);
}

void Machine::end_thread() {
  Thread& thread = *current;
  Block& block = *thread.block;
  const int lane = thread.number % 32;
  for (const Meeting& meeting : block.warps[thread.number / 32].meetings) {
    if (meeting.mask >> lane & 1u) fail("ends while lanes of its warp wait for it at " + std::string(meeting.what) + " with mask " + hex(meeting.mask));
  }
  if (block.num_at_barrier > 0) fail("ends while threads of its block wait for it at __syncthreads");
  thread.is_done = true;
  current = nullptr;
  idle_ = 0;
  if (--block.num_live > 0) return;
  const auto place = std::find_if(blocks_.begin(), blocks_.end(), [&](const auto& b) { return b.get() == &block; });
  spare_blocks_.push_back(std::move(*place));
  blocks_.erase(place);
  admit_block();
}

void Machine::yield() {
  // Threads that spin for another process give it the processor; those that spin for nobody are stopped.
  if (++idle_ > 64 * (ready_.size() + 1)) {
    if (idle_ % 1024 == 0) {
      if (idle_since_ == 0) idle_since_ = seconds();
      if (seconds() - idle_since_ > patience) fail("spins and nothing changes");
      sched_yield();
    }
  } else {
    idle_since_ = 0;
  }
  ready_.push_back(current);
  wait();
}

// --- barriers and collectives ---

void Machine::sync_block() {
  Thread& thread = *current;
  Block& block = *thread.block;
  if (block.num_live < block.num_threads) {
    const auto gone = std::find_if(block.threads.begin(), block.threads.end(), [](const Thread& t) { return t.is_done; });
    fail("__syncthreads, but thread " + name(gone->index) + " has ended");
  }
  if (++block.num_at_barrier < block.num_threads) {
    thread.waits_for = "__syncthreads";
    thread.mask = 0;
    wait();
    thread.waits_for = nullptr;
    return;
  }
  block.num_at_barrier = 0;
  ++block.phase;
  idle_ = 0;
  for (Thread& other : block.threads) {
    if (&other != &thread) ready_.push_back(&other);
  }
  yield();
}

const uint64_t* Machine::meet(const char* what, uint32_t mask, uint64_t value) {
  Thread& thread = *current;
  Block& block = *thread.block;
  Warp& warp = block.warps[thread.number / 32];
  const int lane = thread.number % 32;
  const auto here = [&] { return std::string(what) + " with mask " + hex(mask); };
  if (!(mask >> lane & 1u)) fail(here() + ", which doesn't name its own lane " + std::to_string(lane));
  if (mask & ~warp.lanes) fail(here() + ", which names lanes that the block doesn't have");
  size_t which = warp.meetings.size();
  for (size_t i = 0; i < warp.meetings.size(); ++i) {
    const Meeting& meeting = warp.meetings[i];
    if (meeting.mask == mask && std::strcmp(meeting.what, what) == 0) which = i;
  }
  if (which == warp.meetings.size()) {
    for (int i = 0; i < 32; ++i) {
      const size_t other = thread.number / 32 * 32 + static_cast<size_t>(i);
      if ((mask >> i & 1u) && block.threads[other].is_done) fail(here() + ", but lane " + std::to_string(i) + " has ended");
    }
    warp.meetings.push_back({what, mask, 0, {}});
  }
  Meeting& meeting = warp.meetings[which];
  meeting.here |= 1u << lane;
  meeting.values[lane] = value;
  if (meeting.here != mask) {
    thread.waits_for = what;
    thread.mask = mask;
    wait();
    thread.waits_for = nullptr;
    return thread.values;
  }
  hold_meeting(block, warp, which);
  yield();
  return thread.values;
}

// All are here: they get the values, and go on in any order.
void Machine::hold_meeting(Block& block, Warp& warp, size_t which) {
  const Meeting meeting = warp.meetings[which];
  warp.meetings.erase(warp.meetings.begin() + static_cast<std::ptrdiff_t>(which));
  idle_ = 0;
  const size_t first = static_cast<size_t>(current->number / 32 * 32);
  for (size_t i = 0; i < 32; ++i) {
    if (!(meeting.mask >> i & 1u)) continue;
    Thread& thread = block.threads[first + i];
    std::copy(std::begin(meeting.values), std::end(meeting.values), thread.values);
    if (&thread != current) ready_.push_back(&thread);
  }
  if (std::strcmp(meeting.what, "__syncwarp") != 0) return;
  // The only one that orders accesses to memory.
  uint32_t joined[32] = {};
  for (int i = 0; i < 32; ++i) {
    for (int j = 0; j < 32; ++j) joined[j] = std::max(joined[j], meeting.mask >> i & 1u ? warp.clocks[i][j] : 0u);
  }
  for (int i = 0; i < 32; ++i) {
    if (!(meeting.mask >> i & 1u)) continue;
    std::copy(std::begin(joined), std::end(joined), warp.clocks[i]);
    ++warp.clocks[i][i];
  }
}

void Machine::sync_warp(uint32_t mask) { meet("__syncwarp", mask, 0); }

void* Machine::shared(int number, size_t bytes) {
  auto& variables = current->block->shared;
  auto place = variables.find(number);
  if (place == variables.end()) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, bytes) != 0) fail("no memory for a shared variable");
    place = variables.emplace(number, std::unique_ptr<char, void (*)(void*)>(static_cast<char*>(memory), &std::free)).first;
    for (size_t i = 0; i < bytes; ++i) static_cast<char*>(memory)[i] = static_cast<char>(random_());
    races_.forget(reinterpret_cast<uintptr_t>(memory), bytes);  // it may have been another block's
  }
  return place->second.get();
}

// --- accesses ---

void Machine::touch(const void* address, size_t bytes, bool write, bool atomic, const void* code) {
  const char* place = static_cast<const char*>(address);
  if (running_->holds(address) || (place >= closure_ && place < closure_ + closure_bytes_)) return;  // a thread's own variables; its arguments
  const auto what = [&] {
    return std::string(write ? "writes " : "reads ") + std::to_string(bytes) + " bytes at " + std::to_string(reinterpret_cast<uintptr_t>(address)) + place_of(code);
  };
  if (fibres_.hold(address)) fail(what() + ", which is on another thread's stack");
  if (&__asan_region_is_poisoned && __asan_region_is_poisoned(const_cast<void*>(address), bytes)) fail(what() + ", out of bounds");
  const Thread& thread = *current;
  const uint32_t* lanes = thread.block->warps[thread.number / 32].clocks[thread.number % 32];
  Access me;
  me.block = thread.block->number;
  me.phase = thread.block->phase;
  me.clock = lanes[thread.number % 32];
  me.thread = static_cast<uint16_t>(thread.number);
  me.who = Who::thread;
  me.atomic = atomic;
  if (const Access* other = races_.touch(reinterpret_cast<uintptr_t>(address), bytes, write, me, lanes)) {
    fail(what() + ", a race with " + describe(*other));
  }
}

// --- what went wrong ---

void Machine::fail(const std::string& what) {
  if (!current) throw std::runtime_error("emulator: " + what);
  error_ = describe(*current) + ": " + what;
  running_->go(host_);
  __builtin_unreachable();
}

std::string Machine::who_waits() const {
  std::map<std::string, std::pair<int, const Thread*>> found;  // by what they wait at: how many, and one of them
  for (const auto& block : blocks_) {
    for (const Thread& thread : block->threads) {
      if (thread.is_done) continue;
      auto& [number, one] = found[thread.waits_for + (thread.mask ? " with mask " + hex(thread.mask) : std::string())];
      if (number++ == 0) one = &thread;
    }
  }
  std::string text;
  for (const auto& [where, who] : found) {
    text += (text.empty() ? "" : "; ") + describe(*who.second) + " waits at " + where + ", as do " + std::to_string(who.first - 1) + " others";
  }
  return text;
}

std::string Machine::describe(const Thread& thread) const { return "block " + name(thread.block->index) + " thread " + name(thread.index); }

std::string Machine::describe(const Access& access) const {
  const std::string block = "block " + name(split(access.block, config.grid));
  switch (access.who) {
    case Who::thread: return block + " thread " + name(split(access.thread, config.block));
    case Who::lanes: return block + " warp " + std::to_string(access.thread / 32);
    case Who::warps: return block;
    default: return "several blocks";
  }
}

// --- what kernels call ---

void run(const char* kernel, const Config& config, Body body, const void* closure, size_t closure_bytes) {
  Machine::here().run(kernel, config, body, closure, closure_bytes);
}
uint3 thread_index() { return Machine::here().current->index; }
uint3 block_index() { return Machine::here().current->block->index; }
dim3 block_size() { return Machine::here().config.block; }
dim3 grid_size() { return Machine::here().config.grid; }
int lane() { return Machine::here().current->number % 32; }
void trap() { Machine::here().trap(); }
void fail(const std::string& what) { Machine::here().fail(what); }
void yield() { Machine::here().yield(); }
void sync_block() { Machine::here().sync_block(); }
void sync_warp(uint32_t mask) { Machine::here().sync_warp(mask); }
const uint64_t* meet(const char* what, uint32_t mask, uint64_t value) { return Machine::here().meet(what, mask, value); }
void* shared(int number, size_t bytes) { return Machine::here().shared(number, bytes); }
void* dynamic_shared() { return Machine::here().shared(-1, Machine::here().config.shared_bytes); }

int print(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  const int length = std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  std::string& line = Machine::here().printed;
  line = text;
  while (!line.empty() && line.back() == '\n') line.pop_back();
  return length;
}

void check_segment(const char* what, int width) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail(std::string(what) + ": a segment of " + std::to_string(width) + " lanes");
}

uint64_t exchange(const char* what, uint32_t mask, uint64_t value, int source) {
  const uint64_t* values = meet(what, mask, value);
  if (source < 0 || source > 31 || !(mask >> source & 1u)) {
    fail(std::string(what) + ": reads lane " + std::to_string(source) + ", which is not in the mask " + hex(mask));
  }
  return values[source];
}

uint64_t atomic(Atomic kind, void* address, size_t bytes, bool is_signed, uint64_t operand, uint64_t expected) {
  Machine& machine = Machine::here();
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) machine.fail("an atomic at a misaligned address");
  machine.touch(address, bytes, true, true, __builtin_return_address(0));
  machine.yield();
  const auto change = [&](auto* place, auto zero) -> uint64_t {
    using T = decltype(zero);
    const T value = static_cast<T>(operand);
    T old = __atomic_load_n(place, __ATOMIC_SEQ_CST), desired;
    do {
      switch (kind) {
        case Atomic::add: desired = static_cast<T>(static_cast<uint64_t>(old) + operand); break;
        case Atomic::exchange: desired = value; break;
        case Atomic::compare_exchange: desired = old == static_cast<T>(expected) ? value : old; break;
        case Atomic::minimum: desired = std::min(old, value); break;
        case Atomic::maximum: desired = std::max(old, value); break;
        case Atomic::bit_or: desired = old | value; break;
        default: desired = old & value; break;
      }
    } while (!__atomic_compare_exchange_n(place, &old, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    return static_cast<uint64_t>(old);
  };
  if (bytes == 4) return is_signed ? change(static_cast<int32_t*>(address), int32_t{}) : change(static_cast<uint32_t*>(address), uint32_t{});
  return is_signed ? change(static_cast<int64_t*>(address), int64_t{}) : change(static_cast<uint64_t*>(address), uint64_t{});
}

}  // namespace emulator

extern "C" __attribute__((visibility("default"))) void emulator_seed(uint64_t seed) { emulator::seed = seed; }
extern "C" __attribute__((visibility("default"))) void emulator_patience(double seconds) { emulator::patience = seconds; }
