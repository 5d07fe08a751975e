// SPDX-License-Identifier: Apache-2.0
// The sum over cached orders that cache_lookup and its fused norm share.
#pragma once

#include <cassert>

#include "elements.cuh"
#include "rowwise.h"

namespace rapid3rt::cuda {

// One row's entry in the cache.
template <class T>
struct Terms {
  const T* entry;     // [num_orders, row_size]
  const float* coef;  // [num_orders]
  int64_t num_orders, row_size;
};

template <class T, class Params>
__device__ __forceinline__ Terms<T> terms_of(const Params& p, uint32_t row) {
  const int64_t row_size = p.num_tokens * p.width;
  if (p.num_orders == 0) return {nullptr, nullptr, 0, row_size};
  assert(p.slot[row] >= 0 && p.slot[row] < p.num_slots);
  return {static_cast<const T*>(p.slots) + p.slot[row] * p.num_orders * row_size,
          p.coef + row * p.num_orders, p.num_orders, row_size};
}

// embedded + sum of coef * order, in the order of o, for the vectors at `at`, `at + step`, ...; all
// lanes from `end` on are 0. An order whose coefficient is 0 is not read: it may never have been
// written. The branch is the same for the whole CTA.
template <bool kAligned, class T, int kItems>
__device__ __forceinline__ void look_up(const T* embedded, const Terms<T>& terms, int64_t at,
                                        int64_t step, int64_t end, float (&x)[kItems][kLanes<T>]) {
  Pack<4> packs[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int64_t j = at + i * step;
    packs[i] = load<kAligned>(embedded + j, lanes_before(j, end, kLanes<T>));
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) widen<T>(packs[i], x[i]);
  for (int64_t order = 0; order < terms.num_orders; ++order) {
    const float c = terms.coef[order];
    if (c == 0.0f) continue;
    const T* const entry = terms.entry + order * terms.row_size;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int64_t j = at + i * step;
      packs[i] = load<kAligned>(entry + j, lanes_before(j, end, kLanes<T>));
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      float term[kLanes<T>];
      widen<T>(packs[i], term);
#pragma unroll
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        x[i][lane] = add(x[i][lane], mul(c, term[lane]));
      }
    }
  }
}

}  // namespace rapid3rt::cuda
