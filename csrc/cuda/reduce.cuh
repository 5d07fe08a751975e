// SPDX-License-Identifier: Apache-2.0
// Sums over warps and groups of warps, always in the same order; every thread gets the result.
#pragma once

#include <cuda_runtime.h>

#include "rowwise.h"

namespace rapid3rt::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

template <class Number>
__device__ __forceinline__ Number warp_sum(Number x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
}

// Each of kSums sums over `warps` warps from `first` on; these warps call it together with all
// others of the CTA. `scratch`: of a CTA of kMostWarps warps, read until the CTA's next barrier.
template <int kMostWarps, int kSums, class Number>
__device__ __forceinline__ void group_sums(Number (&x)[kSums], int warp, int lane, int first,
                                           int warps, Number (&scratch)[kMostWarps][kSums]) {
#pragma unroll
  for (Number& sum : x) sum = warp_sum(sum);
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) scratch[warp][i] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSums; ++i) x[i] = scratch[first][i];
  for (int w = first + 1; w < first + warps; ++w) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) x[i] += scratch[w][i];
  }
}

}  // namespace rapid3rt::cuda
