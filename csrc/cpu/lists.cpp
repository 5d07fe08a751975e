// SPDX-License-Identifier: Apache-2.0
// build_block_lists: block means, their dot products, the best key blocks per query block,
// longest-first work order.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "ops.h"
#include "work_queue.h"

namespace rapid3rt {
namespace {

int64_t num_blocks(int64_t tokens, int64_t block) { return (tokens + block - 1) / block; }

// Which blocks touch a text token.
std::vector<char> text_blocks(const ListsParams& p, int64_t block) {
  std::vector<char> is_text(num_blocks(p.num_tokens, block), 0);
  for (int64_t b = 0; b < static_cast<int64_t>(is_text.size()); ++b) {
    const int64_t begin = b * block, end = std::min(begin + block, p.num_tokens);
    is_text[b] = p.text_len > 0 && begin < p.text_start + p.text_len && p.text_start < end;
  }
  return is_text;
}

// means[b, :]: mean over the tokens of block b.
template <class T>
void block_means(const T* x, int64_t token_stride, int64_t tokens, int64_t head_dim, int64_t block,
                 float* means) {
  for (int64_t b = 0; b < num_blocks(tokens, block); ++b) {
    const int64_t begin = b * block, end = std::min(begin + block, tokens);
    float* const mean = means + b * head_dim;
    std::fill_n(mean, head_dim, 0.0f);
    for (int64_t token = begin; token < end; ++token) {
      const T* const row = x + token * token_stride;
      for (int64_t d = 0; d < head_dim; ++d) mean[d] += to_float(row[d]);
    }
    const float count = static_cast<float>(end - begin);
    for (int64_t d = 0; d < head_dim; ++d) mean[d] /= count;
  }
}

// Marks the keep best image key blocks of one query block; ties take the lower index.
void mark_best(const std::vector<float>& score, const std::vector<int64_t>& image_keys,
               int64_t keep, std::vector<int64_t>& ranked, std::vector<char>& listed) {
  ranked = image_keys;
  std::partial_sort(ranked.begin(), ranked.begin() + keep, ranked.end(), [&](int64_t a, int64_t b) {
    return score[a] != score[b] ? score[a] > score[b] : a < b;
  });
  for (int64_t i = 0; i < keep; ++i) listed[ranked[i]] = 1;
}

template <class T>
void build(const ListsParams& p) {
  const int64_t num_q = num_blocks(p.num_tokens, p.block_q);
  const int64_t num_kv = num_blocks(p.num_tokens, p.block_kv);
  const std::vector<char> q_is_text = text_blocks(p, p.block_q);
  const std::vector<char> k_is_text = text_blocks(p, p.block_kv);
  std::vector<int64_t> image_keys;
  for (int64_t b = 0; b < num_kv; ++b) {
    if (!k_is_text[b]) image_keys.push_back(b);
  }
  const int64_t num_image = static_cast<int64_t>(image_keys.size());
  const int64_t items = p.num_rows * p.num_heads;
  const int64_t bytes = 2 * items * p.num_tokens * p.head_dim * static_cast<int64_t>(sizeof(T));
  run_queue(items, threads_for_bytes(bytes, p.num_threads), [&] {
    return [&, q_means = std::vector<float>(num_q * p.head_dim),
            k_means = std::vector<float>(num_kv * p.head_dim), score = std::vector<float>(num_kv),
            ranked = std::vector<int64_t>(),
            listed = std::vector<char>(num_kv)](int64_t item) mutable {
      const int64_t row = item / p.num_heads, head = item % p.num_heads;
      const int64_t keep = std::max<int64_t>(p.keep[row], 0);
      const bool dense = keep >= num_image;
      p.mode[item] = dense ? 0 : 1;
      if (!dense) {
        block_means(static_cast<const T*>(p.q) + row * p.q_strides.row + head * p.q_strides.head,
                    p.q_strides.token, p.num_tokens, p.head_dim, p.block_q, q_means.data());
        block_means(static_cast<const T*>(p.k) + row * p.k_strides.row + head * p.k_strides.head,
                    p.k_strides.token, p.num_tokens, p.head_dim, p.block_kv, k_means.data());
      }
      for (int64_t m = 0; m < num_q; ++m) {
        if (dense || q_is_text[m]) {
          std::fill(listed.begin(), listed.end(), 1);
        } else {
          listed = k_is_text;
          for (const int64_t b : image_keys) {
            float dot = 0.0f;
            for (int64_t d = 0; d < p.head_dim; ++d) {
              dot += q_means[m * p.head_dim + d] * k_means[b * p.head_dim + d];
            }
            // NaN would break the order of the sort.
            score[b] = std::isnan(dot) ? -std::numeric_limits<float>::infinity() : dot * p.scale;
          }
          mark_best(score, image_keys, keep, ranked, listed);
        }
        const int64_t at = item * num_q + m;
        int32_t* const index = p.index + at * num_kv;
        int32_t count = 0;
        for (int64_t b = 0; b < num_kv; ++b) {
          if (listed[b]) index[count++] = static_cast<int32_t>(b);
        }
        p.count[at] = count;
        int64_t rest = count;  // the other blocks follow, so that every element is written
        for (int64_t b = 0; b < num_kv; ++b) {
          if (!listed[b]) index[rest++] = static_cast<int32_t>(b);
        }
      }
    };
  });
  std::iota(p.order, p.order + items * num_q, 0);
  std::stable_sort(p.order, p.order + items * num_q,
                   [&](int32_t a, int32_t b) { return p.count[a] > p.count[b]; });
}

}  // namespace

void build_block_lists(const ListsParams& params) {
  with_type(params.dtype, [&](auto type) { build<decltype(type)>(params); });
}

}  // namespace rapid3rt
