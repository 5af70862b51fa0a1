// Mask -> routes sorted by expert, by a stable counting sort without atomics:
//
//   1. bits:   each row of the mask as ceil(E / 32) words, and the routes before each word in its row (a warp per token)
//   2. count:  routes per (expert, chunk of tokens), experts outermost (a warp per word and chunk, a lane per expert)
//   3. scan:   exclusive sums; of (2), the place of the first route of every expert and chunk; of the row sums, row_offsets
//   4. fill:   the walk of (2) again; each lane now knows where its routes go
#include <algorithm>

#include <cub/device/device_scan.cuh>

#include "common.cuh"

namespace moetrain::cuda {

namespace {

constexpr int64_t kChunk = 128;  // tokens

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Workspace {
  int64_t words;        // per row
  int64_t chunks;       // of tokens
  int64_t num_starts;   // E * chunks + 1
  size_t scan_bytes;
  uint32_t* bits;       // (T, words)
  int32_t* before;      // (T, words) routes of the same row in earlier words
  int32_t* row_counts;  // (T + 1,), the last 0
  int32_t* starts;      // (E * chunks + 1,): counts, the last 0; then their exclusive sums
  void* scan;
  size_t bytes;

  Workspace(int64_t num_tokens, int64_t num_experts, void* base) {
    words = divide_up(num_experts, 32);
    chunks = divide_up(num_tokens, kChunk);
    num_starts = num_experts * chunks + 1;
    if (num_starts > INT32_MAX) throw std::runtime_error("moetrain::route: mask: too large: T * E / 128 must be below 2^31");
    const int longest = static_cast<int>(std::max(num_starts, num_tokens + 1));
    CUDA_CHECK(cub::DeviceScan::ExclusiveSum(
        nullptr, scan_bytes, static_cast<const int32_t*>(nullptr), static_cast<int32_t*>(nullptr), longest));
    bytes = 0;
    const auto take = [&](size_t size) {
      char* place = static_cast<char*>(base) + bytes;
      bytes += divide_up(static_cast<int64_t>(size), 256) * 256;
      return place;
    };
    bits = reinterpret_cast<uint32_t*>(take(num_tokens * words * 4));
    before = reinterpret_cast<int32_t*>(take(num_tokens * words * 4));
    row_counts = reinterpret_cast<int32_t*>(take((num_tokens + 1) * 4));
    starts = reinterpret_cast<int32_t*>(take(num_starts * 4));
    scan = take(scan_bytes);
  }
};

__global__ void bits_kernel(RouteArgs a, Workspace w) {
  const int64_t t = warp_row();
  if (t > a.num_tokens) return;
  int32_t routes = 0;
  if (t < a.num_tokens) {
    for (int64_t word = 0; word < w.words; ++word) {
      const int64_t e = word * 32 + threadIdx.x;
      const bool active = e < a.num_experts && a.mask[t * a.num_experts + e] != 0;
      const uint32_t bits = __ballot_sync(0xffffffffu, active);
      if (threadIdx.x == 0) {
        w.bits[t * w.words + word] = bits;
        w.before[t * w.words + word] = routes;
      }
      routes += __popc(bits);
    }
  }
  if (threadIdx.x == 0) w.row_counts[t] = routes;
}

// A warp has one word and one chunk: its row in the grid is chunk * words + word.
__global__ void count_kernel(RouteArgs a, Workspace w) {
  const int64_t row = warp_row();
  if (row == 0 && threadIdx.x == 0) w.starts[w.num_starts - 1] = 0;
  if (row >= w.chunks * w.words) return;
  const int64_t chunk = row / w.words, word = row % w.words;
  const int64_t e = word * 32 + threadIdx.x;
  const int64_t end = min((chunk + 1) * kChunk, a.num_tokens);
  int32_t count = 0;
  for (int64_t t = chunk * kChunk; t < end; ++t) count += w.bits[t * w.words + word] >> threadIdx.x & 1u;
  if (e < a.num_experts) w.starts[e * w.chunks + chunk] = count;
}

__global__ void fill_kernel(RouteArgs a, Workspace w) {
  const int64_t row = warp_row();
  if (row >= w.chunks * w.words) return;
  const int64_t chunk = row / w.words, word = row % w.words;
  const int64_t e = word * 32 + threadIdx.x;
  if (e >= a.num_experts) return;
  const int64_t end = min((chunk + 1) * kChunk, a.num_tokens);
  int32_t place = w.starts[e * w.chunks + chunk];
  for (int64_t t = chunk * kChunk; t < end; ++t) {
    const uint32_t bits = w.bits[t * w.words + word];
    if ((bits >> threadIdx.x & 1u) == 0) continue;
    const uint32_t earlier = bits & ((1u << threadIdx.x) - 1u);
    const int64_t slot = a.row_offsets[t] + w.before[t * w.words + word] + __popc(earlier);
    DEVICE_CHECK(place < a.num_routes && slot < a.num_routes, "route: num_routes is less than the number of ones in mask");
    a.tokens[place] = static_cast<int32_t>(t);
    a.positions[slot] = place;
    ++place;
  }
}

__global__ void counts_kernel(RouteArgs a, Workspace w) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e == 0) {
    DEVICE_CHECK(a.padded || w.starts[w.num_starts - 1] == a.num_routes, "route: num_routes is not the number of ones in mask");
  }
  if (e < a.num_experts) a.counts[e] = w.starts[(e + 1) * w.chunks] - w.starts[e * w.chunks];
}

}  // namespace

size_t route_workspace(int64_t num_tokens, int64_t num_experts) {
  return Workspace(num_tokens, num_experts, nullptr).bytes;
}

void route(const RouteArgs& a, void* stream_pointer) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  Workspace w(a.num_tokens, a.num_experts, a.workspace);
  if (a.padded && a.num_routes > 0) {
    // All of it: where padding begins only the device knows.
    CUDA_CHECK(cudaMemsetAsync(a.tokens, 0, a.num_routes * sizeof(int32_t), stream));
    CUDA_CHECK(cudaMemsetAsync(a.positions, 0, a.num_routes * sizeof(int32_t), stream));
  }
  // One row more than tokens and at least one warp of (2): both write the 0 that ends their array.
  bits_kernel<<<grid_of_warps(a.num_tokens + 1), block_of_warps(), 0, stream>>>(a, w);
  CUDA_CHECK_LAUNCH();
  const int64_t pairs = std::max<int64_t>(1, w.chunks * w.words);
  count_kernel<<<grid_of_warps(pairs), block_of_warps(), 0, stream>>>(a, w);
  CUDA_CHECK_LAUNCH();
  CUDA_CHECK(cub::DeviceScan::ExclusiveSum(
      w.scan, w.scan_bytes, w.row_counts, a.row_offsets, static_cast<int>(a.num_tokens + 1), stream));
  CUDA_CHECK(cub::DeviceScan::ExclusiveSum(
      w.scan, w.scan_bytes, w.starts, w.starts, static_cast<int>(w.num_starts), stream));
  fill_kernel<<<grid_of_warps(pairs), block_of_warps(), 0, stream>>>(a, w);
  CUDA_CHECK_LAUNCH();
  constexpr int threads = 256;
  counts_kernel<<<static_cast<unsigned>(std::max<int64_t>(1, divide_up(a.num_experts, threads))), threads, 0, stream>>>(a, w);
  CUDA_CHECK_LAUNCH();
}

}  // namespace moetrain::cuda
