// SPDX-License-Identifier: Apache-2.0
// cache_lookup: one pass, 16 bytes an access, the bits of the reference.
#include "lookup.cuh"
#include "norm.h"
#include "ops.h"
#include "start.cuh"

namespace rapid3rt::cuda {
namespace {

constexpr int kThreads = 256, kUnroll = 4;

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 4)
    lookup_kernel(const LookupParams p, uint32_t pieces) {
  constexpr int64_t kStep = kThreads * kLanes<T>;
  const Piece piece = piece_of(blockIdx.x, pieces);
  const Terms<T> terms = terms_of<T>(p, piece.row);
  const int64_t at = piece.piece * (kUnroll * kStep) + threadIdx.x * kLanes<T>;
  const int64_t row = piece.row * terms.row_size;
  float x[kUnroll][kLanes<T>];
  look_up<kAligned>(static_cast<const T*>(p.embedded) + row, terms, at, kStep, terms.row_size, x);
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t j = at + i * kStep;
    store<kAligned>(static_cast<T*>(p.out) + row + j, narrow<T>(x[i]),
                    lanes_before(j, terms.row_size, kLanes<T>));
  }
}

}  // namespace

void cache_lookup(const LookupParams& p, const Launch& launch) {
  if (p.num_rows == 0 || p.num_tokens == 0 || p.width == 0) return;
  if (p.scale != nullptr) {
    return start_norm(
        "cache_lookup_norm",
        {p.out, p.embedded, p.slots, p.slot, p.coef, p.scale, p.shift, nullptr, nullptr, p.eps,
         false, p.num_rows, p.num_slots, p.num_orders, p.num_tokens, p.width, p.dtype},
        launch);
  }
  const DeviceGuard guard(launch.device);
  const int64_t row_size = p.num_tokens * p.width;
  const bool is_aligned =
      all_multiples(kVectorBytes, p.out, p.embedded, p.slots, row_size * element_bytes(p.dtype));
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t pieces = ceil_div(row_size, int64_t{kThreads} * kUnroll * kLanes<T>);
    start("cache_lookup", is_aligned ? lookup_kernel<T, true> : lookup_kernel<T, false>,
          grid_size(p.num_rows, pieces), dim3(kThreads), launch, p, static_cast<uint32_t>(pieces));
  });
}

}  // namespace rapid3rt::cuda
