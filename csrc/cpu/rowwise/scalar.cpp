// SPDX-License-Identifier: Apache-2.0
// Rows in portable C++; the compiler makes of it what the base instruction set offers.
#include <cmath>

#include "rapid3rt/dtype.h"
#include "rowwise/spans.h"

namespace rapid3rt {
namespace {

struct LanesScalar {
  struct Vec {
    float lane[kLanes];
  };
  static constexpr int kSums = 1;

  static float widen(float x) { return x; }
  static float widen(BFloat16 x) { return to_float(bfloat16{x.bits}); }
  static float widen(Float16 x) { return to_float(float16{x.bits}); }
  static void narrow(float x, float& out) { out = x; }
  static void narrow(float x, BFloat16& out) {
    bfloat16 rounded;
    from_float(x, rounded);
    out.bits = rounded.bits;
  }
  static void narrow(float x, Float16& out) {
    float16 rounded;
    from_float(x, rounded);
    out.bits = rounded.bits;
  }

  template <class Lane>
  static Vec each(Lane lane) {
    Vec x;
    for (int i = 0; i < kLanes; ++i) x.lane[i] = lane(i);
    return x;
  }

  template <class T>
  static Vec load(const T* p) {
    return each([&](int i) { return widen(p[i]); });
  }
  template <class T>
  static void store(T* p, Vec x) {
    for (int i = 0; i < kLanes; ++i) narrow(x.lane[i], p[i]);
  }
  template <class T>
  static void stream(T* p, Vec x) {
    store(p, x);
  }
  template <class T>
  static void stream(T* p, const Vec& x, const Vec& y) {
    store(p, x);
    store(p + kLanes, y);
  }
  static void fence() {}

  static Vec zero() { return Vec{}; }
  static Vec set1(float x) {
    return each([&](int) { return x; });
  }
  static Vec add(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Vec sub(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static Vec mul(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Vec div(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  static Vec abs(const Vec& x) {
    return each([&](int i) { return std::fabs(x.lane[i]); });
  }
  static Vec keep(const Vec& x, int64_t n) {
    return each([&](int i) { return i < n ? x.lane[i] : 0.0f; });
  }

  static float sum(Vec x) {
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) x.lane[i] += x.lane[i + half];
    }
    return x.lane[0];
  }

  static float inverse_sqrt(float x) { return 1.0f / std::sqrt(x); }
};

}  // namespace

const RowKernels kScalarRows = make_row_kernels<LanesScalar>();

}  // namespace rapid3rt
