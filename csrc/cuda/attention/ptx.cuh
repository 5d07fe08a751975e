// SPDX-License-Identifier: Apache-2.0
// The machine that Sm80Attention is written over, on a GPU: one PTX instruction each.
#pragma once

#include <cstdint>

#include "rapid3rt/dtype.h"

namespace rapid3rt::cuda {

struct PtxMachine {
  using Chunk = uint4;

  static __device__ __forceinline__ uint32_t thread() { return threadIdx.x; }

  // The same number, of which the compiler knows nothing.
  static __device__ __forceinline__ uint32_t opaque(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
  }

  static __device__ __forceinline__ uint32_t cta() { return blockIdx.x; }
  static __device__ __forceinline__ uint32_t num_ctas() { return gridDim.x; }

  // There is no other shared memory, so the base is as aligned as it says.
  static __device__ __forceinline__ uint32_t shared_base() {
    extern __shared__ __align__(1024) unsigned char memory[];
    return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  }

  static __device__ __forceinline__ void sync() { __syncthreads(); }
  static __device__ __forceinline__ void sync_warp() { __syncwarp(); }

  static __device__ __forceinline__ uint32_t atomic_increment(uint32_t* counter) {
    return atomicAdd(counter, 1u);
  }

  // Past the first-level cache: a CTA reads a key once.
  static __device__ __forceinline__ void cp_async(uint32_t to, const void* from, int num_bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(num_bytes)
                 : "memory");
  }
  static __device__ __forceinline__ void commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  static __device__ __forceinline__ void wait_all_but_one() {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  }

  static __device__ __forceinline__ void ldmatrix(uint32_t (&to)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  }
  static __device__ __forceinline__ void ldmatrix_trans(uint32_t (&to)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  }

  // c += a b
  template <class T>
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);

  // Two floats as one word, the first in its low half.
  template <class T>
  static __device__ __forceinline__ uint32_t pack(float low, float high);

  // Relative error about 2^-22; exactly 1 at 0 and 0 at -inf.
  static __device__ __forceinline__ float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  static __device__ __forceinline__ float log2(float x) { return log2f(x); }
  static __device__ __forceinline__ float max(float a, float b) { return fmaxf(a, b); }
  static __device__ __forceinline__ float fma(float a, float b, float c) { return fmaf(a, b, c); }
  // Rounded one by one: plain operators would be contracted.
  static __device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
  static __device__ __forceinline__ float sub(float a, float b) { return __fsub_rn(a, b); }

  // Over the four lanes that hold a row.
  static __device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
  }
  static __device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  }

  static __device__ __forceinline__ void store_word(uint32_t to, uint32_t value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
  }
  static __device__ __forceinline__ uint32_t load_word(uint32_t from) {
    uint32_t value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(from) : "memory");
    return value;
  }
  static __device__ __forceinline__ uint4 load_chunk(uint32_t from) {
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(from)
                 : "memory");
    return value;
  }
  static __device__ __forceinline__ void store_global(void* to, uint4 value) {
    *static_cast<uint4*>(to) = value;
  }
};

#define R3_MMA(TYPE)                                                  \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE \
               ".f32 {%0, %1, %2, %3}, "                              \
               "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"        \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

template <>
__device__ __forceinline__ void PtxMachine::mma<bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                          uint32_t b0, uint32_t b1) {
  R3_MMA("bf16");
}
template <>
__device__ __forceinline__ void PtxMachine::mma<float16>(float (&c)[4], const uint32_t (&a)[4],
                                                         uint32_t b0, uint32_t b1) {
  R3_MMA("f16");
}
#undef R3_MMA

template <>
__device__ __forceinline__ uint32_t PtxMachine::pack<bfloat16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
__device__ __forceinline__ uint32_t PtxMachine::pack<float16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

}  // namespace rapid3rt::cuda
