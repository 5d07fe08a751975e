// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <atomic>
#include <initializer_list>

#ifdef RAPID3RT_AVX2
#include <cpuid.h>
#endif
#if defined(RAPID3RT_AMX) && !defined(RAPID3RT_AMX_EMULATED)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rapid3rt {
namespace {

#ifdef RAPID3RT_AVX2
struct Registers {
  unsigned a, b, c, d;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r{};
  if (__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d) == 0) r = {};
  return r;
}

bool has_bits(unsigned value, std::initializer_list<int> bits) {
  for (const int bit : bits) {
    if ((value >> bit & 1) == 0) return false;
  }
  return true;
}

// Registers that the operating system saves; 0 where it saves none.
unsigned saved_registers() {
  if (!has_bits(cpuid(1, 0).c, {27})) return 0;  // osxsave
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

[[maybe_unused]] bool tiles_permitted() {
#if !defined(RAPID3RT_AMX)
  return false;
#elif defined(RAPID3RT_AMX_EMULATED)
  return true;
#else
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  const unsigned features = cpuid(7, 0).d;
  return has_bits(features, {22, 24}) &&  // amx-bf16, amx-tile
         has_bits(saved_registers(), {17, 18}) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}

Isa detect() {
  const unsigned saved = saved_registers();
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0);
  const bool avx2 = has_bits(saved, {1, 2}) && has_bits(one.c, {12, 28, 29}) &&  // fma, avx, f16c
                    has_bits(seven.b, {5});
  if (!avx2) return Isa::kScalar;
#ifdef RAPID3RT_AVX512
  const bool avx512 = has_bits(saved, {5, 6, 7}) && has_bits(seven.b, {16, 17, 30, 31});
  if (!avx512) return Isa::kAvx2;  // f, dq, bw, vl
#ifdef RAPID3RT_AVX512_BF16
  if (!has_bits(cpuid(7, 1).a, {5})) return Isa::kAvx512;
  return tiles_permitted() ? Isa::kAmx : Isa::kAvx512Bf16;
#else
  return Isa::kAvx512;
#endif
#else
  return Isa::kAvx2;
#endif
}
bool is_intel() {
  const Registers vendor = cpuid(0, 0);
  return vendor.b == 0x756e6547 && vendor.d == 0x49656e69 && vendor.c == 0x6c65746e;
}
#else
Isa detect() { return Isa::kScalar; }
bool is_intel() { return false; }
#endif

constexpr int kUnforced = -1;
std::atomic<int> forced{kUnforced};

}  // namespace

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa current_isa() {
  const int isa = forced.load(std::memory_order_relaxed);
  return isa == kUnforced ? best_isa() : static_cast<Isa>(isa);
}

bool is_forced() { return forced.load(std::memory_order_relaxed) != kUnforced; }

bool has_fast_dots() {
  static const bool fast = !is_intel();
  return fast;
}

void force_isa(Isa isa) { forced.store(static_cast<int>(isa), std::memory_order_relaxed); }
void unforce_isa() { forced.store(kUnforced, std::memory_order_relaxed); }

}  // namespace rapid3rt
