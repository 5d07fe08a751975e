// SPDX-License-Identifier: Apache-2.0
// cache_store: residuals and their finite differences into the cache, and statistics in the same
// pass. Each CTA leaves its own statistics in the workspace; a second launch merges them in a fixed
// order, so that the same inputs give the same bits.
#include <cassert>
#include <cfloat>

#include "elements.cuh"
#include "ops.h"
#include "reduce.cuh"
#include "start.cuh"

namespace rapid3rt::cuda {
namespace {

constexpr int kThreads = 256, kUnroll = 2, kWarps = kThreads / kWarp;

// Of the residuals r in one CTA: mean, sum of (r - mean)^2, sum of |r - old r|, sum of |old r|.
struct alignas(16) Partial {
  double mean, spread, change, old_size;
};

template <class T>
constexpr int64_t kPieceSize = int64_t{kThreads} * kUnroll * kLanes<T>;

int64_t piece_size(DType dtype) {
  return dtype == DType::kFloat32 ? kPieceSize<float> : kPieceSize<bfloat16>;
}

int64_t num_pieces(const StoreParams& p) {
  return ceil_div(p.num_tokens * p.width, piece_size(p.dtype));
}

// What a thread holds: vectors of residuals at `at`, `at + step`, ... of its row.
template <class T>
struct Residuals {
  static constexpr int64_t kStep = kThreads * kLanes<T>;
  float r[kUnroll][kLanes<T>];
  int64_t at, row_size;

  __device__ __forceinline__ int64_t element(int i) const { return at + i * kStep; }
  __device__ __forceinline__ int lanes(int i) const {
    return lanes_before(element(i), row_size, kLanes<T>);
  }
};

template <bool kAligned, class T>
__device__ __forceinline__ void load_residuals(const T* out, const T* embedded, Residuals<T>& t) {
  Pack<4> a[kUnroll], b[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    a[i] = load<kAligned>(out + t.element(i), t.lanes(i));
    b[i] = load<kAligned>(embedded + t.element(i), t.lanes(i));
  }
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    float minus[kLanes<T>];
    widen<T>(a[i], t.r[i]);
    widen<T>(b[i], minus);
#pragma unroll
    for (int lane = 0; lane < kLanes<T>; ++lane) t.r[i][lane] = sub(t.r[i][lane], minus[lane]);
  }
}

// A row without history: nothing is read, higher orders become 0.
template <bool kAligned, class T>
__device__ __forceinline__ void store_first(const Residuals<T>& t, T* entry, int64_t num_orders) {
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    store<kAligned>(entry + t.element(i), narrow<T>(t.r[i]), t.lanes(i));
  }
  for (int64_t order = 1; order < num_orders; ++order) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      store<kAligned>(entry + order * t.row_size + t.element(i), Pack<4>{}, t.lanes(i));
    }
  }
}

// Puts `value` into an order and makes of it its difference to what was there.
template <bool kAligned, class T>
__device__ __forceinline__ void exchange(const Residuals<T>& t, T* entry,
                                         float (&value)[kUnroll][kLanes<T>],
                                         float (&old)[kUnroll][kLanes<T>]) {
  Pack<4> packs[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    // Plain loads: the compiler must see that what is read here is written below.
    packs[i] = load<kAligned, 4, Reuse::kCached>(entry + t.element(i), t.lanes(i));
  }
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    widen<T>(packs[i], old[i]);
    store<kAligned>(entry + t.element(i), narrow<T>(value[i]), t.lanes(i));
#pragma unroll
    for (int lane = 0; lane < kLanes<T>; ++lane) value[i][lane] = sub(value[i][lane], old[i][lane]);
  }
}

// Adds sum of |r - old r| and sum of |old r|.
template <bool kAligned, class T>
__device__ __forceinline__ void store_next(const Residuals<T>& t, T* entry, int64_t num_orders,
                                           float gap, float& change, float& old_size) {
  float value[kUnroll][kLanes<T>], old[kUnroll][kLanes<T>];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
#pragma unroll
    for (int lane = 0; lane < kLanes<T>; ++lane) value[i][lane] = t.r[i][lane];
  }
  exchange<kAligned>(t, entry, value, old);
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
#pragma unroll
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      change = add(change, fabsf(value[i][lane]));
      old_size = add(old_size, fabsf(old[i][lane]));
    }
  }
  for (int64_t order = 1; order < num_orders; ++order) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
#pragma unroll
      for (int lane = 0; lane < kLanes<T>; ++lane) value[i][lane] = div(value[i][lane], gap);
    }
    exchange<kAligned>(t, entry + order * t.row_size, value, old);
  }
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    store_kernel(const StoreParams p, uint32_t pieces, Partial* partials) {
  __shared__ float sums[kWarps][3], centred[kWarps][2];
  const Piece piece = piece_of(blockIdx.x, pieces);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  Residuals<T> t;
  t.row_size = p.num_tokens * p.width;
  t.at = piece.piece * kPieceSize<T> + threadIdx.x * kLanes<T>;
  const int64_t row = piece.row * t.row_size;
  load_residuals<kAligned>(static_cast<const T*>(p.out) + row,
                           static_cast<const T*>(p.embedded) + row, t);
  assert(p.slot[piece.row] >= 0 && p.slot[piece.row] < p.num_slots);
  T* const entry = static_cast<T*>(p.slots) + p.slot[piece.row] * p.num_orders * t.row_size;
  const float gap = p.gap[piece.row];
  float first[3] = {};  // of r, |r - old r|, |old r|
  if (gap == 0.0f) {
    store_first<kAligned>(t, entry, p.num_orders);
  } else {
    store_next<kAligned>(t, entry, p.num_orders, gap, first[1], first[2]);
  }

  // Statistics: the mean first, then what is left of it together with the spread.
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
#pragma unroll
    for (const float r : t.r[i]) first[0] = add(first[0], r);
  }
  group_sums<kWarps>(first, warp, lane, 0, kWarps, sums);
  const int64_t begin = piece.piece * kPieceSize<T>;
  const auto count = static_cast<float>(lanes_before(begin, t.row_size, kPieceSize<T>));
  const float mean = div(first[0], count);
  float second[2] = {};  // of r - mean, (r - mean)^2
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int n = t.lanes(i);
#pragma unroll
    for (int j = 0; j < kLanes<T>; ++j) {
      const float distance = sub(t.r[i][j], mean);
      if (j < n) {
        second[0] = add(second[0], distance);
        second[1] = add(second[1], mul(distance, distance));
      }
    }
  }
  group_sums<kWarps>(second, warp, lane, 0, kWarps, centred);
  if (threadIdx.x == 0) {
    const float rest = div(second[0], count);
    // An infinite mean leaves no number of the rest.
    const double exact = isinf(mean) ? double{mean} : double{mean} + rest;
    partials[blockIdx.x] = {exact, second[1] - double{rest} * second[0], first[1], first[2]};
  }
}

constexpr int kMergeThreads = 512, kMergeWarps = kMergeThreads / kWarp;

// One CTA a row.
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const StoreParams p, uint32_t pieces, int64_t size, const Partial* partials) {
  __shared__ double sums[kMergeWarps][3], spreads[kMergeWarps][1];
  const uint32_t row = blockIdx.x;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t row_size = p.num_tokens * p.width;
  const auto total = static_cast<double>(row_size);
  partials += int64_t{row} * pieces;
  double first[3] = {};  // of r, |r - old r|, |old r|
  for (uint32_t i = threadIdx.x; i < pieces; i += kMergeThreads) {
    const int64_t count = i + 1 < pieces ? size : row_size - i * size;
    first[0] += partials[i].mean * static_cast<double>(count);
    first[1] += partials[i].change;
    first[2] += partials[i].old_size;
  }
  group_sums<kMergeWarps>(first, warp, lane, 0, kMergeWarps, sums);
  const double mean = first[0] / total;
  double spread[1] = {};
  for (uint32_t i = threadIdx.x; i < pieces; i += kMergeThreads) {
    const int64_t count = i + 1 < pieces ? size : row_size - i * size;
    const double distance = partials[i].mean - mean;
    spread[0] += partials[i].spread + distance * distance * static_cast<double>(count);
  }
  group_sums<kMergeWarps>(spread, warp, lane, 0, kMergeWarps, spreads);
  if (threadIdx.x != 0) return;
  float* const stats = p.stats + int64_t{row} * 3;
  const double old_size = first[2] / total, least = FLT_MIN;
  const double drift = first[1] / total / (old_size < least ? least : old_size);
  const bool has_values = row_size > 0;
  stats[0] = has_values && p.gap[row] != 0.0f ? static_cast<float>(drift) : 0.0f;
  stats[1] = has_values ? static_cast<float>(mean) : 0.0f;
  stats[2] = has_values ? static_cast<float>(sqrt(spread[0] / total)) : 0.0f;
}

}  // namespace

int64_t store_workspace_bytes(const StoreParams& p) {
  return p.num_rows * num_pieces(p) * static_cast<int64_t>(sizeof(Partial));
}

void cache_store(const StoreParams& p, void* workspace, const Launch& launch) {
  if (p.num_rows == 0) return;
  const DeviceGuard guard(launch.device);
  const int64_t pieces = num_pieces(p);
  auto* const partials = static_cast<Partial*>(workspace);
  const bool is_aligned = all_multiples(kVectorBytes, p.slots, p.out, p.embedded,
                                        p.num_tokens * p.width * element_bytes(p.dtype));
  if (pieces > 0) {
    with_type(p.dtype, [&](auto type) {
      using T = decltype(type);
      start("cache_store", is_aligned ? store_kernel<T, true> : store_kernel<T, false>,
            grid_size(p.num_rows, pieces), dim3(kThreads), launch, p, static_cast<uint32_t>(pieces),
            partials);
    });
  }
  start("cache_store", merge_kernel, grid_size(p.num_rows, 1), dim3(kMergeThreads), launch, p,
        static_cast<uint32_t>(pieces), piece_size(p.dtype), partials);
}

}  // namespace rapid3rt::cuda
