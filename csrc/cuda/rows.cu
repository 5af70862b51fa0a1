// Rows to routes and back: permute (gather), combine (weighted sum per token) and its backward.
#include "common.cuh"

namespace moetrain::cuda {

namespace {

template <class T, int N>
__global__ void permute_kernel(PermuteArgs a) {
  const int64_t r = warp_row();
  if (r >= a.num_routes) return;
  const int64_t token = a.tokens[r];
  DEVICE_CHECK(token >= 0 && token < a.num_tokens, "permute: tokens: index out of range");
  const T* from = static_cast<const T*>(a.x) + token * a.dim;
  T* to = static_cast<T*>(a.out) + r * a.dim;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kLanes * N;
  for (int64_t i = (static_cast<int64_t>(blockIdx.y) * kLanes + threadIdx.x) * N; i < a.dim; i += step) {
    store_pack<N>(to + i, load_pack<N>(from + i));
  }
}

// A lane owns its columns of the token and adds the routes up in order, so no two threads write the same sum.
template <class T, int N>
__global__ void combine_kernel(CombineArgs a) {
  using A = acc_t<T>;
  const int64_t t = warp_row();
  if (t >= a.num_tokens) return;
  const int32_t begin = a.row_offsets[t], end = a.row_offsets[t + 1];
  DEVICE_CHECK(begin >= 0 && begin <= end && end <= a.num_routes, "combine: row_offsets: not rising within the routes");
  const T* rows = static_cast<const T*>(a.rows);
  const A* weights = static_cast<const A*>(a.weights);
  T* out = static_cast<T*>(a.out) + t * a.dim;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kLanes * N;
  for (int64_t i = (static_cast<int64_t>(blockIdx.y) * kLanes + threadIdx.x) * N; i < a.dim; i += step) {
    A sum[N] = {};
    for (int32_t j = begin; j < end; ++j) {
      const int64_t p = a.positions[j];
      DEVICE_CHECK(p >= 0 && p < a.num_routes, "combine: positions: index out of range");
      const A weight = weights ? weights[p] : A(1);
      const Pack<T, N> row = load_pack<N>(rows + p * a.dim + i);
#pragma unroll
      for (int k = 0; k < N; ++k) sum[k] += weight * load(row.values[k]);
    }
    Pack<T, N> result;
#pragma unroll
    for (int k = 0; k < N; ++k) store(result.values[k], sum[k]);
    store_pack<N>(out + i, result);
  }
}

template <class T, int N>
__global__ void combine_backward_kernel(CombineBackwardArgs a) {
  using A = acc_t<T>;
  const int64_t r = warp_row();
  if (r >= a.num_routes) return;
  const int64_t token = a.tokens[r];
  DEVICE_CHECK(token >= 0 && token < a.num_tokens, "combine_backward: tokens: index out of range");
  const T* grad = static_cast<const T*>(a.grad) + token * a.dim;
  const T* row = static_cast<const T*>(a.rows);
  if (row) row += r * a.dim;
  T* grad_row = static_cast<T*>(a.grad_rows) + r * a.dim;
  const A weight = a.weights ? static_cast<const A*>(a.weights)[r] : A(1);
  A sum = A(0);
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * N; i < a.dim; i += kLanes * N) {
    const Pack<T, N> dy = load_pack<N>(grad + i);
    Pack<T, N> result;
#pragma unroll
    for (int k = 0; k < N; ++k) store(result.values[k], weight * load(dy.values[k]));
    store_pack<N>(grad_row + i, result);
    if (!row) continue;
    const Pack<T, N> y = load_pack<N>(row + i);
#pragma unroll
    for (int k = 0; k < N; ++k) sum += load(dy.values[k]) * load(y.values[k]);
  }
  if (!a.grad_weights) return;
  sum = warp_sum(sum);
  if (threadIdx.x == 0) static_cast<A*>(a.grad_weights)[r] = sum;
}

}  // namespace

void permute(const PermuteArgs& a, void* stream) {
  if (a.num_routes == 0 || a.dim == 0) return;
  with_packs(
      a.dtype, a.dim,
      [&](auto zero, auto size) {
        constexpr int n = decltype(size)::value;
        permute_kernel<decltype(zero), n>
            <<<grid_of_warps(a.num_routes, a.dim / n), block_of_warps(), 0, static_cast<cudaStream_t>(stream)>>>(a);
      },
      a.x, a.out);
  CUDA_CHECK_LAUNCH();
}

void combine(const CombineArgs& a, void* stream) {
  if (a.num_tokens == 0 || a.dim == 0) return;
  with_packs(
      a.dtype, a.dim,
      [&](auto zero, auto size) {
        constexpr int n = decltype(size)::value;
        combine_kernel<decltype(zero), n>
            <<<grid_of_warps(a.num_tokens, a.dim / n), block_of_warps(), 0, static_cast<cudaStream_t>(stream)>>>(a);
      },
      a.rows, a.out);
  CUDA_CHECK_LAUNCH();
}

void combine_backward(const CombineBackwardArgs& a, void* stream) {
  if (a.num_routes == 0) return;
  with_packs(
      a.dtype, a.dim,
      [&](auto zero, auto size) {
        combine_backward_kernel<decltype(zero), decltype(size)::value>
            <<<grid_of_warps(a.num_routes), block_of_warps(), 0, static_cast<cudaStream_t>(stream)>>>(a);
      },
      a.grad, a.rows, a.grad_rows);
  CUDA_CHECK_LAUNCH();
}

}  // namespace moetrain::cuda
