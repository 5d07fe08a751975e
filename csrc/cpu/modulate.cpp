// SPDX-License-Identifier: Apache-2.0
// norm_modulate and gate_residual.
#include <algorithm>
#include <vector>

#include "numeric.h"
#include "ops.h"
#include "work_queue.h"

namespace rapid3rt {
namespace {

template <class T>
void modulate(const ModulateParams& p) {
  const auto* x = static_cast<const T*>(p.x);
  const auto* scale = static_cast<const T*>(p.scale);
  const auto* shift = static_cast<const T*>(p.shift);
  const auto* weight = static_cast<const T*>(p.weight);
  const auto* bias = static_cast<const T*>(p.bias);
  auto* out = static_cast<T*>(p.out);
  const int64_t width = p.width, tokens = tokens_per_item(width);
  const int64_t chunks = (p.num_tokens + tokens - 1) / tokens;
  const int64_t bytes = 2 * p.num_rows * p.num_tokens * width * static_cast<int64_t>(sizeof(T));
  run_queue(p.num_rows * chunks, threads_for_bytes(bytes, p.num_threads), [&] {
    return [&, scratch = std::vector<float>(width)](int64_t item) mutable {
      const int64_t row = item / chunks, first = item % chunks * tokens;
      float* const value = scratch.data();
      for (int64_t token = first; token < std::min(first + tokens, p.num_tokens); ++token) {
        const int64_t at = (row * p.num_tokens + token) * width;
        load_row(x + at, width, value);
        normalize_row(value, width, p.eps, p.rms);
        if (weight != nullptr) {
          for (int64_t j = 0; j < width; ++j) value[j] *= to_float(weight[j]);
        }
        if (bias != nullptr) {
          for (int64_t j = 0; j < width; ++j) value[j] += to_float(bias[j]);
        }
        modulate_row(value, scale + row * width, shift + row * width, width, out + at);
      }
    };
  });
}

template <class T>
void gate(const GateParams& p) {
  const auto* residual = static_cast<const T*>(p.residual);
  const auto* gate = static_cast<const T*>(p.gate);
  const auto* y = static_cast<const T*>(p.y);
  auto* out = static_cast<T*>(p.out);
  const int64_t width = p.width, tokens = tokens_per_item(width);
  const int64_t chunks = (p.num_tokens + tokens - 1) / tokens;
  const int64_t bytes = 3 * p.num_rows * p.num_tokens * width * static_cast<int64_t>(sizeof(T));
  run_queue(p.num_rows * chunks, threads_for_bytes(bytes, p.num_threads), [&] {
    return [&](int64_t item) {
      const int64_t row = item / chunks, first = item % chunks * tokens;
      const T* const g = gate + row * width;
      for (int64_t token = first; token < std::min(first + tokens, p.num_tokens); ++token) {
        const int64_t at = (row * p.num_tokens + token) * width;
        for (int64_t j = 0; j < width; ++j) {
          from_float(to_float(residual[at + j]) + to_float(g[j]) * to_float(y[at + j]),
                     out[at + j]);
        }
      }
    };
  });
}

}  // namespace

void norm_modulate(const ModulateParams& params) {
  with_type(params.dtype, [&](auto type) { modulate<decltype(type)>(params); });
}

void gate_residual(const GateParams& params) {
  with_type(params.dtype, [&](auto type) { gate<decltype(type)>(params); });
}

}  // namespace rapid3rt
