// SPDX-License-Identifier: Apache-2.0
// Vectors of 8 floats: AVX2, FMA and F16C.
#pragma once

#include "attention/flash.h"
#include "bfloat16.h"

namespace rapid3rt {
namespace {

struct Vectors256 {
  using Vec = __m256;
  static constexpr int64_t kLanes = 8;
  static constexpr int kRows =
      4;  // sums of kRows x 2 vectors, and their operands, fill the registers

  static Vec load(const Word* p) { return _mm256_loadu_ps(p); }
  static void store(Word* p, Vec x) { _mm256_storeu_ps(p, x); }
  static Vec set1(float x) { return _mm256_set1_ps(x); }
  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

  static Vec zero_where_lowest(Vec x) {
    return _mm256_and_ps(x, _mm256_cmp_ps(x, set1(-__builtin_inff()), _CMP_NEQ_UQ));
  }
  static Vec inverse_or_zero(Vec x) {
    const Vec nonzero = _mm256_cmp_ps(x, zero(), _CMP_NEQ_UQ);
    return _mm256_and_ps(_mm256_div_ps(set1(1.0f), x), nonzero);
  }

  // 0 below -126, where the power is no normal number.
  template <int kDegree>
  static Vec exp2(Vec x) {
    const Vec n = _mm256_floor_ps(x), r = sub(x, n);
    Vec y = set1(Exp2<kDegree>::kCoef[kDegree - 1]);
    for (int i = kDegree - 2; i >= 0; --i) y = fma(y, r, set1(Exp2<kDegree>::kCoef[i]));
    y = fma(y, r, set1(1.0f));
    const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), power));
    return _mm256_andnot_ps(_mm256_cmp_ps(x, set1(-126.0f), _CMP_LT_OQ), y);
  }

  static void store_low(Word* p, Vec x) { _mm_storeu_ps(p, _mm256_castps256_ps128(x)); }
  static void store_high(Word* p, Vec x) { _mm_storeu_ps(p, _mm256_extractf128_ps(x, 1)); }
  static void store_words(Word* p, int64_t, Vec x) { store(p, x); }

  // The head dim is a multiple of 8: rows are read and written in whole vectors.
  template <int kType>
  static Vec load_as(const char* row, int64_t d, int64_t) {
    if (kType == kFloat32) return load(reinterpret_cast<const Word*>(row) + d);
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 2 * d));
    if (kType == kFloat16) return _mm256_cvtph_ps(x);
    return widen_bfloat16(x);
  }

  static __m128i to_bfloat16(Vec x) {
    const __m256i words = bfloat16_words(x);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }

  template <int kType>
  static void store_as(char* row, int64_t d, int64_t, Vec x) {
    if (kType == kFloat32) return store(reinterpret_cast<Word*>(row) + d, x);
    const __m128i half =
        kType == kBFloat16 ? to_bfloat16(x) : _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row + 2 * d), half);
  }

  static void transpose(Vec (&x)[8]) {
    Vec a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
      a[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
      a[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      for (int j = 0; j < 2; ++j) {
        b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
        b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
      }
    }
    for (int c = 0; c < 4; ++c) {
      x[c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
      x[4 + c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
    }
  }
};

}  // namespace
}  // namespace rapid3rt
