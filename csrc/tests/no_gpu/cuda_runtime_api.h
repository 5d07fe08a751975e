// SPDX-License-Identifier: Apache-2.0
// What host code of the CUDA module calls, for tests on machines without the toolkit: two devices
// whose memory is the host's.
#pragma once

#include <cstddef>
#include <cstring>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101 };
using cudaStream_t = void*;

inline int current_device = 0;

inline cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid device ordinal";
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t num_bytes, cudaStream_t) {
  std::memset(to, value, num_bytes);
  return cudaSuccess;
}
