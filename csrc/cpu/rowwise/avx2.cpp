// SPDX-License-Identifier: Apache-2.0
// Rows on AVX2 and F16C.
#include <immintrin.h>

#include "bfloat16.h"
#include "rowwise/spans.h"

namespace rapid3rt {
namespace {

struct Lanes256 {
  struct Vec {
    __m256 low, high;
  };
  static constexpr int kSums = 4;

  static Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static __m128i load_eight(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
  }
  static __m256 widen(BFloat16, __m128i x) { return widen_bfloat16(x); }
  static __m256 widen(Float16, __m128i x) { return _mm256_cvtph_ps(x); }
  template <class T>
  static Vec load(const T* p) {
    return {widen(T{}, load_eight(p)), widen(T{}, load_eight(p + 8))};
  }

  static __m256i narrow(BFloat16, Vec x) {
    const __m256i packed = _mm256_packus_epi32(bfloat16_words(x.low), bfloat16_words(x.high));
    return _mm256_permute4x64_epi64(packed, 0xd8);  // packing works within halves
  }
  static __m256i narrow(Float16, Vec x) {
    return _mm256_set_m128i(_mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
  }

  static void store(float* p, Vec x) {
    _mm256_storeu_ps(p, x.low);
    _mm256_storeu_ps(p + 8, x.high);
  }
  template <class T>
  static void store(T* p, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(T{}, x));
  }

  static void stream(float* p, Vec x) {
    _mm256_stream_ps(p, x.low);
    _mm256_stream_ps(p + 8, x.high);
  }
  template <class T>
  static void stream(T* p, Vec x) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(T{}, x));
  }
  template <class T>
  static void stream(T* p, Vec x, Vec y) {
    stream(p, x);
    stream(p + kLanes, y);
  }
  static void fence() { _mm_sfence(); }

  static Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Vec set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Vec add(Vec a, Vec b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
  }
  static Vec sub(Vec a, Vec b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
  }
  static Vec mul(Vec a, Vec b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
  }
  static Vec div(Vec a, Vec b) {
    return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
  }
  static Vec abs(Vec x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
  }

  static Vec keep(Vec x, int64_t n) {
    const __m256i count = _mm256_set1_epi32(static_cast<int>(n));
    const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i high = _mm256_add_epi32(low, _mm256_set1_epi32(8));
    return {_mm256_and_ps(x.low, _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, low))),
            _mm256_and_ps(x.high, _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, high)))};
  }

  static float sum(Vec x) {
    const __m256 eight = _mm256_add_ps(x.low, x.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  static float inverse_sqrt(float x) { return 1.0f / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }
};

}  // namespace

const RowKernels kAvx2Rows = make_row_kernels<Lanes256>();

}  // namespace rapid3rt
