// SPDX-License-Identifier: Apache-2.0
// Attention of one tile: block_q queries of one head against a list of key blocks, online softmax
// in float. A unit that is compiled with the flags of an instruction set includes only what stands
// here: plain structs and declarations, no shared inline functions, so that nothing of it can leak
// into the units of the base build.
#pragma once

#include <stdint.h>

namespace rapid3rt {

// Element (i, d) of a block lies at data + i * token + d; dtype numbers as in DType.
struct TileOperand {
  const void* data;
  int64_t token;
};

struct Tile {
  TileOperand q, k, v;  // q at its first query, k and v at key 0 of the head
  const void* packed;   // of the head as pack() wrote it, block after block; or null
  void* out;            // at the first query
  int64_t out_token;
  float* row_max;        // [block_q], written: largest scaled logit, -inf without keys
  float* row_sum;        // [block_q], written: sum of exp(logit - row_max)
  bool lse;              // whether the caller reads these two
  const int32_t* index;  // key blocks in the order of visit, null: all
  int64_t num_listed;
  int64_t num_q, num_kv;  // queries of this tile, keys that may be read
  int64_t head_dim, block_q, block_kv;
  float scale;
  int dtype;
  void* scratch;  // scratch_bytes() bytes at a multiple of 64
};

// One way to compute a tile.
struct TileKernel {
  void (*run)(const Tile& tile);
  int64_t (*scratch_bytes)(const Tile& tile);  // head_dim, block_q, block_kv and dtype are given
  int64_t serial_flops;                        // a call of fewer takes less than about 100 us
  void (*enter)();                             // each worker, before its first tile; may be null
  void (*leave)();                             // each worker, after its last tile; may be null
  // Where keys and values must be rearranged for the kernel: bytes of a key block, a multiple of
  // 64, and the rearrangement, done once for each block that some tile will visit, to a multiple
  // of 64. Null where they are used as they are.
  int64_t (*packed_bytes)(const Tile& tile);
  void (*pack)(const Tile& tile, int64_t block, void* to);
};

// Of the instruction sets that the build has; head dim: any for scalar, else a multiple of 8.
extern const TileKernel kScalarTile;
extern const TileKernel kAvx2Tile;
extern const TileKernel kAvx512Tile;
extern const TileKernel kAvx512Bf16Tile;  // bfloat16
extern const TileKernel kAmxTile;         // bfloat16, head dim a multiple of 32

}  // namespace rapid3rt
