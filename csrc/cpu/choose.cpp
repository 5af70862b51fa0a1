// What a router does with its scores, (T, E) numbers, row by row: the largest, their shares, and how many routes that makes.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../kernels.h"
#include "math.h"
#include "parallel.h"

namespace moetrain::cpu {

namespace {

// A float's bits as a whole number in the order of floats: -0.0 as 0.0, NaN beyond the infinity of its sign.
MOETRAIN_INLINE int32_t ordered(float x) {
  const int32_t bits = bit_cast<int32_t>(x + 0.0f);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

MOETRAIN_MULTIVERSION void largest_rows(const LargestArgs& a, int64_t begin, int64_t end, int32_t* keys) {
  const int64_t E = a.num_experts, k = a.k;
  int32_t* best = keys + E;  // of the k largest so far, falling
  for (int64_t t = begin; t < end; ++t) {
    const float* row = a.scores + t * E;
    int64_t* out = a.experts + t * k;
    for (int64_t e = 0; e < E; ++e) keys[e] = ordered(row[e]);
    for (int64_t e = 0; e < E; ++e) {
      const int32_t key = keys[e];
      // Among equals the earlier one is ahead, so a later one never takes its place.
      if (e >= k && key <= best[k - 1]) continue;
      int64_t at = std::min(e, k - 1);
      for (; at > 0 && best[at - 1] < key; --at) best[at] = best[at - 1], out[at] = out[at - 1];
      best[at] = key, out[at] = e;
    }
  }
}

// A row's numbers are added in kWide running sums, then those: an order that depends on E alone.
constexpr int64_t kWide = 16;
MOETRAIN_INLINE float total_of(const float* sums) {
  float total = 0;
  for (int64_t lane = 0; lane < kWide; ++lane) total += sums[lane];
  return total;
}

// x, or 0 where it does not count; without a branch, so that loops over it vectorise.
MOETRAIN_INLINE float only_if(uint8_t active, float x) { return bit_cast<float>(bit_cast<uint32_t>(x) & (active ? ~0u : 0u)); }

// Sum over the active e of s[e], or times grad[e].
template <bool kGrad>
MOETRAIN_INLINE float active_sum(const float* s, const float* grad, const uint8_t* active, int64_t E) {
  const auto at = [&](int64_t e) { return only_if(active[e], kGrad ? s[e] * grad[e] : s[e]); };
  float sums[kWide] = {};
  int64_t e = 0;
  for (; e + kWide <= E; e += kWide) {
    for (int64_t lane = 0; lane < kWide; ++lane) sums[lane] += at(e + lane);
  }
  for (int64_t lane = 0; e < E; ++e, ++lane) sums[lane] += at(e);
  return total_of(sums);
}

MOETRAIN_INLINE float divisor(const float* s, const uint8_t* active, int64_t E) {
  const float total = active_sum<false>(s, nullptr, active, E);
  return total > 0 ? total : 1.0f;
}

MOETRAIN_MULTIVERSION void share_rows(const ShareArgs& a, int64_t begin, int64_t end) {
  const int64_t E = a.num_experts;
  for (int64_t t = begin; t < end; ++t) {
    const float* s = a.scores + t * E;
    const uint8_t* active = a.active + t * E;
    float* out = a.out + t * E;
    const float total = divisor(s, active, E);
    MOETRAIN_INDEPENDENT
    for (int64_t e = 0; e < E; ++e) out[e] = only_if(active[e], s[e] / total);
  }
}

MOETRAIN_MULTIVERSION void share_backward_rows(const ShareArgs& a, int64_t begin, int64_t end) {
  const int64_t E = a.num_experts;
  for (int64_t t = begin; t < end; ++t) {
    const float *s = a.scores + t * E, *grad = a.grad + t * E;
    const uint8_t* active = a.active + t * E;
    float* out = a.out + t * E;
    const float total = divisor(s, active, E), mean = active_sum<true>(s, grad, active, E) / total;
    MOETRAIN_INDEPENDENT
    for (int64_t e = 0; e < E; ++e) out[e] = only_if(active[e], (grad[e] - mean) / total);
  }
}

MOETRAIN_MULTIVERSION void count_rows(const CountArgs& a, int64_t begin, int64_t end, int32_t* of_experts) {
  for (int64_t t = begin; t < end; ++t) {
    const uint8_t* row = a.mask + t * a.num_experts;
    int32_t routes = 0;
    for (int64_t e = 0; e < a.num_experts; ++e) {
      const int32_t active = row[e] != 0;
      of_experts[e] += active;
      routes += active;
    }
    a.of_tokens[t] = routes;
  }
}

}  // namespace

void largest(const LargestArgs& a) {
  parallel_for(a.num_tokens, rows_per_piece(a.num_experts), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> keys(a.num_experts + a.k);
    largest_rows(a, begin, end, keys.data());
  });
}

void share(const ShareArgs& a) {
  auto* const rows = a.grad ? share_backward_rows : share_rows;
  parallel_for(a.num_tokens, rows_per_piece(a.num_experts), [&](int64_t begin, int64_t end) { rows(a, begin, end); });
}

void count(const CountArgs& a) {
  const int64_t grain = rows_per_piece(a.num_experts);
  const int64_t pieces = std::max<int64_t>(1, std::min<int64_t>(num_threads(), a.num_tokens / grain));
  const int64_t piece = (a.num_tokens + pieces - 1) / pieces;
  std::vector<int32_t> counts(pieces * a.num_experts, 0);
  parallel_for(pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      count_rows(a, std::min(a.num_tokens, i * piece), std::min(a.num_tokens, (i + 1) * piece), counts.data() + i * a.num_experts);
    }
  });
  std::fill_n(a.of_experts, a.num_experts, 0);
  for (int64_t i = 0; i < pieces; ++i) {
    for (int64_t e = 0; e < a.num_experts; ++e) a.of_experts[e] += counts[i * a.num_experts + e];
  }
}

}  // namespace moetrain::cpu
