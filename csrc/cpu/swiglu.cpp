// SwiGLU with the route's weight folded in: forward, backward, and the probe's inner product.
//
// With s = sigmoid(g): silu(g) = g s and silu'(g) = s + g s (1 - s).
#include "../kernels.h"
#include "math.h"
#include "parallel.h"

namespace moetrain::cpu {

namespace {

template <class T>
MOETRAIN_INLINE void swiglu_rows(const SwigluArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A* weights = static_cast<const A*>(a.weights);
  for (int64_t r = begin; r < end; ++r) {
    const T* gate = static_cast<const T*>(a.gate_up) + r * 2 * a.dim;
    const T* up = gate + a.dim;
    T* out = static_cast<T*>(a.out) + r * a.dim;
    const A weight = weights ? weights[r] : A(1);
    MOETRAIN_INDEPENDENT
    for (int64_t i = 0; i < a.dim; ++i) {
      const A g = load(gate[i]);
      store(out[i], weight * (g * sigmoid(g) * load(up[i])));
    }
  }
}

template <class T>
MOETRAIN_INLINE void swiglu_backward_rows(const SwigluBackwardArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A* weights = static_cast<const A*>(a.weights);
  for (int64_t r = begin; r < end; ++r) {
    const T* gate = static_cast<const T*>(a.gate_up) + r * 2 * a.dim;
    const T* up = gate + a.dim;
    const T* grad = static_cast<const T*>(a.grad) + r * a.dim;
    T* grad_gate = static_cast<T*>(a.grad_gate_up) + r * 2 * a.dim;
    T* grad_up = grad_gate + a.dim;
    T* activation = static_cast<T*>(a.activation) + r * a.dim;
    const A weight = weights ? weights[r] : A(1);
    LaneSum<A> sum;
    for (int64_t start = 0; start < a.dim; start += kBlock) {
      const int64_t size = std::min(kBlock, a.dim - start);
      A products[kBlock];
      MOETRAIN_INDEPENDENT
      for (int64_t i = 0; i < size; ++i) {
        const A g = load(gate[start + i]);
        const A u = load(up[start + i]);
        const A dy = load(grad[start + i]);
        const A s = sigmoid(g);
        const A silu = g * s;
        const A h = silu * u;
        products[i] = dy * h;
        store(activation[start + i], weight * h);
        store(grad_up[start + i], weight * dy * silu);
        store(grad_gate[start + i], weight * dy * u * (s + silu * (A(1) - s)));
      }
      for (int64_t i = size; i < kBlock; ++i) products[i] = A(0);
      sum.add(products);
    }
    if (a.grad_weights) static_cast<A*>(a.grad_weights)[r] = sum.total();
  }
}

template <class T>
MOETRAIN_INLINE void swiglu_dot_rows(const SwigluDotArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t r = begin; r < end; ++r) {
    const T* gate = static_cast<const T*>(a.gate_up) + r * 2 * a.dim;
    const T* up = gate + a.dim;
    const T* grad = static_cast<const T*>(a.grad) + r * a.dim;
    LaneSum<A> sum;
    for (int64_t start = 0; start < a.dim; start += kBlock) {
      const int64_t size = std::min(kBlock, a.dim - start);
      A products[kBlock];
      MOETRAIN_INDEPENDENT
      for (int64_t i = 0; i < size; ++i) {
        const A g = load(gate[start + i]);
        products[i] = load(grad[start + i]) * (g * sigmoid(g) * load(up[start + i]));
      }
      for (int64_t i = size; i < kBlock; ++i) products[i] = A(0);
      sum.add(products);
    }
    static_cast<A*>(a.out)[r] = sum.total();
  }
}

}  // namespace

MOETRAIN_ROW_KERNEL(swiglu, SwigluArgs, swiglu_rows, a.num_rows, rows_per_piece(2 * a.dim))
MOETRAIN_ROW_KERNEL(swiglu_backward, SwigluBackwardArgs, swiglu_backward_rows, a.num_rows, rows_per_piece(4 * a.dim))
MOETRAIN_ROW_KERNEL(swiglu_dot, SwigluDotArgs, swiglu_dot_rows, a.num_rows, rows_per_piece(2 * a.dim))

}  // namespace moetrain::cpu
