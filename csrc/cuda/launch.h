// SPDX-License-Identifier: Apache-2.0
// Where a call runs: device and stream, set for the call and put back, and its errors told by name.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "rapid3rt/error.h"

namespace rapid3rt::cuda {

struct Launch {
  int device;
  cudaStream_t stream;
};

// What the device or the driver refuses is no wrong value of the caller's: RuntimeError in Python.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a launch error is told once and does not stick
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes the call's device the current one and the old one current again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace rapid3rt::cuda
