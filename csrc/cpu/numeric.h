// SPDX-License-Identifier: Apache-2.0
// Row-wise arithmetic in float with a fixed order of summation: sixteen lanes, then a tree.
#pragma once

#include <cmath>
#include <cstdint>

#include "rapid3rt/dtype.h"

namespace rapid3rt {

constexpr int kLanes = 16;

// Sum of term(j) over j < n, always in the same order.
template <class Term>
inline float sum_lanes(int64_t n, Term&& term) {
  float lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(j + lane);
  }
  for (int lane = 0; j < n; ++j, ++lane) lanes[lane] += term(j);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

template <class T>
inline void load_row(const T* x, int64_t n, float* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = to_float(x[j]);
}

// In place: (x - mean) / sqrt(var + eps), or x / sqrt(mean of squares + eps).
inline void normalize_row(float* x, int64_t n, float eps, bool rms) {
  const float count = static_cast<float>(n);
  if (!rms) {
    const float mean = sum_lanes(n, [&](int64_t j) { return x[j]; }) / count;
    for (int64_t j = 0; j < n; ++j) x[j] -= mean;
  }
  const float mean_square = sum_lanes(n, [&](int64_t j) { return x[j] * x[j]; }) / count;
  const float inverse = 1.0f / std::sqrt(mean_square + eps);
  for (int64_t j = 0; j < n; ++j) x[j] *= inverse;
}

template <class T>
inline void modulate_row(const float* x, const T* scale, const T* shift, int64_t n, T* out) {
  for (int64_t j = 0; j < n; ++j) {
    from_float(x[j] * (1.0f + to_float(scale[j])) + to_float(shift[j]), out[j]);
  }
}

// Tokens per work item: enough to pay for taking an item, independent of the number of threads.
inline int64_t tokens_per_item(int64_t width) {
  const int64_t tokens = 16384 / (width > 0 ? width : 1);
  return tokens > 1 ? tokens : 1;
}

}  // namespace rapid3rt
