// SPDX-License-Identifier: Apache-2.0
// bfloat16 on AMX. Transposed as on vector units: logits [keys, queries] = keys queries^T, output
// [head_dim, queries] += values^T weights. A unit is 32 by 32 sums in four tile registers. Keys and
// values are rearranged once per key block, for all query blocks, to lie in the order in which
// tiles are loaded: rows a caller's stride apart would share few sets of the first cache.
//
// The vector unit works while the tile unit does: a unit's weights are made between the tile
// instructions of the next. So a base must be subtracted before all logits are known. It is the
// largest logit of the first 32 keys, and stays: weights relative to it are as exact as any but 1,
// as long as they do not overflow, and what rounding takes from them it takes from their sum too.
// Where those of a chunk add up to more than kLimit, the chunk is weighed anew and the queries
// concerned, only they, get a higher base.
//
// Where the time goes, one core of 4 GHz with 2 MB of second cache, FLUX shape: 450 ns for a unit
// and its values. Tile products from the first cache take 172 (3.0 TFLOP/s; 3.4 where operands are
// 0), exponentials alone 88. Beside products they have one floating point port instead of two and
// take 168, so that mixing both saves a fifth at most. The rest are waits for lines of the second
// cache: for stores that miss the first one, and as long for keys and values. None of these was
// faster by more than 5 %: weights of two chunks at once, so that they go on beside value products
// (0.88 to 1.04); one panel, chunks of 3 to 16 groups; sums stored between the products of the next
// unit; prefetches into either cache; TILELOADDT1.
#include "attention/amx_tile.h"
#include "attention/dot512.h"

namespace rapid3rt {
namespace {

constexpr int64_t kSide = 16;             // rows of a tile, and words in a row
constexpr int64_t kTile = kSide * kSide;  // words of a tile
constexpr int64_t kUnit = 2 * kSide;
constexpr int64_t kSums = kUnit * kUnit;
constexpr int64_t kWeights = kSums / 2;  // words of a unit's weights
constexpr int64_t kPanels = 2;           // of queries that share a chunk while it is in the cache
constexpr int64_t kGroups = 8;           // of 32 keys: a chunk
constexpr float kLimit = 65536;
constexpr __mmask32 kUpper = 0xaaaaaaaa;  // the upper halves of words

using V = Vectors512;
using Vec = V::Vec;
static_assert(kVectors * V::kLanes == kUnit, "panels are a unit wide");

// sum tiles 0 to 3 [32, 32] += left[32, 16 words] right[16 words, 32]; left is two tiles.
inline void add_four_products(const Word* left, const Word* right) {
  TILE_LOAD(6, right, kUnit * 4);
  TILE_LOAD(7, right + kSide, kUnit * 4);
  TILE_LOAD(4, left, kSide * 4);
  TILE_PRODUCT(0, 4, 6);
  TILE_PRODUCT(1, 4, 7);
  TILE_LOAD(5, left + kTile, kSide * 4);
  TILE_PRODUCT(2, 5, 6);
  TILE_PRODUCT(3, 5, 7);
}

inline void zero_four() {
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
}

inline void load_four(const Word* from) {
  TILE_LOAD(0, from, kUnit * 4);
  TILE_LOAD(1, from + kSide, kUnit * 4);
  TILE_LOAD(2, from + kSide * kUnit, kUnit * 4);
  TILE_LOAD(3, from + kSide * kUnit + kSide, kUnit * 4);
}

inline void store_four(Word* to) {
  TILE_STORE(0, to, kUnit * 4);
  TILE_STORE(1, to + kSide, kUnit * 4);
  TILE_STORE(2, to + kSide * kUnit, kUnit * 4);
  TILE_STORE(3, to + kSide * kUnit + kSide, kUnit * 4);
}

// 32 keys of a block, as pack() wrote them.
struct Group {
  const Word* keys;    // two tiles of 16 keys for every 32 channels
  const Word* values;  // a tile for every 16 channels: 16 pairs of keys each
  int64_t num_keys;    // that may be read
};

int64_t packed_bytes(const Tile& t) { return 2 * t.head_dim * t.block_kv * 2; }

// x[w] = word w of 16 rows, from `offset` bytes on; a null row is 0. Loads put the quarters of rows
// together, which leaves half of the shuffles that a transpose of registers takes.
inline void load_transposed(const char* const (&rows)[kSide], int64_t offset, Vec (&x)[kSide]) {
  alignas(64) static constexpr char kZeros[kSide * 4] = {};
  const Word* from[kSide];
  for (int64_t i = 0; i < kSide; ++i) {
    from[i] = reinterpret_cast<const Word*>(rows[i] == nullptr ? kZeros : rows[i] + offset);
  }
  for (int64_t w = 0; w < kSide; w += 4) {
    __m512d low[2], high[2];
    for (int64_t i = 0; i < 2; ++i) {
      const auto quarters = [&](int64_t first) {
        Vec q = _mm512_castps128_ps512(_mm_loadu_ps(from[first] + w));
        q = _mm512_insertf32x4(q, _mm_loadu_ps(from[first + 4] + w), 1);
        q = _mm512_insertf32x4(q, _mm_loadu_ps(from[first + 8] + w), 2);
        return _mm512_insertf32x4(q, _mm_loadu_ps(from[first + 12] + w), 3);
      };
      const Vec even = quarters(2 * i), odd = quarters(2 * i + 1);
      low[i] = _mm512_castps_pd(_mm512_unpacklo_ps(even, odd));
      high[i] = _mm512_castps_pd(_mm512_unpackhi_ps(even, odd));
    }
    x[w] = _mm512_castpd_ps(_mm512_unpacklo_pd(low[0], low[1]));
    x[w + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low[0], low[1]));
    x[w + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high[0], high[1]));
    x[w + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high[0], high[1]));
  }
}

// What a panel's weights are relative to, in units of log2, and what they add up to.
// The output is divided by the sum of what its weights were rounded to: then they are parts of a
// whole, and a key that outweighs all others gives its own value. With lse also the sum of the
// weights themselves.
struct Softmax {
  Vec base[kVectors], sum[kVectors], unrounded[kVectors];
};

// The bfloat16 in the upper half of every word.
inline Vec upper_half(__m512i x) {
  return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

// Rows 2 i and 2 i + 1 of a unit's logits [32, 32] become row i of its weights [16 pairs, 32]. A
// key that may not be read weighs 0. Weights are rounded ties away from 0: integers leave the ports
// alone that products and exponentials want.
template <bool kLse>
inline __attribute__((always_inline)) void make_weights(const Word* logits, Word* weights,
                                                        int64_t i, int64_t num_keys, Vec scale,
                                                        Softmax& s) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i upper = _mm512_broadcast_i32x4(
      _mm_setr_epi8(2, 3, -1, -1, 6, 7, -1, -1, 10, 11, -1, -1, 14, 15, -1, -1));
  for (int c = 0; c < kVectors; ++c) {
    const Word* const from = logits + 2 * i * kUnit + c * V::kLanes;
    Vec even = V::exp2<4>(V::sub(V::mul(V::load(from), scale), s.base[c]));
    Vec odd = V::exp2<4>(V::sub(V::mul(V::load(from + kUnit), scale), s.base[c]));
    if (num_keys != kUnit) {
      if (2 * i >= num_keys) even = V::zero();
      if (2 * i + 1 >= num_keys) odd = V::zero();
    }
    if (kLse) s.unrounded[c] = V::add(s.unrounded[c], V::add(even, odd));
    const __m512i low = _mm512_add_epi32(_mm512_castps_si512(even), half);
    const __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd), half);
    s.sum[c] = V::add(s.sum[c], V::add(upper_half(low), upper_half(high)));
    // Of every word the upper half of low, then that of high: by a shuffle, which the floating
    // point port does not do; a shift it would.
    const __m512i both = _mm512_mask_blend_epi16(kUpper, _mm512_shuffle_epi8(low, upper), high);
    V::store(weights + i * kUnit + c * V::kLanes, _mm512_castsi512_ps(both));
  }
}

// A unit whose logits wait to become weights.
struct Waiting {
  const Word* logits;
  Word* weights;
  int64_t num_keys;
};

// Logits of one unit, and meanwhile, a few rows after every step, the weights of the one before.
template <int64_t kSteps, bool kWeigh, bool kLse>
inline __attribute__((always_inline)) void make_unit(const Word* keys, const Word* queries,
                                                     Word* logits, int64_t steps,
                                                     const Waiting& before, Vec scale, Softmax& s) {
  const int64_t num = kSteps == 0 ? steps : kSteps;
  int64_t row = 0;
  zero_four();
  for (int64_t step = 0; step < num; ++step) {
    add_four_products(keys + step * 2 * kTile, queries + step * kSide * kUnit);
    if (!kWeigh) continue;
    for (const int64_t end = (step + 1) * kSide / num; row < end; ++row) {
      make_weights<kLse>(before.logits, before.weights, row, before.num_keys, scale, s);
    }
  }
  store_four(logits);
}

using Masks = __mmask16[kVectors];

// One tile: a block of queries against its list. kDim: head dim, 0 for any. kLse: as Tile::lse.
template <int64_t kDim, bool kLse>
class TileRun {
 public:
  explicit TileRun(const Tile& t)
      : t_(t),
        p_(make_plan(t, 0)),
        logits_(reinterpret_cast<Word*>(static_cast<char*>(t.scratch) + p_.bytes)),
        weights_(logits_ + kGroups * kSums),
        scale_(V::set1((t.scale < 0 ? -t.scale : t.scale) * kLog2E)) {}

  static int64_t scratch_bytes(const Tile& t) {
    return plan_bytes(t, 0) + kGroups * (kSums + kPanels * kWeights) * 4;
  }

  void run() {
    const int64_t padded = round_up(t_.num_q, kUnit);
    for (int64_t i = 0; i < padded; i += V::kLanes) {
      V::store(p_.row_max + i, V::set1(-__builtin_inff()));
      V::store(p_.row_sum + i, V::zero());
      V::store(t_.row_sum + i, V::zero());
    }
    load_queries();
    bool first = true;
    while (next_chunk()) {
      for (int64_t col = 0; col < padded; col += kPanels * kUnit) {
        run_chunk(col, smaller(kPanels, (padded - col) / kUnit), first);
      }
      first = false;
    }
    if (first) {
      for (int64_t i = 0; i < padded * dim(); i += V::kLanes) V::store(p_.output + i, V::zero());
    }
    store_output();
  }

 private:
  int64_t dim() const { return kDim == 0 ? t_.head_dim : kDim; }
  int64_t steps() const { return dim() / kUnit; }
  const Word* queries(int64_t col) const { return p_.queries + col * (dim() / 2); }
  Word* weights(int64_t panel, int64_t group) const {
    return weights_ + (panel * kGroups + group) * kWeights;
  }

  // As the function of flash.h, 32 channels at once.
  void load_queries() const {
    const char* const q = static_cast<const char*>(t_.q.data);
    for (int64_t col = 0; col < round_up(t_.num_q, kUnit); col += kSide) {
      const char* rows[kSide];
      for (int64_t i = 0; i < kSide; ++i) {
        rows[i] = col + i < t_.num_q ? q + (col + i) * t_.q.token * 2 : nullptr;
      }
      Word* to = p_.queries + col / kUnit * kUnit * (dim() / 2) + col % kUnit;
      for (int64_t d = 0; d < dim(); d += kUnit) {
        Vec words[kSide];
        load_transposed(rows, 2 * d, words);
        for (int64_t w = 0; w < kSide; ++w, to += kUnit) {
          V::store(to, t_.scale < 0 ? DotProducts::negate(words[w]) : words[w]);
        }
      }
    }
  }

  // As the function of flash.h: two channels become a word before they are transposed, so that a
  // row of 32 is one store.
  void store_output() const {
    for (int64_t col = 0; col < t_.num_q; col += kSide) {
      const Vec factor = V::inverse_or_zero(V::load(p_.row_sum + col));
      const int64_t num_rows = smaller(kSide, t_.num_q - col);
      const Word* from = p_.output + col / kUnit * kUnit * dim() + col % kUnit;
      char* const out = static_cast<char*>(t_.out) + col * t_.out_token * 2;
      for (int64_t d = 0; d < dim(); d += kUnit) {
        Vec words[kSide];
        for (int64_t w = 0; w < kSide; ++w, from += 2 * kUnit) {
          const Vec even = V::mul(factor, V::load(from));
          const Vec odd = V::mul(factor, V::load(from + kUnit));
          words[w] = DotProducts::round_pairs(even, odd);
        }
        V::transpose(words);
        for (int64_t i = 0; i < num_rows; ++i) {
          V::store(reinterpret_cast<Word*>(out + (i * t_.out_token + d) * 2), words[i]);
        }
      }
    }
    for (int64_t i = 0; i < t_.num_q; ++i) {
      t_.row_max[i] = p_.row_max[i] * kLn2;
    }
  }

  // The next groups of the list; false where there are none.
  bool next_chunk() {
    const int64_t words = dim() / 2 * kUnit;
    num_groups_ = 0;
    while (listed_ < t_.num_listed && num_groups_ < kGroups) {
      const int64_t block = t_.index == nullptr ? listed_ : t_.index[listed_];
      const int64_t left = t_.num_kv - block * t_.block_kv - in_block_;
      if (left <= 0 || in_block_ == t_.block_kv) {
        ++listed_;
        in_block_ = 0;
        continue;
      }
      const char* const packed = static_cast<const char*>(t_.packed) + block * packed_bytes(t_);
      Group& group = groups_[num_groups_++];
      group.keys = reinterpret_cast<const Word*>(packed) + in_block_ / kUnit * words;
      group.values = group.keys + t_.block_kv / kUnit * words;
      group.num_keys = smaller(left, kUnit);
      in_block_ += kUnit;
    }
    return num_groups_ > 0;
  }

  // The chunk against some panels from query col on.
  void run_chunk(int64_t col, int64_t panels, bool first) {
    Masks above[kPanels];
    weigh(col, panels, first, above);
    for (int64_t i = 0; i < panels; ++i) {
      if ((above[i][0] | above[i][1]) != 0) weigh_anew(col + i * kUnit, i, first, above[i]);
    }
    add_values(col, panels, first);
  }

  // Largest logits of a unit in units of log2, none below those in row_max: the base of its panel.
  void raise_base(int64_t col, const Word* logits, int64_t num_keys, const Masks& which) {
    Vec top[kVectors] = {V::set1(-__builtin_inff()), V::set1(-__builtin_inff())};
    for (int64_t key = 0; key < num_keys; ++key) {
      for (int c = 0; c < kVectors; ++c) {
        top[c] = V::max(top[c], V::load(logits + key * kUnit + c * V::kLanes));
      }
    }
    for (int c = 0; c < kVectors; ++c) {
      float* const row_max = p_.row_max + col + c * V::kLanes;
      const Vec old = V::load(row_max), now = V::max(old, V::mul(top[c], scale_));
      V::store(row_max, _mm512_mask_mov_ps(old, which[c], now));
    }
  }

  // Without any finite logit the base is 0: -inf minus -inf would be NaN.
  Softmax begin_softmax(int64_t col) const {
    Softmax s;
    for (int c = 0; c < kVectors; ++c) {
      s.base[c] = V::zero_where_lowest(V::load(p_.row_max + col + c * V::kLanes));
      s.sum[c] = s.unrounded[c] = V::zero();
    }
    return s;
  }

  // Weights relative to the bases that there are, and which queries need a higher one.
  void weigh(int64_t col, int64_t panels, bool first, Masks (&above)[kPanels]) {
    constexpr Masks kAll = {0xffff, 0xffff};
    Softmax softmax[kPanels], s;
    for (int64_t i = 0; !first && i < panels; ++i) softmax[i] = begin_softmax(col + i * kUnit);
    Waiting before{};
    int64_t last = 0;  // panel of the unit before
    for (int64_t g = 0; g < num_groups_; ++g) {
      for (int64_t i = 0; i < panels; ++i) {
        Word* const logits = logits_ + (g * panels + i) % 2 * kSums;
        const Word* const q = queries(col + i * kUnit);
        if (before.logits == nullptr) {
          make_unit<kDim / kUnit, false, kLse>(groups_[g].keys, q, logits, steps(), before, scale_,
                                               s);
        } else {
          s = softmax[last];
          make_unit<kDim / kUnit, true, kLse>(groups_[g].keys, q, logits, steps(), before, scale_,
                                              s);
          softmax[last] = s;
        }
        if (first && g == 0) {
          raise_base(col + i * kUnit, logits, groups_[g].num_keys, kAll);
          softmax[i] = begin_softmax(col + i * kUnit);
        }
        before = {logits, weights(i, g), groups_[g].num_keys};
        last = i;
      }
    }
    s = softmax[last];
    for (int64_t row = 0; row < kSide; ++row) {
      make_weights<kLse>(before.logits, before.weights, row, before.num_keys, scale_, s);
    }
    softmax[last] = s;
    for (int64_t i = 0; i < panels; ++i) end_softmax(col + i * kUnit, softmax[i], above[i]);
  }

  void end_softmax(int64_t col, const Softmax& s, Masks& above) {
    for (int c = 0; c < kVectors; ++c) {
      const Vec base = V::load(p_.row_max + col + c * V::kLanes);
      above[c] = _mm512_cmp_ps_mask(s.sum[c], V::set1(kLimit), _CMP_GT_OQ) |
                 _mm512_cmp_ps_mask(base, V::set1(-__builtin_inff()), _CMP_EQ_OQ);
    }
    if ((above[0] | above[1]) != 0) return;
    add_sums(col, s, {V::set1(1.0f), V::set1(1.0f)});
  }

  // sums = sums decay + s
  void add_sums(int64_t col, const Softmax& s, const Vec (&decay)[kVectors]) {
    for (int c = 0; c < kVectors; ++c) {
      float* const row_sum = p_.row_sum + col + c * V::kLanes;
      float* const unrounded = t_.row_sum + col + c * V::kLanes;
      V::store(row_sum, V::fma(V::load(row_sum), decay[c], s.sum[c]));
      V::store(unrounded, V::fma(V::load(unrounded), decay[c], s.unrounded[c]));
    }
  }

  // The weights of one panel again. Queries that are not above keep their base and so their bits.
  void weigh_anew(int64_t col, int64_t panel, bool first, const Masks& above) {
    Softmax s;
    Vec decay[kVectors];
    for (int c = 0; c < kVectors; ++c) decay[c] = V::load(p_.row_max + col + c * V::kLanes);
    for (int64_t g = 0; g < num_groups_; ++g) {
      Word* const logits = logits_ + g * kSums;
      make_unit<kDim / kUnit, false, kLse>(groups_[g].keys, queries(col), logits, steps(), {},
                                           scale_, s);
      raise_base(col, logits, groups_[g].num_keys, above);
    }
    s = begin_softmax(col);
    for (int64_t g = 0; g < num_groups_; ++g) {
      for (int64_t row = 0; row < kSide; ++row) {
        make_weights<kLse>(logits_ + g * kSums, weights(panel, g), row, groups_[g].num_keys, scale_,
                           s);
      }
    }
    for (int c = 0; c < kVectors; ++c) {
      decay[c] = V::exp2<5>(V::sub(decay[c], s.base[c]));
    }
    add_sums(col, s, decay);
    for (int64_t d = 0; !first && d < dim(); ++d) {
      for (int c = 0; c < kVectors; ++c) {
        Word* const at = p_.output + col * dim() + d * kUnit + c * V::kLanes;
        V::store(at, V::mul(decay[c], V::load(at)));
      }
    }
  }

  // output += values^T weights
  void add_values(int64_t col, int64_t panels, bool first) {
    for (int64_t i = 0; i < panels; ++i) {
      for (int64_t d = 0; d < dim(); d += kUnit) {
        Word* const out = p_.output + (col + i * kUnit) * dim() + d * kUnit;
        first ? zero_four() : load_four(out);
        for (int64_t g = 0; g < num_groups_; ++g) {
          add_four_products(groups_[g].values + d * kSide, weights(i, g));
        }
        store_four(out);
      }
    }
  }

  const Tile& t_;
  const Plan p_;
  Word* const logits_;   // [kGroups, 32, 32]; two of them where weights follow at once
  Word* const weights_;  // [kPanels, kGroups, 16, 32]
  const Vec scale_;
  Group groups_[kGroups];
  int64_t num_groups_ = 0, listed_ = 0, in_block_ = 0;
};

template <bool kLse>
void run_any_dim(const Tile& t) {
  if (t.head_dim == 64) return TileRun<64, kLse>(t).run();
  if (t.head_dim == 128) return TileRun<128, kLse>(t).run();
  TileRun<0, kLse>(t).run();
}

void run_amx(const Tile& t) { t.lse ? run_any_dim<true>(t) : run_any_dim<false>(t); }

// One key block: its keys, group after group, then its values; 0 for keys that may not be read.
void pack(const Tile& t, int64_t block, void* to) {
  const int64_t first = block * t.block_kv;
  const auto row = [&](const TileOperand& x, int64_t key) {
    return key < t.num_kv ? static_cast<const char*>(x.data) + key * x.token * 2 : nullptr;
  };
  Word* out = static_cast<Word*>(to);
  for (int64_t group = 0; group < t.block_kv; group += kUnit) {
    for (int64_t w = 0; w < t.head_dim / 2; w += kSide) {
      for (int64_t i = 0; i < kUnit; ++i, out += kSide) {
        const char* const key = row(t.k, first + group + i);
        V::store(out, key == nullptr ? V::zero() : DotProducts::load_words(key, w, kSide));
      }
    }
  }
  for (int64_t group = 0; group < t.block_kv; group += kUnit) {
    const char *even[kSide], *odd[kSide];
    for (int64_t i = 0; i < kSide; ++i) {
      even[i] = row(t.v, first + group + 2 * i);
      odd[i] = row(t.v, first + group + 2 * i + 1);
    }
    for (int64_t d = 0; d < t.head_dim; d += kUnit) {
      Vec low[kSide], high[kSide];  // words of two channels, of even and of odd keys
      load_transposed(even, 2 * d, low);
      load_transposed(odd, 2 * d, high);
      for (int64_t w = 0; w < kSide; ++w, out += 2 * kSide) {
        const __m512i a = _mm512_castps_si512(low[w]), b = _mm512_castps_si512(high[w]);
        const __m512i lower = _mm512_mask_blend_epi16(kUpper, a, _mm512_slli_epi32(b, 16));
        const __m512i upper = _mm512_mask_blend_epi16(kUpper, _mm512_srli_epi32(a, 16), b);
        V::store(out, _mm512_castsi512_ps(lower));
        V::store(out + kSide, _mm512_castsi512_ps(upper));
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
    run_amx, TileRun<0, false>::scratch_bytes, 48000000, enter, leave, packed_bytes, pack};

}  // namespace rapid3rt
