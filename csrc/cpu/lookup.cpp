// SPDX-License-Identifier: Apache-2.0
// cache_lookup, cache_lookup_norm and cache_store: one pass over memory each, arithmetic in float,
// one rounding.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "numeric.h"
#include "ops.h"
#include "work_queue.h"

namespace rapid3rt {
namespace {

template <class T>
void lookup(const LookupParams& p) {
  const auto* embedded = static_cast<const T*>(p.embedded);
  const auto* slots = static_cast<const T*>(p.slots);
  const auto* scale = static_cast<const T*>(p.scale);
  const auto* shift = static_cast<const T*>(p.shift);
  auto* out = static_cast<T*>(p.out);
  const int64_t width = p.width, tokens = tokens_per_item(width);
  const int64_t chunks = (p.num_tokens + tokens - 1) / tokens;
  const int64_t row_size = p.num_tokens * width;
  const int64_t bytes =
      p.num_rows * row_size * (2 + p.num_orders) * static_cast<int64_t>(sizeof(T));
  run_queue(p.num_rows * chunks, threads_for_bytes(bytes, p.num_threads), [&] {
    return [&, sum = std::vector<float>(width)](int64_t item) mutable {
      const int64_t row = item / chunks, first = item % chunks * tokens;
      const T* slot = slots + p.slot[row] * p.num_orders * row_size;
      const float* coef = p.coef + row * p.num_orders;
      for (int64_t token = first; token < std::min(first + tokens, p.num_tokens); ++token) {
        const int64_t at = token * width;
        float* const x = sum.data();
        load_row(embedded + row * row_size + at, width, x);
        for (int64_t order = 0; order < p.num_orders; ++order) {
          const float c = coef[order];
          if (c == 0.0f) continue;  // such an order is not read: it may never have been written
          const T* term = slot + order * row_size + at;
          for (int64_t j = 0; j < width; ++j) x[j] += c * to_float(term[j]);
        }
        T* const to = out + row * row_size + at;
        if (scale != nullptr) {
          normalize_row(x, width, p.eps, false);
          modulate_row(x, scale + row * width, shift + row * width, width, to);
        } else {
          for (int64_t j = 0; j < width; ++j) from_float(x[j], to[j]);
        }
      }
    };
  });
}

// Statistics over some tokens of one row. Spread about the mean is merged, never taken from a
// difference of squares.
struct Partial {
  double change, old_size, count, mean, spread;

  void merge(const Partial& other) {
    change += other.change;
    old_size += other.old_size;
    if (other.count == 0) return;
    const double total = count + other.count, delta = other.mean - mean;
    spread += other.spread + delta * delta * count * other.count / total;
    mean += delta * other.count / total;
    count = total;
  }
};

template <class T>
void store(const StoreParams& p) {
  const auto* out = static_cast<const T*>(p.out);
  const auto* embedded = static_cast<const T*>(p.embedded);
  auto* slots = static_cast<T*>(p.slots);
  const int64_t width = p.width, tokens = tokens_per_item(width);
  const int64_t chunks = (p.num_tokens + tokens - 1) / tokens;
  const int64_t row_size = p.num_tokens * width;
  const int64_t bytes =
      p.num_rows * row_size * (2 + 2 * p.num_orders) * static_cast<int64_t>(sizeof(T));
  std::vector<Partial> partials(p.num_rows * chunks);
  run_queue(p.num_rows * chunks, threads_for_bytes(bytes, p.num_threads), [&] {
    return [&, residual = std::vector<float>(width), old = std::vector<float>(width),
            next = std::vector<float>(width)](int64_t item) mutable {
      const int64_t row = item / chunks, first = item % chunks * tokens;
      const float gap = p.gap[row];
      float *const r = residual.data(), *const before = old.data(), *const value = next.data();
      Partial total{};
      for (int64_t token = first; token < std::min(first + tokens, p.num_tokens); ++token) {
        const int64_t at = row * row_size + token * width;
        for (int64_t j = 0; j < width; ++j)
          r[j] = to_float(out[at + j]) - to_float(embedded[at + j]);
        Partial part{};
        const float mean =
            sum_lanes(width, [&](int64_t j) { return r[j]; }) / static_cast<float>(width);
        part.count = static_cast<double>(width);
        part.mean = mean;
        part.spread = sum_lanes(width, [&](int64_t j) { return (r[j] - mean) * (r[j] - mean); });
        total.merge(part);
        T* slot = slots + p.slot[row] * p.num_orders * row_size + token * width;
        if (gap == 0.0f) {  // the first compute of this row: what the slot held is not read
          for (int64_t j = 0; j < width; ++j) from_float(r[j], slot[j]);
          for (int64_t order = 1; order < p.num_orders; ++order) {
            std::fill_n(slot + order * row_size, width, T{});
          }
          continue;
        }
        load_row(slot, width, before);
        total.change += sum_lanes(width, [&](int64_t j) { return std::fabs(r[j] - before[j]); });
        total.old_size += sum_lanes(width, [&](int64_t j) { return std::fabs(before[j]); });
        // value: the new entry of the order in hand; before: its old entry.
        std::copy_n(r, width, value);
        for (int64_t order = 0; order < p.num_orders; ++order) {
          T* const entry = slot + order * row_size;
          for (int64_t j = 0; j < width; ++j) {
            const float held = to_float(entry[j]);
            from_float(value[j], entry[j]);
            value[j] = (value[j] - held) / gap;
          }
        }
      }
      partials[item] = total;
    };
  });
  for (int64_t row = 0; row < p.num_rows; ++row) {
    Partial total{};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total.merge(partials[row * chunks + chunk]);
    const double old_size = std::max(total.old_size / total.count, double{FLT_MIN});
    const double drift = total.change / total.count / old_size;
    p.stats[3 * row] = p.gap[row] == 0.0f ? 0.0f : static_cast<float>(drift);
    p.stats[3 * row + 1] = static_cast<float>(total.mean);
    p.stats[3 * row + 2] = static_cast<float>(std::sqrt(total.spread / total.count));
  }
}

}  // namespace

void cache_lookup(const LookupParams& params) {
  check_ids("slot", params.slot, params.num_rows, params.num_slots, false);
  with_type(params.dtype, [&](auto type) { lookup<decltype(type)>(params); });
}

void cache_store(const StoreParams& params) {
  check_ids("slot", params.slot, params.num_rows, params.num_slots, true);
  with_type(params.dtype, [&](auto type) { store<decltype(type)>(params); });
}

}  // namespace rapid3rt
