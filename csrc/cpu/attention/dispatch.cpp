// SPDX-License-Identifier: Apache-2.0
// block_sparse_attention: checks lists, makes one tile per (row, head, query block), runs them
// longest first.
#include <algorithm>
#include <limits>
#include <vector>

#include "attention/tile.h"
#include "ops.h"
#include "work_queue.h"

namespace rapid3rt {
namespace {

enum Mode : uint8_t { kDense = 0, kList = 1, kSkip = 2 };

const int32_t* list_of(const AttentionParams& p, int64_t row, int64_t head, int64_t block) {
  return p.index + row * p.index_strides.row + head * p.index_strides.head +
         block * p.index_strides.token;
}

int32_t count_of(const AttentionParams& p, int64_t row, int64_t head, int64_t block) {
  return p.count[row * p.count_row + head * p.count_head + block];
}

void check_lists(const AttentionParams& p, int64_t num_q, int64_t num_kv) {
  for (int64_t row = 0; row < p.num_rows; ++row) {
    if (p.kv_len != nullptr) {
      R3_CHECK(p.kv_len[row] >= 0 && p.kv_len[row] <= p.len_kv, "kv_len must be in [0, ", p.len_kv,
               "], got ", p.kv_len[row], " for row ", row);
    }
    for (int64_t head = 0; head < p.num_heads; ++head) {
      const int mode = p.mode[row * p.num_heads + head];
      R3_CHECK(mode <= kSkip, "mode must be 0, 1 or 2, got ", mode, " for row ", row, ", head ",
               head);
      R3_CHECK(mode != kSkip || p.allow_skip,
               "mode must be 0 or 1 in the functional form, got 2 (skip) for row ", row, ", head ",
               head, "; use block_sparse_attention_");
      if (mode != kList) continue;
      R3_CHECK(p.count != nullptr && p.index != nullptr,
               "count and index must be given where a mode is 1, got none for row ", row, ", head ",
               head);
      for (int64_t block = 0; block < num_q; ++block) {
        const int32_t count = count_of(p, row, head, block);
        R3_CHECK(count >= 0 && count <= p.list_len, "count must be in [0, ", p.list_len, "], got ",
                 count, " for row ", row, ", head ", head, ", query block ", block);
        const int32_t* const index = list_of(p, row, head, block);
        for (int32_t i = 0; i < count; ++i) {
          R3_CHECK(index[i] >= 0 && index[i] < num_kv && (i == 0 || index[i] > index[i - 1]),
                   "index must be ascending in [0, ", num_kv, "), got ", index[i], " for row ", row,
                   ", head ", head, ", query block ", block);
        }
      }
    }
  }
}

Tile make_tile(const AttentionParams& p, int64_t item, int64_t num_q, int64_t num_kv,
               int64_t element) {
  const int64_t row = item / (p.num_heads * num_q), head = item / num_q % p.num_heads;
  const int64_t block = item % num_q, first = block * p.block_q;
  const auto at = [&](const void* base, const Strides& s, int64_t token) {
    return static_cast<const char*>(base) +
           (row * s.row + head * s.head + token * s.token) * element;
  };
  Tile tile{};
  tile.q = {at(p.q, p.q_strides, first), p.q_strides.token};
  tile.k = {at(p.k, p.k_strides, 0), p.k_strides.token};
  tile.v = {at(p.v, p.v_strides, 0), p.v_strides.token};
  tile.out = const_cast<char*>(at(p.out, p.out_strides, first));
  tile.out_token = p.out_strides.token;
  tile.lse = p.lse == nullptr ? nullptr : p.lse + (row * p.num_heads + head) * p.len_q + first;
  tile.num_listed = num_kv;
  if (p.mode[row * p.num_heads + head] == kList) {
    tile.index = list_of(p, row, head, block);
    tile.num_listed = count_of(p, row, head, block);
  }
  tile.num_q = std::min(p.block_q, p.len_q - first);
  tile.num_kv = p.kv_len == nullptr ? p.len_kv : p.kv_len[row];
  tile.head_dim = p.head_dim;
  tile.block_q = p.block_q;
  tile.block_kv = p.block_kv;
  tile.scale = p.scale;
  tile.dtype = static_cast<int>(p.dtype);
  return tile;
}

}  // namespace

void block_sparse_attention(const AttentionParams& p) {
  const int64_t num_q = (p.len_q + p.block_q - 1) / p.block_q;
  const int64_t num_kv = (p.len_kv + p.block_kv - 1) / p.block_kv;
  const int64_t items = p.num_rows * p.num_heads * num_q;
  const int64_t element = p.dtype == DType::kFloat32 ? 4 : 2;
  R3_CHECK(items <= std::numeric_limits<int32_t>::max(),
           "rows * heads * query blocks must fit int32, got ", items);
  check_lists(p, num_q, num_kv);
  if (p.order != nullptr) check_ids("order", p.order, items, items, true);
  // A tile of 32 x 32 keys alone is some microseconds: only the smallest calls stay on the caller.
  const int64_t flops = 4 * p.num_rows * p.num_heads * p.len_q * p.len_kv * p.head_dim;
  const int num_threads = flops < 1000000 ? 1 : p.num_threads;
  run_queue(items, num_threads, [&] {
    const int64_t floats = tile_scratch_floats(p.head_dim, p.block_q, p.block_kv);
    return [&, scratch = std::vector<float>(floats)](int64_t i) mutable {
      const int64_t item = p.order == nullptr ? i : p.order[i];
      if (p.mode[item / num_q] == kSkip) return;
      Tile tile = make_tile(p, item, num_q, num_kv, element);
      tile.scratch = scratch.data();
      attention_tile_scalar(tile);
    };
  });
}

}  // namespace rapid3rt
