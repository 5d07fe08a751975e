// SPDX-License-Identifier: Apache-2.0
// The kernel around Sm80Attention, and how it is launched: as many CTAs as fit, each taking tiles.
#pragma once

#include <algorithm>
#include <atomic>

#include "launchers.h"
#include "ptx.cuh"
#include "sm80.h"

namespace rapid3rt::cuda {

// At least two CTAs per SM, so that one has work while the other waits: 255 registers a thread.
// Three, 168 registers, fit the smallest tile alone; at head dim 128 its output and queries spill
// then.
template <class T, int kDim, int kBlock>
__global__ void __launch_bounds__(Sm80Attention<PtxMachine, T, kDim, kBlock>::kThreads,
                                  kDim + kBlock == 128 ? 3 : 2)
    attention_sm80(const __grid_constant__ AttentionCall call) {
  Sm80Attention<PtxMachine, T, kDim, kBlock>(call).run();
}

// CTAs of a kernel that a device holds at once. Asked once per device and kernel, where the kernel
// is allowed its shared memory too; threads that ask at the same time get the same answer.
template <auto kKernel, int kThreads, int kSharedBytes>
int resident_ctas(int device) {
  constexpr int kKnown = 64;
  static std::atomic<int> known[kKnown];
  if (device < kKnown && known[device] != 0) return known[device];
  constexpr const char* kWhat = "block_sparse_attention";
  const auto kernel = reinterpret_cast<const void*>(kKernel);
  int most = 0, num_sms = 0, per_sm = 0;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), kWhat);
  check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device), kWhat);
  R3_CHECK(kSharedBytes <= most, "block_sparse_attention needs ", kSharedBytes,
           " bytes of shared memory per block, device ", device, " has ", most,
           "; use backend 'flex' or 'reference'");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
        kWhat);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, kThreads, kSharedBytes),
        kWhat);
  const int ctas = num_sms * std::max(per_sm, 1);
  if (device < kKnown) known[device] = ctas;
  return ctas;
}

template <class T, int kDim, int kBlock>
void launch_block(const AttentionCall& call, const Launch& launch) {
  using Kernel = Sm80Attention<PtxMachine, T, kDim, kBlock>;
  constexpr auto kKernel = attention_sm80<T, kDim, kBlock>;
  const int resident =
      resident_ctas<kKernel, Kernel::kThreads, Kernel::kSharedBytes>(launch.device);
  const uint32_t ctas = std::min(call.num_items, static_cast<uint32_t>(resident));
  kKernel<<<ctas, Kernel::kThreads, Kernel::kSharedBytes, launch.stream>>>(call);
  check(cudaGetLastError(), "block_sparse_attention");
}

template <class T, int kDim>
void attend_sm80(const AttentionCall& call, const Launch& launch) {
  if (call.params.block_q == 64) return launch_block<T, kDim, 64>(call, launch);
  launch_block<T, kDim, 128>(call, launch);
}

}  // namespace rapid3rt::cuda
