// SPDX-License-Identifier: Apache-2.0
// Vectors of elements: one access of 16 bytes (or 8) where addresses allow it, else element by
// element, with the same elements in the same lanes, so that an address never changes a sum.
// Arithmetic is rounded after each operation (__fmul_rn and its like are never contracted): the
// bits are those of the reference whatever the flags of the compiler.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "host_device.h"
#include "rapid3rt/dtype.h"

namespace rapid3rt::cuda {

// Elements as they lie in memory, two to a word where they have 16 bits.
template <int kWords>
struct alignas(4 * kWords) Pack {
  uint32_t word[kWords];
};

template <class T, int kWords = 4>
constexpr int kLanes = 4 * kWords / static_cast<int>(sizeof(T));

// kNone: read once, past the first-level cache, and never what the kernel writes.
enum class Reuse { kNone, kCached };

#ifdef __CUDACC__
__device__ __forceinline__ Pack<4> read_once(const Pack<4>* x) {
  Pack<4> p;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(p.word[0]), "=r"(p.word[1]), "=r"(p.word[2]), "=r"(p.word[3])
               : "l"(x));
  return p;
}
__device__ __forceinline__ Pack<2> read_once(const Pack<2>* x) {
  Pack<2> p;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(p.word[0]), "=r"(p.word[1])
               : "l"(x));
  return p;
}
__device__ __forceinline__ float2 widen_pair(uint32_t word, float16) {
  float2 pair;
  asm("{.reg .f16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.f32.f16 %0, low;\n"
      "cvt.f32.f16 %1, high;}"
      : "=f"(pair.x), "=f"(pair.y)
      : "r"(word));
  return pair;
}
__device__ __forceinline__ uint32_t narrow_pair(float2 pair, float16) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(pair.y), "f"(pair.x));
  return word;
}
__device__ __forceinline__ uint32_t narrow_pair(float2 pair, bfloat16) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(pair.y), "f"(pair.x));
  return word;
}
#else  // a CPU test
template <int kWords>
Pack<kWords> read_once(const Pack<kWords>* x) {
  return *x;
}
inline float2 widen_pair(uint32_t word, float16) {
  return {to_float(float16{static_cast<uint16_t>(word)}),
          to_float(float16{static_cast<uint16_t>(word >> 16)})};
}
template <class T>
uint32_t narrow_pair(float2 pair, T) {
  T low, high;
  from_float(pair.x, low);
  from_float(pair.y, high);
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}
#endif
__device__ __forceinline__ float2 widen_pair(uint32_t word, bfloat16) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

__device__ __forceinline__ uint32_t raw_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint32_t raw_bits(bfloat16 x) { return x.bits; }
__device__ __forceinline__ uint32_t raw_bits(float16 x) { return x.bits; }
__device__ __forceinline__ void set_bits(float& x, uint32_t bits) { x = __uint_as_float(bits); }
__device__ __forceinline__ void set_bits(bfloat16& x, uint32_t bits) {
  x.bits = static_cast<uint16_t>(bits);
}
__device__ __forceinline__ void set_bits(float16& x, uint32_t bits) {
  x.bits = static_cast<uint16_t>(bits);
}

// The n elements at x; lanes from n on are 0. kAligned: x is a multiple of the pack, and n is 0 or
// all of its lanes.
template <bool kAligned, int kWords = 4, Reuse kReuse = Reuse::kNone, class T>
__device__ __forceinline__ Pack<kWords> load(const T* x, int n) {
  constexpr int kAll = kLanes<T, kWords>;
  Pack<kWords> p = {};
  if constexpr (kAligned) {
    const auto* const from = reinterpret_cast<const Pack<kWords>*>(x);
    if (n > 0) p = kReuse == Reuse::kNone ? read_once(from) : *from;
  } else {
#pragma unroll
    for (int i = 0; i < kAll; ++i) {
      const uint32_t bits = i < n ? raw_bits(x[i]) : 0;
      if constexpr (sizeof(T) == 4) {
        p.word[i] = bits;
      } else {
        p.word[i / 2] |= bits << i % 2 * 16;
      }
    }
  }
  return p;
}

template <bool kAligned, int kWords = 4, class T>
__device__ __forceinline__ void store(T* out, const Pack<kWords>& p, int n) {
  if constexpr (kAligned) {
    if (n > 0) *reinterpret_cast<Pack<kWords>*>(out) = p;
  } else {
#pragma unroll
    for (int i = 0; i < kLanes<T, kWords>; ++i) {
      if (i >= n) continue;
      if constexpr (sizeof(T) == 4) {
        set_bits(out[i], p.word[i]);
      } else {
        set_bits(out[i], p.word[i / 2] >> i % 2 * 16 & 0xffffu);
      }
    }
  }
}

template <class T, int kWords>
__device__ __forceinline__ void widen(const Pack<kWords>& p, float (&x)[kLanes<T, kWords>]) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(p.word[i]);
    } else {
      const float2 pair = widen_pair(p.word[i], T{});
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
}

template <class T, int kWords = 4>
__device__ __forceinline__ Pack<kWords> narrow(const float (&x)[kLanes<T, kWords>]) {
  Pack<kWords> p;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if constexpr (sizeof(T) == 4) {
      p.word[i] = __float_as_uint(x[i]);
    } else {
      p.word[i] = narrow_pair({x[2 * i], x[2 * i + 1]}, T{});
    }
  }
  return p;
}

__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float sub(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float div(float a, float b) { return __fdiv_rn(a, b); }

}  // namespace rapid3rt::cuda
