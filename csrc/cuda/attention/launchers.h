// SPDX-License-Identifier: Apache-2.0
// The kernels of attention, as the dispatcher sees them: one launcher per unit.
#pragma once

#include "../launch.h"
#include "work.h"

namespace rapid3rt::cuda {

// block_q = block_kv = 64 or 128. Asynchronous; the counter is zero already.
using AttentionLauncher = void (*)(const AttentionCall& call, const Launch& launch);

void attend_sm80_d64_bf16(const AttentionCall& call, const Launch& launch);
void attend_sm80_d64_fp16(const AttentionCall& call, const Launch& launch);
void attend_sm80_d128_bf16(const AttentionCall& call, const Launch& launch);
void attend_sm80_d128_fp16(const AttentionCall& call, const Launch& launch);

}  // namespace rapid3rt::cuda
