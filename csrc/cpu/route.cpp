// Mask -> routes sorted by expert, by a stable counting sort.
#include <algorithm>
#include <vector>

#include "../kernels.h"
#include "math.h"
#include "parallel.h"

namespace moetrain::cpu {

namespace {

// Adds one piece of tokens to its expert counts. Without a branch, so that it vectorises.
MOETRAIN_MULTIVERSION void count_rows(
    const uint8_t* mask, int64_t begin, int64_t end, int64_t num_experts, int32_t* expert_counts, int32_t* row_counts) {
  for (int64_t t = begin; t < end; ++t) {
    const uint8_t* row = mask + t * num_experts;
    int32_t routes = 0;
    for (int64_t e = 0; e < num_experts; ++e) {
      const int32_t active = row[e] != 0;
      expert_counts[e] += active;
      routes += active;
    }
    row_counts[t] = routes;
  }
}

// Writes the routes of one piece of tokens. `cursor[e]` is the place of the piece's first route to expert e.
void fill_rows(const RouteArgs& a, int64_t begin, int64_t end, int32_t* cursor) {
  for (int64_t t = begin; t < end; ++t) {
    const uint8_t* row = a.mask + t * a.num_experts;
    int32_t* out = a.positions + a.row_offsets[t];
    const auto visit = [&](int64_t e) {
      const int32_t place = cursor[e]++;
      a.tokens[place] = static_cast<int32_t>(t);
      *out++ = place;
    };
    int64_t e = 0;
    // Masks are sparse: eight zeros at a time.
    for (; e + 8 <= a.num_experts; e += 8) {
      uint64_t word;
      std::memcpy(&word, row + e, 8);
      if (word == 0) continue;
      for (int64_t i = e; i < e + 8; ++i) {
        if (row[i]) visit(i);
      }
    }
    for (; e < a.num_experts; ++e) {
      if (row[e]) visit(e);
    }
  }
}

}  // namespace

int64_t route(const RouteArgs& a) {
  const int64_t grain = rows_per_piece(a.num_experts);
  const int64_t pieces = std::max<int64_t>(1, std::min<int64_t>(num_threads(), a.num_tokens / grain));
  const int64_t piece = (a.num_tokens + pieces - 1) / pieces;
  const auto first = [&](int64_t i) { return std::min(a.num_tokens, i * piece); };

  // (pieces, E) counts per piece, then the place of each piece's first route to each expert.
  std::vector<int32_t> cursors(pieces * a.num_experts, 0);
  std::vector<int32_t> row_counts(a.num_tokens);
  parallel_for(pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      count_rows(a.mask, first(i), first(i + 1), a.num_experts, cursors.data() + i * a.num_experts, row_counts.data());
    }
  });

  int64_t total = 0;
  for (const int32_t count : row_counts) total += count;
  if (a.padded ? total > a.num_routes : total != a.num_routes) return total;
  std::fill(a.tokens + total, a.tokens + a.num_routes, 0);
  std::fill(a.positions + total, a.positions + a.num_routes, 0);

  int32_t next = 0;
  for (int64_t e = 0; e < a.num_experts; ++e) {
    const int32_t start = next;
    for (int64_t i = 0; i < pieces; ++i) {
      int32_t& cursor = cursors[i * a.num_experts + e];
      const int32_t count = cursor;
      cursor = next;
      next += count;
    }
    a.counts[e] = next - start;
  }
  a.row_offsets[0] = 0;
  for (int64_t t = 0; t < a.num_tokens; ++t) a.row_offsets[t + 1] = a.row_offsets[t] + row_counts[t];

  parallel_for(pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) fill_rows(a, first(i), first(i + 1), cursors.data() + i * a.num_experts);
  });
  return total;
}

}  // namespace moetrain::cpu
