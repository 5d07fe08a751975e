// SPDX-License-Identifier: Apache-2.0
// Which key blocks a query block sees: rules of build_block_lists, for host and device.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace rapid3rt::cuda {

// Blocks that touch a text token: [begin, end), empty without text. Text is one run of tokens, so
// its blocks are one run too.
struct TextBlocks {
  int64_t begin, end;

  R3_HOST_DEVICE bool holds(int64_t block) const { return begin <= block && block < end; }
  R3_HOST_DEVICE int64_t count() const { return end - begin; }
};

// As the reference: no tokens beyond `num_tokens`, whatever the span says.
R3_HOST_DEVICE TextBlocks text_blocks(int64_t num_tokens, int64_t block, int64_t text_start,
                                      int64_t text_len) {
  const int64_t first = text_start > 0 ? text_start : 0;
  const int64_t text_end = text_start + text_len;
  const int64_t last = text_end < num_tokens ? text_end : num_tokens;
  if (text_len <= 0 || first >= last) return {0, 0};
  return {first / block, (last - 1) / block + 1};
}

// Tokens of a block; the last one may be shorter.
R3_HOST_DEVICE int64_t block_tokens(int64_t num_tokens, int64_t block, int64_t index) {
  const int64_t left = num_tokens - index * block;
  return left < block ? left : block;
}

// An integer, above 0, that orders as scores do. NaN counts as the lowest score, -0 as 0.
R3_HOST_DEVICE uint32_t rank_key(float score) {
  if (score != score) return 0x007fffffu;  // -infinity
  const float value = score + 0.0f;
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The `keep`-th largest of keys above 0, of which there are at least `keep` > 0.
// at_least(key): how many are `key` or more. Bit by bit: 32 counts, whatever the number of keys.
template <class Count>
R3_HOST_DEVICE uint32_t keep_threshold(int64_t keep, const Count& at_least) {
  uint32_t threshold = 0;
  for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
    const uint32_t candidate = threshold | bit;
    if (at_least(candidate) >= keep) threshold = candidate;
  }
  return threshold;
}

// Where a block stands in its index row: listed ones ascending, then the others ascending.
// listed_before: listed blocks below this one.
R3_HOST_DEVICE int64_t list_position(int64_t block, bool listed, int64_t listed_before,
                                     int64_t count) {
  return listed ? listed_before : count + block - listed_before;
}

// Bins of the counting sort: longest lists first, within a length the ids of warp 0, then warp 1,
// and so on; warps hold ascending ranges of ids.
R3_HOST_DEVICE int64_t order_bin(int64_t count, int64_t num_kv, int warp, int warps) {
  return (num_kv - count) * warps + warp;
}

}  // namespace rapid3rt::cuda
