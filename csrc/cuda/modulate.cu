// SPDX-License-Identifier: Apache-2.0
// norm_modulate, the norm of cache_lookup_norm, and gate_residual. A token is read once: it stays
// in registers between the sums and the result, unless it is wider than they hold.
#include "lookup.cuh"
#include "norm.h"
#include "ops.h"
#include "reduce.cuh"
#include "start.cuh"

namespace rapid3rt::cuda {
namespace {

// Thread x of a token, token y of a CTA.
struct TokenThread {
  int64_t token;          // of the row; those beyond the last one only take part in barriers
  int warp, lane;         // of the CTA
  int first_warp, warps;  // that share the token
  int64_t begin, end;     // the thread's first element and the token's last, of the row
  int64_t step;           // between the thread's vectors
};

template <class T>
__device__ __forceinline__ TokenThread token_thread(const NormParams& p, uint32_t piece) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, warps = blockDim.x / kWarp;
  const int64_t token = int64_t{piece} * blockDim.y + threadIdx.y;
  const int64_t at = token * p.width;
  return {token,
          thread / kWarp,
          thread % kWarp,
          static_cast<int>(threadIdx.y) * warps,
          warps,
          at + threadIdx.x * kLanes<T>,
          token < p.num_tokens ? at + p.width : 0,
          int64_t{blockDim.x} * kLanes<T>};
}

constexpr int kMostWarps = kTokenThreads / kWarp;
using Scratch = float[kMostWarps][1];

__device__ __forceinline__ float token_sum(float x, const TokenThread& t, Scratch& scratch) {
  float sums[1] = {x};
  group_sums<kMostWarps>(sums, t.warp, t.lane, t.first_warp, t.warps, scratch);
  return sums[0];
}

template <int kCount>
__device__ __forceinline__ float lane_sum(const float (&x)[kCount]) {
  float sum = x[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) sum = add(sum, x[i]);
  return sum;
}

// Sum of (x - mean)^2 over the n lanes that hold elements.
template <int kCount>
__device__ __forceinline__ float lane_squares(const float (&x)[kCount], float mean, int n) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float centred = sub(x[i], mean);
    if (i < n) sum = add(sum, mul(centred, centred));
  }
  return sum;
}

__device__ __forceinline__ float inverse_deviation(float squares, const NormParams& p) {
  return div(1.0f, __fsqrt_rn(add(div(squares, static_cast<float>(p.width)), p.eps)));
}

// The vector of a [D] tensor at column d.
template <bool kAligned, class T>
__device__ __forceinline__ void load_column(const void* x, int64_t d, int n,
                                            float (&value)[kLanes<T>]) {
  const T* const from = static_cast<const T*>(x) + d;
  widen<T>(load<kAligned, 4, Reuse::kCached>(from, n), value);
}

// Writes a token's n elements from column d on.
template <bool kAligned, class T>
__device__ __forceinline__ void modulate(const NormParams& p, uint32_t row, int64_t at, int64_t d,
                                         int n, float mean, float inverse, float (&x)[kLanes<T>]) {
  float factor[kLanes<T>], summand[kLanes<T>];
  const int64_t per_row = row * p.width + d;
  load_column<kAligned, T>(p.scale, per_row, n, factor);
  load_column<kAligned, T>(p.shift, per_row, n, summand);
#pragma unroll
  for (float& value : x) value = mul(sub(value, mean), inverse);
  if (p.weight != nullptr) {
    float weight[kLanes<T>];
    load_column<kAligned, T>(p.weight, d, n, weight);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) x[i] = mul(x[i], weight[i]);
  }
  if (p.bias != nullptr) {
    float bias[kLanes<T>];
    load_column<kAligned, T>(p.bias, d, n, bias);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) x[i] = add(x[i], bias[i]);
  }
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) x[i] = add(mul(x[i], add(1.0f, factor[i])), summand[i]);
  store<kAligned>(static_cast<T*>(p.out) + at, narrow<T>(x), n);
}

// Of one vector a thread, two CTAs fit an SM; of more, one, without spills.
template <class T, bool kAligned, int kItems>
__global__ void __launch_bounds__(kTokenThreads, kItems == 1 ? 2 : 1)
    norm_kernel(const NormParams p, uint32_t pieces) {
  __shared__ Scratch totals, squares;
  const Piece piece = piece_of(blockIdx.x, pieces);
  const TokenThread t = token_thread<T>(p, piece.piece);
  const Terms<T> terms = terms_of<T>(p, piece.row);
  const int64_t row = piece.row * terms.row_size;
  float x[kItems][kLanes<T>];
  look_up<kAligned>(static_cast<const T*>(p.embedded) + row, terms, t.begin, t.step, t.end, x);
  float mean = 0.0f;
  if (!p.rms) {
    float sum = lane_sum(x[0]);
#pragma unroll
    for (int i = 1; i < kItems; ++i) sum = add(sum, lane_sum(x[i]));
    mean = div(token_sum(sum, t, totals), static_cast<float>(p.width));
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int n = lanes_before(t.begin + i * t.step, t.end, kLanes<T>);
    sum = add(sum, lane_squares(x[i], mean, n));
  }
  const float inverse = inverse_deviation(token_sum(sum, t, squares), p);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int64_t j = t.begin + i * t.step;
    const int n = lanes_before(j, t.end, kLanes<T>);
    if (n > 0) {
      modulate<kAligned, T>(p, piece.row, row + j, j - t.token * p.width, n, mean, inverse, x[i]);
    }
  }
}

// Tokens wider than registers: read three times, the second and third time from the caches.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kTokenThreads, 1)
    wide_norm_kernel(const NormParams p, uint32_t pieces) {
  __shared__ Scratch totals, squares;
  const Piece piece = piece_of(blockIdx.x, pieces);
  const TokenThread t = token_thread<T>(p, piece.piece);
  const Terms<T> terms = terms_of<T>(p, piece.row);
  const int64_t row = piece.row * terms.row_size;
  const T* const embedded = static_cast<const T*>(p.embedded) + row;
  float x[1][kLanes<T>];
  float mean = 0.0f, sum = 0.0f;
  if (!p.rms) {
    for (int64_t j = t.begin; j < t.end; j += t.step) {
      look_up<kAligned>(embedded, terms, j, t.step, t.end, x);
      sum = add(sum, lane_sum(x[0]));
    }
    mean = div(token_sum(sum, t, totals), static_cast<float>(p.width));
  }
  sum = 0.0f;
  for (int64_t j = t.begin; j < t.end; j += t.step) {
    look_up<kAligned>(embedded, terms, j, t.step, t.end, x);
    sum = add(sum, lane_squares(x[0], mean, lanes_before(j, t.end, kLanes<T>)));
  }
  const float inverse = inverse_deviation(token_sum(sum, t, squares), p);
  for (int64_t j = t.begin; j < t.end; j += t.step) {
    look_up<kAligned>(embedded, terms, j, t.step, t.end, x);
    modulate<kAligned, T>(p, piece.row, row + j, j - t.token * p.width,
                          lanes_before(j, t.end, kLanes<T>), mean, inverse, x[0]);
  }
}

using NormKernel = void (*)(NormParams, uint32_t);

template <class T, bool kAligned>
NormKernel norm_kernel_of(int items) {
  if (items == 0) return wide_norm_kernel<T, kAligned>;
  return items == 1 ? norm_kernel<T, kAligned, 1> : norm_kernel<T, kAligned, 4>;
}

constexpr int kTokensPerThread = 4;

// out = residual + gate * y. A thread goes down kTokensPerThread tokens of one column.
template <class T, bool kAligned>
__global__ void __launch_bounds__(256)
    gate_kernel(const GateParams p, uint32_t pieces, uint32_t tiles) {
  const Piece piece = piece_of(blockIdx.x, pieces);
  const Piece tile = piece_of(piece.piece, tiles);  // rows of tiles: of tokens
  const int64_t d = (int64_t{tile.piece} * blockDim.x + threadIdx.x) * kLanes<T>;
  const int n = lanes_before(d, p.width, kLanes<T>);
  if (n == 0) return;
  const int64_t first = int64_t{tile.row} * blockDim.y * kTokensPerThread + threadIdx.y;
  const int64_t row = piece.row * p.num_tokens * p.width + d;
  float gate[kLanes<T>];
  load_column<kAligned, T>(p.gate, piece.row * p.width + d, n, gate);
  Pack<4> residual[kTokensPerThread], y[kTokensPerThread];
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    const int64_t token = first + i * blockDim.y, at = row + token * p.width;
    const int lanes = token < p.num_tokens ? n : 0;
    residual[i] = load<kAligned>(static_cast<const T*>(p.residual) + at, lanes);
    y[i] = load<kAligned>(static_cast<const T*>(p.y) + at, lanes);
  }
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    const int64_t token = first + i * blockDim.y, at = row + token * p.width;
    float a[kLanes<T>], b[kLanes<T>];
    widen<T>(residual[i], a);
    widen<T>(y[i], b);
#pragma unroll
    for (int lane = 0; lane < kLanes<T>; ++lane) a[lane] = add(a[lane], mul(gate[lane], b[lane]));
    store<kAligned>(static_cast<T*>(p.out) + at, narrow<T>(a), token < p.num_tokens ? n : 0);
  }
}

}  // namespace

void start_norm(const char* name, const NormParams& p, const Launch& launch) {
  if (p.num_rows == 0 || p.num_tokens == 0 || p.width == 0) return;
  const DeviceGuard guard(launch.device);
  const bool is_aligned = all_multiples(kVectorBytes, p.out, p.embedded, p.slots, p.scale, p.shift,
                                        p.weight, p.bias, p.width * element_bytes(p.dtype));
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const TokenShape shape = token_shape(ceil_div(p.width, kLanes<T>));
    const int64_t pieces = ceil_div(p.num_tokens, shape.tokens);
    const NormKernel kernel =
        is_aligned ? norm_kernel_of<T, true>(shape.items) : norm_kernel_of<T, false>(shape.items);
    start(name, kernel, grid_size(p.num_rows, pieces), dim3(shape.threads, shape.tokens), launch, p,
          static_cast<uint32_t>(pieces));
  });
}

void norm_modulate(const ModulateParams& p, const Launch& launch) {
  start_norm("norm_modulate",
             {p.out, p.x, nullptr, nullptr, nullptr, p.scale, p.shift, p.weight, p.bias, p.eps,
              p.rms, p.num_rows, 0, 0, p.num_tokens, p.width, p.dtype},
             launch);
}

void gate_residual(const GateParams& p, const Launch& launch) {
  if (p.num_rows == 0 || p.num_tokens == 0 || p.width == 0) return;
  const DeviceGuard guard(launch.device);
  const bool is_aligned =
      all_multiples(kVectorBytes, p.out, p.residual, p.gate, p.y, p.width * element_bytes(p.dtype));
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const ColumnShape shape = column_shape(ceil_div(p.width, kLanes<T>));
    const int64_t pieces =
        ceil_div(p.num_tokens, int64_t{shape.tokens} * kTokensPerThread) * shape.tiles;
    start("gate_residual", is_aligned ? gate_kernel<T, true> : gate_kernel<T, false>,
          grid_size(p.num_rows, pieces), dim3(shape.threads, shape.tokens), launch, p,
          static_cast<uint32_t>(pieces), static_cast<uint32_t>(shape.tiles));
  });
}

}  // namespace rapid3rt::cuda
