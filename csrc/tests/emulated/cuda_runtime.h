// SPDX-License-Identifier: Apache-2.0
// As much of CUDA as the memory-bound kernels use, on one CPU thread, for tests where there is no
// GPU. The threads of a CTA are fibers that change at barriers, in an order that the test chooses:
// a missing barrier gives another result in another order, and under ThreadSanitizer a report. A
// barrier or shuffle that not all threads reach ends the program. CTAs run one after another.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // never cleared: each CTA finds what the one before left

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct float2 {
  float x, y;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidDevice };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

namespace emulated {

// In which order the threads of a CTA, and the CTAs of a grid, run.
enum class Order { kAscending, kDescending, kShuffled };
void set_order(Order order);

void sync_threads();
// All 32 lanes give a value and get those of all.
const uint64_t* exchange(const char* what, uint64_t value);
void run(dim3 grid, dim3 block, void (*body)(void*), void* argument);

template <class Number>
uint64_t to_bits(Number x) {
  static_assert(sizeof(Number) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof(x));
  return bits;
}
template <class Number>
Number from_bits(uint64_t bits) {
  Number x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
inline int lane() { return static_cast<int>((threadIdx.y * blockDim.x + threadIdx.x) % 32); }

}  // namespace emulated

inline void __syncthreads() { emulated::sync_threads(); }
inline void __syncwarp() { emulated::exchange("syncwarp", 0); }
inline void __threadfence() {}
template <class Number>
Number __shfl_xor_sync(unsigned, Number x, int mask) {
  const auto* all = emulated::exchange("shfl_xor", emulated::to_bits(x));
  return emulated::from_bits<Number>(all[emulated::lane() ^ mask]);
}
template <class Number>
Number __shfl_up_sync(unsigned, Number x, int distance) {
  const auto* all = emulated::exchange("shfl_up", emulated::to_bits(x));
  const int from = emulated::lane() - distance;
  return from < 0 ? x : emulated::from_bits<Number>(all[from]);
}
template <class Number>
Number __shfl_sync(unsigned, Number x, int lane) {
  return emulated::from_bits<Number>(emulated::exchange("shfl", emulated::to_bits(x))[lane]);
}
inline unsigned __ballot_sync(unsigned, bool x) {
  const auto* all = emulated::exchange("ballot", x);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= static_cast<unsigned>(all[i]) << i;
  return votes;
}
template <class Number>
unsigned __match_any_sync(unsigned, Number x) {
  const auto* all = emulated::exchange("match_any", emulated::to_bits(x));
  unsigned alike = 0;
  for (int i = 0; i < 32; ++i) alike |= unsigned{all[i] == emulated::to_bits(x)} << i;
  return alike;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned atomicAdd(unsigned* x, unsigned value) {
  return __atomic_fetch_add(x, value, __ATOMIC_ACQ_REL);
}
template <class Number>
Number __ldcg(const Number* x) {
  return *x;
}

// Compile with -ffp-contract=off.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __uint_as_float(uint32_t x) { return emulated::from_bits<float>(x); }
inline uint32_t __float_as_uint(float x) { return static_cast<uint32_t>(emulated::to_bits(x)); }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Expected, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Given&&... arguments) {
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  const unsigned threads = block.x * block.y * block.z;
  if (grid.x == 0 || grid.y != 1 || grid.z != 1 || block.z != 1 || threads == 0 || threads > 1024) {
    return cudaErrorInvalidValue;
  }
  auto call = [&] { kernel(arguments...); };
  emulated::run(grid, block, [](void* c) { (*static_cast<decltype(call)*>(c))(); }, &call);
  return cudaSuccess;
}
