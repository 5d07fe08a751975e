// SPDX-License-Identifier: Apache-2.0
// bfloat16 on AVX-512 BF16.
#include "attention/dot512.h"

namespace rapid3rt {

const TileKernel kAvx512Bf16Tile = {
    run_any_dim<DotProducts>,  flash_scratch_bytes, 24000000, nullptr, nullptr,
    packed_bytes<DotProducts>, pack<DotProducts>};

}  // namespace rapid3rt
