// The experts' SwiGLU FFNs over a route list: forward, backward and the probes' inner products, from blocks of rows and columns
// whose products brgemm computes.
//
// Nothing of size (R, D) exists. A block's rows are gathered where they are needed, its float32 result is finished while it is in
// cache, and what experts add to one token is added in float32 in a slice of columns, expert after expert: so a sum's order does
// not depend on threads, which share out whole tasks. Forward keeps the pre-activations alone: each slice computes the activations
// again, block by block, which costs less than the memory for all of them.
#include <vector>

#include "../kernels.h"
#include "brgemm.h"
#include "finish.h"
#include "layout.h"
#include "math.h"
#include "tasks.h"

namespace moetrain::cpu {

namespace {

constexpr int64_t kRows = 64;               // of a block's product
constexpr int64_t kLeastChunk = 512;        // rows that share packed panels; more rows of an expert pack them again
constexpr int64_t kMostChunk = 1024;
constexpr int64_t kAdded = 128;             // columns of sums that are added to at once
constexpr int64_t kSliceColumns = 1024;     // of a sum over experts
constexpr int64_t kPanelBytes = 512 << 10;  // of panels that every block of rows reads, and of operands read again and again: half a core's L2
constexpr int64_t kDepth = 1024;            // of a product that sums over rows: a few sizes, each of which is a compiled kernel
constexpr int64_t kRowStep = 8;  // a last block's rows are rounded up to this, a last sum's depth to kDepthStep, for the same reason
constexpr int64_t kDepthStep = 16;

// ---- tasks ----

// Numbers that forward keeps for backward: what its scratch is measured by, which is there at the same time.
int64_t kept_numbers(const ExpertsArgs& a) { return a.num_rows * a.dim + a.num_routes * 2 * a.expert_dim; }

// Gathered, the rows of the chunks that are worked on are a tenth of what is kept, as far as a chunk can be as small.
int64_t chunk_rows(const ExpertsArgs& a) {
  const int64_t rows = kept_numbers(a) / 10 / std::max<int64_t>(1, a.dim * a.threads.number);
  return std::clamp(rows / kRows * kRows, kLeastChunk, kMostChunk);
}

struct Chunk {
  int64_t expert, begin, end;  // routes
};

std::vector<Chunk> chunks_of(const ExpertsArgs& a) {
  std::vector<Chunk> chunks;
  const int64_t most = chunk_rows(a);
  int64_t begin = 0;
  for (int64_t e = 0; e < a.num_experts; ++e) {
    const int64_t end = begin + a.counts[e], pieces = (a.counts[e] + most - 1) / most;
    for (int64_t left = pieces; left > 0; --left) {
      const int64_t size = std::min(end - begin, round_up((end - begin + left - 1) / left, kRows));
      chunks.push_back({e, begin, begin + size});
      begin += size;
    }
  }
  return chunks;
}

int64_t most_rows(const ExpertsArgs& a) {
  int32_t most = 0;
  for (int64_t e = 0; e < a.num_experts; ++e) most = std::max(most, a.counts[e]);
  return most;
}

// What one task adds up: so many columns of so many tokens of the (N, D) sums over experts.
struct Slice {
  int64_t columns, tokens;
};

// The fewest slices of all tokens, one for each thread at least, of `most` columns at most, equally wide.
int64_t slice_columns(int64_t dim, int64_t threads, int64_t most) {
  const int64_t share = round_up(pieces(dim, threads), kColumns);
  return round_up(pieces(share, pieces(share, most)), kColumns);
}

// Of forward in bfloat16, which is there for as long as what it keeps: the halves of its sums beside the result (SplitSums) are a tenth of that at
// most for all threads together, as far as the narrowest slices allow. Few tokens and many columns, or many and few? All columns of a token want its routes' operands made once
// more, all tokens of a column its experts' panels packed once more; a route's column of operands costs as much as 3 of a panel and as 100 of its
// products (measured, with AVX512-BF16). An expert has a block of rows in each part of the tokens.
Slice forward_slice(const ExpertsArgs& a) {
  const int64_t kept = kept_numbers(a);
  const int64_t most_parts = std::max<int64_t>(1, a.num_routes / (std::max<int64_t>(1, a.num_experts) * kRows));
  Slice best{};
  double best_cost = 0;
  for (int64_t parts = 1; parts <= most_parts; ++parts) {
    const int64_t tokens = pieces(a.num_rows, parts), most = kept / 10 / (tokens * a.threads.number) / kColumns * kColumns;
    const int64_t columns = slice_columns(a.dim, pieces(a.threads.number, parts), std::clamp(most, kColumns, kSliceColumns));
    const int64_t across = pieces(a.dim, columns), tasks = across * parts;
    const double routes = a.num_routes, dim = a.dim;
    const double work = routes * dim / 32 + 3 * across * routes + parts * a.num_experts * dim;
    const double memory = 10.0 * tokens * columns * a.threads.number / kept;  // over 1 where the narrowest slices are too many at once
    const double cost = work / tasks * pieces(tasks, a.threads.number) * std::max(1.0, memory);
    if (parts == 1 || cost < best_cost) best = {columns, tokens}, best_cost = cost;
  }
  return best;
}

Slice slice_of(const ExpertsArgs& a, bool forward) {
  if (forward && a.dtype == DType::bf16 && a.num_rows > 0 && a.dim > 0) return forward_slice(a);
  return {slice_columns(a.dim, a.threads.number, kSliceColumns), a.num_rows};
}

// body(first column, first token, scratch of the thread) for each slice.
template <class Body>
void for_slices(const ExpertsArgs& a, const Slice& slice, const Body& body) {
  const int64_t across = pieces(a.dim, slice.columns);
  for_tasks(a.threads, a.dtype, across * pieces(a.num_rows, slice.tokens), [&](int64_t task, char* memory) {
    body(task % across * slice.columns, task / across * slice.tokens, memory);
  });
}

// How many of `columns` columns, in whole panels, have panels of `bytes` each that stay in cache together.
int64_t columns_in_cache(int64_t columns, int64_t bytes) {
  return std::min(round_up(columns, kColumns), std::max<int64_t>(1, kPanelBytes / std::max<int64_t>(1, bytes)) * kColumns);
}

// The rows of a chunk, gathered while the first panels are used. If these are all the panels there are, a block's rows are used once.
template <class T>
struct ChunkRows {
  T* memory;
  int64_t ld, step;

  static int64_t size(const ExpertsArgs& a, bool once) {
    return (once ? kRows : std::min(chunk_rows(a), round_up(most_rows(a), kRowStep))) * even<T>(a.dim);
  }
  ChunkRows(Scratch& s, const ExpertsArgs& a, bool once) : memory(s.take<T>(size(a, once))), ld(even<T>(a.dim)), step(once ? 0 : ld) {}

  // Rows r .. r + kRows of the chunk, zeros up to a rounded number; from `data` if they are not there yet.
  const T* block(const void* data, const ExpertsArgs& a, const Chunk& chunk, int64_t r, bool first) const {
    T* out = memory + r * step;
    if (first) {
      const int64_t size = std::min(kRows, chunk.end - chunk.begin - r);
      gather(Rows<T>{static_cast<const T*>(data), a.dim, a.tokens + chunk.begin + r}, size, a.dim, out, ld);
      std::fill_n(out + size * ld, (round_up(size, kRowStep) - size) * ld, T{});
    }
    return out;
  }
};

// Panels of `sides` matrices, and a block of rows' products with all of them: finished together, so that memory is read and written in whole rows.
template <class T>
struct UpScratch {
  int64_t columns;  // of F at a time
  ChunkRows<T> rows;
  T* panels;
  float* c;
  UpScratch(Scratch& s, const ExpertsArgs& a, int64_t sides)
      : columns(columns_in_cache(a.expert_dim, sides * even<T>(a.dim) * kColumns * sizeof(T))),
        rows(s, a, columns >= a.expert_dim),
        panels(s.take<T>(sides * even<T>(a.dim) * columns)),
        c(s.take<float>(sides * kRows * columns)) {}
};

template <class T>
struct SumScratch {
  float *sums, *c;  // of a bfloat16 result: the sums, or room for their lower halves
  T *left, *panels;
  SumScratch(Scratch& s, const ExpertsArgs& a, const Slice& slice, bool forward)
      : sums(s.take<float>(sizeof(T) == 4 ? 0 : slice.tokens * slice.columns / (forward ? 2 : 1))),
        c(s.take<float>(kRows * kAdded)),
        left(s.take<T>(forward ? kRows * even<T>(a.expert_dim) : 0)),
        panels(s.take<T>((forward ? even<T>(a.expert_dim) : sizeof(T) == 4 ? 0 : even<T>(2 * a.expert_dim)) * slice.columns)) {}
};

// Columns of D whose weight gradients are one task: all of them for one thread, since a task prepares its expert's other operand.
int64_t group_columns(const ExpertsArgs& a) {
  const int64_t whole = round_up(a.dim, kColumns);
  return a.threads.number == 1 ? whole : std::min<int64_t>(whole, 512);
}

template <class T>
struct WeightScratch {
  T *left, *staging, *right;
  float *c, *turned;
  WeightScratch(Scratch& s, const ExpertsArgs& a)
      : left(s.take<T>(depth(a) * round_up(2 * a.expert_dim, kColumns))),
        staging(s.take<T>(depth(a) * round_up(2 * a.expert_dim, kColumns))),
        right(s.take<T>(right_size(a))),
        c(s.take<float>(kColumns * group_columns(a))),
        turned(s.take<float>(kColumns * round_up(a.expert_dim, kColumns))) {}
  static int64_t depth(const ExpertsArgs& a) { return round_up(most_rows(a), kDepthStep); }
  static int64_t columns_of(const ExpertsArgs& a, int64_t K) { return columns_in_cache(group_columns(a), K * kColumns * sizeof(T)); }
  // An expert with fewer rows takes more columns.
  static int64_t right_size(const ExpertsArgs& a) {
    return std::max<int64_t>(depth(a) * kColumns, std::min<int64_t>(kPanelBytes / sizeof(T), depth(a) * group_columns(a)));
  }
};

template <class T>
struct ProbeScratch {
  UpScratch<T> up;
  ChunkRows<T> grads;
  ProbeScratch(Scratch& s, const ExpertsArgs& a) : up(s, a, 3), grads(s, a, up.columns >= a.expert_dim) {}
};

int64_t block_rows(int64_t left) { return std::min(kRows, round_up(left, kRowStep)); }

// Gate and up of columns f .. f + n as one panel: gate's columns, then up's.
template <class T>
void pack_gate_up(const ExpertsArgs& a, int64_t e, int64_t f, int64_t n, T* panel) {
  const int64_t D = a.dim, F = a.expert_dim;
  const T* gate_up = static_cast<const T*>(a.gate_up) + e * 2 * F * D;
  pack_transposed(gate_up + f * D, D, D, n, panel, 2 * kColumns);
  pack_transposed(gate_up + (F + f) * D, D, D, n, panel + kColumns * kPair<T>, 2 * kColumns);
}

// c (m, 2 * kColumns), rows ldc apart = rows @ panel of gate and up. Between the halves of a narrow panel there is nothing: two products.
template <class T>
void gate_up_products(int64_t m, int64_t n, int64_t K, const T* rows, const T* panel, float* c, int64_t ldc) {
  if (n == kColumns) {
    brgemm(m, 2 * kColumns, K, rows, K, panel, 2 * kColumns, c, ldc, false);
  } else {
    brgemm(m, n, K, rows, K, panel, 2 * kColumns, c, ldc, false);
    brgemm(m, n, K, rows, K, panel + kColumns * kPair<T>, 2 * kColumns, c + kColumns, ldc, false);
  }
}

// ---- forward ----

// The chunk's pre-activations.
template <class T>
void forward_up(const ExpertsArgs& a, const Chunk& chunk, char* memory) {
  Scratch scratch(memory);
  const UpScratch<T> s(scratch, a, 2);
  const int64_t F = a.expert_dim, Dp = even<T>(a.dim), size = chunk.end - chunk.begin;
  T* pre = static_cast<T*>(a.pre) + chunk.begin * 2 * F;
  for (int64_t f0 = 0; f0 < F; f0 += s.columns) {
    const int64_t f1 = std::min(F, f0 + s.columns);
    for (int64_t f = f0; f < f1; f += kColumns) pack_gate_up(a, chunk.expert, f, std::min(kColumns, F - f), s.panels + (f - f0) * 2 * Dp);
    for (int64_t r = 0; r < size; r += kRows) {
      const T* rows = s.rows.block(a.rows, a, chunk, r, f0 == 0);
      for (int64_t f = f0; f < f1; f += kColumns) {
        const int64_t n = std::min(kColumns, F - f);
        gate_up_products(block_rows(size - r), n, Dp, rows, s.panels + (f - f0) * 2 * Dp, s.c + 2 * (f - f0), 2 * s.columns);
      }
      T* gate = pre + r * 2 * F + f0;
      forward_end(s.c, 2 * s.columns, std::min(kRows, size - r), f1 - f0, gate, gate + F, 2 * F);
    }
  }
}

// The panels of a slice: panel p at data + p * step, its rows ld apart.
template <class T>
struct Panels {
  const T* data;
  int64_t ld, step;
};

// Rows k of w (K, ..), columns .. + n, as B of brgemm. float32 is read where it lies.
Panels<float> rows_panels(const float* w, int64_t ldw, int64_t, int64_t, float*) { return {w, ldw, kColumns}; }
Panels<bfloat16> rows_panels(const bfloat16* w, int64_t ldw, int64_t K, int64_t n, bfloat16* panels) {
  pack_rows(Rows<bfloat16>{w, ldw, nullptr}, K, even<bfloat16>(K), n, kColumns, panels);
  return {panels, kColumns, even<bfloat16>(K) * kColumns};
}

// Columns d0 .. d0 + width of the sums, for each token from sums.first on, num_tokens of them, over its routes of left[route] @ B(expert).
// operand (R, row_bytes): what left(begin, rows, memory) makes rows (.., K) of A from, from route `begin` on; pack(expert, d, n, panels) makes the
// panels of B's columns d .. d + n.
template <class T, class S, class Left, class Pack>
void add_products(
    const ExpertsArgs& a, const SumScratch<T>& s, int64_t d0, int64_t width, int64_t K, const S& sums, int64_t num_tokens, const void* operand,
    int64_t row_bytes, const Left& left, const Pack& pack) {
  clear(sums, num_tokens, width);
  const int64_t part = round_up(kRows * row_bytes * kColumns / round_up(width, kColumns), 64);
  int64_t of_expert = 0;
  for (int64_t e = 0; e < a.num_experts; of_expert += a.counts[e++]) {
    // An expert's tokens ascend.
    const int32_t *tokens = a.tokens + of_expert, *stop = tokens + a.counts[e];
    int64_t begin = std::lower_bound(tokens, stop, sums.first) - a.tokens;
    const int64_t end = std::lower_bound(tokens, stop, sums.first + num_tokens) - a.tokens;
    if (begin == end) continue;
    const Panels<T> B = pack(e, d0, width, s.panels);
    for (; begin < end; begin += kRows) {
      const int64_t rows = std::min(kRows, end - begin);
      const T* A = left(begin, rows, s.left);
      // The next block's operand comes nearer during this one's products, a part with each; and before each the sums of its tokens, which lie
      // anywhere.
      const char *next = static_cast<const char*>(operand) + (begin + kRows) * row_bytes, *last = static_cast<const char*>(operand) + end * row_bytes;
      for (int64_t d = 0; d < width; d += kColumns) {
        const int64_t n = std::min(kColumns, width - d), first = d / kAdded * kAdded;
        for (const char* stop = std::min(last, next + part); next < stop; next += 64) __builtin_prefetch(next, 0, 2);
        for (int64_t r = 0; r < rows; ++r) prefetch(sums, a.tokens[begin + r], d, n);
        brgemm(block_rows(rows), n, K, A, K, B.data + d / kColumns * B.step, B.ld, s.c + d - first, kAdded, false);
        if (d + n == std::min(width, first + kAdded)) add_rows(s.c, kAdded, rows, d + n - first, a.tokens + begin, sums, first);
      }
    }
  }
}

// The same for a slice of `out` (N, D), from column d0 and token t0 on. forward: with less memory beside it.
template <class Left, class Pack>
void add_slice(
    const ExpertsArgs& a, const Slice& slice, int64_t d0, int64_t t0, int64_t K, float* out, bool forward, char* memory, const void* operand,
    int64_t row_bytes, const Left& left, const Pack& pack) {
  Scratch scratch(memory);
  const SumScratch<float> s(scratch, a, slice, forward);
  const int64_t width = std::min(slice.columns, a.dim - d0), num_tokens = std::min(slice.tokens, a.num_rows - t0);
  add_products(a, s, d0, width, K, Sums{out + t0 * a.dim + d0, a.dim, t0}, num_tokens, operand, row_bytes, left, pack);
}

template <class Left, class Pack>
void add_slice(
    const ExpertsArgs& a, const Slice& slice, int64_t d0, int64_t t0, int64_t K, bfloat16* out, bool forward, char* memory, const void* operand,
    int64_t row_bytes, const Left& left, const Pack& pack) {
  Scratch scratch(memory);
  const SumScratch<bfloat16> s(scratch, a, slice, forward);
  const int64_t width = std::min(slice.columns, a.dim - d0), num_tokens = std::min(slice.tokens, a.num_rows - t0);
  bfloat16* result = out + t0 * a.dim + d0;
  if (forward) {
    const SplitSums sums{result, a.dim, reinterpret_cast<uint16_t*>(s.sums), slice.columns, t0};
    add_products(a, s, d0, width, K, sums, num_tokens, operand, row_bytes, left, pack);
    round_sums(sums, num_tokens, width);
  } else {
    add_products(a, s, d0, width, K, Sums{s.sums, slice.columns, t0}, num_tokens, operand, row_bytes, left, pack);
    store_end(s.sums, slice.columns, num_tokens, width, result, a.dim);
  }
}

template <class T>
void forward(const ExpertsArgs& a) {
  const std::vector<Chunk> chunks = chunks_of(a);
  for_tasks(a.threads, a.dtype, chunks.size(), [&](int64_t task, char* memory) { forward_up<T>(a, chunks[task], memory); });
  const int64_t F = a.expert_dim, Fp = even<T>(F);
  const T* down = static_cast<const T*>(a.down);
  const auto left = [&](int64_t begin, int64_t rows, T* out) {
    activation(static_cast<const T*>(a.pre) + begin * 2 * F, rows, F, a.weights + begin, out, Fp);
    return static_cast<const T*>(out);
  };
  const Slice slice = slice_of(a, true);
  for_slices(a, slice, [&](int64_t d0, int64_t t0, char* memory) {
    const auto pack = [&](int64_t e, int64_t d, int64_t n, T* panels) {
      for (int64_t j = 0; j < n; j += kColumns) {
        pack_transposed(down + (e * a.dim + d + j) * F, F, F, std::min(kColumns, n - j), panels + j * Fp, kColumns);
      }
      return Panels<T>{panels, kColumns, Fp * kColumns};
    };
    add_slice(a, slice, d0, t0, Fp, static_cast<T*>(a.out), true, memory, a.pre, 2 * F * sizeof(T), left, pack);
  });
}

// ---- backward ----

// The chunk's gradients of pre-activations and weights, and its activations again.
template <class T>
void backward_up(const ExpertsArgs& a, const Chunk& chunk, char* memory) {
  Scratch scratch(memory);
  const UpScratch<T> s(scratch, a, 1);
  const int64_t D = a.dim, F = a.expert_dim, Dp = even<T>(D), Fp = even<T>(F), size = chunk.end - chunk.begin;
  const T* down = static_cast<const T*>(a.down) + chunk.expert * D * F;
  const T* pre = static_cast<const T*>(a.pre) + chunk.begin * 2 * F;
  T* grad_pre = static_cast<T*>(a.grad_pre) + chunk.begin * 2 * F;
  T* activation = static_cast<T*>(a.activation) + chunk.begin * Fp;
  float* grad_weights = static_cast<float*>(a.grad_weights) + chunk.begin;
  std::fill_n(grad_weights, size, 0.0f);
  for (int64_t f0 = 0; f0 < F; f0 += s.columns) {
    const int64_t f1 = std::min(F, f0 + s.columns);
    const Panels<T> B = rows_panels(down + f0, F, D, f1 - f0, s.panels);
    for (int64_t r = 0; r < size; r += kRows) {
      const T* rows = s.rows.block(a.grad, a, chunk, r, f0 == 0);
      for (int64_t f = f0; f < f1; f += kColumns) {
        const int64_t n = std::min(kColumns, F - f);
        brgemm(block_rows(size - r), n, Dp, rows, Dp, B.data + (f - f0) / kColumns * B.step, B.ld, s.c + f - f0, s.columns, false);
      }
      const int64_t at = r * 2 * F + f0;
      backward_end(
          s.c, s.columns, std::min(kRows, size - r), f1 - f0, a.weights + chunk.begin + r, pre + at, pre + at + F, grad_pre + at, grad_pre + at + F,
          2 * F, activation + r * Fp + f0, Fp, grad_weights + r);
    }
  }
  for (int64_t r = 0; r < size && Fp > F; ++r) activation[r * Fp + F] = T{};
}

// c (m, n), rows ldc apart = left (m, K) @ panel (K, n), K a multiple of kDepthStep.
template <class T>
void sum_over_rows(int64_t m, int64_t n, int64_t K, const T* left, const T* panel, float* c, int64_t ldc) {
  for (int64_t k = 0; k < K; k += kDepth) brgemm(m, n, std::min(kDepth, K - k), left + k, K, panel + k * kColumns, kColumns, c, ldc, k > 0);
}

// Columns d0 .. d1 of the expert's gate_up gradient, and these rows of its down gradient. begin: its first route.
template <class T>
void weight_gradients(const ExpertsArgs& a, int64_t e, int64_t begin, int64_t d0, int64_t d1, char* memory) {
  const int64_t D = a.dim, F = a.expert_dim, Fp = even<T>(F), count = a.counts[e], K = round_up(count, kDepthStep), Fc = round_up(F, kColumns);
  T* grad_gate_up = a.grad_gate_up ? static_cast<T*>(a.grad_gate_up) + e * 2 * F * D : nullptr;
  T* grad_down = a.grad_down ? static_cast<T*>(a.grad_down) + e * D * F : nullptr;
  if (count == 0) {
    for (int64_t f = 0; f < 2 * F && grad_gate_up; ++f) std::fill_n(grad_gate_up + f * D + d0, d1 - d0, T{});
    if (grad_down) std::fill_n(grad_down + d0 * F, (d1 - d0) * F, T{});
    return;
  }
  Scratch scratch(memory);
  const WeightScratch<T> s(scratch, a);
  const int64_t columns = WeightScratch<T>::columns_of(a, K);
  // left^T (M, K) of the expert's rows of `source`, which has M columns, rows ld apart.
  const auto turn = [&](const T* source, int64_t ld, int64_t M) {
    pack_rows(Rows<T>{source, ld, nullptr}, count, K, M, kColumns, s.staging);
    for (int64_t f = 0; f < M; f += kColumns) transpose_packed(s.staging + f * K, kColumns, K, std::min(kColumns, M - f), s.left + f * K, K);
  };
  // body(d, width) for pieces of the columns, once s.right has their panels: the expert's rows of `source` (N, D).
  const auto for_columns = [&](const void* source, const auto& body) {
    for (int64_t d = d0; d < d1; d += columns) {
      const int64_t width = std::min(columns, d1 - d);
      pack_rows(Rows<T>{static_cast<const T*>(source) + d, D, a.tokens + begin}, count, K, width, kColumns, s.right);
      body(d, width);
    }
  };
  if (grad_gate_up) {
    turn(static_cast<const T*>(a.grad_pre) + begin * 2 * F, 2 * F, 2 * F);
    for_columns(a.rows, [&](int64_t d, int64_t width) {
      for (int64_t f = 0; f < 2 * F; f += kColumns) {
        const int64_t m = std::min(kColumns, 2 * F - f);
        for (int64_t j = 0; j < width; j += kColumns) {
          sum_over_rows(m, std::min(kColumns, width - j), K, s.left + f * K, s.right + j * K, s.c + j, columns);
        }
        stream_end(s.c, columns, m, width, grad_gate_up + f * D + d, D);
      }
    });
  }
  if (grad_down) {
    // The transpose, (F, D), and that turned block by block: a small result in place of a large operand.
    turn(static_cast<const T*>(a.activation) + begin * Fp, Fp, F);
    for_columns(a.grad, [&](int64_t d, int64_t width) {
      for (int64_t j = 0; j < width; j += kColumns) {
        const int64_t n = std::min(kColumns, width - j);
        for (int64_t f = 0; f < F; f += kColumns) {
          const int64_t m = std::min(kColumns, F - f);
          sum_over_rows(m, n, K, s.left + f * K, s.right + j * K, s.c, kColumns);
          transpose_floats(s.c, kColumns, m, n, s.turned + f, Fc);
        }
        stream_end(s.turned, Fc, n, F, grad_down + (d + j) * F, F);
      }
    });
  }
}

template <class T>
void backward(const ExpertsArgs& a) {
  const std::vector<Chunk> chunks = chunks_of(a);
  for_tasks(a.threads, a.dtype, chunks.size(), [&](int64_t task, char* memory) { backward_up<T>(a, chunks[task], memory); });

  if (a.grad_gate_up || a.grad_down) {
    std::vector<int64_t> begins(a.num_experts + 1, 0);
    for (int64_t e = 0; e < a.num_experts; ++e) begins[e + 1] = begins[e] + a.counts[e];
    const int64_t columns = group_columns(a), groups = columns == 0 ? 0 : (a.dim + columns - 1) / columns;
    for_tasks(a.threads, a.dtype, a.num_experts * groups, [&](int64_t task, char* memory) {
      const int64_t e = task / groups, d = task % groups * columns;
      weight_gradients<T>(a, e, begins[e], d, std::min(a.dim, d + columns), memory);
    });
  }
  if (a.grad_rows) {
    const int64_t K = 2 * a.expert_dim;
    const T* gate_up = static_cast<const T*>(a.gate_up);
    const auto left = [&](int64_t begin, int64_t, T*) { return static_cast<const T*>(a.grad_pre) + begin * K; };
    const Slice slice = slice_of(a, false);
    for_slices(a, slice, [&](int64_t d0, int64_t t0, char* memory) {
      const auto pack = [&](int64_t e, int64_t d, int64_t n, T* panels) {
        return rows_panels(gate_up + e * K * a.dim + d, a.dim, K, n, panels);
      };
      add_slice(a, slice, d0, t0, K, static_cast<T*>(a.grad_rows), false, memory, a.grad_pre, K * sizeof(T), left, pack);
    });
  }
}

// ---- probes ----

template <class T>
void probe_chunk(const ExpertsArgs& a, const Chunk& chunk, char* memory) {
  Scratch scratch(memory);
  const ProbeScratch<T> s(scratch, a);
  const int64_t D = a.dim, F = a.expert_dim, Dp = even<T>(D), size = chunk.end - chunk.begin, columns = s.up.columns;
  const T* down = static_cast<const T*>(a.down) + chunk.expert * D * F;
  float* products = static_cast<float*>(a.grad_weights) + chunk.begin;
  float *pre = s.up.c, *c = pre + 2 * kRows * kColumns;  // of one panel
  T* down_panels = s.up.panels + 2 * Dp * columns;
  std::fill_n(products, size, 0.0f);
  for (int64_t f0 = 0; f0 < F; f0 += columns) {
    const int64_t f1 = std::min(F, f0 + columns);
    for (int64_t f = f0; f < f1; f += kColumns) pack_gate_up(a, chunk.expert, f, std::min(kColumns, F - f), s.up.panels + (f - f0) * 2 * Dp);
    const Panels<T> B = rows_panels(down + f0, F, D, f1 - f0, down_panels);
    for (int64_t r = 0; r < size; r += kRows) {
      const T *rows = s.up.rows.block(a.rows, a, chunk, r, f0 == 0), *grads = s.grads.block(a.grad, a, chunk, r, f0 == 0);
      const int64_t m = block_rows(size - r);
      for (int64_t f = f0; f < f1; f += kColumns) {
        const int64_t n = std::min(kColumns, F - f);
        gate_up_products(m, n, Dp, rows, s.up.panels + (f - f0) * 2 * Dp, pre, 2 * kColumns);
        brgemm(m, n, Dp, grads, Dp, B.data + (f - f0) / kColumns * B.step, B.ld, c, kColumns, false);
        probe_end(pre, c, std::min(kRows, size - r), n, products + r);
      }
    }
  }
}

template <class T>
void probes(const ExpertsArgs& a) {
  const std::vector<Chunk> chunks = chunks_of(a);
  for_tasks(a.threads, a.dtype, chunks.size(), [&](int64_t task, char* memory) { probe_chunk<T>(a, chunks[task], memory); });
}

template <class T>
int64_t scratch_bytes(const ExpertsArgs& a, ExpertsPass pass) {
  Scratch up(nullptr), sum(nullptr), weight(nullptr);
  if (pass == ExpertsPass::probe) {
    ProbeScratch<T>(up, a);
  } else {
    UpScratch<T>(up, a, pass == ExpertsPass::forward ? 2 : 1);
    const bool forward = pass == ExpertsPass::forward;
    SumScratch<T>(sum, a, slice_of(a, forward), forward);
  }
  if (pass == ExpertsPass::backward) WeightScratch<T>(weight, a);
  return std::max({up.used(), sum.used(), weight.used()});
}

}  // namespace

bool has_experts(DType dtype) { return has_brgemm(dtype); }

int64_t experts_row_elements(DType dtype, int64_t dim) { return dtype == DType::bf16 ? even<bfloat16>(dim) : dim; }

int64_t experts_scratch(const ExpertsArgs& a, ExpertsPass pass) {
  return a.dtype == DType::bf16 ? scratch_bytes<bfloat16>(a, pass) : scratch_bytes<float>(a, pass);
}

void experts_forward(const ExpertsArgs& a) { a.dtype == DType::bf16 ? forward<bfloat16>(a) : forward<float>(a); }
void experts_backward(const ExpertsArgs& a) { a.dtype == DType::bf16 ? backward<bfloat16>(a) : backward<float>(a); }
void experts_probe(const ExpertsArgs& a) { a.dtype == DType::bf16 ? probes<bfloat16>(a) : probes<float>(a); }

}  // namespace moetrain::cpu
