// SwiGLU with the route's weight folded in: forward, backward, and the probe's inner product. Formulas: csrc/cpu/swiglu.cpp.
#include "common.cuh"

namespace moetrain::cuda {

namespace {

template <class T, int N>
__global__ void swiglu_kernel(SwigluArgs a) {
  using A = acc_t<T>;
  const int64_t r = warp_row();
  if (r >= a.num_rows) return;
  const T* gate = static_cast<const T*>(a.gate_up) + r * 2 * a.dim;
  const T* up = gate + a.dim;
  T* out = static_cast<T*>(a.out) + r * a.dim;
  const A weight = a.weights ? static_cast<const A*>(a.weights)[r] : A(1);
  const int64_t step = static_cast<int64_t>(gridDim.y) * kLanes * N;
  for (int64_t i = (static_cast<int64_t>(blockIdx.y) * kLanes + threadIdx.x) * N; i < a.dim; i += step) {
    const Pack<T, N> gates = load_pack<N>(gate + i), ups = load_pack<N>(up + i);
    Pack<T, N> result;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const A g = load(gates.values[k]);
      store(result.values[k], weight * (g * sigmoid(g) * load(ups.values[k])));
    }
    store_pack<N>(out + i, result);
  }
}

template <class T, int N>
__global__ void swiglu_backward_kernel(SwigluBackwardArgs a) {
  using A = acc_t<T>;
  const int64_t r = warp_row();
  if (r >= a.num_rows) return;
  const T* gate = static_cast<const T*>(a.gate_up) + r * 2 * a.dim;
  const T* up = gate + a.dim;
  const T* grad = static_cast<const T*>(a.grad) + r * a.dim;
  T* grad_gate = static_cast<T*>(a.grad_gate_up) + r * 2 * a.dim;
  T* grad_up = grad_gate + a.dim;
  T* activation = static_cast<T*>(a.activation) + r * a.dim;
  const A weight = a.weights ? static_cast<const A*>(a.weights)[r] : A(1);
  A sum = A(0);
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * N; i < a.dim; i += kLanes * N) {
    const Pack<T, N> gates = load_pack<N>(gate + i), ups = load_pack<N>(up + i), grads = load_pack<N>(grad + i);
    Pack<T, N> gate_result, up_result, activation_result;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const A g = load(gates.values[k]), u = load(ups.values[k]), dy = load(grads.values[k]);
      const A s = sigmoid(g);
      const A silu = g * s;
      const A h = silu * u;
      sum += dy * h;
      store(activation_result.values[k], weight * h);
      store(up_result.values[k], weight * dy * silu);
      store(gate_result.values[k], weight * dy * u * (s + silu * (A(1) - s)));
    }
    store_pack<N>(grad_gate + i, gate_result);
    store_pack<N>(grad_up + i, up_result);
    store_pack<N>(activation + i, activation_result);
  }
  if (!a.grad_weights) return;
  sum = warp_sum(sum);
  if (threadIdx.x == 0) static_cast<A*>(a.grad_weights)[r] = sum;
}

template <class T, int N>
__global__ void swiglu_dot_kernel(SwigluDotArgs a) {
  using A = acc_t<T>;
  const int64_t r = warp_row();
  if (r >= a.num_rows) return;
  const T* gate = static_cast<const T*>(a.gate_up) + r * 2 * a.dim;
  const T* up = gate + a.dim;
  const T* grad = static_cast<const T*>(a.grad) + r * a.dim;
  A sum = A(0);
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * N; i < a.dim; i += kLanes * N) {
    const Pack<T, N> gates = load_pack<N>(gate + i), ups = load_pack<N>(up + i), grads = load_pack<N>(grad + i);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const A g = load(gates.values[k]);
      sum += load(grads.values[k]) * (g * sigmoid(g) * load(ups.values[k]));
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x == 0) static_cast<A*>(a.out)[r] = sum;
}

}  // namespace

void swiglu(const SwigluArgs& a, void* stream) {
  if (a.num_rows == 0 || a.dim == 0) return;
  with_packs(
      a.dtype, a.dim,
      [&](auto zero, auto size) {
        constexpr int n = decltype(size)::value;
        swiglu_kernel<decltype(zero), n>
            <<<grid_of_warps(a.num_rows, a.dim / n), block_of_warps(), 0, static_cast<cudaStream_t>(stream)>>>(a);
      },
      a.gate_up, a.out);
  CUDA_CHECK_LAUNCH();
}

void swiglu_backward(const SwigluBackwardArgs& a, void* stream) {
  if (a.num_rows == 0) return;
  with_packs(
      a.dtype, a.dim,
      [&](auto zero, auto size) {
        swiglu_backward_kernel<decltype(zero), decltype(size)::value>
            <<<grid_of_warps(a.num_rows), block_of_warps(), 0, static_cast<cudaStream_t>(stream)>>>(a);
      },
      a.grad, a.gate_up, a.grad_gate_up, a.activation);
  CUDA_CHECK_LAUNCH();
}

void swiglu_dot(const SwigluDotArgs& a, void* stream) {
  if (a.num_rows == 0) return;
  with_packs(
      a.dtype, a.dim,
      [&](auto zero, auto size) {
        swiglu_dot_kernel<decltype(zero), decltype(size)::value>
            <<<grid_of_warps(a.num_rows), block_of_warps(), 0, static_cast<cudaStream_t>(stream)>>>(a);
      },
      a.grad, a.gate_up);
  CUDA_CHECK_LAUNCH();
}

}  // namespace moetrain::cuda
