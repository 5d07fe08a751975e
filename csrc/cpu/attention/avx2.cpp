// SPDX-License-Identifier: Apache-2.0
// Float arithmetic for all types on AVX2, FMA and F16C.
#include "attention/vectors256.h"

namespace rapid3rt {
const TileKernel kAvx2Tile = {
    run_float<Vectors256>,          flash_scratch_bytes,   6000000, nullptr, nullptr,
    packed_float_bytes<Vectors256>, pack_float<Vectors256>};

}  // namespace rapid3rt
