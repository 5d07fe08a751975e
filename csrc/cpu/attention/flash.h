// SPDX-License-Identifier: Apache-2.0
// The tile kernel for vector units, written over two small policies so that every instruction set
// runs the same control flow.
//
// Everything is transposed: logits are [keys, queries] and the output is [head_dim, queries], so
// that a vector holds one number of several queries. Sums and maxima over keys are then vertical,
// and the left operand of both products (keys, values) is broadcast from memory word by word. A
// word is 4 bytes: a float, or two bfloat16 that follow each other along the axis that is summed
// over (M::kPair = 2). Values are cut into strips of as many channels as a product makes at once,
// and keys put together, so that products read memory front to back: rows a caller's stride apart
// share few sets of the first cache. Both is done once per head, not once per tile.
//
// V, vectors of kLanes floats: load, store, set1, zero, mul, add, max, fma, exp2<degree>, ...
// M, products: V, kPair, kType, and how queries, keys, values and weights become words.
//
// No lane reads another and every sum runs in the order of the list: a query's result depends
// neither on its neighbours in the tile nor on the width of the vectors' groups.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "attention/tile.h"

namespace rapid3rt {
namespace {

typedef float __attribute__((may_alias)) Word;

constexpr int kVectors = 2;       // vectors of queries in a panel
constexpr int64_t kChunk = 128;   // keys between two updates of the running maximum
constexpr int64_t kKeyGroup = 8;  // keys of a chunk are padded to a multiple by repeating the last
constexpr int64_t kWidest = 32;   // queries in a panel of the widest vectors; divides block_q
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr int kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2;  // as DType

// 2^r on [0, 1] with relative error below 2.9e-6 (degree 4) and 8.3e-8 (degree 5), before rounding;
// exact at 0, so that the largest key weighs 1 and an unchanged maximum decays nothing. For this a
// logit is scaled and rounded before the base, which is one of them, is taken from it: a fused
// difference would be what the base lost by rounding, beyond any exponent for logits of 1e10.
template <int kDegree>
struct Exp2;
template <>
struct Exp2<4> {
  static constexpr float kCoef[4] = {6.930448445e-01f, 2.412802076e-01f, 5.224246823e-02f,
                                     1.342668797e-02f};
};
template <>
struct Exp2<5> {
  static constexpr float kCoef[5] = {6.931513118e-01f, 2.401644500e-01f, 5.579991376e-02f,
                                     9.017029415e-03f, 1.867130496e-03f};
};

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t element_bytes(int type) { return type == kFloat32 ? 4 : 2; }

// Values of one block as pack() left them: [head_dim / kRows, block_kv / pair, kRows]. A chunk
// takes of each strip as many words of kRows as the block has pairs of keys.
struct Strips {
  const Word* values;
  int64_t pairs;
};

// Scratch of one tile. Queries and output are cut into panels of W queries, two vectors wide: panel
// [rows, W] after panel. Wider panels read keys and values less often, but were no faster.
struct Plan {
  Word* queries;         // [head_dim / pair, W] per panel
  Word* output;          // [head_dim, W] per panel
  Word* logits;          // [kChunk, W]; the weights [kChunk / pair, W] take their place
  float* row_max;        // [block_q], in units of log2
  float* row_sum;        // [block_q]
  const Word** key_row;  // [kChunk]
  Strips* strips;        // [kChunk], of the chunk's blocks
  int64_t bytes;
};

// chunk: keys of a chunk, 0 where they are used in another form.
inline Plan make_plan(const Tile& t, int64_t chunk = kChunk) {
  const int64_t num_q = t.block_q, dim = t.head_dim;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.scratch);
  uintptr_t at = begin;
  const auto take = [&](int64_t count, int64_t size) {
    const uintptr_t place = at;
    at += static_cast<uintptr_t>(round_up(count * size, 64));
    return reinterpret_cast<void*>(place);
  };
  Plan p{};
  p.queries = static_cast<Word*>(take(dim * num_q, 4));
  p.output = static_cast<Word*>(take(dim * num_q, 4));
  p.logits = static_cast<Word*>(take(chunk * kWidest, 4));
  p.row_max = static_cast<float*>(take(num_q, 4));
  p.row_sum = static_cast<float*>(take(num_q, 4));
  p.key_row = static_cast<const Word**>(take(chunk, sizeof(Word*)));
  p.strips = static_cast<Strips*>(take(chunk, sizeof(Strips)));
  p.bytes = static_cast<int64_t>(at - begin);
  return p;
}

inline int64_t plan_bytes(const Tile& t, int64_t chunk) {
  Tile empty = t;
  empty.scratch = nullptr;
  return make_plan(empty, chunk).bytes;
}

inline int64_t flash_scratch_bytes(const Tile& t) { return plan_bytes(t, kChunk); }

// Keys that are worked on at once: whole blocks, but for the last one.
struct Chunk {
  int64_t num_keys, num_blocks;
};

// acc[R, kVectors] += left[R, depth] right[depth, kVectors], where left(r, i) is a word.
template <class M, int R, class Left>
inline __attribute__((always_inline)) void multiply(Left left, const Word* right, int64_t depth,
                                                    typename M::V::Vec (&acc)[R][kVectors]) {
  using V = typename M::V;
  for (int64_t i = 0; i < depth; ++i) {
    typename V::Vec b[kVectors];
    for (int c = 0; c < kVectors; ++c) b[c] = V::load(right + (i * kVectors + c) * V::kLanes);
    for (int r = 0; r < R; ++r) {
      const typename V::Vec a = V::set1(left(r, i));
      for (int c = 0; c < kVectors; ++c) acc[r][c] = M::fma(a, b[c], acc[r][c]);
    }
  }
}

template <class V, int R>
inline __attribute__((always_inline)) void clear(typename V::Vec (&acc)[R][kVectors]) {
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < kVectors; ++c) acc[r][c] = V::zero();
  }
}

// logits[num_keys, W] = keys queries^T of one panel; `top` becomes their largest per query.
template <class M>
inline void make_logits(const Plan& p, const Word* queries, int64_t num_keys, int64_t words,
                        typename M::V::Vec (&top)[kVectors]) {
  using V = typename M::V;
  constexpr int R = V::kRows;
  for (int64_t key = 0; key < num_keys; key += R) {
    const Word* row[R];
    for (int r = 0; r < R; ++r) row[r] = p.key_row[key + r];
    typename V::Vec acc[R][kVectors];
    clear<V, R>(acc);
    multiply<M, R>([&](int r, int64_t i) { return row[r][i]; }, queries, words, acc);
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < kVectors; ++c) {
        top[c] = V::max(top[c], acc[r][c]);
        V::store(p.logits + ((key + r) * kVectors + c) * V::kLanes, acc[r][c]);
      }
    }
  }
}

// output[head_dim, W] = output decay + values^T weights of one panel. A chunk is summed by itself:
// one long chain over all keys would round twice as badly as PyTorch.
template <class M>
inline void add_values(const Plan& p, Word* output, const Chunk& chunk, int64_t strip, int64_t dim,
                       bool first, const typename M::V::Vec (&decay)[kVectors]) {
  using V = typename M::V;
  constexpr int R = V::kRows;
  for (int64_t d = 0; d < dim; d += R) {
    typename V::Vec acc[R][kVectors];
    clear<V, R>(acc);
    const Word* weights = p.logits;
    for (int64_t block = 0; block < chunk.num_blocks; ++block) {
      const Strips& of_block = p.strips[block];
      const Word* const values = of_block.values + d / R * strip;
      multiply<M, R>([&](int r, int64_t i) { return values[i * R + r]; }, weights, of_block.pairs,
                     acc);
      weights += of_block.pairs * kVectors * V::kLanes;
    }
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < kVectors; ++c) {
        Word* const out = output + ((d + r) * kVectors + c) * V::kLanes;
        V::store(out, first ? acc[r][c] : V::fma(decay[c], V::load(out), acc[r][c]));
      }
    }
  }
}

// One chunk of keys against one panel of kVectors vectors of queries.
template <class M>
inline void run_panel(const Tile& t, const Plan& p, int64_t col, const Chunk& chunk, int64_t dim,
                      bool first) {
  using V = typename M::V;
  using Vec = typename V::Vec;
  const Word* const queries = p.queries + col * (dim / M::kPair);
  Vec top[kVectors], base[kVectors], sum[kVectors], decay[kVectors];
  for (int c = 0; c < kVectors; ++c) top[c] = V::set1(-__builtin_inff());
  make_logits<M>(p, queries, chunk.num_keys, dim / M::kPair, top);
  const Vec scale = V::set1((t.scale < 0 ? -t.scale : t.scale) * kLog2E);
  for (int c = 0; c < kVectors; ++c) {
    float* const row_max = p.row_max + col + c * V::kLanes;
    const Vec old = V::load(row_max);
    const Vec now = V::max(old, V::mul(top[c], scale));
    // Without any finite logit the base is 0: -inf minus -inf would be NaN.
    base[c] = V::zero_where_lowest(now);
    decay[c] = V::template exp2<5>(V::sub(old, base[c]));
    sum[c] = V::zero();
    V::store(row_max, now);
  }
  M::make_weights(p.logits, chunk.num_keys, scale, base, sum);
  for (int c = 0; c < kVectors; ++c) {
    float* const row_sum = p.row_sum + col + c * V::kLanes;
    V::store(row_sum, V::fma(V::load(row_sum), decay[c], sum[c]));
  }
  const int64_t strip = t.block_kv / M::kPair * V::kRows;
  add_values<M>(p, p.output + col * dim, chunk, strip, dim, first, decay);
}

// Queries to words, transposed: panels [head_dim / pair, W], zero beyond num_q. A negative scale is
// turned into negative queries, so that the largest product is the largest logit.
template <class M>
inline void load_queries(const Tile& t, const Plan& p, int64_t dim) {
  using V = typename M::V;
  const int64_t words = dim / M::kPair;
  const char* const q = static_cast<const char*>(t.q.data);
  const int64_t token = t.q.token * element_bytes(M::kType);
  constexpr int64_t width = kVectors * V::kLanes;
  for (int64_t col = 0; col < t.num_q; col += width) {
    for (int64_t at = 0; at < width; at += V::kLanes) {
      Word* const to = p.queries + col * words + at;
      for (int64_t w = 0; w < words; w += V::kLanes) {
        const int64_t n = smaller(V::kLanes, words - w);
        typename V::Vec block[V::kLanes];
        for (int64_t i = 0; i < V::kLanes; ++i) {
          const int64_t query = col + at + i;
          block[i] = query < t.num_q ? M::load_words(q + query * token, w, n) : V::zero();
          if (t.scale < 0) block[i] = M::negate(block[i]);
        }
        V::transpose(block);
        for (int64_t i = 0; i < n; ++i) V::store(to + (w + i) * width, block[i]);
      }
    }
  }
}

// output / row_sum to the caller's layout and type; 0 for a query without keys.
template <class M>
inline void store_output(const Tile& t, const Plan& p, int64_t dim) {
  using V = typename M::V;
  const int64_t token = t.out_token * element_bytes(M::kType);
  constexpr int64_t width = kVectors * V::kLanes;
  for (int64_t col = 0; col < t.num_q; col += width) {
    for (int64_t at = 0; at < width && col + at < t.num_q; at += V::kLanes) {
      const typename V::Vec factor = V::inverse_or_zero(V::load(p.row_sum + col + at));
      const Word* const from = p.output + col * dim + at;
      const int64_t num_rows = smaller(V::kLanes, t.num_q - col - at);
      char* const out = static_cast<char*>(t.out) + (col + at) * token;
      for (int64_t d = 0; d < dim; d += V::kLanes) {
        const int64_t n = smaller(V::kLanes, dim - d);
        typename V::Vec block[V::kLanes];
        for (int64_t i = 0; i < V::kLanes; ++i) {
          block[i] = i < n ? V::mul(factor, V::load(from + (d + i) * width)) : V::zero();
        }
        V::transpose(block);
        for (int64_t i = 0; i < num_rows; ++i) {
          V::template store_as<M::kType>(out + i * token, d, n, block[i]);
        }
      }
    }
  }
  for (int64_t i = 0; i < t.num_q; ++i) {
    t.row_max[i] = p.row_max[i] * kLn2;
    t.row_sum[i] = p.row_sum[i];
  }
}

// A group of keys is complete: the last one stands for those that are missing.
inline void pad_keys(const Plan& p, int64_t num_keys) {
  const Word* const last = p.key_row[num_keys - 1];
  for (int64_t i = num_keys; i < round_up(num_keys, kKeyGroup); ++i) p.key_row[i] = last;
}

// Words of the keys of a packed block, [block_kv, head_dim / pair], and of its strips.
template <class M>
inline int64_t block_words(const Tile& t) {
  return t.block_kv * t.head_dim / M::kPair;
}

template <class M>
inline int64_t packed_bytes(const Tile& t) {
  return round_up(2 * block_words<M>(t) * 4, 64);
}

template <class M>
inline void pack(const Tile& t, int64_t block, void* to) {
  using V = typename M::V;
  constexpr int R = V::kRows;
  static_assert(V::kLanes == 2 * R, "a vector of values is cut into two strips");
  const int64_t dim = t.head_dim, bytes = element_bytes(M::kType);
  const int64_t first = block * t.block_kv, num_keys = smaller(t.block_kv, t.num_kv - first);
  Word* const keys = static_cast<Word*>(to);
  const char* const k = static_cast<const char*>(t.k.data) + first * t.k.token * bytes;
  const char* const v = static_cast<const char*>(t.v.data) + first * t.v.token * bytes;
  for (int64_t i = 0; i < num_keys; ++i) {
    M::load_row(keys + i * (dim / M::kPair), k + i * t.k.token * bytes, dim);
  }
  Word* const values = keys + block_words<M>(t);
  const int64_t strip = t.block_kv / M::kPair * R;
  for (int64_t i = 0; i < num_keys; i += M::kPair) {
    const char* const row = v + i * t.v.token * bytes;
    const char* const next = i + 1 < num_keys ? row + t.v.token * bytes : nullptr;
    for (int64_t d = 0; d < dim; d += V::kLanes) {
      const int64_t n = smaller(V::kLanes, dim - d);
      const typename V::Vec words = M::load_values(row, next, d, n);
      Word* const at = values + d / R * strip + i / M::kPair * R;
      V::store_low(at, words);
      if (n > R) V::store_high(at + strip, words);
    }
  }
}

// The next listed blocks, as many as fit into a chunk; one that kv_len cuts ends it.
template <class M>
inline Chunk next_chunk(const Tile& t, const Plan& p, int64_t& listed) {
  Chunk chunk{0, 0};
  const int64_t key_words = t.head_dim / M::kPair, block_bytes = packed_bytes<M>(t);
  bool whole = true;
  for (; listed < t.num_listed && whole && chunk.num_keys + t.block_kv <= kChunk; ++listed) {
    const int64_t block = t.index == nullptr ? listed : t.index[listed];
    const int64_t num_keys = smaller(t.block_kv, t.num_kv - block * t.block_kv);
    if (num_keys <= 0) continue;
    const char* const packed = static_cast<const char*>(t.packed) + block * block_bytes;
    const Word* const keys = reinterpret_cast<const Word*>(packed);
    for (int64_t i = 0; i < num_keys; ++i) p.key_row[chunk.num_keys + i] = keys + i * key_words;
    p.strips[chunk.num_blocks++] = {keys + block_words<M>(t), (num_keys + M::kPair - 1) / M::kPair};
    chunk.num_keys += num_keys;
    whole = num_keys == t.block_kv;
  }
  if (chunk.num_keys != 0) pad_keys(p, chunk.num_keys);
  return chunk;
}

template <class M, int64_t kDim>
void run_tile(const Tile& t) {
  using V = typename M::V;
  const int64_t dim = kDim == 0 ? t.head_dim : kDim;
  const Plan p = make_plan(t);
  const int64_t padded = round_up(t.num_q, kVectors * V::kLanes);
  for (int64_t i = 0; i < padded; i += V::kLanes) {
    V::store(p.row_max + i, V::set1(-__builtin_inff()));
    V::store(p.row_sum + i, V::zero());
  }
  load_queries<M>(t, p, dim);
  bool first = true;
  for (int64_t listed = 0; listed < t.num_listed;) {
    const Chunk chunk = next_chunk<M>(t, p, listed);
    if (chunk.num_keys == 0) continue;  // all keys of these blocks lie beyond kv_len
    for (int64_t col = 0; col < t.num_q; col += kVectors * V::kLanes) {
      run_panel<M>(t, p, col, chunk, dim, first);
    }
    first = false;
  }
  if (first) {
    for (int64_t i = 0; i < padded * dim; i += V::kLanes) V::store(p.output + i, V::zero());
  }
  store_output<M>(t, p, dim);
}

template <class M>
void run_any_dim(const Tile& t) {
  if (t.head_dim == 64) return run_tile<M, 64>(t);
  if (t.head_dim == 128) return run_tile<M, 128>(t);
  return run_tile<M, 0>(t);
}

// Products of floats; elements of kElement are converted as they are loaded.
template <class Vectors, int kElement>
struct FloatProducts {
  using V = Vectors;
  using Vec = typename V::Vec;
  static constexpr int kPair = 1, kType = kElement;

  static Vec fma(Vec a, Vec b, Vec c) { return V::fma(a, b, c); }
  static Vec negate(Vec x) { return V::mul(x, V::set1(-1.0f)); }
  static Vec load_words(const char* row, int64_t word, int64_t n) {
    return V::template load_as<kElement>(row, word, n);
  }

  static void load_row(Word* to, const char* row, int64_t dim) {
    for (int64_t d = 0; d < dim; d += V::kLanes) {
      const int64_t n = smaller(V::kLanes, dim - d);
      V::store_words(to + d, n, V::template load_as<kElement>(row, d, n));
    }
  }

  static Vec load_values(const char* row, const char*, int64_t d, int64_t n) {
    return V::template load_as<kElement>(row, d, n);
  }

  static void make_weights(Word* logits, int64_t num_keys, Vec scale, const Vec (&base)[kVectors],
                           Vec (&sum)[kVectors]) {
    for (int64_t i = 0; i < num_keys; ++i) {
      for (int c = 0; c < kVectors; ++c) {
        Word* const at = logits + (i * kVectors + c) * V::kLanes;
        const Vec weight = V::template exp2<5>(V::sub(V::mul(V::load(at), scale), base[c]));
        sum[c] = V::add(sum[c], weight);
        V::store(at, weight);
      }
    }
  }
};

// f(M) of the products for a type of elements.
template <class V, class F>
auto with_floats(int dtype, F f) {
  if (dtype == kFloat32) return f(FloatProducts<V, kFloat32>());
  if (dtype == kBFloat16) return f(FloatProducts<V, kBFloat16>());
  return f(FloatProducts<V, kFloat16>());
}

template <class V>
void run_float(const Tile& t) {
  with_floats<V>(t.dtype, [&](auto m) { run_any_dim<decltype(m)>(t); });
}

template <class V>
int64_t packed_float_bytes(const Tile& t) {
  return with_floats<V>(t.dtype, [&](auto m) { return packed_bytes<decltype(m)>(t); });
}

template <class V>
void pack_float(const Tile& t, int64_t block, void* to) {
  with_floats<V>(t.dtype, [&](auto m) { pack<decltype(m)>(t, block, to); });
}

}  // namespace
}  // namespace rapid3rt
