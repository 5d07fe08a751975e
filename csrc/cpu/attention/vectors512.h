// SPDX-License-Identifier: Apache-2.0
// Vectors of 16 floats: AVX-512 F, BW, DQ and VL.
#pragma once

#include "attention/flash.h"
#include "bfloat16.h"

namespace rapid3rt {
namespace {

struct Vectors512 {
  using Vec = __m512;
  static constexpr int64_t kLanes = 16;
  static constexpr int kRows =
      8;  // sums of kRows x 2 vectors, and their operands, fill the registers

  static Vec load(const Word* p) { return _mm512_loadu_ps(p); }
  static void store(Word* p, Vec x) { _mm512_storeu_ps(p, x); }
  static Vec set1(float x) { return _mm512_set1_ps(x); }
  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

  static Vec zero_where_lowest(Vec x) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, set1(-__builtin_inff()), _CMP_NEQ_UQ), x);
  }
  static Vec inverse_or_zero(Vec x) {
    return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(x, zero(), _CMP_NEQ_UQ), set1(1.0f), x);
  }

  template <int kDegree>
  static Vec exp2(Vec x) {
    const Vec r = _mm512_reduce_ps(x, 1);  // x - floor(x)
    Vec y = set1(Exp2<kDegree>::kCoef[kDegree - 1]);
    for (int i = kDegree - 2; i >= 0; --i) y = fma(y, r, set1(Exp2<kDegree>::kCoef[i]));
    return _mm512_scalef_ps(fma(y, r, set1(1.0f)), x);
  }

  static void store_low(Word* p, Vec x) { _mm256_storeu_ps(p, _mm512_castps512_ps256(x)); }
  static void store_high(Word* p, Vec x) { _mm256_storeu_ps(p, _mm512_extractf32x8_ps(x, 1)); }

  static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

  static void store_words(Word* p, int64_t n, Vec x) { _mm512_mask_storeu_ps(p, first(n), x); }

  // n elements of a row from element d on, zeros beyond.
  template <int kType>
  static Vec load_as(const char* row, int64_t d, int64_t n) {
    if (kType == kFloat32) return _mm512_maskz_loadu_ps(first(n), row + 4 * d);
    const __m256i x = _mm256_maskz_loadu_epi16(first(n), row + 2 * d);
    return kType == kBFloat16 ? widen_bfloat16(x) : _mm512_cvtph_ps(x);
  }

  template <int kType>
  static void store_as(char* row, int64_t d, int64_t n, Vec x) {
    if (kType == kFloat32) return _mm512_mask_storeu_ps(row + 4 * d, first(n), x);
    const __m256i half =
        kType == kBFloat16 ? to_bfloat16(x) : _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
    _mm256_mask_storeu_epi16(row + 2 * d, first(n), half);
  }

  static void transpose(Vec (&x)[16]) {
    Vec a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
      a[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
      a[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      for (int j = 0; j < 2; ++j) {
        const __m512d low = _mm512_castps_pd(a[i + j]), high = _mm512_castps_pd(a[i + j + 2]);
        b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
        b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
      }
    }
    // b[4 g + c] holds, per 128-bit lane l, column 4 l + c of rows 4 g to 4 g + 3.
    for (int c = 0; c < 4; ++c) {
      const Vec low01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x44);
      const Vec high01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xee);
      const Vec low23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x44);
      const Vec high23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xee);
      x[c] = _mm512_shuffle_f32x4(low01, low23, 0x88);
      x[4 + c] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
      x[8 + c] = _mm512_shuffle_f32x4(high01, high23, 0x88);
      x[12 + c] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
    }
  }
};

}  // namespace
}  // namespace rapid3rt
