// SPDX-License-Identifier: Apache-2.0
// Rows on AVX-512.
#include "rowwise/lanes512.h"

namespace rapid3rt {

const RowKernels kAvx512Rows = make_row_kernels<Lanes512<Rounding512>>();

}  // namespace rapid3rt
