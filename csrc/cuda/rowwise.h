// SPDX-License-Identifier: Apache-2.0
// How the memory-bound ops are cut into CTAs. A cut depends on the width and the dtype of a call,
// never on the number of rows or on addresses: neither changes a bit of any row.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "rapid3rt/error.h"

namespace rapid3rt::cuda {

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;  // what one access moves

R3_HOST_DEVICE int64_t ceil_div(int64_t n, int64_t step) { return (n + step - 1) / step; }

// How many of `lanes` elements from `at` on lie before `end`.
R3_HOST_DEVICE int lanes_before(int64_t at, int64_t end, int lanes) {
  const int64_t left = end - at;
  return left >= lanes ? lanes : left > 0 ? static_cast<int>(left) : 0;
}

// The piece of work of a CTA: `piece` of `pieces` that a row was cut into.
struct Piece {
  uint32_t row, piece;
};

R3_HOST_DEVICE Piece piece_of(uint32_t block, uint32_t pieces) {
  return {block / pieces, block % pieces};
}

// CTAs of a one-dimensional grid.
inline uint32_t grid_size(int64_t rows, int64_t pieces) {
  constexpr int64_t kMost = 0x7fffffff;
  R3_CHECK(rows <= kMost / pieces, "rows times pieces must be at most ", kMost, ", got ", rows,
           " times ", pieces);
  return static_cast<uint32_t>(rows * pieces);
}

inline bool is_multiple(int64_t distance, int64_t step) { return distance % step == 0; }
inline bool is_multiple(const void* address, int64_t step) {
  return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(step) == 0;
}

// Whether all of the addresses and of the distances in bytes are multiples of `step`.
template <class... Places>
bool all_multiples(int64_t step, Places... places) {
  return (is_multiple(places, step) && ...);
}

// A CTA that works on whole tokens: `threads` (a multiple of a warp) beside each other on the
// vectors of a token, `tokens` of them at a time. Each thread holds `items` vectors, 0: more than
// fit into registers.
struct TokenShape {
  int threads, tokens, items;
};

constexpr int kTokenThreads = 512;  // at most, in all

inline TokenShape token_shape(int64_t vectors) {
  constexpr int kMany = 4;
  const int items = vectors <= kTokenThreads ? 1 : vectors <= kMany * kTokenThreads ? kMany : 0;
  const int64_t columns = items == 0 ? kTokenThreads : ceil_div(vectors, items);
  const int threads = static_cast<int>(ceil_div(columns > 0 ? columns : 1, kWarp)) * kWarp;
  constexpr int kEnough = 256;
  return {threads, threads < kEnough ? kEnough / threads : 1, items};
}

// A CTA that works on columns of vectors, each thread down several tokens.
struct ColumnShape {
  int threads, tokens;  // beside each other
  int64_t tiles;        // CTAs that cover the vectors of a token
};

inline ColumnShape column_shape(int64_t vectors) {
  constexpr int kMost = 256;
  const int64_t tiles = ceil_div(vectors, kMost);
  const int threads = static_cast<int>(ceil_div(ceil_div(vectors, tiles), kWarp)) * kWarp;
  return {threads, kMost / threads, tiles};
}

}  // namespace rapid3rt::cuda
