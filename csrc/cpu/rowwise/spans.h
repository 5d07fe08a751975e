// SPDX-License-Identifier: Apache-2.0
// The loops of RowKernels over a policy V, sixteen floats at a time, so that every instruction set
// runs the same control flow and gives the same bits.
//
// V: Vec; load and store of float, BFloat16 and Float16 (store rounds to nearest even and keeps
// NaN), stream (past the caches, a line: one vector of floats, two of anything else; or half a
// line) and fence after the last of them; zero, set1, add, sub, mul, div, abs; keep(x, n): zeros in
// all lanes from n on; sum(x): lanes 0 to 7 plus lanes 8 to 15, then quarters, and so on;
// inverse_sqrt of one float.
#pragma once

#include <stdint.h>

#include "rowwise/kernels.h"

// Bodies of loops are called at several places; the compiler would make functions of them.
#if defined(__GNUC__)
#define R3_INLINE __attribute__((always_inline))
#else
#define R3_INLINE
#endif

namespace rapid3rt {
namespace {

// Elements as they lie in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Calls body(T{}) with the element type of a dtype number.
template <class Body>
inline auto with_element(int dtype, Body body) {
  if (dtype == 0) return body(float{});
  if (dtype == 1) return body(BFloat16{});
  return body(Float16{});
}

// How many elements a vector holds of a row: all kLanes, or at its end n of them, beyond which
// nothing is read or written. Two types, so that whole vectors get code of their own.
struct Whole {};

template <class V, class T>
R3_INLINE inline typename V::Vec load(const T* x, Whole) {
  return V::load(x);
}

template <class V, class T>
inline typename V::Vec load(const T* x, int64_t n) {
  alignas(64) T padded[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = x[i];
  return V::load(padded);
}

template <class V, class T>
R3_INLINE inline void store(T* out, typename V::Vec x, Whole, bool stream) {
  if (stream) {
    V::stream(out, x);
  } else {
    V::store(out, x);
  }
}

template <class V, class T>
inline void store(T* out, typename V::Vec x, int64_t n, bool) {
  alignas(64) T padded[kLanes];
  V::store(padded, x);
  for (int64_t i = 0; i < n; ++i) out[i] = padded[i];
}

template <class V>
R3_INLINE inline typename V::Vec keep(typename V::Vec x, Whole) {
  return x;
}

template <class V>
inline typename V::Vec keep(typename V::Vec x, int64_t n) {
  return V::keep(x, n);
}

// Calls body(j, n) for the elements of a row from j on, n: Whole or how many.
template <class Body>
R3_INLINE inline void for_lanes(int64_t width, Body body) {
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) body(j, Whole{});
  if (j < width) body(j, width - j);
}

// out[j] = value(j, n) for the elements of a row. Streams write whole lines, two vectors where
// elements are of two bytes.
template <class V, class T, class Value>
R3_INLINE inline void write_lanes(T* out, int64_t width, bool stream, Value value) {
  int64_t first = 0;
  for (constexpr int64_t kLine = 64 / sizeof(T); stream && first + kLine <= width; first += kLine) {
    if constexpr (kLine == kLanes) {
      V::stream(out + first, value(first, Whole{}));
    } else {
      V::stream(out + first, value(first, Whole{}), value(first + kLanes, Whole{}));
    }
  }
  for_lanes(width - first, [&](int64_t j, auto n) R3_INLINE {
    store<V>(out + first + j, value(first + j, n), n, stream);
  });
}

// Sum of term(j, n) over a row; lanes from n on must be 0. Four sums, so that additions overlap.
template <class V, class Term>
R3_INLINE inline float sum_lanes(int64_t width, Term term) {
  typename V::Vec a = V::zero(), b = V::zero(), c = V::zero(), d = V::zero();
  int64_t j = 0;
  for (; j + 4 * kLanes <= width; j += 4 * kLanes) {
    a = V::add(a, term(j, Whole{}));
    b = V::add(b, term(j + kLanes, Whole{}));
    c = V::add(c, term(j + 2 * kLanes, Whole{}));
    d = V::add(d, term(j + 3 * kLanes, Whole{}));
  }
  for (; j + kLanes <= width; j += kLanes) a = V::add(a, term(j, Whole{}));
  if (j < width) a = V::add(a, term(j, width - j));
  return V::sum(V::add(V::add(a, c), V::add(b, d)));
}

// A number of terms that the compiler knows; an int64_t where it cannot.
template <int64_t kCount>
struct Count {
  constexpr operator int64_t() const { return kCount; }
};

template <class Body>
inline void with_count(int64_t count, Body body) {
  if (count == 0) return body(Count<0>{});
  if (count == 1) return body(Count<1>{});
  if (count == 2) return body(Count<2>{});
  if (count == 3) return body(Count<3>{});
  body(count);
}

template <class V, class T, class C, class N>
R3_INLINE inline typename V::Vec looked_up(const LookupPiece& p, C num_terms, int64_t at, N n) {
  typename V::Vec x = load<V>(static_cast<const T*>(p.embedded) + at, n);
  for (int64_t i = 0; i < num_terms; ++i) {
    const typename V::Vec term = load<V>(static_cast<const T*>(p.terms[i]) + at, n);
    x = V::add(x, V::mul(V::set1(p.coef[i]), term));
  }
  return x;
}

// Sum of (x - mean)^2 over a row in scratch.
template <class V>
inline float squares(const float* x, int64_t width, typename V::Vec mean) {
  return sum_lanes<V>(width, [&](int64_t j, auto n) R3_INLINE {
    const typename V::Vec centred = keep<V>(V::sub(V::load(x + j), mean), n);
    return V::mul(centred, centred);
  });
}

// x: a row in scratch, total: its sum.
template <class V, class T>
inline void modulate(const float* x, float total, int64_t width, const Modulation& m, T* out,
                     bool stream) {
  using Vec = typename V::Vec;
  const float count = static_cast<float>(width);
  const Vec mean = V::set1(m.rms ? 0.0f : total / count);
  const Vec inverse = V::set1(V::inverse_sqrt(squares<V>(x, width, mean) / count + m.eps));
  const Vec one = V::set1(1.0f);
  const auto* const scale = static_cast<const T*>(m.scale);
  const auto* const shift = static_cast<const T*>(m.shift);
  const auto* const weight = static_cast<const T*>(m.weight);
  const auto* const bias = static_cast<const T*>(m.bias);
  write_lanes<V>(out, width, stream, [&](int64_t j, auto n) R3_INLINE {
    Vec y = V::mul(V::sub(V::load(x + j), mean), inverse);
    if (weight != nullptr) y = V::mul(y, load<V>(weight + j, n));
    if (bias != nullptr) y = V::add(y, load<V>(bias + j, n));
    return V::add(V::mul(y, V::add(one, load<V>(scale + j, n))), load<V>(shift + j, n));
  });
}

template <class V, class T, class C>
inline void lookup_terms(const LookupPiece& p, C num_terms) {
  T* const out = static_cast<T*>(p.out);
  if (p.modulation == nullptr) {
    write_lanes<V>(out, p.count, p.stream, [&](int64_t j, auto n) R3_INLINE {
      return looked_up<V, T>(p, num_terms, j, n);
    });
    return;
  }
  float* const row = p.scratch;
  for (int64_t first = 0; first < p.count; first += p.width) {
    const float total = sum_lanes<V>(p.width, [&](int64_t j, auto n) R3_INLINE {
      const typename V::Vec x = looked_up<V, T>(p, num_terms, first + j, n);
      V::store(row + j, x);
      return x;
    });
    modulate<V>(row, total, p.width, *p.modulation, out + first, p.stream);
  }
}

template <class V>
void lookup(const LookupPiece& p) {
  with_element(p.dtype, [&](auto type) {
    with_count(p.num_terms, [&](auto count) { lookup_terms<V, decltype(type)>(p, count); });
  });
  if (p.stream) V::fence();
}

template <class V>
void gate(const GatePiece& p) {
  with_element(p.dtype, [&](auto type) {
    using T = decltype(type);
    const T* const gate = static_cast<const T*>(p.gate);
    for (int64_t token = 0; token < p.tokens; ++token) {
      const T* const residual = static_cast<const T*>(p.residual) + token * p.width;
      const T* const y = static_cast<const T*>(p.y) + token * p.width;
      T* const out = static_cast<T*>(p.out) + token * p.width;
      write_lanes<V>(out, p.width, p.stream, [&](int64_t j, auto n) R3_INLINE {
        const auto gated = V::mul(load<V>(gate + j, n), load<V>(y + j, n));
        return V::add(load<V>(residual + j, n), gated);
      });
    }
  });
  if (p.stream) V::fence();
}

// Keeps r in all orders of an entry; `moved` and `held` receive r - old r and old r.
template <class V, class T, class N>
R3_INLINE inline void keep_orders(const StorePiece& p, int64_t j, N n, typename V::Vec r,
                                  typename V::Vec& moved, typename V::Vec& held) {
  using Vec = typename V::Vec;
  T* const entries = static_cast<T*>(p.entries) + j;
  const Vec gap = V::set1(p.gap);
  held = load<V>(entries, n);
  moved = V::sub(r, held);
  store<V>(entries, r, n, false);
  Vec value = V::div(moved, gap);  // of the order in hand
  for (int64_t order = 1; order < p.num_orders; ++order) {
    T* const entry = entries + order * p.order_stride;
    const Vec change = V::sub(value, load<V>(entry, n));
    store<V>(entry, value, n, false);
    value = V::div(change, gap);
  }
}

template <class V>
TokenStats store_token(const StorePiece& p) {
  using Vec = typename V::Vec;
  return with_element(p.dtype, [&](auto type) {
    using T = decltype(type);
    const T* const out = static_cast<const T*>(p.out);
    const T* const embedded = static_cast<const T*>(p.embedded);
    T* const entries = static_cast<T*>(p.entries);
    Vec change = V::zero(), old_size = V::zero();
    const float total = sum_lanes<V>(p.width, [&](int64_t j, auto n) R3_INLINE {
      const Vec r = V::sub(load<V>(out + j, n), load<V>(embedded + j, n));
      V::store(p.scratch + j, r);
      if (p.gap == 0.0f) {
        for (int64_t order = 0; order < p.num_orders; ++order) {
          store<V>(entries + order * p.order_stride + j, order == 0 ? r : V::zero(), n, p.stream);
        }
      } else {
        Vec moved, held;
        keep_orders<V, T>(p, j, n, r, moved, held);
        change = V::add(change, V::abs(moved));
        old_size = V::add(old_size, V::abs(held));
      }
      return r;
    });
    if (p.stream) V::fence();
    const float mean = total / static_cast<float>(p.width);
    const float spread = squares<V>(p.scratch, p.width, V::set1(mean));
    return TokenStats{mean, spread, V::sum(change), V::sum(old_size)};
  });
}

// Each column is summed token after token.
template <class V>
void block_mean(const BlockMean& p) {
  with_element(p.dtype, [&](auto type) {
    using T = decltype(type);
    using Vec = typename V::Vec;
    constexpr int64_t kColumns = V::kSums * kLanes;
    const Vec count = V::set1(static_cast<float>(p.tokens));
    const T* const x = static_cast<const T*>(p.x);
    int64_t d = 0;
    for (; d + kColumns <= p.head_dim; d += kColumns) {
      Vec sums[V::kSums];
      for (Vec& sum : sums) sum = V::zero();
      for (int64_t token = 0; token < p.tokens; ++token) {
        const T* const row = x + token * p.stride + d;
        for (int i = 0; i < V::kSums; ++i) sums[i] = V::add(sums[i], V::load(row + i * kLanes));
      }
      for (int i = 0; i < V::kSums; ++i) V::store(p.mean + d + i * kLanes, V::div(sums[i], count));
    }
    for_lanes(p.head_dim - d, [&](int64_t j, auto n) R3_INLINE {
      Vec sum = V::zero();
      for (int64_t token = 0; token < p.tokens; ++token) {
        sum = V::add(sum, load<V>(x + token * p.stride + d + j, n));
      }
      store<V>(p.mean + d + j, V::div(sum, count), n, false);
    });
  });
}

template <class V>
void scores(const float* query, const float* keys, int64_t head_dim, int64_t num_blocks,
            float* scores) {
  for (int64_t b = 0; b < num_blocks; b += kLanes) {
    typename V::Vec sum = V::zero();
    for (int64_t d = 0; d < head_dim; ++d) {
      sum = V::add(sum, V::mul(V::set1(query[d]), V::load(keys + d * num_blocks + b)));
    }
    V::store(scores + b, sum);
  }
}

template <class V>
void copy(void* out, const void* x, int64_t bytes) {
  auto* const to = static_cast<float*>(out);
  const auto* const from = static_cast<const float*>(x);
  for (int64_t j = 0; j < bytes / 4; j += kLanes) V::stream(to + j, V::load(from + j));
  V::fence();
}

template <class V>
constexpr RowKernels make_row_kernels() {
  return {lookup<V>, gate<V>, store_token<V>, block_mean<V>, scores<V>, copy<V>};
}

}  // namespace
}  // namespace rapid3rt
