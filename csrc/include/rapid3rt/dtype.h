// SPDX-License-Identifier: Apache-2.0
// Element types of the kernels and their exact conversion to and from float (round to nearest
// even).
#pragma once

#include <cstdint>
#include <cstring>

#include "rapid3rt/error.h"

namespace rapid3rt {

// The same numbers stand in rapid3rt/ops/native.py.
enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float to_float(float x) { return x; }

inline float to_float(bfloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }

// Branch-free, so that loops over it vectorise; subnormals go through normal floats.
inline float to_float(float16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & (0x1fu << 23);
  const uint32_t rebased = magnitude + ((127u - 15u) << 23);
  const uint32_t special = rebased + ((128u - 16u) << 23);
  const float subnormal = as_float(rebased + (1u << 23)) - as_float(113u << 23);
  uint32_t bits = exponent == (0x1fu << 23) ? special : rebased;
  bits = exponent == 0 ? as_bits(subnormal) : bits;
  return as_float(bits | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
}

inline void from_float(float value, float& out) { out = value; }

inline void from_float(float value, bfloat16& out) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded >> 16);
}

inline void from_float(float value, float16& out) {
  const uint32_t bits = as_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t magic = ((127u - 15u) + (23u - 10u) + 1u) << 23;
  const uint32_t subnormal = as_bits(as_float(magnitude) + as_float(magic)) - magic;
  const uint32_t odd = (magnitude >> 13) & 1u;
  const uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + odd) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= ((127u + 16u) << 23) ? special : half;
  out.bits = static_cast<uint16_t>(half | sign);
}

// Calls body(T{}) with the C++ type of a dtype.
template <class Body>
void with_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(bfloat16{});
    case DType::kFloat16:
      return body(float16{});
  }
  R3_CHECK(false, "dtype must be 0, 1 or 2, got ", static_cast<int32_t>(dtype));
}

}  // namespace rapid3rt
