// The state of a launch: its blocks, their threads, and who waits for what. One Machine serves one host thread.
//
// Threads run one at a time, each until it ends or must wait, and who goes on is drawn at random: with the same seed the same order. A fibre
// takes up threads one after the other and stays with one only while that waits, so a kernel that never waits needs a single fibre.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "emulator.h"
#include "fibre.h"
#include "races.h"

namespace emulator {

struct Block;

struct Thread {
  Block* block;
  uint3 index;
  int number;               // linear in the block
  Fibre* fibre;             // while it waits
  const char* waits_for;    // a barrier or collective, or null
  uint32_t mask;            // of that collective
  bool is_done;
  uint64_t values[32];      // what the lanes brought to its last collective
};

// Lanes of a warp that wait for the rest of `mask`.
struct Meeting {
  const char* what;
  uint32_t mask, here;
  uint64_t values[32];
};

struct Warp {
  uint32_t lanes;           // those that exist
  uint32_t clocks[32][32];  // [lane][other]: what `lane` knows of the others
  std::vector<Meeting> meetings;
};

struct Block {
  uint3 index;
  uint32_t number;           // linear in the grid
  uint32_t phase;            // __syncthreads passed
  int num_threads, num_live, num_at_barrier;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::map<int, std::unique_ptr<char, void (*)(void*)>> shared;  // by the number of the variable; -1: dynamic
};

class Machine {
 public:
  static Machine& here() {
    if (!here_) here_ = make();
    return *here_;
  }

  void run(const char* kernel, const Config& config, Body body, const void* closure, size_t closure_bytes);

  // Of the thread that runs.
  void sync_block();
  void sync_warp(uint32_t mask);
  const uint64_t* meet(const char* what, uint32_t mask, uint64_t value);
  void yield();
  void* shared(int number, size_t bytes);
  void touch(const void* address, size_t bytes, bool write, bool atomic, const void* code);
  [[noreturn]] void fail(const std::string& what);
  [[noreturn]] void trap() { fail("__trap" + (printed.empty() ? "" : " after \"" + printed + "\"")); }

  Thread* current = nullptr;  // null on the host
  Config config{{}, {}};
  std::string printed;        // the last line that a thread printed

 private:
  static Machine* make();
  static thread_local Machine* here_ __attribute__((tls_model("initial-exec")));  // the fastest; asked for at every access
  static void work_here() { here().work(); }
  void work();
  Thread* next();
  void wait();
  void end_thread();
  bool admit_block();
  void hold_meeting(Block& block, Warp& warp, size_t which);
  void abandon();
  std::string who_waits() const;
  std::string describe(const Thread& thread) const;
  std::string describe(const Access& access) const;
  Fibre& free_fibre();
  uint32_t draw(uint32_t below) { return static_cast<uint32_t>((static_cast<uint64_t>(random_()) * below) >> 32); }

  static constexpr uint32_t kBlocks = 3;  // at most at a time

  const char* kernel_ = nullptr;
  Body body_ = nullptr;
  const char* closure_ = nullptr;
  size_t closure_bytes_ = 0;
  std::vector<uint32_t> order_;  // of blocks; the last comes next
  size_t limit_ = 1;             // of blocks at a time
  std::vector<std::unique_ptr<Block>> blocks_, spare_blocks_;
  std::vector<Thread*> ready_;
  size_t idle_ = 0;              // yields since anything happened
  double idle_since_ = 0;

  Fibre host_;
  Fibres fibres_{kBlocks * 1024 + 1};
  std::vector<Fibre*> free_;
  Fibre* running_ = nullptr;
  std::string error_;
  Races races_;
  std::mt19937 random_;
  uint64_t launches_ = 0;
};

}  // namespace emulator
