// SPDX-License-Identifier: Apache-2.0
// One kernel serves norm_modulate and cache_lookup_norm: the first is a lookup of no orders.
#pragma once

#include <cstdint>

#include "launch.h"
#include "rapid3rt/dtype.h"

namespace rapid3rt::cuda {

// (norm(x) weight + bias) (1 + scale) + shift of x = embedded + sum of coef * slots[slot].
struct NormParams {
  void* out;             // [R, I, D]
  const void* embedded;  // [R, I, D]
  const void* slots;     // [S, O, I, D]
  const int32_t* slot;   // [R]
  const float* coef;     // [R, O]
  const void* scale;     // [R, D]
  const void* shift;     // [R, D]
  const void* weight;    // [D] or null
  const void* bias;      // [D] or null
  float eps;
  bool rms;
  int64_t num_rows, num_slots, num_orders, num_tokens, width;
  DType dtype;
};

void start_norm(const char* name, const NormParams& params, const Launch& launch);

}  // namespace rapid3rt::cuda
