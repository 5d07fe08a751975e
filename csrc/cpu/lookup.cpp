// SPDX-License-Identifier: Apache-2.0
// cache_lookup, cache_lookup_norm and cache_store: one pass over memory each, arithmetic in float,
// one rounding.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "ops.h"
#include "rowwise/choose.h"
#include "work_queue.h"

namespace rapid3rt {
namespace {

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

void write_stats(const StoreParams& p, const std::vector<Partial>& partials, int64_t chunks) {
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

void cache_lookup(const LookupParams& p) {
  check_ids("slot", p.slot, p.num_rows, p.num_slots, false);
  const RowKernels& kernels = row_kernels();
  const bool has_norm = p.scale != nullptr;
  const RowItems items = cut_rows(p, 2 + p.num_orders, has_norm);
  items.run([&] {
    return [&, scratch = Scratch(has_norm ? p.width : 0),
            terms = std::vector<const void*>(p.num_orders),
            coef = std::vector<float>(p.num_orders)](const RowItem& item) mutable {
      const int64_t first = item.at - item.row * items.row_size;
      int64_t num_terms = 0;
      for (int64_t order = 0; order < p.num_orders; ++order) {
        const float c = p.coef[item.row * p.num_orders + order];
        if (c == 0.0f) continue;  // such an order is not read: it may never have been written
        const int64_t entry = (p.slot[item.row] * p.num_orders + order) * items.row_size + first;
        terms[num_terms] = element(p.slots, entry, p.dtype);
        coef[num_terms++] = c;
      }
      Modulation modulation{};
      if (has_norm) {
        modulation.scale = element(p.scale, item.row * p.width, p.dtype);
        modulation.shift = element(p.shift, item.row * p.width, p.dtype);
        modulation.eps = p.eps;
      }
      LookupPiece piece{};
      piece.out = element(p.out, item.at, p.dtype);
      piece.embedded = element(p.embedded, item.at, p.dtype);
      piece.terms = terms.data();
      piece.coef = coef.data();
      piece.num_terms = num_terms;
      piece.count = item.count;
      piece.width = p.width;
      piece.modulation = has_norm ? &modulation : nullptr;
      piece.scratch = scratch.data();
      piece.stream = items.stream;
      piece.dtype = static_cast<int>(p.dtype);
      kernels.lookup(piece);
    };
  });
}

void cache_store(const StoreParams& p) {
  check_ids("slot", p.slot, p.num_rows, p.num_slots, true);
  const RowKernels& kernels = row_kernels();
  const int64_t tokens = tokens_per_item(p.width);
  const int64_t chunks = ceil_div(p.num_tokens, tokens);
  const int64_t row_size = p.num_tokens * p.width, size = element_bytes(p.dtype);
  const int64_t slot_bytes = p.num_rows * p.num_orders * row_size * size;
  const bool can_stream = should_stream(p.slots, slot_bytes, p.width * size, p.num_threads);
  const int64_t bytes = 2 * p.num_rows * row_size * size + 2 * slot_bytes;
  std::vector<Partial> partials(p.num_rows * chunks);
  run_queue(p.num_rows * chunks, threads_for_bytes(bytes, p.num_threads), [&] {
    return [&, scratch = Scratch(p.width)](int64_t item) mutable {
      const int64_t row = item / chunks, first = item % chunks * tokens;
      Partial total{};
      for (int64_t token = first; token < std::min(first + tokens, p.num_tokens); ++token) {
        const int64_t at = row * row_size + token * p.width;
        const int64_t entry = p.slot[row] * p.num_orders * row_size + token * p.width;
        StorePiece piece{};
        piece.out = element(p.out, at, p.dtype);
        piece.embedded = element(p.embedded, at, p.dtype);
        piece.entries = element(p.slots, entry, p.dtype);
        piece.num_orders = p.num_orders;
        piece.order_stride = row_size;
        piece.width = p.width;
        piece.gap = p.gap[row];
        piece.scratch = scratch.data();
        // Entries that are read first are in the caches anyway.
        piece.stream = can_stream && piece.gap == 0.0f;
        piece.dtype = static_cast<int>(p.dtype);
        const TokenStats stats = kernels.store(piece);
        total.merge(
            {stats.change, stats.old_size, static_cast<double>(p.width), stats.mean, stats.spread});
      }
      partials[item] = total;
    };
  });
  write_stats(p, partials, chunks);
}

}  // namespace rapid3rt
