// Kernels that are wrong in one way each, and some that are right, for tests/test_emulation.py. All take (int* data, int n).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <exception>
#include <string>

namespace {

constexpr unsigned kAll = 0xffffffffu;

// --- wrong ---

__global__ void missing_barrier(int* data, int n) {
  __shared__ int tile[64];
  tile[threadIdx.x] = data[threadIdx.x];
  data[threadIdx.x] = tile[(threadIdx.x + 32) % 64];
}

__global__ void missing_warp_barrier(int* data, int n) {
  __shared__ int tile[32];
  tile[threadIdx.x] = data[threadIdx.x];
  __shfl_sync(kAll, 0, 0);  // waits, but orders no memory
  data[threadIdx.x] = tile[31 - threadIdx.x];
}

// The second round writes what lanes may still be reading.
__global__ void missing_second_barrier(int* data, int n) {
  __shared__ int tile[64];
  int sum = 0;
  for (int round = 0; round < 2; ++round) {
    tile[threadIdx.x] = data[threadIdx.x] + round;
    __syncthreads();
    sum += tile[63 - threadIdx.x];
  }
  data[threadIdx.x] = sum;
}

__global__ void race_of_blocks(int* data, int n) { data[0] = 5; }  // the same value: still two writes of one place

__global__ void race_with_atomic(int* data, int n) {
  if (threadIdx.x == 0) data[0] = 1;
  else atomicAdd(data, 1);
}

__global__ void barrier_of_some(int* data, int n) {
  if (threadIdx.x < 16) __syncthreads();
}

__global__ void barrier_after_return(int* data, int n) {
  if (static_cast<int>(threadIdx.x) >= n) return;
  __syncthreads();
}

__global__ void different_collectives(int* data, int n) {
  data[threadIdx.x] = threadIdx.x < 16 ? __shfl_down_sync(kAll, 1, 1) : static_cast<int>(__ballot_sync(kAll, 1));
}

__global__ void collective_of_some(int* data, int n) {
  if (static_cast<int>(threadIdx.x) < n) data[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
}

__global__ void waiting_for_each_other(int* data, int n) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else if (threadIdx.x < 48) {
    __syncwarp();
  } else {
    __syncthreads();
    __syncwarp();
  }
}

__global__ void lane_outside_the_mask(int* data, int n) {
  if (threadIdx.x < 16) data[threadIdx.x] = __shfl_down_sync(0xffffu, 1, 8);
}

__global__ void lane_out_of_range(int* data, int n) { data[threadIdx.x] = __shfl_sync(kAll, 1, 32); }

__global__ void not_in_its_own_mask(int* data, int n) { __syncwarp(0xfffffffeu); }

__global__ void mask_of_missing_lanes(int* data, int n) { __ballot_sync(kAll, 1); }

__global__ void misaligned(int* data, int n) { reinterpret_cast<int4*>(data + 1)[0] = reinterpret_cast<int4*>(data)[2]; }

__global__ void past_the_end(int* data, int n) { data[n + static_cast<int>(threadIdx.x)] = 1; }

__global__ void past_shared(int* data, int n) {
  __shared__ int tile[32];
  int* place = tile;
  place[static_cast<int>(threadIdx.x) + n] = 1;
}

__global__ void past_a_local_array(int* data, int n) {
  int local[4] = {1, 2, 3, 4};
  data[threadIdx.x] = local[n];
}

__global__ void shift_by_too_much(int* data, int n) { data[0] = static_cast<int>(1u << n); }

__global__ void overflow(int* data, int n) { data[0] = 0x7fffffff + n; }

__global__ void other_thread_s_stack(int* data, int n) {
  __shared__ int* place;
  int mine = n;
  if (threadIdx.x == 0) place = &mine;
  __syncthreads();
  if (threadIdx.x == 1) *place = 7;
  __syncthreads();
  data[0] = mine;
}

__global__ void spinning(int* data, int n) {
  while (*static_cast<volatile int*>(data) != n + 1) __nanosleep(10);
}

__global__ void trapping(int* data, int n) {
  if (threadIdx.x == 3 && blockIdx.x == 1) {
    printf("seen %d\n", n);
    __trap();
  }
}

// No race, but the result depends on who comes first.
__global__ void order(int* data, int n) { data[1 + atomicAdd(data, 1)] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

__global__ void unwritten(int* data, int n) {
  __shared__ int tile[32];
  data[threadIdx.x] = tile[threadIdx.x];
}

// --- right ---

__global__ void block_sum(int* data, int n) {
  __shared__ int partial[4];
  extern __shared__ int tile[];
  tile[threadIdx.x] = static_cast<int>(threadIdx.x) < n ? data[threadIdx.x] : 0;
  __syncthreads();
  int sum = tile[blockDim.x - 1 - threadIdx.x];
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(kAll, sum, distance);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) data[n + blockIdx.x] = partial[0] + partial[1] + partial[2] + partial[3];
}

// Lanes hand a value on through shared memory, eight times, with nothing but __syncwarp between.
__global__ void warp_ring(int* data, int n) {
  __shared__ int tile[64];
  int value = data[threadIdx.x];
  const int first = threadIdx.x / 32 * 32;
  for (int i = 0; i < 8; ++i) {
    tile[threadIdx.x] = value;
    __syncwarp();
    value = tile[first + (threadIdx.x + 1) % 32];
    __syncwarp();
  }
  data[threadIdx.x] = value;
}

__global__ void shuffles(int* data, int n) {
  const int lane = threadIdx.x;
  data[lane] = __shfl_sync(kAll, lane, 3, n);
  data[32 + lane] = __shfl_up_sync(kAll, lane, 3, n);
  data[64 + lane] = __shfl_down_sync(kAll, lane, 3, n);
  data[96 + lane] = __shfl_xor_sync(kAll, lane, 5, n);
  data[128 + lane] = static_cast<int>(__shfl_down_sync(kAll, static_cast<double>(lane) + 0.5, 1) * 2);
}

// Two halves of a warp, each with collectives of its own, at the same time.
__global__ void halves(int* data, int n) {
  const int lane = threadIdx.x;
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  int sum = lane;
  for (int i = 0; i < (lane < 16 ? 4 : 1); ++i) sum += __shfl_xor_sync(half, sum, 1 << i);
  data[lane] = sum;
  __syncwarp();
  data[32 + lane] = static_cast<int>(__ballot_sync(half, lane % 3 == 0));
  data[64 + lane] = __any_sync(half, lane == 20) * 2 + __all_sync(half, lane < 16);
}

__global__ void atomics(int* data, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(data, i);
  atomicMax(data + 1, i);
  atomicMin(data + 2, -i);
  atomicOr(reinterpret_cast<unsigned*>(data + 3), 1u << i % 32);
  atomicAnd(reinterpret_cast<unsigned*>(data + 4), ~(1u << i % 16));
  if (atomicCAS(data + 5, 0, 1) == 0) atomicExch(data + 6, 77);
}

// The second warp waits for the first one's flag.
__global__ void flags(int* data, int n) {
  volatile int* flag = data;
  if (threadIdx.x == 0) *flag = n;
  if (threadIdx.x == 32) {
    while (*flag != n) __nanosleep(10);
    data[1] = n + 1;
  }
}

__global__ void indices(int* data, int n) {
  const dim3 b = blockDim, g = gridDim;
  const unsigned thread = threadIdx.x + b.x * (threadIdx.y + b.y * threadIdx.z);
  const unsigned block = blockIdx.x + g.x * (blockIdx.y + g.y * blockIdx.z);
  const int lanes = __popc(__ballot_sync(kAll, 1));
  atomicAdd(&data[thread + b.x * b.y * b.z * block], lanes);
}

// Packs of 16 bytes to buffers that a table names, as rows go to other ranks.
__global__ void through_a_table(int* data, int n) {
  __shared__ uint4* table[2];
  if (threadIdx.x < 2) table[threadIdx.x] = reinterpret_cast<uint4*>(data + (1 + threadIdx.x) * 4 * n);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
    table[i % 2][i] = __ldg(reinterpret_cast<const uint4*>(data) + i);
  }
}

__global__ void from_half(int* data, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  const unsigned short bits = static_cast<unsigned short>(data[i]);
  reinterpret_cast<float*>(data)[n + i] = __half2float(__ushort_as_half(bits));
  reinterpret_cast<float*>(data)[2 * n + i] = __bfloat162float(__ushort_as_bfloat16(bits));
}

__global__ void to_half(int* data, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  const float x = reinterpret_cast<const float*>(data)[i];
  data[n + i] = __half_as_ushort(__float2half_rn(x));
  data[2 * n + i] = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

template <class Kernel>
const char* run(Kernel kernel, dim3 grid, dim3 block, size_t bytes, int* data, int n) {
  static thread_local std::string error;
  try {
    kernel<<<grid, block, bytes>>>(data, n);
    return nullptr;
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
}

}  // namespace

#define SNIPPET(NAME) \
  extern "C" __attribute__((visibility("default"))) const char* NAME##_(int* data, int n, dim3 grid, dim3 block, size_t bytes) { \
    return run(NAME, grid, block, bytes, data, n); \
  }
SNIPPET(missing_barrier)
SNIPPET(missing_warp_barrier)
SNIPPET(missing_second_barrier)
SNIPPET(race_of_blocks)
SNIPPET(race_with_atomic)
SNIPPET(barrier_of_some)
SNIPPET(barrier_after_return)
SNIPPET(different_collectives)
SNIPPET(collective_of_some)
SNIPPET(waiting_for_each_other)
SNIPPET(lane_outside_the_mask)
SNIPPET(lane_out_of_range)
SNIPPET(not_in_its_own_mask)
SNIPPET(mask_of_missing_lanes)
SNIPPET(misaligned)
SNIPPET(past_the_end)
SNIPPET(past_shared)
SNIPPET(past_a_local_array)
SNIPPET(shift_by_too_much)
SNIPPET(overflow)
SNIPPET(other_thread_s_stack)
SNIPPET(spinning)
SNIPPET(trapping)
SNIPPET(order)
SNIPPET(unwritten)
SNIPPET(block_sum)
SNIPPET(warp_ring)
SNIPPET(shuffles)
SNIPPET(halves)
SNIPPET(atomics)
SNIPPET(flags)
SNIPPET(indices)
SNIPPET(through_a_table)
SNIPPET(from_half)
SNIPPET(to_half)
