// SPDX-License-Identifier: Apache-2.0
// The instruction sets that kernels are written for, and which of them this machine has. Ascending:
// a machine that has one has those before it.
#pragma once

namespace rapid3rt {

enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

constexpr int kNumIsas = 5;
constexpr const char* kIsaNames[kNumIsas] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx"};

// The best that processor, operating system and this build offer together. Asks the kernel once for
// the AMX tile registers; where it refuses, the answer is the set before.
Isa best_isa();

// The set whose kernels run: the best, unless one was forced, which may be the best too.
Isa current_isa();
bool is_forced();
void force_isa(Isa isa);
void unforce_isa();

// Whether attention is faster with sums of products of bfloat16 pairs than with floats. Not on
// Intel's processors, as measured on one with AMX.
bool has_fast_dots();

}  // namespace rapid3rt
