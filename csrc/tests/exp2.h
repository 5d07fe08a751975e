// SPDX-License-Identifier: Apache-2.0
// The stated error of exp2 on a vector unit, against double. Included by one unit per instruction
// set, compiled with its flags.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace rapid3rt {
namespace {

// 2^x in double: exact steps of sqrt(2), then a series whose remainder is below 1e-17.
inline double exact_exp2(double x) {
  const int64_t whole = static_cast<int64_t>(__builtin_floor(x));
  double term = 1, sum = 1;
  for (int i = 1; i < 24; ++i) {
    term *= (x - whole) * 0.69314718055994530942 / i;
    sum += term;
  }
  return __builtin_ldexp(sum, static_cast<int>(whole));
}

template <class V, int kDegree>
double exp2_one(float x) {
  float result[V::kLanes];
  V::store(result, V::template exp2<kDegree>(V::set1(x)));
  return result[0];
}

// Largest relative error on [-126, 0]; negative where a value that must be exact is not.
template <class V, int kDegree>
double exp2_error() {
  double worst = 0;
  for (int i = 0; i <= 126 * 4096; ++i) {
    const float x = -i / 4096.0f;
    const double truth = exact_exp2(x), error = exp2_one<V, kDegree>(x) / truth - 1;
    worst = error > worst ? error : (-error > worst ? -error : worst);
  }
  const double far = exp2_one<V, kDegree>(-1e30f);
  const double nan = exp2_one<V, kDegree>(__builtin_nanf(""));
  if (exp2_one<V, kDegree>(0.0f) != 1.0 || far != 0 || nan == nan) return -1;
  if (exp2_one<V, kDegree>(-__builtin_inff()) != 0.0) return -2;
  for (int i = 1; i <= 126; ++i) {  // whole powers are exact: a decay of 2^-i loses nothing
    if (exp2_one<V, kDegree>(static_cast<float>(-i)) != exact_exp2(-i)) return -3;
  }
  return worst;
}

}  // namespace
}  // namespace rapid3rt
