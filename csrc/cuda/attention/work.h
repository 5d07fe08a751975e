// SPDX-License-Identifier: Apache-2.0
// What a CTA works on: which tile a work id is, and which keys that tile reads, as steps of 64.
// Index logic alone: device code and CPU tests compile the same lines.
//
// A call is num_items tiles, one per (row, head, query block); a tile's id counts them in that
// order. Lists on a device are never read by the host, so nothing here trusts them: whatever stands
// in mode, order, count, index and kv_len, no key outside [0, kv_len) is addressed; a debug build
// stops at what is out of range. A list that is not given is empty.
#pragma once

#include <cassert>
#include <cstdint>

#include "../host_device.h"
#include "rapid3rt/params.h"

namespace rapid3rt::cuda {

constexpr int kStepKeys = 64;  // keys between two updates of the running maximum: half a 128-block

enum class Mode : uint8_t { kDense = 0, kList = 1, kSkip = 2 };

// A call as kernels take it: its parameters, and what follows from them.
struct AttentionCall {
  AttentionParams params;
  uint32_t num_items;  // at most INT32_MAX
  uint32_t num_q;      // query blocks of a head
  uint32_t* counter;   // tiles taken after each CTA's first; null: a constant stride
  float scale;         // > 0: turns a logit into units of log2
  bool is_negative;    // the scale's sign: logits change theirs before anything else
};

R3_HOST_DEVICE int64_t ceil_div(int64_t n, int64_t step) { return (n + step - 1) / step; }

// The smallest normal float stands for a scale of 0: -inf * 0 is NaN, and what is masked is -inf.
// The stride of a single token may be any number, and rows behind it are addressed, though not
// read.
R3_HOST_DEVICE AttentionCall make_call(AttentionParams p, uint32_t* counter) {
  if (p.len_q == 1) p.q_strides.token = 0;
  if (p.len_kv == 1) p.k_strides.token = p.v_strides.token = 0;
  constexpr float kLog2E = 1.44269504f, kSmallest = 1.17549435e-38f;
  const int64_t num_q = ceil_div(p.len_q, p.block_q);
  const float scale = (p.scale < 0 ? -p.scale : p.scale) * kLog2E;
  return {p,
          static_cast<uint32_t>(p.num_rows * p.num_heads * num_q),
          static_cast<uint32_t>(num_q),
          counter,
          scale < kSmallest ? kSmallest : scale,  // NaN stays
          p.scale < 0};
}

struct Work {
  int32_t row, head, first_query, num_queries;
  Mode mode;
};

// The tile at a place of the order of work. An id out of range becomes the skipped tile 0.
R3_HOST_DEVICE Work work_at(const AttentionCall& call, uint32_t position) {
  const AttentionParams& p = call.params;
  const uint32_t id = p.order == nullptr ? position : static_cast<uint32_t>(p.order[position]);
  assert(id < call.num_items);
  if (id >= call.num_items) return {0, 0, 0, 0, Mode::kSkip};
  const uint32_t head_id = id / call.num_q, num_heads = static_cast<uint32_t>(p.num_heads);
  const int32_t first = static_cast<int32_t>((id - head_id * call.num_q) * p.block_q);
  const int32_t left = static_cast<int32_t>(p.len_q) - first;
  Mode mode = static_cast<Mode>(p.mode[head_id]);
  // The functional form's output is uninitialised: it must not stay so, whatever the mode says.
  if (mode == Mode::kSkip && !p.allow_skip) mode = Mode::kDense;
  return {static_cast<int32_t>(head_id / num_heads), static_cast<int32_t>(head_id % num_heads),
          first, left < p.block_q ? left : static_cast<int32_t>(p.block_q), mode};
}

// Where a CTA goes on: `ticket` is what its atomic increment of the counter returned.
R3_HOST_DEVICE uint32_t next_position(uint32_t position, uint32_t num_ctas, bool is_queue,
                                      uint32_t ticket) {
  return (is_queue ? ticket : position) + num_ctas;
}

R3_HOST_DEVICE int64_t offset_of(const Strides& s, int64_t row, int64_t head, int64_t token) {
  return row * s.row + head * s.head + token * s.token;
}

// Consecutive keys; none: the walk is over.
struct Step {
  int32_t first, num_keys;
};

// The keys of a tile in the order of its list: blocks of kBlock keys in steps of 64, those beyond
// kv_len left out. An entry is read one step before it is needed, so that no load waits for it.
template <int kBlock>
class KeyWalk {
 public:
  R3_HOST_DEVICE KeyWalk(const AttentionParams& p, const Work& w) {
    const int32_t len_kv = static_cast<int32_t>(p.len_kv);
    num_keys_ = p.kv_len == nullptr ? len_kv : clamp(p.kv_len[w.row], len_kv);
    num_blocks_ = static_cast<int32_t>(ceil_div(num_keys_, kBlock));
    num_listed_ = num_blocks_;
    if (w.mode == Mode::kList) {
      num_listed_ = 0;
      if (p.index != nullptr) {
        const int64_t block = w.first_query / kBlock;
        list_ = p.index + offset_of(p.index_strides, w.row, w.head, block);
        num_listed_ = clamp(p.count[w.row * p.count_row + w.head * p.count_head + block],
                            static_cast<int32_t>(p.list_len));
#ifndef NDEBUG
        for (int32_t i = 0; i < num_listed_; ++i) {
          assert(list_[i] >= 0 && list_[i] < ceil_div(len_kv, kBlock));
        }
#endif
      }
    }
    read_ahead();
  }

  R3_HOST_DEVICE Step next() {
    while (listed_ < num_listed_) {
      const uint32_t block = block_;
      const int part = part_;
      advance();
      if (block >= static_cast<uint32_t>(num_blocks_)) continue;  // beyond kv_len, or no block
      const int32_t first = static_cast<int32_t>(block) * kBlock + part * kStepKeys;
      const int32_t left = num_keys_ - first;
      if (left > 0) return {first, left < kStepKeys ? left : kStepKeys};
    }
    return {0, 0};
  }

 private:
  static_assert(kBlock % kStepKeys == 0, "a block is walked in whole steps");

  static R3_HOST_DEVICE int32_t clamp(int32_t n, int32_t most) {
    assert(n >= 0 && n <= most);
    return n < 0 ? 0 : n < most ? n : most;
  }

  R3_HOST_DEVICE void advance() {
    part_ = (part_ + 1) % (kBlock / kStepKeys);
    if (part_ != 0) return;
    ++listed_;
    read_ahead();
  }

  R3_HOST_DEVICE void read_ahead() {
    if (listed_ < num_listed_) {
      block_ = static_cast<uint32_t>(list_ == nullptr ? listed_ : list_[listed_]);
    }
  }

  const int32_t* list_ = nullptr;  // null: all blocks
  int32_t num_keys_, num_blocks_, num_listed_;
  int32_t listed_ = 0, part_ = 0;
  uint32_t block_ = 0;
};

}  // namespace rapid3rt::cuda
