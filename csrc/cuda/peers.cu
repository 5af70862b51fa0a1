// Rows straight into and out of the memory of the other GPUs of a node. The caller orders them with the other ranks' kernels.
#include "common.cuh"

namespace moetrain::cuda {

namespace {

// The rank whose part has row p.
__device__ __forceinline__ int64_t rank_of(const int32_t* begins, int64_t num_ranks, int64_t p) {
  int64_t low = 0, high = num_ranks - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (p < begins[middle + 1]) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Where row p is: its rank's buffer, and the row there, which is checked.
template <class Args>
__device__ __forceinline__ char* row_of(const Args& a, int64_t p, int64_t row_bytes) {
  const int64_t w = rank_of(a.begins, a.num_ranks, p);
  const int64_t row = int64_t{a.places[w]} + p - a.begins[w];
  DEVICE_CHECK(p >= a.begins[w] && p < a.begins[w + 1], "peers: begins: not rising to the number of rows");
  DEVICE_CHECK(row >= 0 && (row + 1) * row_bytes <= a.capacity, "peers: places: a row outside its buffer");
  return reinterpret_cast<char*>(a.buffers[w]) + row * row_bytes;
}

// Word: the largest unit that divides a row.
template <class Word>
__global__ void push_kernel(PushArgs a) {
  const int64_t p = warp_row();
  if (p >= a.num_pairs) return;
  const int64_t token = a.tokens ? a.tokens[p] : p;
  DEVICE_CHECK(token >= 0 && token < a.num_rows, "push_rows: tokens: index out of range");
  const int64_t words = a.row_bytes / static_cast<int64_t>(sizeof(Word));
  const Word* from = reinterpret_cast<const Word*>(static_cast<const char*>(a.x) + token * a.row_bytes);
  Word* to = reinterpret_cast<Word*>(row_of(a, p, a.row_bytes));
  const int64_t step = static_cast<int64_t>(gridDim.y) * kLanes;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * kLanes + threadIdx.x; i < words; i += step) to[i] = from[i];
}

template <class Word>
void push(const PushArgs& a, cudaStream_t stream) {
  push_kernel<Word><<<grid_of_warps(a.num_pairs, a.row_bytes / static_cast<int64_t>(sizeof(Word))), block_of_warps(), 0, stream>>>(a);
}

// As `combine`, with rows that lie in several buffers.
template <class T, int N>
__global__ void pull_kernel(PullArgs a) {
  using A = acc_t<T>;
  const int64_t t = warp_row();
  if (t >= a.num_tokens) return;
  const int32_t begin = a.row_offsets[t], end = a.row_offsets[t + 1];
  DEVICE_CHECK(begin >= 0 && begin <= end && end <= a.num_pairs, "pull_rows: row_offsets: not rising within the rows");
  T* out = static_cast<T*>(a.out) + t * a.dim;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kLanes * N;
  for (int64_t i = (static_cast<int64_t>(blockIdx.y) * kLanes + threadIdx.x) * N; i < a.dim; i += step) {
    A sum[N] = {};
    for (int32_t j = begin; j < end; ++j) {
      const int64_t p = a.positions[j];
      DEVICE_CHECK(p >= 0 && p < a.num_pairs, "pull_rows: positions: index out of range");
      const T* row = reinterpret_cast<const T*>(row_of(a, p, a.dim * static_cast<int64_t>(sizeof(T))));
      const Pack<T, N> pack = load_pack<N>(row + i);
#pragma unroll
      for (int k = 0; k < N; ++k) sum[k] += load(pack.values[k]);
    }
    Pack<T, N> result;
#pragma unroll
    for (int k = 0; k < N; ++k) store(result.values[k], sum[k]);
    store_pack<N>(out + i, result);
  }
}

}  // namespace

void push_rows(const PushArgs& a, void* stream_pointer) {
  if (a.num_pairs == 0 || a.row_bytes == 0) return;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  // Buffers are aligned to 16.
  const uintptr_t both = reinterpret_cast<uintptr_t>(a.x) | static_cast<uintptr_t>(a.row_bytes);
  if (both % 16 == 0) {
    push<uint4>(a, stream);
  } else if (both % 4 == 0) {
    push<uint32_t>(a, stream);
  } else if (both % 2 == 0) {
    push<uint16_t>(a, stream);
  } else {
    push<uint8_t>(a, stream);
  }
  CUDA_CHECK_LAUNCH();
}

void pull_rows(const PullArgs& a, void* stream) {
  if (a.num_tokens == 0 || a.dim == 0) return;
  with_packs(
      a.dtype, a.dim,
      [&](auto zero, auto size) {
        constexpr int n = decltype(size)::value;
        pull_kernel<decltype(zero), n>
            <<<grid_of_warps(a.num_tokens, a.dim / n), block_of_warps(), 0, static_cast<cudaStream_t>(stream)>>>(a);
      },
      a.out);
  CUDA_CHECK_LAUNCH();
}

}  // namespace moetrain::cuda
