// SPDX-License-Identifier: Apache-2.0
// build_block_lists: block means, their dot products, the best key blocks per query block,
// longest-first work order.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "ops.h"
#include "rowwise/choose.h"
#include "work_queue.h"

namespace rapid3rt {
namespace {

// Which blocks touch a text token.
std::vector<char> text_blocks(const ListsParams& p, int64_t block) {
  std::vector<char> is_text(ceil_div(p.num_tokens, block), 0);
  for (int64_t b = 0; b < static_cast<int64_t>(is_text.size()); ++b) {
    const int64_t begin = b * block, end = std::min(begin + block, p.num_tokens);
    is_text[b] = p.text_len > 0 && begin < p.text_start + p.text_len && p.text_start < end;
  }
  return is_text;
}

// Means over the tokens of each block of one head: [blocks, head_dim].
void block_means(const RowKernels& kernels, const char* x, int64_t token_stride, int64_t block,
                 const ListsParams& p, float* means) {
  for (int64_t begin = 0; begin < p.num_tokens; begin += block) {
    BlockMean piece{};
    piece.mean = means + begin / block * p.head_dim;
    piece.x = element(static_cast<const void*>(x), begin * token_stride, p.dtype);
    piece.stride = token_stride;
    piece.tokens = std::min(block, p.num_tokens - begin);
    piece.head_dim = p.head_dim;
    piece.dtype = static_cast<int>(p.dtype);
    kernels.block_mean(piece);
  }
}

// An integer that orders as (score, lower index first) does. NaN counts as the lowest score, -0 as
// 0.
uint64_t rank_key(float score, int64_t block) {
  if (std::isnan(score)) score = -std::numeric_limits<float>::infinity();
  const uint32_t bits = as_bits(score + 0.0f);
  const uint32_t ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ascending) << 32 | (0xffffffffu - static_cast<uint32_t>(block));
}

// Chooses the key blocks of one head after another; owns a worker's memory.
class Chooser {
 public:
  explicit Chooser(const ListsParams& p)
      : p_(p),
        kernels_(row_kernels()),
        num_q_(ceil_div(p.num_tokens, p.block_q)),
        num_kv_(ceil_div(p.num_tokens, p.block_kv)),
        padded_kv_(ceil_div(num_kv_, kLanes) * kLanes),
        q_is_text_(text_blocks(p, p.block_q)),
        k_is_text_(text_blocks(p, p.block_kv)),
        q_means_(num_q_ * p.head_dim),
        k_means_(num_kv_ * p.head_dim),
        keys_(p.head_dim * padded_kv_),
        scores_(padded_kv_) {
    for (int64_t b = 0; b < num_kv_; ++b) {
      if (!k_is_text_[b]) image_keys_.push_back(b);
    }
  }

  void choose(int64_t item) {
    const int64_t row = item / p_.num_heads, head = item % p_.num_heads;
    const bool dense = p_.keep[row] >= static_cast<int64_t>(image_keys_.size());
    const int64_t keep = std::max<int64_t>(p_.keep[row], 0);
    p_.mode[item] = dense ? 0 : 1;
    if (!dense) read_means(row, head);
    for (int64_t m = 0; m < num_q_; ++m) {
      if (dense || q_is_text_[m]) {
        listed_.assign(num_kv_, 1);
      } else {
        listed_ = k_is_text_;
        mark_best(m, keep);
      }
      write_list(item * num_q_ + m);
    }
  }

 private:
  void read_means(int64_t row, int64_t head) {
    const int64_t q_at = row * p_.q_strides.row + head * p_.q_strides.head;
    const int64_t k_at = row * p_.k_strides.row + head * p_.k_strides.head;
    block_means(kernels_, element(p_.q, q_at, p_.dtype), p_.q_strides.token, p_.block_q, p_,
                q_means_.data());
    block_means(kernels_, element(p_.k, k_at, p_.dtype), p_.k_strides.token, p_.block_kv, p_,
                k_means_.data());
    // Transposed, so that a vector holds the scores of several blocks.
    for (int64_t b = 0; b < num_kv_; ++b) {
      for (int64_t d = 0; d < p_.head_dim; ++d) {
        keys_.data()[d * padded_kv_ + b] = k_means_.data()[b * p_.head_dim + d];
      }
    }
  }

  // Ties take the lower index.
  void mark_best(int64_t query_block, int64_t keep) {
    kernels_.scores(q_means_.data() + query_block * p_.head_dim, keys_.data(), p_.head_dim,
                    padded_kv_, scores_.data());
    ranked_.clear();
    for (const int64_t b : image_keys_) {
      ranked_.push_back(rank_key(scores_.data()[b] * p_.scale, b));
    }
    std::nth_element(ranked_.begin(), ranked_.begin() + keep, ranked_.end(), std::greater<>());
    for (int64_t i = 0; i < keep; ++i) {
      listed_[0xffffffffu - static_cast<uint32_t>(ranked_[i])] = 1;
    }
  }

  // The listed blocks ascending, then the others, so that every element is written.
  void write_list(int64_t at) {
    int32_t* const index = p_.index + at * num_kv_;
    const auto count = static_cast<int32_t>(std::count(listed_.begin(), listed_.end(), 1));
    p_.count[at] = count;
    int64_t front = 0, rest = count;
    for (int64_t b = 0; b < num_kv_; ++b) {
      index[listed_[b] ? front++ : rest++] = static_cast<int32_t>(b);
    }
  }

  const ListsParams& p_;
  const RowKernels& kernels_;
  const int64_t num_q_, num_kv_, padded_kv_;
  const std::vector<char> q_is_text_, k_is_text_;
  Scratch q_means_, k_means_;  // [blocks, head_dim]
  Scratch keys_;               // [head_dim, padded_kv], zeros in the padding
  Scratch scores_;             // [padded_kv]
  std::vector<int64_t> image_keys_;
  std::vector<uint64_t> ranked_;
  std::vector<char> listed_;
};

// Work ids by falling count, ties by id: counting sort, since counts are small.
void write_order(const ListsParams& p, int64_t num_items, int64_t num_kv) {
  std::vector<int64_t> begin(num_kv + 2, 0);  // begin[c + 1]: where ids of count c go
  for (int64_t id = 0; id < num_items; ++id) ++begin[p.count[id]];
  for (int64_t c = num_kv; c >= 0; --c) begin[c] += begin[c + 1];
  for (int64_t id = 0; id < num_items; ++id) {
    p.order[begin[p.count[id] + 1]++] = static_cast<int32_t>(id);
  }
}

}  // namespace

void build_block_lists(const ListsParams& p) {
  const int64_t num_heads = p.num_rows * p.num_heads;
  const int64_t bytes = 2 * num_heads * p.num_tokens * p.head_dim * element_bytes(p.dtype);
  run_queue(num_heads, threads_for_bytes(bytes, p.num_threads),
            [&] { return [chooser = Chooser(p)](int64_t item) mutable { chooser.choose(item); }; });
  const int64_t num_kv = ceil_div(p.num_tokens, p.block_kv);
  write_order(p, num_heads * ceil_div(p.num_tokens, p.block_q), num_kv);
}

}  // namespace rapid3rt
