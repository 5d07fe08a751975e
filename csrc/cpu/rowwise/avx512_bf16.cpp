// SPDX-License-Identifier: Apache-2.0
// Rows on AVX-512 with the conversion of its BF16 extension: half the work of rounding.
#include "rowwise/lanes512.h"

namespace rapid3rt {
namespace {

struct RoundingBf16 {
  // The instruction takes subnormal numbers for 0 and keeps the payload of NaN: those are rare and
  // go the other way, for the same bits everywhere.
  static constexpr int kNanOrSubnormal = 0xa1;
  static __m256i to_bfloat16(__m512 x) {
    if (_mm512_fpclass_ps_mask(x, kNanOrSubnormal) != 0) return Rounding512::to_bfloat16(x);
    return (__m256i)_mm512_cvtneps_pbh(x);
  }
  static __m512i to_bfloat16(__m512 x, __m512 y) {
    const __mmask16 rare = _mm512_fpclass_ps_mask(x, kNanOrSubnormal);
    if ((rare | _mm512_fpclass_ps_mask(y, kNanOrSubnormal)) != 0) {
      return Rounding512::to_bfloat16(x, y);
    }
    return (__m512i)_mm512_cvtne2ps_pbh(y, x);
  }
};

}  // namespace

const RowKernels kAvx512Bf16Rows = make_row_kernels<Lanes512<RoundingBf16>>();

}  // namespace rapid3rt
