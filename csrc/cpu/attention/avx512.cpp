// SPDX-License-Identifier: Apache-2.0
// Float arithmetic for all types on AVX-512.
#include "attention/vectors512.h"

namespace rapid3rt {

const TileKernel kAvx512Tile = {
    run_float<Vectors512>,          flash_scratch_bytes,   12000000, nullptr, nullptr,
    packed_float_bytes<Vectors512>, pack_float<Vectors512>};

}  // namespace rapid3rt
