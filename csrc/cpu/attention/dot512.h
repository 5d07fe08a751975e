// SPDX-License-Identifier: Apache-2.0
// Products of bfloat16 pairs summed in float: AVX-512 BF16.
#pragma once

#include "attention/vectors512.h"

namespace rapid3rt {
namespace {

struct DotProducts {
  using V = Vectors512;
  using Vec = V::Vec;
  static constexpr int kPair = 2, kType = kBFloat16;

  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
  static Vec negate(Vec x) { return _mm512_xor_ps(x, signs()); }
  static Vec signs() {
    return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(0x80008000)));
  }
  static Vec load_words(const char* row, int64_t word, int64_t n) {
    return _mm512_maskz_loadu_ps(V::first(n), row + 4 * word);
  }

  static void load_row(Word* to, const char* row, int64_t dim) {
    __builtin_memcpy(to, row, static_cast<size_t>(2 * dim));
  }

  // n channels from d on of two rows, paired; no odd one is zeros.
  static Vec load_values(const char* even, const char* odd, int64_t d, int64_t n) {
    const __m512i low = widen(even + 2 * d, n);
    const __m512i high = odd == nullptr ? _mm512_setzero_si512() : widen(odd + 2 * d, n);
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  static __m512i widen(const char* from, int64_t n) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(V::first(n), from));
  }

  // Words of an even and an odd number each.
  static Vec round_pairs(Vec even, Vec odd) {
    // clang-format off
    alignas(64) static constexpr uint16_t kInterleave[32] = {
        0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    // clang-format on
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), both));
  }

  // Weights of two keys become one row of words. Their sum is taken before they are rounded.
  static void make_weights(Word* logits, int64_t num_keys, Vec scale, const Vec (&base)[kVectors],
                           Vec (&sum)[kVectors]) {
    for (int64_t i = 0; i < num_keys; i += 2) {
      for (int c = 0; c < kVectors; ++c) {
        const Word* const from = logits + (i * kVectors + c) * V::kLanes;
        const Vec even = V::exp2<4>(V::sub(V::mul(V::load(from), scale), base[c]));
        Vec odd = V::zero();
        if (i + 1 < num_keys) {
          odd = V::exp2<4>(V::sub(V::mul(V::load(from + kVectors * V::kLanes), scale), base[c]));
        }
        sum[c] = V::add(sum[c], V::add(even, odd));
        V::store(logits + (i / 2 * kVectors + c) * V::kLanes, round_pairs(even, odd));
      }
    }
  }
};

}  // namespace
}  // namespace rapid3rt
