// SPDX-License-Identifier: Apache-2.0
#include "sm80.cuh"

namespace rapid3rt::cuda {

void attend_sm80_d128_bf16(const AttentionCall& call, const Launch& launch) {
  attend_sm80<bfloat16, 128>(call, launch);
}

}  // namespace rapid3rt::cuda
