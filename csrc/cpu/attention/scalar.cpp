// SPDX-License-Identifier: Apache-2.0
// The tile kernel in portable C++: loops of fixed extent that any compiler vectorises.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "attention/tile.h"
#include "rapid3rt/dtype.h"

namespace rapid3rt {
namespace {

constexpr int64_t kRows = 4;     // queries per register block; block_q is a multiple of it
constexpr int64_t kColumns = 8;  // keys or channels per register block

int64_t padded_dim(const Tile& t) { return (t.head_dim + kColumns - 1) / kColumns * kColumns; }

// q, k, v and the output as float, and the logits.
int64_t scratch_bytes(const Tile& t) {
  const int64_t floats = padded_dim(t) * (2 * t.block_q + 2 * t.block_kv) + t.block_q * t.block_kv;
  return floats * static_cast<int64_t>(sizeof(float));
}

// e^x for x <= 0 within 2 units in the last place; 0 below -87, NaN stays NaN. Vectorises, std::exp
// does not.
inline float exp_nonpositive(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float poly = 1.9875691500e-4f;
  poly = poly * f + 1.3981999507e-3f;
  poly = poly * f + 8.3334519073e-3f;
  poly = poly * f + 4.1665795894e-2f;
  poly = poly * f + 1.6666665459e-1f;
  poly = poly * f + 5.0000001201e-1f;
  poly = poly * f * f + f + 1.0f;
  const float power = as_float((as_bits(shifted) << 23) + 0x3f800000u);
  return x < -87.0f ? 0.0f : poly * power;
}

// acc[4, 8] += a[4, depth] b[depth, 8]; strides in floats.
inline void multiply_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                           int64_t depth, float acc[kRows][kColumns]) {
  for (int64_t d = 0; d < depth; ++d) {
    for (int64_t i = 0; i < kRows; ++i) {
      const float x = a[i * a_stride + d];
      for (int64_t j = 0; j < kColumns; ++j) acc[i][j] += x * b[d * b_stride + j];
    }
  }
}

// c[rows, columns] (+)= a[rows, depth] b[depth, columns]; rows % 4 == columns % 8 == 0.
inline void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                     int64_t c_stride, int64_t rows, int64_t columns, int64_t depth, bool add) {
  for (int64_t j = 0; j < columns; j += kColumns) {
    for (int64_t i = 0; i < rows; i += kRows) {
      float acc[kRows][kColumns] = {};
      float* const to = c + i * c_stride + j;
      if (add) {
        for (int64_t r = 0; r < kRows; ++r) std::copy_n(to + r * c_stride, kColumns, acc[r]);
      }
      multiply_block(a + i * a_stride, a_stride, b + j, b_stride, depth, acc);
      for (int64_t r = 0; r < kRows; ++r) std::copy_n(acc[r], kColumns, to + r * c_stride);
    }
  }
}

// Logits of one query against one key block to probabilities; returns what the old output must be
// multiplied with.
inline float softmax_row(float* logits, int64_t num_keys, int64_t block_kv, float& row_max,
                         float& row_sum) {
  float top = row_max;
  for (int64_t j = 0; j < num_keys; ++j) top = logits[j] > top ? logits[j] : top;
  const float base = top == -std::numeric_limits<float>::infinity() ? 0.0f : top;
  float lanes[kColumns] = {};
  for (int64_t j = num_keys; j < block_kv; ++j) logits[j] = -std::numeric_limits<float>::infinity();
  for (int64_t j = 0; j < block_kv; j += kColumns) {
    for (int64_t lane = 0; lane < kColumns; ++lane) {
      const float p = exp_nonpositive(logits[j + lane] - base);
      logits[j + lane] = p;
      lanes[lane] += p;
    }
  }
  float sum = 0.0f;
  for (const float lane : lanes) sum += lane;
  const float decay = exp_nonpositive(row_max - base);
  row_max = top;
  row_sum = row_sum * decay + sum;
  return decay;
}

// One key block, converted: keys transposed [head_dim, block_kv], values [block_kv, padded]; zeros
// beyond num_keys.
template <class T>
void load_block(const Tile& t, int64_t first, int64_t num_keys, int64_t padded, float* keys,
                float* values) {
  const T* const k = static_cast<const T*>(t.k.data) + first * t.k.token;
  const T* const v = static_cast<const T*>(t.v.data) + first * t.v.token;
  if (num_keys < t.block_kv) {
    std::fill_n(keys, t.head_dim * t.block_kv, 0.0f);
    std::fill_n(values, t.block_kv * padded, 0.0f);
  }
  for (int64_t j = 0; j < num_keys; ++j) {
    for (int64_t d = 0; d < t.head_dim; ++d) {
      keys[d * t.block_kv + j] = to_float(k[j * t.k.token + d]);
      values[j * padded + d] = to_float(v[j * t.v.token + d]);
    }
  }
}

template <class T>
void run_tile(const Tile& t) {
  const int64_t padded = padded_dim(t);
  const int64_t rows = (t.num_q + kRows - 1) / kRows * kRows;
  float* const queries = static_cast<float*>(t.scratch);
  float* const output = queries + padded * t.block_q;
  float* const keys = output + padded * t.block_q;
  float* const values = keys + padded * t.block_kv;
  float* const logits = values + padded * t.block_kv;
  float* const row_max = t.row_max;
  float* const row_sum = t.row_sum;

  std::fill_n(queries, 2 * padded * t.block_q, 0.0f);
  std::fill_n(values, t.block_kv * padded, 0.0f);
  std::fill_n(row_max, t.block_q, -std::numeric_limits<float>::infinity());
  std::fill_n(row_sum, t.block_q, 0.0f);
  const T* const q = static_cast<const T*>(t.q.data);
  for (int64_t i = 0; i < t.num_q; ++i) {
    for (int64_t d = 0; d < t.head_dim; ++d) {
      queries[i * padded + d] = to_float(q[i * t.q.token + d]) * t.scale;
    }
  }
  for (int64_t n = 0; n < t.num_listed; ++n) {
    const int64_t first = (t.index == nullptr ? n : t.index[n]) * t.block_kv;
    const int64_t num_keys = std::min(t.block_kv, t.num_kv - first);
    if (num_keys <= 0) continue;  // all keys of this block lie beyond kv_len
    load_block<T>(t, first, num_keys, padded, keys, values);
    multiply(queries, padded, keys, t.block_kv, logits, t.block_kv, rows, t.block_kv, t.head_dim,
             false);
    for (int64_t i = 0; i < t.num_q; ++i) {
      const float decay =
          softmax_row(logits + i * t.block_kv, num_keys, t.block_kv, row_max[i], row_sum[i]);
      for (int64_t d = 0; d < padded; ++d) output[i * padded + d] *= decay;
    }
    multiply(logits, t.block_kv, values, padded, output, padded, rows, padded, num_keys, true);
  }
  for (int64_t i = 0; i < t.num_q; ++i) {
    T* const out = static_cast<T*>(t.out) + i * t.out_token;
    const bool has_keys =
        row_max[i] != -std::numeric_limits<float>::infinity() || row_sum[i] != 0.0f;
    for (int64_t d = 0; d < t.head_dim; ++d) {
      from_float(has_keys ? output[i * padded + d] / row_sum[i] : 0.0f, out[d]);
    }
  }
}

void run_any_type(const Tile& tile) {
  with_type(static_cast<DType>(tile.dtype), [&](auto type) { run_tile<decltype(type)>(tile); });
}

}  // namespace

const TileKernel kScalarTile = {run_any_type, scratch_bytes, 1000000, nullptr,
                                nullptr,      nullptr,       nullptr};

}  // namespace rapid3rt
