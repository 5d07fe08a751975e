// SPDX-License-Identifier: Apache-2.0
// Puts a kernel on the caller's stream; the device is the current one already.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "launch.h"

namespace rapid3rt::cuda {

template <class... Expected, class... Given>
void start(const char* name, void (*kernel)(Expected...), uint32_t grid, dim3 block,
           const Launch& launch, Given&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = block;
  config.stream = launch.stream;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Given>(arguments)...), name);
}

}  // namespace rapid3rt::cuda
