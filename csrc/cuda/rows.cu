// SPDX-License-Identifier: Apache-2.0
// gather_rows and scatter_rows: copies of whole rows as bytes, in the largest unit that addresses
// and the size of a row allow.
#include <cassert>

#include "elements.cuh"
#include "ops.h"
#include "rowwise.h"
#include "start.cuh"

namespace rapid3rt::cuda {
namespace {

constexpr int kThreads = 256, kUnroll = 4;
constexpr int64_t kUnitsPerCta = kThreads * kUnroll;

__device__ __forceinline__ Pack<4> read_unit(const Pack<4>* x) { return read_once(x); }
template <class Unit>
__device__ __forceinline__ Unit read_unit(const Unit* x) {
  return *x;
}

// from, to: the row of x and of out for each row of the call; null: the row itself. Either has
// `total` rows.
template <class Unit>
__global__ void __launch_bounds__(kThreads)
    copy_rows_kernel(Unit* out, const Unit* x, const int32_t* from, const int32_t* to,
                     [[maybe_unused]] int64_t total, int64_t row_units, uint32_t pieces) {
  const Piece at = piece_of(blockIdx.x, pieces);
  const int64_t source = from == nullptr ? at.row : from[at.row];
  const int64_t target = to == nullptr ? at.row : to[at.row];
  [[maybe_unused]] const int64_t named = from == nullptr ? target : source;
  assert(named >= 0 && named < total);
  const int64_t first = at.piece * kUnitsPerCta + threadIdx.x;
  x += source * row_units;
  out += target * row_units;
  Unit units[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t unit = first + i * kThreads;
    if (unit < row_units) units[i] = read_unit(x + unit);
  }
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t unit = first + i * kThreads;
    if (unit < row_units) out[unit] = units[i];
  }
}

template <class Unit>
void start_copy(const char* name, const RowsParams& p, const int32_t* from, const int32_t* to,
                const Launch& launch) {
  const int64_t row_units = p.row_bytes / static_cast<int64_t>(sizeof(Unit));
  const int64_t pieces = ceil_div(row_units, kUnitsPerCta);
  start(name, copy_rows_kernel<Unit>, grid_size(p.num_rows, pieces), dim3(kThreads), launch,
        static_cast<Unit*>(p.out), static_cast<const Unit*>(p.x), from, to, p.total, row_units,
        static_cast<uint32_t>(pieces));
}

void copy_rows(const char* name, const RowsParams& p, const int32_t* from, const int32_t* to,
               const Launch& launch) {
  if (p.num_rows == 0 || p.row_bytes == 0) return;
  const DeviceGuard guard(launch.device);
  const auto unit_is = [&](int64_t bytes) { return all_multiples(bytes, p.out, p.x, p.row_bytes); };
  if (unit_is(kVectorBytes)) return start_copy<Pack<4>>(name, p, from, to, launch);
  if (unit_is(4)) return start_copy<uint32_t>(name, p, from, to, launch);
  if (unit_is(2)) return start_copy<uint16_t>(name, p, from, to, launch);
  start_copy<uint8_t>(name, p, from, to, launch);
}

}  // namespace

void gather_rows(const RowsParams& p, const Launch& launch) {
  copy_rows("gather_rows", p, p.rows, nullptr, launch);
}

void scatter_rows(const RowsParams& p, const Launch& launch) {
  copy_rows("scatter_rows", p, nullptr, p.rows, launch);
}

}  // namespace rapid3rt::cuda
