// SPDX-License-Identifier: Apache-2.0
#include "rowwise/choose.h"

#ifdef RAPID3RT_AVX2
#include <cpuid.h>
#endif

#include <algorithm>

#include "isa.h"

namespace rapid3rt {
namespace {

// Size of the third-level cache, as the processor tells it: sysconf answers 384 MB on a machine of
// 32.
int64_t cache_bytes() {
#ifdef RAPID3RT_AVX2
  for (const unsigned leaf : {0x4u, 0x8000001du}) {  // Intel, AMD
    unsigned a, b, c, d;
    if (__get_cpuid_count(leaf, 3, &a, &b, &c, &d) == 0 || (a >> 5 & 7) != 3) continue;
    const int64_t ways = (b >> 22) + 1, partitions = (b >> 12 & 0x3ff) + 1, line = (b & 0xfff) + 1;
    return ways * partitions * line * (static_cast<int64_t>(c) + 1);
  }
#endif
  return 32 * 1024 * 1024;
}

}  // namespace

const RowKernels& row_kernels() {
  [[maybe_unused]] const Isa isa = current_isa();
#ifdef RAPID3RT_AVX512_BF16
  if (isa >= Isa::kAvx512Bf16) return kAvx512Bf16Rows;
#endif
#ifdef RAPID3RT_AVX512
  if (isa >= Isa::kAvx512) return kAvx512Rows;
#endif
#ifdef RAPID3RT_AVX2
  if (isa >= Isa::kAvx2) return kAvx2Rows;
#endif
  return kScalarRows;
}

bool should_stream(const void* out, int64_t out_bytes, int64_t step, int num_threads) {
  // What a core has of a cache that many share. A virtual machine of two cores may see all of it,
  // 480 MB where measured: there streams were up to 1.4 times as fast from 12 MB on.
  constexpr int64_t kShare = 4 * 1024 * 1024;
  static const int64_t cache = cache_bytes();
  const int64_t own = std::min(cache / 2, kShare * num_threads);
  return out_bytes > own && reinterpret_cast<uintptr_t>(out) % 64 == 0 && step % 64 == 0;
}

}  // namespace rapid3rt
