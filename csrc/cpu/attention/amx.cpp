// SPDX-License-Identifier: Apache-2.0
// bfloat16 on AMX. Queries, logits and weights lie as on AVX-512 BF16; a panel's words are the
// right operand of a tile product as they are, and so are 16 keys of the caller the left one. Only
// values must be transposed, to [head_dim, keys]: once per key block, shared by all query blocks.
#include "attention/amx_tile.h"
#include "attention/dot512.h"

namespace rapid3rt {
namespace {

constexpr int64_t kSide = 16;  // rows of a tile, and words in a row

// sum tiles 0 to 3 [32, 32] += left[32, 16 words] right[16, 32 words]; the lower half of left may
// be missing.
inline void add_four_products(const void* left, int64_t left_stride, bool both, const Word* right,
                              int64_t width) {
  TILE_LOAD(6, right, width * 4);
  TILE_LOAD(7, right + kSide, width * 4);
  TILE_LOAD(4, left, left_stride);
  TILE_PRODUCT(0, 4, 6);
  TILE_PRODUCT(1, 4, 7);
  if (!both) return;
  TILE_LOAD(5, static_cast<const char*>(left) + kSide * left_stride, left_stride);
  TILE_PRODUCT(2, 5, 6);
  TILE_PRODUCT(3, 5, 7);
}

inline void zero_four() {
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
}

inline void load_four(const Word* from, int64_t width) {
  TILE_LOAD(0, from, width * 4);
  TILE_LOAD(1, from + kSide, width * 4);
  TILE_LOAD(2, from + kSide * width, width * 4);
  TILE_LOAD(3, from + kSide * width + kSide, width * 4);
}

inline void store_four(Word* to, bool both, int64_t width) {
  TILE_STORE(0, to, width * 4);
  TILE_STORE(1, to + kSide, width * 4);
  if (!both) return;
  TILE_STORE(2, to + kSide * width, width * 4);
  TILE_STORE(3, to + kSide * width + kSide, width * 4);
}

struct TileProducts : DotProducts {
  // Keys of a last, partial tile are copied and padded by repeating the last key.
  static void load_keys(const Plan& p, int64_t num_keys, int64_t dim) {
    const int64_t whole = num_keys / kSide * kSide;
    if (whole == num_keys) return;
    for (int64_t i = 0; i < kSide; ++i) {
      const char* const row = p.key_row[smaller(whole + i, num_keys - 1)];
      Word* const to = p.keys + i * (dim / 2);
      for (int64_t w = 0; w < dim / 2; w += kSide) V::store(to + w, load_words(row, w, kSide));
    }
    // The copies are addressed like keys, all 16 of them.
    for (int64_t i = 0; i < kSide; ++i) {
      p.key_row[whole + i] = reinterpret_cast<const char*>(p.keys + i * (dim / 2));
    }
  }

  static void load_values(const Plan&, int64_t, int64_t) {}

  static const char* value_row(const Tile& t, int64_t key) {
    const int64_t block = key / t.block_kv;
    return static_cast<const char*>(t.packed) + block * packed_bytes(t) +
           (key - block * t.block_kv) * 2;
  }

  static int64_t packed_bytes(const Tile& t) { return t.head_dim * t.block_kv * 2; }

  static void make_logits(const Plan& p, const Word* queries, int64_t num_keys, int64_t dim,
                          Vec (&top)[kVectors]) {
    constexpr int64_t kWidth = kVectors * kSide;
    for (int64_t key = 0; key < num_keys; key += kSide) {
      const char* const keys = p.key_row[key];
      const int64_t token = p.key_row[key + 1] - keys;
      // Two tiles of keys at once where the second follows at the same distance.
      const bool both = key + kSide < num_keys && p.key_row[key + kSide] == keys + kSide * token;
      for (int64_t col = 0; col < kWidth; col += 2 * kSide) {
        zero_four();
        for (int64_t w = 0; w < dim / 2; w += kSide) {
          add_four_products(keys + 4 * w, token, both, queries + w * kWidth + col, kWidth);
        }
        store_four(p.logits + key * kWidth + col, both, kWidth);
      }
      if (both) key += kSide;
    }
    for (int64_t key = 0; key < num_keys; ++key) {
      for (int c = 0; c < kVectors; ++c) {
        top[c] = V::max(top[c], V::load(p.logits + (key * kVectors + c) * V::kLanes));
      }
    }
  }

  static void add_values(const Plan& p, Word* output, int64_t pairs, int64_t dim, bool first,
                         const Vec (&decay)[kVectors]) {
    constexpr int64_t kWidth = kVectors * kSide;
    const int64_t padded = round_up(pairs, kSide);
    for (int64_t i = pairs * kVectors; i < padded * kVectors; ++i)
      V::store(p.logits + i * kSide, V::zero());
    for (int64_t i = 0; !first && i < dim; ++i) {
      for (int c = 0; c < kVectors; ++c) {
        Word* const at = output + (i * kVectors + c) * V::kLanes;
        V::store(at, V::mul(decay[c], V::load(at)));
      }
    }
    for (int64_t d = 0; d < dim; d += 2 * kSide) {
      for (int64_t col = 0; col < kWidth; col += 2 * kSide) {
        Word* const out = output + d * kWidth + col;
        first ? zero_four() : load_four(out, kWidth);
        for (int64_t pair = 0; pair < padded; pair += kSide) {
          const char* const values = p.value_row[2 * pair] + d * p.value_stride;
          add_four_products(values, p.value_stride, true, p.logits + pair * kWidth + col, kWidth);
        }
        store_four(out, true, kWidth);
      }
    }
  }
};

// One key block of values: [head_dim, block_kv], 0 for keys that may not be read.
void pack_values(const Tile& t, int64_t block, void* to) {
  using M = TileProducts;
  const int64_t pairs = t.block_kv / 2, token = t.v.token * 2;
  const char* const v = static_cast<const char*>(t.v.data);
  for (int64_t d = 0; d < t.head_dim; d += kSide) {
    for (int64_t pair = 0; pair < pairs; pair += kSide) {
      M::Vec words[kSide];
      for (int64_t i = 0; i < kSide; ++i) {
        const int64_t key = block * t.block_kv + 2 * (pair + i);
        const char* const even = key < t.num_kv ? v + key * token : nullptr;
        const char* const odd = key + 1 < t.num_kv ? v + (key + 1) * token : nullptr;
        words[i] = M::join(even, odd, d, kSide);
      }
      M::V::transpose(words);
      for (int64_t i = 0; i < kSide; ++i) {
        M::V::store(static_cast<Word*>(to) + (d + i) * pairs + pair, words[i]);
      }
    }
  }
}

void enter() {
  TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = 16;
  }
  TILE_CONFIGURE(config);
}

void leave() { TILE_RELEASE(); }

}  // namespace

const TileKernel kAmxTile = {
    run_any_dim<TileProducts>,  flash_scratch_bytes, 48000000, enter, leave,
    TileProducts::packed_bytes, pack_values};

}  // namespace rapid3rt
