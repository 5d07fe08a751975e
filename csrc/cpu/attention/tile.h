// SPDX-License-Identifier: Apache-2.0
// Attention of one tile: block_q queries of one head against a list of key blocks, online softmax
// in float. A unit that is compiled with the flags of an instruction set includes only what stands
// here: plain loops over raw pointers, no shared inline functions, so that nothing of it can leak
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
  void* out;            // at the first query
  int64_t out_token;
  float* lse;            // at the first query, or null
  const int32_t* index;  // key blocks in the order of visit, null: all
  int64_t num_listed;
  int64_t num_q, num_kv;  // queries of this tile, keys that may be read
  int64_t head_dim, block_q, block_kv;
  float scale;
  int dtype;
  float* scratch;  // tile_scratch_floats() floats
};

static inline int64_t round_up_8(int64_t n) { return (n + 7) / 8 * 8; }

// q, k, v and the output as float, the logits, and three numbers per query.
static inline int64_t tile_scratch_floats(int64_t head_dim, int64_t block_q, int64_t block_kv) {
  const int64_t padded = round_up_8(head_dim);
  return padded * (2 * block_q + 2 * block_kv) + block_q * block_kv + 3 * block_q;
}

void attention_tile_scalar(const Tile& tile);

}  // namespace rapid3rt
