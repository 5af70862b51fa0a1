// Data races within a launch: two threads touch a byte, one writes, and no barrier orders them. The first reader or writer that is not
// ordered is reported, whether or not the values differ in this run.
//
// A thread's accesses carry the number of __syncthreads it has passed and, for lanes of one warp, a vector clock that __syncwarp joins.
// Of each byte the last write and a summary of the reads since are kept (as FastTrack does: C. Flanagan, S. Freund, PLDI 2009; [recalled]).
// The summary of several readers keeps the latest of their times, so a partial __syncwarp after reads by several lanes may be reported
// although it orders them; nothing unordered is missed for it. Atomics and volatile accesses don't race with each other; they are
// not taken to order anything else, so data handed to another block inside one launch is reported too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <memory>
#include <unordered_map>
#include <vector>

namespace emulator {

enum class Who : uint8_t { nobody, thread, lanes, warps, blocks };

struct Access {
  uint32_t block = 0;  // linear in the grid
  uint32_t phase = 0;  // __syncthreads passed
  uint32_t clock = 0;  // the lane's own
  uint16_t thread = 0;  // linear in the block
  Who who = Who::nobody;
  bool atomic = false;
};

// `lanes` are the clocks of the 32 lanes of my warp as far as I know them.
inline bool is_ordered(const Access& earlier, const Access& me, const uint32_t* lanes) {
  if (earlier.who == Who::nobody) return true;
  if (earlier.who == Who::blocks || earlier.block != me.block) return false;
  if (earlier.phase < me.phase) return true;
  if (earlier.who == Who::warps || earlier.thread / 32 != me.thread / 32) return false;
  if (earlier.who == Who::lanes) return *std::min_element(lanes, lanes + 32) >= earlier.clock;
  return earlier.thread == me.thread || lanes[earlier.thread % 32] >= earlier.clock;
}

class Races {
 public:
  // Notes that `me` touches the bytes. Returns the earlier access that this one races with, or null.
  const Access* touch(uintptr_t address, size_t bytes, bool write, const Access& me, const uint32_t* lanes) {
    for (; bytes > 0; ++address, --bytes) {
      Cell& cell = at(address);
      if (!is_ordered(cell.write, me, lanes) && !(cell.write.atomic && me.atomic)) return &cell.write;
      if (!write) {
        note_read(cell.read, me, lanes);
        continue;
      }
      if (!is_ordered(cell.read, me, lanes) && !(cell.read.atomic && me.atomic)) return &cell.read;
      cell.write = me;
      cell.read = {};
    }
    return nullptr;
  }

  // The bytes have become something else, of somebody else.
  void forget(uintptr_t address, size_t bytes) {
    for (; bytes > 0; ++address, --bytes) at(address) = {};
  }

  void clear() {
    for (auto& [_, page] : pages_) {
      if (spare_.size() < kSpare) spare_.push_back(std::move(page));
    }
    pages_.clear();
    std::fill(std::begin(recent_), std::end(recent_), Recent{});
  }

 private:
  struct Cell {
    Access write, read;
  };
  static constexpr size_t kPage = 1024, kSpare = 1024, kRecent = 64;
  struct Page {
    Cell cells[kPage];
  };
  struct Recent {
    uintptr_t number = ~uintptr_t{0};
    Page* page = nullptr;
  };

  Cell& at(uintptr_t address) {
    const uintptr_t number = address / kPage;
    Recent& recent = recent_[number % kRecent];
    if (number != recent.number) {
      std::unique_ptr<Page>& page = pages_[number];
      if (!page && !spare_.empty()) {
        page = std::move(spare_.back());
        spare_.pop_back();
        std::fill(std::begin(page->cells), std::end(page->cells), Cell{});
      }
      if (!page) page = std::make_unique<Page>();
      recent = {number, page.get()};
    }
    return recent.page->cells[address % kPage];
  }

  static void note_read(Access& read, const Access& me, const uint32_t* lanes) {
    if (read.who == Who::blocks) {
      read.atomic = read.atomic && me.atomic;
      return;
    }
    // A read that is ordered before this one is before all that comes after this one.
    if (is_ordered(read, me, lanes)) {
      read = me;
      return;
    }
    const Who wide = read.block != me.block ? Who::blocks : read.thread / 32 != me.thread / 32 ? Who::warps : Who::lanes;
    read.who = std::max(read.who, wide);
    read.phase = std::max(read.phase, me.phase);
    read.clock = std::max(read.clock, me.clock);
    read.atomic = read.atomic && me.atomic;
  }

  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  std::vector<std::unique_ptr<Page>> spare_;
  Recent recent_[kRecent];
};

}  // namespace emulator
