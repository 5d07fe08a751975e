// SPDX-License-Identifier: Apache-2.0
// build_block_lists: its rules against brute force, and its kernels on emulated CTAs against the
// CPU twin, bit for bit. Unread blocks and all outputs hold poison.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <random>
#include <vector>

#include "../cpu/ops.h"
#include "../cuda/block_choice.h"
#include "../cuda/ops.h"
#include "check.h"
#include "cuda_buffers.h"
#include "cuda_runtime.h"

namespace rapid3rt {
namespace {

using cuda::TextBlocks;

void text_blocks_are_those_that_touch_text() {
  for (int64_t tokens = 0; tokens <= 13; ++tokens) {
    for (int64_t start = 0; start <= 15; ++start) {
      for (int64_t length = 0; length <= 15; ++length) {
        for (const int64_t block : {1, 3, 4}) {
          const TextBlocks text = cuda::text_blocks(tokens, block, start, length);
          int64_t count = 0;
          for (int64_t b = 0; b * block < tokens; ++b) {
            bool touches = false;
            for (int64_t t = b * block; t < std::min((b + 1) * block, tokens); ++t) {
              touches |= start <= t && t < start + length;
            }
            count += touches;
            CHECK(text.holds(b) == touches, "tokens %d text %d + %d block %d of %d", int(tokens),
                  int(start), int(length), int(b), int(block));
          }
          CHECK(text.count() == count, "%d text blocks", int(text.count()));
        }
      }
    }
  }
}

void rank_keys_order_as_scores_do() {
  const float inf = INFINITY;
  const std::vector<float> rising = {-inf, -1e30f, -1.0f, -1e-40f, 0.0f, 1e-40f, 2.0f, 1e30f, inf};
  for (size_t i = 1; i < rising.size(); ++i) {
    CHECK(cuda::rank_key(rising[i - 1]) < cuda::rank_key(rising[i]), "%g", rising[i]);
  }
  CHECK(cuda::rank_key(-0.0f) == cuda::rank_key(0.0f), "zeros");
  CHECK(cuda::rank_key(NAN) == cuda::rank_key(-inf), "NaN");
  CHECK(cuda::rank_key(-NAN) == cuda::rank_key(-inf) && cuda::rank_key(-inf) > 0, "NaN");
}

void thresholds_are_the_kept_largest() {
  std::mt19937 g(1);
  for (int round = 0; round < 200; ++round) {
    std::vector<uint32_t> keys(1 + g() % 60);
    for (uint32_t& key : keys) key = round % 2 ? 1 + g() % 5 : g() | 1;
    std::vector<uint32_t> sorted = keys;
    std::sort(sorted.rbegin(), sorted.rend());
    for (size_t keep = 1; keep <= keys.size(); ++keep) {
      const auto at_least = [&](uint32_t limit) {
        return static_cast<int64_t>(
            std::count_if(keys.begin(), keys.end(), [&](uint32_t key) { return key >= limit; }));
      };
      const uint32_t got = cuda::keep_threshold(static_cast<int64_t>(keep), at_least);
      CHECK(got == sorted[keep - 1], "%u, not %u", got, sorted[keep - 1]);
    }
  }
}

void listed_blocks_stand_first_and_ascending() {
  for (unsigned listed = 0; listed < 64; ++listed) {
    std::vector<int64_t> index(6, -1), want;
    const int count = __builtin_popcount(listed);
    for (int b = 0; b < 6; ++b) {
      const int before = __builtin_popcount(listed & ((1u << b) - 1));
      index[cuda::list_position(b, listed >> b & 1, before, count)] = b;
    }
    for (const unsigned in_list : {1u, 0u}) {
      for (int b = 0; b < 6; ++b) {
        if ((listed >> b & 1) == in_list) want.push_back(b);
      }
    }
    CHECK(index == want, "listed %x", listed);
  }
}

void bins_go_from_long_to_short_and_from_warp_to_warp() {
  int64_t bin = 0;
  for (int64_t count = 9; count >= 0; --count) {
    for (int warp = 0; warp < 8; ++warp, ++bin) {
      CHECK(cuda::order_bin(count, 9, warp, 8) == bin, "count %d", int(count));
    }
  }
}

struct Case {
  int64_t rows, heads, tokens, head_dim, text_start, text_len, block_q, block_kv;
  std::vector<int32_t> keep;
  DType dtype = DType::kFloat32;
  int skip = 0;
  bool is_packed = false;  // [R, N, H, K] instead of [R, H, N, K]
  bool has_ties = false;
  float scale = 0.3f;

  int64_t num_q() const { return (tokens + block_q - 1) / block_q; }
  int64_t num_kv() const { return (tokens + block_kv - 1) / block_kv; }
  Strides strides() const {
    if (is_packed) return {tokens * heads * head_dim, head_dim, heads * head_dim};
    return {heads * tokens * head_dim, tokens * head_dim, head_dim};
  }
};

struct Lists {
  std::vector<uint8_t> mode;
  std::vector<int32_t> count, index, order;

  bool operator==(const Lists& other) const {
    return mode == other.mode && count == other.count && index == other.index &&
           order == other.order;
  }
};

template <class Build>
Lists lists_of(const Case& c, const Buffer& q, const Buffer& k, Build build) {
  const int64_t heads = c.rows * c.heads, items = heads * c.num_q();
  Lists lists{std::vector<uint8_t>(heads, 77), std::vector<int32_t>(items, -7),
              std::vector<int32_t>(items * c.num_kv(), -7), std::vector<int32_t>(items, -7)};
  build(ListsParams{lists.mode.data(),
                    lists.count.data(),
                    lists.index.data(),
                    lists.order.data(),
                    q.data(),
                    k.data(),
                    c.keep.data(),
                    c.strides(),
                    c.strides(),
                    c.rows,
                    c.heads,
                    c.tokens,
                    c.head_dim,
                    c.text_start,
                    c.text_len,
                    c.block_q,
                    c.block_kv,
                    c.scale,
                    c.dtype,
                    1});
  return lists;
}

void on_emulated_ctas(const ListsParams& p) {
  const Memory workspace = make_memory(cuda::lists_workspace_bytes(p));
  cuda::build_block_lists(p, workspace.get(), {0, nullptr});
}

// Few values, so that scores tie.
void make_ties(const Case& c, Buffer& x) {
  for (int64_t i = 0; i < c.rows * c.heads * c.tokens * c.head_dim; ++i) {
    x.set(i, static_cast<float>(static_cast<int>(x.value(i) * 64) % 2));
  }
}

void lists_match_their_twin(const Case& c) {
  const int64_t size = c.rows * c.heads * c.tokens * c.head_dim;
  Buffer q(size, c, 5), k(size, c, 6);
  if (c.has_ties) make_ties(c, q), make_ties(c, k);
  const Lists want = lists_of(c, q, k, [](const ListsParams& p) { build_block_lists(p); });
  using emulated::Order;
  for (const Order order : {Order::kAscending, Order::kDescending, Order::kShuffled}) {
    emulated::set_order(order);
    const Lists got = lists_of(c, q, k, on_emulated_ctas);
    CHECK(got.mode == want.mode && got.count == want.count, "%d tokens, block %d: counts",
          int(c.tokens), int(c.block_kv));
    CHECK(got.index == want.index, "%d tokens, block %d: index", int(c.tokens), int(c.block_kv));
    CHECK(got.order == want.order, "%d tokens, block %d: order", int(c.tokens), int(c.block_kv));
  }
}

// Text blocks as keys and queries and rows that keep all need no scores.
void what_needs_no_score_is_not_read() {
  Case c{2, 1, 8 * 32, 16, 3 * 32, 40, 32, 32, {99, 2}};
  Buffer q(c.rows * c.tokens * c.head_dim, c, 5), k(c.rows * c.tokens * c.head_dim, c, 6);
  const Lists want = lists_of(c, q, k, on_emulated_ctas);
  q.poison(0, c.tokens * c.head_dim);
  k.poison(0, c.tokens * c.head_dim);
  for (Buffer* x : {&q, &k}) x->poison((8 + 3) * 32 * c.head_dim, 2 * 32 * c.head_dim);
  CHECK(lists_of(c, q, k, on_emulated_ctas) == want, "poison was read");
}

void values_that_are_no_numbers_have_a_place() {
  Case c{1, 1, 6 * 32, 16, 0, 0, 32, 32, {3}};
  Buffer q(c.tokens * c.head_dim, c, 1), k(c.tokens * c.head_dim, c, 1);
  for (int64_t i = 0; i < c.tokens * c.head_dim; ++i) q.set(i, 1.0f), k.set(i, 0.0f);
  k.set(5, NAN);
  k.set(3 * 32 * 16, INFINITY);
  k.set(4 * 32 * 16, -INFINITY);
  for (const int32_t keep : {1, 3, 4, 5}) {
    c.keep = {keep};
    const Lists want = lists_of(c, q, k, [](const ListsParams& p) { build_block_lists(p); });
    CHECK(lists_of(c, q, k, on_emulated_ctas) == want, "keep %d", keep);
  }
}

void random_geometries_match() {
  std::mt19937 g(3);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(g() % n); };
  for (int round = 0; round < 60; ++round) {
    Case c{1 + below(3),
           1 + below(3),
           1 + below(400),
           1 + below(20),
           0,
           0,
           1 << (3 + below(4)),
           1 << (3 + below(4)),
           {}};
    c.text_start = below(c.tokens + 1);
    c.text_len = below(c.tokens - c.text_start + 1);
    for (int64_t r = 0; r < c.rows; ++r) c.keep.push_back(int32_t(below(c.num_kv() + 2)) - 1);
    c.dtype = static_cast<DType>(below(3));
    c.skip = int(below(2));
    c.is_packed = below(2);
    c.has_ties = below(2);
    c.scale = static_cast<float>(below(3) - 1) * 0.25f;
    lists_match_their_twin(c);
  }
}

}  // namespace
}  // namespace rapid3rt

int main() {
  using namespace rapid3rt;
  text_blocks_are_those_that_touch_text();
  rank_keys_order_as_scores_do();
  thresholds_are_the_kept_largest();
  listed_blocks_stand_first_and_ascending();
  bins_go_from_long_to_short_and_from_warp_to_warp();
  what_needs_no_score_is_not_read();
  values_that_are_no_numbers_have_a_place();
  random_geometries_match();
  constexpr DType kBf16 = DType::kBFloat16;
  lists_match_their_twin({2, 2, 1100, 64, 1000, 100, 32, 32, {4, -3}, kBf16, 0, true});
  lists_match_their_twin({1, 2, 700, 40, 0, 65, 64, 64, {2}, DType::kFloat16, 0, true});
  // Key blocks of more than two a lane; more than registers hold; more than shared bins hold.
  lists_match_their_twin({1, 2, 4 * 100, 8, 390, 10, 64, 4, {17}, kBf16, 0, false, true});
  lists_match_their_twin({1, 1, 4 * 256, 4, 0, 0, 128, 4, {200}});
  lists_match_their_twin({1, 1, 3 * 257 - 1, 4, 5, 9, 100, 3, {100}, kBf16});
  lists_match_their_twin({1, 2, 2 * 530, 4, 1000, 20, 200, 2, {60}, kBf16, 1, false, true});
  std::puts("cuda lists: ok");
  return 0;
}
