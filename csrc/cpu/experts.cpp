// The experts' SwiGLU FFNs over a route list: forward, backward and the probes' inner products, from blocks of rows and columns
// whose products brgemm computes.
//
// Nothing of size (R, D) exists. A block's rows are gathered where they are needed, its float32 result is finished while it is in
// cache, and what experts add to one token is added in float32 in a slice of columns, expert after expert: so a sum's order does
// not depend on threads, which share out whole tasks.
#include <atomic>
#include <vector>

#include "../kernels.h"
#include "brgemm.h"
#include "layout.h"
#include "math.h"
#include "parallel.h"

namespace moetrain::cpu {

namespace {

constexpr int64_t kRows = 64;      // of a block's product
constexpr int64_t kColumns = 64;   // of a panel of weights; gate and up together have twice as many
constexpr int64_t kChunk = 512;    // rows that share a packed panel; more rows of an expert pack it again
constexpr int64_t kDepth = 512;    // of a product that sums over rows: a few sizes, each of which is a compiled kernel
constexpr int64_t kRowStep = 8;    // a last block's rows are rounded up to this, a last sum's depth to kDepthStep, for the same reason
constexpr int64_t kDepthStep = 16;

// ---- the ends of products: a block of float32 in, the tensors' type out ----

// c: (rows, 2 * kColumns): gate | up. Rounds them, and computes the activation from the rounded numbers, as backward will.
template <class T>
MOETRAIN_INLINE void finish_forward(
    const float* c, int64_t rows, int64_t n, const float* weights, T* gate, T* up, int64_t ld, T* activation, int64_t ld_activation) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* c_gate = c + r * 2 * kColumns;
    const float* c_up = c_gate + kColumns;
    const float weight = weights[r];
    MOETRAIN_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) {
      store(gate[r * ld + j], c_gate[j]);
      store(up[r * ld + j], c_up[j]);
      const float g = load(gate[r * ld + j]);
      store(activation[r * ld_activation + j], weight * (g * sigmoid(g) * load(up[r * ld + j])));
    }
  }
}

MOETRAIN_INLINE float sum_of(const float* products) {
  float lanes[16] = {};
  for (int64_t j = 0; j < kColumns; j += 16) {
    for (int64_t lane = 0; lane < 16; ++lane) lanes[lane] += products[j + lane];
  }
  for (int64_t width = 8; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

// c: (rows, kColumns), the gradient of silu(gate) * up before the weight. With s = sigmoid(g): silu'(g) = s + g s (1 - s).
template <class T>
MOETRAIN_INLINE void finish_backward(
    const float* c, int64_t rows, int64_t n, const float* weights, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t ld,
    T* activation, int64_t ld_activation, float* grad_weights) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* grad = c + r * kColumns;
    const T *g_row = gate + r * ld, *u_row = up + r * ld;
    T *dg_row = grad_gate + r * ld, *du_row = grad_up + r * ld, *a_row = activation + r * ld_activation;
    const float weight = weights[r];
    float products[kColumns];
    MOETRAIN_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) {
      const float g = load(g_row[j]), u = load(u_row[j]), s = sigmoid(g);
      const float silu = g * s, a = silu * u, upstream = weight * grad[j];
      products[j] = grad[j] * a;
      store(a_row[j], weight * a);
      store(du_row[j], upstream * silu);
      store(dg_row[j], upstream * u * (s + silu * (1.0f - s)));
    }
    for (int64_t j = n; j < kColumns; ++j) products[j] = 0.0f;
    grad_weights[r] += sum_of(products);
  }
}

// pre: (rows, 2 * kColumns): gate | up. c: (rows, kColumns). out[r] += <c, silu(gate) * up>
MOETRAIN_MULTIVERSION void finish_probe(const float* pre, const float* c, int64_t rows, int64_t n, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    const float *gate = pre + r * 2 * kColumns, *up = gate + kColumns, *grad = c + r * kColumns;
    float products[kColumns];
    MOETRAIN_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) products[j] = grad[j] * (gate[j] * sigmoid(gate[j]) * up[j]);
    for (int64_t j = n; j < kColumns; ++j) products[j] = 0.0f;
    out[r] += sum_of(products);
  }
}

// sums[tokens[r]] += c[r], rows of sums ld apart
MOETRAIN_MULTIVERSION void add_rows(const float* c, int64_t rows, int64_t n, const int32_t* tokens, float* sums, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) {
    float* sum = sums + tokens[r] * ld;
    const float* row = c + r * kColumns;
    MOETRAIN_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) sum[j] += row[j];
  }
}

template <class T>
MOETRAIN_INLINE void store_rows(const float* c, int64_t ldc, int64_t rows, int64_t n, T* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; ++r) {
    MOETRAIN_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) store(out[r * ldo + j], c[r * ldc + j]);
  }
}

#define MOETRAIN_FINISHES(T)                                                                                               \
  MOETRAIN_MULTIVERSION void forward_end(                                                                                  \
      const float* c, int64_t rows, int64_t n, const float* w, T* gate, T* up, int64_t ld, T* a, int64_t lda) {            \
    finish_forward(c, rows, n, w, gate, up, ld, a, lda);                                                                   \
  }                                                                                                                        \
  MOETRAIN_MULTIVERSION void backward_end(                                                                                 \
      const float* c, int64_t rows, int64_t n, const float* w, const T* gate, const T* up, T* dg, T* du, int64_t ld, T* a, \
      int64_t lda, float* dw) {                                                                                            \
    finish_backward(c, rows, n, w, gate, up, dg, du, ld, a, lda, dw);                                                      \
  }                                                                                                                        \
  MOETRAIN_MULTIVERSION void store_end(const float* c, int64_t ldc, int64_t rows, int64_t n, T* out, int64_t ldo) {        \
    store_rows(c, ldc, rows, n, out, ldo);                                                                                 \
  }
MOETRAIN_FINISHES(float)
MOETRAIN_FINISHES(bfloat16)

// ---- tasks and scratch ----

struct Chunk {
  int64_t expert, begin, end;  // routes
};

std::vector<Chunk> chunks_of(const ExpertsArgs& a) {
  std::vector<Chunk> chunks;
  int64_t begin = 0;
  for (int64_t e = 0; e < a.num_experts; ++e) {
    const int64_t end = begin + a.counts[e];
    for (; begin < end; begin += kChunk) chunks.push_back({e, begin, std::min(begin + kChunk, end)});
    begin = end;
  }
  return chunks;
}

int64_t most_rows(const ExpertsArgs& a) {
  int32_t most = 0;
  for (int64_t e = 0; e < a.num_experts; ++e) most = std::max(most, a.counts[e]);
  return most;
}

// Hands out one thread's scratch piece by piece. Without memory it only counts.
class Scratch {
 public:
  explicit Scratch(char* memory) : memory_(memory) {}
  template <class T>
  T* take(int64_t size) {
    char* piece = memory_ + used_;
    used_ += round_up(size * sizeof(T), 64) + 64;  // an odd number of cache lines between pieces of round sizes
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// Threads take task after task. body(task, scratch of the thread) on whole tasks, in no order.
template <class Body>
void for_tasks(const ExpertsArgs& a, int64_t num_tasks, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t per_thread = a.workspace_bytes / a.num_threads;
  parallel_for(a.num_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t task = next++; task < num_tasks; task = next++) body(task, static_cast<char*>(a.workspace) + thread * per_thread);
    }
    brgemm_release(a.dtype);
  });
}

// Columns of a slice, in which one task adds up its rows: few passes over the routes, but a task for each thread and sums that stay near.
int64_t slice_columns(const ExpertsArgs& a) {
  const int64_t share = round_up((a.dim + a.num_threads - 1) / a.num_threads, kColumns);
  return std::min<int64_t>(share, 4 * kColumns);
}

template <class T>
struct UpScratch {
  T *rows, *panel;
  float* c;
  UpScratch(Scratch& s, const ExpertsArgs& a)
      : rows(s.take<T>(std::min(kChunk, round_up(most_rows(a), kRowStep)) * even<T>(a.dim))),
        panel(s.take<T>(even<T>(a.dim) * 2 * kColumns)),
        c(s.take<float>(kRows * 2 * kColumns)) {}
};

template <class T>
struct SumScratch {
  float *sums, *c;
  T* panel;
  SumScratch(Scratch& s, const ExpertsArgs& a)
      : sums(s.take<float>(a.num_rows * slice_columns(a))),
        c(s.take<float>(kRows * kColumns)),
        panel(s.take<T>(even<T>(2 * a.expert_dim) * slice_columns(a))) {}
};

template <class T>
struct WeightScratch {
  T *left, *staging, *right;
  float* c;
  WeightScratch(Scratch& s, const ExpertsArgs& a, int64_t columns)
      : left(s.take<T>(depth(a) * kColumns)),
        staging(s.take<T>(depth(a) * kColumns)),
        right(s.take<T>(depth(a) * std::max(columns, round_up(a.expert_dim, kColumns)))),
        c(s.take<float>(kColumns * kColumns)) {}
  static int64_t depth(const ExpertsArgs& a) { return round_up(most_rows(a), kDepthStep); }
};

template <class T>
struct ProbeScratch {
  T *rows, *grads, *panel, *down;
  float *pre, *c;
  ProbeScratch(Scratch& s, const ExpertsArgs& a)
      : rows(s.take<T>(std::min(kChunk, round_up(most_rows(a), kRowStep)) * even<T>(a.dim))),
        grads(s.take<T>(std::min(kChunk, round_up(most_rows(a), kRowStep)) * even<T>(a.dim))),
        panel(s.take<T>(even<T>(a.dim) * 2 * kColumns)),
        down(s.take<T>(even<T>(a.dim) * kColumns)),
        pre(s.take<float>(kRows * 2 * kColumns)),
        c(s.take<float>(kRows * kColumns)) {}
};

// Columns of D whose weight gradients are one task: all of them for one thread, since a task prepares its expert's other operand.
int64_t group_columns(const ExpertsArgs& a) {
  const int64_t whole = round_up(a.dim, kColumns);
  return a.num_threads == 1 ? whole : std::min<int64_t>(whole, 512);
}

int64_t block_rows(int64_t left) { return std::min(kRows, round_up(left, kRowStep)); }

// rows: the chunk's, zeros up to the rounded number.
template <class T>
void gather_chunk(const void* data, const ExpertsArgs& a, const Chunk& chunk, T* out) {
  const int64_t ld = even<T>(a.dim), size = chunk.end - chunk.begin;
  gather(Rows<T>{static_cast<const T*>(data), a.dim, a.tokens + chunk.begin}, size, a.dim, out, ld);
  std::fill_n(out + size * ld, (round_up(size, kRowStep) - size) * ld, T{});
}

// ---- forward ----

// The chunk's pre-activations and activations.
template <class T>
void forward_up(const ExpertsArgs& a, const Chunk& chunk, char* memory) {
  Scratch scratch(memory);
  const UpScratch<T> s(scratch, a);
  const int64_t D = a.dim, F = a.expert_dim, Dp = even<T>(D), Fp = even<T>(F), size = chunk.end - chunk.begin;
  const T* gate_up = static_cast<const T*>(a.gate_up) + chunk.expert * 2 * F * D;
  T* pre = static_cast<T*>(a.pre) + chunk.begin * 2 * F;
  T* activation = static_cast<T*>(a.activation) + chunk.begin * Fp;
  gather_chunk(a.rows, a, chunk, s.rows);
  for (int64_t f = 0; f < F; f += kColumns) {
    const int64_t n = std::min(kColumns, F - f);
    pack_transposed(gate_up + f * D, D, D, n, s.panel, 2 * kColumns);
    pack_transposed(gate_up + (F + f) * D, D, D, n, s.panel + kColumns * kPair<T>, 2 * kColumns);
    for (int64_t r = 0; r < size; r += kRows) {
      const int64_t m = block_rows(size - r);
      // Between the halves of a narrow panel there is nothing: two products.
      if (n == kColumns) {
        brgemm(m, 2 * kColumns, Dp, s.rows + r * Dp, Dp, s.panel, 2 * kColumns, s.c, 2 * kColumns, false);
      } else {
        brgemm(m, n, Dp, s.rows + r * Dp, Dp, s.panel, 2 * kColumns, s.c, 2 * kColumns, false);
        brgemm(m, n, Dp, s.rows + r * Dp, Dp, s.panel + kColumns * kPair<T>, 2 * kColumns, s.c + kColumns, 2 * kColumns, false);
      }
      forward_end(
          s.c, std::min(kRows, size - r), n, static_cast<const float*>(a.weights) + chunk.begin + r, pre + r * 2 * F + f,
          pre + r * 2 * F + F + f, 2 * F, activation + r * Fp + f, Fp);
    }
  }
  for (int64_t r = 0; r < size && Fp > F; ++r) activation[r * Fp + F] = T{};
}

template <class T>
struct Panel {
  const T* data;
  int64_t ld;
};

// Rows k of w (K, ..), columns .. + n, as B of brgemm. float32 is read where it lies.
Panel<float> rows_panel(const float* w, int64_t ldw, int64_t, int64_t, float*) { return {w, ldw}; }
Panel<bfloat16> rows_panel(const bfloat16* w, int64_t ldw, int64_t K, int64_t n, bfloat16* panel) {
  pack_rows(Rows<bfloat16>{w, ldw, nullptr}, K, even<bfloat16>(K), n, panel, kColumns);
  return {panel, kColumns};
}

// One slice of columns of out[t] = sum over the routes of t of left[route] @ B(expert), left (R, ld). pack(expert, d, n, panel) makes the panel
// of B's columns d .. d + n and says where it is.
template <class T, class Pack>
void add_slice(const ExpertsArgs& a, int64_t slice, const T* left, int64_t ld, T* out, char* memory, const Pack& pack) {
  Scratch scratch(memory);
  const SumScratch<T> s(scratch, a);
  const int64_t columns = slice_columns(a), d0 = slice * columns, width = std::min(columns, a.dim - d0);
  std::fill_n(s.sums, a.num_rows * columns, 0.0f);
  int64_t begin = 0;
  for (int64_t e = 0; e < a.num_experts; ++e) {
    const int64_t end = begin + a.counts[e];
    if (begin == end) continue;
    Panel<T> panels[4];
    for (int64_t d = 0; d < width; d += kColumns) {
      panels[d / kColumns] = pack(e, d0 + d, std::min(kColumns, width - d), s.panel + d * even<T>(ld));
    }
    for (; begin < end; begin += kRows) {
      for (int64_t d = 0; d < width; d += kColumns) {
        const int64_t n = std::min(kColumns, width - d);
        const Panel<T> B = panels[d / kColumns];
        brgemm(block_rows(end - begin), n, ld, left + begin * ld, ld, B.data, B.ld, s.c, kColumns, false);
        add_rows(s.c, std::min(kRows, end - begin), n, a.tokens + begin, s.sums + d, columns);
      }
    }
    begin = end;
  }
  store_end(s.sums, columns, a.num_rows, width, out + d0, a.dim);
}

int64_t slices_of(const ExpertsArgs& a) { return a.dim == 0 ? 0 : (a.dim + slice_columns(a) - 1) / slice_columns(a); }

template <class T>
void forward(const ExpertsArgs& a) {
  const std::vector<Chunk> chunks = chunks_of(a);
  for_tasks(a, chunks.size(), [&](int64_t task, char* memory) { forward_up<T>(a, chunks[task], memory); });
  const int64_t F = a.expert_dim;
  const T* down = static_cast<const T*>(a.down);
  for_tasks(a, slices_of(a), [&](int64_t slice, char* memory) {
    const auto pack = [&](int64_t e, int64_t d, int64_t n, T* panel) {
      pack_transposed(down + (e * a.dim + d) * F, F, F, n, panel, kColumns);
      return Panel<T>{panel, kColumns};
    };
    add_slice(a, slice, static_cast<const T*>(a.activation), even<T>(F), static_cast<T*>(a.out), memory, pack);
  });
}

// ---- backward ----

// The chunk's gradients of pre-activations and weights, and its activations again.
template <class T>
void backward_up(const ExpertsArgs& a, const Chunk& chunk, char* memory) {
  Scratch scratch(memory);
  const UpScratch<T> s(scratch, a);
  const int64_t D = a.dim, F = a.expert_dim, Dp = even<T>(D), Fp = even<T>(F), size = chunk.end - chunk.begin;
  const T* down = static_cast<const T*>(a.down) + chunk.expert * D * F;
  const T* pre = static_cast<const T*>(a.pre) + chunk.begin * 2 * F;
  T* grad_pre = static_cast<T*>(a.grad_pre) + chunk.begin * 2 * F;
  T* activation = static_cast<T*>(a.activation) + chunk.begin * Fp;
  float* grad_weights = static_cast<float*>(a.grad_weights) + chunk.begin;
  std::fill_n(grad_weights, size, 0.0f);
  gather_chunk(a.grad, a, chunk, s.rows);
  for (int64_t f = 0; f < F; f += kColumns) {
    const int64_t n = std::min(kColumns, F - f);
    const Panel<T> B = rows_panel(down + f, F, D, n, s.panel);
    for (int64_t r = 0; r < size; r += kRows) {
      brgemm(block_rows(size - r), n, Dp, s.rows + r * Dp, Dp, B.data, B.ld, s.c, kColumns, false);
      const int64_t at = r * 2 * F + f;
      backward_end(
          s.c, std::min(kRows, size - r), n, static_cast<const float*>(a.weights) + chunk.begin + r, pre + at, pre + at + F, grad_pre + at,
          grad_pre + at + F, 2 * F, activation + r * Fp + f, Fp, grad_weights + r);
    }
  }
  for (int64_t r = 0; r < size && Fp > F; ++r) activation[r * Fp + F] = T{};
}

// out (m, n), rows ldo apart = left (m, K) @ panel (K, n), K a multiple of kDepthStep.
template <class T>
void sum_over_rows(int64_t m, int64_t n, int64_t K, const T* left, const T* panel, T* out, int64_t ldo, float* c) {
  constexpr bool direct = sizeof(T) == sizeof(float);
  float* sums = direct ? reinterpret_cast<float*>(out) : c;
  const int64_t ld = direct ? ldo : kColumns;
  for (int64_t k = 0; k < K; k += kDepth) {
    brgemm(m, n, std::min(kDepth, K - k), left + k, K, panel + k * kColumns, kColumns, sums, ld, k > 0);
  }
  if constexpr (!direct) store_end(c, kColumns, m, n, out, ldo);
}

// Columns d0 .. d1 of the expert's gate_up gradient, and these rows of its down gradient. begin: its first route.
template <class T>
void weight_gradients(const ExpertsArgs& a, int64_t e, int64_t begin, int64_t d0, int64_t d1, char* memory) {
  const int64_t D = a.dim, F = a.expert_dim, Fp = even<T>(F), count = a.counts[e], K = round_up(count, kDepthStep);
  T* grad_gate_up = a.grad_gate_up ? static_cast<T*>(a.grad_gate_up) + e * 2 * F * D : nullptr;
  T* grad_down = a.grad_down ? static_cast<T*>(a.grad_down) + e * D * F : nullptr;
  if (count == 0) {
    for (int64_t f = 0; f < 2 * F && grad_gate_up; ++f) std::fill_n(grad_gate_up + f * D + d0, d1 - d0, T{});
    if (grad_down) std::fill_n(grad_down + d0 * F, (d1 - d0) * F, T{});
    return;
  }
  Scratch scratch(memory);
  const WeightScratch<T> s(scratch, a, group_columns(a));
  const int32_t* tokens = a.tokens + begin;
  if (grad_gate_up) {
    for (int64_t d = d0; d < d1; d += kColumns) {
      pack_rows(Rows<T>{static_cast<const T*>(a.rows) + d, D, tokens}, count, K, std::min(kColumns, d1 - d), s.right + (d - d0) * K, kColumns);
    }
    for (int64_t f = 0; f < 2 * F; f += kColumns) {
      const int64_t m = std::min(kColumns, 2 * F - f);
      transpose(Rows<T>{static_cast<const T*>(a.grad_pre) + begin * 2 * F + f, 2 * F, nullptr}, count, K, m, s.left, K, s.staging);
      for (int64_t d = d0; d < d1; d += kColumns) {
        sum_over_rows(m, std::min(kColumns, d1 - d), K, s.left, s.right + (d - d0) * K, grad_gate_up + f * D + d, D, s.c);
      }
    }
  }
  if (grad_down) {
    for (int64_t f = 0; f < F; f += kColumns) {
      pack_rows(
          Rows<T>{static_cast<const T*>(a.activation) + begin * Fp + f, Fp, nullptr}, count, K, std::min(kColumns, F - f), s.right + f * K,
          kColumns);
    }
    for (int64_t d = d0; d < d1; d += kColumns) {
      const int64_t m = std::min(kColumns, d1 - d);
      transpose(Rows<T>{static_cast<const T*>(a.grad) + d, D, tokens}, count, K, m, s.left, K, s.staging);
      for (int64_t f = 0; f < F; f += kColumns) {
        sum_over_rows(m, std::min(kColumns, F - f), K, s.left, s.right + f * K, grad_down + d * F + f, F, s.c);
      }
    }
  }
}

template <class T>
void backward(const ExpertsArgs& a) {
  const std::vector<Chunk> chunks = chunks_of(a);
  for_tasks(a, chunks.size(), [&](int64_t task, char* memory) { backward_up<T>(a, chunks[task], memory); });

  if (a.grad_gate_up || a.grad_down) {
    std::vector<int64_t> begins(a.num_experts + 1, 0);
    for (int64_t e = 0; e < a.num_experts; ++e) begins[e + 1] = begins[e] + a.counts[e];
    const int64_t columns = group_columns(a), groups = columns == 0 ? 0 : (a.dim + columns - 1) / columns;
    for_tasks(a, a.num_experts * groups, [&](int64_t task, char* memory) {
      const int64_t e = task / groups, d = task % groups * columns;
      weight_gradients<T>(a, e, begins[e], d, std::min(a.dim, d + columns), memory);
    });
  }
  if (a.grad_rows) {
    const int64_t K = 2 * a.expert_dim;
    const T* gate_up = static_cast<const T*>(a.gate_up);
    for_tasks(a, slices_of(a), [&](int64_t slice, char* memory) {
      const auto pack = [&](int64_t e, int64_t d, int64_t n, T* panel) { return rows_panel(gate_up + e * K * a.dim + d, a.dim, K, n, panel); };
      add_slice(a, slice, static_cast<const T*>(a.grad_pre), K, static_cast<T*>(a.grad_rows), memory, pack);
    });
  }
}

// ---- probes ----

template <class T>
void probe_chunk(const ExpertsArgs& a, const Chunk& chunk, char* memory) {
  Scratch scratch(memory);
  const ProbeScratch<T> s(scratch, a);
  const int64_t D = a.dim, F = a.expert_dim, Dp = even<T>(D), size = chunk.end - chunk.begin;
  const T* gate_up = static_cast<const T*>(a.gate_up) + chunk.expert * 2 * F * D;
  const T* down = static_cast<const T*>(a.down) + chunk.expert * D * F;
  float* products = static_cast<float*>(a.grad_weights) + chunk.begin;
  std::fill_n(products, size, 0.0f);
  gather_chunk(a.rows, a, chunk, s.rows);
  gather_chunk(a.grad, a, chunk, s.grads);
  for (int64_t f = 0; f < F; f += kColumns) {
    const int64_t n = std::min(kColumns, F - f);
    pack_transposed(gate_up + f * D, D, D, n, s.panel, 2 * kColumns);
    pack_transposed(gate_up + (F + f) * D, D, D, n, s.panel + kColumns * kPair<T>, 2 * kColumns);
    const Panel<T> B = rows_panel(down + f, F, D, n, s.down);
    for (int64_t r = 0; r < size; r += kRows) {
      const int64_t m = block_rows(size - r);
      if (n == kColumns) {
        brgemm(m, 2 * kColumns, Dp, s.rows + r * Dp, Dp, s.panel, 2 * kColumns, s.pre, 2 * kColumns, false);
      } else {
        brgemm(m, n, Dp, s.rows + r * Dp, Dp, s.panel, 2 * kColumns, s.pre, 2 * kColumns, false);
        brgemm(m, n, Dp, s.rows + r * Dp, Dp, s.panel + kColumns * kPair<T>, 2 * kColumns, s.pre + kColumns, 2 * kColumns, false);
      }
      brgemm(m, n, Dp, s.grads + r * Dp, Dp, B.data, B.ld, s.c, kColumns, false);
      finish_probe(s.pre, s.c, std::min(kRows, size - r), n, products + r);
    }
  }
}

template <class T>
void probes(const ExpertsArgs& a) {
  const std::vector<Chunk> chunks = chunks_of(a);
  for_tasks(a, chunks.size(), [&](int64_t task, char* memory) { probe_chunk<T>(a, chunks[task], memory); });
}

template <class T>
int64_t scratch_bytes(const ExpertsArgs& a, ExpertsPass pass) {
  Scratch up(nullptr), sum(nullptr), weight(nullptr), probe(nullptr);
  if (pass == ExpertsPass::probe) {
    ProbeScratch<T>(probe, a);
  } else {
    UpScratch<T>(up, a);
    SumScratch<T>(sum, a);
  }
  if (pass == ExpertsPass::backward) WeightScratch<T>(weight, a, group_columns(a));
  return std::max({up.used(), sum.used(), weight.used(), probe.used()});
}

}  // namespace

bool has_experts(DType dtype) { return has_brgemm(dtype); }

int64_t experts_row_elements(DType dtype, int64_t dim) { return dtype == DType::bf16 ? even<bfloat16>(dim) : dim; }

int64_t experts_workspace(const ExpertsArgs& a, ExpertsPass pass) {
  return (a.dtype == DType::bf16 ? scratch_bytes<bfloat16>(a, pass) : scratch_bytes<float>(a, pass)) * a.num_threads;
}

void experts_forward(const ExpertsArgs& a) { a.dtype == DType::bf16 ? forward<bfloat16>(a) : forward<float>(a); }
void experts_backward(const ExpertsArgs& a) { a.dtype == DType::bf16 ? backward<bfloat16>(a) : backward<float>(a); }
void experts_probe(const ExpertsArgs& a) { a.dtype == DType::bf16 ? probes<bfloat16>(a) : probes<float>(a); }

}  // namespace moetrain::cpu
