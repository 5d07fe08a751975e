// SPDX-License-Identifier: Apache-2.0
// Arithmetic of the memory-bound ops on pieces of rows, once per instruction set. All sets give the
// same bits: sums run in the same order and nothing is contracted. A unit that is compiled with the
// flags of an instruction set includes only what stands here: plain structs and declarations.
#pragma once

#include <stdint.h>

namespace rapid3rt {

// Elements that are worked on together; a row in scratch is padded to a multiple.
constexpr int64_t kLanes = 16;

// (norm(x) weight + bias) (1 + scale) + shift, norm over width. All [width]; weight and bias may be
// null.
struct Modulation {
  const void* scale;
  const void* shift;
  const void* weight;
  const void* bias;
  float eps;
  bool rms;
};

// out = embedded + sum of coef[i] * terms[i] over `count` elements, and with modulation of each
// `width` of them. `stream`: stores go past the caches, every token of out starts at a multiple of
// 64 bytes.
struct LookupPiece {
  void* out;
  const void* embedded;
  const void* const* terms;
  const float* coef;
  int64_t num_terms, count, width;
  const Modulation* modulation;  // null: none
  float* scratch;  // width rounded up to kLanes, at a multiple of 64 bytes; with modulation
  bool stream;
  int dtype;
};

struct GatePiece {
  void* out;             // [tokens, width]
  const void* residual;  // [tokens, width]
  const void* gate;      // [width]
  const void* y;         // [tokens, width]
  int64_t tokens, width;
  bool stream;
  int dtype;
};

// One token: entries [num_orders, width], `order_stride` elements apart.
struct StorePiece {
  const void* out;
  const void* embedded;
  void* entries;
  int64_t num_orders, order_stride, width;
  float gap;       // 0: the entries are not read
  float* scratch;  // as in LookupPiece
  bool stream;     // only where gap is 0
  int dtype;
};

// Of the residual r: sum of r / width, sum of (r - mean)^2, sum of |r - old r|, sum of |old r|.
struct TokenStats {
  float mean, spread, change, old_size;
};

struct BlockMean {
  float* mean;    // [head_dim]
  const void* x;  // [tokens, head_dim], `stride` elements apart
  int64_t stride, tokens, head_dim;
  int dtype;
};

struct RowKernels {
  void (*lookup)(const LookupPiece& piece);
  void (*gate)(const GatePiece& piece);
  TokenStats (*store)(const StorePiece& piece);
  void (*block_mean)(const BlockMean& piece);
  // scores[b] = sum over d of query[d] * keys[d * num_blocks + b]; num_blocks a multiple of 16.
  void (*scores)(const float* query, const float* keys, int64_t head_dim, int64_t num_blocks,
                 float* scores);
  // Past the caches. `out` and `bytes` are multiples of 64.
  void (*copy)(void* out, const void* x, int64_t bytes);
};

extern const RowKernels kScalarRows;
extern const RowKernels kAvx2Rows;
extern const RowKernels kAvx512Rows;
extern const RowKernels kAvx512Bf16Rows;

}  // namespace rapid3rt
