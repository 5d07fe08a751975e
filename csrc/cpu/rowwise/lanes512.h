// SPDX-License-Identifier: Apache-2.0
// Sixteen lanes on AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include "bfloat16.h"
#include "rowwise/spans.h"

namespace rapid3rt {
namespace {

// Integer arithmetic.
struct Rounding512 {
  static __m256i to_bfloat16(__m512 x) { return rapid3rt::to_bfloat16(x); }
  static __m512i to_bfloat16(__m512 x, __m512 y) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(to_bfloat16(x)), to_bfloat16(y), 1);
  }
};

template <class Rounding>
struct Lanes512 {
  using Vec = __m512;
  static constexpr int kSums = 8;

  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static Vec load(const BFloat16* p) {
    return widen_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Vec load(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  static __m256i narrow(BFloat16, Vec x) { return Rounding::to_bfloat16(x); }
  static __m256i narrow(Float16, Vec x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
  static __m512i narrow(BFloat16, Vec x, Vec y) { return Rounding::to_bfloat16(x, y); }
  static __m512i narrow(Float16, Vec x, Vec y) {
    const __m512i low = _mm512_castsi256_si512(narrow(Float16{}, x));
    return _mm512_inserti64x4(low, narrow(Float16{}, y), 1);
  }

  static void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
  template <class T>
  static void store(T* p, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(T{}, x));
  }

  static void stream(float* p, Vec x) { _mm512_stream_ps(p, x); }
  template <class T>
  static void stream(T* p, Vec x) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(T{}, x));
  }
  template <class T>
  static void stream(T* p, Vec x, Vec y) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow(T{}, x, y));
  }
  static void fence() { _mm_sfence(); }

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec set1(float x) { return _mm512_set1_ps(x); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static Vec abs(Vec x) { return _mm512_abs_ps(x); }

  static Vec keep(Vec x, int64_t n) {
    return _mm512_maskz_mov_ps(static_cast<__mmask16>((1u << n) - 1), x);
  }

  static float sum(Vec x) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  static float inverse_sqrt(float x) { return 1.0f / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }
};

}  // namespace
}  // namespace rapid3rt
